"""Triton's interpreter, in about half the time: for checks, which have thousands of steps."""

from __future__ import annotations

from functools import cache
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


@cache
def speed_up() -> None:
    """Have the interpreter do once what it repeats. For the whole process; nothing undoes it.

    - A launch patches `triton.language`. Triton patches it again whenever a kernel calls a function
      of ours, which takes longer than most of these functions.
    - With every value it makes the table of numpy's dtypes anew.
    """
    call, numpy_dtype = interpreter.InterpretedFunction.__call__, interpreter._get_np_dtype
    numpy_dtypes: dict[tl.dtype, Any] = {}

    def called(function: Any, *args: Any, **kwargs: Any) -> Any:
        if function.fn.__module__.startswith("triton."):
            return call(function, *args, **kwargs)
        return function.rewrite()(*args, **kwargs)

    def found(dtype: tl.dtype) -> Any:
        scalar = dtype.scalar
        if isinstance(scalar, tl.pointer_type):  # which has no hash
            return numpy_dtype(dtype)
        if scalar not in numpy_dtypes:
            numpy_dtypes[scalar] = numpy_dtype(scalar)
        return numpy_dtypes[scalar]

    interpreter.InterpretedFunction.__call__ = called
    interpreter._get_np_dtype = found

"""Triton's interpreter, in about half the time."""

from __future__ import annotations

from typing import Any

from triton.runtime.interpreter import InterpretedFunction


def patch_once_a_launch() -> None:
    """Leave `triton.language` as the launch patched it when a kernel calls a function of ours.

    Triton patches it again at each of these calls, which takes longer than the functions.
    """
    call = InterpretedFunction.__call__

    def faster(function: Any, *args: Any, **kwargs: Any) -> Any:
        if function.fn.__module__.startswith("triton."):
            return call(function, *args, **kwargs)
        return function.rewrite()(*args, **kwargs)

    InterpretedFunction.__call__ = faster

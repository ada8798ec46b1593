"""Triton's interpreter, in half the time."""

from __future__ import annotations

from typing import Any

from triton.runtime.interpreter import InterpretedFunction


def patch_once_a_launch() -> None:
    """Leave `triton.language` as the launch patched it when a kernel calls another function.

    Triton patches it again at each of these calls, which takes longer than the functions.
    """
    InterpretedFunction.__call__ = _call


def _call(function: Any, *args: Any, **kwargs: Any) -> Any:
    return function.rewrite()(*args, **kwargs)

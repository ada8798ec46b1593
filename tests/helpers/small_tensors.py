"""A parameter of each kind, small: stored formats take long in the interpreter."""

from __future__ import annotations

from cases import BLOCK, Spec

SMALL = (
    Spec("0-dim", lambda draw: draw()),
    Spec("empty", lambda draw: draw(0)),
    Spec("blocks", lambda draw: draw(2 * BLOCK + 5)),
    Spec("misaligned", lambda draw: draw(20)[1:], lambda draw: draw(19)),
    Spec("transposed", lambda draw: draw(12, 8).t(), lambda draw: draw(12, 8).t()),
)

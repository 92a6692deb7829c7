"""Arithmetic of many digits, whose exp() and pow() are the same on every machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from decimal import Context

#: Significant digits of exp() and pow(): float64 needs 17.
_DIGITS = 40


def make_context(digits: int = _DIGITS) -> Context:
    """Return a context of `decimal` that depends on nothing that the caller's program has set."""
    # Imported here because equal and linear, and --help, can do without its start-up time.
    # Its exponents reach so far that exp() and pow() underflow quietly instead of failing.
    from decimal import MAX_EMAX, MIN_EMIN, ROUND_HALF_EVEN, Context, InvalidOperation

    # What is not given here would come from the caller's decimal.DefaultContext.
    return Context(
        prec=digits,
        rounding=ROUND_HALF_EVEN,
        Emin=MIN_EMIN,
        Emax=MAX_EMAX,
        traps=[InvalidOperation],
    )

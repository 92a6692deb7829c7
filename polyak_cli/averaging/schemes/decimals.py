"""Arithmetic of many digits, whose exp() and pow() are the same on every machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from decimal import Context, Decimal

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


#: Pi, with more digits than a context has.
_PI = "3.14159265358979323846264338327950288419716939937510582"


def compute_cosine(part: Decimal, context: Context) -> Decimal:
    """Return cos(pi x) for x from 0 to 1, which `decimal` lacks, by its power series."""
    angle = context.multiply(context.create_decimal(_PI), part)
    square = context.minus(context.multiply(angle, angle))
    # The largest term is below 6, so that the sum loses one digit; the last one is below 1e-45.
    term = total = context.create_decimal(1)
    for k in range(2, 60, 2):
        term = context.divide(context.multiply(term, square), k * (k - 1))
        total = context.add(total, term)
    return total

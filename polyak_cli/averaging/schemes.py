"""Compute how much each checkpoint counts: one small function for each scheme.

A scheme gives multipliers, such as 1 for each of ten checkpoints.  An average is the sum of the
multiplied checkpoints, divided once by the sum of the multipliers.  Coefficients, such as 0.1 each,
are what people read: to multiply by them would round 1/10 before it is used.

Knows only numbers: how many checkpoints there are, and how far into the run each was saved.  Does
not know files, tensors or the command line, and needs no numpy.

The coefficients are the same to the last bit on every machine.  ``+ - * /`` are exact to the bit
wherever floats are IEEE 754, but the exp() and pow() of C libraries are not, so those two go
through `decimal`, and sums through `math.fsum`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from polyak_cli.errors import UsageError, shown, word_count

if TYPE_CHECKING:
    from decimal import Context

#: Significant digits of exp() and pow(): float64 needs 17, the differences of `power` some more.
_DIGITS = 40


@dataclass(frozen=True, slots=True)
class Parameter:
    """The number that a scheme takes: the name of its option, its default, and its range."""

    name: str
    default: float
    allowed: Callable[[float], bool]
    range: str


@dataclass(frozen=True, slots=True)
class Scheme:
    """A rule that gives coefficients: its function, and its parameter if it has one.

    ``function(positions, parameter)`` gives the multipliers, oldest first; a scheme without a
    parameter is called with 0.0.
    """

    function: Callable[[Sequence[float], float], list[float]]
    summary: str
    parameter: Parameter | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """The scheme that is used: its name, which may be ``custom``, and its parameters."""

    name: str
    parameters: Mapping[str, float]


class Mean(NamedTuple):
    """The rule of a weighted mean: ``(m_1 x_1 + m_2 x_2 + ...) / divisor``.

    Attributes:
        multipliers: one a checkpoint, oldest first, each finite and at least 0, one above 0.
        divisor: their sum, rounded once.  It is 1.0 for averages whose record has no divisor: they
            were multiplied by the coefficients themselves.
    """

    multipliers: tuple[float, ...]
    divisor: float

    @property
    def coefficients(self) -> tuple[float, ...]:
        """The share of each checkpoint: multiplier / divisor, rounded once; the sum is 1."""
        return tuple(multiplier / self.divisor for multiplier in self.multipliers)

    def scale(self) -> Mean:
        """Return the same mean with a divisor above 1/2 and at most 1, for the arithmetic.

        Both sides are scaled by one power of two, which changes no digit.  Sums of float64 near the
        maximum overflow no sooner than with coefficients, and one checkpoint is multiplied by 1.
        """
        counted = [multiplier for multiplier in self.multipliers if multiplier]
        if len(counted) == 1:  # nothing is rounded, not even the smallest float64
            return Mean(tuple(float(m > 0) for m in self.multipliers), 1.0)
        fraction, exponent = math.frexp(self.divisor)
        exponent -= fraction == 0.5  # exactly a power of two becomes 1
        scaled = tuple(math.ldexp(m, -exponent) for m in self.multipliers)
        return Mean(scaled, math.ldexp(self.divisor, -exponent))


def make_mean(multipliers: Sequence[float]) -> Mean:
    """Return the mean that divides by the sum of its multipliers.

    Args:
        multipliers: as in `Mean`.
    """
    # The sum of huge custom coefficients would overflow; a power of two scales them exactly.
    large = max(multipliers) > 2.0**900
    own = tuple(math.ldexp(m, -200) if large else m for m in multipliers)
    return Mean(own, math.fsum(own))


def coefficients(
    scheme: str | None,
    positions: Sequence[float],
    *,
    alpha: float | None = None,
    decay: float | None = None,
    sigma: float | None = None,
    custom: Sequence[float] | None = None,
) -> tuple[float, ...]:
    """Return the coefficient of each checkpoint.

    Args:
        scheme: a name in `SCHEMES`; None means equal, or ``custom`` if that is given.
        positions: one number a checkpoint, oldest first: its distance from the start of the run, in
            epochs. Only ``power`` looks at the values; they must rise then.
        alpha: e-folding age of ``exp``, in checkpoints; larger is flatter.
        decay: factor of ``ema`` for each checkpoint of age.
        sigma: relative width of ``power``, as a part of the run's length.
        custom: custom coefficients, oldest first; they are normalised.

    Returns:
        float64, oldest first, each at least 0, with the sum 1 up to rounding.

    Raises:
        UsageError: the scheme is unknown, a parameter is out of range or not the scheme's, or the
            numbers given do not fit the checkpoints.
    """
    choice = resolve(scheme, alpha=alpha, decay=decay, sigma=sigma, custom=custom)
    return compute_mean(choice, positions, custom).coefficients


def compute_mean(
    choice: Choice, positions: Sequence[float], custom: Sequence[float] | None = None
) -> Mean:
    """Return the mean of a scheme.

    Args:
        choice: from `resolve`.
        positions: as for `coefficients`.
        custom: the multipliers themselves, oldest first, if the scheme is ``custom``.

    Raises:
        UsageError: the numbers given do not fit the checkpoints.
    """
    if not positions:
        raise UsageError("there are no checkpoints; expected at least one")
    if custom is not None:
        return make_mean(_checked_custom(custom, len(positions)))
    return make_mean(
        SCHEMES[choice.name].function(positions, *(choice.parameters.values() or [0.0]))
    )


def resolve(
    scheme: str | None,
    *,
    alpha: float | None = None,
    decay: float | None = None,
    sigma: float | None = None,
    custom: Sequence[float] | None = None,
) -> Choice:
    """Return the scheme and its parameter, with defaults filled in.

    Raises:
        UsageError: as for `coefficients`, except what depends on the checkpoints.
    """
    given = {
        name: value
        for name, value in (("alpha", alpha), ("decay", decay), ("sigma", sigma))
        if value is not None
    }
    if custom is not None and scheme is not None:
        raise UsageError(
            f"--coefficients and --scheme {shown(scheme)} exclude each other: give one of them"
        )
    name = "custom" if custom is not None else scheme if scheme is not None else "equal"
    if custom is None and name not in SCHEMES:
        raise UsageError(f"unknown scheme {shown(name)!r}: choose one of {', '.join(SCHEMES)}")
    parameter = None if custom is not None else SCHEMES[name].parameter
    for option in given:
        if parameter is None or option != parameter.name:
            raise UsageError(_stray_parameter(option, name))
    if parameter is None:
        return Choice(name, {})
    value = float(given.get(parameter.name, parameter.default))
    if not parameter.allowed(value):
        raise UsageError(f"--{parameter.name} is {value}; expected {parameter.range}")
    return Choice(name, {parameter.name: value})


def effective_number(coefficients: Sequence[float]) -> float:
    """Return how many equally counted checkpoints would average noise as well: 1 / sum(c^2).

    Args:
        coefficients: normalised, in any order, not none at all.

    Raises:
        ZeroDivisionError: there are none, or all are zero.
    """
    return 1.0 / math.fsum(c * c for c in coefficients)


def gamma(sigma: float) -> float:
    """Return the exponent of the power-function EMA whose relative width is ``sigma``.

    It is the largest real root of x^3 + 7x^2 + (16 - 1/sigma^2)x + (12 - 1/sigma^2) (Karras et al.
    2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", post-hoc EMA).

    Args:
        sigma: more than 0, less than 1/sqrt(12).

    Returns:
        The exponent, at least 0; infinity where it exceeds float64 (sigma below about 1e-308).
    """
    # With x = y / sigma the root lies in (0, 1) and no term can overflow.  To the right of it the
    # cubic rises and is convex, so Newton's steps from y = 1 fall towards it and never jump over.
    b, c, d = 7.0 * sigma, 16.0 * sigma * sigma - 1.0, (12.0 * sigma * sigma - 1.0) * sigma
    y = 1.0
    while True:
        value = ((y + b) * y + c) * y + d
        slope = (3.0 * y + 2.0 * b) * y + c
        lower = y - value / slope
        if not 0.0 < lower < y:
            return y / sigma
        y = lower


def equal(positions: Sequence[float], _: float = 0.0) -> list[float]:
    """1 for each: the plain Polyak-Ruppert average of the checkpoints."""
    return [1.0] * len(positions)


def linear(positions: Sequence[float], _: float = 0.0) -> list[float]:
    """N - a for age a: 1, 2, ..., N from the oldest to the newest (the Keras tutorial's)."""
    count = len(positions)
    return [float(count - age) for age in _ages(count)]


def exp(positions: Sequence[float], alpha: float) -> list[float]:
    """e^(-a / alpha) for age a: falls by e every ``alpha`` checkpoints (the tutorial's).

    The tutorial has a + 1 in place of a, a factor common to all, which the division cancels.
    Without it the newest has exactly 1, and no alpha is so small that all would be 0.
    """
    context = _context()
    width = context.create_decimal(alpha)
    return [float(context.exp(context.divide(-age, width))) for age in _ages(len(positions))]


def ema(positions: Sequence[float], decay: float) -> list[float]:
    """decay^a for age a: the exponential moving average, debiased.

    An average started from the oldest checkpoint would count that one far too much; dividing by the
    sum of the powers, which normalising does, removes this bias (Kingma & Ba 2015, section 3).
    Equals ``exp`` with alpha = -1 / ln(decay).
    """
    context = _context()
    factor = context.create_decimal(decay)
    # 0^0 cannot come up: decay is more than 0.
    return [float(context.power(factor, age)) for age in _ages(len(positions))]


def power(positions: Sequence[float], sigma: float) -> list[float]:
    """(t_i^(g+1) - t_(i-1)^(g+1)) / t_N^(g+1), with g = gamma(sigma) and t the positions.

    The power-function EMA of a whole run, where each checkpoint represents the steps since the one
    before (Karras et al. 2024, as for `gamma`).  The oldest represents as many steps as the next
    one, but none before step 0.
    """
    _require_rising(positions)
    if len(positions) == 1:
        return [1.0]
    start = max(0.0, positions[0] - (positions[1] - positions[0]))
    context = _context()
    exponent = context.add(context.create_decimal(gamma(sigma)), 1)
    end = context.create_decimal(positions[-1])
    powers = [
        context.power(context.divide(context.create_decimal(t), end), exponent)
        for t in (start, *positions)
    ]
    return [float(context.subtract(upper, lower)) for lower, upper in pairwise(powers)]


def _ages(count: int) -> range:
    """The ages of ``count`` checkpoints, oldest first: count - 1 down to 0."""
    return range(count - 1, -1, -1)


def _context() -> Context:
    # Imported here because equal and linear, and --help, can do without its start-up time.
    # Its exponents reach so far that exp() and pow() underflow quietly instead of failing.
    from decimal import MAX_EMAX, MIN_EMIN, ROUND_HALF_EVEN, Context, InvalidOperation

    # What is not given here would come from the caller's decimal.DefaultContext.
    return Context(
        prec=_DIGITS,
        rounding=ROUND_HALF_EVEN,
        Emin=MIN_EMIN,
        Emax=MAX_EMAX,
        traps=[InvalidOperation],
    )


def _checked_custom(custom: Sequence[float], count: int) -> list[float]:
    if len(custom) != count:
        raise UsageError(
            f"--coefficients has {word_count(len(custom), 'number')}; expected {count}, one for "
            "each checkpoint, oldest first"
        )
    values = [float(value) for value in custom]
    for place, value in enumerate(values, start=1):
        if not (math.isfinite(value) and value >= 0.0):
            raise UsageError(
                f"--coefficients: number {place} is {value:g}; expected finite numbers of 0 or more"
            )
    if not any(values):
        raise UsageError("--coefficients: all numbers are 0; expected at least one above 0")
    return values


def _require_rising(positions: Sequence[float]) -> None:
    for position in positions:
        if not (math.isfinite(position) and position > 0.0):
            raise UsageError(
                f"--scheme power: a checkpoint has position {position:g}; expected finite "
                "positions above 0"
            )
    for earlier, later in pairwise(positions):
        if not earlier < later:
            raise UsageError(
                f"--scheme power: position {later:g} follows {earlier:g}; expected positions that "
                "rise from the oldest checkpoint to the newest"
            )


def _stray_parameter(option: str, name: str) -> str:
    owner = next(
        key
        for key, scheme in SCHEMES.items()
        if scheme.parameter is not None and scheme.parameter.name == option
    )
    chosen = "to --coefficients" if name == "custom" else f"to {name}"
    return f"--{option} belongs to --scheme {owner}, not {chosen}"


#: Every scheme by name; the command line's choices, defaults and help come from here.
SCHEMES: Mapping[str, Scheme] = {
    "equal": Scheme(equal, "the same for all"),
    "linear": Scheme(linear, "falling linearly with age"),
    "exp": Scheme(
        exp,
        "falling by the factor e every ALPHA checkpoints",
        Parameter("alpha", 2.0, lambda a: 0.0 < a < math.inf, "a finite number above 0"),
    ),
    "ema": Scheme(
        ema,
        "falling by the factor DECAY with each checkpoint (debiased)",
        Parameter("decay", 0.9, lambda d: 0.0 < d <= 1.0, "a number above 0 and at most 1"),
    ),
    "power": Scheme(
        power,
        "power-function EMA of relative width SIGMA",
        Parameter(
            "sigma",
            0.1,
            lambda s: s > 0.0 and 12.0 * s * s < 1.0,
            "a number above 0 and below 1/sqrt(12) = 0.288675, which would be the equal average",
        ),
    ),
}

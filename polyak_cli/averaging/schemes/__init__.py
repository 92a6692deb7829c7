"""Compute how much each checkpoint counts: one small function for each scheme.

A scheme gives multipliers, such as 1 for each of ten checkpoints.  An average is the sum of the
multiplied checkpoints, divided once by the sum of the multipliers.  Coefficients, such as 0.1 each,
are what people read: to multiply by them would round 1/10 before it is used.

Knows only numbers: how many checkpoints there are, and how far into the run each was saved.  Does
not know files, tensors or the command line, and needs no numpy.

The coefficients are the same to the last bit on every machine.  ``+ - * /`` are exact to the bit
wherever floats are IEEE 754, but the exp() and pow() of C libraries are not, so those two go
through `decimal`, and sums through `math.fsum`.

To add a scheme: a function beside its like, with its source, and a line in `SCHEMES`.  A new name
of a parameter is an option too: see `polyak_cli.Options`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from polyak_cli.averaging.schemes.by_age import equal, exp, linear
from polyak_cli.averaging.schemes.by_position import find_longest_half_life, gamma, power
from polyak_cli.averaging.schemes.decays import SHAPES, decay
from polyak_cli.averaging.schemes.means import (
    Mean,
    effective_number,
    is_signed,
    make_mean,
    sum_absolutes,
)
from polyak_cli.averaging.schemes.moving import RAMPS, ema
from polyak_cli.averaging.schemes.parameters import (
    Flag,
    Number,
    Parameter,
    Scheme,
    UsedScheme,
    Value,
    Word,
    spell,
)
from polyak_cli.averaging.schemes.posthoc import WIDTHS, is_width, posthoc
from polyak_cli.averaging.schemes.running import window
from polyak_cli.errors import UsageError, shown, word_count

__all__ = [
    "PARAMETERS",
    "SCHEMES",
    "Flag",
    "Mean",
    "Number",
    "Parameter",
    "Scheme",
    "UsedScheme",
    "Value",
    "Word",
    "coefficients",
    "compute_mean",
    "effective_number",
    "find_longest_half_life",
    "gamma",
    "is_signed",
    "make_mean",
    "refuse_running_means",
    "resolve",
    "spell",
    "sum_absolutes",
    "takes_running_means",
]


def coefficients(
    scheme: str | None,
    positions: Sequence[float],
    *,
    custom: Sequence[float] | None = None,
    sigmas: Sequence[float] = (),
    **parameters: Value | None,
) -> tuple[float, ...]:
    """Return the coefficient of each checkpoint.

    Args:
        scheme: a name in `SCHEMES`; None means equal, or ``custom`` if that is given.
        positions: one number a checkpoint, oldest first: its distance from the start of the run, in
            epochs. Only ``power``, ``decay`` and half-lives look at them; they must rise then.
        custom: custom coefficients, oldest first; they are normalised.
        sigmas: the relative width of each file, which only ``posthoc`` takes.
        **parameters: those of the scheme, such as ``alpha`` of ``exp``; see `polyak_cli.Options`.

    Returns:
        float64, oldest first, with the sum 1 up to rounding; some are negative only if ``custom``
        has both signs, or for ``window`` and ``posthoc``.

    Raises:
        UsageError: the scheme is unknown, a parameter is out of range or not the scheme's, or the
            numbers given do not fit the checkpoints.
    """
    used = resolve(scheme, parameters, custom=custom)
    return compute_mean(used, positions, custom, sigmas).coefficients


def compute_mean(
    used: UsedScheme,
    positions: Sequence[float],
    custom: Sequence[float] | None = None,
    sigmas: Sequence[float] = (),
) -> Mean:
    """Return the mean of a scheme.

    Args:
        used: from `resolve`.
        positions: as for `coefficients`.
        custom: the multipliers themselves, oldest first, if the scheme is ``custom``.
        sigmas: as for `coefficients`.

    Raises:
        UsageError: the numbers given do not fit the checkpoints.
    """
    if not positions:
        raise UsageError("there are no checkpoints; expected at least one")
    if custom is not None:
        return make_mean(_checked_custom(custom, len(positions)))
    scheme = SCHEMES[used.name]
    widths = {"sigmas": sigmas} if scheme.takes == "snapshots" else {}
    return make_mean(scheme.function(positions, **used.parameters, **widths))


def resolve(
    scheme: str | None,
    parameters: Mapping[str, Value | None] | None = None,
    *,
    custom: Sequence[float] | None = None,
) -> UsedScheme:
    """Return the scheme and its parameters, with defaults filled in.

    Args:
        scheme: as for `coefficients`.
        parameters: name -> value; None, and False of a flag, mean that it was not given.
        custom: as for `coefficients`.

    Raises:
        TypeError: no scheme has such a parameter.
        UsageError: as for `coefficients`, except what depends on the checkpoints.
    """
    given = {
        name: value
        for name, value in (parameters or {}).items()
        if value is not None and value is not False
    }
    if unknown := given.keys() - PARAMETERS.keys():
        raise TypeError(f"no scheme has a parameter {', '.join(sorted(unknown))}")
    if custom is not None and scheme is not None:
        raise UsageError(
            f"--coefficients and --scheme {shown(scheme)} exclude each other: give one of them"
        )
    name = "custom" if custom is not None else scheme if scheme is not None else "equal"
    if custom is None and name not in SCHEMES:
        raise UsageError(f"unknown scheme {shown(name)!r}: choose one of {', '.join(SCHEMES)}")
    own = () if custom is not None else SCHEMES[name].parameters
    for option in given:
        if option not in {one.name for one in own}:
            raise UsageError(_describe_stray(option, name))
    replaced = _find_replaced(own, given)
    values = {
        one.name: _fill(one, given.get(one.name), name) for one in own if one.name not in replaced
    }
    _require_needed(own, values)
    # What is not given and has no default is left out, in the plan and in the record too.
    return UsedScheme(
        name, {key: v for key, v in values.items() if v is not None and v is not False}
    )


def _find_replaced(own: Sequence[Parameter], given: Mapping[str, Value]) -> set[str]:
    """Return the parameters in whose place others are given.

    Raises:
        UsageError: both are given.
    """
    found = set()
    for one in own:
        if isinstance(one, Number) and one.instead_of and one.name in given:
            if one.instead_of in given:
                raise UsageError(
                    f"{spell(one.name)} and {spell(one.instead_of)} exclude each other: give one "
                    "of them"
                )
            found.add(one.instead_of)
    return found


def _require_needed(own: Sequence[Parameter], values: Mapping[str, Value | None]) -> None:
    """Refuse a word without the parameter that it needs.

    Raises:
        UsageError: names both.
    """
    for one in own:
        word = values.get(one.name)
        needed = one.needs.get(word) if isinstance(one, Word) and isinstance(word, str) else None
        if needed and values.get(needed) is None:
            raise UsageError(
                f"{spell(one.name)} {word} needs {spell(needed)}; give both, or choose another word"
            )


def _fill(parameter: Parameter, given: Value | None, name: str) -> Value | None:
    """Return a parameter's value, or its default; None where neither is needed."""
    value = parameter.default if given is None else given
    if value is None and parameter.optional:
        return None
    if value is None:
        expected = parameter.range if isinstance(parameter, Number) else "a value"
        raise UsageError(f"--scheme {name} needs {spell(parameter.name)}; expected {expected}")
    return parameter.check(value)


def _checked_custom(custom: Sequence[float], count: int) -> list[float]:
    if len(custom) != count:
        raise UsageError(
            f"--coefficients has {word_count(len(custom), 'number')}; expected {count}, one for "
            "each checkpoint, oldest first"
        )
    values = [_check_number(place, value) for place, value in enumerate(custom, start=1)]
    if not any(values):
        raise UsageError("--coefficients: all numbers are 0; expected at least one other number")
    # Decimals are rounded to float64, each by 2^-53 of itself: 0.1 + 0.2 - 0.3 is a sum of 0 too.
    # A power of two makes the largest less than 1, so that no sum overflows.
    _, exponent = math.frexp(max(map(abs, values)))
    scaled = [math.ldexp(value, -exponent) for value in values]
    if abs(math.fsum(scaled)) <= 2.0**-53 * math.fsum(map(abs, scaled)):
        raise UsageError(
            "--coefficients: the sum is 0, by which they would be divided; expected another sum"
        )
    return values


def _check_number(place: int, given: object) -> float:
    """Return a custom coefficient, counted from 1, as a float."""
    try:
        value = float(given)  # type: ignore[arg-type]  # a number of any library, or an error
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(
            f"--coefficients: number {place} is {shown(given)}; expected finite numbers"
        )
    return value


def takes_running_means(scheme: str | None) -> bool:
    """Return whether a scheme is for files that hold running means."""
    return scheme is not None and scheme in SCHEMES and SCHEMES[scheme].takes != "checkpoints"


def refuse_running_means(scheme: str | None, where: str) -> None:
    """Refuse a scheme of running means where the checkpoints of a run are meant.

    Args:
        scheme: a name in `SCHEMES`, or None.
        where: what cannot use it.

    Raises:
        UsageError: names the scheme.
    """
    if takes_running_means(scheme):
        raise UsageError(
            f"--scheme {scheme} takes running means that belong together, and {where} is for "
            "the checkpoints of a run; use it with polyak average"
        )


def _describe_stray(option: str, name: str) -> str:
    """Return the message for a parameter that is not the chosen scheme's."""
    owners = " or ".join(PARAMETERS[option])
    chosen = "to --coefficients" if name == "custom" else f"to {name}"
    return f"{spell(option)} belongs to --scheme {owners}, not {chosen}"


def _declare_half_life(instead_of: str, meaning: str) -> Number:
    return Number(
        "ema_half_life",
        meaning,
        None,
        lambda h: 0.0 < h < math.inf,
        "a finite number above 0, of epochs or steps, whichever the names have",
        instead_of=instead_of,
    )


#: Every scheme by name; the command line's choices, defaults and help come from here.
SCHEMES: Mapping[str, Scheme] = {
    "equal": Scheme(equal, "the same for all"),
    "linear": Scheme(linear, "falling linearly with age"),
    "exp": Scheme(
        exp,
        "falling exponentially with age",
        (
            Number(
                "alpha",
                "falling by the factor e every ALPHA checkpoints",
                2.0,
                lambda a: 0.0 < a < math.inf,
                "a finite number above 0",
            ),
        ),
    ),
    "ema": Scheme(
        ema,
        "the debiased exponential moving average",
        (
            Number(
                "decay",
                "falling by the factor DECAY with each checkpoint (debiased)",
                0.9,
                lambda d: 0.0 < d <= 1.0,
                "a number above 0 and at most 1",
            ),
            _declare_half_life("decay", "falling by half in as many epochs or steps"),
            Flag(
                "from_first",
                "start from the oldest checkpoint, as an EMA in training does, not debiased",
            ),
            Word(
                "ramp",
                "smaller decays at first, as in TensorFlow Addons, ema-pytorch or EDM2; it starts "
                "from the oldest too",
                None,
                tuple(RAMPS),
                needs={"edm2": "ema_half_life"},
            ),
        ),
    ),
    "power": Scheme(
        power,
        "the power-function EMA of the whole run",
        (
            Number(
                "sigma",
                "power-function EMA of relative width SIGMA",
                0.1,
                lambda s: s > 0.0 and 12.0 * s * s < 1.0,
                "a number above 0 and below 1/sqrt(12) = 0.288675, which would be the equal "
                "average",
            ),
            _declare_half_life("sigma", "the same with this half-life at the end of the run"),
        ),
    ),
    "decay": Scheme(
        decay,
        "in place of a decay of the learning rate (WSM)",
        (Word("shape", "SHAPE of the decay that the average replaces", "1-sqrt", SHAPES),),
    ),
    "window": Scheme(
        window, "the mean of a part of the run, from two running means", takes="running means"
    ),
    "posthoc": Scheme(
        posthoc,
        "an EMA of another width, from EMA snapshots",
        (
            Number(
                "sigma",
                "relative width SIGMA of the EMA that is made of EMA snapshots",
                None,
                is_width,
                WIDTHS,
            ),
        ),
        takes="snapshots",
    ),
}

#: Name of each parameter -> scheme that takes it -> its description there.
PARAMETERS: Mapping[str, Mapping[str, Parameter]] = {
    name: {
        key: one for key, scheme in SCHEMES.items() for one in scheme.parameters if one.name == name
    }
    for name in dict.fromkeys(one.name for scheme in SCHEMES.values() for one in scheme.parameters)
}

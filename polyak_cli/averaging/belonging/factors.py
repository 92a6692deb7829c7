"""Recognise factors whose product is meant: LoRA's two matrices, and weight norm's g and v.

The mean of factors is not the factor of the mean product.  Knows how programs call the factors and
how they lie in a file.  Reads no values: `averaging.products` measures and computes with them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from polyak_cli.averaging.matching import Row
from polyak_cli.checkpoints import Problem
from polyak_cli.errors import choose_verb, list_some, shown, word_count, word_share

#: The relative distance above which the mean of factors is a warning.
TOLERATED = 0.05
#: The matrix that is applied first: PEFT's and loralib's lora_A, lora_embedding_A; Keras's
#: lora_kernel_a, lora_embeddings_a; kohya's lora_down; diffusers' lora.down.
_FIRST = re.compile(r"lora\w{0,24}?[._/](A|a|down)(?![A-Za-z0-9_])|lora(A)(?![A-Za-z0-9_])")
_SECOND = {"A": "B", "a": "b", "down": "up"}
_WORDS = ("lora", "dora", "hada", "lokr")
#: DoRA's magnitudes: PEFT's, and kohya's.
_MAGNITUDES = re.compile(r"lora_magnitude_vector|dora_scale")
#: Factors of more than one product: LoHa's, LoKr's, LoCon's with a core, AdaLoRA's with values.
_OTHERS = re.compile(r"(hada_w[12]_[ab]|lokr_w[12](_[ab])?|lora_mid|lora_E)(?![A-Za-z0-9])")
#: torch's weight_norm, its parametrization, and the layer of TensorFlow Addons.
_MAGNITUDE = re.compile(r"(?P<g>_g|original0|(?<=[/.])g)(?P<tail>:\d+)?$")
_DIRECTION = {"_g": "_v", "original0": "original1", "g": "v"}


class Pair(NamedTuple):
    """Two matrices whose product a model adds to its weights.

    ``left`` is stored as an array of ``rows`` times ``rank``, and ``right`` as one of ``rank``
    times ``columns``, whatever further dimensions there are: those of convolutions lie in the rows
    and the columns.
    """

    name: str  # of the layer
    left: Row
    right: Row
    rows: int
    rank: int
    columns: int

    @property
    def names(self) -> tuple[str, str]:
        """The names of the two tensors."""
        return self.left[-1].name, self.right[-1].name


class Norm(NamedTuple):
    """A weight norm: the model uses g v / ||v||.

    Salimans and Kingma, "Weight normalization", 2016.
    """

    name: str
    g: Row
    v: Row
    axis: int | None  # of v, that g counts along; None if g is one number


@dataclass(frozen=True, slots=True)
class Factors:
    """All factors of a model.

    Attributes:
        pairs: of LoRA and DoRA.
        magnitudes: how many vectors of DoRA there are.
        norms: weight norms.
        alphas: numbers that kohya's programs keep beside a pair, and multiply its product with.
        others: names of factors that are recognised, and neither measured nor multiplied.
    """

    pairs: tuple[Pair, ...] = ()
    magnitudes: int = 0
    norms: tuple[Norm, ...] = ()
    alphas: tuple[Row, ...] = ()
    others: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Return whether there are any."""
        return bool(self.pairs or self.norms or self.others)

    def data(self) -> dict[str, Any]:
        """Return it as what JSON can hold."""
        return {
            "pairs": [one.name for one in self.pairs],
            "magnitudes": self.magnitudes,
            "weight_norms": [one.name for one in self.norms],
            "others": list(self.others),
        }

    def describe(self) -> str:
        """Return what there is, such as "2 LoRA pairs and 1 weight norm"."""
        kind = "DoRA" if self.magnitudes else "LoRA"
        found = [
            word_count(len(listed), noun)
            for listed, noun in (
                (self.pairs, f"{kind} pair"),
                (self.norms, "weight norm"),
                (self.others, "factor of another kind"),
            )
            if listed
        ]
        return " and ".join(found).replace("kinds", "kind")


class Measured(NamedTuple):
    """How far the product of the means is from the mean of the products.

    All norms are Frobenius norms over all factors of a kind.
    """

    kind: str  # "lora" or "weight norm"
    products: int  # how many were measured
    cross_term: float  # the distance, relative to the norm of the mean product
    worst: str  # the layer where it is greatest
    worst_term: float
    lost: float | None  # by a mean product that is truncated to the rank; None if not computed
    unmeasured: tuple[str, ...]  # layers that need too much memory, or are not finite

    def data(self) -> dict[str, Any]:
        """Return it as what JSON can hold."""
        return self._asdict() | {"unmeasured": list(self.unmeasured)}


def find_factors(averaged: Sequence[Row]) -> Factors:
    """Return the factors among the tensors that are averaged.

    One factor alone, where the other is carried, is linear in what is averaged: it is left out.
    """
    rows = {row[-1].name: row for row in averaged}
    pairs: list[Pair] = []
    # Looking for a text first is faster than an expression, and there may be 100,000 names.
    adapters = [name for name in rows if any(word in name for word in _WORDS)]
    others = [name for name in adapters if _OTHERS.search(name)]
    layers = {name.rpartition(".lora_")[0] for name in others}
    for name in adapters:
        found = _FIRST.search(name)
        first = found and (found[1] or found[2])
        if not found or not first:
            continue
        end = found.end()
        second = f"{name[: end - len(first)]}{_SECOND[first]}{name[end:]}"
        if second not in rows:
            continue
        layer = name[: found.start()].rstrip("._/") or name
        made = _make_pair(layer, rows[name], rows[second])
        if made and layer not in layers:
            pairs.append(made)
        else:
            others += [name, second]
    return Factors(
        tuple(pairs),
        sum(1 for name in adapters if _MAGNITUDES.search(name)),
        tuple(_find_norms(rows)),
        tuple(rows[f"{one.name}.alpha"] for one in pairs if f"{one.name}.alpha" in rows),
        tuple(dict.fromkeys(others)),
    )


def _make_pair(layer: str, first: Row, second: Row) -> Pair | None:
    """Return a pair with its matrices in the order of the product; None if they have no product.

    PyTorch's programs multiply B A with A of (rank, inputs), Keras and MLX a b with a of
    (inputs, rank).  Where both fit, the rank is the smaller of the two numbers.
    """
    a, b = first[-1], second[-1]
    if min(len(a.shape), len(b.shape)) < 2 or not a.size or not b.size:
        return None
    # The dimensions of a convolution in Fortran order are not those of a matrix.
    if (a.arrangement or b.arrangement) and len(a.shape) + len(b.shape) > 4:
        return None
    # Of a convolution, PEFT's B is 1x1.
    pointwise = all(length == 1 for length in b.shape[2:])
    torch = a.shape[0] if pointwise and b.shape[1] == a.shape[0] else None
    keras = b.shape[0] if a.shape[-1] == b.shape[0] else None
    if torch is not None and (keras is None or torch <= keras):
        return Pair(layer, second, first, b.size // torch, torch, a.size // torch)
    if keras is not None:
        return Pair(layer, first, second, a.size // keras, keras, b.size // keras)
    return None


def _find_norms(rows: Mapping[str, Row]) -> Iterator[Norm]:
    """Yield the weight norms among tensors."""
    for name, g in rows.items():
        found = _MAGNITUDE.search(name, max(0, len(name) - 24))
        if not found:
            continue
        v = rows.get(f"{name[: found.start()]}{_DIRECTION[found['g']]}{found['tail'] or ''}")
        axis = _find_axis(g[-1].shape, v[-1].shape) if v else -1
        if v and axis != -1:
            yield Norm(name[: found.start()].rstrip("./"), g, v, axis)


def _find_axis(g: Sequence[int], v: Sequence[int]) -> int | None:
    """Return the axis of v that g counts along, None if g is one number; -1 if they do not fit."""
    if math.prod(g) >= math.prod(v):
        return -1
    if math.prod(g) == 1:
        return None
    if len(g) == 1:  # TensorFlow Addons: along the last axis
        return next((axis for axis in (len(v) - 1, 0) if v[axis] == g[0]), -1)
    long = [axis for axis, length in enumerate(g) if length != 1]
    fits = len(g) == len(v) and len(long) == 1 and g[long[0]] == v[long[0]]
    return long[0] if fits else -1


# --- words ----------------------------------------------------------------------------------------


def describe_plan(factors: Factors, *, exact: bool) -> list[str]:
    """Return the notes on factors of a plan, which has read no values."""
    if not factors:
        return []
    if exact:
        return [
            f"{factors.describe()}: the mean of their products will be written, truncated to the "
            "rank for LoRA; the report says how much that loses"
        ]
    return [
        f"{factors.describe()}: the factors are averaged, which is not the mean of their "
        "products; the report says how far apart the two are"
    ]


def describe_measured(
    factors: Factors, measured: Sequence[Measured], *, exact: bool
) -> tuple[list[str], list[Problem]]:
    """Return the notes on factors of a run, and those of them that are warnings as suspicions."""
    texts: list[str] = []
    suspicions: list[Problem] = []
    for one in measured:
        is_lora = one.kind == "lora"
        if one.products and is_lora and exact:
            texts.append(_describe_exact(one))
        elif one.products and exact:
            texts.append(
                f"{word_count(one.products, 'weight norm')}: the mean of the products is written, "
                f"which loses nothing (the mean of the factors would be "
                f"{word_share(one.cross_term)} off)"
            )
        elif one.cross_term:  # 0 where a factor never changes, and of one checkpoint
            text = _describe_cross_term(factors, one)
            if one.cross_term > TOLERATED:
                suspicions.append(Problem("factors", f"{text}; {_advise(one)}"))
            else:
                texts.append(text)
        if one.unmeasured:
            texts.append(
                f"{word_count(len(one.unmeasured), 'product')} of factors "
                f"{choose_verb(len(one.unmeasured))} not measured "
                f"({list_some(one.unmeasured)}): too large for --max-memory, or not finite"
            )
    if factors.magnitudes and factors.pairs:
        texts.append(
            f"DoRA's {word_count(factors.magnitudes, 'magnitude vector')} "
            f"{choose_verb(factors.magnitudes)} averaged separately; the norms that they replace "
            "depend on the base model"
        )
    if factors.others:
        text = (
            f"{word_count(len(factors.others), 'factor')} of products of another kind "
            f"{choose_verb(len(factors.others))} averaged separately, and the error is not "
            f"measured ({list_some(factors.others)}); to average the products, merge each "
            "checkpoint into its base model first"
        )
        suspicions.append(Problem("factors", text))
    return texts, suspicions


def _describe_cross_term(factors: Factors, one: Measured) -> str:
    kind = ("DoRA" if factors.magnitudes else "LoRA") if one.kind == "lora" else "weight norm"
    what = word_count(one.products, f"{kind} pair" if one.kind == "lora" else kind)
    where = f"; most in '{shown(one.worst, 80)}', {word_share(one.worst_term)}"
    return (
        f"{what}: the product of the averaged factors is {word_share(one.cross_term)} off the "
        f"mean of the products, relative to its norm{where if one.products > 1 else ''}"
    )


def _advise(one: Measured) -> str:
    """Return what to do about the mean of factors."""
    if one.kind != "lora":
        return "--lora exact writes the mean product, which loses nothing"
    lost = "" if one.lost is None else f", which loses {word_share(one.lost)}"
    return f"--lora exact writes the mean product, truncated to the rank{lost}"


def _describe_exact(one: Measured) -> str:
    lost = word_share(one.lost or 0.0)
    return (
        f"{word_count(one.products, 'LoRA pair')}: the mean of the products is written, truncated "
        f"to the rank, which loses {lost} of its norm (the mean of the factors would be "
        f"{word_share(one.cross_term)} off)"
    )

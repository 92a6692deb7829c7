"""Read factors whose product is meant: measure what their means miss, and write the mean product.

Computes with the factors only: no product of the size of a model's weights is formed.  Knows
nothing of how factors are called (`belonging.factors`) and of formats.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from polyak_cli.averaging.belonging.factors import Factors, Measured, Norm, Pair
from polyak_cli.averaging.matching import Row, list_files, list_sources
from polyak_cli.averaging.schemes import Mean
from polyak_cli.engine.inputs import OpenInputs
from polyak_cli.engine.kernel import Kernel, find_kernel
from polyak_cli.engine.timing import Clock, Progress, Totals
from polyak_cli.errors import FormatError, MismatchError, UsageError, shown, word_size
from polyak_cli.formats import Skeleton
from polyak_cli.storage import open_input
from polyak_cli.storage.local import LocalOutput
from polyak_cli.tensors import Float64, Table, TensorSpec, itemsize

#: Elements of a weight norm's direction that are read of each checkpoint: of larger ones, evenly
#: spaced channels are, as their norms are computed one by one.
_SAMPLE = 1 << 18
#: Rows and columns of the matrices whose eigenvalues are computed unasked.
_SMALL = 256
#: What a PEFT adapter's configuration says of the scale of its products.
_SCALING = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
_LARGEST_CONFIGURATION = 1 << 20
#: float64 arrays of the size of all stacked factors that are alive in `_truncate`.
_ALIVE = 4


class Reader:
    """Reads factors of several checkpoints as float64 matrices.

    Args:
        tables: of the checkpoints.
        coefficients: one a checkpoint; a checkpoint of coefficient 0 is never read.
        max_memory: bytes for buffers.
        progress: called with the bytes of each piece that was read.
        divisor: what a sum over the checkpoints is divided by.
        kernel: the name of the one that converts numbers; empty for the one in use.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        coefficients: Sequence[float],
        max_memory: int,
        progress: Progress = lambda _: None,
        divisor: float = 1.0,
        kernel: str = "",
    ) -> None:
        self.tables = tables
        self.divisor = divisor
        self.kernel = find_kernel(kernel)
        self.max_memory = max_memory
        self.progress = progress
        self.clock = Clock()
        # 0 * inf is nan.
        self.terms = [(k, float(c)) for k, c in enumerate(coefficients) if c]
        self.inputs = OpenInputs(list_files(tables))

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.inputs.close()

    def read_run(self, row: Row, k: int, start: int, stop: int) -> Float64:
        """Return elements of a tensor of checkpoint ``k``, in the order they are stored in."""
        spec = row[k]
        width = itemsize(spec.dtype)
        raw = np.empty((stop - start) * width, np.uint8)
        source = list_sources(self.tables, row)[k]
        self.inputs.read(source, start * width, raw, spec.name)
        values = np.empty(stop - start)
        with np.errstate(invalid="ignore"):
            self.kernel.widen(raw, spec.dtype, spec.byteorder, values)
        self.clock.read(len(raw))
        self.progress(len(raw))
        return values

    def read_lines(
        self, row: Row, k: int, lines: int, rank: int, *, across: bool, start: int, stop: int
    ) -> Float64:
        """Return lines of a factor as a matrix of ``rank`` columns.

        Args:
            row: the factor.
            k: of which checkpoint.
            lines: how many there are.
            rank: elements of a line.
            across: the factor is stored as a matrix of ``rank`` rows.
            start: the first line.
            stop: the line after the last.
        """
        # Fortran order is the C order of the transposed matrix.
        if across == bool(row[k].arrangement):
            return self.read_run(row, k, start * rank, stop * rank).reshape(-1, rank)
        if (start, stop) == (0, lines):
            return self.read_run(row, k, 0, lines * rank).reshape(rank, lines).T
        runs = [self.read_run(row, k, n * lines + start, n * lines + stop) for n in range(rank)]
        return np.stack(runs, axis=1)

    def check_finite(self, spec: TensorSpec, k: int, values: Float64) -> None:
        """Refuse NaN and infinity, of which there is no decomposition."""
        if not self.kernel.is_finite(np.ascontiguousarray(values).reshape(-1)):
            raise MismatchError(
                f"{shown(self.tables[k].path)}: tensor '{shown(spec.name)}' holds NaN or infinity; "
                "expected finite numbers. Leave the checkpoint out with --exclude, or average the "
                "factors themselves with --lora factors"
            )


def measure(
    factors: Factors,
    tables: Sequence[Table],
    coefficients: Sequence[float],
    max_memory: int,
    *,
    exact: bool = False,
) -> list[Measured]:
    """Measure how far the products of averaged factors are from the mean of the products.

    Args:
        factors: what to measure.
        tables: of the checkpoints.
        coefficients: one a checkpoint, sum 1.
        max_memory: bytes for buffers.
        exact: compute in any case what a truncated mean product loses, and not only where the
            distance is a warning.

    Returns:
        One result a kind of factors that there is.

    Raises:
        FormatError: a file cannot be read, or changed since it was scanned.
        MismatchError: the checkpoints scale their products differently.
    """
    with Reader(tables, coefficients, max_memory) as reader:
        _compare_scales(reader, factors.alphas)
        pairs = [_measure_pair(reader, pair, exact=exact) for pair in factors.pairs]
        norms = [_measure_norm(reader, norm) for norm in factors.norms]
    found = [("lora", pairs), ("weight norm", norms)]
    return [_summarise(kind, squares) for kind, squares in found if squares]


class _Squares(NamedTuple):
    """Squared Frobenius norms of one product."""

    name: str
    product: float  # of the mean product
    distance: float  # of the mean product minus the product of the means
    tail: float | None = None  # of what the truncation to the rank leaves out


def _summarise(kind: str, found: Sequence[_Squares | str]) -> Measured:
    """Return the result over all products of a kind; a name is a product that was not measured."""
    known = [one for one in found if isinstance(one, _Squares)]
    total = sum(one.product for one in known)

    def share(square: float, whole: float) -> float:
        return float(np.sqrt(square / whole)) if whole > 0 else float(square > 0)

    worst = max(known, key=lambda one: share(one.distance, one.product), default=None)
    tails = [one.tail for one in known if one.tail is not None]
    return Measured(
        kind=kind,
        products=len(known),
        cross_term=share(sum(one.distance for one in known), total),
        worst=worst.name if worst else "",
        worst_term=share(worst.distance, worst.product) if worst else 0.0,
        lost=share(sum(tails), total) if known and len(tails) == len(known) else None,
        unmeasured=tuple(one for one in found if isinstance(one, str)),
    )


# --- LoRA -----------------------------------------------------------------------------------------


def _measure_pair(reader: Reader, pair: Pair, *, exact: bool) -> _Squares | str:
    """Return the squared norms of one pair, or its name if it needs too much memory.

    With dB_k = B_k - B and dA_k = A_k - A, where B and A are the means, the mean product is

        sum c_k B_k A_k = B A + sum c_k dB_k dA_k,

    as sum c_k = 1: the last sum is the distance.  Both are products of stacked factors,
    L = [B, c_1 dB_1, ...] and R = [A; dA_1; ...], and ||L R||^2 is the sum over the elementwise
    product of the small matrices L'L and R R'.
    """
    rank = pair.rank
    width = rank * (1 + len(reader.terms))
    # The two matrices, and the one that is added to them; or strips of them, one after the other.
    whole = exact or 3 * 8 * width * width <= reader.max_memory
    if not whole and 4 * 8 * width * rank > reader.max_memory:
        return pair.name
    # In a few milliseconds where the factors are small; else only where it was asked for.
    with_tail = exact or (whole and width <= _SMALL)
    product = distance = tail = 0.0
    for first in range(0, width, width if whole else rank):
        strip = slice(first, width if whole else first + rank)
        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is looked for below
            left = _multiply_by_itself(reader, pair, strip, is_left=True)
            right = _multiply_by_itself(reader, pair, strip, is_left=False)
        if not np.isfinite(left).all() or not np.isfinite(right).all():
            if exact:
                _stack(reader, pair)  # names the tensor
            return pair.name  # the fold refuses it, unless it is allowed
        product += float(np.vdot(left, right))
        own = max(0, rank - first)  # rows of the means, which are no distances
        distance += float(np.einsum("ij,ij->", left[own:, rank:], right[own:, rank:]))
        if with_tail:
            tail += _measure_tail(left, right, rank)
    # The trace of a product of such matrices is not negative, whatever rounding says.
    found = max(0.0, product), max(0.0, distance)
    return _Squares(pair.name, *found, tail if with_tail else None)


def _multiply_by_itself(reader: Reader, pair: Pair, strip: slice, *, is_left: bool) -> Float64:
    """Return rows of L'L or of R R' of the stacked factors of a pair, by blocks of their lines."""
    row, lines = (pair.left, pair.rows) if is_left else (pair.right, pair.columns)
    rank, count = pair.rank, len(reader.terms)
    width = rank * (1 + count)
    # The lines as read, widened, stacked, and the copy that a matrix product makes.
    step = max(1, min(lines, reader.max_memory // (4 * 8 * width)))
    total = np.zeros((strip.stop - strip.start, width))
    for start in range(0, lines, step):
        stop = min(lines, start + step)
        stack = np.empty((stop - start, width))
        mean = stack[:, :rank]
        mean[:] = 0
        parts = stack[:, rank:].reshape(stop - start, count, rank)
        for place, (k, coefficient) in enumerate(reader.terms):
            parts[:, place] = reader.read_lines(
                row, k, lines, rank, across=not is_left, start=start, stop=stop
            )
            mean += coefficient * parts[:, place]
        for place, (_, coefficient) in enumerate(reader.terms):
            parts[:, place] -= mean
            if is_left:
                parts[:, place] *= coefficient
        total += stack[:, strip].T @ stack
        reader.clock.fold()
    return total


def _measure_tail(left: Float64, right: Float64, rank: int) -> float:
    """Return the sum of the squared singular values of L R after the first ``rank``.

    With L'L = S S', they are the eigenvalues of S' (R R') S.
    """
    values, vectors = np.linalg.eigh(left)
    root = vectors * np.sqrt(np.maximum(values, 0))
    squares = np.maximum(np.linalg.eigvalsh(root.T @ right @ root), 0)[::-1]
    return float(np.sum(squares[rank:]))


# --- weight norm ----------------------------------------------------------------------------------


class _Channels(NamedTuple):
    """Some channels of a weight norm, in float64, and their means over the checkpoints."""

    product: Float64  # channels x elements: the mean of g v / ||v||
    g: Float64  # one a channel
    v: Float64  # channels x elements


def _measure_norm(reader: Reader, norm: Norm) -> _Squares | str:
    """Return the squared norms of one weight norm, or its name if it needs too much memory.

    Of a large tensor, evenly spaced channels stand for all.
    """
    if not _fits(reader, norm):
        return norm.name
    product = distance = 0.0
    for start, stop in _list_blocks(reader, norm, sample=_SAMPLE):
        found = _average_channels(reader, norm, start, stop)
        with np.errstate(invalid="ignore", over="ignore"):
            length = np.sqrt(np.sum(found.v * found.v, axis=1))
            own = _scale(found.v, found.g, length) - found.product
            product += float(np.sum(found.product * found.product))
            distance += float(np.sum(own * own))
    return _Squares(norm.name, product, distance) if np.isfinite(product) else norm.name


def _fits(reader: Reader, norm: Norm) -> bool:
    """Return whether the channels of a weight norm can be read within the memory."""
    largest = norm.v[-1].size if _is_whole(norm) else norm.v[-1].size // norm.v[-1].shape[0]
    return 6 * 8 * largest <= reader.max_memory


def _is_whole(norm: Norm) -> bool:
    """Return whether the channels do not lie one after the other, so that all are read at once."""
    return norm.axis != 0 or bool(norm.v[-1].arrangement)


def _list_blocks(reader: Reader, norm: Norm, sample: int) -> Iterator[tuple[int, int]]:
    """Yield the first channel and the one after the last of blocks that fit the memory.

    Args:
        reader: bounds the memory.
        norm: the tensors.
        sample: elements to read at most, where the tensor has more.
    """
    spec = norm.v[-1]
    count = 1 if norm.axis is None else spec.shape[norm.axis]
    if _is_whole(norm):
        yield 0, count
        return
    length = spec.size // count
    if spec.size > sample:
        wanted = max(1, sample // length)
        for channel in range(0, count, -(-count // wanted)):
            yield channel, channel + 1
        return
    step = max(1, reader.max_memory // (6 * 8 * length))
    for start in range(0, count, step):
        yield start, min(count, start + step)


def _average_channels(reader: Reader, norm: Norm, start: int, stop: int) -> _Channels:
    """Return the means of some channels of all checkpoints."""
    spec = norm.v[-1]
    channels = stop - start
    length = spec.size // (1 if norm.axis is None else spec.shape[norm.axis])
    product, mean_v = np.zeros((channels, length)), np.zeros((channels, length))
    mean_g = np.zeros(channels)
    for k, coefficient in reader.terms:
        g = reader.read_run(norm.g, k, start, stop)
        if _is_whole(norm):
            stored = reader.read_run(norm.v, k, 0, spec.size)
            v = _order_channels(stored, spec, norm.axis)
        else:
            v = reader.read_run(norm.v, k, start * length, stop * length).reshape(channels, length)
        with np.errstate(invalid="ignore", over="ignore"):
            product += coefficient * _scale(v, g, np.sqrt(np.sum(v * v, axis=1)))
            mean_g += coefficient * g
            mean_v += coefficient * v
    for total in (product, mean_g, mean_v):
        total /= reader.divisor
    reader.clock.fold()
    return _Channels(product, mean_g, mean_v)


def _scale(v: Float64, g: Float64, length: Float64) -> Float64:
    """Return g v / ||v|| by channels; 0 where v is 0."""
    scaled: Float64 = v * (g / np.where(length == 0, 1.0, length))[:, None]
    return scaled


def _order_channels(stored: Float64, spec: TensorSpec, axis: int | None) -> Float64:
    """Return the elements of a whole tensor as channels x elements."""
    shape = spec.shape[::-1] if spec.arrangement else spec.shape
    whole = stored.reshape(shape)
    whole = whole.T if spec.arrangement else whole
    ordered: Float64 = np.moveaxis(whole, axis, 0) if axis is not None else whole[None]
    return ordered.reshape(ordered.shape[0], -1)


def _order_elements(channels: Float64, spec: TensorSpec, axis: int | None) -> Float64:
    """Return channels x elements in the order in which a tensor is stored."""
    if axis is None:
        whole = channels.reshape(spec.shape)
    else:
        moved = (spec.shape[axis], *spec.shape[:axis], *spec.shape[axis + 1 :])
        whole = np.moveaxis(channels.reshape(moved), 0, axis)
    return np.ascontiguousarray(whole.T if spec.arrangement else whole).reshape(-1)


# --- scales ---------------------------------------------------------------------------------------


def _compare_scales(reader: Reader, alphas: Sequence[Row]) -> None:
    """Refuse kohya's alphas that differ: each checkpoint multiplies its product by alpha / rank."""
    for row in alphas:
        values = [(k, reader.read_run(row, k, 0, 1)[0]) for k, _ in reader.terms]
        newest = values[-1][1]
        for k, value in values:
            if value != newest:
                raise MismatchError(
                    f"{shown(reader.tables[k].path)}: tensor '{shown(row[k].name)}' is {value:g}, "
                    f"but in {shown(reader.tables[values[-1][0]].path)} it is {newest:g}: the "
                    f"products are scaled differently. {_SAME_SCALE}"
                )


_SAME_SCALE = (
    "All checkpoints must have one scaling: leave the others out with --exclude, or merge each "
    "checkpoint into its base model first"
)


def compare_configurations(tables: Sequence[Table]) -> None:
    """Refuse PEFT adapters whose configurations scale the products differently.

    Raises:
        MismatchError: names both files, and what to do.
    """
    newest = _read_scaling(tables[-1])
    for table in tables[:-1]:
        scaling = _read_scaling(table)
        for key in _SCALING if newest and scaling else ():
            if scaling.get(key) != newest.get(key):
                raise MismatchError(
                    f"{shown(table.path)}: its adapter_config.json has {key} "
                    f"{shown(scaling.get(key), 40)}, but that of {shown(tables[-1].path)} has "
                    f"{shown(newest.get(key), 40)}: the products are scaled differently. "
                    f"{_SAME_SCALE}"
                )


def _read_scaling(table: Table) -> dict[str, Any]:
    """Return the configuration of a PEFT adapter; nothing if there is none that can be read."""
    path = Path(table.files[0].path).with_name("adapter_config.json")
    try:
        with open_input(path) as file:
            found = json.loads(file.read(0, _LARGEST_CONFIGURATION))
    except (FormatError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


# --- the mean product -----------------------------------------------------------------------------


def list_exact(factors: Factors) -> frozenset[str]:
    """Return the names of the tensors that `write_products` writes."""
    names = {name for pair in factors.pairs for name in pair.names}
    return frozenset(names | {row[-1].name for norm in factors.norms for row in (norm.g, norm.v)})


def check_products(factors: Factors, terms: int, max_memory: int) -> None:
    """Refuse products that `write_products` cannot compute.

    Args:
        factors: of the model.
        terms: how many checkpoints count.
        max_memory: bytes for buffers.

    Raises:
        UsageError: there is no product, or one needs more memory; says what to do.
    """
    if not factors:
        raise UsageError(
            "--lora exact: no averaged tensors are factors of a product; leave out --lora"
        )
    if factors.others:
        globs = " ".join(f"--exclude-tensors '{shown(name)}'" for name in factors.others[:8])
        raise UsageError(
            f"--lora exact: tensor '{shown(factors.others[0])}' is not a factor of a product of "
            f"two matrices; copy such tensors from the newest with {globs}, or merge each "
            "checkpoint into its base model first"
        )
    needed = {pair.name: _count_bytes(pair, terms) for pair in factors.pairs}
    needed |= {norm.name: 6 * 8 * norm.v[-1].size for norm in factors.norms if _is_whole(norm)}
    name = max(needed, key=lambda one: needed[one], default="")
    if name and needed[name] > max_memory:
        raise UsageError(
            f"--lora exact: the product of '{shown(name)}' needs {word_size(needed[name])} of "
            f"memory; use --max-memory {needed[name]}"
        )


def _count_bytes(pair: Pair, terms: int) -> int:
    """Return the memory that `_truncate` needs for a pair."""
    width = pair.rank * terms
    return 8 * width * (_ALIVE * (pair.rows + pair.columns) + 6 * width)


def write_products(
    factors: Factors,
    tables: Sequence[Table],
    mean: Mean,
    skeleton: Skeleton,
    max_memory: int,
    progress: Progress,
    kernel: str = "",
) -> Totals:
    """Write the factors of the mean product, where the means of the factors would be.

    A weight norm's mean product has factors of its own: v is the product, and g its norm.  The mean
    product of LoRA has a higher rank; the nearest matrix of the pair's rank is written, which is
    the beginning of its singular value decomposition (Eckart and Young, 1936).

    The same inputs give the same bytes with any number of processes.  On another machine the last
    bits may differ: numpy leaves QR and SVD to the LAPACK that it was built with.

    Raises:
        FormatError: a file cannot be read, or changed since it was scanned.
        MismatchError: a value is not finite, or the stored type cannot hold it.
        OSError: the output cannot be written.
    """
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(
            Reader(tables, mean.multipliers, max_memory, progress, mean.divisor, kernel)
        )
        files = [stack.enter_context(_open_output(path)) for path in skeleton.files]
        writer = _Writer(skeleton, files, reader.clock, reader.kernel)
        for pair in factors.pairs:
            left, right = _truncate(*_stack(reader, pair), pair.rank, reader.divisor)
            reader.clock.fold()
            writer.write(pair.left[-1], 0, left.T if pair.left[-1].arrangement else left)
            writer.write(pair.right[-1], 0, right if pair.right[-1].arrangement else right.T)
        for norm in factors.norms:
            _write_norm(reader, norm, writer)
        return reader.clock.totals()


@contextlib.contextmanager
def _open_output(path: str) -> Iterator[LocalOutput]:
    with contextlib.closing(LocalOutput(path)) as output:
        yield output


class _Writer(NamedTuple):
    """Rounds values once and writes them where the skeleton has room for them."""

    skeleton: Skeleton
    files: Sequence[LocalOutput]
    clock: Clock
    kernel: Kernel

    def write(self, spec: TensorSpec, start: int, values: Float64) -> None:
        """Write values of a tensor from element ``start`` on."""
        place = self.skeleton.placements[spec.location]
        width = itemsize(place.dtype)
        flat = np.ascontiguousarray(values).reshape(-1)
        raw = np.empty(flat.size * width, np.uint8)
        self.kernel.round_to(flat, place.dtype, place.byteorder, raw)
        stored = np.empty(flat.size)
        self.kernel.widen(raw, place.dtype, place.byteorder, stored)
        if not self.kernel.is_finite(stored):
            worst = flat[~np.isfinite(stored)][0]
            raise MismatchError(
                f"the mean product's factor '{shown(spec.name)}' holds {worst:.6g}, which "
                f"{place.dtype} cannot store; choose a wider --dtype"
            )
        place.write(self.files, start * width, raw)
        self.clock.write(len(raw))


def _stack(reader: Reader, pair: Pair) -> tuple[Float64, Float64]:
    """Return [c_1 B_1, c_2 B_2, ...] and [A_1', A_2', ...].

    Their product is the mean product times the reader's divisor.
    """
    rank, count = pair.rank, len(reader.terms)
    left, right = np.empty((pair.rows, rank * count)), np.empty((pair.columns, rank * count))
    for place, (k, coefficient) in enumerate(reader.terms):
        columns = slice(place * rank, (place + 1) * rank)
        for row, stacked, across in ((pair.left, left, False), (pair.right, right, True)):
            lines = len(stacked)
            read = reader.read_lines(row, k, lines, rank, across=across, start=0, stop=lines)
            reader.check_finite(row[k], k, read)
            stacked[:, columns] = read
        left[:, columns] *= coefficient
    return left, right


def _truncate(left: Float64, right: Float64, rank: int, divisor: float) -> tuple[Float64, Float64]:
    """Return two matrices of ``rank`` columns with U V' nearest to L R' / divisor.

    With L = Q T and R = P S, the decomposition of the small T S' gives that of L R'.  Each factor
    takes the square roots of the singular values, so that neither is larger.
    """
    (q, t), (p, s) = np.linalg.qr(left), np.linalg.qr(right)
    u, values, v = np.linalg.svd(t @ s.T)
    keep = min(rank, len(values))
    roots = np.sqrt(values[:keep] / divisor)
    first, second = q @ (u[:, :keep] * roots), p @ (v[:keep].T * roots)
    # A singular vector has no sign of its own: its greatest element shall be positive.
    greatest = first[np.argmax(np.abs(first), axis=0), np.arange(keep)]
    signs = np.where(greatest < 0, -1.0, 1.0)
    empty = ((0, 0), (0, rank - keep))
    return np.pad(first * signs, empty), np.pad(second * signs, empty)


def _write_norm(reader: Reader, norm: Norm, writer: _Writer) -> None:
    """Write the factors of the mean product of a weight norm: itself, and its norms."""
    for start, stop in _list_blocks(reader, norm, sample=norm.v[-1].size):
        found = _average_channels(reader, norm, start, stop)
        reader.check_finite(norm.v[-1], reader.terms[-1][0], found.product)
        length = np.sqrt(np.sum(found.product * found.product, axis=1))
        # 0 / 0 would be NaN in the model: a channel of zeros keeps a direction.
        v = np.where(length[:, None] > 0, found.product, found.v)
        writer.write(norm.g[-1], start, length)
        if _is_whole(norm):
            writer.write(norm.v[-1], 0, _order_elements(v, norm.v[-1], norm.axis))
        else:
            writer.write(norm.v[-1], start * v.shape[1], v)

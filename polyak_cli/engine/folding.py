"""Fold batches of slabs in float64, from the oldest checkpoint to the newest, and round once.

Knows no format, no scheme and no header: it gets tables of extents, a matrix of coefficients, and
what each sum is divided by.
Starts neither threads nor processes: work is divided across slabs, never across checkpoints, so the
bytes do not depend on the division.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from polyak_cli.engine.constants import FINITE, NAN, Agreement, Constant, find_codes
from polyak_cli.engine.inputs import OpenInputs
from polyak_cli.engine.kernel import find_kernel, is_finite
from polyak_cli.engine.pairs import GroupProducts
from polyak_cli.engine.samples import Sampler, SampleSums, Sampling
from polyak_cli.engine.slabs import (
    TUNING,
    Batch,
    Bundle,
    Slab,
    TensorSource,
    Tuning,
    count_elements,
    refine,
)
from polyak_cli.engine.sums import Region, Run, Sums
from polyak_cli.engine.timing import Clock, Crew, Totals
from polyak_cli.errors import MismatchError, PolyakError, quote_glob, shown
from polyak_cli.storage import Bytes, File, OutputFile, mirrors
from polyak_cli.storage.local import PAGE, LocalOutput, clashes, page_aligned
from polyak_cli.storage.parts import PartOutput
from polyak_cli.tensors import Extent, Float64, itemsize

if TYPE_CHECKING:  # of no use to who writes local files
    from polyak_cli.storage.uploads import Upload

#: Bytes by which a buffer is moved where the system would copy slowly; see `clashes`.
_DODGE = PAGE // 2


@dataclass(frozen=True, slots=True)
class FoldJob:
    """All that a batch needs besides itself: plain values, so that it can be sent anywhere."""

    inputs: Sequence[File]  # of all checkpoints
    outputs: Sequence[str]  # the files of all averages
    coefficients: npt.NDArray[np.float64]  # averages x checkpoints; what values are multiplied by
    divisors: Sequence[float]  # of each average, what its sum is divided by
    allow_nonfinite: bool
    sampling: Sampling | None = None  # of what inner products are taken, if they are wanted
    kernel: str = ""  # its name; empty for the one that a worker's process has chosen
    piece: int = 0  # elements that are folded at a time where slabs are larger; 0: as these are
    flush: bool = False  # what a share has written is on the disk when it is done
    #: Where outputs are sent to a store while they are written: of each, the bytes of a part, or 0
    #: for one that is a file.  Whoever folds a part folds all of it.
    parts: Sequence[int] = ()
    #: Names of the tensors whose averages are refused if they are negative.
    unsigned: frozenset[str] = frozenset()
    #: For workers that do not see the files of outputs: of each the upload to which they send parts
    #: by themselves, or None where the folded bytes go back to the coordinator; see `sinks`.
    sinks: Sequence[Upload | None] = ()
    regions: Sequence[Region] = ()  # of the inputs, whose checksums are wanted
    #: A process keeps its worker for all batches of the job with this name.
    id: str = field(init=False, default_factory=lambda: os.urandom(8).hex())

    def list_counted(self) -> list[int]:
        """Return the numbers of the checkpoints that count in some average."""
        return [k for k, column in enumerate(self.coefficients.T) if column.any()]

    def list_signed(self) -> list[bool]:
        """Return for each average whether some checkpoint counts negatively in it."""
        return [bool((row < 0).any()) for row in self.coefficients]

    def list_terms(self) -> list[list[tuple[int, float]]]:
        """Return for each checkpoint the averages it counts in, with its coefficients there."""
        # 0 * inf is nan, so a coefficient of 0 gives no term.  A checkpoint without any term is
        # not even read.
        return [
            [(row, float(c)) for row, c in enumerate(column) if c] for column in self.coefficients.T
        ]

    def start_worker(self, tuning: Tuning, team: Team | None = None) -> Worker:
        """Return who folds batches of the job, one after the other."""
        return Worker(self, tuning, team)


class Done(NamedTuple):
    """What folding a batch, or all of them, took and found."""

    totals: Totals = Totals()
    samples: SampleSums | None = None  # of the checkpoints that count
    constants: Sequence[Constant] = ()  # of slabs, in any order
    crew: Crew = Crew()
    pairs: GroupProducts | None = None  # of a `GramJob`
    sums: Sequence[Run] = ()  # of what was read of the regions


class Stopped(Exception):  # noqa: N818 - it is what a worker was asked for
    """A worker gave up its batch, because its team was stopped."""


@dataclass(slots=True)
class Team:
    """The workers that one process has at a time, each on a thread of its own."""

    size: int = 1
    is_stopped: bool = False


class Worker:
    """Folds batches of one job one after the other, with open files and buffers that it keeps."""

    def __init__(
        self,
        job: FoldJob,
        tuning: Tuning = TUNING,
        team: Team | None = None,
        outputs: Sequence[OutputFile] | None = None,
    ) -> None:
        """Open the outputs.

        Args:
            job: what is folded.
            tuning: how.
            team: the other workers of this process.
            outputs: those of the job, open, to be closed with the worker.
        """
        _check_subnormals()
        self.job = job
        self.tuning = tuning
        self.kernel = find_kernel(job.kernel)
        self.team = team or Team()
        self.terms, self.signed = job.list_terms(), job.list_signed()
        counted = len(job.list_counted())
        self.sampler = Sampler(counted, job.sampling) if job.sampling else None
        self.clock = Clock()
        self.constants: list[Constant] = []  # of the slabs of this batch
        # Each worker opens all files, so that the others' outputs leave fewer for inputs.
        taken = len(job.outputs) * (self.team.size - 1)
        self.checked = Sums(job.regions) if job.regions else None
        self.inputs = OpenInputs(job.inputs, taken, self.team.size, self.checked)
        self.span = page_aligned(0)  # small tensors and what lies between them
        self.layout = b"", b""  # of the small tensors that were read last; see `_pick`
        self.picked = np.empty(0, np.int64)
        self._allocate(0)
        self.outputs: list[OutputFile] = [*outputs] if outputs is not None else []
        try:
            for path in job.outputs if outputs is None else ():
                self.outputs.append(mirrors.open_output(path) if job.parts else LocalOutput(path))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        self.inputs.close()
        for output in self.outputs:
            output.close()

    def _allocate(self, count: int) -> None:
        """Make buffers for slabs of up to ``count`` elements."""

        def allocate_floats() -> Float64:
            return page_aligned(count * 8).view(np.float64)

        self.raw: Bytes = page_aligned(count * 8 + _DODGE)
        self.values = allocate_floats()
        self.sums = [allocate_floats() for _ in self.job.coefficients]
        # With one average, the product may overwrite the widened values.
        self.product = allocate_floats() if len(self.sums) > 1 else self.values

    def _place_buffer(self, nbytes: int, distance: int) -> Bytes:
        """Return a buffer for stored values.

        Args:
            nbytes: its length.
            distance: where a page boundary lies relative to the source of the system's copy (when
                reading) or to its target (when writing), modulo a page; see `clashes`.
        """
        start = _DODGE if clashes(distance) else 0
        return self.raw[start : start + nbytes]

    def fold(self, batch: Batch) -> Done:
        """Average the bundles into the outputs and return what that took and found."""
        self.clock, self.constants = Clock(), []
        # Entered once a batch: entering it for each slab would take longer than a small one.
        with np.errstate(invalid="ignore", over="ignore", under="ignore"):
            for bundle in batch:
                for piece in refine(bundle, self.job.piece):
                    self._fold_bundle(piece)
        found = self.sampler.take_sums() if self.sampler else None
        checked = self.checked.take() if self.checked else []
        return Done(self.clock.totals(), found, self.constants, sums=checked)

    def finish(self) -> None:
        """Send the last part of each output that is sent in parts; its batches are complete."""
        for output in self.outputs:
            if isinstance(output, PartOutput):
                output.sync()

    def prefetch(self, batch: Batch) -> None:
        """Have the bytes of a batch fetched, if the last batch did not come from the page cache."""
        if self.clock.bytes_read >= self.tuning.cache_speed * self.clock.reading:
            return
        wanted: dict[int, list[tuple[int, int]]] = {}  # input -> offset and length of each range
        for slab in itertools.chain.from_iterable(batch):
            for source, terms in zip(slab.tensor.sources, self.terms, strict=True):
                width = itemsize(source.dtype)
                start, stop = slab.start * width, slab.stop * width
                if terms and stop - start >= self.tuning.prefetch_nbytes:
                    for extent in source.storage.byte_ranges(start, stop):
                        ranges = wanted.setdefault(source.file + extent.file, [])
                        ranges.append((extent.offset, extent.nbytes))
        # All ranges of a file at once: those that lie side by side become one request of a network.
        for number, ranges in wanted.items():
            self.inputs.prefetch(number, ranges)

    def _fold_bundle(self, bundle: Bundle) -> None:
        """Average the slabs of a bundle as if they were one."""
        count = count_elements(bundle)
        if count > self.values.size:
            self._allocate(count)
        try:
            self._sum(bundle, count)
            self._store(bundle, count)
        except PolyakError:
            if len(bundle) == 1:
                raise
            # Folded one by one, the slab that is at fault names its own tensor.
            for slab in bundle:
                self._fold_bundle([slab])

    def _sum(self, bundle: Bundle, count: int) -> None:
        """Compute ``(sum_k c_k x_k) / d`` in float64, from the oldest checkpoint to the newest."""
        tensor = bundle[0].tensor
        scratch = self.values[:count], self.product[:count]
        sums = [whole[:count] for whole in self.sums]
        started = bytearray(len(sums))
        sampler = self.sampler if self.sampler and self.sampler.begin(bundle) else None
        for k, terms in enumerate(self.terms):
            if not terms:
                continue
            raw = self._read(bundle, k, count)
            source = tensor.sources[k]
            self.kernel.accumulate(
                raw, source.dtype, source.byteorder, terms, sums, started, scratch
            )
            if sampler:
                sampler.take(raw, source.dtype, source.byteorder)
            self.clock.fold()
        # One rounding, instead of that of each coefficient: of numbers whose sum float64 can hold,
        # the quotient is the float64 nearest to their mean.  Whether a value is finite is asked of
        # the quotients only, which is one pass instead of one for each checkpoint: NaN and infinity
        # go through every sum, and are looked at afterwards.
        divided = zip(sums, self.job.divisors, strict=True)
        finite = [self.kernel.divide(total, divisor) for total, divisor in divided]
        rows = [row for row, one in enumerate(finite) if not one]
        if rows and self.job.allow_nonfinite:
            # Whose NaN a sum of two inherits is the processor's choice, and even that of the loop:
            # numpy's vectors and the rest after them differ.
            for row in rows:
                if self.signed[row]:
                    self._keep_infinities(bundle, count, row)
                np.copyto(sums[row], np.nan, where=np.isnan(sums[row]))
        elif rows:
            self._settle_nonfinite(bundle, count, rows)
        if sampler:
            sampler.finish()

    def _read(self, bundle: Bundle, k: int, count: int) -> Bytes:
        """Return the stored bytes that checkpoint ``k`` has for a bundle."""
        if self.team.is_stopped:
            raise Stopped
        slab = bundle[0]
        tensor, source = slab.tensor, slab.tensor.sources[k]
        width = itemsize(source.dtype)
        if len(bundle) > 1:
            raw = self._gather([s.tensor.sources[k] for s in bundle], width, tensor.name)
        else:
            offset = source.storage.offset if isinstance(source.storage, Extent) else 0
            raw = self._place_buffer(count * width, -offset - slab.start * width)
            self.inputs.read(source, slab.start * width, raw, tensor.name)
        self.clock.read(len(raw))
        return raw

    def _gather(self, sources: Sequence[TensorSource], width: int, name: str) -> Bytes:
        """Return the values of neighbouring small tensors, from one read with what lies between."""
        extents = [source.storage for source in sources]
        starts = np.array([extent.offset for extent in extents if isinstance(extent, Extent)])
        sizes = np.array([extent.nbytes for extent in extents])
        low, high = int(starts[0]), int(starts[-1] + sizes[-1])
        if high - low > len(self.span):
            self.span = page_aligned(high - low)
        whole = self.span[: high - low]
        span = Extent(low, len(whole), getattr(extents[0], "file", 0))
        self.inputs.read(sources[0]._replace(storage=span), 0, whole, name)
        # All tensors begin and end at multiples of this unit; the larger it is, the fewer indices.
        unit = int(np.gcd(np.gcd.reduce(starts - low), width))
        raw = self._place_buffer(int(sizes.sum()), 0)
        picked = self._pick((starts - low) // unit, sizes // unit)
        np.take(whole.view(f"u{unit}"), picked, out=raw.view(f"u{unit}"), mode="clip")
        return raw

    def _pick(
        self, starts: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Return the indices of tensors that have these starts and sizes, one after the other."""
        # Checkpoints of one model mostly lie alike: the indices for one of them serve all, and
        # making them takes longer than using them.
        layout = starts.tobytes(), sizes.tobytes()
        if layout != self.layout:
            ends = np.cumsum(sizes)
            self.layout = layout
            self.picked = np.arange(ends[-1]) + np.repeat(starts - ends + sizes, sizes)
        return self.picked

    def _store(self, bundle: Bundle, count: int) -> None:
        """Round the sums to the stored type and write them."""
        first = bundle[0]
        dtypes = {source.dtype for source in first.tensor.sources}
        for row, target in enumerate(first.tensor.targets):
            width = itemsize(target.dtype)
            values = self.sums[row][:count]
            raw = self._place_buffer(count * width, target.offset + first.start * width)
            self.kernel.round_to(values, target.dtype, target.byteorder, raw)
            if self.signed[row] and self.job.unsigned:
                self._check_unsigned(bundle, values)
            # Finite values of one type cannot have an average that the type cannot hold, unless it
            # lies outside of them.
            is_held = dtypes == {target.dtype} and not self.signed[row]
            if not is_held and not self.job.allow_nonfinite:
                stored = self.values[:count]
                self.kernel.widen(raw, target.dtype, target.byteorder, stored)
                _check_fits(first.tensor.name, target.dtype, values, stored)
            self.clock.fold()
            # A bundle is read at once but written tensor by tensor: the bytes between its tensors
            # belong to the template and must stay.
            written = 0
            for tensor, start, stop in bundle:
                end = written + (stop - start) * width
                tensor.targets[row].write(self.outputs, start * width, raw[written:end])
                written = end
            self.clock.write(len(raw))

    def _check_unsigned(self, bundle: Bundle, values: Float64) -> None:
        """Refuse a negative average of values of which there are no negative ones."""
        begin = 0
        for tensor, start, stop in bundle:
            part = values[begin : begin + stop - start]
            begin += stop - start
            if tensor.name in self.job.unsigned and (part < 0).any():
                place = int(np.argmax(part < 0))
                raise MismatchError(
                    f"the average of tensor '{shown(tensor.name)}', a variance, is "
                    f"{part[place]:.6g} (element {start + place}), because some coefficients are "
                    "negative; expected 0 or more. Copy the newest one's with --exclude-tensors "
                    f"{quote_glob(tensor.name)}, or, for whole Keras models, compute BatchNorm's "
                    "statistics again with --recalibrate"
                )

    def _keep_infinities(self, bundle: Bundle, count: int, row: int) -> None:
        """Put infinities that every checkpoint has into a sum, where they have cancelled."""
        agreement = Agreement(count)
        for k, terms in enumerate(self.terms):
            if row in dict(terms):
                agreement.add(find_codes(self._widen(bundle, k, count)))
        # The values are those of the newest that counts.
        same = (agreement.common != FINITE) & (agreement.common != NAN)
        np.copyto(self.sums[row][:count], self.values[:count], where=same)

    def _settle_nonfinite(self, bundle: Bundle, count: int, rows: Sequence[int]) -> None:
        """Put constants that are not finite into sums that are not finite; refuse all else."""
        agreements = {row: Agreement(count) for row in rows}
        for k, terms in enumerate(self.terms):
            members = [row for row, _ in terms if row in agreements]
            if not members:
                continue
            codes = find_codes(self._widen(bundle, k, count))
            for row in members:
                agreements[row].add(codes)
                # A negative coefficient turns infinity around, and NaN would lose its bits: the
                # last that counts is the newest.
                np.copyto(self.sums[row][:count], self.values[:count], where=codes != 0)
        places = [*itertools.accumulate((slab.stop - slab.start for slab in bundle), initial=0)]
        for row, agreement in agreements.items():
            for start, stop in itertools.pairwise(places):
                agreement.refuse_nan(start, stop)
            infinite = find_codes(self.sums[row][:count])
            if agreement.strays.any() or not np.array_equal(infinite, agreement.common):
                raise self._find_culprit(bundle[0], row, agreement)
        # An element may be constant in one average, of few checkpoints, and finite in another.
        merged = max(agreements.values(), key=lambda one: int(np.count_nonzero(one.common)))
        for slab, (start, stop) in zip(bundle, itertools.pairwise(places), strict=True):
            found = merged.describe(slab.tensor.name, start, stop)
            if found.infinite or found.nan:
                self.constants.append(found)

    def _widen(self, bundle: Bundle, k: int, count: int) -> Float64:
        """Read a bundle of checkpoint ``k`` again, and return its values."""
        source = bundle[0].tensor.sources[k]
        values = self.values[:count]
        self.kernel.widen(self._read(bundle, k, count), source.dtype, source.byteorder, values)
        return values

    def _find_culprit(self, slab: Slab, row: int, found: Agreement) -> MismatchError:
        """Read a slab again and return the error that names the checkpoint at fault.

        The sums may be of a bundle that begins with the slab; then the error is not shown.
        """
        name = slab.tensor.name
        ways = f"Copy the newest one's with --exclude-tensors {quote_glob(name)}, or use "
        count = slab.stop - slab.start
        strays = np.flatnonzero(found.strays[:count])
        if not len(strays):
            return MismatchError(
                f"the average of tensor '{shown(name)}' overflows float64, although every "
                "checkpoint is finite; use --allow-nonfinite to write it anyway"
            )
        # Who holds what at one place; the oldest checkpoint that is not finite there is named.
        place = int(strays[0])
        members = [k for k, terms in enumerate(self.terms) if row in dict(terms)]
        held = [(k, float(self._widen([slab], k, count)[place])) for k in members]
        culprit, value = next((k, one) for k, one in held if not np.isfinite(one))
        others = (k for k, one in held if not np.array_equal(one, value, equal_nan=True))
        other = next(others, None)
        what = f"tensor '{shown(name)}' holds {value} (element {slab.start + place})"
        wanted = f"expected finite numbers, or the same infinity in every checkpoint. {ways}"
        if other is None and len(held) > 1:  # no file is worse than the others
            return MismatchError(
                f"{what} in every checkpoint: the run may have diverged; {wanted}--allow-nonfinite"
            )
        against = ""
        if other is not None:
            against = f", but {self._name_file(slab, other, place)} holds {dict(held)[other]:.6g}"
        path = self._name_file(slab, culprit, place)
        return MismatchError(f"{path}: {what}{against}; {wanted}--allow-nonfinite")

    def _name_file(self, slab: Slab, k: int, place: int) -> str:
        """Return the file of checkpoint ``k`` that holds an element of a slab."""
        source = slab.tensor.sources[k]
        file = source.find_file((slab.start + place) * itemsize(source.dtype))
        return shown(self.job.inputs[file].path)


def _check_subnormals() -> None:
    """Refuse to compute where the processor takes subnormal numbers for 0.

    A thread inherits that from the one that starts it, and a forked process from its parent.
    """
    if sys.float_info.min / 2 == 0.0:
        raise PolyakError(
            "subnormal numbers are 0 in this process, which would change the average; switch that "
            "off before, as with torch.set_flush_denormal(False), or run polyak average in a "
            "process of its own"
        )


def _check_fits(name: str, dtype: str, values: Float64, stored: Float64) -> None:
    """Refuse an average that the wanted type can only store as infinity or NaN, unless it is so."""
    if not is_finite(stored):
        unequal = ~np.isfinite(stored) & ~(
            (stored == values) | (np.isnan(stored) & np.isnan(values))
        )
        if unequal.any():
            raise MismatchError(
                f"the average of tensor '{shown(name)}' holds {values[unequal][0]:.6g}, which "
                f"{dtype} cannot store; choose a wider --dtype"
            )

"""Average once more and compare with what is there, bit for bit.

One place for `polyak verify` and for ``average --verify``.  Does not know how the inputs were
found, nor what is done about a difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from polyak_cli.averaging import writing
from polyak_cli.averaging.matching import list_sources
from polyak_cli.averaging.planning import Plan
from polyak_cli.engine import reading
from polyak_cli.errors import shown
from polyak_cli.examining import bitwise
from polyak_cli.examining.bitwise import Deviation, TensorDeviation
from polyak_cli.examining.reductions import bound_memory
from polyak_cli.storage import publishing
from polyak_cli.tensors import Table


class Written(NamedTuple):
    """An output to compare with.

    Attributes:
        files: all of its files, in the order of its table.
        opened: its name: of the file, or of the folder and of the file in it that opens it.
        record: the text of its record.
        nbytes: about the size of all its files.
        recalibrated: its table, if it has statistics that were gathered over data: those cannot be
            recomputed and are copied from it.
    """

    files: Sequence[Path]
    opened: Path
    record: str
    nbytes: int
    recalibrated: Table | None = None


def compare_again(
    plan: Plan,
    written: Written,
    near: Sequence[Path],
    *,
    table: Table | None = None,
    kernel: str = "",
) -> Deviation:
    """Average once more, into a scratch folder, and return how an output deviates from that.

    Args:
        plan: the plan that the output was made by.
        written: the output.
        near: folders; the first with room for the copy will hold it, for a while.
        table: of the output, if its tensors may lie at other places than they should.
        kernel: the name of the one that computes; empty for the one in use.

    Raises:
        PolyakError: as averaging itself.
        OutputError: there is no room for the copy.
    """
    nbytes = written.nbytes * (1 if written.recalibrated is None else 2)
    with publishing.make_scratch(near, nbytes) as folder:
        expected = writing.write_again(plan, folder, written.opened, written.record, kernel)
        if written.recalibrated is not None:
            from polyak_cli.evaluation import recalibration  # which knows of Keras

            expected = recalibration.restore_statistics(expected, written.recalibrated)
        if table is not None and not _is_laid_out_alike(table, expected):
            return _compare_tensors(table, expected)
        deviation = bitwise.compare(written.files, expected)
    if table is not None and deviation.outside and table.config != expected.config:
        more = (
            *deviation.outside,
            "the configuration of the model is not that of the newest checkpoint",
        )
        return deviation._replace(outside=more)
    return deviation


def _is_laid_out_alike(one: Table, other: Table) -> bool:
    """Return whether both have the same tensors at the same places."""

    def places(table: Table) -> dict[str, Any]:
        specs = {**table.tensors, **table.others}
        return {name: (s.dtype, s.shape, s.storage) for name, s in specs.items()}

    return len(one.files) == len(other.files) and places(one) == places(other)


def _compare_tensors(found: Table, expected: Table) -> Deviation:
    """Compare outputs that are laid out differently, tensor by tensor."""
    a, b = ({**table.tensors, **table.others} for table in (found, expected))
    mismatches = [f"tensor '{shown(name)}' is missing" for name in b if name not in a]
    mismatches += [f"tensor '{shown(name)}' is not expected" for name in a if name not in b]
    unequal = set()
    rows = []
    for name in (name for name in b if name in a):
        row = (a[name], b[name])
        if len({(spec.dtype, spec.shape, spec.digest) for spec in row}) > 1:
            unequal.add(name)
        elif all(spec.storage for spec in row):
            rows.append((name, list_sources([found, expected], row)))
    differing, _ = reading.find_differing(rows, [*found.files, *expected.files], bound_memory())
    unequal.update(differing)
    tensors = [TensorDeviation(name, 0, 0, b[name].size) for name in b if name in unequal]
    return Deviation(tuple(tensors), (*mismatches, "the tensors are not in the expected places"))

"""Write a copy of a model with BatchNorm statistics that fit its other tensors.

The statistics of an average are averages of estimates that were made for other tensors.
`batchnorm`, or for PyTorch `torch_batchnorm`, gathers them again; this module writes them into a
copy of the model: a file, or a folder with what lies beside its tensors.  It imports no framework,
and does not know how the statistics are computed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from polyak_cli import __version__, formats
from polyak_cli.averaging import carried_files, provenance, records
from polyak_cli.averaging.belonging.averages import list_averages
from polyak_cli.averaging.matching import is_statistic
from polyak_cli.checkpoints import find_file
from polyak_cli.engine import reading
from polyak_cli.engine.inputs import check_unchanged
from polyak_cli.engine.kernel import round_to, widen
from polyak_cli.engine.reading import ReadTensor
from polyak_cli.engine.slabs import Memory, TensorSource
from polyak_cli.errors import FormatError, MismatchError, OutputError, shown
from polyak_cli.evaluation import data, named_models, user_code, weights
from polyak_cli.evaluation.architectures import Architecture
from polyak_cli.evaluation.batchnorm import Moments, check_rows, gather_moments
from polyak_cli.evaluation.keras_files import check_model, is_of_keras, refuse_parts
from polyak_cli.evaluation.user_code import Maker
from polyak_cli.formats import outputs
from polyak_cli.formats.catalogue import find_format
from polyak_cli.formats.model_folders import FolderFiles
from polyak_cli.storage import Bytes, mirrors, publishing
from polyak_cli.storage.local import LocalOutput
from polyak_cli.tensors import FLOATS, Float64, Table, itemsize

BATCH_SIZE = 256
_MEMORY = 32 << 20  # bytes of the buffers; statistics are a few numbers a channel
_StrPath = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Gathering:
    """How statistics are gathered.

    Attributes:
        rows: features; the labels are not used.
        batch_size: the largest number of rows in a batch.
        trust_code: run the code that the file carries in a Lambda layer.
        architecture: the layers of a file that holds weights only, as ``model`` of `evaluate`.
        device: where PyTorch runs a module; by default a GPU where there is one.
        progress: as for `recalibrate`.
        key: of the part of a checkpoint of PyTorch whose statistics they are, as for `average`.
        use_ema: they are those of the running means beside the weights, as for `recalibrate`.
    """

    rows: data.Split
    batch_size: int = BATCH_SIZE
    trust_code: bool = False
    architecture: str | None = None
    device: str | None = None
    progress: Callable[[int, int], None] | None = None
    key: str = ""
    use_ema: bool = False


@dataclass(frozen=True, slots=True)
class Recalibration:
    """The result of a recalibration.

    Attributes:
        model: the input: a file, or the file that opens a folder.
        output: the file or folder that was written.
        statistics: names of the tensors that were replaced.
        layers: the number of BatchNorm layers that they belong to.
        source: the name of the rows.
        rows: the number of rows.
        batch_size: the largest number of rows in a batch.
        batches: the number of batches.
        seconds: wall-clock time.
        notes: messages for the user, one line each.
    """

    model: Path
    output: Path
    statistics: tuple[str, ...]
    layers: int
    source: str
    rows: int
    batch_size: int
    batches: int
    seconds: float
    notes: tuple[str, ...] = ()

    def data(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "model": str(self.model),
            "output": str(self.output),
            "statistics": list(self.statistics),
            "layers": self.layers,
            "data": self.source,
            "rows": self.rows,
            "batch_size": self.batch_size,
            "batches": self.batches,
            "seconds": self.seconds,
            "notes": list(self.notes),
        }


def recalibrate(
    model: _StrPath,
    output: _StrPath,
    rows: data.Split,
    *,
    batch_size: int = BATCH_SIZE,
    trust_code: bool = False,
    force: bool = False,
    architecture: Maker | None = None,
    device: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    key: str | None = None,
    use_ema: bool = False,
) -> Recalibration:
    """Gather the moving statistics of the BatchNorm layers again, in one pass over rows.

    The output equals the model bit for bit, except for these statistics and the provenance record,
    which describes the pass.  The module `batchnorm` says how they are gathered.

    >>> rows = Split("my training rows", x, y)                            # doctest: +SKIP
    >>> recalibrate("average.h5", "final.h5", rows).layers                # doctest: +SKIP

    Args:
        model: a whole-model ``.h5``, ``.hdf5`` or ``.keras`` file, or with ``architecture`` one
            that holds weights only, of Keras, or any checkpoint that `average` reads, such as a
            ``.pt`` file, or a folder of Hugging Face.
        output: the file or folder to write, in the model's format.
        rows: features; the labels are not used.
        batch_size: the largest number of rows in a batch; best the batch size of training.  In
            small batches the variance is too small, by the factor (n - 1) / n.
        trust_code: run the code that the file carries in a Lambda layer.
        force: replace an existing output.
        architecture: the layers of a file that holds weights only, as ``model`` of `evaluate`.
        device: where PyTorch runs a module; by default a GPU where there is one.
        progress: called after each batch with the number of batches done, and that of all.
        key: of the part of a PyTorch checkpoint whose statistics are gathered, such as
            ``state_dict_ema``; the others stay as they are.
        use_ema: gather those of the EMA that a trainer keeps beside the weights, which stay as they
            are.

    Raises:
        UsageError: the batch size is out of range, the architecture is none, or there are no parts.
        MissingExtraError: Keras or its back end is not installed.
        FormatError: the file is damaged or foreign, or holds weights without an architecture.
        MismatchError: the rows do not fit the model, it has no statistics to gather, or they are
            not finite.
        OutputError: the output exists already or cannot be written.
        PolyakError: Keras is too old, or cannot load or run the model, or the model carries code.
    """
    path, target = Path(mirrors.enter(os.fspath(model))), Path(output)
    (table,) = formats.scan([find_file(path)], with_optimizer=True)
    source = user_code.name_source(architecture) if architecture is not None else None
    how = Gathering(rows, batch_size, trust_code, source, device, progress, key or "", use_ema)
    check_recalibration(table, target, how)
    owned = records.list_owned
    outputs.check_output(target, [table], force=force, list_owned=owned)
    files = carried_files.plan_files(target, table)
    formats.check([table], jobs=1)
    # The output is a copy of the model, whose size the new statistics do not change.
    publishing.check_room(target, table.size + (files.nbytes if files else 0))
    folder, opener = (owned, files.weights[-1]) if files else (None, "")
    with publishing.publish(target, force=force, folder=folder, opener=opener) as hidden:
        return rewrite(table, hidden, target, how, files)


def check_recalibration(table: Table, output: Path | None, how: Gathering) -> None:
    """Refuse a model, rows or output that cannot be recalibrated, before any work.

    Args:
        table: table of the model, or of one like it.
        output: the file or folder that will be written, if known.
        how: the statistics will be gathered.

    Raises:
        UsageError: the batch size is out of range, the architecture is none, or there are no parts.
        MismatchError: there is only one row, which has no variance.
        FormatError: the file is of a format that Keras does not open as a model.
        OutputError: the output would have another format.
        PolyakError: Keras is missing or too old, or PyTorch is missing.
    """
    check_rows(how.rows, how.batch_size)
    if not is_of_keras(find_format(table.format)):
        _check_named(table, how.architecture)
        named_models.check_device(how.device)
    elif how.key or how.use_ema:
        refuse_parts(table.path, find_format(table.format))
    else:
        check_model(table, bare=how.architecture is not None)
        if how.architecture is not None:
            Architecture(how.architecture)  # refuses what is no architecture
    if outputs.choose_format(output, table) != table.format or outputs.takes_weights(output, table):
        raise OutputError(
            f"{shown(output)}: would not be a {find_format(table.format).name} file; give the "
            f"output the same suffix as {shown(table.path)}"
        )


def _check_named(table: Table, architecture: str | None) -> None:
    """Refuse a checkpoint of another program whose module polyak cannot run.

    Raises:
        FormatError: no function makes its module.
        MissingExtraError: PyTorch is not installed.
    """
    if architecture is None or not user_code.is_function(architecture):
        raise FormatError(
            f"{shown(table.path)}: is {find_format(table.format).name}, which holds tensors "
            "without a model; name a function that returns it, a torch.nn.Module: "
            "--model MODULE.py:FUNCTION"
        )
    named_models.require_torch(table.path)


def rewrite(
    table: Table,
    hidden: Path,
    output: Path,
    how: Gathering,
    files: FolderFiles | None,
    name: Path | None = None,
    twins: Mapping[str, Sequence[str]] = {},
) -> Recalibration:
    """Write a model with new statistics under a hidden name, as `recalibrate` describes.

    Args:
        table: table of the model, scanned ``with_optimizer``.
        hidden: the file or folder to write.
        output: its later name.
        how: the statistics are gathered.
        files: what the output will hold if it is a folder.
        name: of the model in messages, if it is hidden too.
        twins: name of a tensor -> those that have its values too, and so get its new ones.
    """
    begun = time.perf_counter()
    named = replace(table, path=name or table.path)
    found = _gather(table, named.path, how)
    # Keras finds tensors by order, not by name.  If it loaded others than this tool found, new
    # statistics would be written to the wrong place.
    _check_loaded(named, found)
    names = {spec.location: spec.name for spec in table.tensors.values()}
    values = {names[location]: np.ravel(values) for location, values in found.after.items()}
    values |= {twin: own for one, own in values.items() for twin in twins.get(one, ())}
    record = _make_record(named, found, how, files)
    record["recalibrated"]["statistics"] = hash_values(table, values)
    text = records.encode(records.seal(record))
    _write(table, values, hidden, text, named.path)
    if files:
        carried_files.copy_files(files, hidden, text)
    # Last: the model may have been replaced while it was copied.
    check_unchanged([*table.files, *(one.file for one in (files.carried if files else ()))])
    return Recalibration(
        model=named.path,
        output=output,
        statistics=tuple(values),
        layers=found.layers,
        source=how.rows.source,
        rows=how.rows.rows,
        batch_size=how.batch_size,
        batches=found.batches,
        seconds=time.perf_counter() - begun,
        notes=(*found.notes, *carried_files.note_other_weights(files)),
    )


def _gather(table: Table, name: Path, how: Gathering) -> Moments:
    """Return the statistics of a model, of the part that is wanted if it has parts.

    Args:
        table: of the model.
        name: of the model in messages.
        how: the statistics are gathered.
    """
    if how.architecture is None or is_of_keras(find_format(table.format)):
        return gather_moments(
            replace(table, path=name),
            how.rows,
            batch_size=how.batch_size,
            trust_code=how.trust_code,
            architecture=how.architecture,
            progress=how.progress,
        )
    part = table
    if how.key:
        (part,) = formats.scan([table.path], with_optimizer=True, key=how.key)
    part = replace(part, path=name)
    taken = weights.take_emas(part) if how.use_ema else part
    found = named_models.gather_moments(
        taken, how.architecture, how.rows, how.batch_size, how.device, how.progress
    )
    return found if taken is part else _place_in_emas(found, part, taken)


def _place_in_emas(found: Moments, part: Table, taken: Table) -> Moments:
    """Return the statistics of running means at their own places, instead of the weights'.

    Args:
        found: as if the running means were the weights.
        part: the checkpoint as it is.
        taken: the same with running means in place of the weights.

    Raises:
        MismatchError: the running means have no statistics of their own.
    """
    means = {name for one in list_averages([part])[0] for name in one.names}
    places: dict[object, list[str]] = {}  # by what is read -> locations of running means
    for name in means:
        places.setdefault(taken.tensors[name].storage, []).append(part.tensors[name].location)
    read = {spec.location: spec.storage for spec in taken.tensors.values()}
    own = {spec.location: spec.storage for spec in part.tensors.values()}
    lacking = [location for location in found.after if read[location] not in places]
    if lacking:
        raise MismatchError(
            f"{shown(part.path)}: its running means (--use-ema) have no BatchNorm statistics of "
            "their own; write them as a model of its own, and recalibrate that: polyak average "
            "FILE --use-ema -o EMA"
        )
    after = {
        place: values
        for location, values in found.after.items()
        for place in places[read[location]]
    }
    before = {
        place: values
        for location, values in found.before.items()
        for place in places[read[location]]
        if own[place] == read[location]  # the others are the same, rounded
    }
    return replace(found, before=before, after=after)


def _make_record(
    table: Table, found: Moments, how: Gathering, files: FolderFiles | None
) -> dict[str, Any]:
    """Return the record of the output: that of the model, and the pass over rows."""
    # Times and folders are left out, so that the same inputs give the same bytes.
    # A model of another program has no record; then only the pass is recorded.
    text = table.about.get("provenance", "{}")
    try:
        own = json.loads(text)
    except (ValueError, RecursionError):
        own = None
    if not isinstance(own, dict):
        raise FormatError(
            f"{shown(table.path)}: its attribute polyak_provenance is not a record that polyak "
            f"wrote: {shown(text, 60)}; remove the attribute"
        )
    rows = how.rows
    made = {
        "polyak": __version__,
        "data": Path(rows.source).name,
        "rows": rows.rows,
        "sha256": _hash_features(rows.features),
        "batch_size": how.batch_size,
        "batches": found.batches,
        "layers": found.layers,
    }
    if how.architecture is not None:  # without its folder, as the data
        made["model"] = Path(how.architecture).name
    listed = own.pop("files", None)
    if files:
        own["files"] = provenance.describe_files(files, listed)
    return {"polyak": __version__} | own | {"recalibrated": made}


def hash_values(table: Table, values: Mapping[str, Float64]) -> dict[str, str]:
    """Return the SHA-256 of the stored values of each tensor.

    Args:
        table: says in which type they are stored.
        values: name of a tensor -> its elements.
    """
    found = {}
    # Always little-endian, whatever the byte order of the file: `verify` compares these digests
    # with those of another copy of the model, which may store big-endian numbers.
    for name, elements in values.items():
        dtype = table.tensors[name].dtype
        raw = np.empty(elements.size * itemsize(dtype), np.uint8)
        round_to(elements, dtype, "<", raw)
        found[name] = hashlib.sha256(raw.data).hexdigest()
    return found


def read_statistics(table: Table) -> dict[str, Float64]:
    """Return the statistics that recalibration wrote into a file, name -> elements.

    Raises:
        FormatError: the record is damaged, or names a tensor that the file does not have.
    """
    record = records.read(table.about.get("provenance", ""))
    # Records of version 0.1.0 do not name them; then all tensors named like statistics are read.
    if record.statistics is None:
        names = [name for name in table.tensors if is_statistic(table, name)]
    else:
        names = [*record.statistics]
    tensors = []
    for name in names:
        spec = table.tensors.get(name)
        if spec is None or spec.dtype not in FLOATS or spec.storage is None:
            raise FormatError(
                f"{shown(table.path)}: its record names the statistic '{shown(name, 60)}', which "
                "the file does not have"
            )
        source = TensorSource(spec.storage, spec.dtype, spec.byteorder, 0)
        tensors.append(ReadTensor(name, spec.size, [source]))
    found = {tensor.name: np.empty(tensor.size) for tensor in tensors}
    done = dict.fromkeys(found, 0)
    with np.errstate(invalid="ignore"):
        filled = [tensor for tensor in tensors if tensor.size]
        for tensor, (slab,) in reading.read_values(filled, table.files, Memory.within(_MEMORY, 1)):
            start = done[tensor.name]
            done[tensor.name] = start + slab.size
            found[tensor.name][start : start + slab.size] = slab
    return found


def restore_statistics(average: Table, written: Table) -> Table:
    """Put the statistics and the record of a recalibrated model into an average again.

    So a recalibrated average can be recomputed without the rows.

    Args:
        average: the average, whose file is overwritten.
        written: the recalibrated model, which the statistics and the record are read from.

    Raises:
        FormatError: the record is damaged, or an input changed meanwhile.
        MismatchError: a statistic is not finite.
        OSError: the disk is full.
    """
    text, values = written.about["provenance"], read_statistics(written)
    folder = outputs.find_folder(average)
    made = (folder or average.path).with_name(".recalibrated")
    made.mkdir() if folder else made.touch()
    _write(average, values, made, text, average.path)
    if folder:
        shutil.rmtree(folder)
    made.replace(folder or average.path)
    (table,) = formats.scan([average.path], with_optimizer=True)
    return table


def _hash_features(features: data.Arrays) -> str:
    """Return the SHA-256 of the features: type, shape and values of each array."""
    total = hashlib.sha256()
    for array in data.list_arrays(features):
        total.update(f"{array.dtype.str}{array.shape}".encode())
        total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()


def _check_loaded(table: Table, found: Moments) -> None:
    """Check that Keras loaded the values at the locations that will be overwritten.

    Raises:
        MismatchError: Keras loaded other values.
    """
    specs = [s for s in table.tensors.values() if s.location in found.before]
    loaded = {spec.name: np.ravel(found.before[spec.location]) for spec in specs}
    tensors = [
        ReadTensor(s.name, s.size, [TensorSource(s.storage, s.dtype, s.byteorder, 0)])
        for s in specs
        if s.size and s.storage
    ]
    done = dict.fromkeys(loaded, 0)
    with np.errstate(invalid="ignore", over="ignore"):
        for tensor, (slab,) in reading.read_values(tensors, table.files, Memory.within(_MEMORY, 1)):
            start = done[tensor.name]
            done[tensor.name] = start + slab.size
            own = loaded[tensor.name][start : start + slab.size]
            # Keras may have loaded float64 as float32 (its floatx), so the file is rounded alike.
            if not np.array_equal(slab.astype(own.dtype), own, equal_nan=True):
                raise MismatchError(
                    f"{shown(table.path)}: '{shown(tensor.name)}' is not what was loaded for it; "
                    "load the model and save it again"
                )


def _write(
    table: Table, values: Mapping[str, Float64], hidden: Path, record: str, name: Path
) -> None:
    """Write a copy of the model's tensors with new statistics, into a file or a folder.

    Raises:
        MismatchError: a statistic is not finite.
        FormatError: the model cannot be copied safely.
        OSError: the disk is full.
    """
    specs = [spec for spec in table.tensors.values() if spec.name in values and spec.size]
    # The skeleton is everything but these tensors; so recalibration uses the writer of averages.
    skeleton = formats.write_skeleton(
        table,
        hidden,
        averaged={spec.location: spec.dtype for spec in specs},
        drop_optimizer=False,
        provenance=record,
    )
    with contextlib.ExitStack() as opened:
        files = [opened.enter_context(LocalOutput(path)) for path in skeleton.files]
        for spec in specs:
            place = skeleton.placements[spec.location]
            where = f"{shown(name)}: the new values of '{shown(spec.name)}'"
            place.write(
                files, 0, round_values(values[spec.name], place.dtype, place.byteorder, where)
            )
    skeleton.finalize()


def round_values(values: Float64, dtype: str, byteorder: str, where: str) -> Bytes:
    """Return values as they are stored.

    Args:
        values: one-dimensional.
        dtype: of the stored ones.
        byteorder: "<" or ">".
        where: what they are, for messages.

    Raises:
        MismatchError: one is not finite after rounding; float16 ends at 65504.
    """
    raw = np.empty(values.size * itemsize(dtype), np.uint8)
    round_to(values, dtype, byteorder, raw)
    stored = np.empty_like(values)
    with np.errstate(invalid="ignore"):
        widen(raw, dtype, byteorder, stored)
    if not np.isfinite(stored).all():
        worst = values[~np.isfinite(stored)][0]
        raise MismatchError(
            f"{where} hold {worst:g}, expected finite numbers of type {dtype}; look for "
            "non-finite numbers in the rows and in the model (polyak inspect --stats)"
        )
    return raw

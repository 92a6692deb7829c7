"""The tool of `polyak verify`: check that an average is what its record says, bit for bit.

Finds the checkpoints that the record names, compares their digests, averages them once more, and
compares all files byte by byte.  Does not know how an average is made, and guesses nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from polyak_cli import __version__, formats
from polyak_cli.averaging import carried_files, hashing, planning, records
from polyak_cli.averaging import options as averaging_options
from polyak_cli.averaging.fates import map_stored_dtypes
from polyak_cli.averaging.planning import Plan
from polyak_cli.averaging.records import Record
from polyak_cli.checkpoints import Checkpoint, Selection, enter, find_file, make_natural_key
from polyak_cli.engine.inputs import check_unchanged
from polyak_cli.errors import (
    CheckpointError,
    FormatError,
    MismatchError,
    PolyakError,
    StoreError,
    UsageError,
    name_path,
    shown,
)
from polyak_cli.evaluation import recalibration
from polyak_cli.examining.bitwise import Deviation
from polyak_cli.examining.recompute import Written, compare_again
from polyak_cli.formats import outputs
from polyak_cli.formats.catalogue import detect, find_format
from polyak_cli.formats.model_folders import RECORD_NAME
from polyak_cli.storage import File, locate, open_input, read_version
from polyak_cli.tensors import Table

_StrPath = str | os.PathLike[str]

#: Folders that are looked through for checkpoints, unasked.
_MOST_FOLDERS = 1000


class Discrepancy(NamedTuple):
    """One reason why an average does not verify.

    Attributes:
        kind: what differs: "file", "record", "input", "tensor" or "metadata".
        name: the name of the input or the tensor; otherwise that of the average's file.
        text: a sentence that includes the name.
    """

    kind: Literal["file", "record", "input", "tensor", "metadata"]
    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of verifying an average.

    Attributes:
        output: the average, as the user named it.
        inputs: name and path of each checkpoint it was made of, oldest first; the path is None if
            the checkpoint was not found.
        problems: why it does not verify; empty if it does.
        nbytes: how many bytes were compared.
        unverified: tensors that cannot be recomputed: BatchNorm statistics gathered over data.
        notes: what the user should know, a line each.
    """

    output: Path
    inputs: tuple[tuple[str, Path | None], ...] = ()
    problems: tuple[Discrepancy, ...] = ()
    nbytes: int = 0
    unverified: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def verified(self) -> bool:
        """Whether the average is what its record says, bit for bit."""
        return not self.problems

    def data(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return {
            "output": name_path(self.output),
            "verified": self.verified,
            "problems": [problem._asdict() for problem in self.problems],
            "inputs": [
                {"name": name, "path": path and name_path(path)} for name, path in self.inputs
            ],
            "bytes": self.nbytes,
            "unverified": list(self.unverified),
            "notes": list(self.notes),
        }


def verify(
    output: _StrPath,
    *,
    sources: Sequence[_StrPath] = (),
    max_memory: int | None = None,
    jobs: int | None = None,
    engine: Literal["here", "dask", "mpi"] = "here",
    scheduler: str | None = None,
) -> Verification:
    """Recompute an average from the record in it, and compare it bit for bit.

    The record is no signature: anyone who can write both the file and its record can make them
    agree.

    Args:
        output: the average: a file, or a folder of shards.
        sources: folders to search for the checkpoints, before the folder that holds the average;
            without them, the folders beside the average are searched too.
        max_memory: bytes for buffers; 32 MiB if None.
        jobs: threads or processes; as many as there are processors, at most 8, if None.
        engine: who averages again; see `polyak_cli.Options`.
        scheduler: the address of Dask's; see `polyak_cli.Options`.

    Raises:
        UsageError: a source is no folder, or a number is out of range.
        FormatError: there is no such file, or it holds no record.
        CheckpointError: the folder holds several files that could be the average, or the file is
            no average.
        OutputError: there is no room for a copy to compare with.
    """
    machine: averaging_options.Options = {
        "max_memory": max_memory,
        "jobs": jobs,
        "engine": engine,
        "scheduler": scheduler,
    }
    averaging_options.parse(machine)
    output, sources = enter(output), [enter(source) for source in sources]
    path = _find_opener(Path(output))
    for folder in map(Path, sources):
        if not _is_folder(folder):
            raise UsageError(
                f"--source {shown(folder)}: is not a folder; name one with checkpoints"
            )
    try:
        (table,) = formats.scan([path])
    except FormatError as error:
        return Verification(Path(output), problems=(Discrepancy("file", path.name, str(error)),))
    if "provenance" not in table.about and not table.is_polyak_output:
        raise FormatError(
            f"{shown(output)}: holds no record of provenance; only averages that polyak wrote can "
            "be verified"
        )
    try:
        record = records.read(table.about.get("provenance", ""))
    except FormatError as error:
        text = f"{shown(output)}: {error}"
        return Verification(Path(output), problems=(Discrepancy("record", path.name, text),))
    except CheckpointError as error:
        raise CheckpointError(f"{shown(output)}: {error}; there is nothing to recompute") from None
    folders = [*map(Path, sources), _find_folder(table, record)]
    others, notes = ([], []) if sources else _find_folders_beside(record, table)
    search = _Search(record, [*folders, *others], table, is_wide=not sources)
    return _Verifier(Path(output), table, record, search, machine, notes=notes).run()


def _find_opener(path: Path) -> Path:
    """Return the file that opens an average; TensorFlow's may be named by its files' prefix."""
    found = find_file(path)
    if not found.exists():
        index = path.with_name(f"{path.name}.index")
        found = index if index.is_file() else found
    if found.exists() and not found.is_file():
        raise FormatError(
            f"{shown(path)}: is neither a file nor a folder that holds one checkpoint"
        )
    open_input(found).close()  # the reason why it cannot be read, before a child is started
    return found


def _is_folder_output(table: Table, record: Record) -> bool:
    """Return whether an average is a folder, not a file or files whose names begin alike."""
    # Weights may have been taken out of their folder; then they are a file.
    return outputs.find_folder(table) is not None or (
        bool(record.weights) and _find_record_beside(table).exists()
    )


def _find_record_beside(table: Table) -> Path:
    """Return where the record of an output folder lies."""
    return find_format(table.format).find_root(table) / RECORD_NAME


def _find_folder(table: Table, record: Record) -> Path:
    """Return the folder that holds an average."""
    if not _is_folder_output(table, record):
        return table.path.parent
    return find_format(table.format).find_root(table).absolute().parent


# --- where the inputs are -------------------------------------------------------------------------


@dataclass(slots=True)
class _Input:
    """One input of the record, and the checkpoint found for it.

    Attributes:
        recorded: what the record says of it.
        path: the checkpoint, None if it was not found.
        files: of the checkpoint.
        is_recorded: it has the size that was recorded, and the digest if there is one.
        is_renamed: it was found by its digest, under another name.
        error: why a checkpoint of its name was passed over.
    """

    recorded: records.Input
    path: Path | None = None
    files: tuple[File, ...] = ()
    is_recorded: bool = False
    is_renamed: bool = False
    error: str = ""

    @property
    def size(self) -> int:
        """Bytes of all files that were found."""
        return sum(file.version.size for file in self.files)

    def make_problem(self, text: str) -> Discrepancy:
        """Return a problem of this input."""
        name = self.recorded.path
        return Discrepancy("input", name, f"'{shown(name, 80)}' {text}")


class _Search:
    """Finds the inputs of a record in folders.

    A candidate that cannot be read, or is of another format than the inputs found by their
    digests, is passed over: the search continues, and such a candidate is never taken.
    """

    def __init__(self, record: Record, folders: Sequence[Path], own: Table, is_wide: bool) -> None:
        self.folders = folders
        self.is_wide = is_wide  # folders that nobody named were looked through
        self.own = own
        self.key = record.key
        self.inputs = [_Input(one) for one in record.inputs]
        self._taken: set[Path] = set()  # two inputs never share a checkpoint

    def run(self) -> list[_Input]:
        """Look for every input by name and digest, then by name alone, then by digest alone."""
        # All inputs that are as recorded come first: their format is known to be right, and no
        # changed input may take a checkpoint that is exactly another one.
        for one in self.inputs:
            self._find_recorded(one)
        for one in self.inputs:
            if one.path is None:
                self._find_readable(one)
        self._find_renamed([one for one in self.inputs if one.path is None])
        return self.inputs

    def _list_paths(self, recorded: records.Input) -> list[Path]:
        """Return the paths with an input's name that no other input has taken."""
        found = _find_named(recorded, self.folders, self.own)
        return [path for path in found if path not in self._taken]

    def _take(self, one: _Input, path: Path, files: tuple[File, ...]) -> None:
        one.path, one.files = path, files
        self._taken.add(path)

    def _find_recorded(self, one: _Input) -> None:
        """Take the first checkpoint of the name that is as recorded."""
        for path in self._list_paths(one.recorded):
            with contextlib.suppress(PolyakError, OSError):
                files = _list_files(path, one.recorded.size, self.key)
                if _is_recorded(files, one.recorded):
                    self._take(one, path, files)
                    one.is_recorded = True
                    return

    def _find_readable(self, one: _Input) -> None:
        """Take the first checkpoint of the name that can be read and has the expected format."""
        for path in self._list_paths(one.recorded):
            try:
                (table,) = formats.scan([find_file(path)], key=self.key)
                self._check_format(path, table.format)
            except StoreError:
                raise
            except PolyakError as error:
                one.error = one.error or str(error)  # of the first folder, the likeliest
            except OSError as error:
                one.error = one.error or f"{shown(path)}: cannot be read: {error.strerror}"
            else:
                self._take(one, path, table.files)
                one.is_recorded = _is_recorded(table.files, one.recorded)
                return

    def _check_format(self, path: Path, found: str) -> None:
        """Refuse a format that is not that of the inputs which are as recorded."""
        known = next((one.path for one in self.inputs if one.path and one.is_recorded), None)
        expected = detect(find_file(known)) if known else found
        if found != expected:
            one, other = (find_format(name).name for name in (found, expected))
            raise FormatError(
                f"{shown(path)}: is a {one} file, but other checkpoints of the record are {other}"
            )

    def _find_renamed(self, missing: Sequence[_Input]) -> None:
        """Take checkpoints of other names that have the digests of missing inputs."""
        wanted = [one for one in missing if one.recorded.sampled or one.recorded.sha256]
        names = {one.recorded.name for one in self.inputs}
        sizes = {one.recorded.size for one in wanted}
        for path in _find_others(names, self.folders, self.own) if wanted else ():
            with contextlib.suppress(PolyakError, OSError):
                nbytes = path.stat().st_size
                if nbytes in sizes or _is_folder(path):
                    self._take_renamed(wanted, path, _list_files(path, nbytes, self.key))

    def _take_renamed(self, wanted: Sequence[_Input], path: Path, files: tuple[File, ...]) -> None:
        """Take a checkpoint of another name for the input whose digest it has, if there is one."""
        sampled = hashing.compute_sampled_digest(files)
        # Records of polyak 0.1.0 have no other digest than that of all bytes.
        digests = () if all(one.recorded.sampled for one in wanted) else hashing.hash_files(files)
        for one in wanted:
            recorded = one.recorded
            same = recorded.sampled == sampled if recorded.sampled else recorded.sha256 == digests
            if one.path is None and same:
                self._take(one, path, files)
                one.is_recorded = one.is_renamed = True
                return


def _find_named(recorded: records.Input, folders: Sequence[Path], own: Table) -> Iterator[Path]:
    """Yield what has an input's path or name in the folders, or is such a folder itself.

    The average's own files are left out.
    """
    for folder in folders:
        places = dict.fromkeys([folder / recorded.path, folder / recorded.name])
        found = [path for path in places if os.path.exists(path)]  # noqa: PTH110 - see `_is_folder`
        yield from (path for path in found if not _is_part(path, own))
        if not found and folder.name == recorded.name and _is_checkpoint(folder):
            yield folder


def _find_others(names: set[str], folders: Sequence[Path], own: Table) -> Iterator[Path]:
    """Yield what has another name than the inputs, or such a name in another folder."""
    for folder in folders:
        for path in sorted(_list_entries(folder), key=make_natural_key):
            if not _is_folder(path) or _is_checkpoint(path):
                if path.name not in names and not _is_part(path, own):
                    yield path
            else:
                yield from (one for one in _list_entries(path) if one.name in names)


def _list_entries(folder: Path) -> list[Path]:
    """Return what a folder holds, without hidden entries; nothing if it cannot be read."""
    with contextlib.suppress(OSError):
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    return []


def _list_folders_below(folder: Path) -> Iterator[Path]:
    """Yield the folders in a folder, then those in these."""
    near = [path for path in _list_entries(folder) if _is_folder(path)]
    yield from near
    for one in near:
        yield from (path for path in _list_entries(one) if _is_folder(path))


def _is_folder(path: Path) -> bool:
    """Return whether a path is a folder; unlike `Path.is_dir`, never raise."""
    return os.path.isdir(path)  # noqa: PTH112 - Path's raises where one may not look


def _is_checkpoint(folder: Path) -> bool:
    """Return whether a folder is one checkpoint."""
    with contextlib.suppress(PolyakError, OSError):
        return find_file(folder) != folder
    return False


def _is_part(path: Path, own: Table) -> bool:
    """Return whether a file is one of the average's."""
    with contextlib.suppress(PolyakError, OSError):
        return read_version(find_file(path)) in [version for _, version in own.files]
    return False


def _list_files(path: Path, nbytes: int, key: str) -> tuple[File, ...]:
    """Return the files of a checkpoint that may have ``nbytes`` bytes.

    Raises:
        PolyakError: it cannot be read as a checkpoint.
        OSError: it has gone.
    """
    opener = find_file(path)
    status = opener.stat()
    # The headers of a single file need not be read: its digest says whether it is the one.
    if stat.S_ISREG(status.st_mode) and opener == path and status.st_size == nbytes:
        return (File(str(path), read_version(path, status)),)
    (table,) = formats.scan([opener], key=key)
    return table.files


def _is_recorded(files: Sequence[File], recorded: records.Input) -> bool:
    """Return whether a checkpoint has the recorded size, and the digest if there is one."""
    if sum(file.version.size for file in files) != recorded.size:
        return False
    if recorded.sampled:
        return hashing.compute_sampled_digest(files) == recorded.sampled
    return not recorded.sha256 or hashing.hash_files(files) == recorded.sha256


def _find_folders_beside(record: Record, own: Table) -> tuple[list[Path], list[str]]:
    """Return the folders to search besides that of the average, and notes.

    If several hold files of the names, only digests can say which is meant.
    """
    beside = _find_folder(own, record)
    named = [
        folder
        for folder in _list_entries(beside)
        if _is_folder(folder) and any(any(_find_named(one, [folder], own)) for one in record.inputs)
    ]
    if all(one.sampled or one.sha256 for one in record.inputs):
        return [*named, *_find_folders_further(record, own, beside, named)], []
    # Without digests, sizes are all there is: a folder of other sizes is not meant.
    if all(_has_recorded(beside, one, own, record.key) for one in record.inputs):
        return [], []
    likely = [
        folder
        for folder in named
        if any(_has_recorded(folder, one, own, record.key) for one in record.inputs)
    ]
    if len(likely) < 2:
        return likely or named, []
    several = " and ".join(shown(folder) for folder in likely[:2])
    return [], [f"{several} hold files with these names: choose one with --source"]


def _find_folders_further(
    record: Record, own: Table, beside: Path, named: Sequence[Path]
) -> list[Path]:
    """Return folders two levels below the average's or the working folder that hold an input.

    So far away a name says nothing: the digest must be that of the record.
    """
    if all(any(_find_named(one, [beside, *named], own)) for one in record.inputs):
        return []
    working = Path()
    further = itertools.chain(_list_folders_below(beside), [working], _list_folders_below(working))
    return [
        folder
        for folder in itertools.islice(further, _MOST_FOLDERS)
        if folder not in named
        and any(
            os.path.exists(folder / one.path)  # noqa: PTH110 - see `_is_folder`
            and _has_recorded(folder, one, own, record.key)
            for one in record.inputs
        )
    ]


def _has_recorded(folder: Path, recorded: records.Input, own: Table, key: str) -> bool:
    """Return whether a folder has an input, under its name and as recorded."""
    for path in _find_named(recorded, [folder], own):
        with contextlib.suppress(PolyakError, OSError):
            if _is_recorded(_list_files(path, recorded.size, key), recorded):
                return True
    return False


# --- comparing ------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Verifier:
    """Verifies one average whose record could be read."""

    output: Path
    table: Table
    record: Record
    search: _Search
    machine: averaging_options.Options
    inputs: list[_Input] = field(default_factory=list)
    problems: list[Discrepancy] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def run(self) -> Verification:
        """Verify inputs, statistics and output."""
        if not self.record.is_sealed:
            self.notes.append(
                f"its record, by polyak {shown(self.record.version, 40)}, has no digest of "
                "itself, so a change of the record alone may go unnoticed"
            )
        self.inputs = self.search.run()
        gathered: tuple[str, ...] = ()
        try:
            self._compare_inputs()
            gathered = self._compare_statistics()
            self._compare_architecture()
            plan = self._make_plan()
            if plan:
                self._compare_output(plan)
            self._compare_copies()
        except (FormatError, MismatchError, CheckpointError) as error:
            gathered = ()
            self._explain(error)
        check_unchanged(self.table.files)
        return Verification(
            output=self.output,
            inputs=tuple((one.recorded.name, one.path) for one in self.inputs),
            problems=tuple(self.problems),
            nbytes=self.table.size,
            unverified=gathered,
            notes=tuple(self.notes),
        )

    def _make_plan(self) -> Plan | None:
        """Return the plan by which the average was made, None if a checkpoint is missing.

        Raises:
            PolyakError: the checkpoints cannot be averaged as recorded.
        """
        paths = [one.path for one in self.inputs if one.path]
        if len(paths) < len(self.inputs):
            return None
        given = zip(paths, self.record.inputs, strict=True)
        chosen = tuple(Checkpoint(path, one.epoch, None) for path, one in given)
        positions = tuple(float(k) for k in range(1, len(paths) + 1))
        # The type is not the checkpoints' concern, and neither is that of the output.
        options: Any = {**self.record.options, **self.machine}
        try:
            settings = averaging_options.parse(options)
            untyped = replace(settings, tensors=replace(settings.tensors, dtype=None))
            selected = Selection(chosen, (), (), positions)
            plan = planning.plan_average(selected, None, untyped)
        except UsageError as error:
            raise FormatError(f"its record has options that are refused: {error}") from None
        has_model = bool(self.record.architecture)
        return replace(
            plan,
            mean=self.record.mean,
            settings=settings,
            output_form=outputs.find_form(self.table, plan.tables[-1], completed=has_model),
            # The record has what was done, and not what was asked for.
            drop_optimizer=settings.tensors.optimizer == "drop",
            stored_dtypes=map_stored_dtypes(
                plan.averaged_rows, settings.tensors.dtype, plan.tables[-1]
            ),
        )

    def _explain(self, error: PolyakError) -> None:
        """Say why nothing can be recomputed, and which input is to blame."""
        found = [(one, one.path) for one in self.inputs if one.path]
        outcomes = formats.probe([find_file(path) for _, path in found], key=self.record.key)
        blamed = [
            one.make_problem(f"cannot be averaged: {outcome}")
            for (one, _), outcome in zip(found, outcomes, strict=True)
            if isinstance(outcome, PolyakError)
        ]
        if not blamed:
            text = f"the average cannot be recomputed: {error}"
            blamed = [Discrepancy("file", self.table.path.name, text)]
        self.problems += blamed

    # --- inputs -----------------------------------------------------------------------------------

    def _compare_inputs(self) -> None:
        """Name the inputs that are missing, renamed, changed or exchanged."""
        where = " or ".join(dict.fromkeys(shown(folder) for folder in self.search.folders))
        wide = ""
        if self.search.is_wide:
            # Of a bucket, only the objects beside the average are listed.
            is_local = locate(os.fspath(self.table.path)) == os.fspath(self.table.path)
            below = "two levels of folders below" if is_local else "whose folders are not searched"
            wide = f", {below}, or those of the working folder"
        for one in self.inputs:
            if one.path is None:
                text = f"no file of that name in {where}{wide}; name its folder with --source"
                text = f"cannot be averaged: {one.error}" if one.error else f"is missing: {text}"
                self.problems.append(one.make_problem(text))
                continue
            if one.is_renamed:
                how = "moved" if one.path.name == one.recorded.name else "renamed"
                text = f"is missing, but {shown(one.path)} holds what was averaged: it was {how}"
                self.problems.append(one.make_problem(text))
            self._compare_digests(one)

    def _compare_digests(self, one: _Input) -> None:
        """Compare the size and all digests of an input that was found."""
        recorded = one.recorded
        if one.size != recorded.size:
            text = f"has {one.size} bytes, but had {recorded.size} when it was averaged"
            self.problems.append(one.make_problem(text))
            return
        digests = hashing.hash_files(one.files) if recorded.sha256 else ()
        # The sampled digest may miss a change that the digest of all bytes shows.
        if one.is_recorded and digests == recorded.sha256:
            return
        sampled = hashing.compute_sampled_digest(one.files)
        for other in self.record.inputs:
            if (other.sampled, other.sha256) == (other.sampled and sampled, digests):
                text = f"holds what '{shown(other.path, 80)}' held: the files were exchanged"
                break
        else:
            what = "SHA-256" if recorded.sha256 else "sampled SHA-256"
            text = f"was changed: its {what} is not the recorded one"
        self.problems.append(one.make_problem(text))

    # --- the output -------------------------------------------------------------------------------

    def _compare_statistics(self) -> tuple[str, ...]:
        """Compare statistics that cannot be recomputed with their digests; return their names."""
        if not self.record.recalibrated:
            return ()
        values = recalibration.read_statistics(self.table)
        what = f"{len(values)} BatchNorm statistics were recalibrated on rows of data"
        if self.record.statistics is None:
            self.notes.append(f"{what}, and their digest was not recorded: they are not verified")
            return tuple(values)
        self.notes.append(f"{what}: they are compared with recorded digests, and not recomputed")
        digests = recalibration.hash_values(self.table, values)
        for name, digest in digests.items():
            if digest != self.record.statistics[name]:
                text = f"tensor '{shown(name)}' is not as recalibrated: its SHA-256 differs"
                self.problems.append(Discrepancy("tensor", name, text))
        return tuple(values)

    def _compare_architecture(self) -> None:
        """Compare the model to which weights were added with its recorded digest."""
        if self.record.architecture:
            self.notes.append(
                "its tensors were added to a whole model, whose layers are compared with the "
                "record; its training configuration and assets are not"
            )
            if self.record.architecture != self.table.config:
                text = "the configuration of the model is not the recorded one"
                self.problems.append(Discrepancy("metadata", self.table.path.name, text))

    def _compare_output(self, plan: Plan) -> None:
        """Average once more and compare; say what differs, and what was changed."""
        deviation = self._recompute(plan)
        if not deviation:
            return
        blamed = any(problem.kind == "input" for problem in self.problems)
        self.problems += [Discrepancy("tensor", one.name, str(one)) for one in deviation.tensors]
        name = self.table.path.name
        self.problems += [Discrepancy("metadata", name, text) for text in deviation.outside]
        # A newer version may write the same tensors with other metadata, which is no damage.
        if deviation.outside and not deviation.tensors and self.record.version != __version__:
            self.notes.append(
                f"every tensor is equal bit for bit; the file was written by polyak "
                f"{shown(self.record.version, 40)}, and this is {__version__}, which may lay out "
                "the rest of the file differently"
            )
        if not blamed:
            self.notes.append(self._describe_suspects())

    def _recompute(self, plan: Plan) -> Deviation:
        """Average once more and compare with the output."""
        path = self.table.path
        written = Written(
            files=[Path(file.path) for file in self.table.files],
            opened=Path(
                "copy", path.relative_to(find_format(self.table.format).find_root(self.table))
            )
            if _is_folder_output(self.table, self.record)
            else Path(path.name),
            record=self.record.text,
            nbytes=self.table.size,
            recalibrated=self.table if self.record.recalibrated else None,
        )
        near = [_find_folder(self.table, self.record), Path(tempfile.gettempdir())]
        return compare_again(plan, written, near, table=self.table)

    def _compare_copies(self) -> None:
        """Compare the copied files of an output folder with their digests, and its record.

        Weights that were taken out of their folder have no copied files to compare.
        """
        folder = find_format(self.table.format).find_root(self.table)
        if not self.record.weights or not _find_record_beside(self.table).exists():
            return
        for text in carried_files.find_changed(folder, self.record.carried):
            self.problems.append(Discrepancy("file", str(folder), text))
        with contextlib.suppress(FormatError), open_input(_find_record_beside(self.table)) as file:
            expected = f"{self.record.text}\n".encode()
            if file.read(0, len(expected) + 1) != expected:
                text = f"'{RECORD_NAME}' is not the record in the weights"
                self.problems.append(Discrepancy("record", RECORD_NAME, text))

    def _describe_suspects(self) -> str:
        """Say what may have been changed, where no input is known to be."""
        if any(not one.sampled and not one.sha256 for one in self.record.inputs):
            return (
                "no digests of the inputs were recorded (--hash), so it is unknown whether an "
                "input or the average was changed"
            )
        suspects = [one.path for one in self.record.inputs if not one.is_covered]
        if not suspects:
            return "every input has the SHA-256 recorded: the average was changed"
        names = ", ".join(f"'{shown(name, 80)}'" for name in suspects)
        return (
            "every input has the sampled SHA-256 recorded, which does not cover all bytes of "
            f"{names}: one of these or the average was changed; with --hash, the record shows "
            "which"
        )

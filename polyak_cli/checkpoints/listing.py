"""Expand directories, patterns and files into the candidates for checkpoints of a run.

Looks only at names and at os.stat(), so a pipe or a device that is named like a checkpoint cannot
block the program.  Opens no checkpoint and does not order them.
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import itertools
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from polyak_cli.checkpoints import dated
from polyak_cli.checkpoints.inner_folders import INCOMPLETE, find_incomplete, find_inner
from polyak_cli.checkpoints.names import split_words
from polyak_cli.errors import CheckpointError, UsageError, shown, word_count, word_rest
from polyak_cli.formats.catalogue import (
    FORMATS,
    MODULES,
    OPENERS,
    choose_openers,
    is_known_content,
    name_file,
    name_folder,
)
from polyak_cli.formats.foreign import EMPTY, JSON, NUMPY, ZIP, name_by_ending
from polyak_cli.formats.model_folders import STATE, is_state_folder, is_training_state
from polyak_cli.storage import mirrors

StrPath = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One saved model of a run: a file, or a folder that is one checkpoint.

    Attributes:
        path: the file or folder.
        epoch: the epoch in its name; None if the file was given by itself and has no number.
        metric: the value that the best checkpoints were chosen by; otherwise None.
    """

    path: Path
    epoch: int | None
    metric: float | None


@dataclass(frozen=True, slots=True)
class PassedOver:
    """A file that was excluded, or found in a directory and not taken for a checkpoint.

    Attributes:
        path: the file or folder.
        reason: why, in a few words.
    """

    path: Path
    reason: str


class Problem(NamedTuple):
    """Something wrong with a checkpoint of a run, or with the run.

    Attributes:
        kind: of a checkpoint: "unreadable", "nonfinite", "identical", "outlier", "other model",
            "other run", "duplicate epoch" or "no epoch".  Of a run: "gap", "resumed", "same file",
            "quantised", "factors", or "other run" if files of two formats lie together.
        text: a sentence that names the file.
        path: of the checkpoint or folder, if the search for checkpoints found the problem.
    """

    kind: str
    text: str
    path: Path = Path()

    def data(self) -> dict[str, str]:
        """Return it as JSON types."""
        return {"kind": self.kind, "text": self.text}


#: Suffixes of the files in a directory that are taken for checkpoints -> their kind.  The first
#: suffix that fits counts.  The format is recognised later, by content.
KINDS_OF_FILE = dict(
    sorted(
        (pair for entry in FORMATS for pair in entry.kinds.items()),
        key=lambda pair: not pair[0].startswith(".weights"),  # ".weights.h5" ends in ".h5" too
    )
)

#: The kind of a folder that is one checkpoint.
_FOLDER = "checkpoint folders"

#: The suffix of Lightning's files, and of the folders that it saves from several processes.
_LIGHTNING = ".ckpt"

#: The files by which a folder is opened, and the folders in it that hold such a file.
_OPENED = frozenset(name.partition("/")[0] for name in OPENERS)

#: A data shard of a TensorFlow checkpoint, which is named by its .index file.
_DATA = re.compile(r"(.+)\.data-\d{5}-of-\d{5}", re.DOTALL)

#: A shard of a sharded save of Keras, which is named by its .weights.json file.
_SHARD = re.compile(r"(.+)_[0-9]{5,}\.weights\.h5")

#: A shard of a sharded checkpoint of Transformers, which is named by its index.
_PIECE = re.compile(r".*-\d{5}-of-\d{5}\.(safetensors|bin)", re.IGNORECASE | re.DOTALL)

#: A part of a checkpoint that DeepSpeed's ZeRO has divided among processes.
_ZERO = re.compile(r"(bf16_|fp16_)?zero_pp_rank_\d.*")

#: The process that wrote a file, in its name.
_RANK = re.compile(r"rank_?\d+")

#: A folder of a module of sentence-transformers, such as 2_Dense.
_MODULE = re.compile(r"\d{1,2}_\w+")

#: How the names of files end that name the other files of a checkpoint, which begin alike.
_INDICES = (".safetensors.index.json", ".weights.json", ".bin.index.json", ".index")

_SHARD_ENDING = re.compile(
    r"\.data-\d{5}-of-\d{5}|_\d{5,}\.weights\.h5|-\d{5}-of-\d{5}\.(?:safetensors|bin)"
)

#: Suffixes of Keras weights without an architecture.
WEIGHTS_SUFFIXES = (".weights.h5", ".weights.json")

#: The same for whole models: weights without an architecture do not count.
KINDS_OF_MODEL = {".weights.h5": "", ".h5": ".h5", ".hdf5": ".h5", ".keras": ".keras"}

#: Parts of a name, between dots, by which programs mark a file that they have not finished.
_UNFINISHED = split_words(
    "tmp temp part partial incomplete unfinished crdownload download swp swo lock"
)

#: How Orbax calls a folder until it is complete, and what it leaves when it is killed.
_ORBAX_UNFINISHED = re.compile(r".*\.orbax-checkpoint-tmp(-\d+)?", re.DOTALL)

#: Files of a folder without checkpoints that are looked into.
_LOOKED_AT = 1000

#: What also lies beside checkpoints that are elsewhere.
_SAY_NOTHING = (JSON, EMPTY, NUMPY, ZIP)

#: How a URL begins.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://?")

#: Folders beside one another, and names in each, that are looked through for checkpoints.
_MOST_FOLDERS, _MOST_NAMES = 100, 10_000

#: Why an average is passed over.
_OURS = "written by polyak"

#: Why a file is passed over whose name says nothing.
_NOT_NAMED_LIKE = "not named like a "
_NO_CHECKPOINT_BY_NAME = f"{_NOT_NAMED_LIKE}checkpoint"

#: Why a folder that is no checkpoint is passed over.
_PLAIN_FOLDER = "a directory"

_SPECIAL_FILES = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


@dataclass(frozen=True, slots=True)
class Pool:
    """All candidates.  ``as_given``: each was given by itself, so their order is the user's."""

    paths: tuple[Path, ...]
    as_given: bool
    passed_over: tuple[PassedOver, ...]
    notes: tuple[str, ...]


def find_candidates(
    sources: Sequence[StrPath],
    exclude: Sequence[str],
    growing: bool,
    find_polyak_outputs: Callable[[Sequence[Path]], Collection[Path]],
    on_problem: Callable[[Problem], None],
    in_given_order: bool = False,
    use_ema: bool = False,
) -> Pool:
    """Find all candidates; see `select`.

    Ambiguities are passed to ``on_problem``.  If it does not raise, the search continues.
    """
    unusable: list[Path] = []
    given: list[Path] = []
    found: dict[tuple[int, int], Path] = {}
    passed_over: list[PassedOver] = []
    unmatched = dict.fromkeys(exclude)
    as_given = True
    for source in sources:
        paths, listed = expand_source(source)
        as_given = as_given and not listed
        if listed:
            paths = [path for path in paths if not _is_part(path)]
        kept, passed = _sift(paths, listed, exclude, unmatched)
        if listed:
            if not kept:
                kept, passed = _look_into(passed)
            kept, passed = _open_numbered(source, kept, passed, use_ema=use_ema)
            kept, odd = _separate_kinds(source, kept, on_problem)
            cut = find_incomplete([p.path for p in passed if p.reason == _PLAIN_FOLDER], kept)
            passed = [PassedOver(p.path, INCOMPLETE) if p.path in cut else p for p in passed] + odd
        files, others = _read_identities(kept, on_problem)
        unusable += others
        given += [] if listed else [path for path, _ in files]
        if listed:
            ours = _find_averages([path for path, _ in files], find_polyak_outputs)
            passed += [PassedOver(path, _OURS) for path, _ in files if path in ours]
            files = [(path, identity) for path, identity in files if path not in ours]
            files, links = _pass_over_links(files)
            passed += links
            if not files and not unusable and not growing:
                raise CheckpointError(describe_nothing_found(source, passed))
        passed_over += passed
        for path, identity in files:
            if identity in found:
                on_problem(Problem("same file", _describe_same_file(found[identity], path), path))
            found.setdefault(identity, path)
    if not found and not unusable and as_given:
        raise CheckpointError("no checkpoint is left: --exclude matches every file")
    if given and len(found) > 1 and not in_given_order:
        for path in _report_averages(given, list(found.values()), find_polyak_outputs, on_problem):
            found = {identity: one for identity, one in found.items() if one != path}
            passed_over.append(PassedOver(path, _OURS))
    notes = tuple(f"--exclude '{shown(pattern)}' matched nothing" for pattern in unmatched)
    return Pool((*found.values(), *unusable), as_given, tuple(passed_over), notes)


def _find_averages(
    paths: Sequence[Path], find_polyak_outputs: Callable[[Sequence[Path]], Collection[Path]]
) -> set[Path]:
    """Return the checkpoints that this tool wrote."""
    opened = {find_file(path): path for path in paths}
    return {opened[file] for file in find_polyak_outputs(list(opened))} if opened else set()


def _report_averages(
    given: Sequence[Path],
    found: Sequence[Path],
    find_polyak_outputs: Callable[[Sequence[Path]], Collection[Path]],
    on_problem: Callable[[Problem], None],
) -> list[Path]:
    """Report and return averages that were given by themselves, beside files that are none.

    A shell that expands a pattern names an average which lies in the run's folder too.
    """
    ours = _find_averages(given, find_polyak_outputs)
    # An average of averages is a model soup: they were meant.
    if ours.issuperset(found):
        return []
    averages = [path for path in given if path in ours]
    for path in averages:
        text = (
            f"{shown(path)} is an average that polyak wrote, beside checkpoints that are none: "
            f"{advise_exclusion(path)}; if it shall be averaged too, add --order given"
        )
        on_problem(Problem("other run", text, path))
    return averages


def _read_identities(
    paths: Sequence[Path], on_problem: Callable[[Problem], None]
) -> tuple[list[tuple[Path, tuple[int, int]]], list[Path]]:
    """Return the regular files with device and inode, and the other paths, which are reported."""
    files: list[tuple[Path, tuple[int, int]]] = []
    others: list[Path] = []
    for path in paths:
        try:
            files.append((path, _read_identity(path)))
        except CheckpointError as error:
            on_problem(Problem("unreadable", str(error), path))
            others.append(path)
    return files, others


def refuse(problem: Problem) -> None:
    """Raise a problem as an error; `select` does so with the first problem."""
    raise CheckpointError(problem.text) from None


def list_sources(sources: StrPath | Sequence[StrPath]) -> Sequence[StrPath]:
    """Return a sequence of sources.

    A single string is wrapped, because a string is itself a sequence of strings: its letters.
    """
    sources = [sources] if isinstance(sources, (str, os.PathLike)) else sources
    if not sources:
        raise UsageError("no checkpoints named: give a directory, a pattern or files")
    return sources


def enter(source: StrPath) -> str:
    """Return the local name of a source: what a URL names is listed, and read when it is needed.

    Raises:
        UsageError: it is a URL that is not supported, or one that `Path` has taken a slash from.
        PolyakError: it cannot be listed.
    """
    text = os.fspath(source)
    if _URL.match(text):
        text = mirrors.enter(text)
        mangled = _URL.match(text)
        # A folder of such a name may be there.
        if mangled and not os.path.lexists(mangled[0]):
            raise UsageError(
                f"{shown(text)}: is a URL with one slash, as pathlib.Path makes it; give URLs as "
                f"texts, like {shown(mangled[0])}/{shown(text[mangled.end() :])}"
            )
    return text


def refuse_url(text: str, what: str = "this") -> None:
    """Refuse a URL, which must not become a path, where only a local file will do.

    Raises:
        UsageError: it is one.
    """
    scheme = _URL.match(text)
    # A pathlib.Path has lost a slash already; such a folder may still be there.
    if scheme and (scheme[0].endswith("//") or not os.path.lexists(scheme[0])):
        raise UsageError(
            f"{shown(text)}: {what} must be a local file; name a path, and copy the file to or "
            "from the storage"
        )


def expand_source(source: StrPath) -> tuple[list[Path], bool]:
    """Return the paths of a source, and whether they were listed rather than given by itself."""
    text = os.fspath(source)
    # Path("") is the current directory; an empty name comes from an unset shell variable.
    if not text or "\0" in text:
        raise CheckpointError(
            f"{shown(text)!r} is not a path: give a directory, a pattern or files"
        )
    text = enter(text)
    try:
        mode = os.stat(text).st_mode  # noqa: PTH116 - Path() would forget a trailing slash
    except OSError as error:
        if glob.has_magic(text) and not os.path.lexists(text):
            return _expand_pattern(text), True
        # TensorFlow names a checkpoint by the common prefix of its files.
        if error.errno == errno.ENOENT and os.path.isfile(f"{text}.index"):  # noqa: PTH113 - as above
            return [Path(f"{text}.index")], False
        raise CheckpointError(_describe_unusable(Path(text), error)) from error
    if not stat.S_ISDIR(mode):
        return [_find_folder(Path(text))], False
    try:
        with os.scandir(text) as entries:
            names = sorted(entry.name for entry in entries)
    except OSError as error:
        raise CheckpointError(
            f"{shown(text)}: the directory cannot be listed: {error.strerror}"
        ) from error
    listed = [Path(text, name) for name in names]
    # A run's folder may hold its final model beside its checkpoints; then it is not one checkpoint.
    folder = Path(text)
    may_be_one = not _OPENED.isdisjoint(names) or dated.is_dated(folder)
    is_one = may_be_one and bool(_find_openers(folder))
    if is_one and not any(_is_another(path) for path in listed):
        return [folder if folder.name not in ("", "..") else folder.resolve()], False
    return listed, True


def _is_another(path: Path) -> bool:
    """Return whether a path in a folder is a checkpoint besides the folder's own."""
    if path.name in _OPENED or _PIECE.fullmatch(path.name) or is_state_folder(path.name):
        return False
    if (path / "_METADATA").is_file() and path.with_name("_CHECKPOINT_METADATA").is_file():
        return False  # an item of a step
    # A model of several modules may hold other models, which have no number.
    has_modules = path.with_name(MODULES).is_file()
    if _is_module(path) or (has_modules and not re.search(r"\d", path.name)):
        return False
    kind = _find_kind_by_suffix(path, KINDS_OF_FILE)
    return kind.startswith(".safetensors") or bool(_find_openers(path))


def _is_module(path: Path) -> bool:
    """Return whether a folder is that of a module of the model beside it."""
    return bool(_MODULE.fullmatch(path.name)) and path.with_name(MODULES).is_file()


def find_file(path: Path) -> Path:
    """Return the file by which a checkpoint is opened: the path itself, or a file in the folder.

    Raises:
        CheckpointError: the folder has several such files.
    """
    found = _find_openers(path)
    if len(found) > 1:
        raise CheckpointError(
            f"{shown(path)}: holds {shown(found[0].name)} and {shown(found[1].name)}, and either "
            "could be the checkpoint; move one away"
        )
    return found[0] if found else path


def read_times(paths: Sequence[Path]) -> list[float | None]:
    """Return when each checkpoint was written, in seconds since 1970; None for one that is gone.

    A checkpoint of several files, such as shards and their index, is as new as the newest of them.
    """
    listed: dict[Path, list[str]] = {}
    return [_read_time(path, listed) for path in paths]


def _read_time(path: Path, listed: dict[Path, list[str]]) -> float | None:
    """Return a checkpoint's time; ``listed`` keeps the names in each folder."""
    try:
        file = find_file(path)
        stem = next((file.name[: -len(end)] for end in _INDICES if file.name.endswith(end)), None)
        if stem is None:
            return file.stat().st_mtime
        if file.parent not in listed:
            listed[file.parent] = os.listdir(file.parent)  # noqa: PTH208 (only names)
        others = (name for name in listed[file.parent] if name.startswith(stem))
        shards = [name for name in others if _SHARD_ENDING.fullmatch(name, len(stem))]
        return max((file.parent / name).stat().st_mtime for name in (file.name, *shards))
    except (OSError, CheckpointError):
        return None


def _find_openers(path: Path) -> list[Path]:
    """Return the files by which a folder could be opened as one checkpoint."""
    # A name with a known suffix is no folder; this saves a stat() for each file of a long run.
    # Lightning gives folders the suffix of its files.
    kind = _find_kind_by_suffix(path, KINDS_OF_FILE)
    if kind not in ("", _LIGHTNING) or not path.is_dir():
        return []
    if dated.is_dated(path):
        return [path / dated.MODEL] if (path / dated.MODEL).is_file() else []
    there = [name for name in OPENERS if (path / name).is_file()]
    return [path / name for name in choose_openers(there)]


def _find_folder(path: Path) -> Path:
    """Return the folder of which a file is the opener, as its name has the epoch; else the file."""
    known = path.name in OPENERS and path.parent.name not in ("", "..")
    return path.parent if known and _find_openers(path.parent) == [path] else path


def _expand_pattern(pattern: str) -> list[Path]:
    paths = sorted(
        _find_folder(Path(match))
        for match in glob.glob(pattern)  # noqa: PTH207 - may be absolute
    )
    if not paths:
        raise CheckpointError(f"{shown(pattern)}: no file matches this pattern or has this name")
    return paths


def _sift(
    paths: Sequence[Path], listed: bool, exclude: Sequence[str], unmatched: dict[str, None]
) -> tuple[list[Path], list[PassedOver]]:
    """Separate the candidates from the rest; remove patterns that match from ``unmatched``."""
    kept: list[Path] = []
    passed: list[PassedOver] = []
    for path in paths:
        matching = [pattern for pattern in exclude if is_matched(path, pattern)]
        for pattern in matching:
            unmatched.pop(pattern, None)
        reason = f"--exclude '{shown(matching[0])}'" if matching else None
        if reason is None and listed:
            reason = find_objection(path, KINDS_OF_FILE, "checkpoint")
        if reason is None:
            kept.append(path)
        else:
            passed.append(PassedOver(path, reason))
    return kept, passed


def _look_into(passed: Sequence[PassedOver]) -> tuple[list[Path], list[PassedOver]]:
    """Separate files whose names say nothing from the rest, by what is in them.

    Many programs give checkpoints no suffix (``do_00010000``), or a number (``params.00001``).
    A few bytes of each are read, and only where no file is named like a checkpoint.
    """
    unknown = [one.path for one in passed if one.reason == _NO_CHECKPOINT_BY_NAME][:_LOOKED_AT]
    found = [path for path in unknown if path.is_file() and is_known_content(path)]
    return found, [one for one in passed if one.path not in found]


def _open_numbered(
    source: StrPath, kept: list[Path], passed: list[PassedOver], *, use_ema: bool
) -> tuple[list[Path], list[PassedOver]]:
    """Return the models in numbered folders, where no checkpoint of the run's folder has a number.

    What the run's folder holds besides is then the final model, which Diffusers saves there.

    Raises:
        CheckpointError: the numbered folders hold several models.
    """
    if any(re.search(r"\d", path.name) for path in kept):
        return kept, passed
    plain = [one.path for one in passed if one.reason == _PLAIN_FOLDER]
    found = find_inner(plain, lambda folder: bool(_find_openers(folder)), use_ema=use_ema)
    if found is None:
        return kept, passed
    if not found.chosen:
        where = Path(source) / "*"
        patterns = " or ".join(f"'{shown(where / name)}'" for name in found.names)
        raise CheckpointError(
            f"{shown(os.fspath(source))}: {word_count(len(found.folders), 'folder')} such as "
            f"{shown(found.folders[-1].name, 60)} hold several models each; average one after the "
            f"other: {patterns}"
        )
    left = [PassedOver(path, reason) for path, reason in found.left]
    left += [PassedOver(path, "no checkpoint of the run, by its name") for path in kept]
    others = [one for one in passed if one.path not in found.folders]
    return [*found.chosen], [*others, *left]


def _pass_over_links(
    files: Sequence[tuple[Path, tuple[int, int]]],
) -> tuple[list[tuple[Path, tuple[int, int]]], list[PassedOver]]:
    """Separate second names without a number, such as last.ckpt, of files that have one too.

    Some programs make symbolic links, and others, such as timm, hard ones.
    """
    # Composer calls a link latest-rank0.pt, by the process that wrote the file.
    is_numbered = {path: re.search(r"\d", _RANK.sub("", path.name)) for path, _ in files}
    numbered = {identity: path for path, identity in files if is_numbered[path]}
    kept, passed = [], []
    for path, identity in files:
        other = numbered.get(identity, path)
        if other == path or is_numbered[path]:
            kept.append((path, identity))
        else:
            passed.append(PassedOver(path, f"a link to {shown(other.name, 60)}"))
    return kept, passed


def is_matched(path: Path, pattern: str) -> bool:
    """Return whether a pattern matches a file's name or its whole path."""
    return fnmatch.fnmatchcase(path.name, pattern) or fnmatch.fnmatchcase(str(path), pattern)


def _is_part(path: Path) -> bool:
    """Return whether a file is a data shard of a TensorFlow checkpoint that has an index."""
    shard = _DATA.fullmatch(path.name)
    return shard is not None and path.with_name(f"{shard[1]}.index").is_file()


def find_objection(path: Path, kinds: Mapping[str, str], what: str) -> str | None:
    """Return why a path in a directory is not taken, judged by its name, or None if it is."""
    name = path.name.casefold()
    if name.startswith("."):
        return "hidden"
    if name.endswith("~") or not _UNFINISHED.isdisjoint(re.split(r"[.]|(?<=^tmp)-", name)):
        return "unfinished, by its name"
    if any(_ORBAX_UNFINISHED.fullmatch(part) for part in (name, path.parent.name)):
        return "unfinished, by its name (of Orbax)"
    if name == "checkpoint" and path.is_file():
        return "TensorFlow's list of checkpoints"
    if _DATA.fullmatch(name):
        return "a data shard of a TensorFlow checkpoint whose .index is not here"
    if _PIECE.fullmatch(name):
        return "one shard of several, which belong to an index"
    if _ZERO.fullmatch(name):
        return "a part of a checkpoint of DeepSpeed's ZeRO"
    if is_training_state(name):
        return STATE
    if _is_module(path):
        return "a module of the model beside it"
    if not find_kind(path, kinds):
        return _describe_unknown(path, what)
    shard = _SHARD.fullmatch(path.name)
    whole = path.with_name(f"{shard[1]}.weights.json") if shard else None
    return f"a part of {shown(whole.name)}" if whole and whole.is_file() else None


def _describe_unknown(path: Path, what: str) -> str:
    """Return what a path is whose name is not that of a checkpoint."""
    if path.is_dir():
        foreign, plain = name_folder(path), _PLAIN_FOLDER
    else:
        foreign, plain = name_by_ending(path.name), f"{_NOT_NAMED_LIKE}{what}"
    return foreign.name if foreign else plain


def find_kind(path: Path, kinds: Mapping[str, str] = KINDS_OF_FILE) -> str:
    """Return the kind of a file, judged by its name, or '' if it has none."""
    kind = _find_kind_by_suffix(path, kinds)
    if kind == _LIGHTNING and path.is_dir():
        kind = ""
    return kind or (_FOLDER if kinds is KINDS_OF_FILE and _find_openers(path) else "")


def _find_kind_by_suffix(path: Path, kinds: Mapping[str, str]) -> str:
    name = path.name.casefold()
    return next((kind for end, kind in kinds.items() if name.endswith(end)), "")


def _separate_kinds(
    source: StrPath, paths: Sequence[Path], on_problem: Callable[[Problem], None]
) -> tuple[list[Path], list[PassedOver]]:
    """Separate a directory's checkpoints from single files of other kinds, such as a data set.

    Several files of more than one kind, or one file of each, are reported as a problem.
    """
    kinds = Counter(find_kind(path) for path in paths)
    common = [kind for kind, count in kinds.items() if count > 1] or list(kinds)
    if len(common) > 1:
        one, other = sorted(common)[:2]
        files = "" if other == _FOLDER else " files"  # a folder's kind is the last, as sorted
        text = (
            f"{shown(os.fspath(source))}: holds {kinds[one]} {one} and {kinds[other]} "
            f"{other}{files}, which do not belong to one run; leave one kind out, for example "
            f"with --exclude '*{max({one, other} - {_FOLDER}, key=len)}'"
        )
        on_problem(Problem("other run", text, Path(source)))
    kept = [path for path in paths if find_kind(path) in common]
    reason = f"the only {{}} among {kinds[common[0]]} {common[0]}" if common else ""
    others = [(path, find_kind(path)) for path in paths if find_kind(path) not in common]
    passed = [
        PassedOver(path, reason.format("folder" if kind == _FOLDER else f"{kind} file"))
        for path, kind in others
    ]
    return kept, passed


def _read_identity(path: Path) -> tuple[int, int]:
    """Return device and inode of a regular file.

    Raises:
        CheckpointError: it is anything else.
    """
    try:
        status = find_file(path).stat()
    except OSError as error:
        raise CheckpointError(_describe_unusable(path, error)) from error
    if stat.S_ISREG(status.st_mode):
        return status.st_dev, status.st_ino
    kind = next((kind for test, kind in _SPECIAL_FILES if test(status.st_mode)), "a special file")
    raise CheckpointError(
        f"{shown(path)} is {kind}, not a checkpoint file: {advise_exclusion(path)}"
    )


def _describe_unusable(path: Path, error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return f"{shown(path)} is a symbolic link to itself: {advise_exclusion(path)}"
    if error.errno == errno.ENOENT and path.is_symlink():
        return (
            f"{shown(path)} is a symbolic link to a file that does not exist: "
            f"{advise_exclusion(path)}"
        )
    if error.errno == errno.ENOENT:
        return f"{shown(path)}: no such file or directory"
    return f"{shown(path)} cannot be used: {error.strerror}"


def _describe_same_file(first: Path, second: Path) -> str:
    if str(first) == str(second):
        return f"{shown(first)} is given twice: name each checkpoint once"
    extra = first if first.is_symlink() and not second.is_symlink() else second
    return (
        f"{shown(first)} and {shown(second)} are the same file, by a link or by another form of "
        f"its path: {advise_exclusion(extra, whole=first.name == second.name)}"
    )


def advise_exclusion(path: Path, whole: bool = False) -> str:
    """Return the advice to exclude a file, with a pattern that matches no other in its folder."""
    return f"leave it out with --exclude '{shown(glob.escape(str(path) if whole else path.name))}'"


def exclude_all(paths: Sequence[Path]) -> str:
    """Return the options that exclude files, each by its name, or its path where names repeat."""
    whole = len({path.name for path in paths}) < len(paths)
    names = (glob.escape(str(path) if whole else path.name) for path in paths)
    return " ".join(f"--exclude '{shown(name)}'" for name in names)


def describe_nothing_found(
    source: StrPath,
    passed: Sequence[PassedOver],
    what: str = "checkpoint",
    kinds: Mapping[str, str] = KINDS_OF_FILE,
) -> str:
    """Return the message for a source that holds no candidate."""
    where = shown(os.fspath(source))
    foreign = _describe_foreign(Path(source), passed)
    if foreign:
        return f"{where}: {foreign}"
    below = describe_folders(passed, what, kinds)
    if below:
        return f"{where}: there is no {what} here, but {below}"
    ends = ", ".join(end for end, kind in kinds.items() if kind)
    text = f"{where}: there is no {what} here: looked for files in {ends}"
    if not passed:
        return f"{text}, but the folder is empty"
    some = ", ".join(f"{shown(one.path.name, 60)} ({one.reason})" for one in passed[:3])
    return f"{text}, passed over {some}{word_rest(len(passed) - 3)}"


def describe_folders(
    passed: Sequence[PassedOver],
    what: str = "checkpoint",
    kinds: Mapping[str, str] = KINDS_OF_FILE,
) -> str:
    """Return which folders in a folder without checkpoints hold some; nothing if none does."""
    folders = [one.path for one in passed if one.reason == _PLAIN_FOLDER][:_MOST_FOLDERS]
    names = {folder: _list_candidates(folder, what, kinds) for folder in folders}
    found = [(folder, those) for folder, those in names.items() if those]
    if not found:
        return ""
    if len(found) == 1:
        folder, those = found[0]
        return f"{shown(folder)} holds {word_count(len(those), what)}; name that folder"
    some = ", ".join(f"{shown(folder)} ({len(those)})" for folder, those in found[:3])
    text = f"{some}{word_rest(len(found) - 3)} hold {what}s"
    if all(those == found[0][1] for _, those in found) and len(found[0][1]) == 1:
        pattern = found[0][0].parent / "*" / found[0][1][0]
        return f"{text}; name all of them with '{shown(pattern)}'"
    return f"{text}; name one of them"


def _list_candidates(folder: Path, what: str, kinds: Mapping[str, str]) -> list[str]:
    """Return the names in a folder that are those of checkpoints; none if it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in itertools.islice(entries, _MOST_NAMES)]
    except OSError:
        return []
    return [name for name in names if find_objection(folder / name, kinds, what) is None]


def _describe_foreign(source: Path, passed: Sequence[PassedOver]) -> str:
    """Return what a folder is, or what it holds, if that is another program's; else nothing.

    Only here are files looked into that are not named like checkpoints: regular files, a few bytes.
    """
    itself = name_folder(source)
    if itself:
        return str(itself)
    # A file that lies in such a folder, or was excluded, says nothing about the others.
    looked = [one.path for one in passed if not one.reason.startswith("--exclude")][:_LOOKED_AT]
    for path in looked:
        what = name_folder(path) if path.is_dir() else name_file(path)
        if what and what not in _SAY_NOTHING:
            return f"holds no checkpoint, but {shown(path.name, 60)}, which {what}"
    return ""

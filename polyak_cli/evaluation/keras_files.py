"""Describe Keras model files, open them safely, and reword what Keras raises.

Every file is inspected in a separate process by `formats` before Keras opens it.  Models are loaded
in Keras's safe mode, and nothing that a file names is imported.  This module knows no data.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from polyak_cli import formats
from polyak_cli.errors import (
    FormatError,
    MissingExtraError,
    PolyakError,
    UsageError,
    shown,
    word_size,
)
from polyak_cli.formats.catalogue import find_format
from polyak_cli.formats.format import Format
from polyak_cli.formats.keras.names import WEIGHTS_SUFFIX, is_variable
from polyak_cli.storage import open_input
from polyak_cli.tensors import Table

#: Older ones run the code of a Lambda layer in any .h5 file, safe mode or not: CVE-2025-9905.
LEAST_KERAS = (3, 11, 3)
#: Back ends on which Keras runs models; the first one installed is used.  JAX gives the same
#: scores, but its threads can block the children that `processes` forks to inspect files.
BACKENDS = ("tensorflow", "torch")
#: Bytes of a config.json; a small zip may expand to gigabytes.
LONGEST_CONFIG = 64 << 20


def require_keras(command: str, backends: Sequence[str] = BACKENDS) -> None:
    """Check that a safe Keras and one of the back ends are installed, without importing them.

    Raises:
        MissingExtraError: Keras or its back end is not installed.
        PolyakError: this Keras is too old to open files of others safely.
    """
    missing = find_missing_extra(backends)
    if missing:
        raise MissingExtraError(command, missing)
    version = importlib.metadata.version("keras")
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < LEAST_KERAS:
        least = ".".join(map(str, LEAST_KERAS))
        raise PolyakError(
            f"{command} needs Keras {least} or newer, found {shown(version)}, which runs code "
            f"hidden in .h5 files (CVE-2025-9905): pip install --upgrade keras"
        )


def require_keras_for(command: str, paths: Sequence[Path]) -> None:
    """Check what `require_keras` does, if any file is Keras's by its name, before rows are loaded.

    Raises:
        MissingExtraError: Keras or its back end is not installed.
        PolyakError: this Keras is too old to open files of others safely.
    """
    if any(path.name.endswith((".keras", ".h5", ".hdf5")) for path in paths):
        require_keras(command)


def find_missing_extra(backends: Sequence[str] = BACKENDS) -> str:
    """Return the extra that brings Keras and a back end, nothing if both are installed."""
    installed = [name for name in backends if find_spec(name)]
    try:
        importlib.metadata.version("keras")
    except importlib.metadata.PackageNotFoundError:
        # TensorFlow is some 2 GB: those who have another back end need only Keras.
        return "keras" if installed and "tensorflow" not in installed else "tensorflow"
    return "" if installed else "tensorflow"


def choose_back_end(backends: Sequence[str] = BACKENDS) -> None:
    """Have Keras run on a back end that is installed, unless the user chose one."""
    installed = next(filter(find_spec, backends), None)
    if installed and not find_spec("tensorflow"):
        os.environ.setdefault("KERAS_BACKEND", installed)


def import_keras(command: str, backends: Sequence[str] = BACKENDS) -> Any:
    """Return keras, after the checks of `require_keras`, on the first back end installed.

    A back end that the user chose with KERAS_BACKEND is used instead.  Without TensorFlow, Keras
    itself would choose none of the others, and fail.

    Raises:
        PolyakError: Keras fails on the back end that the user chose.
    """
    require_keras(command, backends)
    choose_back_end(backends)
    try:
        import keras
    except (ImportError, ValueError) as error:
        chosen = shown(os.environ.get("KERAS_BACKEND", "tensorflow"), 40)
        raise PolyakError(
            f"{command}: Keras cannot be imported on the back end {chosen}: {shown(error)}; "
            f"install it, or set KERAS_BACKEND to one of {', '.join(backends)}"
        ) from error
    return keras


def describe_hdf5_files(
    paths: Sequence[Path], weights_of: Description | None = None
) -> Iterator[Description]:
    """Yield the description of each file; refuse files that Keras cannot or must not open.

    Args:
        paths: HDF5 files, and the indices of sharded weights.
        weights_of: the description of weights without a model; such files are refused if None.
    """
    tables = formats.scan(paths, jobs=4)
    for table in tables:
        check_architecture(table, bare=weights_of is not None)
    models = [
        path
        for path, table in zip(paths, tables, strict=True)
        if table.config or weights_of is None
    ]
    texts = dict(zip(models, formats.read_descriptions(models), strict=True))
    for path, table in zip(paths, tables, strict=True):
        if weights_of is not None and path not in texts:
            check_weights_name(table)
            if path.suffix != ".json":
                check_suffix(path, find_format(table.format))
            yield weights_of
            continue
        check_suffix(path, find_format(table.format))
        architecture, training, keras = texts[path]
        yield Description(architecture, _drop_optimizer(path, training), keras)


def is_of_keras(form: Format) -> bool:
    """Return whether Keras opens files of a format: whole models, or weights."""
    return bool(form.keras_layout) or form.key == "weights_json"


def check_architecture(table: Table, *, bare: bool = False) -> None:
    """Refuse a file from which Keras cannot build a model, except ``bare`` weights."""
    form = find_format(table.format)
    if not is_of_keras(form):
        raise FormatError(
            f"{shown(table.path)}: is {form.name}, which holds tensors without a model that Keras "
            "can run; evaluate it in the program that trained it"
        )
    if not table.config and not bare:
        raise FormatError(
            f"{shown(table.path)}: holds weights only, no architecture; expected a whole "
            "model: save it with model.save(), or name its architecture with --model"
        )


def check_weights_name(table: Table) -> None:
    """Refuse weights whose suffix makes Keras expect another format."""
    numbered = any(is_variable(spec.location) for spec in table.tensors.values())
    if not numbered or table.path.name.endswith((WEIGHTS_SUFFIX, ".json")):
        return
    raise FormatError(
        f"{shown(table.path)}: holds weights that Keras opens only with the suffix "
        f"{WEIGHTS_SUFFIX}; rename it"
    )


def check_suffix(path: Path, form: Format) -> None:
    """Refuse an HDF5 file whose suffix makes Keras expect another format."""
    if path.suffix not in form.suffixes:
        raise FormatError(
            f"{shown(path)}: is an HDF5 file, and Keras opens it only with the suffix .h5 or "
            ".hdf5; rename it"
        )


def refuse_parts(path: Path, form: Format) -> NoReturn:
    """Refuse to choose tensors of a file that Keras opens.

    Raises:
        UsageError: always.
    """
    raise UsageError(
        f"--key and --use-ema: {shown(path)} is {form.name}, which Keras opens as a whole; write "
        "its EMA as a model of its own: polyak average FILE --use-ema"
    )


def is_zip(path: Path) -> bool:
    """Return whether a file is a zip archive, as .keras files are."""
    try:
        return path.is_file() and zipfile.is_zipfile(path)
    except OSError as error:
        raise FormatError(f"{shown(path)}: cannot be read: {error.strerror}") from None


@contextlib.contextmanager
def collect_warnings(whose: str = "Keras") -> Iterator[list[str]]:
    """Yield a list that gets the warnings of the block, one line each, as those of a framework.

    Python would print two lines of source code for each.
    """
    lines: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for category in (DeprecationWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", category)
        yield lines
    lines += dict.fromkeys(f"{whose} warns: {shown(warning.message)}" for warning in caught)


@contextlib.contextmanager
def reword_keras_errors(path: Path, what: str, held_back: Callable[[], str]) -> Iterator[None]:
    """Replace any exception of Keras by an error of one line.

    Raises:
        PolyakError: the model carries code, has unknown parts, or does not work.
    """
    try:
        yield
    except PolyakError:
        raise
    except Exception as error:
        # Keras adds the name and the arguments of the failing layer before this phrase.
        text = str(error).rpartition("Exception encountered: ")[2]
        if "arbitrary code execution" in text or "safe_mode" in text or "unsafe_deser" in text:
            raise PolyakError(
                f"{shown(path)}: contains code (such as a Lambda layer), which would run when it "
                "is loaded; use --trust-code if you trust its source"
            ) from error
        unknown = re.search(r"Unknown layer: '([^']*)'|Could not locate class '([^']*)'", text)
        if unknown:
            raise PolyakError(
                f"{shown(path)}: needs '{shown(unknown[1] or unknown[2], 60)}', which Keras does "
                "not know; register it (keras.saving.register_keras_serializable) in the file of "
                "--data MODULE.py:FUNCTION"
            ) from error
        # An error in a graph ends with its reason, after a traceback; others begin with it.
        lines = [line for line in text.splitlines() if line.strip()] or [type(error).__name__]
        reason = lines[-1] if lines[0].startswith("Graph execution error") else lines[0]
        if held_back():
            reason = f"{shown(reason)} ({shown(held_back())})"
        raise PolyakError(f"{shown(path)}: Keras {what}: {shown(reason, 400)}") from error


class Description(NamedTuple):
    """The texts in a file that describe its model; "" for missing ones."""

    architecture: str  # JSON
    training: str  # JSON, without the optimizer
    keras: str  # the version that wrote it
    assets: bool = False  # whether it has vocabularies or other state besides tensors
    weights: bool = False  # whether the file holds weights only, of the model of --model


def _drop_optimizer(path: Path, text: str) -> str:
    """Return a training configuration without the optimizer.

    Its learning rate may change from epoch to epoch, and files with equal descriptions share a
    compiled model.
    """
    training = dict(parse_json_object(path, text, "training configuration")) if text else {}
    for key in ("optimizer", "optimizer_config"):
        training.pop(key, None)
    return json.dumps(training) if training else ""


def name_writer(description: Description) -> str:
    """Return a phrase with the Keras that wrote a file, if it is one of the incompatible 2.x."""
    if not description.keras.startswith(("0.", "1.", "2.")):
        return ""
    return f" (it was written by Keras {shown(description.keras, 20)})"


def describe_archive(path: Path) -> Description:
    """Read the description of a .keras file."""
    text, assets = _read_config(path)
    return describe_config(path, text, assets=assets)


def describe_config(path: Path, text: bytes, *, assets: bool) -> Description:
    """Return the description of a model in JSON, as Keras writes it into .keras files."""
    _check_length(path, text)
    config = dict(parse_json_object(path, text, "config.json"))
    training = config.pop("compile_config", None)
    measuring = _drop_optimizer(path, json.dumps(training)) if training else ""
    return Description(json.dumps(config), measuring, "", assets)


def _read_config(path: Path) -> tuple[bytes, bool]:
    """Return config.json, and whether the archive has assets."""
    try:
        with (
            open_input(path) as file,
            file.stream() as stream,
            zipfile.ZipFile(stream) as archive,
            archive.open("config.json") as member,
        ):
            config = member.read(LONGEST_CONFIG + 1)
            assets = any(name.startswith("assets/") for name in archive.namelist())
    except (KeyError, OSError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise FormatError(
            f"{shown(path)}: is damaged or not a Keras model: {shown(error)}"
        ) from None
    return config, assets


def _check_length(path: Path, config: bytes) -> None:
    if len(config) > LONGEST_CONFIG:
        raise FormatError(
            f"{shown(path)}: its config.json is longer than {word_size(LONGEST_CONFIG)}; the "
            "file is damaged or hostile"
        )


def parse_json_object(path: Path, text: str | bytes, what: str) -> Mapping[str, Any]:
    """Parse a JSON object from a file that may be damaged or hostile."""
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{shown(path)}: its {what} is damaged: {shown(error)}") from None
    if not isinstance(parsed, dict):
        raise FormatError(f"{shown(path)}: its {what} is damaged: it is not a JSON object")
    return parsed


def check_model(table: Table, *, bare: bool = False) -> None:
    """Refuse a model, except ``bare`` weights, that Keras cannot run, without importing Keras.

    Raises:
        MissingExtraError: Keras or its back end is not installed.
        FormatError: the file holds no architecture.
        PolyakError: Keras is too old.
    """
    require_keras("recalibrating BatchNorm")
    check_architecture(table, bare=bare)

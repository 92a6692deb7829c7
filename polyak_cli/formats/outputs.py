"""Decide which name, folder and format an output may have.

Writes nothing.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from polyak_cli.errors import MismatchError, OutputError, PolyakError, shown
from polyak_cli.formats.catalogue import FORMATS, OPENERS, find_format
from polyak_cli.formats.format import OutputForm, SkeletonRequest
from polyak_cli.formats.keras.names import WEIGHTS_SUFFIX
from polyak_cli.processes.sandbox import Heartbeat
from polyak_cli.storage import publishing
from polyak_cli.tensors import Table


@functools.cache
def _map_conversions(source: str) -> dict[str, str]:
    """Return suffix of an output -> the format to which checkpoints of the source's are converted.

    Args:
        source: the key of their format.
    """
    # Reversed: safetensors comes before .npz, which has no bfloat16.
    forms = {entry.key: find_format(entry.key) for entry in reversed(FORMATS)}
    return {
        form.conversion_suffix: key
        for key, form in forms.items()
        if form.conversion_suffix and source in (form.converts_from or forms)
    }


def choose_format(output: Path | None, template: Table) -> str:
    """Return the format of an output: the template's, unless its suffix is that of another."""
    form = find_format(template.format)
    if takes_weights(output, template):
        return form.inner
    if output and not output.name.endswith(form.suffixes) and form.can_be_left:
        return _map_conversions(form.key).get(output.suffix, template.format)
    return template.format


def find_form(output: Table, template: Table, *, completed: bool) -> OutputForm:
    """Return the form in which an output that is there already was made of a template.

    Args:
        output: its table.
        template: the checkpoint that it is like.
        completed: the template's tensors were added to a whole model.
    """
    # Sharded weights become a single HDF5 file, which is no conversion: their format writes it.
    is_converted = output.format in _map_conversions(template.format).values()
    is_inner = output.format == find_format(template.format).inner
    extract = is_inner and bool(template.config) and not output.config
    key = output.format if is_converted or extract else template.format
    # The model is in the output itself, whose configuration is compared with the record.
    return OutputForm(key, extract, output if completed else None)


def is_folder(output: Path, template: Table) -> bool:
    """Return whether an output is to be a folder: the checkpoints are, and it has no suffix.

    What begins with a digit is no suffix but a number, as in ``llama-3.1``.
    """
    is_named_so = not output.suffix or output.suffix[1].isdigit()
    return is_named_so and (template.path.name in OPENERS or _is_sharded(template))


def takes_weights(output: Path | None, template: Table) -> bool:
    """Return by its suffix whether an output is to have a whole model's weights alone."""
    suffix = _find_inner_suffix(template)
    # An older whole model may itself be called so.
    is_named_so = bool(output and suffix and output.name.endswith(suffix))
    return is_named_so and not template.path.name.endswith(suffix)


def _find_inner_suffix(template: Table) -> str:
    """Return the suffix that asks for the weights of a whole model; "" where there is none."""
    inner = find_format(template.format).inner
    return find_format(inner).weights_suffix if inner and template.config else ""


def _is_sharded(template: Table) -> bool:
    """Return whether a checkpoint consists of files that a folder can hold under their names."""
    return find_format(template.format).can_be_folder and len(template.files) > 1


def find_folder(table: Table) -> Path | None:
    """Return the folder that holds a checkpoint of several files; None where it is one file."""
    return find_format(table.format).find_root(table) if _is_sharded(table) else None


def check_conversion(
    output: Path | None,
    template: Table,
    *,
    averaged: Mapping[str, str],
    drop_optimizer: bool,
    only_weights: bool = False,
    architecture: Table | None = None,
) -> None:
    """Refuse, before any work, an output whose format cannot hold what is to be in it.

    Args:
        output: the file or folder that will be written; None for one of the template's format.
        template: the checkpoint that it will be like.
        averaged: location in the template -> dtype to store.
        drop_optimizer: leave its state out.
        only_weights: leave out the configuration too, where the output can hold tensors only.
        architecture: the whole model to which a template without one adds its tensors.

    Raises:
        OutputError: what would be lost.
    """
    from polyak_cli.processes import sandbox

    name = choose_format(output, template)
    for dtype in sorted({*averaged.values()} - find_format(name).dtypes):
        raise OutputError(
            f"{shown(output or template.path)}: is {find_format(name).name}, which has no "
            f"type {dtype}; choose another --dtype, or safetensors for the output"
        )
    extract = takes_weights(output, template)
    if extract and not only_weights:
        raise OutputError(
            f"{shown(output)}: the configuration and the assets of {shown(template.path)} "
            f"would be lost, because a {find_format(name).weights_suffix} holds tensors only; "
            f"leave them out with --only-weights, or keep {find_format(template.format).name}"
        )
    _check_architecture(output, template, name, architecture)
    is_same = name == template.format and not extract
    if not output or (is_same and not _is_merged(output, template)):
        return
    whole = str(architecture.path) if architecture else ""
    request = SkeletonRequest(template, "", averaged, drop_optimizer, "", whole, only_weights)
    refuse = _refuse_extraction if extract else _refuse_conversion
    (outcome,) = sandbox.run_each(refuse, [(name, request)], [str(template.path)])
    if isinstance(outcome, OutputError):
        raise OutputError(f"{shown(output)}: {shown(template.path)} {outcome}")
    if isinstance(outcome, PolyakError):
        raise outcome


def _check_architecture(
    output: Path | None, template: Table, name: str, architecture: Table | None
) -> None:
    """Refuse a whole model to which the tensors of a template cannot be added."""
    if architecture is None:
        return
    where, weights = shown(architecture.path), shown(template.path)
    if template.rules.suffixes != (WEIGHTS_SUFFIX,) or not find_format(name).completes:
        raise OutputError(
            f"--model {where}: adds a whole model to weights of Keras 3 (.weights.h5, "
            f".weights.json), and the checkpoints are {find_format(template.format).name}"
            f"{' with a model' if template.config else ''}; leave it out for "
            f"{shown(output or template.path)}"
        )
    if architecture.format != name:
        raise OutputError(
            f"--model {where}: is {find_format(architecture.format).name}; expected a "
            f"{find_format(name).name} file of the same model, which model.save() writes"
        )
    wanted = {spec.location: spec.shape for spec in architecture.tensors.values()}
    found = {spec.location: spec.shape for spec in template.tensors.values()}
    for at in sorted(wanted.keys() | found.keys()):
        if wanted.get(at) != found.get(at):
            raise MismatchError(
                f"{weights}: is of another model than {where}: '{shown(at[1:])}' is "
                f"{_describe_shape(found.get(at))} here and {_describe_shape(wanted.get(at))} there"
            )


def _describe_shape(shape: Sequence[int] | None) -> str:
    return "missing" if shape is None else f"of shape {tuple(shape)}"


def _is_merged(output: Path, template: Table) -> bool:
    """Return whether the shards of a folder, each with texts of its own, become one file."""
    return _is_sharded(template) and not is_folder(output, template)


def _refuse_conversion(request: tuple[str, SkeletonRequest], heartbeat: Heartbeat) -> None:
    """Refuse, in a child, what cannot be converted or merged."""
    from polyak_cli.formats import conversion

    name, layout = request
    texts = find_format(layout.template.format).texts(layout.template, heartbeat)
    if name != layout.template.format:
        conversion.refuse_losses(layout)
        find_format(name).refuse_conversion(layout, texts)


def _refuse_extraction(request: tuple[str, SkeletonRequest], heartbeat: Heartbeat) -> None:
    """Refuse, in a child, a model whose weights cannot be written alone."""
    _, layout = request
    find_format(layout.template.format).refuse_extraction(layout, heartbeat)


def check_output(
    output: Path,
    tables: Sequence[Table],
    *,
    force: bool,
    run: Sequence[Path] = (),
    list_owned: publishing.ListOwned = publishing.own_nothing,
) -> None:
    """Refuse, before any work, an output that could not or must not be written.

    Args:
        output: the file or folder to write.
        tables: of the checkpoints, the template last.
        force: replace an older output.
        run: further checkpoints of the same run, which are not to be replaced either.
        list_owned: returns which files of an older output folder may be replaced.

    Raises:
        OutputError: what is in the way, and what to do.
    """
    try:
        _check_place(output, tables, force=force, list_owned=list_owned)
        for path in run:
            if output.exists() and path.exists() and output.samefile(path):
                raise OutputError(
                    f"{shown(output)}: is a checkpoint of this run, though not one of those "
                    "averaged; name another output"
                )
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        reason = error.strerror if isinstance(error, OSError) else error
        raise OutputError(f"{shown(output)}: cannot be written: {shown(reason)}") from None


def _check_place(
    output: Path, tables: Sequence[Table], *, force: bool, list_owned: publishing.ListOwned
) -> None:
    name = shown(output)
    folder_wanted = is_folder(output, tables[-1])
    if output.is_dir() and not folder_wanted:
        raise OutputError(f"{name}: is a folder; name the file to write in it")
    named = choose_format(output, tables[-1])
    form = find_format(named)
    suffixes = (named == tables[-1].format and tables[-1].rules.suffixes) or form.suffixes
    if takes_weights(output, tables[-1]):
        suffixes = (form.weights_suffix,)
    if not folder_wanted and not suffixes:
        raise OutputError(
            f"{name}: the checkpoints are {form.name}, which is written to a folder; give the "
            f"output no suffix{_describe_alternatives(tables[-1])}"
        )
    if not folder_wanted and not output.name.endswith(suffixes):
        ways = _describe_alternatives(tables[-1])
        raise OutputError(
            f"{name}: the checkpoints are {form.name}, which is opened only as "
            f"{' or '.join(suffixes)}; give the output that suffix{ways}"
            if suffixes
            else f"{name}: the checkpoints are {form.name}; give the output"
            f"{ways.removeprefix(', or')}"
        )
    _check_weights_suffix(output, tables[-1], suffixes)
    folder = output.resolve().parent
    newest = form.find_root(tables[-1]).resolve()
    if folder_wanted and newest in (folder, *folder.parents):
        # Its files are copied with the rest of that folder the next time.
        raise OutputError(
            f"{name}: lies in the folder of the checkpoint {shown(tables[-1].path.parent)}, whose "
            "files are copied; name an output outside of it"
        )
    if not folder.is_dir():
        raise OutputError(f"{name}: there is no folder {shown(folder)}; create it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{name}: the folder {shown(folder)} is not writable")
    # A format of several files replaces all of them together, so all names must be free.
    for further in _list_further(output, tables[-1]):
        if os.path.lexists(further) and not force:
            raise OutputError(f"{shown(further)}: already exists; use --force to replace it")
    if not os.path.lexists(output):
        return
    if folder_wanted and output.exists():
        inputs = [file for table in tables for file in table.files]
        publishing.check_folder(output, inputs, list_owned, force=force)
        return
    if output.exists():
        _check_existing(output, tables)
    if not force:
        raise OutputError(f"{name}: already exists; use --force to replace it")


def _check_weights_suffix(output: Path, template: Table, suffixes: Sequence[str]) -> None:
    """Refuse what Keras would take for another layout by its name, unless it was called so."""
    weights = find_format(choose_format(output, template)).weights_suffix
    if not weights or weights in suffixes or template.path.name.endswith(weights):
        return
    if output.name.endswith(weights):
        raise OutputError(
            f"{shown(output)}: {shown(template.path)} is of Keras's older layout, which "
            f"load_weights() refuses in a file called {weights}; call the output "
            f"{' or '.join(suffixes)}"
        )


def _list_further(output: Path, template: Table) -> list[Path]:
    """Return the files that an output consists of besides the one that is named.

    Raises:
        OutputError: the name is a link, beside whose target they would not be found.
    """
    further = [publishing.name_beside(output, tail) for tail in template.rules.tails]
    if further and output.is_symlink():
        raise OutputError(
            f"{shown(output)}: is a symbolic link, but the output has several files; name the "
            "file that it points to"
        )
    return further


def _describe_alternatives(template: Table) -> str:
    """Say what else an output may be called."""
    form = find_format(template.format)
    shards = (
        ", or no suffix for a folder with all of the model's files"
        if is_folder(Path("x"), template) and form.suffixes
        else ""
    )
    others = (
        [end for end in _map_conversions(form.key) if end not in form.suffixes]
        if form.can_be_left
        else []
    )
    inner = _find_inner_suffix(template)
    others += [inner] if inner else []
    return shards + (f", or {' or '.join(others)} to convert it" if others else "")


def _check_existing(output: Path, tables: Sequence[Table]) -> None:
    """Refuse to replace an input or what is no file, --force or not."""
    status = output.stat()
    for path, identity in (file for table in tables for file in table.files):
        same = (status.st_dev, status.st_ino) == (identity.device, identity.inode)
        if same or Path(path) == output:  # the version of an object has no inode
            raise OutputError(
                f"{shown(output)}: is the checkpoint {shown(path)} itself; name another output"
            )
    if not output.is_file():
        raise OutputError(f"{shown(output)}: is not a regular file; name another output")

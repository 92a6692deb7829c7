"""Replace a model's tensors by the EMAs that the optimizer keeps of them.

Keras keeps an EMA of each trained tensor in the optimizer's state (``use_ema=True``), and so does
torchtitan.  Tensors that are not trained, such as BatchNorm's statistics, have none and stay as
they are.  Reads only tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from polyak_cli.averaging.belonging import averages
from polyak_cli.averaging.options import Tensors
from polyak_cli.checkpoints import Problem
from polyak_cli.errors import MismatchError, shown
from polyak_cli.formats.catalogue import find_format
from polyak_cli.tensors import FLOATS, Table, TensorSpec


def take_parts(
    tables: Sequence[Table], wanted: Tensors
) -> tuple[Sequence[Table], list[Problem], list[str]]:
    """Return the tables with the parts that are wanted in place of others; see `choose_parts`.

    Raises:
        MismatchError: there is no such part, or several.
    """
    taken, found, missing = averages.choose_parts(tables, wanted)
    if wanted.use_ema and not found:
        taken, missing = substitute_emas(tables)
    return taken, found, missing


def substitute_emas(tables: Sequence[Table]) -> tuple[list[Table], list[str]]:
    """Return the tables with EMAs in place of tensors, and the names of those that have none.

    Args:
        tables: of all checkpoints, with what is not the model's own; the last is the template.

    Raises:
        MismatchError: a checkpoint has no EMAs, has them of other tensors than the template, or has
            one that fits no single tensor; names file and tensor.
    """
    found: dict[int, Mapping[str, TensorSpec]] = {}
    for table in tables:
        if id(table.tensors) not in found:  # tables of the same skeleton share their tensors
            found[id(table.tensors)] = _find_emas(table)
    wanted = found[id(tables[-1].tensors)]
    for table in tables:
        differing = sorted(found[id(table.tensors)].keys() ^ wanted.keys())
        if differing:
            raise MismatchError(
                f"{shown(table.path)} and {shown(tables[-1].path)}: only one of the two has an "
                f"EMA of tensor '{shown(differing[0])}'; average checkpoints of one run"
            )
    # One merged mapping for each shared one: 100,000 tensors a checkpoint would not fit.
    merged = {id(t.tensors): {**t.tensors, **found[id(t.tensors)]} for t in tables}
    template = tables[-1].tensors.values()
    without = [s.name for s in template if s.dtype in FLOATS and s.name not in wanted]
    return [replace(table, tensors=merged[id(table.tensors)]) for table in tables], without


def _find_emas(table: Table) -> dict[str, TensorSpec]:
    """Return the EMA of each tensor that has one, described as the tensor is."""
    # Keras writes the slots only if the model was saved with its optimizer.
    if not table.keras.ema_slots:
        form = find_format(table.format)
        usual = "the run was not trained with use_ema=True and saved whole"
        # TensorFlow checkpoints hold Keras's optimizers too.
        foreign = f"{form.name} files hold none of Keras's optimizers"
        is_keras = form.keras_layout or form.key in ("weights_json", "tf_bundle")
        why = table.rules.cautions.get("ema", usual if is_keras else foreign)
        raise MismatchError(f"{shown(table.path)}: has no EMA slots that could be averaged: {why}")
    found: dict[str, TensorSpec] = {}
    for slot, tensors in table.keras.ema_slots.items():
        if len(tensors) != 1 or tensors[0] in found:
            whose = f"{len(tensors)} tensors" if len(tensors) != 1 else "a tensor that has another"
            raise MismatchError(
                f"{shown(table.path)}: the EMA slot '{shown(slot)}' fits {whose}; expected exactly "
                "one slot of one tensor, recognised by its name"
            )
        found[tensors[0]] = _describe_as(table, table.others[slot], table.tensors[tensors[0]])
    return found


def _describe_as(table: Table, slot: TensorSpec, tensor: TensorSpec) -> TensorSpec:
    """Return the tensor with the slot's values; its place in an output stays its own."""
    if (slot.shape, slot.dtype) != (tensor.shape, tensor.dtype):
        raise MismatchError(
            f"{shown(table.path)}: the EMA slot '{shown(slot.name)}' has shape {slot.shape} and "
            f"dtype {slot.dtype}; expected those of tensor '{shown(tensor.name)}', {tensor.shape} "
            f"and {tensor.dtype}"
        )
    # An EMA is read in the tensor's place, so it must have the tensor's layout in the file.
    if slot.storage is None or slot.storage.nbytes != tensor.nbytes:
        raise MismatchError(
            f"{shown(table.path)}: the EMA slot '{shown(slot.name)}' was never written, or is not "
            "stored in one piece as Keras does"
        )
    return replace(tensor, storage=slot.storage, byteorder=slot.byteorder)

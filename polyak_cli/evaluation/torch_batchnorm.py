"""Run a module of PyTorch over rows to gather the running statistics of its BatchNorm layers.

What `batchnorm` does for Keras, and `torch.optim.swa_utils.update_bn` in memory: each statistic
becomes the mean of the values that the layer itself computes for each batch, weighted by the rows.
Only BatchNorm runs as in training; dropout is off.  A variance has the factor n / (n - 1) that
PyTorch gives it.

Layers that stay in evaluation mode when the module trains keep their statistics, which are
constants to them; so do those without statistics (``track_running_stats=False``), and layers of
other classes, such as InstanceNorm and torchvision's FrozenBatchNorm2d.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from polyak_cli.errors import MismatchError, list_some, shown, word_count
from polyak_cli.evaluation import data, user_code, weights
from polyak_cli.evaluation.batchnorm import Moments, divide_rows
from polyak_cli.evaluation.torch_modules import Module, is_tensor
from polyak_cli.tensors import FLOATS, Float64

_STATISTICS = ("running_mean", "running_var")


class _Recorder:
    """Adds up the statistics that a BatchNorm layer computes for each batch."""

    def __init__(self, names: Sequence[str], layer: Any) -> None:
        self.names = names  # of the layer in the module; several where it is used twice
        self.layer = layer
        self.trains = bool(layer.training)
        self.tracks = layer.running_mean is not None
        self.sums: list[Float64] = []
        self.rows = 0

    def prepare(self) -> None:
        """Make the statistics of the layer those of the latest batch alone."""
        self.layer.train()
        # PyTorch computes running = (1 - momentum) * running + momentum * batch.
        self.layer.momentum = 1.0
        self.layer.reset_running_stats()  # 0 * NaN is NaN
        self.layer.register_forward_hook(self.gather)

    def gather(self, layer: Any, _: tuple[Any, ...], output: Any) -> None:
        """Add up the statistics of a batch, which the layer has just stored."""
        count = int(output.shape[0])  # the inputs may be given by keyword
        # float64: over thousands of batches, float32 sums lose the digits that matter.
        found = [getattr(layer, name).double().cpu().numpy() * count for name in _STATISTICS]
        self.sums = [a + b for a, b in zip(self.sums, found, strict=True)] if self.sums else found
        self.rows += count


def gather_moments(
    held: weights.Weights,
    module: Module,
    maker: user_code.UserFunction,
    rows: data.Split,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> Moments:
    """Run a module with the tensors of a checkpoint once over rows.

    The rows are shuffled, always in the same order.  The sizes of batches differ by one at most.
    The module is of no use afterwards.

    Args:
        held: the tensors of the checkpoint.
        module: gets them.
        maker: the function that made it.
        rows: features; the labels are not used.
        batch_size: the largest number of rows in a batch.
        progress: called after each batch with the number of batches done, and that of all.

    Raises:
        MismatchError: the tensors are not those of the module, or it has no statistics to gather.
        PolyakError: the module fails on the rows.
    """
    what = f"the module of {shown(maker.path)}"
    with maker.running(f"the model cannot take the tensors of {shown(held.path)}"):
        notes, views = module.load(held, what), module.pair(held, what)
        recorders = _make_recorders(held.path, module.module)
    places = {
        (one, which): [views[name] for name in _list_names(one, which) if name in views]
        for one in recorders
        if one.tracks
        for which in _STATISTICS
    }
    before: dict[str, data.Array] = {}
    sharing = Counter(view.spec.location for view in held.views.values())
    for (one, which), found in places.items():
        values = getattr(one.layer, which).detach().clone()
        # The names of one layer have one storage, or copies where the state was copied.
        own = Counter(view.spec.location for view in found)
        for view in found:
            place = view.spec.location
            _check_place(held, view, one, sharing[place] == own[place])
            # A module of a narrower type has other values than the file.
            if values.element_size() >= 4 or str(values.dtype) == f"torch.{view.spec.dtype}":
                before[view.spec.location] = values.float().cpu().numpy()
    with maker.running(f"the model failed on {rows.source}"):
        count = _run(module, recorders, rows, batch_size, progress)
    notes += _note_unchanged(held.path, recorders, _list_others(module.module))
    after = {
        view.spec.location: one.sums[_STATISTICS.index(which)] / one.rows
        for (one, which), found in places.items()
        if one.rows
        for view in found
    }
    layers = sum(one.rows > 0 for one in recorders)
    before = {where: values for where, values in before.items() if where in after}
    return Moments(before, after, layers, count, tuple(notes))


def _make_recorders(path: Path, module: Any) -> list[_Recorder]:
    """Return a recorder for each BatchNorm layer, with the mode that it trains in.

    Raises:
        MismatchError: there is none.
    """
    names: dict[int, list[str]] = {}
    layers: dict[int, Any] = {}
    module.train()  # code of the user may keep some layers from it
    for name, layer in module.named_modules(remove_duplicate=False):
        if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):  # SyncBatchNorm is one too
            names.setdefault(id(layer), []).append(name)
            layers[id(layer)] = layer
    if not layers:
        raise MismatchError(f"{shown(path)}: has no BatchNorm layer; nothing to recalibrate")
    found = [_Recorder(names[key], layer) for key, layer in layers.items()]
    module.eval()
    return found


def _list_names(one: _Recorder, which: str) -> list[str]:
    return [f"{name}.{which}" if name else which for name in one.names]


def _list_others(module: Any) -> list[str]:
    """Return the layers that have running statistics and are no BatchNorm, as in `update_bn`."""
    return [
        name
        for name, layer in module.named_modules()
        if not isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)
        and is_tensor(getattr(layer, "running_mean", None))
    ]


def _check_place(held: weights.Weights, view: weights.View, one: _Recorder, is_alone: bool) -> None:
    """Refuse a statistic that cannot be replaced in the file by itself.

    Args:
        held: the checkpoint.
        view: of the statistic.
        one: its layer, whose several names may stand for one tensor.
        is_alone: its storage holds no other tensor.

    Raises:
        MismatchError: it shares its storage with another tensor, or is no float.
    """
    where = f"{shown(held.path)}: a statistic of layer '{shown(one.names[0], 80)}'"
    if not is_alone or (view.offset, view.shape) != (0, (view.spec.size,)):
        raise MismatchError(
            f"{where} shares its storage with another tensor; save the checkpoint as safetensors"
        )
    if view.spec.dtype not in FLOATS:
        raise MismatchError(f"{where} is {view.spec.dtype}; expected a type of floats")


def _run(
    module: Module,
    found: Sequence[_Recorder],
    rows: data.Split,
    batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> int:
    """Run the module once over the rows; return the number of batches."""
    chosen = [one for one in found if one.trains and one.tracks]
    for one in chosen:
        one.prepare()
    if not chosen:
        return 0
    batches = divide_rows(rows.rows, batch_size)
    for done, batch in enumerate(batches, 1):
        module.predict(data.take_rows(rows.features, batch))
        if progress:
            progress(done, len(batches))
    return len(batches)


def _note_unchanged(path: Path, found: Sequence[_Recorder], others: Sequence[str]) -> Iterator[str]:
    """Yield notes about layers whose statistics stay as they are.

    Raises:
        MismatchError: no layer has new statistics.
    """
    groups: Mapping[str, list[str]] = {
        "have no running statistics (track_running_stats=False) and stay": [],
        "are frozen (in evaluation mode when the module trains); their statistics stay": [],
        "saw no rows; their statistics stay": [],
    }
    untracked, frozen, unused = groups.values()
    for one in found:
        name = one.names[0] or "the module itself"
        if not one.tracks:
            untracked.append(name)
        elif not one.trains:
            frozen.append(name)
        elif not one.rows:
            unused.append(name)
    if sum(map(len, groups.values())) == len(found):
        raise MismatchError(
            f"{shown(path)}: every BatchNorm layer is frozen (in evaluation mode when the module "
            "trains) or has no running statistics; nothing to recalibrate"
        )
    for words, names in groups.items():
        if names:
            yield f"{len(names)} BatchNorm layers {words} ({list_some(names)})"
    if others:
        count = word_count(len(others), "layer")
        yield (
            f"the running statistics of {count} stay, as "
            f"{'it is' if len(others) == 1 else 'they are'} no BatchNorm ({list_some(others)})"
        )

"""Run modules of PyTorch: the only place of the package that imports it.

The module is the user's, made by code of the user.  It gets the tensors of one checkpoint after
another by name, strictly, and runs in evaluation mode without gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from polyak_cli.errors import MismatchError, UsageError, list_some, shown, word_count
from polyak_cli.evaluation import data, weights
from polyak_cli.tensors import FLOATS, itemsize


def is_module(made: object) -> bool:
    """Return whether something is a module of PyTorch."""
    return isinstance(made, torch.nn.Module)


def choose_device(wanted: str | None) -> torch.device:
    """Return the device of a name, by default a GPU where there is one.

    Raises:
        UsageError: there is no such device.
    """
    if wanted is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device).cpu()  # the meta device has no values
    except (RuntimeError, AssertionError) as error:  # unknown, or PyTorch was built without it
        line = str(error).splitlines()[0]
        raise UsageError(f"--device {shown(wanted)}: cannot be used: {shown(line)}") from None
    return device


class Module:
    """A module of the user's that gets the tensors of checkpoints."""

    def __init__(self, module: Any, device: str | None) -> None:
        """Move a module to a device, which may run code of the user.

        Raises:
            UsageError: there is no such device.
        """
        self.device = choose_device(device)
        self.module = module.to(self.device).eval()
        self._dtype = next(
            (p.dtype for p in module.parameters() if p.is_floating_point()),
            torch.get_default_dtype(),
        )

    def load(self, held: weights.Weights, what: str) -> list[str]:
        """Give the module the tensors of a checkpoint, and return what a user should know of that.

        Raises:
            MismatchError: the tensors are not those of the module, by name and shape.
            FormatError: the file is damaged, or changed since it was scanned.
        """
        own = self._list_own()
        views = self.pair(held, what)
        state = {name: _make_tensor(raw, v) for name, raw, v in weights.read(held, views)}
        # A name that the file lacks is tied to one that it has: `pair` has checked that.
        by_place = {id(own[name]): tensor for name, tensor in state.items()}
        state |= {name: by_place[id(own[name])] for name in own if name not in state}
        # Reading what is no tensor would unpickle it.
        extra = {n: v for n, v in self.module.state_dict().items() if not is_tensor(v)}
        state |= extra
        try:
            self.module.load_state_dict(state, strict=True)
        except RuntimeError as error:
            raise MismatchError(
                f"{shown(held.path)}: {what} does not take its tensors: "
                f"{shown(' '.join(str(error).split()))}"
            ) from None
        narrow = [
            name
            for name, view in views.items()
            if view.spec.dtype in FLOATS and itemsize(view.spec.dtype) > own[name].element_size()
        ]
        notes = []
        if narrow:
            count = word_count(len(narrow), "tensor")
            notes.append(f"{count} rounded to the narrower type of the module")
        if extra:
            notes.append(f"extra state stays as the function made it ({list_some([*extra])})")
        return notes

    def pair(self, held: weights.Weights, what: str) -> dict[str, weights.View]:
        """Return where a checkpoint has the tensor of each name of the module."""
        own = self._list_own()
        shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
        return weights.pair(held, shapes, _list_tied(own), what)

    def find_changed(self, held: weights.Weights, what: str) -> tuple[list[str], int]:
        """Return the parameters whose values are not those of a checkpoint, and how many are.

        A module with other names has been changed on purpose, and is not compared; neither are
        parameters of equal constants, such as ones, which any new module has.

        Raises:
            FormatError: the file is damaged, or changed since it was scanned.
        """
        try:
            views = self.pair(held, what)
        except MismatchError:
            return [], 0
        changed, same = [], 0
        own = dict(self.module.named_parameters())
        mine = {name: view for name, view in views.items() if name in own}
        for name, raw, view in weights.read(held, mine):
            given = _make_tensor(raw, view).to(own[name])  # a module may be of a narrower type
            if not torch.equal(own[name], given):
                changed.append(name)
            elif given.numel() and (given != given.flatten()[0]).any():
                same += 1
        return changed, same

    def _list_own(self) -> dict[str, Any]:
        """Return the tensors of the module by name; tied ones are one object."""
        held = self.module.state_dict(keep_vars=True)
        found = {name: tensor for name, tensor in held.items() if is_tensor(tensor)}
        for name, tensor in found.items():
            if torch.nn.parameter.is_lazy(tensor):
                raise MismatchError(
                    f"the module is lazy: '{shown(name, 80)}' has no shape yet; run a batch of "
                    "rows through it in the function that returns it"
                )
        return found

    def predict(self, features: data.Arrays) -> Any:
        """See `passes.Predictor.predict`."""
        with torch.no_grad():
            if isinstance(features, Mapping):  # as Transformers' tokenizers return them
                return self.module(**{name: self._feed(one) for name, one in features.items()})
            return self.module(*map(self._feed, data.list_arrays(features)))

    def find_output(self, returned: Any) -> Any:
        """See `passes.Predictor.find_output`."""
        return _find_output(returned)

    def _feed(self, array: data.Array) -> Any:
        """Return features as the module takes them: floats in its own type, integers as int64."""
        tensor = torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
        if tensor.is_floating_point():
            return tensor.to(self._dtype)
        return tensor if array.dtype.kind == "b" else tensor.to(torch.int64)

    def unwrap(self, outputs: Any) -> data.Array:
        """See `passes.Predictor.unwrap`."""
        tensor = torch.as_tensor(outputs).detach()
        # numpy has no bfloat16; in float32 each of its values is the same.
        wide = tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor
        return np.asarray(wide.cpu().numpy())

    def wrap(self, labels: data.Array) -> Any:
        """See `passes.Predictor.wrap`."""
        tensor = torch.from_numpy(np.ascontiguousarray(labels)).to(self.device)
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor


def is_tensor(value: object) -> bool:
    """Return whether an entry of a state dict is a tensor; extra state may be anything."""
    return isinstance(value, torch.Tensor)


def _list_tied(own: Mapping[str, Any]) -> list[str]:
    """Return the names of tensors that a module has under several names."""
    names: dict[int, list[str]] = {}
    for name, tensor in own.items():
        names.setdefault(id(tensor), []).append(name)
    return [name for several in names.values() if len(several) > 1 for name in several]


def _make_tensor(raw: data.Array, view: weights.View) -> Any:
    """Return the tensor that lies in stored bytes."""
    flat = torch.from_numpy(raw).view(getattr(torch, view.spec.dtype))
    return flat.as_strided(view.shape, view.steps, view.offset)


def _find_output(returned: Any) -> Any:
    """Return the one tensor that a module gives: itself, its logits, or the only one of a tuple.

    Raises:
        MismatchError: it gives something else.
    """
    if isinstance(returned, Mapping):
        returned = returned.get("logits", returned)
    elif hasattr(returned, "logits"):  # a dataclass of Transformers
        returned = returned.logits
    if isinstance(returned, (tuple, list)) and len(returned) == 1:
        (returned,) = returned
    if not is_tensor(returned):
        raise MismatchError(
            f"the module gives {_describe(returned)}; expected one tensor, or an output with "
            'logits; for several outputs, give labels by name, {"NAME": array}, or as a tuple'
        )
    return returned


def _describe(returned: Any) -> str:
    """Return what a module gives, in a few words."""
    what = shown(type(returned).__name__, 60)
    if isinstance(returned, Mapping):
        return f"{what} with {list_some([str(name) for name in returned])}"
    return f"{what} of {len(returned)}" if isinstance(returned, (tuple, list)) else what

"""Tell what a checkpoint holds beside its model: optimizers, schedulers, random states, settings.

Programs give the state of an optimizer any name (``optim_g``, ``opt_disc``), so it is recognised by
its structure, which is that of ``torch.optim``.  Does not know how tensors lie in the file.
"""

from __future__ import annotations

import math
import re
from typing import Any, Literal

from polyak_cli.formats.running_means import names_running_mean
from polyak_cli.formats.torch.pickles import Instance, Pairs, Tensor

#: Whose a value is: "" is the model's own, "run" is neither the model's nor an optimizer's.
Owner = Literal["", "optimizer", "run"]

#: Names under which programs keep the states of optimizers, schedulers and gradient scalers.
_OPTIMIZER = re.compile(
    r"(\w+_)?(opt(im(izer)?)?s?|(lr_?)?sched(uler)?s?|scaler|amp)(_?[A-Z0-9])?(_states?)?(_dicts?)?"
)
#: PyTorch Lightning's, fairseq's, torchtitan's, and what training scripts keep of their settings.
_OF_THE_RUN = {
    "args",
    "callbacks",
    "cfg",
    "config",
    "dataloader",
    "datamodule_hyper_parameters",
    "extra_state",
    "hparams",
    "hyper_parameters",
    "loops",
    "sampler",
    "train_state",
}
_RANDOM = re.compile(r"(\w+_)?(rng(_\w+)?|random_states?)")
#: What optimizers call the tensors that they keep for a parameter: torch.optim and apex; Adafactor
#: of Transformers and of torch.optim; Adan, Sophia, Shampoo, Lookahead and bitsandbytes.
SLOTS = {
    "absmax1",
    "acc_delta",
    "col_var",
    "exp_avg",
    "exp_avg_diff",
    "exp_avg_slow",
    "exp_avg_sq",
    "exp_avg_sq_col",
    "exp_avg_sq_row",
    "exp_inf",
    "hessian_diag_h",
    "master_param",
    "max_exp_avg_sq",
    "momentum_buffer",
    "preconditioner",
    "prev_flat_grad",
    "qmap1",
    "row_var",
    "slow_buffer",
    "slow_param",
    "square_avg",
}
#: Where programs write their version, and the keys of those that write none.
_VERSIONS = {
    "pytorch-lightning_version": "PyTorch Lightning",
    "mmengine_version": "mmengine",
    "ds_version": "DeepSpeed",
}
_KEYS = {
    "timm": {"arch", "epoch", "optimizer", "state_dict", "version"},
    "fairseq": {"extra_state", "model", "optimizer_history"},
}
_OPTIMIZER_KEYS = {"state", "param_groups"}
#: torch.amp.GradScaler's, and those of torch.optim.lr_scheduler, which has others besides.
_SCALER_KEYS = {"growth_factor", "backoff_factor", "growth_interval"}
_SCHEDULER_KEYS = {"last_epoch", "_step_count"}, {"last_epoch", "base_lrs"}


def find_owner(path: tuple[str, ...], value: Any) -> Owner:
    """Return whose a value is by its name and structure; "" if neither says anything.

    Args:
        path: the keys that lead to the value from the pickle's root.
        value: what is there; what is in it has the same owner.
    """
    if path and _RANDOM.fullmatch(path[-1]) and getattr(value, "dtype", "uint8") == "uint8":
        return "run"  # PyTorch's states are bytes
    if not isinstance(value, (Pairs, Instance, list, tuple)):
        return ""  # a tensor that is called as an optimizer is may well be a model's
    if len(path) == 1 and _OPTIMIZER.fullmatch(path[0]):
        return "optimizer"
    if isinstance(value, Pairs) and is_optimizer(value):
        return "optimizer"
    return "run" if len(path) == 1 and path[0] in _OF_THE_RUN else ""


def find_trainer(root: Any) -> str:
    """Return the program that wrote a checkpoint, with its version if it says so; "" if unknown.

    Goes by keys that only one program writes: a version of its own, or a set of keys (timm's
    CheckpointSaver, fairseq's Trainer).
    """
    values = _list_texts(root)
    values |= {"mmengine_version": _list_texts(values.get("meta")).get("mmengine_version")}
    for key, name in _VERSIONS.items():
        if isinstance(values.get(key), str):
            return f"{name} {values[key]}"
    return next((name for name, keys in _KEYS.items() if keys <= values.keys()), "")


def find_metric(root: Any) -> tuple[str, float] | None:
    """Return name and value of the metric in a checkpoint of timm; see `Format.read_metric`.

    The name is among the arguments that its training script was started with.
    """
    values = _list_texts(root)
    value = _as_float(values.get("metric"))
    if find_trainer(root) != "timm" or value is None:
        return None
    arguments = values.get("args")
    said = _list_texts(arguments.state) if isinstance(arguments, Instance) else {}
    name = said.get("eval_metric")
    return (name if isinstance(name, str) else ""), value


def find_number(root: Any, key: str) -> float | None:
    """Return a finite number at the top of a checkpoint's dictionary; see `Format.read_number`."""
    value = _as_float(_list_texts(root).get(key))
    return value if value is not None and math.isfinite(value) else None


def _as_float(value: Any) -> float | None:
    """Return a number of a pickle; None for anything else, and for an int beyond all floats."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def find_raw_part(root: Any, part: str) -> str:
    """Return where the raw weights are, if a part is their running mean and named like a model's.

    Lightning's WeightAveraging and mmengine's EMAHook put the running mean where programs look for
    the model, and the raw weights beside it; see `averaging.belonging.averages`.
    """
    values = _list_texts(root)
    if part != "state_dict":
        return ""
    if {"averaging_state", "current_model_state"} <= values.keys():
        return "current_model_state"
    return "ema_state_dict" if "steps" in _list_texts(values.get("ema_state_dict")) else ""


def _list_texts(value: Any) -> dict[str, Any]:
    """Return what a dictionary has under texts; nothing if it is none."""
    pairs = value.items if isinstance(value, Pairs) else []
    return {key: item for key, item in pairs if isinstance(key, str)}


def is_running_mean(path: tuple[str, ...], value: Any) -> bool:
    """Return whether what a run keeps of itself is a running mean of its model's weights.

    fairseq keeps it in extra_state, and callbacks of Lightning in their states; the mean is as much
    a part of the model there as it is beside its state dict.
    """
    return bool(path) and names_running_mean(path[-1]) and _holds_weights(value)


def _holds_weights(value: Any) -> bool:
    """Return whether a state dict is there, or in a dictionary there: scores are single numbers."""
    inner = [one for _, one in value.items] if isinstance(value, Pairs) else []
    for one in [*inner]:
        inner += [item for _, item in one.items] if isinstance(one, Pairs) else []
        inner += one if isinstance(one, list) else []
    return any(isinstance(one, Tensor) and one.shape not in ((), (1,)) for one in inner)


def is_optimizer(value: Pairs) -> bool:
    """Return whether a dictionary has the structure of an optimizer, a scheduler or a scaler."""
    keys = {key for key, _ in value.items if isinstance(key, str)}
    if keys >= _OPTIMIZER_KEYS or keys >= _SCALER_KEYS:
        return True
    if any(keys >= known for known in _SCHEDULER_KEYS):
        return True
    # One parameter's slots; programs that save only a part of a state save dictionaries of these.
    if not keys.isdisjoint(SLOTS):
        return True
    return any(key == "state" and _is_numbered(item) for key, item in value.items)


def _is_numbered(value: Any) -> bool:
    """Return whether a dictionary has a dictionary for each number of a parameter."""
    return (
        isinstance(value, Pairs)
        and bool(value.items)
        and all(type(key) is int and isinstance(item, Pairs) for key, item in value.items)
    )

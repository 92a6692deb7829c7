"""Checkpoints that hold running means of their weights, as the libraries write them.

The libraries that are not installed are imitated with plain torch, after their own source.
"""

from __future__ import annotations

import copy
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from polyak_cli import average, check, inspect, plan, verify
from polyak_cli.errors import MismatchError
from tests.command import polyak

HALF = [torch.float16, torch.float32]
State = dict[str, Any]


def network() -> nn.Module:
    """Return a model with a layer, tied weights and BatchNorm's buffers."""
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3, bias=False))
    net[2].weight = net[0].weight
    return net


def train(seed: int) -> tuple[nn.Module, AveragedModel]:
    """Return a model after some steps, and the EMA of its weights and buffers."""
    torch.manual_seed(seed)
    net = network()
    mean = AveragedModel(net, avg_fn=get_ema_avg_fn(0.5), use_buffers=True)
    for _ in range(3):
        with torch.no_grad():
            for value in (*net.parameters(), net[1].running_mean, net[1].running_var):
                value.add_(torch.rand_like(value))
        mean.update_parameters(net)
    return net, mean


def test_ema_from_the_first_is_what_torch_keeps(tmp_path: Path) -> None:
    """AveragedModel copies the first checkpoint and folds in each that follows."""
    torch.manual_seed(0)
    net = nn.Linear(4, 3).double()
    mean = AveragedModel(net, avg_fn=get_ema_avg_fn(0.9))
    for step in range(1, 6):
        with torch.no_grad():
            for value in net.parameters():
                value.add_(torch.randn_like(value))
        mean.update_parameters(net)
        torch.save(net.state_dict(), tmp_path / f"step_{step}.pt")
    average(tmp_path, tmp_path / "o.pt", scheme="ema", decay=0.9, from_first=True)
    found = torch.load(tmp_path / "o.pt", weights_only=True)
    for name, value in mean.module.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-13, atol=1e-14)


def prefixed(prefix: str, state: State) -> State:
    """Return a state dict with longer names."""
    return {prefix + name: value for name, value in state.items()}


def lightning(seed: int) -> State:
    """After WeightAveraging.on_save_checkpoint of Lightning 2.5.2 (weight_averaging.py)."""
    net, mean = train(seed)
    state = mean.state_dict()
    return {
        "epoch": seed,
        "pytorch-lightning_version": "2.5.2",
        "current_model_state": net.state_dict(),
        "state_dict": {n[7:]: v for n, v in state.items() if n.startswith("module.")},
        "averaging_state": {n: v for n, v in state.items() if not n.startswith("module.")},
    }


def mmengine(seed: int) -> State:
    """After EMAHook.before_save_checkpoint of mmengine 0.10 (hooks/ema_hook.py): both swapped."""
    net, mean = train(seed)
    return {
        "state_dict": mean.module.state_dict(),
        "ema_state_dict": {"steps": torch.tensor(3)} | prefixed("module.", net.state_dict()),
    }


def timm(seed: int) -> State:
    """After CheckpointSaver._save of timm 1.0 (utils/checkpoint_saver.py)."""
    net, mean = train(seed)
    return {
        "epoch": seed,
        "state_dict": net.state_dict(),
        "version": 2,
        "state_dict_ema": mean.module.state_dict(),
        "metric": 0.5,
    }


def icefall(seed: int) -> State:
    """After save_checkpoint of icefall (icefall/checkpoint.py): the mean is always float32."""
    net, mean = train(seed)
    return {"model": net.half().state_dict(), "model_avg": mean.module.float().state_dict()}


def ema_pytorch(seed: int) -> State:
    """After EMA of ema-pytorch 0.7 (ema_pytorch.py), a module with both models and two buffers."""
    net, mean = train(seed)
    return (
        prefixed("online_model.", net.state_dict())
        | prefixed("ema_model.", mean.module.state_dict())
        | {"initted": torch.tensor(True), "step": torch.tensor(9)}
    )


def latent_diffusion(seed: int) -> State:
    """After LitEma of latent diffusion (ldm/modules/ema.py): names without points."""
    net, mean = train(seed)
    means = {n.replace(".", ""): v.detach() for n, v in mean.module.named_parameters()}
    marks = {"decay": torch.tensor(0.999), "num_updates": torch.tensor(9)}
    return {
        "state_dict": prefixed("model.", net.state_dict())
        | {"other.weight": torch.randn(2)}
        | prefixed("model_ema.", marks | means)
    }


def averaged_model(seed: int) -> State:
    """A program that keeps torch's AveragedModel beside the model, both as state dicts."""
    net, mean = train(seed)
    return {"net": net.state_dict(), "swa_model": mean.state_dict(), "epoch": seed}


def gan(seed: int) -> State:
    """StyleGAN2's training script in PyTorch: generator, discriminator and the generator's EMA."""
    net, mean = train(seed)
    other = nn.Linear(5, 5)
    return {"g": net.state_dict(), "d": other.state_dict(), "g_ema": mean.module.state_dict()}


def yolo(seed: int) -> State:
    """Ultralytics's keys, with state dicts in place of pickled modules."""
    net, mean = train(seed)
    return {"epoch": seed, "model": net.state_dict(), "ema": mean.module.state_dict()}


def ddp(seed: int) -> State:
    """A model saved in its DDP wrapper beside an EMA without it."""
    net, mean = train(seed)
    return {"model": prefixed("module.", net.state_dict()), "model_ema": mean.module.state_dict()}


def fairseq(seed: int) -> State:
    """After Trainer.state_dict of fairseq with ema.store_ema (fairseq/trainer.py)."""
    net, mean = train(seed)
    return {
        "cfg": None,
        "model": net.state_dict(),
        "extra_state": {"metrics": [], "ema": mean.module.state_dict(), "val_loss": 0.5},
        "last_optimizer_state": {"state": {0: {"exp_avg": torch.rand(3)}}},
    }


def callback(seed: int) -> State:
    """Lightning's checkpoint with a callback that keeps an EMA in its own state."""
    net, mean = train(seed)
    kept = {"decay": 0.5, "ema_state_dict": mean.module.state_dict()}
    best = {"best_model_score": torch.tensor(0.5)}
    return {
        "state_dict": net.state_dict(),
        "callbacks": {"EMA{'decay': 0.5}": kept, "ModelCheckpoint{'mode': 'min'}": best},
    }


def list_of_diffusers(seed: int) -> State:
    """EMAModel.state_dict of diffusers (training_utils.py): the parameters without names."""
    net, mean = train(seed)
    parameters = [value.detach() for value in mean.module.parameters()]
    return {
        "model": net.state_dict(),
        "ema_state": {"decay": 0.9999, "optimization_step": seed, "shadow_params": parameters},
    }


def two_means(seed: int) -> State:
    """A program that keeps EMAs of two decays beside the model."""
    net, mean = train(seed)
    other = copy.deepcopy(mean.module)
    with torch.no_grad():
        other[0].weight.mul_(0.5)
    states = {"ema_99": mean.module.state_dict(), "ema_9999": other.state_dict()}
    return {"model": net.state_dict(), **states}


#: What writes it -> the state, where the raw weights are, and where their running mean is.
BOTH: dict[str, tuple[Callable[[int], State], str, str]] = {
    "lightning": (lightning, "current_model_state/", "state_dict/"),
    "mmengine": (mmengine, "ema_state_dict/module.", "state_dict/"),
    "timm": (timm, "state_dict/", "state_dict_ema/"),
    "icefall": (icefall, "model/", "model_avg/"),
    "ema_pytorch": (ema_pytorch, "online_model.", "ema_model."),
    "averaged_model": (averaged_model, "net/", "swa_model/module."),
    "gan": (gan, "g/", "g_ema/"),
    "yolo": (yolo, "model/", "ema/"),
    "ddp": (ddp, "model/module.", "model_ema/"),
    "fairseq": (fairseq, "model/", "extra_state/ema/"),
    "callback": (callback, "state_dict/", "callbacks/EMA{'decay': 0.5}/ema_state_dict/"),
}


def flatten(state: Any, path: str = "") -> dict[str, torch.Tensor]:
    """Return all tensors by the keys that lead to them."""
    if isinstance(state, torch.Tensor):
        return {path.removeprefix("/"): state}
    found: dict[str, torch.Tensor] = {}
    items = enumerate(state) if isinstance(state, list) else ()
    for key, value in state.items() if isinstance(state, dict) else items:
        found |= flatten(value, f"{path}/{key}")
    return found


def write_run(folder: Path, make: Callable[[int], State]) -> list[dict[str, torch.Tensor]]:
    """Write two checkpoints; return their tensors."""
    folder.mkdir()
    states = [make(seed) for seed in (1, 2)]
    for k, state in enumerate(states):
        torch.save(state, folder / f"m_{k}.pt")
    return [flatten(copy.deepcopy(state)) for state in states]


def middle(values: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Return the mean in float64, rounded once."""
    return ((values[0].double() + values[1].double()) / 2).to(dtype)


@pytest.mark.parametrize("use_ema", [False, True], ids=["raw", "ema"])
@pytest.mark.parametrize("library", BOTH)
def test_one_of_both_is_averaged_and_written_in_both_places(
    tmp_path: Path, library: str, use_ema: bool
) -> None:
    """The raw weights by default, the running means where they are asked for; all else stays."""
    make, raw, mean = BOTH[library]
    states = write_run(tmp_path / "run", make)
    output = tmp_path / "o.pt"
    report = average(tmp_path / "run", output, use_ema=use_ema)
    found = flatten(torch.load(output, weights_only=True))
    source = mean if use_ema else raw
    names = [n.removeprefix(raw) for n in states[0] if n.startswith(raw)]
    floats = [n for n in names if states[0][raw + n].is_floating_point()]
    assert len(floats) == 7
    for name in floats:
        expected = [state[source + name] for state in states]
        assert not torch.equal(states[0][raw + name], states[0][mean + name]), "no test"
        for place in (raw, mean):
            stored = found[place + name]
            assert stored.dtype == states[-1][place + name].dtype
            assert torch.equal(stored, middle(expected, stored.dtype)), (place, name)
    (note,) = (note for note in report.notes if "running mean" in note)
    assert f"'{mean}*' is a running mean of the raw weights '{raw}*'" in note
    assert ("the running means are averaged" in note) == use_ema
    assert {"kind": "average", "text": note} in report.data()["suspicions"]
    assert verify(output, sources=[tmp_path / "run"]).problems == ()


def test_a_callback_called_as_its_mean_is_paired_with_the_weights(tmp_path: Path) -> None:
    """Lightning names a callback's state by its class: EMA, and in it is an ema_state_dict."""
    states = []
    (tmp_path / "run").mkdir()
    for seed in (1, 2):
        state = callback(seed)
        (kept, _) = state["callbacks"].values()
        torch.save(state | {"callbacks": {"EMA": kept}}, tmp_path / "run" / f"m_{seed}.pt")
        states.append(flatten(state["state_dict"]))
    average(tmp_path / "run", tmp_path / "o.pt")
    found = torch.load(tmp_path / "o.pt", weights_only=True)
    for place in (found["state_dict"], found["callbacks"]["EMA"]["ema_state_dict"]):
        weight = place["0.weight"]
        assert torch.equal(weight, middle([s["0.weight"] for s in states], weight.dtype))


def test_names_without_points_are_found_again(tmp_path: Path) -> None:
    """LitEma's means have no buffers; what has no running mean is averaged by itself, and said."""
    states = write_run(tmp_path / "run", latent_diffusion)
    report = average(tmp_path / "run", tmp_path / "raw.pt")
    found = flatten(torch.load(tmp_path / "raw.pt", weights_only=True))
    expected = middle([state["state_dict/model.0.weight"] for state in states], torch.float32)
    assert torch.equal(found["state_dict/model.0.weight"], expected)
    assert torch.equal(found["state_dict/model_ema.0weight"], expected)
    other = middle([state["state_dict/other.weight"] for state in states], torch.float32)
    assert torch.equal(found["state_dict/other.weight"], other)
    assert any("'state_dict/model_ema.*' is a running mean" in note for note in report.notes)
    report = average(tmp_path / "run", tmp_path / "ema.pt", use_ema=True)
    found = flatten(torch.load(tmp_path / "ema.pt", weights_only=True))
    expected = middle([state["state_dict/model_ema.0weight"] for state in states], torch.float32)
    assert torch.equal(found["state_dict/model.0.weight"], expected)
    (note,) = (note for note in report.notes if "have no EMA" in note)
    assert "other.weight" in note


def test_flat_names_of_safetensors_are_paired_too(tmp_path: Path) -> None:
    """The names that ema-pytorch gives, without any dictionary."""
    states = []
    for seed in (1, 2):
        state = {name: value.clone() for name, value in ema_pytorch(seed).items()}
        states.append(state)
        save_file(state, tmp_path / f"m_{seed}.safetensors")
    paths = [tmp_path / f"m_{seed}.safetensors" for seed in (1, 2)]
    report = average(paths, tmp_path / "o.safetensors")
    found = load_file(tmp_path / "o.safetensors")
    expected = middle([state["online_model.0.weight"] for state in states], torch.float32)
    assert torch.equal(found["online_model.0.weight"], expected)
    assert torch.equal(found["ema_model.0.weight"], expected)
    assert any("'ema_model.*' is a running mean" in note for note in report.notes)


def denoising_diffusion(seed: int) -> State:
    """After Trainer.save of denoising-diffusion-pytorch: ema-pytorch's module beside its model."""
    net, mean = train(seed)
    state = net.state_dict()
    marks = {"initted": torch.tensor(True), "step": torch.tensor(9)}
    means = prefixed("ema_model.", mean.module.state_dict())
    return {
        "step": seed,
        "model": state,
        "opt": torch.optim.Adam(net.parameters()).state_dict(),
        "ema": prefixed("online_model.", state) | means | marks,
        "scaler": None,
    }


@pytest.mark.parametrize("use_ema", [False, True], ids=["raw", "ema"])
def test_the_model_that_ema_pytorch_shares_is_written_once(tmp_path: Path, use_ema: bool) -> None:
    """The model, the module's own model and its EMA have the same values in the average."""
    states = write_run(tmp_path / "run", denoising_diffusion)
    average(tmp_path / "run", tmp_path / "o.pt", use_ema=use_ema)
    found = flatten(torch.load(tmp_path / "o.pt", weights_only=True))
    source = "ema/ema_model." if use_ema else "model/"
    for name in network().state_dict():
        values = [state[source + name] for state in states]
        if values[0].is_floating_point():
            for place in ("model/", "ema/online_model.", "ema/ema_model."):
                assert torch.equal(found[place + name], middle(values, torch.float32)), place


@pytest.mark.parametrize("use_ema", [False, True], ids=["raw", "ema"])
def test_a_list_of_means_is_paired_with_the_parameters_in_their_order(
    tmp_path: Path, use_ema: bool
) -> None:
    """As diffusers and torch_ema do; a tied weight counts once and buffers are none of it."""
    states = write_run(tmp_path / "run", list_of_diffusers)
    report = average(tmp_path / "run", tmp_path / "o.pt", use_ema=use_ema)
    found = flatten(torch.load(tmp_path / "o.pt", weights_only=True))
    names = [name for name, _ in network().named_parameters()]
    assert len(names) == 4
    for number, name in enumerate(names):
        mean = f"ema_state/shadow_params/{number}"
        values = [state[mean if use_ema else f"model/{name}"] for state in states]
        for place in (mean, f"model/{name}"):
            assert torch.equal(found[place], middle(values, torch.float32)), place
    moving = [state["model/1.running_mean"] for state in states]
    assert torch.equal(found["model/1.running_mean"], middle(moving, torch.float32))
    (note,) = (note for note in report.notes if "running mean of the raw" in note)
    assert "a list without names" in note


@pytest.mark.parametrize("use_ema", [False, True], ids=["raw", "ema"])
def test_a_list_of_means_that_fits_no_model_is_refused_until_it_is_excluded(
    tmp_path: Path, use_ema: bool
) -> None:
    """One tensor is missing in the list: nothing says which, and nothing is guessed."""

    def make(seed: int) -> State:
        state = list_of_diffusers(seed)
        del state["ema_state"]["shadow_params"][1]
        return state

    states = write_run(tmp_path / "run", make)
    with pytest.raises(
        MismatchError,
        match=r"m_0\.pt: 'ema_state/\*' .*list without names, of 3 tensors; .*carries",
    ):
        average(tmp_path / "run", tmp_path / "o.pt", use_ema=use_ema)
    if use_ema:
        with pytest.raises(MismatchError, match="has no running mean"):
            plan(tmp_path / "run", use_ema=True, exclude_tensors=["ema_state/*"])
        return
    average(tmp_path / "run", tmp_path / "o.pt", exclude_tensors=["ema_state/*"])
    found = flatten(torch.load(tmp_path / "o.pt", weights_only=True))
    mean = "ema_state/shadow_params/0"
    assert torch.equal(found[mean], states[1][mean])
    values = [state["model/0.weight"] for state in states]
    assert torch.equal(found["model/0.weight"], middle(values, torch.float32))


def test_two_running_means_of_a_model_are_named_and_one_is_chosen(tmp_path: Path) -> None:
    """The error has both and the option that leaves one out; without --use-ema all is raw."""
    states = write_run(tmp_path / "run", two_means)
    with pytest.raises(MismatchError, match=r"'ema_99/\*' and 'ema_9999/\*' are both") as caught:
        average(tmp_path / "run", tmp_path / "o.pt", use_ema=True)
    assert "--exclude-tensors 'ema_99/*' or --exclude-tensors 'ema_9999/*'" in str(caught.value)
    for left_out, chosen in (("ema_99", "ema_9999"), ("ema_9999", "ema_99")):
        output = tmp_path / f"{chosen}.pt"
        average(tmp_path / "run", output, use_ema=True, exclude_tensors=[f"{left_out}/*"])
        found = flatten(torch.load(output, weights_only=True))
        expected = middle([state[f"{chosen}/0.weight"] for state in states], torch.float32)
        assert torch.equal(found["model/0.weight"], expected)
        assert torch.equal(found[f"{chosen}/0.weight"], expected)
        assert torch.equal(found[f"{left_out}/0.weight"], states[1][f"{left_out}/0.weight"])
    average(tmp_path / "run", tmp_path / "raw.pt")
    found = flatten(torch.load(tmp_path / "raw.pt", weights_only=True))
    expected = middle([state["model/0.weight"] for state in states], torch.float32)
    assert all(torch.equal(found[f"{k}/0.weight"], expected) for k in ("model", "ema_99"))


def test_a_part_holds_no_running_mean_of_itself(tmp_path: Path) -> None:
    """The EMA is chosen with --key itself, and all else is the newest's."""
    states = write_run(tmp_path / "run", fairseq)
    with pytest.raises(MismatchError, match=r"no running mean .* in 'model'; --key may choose"):
        plan(tmp_path / "run", use_ema=True, key="model")
    average(tmp_path / "run", tmp_path / "o.pt", key="extra_state/ema")
    found = flatten(torch.load(tmp_path / "o.pt", weights_only=True))
    values = [state["extra_state/ema/0.weight"] for state in states]
    assert torch.equal(found["extra_state/ema/0.weight"], middle(values, torch.float32))
    assert torch.equal(found["model/0.weight"], states[1]["model/0.weight"])


@pytest.mark.parametrize(
    ("make", "raw"), [(lightning, "current_model_state"), (mmengine, "ema_state_dict")]
)
def test_a_part_that_is_a_running_mean_in_disguise_is_called_one(
    tmp_path: Path, make: Callable[[int], State], raw: str
) -> None:
    """Programs put it where the model is looked for; the note says where the model is."""
    states = write_run(tmp_path / "run", make)
    report = average(tmp_path / "run", tmp_path / "o.pt", key="state_dict")
    assert any(
        "'state_dict' is a running mean (EMA) of" in note and raw in note for note in report.notes
    )
    found = flatten(torch.load(tmp_path / "o.pt", weights_only=True))
    expected = middle([state["state_dict/0.weight"] for state in states], torch.float32)
    assert torch.equal(found["state_dict/0.weight"], expected)
    report = average(tmp_path / "run", tmp_path / "raw.pt", key=raw)
    assert not any("running mean" in note for note in report.notes)


@pytest.mark.parametrize("use_ema", [False, True])
def test_the_unrounded_mean_of_fairseq_is_taken(tmp_path: Path, use_ema: bool) -> None:
    """With ema_fp32, it lies beside the mean in the model's type; the average is in all places."""

    def make(seed: int) -> State:
        net, mean = train(seed)
        exact = mean.module.state_dict()
        return {
            "model": {name: value.half() for name, value in net.state_dict().items()},
            "extra_state": {
                "ema": {name: value.half() for name, value in exact.items()},
                "ema_fp32_params": exact,
            },
            "optimizer_history": [],
        }

    states = write_run(tmp_path / "run", make)
    report = average(tmp_path / "run", tmp_path / "o.pt", use_ema=use_ema)
    found = flatten(torch.load(tmp_path / "o.pt", weights_only=True))
    source = "extra_state/ema_fp32_params/" if use_ema else "model/"
    means = [middle([state[source + "0.weight"] for state in states], dtype) for dtype in HALF]
    assert not torch.equal(means[0].float(), means[1])
    for place in ("model/", "extra_state/ema/", "extra_state/ema_fp32_params/"):
        value = found[place + "0.weight"]
        assert value.dtype == (torch.float32 if "fp32" in place else torch.float16)
        assert torch.equal(value, means[HALF.index(value.dtype)]), place
    said = "as 'extra_state/ema_fp32_params/*' has them in float32"
    assert any(said in note for note in report.notes) == use_ema
    assert verify(tmp_path / "o.pt", sources=[tmp_path / "run"]).verified


def test_the_ema_folders_of_diffusers_are_named_by_a_glob(tmp_path: Path) -> None:
    """EMAModel.save_pretrained's folder, by checkpoint-N's step; the model beside is not read."""
    weights = {}
    for step in (500, 1000, 1500):
        torch.manual_seed(step)
        for name in ("unet", "unet_ema"):
            folder = tmp_path / "run" / f"checkpoint-{step}" / name
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(json.dumps({"optimization_step": step}))
            weights[step, name] = torch.randn(3, 3)
            file = folder / "diffusion_pytorch_model.safetensors"
            save_file({"conv_in.weight": weights[step, name]}, file, {"format": "pt"})
    pattern = str(tmp_path / "run" / "checkpoint-*" / "unet_ema")
    average([pattern], tmp_path / "final", last=2)
    found = load_file(tmp_path / "final" / "diffusion_pytorch_model.safetensors")
    expected = middle([weights[1000, "unet_ema"], weights[1500, "unet_ema"]], torch.float32)
    assert torch.equal(found["conv_in.weight"], expected)
    copied = json.loads((tmp_path / "final" / "config.json").read_text())
    assert copied == {"optimization_step": 1500}


#: What writes it -> what is said of it.
WRITERS: dict[str, tuple[Callable[[int], State], str]] = {
    "lightning": (lightning, "PyTorch Lightning 2.5.2"),
    "mmengine": (
        lambda seed: mmengine(seed) | {"meta": {"mmengine_version": "0.10"}},
        "mmengine 0.10",
    ),
    "timm": (lambda seed: timm(seed) | {"arch": "vit", "optimizer": {}}, "timm"),
    "fairseq": (lambda seed: fairseq(seed) | {"optimizer_history": []}, "fairseq"),
    "unknown": (yolo, ""),
    "numbers": (lambda seed: yolo(seed) | {"ds_version": 3, "meta": [1]}, ""),
}


@pytest.mark.parametrize("library", WRITERS)
def test_inspect_tells_what_each_tensor_is_and_what_wrote_the_file(
    tmp_path: Path, library: str
) -> None:
    """Raw weights, running means with their counters, optimizer; the trainer and its version."""
    make, trainer = WRITERS[library]
    _, raw, mean = BOTH["yolo" if library in ("unknown", "numbers") else library]
    write_run(tmp_path / "run", make)
    (found,) = inspect([tmp_path / "run" / "m_0.pt"])
    assert found.table.about.get("trainer", "") == trainer
    roles = {one.spec.name: one.role for one in found.tensors}
    expected = {name: "weights" for name in roles if name.startswith(raw)}
    expected |= {name: "ema" for name in roles if name.startswith(mean)}
    expected |= {name: "optimizer" for name in roles if name.startswith("last_optimizer_state")}
    assert {name: role for name, role in roles.items() if name in expected} == expected
    assert {"weights", "ema"} <= {*expected.values()}
    result = polyak("inspect", tmp_path / "run" / "m_0.pt", cwd=tmp_path)
    (line,) = (line for line in result.stdout.splitlines() if f"{mean}0.weight" in line)
    assert line.split()[-1] == "ema"
    assert f", trainer {trainer}" in result.stdout or not trainer


ALONE: dict[str, Callable[[int], State]] = {
    "AveragedModel": lambda seed: dict(train(seed)[1].state_dict()),
    "ema-pytorch without its online model": lambda seed: {
        name: value
        for name, value in ema_pytorch(seed).items()
        if not name.startswith("online_model.")
    },
    "Real-ESRGAN": lambda seed: {"params_ema": train(seed)[0].state_dict()},
    "diffusers' EMAModel": lambda seed: {
        "decay": 0.9999,
        "optimization_step": seed,
        "shadow_params": [value.detach() for value in train(seed)[1].module.parameters()],
    },
}


@pytest.mark.parametrize("library", ALONE)
def test_a_running_mean_alone_is_refused_until_it_is_asked_for(
    tmp_path: Path, library: str
) -> None:
    """The error names both options, each of which averages it, and `check` reports the same."""
    write_run(tmp_path / "run", ALONE[library])
    with pytest.raises(
        MismatchError, match=r"m_0\.pt.*running mean.*--use-ema or --allow averages"
    ):
        average(tmp_path / "run", tmp_path / "o.pt")
    assert not (tmp_path / "o.pt").exists()
    problems = check(tmp_path / "run").checkpoints[0].problems
    assert [problem.kind for problem in problems] == ["average"]
    assert check(tmp_path / "run", allow=["averages"]).healthy
    options: list[Any] = [{"use_ema": True}, {"allow": ["averages"]}]
    for k, option in enumerate(options):
        output = tmp_path / f"{k}.pt"
        report = average(tmp_path / "run", output, **option)
        assert any("running means are averaged" in note for note in report.notes)
        assert verify(output, sources=[tmp_path / "run"]).problems == ()
    record = json.loads(_read_record(tmp_path / "1.pt"))
    assert record["options"]["allow"] == ["averages"]
    assert record["suspicions"] == ["average"]


def _read_record(path: Path) -> str:
    """Return the record in an output, by zipfile."""
    with zipfile.ZipFile(path) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("polyak_provenance"))
        return archive.read(name).decode()


#: States that look a little like running means, and are none.
HONEST: dict[str, Callable[[], State]] = {
    "a DDP wrapper": lambda: prefixed("module.", network().state_dict()),
    "an attention module called EMA": lambda: {
        "model": {
            f"model.{k}.{part}.conv.weight": torch.randn(2, 2)
            for k in range(4)
            for part in ("a", "b", "ema")
        }
    },
    "a codebook": lambda: {
        "vq.embed_avg": torch.randn(3),
        "vq.cluster_size": torch.randn(3),
        "vq._ema_w": torch.randn(3),
        "encoder.weight": torch.randn(3),
    },
    "a gate": lambda: {
        f"{part}.weight": torch.randn(n) for part, n in (("ema_gate", 3), ("gate", 3), ("w", 9))
    },
    "two heads": lambda: {"avg.weight": torch.randn(3), "max.weight": torch.randn(3)},
    "a schema": lambda: {"schema": {"w": torch.randn(3)}, "cinema": {"w": torch.randn(3)}},
}


@pytest.mark.parametrize("what", HONEST)
def test_a_model_with_such_names_is_averaged_as_it_is(tmp_path: Path, what: str) -> None:
    """No word about running means, and every tensor is averaged by itself."""
    states = write_run(tmp_path / "run", lambda _: HONEST[what]())
    report = average(tmp_path / "run", tmp_path / "o.pt")
    assert not any("running mean" in note for note in report.notes)
    found = flatten(torch.load(tmp_path / "o.pt", weights_only=True))
    for name, value in found.items():
        if value.is_floating_point():
            assert torch.equal(value, middle([s[name] for s in states], value.dtype)), name


def test_ema_is_asked_for_where_there_is_none(tmp_path: Path) -> None:
    """The error says that the checkpoint has no running mean."""
    write_run(tmp_path / "run", lambda _: dict(network().state_dict()))
    with pytest.raises(MismatchError, match=r"m_1\.pt: has no running mean"):
        plan(tmp_path / "run", use_ema=True)

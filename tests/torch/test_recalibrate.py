"""`recalibrate` on checkpoints of PyTorch: the statistics are those of PyTorch's `update_bn`."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from torch.optim.swa_utils import update_bn

from polyak_cli import average, plan, recalibrate, verify
from polyak_cli.errors import MismatchError, PolyakError, UsageError
from polyak_cli.evaluation import data
from tests.command import SAMPLES, polyak
from tests.torch.test_evaluate import write_code

RANDOM = np.random.default_rng(1)
KINDS = {
    "BatchNorm1d(6)": (24, 6),
    "BatchNorm2d(6)": (24, 6, 5, 4),
    "BatchNorm3d(6)": (24, 6, 3, 2, 4),
    "SyncBatchNorm(6)": (24, 6, 5),
    "BatchNorm1d(6, momentum=None)": (24, 6),
    "BatchNorm1d(6, momentum=0.01, affine=False)": (24, 6, 7),
}
#: What a module of `CODE` has of them.
STATISTICS = {f"{layer}.running_{kind}" for layer in "ac" for kind in ("mean", "var")}
CODE = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.{kind}, nn.PReLU(), nn.{kind}

    def forward(self, x):
        return self.c(self.b(self.a(x)))

def make():
    return Net()
"""


def make_rows(shape: tuple[int, ...]) -> data.Split:
    """Return features whose channels differ; the labels play no part."""
    x = RANDOM.normal(size=shape) * RANDOM.uniform(0.5, 3, shape[1:]) + RANDOM.normal(
        size=shape[1:]
    )
    return data.Split("rows", x, np.zeros(shape[0], int))


def build(code: str) -> Any:
    """Return the module of a text, with random tensors."""
    names: dict[str, Any] = {}
    exec(compile(textwrap.dedent(code), "net", "exec"), names)  # the test's own text
    net = names["make"]()
    for tensor in net.parameters():
        torch.nn.init.uniform_(tensor, 0.5, 2)
    return net


def order_batches(rows: data.Split, size: int) -> list[Any]:
    """Return the batches in the order that the documentation of polyak gives."""
    order = np.random.RandomState(0).permutation(rows.rows)
    x = torch.tensor(np.asarray(rows.features), dtype=torch.float32)
    return list(x[order].split(size))


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_those_of_update_bn(tmp_path: Path, kind: str) -> None:
    """For equal batches, in every kind of layer, one behind the other; all else stays as it is."""
    torch.manual_seed(0)
    code = CODE.format(kind=kind)
    net, rows = build(code), make_rows(KINDS[kind])
    torch.save({"net": net.state_dict(), "step": 7}, tmp_path / "a.pt")
    source = f"{write_code(tmp_path, code)}:make"
    seen: list[tuple[int, int]] = []
    found = recalibrate(
        *(tmp_path / "a.pt", tmp_path / "b.pt", rows),
        batch_size=8,
        architecture=source,
        progress=lambda *both: seen.append(both),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert (found.layers, found.batches, found.notes) == (2, 3, ())
    before = torch.load(tmp_path / "a.pt")["net"]
    after = torch.load(tmp_path / "b.pt")
    update_bn(order_batches(rows, 8), net)
    for name, tensor in net.state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            assert after["net"][name].numpy() == pytest.approx(tensor.numpy(), rel=1e-6, abs=1e-6)
            assert not torch.equal(after["net"][name], before[name])
        else:
            assert torch.equal(after["net"][name], before[name]), name
    assert after["step"] == 7


FROZEN = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.still = nn.BatchNorm1d(6)
        self.bare = nn.BatchNorm1d(6, track_running_stats=False)
        self.drop = nn.Dropout(0.5)
        self.last = nn.BatchNorm1d(6)
        self.spare = nn.BatchNorm1d(6)

    def train(self, mode=True):
        super().train(mode)
        self.still.eval()
        return self

    def forward(self, x):
        return self.last(self.drop(self.bare(self.still(x))))

def make():
    return Net()
"""


def test_frozen_bare_and_unused_layers_are_left_alone_and_named(tmp_path: Path) -> None:
    """Dropout is off, and only the layer that trains gets new statistics, in safetensors."""
    net, rows = build(FROZEN), make_rows((24, 6))
    net.still.running_mean.fill_(3)
    save_file(net.state_dict(), tmp_path / "a.safetensors")
    found = recalibrate(
        tmp_path / "a.safetensors",
        tmp_path / "b.safetensors",
        rows,
        batch_size=24,
        architecture=f"{write_code(tmp_path, FROZEN)}:make",
    )
    words = "\n".join(found.notes)
    assert "track_running_stats=False) and stay (bare)" in words
    assert (
        "are frozen (in evaluation mode when the module trains); their statistics stay (still)"
        in words
    )
    assert "saw no rows; their statistics stay (spare)" in words
    before, after = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"last.running_mean", "last.running_var"}
    net.eval()
    net.bare.train()
    with torch.no_grad():
        seen = net.bare(net.still(torch.tensor(np.asarray(rows.features), dtype=torch.float32)))
    assert after["last.running_mean"].numpy() == pytest.approx(seen.mean(0).numpy(), rel=1e-5)
    assert after["last.running_var"].numpy() == pytest.approx(seen.var(0).numpy(), rel=1e-5)


def test_an_average_is_recalibrated_in_one_step_and_verified(tmp_path: Path) -> None:
    """`average --recalibrate` gives the tensors of both commands, and `verify` passes it."""
    code = CODE.format(kind="BatchNorm1d(6)")
    rows = make_rows((24, 6))
    (tmp_path / "run").mkdir()
    for k in range(2):
        torch.save(build(code).state_dict(), tmp_path / f"run/e_{k}.pt")
    np.savez(tmp_path / "rows.npz", x=np.asarray(rows.features), y=np.asarray(rows.labels))
    write_code(tmp_path, code)
    done = polyak(
        *("average", "run", "--recalibrate", "rows.npz", "--model", "net.py:make"),
        *("--batch-size", 8, "-o", "one.pt"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    average(tmp_path / "run", tmp_path / "mean.pt")
    recalibrate(
        tmp_path / "mean.pt",
        tmp_path / "two.pt",
        rows,
        batch_size=8,
        architecture=f"{tmp_path}/net.py:make",
    )
    one, two = torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "two.pt")
    assert all(torch.equal(one[name], two[name]) for name in two)
    assert verify(tmp_path / "one.pt", sources=[tmp_path / "run"]).problems == ()


def write_parts(path: Path, code: str) -> None:
    """Write a checkpoint with weights and their EMA, as timm does."""
    parts = {"state_dict": build(code).state_dict(), "state_dict_ema": build(code).state_dict()}
    torch.save(parts, path)


def find_changed(one: Path, other: Path) -> dict[str, set[str]]:
    """Return which tensors of each part differ."""
    a, b = torch.load(one), torch.load(other)
    return {
        part: {name for name in a[part] if not torch.equal(a[part][name], b[part][name])}
        for part in a
    }


def test_a_part_is_recalibrated_by_its_key(tmp_path: Path) -> None:
    """The statistics of other parts stay; an average by `--key` is recalibrated in that part."""
    code = CODE.format(kind="BatchNorm1d(6)")
    rows, source = make_rows((24, 6)), f"{write_code(tmp_path, code)}:make"
    write_parts(tmp_path / "a_1.pt", code)
    taken: dict[str, Any] = {"batch_size": 8, "key": "state_dict_ema"}
    recalibrate(tmp_path / "a_1.pt", tmp_path / "b.pt", rows, architecture=source, **taken)
    changed = find_changed(tmp_path / "a_1.pt", tmp_path / "b.pt")
    assert not changed["state_dict"]
    assert changed["state_dict_ema"] == STATISTICS
    net = build(code)
    net.load_state_dict(torch.load(tmp_path / "a_1.pt")["state_dict_ema"])
    update_bn(order_batches(rows, 8), net)
    found = torch.load(tmp_path / "b.pt")["state_dict_ema"]
    for name in STATISTICS:
        assert torch.allclose(found[name], net.state_dict()[name], rtol=0, atol=1e-6)
    output = tmp_path / "c.pt"
    average(tmp_path / "a_1.pt", output, recalibrate=rows, model=source, verify=True, **taken)
    assert find_changed(output, tmp_path / "b.pt") == {"state_dict": set(), "state_dict_ema": set()}
    assert verify(output, sources=[tmp_path]).problems == ()
    for part in ({"key": "state_dict_ema"}, {"use_ema": True}):
        with pytest.raises(
            UsageError, match=r"model_499\.h5 is Keras HDF5, which Keras opens as a"
        ):
            recalibrate(SAMPLES / "model_499.h5", tmp_path / "d.h5", rows, **part)


def test_use_ema_recalibrates_the_ema_at_its_own_place(tmp_path: Path) -> None:
    """As the key of the EMA does; weights without their own statistics beside them are refused."""
    code = CODE.format(kind="BatchNorm1d(6)")
    rows, source = make_rows((24, 6)), f"{write_code(tmp_path, code)}:make"
    np.savez(tmp_path / "rows.npz", x=np.asarray(rows.features), y=np.asarray(rows.labels))
    write_parts(tmp_path / "a.pt", code)
    how = ("--data", "rows.npz", "--model", "net.py:make", "--batch-size", 8)
    done = polyak("recalibrate", "a.pt", *how, "--use-ema", "-o", "b.pt", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    by_key = recalibrate(
        *(tmp_path / "a.pt", tmp_path / "c.pt", rows),
        batch_size=8,
        key="state_dict_ema",
        architecture=source,
    )
    assert by_key.layers == 2
    changed = find_changed(tmp_path / "a.pt", tmp_path / "b.pt")
    assert changed == {"state_dict": set(), "state_dict_ema": STATISTICS}
    assert find_changed(tmp_path / "b.pt", tmp_path / "c.pt") == {
        "state_dict": set(),
        "state_dict_ema": set(),
    }
    held = torch.load(tmp_path / "a.pt")
    bare = {k: v for k, v in held["state_dict_ema"].items() if k not in STATISTICS}
    torch.save({**held, "state_dict_ema": bare}, tmp_path / "bare.pt")
    with pytest.raises(MismatchError, match=r"have no BatchNorm statistics of their own; write"):
        recalibrate(
            tmp_path / "bare.pt", tmp_path / "d.pt", rows, architecture=source, use_ema=True
        )


@pytest.mark.parametrize("use_ema", [False, True])
def test_statistics_are_written_where_the_average_is(tmp_path: Path, use_ema: bool) -> None:
    """An average that stands for the weights and for their EMA gets the same ones in both."""
    code = CODE.format(kind="BatchNorm1d(6)")
    source = f"{write_code(tmp_path, code)}:make"
    for k in range(2):
        write_parts(tmp_path / f"a_{k}.pt", code)
    average(
        *(sorted(tmp_path.glob("a_*.pt")), tmp_path / "b.pt"),
        use_ema=use_ema,
        recalibrate=make_rows((24, 6)),
        model=source,
    )
    weights, means = torch.load(tmp_path / "b.pt").values()
    assert all(torch.equal(weights[name], means[name]) for name in weights)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("bfloat16", 0.03)])
def test_statistics_keep_the_type_of_the_module(
    tmp_path: Path, dtype: str, tolerance: float
) -> None:
    """The rows are given in it, and the file keeps it; bfloat16 has three digits."""
    code = CODE.format(kind="BatchNorm1d(6)").replace("Net()\n", f"Net().to(torch.{dtype})\n")
    code = code.replace("from torch import nn", "import torch\nfrom torch import nn")
    net, rows = build(code), make_rows((24, 6))
    save_file(net.state_dict(), tmp_path / "a.safetensors")
    output = tmp_path / "b.safetensors"
    source = f"{write_code(tmp_path, code)}:make"
    recalibrate(tmp_path / "a.safetensors", output, rows, batch_size=8, architecture=source)
    exact = net.double()
    exact.load_state_dict(load_file(tmp_path / "a.safetensors"))
    order = np.random.RandomState(0).permutation(rows.rows)
    update_bn(torch.tensor(np.asarray(rows.features))[order].split(8), exact)
    after = load_file(output)
    for name, tensor in exact.state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            assert str(after[name].dtype) == f"torch.{dtype}"
            found = after[name].double().numpy()
            assert found == pytest.approx(tensor.numpy(), rel=tolerance, abs=tolerance)


ODD = """
import torch
from torch import nn
from torch.nn import functional

class Act(nn.BatchNorm1d):
    def forward(self, x):
        running = self.running_mean, self.running_var
        x = functional.batch_norm(
            x, *running, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return x.relu()

class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.full((6,), 0.5))

    def forward(self, x):
        return x - self.running_mean[:, None]

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.BatchNorm1d(6)
        self.b = self.a
        self.act = Act(6)
        self.fixed = Fixed()
        self.instance = nn.InstanceNorm1d(6, track_running_stats=True)

    def forward(self, x):
        return self.act(self.b(input=self.fixed(self.instance(self.a(x)))))

def make():
    return Net()
"""


def test_a_layer_of_two_names_that_runs_twice_is_gathered_once(tmp_path: Path) -> None:
    """Both names get its statistics; InstanceNorm and a layer of one's own stay, and are named."""
    net, rows = build(ODD), make_rows((24, 6, 5))
    torch.save(net.state_dict(), tmp_path / "a.pt")
    source = f"{write_code(tmp_path, ODD)}:make"
    found = recalibrate(
        tmp_path / "a.pt", tmp_path / "b.pt", rows, batch_size=8, architecture=source
    )
    assert found.layers == 2
    assert "of 2 layers stay, as they are no BatchNorm (fixed, instance)" in found.notes[0]
    after = torch.load(tmp_path / "b.pt")
    seen: dict[str, list[Any]] = {"a": [], "act": []}

    def normalise(x: Any, layer: Any, name: str) -> Any:
        seen[name].append(torch.stack((x.mean((0, 2)), x.transpose(0, 1).flatten(1).var(1))))
        return functional.batch_norm(x, None, None, layer.weight, layer.bias, training=True)

    with torch.no_grad():
        for batch in order_batches(rows, 8):
            x = normalise(batch, net.a, "a") / (1 + net.instance.eps) ** 0.5 - 0.5
            normalise(normalise(x, net.a, "a"), net.act, "act")
    for name, values in seen.items():
        for which, expected in zip(("mean", "var"), torch.stack(values).mean(0), strict=True):
            held = after[f"{name}.running_{which}"].numpy()
            assert held == pytest.approx(expected.numpy(), rel=1e-5, abs=1e-6)
    assert torch.equal(after["a.running_var"], after["b.running_var"])
    assert torch.equal(after["fixed.running_mean"], torch.full((6,), 0.5))
    # As of a state that was copied tensor by tensor, from a GPU or for an EMA.
    copied = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    torch.save(copied, tmp_path / "c.pt")
    recalibrate(tmp_path / "c.pt", tmp_path / "d.pt", rows, batch_size=8, architecture=source)
    again = torch.load(tmp_path / "d.pt")
    assert all(torch.equal(again[name], tensor) for name, tensor in after.items())


def refuse(tmp_path: Path, code: str, **options: Any) -> str:
    """Return the error of recalibrating a checkpoint, which leaves no output."""
    torch.save(build(code).state_dict(), tmp_path / "a.pt")
    source = {"architecture": f"{write_code(tmp_path, code)}:make"} | options
    with pytest.raises(PolyakError) as caught:
        recalibrate(tmp_path / "a.pt", tmp_path / "b.pt", make_rows((24, 6)), **source)
    assert not (tmp_path / "b.pt").exists()
    return str(caught.value)


def test_what_cannot_be_recalibrated_is_refused(tmp_path: Path) -> None:
    """No layer, only frozen ones, no function, one that returns none, and rows that do not fit."""
    plain = "from torch import nn\n\ndef make():\n    return nn.Linear(6, 3)\n"
    assert "has no BatchNorm layer" in refuse(tmp_path, plain)
    frozen = plain.replace("nn.Linear(6, 3)", "nn.BatchNorm1d(6, track_running_stats=False)")
    assert "every BatchNorm layer is frozen" in refuse(tmp_path, frozen)
    code = CODE.format(kind="BatchNorm1d(6)")
    assert "--model MODULE.py:FUNCTION" in refuse(tmp_path, code, architecture=None)
    assert "failed on rows" in refuse(tmp_path, CODE.format(kind="BatchNorm3d(6)"))
    for device in ("meta", "cuda:99", "tpu"):
        assert f"--device {device}: cannot be used" in refuse(tmp_path, code, device=device)


def test_a_lazy_module_is_refused(tmp_path: Path) -> None:
    """Its tensors have no shapes to compare with those of the file."""
    code = CODE.format(kind="BatchNorm1d(6)")
    torch.save(build(code).state_dict(), tmp_path / "a.pt")
    source = f"{write_code(tmp_path, CODE.format(kind='LazyBatchNorm1d()'))}:make"
    with pytest.raises(PolyakError, match=r"'a\.weight' has no shape yet; run a batch"):
        recalibrate(tmp_path / "a.pt", tmp_path / "b.pt", make_rows((24, 6)), architecture=source)


def test_average_refuses_a_device_before_it_reads_and_uses_one(tmp_path: Path) -> None:
    """`--device` is that of the module; without `--recalibrate` there is none to run."""
    code = CODE.format(kind="BatchNorm1d(6)")
    torch.save(build(code).state_dict(), tmp_path / "a_1.pt")
    rows, source = make_rows((24, 6)), f"{write_code(tmp_path, code)}:make"
    with pytest.raises(PolyakError, match="--device tpu: cannot be used"):
        plan(tmp_path / "a_1.pt", recalibrate=rows, model=source, device="tpu")
    with pytest.raises(PolyakError, match="--device belongs to --recalibrate, which is missing"):
        plan(tmp_path / "a_1.pt", device="cpu")
    output = tmp_path / "b.pt"
    found = average(tmp_path / "a_1.pt", output, recalibrate=rows, model=source, device="cpu:0")
    assert found.recalibrated is not None


def test_a_function_of_the_tensors_is_refused(tmp_path: Path) -> None:
    """It returns no layers that could be seen; the message says what is expected."""
    save_file({"w": torch.zeros(2)}, tmp_path / "a.safetensors")
    source = write_code(tmp_path, "def load(tensors):\n    return lambda x: x\n")
    with pytest.raises(UsageError, match=r"takes arguments.*returns a torch\.nn\.Module"):
        recalibrate(
            *(tmp_path / "a.safetensors", tmp_path / "b.safetensors", make_rows((24, 6))),
            architecture=f"{source}:load",
        )

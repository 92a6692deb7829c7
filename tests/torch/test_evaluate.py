"""`evaluate` on checkpoints of PyTorch: every figure is what plain PyTorch computes."""

from __future__ import annotations

import pickle
import re
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from polyak_cli import average, compare, evaluate, recalibrate, sweep
from polyak_cli.errors import MismatchError, PolyakError, UsageError
from polyak_cli.evaluation import data, frameworks
from polyak_cli.evaluation.evaluator import Evaluator
from tests.command import polyak
from tests.test_guide import GUIDE, find_blocks, run

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(203, 4))
CLASSES = RANDOM.integers(0, 3, 203)
NUMBERS = X @ [1.0, -2.0, 0.5, 0.0]
ROWS = data.Split("rows", X, CLASSES)
NET = """
from torch import nn

def make():
    return nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)
    )
"""


def make_net() -> Any:
    """Return the network of NET with random tensors and statistics."""
    names: dict[str, Any] = {}
    exec(compile(NET, "net", "exec"), names)  # the test's own text
    net = names["make"]()
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2)
    return net


def write_code(folder: Path, text: str = NET, name: str = "net.py") -> str:
    """Write a module of the user's, and return its path."""
    (folder / name).write_text(textwrap.dedent(text))
    return str(folder / name)


def run_plainly(net: Any, x: Any = X) -> Any:
    """Return the outputs of a network as PyTorch alone computes them."""
    with torch.no_grad():
        return net.eval()(torch.tensor(x, dtype=torch.float32))


def save_state(state: Mapping[str, Any], path: Path) -> None:
    """Save a plain state dict."""
    torch.save(dict(state), path)


def save_for_lightning(state: Mapping[str, Any], path: Path) -> None:
    """Save as Lightning does, with its prefix."""
    held = {f"model.{name}": tensor for name, tensor in state.items()}
    torch.save({"state_dict": held, "epoch": 3, "global_step": 40}, path)


def test_the_ema_is_scored_where_it_is_asked_for(tmp_path: Path) -> None:
    """By --use-ema or by its key; a file without one is refused."""
    torch.manual_seed(5)
    net, mean = make_net(), make_net()
    state, means = net.state_dict(), mean.state_dict()
    torch.save({"state_dict": state, "state_dict_ema": means, "epoch": 3}, tmp_path / "a.pt")
    source = f"{write_code(tmp_path)}:make"
    options: list[tuple[Any, Mapping[str, Any]]] = [
        (net, {}),
        (mean, {"use_ema": True}),
        (mean, {"key": "state_dict_ema"}),
    ]
    for own, how in options:
        (score,) = evaluate(tmp_path / "a.pt", ROWS, model=source, **how)
        expected = functional.cross_entropy(run_plainly(own), torch.tensor(CLASSES))
        assert score.loss == pytest.approx(float(expected), rel=1e-5)
    torch.save(state, tmp_path / "b.pt")
    with pytest.raises(PolyakError, match="has no running mean of its weights"):
        evaluate(tmp_path / "b.pt", ROWS, model=source, use_ema=True)


def test_a_file_of_the_user_is_imported_once_until_it_changes(tmp_path: Path) -> None:
    """For its rows, its model and its metric; with another text it is imported again."""
    torch.save(make_net().state_dict(), tmp_path / "a.pt")
    code = f"""{NET}
from pathlib import Path
with open({str(tmp_path / "seen")!r}, "a") as file:
    file.write("1")

def rows():
    return [[0.5] * 4] * 3, [0, 1, 2]

def sure(labels, predictions):
    return predictions.max(1)
"""
    source = write_code(tmp_path, code)
    rows = data.load(f"{source}:rows").split()
    list(evaluate(tmp_path / "a.pt", rows, model=f"{source}:make", metric=f"{source}:sure"))
    assert (tmp_path / "seen").read_text() == "1"
    write_code(tmp_path, f"{code}\nCHANGED = True\n")
    list(evaluate(tmp_path / "a.pt", rows, model=f"{source}:make"))
    assert (tmp_path / "seen").read_text() == "11"


def test_the_format_of_a_checkpoint_is_detected_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it is scored; a file that was scored may be another one the next time."""
    torch.save(make_net().state_dict(), tmp_path / "a.pt")
    seen: list[Path] = []
    recognise = frameworks.recognise

    def look(path: Path) -> Any:
        seen.append(path)
        return recognise(path)

    monkeypatch.setattr(frameworks, "recognise", look)
    evaluator = Evaluator([ROWS], model=f"{write_code(tmp_path)}:make")
    evaluator.inspect_files([tmp_path / "a.pt"])
    evaluator.score(tmp_path / "a.pt")
    assert len(seen) == 1
    evaluator.score_rows(tmp_path / "a.pt")
    assert len(seen) == 2
    with pytest.raises(TypeError, match="unknown option modle"):
        Evaluator([ROWS], modle="net.py:make")  # type: ignore[call-arg]


def save_with_ema(state: Mapping[str, Any], path: Path) -> None:
    """Save a model of DDP beside its EMA."""
    means = {f"module.{name}": tensor * 2 for name, tensor in state.items()}
    torch.save({"model": {f"module.{k}": v for k, v in state.items()}, "ema": means}, path)


def save_in_folder(state: Mapping[str, Any], path: Path) -> None:
    """Save a folder as Transformers does."""
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "bert"}')
    save_file(dict(state), path / "model.safetensors")


def save_for_swa(state: Mapping[str, Any], path: Path) -> None:
    """Save PyTorch's own average of weights, which counts its models beside their tensors."""
    net = make_net()
    net.load_state_dict(state)
    torch.save(torch.optim.swa_utils.AveragedModel(net).state_dict(), path)


SAVED: Mapping[str, Callable[[Mapping[str, Any], Path], None]] = {
    "a.pt": save_state,
    "a.ckpt": save_for_lightning,
    "a.pth": save_with_ema,
    "swa.pt": save_for_swa,
    "a.safetensors": lambda state, path: save_file(dict(state), path),
    "checkpoint-40": save_in_folder,
}


@pytest.mark.parametrize("name", SAVED)
def test_a_checkpoint_of_any_form_is_scored_as_pytorch_scores_it(tmp_path: Path, name: str) -> None:
    """Loss, accuracy and the loss of every row are PyTorch's, whatever stands before the names."""
    torch.manual_seed(1)
    net = make_net()
    SAVED[name](net.state_dict(), tmp_path / name)
    outputs = run_plainly(net)
    each = functional.cross_entropy(outputs, torch.tensor(CLASSES), reduction="none")
    source = f"{write_code(tmp_path)}:make"
    (score,) = evaluate(tmp_path / name, ROWS, model=source, batch_size=50)
    assert score.loss == pytest.approx(float(each.mean()), rel=1e-6)
    right = outputs.argmax(1).numpy() == CLASSES
    assert score.metrics == {"accuracy": right.mean()}
    assert score.notes == ()
    assert score.loss_words == "cross-entropy of logits (chosen, as the labels are classes)"
    (rows,) = Evaluator([ROWS], model=source).score_rows(tmp_path / name)
    assert rows.losses == pytest.approx(each.numpy(), rel=1e-5)
    assert rows.correct is not None
    assert (rows.correct == right).all()
    assert rows.predictions == pytest.approx(outputs.softmax(1).numpy(), rel=1e-5)


def test_an_average_and_its_run_have_the_models_that_pytorch_loads(tmp_path: Path) -> None:
    """A folder is scored in the order of its epochs, and the average by its own tensors."""
    (tmp_path / "run").mkdir()
    nets = [make_net() for _ in range(3)]
    for k, net in enumerate(nets):
        torch.save({"model": net.state_dict(), "epoch": k}, tmp_path / f"run/e_{k}.pt")
    average(tmp_path / "run", tmp_path / "mean.pt")
    mean = make_net()
    mean.load_state_dict(torch.load(tmp_path / "mean.pt")["model"])
    write_code(tmp_path)
    np.savez(tmp_path / "rows.npz", x=X, y=CLASSES)
    done = polyak(
        *("evaluate", "run", "mean.pt", "--model", "net:make", "--data", "rows.npz"), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    found = [line.split() for line in done.stdout.splitlines() if ".pt" in line]
    assert [line[0] for line in found] == ["run/e_0.pt", "run/e_1.pt", "run/e_2.pt", "mean.pt"]
    for line, net in zip(found, [*nets, mean], strict=True):
        loss = functional.cross_entropy(run_plainly(net), torch.tensor(CLASSES))
        assert float(line[1]) == pytest.approx(float(loss), abs=1e-6)
    gate = ("--baseline", "run/e_0.pt", "--fail-under", "accuracy=1")
    done = polyak(
        *("evaluate", "mean.pt", "--model", "net.py:make", "--data", "rows.npz", *gate),
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert "minus run/e_0.pt, with 95 % intervals over 203 paired rows" in done.stdout


def test_tied_transposed_and_half_tensors_are_those_that_were_saved(tmp_path: Path) -> None:
    """Tied weights are stored once or twice, a transposed one lies otherwise, and bfloat16 too."""
    code = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight
            self.c = nn.Linear(4, 3)

        def forward(self, x):
            return {"logits": self.c(self.b(self.a(x)))}

    def make():
        return Net()
    """
    source = f"{write_code(tmp_path, code)}:make"
    one, last = torch.randn(4, 4), torch.randn(4, 3).T
    bias = torch.randn(3).bfloat16()
    whole = {"a.weight": one, "b.weight": one, "c.weight": last, "c.bias": bias}
    torch.save(whole, tmp_path / "tied.pt")
    once = {name: t.contiguous() for name, t in whole.items() if name != "b.weight"}
    save_file(once, tmp_path / "tied.safetensors")
    outputs = torch.tensor(X).float() @ one.T @ one.T @ last.T + bias.float()
    expected = functional.cross_entropy(outputs, torch.tensor(CLASSES))
    for name in ("tied.pt", "tied.safetensors"):
        (score,) = evaluate(tmp_path / name, ROWS, model=source)
        assert score.loss == pytest.approx(float(expected), rel=1e-5)


LOSSES = {
    "nn.CrossEntropyLoss()": lambda o, y: functional.cross_entropy(o, y),
    "nn.CrossEntropyLoss(label_smoothing=0.1)": lambda o, y: functional.cross_entropy(
        o, y, label_smoothing=0.1
    ),
    "nn.functional.cross_entropy": lambda o, y: functional.cross_entropy(o, y),
    "nn.MultiMarginLoss()": lambda o, y: functional.multi_margin_loss(o, y),
    "lambda o, y: (o.logsumexp(1) - o[range(len(y)), y]).mean()": functional.cross_entropy,
    "lambda o, y: o.logsumexp(1) - o[range(len(y)), y]": functional.cross_entropy,
}


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_of_the_function_is_used_for_every_row(tmp_path: Path, loss: str) -> None:
    """One of PyTorch's or one's own, a mean or a number a row: rows are compared by it."""
    net = make_net()
    torch.save(net.state_dict(), tmp_path / "a.pt")
    source = write_code(tmp_path, f"{NET}\ndef both():\n    return make(), {loss}\n")
    (rows,) = Evaluator([ROWS], model=f"{source}:both", batch_size=64).score_rows(tmp_path / "a.pt")
    outputs, labels = run_plainly(net), torch.tensor(CLASSES)
    assert rows.loss == pytest.approx(float(LOSSES[loss](outputs, labels)), rel=1e-5)
    assert rows.losses is not None
    single = [float(LOSSES[loss](outputs[k : k + 1], labels[k : k + 1])) for k in range(5)]
    assert rows.losses[:5] == pytest.approx(single, rel=1e-4)
    assert ("your own" in rows.loss_words) == loss.startswith("lambda")


def test_a_loss_that_is_no_mean_over_rows_is_not_compared_by_row(tmp_path: Path) -> None:
    """With weights for classes the mean over batches is shown, and a note says so."""
    net = make_net()
    torch.save(net.state_dict(), tmp_path / "a.pt")
    text = "import torch\n" + NET + "\nloss = nn.CrossEntropyLoss(torch.tensor([1.0, 5.0, 9.0]))\n"
    source = write_code(tmp_path, f"{text}\ndef both():\n    return make(), loss\n")
    found = compare(tmp_path / "a.pt", tmp_path / "a.pt", ROWS, model=f"{source}:both")
    weight = torch.tensor([1.0, 5.0, 9.0])
    expected = functional.cross_entropy(run_plainly(net), torch.tensor(CLASSES), weight)
    assert found.baseline.loss == pytest.approx(float(expected), rel=1e-5)
    assert [gain.metric for gain in found.models[0].gains] == ["accuracy"]
    assert "not the mean of the losses of single rows" in found.baseline.notes[0]


def test_numbers_to_predict_have_a_mean_squared_error(tmp_path: Path) -> None:
    """Labels without a column fit outputs of one column, row by row and not each with each."""
    layer = nn.Linear(4, 1)
    torch.save(layer.state_dict(), tmp_path / "a.pt")
    code = "from torch import nn\n\ndef make():\n    return nn.Linear(4, 1)\n"
    rows = data.Split("rows", X, NUMBERS)
    (score,) = evaluate(tmp_path / "a.pt", rows, model=f"{write_code(tmp_path, code)}:make")
    outputs = run_plainly(layer)[:, 0].numpy()
    assert score.loss == pytest.approx(((outputs - NUMBERS) ** 2).mean(), rel=1e-6)
    assert (score.metrics, score.loss_words) == ({}, "mse (chosen, as the labels are numbers)")


def test_yes_and_no_of_one_column_are_right_from_the_threshold_of_their_loss(
    tmp_path: Path,
) -> None:
    """BCEWithLogitsLoss takes the labels in the shape of the outputs, and 0 parts them."""
    layer = nn.Linear(4, 1)
    torch.save(layer.state_dict(), tmp_path / "a.pt")
    code = (
        "from torch import nn\n\ndef make():\n    return nn.Linear(4, 1), nn.BCEWithLogitsLoss()\n"
    )
    labels = (NUMBERS > 0).astype(int)
    rows = data.Split("rows", X, labels)
    (score,) = evaluate(tmp_path / "a.pt", rows, model=f"{write_code(tmp_path, code)}:make")
    outputs = run_plainly(layer)[:, 0]
    expected = functional.binary_cross_entropy_with_logits(outputs, torch.tensor(labels).float())
    assert score.loss == pytest.approx(float(expected), rel=1e-5)
    assert score.metrics["accuracy"] == ((outputs.numpy() > 0) == labels).mean()


def test_a_function_of_the_tensors_needs_no_framework(tmp_path: Path) -> None:
    """It gets numpy arrays by the names in the file, bfloat16 as float32, and predicts."""
    layer = nn.Linear(4, 3).bfloat16()
    torch.save({"model": layer.state_dict()}, tmp_path / "a.pt")
    code = """
    def load(tensors):
        assert {str(array.dtype) for array in tensors.values()} == {"float32"}
        return lambda x: x @ tensors["model/weight"].T + tensors["model/bias"]
    """
    (score,) = evaluate(tmp_path / "a.pt", ROWS, model=f"{write_code(tmp_path, code)}:load")
    outputs = run_plainly(layer.float()).double()
    expected = functional.cross_entropy(outputs, torch.tensor(CLASSES))
    assert score.loss == pytest.approx(float(expected), rel=1e-6)


SEQUENCES = """
import torch
from torch import nn
from types import SimpleNamespace

class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.words.weight

    def forward(self, input_ids, unused=None):
        mask = nn.Transformer.generate_square_subsequent_mask(input_ids.shape[1])
        hidden = self.block(self.words(input_ids), src_mask=mask, is_causal=True)
        return SimpleNamespace(logits=self.head(hidden))

def make():
    return Language()
"""


def test_the_loss_of_a_sequence_is_the_logarithm_of_its_perplexity(tmp_path: Path) -> None:
    """Of a causal transformer with tied weights in a folder; padding does not count."""
    names: dict[str, Any] = {}
    exec(compile(SEQUENCES, "net", "exec"), names)  # the test's own text
    net = names["make"]()
    state = {name: t.clone() for name, t in net.state_dict().items() if name != "head.weight"}
    save_in_folder(state, tmp_path / "checkpoint-7")
    ids = RANDOM.integers(0, 11, (20, 9))
    labels = ids[:, 1:].copy()
    labels[::3, 5:] = -100
    source = f"{write_code(tmp_path, SEQUENCES)}:make"
    rows = data.Split("texts", {"input_ids": ids[:, :-1]}, labels)
    (found,) = Evaluator([rows], model=source, batch_size=6).score_rows(tmp_path / "checkpoint-7")
    with torch.no_grad():
        logits = net.eval()(torch.tensor(ids[:, :-1])).logits
    expected = [
        float(functional.cross_entropy(one, torch.tensor(label)))
        for one, label in zip(logits, labels, strict=True)
    ]
    assert found.losses == pytest.approx(expected, rel=1e-5)
    counted = labels != -100
    right = (logits.argmax(2).numpy() == labels)[counted].mean()
    assert found.metrics["accuracy"] == pytest.approx(right)
    assert found.correct is None
    every = functional.cross_entropy(logits.flatten(0, 1), torch.tensor(labels).flatten())
    assert found.metrics["perplexity"] == pytest.approx(float(every.exp()), rel=1e-5)
    # As Transformers' collators give them; what is not to count is -100, here as above.
    same = ids.copy()
    same[:, 1:][labels == -100] = -100
    whole = data.Split("texts", {"input_ids": ids, "unused": np.ones_like(ids)}, same)
    again = Evaluator([whole], model=source)
    (shifted,) = again.score_rows(tmp_path / "checkpoint-7")
    assert shifted.losses == pytest.approx(found.losses, rel=1e-6)
    assert shifted.metrics == pytest.approx(found.metrics)
    assert "with the next label (chosen, as the labels are the inputs)" in shifted.loss_words
    assert shifted.predictions is not None
    (ensemble,) = again.score_predictions([shifted.predictions])
    assert ensemble.metrics == pytest.approx(found.metrics, rel=1e-5)


def test_sequences_as_long_as_there_are_classes_are_not_transposed(tmp_path: Path) -> None:
    """Labels that are the inputs tell the axis of the classes, or a loss of PyTorch; else none."""
    code = "\n\nclass Turned(Language):\n    def forward(self, input_ids):\n"
    code += "        return super().forward(input_ids).logits.transpose(1, 2)\n\n"
    code += "def turned():\n    return Turned(), nn.CrossEntropyLoss()\n"
    path = write_code(tmp_path, SEQUENCES + code)
    names: dict[str, Any] = {}
    exec(compile(SEQUENCES, "net", "exec"), names)  # the test's own text
    net = names["make"]()
    torch.save(net.state_dict(), tmp_path / "a.pt")
    ids = RANDOM.integers(0, 11, (6, 11))
    rows = data.Split("texts", {"input_ids": ids}, ids)
    (found,) = Evaluator([rows], model=f"{path}:make").score_rows(tmp_path / "a.pt")
    with torch.no_grad():
        logits = net.eval()(torch.tensor(ids)).logits[:, :-1]
    expected = [
        float(functional.cross_entropy(one, torch.tensor(label)))
        for one, label in zip(logits, ids[:, 1:], strict=True)
    ]
    assert found.losses == pytest.approx(expected, rel=1e-5)
    tags = data.Split("tags", {"input_ids": ids}, (ids + 1) % 11)
    with pytest.raises(MismatchError, match=r"\(11, 11\), and for the labels of tags either axis"):
        Evaluator([tags], model=f"{path}:make").score_rows(tmp_path / "a.pt")
    (turned,) = Evaluator([tags], model=f"{path}:turned").score_rows(tmp_path / "a.pt")
    with torch.no_grad():
        right = net(torch.tensor(ids)).logits.argmax(2).numpy() == (ids + 1) % 11
    assert turned.metrics["accuracy"] == pytest.approx(right.mean())


def test_sequences_without_a_label_that_counts_are_refused(tmp_path: Path) -> None:
    """They have no loss, so that no mean over all rows has one; a single token is such a row."""
    source = f"{write_code(tmp_path, SEQUENCES)}:make"
    names: dict[str, Any] = {}
    exec(compile(SEQUENCES, "net", "exec"), names)  # the test's own text
    torch.save(names["make"]().state_dict(), tmp_path / "a.pt")
    labels = RANDOM.integers(0, 11, (20, 9))
    labels[[3, 7]] = -100
    rows = data.Split("texts", labels * 0 + 1, labels)
    expected = "texts: found 2 rows without a label to compare with, such as row 3, counted from 0"
    with pytest.raises(PolyakError, match=expected):
        list(evaluate(tmp_path / "a.pt", rows, model=source))


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.path, "ran"))


def test_nothing_of_a_checkpoint_is_run(tmp_path: Path) -> None:
    """An object whose unpickling runs code is passed by; the tensors beside it are scored."""
    net = make_net()
    held = {"state_dict": net.state_dict(), "hyper_parameters": {"loss": Bomb(tmp_path / "ran")}}
    torch.save(held, tmp_path / "a.pt")
    (score,) = evaluate(tmp_path / "a.pt", ROWS, model=f"{write_code(tmp_path)}:make")
    assert score.loss is not None
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Bomb(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()  # it would have been seen


def refuse(tmp_path: Path, code: str, state: Mapping[str, Any] | None = None) -> str:
    """Return the error of scoring a checkpoint with a function, one line."""
    torch.save(dict(state if state is not None else make_net().state_dict()), tmp_path / "a.pt")
    source = write_code(tmp_path, NET + textwrap.dedent(code))
    with pytest.raises(PolyakError) as caught:
        list(evaluate(tmp_path / "a.pt", ROWS, model=f"{source}:it"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    """Names, shapes, outputs, labels, and what the function returns or raises."""
    state = make_net().state_dict()
    it = "def it():\n    return make()\n"
    more = {**state, "head.weight": torch.ones(2)}
    assert "and has besides head.weight" in refuse(tmp_path, it, more)
    less = {name: tensor for name, tensor in state.items() if name != "4.bias"}
    assert "it lacks 4.bias" in refuse(tmp_path, it, less)
    wrapped = {f"module.{name}": tensor for name, tensor in less.items()}
    assert refuse(tmp_path, it, wrapped).endswith("it lacks 4.bias")
    on_meta = "def it():\n    return make().to('meta')\n"
    assert "the model cannot take" in refuse(tmp_path, on_meta)
    assert "the module is lazy: 'weight'" in refuse(
        tmp_path, "def it():\n    return nn.LazyLinear(3)\n"
    )
    other = {**state, "4.bias": torch.ones(2)}
    assert "has shape (2,), but the module of" in refuse(tmp_path, it, other)
    assert "line 9: ZeroDivisionError" in refuse(tmp_path, "def it():\n    return 1 / 0\n")
    assert "a dict of arrays by name" in refuse(tmp_path, "def it():\n    return len\n")
    assert "returned int" in refuse(tmp_path, "def it():\n    return 3\n")
    named = refuse(
        tmp_path, "def it():\n    import torch\n    return torch.nn.Linear(4, 3), 'mse'\n"
    )
    assert "the loss beside the model is mse; expected a function" in named
    assert "failed on rows" in refuse(tmp_path, "def it():\n    return make(), min\n")
    wide = "def it():\n    m = make()\n    m[4] = nn.Linear(8, 2)\n    return m\n"
    narrow = {**state, "4.weight": torch.ones(2, 8), "4.bias": torch.ones(2)}
    assert "2 classes, 0 to 1, but the labels of rows go from 0 to 2" in refuse(
        tmp_path, wide, narrow
    )


def test_a_module_may_come_from_a_neighbour_and_keep_state_of_its_own(tmp_path: Path) -> None:
    """It is imported when the function runs; what is no tensor in a file is not unpickled."""
    own = """
    class Own(nn.Sequential):
        def get_extra_state(self): return {"mode": "fast"}
        def set_extra_state(self, state): assert state == {"mode": "fast"}
    """
    write_code(tmp_path, NET + textwrap.dedent(own), "beside_evaluate.py")
    code = write_code(
        tmp_path, "def make():\n    import beside_evaluate as b\n    return b.Own(*b.make())\n"
    )
    net = make_net()
    torch.save({**net.state_dict(), "_extra_state": {"mode": "slow"}}, tmp_path / "a.pt")
    (score,) = evaluate(tmp_path / "a.pt", ROWS, model=f"{code}:make")
    expected = torch.nn.functional.cross_entropy(run_plainly(net), torch.tensor(CLASSES))
    assert score.loss == pytest.approx(float(expected), abs=1e-6)
    assert score.notes == ("extra state stays as the function made it (_extra_state)",)


def test_a_wrong_name_of_the_model_is_refused(tmp_path: Path) -> None:
    """None, a function or a module that is not there, a file, and a device that is not there."""
    torch.save(make_net().state_dict(), tmp_path / "a.pt")
    net = write_code(tmp_path)
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "name a function that returns it, such as a torch.nn.Module: --model MODULE.py:FUN"),
        ({"model": f"{net}:nothing"}, "has no function 'nothing'"),
        ({"model": "nowhere:make"}, "nowhere:make: there is no such module; expected MODULE.py"),
        ({"model": "a.pt"}, "--model a.pt: expected MODULE.py:FUNCTION"),
        ({"model": f"{net}:make", "device": "tpu9"}, "--device tpu9: cannot be used: "),
    ]
    for options, text in cases:
        with pytest.raises(PolyakError, match=re.escape(text)):
            list(evaluate(tmp_path / "a.pt", ROWS, **options))


def test_the_examples_of_the_page_run(tmp_path: Path) -> None:
    """Block by block, as someone who reads it does."""
    for block in find_blocks((GUIDE / "pytorch.md").read_text()):
        done = run(block, tmp_path)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr


def make_three() -> Any:
    """Return a linear module, as a notebook's function does."""
    return nn.Linear(4, 3)


def test_python_takes_the_function_itself(tmp_path: Path) -> None:
    """As `evaluate`, `sweep` and `recalibrate` do its name; one that has none is refused."""
    for k in range(2):
        torch.save(make_three().state_dict(), tmp_path / f"e_{k}.pt")
    named = evaluate(tmp_path / "e_1.pt", ROWS, model=f"{__name__}:make_three")
    assert list(evaluate(tmp_path / "e_1.pt", ROWS, model=make_three)) == list(named)
    rows = data.Dataset("rows", {"": ROWS})
    found = sweep(tmp_path, rows, model=make_three, chosen="equal", scratch=tmp_path)
    assert len(found.rows) == 6
    with pytest.raises(PolyakError, match="has no BatchNorm layer"):
        recalibrate(tmp_path / "e_1.pt", tmp_path / "o.pt", ROWS, architecture=make_three)
    with pytest.raises(UsageError, match="define it at the top of a module or notebook"):
        evaluate(tmp_path / "e_1.pt", ROWS, model=lambda: nn.Linear(4, 3))


def test_a_model_that_writes_into_its_rows_scores_the_next_one_on_the_same(tmp_path: Path) -> None:
    """As one does that scales pictures in place; a module, and a function of the tensors."""
    code = """
    from torch import nn

    class Net(nn.Linear):
        def forward(self, x):
            return super().forward(x.sub_(1).div_(2))

    def make():
        return Net(4, 3)

    def load(tensors):
        def predict(x):
            x -= 1
            x /= 2
            return x @ tensors["weight"].T + tensors["bias"]
        return predict
    """
    source, x = write_code(tmp_path, code), X.astype(np.float32)
    expected = []
    for name in "ab":
        layer = nn.Linear(4, 3)
        torch.save(layer.state_dict(), tmp_path / f"{name}.pt")
        outputs = run_plainly(layer, (x - 1) / 2)
        expected.append(float(functional.cross_entropy(outputs, torch.tensor(CLASSES))))
    for function in ("make", "load"):
        rows = data.Split("rows", x.copy(), CLASSES)
        scores = evaluate(
            [tmp_path / "a.pt", tmp_path / "b.pt"], rows, model=f"{source}:{function}"
        )
        assert [score.loss for score in scores] == pytest.approx(expected, rel=1e-5)


def test_a_function_that_takes_its_argument_for_something_else_is_refused(tmp_path: Path) -> None:
    """As a Lightning module of a rate: random tensors are not scored; what was changed is named."""
    code = """
    import torch
    from torch import nn

    class Net(nn.Sequential):
        def __init__(self, rate):
            super().__init__(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3))
            self.rate = rate

    def load(tensors, dtype=torch.bfloat16):
        net = Net(0.1)
        net.load_state_dict({name: torch.tensor(array) for name, array in tensors.items()})
        return net.to(dtype)

    def prune(tensors):
        net = load(tensors, torch.float32)
        net[2].weight.data[0] = 0
        return net
    """
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    torch.save(net.state_dict(), tmp_path / "a.pt")
    source = write_code(tmp_path, code)
    with pytest.raises(UsageError, match="but the module that it returned has other values than"):
        list(evaluate(tmp_path / "a.pt", ROWS, model=f"{source}:Net"))
    (score,) = evaluate(tmp_path / "a.pt", ROWS, model=f"{source}:load")
    expected = functional.cross_entropy(run_plainly(net), torch.tensor(CLASSES))
    assert score.loss == pytest.approx(float(expected), abs=0.02)
    assert score.notes == ()
    (score,) = evaluate(tmp_path / "a.pt", ROWS, model=f"{source}:prune")
    assert "2.weight" in score.notes[0]

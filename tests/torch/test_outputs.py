"""Outputs and labels of every shape that people train: the figures are those of plain PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from polyak_cli.errors import PolyakError
from polyak_cli.evaluation import data
from polyak_cli.evaluation.evaluator import Evaluator, RowScores
from polyak_cli.pipeline import sweeping
from tests.torch.test_evaluate import CLASSES, NUMBERS, X, run_plainly, write_code

TWO_HEADS = """
import collections
from types import SimpleNamespace
import torch
from torch import nn

Named = collections.namedtuple("Named", "kind size")

class Net(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form, self.body = form, nn.Linear(4, 8)
        self.kind, self.size = nn.Linear(8, 3), nn.Linear(8, 1)

    def forward(self, x):
        hidden = self.body(x).tanh()
        found = {"kind": self.kind(hidden), "size": self.size(hidden)}
        if self.form == "dict":
            return {**found, "hidden": hidden}
        if self.form == "namedtuple":
            return Named(**found)
        return SimpleNamespace(**found) if self.form == "object" else tuple(found.values())

def make():
    return Net("FORM"), LOSSES
"""
NAMED = {"kind": CLASSES, "size": NUMBERS}


def score(tmp_path: Path, code: str, state: Mapping[str, Any], rows: data.Split) -> RowScores:
    """Return the scores of a state, saved as a file, with the model of some code."""
    torch.save(dict(state), tmp_path / "a.pt")
    source = f"{write_code(tmp_path, code, 'own.py')}:make"
    (found,) = Evaluator([rows], model=source, batch_size=60).score_rows(tmp_path / "a.pt")
    return found


def refuse(tmp_path: Path, code: str, state: Mapping[str, Any], rows: data.Split) -> str:
    """Return the error of scoring a state, one line."""
    with pytest.raises(PolyakError) as caught:
        score(tmp_path, code, state, rows)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def make_two_heads() -> Any:
    """Return the network of TWO_HEADS, with a tuple of outputs."""
    names: dict[str, Any] = {}
    exec(compile(TWO_HEADS.replace("LOSSES", "None"), "net", "exec"), names)  # the test's own text
    torch.manual_seed(7)
    return names["Net"]("tuple")


@pytest.mark.parametrize("form", ["dict", "namedtuple", "object", "tuple"])
@pytest.mark.parametrize("losses", ["None", "chosen"])
def test_each_output_has_a_loss_and_the_model_their_sum(
    tmp_path: Path, form: str, losses: str
) -> None:
    """By name or by position, of the user's losses or of those that the labels choose."""
    net = make_two_heads()
    kind, size = run_plainly(net)
    each = functional.cross_entropy(kind, torch.tensor(CLASSES), reduction="none").numpy()
    far = size[:, 0].numpy() - NUMBERS
    if losses == "None":
        others, own = far**2, "None"
    else:
        others, own = np.abs(far), '{"kind": nn.CrossEntropyLoss(), "size": nn.L1Loss()}'
    names = ("kind", "size")
    labels: Any = NAMED
    if form == "tuple":
        names, labels = ("output_1", "output_2"), (CLASSES, NUMBERS)
        own = own.replace('{"kind": ', "(").replace('"size": ', "").replace("}", ")")
    code = TWO_HEADS.replace("FORM", form).replace("LOSSES", own)
    found = score(tmp_path, code, net.state_dict(), data.Split("rows", X, labels))
    assert found.loss == pytest.approx(float((each + others).mean()), rel=1e-5)
    assert found.losses == pytest.approx(each + others, rel=1e-4)
    assert found.metrics == pytest.approx(
        {
            f"{names[0]}_loss": each.mean(),
            f"{names[0]}_accuracy": (kind.argmax(1).numpy() == CLASSES).mean(),
            f"{names[1]}_loss": others.mean(),
        },
        rel=1e-5,
    )
    assert found.loss_words.startswith(f"{names[0]}: ")
    assert (found.correct, found.predictions) == (None, None)


def test_a_run_of_models_with_two_outputs_is_swept_by_the_sum(tmp_path: Path) -> None:
    """There are no ensembles, and the winner is that of the least loss."""
    (tmp_path / "run").mkdir()
    code = TWO_HEADS.replace("FORM", "dict").replace("LOSSES", "None")
    net = make_two_heads()
    for k in range(2):
        net.size.bias.data += k
        torch.save(net.state_dict(), tmp_path / f"run/e_{k}.pt")
    rows = data.Dataset("rows", {"": data.Split("rows", X, NAMED)})
    source = f"{write_code(tmp_path, code)}:make"
    found = sweeping.sweep(tmp_path / "run", rows, chosen="equal", model=source, scratch=tmp_path)
    assert found.metric == "loss"
    assert {row.candidate.kind for row in found.rows} == {"single", "average"}
    losses = [row.value("loss", "selection") for row in found.rows]
    assert found.winner.value("loss", "selection") == min(losses)


def test_outputs_without_labels_of_their_own_are_refused(tmp_path: Path) -> None:
    """Each in one line that says what the model gives, and how to give labels or losses."""
    state = make_two_heads().state_dict()
    code = TWO_HEADS.replace("FORM", "dict").replace("LOSSES", "None")
    pair = TWO_HEADS.replace("FORM", "tuple").replace("LOSSES", "None")
    one_loss = TWO_HEADS.replace("FORM", "dict").replace("LOSSES", "nn.MSELoss()")
    other_loss = TWO_HEADS.replace("FORM", "dict").replace("LOSSES", '{"kind": nn.MSELoss()}')
    three = (CLASSES, NUMBERS, NUMBERS)
    cases: list[tuple[str, Any, str]] = [
        (code, CLASSES, "gives dict with kind, size, hidden; expected one tensor"),
        (pair, CLASSES, "gives tuple of 2; expected one tensor"),
        (code, {"kind": CLASSES, "age": NUMBERS}, "gives kind, size, hidden, but rows has labels"),
        (pair, NAMED, "gives output_1, output_2, but rows has labels for kind, size"),
        (pair, three, "gives 2 outputs, but rows has labels for 3"),
        (one_loss, NAMED, 'return (model, {"NAME": loss, ...}) from the function'),
        (other_loss, NAMED, "returned losses for kind, but rows has labels for kind, size"),
        (other_loss, CLASSES, "returned losses for kind, but rows has labels for one output"),
    ]
    for text, labels, error in cases:
        assert error in refuse(tmp_path, text, state, data.Split("rows", X, labels))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_several_labels_a_row_have_a_yes_or_no_each(tmp_path: Path, reduction: str) -> None:
    """Multi-label: the loss of a row is the mean over its labels, and so is its accuracy."""
    labels = np.random.default_rng(3).integers(0, 2, (len(X), 5))
    layer = nn.Linear(4, 5)
    code = (
        "from torch import nn\n\ndef make():\n"
        f"    return nn.Linear(4, 5), nn.BCEWithLogitsLoss(reduction={reduction!r})\n"
    )
    for given in (labels, labels.astype(np.float32), labels.astype(bool)):
        found = score(tmp_path, code, layer.state_dict(), data.Split("rows", X, given))
        outputs, wanted = run_plainly(layer), torch.tensor(labels).float()
        each = functional.binary_cross_entropy_with_logits(outputs, wanted, reduction="none")
        assert found.losses == pytest.approx(each.mean(1).numpy(), rel=1e-5)
        assert found.metrics["accuracy"] == ((outputs > 0).numpy() == labels).mean()
        assert found.correct is None
    bare = "from torch import nn\n\ndef make():\n    return nn.Linear(4, 5)\n"
    said = refuse(tmp_path, bare, layer.state_dict(), data.Split("rows", X, labels))
    assert "the labels are 0 and 1" in said
    assert "(model, torch.nn.BCEWithLogitsLoss())" in said


@pytest.mark.parametrize("squeezed", [False, True])
@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("loss", ["", ", nn.MSELoss()", ", nn.L1Loss(reduction='none')"])
def test_a_column_is_never_compared_with_every_row(
    tmp_path: Path, squeezed: bool, column: bool, loss: str
) -> None:
    """Outputs (n, 1) or (n,) and labels (n,) or (n, 1): never an n by n broadcast."""
    layer = nn.Linear(4, 1)
    module = "nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))" if squeezed else "nn.Linear(4, 1)"
    names = {f"0.{k}" if squeezed else k: t for k, t in layer.state_dict().items()}
    code = f"from torch import nn\n\ndef make():\n    return {module}{loss}\n"
    labels = NUMBERS[:, None] if column else NUMBERS
    found = score(tmp_path, code, names, data.Split("rows", X, labels))
    far = run_plainly(layer)[:, 0].numpy() - NUMBERS
    expected = np.abs(far) if "L1" in loss else far**2
    assert found.losses == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("loss", ["", ", nn.CrossEntropyLoss()"])
def test_the_loss_of_a_picture_is_the_mean_over_its_pixels(tmp_path: Path, loss: str) -> None:
    """Segmentation: classes on axis 1, a label for each pixel, of which -100 does not count."""
    random = np.random.default_rng(4)
    pictures = random.normal(size=(30, 2, 5, 6)).astype(np.float32)
    labels = random.integers(0, 3, (30, 5, 6))
    labels[:10, 0] = -100
    layer = nn.Conv2d(2, 3, 3, padding=1)
    code = f"from torch import nn\n\ndef make():\n    return nn.Conv2d(2, 3, 3, padding=1){loss}\n"
    outputs, wanted = run_plainly(layer, pictures), torch.tensor(labels)
    if loss:  # PyTorch's mean is over the pixels of the batch, so rows of others count unlike
        labels = np.where(labels == -100, 0, labels)
        wanted = torch.tensor(labels)
    found = score(tmp_path, code, layer.state_dict(), data.Split("pictures", pictures, labels))
    each = [
        float(functional.cross_entropy(one[None], label[None]))
        for one, label in zip(outputs, wanted, strict=True)
    ]
    assert found.losses == pytest.approx(each, rel=1e-5)
    counted = labels != -100
    right = (outputs.argmax(1).numpy() == labels)[counted].mean()
    assert found.metrics["accuracy"] == pytest.approx(right)
    assert found.correct is None


@pytest.mark.parametrize("dtype", ["uint8", "int64"])
def test_pixels_of_the_class_that_the_loss_ignores_do_not_count(tmp_path: Path, dtype: str) -> None:
    """As 255 of Cityscapes and VOC, also in bytes, which have no room for -100."""
    random = np.random.default_rng(5)
    pictures = random.normal(size=(20, 2, 5, 6)).astype(np.float32)
    labels = random.integers(0, 3, (20, 5, 6)).astype(dtype)
    labels[:, 0] = 255
    layer = nn.Conv2d(2, 3, 1)
    code = (
        "from torch import nn\n\ndef make():\n"
        "    return nn.Conv2d(2, 3, 1), nn.CrossEntropyLoss(ignore_index=255)\n"
    )
    found = score(tmp_path, code, layer.state_dict(), data.Split("pictures", pictures, labels))
    outputs, wanted = run_plainly(layer, pictures), torch.tensor(labels).long()
    loss = functional.cross_entropy(outputs, wanted, ignore_index=255)
    assert found.loss == pytest.approx(float(loss), rel=1e-5)
    right = (outputs.argmax(1) == wanted)[wanted != 255].double().mean()
    assert found.metrics == {"accuracy": pytest.approx(float(right))}


def test_a_loss_of_your_own_takes_labels_that_are_not_like_the_outputs(tmp_path: Path) -> None:
    """As CTC's are shorter than the outputs; whole numbers stay whole.  PyTorch's are refused."""
    layer = nn.Linear(4, 6)
    labels = np.random.default_rng(6).integers(1, 3, (len(X), 1, 1))
    code = """
    import torch
    from torch import nn

    def spell(outputs, labels):
        frames = outputs.reshape(-1, 2, 3).log_softmax(2).transpose(0, 1)
        lengths = [torch.full((len(labels),), size) for size in (2, 1)]
        return nn.functional.ctc_loss(frames, labels.flatten(1), *lengths)

    def make():
        return nn.Linear(4, 6), LOSS
    """
    rows = data.Split("rows", X, labels)
    found = score(tmp_path, code.replace("LOSS", "spell"), layer.state_dict(), rows)
    frames = run_plainly(layer).reshape(-1, 2, 3).log_softmax(2)
    # By hand: a word of one letter in two frames is (letter, blank), (blank, letter) or both.
    letter = frames[torch.arange(len(X)), :, torch.tensor(labels[:, 0, 0])]
    ways = torch.stack([letter[:, 0] + frames[:, 1, 0], frames[:, 0, 0] + letter[:, 1]])
    ways = torch.cat([ways, letter.sum(1)[None]])
    assert found.losses == pytest.approx(-ways.logsumexp(0).numpy(), rel=1e-4)
    assert found.metrics == {}
    said = refuse(tmp_path, code.replace("LOSS", "nn.MSELoss()"), layer.state_dict(), rows)
    assert said.endswith("return (model, loss) with a loss function of your own that takes both")


def test_divergences_are_compared_by_row_and_what_is_not_finite_is_no_warning(
    tmp_path: Path,
) -> None:
    """KLDivLoss as PyTorch advises to set it: a row has the sum over its classes."""
    layer, soft = nn.Linear(4, 3), np.random.default_rng(7).dirichlet(np.ones(3), len(X))
    code = (
        "from torch import nn\n\ndef make():\n    net = nn.Sequential(nn.Linear(4, 3))\n"
        "    net.append(nn.LogSoftmax(1))\n    return net, nn.KLDivLoss(reduction='batchmean')\n"
    )
    state = {f"0.{name}": tensor for name, tensor in layer.state_dict().items()}
    found = score(tmp_path, code, state, data.Split("rows", X, soft))
    outputs = run_plainly(layer).log_softmax(1).numpy()
    each = (soft * (np.log(soft) - outputs)).sum(1)
    assert found.losses == pytest.approx(each, rel=1e-3, abs=1e-5)
    layer.bias.data[:] = float("inf")
    bare = "from torch import nn\n\ndef make():\n    return nn.Linear(4, 3)\n"
    found = score(tmp_path, bare, layer.state_dict(), data.Split("rows", X, CLASSES))
    assert (str(found.loss), found.notes) == ("nan", ())


def test_outputs_of_another_length_each_time_are_refused(tmp_path: Path) -> None:
    """As of detectors: lists of dicts, rows of another number, and rows of another shape."""
    forms = {
        "[{'boxes': x} for _ in x]": "gives list of 60; expected one tensor",
        "x[: len(x) // 2, :3]": "for 60",
        "x[:, : 2 + (len(x) == 60)].cumsum(1)": "(3,) for one batch and of shape (2,)",
    }
    for form, error in forms.items():
        code = (
            "import torch\n\nclass Net(torch.nn.Linear):\n    def forward(self, x):\n"
            f"        return {form}\n\ndef make():\n    return Net(4, 3), torch.nn.MSELoss()\n"
        )
        state = nn.Linear(4, 3).state_dict()
        said = refuse(tmp_path, code, state, data.Split("rows", X, X[:, :3]))
        assert error in said, said


def test_a_model_of_two_inputs_gets_them_by_position_or_name(tmp_path: Path) -> None:
    """A tuple of inputs becomes arguments, a dict keyword arguments."""
    code = """
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.deep = nn.Linear(4, 3), nn.Embedding(5, 3)

        def forward(self, wide, deep):
            return self.wide(wide) - self.deep(deep)

    def make():
        return Net()
    """
    wide, deep = nn.Linear(4, 3), nn.Embedding(5, 3)
    state = {f"wide.{k}": t for k, t in wide.state_dict().items()}
    state["deep.weight"] = deep.weight.detach()
    ids = np.random.default_rng(5).integers(0, 5, len(X))
    outputs = run_plainly(wide) - deep(torch.tensor(ids)).detach()
    expected = float(functional.cross_entropy(outputs, torch.tensor(CLASSES)))
    for features in ((X, ids), {"deep": ids, "wide": X}):
        found = score(tmp_path, code, state, data.Split("rows", features, CLASSES))
        assert found.loss == pytest.approx(expected, rel=1e-5)

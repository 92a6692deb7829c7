"""A language model trained by the Trainer: the page's commands give what Transformers computes."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from polyak_cli import evaluate
from polyak_cli.evaluation import data
from polyak_cli.evaluation.evaluator import Evaluator
from tests.hf.models import make_tokenizer
from tests.test_guide import GUIDE, find_blocks, run

STEPS = range(40, 321, 40)
SECTION = "## Score a language model"


class Page(NamedTuple):
    """What the examples of the page left, and what the last of them printed."""

    folder: Path
    printed: str

    def read_rows(self) -> list[list[int]]:
        """Return the tokens of the sequences that models were scored on."""
        spec = importlib.util.spec_from_file_location("page_lm", self.folder / "lm.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return [row["input_ids"] for row in module.load()]

    def load(self, name: str) -> Any:
        """Return a model as Transformers loads it."""
        return AutoModelForCausalLM.from_pretrained(self.folder / name).eval()

    def mix(self, coefficients: Sequence[float]) -> Any:
        """Return the model of a mean of all checkpoints, computed by PyTorch alone."""
        files = [self.folder / f"run/checkpoint-{step}/model.safetensors" for step in STEPS]
        states = [load_file(file) for file in files]
        model = self.load(f"run/checkpoint-{STEPS[-1]}")
        both = [*zip(coefficients, states, strict=True)]
        state = {name: sum(c * s[name].double() for c, s in both).float() for name in states[-1]}
        model.load_state_dict(state, strict=False)
        model.tie_weights()
        return model


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """Run the examples of the page: train for a quarter of a minute, average, evaluate, sweep."""
    folder = tmp_path_factory.mktemp("page")
    blocks = find_blocks((GUIDE / "hugging-face.md").read_text().partition(SECTION)[2])
    assert [block.language for block in blocks] == ["sh", "python", "sh"]
    with pytest.MonkeyPatch.context() as patch:
        # A model so small is slower on two threads; on a busy machine many times so.
        patch.setenv("OMP_NUM_THREADS", "1")
        for block in blocks:
            done = run(block, folder)
            assert done.returncode == 0, done.stderr
    return Page(folder, done.stdout)


def lose(model: Any, rows: Sequence[Sequence[int]]) -> Any:
    """Return the loss of each sequence that a model of Transformers gives for it alone."""
    with torch.no_grad():
        each = [torch.tensor([row]) for row in rows]
        return np.array([float(model(input_ids=ids, labels=ids).loss) for ids in each])


def test_the_trainer_leaves_what_it_leaves(page: Page) -> None:
    """Folders with tied weights stored once, beside the state of the training."""
    names = {path.name for path in (page.folder / "run/checkpoint-320").iterdir()}
    assert {"model.safetensors", "config.json", "trainer_state.json", "optimizer.pt"} <= names
    assert "lm_head.weight" not in load_file(page.folder / "run/checkpoint-320/model.safetensors")


def test_scores_are_those_of_the_models_that_transformers_loads(page: Page) -> None:
    """Of every checkpoint and the average: loss, perplexity, and the difference by sequence."""
    rows = page.read_rows()
    names = [*(f"run/checkpoint-{step}" for step in STEPS), "mean"]
    losses = {name: lose(page.load(name), rows) for name in names}
    mean = lose(page.mix([0.0] * 4 + [0.25] * 4), rows)
    assert losses["mean"] == pytest.approx(mean, rel=1e-5)
    lines = [line.split() for line in page.printed.splitlines()]
    table = {line[0]: line[1:] for line in lines if len(line) == 5 and line[0] in losses}
    assert [line[0] for line in lines if line[0:1] and line[0] in losses][: len(names)] == names
    for name, each in losses.items():
        assert float(table[name][0]) == pytest.approx(each.mean(), abs=2e-6)
        assert float(table[name][2]) == pytest.approx(np.exp(each.mean()), rel=1e-5)
    (gain,) = [line for line in lines if line[:2] == ["mean", "loss"]]
    difference = (losses["mean"] - losses["run/checkpoint-320"]).mean()
    assert float(gain[2]) == pytest.approx(difference, abs=3e-6)
    assert float(gain[3]) < difference < float(gain[4])


def test_every_row_of_the_sweep_is_the_model_of_a_plain_mean(page: Page) -> None:
    """Singles and averages, on the sequences for choosing and the others together."""
    found = json.loads((page.folder / "report/sweep.json").read_text())
    rows = page.read_rows()
    counts = {name: split["rows"] for name, split in found["splits"].items()}
    assert sum(counts.values()) == len(rows)
    models = [row for row in found["rows"] if row["kind"] != "ensemble"]
    assert len(models) == 8 + 6
    for row in models:
        scores: Mapping[str, Any] = row["metrics"]
        total = sum(count * scores[name]["loss"] for name, count in counts.items())
        expected = lose(page.mix(row["coefficients"]), rows).sum()
        assert total == pytest.approx(expected, rel=1e-5), row["label"]
        for one in scores.values():
            assert one["perplexity"] == pytest.approx(np.exp(one["loss"]), rel=1e-9)
    best = min(models, key=lambda row: row["metrics"]["selection"]["loss"])
    assert (found["metric"], found["winner"]["label"]) == ("loss", best["label"])


def test_the_page_of_the_sweep_shows_perplexity(page: Page) -> None:
    """In a column for each part of the rows, as the table of the command does."""
    html = (page.folder / "report/report.html").read_text()
    assert "perplexity (selection)" in html
    assert "perplexity (reporting)" in html
    assert len(re.findall("<svg", html)) >= 1
    assert "perplexity (1)" in page.printed


COLLATED = """
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorForLanguageModeling

from lm import read


def load():
    rows = [row["input_ids"][: 5 + k % 40] for k, row in enumerate(read("shutil")[:50])]
    collator = DataCollatorForLanguageModeling(AutoTokenizer.from_pretrained("words"), mlm=False)
    return DataLoader([{"input_ids": row} for row in rows], batch_size=8, collate_fn=collator)
"""


def test_what_a_collator_pads_is_scored_as_each_sequence_alone(
    page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of several lengths: only the tokens of a sequence count."""
    monkeypatch.chdir(page.folder)
    monkeypatch.syspath_prepend(page.folder)
    make_tokenizer().save_pretrained("words")  # it pads with 0, which is no byte of a text
    (tmp_path / "collated.py").write_text(COLLATED)
    split = data.load(f"{tmp_path}/collated.py:load").split()
    features: Any = split.features
    assert features["input_ids"].shape == (50, 44)
    masks = features["attention_mask"].astype(bool)
    rows = [ids[mask].tolist() for ids, mask in zip(features["input_ids"], masks, strict=True)]
    assert [len(row) for row in rows] == [5 + k % 40 for k in range(50)]
    expected = lose(page.load("mean"), rows)
    (found,) = Evaluator([split], model="lm.py:make", batch_size=7).score_rows(Path("mean"))
    assert found.losses == pytest.approx(expected, rel=1e-5)
    # Its own bytes but for the first, which nothing predicts.
    counts = [len(row) - 1 for row in rows]
    perplexity = np.exp(np.average(expected, weights=counts))
    (score,) = evaluate("mean", split, model="lm.py:make")
    assert score.metrics["perplexity"] == pytest.approx(perplexity, rel=1e-5)
    assert score.loss == pytest.approx(expected.mean(), rel=1e-5)

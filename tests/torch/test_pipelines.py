"""`--data` of PyTorch's data sets and loaders, whose rows are the same for every model."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyak_cli.errors import PolyakError
from polyak_cli.evaluation import data, pipelines

CODE = """
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

x, y = torch.arange(14.0).reshape(7, 2), torch.arange(7) % 3
whole = TensorDataset(x, y)

class Tokens(Dataset):
    def __len__(self):
        return 7
    def __getitem__(self, k):
        return {"input_ids": x[k], "mask": x[k] > 3, "labels": int(y[k])}

class Text(Dataset):
    # Texts of 2, 3, 4, 5 and 6 tokens.
    def __len__(self):
        return 5
    def __getitem__(self, k):
        ids = list(range(1, k + 3))
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids}

def collate(rows):
    longest = max(len(row["labels"]) for row in rows)
    fill = {"input_ids": 9, "attention_mask": 0, "labels": -100}
    return {
        key: torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in rows])
        for key, value in fill.items()
    }

class Stream(IterableDataset):
    def __iter__(self):
        return zip(x.bfloat16(), y)

class Counted(Stream):
    def __len__(self):
        return 7

class Pairs(Dataset):
    def __len__(self):
        return 7
    def __getitem__(self, k):
        return (x[k], x[k] * 2), y[k]

def load():
    return """
X = np.arange(14.0).reshape(7, 2)
Y = np.arange(7) % 3


def load(tmp_path: Path, returned: str) -> data.Dataset:
    """Return the data set of a function that returns an expression of CODE."""
    path = tmp_path / "rows.py"
    path.write_text(CODE + returned)
    return data.load(f"{path}:load")


@pytest.mark.parametrize(
    "given",
    [
        "whole",
        "DataLoader(whole, batch_size=3)",
        "Stream()",
        "Counted()",
        "DataLoader(Stream(), 4)",
        "DataLoader(whole, batch_size=None)",
        "DataLoader([(x[:4], y[:4]), (x[4:], y[4:])], batch_size=None)",
        "DataLoader([(x.tolist(), y.tolist())], batch_size=None)",
        # As PyTorch does where a process cannot be forked; the workers import this file by name.
        "DataLoader(Counted(), 4, num_workers=1, multiprocessing_context='spawn')",
        "(x.bfloat16().requires_grad_(), y)",
    ],
)
def test_a_data_set_or_loader_has_the_rows_that_it_gives(tmp_path: Path, given: str) -> None:
    """Row by row or in batches, the last of which is shorter; bfloat16 becomes float32."""
    rows = load(tmp_path, given).split()
    assert np.array_equal(np.asarray(rows.features), X)
    assert np.array_equal(np.asarray(rows.labels), Y)


@pytest.mark.parametrize("given", ["(whole, Stream())", '{"train": whole, "test": Stream()}'])
def test_two_data_sets_are_train_and_test(tmp_path: Path, given: str) -> None:
    """As a pair or by name."""
    found = load(tmp_path, given)
    assert {name: split.rows for name, split in found.splits.items()} == {"train": 7, "test": 7}


def test_rows_that_are_dicts_or_have_several_inputs_keep_their_names(tmp_path: Path) -> None:
    """As Transformers' models take them, labels apart; and pairs of inputs by position."""
    for given in ("Tokens()", "DataLoader(Tokens(), batch_size=4)"):
        rows: Any = load(tmp_path, given).split()
        assert np.array_equal(rows.features["input_ids"], X)
        assert np.array_equal(rows.features["mask"], X > 3)
        assert np.array_equal(rows.labels, Y)
    pairs: Any = load(tmp_path, "DataLoader(Pairs(), batch_size=2)").split()
    assert np.array_equal(pairs.features[1], X * 2)


class OfHuggingFace:
    """As much of `datasets.Dataset` as a loop needs: rows are dicts of lists."""

    column_names = ("input_ids", "labels")

    def __len__(self) -> int:
        return 3

    def __getitem__(self, k: int) -> dict[str, list[int]]:
        if k >= 3:
            raise IndexError
        return {"input_ids": [k, k + 1], "labels": [k, k + 1]}


def test_rows_may_be_a_list_of_dicts_or_a_data_set_of_hugging_face() -> None:
    """What tokenizers return and Trainer takes: lists of numbers are arrays."""
    whole = OfHuggingFace()
    for given in (whole, [whole[k] for k in range(3)]):
        features, labels = pipelines.read_all(given, "load()")
        assert features["input_ids"].tolist() == labels.tolist() == [[0, 1], [1, 2], [2, 3]]
        both = pipelines.read_all({"train": given, "test": given}, "load()")
        assert both["test"][1].tolist() == labels.tolist()
    # Inputs and outputs by name are no rows.
    pair = [{"a": [1, 2]}, {"b": [1, 2]}]
    assert pipelines.read_all(pair, "load()") is pair


def test_batches_of_several_lengths_are_padded_on_as_they_are(tmp_path: Path) -> None:
    """Each array with its own padding, which shows where the attention mask is 0."""
    rows: Any = load(tmp_path, "DataLoader(Text(), 2, collate_fn=collate)").split()
    ids = np.array([[*range(1, k + 3)] + [9] * (4 - k) for k in range(5)])
    assert rows.features["input_ids"].tolist() == ids.tolist()
    assert rows.features["attention_mask"].tolist() == (ids != 9).astype(int).tolist()
    assert rows.labels.tolist() == np.where(ids == 9, -100, ids).tolist()
    for given in ("Text()", "DataLoader(Text(), 1, collate_fn=collate)"):
        with pytest.raises(PolyakError, match="a DataLoader whose collate_fn pads them"):
            load(tmp_path, given)


def test_classes_may_be_text_in_batches(tmp_path: Path) -> None:
    """PyTorch's loader leaves text in a list."""
    found = load(tmp_path, "DataLoader([(x[k], 'ab'[k % 2]) for k in range(7)], batch_size=3)")
    assert np.array_equal(np.asarray(found.split().labels), np.arange(7) % 2)


def test_a_shuffling_loader_is_read_once(tmp_path: Path) -> None:
    """Features and labels stay together."""
    rows = load(tmp_path, "DataLoader(whole, batch_size=2, shuffle=True)").split()
    assert np.array_equal(np.asarray(rows.features)[:, 0] / 2 % 3, np.asarray(rows.labels))


def test_random_rows_are_the_same_in_each_run(tmp_path: Path) -> None:
    """Shuffled or drawn by PyTorch, numpy or Python; the caller's own numbers go on unchanged."""
    long = "TensorDataset(torch.arange(99.0), torch.zeros(99))"
    for given in (
        f"DataLoader({long}, batch_size=9, shuffle=True)",
        "torch.rand(9), y[:1].repeat(9)",
        "__import__('numpy').random.rand(9), y[:1].repeat(9)",
        "[__import__('random').random() for _ in range(9)], y[:1].repeat(9)",
    ):
        runs, after = [], []
        for seed in (1, 2):  # as two processes would have
            torch.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
            runs.append(np.asarray(load(tmp_path, given).split().features))
            after.append((torch.rand(1).item(), np.random.rand(), random.random()))
        assert np.array_equal(runs[0], runs[1]), given
        assert len(set(runs[0].ravel().tolist())) == runs[0].size, given
        assert all(one != other for one, other in zip(*after, strict=True)), given


def test_what_is_no_pair_of_features_and_labels_is_refused(tmp_path: Path) -> None:
    """Rows without labels, of several lengths, none at all, and a row that fails."""
    for given, text in {
        "TensorDataset(x)": "gives rows of 1 part; expected (x, y), or a dict with 'labels'",
        "[(x, y)] and TensorDataset(x[:0], y[:0])": "is empty; expected one row or more",
        "DataLoader([(x, y), (x[:, :1], y)], batch_size=None)": "do not fit into one array",
        "DataLoader([(x, y)], collate_fn=lambda _: 1 / 0)": "ZeroDivisionError",
    }.items():
        with pytest.raises(PolyakError) as caught:
            load(tmp_path, given)
        assert text in str(caught.value), given
        assert "\n" not in str(caught.value)

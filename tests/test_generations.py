"""Files that every generation of Keras really wrote average to what plain h5py computes."""

from __future__ import annotations

from pathlib import Path

import pytest

from polyak_cli import average
from tests.oracle import naive_average, read_model, same_bits

HOME = Path(__file__).parent / "data" / "keras_generations"
GENERATIONS = sorted(path.name for path in HOME.iterdir() if path.is_dir())


def test_all_generations_are_there() -> None:
    """Two of Keras 2 and three of Keras 3, which name their weights in three ways."""
    assert GENERATIONS == [
        "keras-3.0.5",
        "keras-3.15.1",
        "keras-3.3.3",
        "tf.keras-2.13.1",
        "tf_keras-2.21.0",
    ]


@pytest.mark.parametrize("generation", GENERATIONS)
def test_each_generation_equals_the_naive_average(tmp_path: Path, generation: str) -> None:
    """Nested models and BatchNorm, bit for bit; nothing but optimizer state is lost."""
    paths = sorted((HOME / generation).glob("*.h5"))
    report = average(HOME / generation, tmp_path / "o.h5", scheme="linear")
    assert [c.path for c in report.plan.checkpoints] == paths
    found = read_model(tmp_path / "o.h5")
    assert same_bits(found, naive_average(paths, report.plan.mean.multipliers))
    newest = {n for n in read_model(paths[-1]) if not n.startswith("optimizer_weights/")}
    assert set(found) == newest
    assert len(report.plan.averaged) == 14
    assert len(report.plan.dropped) >= 9
    (note,) = report.notes
    assert note.startswith("4 BatchNorm moving statistics are averaged")

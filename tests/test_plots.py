from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest

from polyak_cli.errors import MissingExtraError, OutputError, UsageError
from polyak_cli.evaluation import plots

HISTORY = {
    "loss": (1.0, 0.5, 0.4),
    "accuracy": (0.5, 0.7, 0.8),
    "val_loss": (1.1, 0.7, 0.6),
    "val_accuracy": (0.4, 0.6, 0.7),
}


def test_the_curves_are_drawn_by_suffix(tmp_path: Path) -> None:
    """A suffix in lower or upper case gives a PNG or SVG with named axes and curves."""
    pytest.importorskip("matplotlib")
    plots.draw_learning_curves(HISTORY, tmp_path / "curves.PNG")
    assert (tmp_path / "curves.PNG").read_bytes().startswith(b"\x89PNG")
    plots.draw_learning_curves(HISTORY, tmp_path / "curves.svg")
    svg = (tmp_path / "curves.svg").read_text(encoding="utf-8")
    for text in ("Epoch", "Loss", "Accuracy", "train", "test"):
        assert f">{text}" in svg


def test_pictures_say_what_they_show(tmp_path: Path) -> None:
    """Each SVG has a title and a description; a name with dollars is no formula."""
    pytest.importorskip("matplotlib")
    plots.draw_learning_curves(HISTORY, tmp_path / "one.svg")
    plots.draw_distances(["a", "$<b$"], [None, 0.2], [0.1, 0.3], tmp_path / "two.svg")
    one, two = ((tmp_path / f"{name}.svg").read_text() for name in ("one", "two"))
    assert "<title>Learning curves</title>" in one
    assert "3 epochs, for training and test points; after the last: loss 0.4, accuracy 0.8" in one
    assert "<title>Distances between checkpoints</title>" in two
    assert "To the average: 0.1 to 0.3, the farthest $&lt;b$.</desc>" in two


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_same_numbers_give_the_same_file(tmp_path: Path, suffix: str) -> None:
    """There are no dates or random identifiers, and settings of the user do not matter."""
    mpl = pytest.importorskip("matplotlib")
    plots.draw_learning_curves(HISTORY, tmp_path / f"one{suffix}")
    with mpl.rc_context({"svg.hashsalt": "other", "font.size": 20}):
        plots.draw_learning_curves(HISTORY, tmp_path / f"two{suffix}")
    one = (tmp_path / f"one{suffix}").read_bytes()
    assert one == (tmp_path / f"two{suffix}").read_bytes()
    plots.draw_learning_curves(HISTORY | {"loss": (1.0, 0.5, 0.3)}, tmp_path / f"two{suffix}")
    assert one != (tmp_path / f"two{suffix}").read_bytes()


def test_a_history_without_test_points_is_drawn(tmp_path: Path) -> None:
    """A missing metric is not drawn."""
    pytest.importorskip("matplotlib")
    plots.draw_learning_curves({"loss": (1.0,)}, tmp_path / "curves.svg")
    svg = (tmp_path / "curves.svg").read_text(encoding="utf-8")
    assert ">train" in svg
    assert ">test" not in svg


@pytest.mark.parametrize("name", ["curves", "curves.pdf", "curves.png.txt"])
def test_another_suffix_is_refused(tmp_path: Path, name: str) -> None:
    """The message lists the known suffixes."""
    with pytest.raises(UsageError, match=r"expected \.png or \.svg"):
        plots.check_path(tmp_path / name)


def test_a_plot_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    """A missing folder is refused before any work, a folder of that name at the end."""
    pytest.importorskip("matplotlib")
    with pytest.raises(OutputError, match="its folder does not exist"):
        plots.check_path(tmp_path / "none" / "curves.png")
    (tmp_path / "curves.png").mkdir()
    with pytest.raises(OutputError, match=r"curves\.png: cannot be written: Is a directory"):
        plots.draw_learning_curves(HISTORY, tmp_path / "curves.png")


def test_a_missing_matplotlib_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message says what to install."""
    real = builtins.__import__

    def without(name: str, *arguments: Any, **named: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"'polyak\[plot\]'"):
        plots.check_path(tmp_path / "curves.png")

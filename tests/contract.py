"""What every format must keep: its tests inherit `Contract` and say how files are written and read.

Both by the format's own library, never by the package: a mistake in our writing could hide behind
the matching mistake in our reading.
"""

from __future__ import annotations

import abc
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import pytest

from polyak_cli import average, check, inspect, plan, verify
from polyak_cli.averaging.planning import Plan
from polyak_cli.engine import slabs
from polyak_cli.errors import FormatError, MismatchError, PolyakError
from polyak_cli.pipeline.stages import Options
from polyak_cli.tensors import Extent
from tests.counting import count_reads
from tests.kernels import needs_compiled, use_kernel
from tests.oracle import Array

Tensors = dict[str, Array]
_Tests = TypeVar("_Tests", bound="Contract")


def naive(models: Sequence[Tensors], multipliers: Sequence[float]) -> Tensors:
    """Average the floats of whole models in float64, oldest first; keep the rest of the newest."""
    result = dict(models[-1])
    for name, newest in models[-1].items():
        if newest.dtype.kind != "f":
            continue
        total: Any = None
        for model, multiplier in zip(models, multipliers, strict=True):
            if multiplier:
                term = np.float64(multiplier) * model[name].astype(np.float64)
                total = term if total is None else total + term
        result[name] = np.asarray(total / math.fsum(multipliers)).astype(newest.dtype)
    return result


def assert_same(found: Mapping[str, Array], expected: Mapping[str, Array]) -> None:
    """Compare names, types, shapes and bits."""
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert found[name].dtype == values.dtype, name
        assert found[name].shape == values.shape, name
        assert found[name].tobytes() == values.tobytes(), name


def described(made: Plan) -> list[Any]:
    """Return all that a plan says, except the memory that the process happens to have."""
    tables = [[*table.tensors.values(), *table.others.values()] for table in made.tables]
    return [replace(made, memory=0, tables=(), averaged_rows=(), carried_rows=()), tables]


def assert_headers_are_enough(folder: Path, output: Path, overrun: int = 0) -> None:
    """Assert that a plan of a run reads no byte of its two large tensors, nor depends on them.

    Args:
        folder: the run; what is averaged is overwritten with NaN.
        output: of the plan; nothing is written to it.
        overrun: bytes of a tensor that may be read with the header before it.
    """
    with count_reads(output.parent) as log:
        made = plan(folder, output)
    reads = log.reads()
    assert reads
    for table in made.tables:
        large = [spec for spec in table.tensors.values() if spec.nbytes > 4096]
        assert len(large) == 2
        for spec in large:
            extent = spec.storage
            if not isinstance(extent, Extent):  # compressed: its bytes are not at an offset
                continue
            path = Path(table.files[extent.file].path)
            inside = [
                read
                for read in reads
                if read.path == str(path)
                and read.overlaps(extent.offset + overrun, extent.offset + extent.nbytes)
            ]
            assert inside == []
            status = path.stat()
            with path.open("r+b") as file:
                file.seek(extent.offset)
                file.write(b"\xff" * extent.nbytes)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert described(plan(folder, output)) == described(made)


class Contract(abc.ABC):
    """Tests that every format runs, with further layouts of it marked `another_layout`."""

    suffix: ClassVar[str]  # of its files
    dtypes: ClassVar[Sequence[str]] = ("float16", "float32", "float64")
    converts: ClassVar[bool] = True  # --dtype may change the stored type
    overrun: ClassVar[int] = 0  # bytes of a tensor that are read with the header before it

    @property
    def result(self) -> str:
        """Suffix of an output."""
        return self.suffix

    @abc.abstractmethod
    def write(self, path: Path, tensors: Tensors) -> None:
        """Write a checkpoint, in the order of the tensors, by the format's own library."""

    @abc.abstractmethod
    def read(self, path: Path) -> Tensors:
        """Read all tensors of a file, by the names of `write`, by the format's own library."""

    def tensors(self, seed: int, dtype: str = "float32") -> Tensors:
        """Return the tensors of one checkpoint."""
        rng = np.random.default_rng(seed)

        def values(*shape: int) -> Array:
            return np.asarray(rng.normal(3, size=shape)).astype(dtype)

        return {
            "kernel": values(33, 17),
            "bias": values(17),
            "scale": values(),
            "count": np.array(7, np.int64),
            "table": np.arange(5, dtype=np.int32),
        }

    def write_run(
        self, folder: Path, count: int = 4, dtype: str = "float32"
    ) -> tuple[list[Path], list[Tensors]]:
        """Write the checkpoints of a run; return them, and what is in them, oldest first."""
        folder.mkdir(exist_ok=True)
        paths = [folder / f"model_{k}{self.suffix}" for k in range(1, count + 1)]
        models = [self.tensors(seed, dtype) for seed in range(count)]
        for path, tensors in zip(paths, models, strict=True):
            self.write(path, tensors)
        return paths, models

    def test_a_plan_reads_headers_only(self, tmp_path: Path) -> None:
        """No byte of an averaged tensor is read, and with NaN in their place the plan is the same.

        Tensors of up to a page are read along where checkpoints are compared; these are larger.
        """
        folder = tmp_path / "run"
        folder.mkdir()
        for k in range(3):
            tensors = self.tensors(k)
            rng = np.random.default_rng(k)
            tensors |= {name: rng.normal(3, size=3000).astype("f4") for name in ("kernel", "bias")}
            self.write(folder / f"model_{k}{self.suffix}", tensors)
        assert_headers_are_enough(folder, tmp_path / f"o{self.result}", self.overrun)

    # Every scheme with every kernel is compared in the tests of golden digests.
    @pytest.mark.parametrize(
        ("options", "kernel"),
        [
            pytest.param({"scheme": "exp", "alpha": 2}, "compiled", marks=needs_compiled, id="exp"),
            pytest.param({"coefficients": [5, 0, 0.25, 3]}, "numpy", id="own"),
        ],
    )
    def test_bit_for_bit(
        self, tmp_path: Path, options: Options, kernel: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The result is the whole-model float64 average, rounded once, in every float type."""
        use_kernel(monkeypatch, kernel)
        for dtype in self.dtypes:
            folder = tmp_path / dtype
            _, models = self.write_run(folder, dtype=dtype)
            output = tmp_path / f"{dtype}{self.result}"
            report = average(folder, output, **options)
            assert_same(self.read(output), naive(models, report.plan.mean.multipliers))

    @pytest.mark.slow
    def test_processes_change_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Several children and tiny pieces write the very bytes that one process writes."""
        self.write_run(tmp_path / "run")
        one, other = tmp_path / f"one{self.result}", tmp_path / f"other{self.result}"
        average(tmp_path / "run", one, jobs=1)
        monkeypatch.setattr(slabs, "TUNING", slabs.Tuning(piece=100, fork_nbytes=0))
        average(tmp_path / "run", other, jobs=3)
        assert content(one) == content(other)

    def test_one_checkpoint_averages_to_itself(self, tmp_path: Path) -> None:
        """Every tensor of the newest is there with its own bits."""
        paths, models = self.write_run(tmp_path / "run", 1)
        average(paths, tmp_path / f"o{self.result}")
        assert_same(self.read(tmp_path / f"o{self.result}"), models[0])

    def test_what_it_wrote_is_recognised(self, tmp_path: Path) -> None:
        """An average beside its checkpoints is not one of them the next time."""
        self.write_run(tmp_path / "run")
        average(tmp_path / "run", tmp_path / f"run/model_5{self.result}")
        report = average(tmp_path / "run", tmp_path / f"o{self.result}")
        assert len(report.plan.checkpoints) == 4
        assert [p.reason for p in report.plan.passed_over] == ["written by polyak"]
        (inside,) = inspect([tmp_path / f"o{self.result}"])
        names = [each["name"] for each in inside.provenance["inputs"]]
        assert names == [f"model_{k}{self.suffix}" for k in range(1, 5)]

    @pytest.mark.slow
    def test_it_verifies_until_a_bit_is_flipped(self, tmp_path: Path) -> None:
        """What was read back and published is found equal again, and one bit is noticed."""
        self.write_run(tmp_path / "run")
        output = tmp_path / f"o{self.result}"
        average(tmp_path / "run", output, scheme="exp", verify=True)
        assert verify(output, sources=[tmp_path / "run"]).problems == ()
        parts = [part for part in tmp_path.rglob("o*") if part.is_file()]
        parts += [part for part in output.rglob("*") if part.is_file()]
        for part in parts:
            whole = part.read_bytes()
            flipped = bytearray(whole)
            flipped[len(whole) // 2] ^= 1
            part.write_bytes(flipped)
            assert not verify(output, sources=[tmp_path / "run"]).verified, part
            part.write_bytes(whole)
        assert {path.name for path in tmp_path.iterdir()} == {
            "run",
            *(part.name for part in parts if part.parent == tmp_path),
            output.name,
        }

    def test_an_average_of_averages_is_like_its_template(self, tmp_path: Path) -> None:
        """What this tool wrote it can read, and its record is the newer one's alone."""
        paths, models = self.write_run(tmp_path / "run", 2)
        output = tmp_path / f"o{self.result}"
        average(paths, output)
        again = tmp_path / f"again{self.result}"
        report = average([output], again)
        assert_same(self.read(again), naive(models, [0.5, 0.5]))
        assert any("is itself an average" in note for note in report.notes)

    def test_another_type_is_stored_where_it_is_asked_for(self, tmp_path: Path) -> None:
        """--dtype rounds the float64 average to that type, once."""
        if not self.converts:
            pytest.skip("this format keeps the types of its template")
        paths, models = self.write_run(tmp_path / "run", 2)
        for dtype in ("float16", "float64"):
            output = tmp_path / f"{dtype}{self.result}"
            average(paths, output, dtype=dtype)
            wide = [{n: v.astype(np.float64) for n, v in m.items()} for m in models]
            for name, values in naive(wide, [0.5, 0.5]).items():
                if models[0][name].dtype.kind == "f":
                    assert self.read(output)[name].tobytes() == values.astype(dtype).tobytes()

    def test_what_is_not_finite_is_named(self, tmp_path: Path) -> None:
        """A NaN is an error that names file and tensor."""
        paths, models = self.write_run(tmp_path / "run")
        models[1]["bias"][3] = np.nan
        self.write(paths[1], models[1])
        with pytest.raises(MismatchError, match=r"model_2.*bias.*nan.*element 3"):
            average(paths, tmp_path / f"o{self.result}")
        assert os.listdir(tmp_path) == ["run"]

    def test_float_types_that_differ_are_averaged(self, tmp_path: Path) -> None:
        """A run that changed its precision is averaged in float64 and stored as its newest is."""
        (tmp_path / "run").mkdir()
        types = [dtype for dtype in ("float64", "float32", "float16") if dtype in self.dtypes]
        models = [self.tensors(seed, dtype) for seed, dtype in enumerate([types[0], *types])]
        for k, tensors in enumerate(models):
            self.write(tmp_path / "run" / f"model_{k}{self.suffix}", tensors)
        output = tmp_path / f"o{self.result}"
        report = average(tmp_path / "run", output, scheme="exp")
        assert_same(self.read(output), naive(models, report.plan.mean.multipliers))
        (note,) = (note for note in report.notes if "different types" in note)
        assert " and ".join(types) in note
        assert f"stored as {types[-1]}" in note
        assert report.data()["suspicions"] == []
        assert verify(output, sources=[tmp_path / "run"]).problems == ()

    def test_an_infinity_that_all_have_is_kept(self, tmp_path: Path) -> None:
        """A mask of -inf and a number that is inf keep their bits, and `check` finds no problem."""
        paths, models = self.write_run(tmp_path / "run")
        for path, model in zip(paths, models, strict=True):
            model["kernel"][np.triu_indices(33, 1, 17)] = -np.inf
            model["scale"] = np.array(np.inf, model["scale"].dtype)
            self.write(path, model)
        output = tmp_path / f"o{self.result}"
        report = average(tmp_path / "run", output, verify=True)
        assert_same(self.read(output), naive(models, report.plan.mean.multipliers))
        count = len(np.triu_indices(33, 1, 17)[0]) + 1
        health = check(tmp_path / "run")
        notes = (report.notes, health.notes)
        for (note,) in ([one for one in found if "infinite" in one] for found in notes):
            assert note.startswith(f"{count} numbers of 2 tensors (")
        assert not any("nonfinite" in one.kind for one in health.all_problems)

    @pytest.mark.parametrize("change", ["missing", "extra", "shape", "dtype"])
    def test_checkpoints_of_another_model_are_refused(self, tmp_path: Path, change: str) -> None:
        """A tensor missing, extra, or of another shape or type is named, with its file."""
        paths, models = self.write_run(tmp_path / "run")
        changes: dict[str, Callable[[Any], Any]] = {
            "missing": lambda tensors: tensors.pop("bias"),
            "extra": lambda tensors: tensors.update(more=tensors["bias"]),
            "shape": lambda tensors: tensors.update(bias=tensors["bias"][:-1].copy()),
            "dtype": lambda tensors: tensors.update(bias=tensors["bias"].astype(np.int32)),
        }
        changes[change](models[1])
        self.write(paths[1], models[1])
        with pytest.raises(MismatchError, match=r"model_2.*(bias|more|tensors)"):
            average(paths, tmp_path / f"o{self.result}")
        assert os.listdir(tmp_path) == ["run"]

    @pytest.mark.slow
    def test_a_truncated_file_is_refused_wherever_it_ends(self, tmp_path: Path) -> None:
        """No traceback, no output: an error that names the file."""
        paths, _ = self.write_run(tmp_path / "run", 2)
        whole = paths[0].read_bytes()
        for length in {0, 1, 7, len(whole) - 1, *range(8, len(whole), max(1, len(whole) // 16))}:
            paths[0].write_bytes(whole[:length])
            with pytest.raises(PolyakError, match="model_1"):
                average(paths, tmp_path / f"o{self.result}")
        assert os.listdir(tmp_path) == ["run"]

    def test_a_mixture_of_formats_is_refused(self, tmp_path: Path) -> None:
        """The sources of one average are of one format, recognised by content."""
        paths, _ = self.write_run(tmp_path / "run", 2)
        other = tmp_path / f"run/other{self.suffix}"
        other.write_bytes(b"neither this nor that")
        with pytest.raises((FormatError, MismatchError), match="other"):
            average([other, *paths], tmp_path / f"o{self.result}")


#: What does not depend on how a file of a format is laid out.
_ANY_LAYOUT = (
    "test_what_it_wrote_is_recognised",
    "test_an_average_of_averages_is_like_its_template",
    "test_float_types_that_differ_are_averaged",
    "test_an_infinity_that_all_have_is_kept",
    "test_checkpoints_of_another_model_are_refused",
    "test_a_mixture_of_formats_is_refused",
)


def another_layout(tests: type[_Tests]) -> type[_Tests]:
    """Leave to the tests of a format's first layout what does not depend on the layout."""
    for name in _ANY_LAYOUT:
        assert callable(getattr(tests, name))
        if name not in vars(tests):
            setattr(tests, name, None)
    return tests


def content(path: Path) -> dict[str, bytes]:
    """Return the bytes of a file, or of all files of a folder and of those in it."""
    if path.is_file():
        return {"": path.read_bytes()}
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}

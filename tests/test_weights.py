"""Keras's weights files, single and sharded: the contract of all formats, and what is their own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from polyak_cli import average, plan
from polyak_cli.errors import FormatError, MismatchError, OutputError
from polyak_cli.formats.keras import names as keras_names
from tests.contract import Contract, Tensors, another_layout, assert_same, naive
from tests.oracle import Array, nearest_bfloat16, read_model, write_model

ONES = np.ones((3, 4), np.float32)
HALF = np.full(4, 0.5, np.float32)


def write_weights(
    path: Path, tensors: Mapping[str, Array], labels: Mapping[str, str] | None = None
) -> Path:
    """Write datasets at their paths, and the names of layers that Keras keeps at their groups."""
    with h5py.File(path, "w") as file:
        file.create_group("vars")
        for name, values in tensors.items():
            made = file.create_dataset(name, data=values)
            if values.dtype == "V2":
                made.attrs["dtype"] = "bfloat16"
        for group, label in (labels or {}).items():
            file[group].attrs["name"] = label
    return path


def write_shards(path: Path, shards: list[Mapping[str, Array]]) -> Path:
    """Write a sharded save: the JSON and its shards."""
    weight_map: dict[str, list[str]] = {}
    for number, tensors in enumerate(shards):
        shard = path.with_name(f"{path.name.removesuffix('.weights.json')}_{number:05}.weights.h5")
        write_weights(shard, tensors)
        for name in tensors:
            listed = weight_map.setdefault(f"/{name.rpartition('/')[0]}", [])
            if shard.name not in listed:
                listed.append(shard.name)
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}, indent=4))
    return path


class TestWeights(Contract):
    """Written as Keras writes the layers of a subclassed model."""

    suffix = ".weights.h5"

    def write(self, path: Path, tensors: Tensors) -> None:
        """See `Contract.write`."""
        write_weights(path, {f"{name}/vars/0": values for name, values in tensors.items()})

    def read(self, path: Path) -> Tensors:
        """See `Contract.read`."""
        return {name.partition("/")[0]: np.asarray(v) for name, v in read_model(path).items()}


@another_layout
class TestShards(TestWeights):
    """Written in two shards, between which one layer is cut."""

    suffix = ".weights.json"
    result = ".weights.h5"

    def write(self, path: Path, tensors: Tensors) -> None:
        """See `Contract.write`."""
        named = {f"{name}/vars/0": values for name, values in tensors.items()}
        first = dict(list(named.items())[:2])
        write_shards(path, [first, {n: v for n, v in named.items() if n not in first}])

    def test_what_it_wrote_is_recognised(self, tmp_path: Path) -> None:
        """An average beside its checkpoints is not one of them, nor are the shards."""
        self.write_run(tmp_path / "run", 2)
        average(tmp_path / "run", tmp_path / "run/model_5.weights.h5")
        passed = {p.path.name: p.reason for p in plan(tmp_path / "run").passed_over}
        assert passed.pop("model_5.weights.h5").startswith("the only .weights.h5 file")
        assert passed == {
            f"model_{k}_0000{n}.weights.h5": f"a part of model_{k}.weights.json"
            for k in (1, 2)
            for n in (0, 1)
        }


def average_of(
    folder: Path, *models: Mapping[str, Array], labels: Mapping[str, str] | None = None, **how: Any
) -> tuple[dict[str, Array], Any]:
    """Write weights files, average them; return what the output holds, and the report."""
    paths = [folder / f"m_{k}.weights.h5" for k in range(len(models))]
    for path, tensors in zip(paths, models, strict=True):
        write_weights(path, tensors, labels)
    report = average(paths, folder / "o.weights.h5", **how)
    return read_model(folder / "o.weights.h5"), report


# --- what is whose --------------------------------------------------------------------------------


def test_tensors_stand_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """'10' comes after '2', in variables and in layers."""
    order = [f"layers/dense{n}/vars/{k}" for n in ("", "_2", "_10") for k in (0, 2, 10)]
    _, report = average_of(tmp_path, dict.fromkeys(sorted(order), HALF))
    assert list(report.plan.averaged) == order


#: Where a model keeps its own tensors, and where others lie.
PLACES: dict[str, Array] = {
    "vars/0": HALF,
    "layers/functional/layers/dense/vars/0": ONES,
    "layers/lstm/cell/vars/0": ONES,
    "_layer_checkpoint_dependencies/dense_2/vars/0": ONES,
    "block/container/dense/vars/0": ONES,
    "feature_optimizer/vars/0": HALF,
    "metrics/mean/vars/0": np.array(3, np.float32),
    "notes": HALF,
    "optimizer/vars/0": np.array(5, np.int64),
    "optimizer/vars/1": HALF,
    "d_optimizer/vars/0": np.array(6, np.int64),
    "d_optimizer/vars/1": HALF,
}
OWN = [name for name in PLACES if name not in list(PLACES)[6:]]
STATE = [name for name in PLACES if name.split("/")[0] in ("optimizer", "d_optimizer")]


@pytest.mark.parametrize("optimizer", ["drop", "newest"])
def test_what_is_not_the_models_own_is_never_averaged(tmp_path: Path, optimizer: Any) -> None:
    """Metrics and strange datasets are carried; optimizers, a model's own too, as it was asked."""
    newest = {name: (values + 2).astype(values.dtype) for name, values in PLACES.items()}
    found, report = average_of(tmp_path, PLACES, newest, optimizer=optimizer)
    kept = {n: v for n, v in newest.items() if optimizer == "newest" or n not in STATE}
    assert_same(found, {n: PLACES[n] + np.float32(1) if n in OWN else v for n, v in kept.items()})
    assert set(report.plan.averaged) == set(OWN)
    dropped = {name.removeprefix("/") for name in report.plan.dropped}
    assert dropped == (set(STATE) if optimizer == "drop" else set())


def test_groups_and_names_of_layers_are_carried(tmp_path: Path) -> None:
    """Empty groups and the attribute 'name' stand in the output as in the newest."""
    labels = {"vars": "model", "layers/dense/vars": "höhe"}
    average_of(tmp_path, {"layers/dense/vars/0": ONES}, labels=labels)
    with h5py.File(tmp_path / "o.weights.h5") as file:
        assert {group: file[group].attrs["name"] for group in labels} == labels
        assert set(file.attrs) == {"polyak_provenance"}


NORM = {str(k): HALF for k in range(4)}


@pytest.mark.parametrize(
    ("layer", "label", "count", "expected"),
    [
        ("layers/batch_normalization_1", "", 4, "23"),
        ("layers/batch_normalization", "", 2, "01"),
        ("block/sync_batch_normalization", "", 3, "12"),
        ("layers/batch_normalization", "", 6, "2345"),
        ("norm", "batch_normalization_7", 4, "23"),
        ("bn1", "", 4, "23"),
        ("layers/layer_normalization", "layer_normalization", 4, ""),
    ],
)
def test_batchnorm_statistics_are_counted_in_a_note(
    tmp_path: Path, layer: str, label: str, count: int, expected: str
) -> None:
    """They are recognised by class, attribute or layer name, and follow gamma and beta."""
    tensors = {f"{layer}/vars/{k}": HALF for k in range(count)}
    _, report = average_of(tmp_path, tensors, tensors, labels={f"{layer}/vars": label})
    notes = [note for note in report.notes if "moving statistics" in note]
    assert len(notes) == bool(expected)
    assert "".join(notes).startswith(f"{len(expected)} BatchNorm" if expected else "")
    found = keras_names.find_statistics(tensors, {f"{layer}/vars": label})
    assert found == [f"{layer}/vars/{k}" for k in expected]


# --- bfloat16 -------------------------------------------------------------------------------------


def bfloat16(*values: float) -> Array:
    """Return bfloat16 as h5py stores it: two bare bytes."""
    return np.array([nearest_bfloat16(value) for value in values], np.uint16).view("V2")


def test_bfloat16_is_averaged_and_rounded_once(tmp_path: Path) -> None:
    """As the nearest bfloat16 to the float64 average, and Keras's mark of it stays."""
    found, report = average_of(
        tmp_path, {"d/vars/0": bfloat16(1.0, 3.0)}, {"d/vars/0": bfloat16(1.0078125, -1e30)}
    )
    assert found["d/vars/0"].tobytes() == bfloat16(1.00390625, -5e29).tobytes()
    with h5py.File(tmp_path / "o.weights.h5") as file:
        assert dict(file["d/vars/0"].attrs) == {"dtype": "bfloat16"}
    assert not [note for note in report.notes if "bfloat16" in note]


def test_the_mark_of_bfloat16_follows_the_type(tmp_path: Path) -> None:
    """--dtype takes it away from what is bfloat16 no more, and gives it to what becomes so."""
    found, _ = average_of(tmp_path, {"d/vars/0": bfloat16(1.5)}, dtype="float32")
    assert found["d/vars/0"].tobytes() == np.float32(1.5).tobytes()
    with h5py.File(tmp_path / "o.weights.h5") as file:
        assert not dict(file["d/vars/0"].attrs)
    average_of(tmp_path, {"d/vars/0": HALF}, dtype="bfloat16", force=True)
    with h5py.File(tmp_path / "o.weights.h5") as file:
        assert dict(file["d/vars/0"].attrs) == {"dtype": "bfloat16"}
        assert file["d/vars/0"][()].tobytes() == bfloat16(0.5, 0.5, 0.5, 0.5).tobytes()


# --- refused --------------------------------------------------------------------------------------


def test_the_output_must_be_named_as_keras_wants_it(tmp_path: Path) -> None:
    """`load_weights` opens this layout as .weights.h5 only."""
    path = write_weights(tmp_path / "m.weights.h5", {"d/vars/0": HALF})
    with pytest.raises(OutputError, match=r"opened only as \.weights\.h5; give the output that"):
        average([path], tmp_path / "o.h5")


def test_a_whole_model_is_not_called_weights(tmp_path: Path) -> None:
    """`load_weights` refuses its layout under that name, unless an older Keras called it so."""
    whole = write_model(tmp_path / "m.h5", {"d": {"k": HALF}})
    with pytest.raises(OutputError, match=r"would be lost, because a \.weights\.h5 holds tensors"):
        average([whole], tmp_path / "o.weights.h5")
    average([whole.rename(tmp_path / "m.weights.h5")], tmp_path / "o.weights.h5")
    assert "model_weights/d/k" in read_model(tmp_path / "o.weights.h5")


def test_a_whole_model_is_not_averaged_with_weights(tmp_path: Path) -> None:
    """They are of one format, but not of one layout."""
    whole = write_model(tmp_path / "a.h5", {"d": {"k": HALF}})
    path = write_weights(tmp_path / "m.weights.h5", {"d/vars/0": HALF})
    with pytest.raises(MismatchError, match=r"a\.h5: has no tensor 'd/vars/0'"):
        average([whole, path], tmp_path / "o.weights.h5")


def test_quantised_layers_are_refused(tmp_path: Path) -> None:
    """An int8 kernel beside floats is quantised; whole, the layer may be carried."""
    tensors: Tensors = {"d/vars/0": np.ones((2, 2), np.int8), "d/vars/1": HALF, "e/vars/0": HALF}
    with pytest.raises(MismatchError, match=r"'d/vars/0' is quantised"):
        average_of(tmp_path, tensors)
    found, _ = average_of(tmp_path, tensors, exclude_tensors=["d/*"])
    assert_same(found, tensors)


def make_soft_link(file: Any) -> None:
    """Have a layer lie elsewhere."""
    file["layers"] = h5py.SoftLink("/d")


def make_external_link(file: Any) -> None:
    """Have a layer lie in another file."""
    file["layers"] = h5py.ExternalLink("/etc/passwd", "/d")


def make_cycle(file: Any) -> None:
    """Have a layer hold itself."""
    file["d/again"] = file["d"]


def make_external_storage(file: Any) -> None:
    """Have values lie in another file (CVE-2026-1669)."""
    file.create_dataset("d/vars/1", (4,), "f4", external=[("/etc/passwd", 0, 16)])


def make_unwritten(file: Any) -> None:
    """Have a tensor without values, which reads as zeros."""
    file.create_dataset("d/vars/1", (4,), "f4")


def make_strange_label(file: Any) -> None:
    """Have a name that is none, which would crash who reads it as one (HOSTILE.md rule 4)."""
    file["d/vars"].attrs["name"] = 7


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_soft_link, "'/layers' is a soft or external link"),
        (make_external_link, "'/layers' is a soft or external link"),
        (make_cycle, "'/d/again' is linked twice"),
        (make_external_storage, "'d/vars/1' points to another file"),
        (make_unwritten, "'d/vars/1' was never written"),
        (make_strange_label, "'name' is not a string"),
    ],
)
def test_hostile_weights_are_refused(
    tmp_path: Path, make: Callable[[Any], None], message: str
) -> None:
    """With the file and the tensor, and no output."""
    path = write_weights(tmp_path / "m.weights.h5", {"d/vars/0": HALF})
    with h5py.File(path, "r+") as file:
        make(file)
    with pytest.raises(FormatError, match=rf"m\.weights\.h5: .*{message}"):
        average([path], tmp_path / "o.weights.h5")
    assert os.listdir(tmp_path) == ["m.weights.h5"]


# --- shards ---------------------------------------------------------------------------------------

SHARDS: list[Mapping[str, Array]] = [
    {"d/vars/0": ONES, "bn/vars/0": HALF},
    {"d/vars/1": HALF, "bn/vars/1": HALF, "optimizer/vars/0": np.array(5, np.int64)},
    {"optimizer/vars/1": HALF},
]


@pytest.mark.parametrize("optimizer", ["drop", "newest"])
def test_shards_become_one_file(tmp_path: Path, optimizer: Any) -> None:
    """With the groups of all together, and large tensors that are carried too."""
    large: Tensors = {"d/vars/2": np.arange(100_000, dtype=np.int32)}
    newer = [{n: v + v.dtype.type(2) for n, v in shard.items()} for shard in SHARDS]
    runs: list[list[Mapping[str, Array]]] = [[*SHARDS, large], [*newer, large]]
    paths = [write_shards(tmp_path / f"m_{k}.weights.json", run) for k, run in enumerate(runs)]
    report = average(paths, tmp_path / "o.weights.h5", optimizer=optimizer)
    models = [{n: v for shard in run for n, v in shard.items()} for run in runs]
    expected = naive(models, [0.5, 0.5])
    expected |= {"optimizer/vars/1": models[1]["optimizer/vars/1"]}
    kept = {n: v for n, v in expected.items() if optimizer == "newest" or "optimizer" not in n}
    assert_same(read_model(tmp_path / "o.weights.h5"), kept)
    assert any(note.startswith("2 BatchNorm moving statistics") for note in report.notes)
    names = {Path(file.path).name for file in report.plan.tables[0].files}
    assert names == {"m_0.weights.json", *(f"m_0_0000{k}.weights.h5" for k in range(4))}


def changed(path: Path, weight_map: Any) -> None:
    """Replace the map of a sharded save."""
    path.write_text(json.dumps({"weight_map": weight_map}) + " " * 9 + "\n")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (
            {"/d/vars": "../m_00000.weights.h5"},
            r"names the shard '\.\./m_00000.*in the same folder",
        ),
        ({"/d/vars": "/etc/x.weights.h5"}, "names the shard '/etc/x.weights.h5'"),
        ({"/d/vars": "/etc/passwd"}, "names the shard '/etc/passwd'.*in the same folder"),
        ({"/d/vars": "../other/x.h5"}, r"names the shard '\.\./other/x.h5'.*in the same folder"),
        ({"/d/vars": "gone.weights.h5"}, "its shard gone.weights.h5 cannot be read"),
        (
            {"/d/vars": "link.weights.h5"},
            "its shard link.weights.h5 is a link or not a regular file",
        ),
        (
            {"/d/vars": "pipe.weights.h5"},
            "its shard pipe.weights.h5 is a link or not a regular file",
        ),
        ({"/d/vars": "m_00002.weights.h5"}, "m_00002.weights.h5: has no tensor in '/d/vars'"),
        ({"/d/vars": [7], "": "x.weights.h5"}, "the weight_map of '/d/vars' is neither the name"),
        ([".weights.h5"], "is damaged: it has no weight_map"),
        ({"/d/vars": ["m_00000.weights.h5", "twin.weights.h5"]}, "two of its shards hold tensor"),
    ],
)
def test_hostile_maps_are_refused(tmp_path: Path, weight_map: Any, message: str) -> None:
    """What is no bare name of a regular file beside it, or holds something else."""
    path = write_shards(tmp_path / "m.weights.json", SHARDS)
    (tmp_path / "link.weights.h5").symlink_to(tmp_path / "m_00000.weights.h5")
    os.mkfifo(tmp_path / "pipe.weights.h5")
    (tmp_path / "twin.weights.h5").write_bytes((tmp_path / "m_00000.weights.h5").read_bytes())
    changed(path, weight_map)
    with pytest.raises(FormatError, match=message):
        average([path], tmp_path / "o.weights.h5")
    assert not (tmp_path / "o.weights.h5").exists()


def test_a_truncated_shard_is_refused(tmp_path: Path) -> None:
    """By its own name."""
    path = write_shards(tmp_path / "m.weights.json", SHARDS)
    shard = tmp_path / "m_00001.weights.h5"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(FormatError, match=r"m_00001\.weights\.h5: is truncated"):
        average([path], tmp_path / "o.weights.h5")


def test_a_shard_is_not_replaced_by_the_output(tmp_path: Path) -> None:
    """Not even with --force: it is an input."""
    path = write_shards(tmp_path / "m.weights.json", SHARDS)
    with pytest.raises(OutputError, match=r"is the checkpoint .*m_00001\.weights\.h5 itself"):
        average([path], tmp_path / "m_00001.weights.h5", force=True)


def test_numbered_weights_without_a_map_are_checkpoints(tmp_path: Path) -> None:
    """Five digits alone do not make a file a shard."""
    for k in (1, 2):
        write_weights(tmp_path / f"epoch_0000{k}.weights.h5", {"d/vars/0": HALF})
    assert [c.epoch for c in plan(tmp_path).checkpoints] == [1, 2]


# --- names ----------------------------------------------------------------------------------------


def test_ema_slots_are_matched_by_the_paths_of_variables() -> None:
    """As Keras 3 and tf_keras call them; a slot may fit no tensor, or two."""
    paths = {"a": "m/d/kernel", "b": "m/d/bias:0", "c": "m/d_bias"}
    state = [
        "/optimizer_weights/sgd/m_d_kernel_average",
        "/optimizer_weights/sgd/m_d_kernel_momentum",
        "/optimizer_weights/SGD/average/m/d/bias:0",
        "/optimizer_weights/sgd/gone_average",
        "/optimizer_weights/rmsprop/m_d_kernel_average_gradient",
    ]
    assert keras_names.find_slots(paths, state) == {
        state[0]: ["a"],
        state[2]: ["b", "c"],
        state[3]: [],
    }

"""--use-ema: what Keras's optimizers keep in place of a model's own tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from polyak_cli import average
from polyak_cli.errors import FormatError, MismatchError
from polyak_cli.formats.keras import emas
from tests.oracle import Array, read_model, write_model

SLOTS = {"sgd/m_d_kernel_average": "m/d/kernel", "sgd/m_d_bias_average": "m/d/bias"}


def write_run(folder: Path, **changes: Array | None) -> tuple[list[Path], list[dict[str, Array]]]:
    """Write two models with EMA slots; return them and the slots of each.

    Args:
        folder: where.
        **changes: slots of the first model that are others, or none.
    """
    rng = np.random.default_rng(0)
    paths, slots = [], []
    for k in range(2):
        values = {n: rng.normal(size=s).astype("f4") for n, s in (("kernel", (3, 4)), ("bias", 4))}
        slot: dict[str, Any] = {n: rng.normal(size=values[n[8:-8]].shape) for n in SLOTS}
        state = {n: v.astype("f4") for n, v in slot.items()} | {"sgd/iteration": np.array(k)}
        if k == 0:
            state = {n: v for n, v in (state | changes).items() if v is not None}
        layers = {
            "d": {f"m/d/{name}": array for name, array in values.items()},
            "n": {"m/n/moving_mean": np.full(4, k, "f4")},
        }
        paths.append(write_model(folder / f"m_{k}.h5", layers, optimizer=state))
        slots.append(state)
    return paths, slots


def test_the_slots_are_averaged_in_place_of_the_tensors(tmp_path: Path) -> None:
    """What has no slot keeps its own values and is named; the record says what was taken."""
    paths, slots = write_run(tmp_path)
    report = average(paths, tmp_path / "o.h5", use_ema=True)
    found = read_model(tmp_path / "o.h5")
    assert not [name for name in found if name.startswith("optimizer_weights")]
    for slot, path in SLOTS.items():
        mean = (0.5 * slots[0][slot].astype("f8") + 0.5 * slots[1][slot].astype("f8")).astype("f4")
        assert found[f"model_weights/d/{path}"].tobytes() == mean.tobytes()
    assert found["model_weights/n/m/n/moving_mean"].tolist() == [0.5] * 4
    assert any("1 float tensor has no EMA" in note for note in report.notes)
    with h5py.File(tmp_path / "o.h5") as file:
        assert '"use_ema":true' in file.attrs["polyak_provenance"]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_one_checkpoint_gives_its_ema(tmp_path: Path, dtype: str) -> None:
    """In the type that was asked for."""
    paths, slots = write_run(tmp_path)
    average(paths[1:], tmp_path / "o.h5", use_ema=True, dtype=dtype)
    found = read_model(tmp_path / "o.h5")
    for slot, path in SLOTS.items():
        expected = slots[1][slot].astype(dtype)
        assert found[f"model_weights/d/{path}"].tobytes() == expected.tobytes()


KERNEL, BIAS = SLOTS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({KERNEL: None, BIAS: None}, r"m_0\.h5: has no EMA slots .*use_ema=True"),
        ({BIAS: None}, r"m_0\.h5 and .*m_1\.h5: only one of the two .* 'd/m/d/bias'"),
        ({"sgd/gone_average": np.ones(3, "f4")}, r"m_0\.h5: .*gone_average' fits 0 tensors"),
        ({f"b/{BIAS}": np.ones(4, "f4")}, r"m_0\.h5: .* fits a tensor that has another"),
        ({BIAS: np.ones(3, "f4")}, r"m_0\.h5: .*m_d_bias_average' has shape \(3,\)"),
        ({BIAS: np.ones(4, "f8")}, r"m_0\.h5: .*m_d_bias_average' has .* dtype float64"),
    ],
)
def test_slots_that_cannot_be_taken_are_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """None, of other tensors than the newest's, of nothing, of another shape or type."""
    paths, _ = write_run(tmp_path, **changes)
    with pytest.raises(MismatchError, match=message):
        average(paths, tmp_path / "o.h5", use_ema=True)


def test_a_slot_that_was_never_written_is_refused(tmp_path: Path) -> None:
    """HDF5 would read it as zeros."""
    paths, _ = write_run(tmp_path, **{BIAS: None})
    with h5py.File(paths[0], "r+") as file:
        file["optimizer_weights"].create_dataset(BIAS, (4,), "f4")
    with pytest.raises(MismatchError, match=r"m_d_bias_average' was never written"):
        average(paths, tmp_path / "o.h5", use_ema=True)


def test_a_weights_file_says_why_it_cannot(tmp_path: Path) -> None:
    """Its optimizer's variables have numbers, not names."""
    path = tmp_path / "m.weights.h5"
    with h5py.File(path, "w") as file:
        file["d/vars/0"] = file["optimizer/vars/2"] = np.ones(3, "f4")
    with pytest.raises(MismatchError, match=r"numbers the optimizer's variables"):
        average([path], tmp_path / "o.weights.h5", use_ema=True)


def configuration(**settings: Any) -> dict[str, Any]:
    """Return what an archive says of two dense layers of one shape and their optimizer.

    Args:
        **settings: of the optimizer, with its class_name, or the layers' class, module or names.
    """
    names = settings.pop("names", ("b", "a"))
    kind = {"class_name": settings.pop("layer", "Dense"), "module": settings.pop("of", "keras.x")}
    layers = [kind | {"config": {"name": name, "trainable": True}} for name in names]
    chosen = {"use_ema": True, "learning_rate": 0.1, "momentum": 0.0} | settings
    name = chosen.pop("class_name", "SGD")
    optimizer = {"class_name": name, "module": "keras.optimizers", "config": chosen}
    model = {"class_name": "Sequential", "module": "keras", "config": {"layers": layers}}
    return model | {"compile_config": {"optimizer": optimizer}}


def test_slots_without_the_optimizers_name_are_found(tmp_path: Path) -> None:
    """As tf_keras writes them under mixed precision, even for a layer that is called "average"."""
    rng = np.random.default_rng(1)
    paths, kept = [], []
    for k in range(2):
        own = {n: rng.normal(size=3).astype("f4") for n in ("d/kernel:0", "average/kernel:0")}
        slots = {f"average/{n}": rng.normal(size=3).astype("f4") for n in own}
        moments = {f"m/{n}": rng.normal(size=3).astype("f4") for n in own}
        layers = {n.partition("/")[0]: {n: values} for n, values in own.items()}
        state = {"iteration:0": np.array(k), **slots, **moments}
        paths.append(write_model(tmp_path / f"m_{k}.h5", layers, optimizer=state))
        kept.append(slots)
    average(paths, tmp_path / "o.h5", use_ema=True)
    found = read_model(tmp_path / "o.h5")
    for name in ("d/kernel:0", "average/kernel:0"):
        mean = np.mean([one[f"average/{name}"].astype("f8") for one in kept], axis=0).astype("f4")
        layer = name.partition("/")[0]
        assert found[f"model_weights/{layer}/{name}"].tobytes() == mean.tobytes()


def test_an_optimizer_without_description_is_named() -> None:
    """Keras drops it from the configuration of a .keras that is saved after a .h5."""
    said = configuration() | {"compile_config": {"loss": "mean_squared_error"}}
    with pytest.raises(FormatError, match=r"saved as \.h5 before: use those \.h5 files"):
        emas.find_slots(said, OWN, STATE, LABELS)


def test_tf_keras_saves_no_learning_rate() -> None:
    """Its EMAs begin one place earlier."""
    moved = {f"/optimizer/vars/{k}": shape for k, shape in enumerate([*STATE.values()][1:])}
    found = emas.find_slots(configuration(), OWN, moved, {}, "2.21.0")
    assert found == dict(zip([*moved][1:], ([place] for place in OWN), strict=True))


OWN = {f"/layers/dense{k}/vars/{n}": [3, 3][n:] for k in ("", "_1") for n in (0, 1)}
STATE = {f"/optimizer/vars/{k}": [[], [], [3, 3], [3], [3, 3], [3]][k] for k in range(6)}
LABELS = {"/layers/dense/vars": "b", "/layers/dense_1/vars": "a"}


def test_the_slots_of_an_archive_follow_its_configuration() -> None:
    """By the order of the layers there, whatever they are called; a schedule is no variable."""
    expected = dict(zip([*STATE][2:], ([place] for place in OWN), strict=True))
    assert emas.find_slots(configuration(), OWN, STATE, LABELS) == expected
    assert emas.find_slots(configuration(), OWN, STATE, {}) == expected  # of an older Keras
    said = configuration(learning_rate={"class_name": "ExponentialDecay"})
    moved = {f"/optimizer/vars/{k}": shape for k, shape in enumerate([*STATE.values()][1:])}
    found = emas.find_slots(said, OWN, moved, LABELS)
    assert [*found.values()] == [*expected.values()]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_ema": False}, "not trained with use_ema=True"),
        ({"class_name": "Mine"}, "optimizer Mine is unknown"),
        ({"class_name": ["SGD"]}, "optimizer .* is unknown"),
        ({"momentum": 0.9, "amsgrad": True}, "has 6 variables; expected 2 and 3 for each"),
        ({"momentum": 0.9}, "EMAs .* .2 tensors. do not match .* .4.$"),
        ({"names": "bac"}, None),
        ({"names": "b"}, "EMAs .* .4 tensors. do not match .* .2.$"),
        ({"names": "ab"}, "'/layers/dense' does not belong to the layer"),
        ({"of": "mine"}, "'Dense' is unknown"),
        ({"layer": ["Dense"]}, "a layer without a class"),
    ],
)
def test_what_a_configuration_does_not_tell_is_refused(
    settings: dict[str, Any], message: str | None
) -> None:
    """Rather than to take one tensor's EMA for another's; layers without tensors do not matter."""
    if message is None:
        assert len(emas.find_slots(configuration(**settings), OWN, STATE, LABELS)) == 4
        return
    with pytest.raises(FormatError, match=message):
        emas.find_slots(configuration(**settings), OWN, STATE, LABELS)


@pytest.mark.parametrize("said", [{}, {"compile_config": 3}, {"compile_config": {"optimizer": []}}])
def test_a_configuration_of_any_kind_is_read(said: dict[str, Any]) -> None:
    """It may be a stranger's."""
    with pytest.raises(FormatError, match=r"use_ema=True|does not describe the optimizer"):
        emas.find_slots(said, OWN, STATE, LABELS)

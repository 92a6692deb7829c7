"""TensorFlow's checkpoints: TensorFlow writes them, and takes their average back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from polyak_cli import average, plan
from polyak_cli.errors import UsageError
from tests.contract import Contract, Tensors, another_layout, assert_same, naive

V1 = tf.compat.v1
ROWS = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
LABELS = ROWS[:, :2].copy()


def save(prefix: Path, tensors: Tensors) -> None:
    """Write a bundle of plain names."""
    names = list(tensors)
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=names,
        shape_and_slices=[""] * len(names),
        tensors=[tf.constant(tensors[name]) for name in names],
    )


def load(path: Path) -> dict[str, Any]:
    """Return all tensors of a checkpoint; TensorFlow compares their checksums."""
    prefix = path.with_suffix("")
    # What TensorFlow takes for a folder of checkpoints, where there is one, it looks through.
    open_it = V1.train.NewCheckpointReader if prefix.is_dir() else tf.train.load_checkpoint
    reader = open_it(str(prefix))
    names = sorted(reader.get_variable_to_shape_map())
    return {name: np.asarray(reader.get_tensor(name)) for name in names}


class TestPlain(Contract):
    """Written by the operation that all of TensorFlow's savers use."""

    suffix = ".index"
    converts = False

    def write(self, path: Path, tensors: Tensors) -> None:
        """See `Contract.write`."""
        save(path.with_suffix(""), tensors)

    def read(self, path: Path) -> Tensors:
        """See `Contract.read`."""
        return load(path)


@another_layout
@pytest.mark.slow
class TestSharded(TestPlain):
    """The same in three shards."""

    def write(self, path: Path, tensors: Tensors) -> None:
        """See `Contract.write`."""
        parts = [path.with_name(f".{path.stem}-part{k}") for k in range(3)]
        for k, part in enumerate(parts):
            save(part, {name: tensors[name] for name in list(tensors)[k::3]})
        tf.raw_ops.MergeV2Checkpoints(
            checkpoint_prefixes=[str(part) for part in parts],
            destination_prefix=str(path.with_suffix("")),
            delete_old_dirs=False,
        )


def test_types_are_kept_and_what_is_no_float_is_carried(tmp_path: Path) -> None:
    """Averages bfloat16; strings, bools and what is empty come from the newest."""
    (tmp_path / "run").mkdir()
    models = []
    for k in range(2):
        rng = np.random.default_rng(k)
        brain = tf.cast(rng.normal(size=1000), tf.bfloat16)
        models.append(
            {
                "brain": brain.numpy(),
                "empty": np.zeros((0, 3), np.float32),
                "flags": np.array([True, False]),
                "long": np.array([b"", b"x" * 300, b"one"], object),
            }
        )
        save(tmp_path / f"run/m-{k}", models[-1])
    average(tmp_path / "run", tmp_path / "o.index")
    found = load(tmp_path / "o.index")
    total = (models[0]["brain"].astype(np.float64) + models[1]["brain"].astype(np.float64)) / 2
    # A bfloat16 is the first half of a float32, which holds this mean exactly.
    assert np.array_equal(total, total.astype(np.float32))
    bits = total.astype(np.float32).view(np.uint32)
    expected = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    assert np.array_equal(found.pop("brain").view(np.uint16), expected)
    del models[-1]["brain"]
    assert found.pop("long").tolist() == models[-1].pop("long").tolist()
    assert_same(found, models[-1])


def test_float8_is_averaged(tmp_path: Path) -> None:
    """In its own type, like any other float."""
    names = ("float8_e4m3fn", "float8_e5m2")
    for k in range(2):
        values = np.random.default_rng(k).normal(size=50)
        save(tmp_path / f"m-{k}", {name: values.astype(name) for name in names})
    average(tmp_path, tmp_path / "o.index")
    found, one, other = (load(tmp_path / f"{name}.index") for name in ("o", "m-0", "m-1"))
    for name in names:
        # The mean of two such values is exact in float32.
        mean = (one[name].astype(np.float32) + other[name].astype(np.float32)) / 2
        assert found[name].tobytes() == mean.astype(name).tobytes()


def test_another_type_is_refused(tmp_path: Path) -> None:
    """TensorFlow restores a variable from its own type only."""
    save(tmp_path / "m-1", {"x": np.ones(3, np.float32)})
    with pytest.raises(UsageError, match=r"--dtype float16: .*keeps its types.*'x'"):
        plan([tmp_path / "m-1"], tmp_path / "o.index", dtype="float16")


def keras_model(framework: Any, optimizer: Any) -> Any:
    """Return a small model with all kinds of variables, trained a little."""
    model = framework.Sequential(
        [
            framework.layers.Input((4,)) if framework is not keras else keras.Input((4,)),
            framework.layers.Dense(3),
            framework.layers.BatchNormalization(),
            framework.layers.Dense(2),
        ]
    )
    model.compile(optimizer, "mse", metrics=["mae"], run_eagerly=True)
    return model


def train(model: Any, save_epoch: Callable[[int], Any]) -> list[list[Any]]:
    """Train three epochs, saving each; return the weights of each."""
    weights = []
    for epoch in range(1, 4):
        model.fit(ROWS, LABELS, verbose=0)
        save_epoch(epoch)
        weights.append(model.get_weights())
    return weights


def expect_average(model: Any, weights: list[list[Any]]) -> None:
    """Compare a model's weights with the mean of others, bit for bit."""
    columns = [dict(enumerate(row)) for row in weights]
    expected: Any = naive(columns, [1] * 3)  # type: ignore[arg-type] # keys are numbers
    assert_same(dict(enumerate(model.get_weights())), expected)  # type: ignore[arg-type] # as above


@pytest.mark.parametrize("names", [("model", "optimizer"), ("net", "opt")])
def test_keras_3_restores_the_average(tmp_path: Path, names: tuple[str, str]) -> None:
    """Every variable is consumed; the model has the mean, the optimizer the newest's state.

    TensorFlow stores the kernels below the optimizer there, by `_trainable_variables`.
    """
    model = keras_model(keras, keras.optimizers.Adam())
    checkpoint = tf.train.Checkpoint(**dict(zip(names, (model, model.optimizer), strict=True)))
    weights = train(model, lambda _: checkpoint.save(str(tmp_path / "run/ckpt")))
    state = [np.asarray(variable) for variable in model.optimizer.variables]
    report = average(tmp_path / "run", tmp_path / "final.index")
    assert [p.reason for p in report.plan.passed_over] == ["TensorFlow's list of checkpoints"]
    assert not report.plan.dropped
    assert f"{names[1]}/_variables/2" in report.plan.carried
    assert f"{names[1]}/_trainable_variables/0" in report.plan.averaged
    assert any("optimizer state is that of the newest checkpoint" in note for note in report.notes)
    model.fit(ROWS, LABELS, verbose=0)
    checkpoint.restore(str(tmp_path / "final")).assert_consumed()
    expect_average(model, weights)
    for variable, values in zip(model.optimizer.variables, state, strict=True):
        np.testing.assert_array_equal(np.asarray(variable), values)


@pytest.mark.parametrize("legacy", [False, True])
def test_tf_keras_loads_the_average_of_its_weights(tmp_path: Path, legacy: bool) -> None:
    """Of `save_weights`, as `ModelCheckpoint('cp-{epoch:04d}.ckpt')` does."""
    import tf_keras

    optimizers = tf_keras.optimizers
    model = keras_model(tf_keras, (optimizers.legacy if legacy else optimizers).Adam())
    weights = train(model, lambda epoch: model.save_weights(tmp_path / f"run/cp-{epoch:04d}.ckpt"))
    report = average(tmp_path / "run", tmp_path / "final.ckpt.index")
    assert [checkpoint.epoch for checkpoint in report.plan.checkpoints] == [1, 2, 3]
    assert len(report.plan.averaged) == len(weights[0])
    model.fit(ROWS, LABELS, verbose=0)
    model.load_weights(tmp_path / "final.ckpt").assert_consumed()
    expect_average(model, weights)


def test_the_saver_of_tensorflow_1_restores_the_average(tmp_path: Path) -> None:
    """Names, slots and partitioned variables; slots are the newest's."""
    with tf.Graph().as_default(), V1.Session() as session:
        tf.random.set_seed(0)  # another test may have asked for determinism
        kernel = V1.get_variable("dense/kernel", (3, 2))
        split = V1.get_variable("part/w", (70, 4), partitioner=V1.fixed_size_partitioner(2))
        step = V1.train.get_or_create_global_step()
        loss = tf.reduce_sum((kernel - 1) ** 2) + tf.reduce_sum(
            (tf.convert_to_tensor(split) + 1) ** 2
        )
        training = V1.train.AdamOptimizer(0.1).minimize(loss, global_step=step)
        saver = V1.train.Saver(max_to_keep=None)
        session.run(V1.global_variables_initializer())
        models = []
        for _ in range(3):
            session.run(training)
            prefix = saver.save(session, str(tmp_path / "run/model.ckpt"), global_step=step)
            models.append(load(Path(f"{prefix}.index")))
        session.run(training)
        report = average(tmp_path / "run", tmp_path / "final.index")
        assert set(report.plan.averaged) == {
            "dense/kernel",
            "part/w[0:35, 0:4]",
            "part/w[35:70, 0:4]",
        }
        saver.restore(session, str(tmp_path / "final"))
        restored = session.run([kernel, tf.convert_to_tensor(split), step])
    mean = naive(models, [1] * 3)
    expected = models[-1] | {name: mean[name] for name in ("dense/kernel", "part/w")}
    assert_same(load(tmp_path / "final.index"), expected)
    for name, values in zip(("dense/kernel", "part/w", "global_step"), restored, strict=True):
        np.testing.assert_array_equal(values, expected[name])


def test_shadows_are_averaged_or_chosen(tmp_path: Path) -> None:
    """TensorFlow 1's ExponentialMovingAverage: each by itself, or its means in both places."""
    ending = "/ExponentialMovingAverage"
    with tf.Graph().as_default(), V1.Session() as session:
        weights = V1.get_variable("dense/w", [3, 2])
        shadows = tf.train.ExponentialMovingAverage(0.9)
        apply = shadows.apply([weights])
        step = weights.assign_add(V1.random_normal([3, 2], seed=1))
        session.run(V1.global_variables_initializer())
        saver = V1.train.Saver(max_to_keep=None)
        for k in (1, 2):
            session.run(step)
            session.run(apply)
            saver.save(session, str(tmp_path / "run" / "m"), global_step=k, write_meta_graph=False)
    saved = [load(tmp_path / "run" / f"m-{k}.index") for k in (1, 2)]
    assert not np.array_equal(saved[1]["dense/w"], saved[1][f"dense/w{ending}"])
    report = average(tmp_path / "run", tmp_path / "raw.index")
    assert_same(load(tmp_path / "raw.index"), naive(saved, [1, 1]))
    assert any(f"'*{ending}' is a running mean" in note for note in report.notes)
    average(tmp_path / "run", tmp_path / "ema.index", use_ema=True)
    wanted = naive(saved, [1, 1])
    wanted["dense/w"] = wanted[f"dense/w{ending}"]
    assert_same(load(tmp_path / "ema.index"), wanted)

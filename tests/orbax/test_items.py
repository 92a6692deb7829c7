"""Steps of several items, as `CheckpointManager` and Orbax's newer interface save them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint import v1
from safetensors.numpy import load_file

from polyak_cli import average, plan, verify
from polyak_cli.errors import FormatError, MismatchError
from tests.contract import Tensors, assert_same, naive
from tests.oracle import Array
from tests.orbax.test_orbax import load, save, shard


def make_models(count: int = 3, seed: int = 0) -> list[Tensors]:
    """Return the weights of a small model at several steps."""
    rng = np.random.default_rng(seed)
    return [
        {"w": rng.normal(5, size=(30, 20)).astype("f4"), "b": rng.normal(5, size=3).astype("f4")}
        for _ in range(count)
    ]


def as_numpy(tree: Any) -> dict[str, Array]:
    """Return a flat tree with arrays of numpy."""
    return {name: np.asarray(values) for name, values in tree.items()}


def save_items(run: Path, models: list[Tensors], emas: list[Tensors] | None = None) -> None:
    """Save steps of a model, its optimizer, and something that is no tree."""
    names = ("model", "optimizer", "meta", *(["ema"] if emas else []))
    with ocp.CheckpointManager(run, item_names=names) as manager:
        for k, model in enumerate(models):
            trees = {"model": model, "optimizer": {"mu": model["w"] * 2}}
            trees |= {"ema": emas[k]} if emas else {}
            items = {name: ocp.args.StandardSave(dict(tree)) for name, tree in trees.items()}
            args = ocp.args.Composite(**items, meta=ocp.args.JsonSave({"a": k}))
            manager.save(10 * k, args=args)
        manager.wait_until_finished()


def restore(folder: Path, *names: str) -> Any:
    """Load items of a step with Orbax, from a run that has nothing else."""
    run = folder.parent / f"{folder.name}_run"
    shutil.copytree(folder, run / "7")
    with ocp.CheckpointManager(run, item_names=names) as manager:
        args = {
            name: ocp.args.JsonRestore() if name == "meta" else ocp.args.StandardRestore()
            for name in names
        }
        return manager.restore(7, args=ocp.args.Composite(**args))


def test_the_one_model_of_a_step_is_averaged(tmp_path: Path) -> None:
    """Other items than trees are copied, and an optimizer's is not; Orbax restores the step."""
    models = make_models()
    save_items(tmp_path / "run", models)
    report = average(tmp_path / "run", tmp_path / "o", verify=True)
    assert [one.path.name for one in report.plan.checkpoints] == ["0", "10", "20"]
    files = report.plan.files
    assert files
    assert ("optimizer/", "training state") in [tuple(one) for one in files.left_out]
    found = restore(tmp_path / "o", "model", "meta")
    assert_same(as_numpy(found.model), naive(models, [1, 1, 1]))
    assert found.meta == {"a": 2}
    # All that the step's list names is there.
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        said = checkpointer.metadata(tmp_path / "o").item_metadata
    assert sorted(said.keys()) == ["meta", "model"]
    assert verify(tmp_path / "o", sources=[tmp_path / "run"]).problems == ()
    assert not verify(tmp_path / "o").problems


def test_a_key_chooses_the_item(tmp_path: Path) -> None:
    """Without it, one error names the items; with it, the others are not copied."""
    models, emas = make_models(), make_models(seed=1)
    save_items(tmp_path / "run", models, emas)
    with pytest.raises(
        FormatError, match=r"the items 'ema', 'model', 'optimizer'; choose .* --key"
    ):
        plan(tmp_path / "run", tmp_path / "o")
    for key, trees in (("model", models), ("ema", emas)):
        output = tmp_path / f"o_{key}"
        report = average(tmp_path / "run", output, key=key, verify=True)
        assert any("may be in them" in note for note in report.plan.notes)
        assert_same(as_numpy(restore(output, key)[key]), naive(trees, [1, 1, 1]))
        assert verify(output, sources=[tmp_path / "run"]).problems == ()
    average(tmp_path / "run", tmp_path / "o.safetensors", key="ema/w")
    assert_same(load_file(tmp_path / "o.safetensors"), {"w": naive(emas, [1, 1, 1])["w"]})
    with pytest.raises(FormatError, match=r"no 'x' that --key could choose; expected .*'b', 'w'"):
        plan(tmp_path / "run", tmp_path / "o", key="ema/x")


def test_only_weights_are_found_again(tmp_path: Path) -> None:
    """The list of items is written in any case, so the folder is one checkpoint still."""
    models = make_models()
    save_items(tmp_path / "run", models)
    average(tmp_path / "run", tmp_path / "o", only_weights=True)
    assert not (tmp_path / "o/meta").exists()
    assert verify(tmp_path / "o", sources=[tmp_path / "run"]).problems == ()
    average([tmp_path / "o"], tmp_path / "p")
    assert_same(as_numpy(restore(tmp_path / "p", "model").model), naive(models, [1, 1, 1]))


def test_a_key_chooses_a_part_of_the_tree(tmp_path: Path) -> None:
    """The rest of the tree is the newest's, or is left out of another format."""
    models, emas = make_models(), make_models(seed=1)
    for k in range(3):
        tree = {"params": dict(models[k]), "ema_params": dict(emas[k]), "step": k}
        save(tmp_path / f"run/{k}", tree)
    average(tmp_path / "run", tmp_path / "o", key="ema_params", verify=True)
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(tmp_path / "o")
    assert_same(as_numpy(found["ema_params"]), naive(emas, [1, 1, 1]))
    assert_same(as_numpy(found["params"]), models[-1])
    average(tmp_path / "run", tmp_path / "o.safetensors", key="ema_params")
    expected = {f"ema_params.{name}": values for name, values in naive(emas, [1, 1, 1]).items()}
    assert_same(load_file(tmp_path / "o.safetensors"), expected)


def test_what_was_not_finished_is_passed_over(tmp_path: Path) -> None:
    """A killed save leaves a folder of Orbax's own naming, with the same files in it."""
    models = make_models()
    save_items(tmp_path / "run", models)
    shutil.copytree(tmp_path / "run/20", tmp_path / "run/30.orbax-checkpoint-tmp-1719")
    shutil.copytree(tmp_path / "run/20", tmp_path / "run/40.orbax-checkpoint-tmp")
    for sources in ("run", "run/*", "run/*/model"):
        done = plan([tmp_path / sources])
        assert len(done.checkpoints) == 3
        assert len([one for one in done.passed_over if "(of Orbax)" in one.reason]) == 2


def test_a_step_by_itself_is_one_checkpoint(tmp_path: Path) -> None:
    """Its items are no checkpoints of a run, also where they are given by themselves."""
    models = make_models()
    save_items(tmp_path / "run", models)
    steps = [str(tmp_path / f"run/{10 * k}") for k in range(3)]
    average(steps, tmp_path / "o")
    average([f"{step}/model" for step in steps], tmp_path / "p")
    for output in ("o", "p"):
        found = restore(tmp_path / output, "model").model
        assert_same(as_numpy(found), naive(models, [1, 1, 1]))


def test_steps_with_a_prefix_and_metrics(tmp_path: Path) -> None:
    """As `CheckpointManagerOptions` name them; the newest's metrics are copied with it."""
    models = make_models()
    options = ocp.CheckpointManagerOptions(
        step_prefix="ckpt", step_format_fixed_length=8, best_fn=lambda said: said["loss"]
    )
    with ocp.CheckpointManager(tmp_path / "run", options=options) as manager:
        for k, model in enumerate(models):
            args = ocp.args.StandardSave(dict(model))
            manager.save(2 + 4 * k, args=args, metrics={"loss": 1 / (k + 1)})
        manager.wait_until_finished()
    report = average(tmp_path / "run", tmp_path / "o", verify=True)
    names = [one.path.name for one in report.plan.checkpoints]
    assert names == ["ckpt_00000002", "ckpt_00000006", "ckpt_00000010"]
    assert_same(as_numpy(restore(tmp_path / "o", "default").default), naive(models, [1, 1, 1]))


def test_orbax_new_interface(tmp_path: Path) -> None:
    """`v1.save_pytree` and `v1.training.Checkpointer` write steps that v1 loads averaged."""
    models = make_models()
    for k, model in enumerate(models):
        v1.save_pytree(tmp_path / f"run/{k}", dict(model))
    with v1.training.Checkpointer(tmp_path / "other") as checkpointer:
        for k, model in enumerate(models):
            checkpointer.save_checkpointables(k, {"model": dict(model), "opt": {"mu": model["w"]}})
    average(tmp_path / "run", tmp_path / "o", verify=True)
    assert_same(as_numpy(v1.load_pytree(tmp_path / "o")), naive(models, [1, 1, 1]))
    average(tmp_path / "other", tmp_path / "p", verify=True)
    found = v1.load_checkpointables(tmp_path / "p")
    assert list(found) == ["model"]
    assert_same(as_numpy(found["model"]), naive(models, [1, 1, 1]))


def save_emas(run: Path, *names: str) -> dict[str, list[Tensors]]:
    """Save a run of which each tree has running means beside the weights, as JAX's trainers do."""
    rng = np.random.default_rng(2)
    base = rng.normal(5, size=(30, 20))
    trees: dict[str, list[Tensors]] = {name: [] for name in ("params", *names)}
    for k in range(3):
        for models in trees.values():
            values = base + rng.normal(scale=0.01, size=base.shape)
            models.append({"kernel": values.astype("f4"), "bias": values[0].astype("f4")})
        tree = {name: {"dense": dict(models[k])} for name, models in trees.items()}
        statistics = {"dense": {"mean": base[0].astype("f4")}}
        optimizer = {"mu": {"dense": dict(trees["params"][k])}}
        save(run / f"{k}", {**tree, "batch_stats": statistics, "opt_state": optimizer, "step": k})
    return trees


@pytest.mark.parametrize("use_ema", [False, True])
def test_running_means_in_a_tree_are_recognised(tmp_path: Path, use_ema: bool) -> None:
    """A note says so, and the average of the one that was asked for is in both places."""
    trees = save_emas(tmp_path / "run", "ema_params")
    report = average(tmp_path / "run", tmp_path / "o", use_ema=use_ema, verify=True)
    said = "are averaged (--use-ema)" if use_ema else "the raw weights are averaged"
    text = "'ema_params.*' is a running mean of the raw weights 'params.*': the "
    assert any(note.startswith(text) and said in note for note in report.notes)
    expected = naive(trees["ema_params" if use_ema else "params"], [1, 1, 1])
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(tmp_path / "o")
    for part in ("params", "ema_params"):
        assert_same(as_numpy(found[part]["dense"]), expected)


@pytest.mark.parametrize("use_ema", [False, True])
def test_running_means_of_another_type_and_division(tmp_path: Path, use_ema: bool) -> None:
    """Weights are bfloat16 on four devices, running means whole in float32; each keeps its type."""
    rng = np.random.default_rng(3)
    base = rng.normal(5, size=(64, 32))
    trees = []
    for k in range(3):
        raw, mean = (base + rng.normal(scale=0.01, size=base.shape) for _ in "ab")
        weights = jnp.asarray(raw, jnp.bfloat16)
        trees.append({"params": {"w": weights}, "ema_params": {"w": mean.astype("f4")}})
        save(tmp_path / f"run/{k}", {**trees[k], "params": {"w": shard(weights, "a", "b")}})
    average(tmp_path / "run", tmp_path / "o", use_ema=use_ema, verify=True)
    source = "ema_params" if use_ema else "params"
    total = np.sum([np.asarray(tree[source]["w"]).astype("f8") for tree in trees], axis=0)
    found = load(tmp_path / "o")
    for part, dtype in (("params", jnp.bfloat16), ("ema_params", np.float32)):
        assert found[part]["w"].tobytes() == (total / 3).astype(dtype).tobytes()


def test_a_part_that_is_a_running_mean_is_one_for_use_ema(tmp_path: Path) -> None:
    """--use-ema --key ema_params averages that part, and says so; the weights stay the newest's."""
    trees = save_emas(tmp_path / "run", "ema_params")
    report = average(tmp_path / "run", tmp_path / "o", use_ema=True, key="ema_params")
    assert any("'ema_params' (--key) holds running means" in note for note in report.notes)
    found = load(tmp_path / "o")
    assert_same(found["ema_params"]["dense"], naive(trees["ema_params"], [1, 1, 1]))
    assert_same(found["params"]["dense"], trees["params"][-1])


def test_two_running_means_are_both_named(tmp_path: Path) -> None:
    """Which one --use-ema shall take is not guessed; leaving one out decides it."""
    trees = save_emas(tmp_path / "run", "ema_params", "params_ema")
    named = r"'ema_params\.\*' and 'params_ema\.\*' are both running means .*--exclude-tensors"
    with pytest.raises(MismatchError, match=named):
        plan(tmp_path / "run", use_ema=True)
    average(tmp_path / "run", tmp_path / "o", use_ema=True, exclude_tensors=["params_ema.*"])
    found = load(tmp_path / "o")
    assert_same(found["params"]["dense"], naive(trees["ema_params"], [1, 1, 1]))
    assert_same(found["params_ema"]["dense"], trees["params_ema"][-1])


@pytest.mark.parametrize(
    ("parts", "key", "advice"),
    [
        (("params", "slow"), "", r"\(keys of its tree: params, slow\);.* with --key NAME, without"),
        (("params", "ema"), "params", r"take in 'params' .* with --key ema, without --use-ema"),
        (("params", "optimizer_variables"), "", r"Keras keeps its own in 'optimizer_variables'"),
    ],
    ids=["none", "another part", "Keras"],
)
def test_a_tree_without_running_means_names_key(
    tmp_path: Path, parts: tuple[str, ...], key: str, advice: str
) -> None:
    """The error has the tree's keys, and says what to do; Keras is named where it is the writer."""
    save(tmp_path / "m_1", {part: {"w": np.ones(9, "f4")} for part in parts})
    with pytest.raises(MismatchError, match=rf"m_1.*has no running mean .*{advice}"):
        plan([tmp_path / "m_1"], use_ema=True, key=key)

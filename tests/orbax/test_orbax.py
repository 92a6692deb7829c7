"""Checkpoints that Orbax and Keras on JAX write: averaged, and loaded by them again."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, ClassVar

import google_crc32c
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
import zstandard
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from polyak_cli import average, check, formats, inspect, verify
from polyak_cli.errors import FormatError, OutputError, PolyakError
from polyak_cli.formats.format import ScanRequest
from polyak_cli.formats.orbax import ocdbt
from polyak_cli.formats.orbax.checkpoint import OrbaxCheckpoint
from polyak_cli.formats.tensorflow.sstables import encode_varint
from polyak_cli.processes.sandbox import Heartbeat
from tests.command import ROOT
from tests.contract import Contract, Tensors, another_layout, assert_same, naive
from tests.oracle import Array
from tests.test_guide import GUIDE

BEAT = Heartbeat(lambda: None)


def save(folder: Path, tree: Any, **options: bool) -> None:
    """Save a tree with Orbax."""
    shutil.rmtree(folder, ignore_errors=True)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(folder, tree)


def load(folder: Path) -> Any:
    """Load a tree with Orbax, as arrays of numpy."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(folder).item_metadata.tree
        is_leaf = lambda leaf: hasattr(leaf, "sharding")  # noqa: E731 (one word)
        wanted = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree, is_leaf=is_leaf
        )
        return checkpointer.restore(folder, restore_args=wanted)


def shard(values: Array, rows: str | None, columns: str | None) -> jax.Array:
    """Spread a matrix over four devices, two by two."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
    return jax.device_put(values, NamedSharding(mesh, PartitionSpec(rows, columns)))


class TestDefault(Contract):
    """As Orbax writes by default: a database, Zarr's version 2, zstd."""

    suffix = ""
    options: ClassVar[dict[str, bool]] = {}

    @property
    def result(self) -> str:
        """See `Contract.result`; an output must not have a run's name."""
        return "-average"

    def write(self, path: Path, tensors: Tensors) -> None:
        """See `Contract.write`."""
        save(path, dict(tensors), **self.options)

    def read(self, path: Path) -> Tensors:
        """See `Contract.read`."""
        return {name: np.asarray(values) for name, values in load(path).items()}

    @pytest.mark.slow
    def test_a_truncated_file_is_refused_wherever_it_ends(self, tmp_path: Path) -> None:
        """See `Contract`; only what no key leads to may be missing at the end of a data file."""
        paths, models = self.write_run(tmp_path / "run", 2)
        expected, output = naive(models, [1, 1]), tmp_path / "o"
        (table,) = formats.scan([paths[0] / "_METADATA"])
        for part in [Path(file.path) for file in table.files]:
            whole = part.read_bytes()
            refused = 0
            for length in (0, len(whole) // 2, len(whole) - 1):
                part.write_bytes(whole[:length])
                try:
                    average(paths, output)
                except PolyakError as error:
                    assert "model_1" in str(error)  # noqa: PT017 (either may be)
                    refused += 1
                else:
                    assert_same(self.read(output), expected)
                    shutil.rmtree(output)
            part.write_bytes(whole)
            assert refused, part
        assert [path.name for path in tmp_path.iterdir()] == ["run"]


@another_layout
class TestPlain(TestDefault):
    """A folder for each array, in plain bytes."""

    options: ClassVar[dict[str, bool]] = {"use_ocdbt": False, "use_compression": False}


@another_layout
class TestShards(TestDefault):
    """A database, Zarr's version 3 with its shards, zstd, as Keras writes them."""

    options: ClassVar[dict[str, bool]] = {"use_zarr3": True}


@another_layout
class TestPlainShards(TestDefault):
    """A folder for each array, Zarr's version 3, in plain bytes."""

    options: ClassVar[dict[str, bool]] = {
        "use_ocdbt": False,
        "use_zarr3": True,
        "use_compression": False,
    }


@pytest.mark.parametrize("ocdbt", [True, False], ids=["database", "folders"])
@pytest.mark.parametrize("zarr3", [True, False], ids=["zarr3", "zarr2"])
@pytest.mark.parametrize("compression", [True, False], ids=["zstd", "plain"])
def test_sharded_arrays_average_with_whole_ones(
    tmp_path: Path, ocdbt: bool, zarr3: bool, compression: bool
) -> None:
    """Blocks of rows, of columns and of both are put together; the output has the newest's."""
    rng = np.random.default_rng(0)
    models = [{name: rng.normal(5, size=(64, 32)).astype("f4") for name in "xyz"} for _ in range(3)]
    for k, model in enumerate(models):
        tree: Any = dict(model)
        if k:
            places = {"x": ("a", "b"), "y": ("a", None), "z": (None, "b")}
            tree = {name: shard(values, *places[name]) for name, values in model.items()}
        options = {"use_ocdbt": ocdbt, "use_zarr3": zarr3, "use_compression": compression}
        save(tmp_path / f"run/{k}", {"params": tree}, **options)
    average(tmp_path / "run", tmp_path / "o", coefficients=[1, 2, 4], verify=True)
    assert_same(load(tmp_path / "o")["params"], naive(models, [1, 2, 4]))
    average(tmp_path / "run", tmp_path / "o.safetensors", coefficients=[1, 2, 4])
    found = load_file(tmp_path / "o.safetensors")
    assert_same(found, {f"params.{k}": v for k, v in naive(models, [1, 2, 4]).items()})


def test_a_manager_saves_a_run(tmp_path: Path) -> None:
    """Steps are found and ordered as numbers; the newest's optimizer, counts and strings stay."""
    rng = np.random.default_rng(0)
    trees: list[dict[str, Any]] = []
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        for step in (9, 10, 100):
            state = {"w": rng.normal(5, size=(30, 20)).astype("f4")}
            trees.append({"params": state, "opt_state": [{"mu": state["w"] * 2}], "step": step})
            manager.save(step, args=ocp.args.PyTreeSave({**trees[-1], "name": "abc"}))
        manager.wait_until_finished()
    report = average(tmp_path / "run", tmp_path / "out", optimizer="newest")
    assert [one.path.name for one in report.plan.checkpoints] == ["9", "10", "100"]
    shutil.move(tmp_path / "out", tmp_path / "outs/7")
    with ocp.CheckpointManager(tmp_path / "outs") as manager:
        assert manager.latest_step() == 7
        found = manager.restore(7, args=ocp.args.PyTreeRestore())
    expected = naive([tree["params"] for tree in trees], [1, 1, 1])
    assert np.asarray(found["params"]["w"]).tobytes() == expected["w"].tobytes()
    newest = trees[-1]["opt_state"][0]["mu"]
    assert np.asarray(found["opt_state"][0]["mu"]).tobytes() == newest.tobytes()
    assert (found["step"], found["name"]) == (100, "abc")
    assert verify(tmp_path / "outs/7", sources=[tmp_path / "run"]).problems == ()


def test_the_optimizer_can_be_left_out(tmp_path: Path) -> None:
    """--optimizer drop: the tree has no entries of it, and Orbax loads the rest."""
    save(tmp_path / "m_1", {"params": {"w": np.ones(9, "f4")}, "opt_state": {"mu": np.ones(9)}})
    average([tmp_path / "m_1"], tmp_path / "o", optimizer="drop")
    assert list(load(tmp_path / "o")) == ["params"]
    with pytest.raises(OutputError, match="optimizer state cannot be converted"):
        average([tmp_path / "m_1"], tmp_path / "o.npz", optimizer="newest")


def test_keras_opens_the_average(tmp_path: Path) -> None:
    """`load_model` gives a model with the very weights that are set by hand."""
    import keras

    inputs = keras.Input((6,))
    hidden = keras.layers.BatchNormalization()(keras.layers.Dense(5)(inputs))
    model = keras.Model(inputs, keras.layers.Dense(2)(hidden))
    model.compile("adam", "mse")
    x = np.random.default_rng(0).normal(size=(32, 6)).astype("f4")
    weights: list[list[Array]] = []
    model.fit(
        x,
        x[:, :2],
        epochs=3,
        verbose=0,
        callbacks=[
            keras.callbacks.OrbaxCheckpoint(
                str(tmp_path / "run"), save_freq="epoch", max_to_keep=9
            ),
            keras.callbacks.LambdaCallback(
                on_epoch_end=lambda *_: weights.append(model.get_weights())
            ),
        ],
    )
    (tmp_path / "average").mkdir()
    average(tmp_path / "run", tmp_path / "average/0", verify=True)
    loaded = keras.saving.load_model(str(tmp_path / "average"))
    means = [
        np.asarray(sum(np.float64(one[k]) for one in weights) / 3, "f4")
        for k in range(len(weights[0]))
    ]
    for found, mean in zip(loaded.get_weights(), means, strict=True):
        assert found.tobytes() == mean.tobytes()
    model.set_weights(means)
    assert np.array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))


@pytest.mark.parametrize("kind", ["Sequential", "functional"])
def test_the_recipe_of_the_guide_gives_a_keras_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A `.safetensors` becomes a `.keras` with the very weights, where Keras opens no folder."""
    import keras

    keras.utils.clear_session()
    layers = [keras.layers.Dense(5), keras.layers.BatchNormalization(), keras.layers.Dropout(0.1)]
    layers.append(keras.layers.Dense(2))
    inputs = keras.Input((6,))
    model: Any = keras.Sequential([inputs, *layers])
    if kind == "functional":
        outputs = inputs
        for layer in layers:
            outputs = layer(outputs)
        model = keras.Model(inputs, outputs)
    model.compile("adam", "mse")
    x = np.random.default_rng(0).normal(size=(32, 6)).astype("f4")
    weights: list[list[Array]] = []
    save_steps = keras.callbacks.OrbaxCheckpoint(str(tmp_path / "run"), max_to_keep=None)
    keep = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda *_: weights.append([np.asarray(w) for w in model.weights])
    )
    model.fit(x, x[:, :2], epochs=3, verbose=0, callbacks=[save_steps, keep])
    monkeypatch.chdir(tmp_path)
    average("run", "final.safetensors")
    section = (GUIDE / "formats.md").read_text().partition("\n## Orbax")[2].partition("\n## ")[0]
    exec(textwrap.dedent(section.partition("```text\n")[2].partition("  ```")[0]), {})
    loaded = keras.saving.load_model("final.keras")
    means = [
        np.asarray(sum(np.float64(one[k]) for one in weights) / 3, "f4")
        for k in range(len(weights[0]))
    ]
    assert [np.asarray(w).tobytes() for w in loaded.weights] == [mean.tobytes() for mean in means]


def test_a_large_database_is_read_as_tensorstore_reads_it(tmp_path: Path) -> None:
    """A tree of several levels, whose values are inline or not, has the same keys and values."""
    store = tensorstore.KvStore.open(
        {
            "driver": "ocdbt",
            "base": f"file://{tmp_path}/",
            "config": {"max_decoded_node_bytes": 512, "max_inline_value_bytes": 9},
        }
    ).result()
    rng = np.random.default_rng(0)
    expected = {}
    for k in range(300):
        key = f"{'layer' * (k % 3)}.{k}/0"
        expected[key] = rng.bytes(k % 20)
        store[key] = expected[key]
    found, files = ocdbt.read(tmp_path, BEAT)
    assert len(files) > 2
    assert {
        key: value.content
        if value.content is not None
        else (tmp_path / value.file).read_bytes()[value.offset :][: value.nbytes]
        for key, value in found.items()
    } == expected


def test_a_flipped_bit_of_a_database_is_refused(tmp_path: Path) -> None:
    """Nodes and manifest have checksums: any changed byte of the manifest is noticed."""
    save(tmp_path / "m_1", {"w": np.ones(500, "f4")})
    manifest = tmp_path / "m_1/manifest.ocdbt"
    whole = manifest.read_bytes()
    for place in range(0, len(whole), 3):
        spoilt = bytearray(whole)
        spoilt[place] ^= 4
        manifest.write_bytes(spoilt)
        with pytest.raises(FormatError, match="m_1"):
            list(inspect([tmp_path / "m_1"]))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"shape": [1 << 40]}, "chunks; expected at most"),
        ({"shape": [1 << 40], "chunks": [1 << 40]}, "a chunk of 2000 bytes"),
        ({"shape": [1000], "chunks": [500]}, r"no chunk '1'"),
        ({"shape": [-1]}, "the shape"),
        ({"shape": [500, 1 << 61, 1 << 61]}, "the shape"),
        ({"chunks": [0]}, "the chunk shape"),
        ({"chunks": [500, 1]}, "the chunk shape"),
        ({"dtype": "|O"}, "the dtype"),
        ({"dtype": "<f4096"}, "the dtype"),
        ({"compressor": {"id": "blosc"}}, "the compressor"),
        ({"filters": [{"id": "delta"}]}, "the filters"),
        ({"order": "F", "shape": [500, 1], "chunks": [500, 1]}, "the order"),
        ({"zarr_format": 4}, "the zarr_format"),
        ({"dimension_separator": "/../"}, "the dimension_separator"),
    ],
)
def test_metadata_that_lie_are_refused(tmp_path: Path, said: Any, message: str) -> None:
    """One line that names tensor and folder, and nothing is allocated for a shape of terabytes."""
    save(tmp_path / "m_1", {"w": np.ones(500, "f4")}, use_ocdbt=False, use_compression=False)
    path = tmp_path / "m_1/w/.zarray"
    path.write_text(json.dumps({**json.loads(path.read_text()), **said}))
    with pytest.raises(FormatError, match=rf"m_1: tensor 'w' has .*{message}"):
        list(inspect([tmp_path / "m_1"]))


@pytest.mark.parametrize("name", ["../m_2/w", "/etc", "a/./b", ""])
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    """An array's folder lies in the checkpoint."""
    save(tmp_path / "m_1", {"w": np.ones(500, "f4")}, use_ocdbt=False)
    path = tmp_path / "m_1/_METADATA"
    said = json.loads(path.read_text())
    (entry,) = said["tree_metadata"].values()
    entry["key_metadata"][0]["key"] = name
    path.write_text(json.dumps(said))
    with pytest.raises(FormatError, match=r"leads out|neither"):
        list(inspect([tmp_path / "m_1"]))


def test_a_bomb_is_refused_when_it_is_read(tmp_path: Path) -> None:
    """A chunk that decompresses to more than its array is an error, within flat memory."""
    save(tmp_path / "m_1", {"w": np.ones(5000, "f4")}, use_ocdbt=False)
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    (tmp_path / "m_1/w/0").write_bytes(bomb)
    for output in ("o", "o.safetensors"):
        with pytest.raises(FormatError, match=r"m_1.*'w'.*more than 20000 bytes"):
            average([tmp_path / "m_1"], tmp_path / output)
    assert check(tmp_path / "m_1").all_problems


def wrap(magic: bytes, body: bytes, compression: int = 0) -> bytes:
    """Return a block of a database: a head, a body and a checksum that is right."""
    whole = magic + struct.pack("<Q", 18 + len(body)) + bytes((0, compression)) + body
    return whole + struct.pack("<L", google_crc32c.value(whole))


def unwrap(block: bytes) -> bytes:
    """Return the body of a block that TensorStore compressed."""
    return bytes(zstandard.ZstdDecompressor().decompressobj().decompress(block[14:-4]))


def mutate(rng: random.Random, content: bytes) -> bytes:
    """Return bytes with a few of them changed."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(len(data))] = rng.choice((rng.randrange(256), 0, 1, 127, 255))
    return bytes(data)


def test_mutated_databases_give_one_line_or_values(tmp_path: Path) -> None:
    """Hundreds of damaged bodies with right checksums: values or a FormatError, nothing else."""
    save(tmp_path / "m_1", {"params": {"w": np.ones(500, "f4"), "b": np.ones(5)}, "step": 7})
    folder = tmp_path / "m_1"
    table = formats.scan([folder / "_METADATA"])[0]
    manifest, node = (Path(file.path) for file in table.files[:2])
    bodies = unwrap(manifest.read_bytes()), unwrap(node.read_bytes())
    # The node is not compressed now, so the manifest has to say its length.
    length = 18 + len(bodies[1])
    place = bodies[0].rindex(node.name.encode()) + len(node.name)
    # Versions: one, of generation 1 and height 0; the file's number, the offset, the length.
    assert bodies[0][place : place + 5] == bytes((1, 1, 0, 0, 0))
    old = len(encode_varint(len(node.read_bytes())))
    head = bodies[0][: place + 5] + encode_varint(length) + bodies[0][place + 5 + old :]
    rng = random.Random(0)
    outcomes = []
    for spoilt in [None, *(k % 2 for k in range(800))]:
        first, second = (
            mutate(rng, body) if spoilt == k else body for k, body in enumerate((head, bodies[1]))
        )
        manifest.write_bytes(wrap(b"\x0c\xdb\x3a\x2a", first))
        node.write_bytes(wrap(b"\x0c\xdb\x20\xde", second))
        try:
            outcomes.append(ocdbt.read(folder, BEAT)[0])
        except FormatError as error:
            assert "\n" not in str(error)  # noqa: PT017 (either may be)
            assert str(folder) in str(error)  # noqa: PT017
    assert set(outcomes[0]) > {"params.w/.zarray", "params.w/0", "step/0"}
    assert len(outcomes) < 700


def test_mutated_lists_give_one_line_or_tables(tmp_path: Path) -> None:
    """Damaged `_METADATA` and `zarr.json`: a table or a FormatError, and nothing else."""
    save(tmp_path / "m_1", {"w": np.ones(50, "f4")}, use_ocdbt=False, use_zarr3=True)
    rng = random.Random(0)
    for path in (tmp_path / "m_1/_METADATA", tmp_path / "m_1/w/zarr.json"):
        whole = path.read_bytes()
        for _ in range(150):
            path.write_bytes(mutate(rng, whole))
            try:
                OrbaxCheckpoint().scan(ScanRequest(f"{tmp_path}/m_1/_METADATA", True), BEAT)
            except FormatError as error:
                assert "\n" not in str(error)  # noqa: PT017 (either may be)
        path.write_bytes(whole)
    OrbaxCheckpoint().scan(ScanRequest(f"{tmp_path}/m_1/_METADATA", True), BEAT)


def test_the_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without zstandard a compressed checkpoint is refused with the command that installs it."""
    save(tmp_path / "m_1", {"w": np.ones(5000, "f4")})
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(PolyakError, match=r"pip install 'polyak\[orbax\]'"):
        average([tmp_path / "m_1"], tmp_path / "o")


def test_weights_are_averaged_in_memory_on_jax(tmp_path: Path) -> None:
    """JAX keeps the state of training outside of the model; the callback sees it all the same."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.swa", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "KERAS_BACKEND": "jax"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "jax\n"), done.stderr

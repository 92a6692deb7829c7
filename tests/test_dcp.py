"""Distributed checkpoints without PyTorch: blocks in several files, and metadata that lie."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from polyak_cli import average, inspect
from polyak_cli.checkpoints import select
from polyak_cli.errors import FormatError, PolyakError
from polyak_cli.formats.format import ScanRequest
from polyak_cli.formats.torch import dcp_metadata, dcp_parts
from polyak_cli.formats.torch.distributed import DistributedCheckpoint
from polyak_cli.processes.sandbox import Heartbeat
from polyak_cli.storage import open_input
from tests import dcp
from tests.contract import naive
from tests.dcp import Piece, chunk, item, metadata, place, split
from tests.test_torch_zip import (
    BOMBS,
    PROTO,
    STOP,
    call,
    name,
    number,
    several,
    storage,
    text,
    view,
)

BEAT = Heartbeat(lambda: None)
X = np.random.default_rng(0).normal(size=(6, 4)).astype("f4")
PART = "__0_0.distcp"


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_two_divisions_of_a_tensor_average(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Checkpoints of other numbers of processes, divided along other dimensions, are paired."""
    folder = tmp_path_factory.mktemp("run")
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    first = rng.normal(size=shape)
    models = [{"x": (first + k * rng.normal(size=shape) / 100).astype("f4")} for k in range(2)]
    for k, model in enumerate(models):
        counts = [data.draw(st.integers(1, size)) for size in shape]
        dcp.write(folder / f"step-{k}", {"x": split(model["x"], counts)})
    average(folder, folder / "o.safetensors", coefficients=[0.25, 0.75])
    expected = naive(models, [0.25, 0.75])["x"]
    assert load_file(folder / "o.safetensors")["x"].tobytes() == expected.tobytes()


def test_elements_in_another_order_are_averaged_in_it(tmp_path: Path) -> None:
    """Blocks that were saved transposed pair with one another, and not with those in C order."""
    for k in (1, 2):
        pieces = [
            one._replace(values=np.asfortranarray(one.values)) for one in split(k * X, (2, 1))
        ]
        dcp.write(tmp_path / f"step-{k}", {"x": pieces})
    table = DistributedCheckpoint().scan(
        ScanRequest(str(tmp_path / "step-1/.metadata"), True), BEAT
    )
    assert table.tensors["x"].arrangement == "the order of its dimensions (1, 0)"
    dcp.write(tmp_path / "step-2", {"x": split(X, (2, 1))})
    with pytest.raises(PolyakError, match=r"tensor 'x'.*the order of its dimensions"):
        average(tmp_path, tmp_path / "o.safetensors")


def test_blocks_in_two_orders_are_refused(tmp_path: Path) -> None:
    """No single order of dimensions holds for all blocks."""
    first, second = split(X, (2, 1))
    second = second._replace(values=np.asfortranarray(second.values))
    dcp.write(tmp_path / "step-1", {"x": [first, second]})
    with pytest.raises(FormatError, match=r"elements in different orders; save tensor.contiguous"):
        average([tmp_path / "step-1"], tmp_path / "o.safetensors")


LAYOUTS = {
    "torchtitan": ("step-{}", ""),
    "OLMo-core": ("step{}", "model_and_optim"),
    "Megatron": ("iter_{:07d}", ""),
    "Accelerate": ("checkpoint-{}", "pytorch_model_fsdp_0"),
    "Lightning": ("epoch={0}-step={0}.ckpt", ""),
}


@pytest.mark.parametrize("program", LAYOUTS)
def test_the_folders_of_a_program_are_found_and_ordered(tmp_path: Path, program: str) -> None:
    """By the step in their names; what else the program leaves is passed over with its reason."""
    pattern, inner = LAYOUTS[program]
    kind = dcp.STORED_BY_OLMO if program == "OLMo-core" else dcp.STORED
    for step in (1000, 200, 30):
        folder = tmp_path / pattern.format(step)
        dcp.write(folder / inner, {"x": split(step * X, (2, 1))}, kind=kind)
        for extra in ("common.pt", "metadata.json", "config.json", "meta.pt", ".metadata.json"):
            (folder / extra).write_text("{}")
        if inner:
            (folder / "train").mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1000")
    unfinished = tmp_path / pattern.format(1010) / inner
    unfinished.mkdir(parents=True)
    (unfinished / PART).write_bytes(b"x")
    (tmp_path / "tb").mkdir()
    found = select([tmp_path])
    assert [one.epoch for one in found.checkpoints] == [30, 200, 1000]
    reasons = {one.path.name: one.reason for one in found.passed_over}
    assert reasons["latest_checkpointed_iteration.txt"] == "not named like a checkpoint"
    if not inner:
        assert "without its .metadata" in reasons[unfinished.name]
    average(tmp_path, tmp_path / "o.safetensors", last=2)
    expected = naive([{"x": 200 * X}, {"x": 1000 * X}], [0.5, 0.5])["x"]
    assert load_file(tmp_path / "o.safetensors")["x"].tobytes() == expected.tobytes()
    one = tmp_path / pattern.format(30)
    (inside,) = inspect([one])
    assert [one.spec.name for one in inside.tensors] == ["x"]


# --- what must be refused -------------------------------------------------------------------------


def lie(folder: Path, content: bytes, part: bytes | None = None) -> Path:
    """Write a checkpoint of one part with the metadata given."""
    folder.mkdir()
    (folder / PART).write_bytes(dcp.archive(X) if part is None else part)
    (folder / ".metadata").write_bytes(content)
    return folder


WHOLE = dcp.archive(X)
LENGTH = len(WHOLE)
HERE = place("x", (0, 0), PART, 0, LENGTH)
ONE = item("torch float32", X.shape, [chunk((0, 0), X.shape)])


def somewhere(file: str) -> bytes:
    """Return metadata whose tensor lies in a file."""
    return metadata({"x": ONE}, [place("x", (0, 0), file, 0, LENGTH)])


def blocks(*chunks: tuple[Sequence[int], Sequence[int]]) -> bytes:
    """Return metadata of a tensor in blocks, all in one archive."""
    described = [chunk(*one) for one in chunks]
    places = [place("x", start, PART, 0, LENGTH) for start, _ in chunks]
    return metadata({"x": item("torch float32", X.shape, described)}, places)


LIES: dict[str, tuple[bytes, str]] = {
    "a path": (somewhere("../../etc/passwd"), "expected the name of a file in the same folder"),
    "an absolute path": (somewhere("/etc/passwd"), "expected the name of a file in the same"),
    "a NUL": (somewhere("a\0b"), "expected the name of a file in the same folder"),
    "the folder": (somewhere("."), "expected the name of a file in the same folder"),
    "no such file": (somewhere("__7_0.distcp"), "__7_0.distcp: cannot be read"),
    "a wrong offset": (
        metadata({"x": ONE}, [place("x", (0, 0), PART, 3, LENGTH - 3)]),
        "its directory does not lie before its end",
    ),
    "beyond the file": (
        metadata({"x": ONE}, [place("x", (0, 0), PART, 1 << 40, LENGTH)]),
        "it is truncated, or metadata and parts come from different saves",
    ),
    "a length too large": (
        metadata({"x": ONE}, [place("x", (0, 0), PART, 0, 1 << 61)]),
        "it is truncated, or metadata and parts come from different saves",
    ),
    "a negative offset": (
        metadata({"x": ONE}, [place("x", (0, 0), PART, -1, LENGTH)]),
        "lies at offset -1",
    ),
    "a short length": (
        metadata({"x": ONE}, [place("x", (0, 0), PART, 0, 21)]),
        "it is truncated, or metadata and parts come from different saves",
    ),
    "not an archive": (
        metadata({"x": ONE}, [place("x", (0, 0), PART, 0, LENGTH - 5)]),
        "is not in an archive of torch.save where the metadata say",
    ),
    "compressed": (
        metadata(
            {"x": ONE},
            [
                place(
                    "x", (0, 0), PART, 0, LENGTH, transform_descriptors=b"](" + text("zstd") + b"e"
                )
            ],
        ),
        "is compressed",
    ),
    "another shape": (
        metadata({"x": item("torch float32", (4, 6), [chunk((0, 0), (4, 6))])}, [HERE]),
        r"is float32 of shape \(6, 4\) in its archive, but float32 of shape \(4, 6\)",
    ),
    "another type": (
        metadata({"x": item("torch int32", X.shape, [chunk((0, 0), X.shape)])}, [HERE]),
        "is float32 of shape",
    ),
    "a huge shape": (
        metadata({"x": item("torch float32", (1 << 40, 1 << 40), [])}, []),
        "has the shape",
    ),
    "many dimensions": (
        metadata({"x": item("torch float32", (1,) * 65, [])}, []),
        "a size is not a tuple",
    ),
    "a negative size": (
        metadata({"x": item("torch float32", (-1, 4), [])}, []),
        "a size is not a tuple",
    ),
    "no blocks": (metadata({"x": item("torch float32", X.shape, [])}, []), "blocks of 0 elements"),
    "a missing block": (blocks(((0, 0), (3, 4))), "has blocks of 12 elements; expected 24"),
    "overlapping blocks": (
        blocks(((0, 0), (4, 4)), ((3, 0), (2, 4))),
        "overlapping blocks",
    ),
    "too many blocks": (blocks(((0, 0), (6, 4)), ((3, 0), (2, 4))), "overlapping blocks"),
    "a block outside": (blocks(((1, 0), (6, 4))), "reaches out of its shape"),
    "a block of three dimensions": (blocks(((0, 0, 0), (6, 4, 1))), "a block of 3 dimensions"),
    "no place": (metadata({"x": ONE}, []), "no place is given for 'x' at"),
    "two places": (
        metadata({"x": ONE}, [HERE, place("x", (0, 0), PART, 1, LENGTH - 1)]),
        "'x' lies in two places",
    ),
    "bytes of two items": (
        metadata({"x": ONE, "y": ONE}, [HERE, place("y", (0, 0), PART, 0, LENGTH)]),
        "two items lie at offset 0",
    ),
    "bytes outside": (
        metadata({"x": ONE, "s": dcp.plain_item()}, [HERE, place("s", None, PART, LENGTH, 99)]),
        "'s' lies outside the file",
    ),
    "no metadata": (PROTO + dcp.plain_item() + STOP, "expected a M"),
    "a number": (PROTO + number(7) + STOP, "expected a M"),
    "items in a list": (
        PROTO
        + dcp.attributes(
            f"{dcp.MODULE}.metadata Metadata", state_dict_metadata=b"]", storage_data=b"}"
        )
        + STOP,
        "the items are not in a dictionary",
    ),
    "a tensor that is a text": (
        metadata({"x": text("no")}, []),
        "expected a TensorStorageMetadata",
    ),
    "an unknown type": (metadata({"x": item("torch Size", X.shape, [])}, []), "no known type"),
    "a quantised type": (metadata({"x": item("torch qint8", X.shape, [])}, []), "qint8"),
    "a function": (metadata({"x": call("os system", text("touch ran"))}, []), "names 'os.system'"),
    "another class": (
        metadata({"x": name("builtins eval") + b")\x81"}, []),
        "names 'builtins.eval'",
    ),
    "a path that is called": (
        metadata({"x": ONE}, [HERE], storage_meta2=call("pathlib Path.home")),
        "names 'pathlib.Path.home'",
    ),
    "a pickle that never ends": (metadata({"x": ONE}, [HERE])[:-1], "damaged or hostile"),
    "Hugging Face": (
        metadata({"x": ONE}, [(HERE[0], dcp.attributes(f"{dcp.MODULE}._hf_utils _HFStorageInfo"))]),
        "HuggingFaceStorageWriter",
    ),
}


@pytest.mark.parametrize("case", LIES)
def test_metadata_that_lie_are_refused(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line says what is wrong, and nothing is written, called or read outside the folder."""
    monkeypatch.chdir(tmp_path)
    content, message = LIES[case]
    folder = lie(tmp_path / "step-1", content)
    with pytest.raises(PolyakError, match=message) as caught:
        average([folder], tmp_path / "o.safetensors")
    assert "\n" not in str(caught.value)
    assert "step-1" in str(caught.value)
    assert os.listdir(tmp_path) == ["step-1"]


#: Those without objects of unknown classes, which `.metadata` never has.
PLAIN_BOMBS = {name: bomb for name, bomb in BOMBS.items() if "object" not in name}


@pytest.mark.parametrize("bomb", PLAIN_BOMBS.values(), ids=PLAIN_BOMBS)
def test_bombs_cost_little(tmp_path: Path, bomb: bytes) -> None:
    """Nesting without end, as an item or as what a planner keeps, is refused or passed by."""
    folder = lie(tmp_path / "step-1", metadata({"x": bomb}, [HERE]))
    with pytest.raises(FormatError, match="tensor 'x' its metadata are damaged or hostile"):
        average([folder], tmp_path / "o.safetensors")
    (folder / ".metadata").write_bytes(metadata({"x": ONE}, [HERE], planner_data=bomb))
    average([folder], tmp_path / "o.safetensors")
    assert load_file(tmp_path / "o.safetensors")["x"].tobytes() == X.tobytes()


@pytest.mark.parametrize("bomb", PLAIN_BOMBS.values(), ids=PLAIN_BOMBS)
def test_bombs_are_not_written_again(tmp_path: Path, bomb: bytes) -> None:
    """What one byte fetches from the memo is bounded where metadata are written for the weights."""
    folder = lie(tmp_path / "step-1", metadata({"x": ONE}, [HERE], more=bomb))
    try:
        average([folder], tmp_path / "o", only_weights=True)
    except FormatError as error:
        assert "step-1/.metadata: its metadata hold what" in str(error)  # noqa: PT017
        assert os.listdir(tmp_path) == ["step-1"]
    else:
        sizes = [path.stat().st_size for path in tmp_path.glob("*/.metadata")]
        assert max(sizes) <= 16 * min(sizes)


def test_keys_that_cannot_be_hashed_are_left_out(tmp_path: Path) -> None:
    """A dictionary of a pickle may have a list for a key."""
    path = several(text("x"))
    folder = lie(
        tmp_path / "step-1",
        metadata({"x": ONE}, [HERE], planner_data=dcp.pairs([(text("x"), path), (b"]", b"N")])),
    )
    average([folder], tmp_path / "o", only_weights=True)
    average([tmp_path / "o"], tmp_path / "o.safetensors")
    assert load_file(tmp_path / "o.safetensors")["x"].tobytes() == X.tobytes()


def test_a_path_of_many_keys_is_refused(tmp_path: Path) -> None:
    """The dictionaries around an item are at most 64 deep."""
    path = several(*[text("a")] * 65)
    folder = lie(
        tmp_path / "step-1",
        metadata({"x": ONE}, [HERE], planner_data=dcp.pairs([(text("x"), path)])),
    )
    with pytest.raises(FormatError, match="nested more than 64 deep"):
        average([folder], tmp_path / "o.safetensors")


def test_megatron_keeps_more_in_its_metadata(tmp_path: Path) -> None:
    """Its own classes are known; what a shard keeps beside its tensors is carried as bytes."""
    strategies = "megatron.core.dist_checkpointing.strategies"
    reshaped = dcp.attributes(
        f"{strategies}.resharding TensorReformulationMetadata",
        nd_orig_global_shape=several(number(6)),
    )
    key = "decoder.layers.self_attention._extra_state/shard_0_1"
    planner = f"{dcp.MODULE}.planner"
    written = dcp.attributes(
        f"{planner} WriteItem",
        type=call(f"{planner} WriteItemType", number(2)),
        tensor_data=dcp.attributes(f"{planner} TensorWriteData", chunk=chunk((0, 0), X.shape)),
    )
    plans = b"](" + dcp.attributes(f"{planner} SavePlan", items=b"](" + written + b"e") + b"e"
    root = dcp.attributes(
        f"{strategies}.torch MCoreMetadata",
        all_local_plans=plans,
        state_dict_metadata=dcp.pairs([(text("w"), ONE), (text(key), dcp.plain_item())]),
        storage_data=dcp.pairs(
            [place("w", (0, 0), PART, 0, LENGTH), place(key, None, PART, LENGTH, 5)]
        ),
        mcore_data=dcp.pairs([(text("w"), reshaped)]),
    )
    folder = lie(tmp_path / "iter_0000001", PROTO + root + STOP, WHOLE + b"bytes")
    (folder / "common.pt").write_bytes(b"of Megatron")
    report = average([folder], tmp_path / "final")
    assert report.plan.carried == (key,)
    assert (tmp_path / "final" / PART).read_bytes() == WHOLE + b"bytes"
    assert (tmp_path / "final" / "common.pt").read_bytes() == b"of Megatron"
    with pytest.raises(PolyakError, match=r"_extra_state/shard_0_1', which .* --only-weights"):
        average([folder], tmp_path / "o.safetensors")
    report = average([folder], tmp_path / "o.safetensors", only_weights=True, verify=True)
    assert report.plan.dropped == (key,)
    assert load_file(tmp_path / "o.safetensors").keys() == {"w"}
    average([folder], tmp_path / "weights", only_weights=True)
    assert (tmp_path / "weights" / PART).read_bytes() == WHOLE + b"bytes"


def test_metadata_of_older_releases_are_read(tmp_path: Path) -> None:
    """Some classes had another home, and there were no paths and no version."""
    home, old = f"c{dcp.MODULE}.metadata\n", "ctorch.distributed._shard.sharded_tensor.metadata\n"
    described = ONE
    for kind, was in (("TensorProperties\n", ""), ("_MEM_FORMAT_ENCODING\n", "_")):
        new = f"{old}{kind.removeprefix(was)}".encode()
        assert f"{home}{kind}".encode() in described
        described = described.replace(f"{home}{kind}".encode(), new)
    root = dcp.attributes(
        f"{dcp.MODULE}.metadata Metadata",
        state_dict_metadata=dcp.pairs([(text("x"), described)]),
        storage_data=dcp.pairs([HERE]),
    )
    folder = lie(tmp_path / "step-1", PROTO + root + STOP)
    average([folder], tmp_path / "o.safetensors")
    assert load_file(tmp_path / "o.safetensors")["x"].tobytes() == X.tobytes()


def test_a_name_in_two_items_is_refused(tmp_path: Path) -> None:
    """A dictionary of a pickle may have one key twice."""
    items = [(text("x"), ONE), (text("x"), ONE)]
    root = dcp.attributes(
        f"{dcp.MODULE}.metadata Metadata",
        state_dict_metadata=dcp.pairs(items),
        storage_data=dcp.pairs([HERE]),
    )
    folder = lie(tmp_path / "step-1", PROTO + root + STOP)
    with pytest.raises(FormatError, match="two items have the same name"):
        average([folder], tmp_path / "o.safetensors")


def test_a_part_that_is_a_link_or_a_pipe(tmp_path: Path) -> None:
    """Links are followed, as caches of models consist of them; a pipe is not waited for."""
    folder = dcp.write(tmp_path / "step-1", {"x": split(X, (2, 1))}).parent
    (folder / PART).rename(tmp_path / "blob")
    (folder / PART).symlink_to(tmp_path / "blob")
    average([folder], tmp_path / "o.safetensors")
    assert load_file(tmp_path / "o.safetensors")["x"].tobytes() == X.tobytes()
    (folder / PART).unlink()
    (folder / PART).symlink_to("/etc/passwd")
    with pytest.raises(FormatError, match="truncated"):
        average([folder], tmp_path / "p.safetensors")
    (folder / PART).unlink()
    os.mkfifo(folder / PART)
    with pytest.raises(FormatError, match="not a regular file"):
        average([folder], tmp_path / "p.safetensors")


def change(place: int, pattern: str, number: int) -> Callable[[bytearray], None]:
    """Return a change of a number in an archive, counted from its end or its directory."""

    def apply(content: bytearray) -> None:
        at = place if place >= 0 else len(content) + place
        struct.pack_into(pattern, content, at, number)

    return apply


DIRECTORY = WHOLE.index(b"PK\x01\x02")
LAST = WHOLE.rindex(b"PK\x01\x02")
STORAGE = WHOLE.rindex(b"PK\x01\x02", 0, LAST)
DAMAGES = {
    "more members": (change(-12, "<H", 63), "directory"),
    "many members": (change(-12, "<H", 60000), "60000 members"),
    "a huge directory": (change(-10, "<L", 1 << 30), "directory of 1073741824 bytes"),
    "a directory elsewhere": (change(-6, "<L", 3), "does not lie before its end"),
    "a deflated member": (change(STORAGE + 10, "<H", 8), "compressed or encrypted"),
    "an encrypted member": (change(STORAGE + 8, "<H", 1), "compressed or encrypted"),
    "two sizes": (change(STORAGE + 24, "<L", 8), "compressed or encrypted"),
    "a member far away": (change(STORAGE + 42, "<L", 1 << 30), "lies outside it"),
    "a member elsewhere": (change(STORAGE + 42, "<L", 1), "another name in its own header"),
    "a pickle of another checksum": (change(DIRECTORY + 16, "<L", 7), "checksum of the member"),
    "long names": (change(LAST + 28, "<H", 60000), "directory ends early"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_archives_that_lie_are_refused(tmp_path: Path, case: str) -> None:
    """The error names part and tensor."""
    damage, message = DAMAGES[case]
    content = bytearray(WHOLE)
    damage(content)
    folder = lie(tmp_path / "step-1", metadata({"x": ONE}, [HERE]), bytes(content))
    with pytest.raises(FormatError, match=rf"step-1/{PART}: tensor 'x' .*{message}"):
        average([folder], tmp_path / "o.safetensors")


def test_an_archive_of_something_else_is_refused(tmp_path: Path) -> None:
    """A dictionary of tensors, a name, and a view of a part of a storage are no blocks."""
    for k, (pickle, message) in enumerate(
        (
            (b"}", "is not a plain tensor"),
            (call("os system", text("true")), "names 'os.system'"),
            (view(storage("0", 24), (6, 2), (4, 1)), "is float32 of shape"),
            (view(storage("0", 25), (6, 4), (4, 1)), "lies in a storage of 96 bytes"),
            (view(storage("1", 24), (6, 4), (4, 1)), "lacks the storage '1'"),
            (view(storage("0", 24), (6, 4), (4, 1), 1), "a storage of its own"),
            (view(storage("0", 24), (6, 4), (1, 1)), "different orders"),
        )
    ):
        part = dcp.archive(X, pickle)
        content = metadata({"x": ONE}, [place("x", (0, 0), PART, 0, len(part))])
        folder = lie(tmp_path / f"step-{k}", content, part)
        with pytest.raises(FormatError, match=message):
            average([folder], tmp_path / "o.safetensors")


def test_a_flipped_bit_of_a_tensor_is_refused(tmp_path: Path) -> None:
    """PyTorch itself does not look at the checksums; one of 0 was never computed."""
    content = bytearray(WHOLE)
    content[content.index(X.tobytes()) + 3] ^= 1
    folder = lie(tmp_path / "step-1", metadata({"x": ONE}, [HERE]), bytes(content))
    with pytest.raises(FormatError, match=r"__0_0.distcp: tensor 'x' has a wrong checksum"):
        average([folder], tmp_path / "o.safetensors")
    change(STORAGE + 16, "<L", 0)(content)
    (folder / PART).write_bytes(content)
    average([folder], tmp_path / "o.safetensors")


def test_a_truncated_part_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    """No traceback, no output."""
    folder = lie(tmp_path / "step-1", metadata({"x": ONE}, [HERE]))
    for length in range(0, LENGTH, 41):
        (folder / PART).write_bytes(WHOLE[:length])
        with pytest.raises(PolyakError, match=r"__0_0.distcp"):
            average([folder], tmp_path / "o.safetensors")
    assert os.listdir(tmp_path) == ["step-1"]


def test_many_blocks_are_checked_in_little_time() -> None:
    """Blocks that overlap are found among thousands, in any order."""
    grid = [(row, column) for row in range(64) for column in range(64)]
    random.Random(0).shuffle(grid)
    sound = [dcp_metadata.Block((r * 2, c * 3), (2, 3), None) for r, c in grid]  # type: ignore[arg-type]
    dcp_metadata._check_cover((128, 192), sound)
    spoilt = [*sound]
    spoilt[7] = spoilt[7]._replace(start=spoilt[8].start)
    with pytest.raises(FormatError, match="overlapping blocks"):
        dcp_metadata._check_cover((128, 192), spoilt)


def mutate(rng: random.Random, content: bytes) -> bytes:
    """Return bytes with a few of them changed."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(len(data))] = rng.choice((rng.randrange(256), 0, 255, 46))
    return bytes(data)


def test_mutated_metadata_give_one_line_or_items() -> None:
    """Thousands of damaged pickles: items or a FormatError, and nothing else."""
    rng = random.Random(0)
    whole = metadata({"x": ONE, "s": dcp.plain_item()}, [HERE, place("s", None, PART, 9, 9)])
    for _ in range(3000):
        try:
            dcp_metadata.read(mutate(rng, whole), BEAT)
        except FormatError as error:
            assert "\n" not in str(error)  # noqa: PT017 (either may be)
    assert len(dcp_metadata.read(whole, BEAT)[0]) == 1


def test_mutated_archives_give_one_line_or_a_place(tmp_path: Path) -> None:
    """Thousands of damaged archives: a place inside the part or a FormatError."""
    rng = random.Random(0)
    for _ in range(1500):
        (tmp_path / PART).write_bytes(mutate(rng, WHOLE))
        with open_input(tmp_path / PART) as file:
            try:
                found: Any = dcp_parts.PieceReader(BEAT).read(file, 0, LENGTH)
            except FormatError as error:
                assert "\n" not in str(error)  # noqa: PT017 (either may be)
            else:
                assert found.offset + found.nbytes <= LENGTH


def test_pieces_of_one_part_may_lie_anywhere(tmp_path: Path) -> None:
    """Blocks of several tensors in one part, and one tensor in two orders of its blocks."""
    both = split(X, (3, 2))
    tensors = {
        "b": [one._replace(file=PART) for one in both],
        "a": [one._replace(file=PART) for one in reversed(both)],
        "s": [Piece(PART, (), np.array(2.5, "f4"))],
        "n": [Piece(PART, (0,), np.arange(3, dtype="i8"))],
    }
    dcp.write(tmp_path / "step-1", tensors, {"epoch": b"whatever"})
    average([tmp_path / "step-1"], tmp_path / "o.safetensors")
    found = load_file(tmp_path / "o.safetensors")
    assert found["a"].tobytes() == found["b"].tobytes() == X.tobytes()
    assert found["s"] == np.float32(2.5)
    assert found["n"].tolist() == [0, 1, 2]


def write_with_state(folder: Path, **more: bytes) -> Path:
    """Write a tensor behind an optimizer's, and one of which a process has no rows."""
    slot, empty = X[:2], X[:0]
    archives = [dcp.archive(one) for one in (slot, X, empty)]
    starts = [sum(map(len, archives[:k])) for k in range(3)]
    described = item("torch float32", X.shape, [chunk((0, 0), X.shape), chunk((6, 0), (0, 4))])
    items = {"optim.w.exp_avg": item("torch float32", slot.shape, [chunk((0, 0), slot.shape)])}
    names, offsets = ("optim.w.exp_avg", "w", "w"), ((0, 0), (0, 0), (6, 0))
    places = [
        place(name, offset, PART, start, len(content))
        for name, offset, start, content in zip(names, offsets, starts, archives, strict=True)
    ]
    return lie(folder, metadata(items | {"w": described}, places, **more), b"".join(archives))


def test_the_weights_alone_are_moved_to_the_beginning(tmp_path: Path) -> None:
    """An empty block stays, since programs may look for it; OLMo-core's classes stay its own."""
    folder = write_with_state(tmp_path / "step-1")
    average([folder], tmp_path / "o", only_weights=True, verify=True)
    kept = (folder / PART).read_bytes()[len(dcp.archive(X[:2])) :]
    assert (tmp_path / "o" / PART).read_bytes() == kept
    content = (tmp_path / "o/.metadata").read_bytes()
    assert b"exp_avg" not in content
    (found,), others = dcp_metadata.read(content, BEAT)
    assert (found.name, found.shape, others) == ("w", X.shape, [])
    average([tmp_path / "o"], tmp_path / "o.safetensors")
    assert load_file(tmp_path / "o.safetensors")["w"].tobytes() == X.tobytes()
    dcp.write(tmp_path / "step1", {"x": split(X, (2, 1))}, kind=dcp.STORED_BY_OLMO)
    average([tmp_path / "step1"], tmp_path / "p", only_weights=True)
    assert b"olmo_core.distributed" in (tmp_path / "p/.metadata").read_bytes()


def test_weights_that_overlap_make_no_large_output(tmp_path: Path) -> None:
    """Thousands of empty blocks could claim the same bytes."""
    chunks = [chunk((0, 0), X.shape), *(chunk((6, k), (0, 4)) for k in range(3))]
    places = [HERE, *(place("x", (6, k), PART, k, LENGTH - k) for k in range(3))]
    content = metadata({"x": item("torch float32", X.shape, chunks)}, places)
    folder = lie(tmp_path / "step-1", content)
    with pytest.raises(FormatError, match=r"step-1/\.metadata: two items lie at offset"):
        average([folder], tmp_path / "o", only_weights=True)
    assert os.listdir(tmp_path) == ["step-1"]


def test_metadata_that_cannot_be_written_again_are_refused(tmp_path: Path) -> None:
    """The whole checkpoint is averaged without --only-weights."""
    folder = write_with_state(tmp_path / "step-1", more=b"C\x01x")
    with pytest.raises(FormatError, match=r"written again; leave out --only-weights"):
        average([folder], tmp_path / "o", only_weights=True)
    average([folder], tmp_path / "o")

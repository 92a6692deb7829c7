"""Mutated headers of every format: each is read or refused in one line, and nothing else happens.

Run as ``python -m tests.hostile.fuzz --count 20000 --seed 1``; `make fuzz` and CI do.  Values are
left alone: the mutated bytes are those that a program has to understand.  Checksums that would
end the reading early are corrected.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import resource
import struct
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from polyak_cli import average, formats
from polyak_cli.errors import PolyakError
from polyak_cli.formats import catalogue, wire
from polyak_cli.formats.catalogue import find_format
from polyak_cli.formats.format import ScanRequest
from polyak_cli.processes import sandbox
from polyak_cli.storage import File, Version
from tests import dcp
from tests.oracle import Array, write_model
from tests.test_keras_zip import members, write_archive
from tests.test_safetensors import put
from tests.test_tf_bundle import Bundle, mend
from tests.test_torch_zip import archive, dictionary, tensor
from tests.test_weights import write_shards, write_weights

SECONDS, MEMORY = 5.0, 300 << 20  # that one file may take
BATCH = 400  # files that lie on the disk at a time
SHARE = 20  # of those that are read, one in so many is averaged too
X = np.arange(6, dtype=np.float32)
Mutate = Callable[[random.Random, bytes], bytes]


def mutated(rng: random.Random, content: bytes) -> bytes:
    """Return bytes with a few changes of the kinds that break readers."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not data:
            break
        place = rng.randrange(len(data))
        kind = rng.randrange(7)
        if kind == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[place] = rng.randrange(256)
        elif kind == 2:  # a number that is far too large, or negative
            number = rng.choice((0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 64) - 1))
            data[place : place + 8] = struct.pack("<Q", number)[: rng.choice((2, 4, 8))]
        elif kind == 3:
            data[place : place + rng.randrange(1, 16)] = b""
        elif kind == 4:
            other = rng.randrange(len(data))
            data[place:place] = data[other : other + rng.randrange(1, 32)]
        elif kind == 5:
            data[place : place + rng.randrange(1, 16)] = bytes(rng.randrange(1, 16))
        elif rng.random() < 0.2:
            data = data[: max(1, place)]
    return bytes(data)


# --- a sound file of each format, and how it is spoilt --------------------------------------------


def hdf5(folder: Path) -> tuple[bytes, Mutate]:
    """Whole models, with lists of names, a configuration and optimizer state."""
    layers = {"d": {"k": X, "n": np.array(1)}, "e": {"k": X.reshape(2, 3)}}
    path = write_model(folder / "x.h5", layers, optimizer={"m": X}, storage={"chunks": True})
    return path.read_bytes(), mutated


def weights(folder: Path) -> tuple[bytes, Mutate]:
    """Keras 3 weights files."""
    write_weights(folder / "x.weights.h5", {"layers/d/vars/0": X, "layers/d/vars/1": X})
    return (folder / "x.weights.h5").read_bytes(), mutated


def keras_zip(folder: Path) -> tuple[bytes, Mutate]:
    """Archives: the archive itself, or the weights file in a sound one."""
    content = members({"d": X})
    whole = write_archive(folder / "x.keras", content).read_bytes()

    def mutate(rng: random.Random, _: bytes) -> bytes:
        if rng.random() < 0.3:
            return mutated(rng, whole)
        spoilt = content | {"model.weights.h5": mutated(rng, content["model.weights.h5"])}
        method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
        return write_archive(folder / "x.keras", spoilt, method).read_bytes()

    return whole, mutate


def npz(folder: Path) -> tuple[bytes, Mutate]:
    """Archives of arrays, whose headers may be anything."""
    np.savez(folder / "x.npz", a=X, b=X.reshape(2, 3))
    return (folder / "x.npz").read_bytes(), mutated


def safetensors(folder: Path) -> tuple[bytes, Mutate]:
    """A length, a JSON header, values."""
    said = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
    return put(folder / "x.safetensors", said, X.tobytes()).read_bytes(), mutated


def safetensors_index(folder: Path) -> tuple[bytes, Mutate]:
    """Indexes of two shards, which lie beside all mutations."""
    weight_map = {}
    for k in range(2):
        said = {f"t{k}": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}}
        weight_map[f"t{k}"] = put(folder.parent / f"x-{k}.safetensors", said, X.tobytes()).name
    index = {"metadata": {"total_size": 48}, "weight_map": weight_map}
    return json.dumps(index).encode(), mutated


def keras_index(folder: Path) -> tuple[bytes, Mutate]:
    """The JSON of two shards of Keras, which lie beside all mutations."""
    shards: list[Mapping[str, Array]] = [{"layers/d/vars/0": X}, {"layers/e/vars/0": X}]
    return write_shards(folder.parent / "x.weights.json", shards).read_bytes(), mutated


def torch_zip(folder: Path) -> tuple[bytes, Mutate]:
    """Archives: the pickle in a sound one, or the archive itself."""
    pickle = dictionary({"a": tensor("0", 6), "b": tensor("1", 6)})
    whole = archive(folder / "x.pt", pickle, _0=X, _1=X).read_bytes()

    def mutate(rng: random.Random, _: bytes) -> bytes:
        if rng.random() < 0.3:
            return mutated(rng, whole)
        return archive(folder / "x.pt", mutated(rng, pickle), _0=X, _1=X).read_bytes()

    return whole, mutate


def torch_shards(folder: Path) -> tuple[bytes, Mutate]:
    """Indexes of two shards, which lie beside all mutations."""
    weight_map = {}
    for k in range(2):
        shard = folder.parent / f"x-{k}.bin"
        archive(shard, dictionary({f"t{k}": tensor("0", 6)}), _0=X)
        weight_map[f"t{k}"] = shard.name
    index = {"metadata": {"total_size": 48}, "weight_map": weight_map}
    return json.dumps(index).encode(), mutated


def modules(folder: Path) -> tuple[bytes, Mutate]:
    """Lists of modules, whose folders lie beside all mutations."""
    said = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
    for name in ("0_A", "1_B"):
        (folder.parent / name).mkdir()
        put(folder.parent / name / "model.safetensors", said, X.tobytes())
    listed = [{"idx": k, "path": name, "type": name} for k, name in enumerate(("0_A", "1_B"))]
    return json.dumps(listed).encode(), mutated


def tf_bundle(folder: Path) -> tuple[bytes, Mutate]:
    """Indexes, whose checksums are often corrected."""
    Bundle({"a": X, "b": X.reshape(2, 3)}).write(folder / "x.index")

    def mutate(rng: random.Random, content: bytes) -> bytes:
        table = bytearray(mutated(rng, content))
        if rng.random() < 0.7:
            with contextlib.suppress(struct.error):  # what it looks for was hit
                mend(table)
        return bytes(table)

    return (folder / "x.index").read_bytes(), mutate


def torch_dcp(folder: Path) -> tuple[bytes, Mutate]:
    """Folders: the metadata beside sound parts, or a part beside sound metadata."""
    parts = [dcp.archive(X.reshape(2, 3)), dcp.archive(X.reshape(2, 3))]
    whole, length = b"".join(parts), len(parts[0])
    numbers = itertools.count()

    def describe(part: str) -> bytes:
        chunks = [dcp.chunk((0, 0), (2, 3)), dcp.chunk((2, 0), (2, 3))]
        places = [dcp.place("a", (2 * k, 0), part, k * length, length) for k in (0, 1)]
        return dcp.metadata({"a": dcp.item("torch float32", (4, 3), chunks)}, places)

    def mutate(rng: random.Random, _: bytes) -> bytes:
        part = folder.parent / f"{next(numbers)}.distcp"
        content = describe(part.name)
        if rng.random() < 0.5:
            part.write_bytes(mutated(rng, whole))
            return content
        part.write_bytes(whole)
        return mutated(rng, content)

    return describe("0.distcp"), mutate


def orbax(folder: Path) -> tuple[bytes, Mutate]:
    """Folders: the list of arrays beside a sound array, or a sound list beside an array's shape."""
    numbers = itertools.count()
    said = {"chunks": [6], "dtype": "<f4", "order": "C", "shape": [6], "zarr_format": 2}
    shape = json.dumps(said | {"compressor": None, "filters": None}).encode()

    def describe(name: str) -> bytes:
        entry = {"key_metadata": [{"key": name}], "value_metadata": {"value_type": "jax.Array"}}
        return json.dumps({"tree_metadata": {name: entry}, "use_ocdbt": False}).encode()

    def mutate(rng: random.Random, _: bytes) -> bytes:
        array = folder.parent / f"made/{next(numbers)}"
        array.mkdir()
        (array / "0").write_bytes(X.tobytes())
        content, is_list = describe(f"made/{array.name}"), rng.random() < 0.5
        (array / ".zarray").write_bytes(shape if is_list else mutated(rng, shape))
        return mutated(rng, content) if is_list else content

    return describe("x"), mutate


TARGETS = {
    "hdf5": (".h5", hdf5),
    "weights": (".weights.h5", weights),
    "weights_json": (".weights.json", keras_index),
    "keras_zip": (".keras", keras_zip),
    "npz": (".npz", npz),
    "safetensors": (".safetensors", safetensors),
    "safetensors_index": (".safetensors.index.json", safetensors_index),
    "torch_zip": (".pt", torch_zip),
    "torch_dcp": (".metadata", torch_dcp),
    "orbax": (".orbax", orbax),
    "torch_shards": (".bin.index.json", torch_shards),
    "modules": (".modules.json", modules),
    "tf_bundle": (".index", tf_bundle),
}


# --- trying ---------------------------------------------------------------------------------------


def outcomes(paths: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """Yield what became of each file: "read", or the one line that refuses it."""
    by_format: dict[str, list[Path]] = {}
    for path in paths:
        try:
            by_format.setdefault(catalogue.detect(path), []).append(path)
        except PolyakError as error:  # what is left of it is of no format
            yield path, str(error)
    for name, group in by_format.items():
        form = find_format(name)
        requests = [(form, ScanRequest(str(path), with_optimizer=True)) for path in group]
        scanned = sandbox.run_each(formats._scan_one, requests, [str(path) for path in group], 2)
        begun = time.monotonic()
        for path, outcome in zip(group, scanned, strict=True):
            message = str(outcome) if isinstance(outcome, PolyakError) else ""
            if not message:
                try:
                    file = File(str(path), Version.of(path.stat()))
                    wire.unpack_table(outcome, name, file)
                except PolyakError as error:
                    message = str(error)
            took, begun = time.monotonic() - begun, time.monotonic()
            if took > SECONDS and "without a heartbeat" not in message:
                raise AssertionError(f"{path} took {took:.1f} s: {message}")
            yield path, message or "read"


def attempt(path: Path) -> None:
    """Average what could be read; a refusal is as good as an average."""
    suffix = "".join(path.suffixes[-2:])
    if suffix == ".weights.json":
        suffix = ".weights.h5"
    is_folder = suffix.endswith((".json", ".metadata", ".orbax"))
    output = path.with_name("output" if is_folder else f"output{suffix}")
    # Another type makes the pickle of PyTorch be edited; `test_retyping` looks at the result.
    for dtype in (None, "float16") if suffix in (".pt", ".index.json") else (None,):
        try:
            average([path], output, force=True, jobs=1, dtype=dtype)
        except PolyakError as error:
            check(path, str(error))
    if suffix == ".metadata":  # which are written again without the optimizer's items
        try:
            average([path], output, force=True, jobs=1, only_weights=True)
        except PolyakError as error:
            check(path, str(error))


def check(path: Path, message: str) -> None:
    """Insist on one line that a terminal can show."""
    if not message.isprintable() or len(message) > 3000:
        raise AssertionError(f"{path}: {message!r}")


def fuzz(name: str, count: int, seed: int, say: Callable[[str], None] = print) -> Counter[str]:
    """Try so many mutations of one format and return how many were read, refused, or fatal.

    Raises:
        AssertionError: one took too long, or its error has more than one line.
        RuntimeError: one met a bug; the message is a traceback.
    """
    suffix, make = TARGETS[name]
    rng = random.Random(f"{name} {seed}")
    ends: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "made").mkdir()
        content, mutate = make(folder / "made")
        shared = {*folder.glob("*.*")}  # shards, for all mutations of an index
        for first in range(0, count, BATCH):
            paths = []
            for k in range(first, min(count, first + BATCH)):
                path = folder / f"m_{k}{suffix}"
                path.write_bytes(mutate(rng, content))
                if name == "tf_bundle":
                    shard = folder / "made" / "x.data-00000-of-00001"
                    path.with_name(f"m_{k}{shard.suffix}").write_bytes(shard.read_bytes())
                paths.append(path)
            for path, message in outcomes(paths):
                check(path, message)
                crashed = "crashed" in message or "without a heartbeat" in message
                ends["read" if message == "read" else "ended" if crashed else "refused"] += 1
                if message == "read" and ends["read"] % SHARE == 0:
                    attempt(path)
            for path in {*folder.glob("*.*")} - shared:
                path.unlink()
    say(f"{name}: {dict(ends)}")
    return ends


def main() -> int:
    """Fuzz all formats, or some."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=21_000, help="files in all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("formats", nargs="*", default=list(TARGETS), metavar="FORMAT")
    asked = parser.parse_args()
    for name in asked.formats:
        fuzz(name, asked.count // len(asked.formats), asked.seed)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(f"peak memory of a child: {peak >> 20} MiB")
    return 0 if peak <= MEMORY else 1


if __name__ == "__main__":
    sys.exit(main())

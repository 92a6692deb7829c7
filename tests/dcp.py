"""Distributed checkpoints written opcode by opcode, without PyTorch: sound ones and lies.

The test with PyTorch's own are in `tests/torch/test_dcp.py`.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tests.test_torch_zip import PROTO, STOP, call, name, number, several, storage, text, view

Array = npt.NDArray[Any]
MODULE = "torch.distributed.checkpoint"
#: The class that says where an item lies; OLMo-core has one of its own.
STORED = f"{MODULE}.filesystem _StorageInfo"
STORED_BY_OLMO = "olmo_core.distributed.checkpoint.filesystem _StorageInfo"
#: numpy's type -> PyTorch's storage and type.
TYPES = {
    "float16": ("torch HalfStorage", "torch float16"),
    "float32": ("torch FloatStorage", "torch float32"),
    "float64": ("torch DoubleStorage", "torch float64"),
    "int32": ("torch IntStorage", "torch int32"),
    "int64": ("torch LongStorage", "torch int64"),
}


class Piece(NamedTuple):
    """A block of a tensor, and the part that it goes to."""

    file: str
    start: tuple[int, ...]
    values: Array


def pairs(items: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Return the opcodes of a dictionary."""
    return b"}(" + b"".join(key + value for key, value in items) + b"u"


def attributes(kind: str, **state: bytes) -> bytes:
    """Return the opcodes of a dataclass with its attributes."""
    return name(kind) + b")\x81" + pairs([(text(key), one) for key, one in state.items()]) + b"b"


def sizes(numbers: Sequence[int]) -> bytes:
    """Return the opcodes of a `torch.Size`."""
    return call("torch Size", several(*map(number, numbers)))


def chunk(start: Sequence[int], shape: Sequence[int]) -> bytes:
    """Return the opcodes of one block's description."""
    kind = f"{MODULE}.metadata ChunkStorageMetadata"
    return attributes(kind, offsets=sizes(start), sizes=sizes(shape))


def item(dtype: str, shape: Sequence[int], chunks: Sequence[bytes]) -> bytes:
    """Return the opcodes of a tensor's description."""
    layout = call("torch.serialization _get_layout", text("torch.strided"))
    encoding = call(f"{MODULE}.metadata _MEM_FORMAT_ENCODING", number(0))
    state = several(name(dtype), layout, b"\x89", encoding, b"\x89")
    properties = name(f"{MODULE}.metadata TensorProperties") + b")\x81" + state + b"b"
    return attributes(
        f"{MODULE}.metadata TensorStorageMetadata",
        properties=properties,
        size=sizes(shape),
        chunks=b"](" + b"".join(chunks) + b"e",
    )


def plain_item() -> bytes:
    """Return the opcodes of the description of what is not a tensor."""
    return name(f"{MODULE}.metadata BytesStorageMetadata") + b")\x81"


def place(
    fqn: str,
    start: Sequence[int] | None,
    file: str,
    offset: int,
    length: int,
    kind: str = STORED,
    **more: bytes,
) -> tuple[bytes, bytes]:
    """Return the opcodes of where an item lies."""
    offsets = {} if start is None else {"offset": sizes(start)}
    return (
        attributes(f"{MODULE}.metadata MetadataIndex", fqn=text(fqn), index=b"N", **offsets),
        attributes(
            kind,
            relative_path=text(file),
            offset=number(offset),
            length=number(length),
            **more,
        ),
    )


def metadata(
    items: Mapping[str, bytes], places: Sequence[tuple[bytes, bytes]], **more: bytes
) -> bytes:
    """Return the pickle of `.metadata`."""
    saved = call("pathlib PosixPath", text("/runs"), text("step-1"))
    root = attributes(
        f"{MODULE}.metadata Metadata",
        state_dict_metadata=pairs([(text(key), one) for key, one in items.items()]),
        planner_data=more.pop("planner_data", b"N"),
        storage_data=pairs(places),
        storage_meta=attributes(f"{MODULE}.metadata StorageMeta", checkpoint_id=saved),
        version=text("1.0.0"),
        **more,
    )
    return PROTO + root + STOP


def archive(values: Array, pickle: bytes | None = None) -> bytes:
    """Return what `torch.save` writes for one tensor."""
    if pickle is None:
        kind, _ = TYPES[values.dtype.name]
        strides = tuple(step // values.itemsize for step in values.strides)
        pickle = view(storage("0", values.size, kind), values.shape, strides)
    order = sorted(range(values.ndim), key=lambda k: -values.strides[k])
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", PROTO + pickle + STOP)
        file.writestr("archive/byteorder", "little")
        file.writestr("archive/data/0", values.transpose(order).tobytes())
        file.writestr("archive/version", "3\n")
    return buffer.getvalue()


def write(
    folder: Path,
    tensors: Mapping[str, Sequence[Piece]],
    plain: Mapping[str, bytes] | None = None,
    kind: str = STORED,
) -> Path:
    """Write a checkpoint whose tensors have the blocks given; return its `.metadata`."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, bytes] = {}
    items: dict[str, bytes] = {}
    places = []
    for key, pieces in tensors.items():
        shape = [
            max(one.start[k] + one.values.shape[k] for one in pieces)
            for k in range(pieces[0].values.ndim)
        ]
        chunks = [chunk(one.start, one.values.shape) for one in pieces]
        items[key] = item(TYPES[pieces[0].values.dtype.name][1], shape, chunks)
        for one in pieces:
            content = archive(one.values)
            before = parts.get(one.file, b"")
            places.append(place(key, one.start, one.file, len(before), len(content), kind))
            parts[one.file] = before + content
    for key, content in (plain or {}).items():
        items[key] = plain_item()
        before = parts.get("__0_0.distcp", b"")
        places.append(place(key, None, "__0_0.distcp", len(before), len(content), kind))
        parts["__0_0.distcp"] = before + content
    for file, content in parts.items():
        (folder / file).write_bytes(content)
    (folder / ".metadata").write_bytes(metadata(items, places))
    return folder / ".metadata"


def split(values: Array, counts: Sequence[int]) -> list[Piece]:
    """Divide an array evenly along each dimension, one part for each block."""
    bounds = [
        np.linspace(0, size, count + 1).astype(int).tolist()
        for size, count in zip(values.shape, counts, strict=True)
    ]
    pieces = []
    for rank, index in enumerate(np.ndindex(*counts)):
        block = tuple(slice(bounds[d][k], bounds[d][k + 1]) for d, k in enumerate(index))
        start = tuple(one.start for one in block)
        pieces.append(Piece(f"__{rank}_0.distcp", start, np.array(values[block], order="C")))
    return pieces

"""Writes checkpoints in Keras's layout, and compares model files, with h5py and no framework.

Runs in a separate process.  Imports nothing of the package under test.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from tests.benchmarks.material import ITEMSIZE, Material

Array = npt.NDArray[Any]
#: Layer -> name of the weight -> shape.
Layers = Mapping[str, Mapping[str, tuple[int, ...]]]

_PER_LAYER = 4
_BLOCK = 1 << 24  # elements made at a time
#: Keras splits a list of names that is longer, in bytes.
_LONGEST_LIST = 64512
_SAFETENSORS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}


def layers_of(material: Material) -> Layers:
    """Return the shapes of a material's tensors."""
    width = ITEMSIZE[material.dtype]
    if not material.count:
        units = max(1, math.isqrt(material.nbytes // material.layers // width))
        names = ["dense" if not k else f"dense_{k}" for k in range(material.layers)]
        return {
            layer: {
                f"sequential/{layer}/kernel": (units, units),
                f"sequential/{layer}/bias": (units,),
            }
            for layer in names
        }
    elements = max(1, material.nbytes // material.count // width)
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for k in range(material.count):
        layer = f"layer_{k // _PER_LAYER}"
        found.setdefault(layer, {})[f"sequential/{layer}/weight_{k % _PER_LAYER}"] = (elements,)
    return found


def make(material: Material, folder: Path) -> None:
    """Write all files of a material, and beside them how many tensors and bytes each has."""
    layers = layers_of(material)
    paths = [folder / f"model_{epoch:03d}.h5" for epoch in range(material.files)]
    template = folder / "template"
    places = _lay_out(template, material, layers)
    for epoch, path in enumerate(paths):
        shutil.copyfile(template, path)
        _fill(path, material, places, np.random.default_rng(epoch))
        if material.safetensors:
            _as_safetensors(path, material, places)
    template.unlink()
    shapes = [shape for weights in layers.values() for shape in weights.values()]
    nbytes = ITEMSIZE[material.dtype] * sum(math.prod(shape) for shape in shapes)
    (folder / "made.json").write_text(json.dumps({"tensors": len(shapes), "nbytes": nbytes}))


# --- .h5 ------------------------------------------------------------------------------------------

#: Dataset -> shape, and where it lies; no offset where it is compressed.
Places = Mapping[str, tuple[tuple[int, ...], int | None]]


def _lay_out(path: Path, material: Material, layers: Layers) -> Places:
    """Write a checkpoint with all but its values, and return where these go."""
    places: dict[str, tuple[tuple[int, ...], int | None]] = {}
    with h5py.File(path, "w", libver="earliest") as file:
        file.attrs["backend"] = "tensorflow"
        file.attrs["keras_version"] = "3.15.1"
        file.attrs["model_config"] = _config(layers).encode()
        group = file.create_group("model_weights")
        _write_names(group, "layer_names", list(layers))
        group.create_group("top_level_model_weights").attrs["weight_names"] = np.zeros((0,))
        for layer, weights in layers.items():
            below = group.create_group(layer)
            _write_names(below, "weight_names", list(weights))
            places |= _create(below, f"model_weights/{layer}", weights, material)
        if material.optimizer:
            group = file.create_group("optimizer_weights")
            slots = {
                f"sgd/{name.replace('/', '_')}_momentum": shape
                for weights in layers.values()
                for name, shape in weights.items()
            }
            _write_names(group, "weight_names", list(slots))
            places |= _create(group, "optimizer_weights", slots, material)
    return places


def _create(
    group: Any, where: str, shapes: Mapping[str, tuple[int, ...]], material: Material
) -> Places:
    """Create datasets that have their place in the file before they have values."""
    if material.compression:
        for name, shape in shapes.items():
            group.create_dataset(name, shape, _stored(material), compression=material.compression)
        return {f"{where}/{name}": (shape, None) for name, shape in shapes.items()}
    early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    early.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    between = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    between.set_create_intermediate_group(True)
    stored = h5py.h5t.py_create(_stored(material))
    found: dict[str, tuple[tuple[int, ...], int | None]] = {}
    # Not create_dataset, which takes four times as long where there are 100,000.
    for name, shape in shapes.items():
        space = h5py.h5s.create_simple(shape)
        made = h5py.h5d.create(group.id, name.encode(), stored, space, early, between)
        found[f"{where}/{name}"] = shape, made.get_offset()
    return found


def _stored(material: Material) -> np.dtype[Any]:
    """Return the type of the datasets: Keras stores bfloat16 as two opaque bytes."""
    return np.dtype("V2" if material.dtype == "bfloat16" else material.dtype)


def _write_names(group: Any, key: str, names: Sequence[str]) -> None:
    """Write a list of names, split as Keras does when it is long."""
    encoded = np.array([name.encode() for name in names])
    parts = 1
    while any(part.nbytes > _LONGEST_LIST for part in np.array_split(encoded, parts)):
        parts += 1
    if parts == 1:
        group.attrs[key] = [name.encode() for name in names]
        return
    for k, part in enumerate(np.array_split(encoded, parts)):
        group.attrs[f"{key}{k}"] = part


def _config(layers: Layers) -> str:
    """Return the configuration of a Sequential model of Dense layers, as far as Keras needs it."""
    inside: list[dict[str, Any]] = []
    for layer, weights in layers.items():
        shape = next(iter(weights.values()))
        if len(shape) < 2:  # not a model that Keras is asked to open
            break
        if not inside:
            config: dict[str, Any] = {
                "batch_shape": [None, shape[0]],
                "dtype": "float32",
                "name": "input",
            }
            inside.append({"class_name": "InputLayer", "config": config})
        config = {"name": layer, "units": shape[1], "activation": "linear", "use_bias": True}
        inside.append({"class_name": "Dense", "config": config})
    whole = {"name": "sequential", "trainable": True, "dtype": "float32", "layers": inside}
    return json.dumps({"class_name": "Sequential", "config": whole})


def _fill(path: Path, material: Material, places: Places, random: np.random.Generator) -> None:
    """Give every dataset of a file random values, and sync it."""
    if material.compression:
        with h5py.File(path, "r+") as file:
            for name, (shape, _) in places.items():
                blocks = list(_random(random, math.prod(shape), material.dtype))
                file[name][...] = np.concatenate(blocks).view(_stored(material)).reshape(shape)
    descriptor = os.open(path, os.O_RDWR)
    for shape, offset in places.values():
        if offset is None:
            continue
        for block in _random(random, math.prod(shape), material.dtype):
            offset += os.pwrite(descriptor, block.tobytes(), offset)
    os.fsync(descriptor)
    os.close(descriptor)


def _random(random: np.random.Generator, count: int, dtype: str) -> Iterator[Array]:
    """Return values from 0 to 0.5, in blocks; models without a common direction are refused."""
    while count:
        taken = min(count, _BLOCK)
        count -= taken
        if dtype == "float64":
            yield random.random(taken) / 2
            continue
        values = random.random(taken, np.float32)
        values /= np.float32(2)
        if dtype == "bfloat16":  # the upper half of a float32
            yield (values.view(np.uint32) >> 16).astype(np.uint16)
        else:
            yield values.astype(dtype, copy=False)


# --- safetensors ----------------------------------------------------------------------------------


def _as_safetensors(path: Path, material: Material, places: Places) -> None:
    """Write the tensors of a file once more, as safetensors."""
    header: dict[str, Any] = {}
    end = 0
    for name, (shape, _) in places.items():
        start, end = end, end + math.prod(shape) * ITEMSIZE[material.dtype]
        header[name] = {
            "dtype": _SAFETENSORS[material.dtype],
            "shape": shape,
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "rb") as source, open(path.with_suffix(".safetensors"), "wb") as target:
        target.write(len(encoded).to_bytes(8, "little") + encoded)
        for shape, offset in places.values():
            source.seek(offset or 0)
            left = math.prod(shape) * ITEMSIZE[material.dtype]
            while left:
                left -= target.write(source.read(min(left, 1 << 24)))
        target.flush()
        os.fsync(target.fileno())


def _read_safetensors(path: Path) -> Iterator[tuple[str, Array]]:
    """Return names and values of a file of float32 tensors."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        begin = file.tell()
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] != "F32":
                raise SystemExit(f"'{name}' is {entry['dtype']}, not F32")
            start, stop = entry["data_offsets"]
            values = np.fromfile(
                file, "<f4", (stop - start) // 4, offset=begin + start - file.tell()
            )
            yield name, values.reshape(entry["shape"])


# --- comparing ------------------------------------------------------------------------------------


def compare(reference: Path, output: Path) -> dict[str, Any]:
    """Compare each tensor of the reference with the output's of that name, bit for bit.

    Raises:
        SystemExit: a tensor is missing or of another shape.
    """
    same, deviation, seen = True, 0.0, 0
    with h5py.File(reference, "r") as file:
        wanted = _datasets(file["model_weights"])
        for name, values in _tensors(output):
            if name not in wanted:
                continue
            expected = file[name][()]
            if values.shape != expected.shape:
                raise SystemExit(f"'{name}' has shape {values.shape}, expected {expected.shape}")
            seen += 1
            same &= values.dtype == expected.dtype and values.tobytes() == expected.tobytes()
            if values.size and values.dtype.kind == "f":
                deviation = max(deviation, float(np.max(np.abs(values - expected))))
    if seen < len(wanted):
        raise SystemExit(f"{len(wanted) - seen} tensors are missing from the output")
    return {"same": bool(same), "deviation": deviation}


def _tensors(path: Path) -> Iterator[tuple[str, Array]]:
    """Return names and values of a model file, of safetensors, or of a folder of these."""
    if path.is_dir() or path.suffix == ".safetensors":
        for part in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
            yield from _read_safetensors(part)
        return
    with h5py.File(path, "r") as file:
        for name in sorted(_datasets(file["model_weights"])):
            yield name, file[name][()]


def _datasets(group: Any) -> set[str]:
    found: set[str] = set()

    def visit(_: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            found.add(item.name.lstrip("/"))

    group.visititems(visit)
    return found


def main(arguments: Sequence[str]) -> None:
    """Do one of: make DESCRIPTION FOLDER; compare REFERENCE OUTPUT ANSWER."""
    if arguments[0] == "make":
        make(Material(**json.loads(arguments[1])), Path(arguments[2]))
    else:
        reference, output, answer = map(Path, arguments[1:])
        answer.write_text(json.dumps(compare(reference, output)))


if __name__ == "__main__":
    main(sys.argv[1:])

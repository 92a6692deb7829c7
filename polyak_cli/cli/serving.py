"""Which formats and frameworks each command serves, as its help says it.

The formats themselves are in `formats.catalogue`, which imports numpy: help does not need that, so
their names stand here once more, and a test compares them.
"""

from __future__ import annotations

from collections.abc import Mapping

#: Framework -> key of each of its formats -> how its users call the files.
FRAMEWORKS: Mapping[str, Mapping[str, str]] = {
    "Keras": {
        "hdf5": ".h5, .hdf5, .weights.h5",
        "keras_zip": ".keras",
        "weights_json": ".weights.json",
    },
    "PyTorch": {
        "torch_zip": ".pt, .pth, .pth.tar, .bin, .ckpt",
        "torch_shards": ".bin.index.json",
        "torch_dcp": "DCP folders",
    },
    "Hugging Face": {
        "safetensors": ".safetensors, .safetensors.index.json, folders",
        "modules": "sentence-transformers",
    },
    "JAX": {"orbax": "Orbax folders"},
    "TensorFlow": {"tf_bundle": ".index"},
    "numpy": {"npz": ".npz"},
}


def _list_frameworks(left_out: str = "") -> str:
    """Return the frameworks, except one, and their files."""
    return "; ".join(
        f"{framework} ({', '.join(files.values())})"
        for framework, files in FRAMEWORKS.items()
        if framework != left_out
    )


#: What is read without running a model, so that no framework is needed.
EVERY = f"{_list_frameworks()}. No framework is needed."
#: The same, without the option that runs the model.
AVERAGED = f"{EVERY[:-1]} without --recalibrate. With it, see polyak recalibrate --help."
WATCHED = f"{EVERY[:-1]} without --data. With it, see polyak evaluate --help."
_WHOLE = (
    "whole models of Keras (.keras, .h5, .hdf5) with polyak[tensorflow], or Keras on PyTorch; with "
    "--model also weights: Keras (.weights.h5, .weights.json)"
)
#: What is run: with the layers in the file, or with those that --model gives.
RUN = (
    f"{_WHOLE}; {_list_frameworks('Keras')}. A torch.nn.Module needs "
    "polyak[torch]; a function of the tensors, such as one of JAX, needs what it imports."
)
REWRITTEN = (
    f"{_WHOLE}; PyTorch ({', '.join(FRAMEWORKS['PyTorch'].values())}) and Hugging Face "
    f"({FRAMEWORKS['Hugging Face']['safetensors']}), as a torch.nn.Module with polyak[torch]."
)
WRITTEN = "writes Keras (.h5), with polyak[tensorflow]."
NONE = "none; no checkpoint is read."

"""Build the model that weights files belong to, from the ARCH of ``--model``.

A weights file has tensors without layers.  ARCH is a whole Keras model, the JSON of
``model.to_json()``, or a function of the user that returns the model.  Only that function is code
that runs; files are inspected first and loaded in Keras's safe mode.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyak_cli import formats
from polyak_cli.errors import MismatchError, UsageError, shown
from polyak_cli.evaluation import user_code
from polyak_cli.evaluation.keras_files import (
    LONGEST_CONFIG,
    Description,
    describe_archive,
    describe_config,
    describe_hdf5_files,
    is_zip,
    reword_keras_errors,
)
from polyak_cli.formats.keras.names import WEIGHTS_SUFFIX
from polyak_cli.storage import mirrors
from polyak_cli.storage.local import open_local
from polyak_cli.tensors import Table

EXPECTED = "expected a whole model (.keras or .h5), FILE.json or MODULE.py:FUNCTION"


class Architecture:
    """The model that weights files are loaded into.

    Attributes:
        description: its texts; those of a function are not known before it runs.
    """

    def __init__(self, source: str, *, trust_code: bool = False) -> None:
        """Inspect ARCH; a function is not called yet.

        Args:
            source: a ``.keras`` or whole-model ``.h5`` file, ``FILE.json``, or
                ``MODULE.py:FUNCTION``.
            trust_code: run the code that a file carries in a Lambda layer.

        Raises:
            UsageError: it is none of these.
            FormatError: the file is damaged or holds no architecture.
        """
        self._source, self._trust_code = source, trust_code
        self._path = Path(source)
        self._shapes: Counter[tuple[int, ...]] = Counter()
        self._is_function = user_code.is_function(source)
        if self._is_function:
            self.description = Description(source, "", "")
        elif self._path.suffix == ".py":
            raise UsageError(f"--model {shown(source)}: names no function; {EXPECTED}")
        else:
            self.description = self._describe_file()
        self.description = self.description._replace(weights=True)

    def _describe_file(self) -> Description:
        path = self._path
        if not path.is_file():
            raise UsageError(f"--model {shown(self._source)}: there is no such file; {EXPECTED}")
        if path.suffix == ".json":
            with open_local(path) as file, file.stream() as stream:
                return describe_config(path, stream.read(LONGEST_CONFIG + 1), assets=False)
        if path.suffix == ".keras" and is_zip(path):
            return describe_archive(path)
        return next(iter(describe_hdf5_files([path])))

    def build(self, keras: Any) -> tuple[Any, str]:
        """Return a new model, and the JSON of its training configuration.

        Raises:
            PolyakError: Keras cannot build it, or it carries code, or the function failed.
        """
        if self._is_function:
            return self._call_function(keras)
        with reword_keras_errors(self._path, "cannot build it", lambda: ""):
            if self._path.suffix == ".json":
                config = json.loads(self.description.architecture)
                model = keras.saving.deserialize_keras_object(
                    config, safe_mode=not self._trust_code
                )
            else:
                model = keras.saving.load_model(
                    self._path, compile=False, safe_mode=not self._trust_code
                )
        return self._check_kind(keras, model), self.description.training

    def _call_function(self, keras: Any) -> tuple[Any, str]:
        returned = user_code.find_function(self._source, EXPECTED).call()
        model = self._check_kind(keras, returned)
        with reword_keras_errors(self._path, "cannot compile it", lambda: ""):
            training = json.dumps(model.get_compile_config()) if model.compiled else ""
            # load_weights would look for the state of an optimizer, which averages do not have.
            model.compile(optimizer=None)
        return model, training

    def _check_kind(self, keras: Any, model: Any) -> Any:
        if not isinstance(model, keras.Model):
            raise UsageError(
                f"--model {shown(self._source)}: is a {shown(type(model).__name__, 60)}, expected "
                "a keras.Model"
            )
        return model

    def load_weights(self, model: Any, table: Table) -> None:
        """Replace the tensors of a model that was built here by those of a weights file.

        Keras passes silently over what the model does not have, so all shapes are compared first.

        Raises:
            MismatchError: the file has other tensors than the model.
            FormatError: the file is damaged.
        """
        path = Path(table.files[0].path)
        if path.name.endswith((WEIGHTS_SUFFIX, ".weights.json")):
            self._shapes = self._shapes or _list_saved_shapes(model)
            _compare_shapes(self._source, self._shapes, table)
        with mirrors.fetched([file.path for file in table.files]) as local:
            model.load_weights(local)


def _list_saved_shapes(model: Any) -> Counter[tuple[int, ...]]:
    """Return how often Keras saves a tensor of each shape.

    Only Keras knows: a wrapper may save a kernel twice, and the state of a Dropout is saved too.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"model{WEIGHTS_SUFFIX}")
        model.save_weights(path)
        (table,) = formats.scan([path])
    return _count_shapes(table)


def _count_shapes(table: Table) -> Counter[tuple[int, ...]]:
    return Counter(tuple(spec.shape) for spec in table.tensors.values())


def _compare_shapes(source: str, expected: Mapping[tuple[int, ...], int], table: Table) -> None:
    """Refuse weights of another model."""
    found = _count_shapes(table)
    for shape in [*found, *expected]:
        ours, theirs = found[shape], expected.get(shape, 0)
        if ours != theirs:
            raise MismatchError(
                f"{shown(table.path)}: holds {ours} tensors of shape {list(shape)}, expected "
                f"{theirs} as in --model {shown(source)}; name the architecture that was trained, "
                "built (a model without an Input is built by its first call)"
            )

"""Decide what runs the model of a file.

Knows formats; imports no framework, and opens files only to recognise them.
"""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from polyak_cli.checkpoints import find_file
from polyak_cli.errors import FormatError, shown
from polyak_cli.evaluation import user_code
from polyak_cli.evaluation.architectures import EXPECTED
from polyak_cli.evaluation.keras_files import choose_back_end
from polyak_cli.formats.catalogue import detect, find_format
from polyak_cli.formats.format import Format


def recognise(path: Path) -> Format:
    """Return the format of a checkpoint.

    Raises:
        FormatError: it is foreign, or not there.
    """
    if path.suffix == ".keras":  # by which Keras itself decides
        return find_format("keras_zip")
    return find_format(detect(find_file(path)))


def takes_tensors(model: str | None) -> bool:
    """Return whether a model is a function of the tensors, which serves files of every format.

    Raises:
        PolyakError: its module cannot be imported, or has no such function.
    """
    if model is None or not user_code.is_function(model):
        return False
    choose_back_end()  # the file of the function may import Keras
    return user_code.find_function(model, EXPECTED).count_arguments() == 1


def refuse_missing_model(path: Path, form: Format) -> NoReturn:
    """Refuse tensors without a function that makes their model.

    Raises:
        FormatError: always.
    """
    raise FormatError(
        f"{shown(path)}: is {form.name}, which holds tensors without a model; name a function that "
        "returns it, such as a torch.nn.Module: --model MODULE.py:FUNCTION"
    )

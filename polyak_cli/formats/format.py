"""What one way of storing checkpoints has to offer, as a class to inherit from.

Knows no format itself.  A new format is one subclass in a file of its own and one line in
`formats.FORMATS`; `tests/contract.py` says what it has to pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from polyak_cli.processes.sandbox import Heartbeat
from polyak_cli.tensors import COMMON, Checksum, Placement, Table

#: See `Format.recalculation`, of tensors that a module of PyTorch takes.
RUN_MODULE = (
    "--recalibrate DATA --model MODULE.py:FUNCTION, or load the average, and call "
    "torch.optim.swa_utils.update_bn(loader, model)"
)


class ScanRequest(NamedTuple):
    """A checkpoint to scan, and whether to list also what is not the model's own."""

    path: str
    with_optimizer: bool
    key: str = ""  # of the part to take for the model, where a format has parts


class SkeletonRequest(NamedTuple):
    """An output to write except for its averaged tensors."""

    template: Table  # the checkpoint that it will be like
    output: str  # the hidden path to write
    averaged: Mapping[str, str]  # location in the template -> dtype to store
    drop_optimizer: bool
    provenance: str  # the record to write into it, as JSON
    architecture: str = ""  # the path of a whole model to which the template's tensors are added
    only_weights: bool = False  # what is neither the model's nor its optimizer's may be left out


class OutputForm(NamedTuple):
    """How an output is made like its template."""

    key: str = ""  # of its format; "" for the template's
    extract: bool = False  # it has the tensors of a whole model alone
    architecture: Table | None = None  # of the whole model to which it adds its tensors


class Draft(NamedTuple):
    """What a child reports of the skeleton that it wrote."""

    placements: Mapping[str, Placement]  # location in the template -> where its values belong
    files: Sequence[str] = ()  # where there are several; see `storage.publishing.publish`
    notes: Mapping[str, Any] = {}  # what `Format.finalize` needs; JSON can hold it


class Format(ABC):
    """One way of storing checkpoints.

    `finalize` runs in the parent.  Everything else that takes a heartbeat runs in a child of
    `processes.sandbox`, and calls the heartbeat every few hundred tensors.
    """

    #: The name in tables and records; it never changes.
    key: ClassVar[str]
    #: How its users call it.
    name: ClassVar[str]
    #: What an output of it may be called.
    suffixes: ClassVar[tuple[str, ...]]
    #: The suffix by which Keras tells another layout of the same format.
    weights_suffix: ClassVar[str] = ""
    #: How Keras finds the variables of a whole model in it: by the order of its layers ("layers"),
    #: or by the tree of its objects ("objects"); "" where Keras opens no whole model.
    keras_layout: ClassVar[Literal["", "layers", "objects"]] = ""
    #: How its users compute BatchNorm's statistics again where the file holds no whole Keras model.
    recalculation: ClassVar[str] = (
        "load the average into the model, and run training data through it in training mode, "
        "without a step of the optimizer"
    )
    #: Its files hold checksums of their tensors.
    has_checksums: ClassVar[bool] = False
    #: The float types that it can store.
    dtypes: ClassVar[frozenset[str]] = COMMON
    #: The float types that it can store in place of one another although its files are fixed
    #: otherwise (`OutputRules.is_fixed`).
    retypes: ClassVar[frozenset[str]] = frozenset()
    #: Headers lie all over its files, so that an object of usual size is better fetched whole.
    is_scattered: ClassVar[bool] = False
    #: A checkpoint of it may be one part of a larger one; its tensors lie in plain extents.
    can_be_part: ClassVar[bool] = False
    #: A checkpoint holds named parts, such as a model beside its EMA; `ScanRequest.key` chooses.
    has_parts: ClassVar[bool] = False
    #: A checkpoint of several files becomes a folder of as many where the output is named so.
    can_be_folder: ClassVar[bool] = False
    #: Such a folder continues a training as its template does: all files of the template's folder
    #: are copied, and not the model's alone.
    carries_all: ClassVar[bool] = False
    #: An output leaves the optimizer's state out where its weights alone are asked for, although a
    #: program that continues the training needs every part.
    can_be_trimmed: ClassVar[bool] = False
    #: `texts` is there: its checkpoints can be converted to other formats.
    can_be_left: ClassVar[bool] = False
    #: The format to which the tensors of a whole model can be written alone; `extract` is there.
    #: The suffix of an output that asks for it is that format's ``weights_suffix``.
    inner: ClassVar[str] = ""
    #: The suffix that asks for conversion to it; "" where other formats cannot become it.
    conversion_suffix: ClassVar[str] = ""
    #: It adds the tensors of a template without a model to a whole model of its own format.
    completes: ClassVar[bool] = False
    #: The formats that become it; empty for all that can be left.
    converts_from: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def scan(self, request: ScanRequest, heartbeat: Heartbeat) -> Table:
        """Read the header of a checkpoint.

        Returns:
            Its table.  ``files`` is empty where the checkpoint is one file, which the caller knows
            best.  ``others`` and ``about`` are filled only where ``with_optimizer`` asks for them.

        Raises:
            FormatError: the file is damaged, hostile or holds no model; names file and tensor.
        """

    @abstractmethod
    def write_skeleton(self, request: SkeletonRequest, heartbeat: Heartbeat) -> Draft:
        """Write all of an output except its averaged tensors.

        Returns:
            A placement for every averaged tensor that is not empty.

        Raises:
            FormatError: the template cannot be copied safely.
            OSError: the output cannot be written.
        """

    def find_root(self, template: Table) -> Path:
        """Return the folder of a checkpoint that is one, in which its opener need not lie."""
        return template.path.parent

    def list_neighbours(self, template: Table) -> Mapping[str, str]:
        """Return folders in a checkpoint's folder that are other checkpoints, and are not copied.

        Returns:
            The names of the folders, and why each is not copied; see `model_folders.LeftOut`.
        """
        del template
        return {}

    def is_storage(self, name: str) -> bool:
        """Return whether a file beside a checkpoint stores tensors, though none was found in it.

        An output stores its own tensors in its own way, so such a file is not copied.
        """
        del name
        return False

    def name_outputs(self, template: Table) -> list[str]:
        """Return the names of the files in an output folder, relative to it, in their order."""
        folder = template.path.parent
        return [Path(file.path).relative_to(folder).as_posix() for file in template.files]

    @abstractmethod
    def is_polyak_output(self, path: str, heartbeat: Heartbeat) -> bool:
        """Return whether this tool wrote a file; a file that cannot be read it did not."""

    def read_metric(self, path: str, heartbeat: Heartbeat) -> tuple[str, float] | None:
        """Return name and value of the metric that a checkpoint keeps of itself.

        The name is "" if only the value is there; None if neither is.

        Raises:
            FormatError: the file is damaged or hostile.
        """
        del path
        heartbeat()
        return None

    def read_number(self, path: str, key: str, heartbeat: Heartbeat) -> float | None:
        """Return a number that a checkpoint keeps under a key beside its tensors; None without one.

        Raises:
            FormatError: the file is damaged or hostile.
        """
        del path, key
        heartbeat()
        return None

    def check(self, path: str, heartbeat: Heartbeat, later: int | None = None) -> list[Checksum]:
        """Compare the tensors with their checksums; asked only where ``has_checksums``.

        Args:
            path: the file that opens the checkpoint.
            heartbeat: as for `scan`.
            later: return checksums of so many bytes or more instead of reading these, where that
                is possible: they are compared while the bytes are folded.  None for none.

        Raises:
            FormatError: one is wrong; names file and tensor.
        """
        raise NotImplementedError(f"{self.key} has no checksums")

    def finalize(self, output: str, draft: Draft) -> None:  # noqa: B027 - most need nothing
        """Finish an output whose tensors are written, such as with their checksums.

        Raises:
            OSError: it cannot be written.
        """

    def texts(self, table: Table, heartbeat: Heartbeat) -> dict[str, str]:
        """Return all that a checkpoint says besides its tensors; asked where ``can_be_left``.

        Raises:
            OutputError: it says something that is not a text.
        """
        raise NotImplementedError(f"{self.key} cannot be left")

    def extract(self, request: SkeletonRequest, heartbeat: Heartbeat) -> Draft:
        """Write a skeleton of a whole model's tensors alone; asked where ``inner`` is a format."""
        raise NotImplementedError(f"{self.key} has no tensors alone")

    def refuse_extraction(  # noqa: B027 - where the file inside is copied, nothing is in the way
        self, request: SkeletonRequest, heartbeat: Heartbeat
    ) -> None:
        """Refuse a model whose tensors cannot be written alone.

        Raises:
            OutputError: says what and why, without the names of files.
        """

    def refuse_conversion(self, request: SkeletonRequest, texts: Mapping[str, str]) -> None:
        """Refuse what this format cannot hold; asked where it has a ``conversion_suffix``.

        Raises:
            OutputError: says what and why, without the names of files.
        """
        raise NotImplementedError(f"{self.key} cannot be entered")

    def convert(
        self, request: SkeletonRequest, texts: Mapping[str, str], heartbeat: Heartbeat
    ) -> Draft:
        """Write a skeleton from a template of another format; see `write_skeleton`."""
        raise NotImplementedError(f"{self.key} cannot be entered")

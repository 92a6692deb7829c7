"""Read Keras 3's sharded weights: `x.weights.json`, and the `x_00000.weights.h5` ... that it names.

Keras writes them with ``save_weights("x.weights.json", max_shard_size=...)``; a group of variables
may begin in one shard and end in the next.  The output is a single `.weights.h5`, which Keras opens
just as well and in which nothing is lost.  Does not know HDF5; see `hdf5.keras_files`.
"""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from polyak_cli.errors import FormatError, shown
from polyak_cli.formats.format import Draft, Format, ScanRequest, SkeletonRequest
from polyak_cli.formats.hdf5 import keras_files, skeleton
from polyak_cli.formats.hdf5.keras_files import Weights
from polyak_cli.formats.keras import names as keras_names
from polyak_cli.formats.keras.names import WEIGHTS_SUFFIX
from polyak_cli.formats.sharding import read_index
from polyak_cli.processes.sandbox import Heartbeat
from polyak_cli.storage import File, Version, read_version
from polyak_cli.tensors import Table, TensorSpec


def _check_shard(index: Path, shard: Path) -> Version:
    """Return the version of a shard; refuse a link, which may lead to any file."""
    try:
        status = os.lstat(shard)  # not `stat`: a link is to be seen as one
    except OSError as error:
        raise FormatError(
            f"{shown(index)}: its shard {shown(shard.name)} cannot be read: {error.strerror}"
        ) from None
    if not stat.S_ISREG(status.st_mode):
        raise FormatError(
            f"{shown(index)}: its shard {shown(shard.name)} is a link or not a regular file"
        )
    return read_version(shard, status)


def _check_groups(part: Weights, groups: list[str], path: Path, with_optimizer: bool) -> None:
    """Refuse a shard without a group that the JSON promises: another save may have replaced it."""
    held = {spec.location.rpartition("/")[0] for spec in (*part.tensors, *part.others)}
    # Without the optimizer's part, groups that belong to it are not read and cannot be missed.
    for group in groups:
        if group not in held and (with_optimizer or not keras_names.is_aside(group)):
            raise FormatError(
                f"{shown(path)}: has no tensor in '{shown(group)}', although its .json lists one; "
                "the files come from different saves"
            )


def _check_once(specs: Sequence[TensorSpec], index: Path) -> None:
    """Refuse a tensor that two shards hold."""
    ((name, times),) = Counter(spec.name for spec in specs).most_common(1) or [("", 1)]
    if times > 1:
        raise FormatError(f"{shown(index)}: two of its shards hold tensor '{shown(name)}'")


class KerasShards(Format):
    """The `.weights.json` of Keras 3 and the shards that it names."""

    key = "weights_json"
    is_scattered = True
    name = "sharded Keras weights"
    suffixes = (WEIGHTS_SUFFIX,)
    recalculation = keras_names.RECALCULATION
    can_be_left = True

    def scan(self, request: ScanRequest, heartbeat: Heartbeat) -> Table:
        """See `Format.scan`."""
        index = Path(request.path)
        files = [File(request.path, read_version(index))]
        # Each shard is read as a weights file of its own, and what was found is put together.
        found = Weights([], [], {}, False, {})  # False: this tool writes no index
        for shard, groups in read_index(request.path, "", json.loads).shards.items():
            path = index.parent / shard
            files.append(File(str(path), _check_shard(index, path)))
            part = keras_files.read_weights(
                str(path),
                heartbeat,
                with_optimizer=request.with_optimizer,
                number=len(files) - 1,
            )
            found.tensors.extend(part.tensors)
            found.others.extend(part.others)
            found.labels.update({k: label for k, label in part.labels.items() if label})
            _check_groups(part, groups, path, request.with_optimizer)
        # A group that goes on in the next shard keeps counting, so no name comes twice.
        _check_once(found.tensors, index)
        return keras_files.build_weights_table(self.key, request.path, found, files)

    def write_skeleton(self, request: SkeletonRequest, heartbeat: Heartbeat) -> Draft:
        """See `Format.write_skeleton`."""
        return skeleton.merge(
            request, [file.path for file in request.template.files[1:]], heartbeat
        )

    def texts(self, table: Table, heartbeat: Heartbeat) -> dict[str, str]:
        """See `Format.texts`; the JSON says nothing that the shards do not."""
        said: dict[str, str] = {}
        for shard in table.files[1:]:
            said |= keras_files.read_texts(shard.path, heartbeat)
        return said

    def is_polyak_output(self, path: str, heartbeat: Heartbeat) -> bool:
        """Return False: this tool writes a single file instead."""
        del path, heartbeat
        return False

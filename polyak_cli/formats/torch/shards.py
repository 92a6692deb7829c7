"""Shards of `torch.save` with an index, as Transformers wrote them before safetensors.

`pytorch_model.bin.index.json` says which tensor is in which shard; each shard is a state dict of
its own.  The output has the same shards, since each keeps a pickle of its own tensors.  The index
is copied, except the size of all tensors where these get another type.
"""

from __future__ import annotations

import json
from pathlib import Path

from polyak_cli.errors import FormatError
from polyak_cli.formats.catalogue import find_format
from polyak_cli.formats.format import RUN_MODULE, ScanRequest, SkeletonRequest
from polyak_cli.formats.parts import FormatOfParts, Part, request_scan, scan_part
from polyak_cli.formats.sharding import check_shard, read_index
from polyak_cli.formats.torch.archive import read_names
from polyak_cli.formats.torch.pickles import SIZES
from polyak_cli.processes.sandbox import Heartbeat
from polyak_cli.storage.local import LocalOutput
from polyak_cli.tensors import Table

_SUFFIX = ".bin"
#: What the index says of the bytes of all tensors.
_SIZE = "total_size"


class TorchShards(FormatOfParts):
    """`pytorch_model.bin.index.json` and the shards that it names."""

    key = "torch_shards"
    is_scattered = True
    name = "PyTorch in shards"
    suffixes = ()
    recalculation = RUN_MODULE
    can_be_left = True
    can_be_part = True

    def scan_parts(self, request: ScanRequest, heartbeat: Heartbeat) -> list[Part]:
        """Read the shards, which must hold the very tensors that the index says."""
        path = Path(request.path)
        index = read_index(request.path, _SUFFIX, json.loads)
        found = []
        for name in sorted(index.shards):
            found.append(scan_part(path.parent, name, "", request, heartbeat))
            # Tied tensors are compared by all of their names, of which the table has one.
            held = read_names(str(path.with_name(name)), heartbeat)
            check_shard(request.path, index, name, held)
        return found

    def write_index(self, request: SkeletonRequest, heartbeat: Heartbeat) -> str:
        """See `FormatOfParts.write_index`."""
        specs = {spec.location: spec for spec in request.template.tensors.values()}
        grown = sum(
            specs[where].size * (SIZES[dtype] - SIZES[specs[where].dtype])
            for where, dtype in request.averaged.items()
        )
        source = request.template.files[-1]
        content = read_index(source.path, _SUFFIX, json.loads).content
        said = content.get("metadata")
        if not grown or not isinstance(said, dict) or not isinstance(said.get(_SIZE), (int, float)):
            return super().write_index(request, heartbeat)
        target = str(Path(request.output, Path(source.path).name))
        with LocalOutput(target, create=True) as file:
            content = {**content, "metadata": said | {_SIZE: said[_SIZE] + grown}}
            file.write(0, (json.dumps(content, indent=2) + "\n").encode())
        return target

    def texts(self, table: Table, heartbeat: Heartbeat) -> dict[str, str]:
        """See `Format.texts`: each shard must hold nothing but tensors."""
        said: dict[str, str] = {}
        for part in self.scan_parts(request_scan(table), heartbeat):
            said |= find_format(part.table.format).texts(part.table, heartbeat)
        return said

    def is_polyak_output(self, path: str, heartbeat: Heartbeat) -> bool:
        """See `Format.is_polyak_output`."""
        try:
            first = min(read_index(path, _SUFFIX, json.loads).shards)
            shard = Path(path).with_name(first)
            return find_format("torch_zip").is_polyak_output(str(shard), heartbeat)
        except FormatError:
            return False

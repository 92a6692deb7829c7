"""Find and digest the files beside a checkpoint that give its tensors meaning, such as a tokenizer.

Knows how programs call such files, and what in them has no meaning for tensors.  Does not know
which checkpoints are compared.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from polyak_cli.errors import FormatError, PolyakError
from polyak_cli.formats import configurations, wire
from polyak_cli.formats.vocabularies import digest_json
from polyak_cli.processes import sandbox
from polyak_cli.processes.sandbox import Heartbeat
from polyak_cli.storage import open_input
from polyak_cli.tensors import Asset

#: Names of vocabularies and tokenizers, as Transformers, SentencePiece, fairseq, espnet, icefall
#: and others write them, and of lists of classes.
_FILES = re.compile(
    r"tokenizer\.json|added_tokens\.json|merges\.txt|tekken\.json|.*\.tiktoken"
    r"|tokenizer\.model(\.v\d+)?|spiece\.model|sentencepiece\.(bpe\.)?model|(source|target)\.spm"
    r"|(.+[._-])?(vocab|vocabulary|bpe)([._-].+)?\.(txt|json|model|bpe|tsv|yml|yaml|codes)"
    r"|encoder\.json|bpe\.codes|dict(\.\w+)?\.txt|tokens?\.txt|token_list(\.txt)?|units\.txt"
    r"|phonemes\.txt|charset\.txt|alphabet\.(txt|json)"
    r"|(class|label|category)(es|s|_?names|_?list|_?map|2id|_to_id|_to_idx|_indices)"
    r"\.(txt|json|csv)",
    re.IGNORECASE,
)
#: Of tokenizer.json: how the last batch was cut and padded, which every call may change.
_OF_A_BATCH = ("truncation", "padding")
#: Bytes of a file that are digested; tokenizers have some 40 MB at most.  JSON takes several times
#: its size when it is parsed, and the child may use 256 MB.
_MOST, _PARSED = 256 << 20, 32 << 20
_STEP = 1 << 20


def read_assets_beside(folders: Sequence[Path]) -> list[Mapping[str, Asset]]:
    """Return, for each folder, the files in it that give tensors meaning.

    They are read in a child, and parsed only where the bytes differ between folders: parsing a
    tokenizer takes a hundred times as long as digesting it.  A file that cannot be read is left
    out, as if it were not there: who loads the checkpoint cannot read it either.
    """
    listed = [_list_files(folder) for folder in folders]
    raw = _read_all(folders, listed, _digest_bytes)
    counts = Counter((name, asset.digest) for found in raw for name, asset in found.items())
    holders = Counter(name for found in raw for name in found)
    differing = [
        [name for name, asset in found.items() if counts[name, asset.digest] < holders[name]]
        for found in raw
    ]
    parsed = _read_all(folders, differing, _digest_meaning)
    return [
        {
            name: asset
            for name, asset in found.items()
            if name not in others and name not in configurations.NAMES
        }
        | meaning
        for found, others, meaning in zip(raw, differing, parsed, strict=True)
    ]


def _read_all(
    folders: Sequence[Path],
    names: Sequence[Sequence[str]],
    read: Callable[[str, str, Heartbeat], dict[str, Asset]],
) -> list[dict[str, Asset]]:
    """Return the digests of the named files of each folder, computed in a child."""
    if not any(names):
        return [{} for _ in folders]
    requests = [(str(folder), found, read) for folder, found in zip(folders, names, strict=True)]
    outcomes = sandbox.run_each(_digest_files, requests, [path for path, _, _ in requests])
    return [
        {} if isinstance(found, PolyakError) else wire.unpack_assets(found, path)
        for found, (path, _, _) in zip(outcomes, requests, strict=True)
    ]


def _list_files(folder: Path) -> list[str]:
    try:
        names = os.listdir(folder)  # noqa: PTH208 - names alone are needed
    except OSError:
        return []
    return sorted(name for name in names if name in configurations.NAMES or _FILES.fullmatch(name))


def _digest_files(
    request: tuple[str, Sequence[str], Callable[[str, str, Heartbeat], dict[str, Asset]]],
    heartbeat: Heartbeat,
) -> dict[str, Any]:
    """Return the assets of one folder, in a child."""
    folder, names, read = request
    found: dict[str, Any] = {}
    for name in heartbeat.over(names):
        try:
            assets = read(os.path.join(folder, name), name, heartbeat)
        except (FormatError, OSError):
            continue
        found |= {key: list(asset) for key, asset in assets.items()}
    return found


def _digest_bytes(path: str, name: str, heartbeat: Heartbeat) -> dict[str, Asset]:
    """Return the digest of a file's size and bytes."""
    raw = hashlib.sha256()
    with open_input(path) as file:
        raw.update(b"%d\n" % file.size)
        for offset in heartbeat.over(range(0, min(file.size, _MOST), _STEP)):
            raw.update(file.read(offset, _STEP))
    return {name: Asset(raw.hexdigest())}


def _digest_meaning(path: str, name: str, heartbeat: Heartbeat) -> dict[str, Asset]:
    """Return the digest of what a file means, or of each of its parts that have a meaning."""
    with open_input(path) as file:
        content = file.read(0, _PARSED + 1)
    reader = next(
        (r for pattern, r in _READERS.items() if re.fullmatch(pattern, name, re.IGNORECASE)), None
    )
    if reader and len(content) <= _PARSED:
        try:
            return reader(name, content)
        except (ValueError, RecursionError, MemoryError):
            pass  # what is damaged, or larger than it looks, is compared byte by byte
    return {} if name in configurations.NAMES else _digest_bytes(path, name, heartbeat)


def _read_json(name: str, content: bytes) -> dict[str, Asset]:
    """Digest JSON: neither spaces nor the order of keys have a meaning."""
    said = json.loads(content)
    if name.casefold() == "tokenizer.json" and isinstance(said, dict):
        said = {key: value for key, value in said.items() if key not in _OF_A_BATCH}
    return {name: Asset(digest_json(said))}


def _read_lines(name: str, content: bytes) -> dict[str, Asset]:
    """Digest lines: their endings, and a first line with a version, have no meaning."""
    lines = content.rstrip().splitlines()
    if name.casefold() == "merges.txt" and lines and lines[0].startswith(b"#version"):
        del lines[0]
    return {name: Asset(hashlib.sha256(b"\n".join(lines)).hexdigest())}


#: Pattern of a file's name -> what returns the digests of its content; the first that fits counts.
_READERS: Mapping[str, Callable[[str, bytes], dict[str, Asset]]] = {
    "|".join(map(re.escape, configurations.NAMES)): configurations.read_configuration,
    r".*\.json": _read_json,
    r".*\.(txt|csv|tsv)": _read_lines,
}

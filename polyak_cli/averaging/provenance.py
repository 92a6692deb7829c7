"""Say in a record what a plan averages: checkpoints, coefficients, options and files.

`records` knows how a record is encoded, sealed and checked.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from polyak_cli import __version__, checkpoints, formats
from polyak_cli.averaging import hashing
from polyak_cli.averaging.planning import Plan
from polyak_cli.averaging.records import YOUNGER_OPTIONS, remove_seal
from polyak_cli.checkpoints.folders import list_relative_paths
from polyak_cli.errors import PolyakError
from polyak_cli.formats.model_folders import FolderFiles


def make_record(plan: Plan, sampled: Sequence[str] = ()) -> dict[str, Any]:
    """Return the record that the output of a plan carries, without the seal.

    It holds no clock and no absolute path, so that the same inputs give the same bytes.

    Args:
        plan: what is averaged.
        sampled: `hashing.compute_sampled_digest` of each checkpoint, if they are known already.

    Raises:
        FormatError: a checkpoint cannot be read.
    """
    jobs = plan.settings.machine.share().jobs
    sampled = sampled or hashing.compute_sampled_digests(
        [table.files for table in plan.tables], jobs
    )
    inputs = _describe_inputs(plan, sampled)
    wanted = plan.settings.output.hash
    if wanted or (wanted is None and sum(table.size for table in plan.tables) <= hashing.HASHED):
        for record, table in zip(inputs, plan.tables, strict=True):
            found = hashing.hash_files(table.files)
            record["sha256"] = found[0] if len(found) == 1 else list(found)
    skipped = [
        {"name": one.path.name, "reasons": [problem.kind for problem in one.problems]}
        for one in plan.skipped
    ]
    suspected = [problem.kind for problem in plan.suspicions]
    whole = plan.output_form.architecture
    return {
        "polyak": __version__,
        "scheme": plan.scheme,
        "parameters": dict(plan.parameters),
        "options": _list_options(plan),
        "divisor": plan.mean.divisor,
        "inputs": inputs,
        **({"files": describe_files(plan.files)} if plan.files else {}),
        **({"model": {"name": whole.path.name, "config": whole.config}} if whole else {}),
        **({"skipped": skipped} if skipped else {}),
        **({"suspicions": suspected} if suspected else {}),
    }


def _describe_inputs(plan: Plan, sampled: Sequence[str]) -> list[dict[str, Any]]:
    """Return what a record says of the checkpoints, without the digests of all bytes."""
    names = [checkpoint.path.name for checkpoint in plan.checkpoints]
    paths = list_relative_paths([checkpoint.path for checkpoint in plan.checkpoints])
    return [
        {
            "name": name,
            **({"path": path} if paths != names else {}),
            "epoch": checkpoint.epoch,
            "size": table.size,
            "sampled_sha256": digest,
            "coefficient": coefficient,
            "multiplier": multiplier,
        }
        | about
        for name, path, checkpoint, table, coefficient, multiplier, digest, about in zip(
            names,
            paths,
            plan.checkpoints,
            plan.tables,
            plan.coefficients,
            plan.mean.multipliers,
            sampled,
            _describe_running_means(plan),
            strict=True,
        )
    ]


def _describe_running_means(plan: Plan) -> list[dict[str, float]]:
    """Return what the coefficients of running means come from, which no name need say."""
    if not plan.averages_running_means:
        return [{} for _ in plan.checkpoints]
    if not plan.sigmas:
        return [{"step": step} for step in plan.positions]
    pairs = zip(plan.positions, plan.sigmas, strict=True)
    return [{"step": step, "sigma": sigma} for step, sigma in pairs]


def describe_files(files: FolderFiles, older: object = None) -> dict[str, Any]:
    """Return what a record says of the files in an output folder.

    Args:
        files: of the output.
        older: what the record of the checkpoint says that the folder is copied from; it stays, with
            what was left out of that one, if the same files are in both.
    """
    made: dict[str, Any] = {
        "weights": list(files.weights),
        "carried": [
            {"name": one.name, "sha256": hashing.hash_file(one.file)} for one in files.carried
        ],
        "left_out": [one.name for one in files.left_out],
    }
    same = ("weights", "carried")
    if isinstance(older, dict) and all(older.get(key) == made[key] for key in same):
        return older
    return made


def _list_options(plan: Plan) -> dict[str, Any]:
    """Return the options that decide which values an average has."""
    wanted = plan.settings.tensors
    named = {one.name: getattr(wanted, one.name) for one in fields(wanted)}
    listed = {key: list(one) if isinstance(one, tuple) else one for key, one in named.items()}
    for key, (_, default) in YOUNGER_OPTIONS.items():
        if listed[key] == default:
            del listed[key]
    # What was done, and not what was asked for: some files keep the state whatever is asked.
    return listed | {"optimizer": "drop" if plan.drop_optimizer else "newest"}


def read_output_record(output: Path) -> Any:
    """Return what `make_record` made for an existing output, None if it has no such record."""
    with contextlib.suppress(PolyakError, ValueError, RecursionError):
        (table,) = formats.scan([checkpoints.find_file(output)])
        record = json.loads(table.about.get("provenance", "null"))
        return remove_seal(record) if isinstance(record, dict) else None
    return None

"""Writes several averages of the same checkpoints in one pass, as a sweep does for each batch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from polyak_cli import pipeline
from polyak_cli.averaging import schemes, writing


def write(jobs: int, count: int, folder: Path, inputs: Sequence[str]) -> None:
    """Write averages in which every checkpoint counts, the newest more in each than in the last.

    Args:
        jobs: as of `polyak average`.
        count: of averages; the first has equal coefficients.
        folder: made, for the averages 0.h5, 1.h5, ...
        inputs: checkpoints, oldest first.
    """
    folder.mkdir()
    ages = [(k + 1) / len(inputs) for k in range(len(inputs))]
    rows = [[age**power for age in ages] for power in range(count)]
    means = [schemes.make_mean(row) for row in rows]
    outputs = [folder / f"{k}.h5" for k in range(count)]
    writing.write_several(pipeline.plan(inputs, jobs=jobs), means, outputs)


if __name__ == "__main__":
    write(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])

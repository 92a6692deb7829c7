"""What a run did, for programs, for prompts and for notebooks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from polyak_cli.averaging.belonging.runs import Verdict
from polyak_cli.averaging.notebook import write_html, write_text
from polyak_cli.averaging.planning import Plan
from polyak_cli.errors import name_path, word_count, word_size

if TYPE_CHECKING:  # what knows of Keras is imported where it is asked for
    from polyak_cli.evaluation.recalibration import Recalibration


@dataclass(frozen=True, slots=True)
class Report:
    """What a run did.

    Attributes:
        output: the file that was written.
        plan: the plan that was run.
        bytes_read: bytes of tensors that were read.
        bytes_written: the size of the output.
        seconds: wall-clock time from the first byte read to the finished output, without the
            recalibration, which has a time of its own.
        peak_memory: bytes of memory that the largest process had, those of a cluster included.
        kernel: what did the arithmetic: "compiled" or "numpy"; both give the same bytes.  A cluster
            can have both: "compiled, numpy".
        shares: what share of the time went into "reading", "folding" and "writing"; the sum is 1.
        notes: the plan's, and those found while reading values.
        runs: whether the checkpoints are of one run, as far as their values tell.
        recalibrated: the result of recalibrating BatchNorm's statistics, if that was asked for.
        verified: True if the output was read back and equals, bit for bit, the average computed
            again; None if that was not asked for.  A difference is an `OutputError`.
        verified_by: the kernel that computed it again: the other one where there are two; None if
            that was not asked for.
        engine: who folded: "here", the workers of "dask", or the ranks of "mpi".
        workers: how many threads or processes folded.
        requests: how many were sent to servers of objects since the plan was made.
        retries: how many requests, and shares of the work, were tried again.
    """

    output: Path
    plan: Plan
    bytes_read: int
    bytes_written: int
    seconds: float
    peak_memory: int
    kernel: str
    shares: Mapping[str, float]
    notes: tuple[str, ...]
    runs: Verdict
    recalibrated: Recalibration | None = None
    verified: Literal[True] | None = None
    verified_by: str | None = None
    engine: str = "here"
    workers: int = 1
    requests: int = 0
    retries: int = 0

    @property
    def speed(self) -> float:
        """Bytes read in a second."""
        return self.bytes_read / self.seconds if self.seconds else 0.0

    def _describe(self) -> str:
        return f"Averaged {word_count(len(self.plan.checkpoints), 'checkpoint')} into {self.output}"

    def __repr__(self) -> str:
        """Return three lines for a prompt; the fields have the rest."""
        cost = (
            f"scheme {self.plan.scheme}, read {word_size(self.bytes_read)} in {self.seconds:.2f} s"
            f", wrote {word_size(self.bytes_written)}{', verified' if self.verified else ''}"
        )
        return write_text(self._describe(), cost, self.notes)

    def _repr_html_(self) -> str:
        """Return the report for a notebook."""
        rows = [
            ("scheme", self.plan.scheme),
            ("read", word_size(self.bytes_read)),
            ("wrote", word_size(self.bytes_written)),
            ("seconds", self.seconds),
            ("verified", "yes" if self.verified else "not asked for"),
        ]
        return write_html(self._describe(), ("what", "value"), rows, self.notes)

    def data(self) -> dict[str, Any]:
        """Return the report, with its plan, as what JSON can hold."""
        return self.plan.data() | {
            "output": name_path(self.output),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "seconds": self.seconds,
            "speed": self.speed,
            "peak_memory": self.peak_memory,
            "kernel": self.kernel,
            "shares": dict(self.shares),
            "notes": list(self.notes),
            "runs": self.runs.data([one.path for one in self.plan.checkpoints]),
            "recalibrated": self.recalibrated.data() if self.recalibrated else None,
            "verified": self.verified,
            "verified_by": self.verified_by,
            "engine": self.engine,
            "workers": self.workers,
            "requests": self.requests,
            "retries": self.retries,
        }

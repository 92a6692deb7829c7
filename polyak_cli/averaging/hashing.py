"""Digest the files of checkpoints, whole or by samples, so that a record can tell them from others.

Knows neither formats nor records.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from polyak_cli.errors import FormatError
from polyak_cli.storage import File, open_input
from polyak_cli.storage.local import name_errors

#: Inputs of at most this many bytes in all are hashed whole unasked: it takes no time then.
HASHED = 64 << 20
#: A sampled digest reads at most this many pieces of this many bytes: 3.93 MB.
SAMPLES, SAMPLE_BYTES = 64, 60 << 10
#: Checkpoints on a network that are sampled at a time: their pieces are waited for, not hashed.
_REMOTE = 8


def compute_sampled_digest(files: Sequence[File]) -> str:
    """Return the SHA-256 over the sizes of a checkpoint's files and evenly spaced pieces of them.

    The files count as one run of N bytes: one after the other, in the order of the table.  The
    digest covers, in this order:

    1. the size of each file in decimal digits, joined by newlines, and two newlines at the end;
    2. all N bytes if N is at most ``SAMPLES * SAMPLE_BYTES`` (3,932,160); otherwise `SAMPLES`
       pieces of `SAMPLE_BYTES` bytes: piece k = 0 ... 63 begins at byte
       ``k * (N - SAMPLE_BYTES) // (SAMPLES - 1)``.

    Only the sizes decide which bytes are read, and at most 4 MB of a checkpoint are.

    Raises:
        FormatError: a file cannot be read, or changed since it was scanned.
    """
    sizes = [file.version.size for file in files]
    found = hashlib.sha256(("\n".join(map(str, sizes)) + "\n\n").encode())
    ranges = list_sampled_ranges(sum(sizes))
    end = 0
    for file, size in zip(files, sizes, strict=True):
        start, end = end, end + size
        pieces = [(max(a, start) - start, min(b, end) - start) for a, b in ranges]
        wanted = [(a, b) for a, b in pieces if a < b]
        if wanted:  # many shards have none
            _hash_ranges(found, file, wanted)
    return found.hexdigest()


def compute_sampled_digests(checkpoints: Sequence[Sequence[File]], jobs: int) -> list[str]:
    """Return `compute_sampled_digest` of each checkpoint, several of them at a time.

    Args:
        checkpoints: the files of each.
        jobs: threads, at most.

    Raises:
        FormatError: as `compute_sampled_digest`, of the first checkpoint that has an error.
    """
    nbytes = sum(file.version.size for files in checkpoints for file in files)
    if any(file.version.is_object for files in checkpoints for file in files):
        jobs = max(jobs, _REMOTE)
    if jobs > 1 and nbytes > HASHED:  # of fewer bytes, starting threads would take longer
        # Neither reading nor hashing holds the interpreter's lock.  Where a limit allows no more
        # threads, this one does the work.
        with contextlib.suppress(RuntimeError), ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(compute_sampled_digest, checkpoints))
    return [compute_sampled_digest(files) for files in checkpoints]


def list_sampled_ranges(nbytes: int) -> list[tuple[int, int]]:
    """Return the ranges of bytes, start and end, that the digest of a checkpoint covers."""
    if nbytes <= SAMPLES * SAMPLE_BYTES:
        return [(0, nbytes)]
    starts = (k * (nbytes - SAMPLE_BYTES) // (SAMPLES - 1) for k in range(SAMPLES))
    return [(start, start + SAMPLE_BYTES) for start in starts]


def _hash_ranges(found: hashlib._Hash, file: File, ranges: Sequence[tuple[int, int]]) -> None:
    """Add ranges of a file to a hash, in pieces of bounded size."""
    with open_input(file.path, file.version) as opened, name_errors(file.path):
        # A disk fetches scattered pieces faster when it knows of all of them.
        opened.prefetch((start, end - start) for start, end in ranges)
        for start, end in ranges:
            for offset in range(start, end, SAMPLE_BYTES):
                wanted = min(SAMPLE_BYTES, end - offset)
                piece = opened.read(offset, wanted)
                if len(piece) < wanted:
                    raise FormatError(f"the file ends {wanted - len(piece)} bytes too early")
                found.update(piece)


def hash_files(files: Sequence[File]) -> tuple[str, ...]:
    """Return the SHA-256 of each file of a checkpoint, in hexadecimal.

    Raises:
        FormatError: a file cannot be read, or changed since it was scanned.
    """
    return tuple(hash_file(file) for file in files)


def hash_file(file: File) -> str:
    """Return the SHA-256 of a file; see `hash_files`."""
    found = hashlib.sha256()
    _hash_ranges(found, file, [(0, file.version.size)])
    return found.hexdigest()

"""What the figures depend on: the machine, the versions, and whether the page cache was warm."""

from __future__ import annotations

import ctypes
import importlib.metadata
import mmap
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.measure import Failed

#: Distributions whose versions are reported if installed.
_PACKAGES = ("polyak", "numpy", "h5py", "click", "tensorflow", "keras")
_MIB = 1 << 20
#: Share of the inputs below which a run is not said to be warm.
_WARM = 0.99
#: Share of the inputs above which a run is not said to be cold.
_COLD = 0.05


def facts(folder: Path) -> dict[str, str]:
    """Return processor, cores, memory, kernel, file system and versions."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = {
        "processor": _field(Path("/proc/cpuinfo"), "model name") or platform.processor(),
        "cores": str(os.cpu_count()),
        "memory": f"{memory / 1e9:.0f} GB",
        "kernel": f"{platform.system()} {platform.release()}",
        "file system": _file_system(folder),
        "Python": platform.python_version(),
    }
    return found | {name: version for name in _PACKAGES if (version := _version(name))}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _field(path: Path, name: str) -> str:
    """Return the first value of a ``name : value`` file, or nothing."""
    if not path.exists():
        return ""
    lines = path.read_text().splitlines()
    values = (line.partition(":")[2].strip() for line in lines if line.startswith(name))
    return next(values, "")


def _file_system(folder: Path) -> str:
    """Return the type of the file system that holds a folder, such as ext4."""
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return "unknown"
    found = ("", "unknown")
    for line in mounts.read_text().splitlines():
        _, point, kind, *_ = line.split(" ")
        if folder.resolve().is_relative_to(point) and len(point) > len(found[0]):
            found = (point, kind)
    return found[1]


def said(command: Sequence[str]) -> str:
    """Return what a short command prints, on whichever stream; nothing if it cannot run."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip()


# --- the page cache -------------------------------------------------------------------------------


def warm(paths: Sequence[Path]) -> None:
    """Read every file once, unless the page cache holds it already."""
    for path in paths:
        if resident([path]) == 1.0:
            continue
        with open(path, "rb", buffering=0) as file:
            while file.read(_MIB):
                pass


class Warmth:
    """Has files in the page cache ahead of each run, and remembers how well that went."""

    def __init__(self) -> None:
        """Start with nothing seen."""
        self.shares: list[float | None] = []

    def keep(self, paths: Sequence[Path]) -> None:
        """Read what is not in the page cache.

        Raises:
            Failed: they do not fit into it.
        """
        share: float | None = None
        # A system that reclaims idle memory may take a page back at once: read again.
        for _ in range(3):
            warm(paths)
            share = resident(paths)
            if share is None or share == 1.0:
                break
        if share is not None and share < _WARM:
            raise Failed(
                f"the page cache keeps only {share:.1%} of the inputs; choose a smaller --size"
            )
        self.shares.append(share)

    def note(self) -> str:
        """Say whether the page cache was warm."""
        known = [share for share in self.shares if share is not None]
        if not known or len(known) < len(self.shares):
            return "Every input was read ahead of each run; whether it was kept is unknown."
        if min(known) == 1.0:
            return "The page cache was warm: it held every page of the inputs ahead of each run."
        # Rounded down: an incomplete cache must not be reported as 100 %.
        least = int(min(known) * 10000) / 100
        return (
            f"The page cache was warm: it held at least {least} % of the inputs ahead of each run."
        )


class Chill:
    """Has files out of the page cache ahead of each run, and remembers how well that went.

    What lies below, such as the cache of a virtual machine's host, cannot be dropped from here.
    """

    def __init__(self) -> None:
        """Start with nothing seen."""
        self.shares: list[float | None] = []

    def keep(self, paths: Sequence[Path]) -> None:
        """Drop what is in the page cache."""
        drop(paths)
        self.shares.append(resident(paths))

    def note(self) -> str:
        """Say whether the page cache was cold."""
        known = [share for share in self.shares if share is not None]
        if not known or len(known) < len(self.shares):
            return "Whether the inputs left the page cache is unknown."
        most = max(known)
        note = f"Ahead of each run the page cache held at most {most:.1%} of the inputs."
        if most > _COLD:
            return f"THE INPUTS DID NOT LEAVE THE PAGE CACHE: these figures are not cold. {note}"
        return note


def drop(paths: Sequence[Path]) -> None:
    """Drop files from the page cache; what is still to be written goes to the disk first."""
    for path in paths:
        descriptor = os.open(path, os.O_RDWR)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def resident(paths: Sequence[Path]) -> float | None:
    """Return the share of the files' pages that the page cache holds; None if nobody can tell."""
    counts = [_pages(path) for path in paths]
    known = [count for count in counts if count is not None]
    if len(known) < len(counts) or not known:
        return None
    return sum(inside for inside, _ in known) / max(1, sum(pages for _, pages in known))


def _pages(path: Path) -> tuple[int, int] | None:
    """Return how many pages of a file are in memory, and how many it has, by mincore(2)."""
    if not hasattr(os, "posix_fadvise"):  # not Linux: the page cache cannot be seen or steered
        return None
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    library.mmap.argtypes = [pointer, size, number, number, number, ctypes.c_long]
    library.mincore.argtypes = [pointer, size, pointer]
    library.munmap.argtypes = [pointer, size]
    with open(path, "rb") as file:
        length = os.fstat(file.fileno()).st_size
        if not length:
            return 0, 0
        address = library.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address in (None, ctypes.c_void_p(-1).value):
        return None
    pages = -(-length // mmap.PAGESIZE)
    vector = ctypes.create_string_buffer(pages)
    code = library.mincore(address, length, vector)
    library.munmap(address, length)
    return None if code else (pages - vector.raw.count(b"\0"), pages)

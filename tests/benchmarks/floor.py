"""The floor: reads every input byte once on some threads, then writes and syncs one output.

A separate script, so that only the standard library is loaded; computes nothing.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
from collections.abc import Callable, Sequence

_BUFFER = 1 << 20
#: Bytes that a thread takes at a time, so that both end together.
_PORTION = 64 << 20


def _buffer() -> memoryview:
    """Return memory that begins at a page: a bytearray begins 16 bytes behind one.

    Some processors then copy from the page cache four times slower, and it would be no floor.
    """
    return memoryview(mmap.mmap(-1, _BUFFER))


def read(portions: list[tuple[str, int, int]]) -> None:
    """Read portions of files until none is left.

    Args:
        portions: path, first byte, and the byte after the last; shared by all threads.
    """
    buffer = _buffer()
    while portions:
        try:
            path, start, stop = portions.pop()
        except IndexError:  # the other thread was faster
            return
        descriptor = os.open(path, os.O_RDONLY)
        os.lseek(descriptor, start, os.SEEK_SET)
        left = stop - start
        while left > 0:
            left -= os.readv(descriptor, [buffer[:left]]) or left
        os.close(descriptor)


def write(path: str, nbytes: int, *, sync: bool = True) -> None:
    """Write a file of some size and, to be kept, wait until the disk has it."""
    buffer = _buffer()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    while nbytes:
        nbytes -= os.write(descriptor, buffer[:nbytes])
    if sync:
        os.fsync(descriptor)
    os.close(descriptor)


def main(count: int, several: int, output: str, inputs: Sequence[str]) -> None:
    """Read the inputs on some threads; unless the output is a dash, write it as large as the last.

    Args:
        count: of threads.
        several: outputs that are deleted soon, and so not synced, in a folder that is made; 0 for
            one output that is kept.
        output: the file or the folder to write, or a dash.
        inputs: the files to read.
    """
    sizes = [os.stat(path).st_size for path in inputs]  # noqa: PTH116 - pathlib starts slower
    portions = [
        (path, start, min(start + _PORTION, size))
        for path, size in zip(inputs, sizes, strict=True)
        for start in range(0, size, _PORTION)
    ][::-1]
    _on_threads(count, lambda _: read(portions))
    if several:
        os.mkdir(output)  # noqa: PTH102 - pathlib starts slower
        paths = [f"{output}/{k}" for k in range(several)]

        def write_share(k: int) -> None:
            for path in paths[k::count]:
                write(path, sizes[-1], sync=False)

        _on_threads(count, write_share)
    elif output != "-":
        write(output, sizes[-1])


def _on_threads(count: int, work: Callable[[int], object]) -> None:
    """Do the work on some threads, each given its number, and wait for all of them."""
    threads = [threading.Thread(target=work, args=(k,)) for k in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])

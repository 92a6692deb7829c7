"""A part of an open file that libhdf5 takes for a file of its own: an HDF5 file inside an archive.

It reads and writes by offset, so that nothing is unpacked.  Knows nothing of what lies there.
"""

from __future__ import annotations

import io
import os

import numpy as np


class Window:
    """Bytes of an open file from an offset on, as h5py's driver for file-like objects wants them.

    An exception must not pass through libhdf5, which goes on with what it has: what cannot be read
    is zeros to it, and why something could not be read or written is kept for who asks.
    """

    def __init__(self, name: str, descriptor: int, offset: int, size: int = 0) -> None:
        """Open a window.

        Args:
            name: what messages call it.
            descriptor: of the file, which stays open meanwhile.
            offset: where the window begins in it.
            size: bytes of the window; it grows when it is written to.
        """
        self.name = name
        self.descriptor = descriptor
        self.offset = offset
        self.size = size
        self.position = 0
        self.error: OSError | None = None

    def __str__(self) -> str:
        return self.name

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to an offset from the beginning, or from the end with ``SEEK_END``."""
        self.position = offset + (self.size if whence == io.SEEK_END else 0)
        return self.position

    def tell(self) -> int:
        """Return the offset."""
        return self.position

    def readinto(self, buffer: memoryview) -> int:
        """Fill the buffer; what lies behind the end is zeros."""
        view = memoryview(buffer).cast("B")
        inside = view[: max(0, self.size - self.position)]
        done = 0
        try:
            while done < len(inside):
                count = os.preadv(
                    self.descriptor, [inside[done:]], self.offset + self.position + done
                )
                if not count:
                    break
                done += count
        except OSError as error:
            self.error = self.error or error
        np.frombuffer(view, np.uint8)[done:] = 0  # in place: a header may ask for much
        self.position += len(view)
        return len(view)

    def write(self, content: memoryview) -> int:
        """Write the content; ``error`` tells why it could not be."""
        view = memoryview(content).cast("B")
        done = 0
        try:
            while done < len(view):
                done += os.pwrite(self.descriptor, view[done:], self.offset + self.position + done)
        except OSError as error:
            self.error = self.error or error
        self.position += len(view)
        self.size = max(self.size, self.position)
        return len(view)

    def truncate(self, size: int) -> int:
        """Set the size; the file itself is cut, or grows, when it is finished."""
        self.size = size
        return size

    def flush(self) -> None:
        """Do nothing: no byte is kept back."""

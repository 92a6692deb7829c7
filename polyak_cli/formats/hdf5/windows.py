"""Let libhdf5 read and write a part of an open file, such as an HDF5 file inside an archive.

Reads and writes by offset, so that nothing is unpacked.  Does not know the content.
"""

from __future__ import annotations

import io
import os

import numpy as np

from polyak_cli.errors import FormatError
from polyak_cli.storage import InputFile
from polyak_cli.storage.local import LocalInput, make_read_error


class Window:
    """Bytes of an open file from an offset on, as h5py's driver for file-like objects wants them.

    An exception must not pass through libhdf5, which would continue with undefined bytes.  Bytes
    that cannot be read are zeros instead, and ``error`` keeps the first reason.
    """

    def __init__(self, name: str, file: InputFile | int, offset: int, size: int = 0) -> None:
        """Open a window.

        Args:
            name: what messages call it.
            file: the file, which stays open meanwhile, or the descriptor of one to write to.
            offset: where the window begins in it.
            size: bytes of the window; it grows when it is written to.
        """
        self.name = name
        self.descriptor = file if isinstance(file, int) else -1
        self.file = LocalInput.borrow(name, file) if isinstance(file, int) else file
        self.offset = offset
        self.size = size
        self.position = 0
        self.error: OSError | FormatError | None = None

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
        """Fill the buffer, with zeros behind the end."""
        view = memoryview(buffer).cast("B")
        inside = view[: max(0, self.size - self.position)]
        done = 0
        try:
            content = self.file.read(self.offset + self.position, len(inside))
            done = len(content)  # less than wanted: the file was truncated after it was opened
            inside[:done] = content
        except FormatError as error:
            self.error = self.error or error
        np.frombuffer(view, np.uint8)[done:] = 0  # in place: a damaged header may ask for gigabytes
        self.position += len(view)
        return len(view)

    def write(self, content: memoryview) -> int:
        """Write the content; ``error`` is set if that fails."""
        view = memoryview(content).cast("B")
        done = 0
        try:
            while done < len(view):
                done += os.pwrite(self.descriptor, view[done:], self.offset + self.position + done)
        except OSError as error:
            self.error = self.error or error
        self.position += len(view)
        # libhdf5 does not call `truncate` for each write that makes the file longer.
        self.size = max(self.size, self.position)
        return len(view)

    def truncate(self, size: int) -> int:
        """Set the size; the file itself is resized when it is finished."""
        self.size = size
        return size

    def explain_error(self) -> FormatError | None:
        """Return the first error as an input's, which lacks its name."""
        return make_read_error(self.error) if isinstance(self.error, OSError) else self.error

    def flush(self) -> None:
        """Do nothing: no byte is buffered."""

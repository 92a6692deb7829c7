"""The errors of this package, and the wording that messages share.

Every error is one line that says what was found, what was expected, where, and what to do; an error
about a file begins with the file's path and a colon.  Imports nothing of the package, so every
module may import it, and knows nothing of checkpoints.
"""

from __future__ import annotations

import glob
import os
import re
import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class PolyakError(Exception):
    """The input, the output or the machine does not allow the work; the message says why.

    Attributes:
        about: the path of the input at fault, if the message does not begin with it; else "".
        at_fault: the positions, from 0, of the inputs that have to be left out or repaired.
    """

    about: str = ""
    at_fault: tuple[int, ...] = ()


class UsageError(PolyakError):
    """The arguments contradict one another or are out of range; nothing was read."""


class CheckpointError(PolyakError):
    """The checkpoints cannot be found, ordered or selected."""


class FormatError(PolyakError):
    """A file cannot be read: it is foreign, damaged, hostile, or still being written."""


#: What the message of a `ChangedError` says behind the file's name.
CHANGED = "changed while it was read; is training still running?"


class ChangedError(FormatError):
    """A file was changed or replaced while it was read; try again when it is complete."""


class StoreError(PolyakError):
    """A store does not give what it holds: access is denied, or it is out of reach.

    This says nothing about the file, so that a checkpoint is never left out because of it.
    """


class MismatchError(PolyakError):
    """Checkpoints do not belong to one model, or hold numbers that cannot be averaged."""


class OutputError(PolyakError):
    """The output exists already, or cannot be written; an older output is untouched."""


class MissingExtraError(PolyakError):
    """A function needs packages that are not installed; the message says which to install."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(
            f"{what} needs packages that are missing: pip install 'polyak[{extra}]', or in a clone "
            f"pip install '.[{extra}]'"
        )


def rebuild(kind: str, text: str) -> PolyakError:
    """Return the error of another process, of which the class's name and the message were sent."""
    leaf = globals().get(kind)
    if not (isinstance(leaf, type) and issubclass(leaf, PolyakError)):
        return PolyakError(text)
    # Not by a constructor: that of `MissingExtraError` words the message itself.
    return leaf.__new__(leaf, text)


# ---- wording -------------------------------------------------------------------------------------

#: User and password, and the query, of a URL: these may be secrets.
_USER = re.compile(r"(\b[a-z][a-z0-9]*://)[^/@\s]*@", re.I)
_QUERY = re.compile(r"(\bhttps?://[^\s?]*)\?[^\s'\",;]*", re.I)
#: A signature behind a key of a bucket, where none belongs: other ``?`` there are of globs.
_SIGNED = re.compile(
    r"(\b(?:s3|gs|az)://[^\s?]*)\?(?=\S*(?:X-Amz-|X-Goog-|sig=|Signature=))[^\s'\",;]*", re.I
)
#: Matches the folder of stand-ins of objects up to the scheme, where there is one.
_stand_ins: re.Pattern[str] | None = None


def show_urls_for(folder: str) -> None:
    """Have every path below a folder shown as a URL; "" for no folder.

    Args:
        folder: has a folder for each scheme, and below that the rest of the URL.
    """
    global _stand_ins
    _stand_ins = re.compile(rf"{re.escape(folder)}/([a-z0-9]+)/") if folder else None


def redact(text: str) -> str:
    """Return a text without the parts of URLs that may be secrets, and with URLs for stand-ins."""
    if _stand_ins:
        text = _stand_ins.sub(r"\1://", text)
    if "://" not in text:
        return text
    return _SIGNED.sub(r"\1", _QUERY.sub(r"\1", _USER.sub(r"\1", text)))


def name_path(path: str | os.PathLike[str]) -> str:
    """Return a path as data calls it: the URL of an object, without secrets, or the path."""
    return redact(os.fspath(path))


def shown(text: object, limit: int = 200) -> str:
    """Return untrusted text made safe for one line of a terminal.

    Control, bidirectional and unprintable characters and lone surrogates (bytes that are not
    UTF-8) are escaped, secrets in URLs and the middle of a long text are left out, and the
    stand-in of an object is shown as its URL.
    """
    escaped = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii")
        for c in redact(str(text))
    )
    if len(escaped) <= limit:
        return escaped
    half = (limit - 5) // 2
    return f"{escaped[:half]} ... {escaped[-half:]}"


def list_some(names: Sequence[str]) -> str:
    """Return the first three names: ``a, b, c, ...``."""
    return ", ".join(shown(name, 80) for name in names[:3]) + (", ..." if len(names) > 3 else "")


def quote_glob(name: str) -> str:
    """Return a glob that matches a name, in quotes, to be pasted into a command line.

    What cannot be pasted, such as a control character, is replaced by ``?``, and the middle of a
    long name by ``*``.
    """
    ends = (name[:40], name[-40:]) if len(name) > 200 else (name,)  # a message has an end
    escaped = "*".join(map(glob.escape, ends))
    pattern = "".join(c if c.isprintable() else "?" for c in escaped)
    quoted = shlex.quote(pattern)
    return quoted if quoted != pattern else f"'{pattern}'"


def word_count(count: int, noun: str) -> str:
    """Return a number and its noun: ``1 checkpoint``, ``2 checkpoints``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def word_rest(count: int) -> str:
    """Return how a list that was cut short ends: `` and 4 more``, or nothing if it was not cut."""
    return f" and {count} more" if count > 0 else ""


def choose_verb(count: int) -> str:
    """Return the verb that a number of things needs: ``is`` or ``are``."""
    return "is" if count == 1 else "are"


def word_share(share: float) -> str:
    """Return a share in percent, with two significant digits."""
    if 0 < share < 5e-5:
        return "less than 0.01 %"
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.0f} %"


def word_size(nbytes: float) -> str:
    """Return a number of bytes in three digits and a decimal unit."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if nbytes < 999.5:  # else three digits would be "1e+03"
            return f"{nbytes:.0f} {unit}" if unit == "bytes" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"

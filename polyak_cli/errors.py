"""What can go wrong, and how a stranger's text is shown in a message.

Imports nothing, so that everything else may import it.  Every error is one line that says what was
found, what was expected, where, and what to do.
"""

from __future__ import annotations


class PolyakError(Exception):
    """The input, the output or the machine does not allow the work; the message says why."""


class UsageError(PolyakError):
    """The arguments contradict one another or are out of range."""


class CheckpointError(PolyakError):
    """The checkpoints cannot be found, ordered or selected."""


class FormatError(PolyakError):
    """A file is not what it should be: foreign, damaged, hostile, or still being written."""


class MismatchError(PolyakError):
    """Checkpoints do not belong to one model, or hold numbers that cannot be averaged."""


class OutputError(PolyakError):
    """The output cannot be written where it was asked for."""


class MissingExtraError(PolyakError):
    """A command needs packages that are not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs packages that are missing: pip install 'polyak[{extra}]'")


def shown(text: object, limit: int = 200) -> str:
    """Return a stranger's text made safe for one line of a terminal.

    Control, bidirectional and unprintable characters and lone surrogates (bytes that are not
    UTF-8) are escaped, and the middle of a long text is left out.
    """
    escaped = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii")
        for c in str(text)
    )
    if len(escaped) <= limit:
        return escaped
    half = (limit - 5) // 2
    return f"{escaped[:half]} ... {escaped[-half:]}"

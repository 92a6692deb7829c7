"""Write results as HTML for notebooks, a sentence and a short table, and as text for prompts.

Knows HTML, and that names of files and tensors may be hostile.  Does not know the results.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from polyak_cli.errors import shown, word_rest

#: Rows and notes that are shown; a notebook is no place for thousands of tensors.
MOST = 10
_LONGEST = 120  # characters of a cell


def write_html(
    sentence: str,
    header: Sequence[str] = (),
    rows: Sequence[Sequence[object]] = (),
    notes: Iterable[str] = (),
) -> str:
    """Return a result as HTML without scripts, styles or links; every text is escaped.

    Args:
        sentence: what the result is.
        header: the titles of the columns.
        rows: a cell for each column: text, a number, or None for what there is not.
        notes: sentences below the table.
    """
    parts = [f"<p><strong>{_escape(sentence, 400)}</strong></p>"]
    if rows:
        titles = "".join(f"<th>{_escape(title)}</th>" for title in header)
        body = "".join(
            f"<tr>{''.join(f'<td>{_escape(_word(cell))}</td>' for cell in row)}</tr>"
            for row in rows[:MOST]
        )
        parts.append(f"<table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>")
    if len(rows) > MOST:
        parts.append(f"<p>The first {MOST} rows{word_rest(len(rows) - MOST)}.</p>")
    below = [*notes]
    items = "".join(f"<li>{_escape(note, 400)}</li>" for note in below[:MOST])
    if items:
        rest = len(below) - MOST
        items += f"<li>{rest} more</li>" if rest > 0 else ""
        parts.append(f"<ul>{items}</ul>")
    return f"<div>{''.join(parts)}</div>"


def write_text(sentence: str, more: str, notes: Sequence[str]) -> str:
    """Return a result as at most three lines of text: what it is, more, and the notes."""
    lines = [shown(sentence, 400), shown(more, 400)]
    if notes:
        lines.append(f"note: {shown(notes[0], 400)}{word_rest(len(notes) - 1)}")
    return "\n".join(lines)


def _word(cell: object) -> str:
    """Return a cell as text; numbers in at most six digits."""
    if cell is None:
        return "-"
    return f"{cell:.6g}" if isinstance(cell, float) else str(cell)


def _escape(text: str, limit: int = _LONGEST) -> str:
    import html  # only a notebook needs it, and every average would wait for it

    # shown() comes first: an escaped character must not be cut in two.
    return html.escape(shown(text, limit))

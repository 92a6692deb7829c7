"""The results of the digits as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tests.examples.digits.experiment import CONTENDERS


def table(regime: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a regime's results as Markdown."""
    wrong = f", {regime['wrong']:.0%} of the labels drawn at random" if regime["wrong"] else ""
    lines = [
        f"{regime['name'].capitalize()}: rate {regime['rate']:g}, "
        f"batches of {regime['batch']}{wrong}.",
        "",
        "| model | accuracy | over the newest | over the best single |",
        "| --- | --- | --- | --- |",
    ]
    for row in rows:
        gains = [_gain(row[over]) if row["name"] != over else "" for over in CONTENDERS[:2]]
        lines.append(f"| {row['name']} | {row['accuracy']:.4f} | {gains[0]} | {gains[1]} |")
    return "\n".join(lines)


def _gain(gain: Mapping[str, Any]) -> str:
    text = f"{gain['difference']:+.4f} ({gain['low']:+.4f} to {gain['high']:+.4f})"
    return text if gain["verdict"] == "within noise" else f"**{text}**"

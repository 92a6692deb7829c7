"""Damaged pickles whose storages get other types: refused, or edited as they are read."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from polyak_cli.errors import FormatError
from polyak_cli.formats.torch import pickles, retyping
from polyak_cli.processes.sandbox import Heartbeat
from tests.hostile.fuzz import mutated
from tests.test_torch_zip import PROTO, STOP, dictionary, name, several, tensor, text

HEARTBEAT = Heartbeat(lambda: None)


def describe(value: Any, wanted: Mapping[str, str]) -> Any:
    """Return what was read as lists, with other types of some storages."""
    if isinstance(value, pickles.Stored):
        return replace(value, dtype=wanted.get(value.key, value.dtype))
    if isinstance(value, pickles.Tensor):
        stored = describe(value.storage, wanted)
        return replace(value, storage=stored, dtype=stored.dtype)
    if isinstance(value, pickles.Instance):
        parts = (value.arguments, value.state, value.items, value.elements)
        return [value.of, *(describe(one, wanted) for one in parts)]
    if isinstance(value, pickles.Pairs):
        return ["dictionary", describe(value.items, wanted)]
    if isinstance(value, (list, tuple)):
        return [type(value), *(describe(one, wanted) for one in value)]
    return value


def test_only_the_types_that_are_asked_for_change() -> None:
    """The edited pickle is read as the damaged one was, except for the storages' types."""
    fetched = several(text("again"), name("torch FloatStorage") + b"q\x05", b"h\x05", b"K\x07")
    tensors = {"a": tensor("0", 6), "b": tensor("1", 6), "c": tensor("0", 3)}
    sound = PROTO + dictionary(tensors | {"d": fetched}) + STOP
    rng, edited = random.Random(7), 0
    for _ in range(4000):
        content = mutated(rng, sound)
        wanted = {key: rng.choice([*retyping.TYPES]) for key in rng.choice(["", "0", "1", "01"])}
        try:
            before = pickles.read(content, HEARTBEAT, unknown={})
            changed = retyping.retype(content, wanted, HEARTBEAT)
        except FormatError:
            continue
        after = pickles.read(changed, HEARTBEAT, unknown={})
        assert describe(after, {}) == describe(before, wanted), content
        edited += 1
    assert edited > 100

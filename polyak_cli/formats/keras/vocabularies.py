"""Find the vocabularies that Keras writes into a model's configuration, and the layers they are of.

Looks at what JSON holds.  Does not know how vocabularies are called; see `formats.vocabularies`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from polyak_cli.formats.keras.outline import number_group, to_snake_case
from polyak_cli.formats.vocabularies import digest_json, is_name_of_vocabulary
from polyak_cli.tensors import Asset

#: Entries of a configuration; a hostile one may nest without end.
_MOST = 1_000_000


def find_in_configuration(said: Any) -> tuple[dict[str, Asset], dict[str, str]]:
    """Return the vocabularies in a configuration of Keras, and the names of its layers.

    A vocabulary stands in the configuration where it was given to the layer, and among the assets
    where the layer was adapted to data.  A text in its place is the path of a file, which may be
    another one on every machine.

    Args:
        said: a configuration as JSON holds it: ``class_name``, ``config``, and in it ``layers``.

    Returns:
        Name of each vocabulary, such as ``layers/string_lookup_1/vocabulary``, and path of each
        layer, such as ``layers/string_lookup_1``, with its name.
    """
    assets: dict[str, Asset] = {}
    layers: dict[str, str] = {}
    for count, (path, owner, key, value) in enumerate(_walk_configuration(said)):
        if count > _MOST:
            break
        if key == "name":
            layers.setdefault(path, str(value))
        if isinstance(value, (list, dict)) and value and is_name_of_vocabulary(key):
            assets[f"{path}/{key}" if path else key] = Asset(digest_json(value), owner)
    return assets, layers


def _walk_configuration(said: Any) -> Iterator[tuple[str, str, str, Any]]:
    """Yield path and name of the layer, key and value of each entry of each layer's ``config``.

    Paths are those of Keras's weights files: class names in snake case, numbered from the second on
    among the layers of one model.
    """
    waiting: list[tuple[str, Any]] = [("", said)]
    while waiting:
        path, found = waiting.pop()
        config = found.get("config") if isinstance(found, dict) else None
        if not isinstance(config, dict):
            continue
        owner = config.get("name") if isinstance(config.get("name"), str) else ""
        seen: Counter[str] = Counter()
        for key, value in config.items():
            yield path, str(owner), key, value
            inner = value if isinstance(value, list) else [value]
            for one in inner:
                if isinstance(one, dict) and isinstance(one.get("class_name"), str):
                    kind = one["class_name"]
                    # Only the layers of a model are numbered; others have an attribute's name.
                    numbered = key == "layers"
                    part = f"layers/{number_group(to_snake_case(kind), seen)}" if numbered else key
                    waiting.append((f"{path}/{part}" if path else part, one))

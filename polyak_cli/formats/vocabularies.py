"""Recognise and digest what gives rows of tensors their meaning: vocabularies, lists of classes.

Knows how programs call them, and how Keras writes layers into a configuration.  Does not know where
formats keep them, nor what two that differ mean for an average.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from polyak_cli.tensors import Asset

#: How programs call what maps words, characters, classes or bins to rows, in lower case.
_NAMES = {
    *("vocab", "vocabulary", "vocabularies", "stoi", "itos", "token_list", "tokens"),
    *("source_vocab", "target_vocab", "src_vocab", "tgt_vocab"),
    *("alphabet", "charset", "chars", "characters", "symbols", "phonemes"),
    *("labels", "label_names", "label_map", "names", "categories", "category_names"),
    *("classes", "class_names", "speakers", "speaker_ids", "bin_boundaries", "salt"),
}
#: The same for names such as char2idx, idx2word and token_to_id.
_WORD, _ROW = (
    r"(word|char|token|label|class|tag|phone|speaker|spk|item|user)s?",
    r"(id|idx|ix|index)s?",
)
_MAP = re.compile(f"{_WORD}_?(2|to)_?{_ROW}|(int|i|{_ROW})_?(2|to)_?{_WORD}")
#: Entries of a configuration; a hostile one may nest without end.
_MOST = 1_000_000


def is_name_of_vocabulary(name: str) -> bool:
    """Return whether a name is one by which programs call a vocabulary or a list of classes."""
    name = name.casefold()
    return name in _NAMES or _MAP.fullmatch(name) is not None


def digest_json(value: Any) -> str:
    """Return the SHA-256 of what JSON can hold; the order of keys has no meaning."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


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
                    name = _to_snake_case(one["class_name"])
                    # Only the layers of a model are numbered; others have an attribute's name.
                    part = f"layers/{name}{_number(seen, name)}" if key == "layers" else key
                    waiting.append((f"{path}/{part}" if path else part, one))


def _number(seen: Counter[str], name: str) -> str:
    """Return the ending by which Keras tells the second layer of a class from the first."""
    seen[name] += 1
    return f"_{seen[name] - 1}" if seen[name] > 1 else ""


def _to_snake_case(name: str) -> str:
    """Return a class's name as Keras writes it in paths (`keras.src.utils.naming`)."""
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def find_in_texts(texts: Mapping[str, str]) -> dict[str, Asset]:
    """Return the vocabularies among the texts that a file has by name."""
    return {
        name: Asset(hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest())
        for name, text in texts.items()
        if is_name_of_vocabulary(name.rpartition(".")[2])
    }

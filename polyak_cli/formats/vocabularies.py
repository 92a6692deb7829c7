"""Recognise and digest what gives rows of tensors their meaning: vocabularies, lists of classes.

Knows how programs call them.  Does not know where formats keep them, nor what two that differ mean
for an average.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
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


def is_name_of_vocabulary(name: str) -> bool:
    """Return whether a name is one by which programs call a vocabulary or a list of classes."""
    name = name.casefold()
    return name in _NAMES or _MAP.fullmatch(name) is not None


def digest_json(value: Any) -> str:
    """Return the SHA-256 of what JSON can hold; the order of keys has no meaning."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def find_in_texts(texts: Mapping[str, str]) -> dict[str, Asset]:
    """Return the vocabularies among the texts that a file has by name."""
    return {
        name: Asset(hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest())
        for name, text in texts.items()
        if is_name_of_vocabulary(name.rpartition(".")[2])
    }

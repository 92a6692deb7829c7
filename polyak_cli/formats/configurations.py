"""Read from the configuration beside a checkpoint what its tensors mean to the program.

A model of 4 heads and one of 2 have tensors of the same names and shapes.  Knows the configurations
of Transformers, Diffusers and PEFT.  Does not know which checkpoints are compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from polyak_cli.formats.vocabularies import digest_json, is_name_of_vocabulary
from polyak_cli.tensors import Asset

MODEL, ADAPTER = "config.json", "adapter_config.json"
#: The files that are configurations.
NAMES = frozenset({MODEL, ADAPTER})

#: Keys by which a library shows that it wrote a configuration of a model.
_MARKS = frozenset({"model_type", "architectures", "_class_name", "_diffusers_version"})

#: Keys that change nothing of what the tensors mean: who wrote them and where, how they are stored
#: and computed, what only training uses, and how text is generated.
_IGNORED = re.compile(
    r"_?(transformers|diffusers|peft|unsloth)_(version|fixed)|_?name_or_path|_commit_hash|auto_map"
    r"|(torch_)?dtype|use_cache|_?(attn|experts)_implementation\w*|torchscript|pretraining_tp"
    r"|output_(attentions|hidden_states|scores|logits|past|router_logits)|(use_)?return_dict\w*|(use_)?gradient_checkpointing\w*|inference_mode"
    # Training: noise, initial values, losses, and the decay of an EMA of Diffusers.
    r"|\w*(dropout|layerdrop|drop_path)\w*|\w+_p?drop|initializer_\w+|init(ializer)?_std"
    r"|\w+_loss_coef|router_z_loss\w*|router_jitter_noise|mask_(time|feature)_\w+|apply_spec_augment"
    r"|ctc_(loss_reduction|zero_infinity)|problem_type|finetuning_task|task_specific_params"
    r"|decay|min_decay|optimization_step|update_after_step|use_ema_warmup|inv_gamma|power"
    r"|loftq_config|eva_config|corda_config|runtime_config|megatron_config|megatron_core"
    # Generation, which Transformers before 5 kept here.
    r"|(max|min)_(new_)?(length|tokens)|do_sample|early_stopping|num_beam\w*|diversity_penalty"
    r"|temperature|top_[kp]|typical_p|repetition_penalty|length_penalty|\w*no_repeat_ngram_size"
    r"|bad_words_ids|num_return_sequences|remove_invalid_values|exponential_decay_length_penalty"
    r"|(begin_)?suppress_tokens|forced_(bos|eos)_token_id|forced_decoder_ids"
    # The names of an adapter's tensors say this already.
    r"|target_modules|target_parameters|exclude_modules|modules_to_save|auto_mapping"
)
#: Keys that a run or a move to another machine may change where the tensors still belong together:
#: special tokens and lengths that a later stage sets, and where the base model lies.
_NOTED = re.compile(
    r"\w+_token_(ids?|index)|max_position_embeddings|base_model_name_or_path|revision"
    r"|init_lora_weights|task_type"
)
#: Keys of a model in a configuration that no known library wrote, which may also hold the epoch.
_STRUCTURE = re.compile(
    r"(?!\w*(grad|lr|loss))(\w*_)?(n?heads?|n?layers?|dims?|groups?|act|activation\w*|norm\w*|eps\w*|epsilon|theta"
    r"|rope\w*|causal|window\w*|strides?|padding|dilations?|kernel_size|scale\w*)(_\w+)?"
)
#: What PEFT means where an older version wrote no such key.
_ADAPTER_DEFAULTS = dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias"), False)
#: Keys of a configuration that are compared one by one; one with more is compared as a whole.
_MOST = 4096
_LONGEST_VALUE = 60


def read_configuration(name: str, content: bytes) -> dict[str, Asset]:
    """Return what a configuration says, by the path of its keys, such as text_config.n_head.

    Raises:
        ValueError: it is no JSON.
    """
    said = json.loads(content)
    if not isinstance(said, dict):
        return {}
    is_known = name == ADAPTER or not _MARKS.isdisjoint(said)
    if name == ADAPTER:
        said = _ADAPTER_DEFAULTS | said
    found: dict[str, Asset] = {}
    for path, value in _list_values(said, ""):
        key = path.rpartition(".")[2]
        if isinstance(value, (dict, list)) and is_name_of_vocabulary(key):
            found[f"{name}/{path}"] = Asset(digest_json(value))
        else:
            noted = bool(_NOTED.fullmatch(key)) or not (is_known or _STRUCTURE.fullmatch(key))
            found[f"{name}/{path}"] = Asset(_digest(value), "", _write(value), noted)
        if len(found) > _MOST:
            return {name: Asset(digest_json(said))}
    return found


def _list_values(said: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield the path of each key that gives tensors meaning, and its value.

    An object is yielded before its keys: another checkpoint may have null in its place.
    """
    for key, value in said.items():
        if _IGNORED.fullmatch(key):
            continue
        plain = _simplify(value)
        yield f"{prefix}{key}", plain
        if isinstance(plain, dict) and not is_name_of_vocabulary(key):
            yield from _list_values(plain, f"{prefix}{key}.")


def _simplify(value: Any) -> Any:
    """Return a value in one form: versions write 10000 or 10000.0, and {} or null."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_simplify(one) for one in value] or None
    return None if value == {} else value


def _digest(value: Any) -> str:
    """Return the digest of a value; the keys of an object are compared one by one."""
    return digest_json("object") if isinstance(value, dict) else digest_json([value])


def _write(value: Any) -> str:
    """Return a value as JSON that fits into a message."""
    if isinstance(value, dict):
        return "{...}"
    text = json.dumps(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."

"""Recognise the names by which programs call a running mean of a model's weights (an EMA).

Does not know what else tells a running mean, nor which weights it is a mean of; see
`averaging.belonging.averages`.
"""

from __future__ import annotations

import re

#: timm's state_dict_ema, icefall's model_avg, ultralytics' ema, BasicSR's params_ema, StyleGAN's
#: g_ema, k-diffusion's model_ema, diffusers' shadow_params, fairseq's ema_fp32_params, and those of
#: programs that keep several, such as ema_9999.
_OF_A_MODEL = r"(model|state|states|dict|params|parameters|weights|net|network|module|callback)"
_NAME = re.compile(
    rf"(\w+_)?(ema|swa|shadow)(_{_OF_A_MODEL}|_fp32)*(_?\d+)?|"
    rf"{_OF_A_MODEL}_(avg|average|averaged)|(avg|average|averaged)_{_OF_A_MODEL}(_dict)?"
)
#: Where a word begins in EMACallback and modelEma.
_WORD = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_LONGEST = 64  # a longer word is no program's


def names_running_mean(key: str) -> bool:
    """Return whether a key, or a part of a tensor's name, says running mean."""
    return len(key) < _LONGEST and bool(_NAME.fullmatch(_WORD.sub("_", key).lower()))

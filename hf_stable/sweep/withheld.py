"""Detect comparisons that do not measure a method, from the records of its runs.

A cap that no logit reached had no effect. A method with another initialization than in the paper is
not the paper's method.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .paper import Withheld
from .study import BASELINE, Result, Study

_LOGITS = "layers.*.attention/max_logit"
# Norms on the output of a block, with which its size does not depend on the initialization.
_OUTPUT_NORMS = ("v_norm", "attention_post_norm", "mlp_post_norm")
# Relative tolerance of the std of weights to that of the paper's geometry.
_CLOSE = 0.1


def idle_caps(study: Study, runs: Sequence[Result]) -> dict[str, Withheld]:
    """Return the methods whose cap on attention logits never acted in any run, as "vacuous".

    A cap acted if a logit reached it before the cap. A method with a run without recorded logits is
    left out.
    """
    found = {}
    for method in study.methods:
        own = [run for run in runs if run.place.method == method and run.status != "failed"]
        caps = [float(run.model_config.get("attn_logit_softcapping") or 0.0) for run in own]
        if not own or not all(caps):
            continue
        logits = [largest_logit(run) for run in own]
        if all(logit < cap for logit, cap in zip(logits, caps, strict=True)):
            reason = (
                f"the cap never acted: the largest attention logit of any run was "
                f"{max(logits):.3g}, the cap is {min(caps):g}"
            )
            found[method] = Withheld("vacuous", reason)
    return found


def largest_logit(run: Result) -> float:
    """Return the largest attention logit before a cap, over all samples, layers and heads.

    It is NaN if no logit was recorded, or if one was NaN.
    """
    samples = {} if run.history is None else run.history.telemetry
    values = samples.get(_LOGITS)
    return float(np.max(values)) if values is not None and values.size else math.nan


def other_geometry(study: Study, runs: Sequence[Result]) -> dict[str, Withheld]:
    """Return the methods that norm outputs but are initialized unlike the paper, as "withdrawn".

    The paper's std of 0.02 at 1,024 channels is sqrt(2 / (5 channels)). With another std, the share
    of the token embedding in the initial residual stream differs from that of the baseline, so the
    difference between the two is not due to the method alone.
    """
    configs = {run.place.method: run.model_config for run in runs}
    base = configs.get(BASELINE, {})
    found = {}
    for method in study.methods:
        config = configs.get(method, {})
        normed = [name for name in _OUTPUT_NORMS if config.get(name) and not base.get(name)]
        if normed and (mismatch := _mismatch(config)):
            reason = (
                f"{mismatch}, so with {' and '.join(normed)} the token embedding has another share "
                "of the residual stream at the start than in the paper"
            )
            found[method] = Withheld("withdrawn", reason)
    return found


def _mismatch(config: Mapping[str, Any]) -> str | None:
    """Return the difference to the paper's initialization in words, or None."""
    width, std = config.get("hidden_size"), config.get("initializer_range")
    if config.get("embedding_std") is not None:
        return f"embeddings begin with a std of {config['embedding_std']:g}"
    if config.get("initializer") == "fan_in":
        return "weights begin by fan-in"
    if config.get("initializer") != "normal" or not width or not std:
        return None
    wanted = math.sqrt(2 / (5 * width))
    if abs(std / wanted - 1) <= _CLOSE:
        return None
    return f"weights begin with a std of {std:g}, where {width:,} channels need {wanted:.2g}"

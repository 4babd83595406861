"""Names of all telemetry numbers, and their format in records.

A name is `place/quantity`, such as `layers.1.qkv/output_l2` or `head/log_z_mean`. The places of a
block are its linear maps under the papers' names (qkv, proj, fc1, fc2; other families have q, k, v,
gate, ...), attention, stream and optimizer. The places outside of blocks are embed, head and stream
(`stream/final_std`), and the parameter groups embed.optimizer, head.optimizer, other.optimizer (the
final norm and similar parameters) and optimizer (all). Standard library only.
"""

import re
from collections.abc import Mapping
from typing import Any

Value = float | list[float]
Numbers = dict[str, Value]

# Quantity -> description. "Batch" means a whole step: all microbatches of all processes. "H:" marks
# a list with one number per head.
LINEAR = {
    "input_l2": "L2 norm of the input X over the batch",
    "input_rms": "root mean square of an element of X",
    "output_l2": "L2 norm of the output Y over the batch",
    "output_rms": "root mean square of an element of Y",
    "input_grad_l2": "L2 norm of the loss's gradient in X, through this map alone",
    "weight_l2": "L2 (Frobenius) norm of the weight W, before the step",
    "weight_rms": "root mean square of an element of W",
    "weight_grad_l2": "L2 norm of the loss's gradient in W, before clipping where the loop says so",
    "weight_update_ratio": "L2 norm of W's change in this step over that of W",
    "weight_spectral": "largest singular value of proj, gate, fc1 and fc2, by power iteration",
    "gain": "sigma-Reparam's gain",
}
ATTENTION = {
    "max_logit": "H: largest visible logit, scaled, before the cap",
    "max_logit_capped": "H: the same after the cap; only with a cap",
    "entropy": "H: mean over rows of entropy / log(visible keys), 1 is uniform; before a clip",
    "clipped_rows": "H: share of rows whose every probability is clipped to zero; only with a clip",
    "q_l2": "H: root mean square over tokens of a query's L2 norm, as the scores use it",
    "k_l2": "H: the same of keys; a number for each key head",
    "q_l2_before_norm": "H: the same before the query norm; only with one",
    "k_l2_before_norm": "H: the same before the key norm; only with one",
    "q_gain_max": "largest absolute gain of the query norm",
    "k_gain_max": "largest absolute gain of the key norm",
}
STREAM = {
    "attention_std": "sigma_x: standard deviation of the residual stream where attention reads it",
    "mlp_std": "sigma_x': the same where the MLP reads it",
    "attention_bound": "bound (20) of Takase et al. 2023 on the norm of dx'/dx",
    "mlp_bound": "bound (15) of Takase et al. 2023 on the norm of dy/dx'",
}
# Upper edges of the bins of `adam_ratio`; the last bin has no upper edge.
ADAM_RATIO_EDGES = (0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9)
OPTIMIZER = {
    "grad_rms": "root mean square of an element of the gradient, as the optimizer got it",
    "grad_rms_over_eps": "the same over Adam's eps: near 1 the update shrinks (Wortsman et al.)",
    "adam_ratio": "share of elements by |m / sqrt(v)|, debiased, in bins up to "
    + ", ".join(map(str, ADAM_RATIO_EDGES))
    + " and above; two humps at +-1 warn (Molybog et al. 2023)",
    "update_l2": "L2 norm of the step's change of all parameters here, decay included",
}
HEAD = {
    "log_z_mean": "mean of log Z over the targets (other families: all positions), after the cap",
    "log_z_max": "largest log Z",
    "logit_mean": "mean of all logits, before the final cap",
    "logit_max": "largest logit, before the final cap",
    "z_loss": "sum of the microbatches' z-losses, coefficient included; only with one",
}

_LAYER = re.compile(r"^layers\.(\d+)\.(.*)$")


def _rounded(value: Value) -> Value:
    """Round to five significant digits, which keeps the records of a long run small."""
    if isinstance(value, list):
        return [float(f"{each:.5g}") for each in value]
    return float(f"{value:.5g}")


def pack(numbers: Mapping[str, Value]) -> dict[str, Any]:
    """Return numbers in the format of a record: one list over layers per `layers.*.place/quantity`.

    A layer without the quantity is None. Five significant digits are kept.
    """
    packed: dict[str, Any] = {}
    for name, value in numbers.items():
        found = _LAYER.match(name)
        if found is None:
            packed[name] = _rounded(value)
            continue
        layers = packed.setdefault(f"layers.*.{found[2]}", [])
        index = int(found[1])
        layers.extend([None] * (index + 1 - len(layers)))
        layers[index] = _rounded(value)
    return packed


def scalars(numbers: Mapping[str, Value]) -> dict[str, float]:
    """Return numbers for trackers: `telemetry/NAME`, with /min and /max for a list."""
    found: dict[str, float] = {}
    for name, value in numbers.items():
        if isinstance(value, list):
            found[f"telemetry/{name}/min"] = min(value)
            found[f"telemetry/{name}/max"] = max(value)
        else:
            found[f"telemetry/{name}"] = value
    return found


def unpack(packed: Mapping[str, Any]) -> Numbers:
    """Invert `pack`, up to its rounding."""
    numbers: Numbers = {}
    for name, value in packed.items():
        if "*" not in name:
            numbers[name] = value
            continue
        for index, each in enumerate(value):
            if each is not None:
                numbers[name.replace("*", str(index))] = each
    return numbers

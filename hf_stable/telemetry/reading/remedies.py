"""Techniques that address each sign, by group of the model's techniques or the optimizer.

The table lists what papers tried against a sign. No paper shows that it would have helped a given
run.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Remedy:
    """A setting in a recipe that addresses a sign.

    Args:
        name: Name of the technique.
        room: Group of the technique: score, linear, branch, head or optimizer.
        setting: Setting for the recipe. If it has an equals sign, it is in the form of `--set`.
        why: Effect on the sign, with the source.
        off: Fields of the model's config with the values at which the technique is off. Another
            value means that it is on or excluded. Empty if it is not a technique of the model.
        presets: Presets of the model that enable it.
    """

    name: str
    room: str
    setting: str
    why: str
    off: Mapping[str, Any] = field(default_factory=dict)
    presets: tuple[str, ...] = ()

    def is_on(self, run: Mapping[str, Any]) -> bool:
        """Return True if a run (run.json) has the technique, by its resolved config and recipe."""
        chosen = run.get("recipe", {}).get("model", {})
        fields = {**chosen, **run.get("model_config", {})}
        return chosen.get("preset") in self.presets or any(
            fields.get(name, value) != value for name, value in self.off.items()
        )


_QK_NORM = Remedy(
    "qk_norm",
    "score",
    "model.qk_norm=head",
    "norms on queries and keys bound the logits by their gains (Dehghani et al. 2023; Wortsman et "
    "al. 2023; 6.7 times the stable learning rate in Rybakov et al. 2024)",
    {"qk_norm": None},
    ("qk_norm", "qk_norm_cap", "qkv_norm", "qk_fc_norm"),
)
_SOFT_CAP = Remedy(
    "soft_cap",
    "score",
    "model.attn_logit_softcapping=50",
    "the cap bounds what softmax sees (Gemma 2; 6.7 times in Rybakov et al., 10 with qk_norm)",
    {"attn_logit_softcapping": None},
    ("soft_cap", "qk_norm_cap"),
)
_QKV_NORM = Remedy(
    "qkv_norm",
    "score",
    "model.qk_norm=head model.v_norm=head model.attention_pre_norm=false",
    "norms on QKV's output instead of its input (10 times in Rybakov et al.)",
    {"v_norm": None},
    ("qkv_norm",),
)
_SIGMA = Remedy(
    "sigma_reparam",
    "linear",
    "model.sigma_reparam=true",
    "bounds the spectral norms of the four linears, against entropy collapse (Zhai et al. 2023)",
    {"sigma_reparam": False},
    ("sigma_reparam",),
)
_ATTENTION_POST = Remedy(
    "attention_post_norm",
    "branch",
    "model.attention_post_norm=true",
    "a norm on Proj's output, half of qk_fc_norm (Rybakov et al.; Peri-LN)",
    {"attention_post_norm": False},
    ("qk_fc_norm",),
)
_MLP_POST = Remedy(
    "mlp_post_norm",
    "branch",
    "model.mlp_post_norm=true",
    "a norm on FC2's output, half of qk_fc_norm (Rybakov et al.; Peri-LN)",
    {"mlp_post_norm": False},
    ("qk_fc_norm",),
)
_LAYER_SCALE = Remedy(
    "layer_scale",
    "branch",
    "model.layer_scale=1e-5",
    "branches begin small (Touvron et al. 2021; 3.3 times in Rybakov et al.)",
    {"layer_scale": None},
    ("layer_scale",),
)
_SCALED_EMBED = Remedy(
    "scaled_embed",
    "branch",
    "model.embedding_scale=sqrt_hidden model.initializer=small",
    "a large shortcut bounds the gradients of the blocks (Takase et al. 2023)",
    {"embedding_scale": 1.0, "embedding_norm": False},
    ("scaled_embed", "embed_norm"),
)
_Z_LOSS = Remedy(
    "z_loss",
    "head",
    "model.z_loss=1e-4",
    "pulls log Z to zero (PaLM; Wortsman et al.)",
    {"z_loss": 0.0},
    ("z_loss",),
)
_FINAL_CAP = Remedy(
    "final cap",
    "head",
    "model.final_logit_softcapping=30",
    "bounds the output logits (Gemma 2)",
    {"final_logit_softcapping": None},
)
_ALPHA = Remedy(
    "length-scaled clip",
    "score",
    "model.attention_clip_alpha=2 model.attention_clip_gamma=null",
    "scales the clip by each row's length, so that long rows stay alive (Bondarenko et al. 2023)",
    {"attention_clip_alpha": None},
)
_LOWER_RATE = Remedy(
    "learning rate", "optimizer", "a lower optimizer.learning_rate", "updates are as large as it is"
)
_WARMUP = Remedy(
    "warm-up",
    "optimizer",
    "a longer schedule.warmup",
    "lowers the sensitivity to the learning rate (Wortsman et al.)",
)
_EPS = Remedy(
    "eps",
    "optimizer",
    "optimizer.eps=1e-15",
    "with gradients near eps updates vanish (Wortsman et al., 4.8B: 1e-15 better, 1e-6 diverges)",
)

REMEDIES: dict[str, tuple[Remedy, ...]] = {
    "max_logit": (_QK_NORM, _SOFT_CAP, _SIGMA),
    "max_logit_early": (_QK_NORM, _SOFT_CAP, _SIGMA),
    "entropy": (_SIGMA, _QK_NORM, _SOFT_CAP),
    "clipped_rows": (_ALPHA,),
    "qkv_output": (_QK_NORM, _QKV_NORM, _SIGMA),
    "proj_output": (_ATTENTION_POST, _LAYER_SCALE, _SIGMA),
    "fc2_output": (_MLP_POST, _LAYER_SCALE, _SIGMA),
    "qkv_input_grad": (_QK_NORM, _QKV_NORM, _SCALED_EMBED),
    "fc1_input_grad": (_SCALED_EMBED, _MLP_POST, _LAYER_SCALE),
    "update": (_WARMUP, _LOWER_RATE),
    "grad_over_eps": (_EPS,),
    "log_z": (_Z_LOSS, _FINAL_CAP),
    "non_finite": (_LOWER_RATE, _WARMUP),
}
_ALWAYS = (_LOWER_RATE, _WARMUP)


def remedies(rules: Iterable[str], run: Mapping[str, Any]) -> list[Remedy]:
    """Return the remedies for these signs that a run (run.json) lacks, in order of the signs.

    If the run has all of them, only the optimizer's settings are left.
    """
    wanted = [remedy for rule in rules for remedy in REMEDIES[rule] if not remedy.is_on(run)]
    return list({remedy.name: remedy for remedy in wanted}.values()) or list(_ALWAYS)

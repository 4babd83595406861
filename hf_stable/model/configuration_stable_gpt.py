"""Configuration of StableGPT: every stability technique is one field, and off by default.

Invariant: a field that would be ignored is refused, so that no misspelt or contradictory
setting ever trains the baseline in silence.
"""

# Transformers types what a config resolves, and what a forward fills in, as Optional.
# pyright: reportOptionalOperand=false, reportOptionalSubscript=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportTypedDictNotRequiredAccess=false, reportPrivateImportUsage=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

import difflib
import functools
import math
import warnings
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch.utils.weak import WeakIdKeyDictionary
from transformers import GenerationConfig
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

# Of float32, in which parameters are initialized and losses computed.
_LARGEST_FLOAT = 3.4028234663852886e38

# The papers' labels. Sizes are recipes, not presets.
PRESETS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "soft_temp": {"attention_multiplier": 0.5},
    "soft_cap": {"attn_logit_softcapping": 50.0},
    "soft_clip": {"attention_clip_gamma": -0.03, "attention_clip_zeta": 1.03},
    "sigma_reparam": {"sigma_reparam": True},
    "layer_scale": {"layer_scale": 1e-5},
    "qk_norm": {"qk_norm": "head"},
    "qk_norm_cap": {"qk_norm": "head", "attn_logit_softcapping": 50.0},
    "qkv_norm": {"qk_norm": "head", "v_norm": "head", "attention_pre_norm": False},
    "qk_fc_norm": {"qk_norm": "head", "attention_post_norm": True, "mlp_post_norm": True},
    "scaled_embed": {"embedding_scale": "sqrt_hidden", "initializer": "small"},
    "embed_norm": {"embedding_norm": True, "initializer": "small"},
    "embed_detach": {"embedding_detach": 0.1, "initializer": "small"},
    "z_loss": {"z_loss": 1e-4},
    "mup": {"mup_base_width": 256},
    "gated_mlp": {"mlp_gated": True},
}

# What GPT-2, Llama, nanoGPT, Megatron and others call fields of this configuration.
OTHER_NAMES: dict[str, str] = {
    "vocab_size": "n_vocab padded_vocab_size",
    "hidden_size": "d_model dim embed_dim hidden_dim model_dim n_embd n_embed width",
    "intermediate_size": "d_ff ffn_dim ffn_hidden_size mlp_dim n_inner",
    "num_hidden_layers": "depth n_layer n_layers num_layers",
    "num_attention_heads": "n_head n_heads num_heads",
    "num_key_value_heads": "n_kv_head n_kv_heads n_query_groups num_kv_heads num_query_groups",
    "head_dim": "d_head d_kv head_size kv_channels",
    "max_position_embeddings": (
        "block_size context_length max_seq_len max_sequence_length "
        "n_ctx n_positions seq_len seq_length"
    ),
    "hidden_act": "act_fn activation activation_function",
    "rope_parameters": "rope_base rope_scaling rope_theta rotary_base",
    "tie_word_embeddings": "tie_embeddings tied_embeddings",
    "attention_dropout": "attn_dropout attn_pdrop dropout",
    "norm_eps": "layer_norm_eps layer_norm_epsilon rms_norm_eps",
    "norm": "norm_type normalization",
    "linear_bias": "attention_bias bias use_bias",
    "mlp_gated": "gated_mlp",
    "parallel_residual": "use_parallel_residual",
    "embedding_scale": "embd_scale",
    "qk_norm": "qk_layernorm use_qk_norm",
    "attn_logit_softcapping": "attention_logit_cap attn_softcap soft_cap softcap",
    "final_logit_softcapping": "final_logit_softcap",
    "z_loss": "z_loss_coef z_loss_weight",
    "initializer_range": "init_std",
}

# What Transformers itself passes to, or stores in, any configuration besides the declared fields.
_HOST_KEYWORDS = {
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "partial_rotary_factor",
    "quantization_config",
    "rope_scaling",
    "rope_theta",
    "torch_dtype",
    "use_return_dict",
}

# Arguments of a model's from_pretrained, which clients give to the configuration's as well
# (lm-evaluation-harness, transformers serve); about loading, never about the model.
_LOADING_KEYWORDS = {
    "adapter_kwargs",
    "adapter_name",
    "allow_all_kernels",
    "device_map",
    "device_mesh",
    "distributed_config",
    "generation_config",
    "gguf_file",
    "ignore_mismatched_sizes",
    "kernel_config",
    "key_mapping",
    "low_cpu_mem_usage",
    "max_memory",
    "offload_buffers",
    "offload_folder",
    "output_loading_info",
    "state_dict",
    "tp_plan",
    "tp_size",
    "tqdm_class",
    "trust_remote_code",
    "use_kernels",
    "use_safetensors",
    "variant",
    "weights_only",
}

_LEGACY_ROPE = {"rope_theta", "rope_scaling", "partial_rotary_factor"}

# Configs that models were built from.
_frozen = WeakIdKeyDictionary()


@functools.cache
def _technique_fields() -> frozenset[str]:
    """The fields of the five rooms, which stand below `norm` in the class."""
    own = [field.name for field in fields(StableGPTConfig)]
    return frozenset(own[own.index("norm") :])


# In messages.
_KINDS = {
    bool: "True or False",
    dict: "a dictionary",
    float: "a number",
    int: "a whole number",
    list[int]: "a list of whole numbers",
    RopeParameters: "a dictionary",
    str: "text",
    NoneType: "None",
}


def _allowed(annotation: Any) -> list[str]:
    """Return the values that an annotation allows, in words."""
    if get_origin(annotation) in (Union, UnionType):
        kinds = get_args(annotation)
        if float in kinds:
            kinds = tuple(kind for kind in kinds if kind is not int)
        return [word for kind in kinds for word in _allowed(kind)]
    if get_origin(annotation) is Literal:
        return [repr(value) for value in get_args(annotation)]
    return [_KINDS.get(annotation, str(annotation))]


def _names_what_is_allowed(config: type) -> type:
    """Let the config refuse a value of the wrong type by ValueError, with what it may be."""
    set_checked = config.__setattr__

    def set_or_name(self: Any, name: str, value: Any) -> None:
        try:
            set_checked(self, name, value)
        except StrictDataclassFieldValidationError as error:
            annotation = next(field.type for field in fields(self) if field.name == name)
            words = list(dict.fromkeys(_allowed(annotation)))
            listed = " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
            raise ValueError(f"{name}={value!r} must be {listed}.") from error

    config.__setattr__ = set_or_name  # pyright: ignore
    return config


# A clipped row keeps only keys whose probability exceeds -gamma / (zeta - gamma). At initialization
# rows are near uniform, and beyond this product hardly any row keeps one (Bondarenko et al. 2023
# scale gamma by the length for this reason).
_DEAD_ROWS_PRODUCT = 8.0


@_names_what_is_allowed
@strict
class StableGPTConfig(PreTrainedConfig):
    r"""Configuration of a [`StableGPTModel`], a pre-norm decoder with squared ReLU and RoPE.

    Defaults are the baseline of Rybakov et al. 2024 (arXiv 2410.16682, section 3) at the width of
    GPT-2 small. Fields are grouped by the room of the model that they fill; the value shown is
    neutral, that is, off.

    Args:
        vocab_size: number of token ids.
        hidden_size: width of the residual stream.
        intermediate_size: width of the MLP; None is four times `hidden_size`.
        num_hidden_layers: number of blocks.
        num_attention_heads: number of query heads.
        num_key_value_heads: number of key and value heads; None is `num_attention_heads`.
        head_dim: width of one head; None is `hidden_size / num_attention_heads`.
        max_position_embeddings: longest sequence, in tokens.
        hidden_act: activation of the MLP, a name of Transformers' `ACT2FN`.
        rope_parameters: rotary embedding in Transformers' form, e.g. `{"rope_theta": 10000.0}`.
        tie_word_embeddings: whether the head shares the embedding's weight.
        attention_dropout: dropout probability of attention weights in training.
        classifier_dropout: the same before the head of token classification; None is 0.1.

        norm: (branch) "layernorm" or "rmsnorm", for every norm of the model.
        norm_bias: (branch) whether norms add a bias.
        norm_eps: (branch) epsilon inside the root of every norm.
        zero_centered_norm: (branch) gains are stored as their distance from 1 (LayerNorm1P), so
            that weight decay pulls them to 1.
        attention_pre_norm: (branch) norm before the attention branch.
        mlp_pre_norm: (branch) norm before the MLP branch.
        attention_post_norm: (branch) norm on Proj's output before the residual add (Rybakov et
            al., QK_FC_norm).
        mlp_post_norm: (branch) the same on FC2's output.
        post_norm_gain: (branch) initial gain of the two post norms.
        layer_scale: (branch) initial value of the LayerScale vectors (Touvron et al. 2021);
            None is off.
        embedding_scale: (branch) multiplies the embedding output; "sqrt_hidden" is Scaled Embed
            (Takase et al. 2023, section 4).
        embedding_norm: (branch) norm on the embedding output (Embed LN).
        embedding_detach: (branch) share of the gradient that reaches the embedding (Embed Detach,
            GLM-130B: 0.1); 1.0 is off.
        parallel_residual: (branch) the MLP reads what the attention branch reads, not its sum
            (GPT-J; GPT-NeoX).

        mlp_gated: (linear) FC1's output is multiplied by the activation of a further map of the
            MLP's input, which has no activation itself (GLU, Shazeer 2020; Llama's SwiGLU with
            `hidden_act="silu"`): three matrices of `intermediate_size`, not two.
        linear_bias: (linear) whether the linears of a block add a bias: "qkv" that of queries, keys
            and values (Qwen 2), "all" every one (GPT-NeoX); None is off.
        sigma_reparam: (linear) W is replaced by gain * W / sigma(W) in the linears of every block
            (Zhai et al. 2023).
        sigma_gain_init: (linear) "one" (the paper's text) or "spectral" (the PyTorch release: the
            function is unchanged at initialization).
        mup_base_width: (linear) width at which learning rates were tuned (simple muP, Wortsman et
            al. 2023): matrices begin with variance, and train with learning rate, scaled by
            base / width; None is off. The learning rates are `hf_stable.optim`'s work.

        qk_norm: (score) norm on queries and keys before RoPE, per "head" (one gain shared by the
            heads) or over the "full" projection; None is off.
        v_norm: (score) the same on values.
        attention_multiplier: (score) soft_temp's beta, multiplies the scaled logits.
        attn_logit_softcapping: (score) tanh cap of the attention logits; None is off.
        attention_clip_gamma: (score) lower stretch of the clipped softmax, <= 0 (Bondarenko et al.
            2023); None is off.
        attention_clip_zeta: (score) upper stretch, >= 1.
        attention_clip_alpha: (score) instead of gamma: gamma = -alpha / visible keys of the row.

        final_logit_softcapping: (head) tanh cap of the output logits; None is off.
        z_loss: (head) coefficient of the squared log partition function, added to the loss.

        initializer: (init) "normal" (std `initializer_range`), "small" (std sqrt(2 / (5 hidden)))
            or "fan_in" (truncated normal, std 1 / sqrt(fan_in)).
        initializer_range: (init) std of the "normal" initializer.
        embedding_std: (init) std of the embedding; None is the initializer's.
        depth_scaled_init: (init) Proj and FC2 begin 1 / sqrt(2 layers) smaller.

    Raises:
        ValueError: for an unknown keyword (the message has the nearest field's name) and for any
            combination that could not work or would be ignored.
    """

    model_type = "stable_gpt"
    keys_to_ignore_at_inference = ["past_key_values", "cache", "ce_loss", "z_loss"]
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 50304
    hidden_size: int = 768
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 4096
    hidden_act: str = "relu2"
    rope_parameters: RopeParameters | dict | None = None
    tie_word_embeddings: bool = False
    attention_dropout: int | float = 0.0
    classifier_dropout: int | float | None = None
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_bias: bool = False
    norm_eps: int | float = 1e-6
    zero_centered_norm: bool = False
    attention_pre_norm: bool = True
    mlp_pre_norm: bool = True
    attention_post_norm: bool = False
    mlp_post_norm: bool = False
    post_norm_gain: int | float = 1.0
    layer_scale: int | float | None = None
    embedding_scale: int | float | str = 1.0
    embedding_norm: bool = False
    embedding_detach: int | float = 1.0
    parallel_residual: bool = False

    mlp_gated: bool = False
    linear_bias: Literal["qkv", "all"] | None = None
    sigma_reparam: bool = False
    sigma_gain_init: Literal["one", "spectral"] = "one"
    mup_base_width: int | None = None

    qk_norm: Literal["head", "full"] | None = None
    v_norm: Literal["head", "full"] | None = None
    attention_multiplier: int | float = 1.0
    attn_logit_softcapping: int | float | None = None
    attention_clip_gamma: int | float | None = None
    attention_clip_zeta: int | float = 1.0
    attention_clip_alpha: int | float | None = None

    final_logit_softcapping: int | float | None = None
    z_loss: int | float = 0.0

    initializer: Literal["normal", "small", "fan_in"] = "normal"
    initializer_range: int | float = 0.02
    embedding_std: int | float | None = None
    depth_scaled_init: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self._refuse_unknown(kwargs)
        self._require_counts("hidden_size", "num_attention_heads")
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads="
                    f"{self.num_attention_heads}: change one of them, or give head_dim."
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        # Of the instance, since Transformers 5.17 adds the embedding to it where it is tied.
        self.base_model_tp_plan = self.tensor_parallel_plan()  # pyright: ignore
        super().__post_init__(**kwargs)
        self.check()
        self._warn_of_dead_rows()

    def check(self) -> None:
        """Check all fields together; a model does it once more when it is built.

        Raises:
            ValueError: naming the field, its value and the remedy.
        """
        self._check_geometry()
        self._check_branch()
        self._check_linear()
        self._check_score()
        self._check_head()
        self._check_init()

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "StableGPTConfig":
        """Build the configuration that a paper calls `name`.

        Args:
            name: a key of `PRESETS`, e.g. "qk_norm_cap".
            overrides: further fields; they win over the preset's.

        Raises:
            ValueError: when `name` is no preset.
        """
        if name not in PRESETS:
            raise ValueError(
                f"preset {name!r} is unknown{_nearest(name, PRESETS)} "
                f"Known presets: {', '.join(PRESETS)}."
            )
        return cls(**{**PRESETS[name], **overrides})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        for key in _LEGACY_ROPE & kwargs.keys():
            raise ValueError(
                f"{key}={kwargs[key]!r} would be ignored here: give rope_parameters="
                '{"rope_theta": ...} with all its keys.'
            )
        if not kwargs.get("return_unused_kwargs", False):
            own = {key: kwargs[key] for key in kwargs.keys() - _LOADING_KEYWORDS if key[0] != "_"}
            cls._refuse_unknown(own)
        return super().from_dict(config_dict, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse what would have no effect: a misspelt field, or one that a model has read."""
        if name in _technique_fields() and self in _frozen and value != getattr(self, name):
            raise ValueError(
                f"{name}={value!r} would be ignored: a model was built from this config with "
                f"{getattr(self, name)!r}. Change a copy (copy.deepcopy) and build a model from it."
            )
        if not name.startswith("_") and name not in {field.name for field in fields(self)}:
            close = difflib.get_close_matches(name, _technique_fields(), n=1, cutoff=0.85)
            if close:
                raise ValueError(
                    f"StableGPTConfig has no field {name!r}; did you mean {close[0]!r}?"
                )
        super().__setattr__(name, value)

    def freeze(self) -> None:
        """Called by a model that has read the techniques' fields; a copy is not frozen."""
        _frozen[self] = True

    def tensor_parallel_plan(self) -> dict[str, str] | None:
        """Return the tensor-parallel plan of a block's linears, or None if it cannot be split.

        Heads stay whole on every process, as in Transformers' own models with a fused projection:
        its rows are not in the order of any even split.
        """
        if self.sigma_reparam:
            return None
        gate = {"layers.*.mlp.gate_proj": "colwise"} if self.mlp_gated else {}
        return {
            "layers.*.self_attn.qkv_proj": "colwise_gather_output",
            "layers.*.self_attn.o_proj": "rowwise_split_input",
            **gate,
            "layers.*.mlp.up_proj": "colwise",
            "layers.*.mlp.down_proj": "rowwise",
        }

    @property
    def embedding_multiplier(self) -> float:
        """The number that multiplies the embedding output."""
        if self.embedding_scale == "sqrt_hidden":
            return math.sqrt(self.hidden_size)
        return float(self.embedding_scale)

    @property
    def clips_attention(self) -> bool:
        """True if attention uses the clipped softmax."""
        return (
            self.attention_clip_gamma is not None
            or self.attention_clip_alpha is not None
            or self.attention_clip_zeta != 1.0
        )

    @property
    def learning_rate_multiplier(self) -> float:
        """Factor on the learning rate of every matrix but the embedding (simple muP), else 1.0."""
        return 1.0 if self.mup_base_width is None else self.mup_base_width / self.hidden_size

    @classmethod
    def _refuse_unknown(cls, keywords: dict[str, Any]) -> None:
        known = {field.name for field in fields(cls)}
        allowed = known | _HOST_KEYWORDS | set(GenerationConfig._get_default_generation_params())
        allowed.add("return_unused_kwargs")
        for key, value in keywords.items():
            if key == "per_layer_config" and value:
                raise ValueError(
                    "per_layer_config: StableGPT builds all layers alike and would ignore it; "
                    "set the fields for the whole model."
                )
            if key not in allowed and key != "per_layer_config" and not key.startswith("_"):
                raise ValueError(
                    f"StableGPTConfig has no field {key!r} (given {value!r}){_nearest(key, known)}"
                )

    def _check_geometry(self) -> None:
        """Counts and shapes that must fit together."""
        self._require_counts(
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}: every key head serves the same "
                "number of query heads."
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} is odd, but RoPE rotates pairs: make it even."
            )
        self._require("attention_dropout", 0.0 <= self.attention_dropout < 1.0, "in [0, 1)")
        dropout = self.classifier_dropout
        self._require("classifier_dropout", dropout is None or 0.0 <= dropout < 1.0, "in [0, 1)")
        if self.hidden_act not in ACT2FN or any(True for _ in ACT2FN[self.hidden_act].parameters()):
            raise ValueError(
                f"hidden_act={self.hidden_act!r} is no activation of Transformers without "
                f"parameters{_nearest(self.hidden_act, ACT2FN)}"
            )
        pad = self.pad_token_id
        self._require("pad_token_id", pad is None or 0 <= pad < self.vocab_size, "an id or None")
        self._check_rope()

    def _check_rope(self) -> None:
        # A copy, since the caller's may be a recipe.
        rope = self.rope_parameters = {"rope_type": "default", **self.rope_parameters}
        kind = rope["rope_type"]
        if kind not in ("default", *ROPE_INIT_FUNCTIONS):
            raise ValueError(
                f"rope_parameters: rope_type={kind!r} is unknown to Transformers"
                f"{_nearest(str(kind), ROPE_INIT_FUNCTIONS)}"
            )
        theta, share = rope.get("rope_theta"), rope.get("partial_rotary_factor", 1.0)
        if not (isinstance(theta, (int, float)) and 0 < theta <= _LARGEST_FLOAT):
            raise ValueError(
                f"rope_parameters: rope_theta={theta!r} must be greater than 0 and finite in "
                "float32."
            )
        rope["rope_theta"] = float(theta)
        if not (
            0 < share <= 1 and int(self.head_dim * share) % 2 == 0 < int(self.head_dim * share)
        ):
            raise ValueError(
                f"rope_parameters: partial_rotary_factor={share!r} must leave an even number of "
                f"head_dim={self.head_dim} channels to rotate, at least 2."
            )
        if kind != "default":
            try:
                ROPE_INIT_FUNCTIONS[kind](self)
            # Whatever Transformers meets with in values that it does not check.
            except Exception as error:
                raise ValueError(f"rope_parameters={rope!r} cannot be used: {error!r}.") from error

    def _check_branch(self) -> None:
        """The branch room."""
        self._require_positive("norm_eps")
        self._require_finite("post_norm_gain", "layer_scale")
        if isinstance(self.embedding_scale, str):
            self._require(
                "embedding_scale",
                self.embedding_scale == "sqrt_hidden",
                'a number or "sqrt_hidden"',
            )
        else:
            self._require_positive("embedding_scale")
        self._require("embedding_detach", 0.0 <= self.embedding_detach <= 1.0, "in [0, 1]")
        if self.embedding_norm and self.embedding_scale != 1.0:
            raise ValueError(
                f"embedding_scale={self.embedding_scale!r} would be undone by embedding_norm=True: "
                "leave one of them off."
            )
        if self.post_norm_gain != 1.0 and not (self.attention_post_norm or self.mlp_post_norm):
            raise ValueError(
                f"post_norm_gain={self.post_norm_gain} would be ignored: set attention_post_norm "
                "or mlp_post_norm to True, or leave the gain at 1.0."
            )

    def _check_linear(self) -> None:
        """The linear room."""
        if self.sigma_gain_init != "one" and not self.sigma_reparam:
            raise ValueError(
                f"sigma_gain_init={self.sigma_gain_init!r} would be ignored: set "
                'sigma_reparam=True, or leave it at "one".'
            )
        if self.mup_base_width is not None:
            self._require_counts("mup_base_width")
        if self.sigma_reparam and vars(self).get("quantization_config") is not None:
            raise ValueError(
                "sigma_reparam=True cannot be quantized, since a quantized layer knows no "
                "gain / sigma(W): load the model, fold it by model.fold_sigma_reparam(), save it, "
                "and quantize that."
            )

    def _check_score(self) -> None:
        """The score room."""
        self._require_positive("attention_multiplier", "attn_logit_softcapping")
        self._require_finite("attention_clip_gamma", "attention_clip_zeta", "attention_clip_alpha")
        gamma, zeta, alpha = (
            self.attention_clip_gamma,
            self.attention_clip_zeta,
            self.attention_clip_alpha,
        )
        if gamma is not None and alpha is not None:
            raise ValueError(
                f"attention_clip_gamma={gamma} and attention_clip_alpha={alpha} exclude each "
                "other: alpha gives every row its own gamma. Set one of them to None."
            )
        # A positive gamma would give masked, that is future, keys a weight.
        self._require("attention_clip_gamma", gamma is None or gamma <= 0, "<= 0")
        self._require("attention_clip_zeta", zeta >= 1, ">= 1")
        self._require("attention_clip_alpha", alpha is None or alpha > 0, "> 0")

    def _warn_of_dead_rows(self) -> None:
        gamma = self.attention_clip_gamma
        if gamma is not None and -gamma * self.max_position_embeddings > _DEAD_ROWS_PRODUCT:
            warnings.warn(
                f"attention_clip_gamma={gamma} with max_position_embeddings="
                f"{self.max_position_embeddings}: -gamma * length = "
                f"{-gamma * self.max_position_embeddings:.3g} > {_DEAD_ROWS_PRODUCT:g}, so most "
                "rows of the full length are exactly zero, without gradient, at initialization. "
                "attention_clip_alpha scales gamma by the length of each row.",
                stacklevel=4,
            )

    def _check_head(self) -> None:
        """The head room."""
        self._require_positive("final_logit_softcapping")
        self._require("z_loss", self.z_loss >= 0, ">= 0")
        self._require_finite("z_loss")

    def _check_init(self) -> None:
        """The init room."""
        self._require_positive("initializer_range", "embedding_std")
        if self.initializer != "normal" and self.initializer_range != 0.02:
            raise ValueError(
                f"initializer_range={self.initializer_range} would be ignored by "
                f'initializer={self.initializer!r}: use initializer="normal", or leave it at 0.02.'
            )

    def _require(self, field: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise ValueError(f"{field}={getattr(self, field)!r} must be {wanted}.")

    def _require_counts(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            fine = isinstance(value, int) and 1 <= value < 2**63
            self._require(name, fine, "a whole number of at least 1, in 64 bits")

    def _require_finite(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None:
                self._require(name, abs(value) <= _LARGEST_FLOAT, "finite in float32")
                setattr(self, name, float(value))  # PyTorch takes no integer beyond 64 bits

    def _require_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            self._require(name, value is None or value > 0, "greater than 0")
        self._require_finite(*names)


def _nearest(name: str, known: Any) -> str:
    """The words that suggest the known name nearest to a misspelt one, or none."""
    meant = [field for field, others in OTHER_NAMES.items() if name.lower() in others.split()]
    if meant and meant[0] in known:
        return f"; did you mean {meant[0]!r}?"
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else "."


__all__ = ["PRESETS", "StableGPTConfig"]

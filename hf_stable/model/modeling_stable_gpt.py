"""StableGPT as Transformers knows it: the family's base class, the decoder and its causal LM.

Invariant, as of the blocks: no `forward` tests a technique's field.
"""

# Transformers types what a config resolves, and what a forward fills in, as Optional.
# pyright: reportOptionalOperand=false, reportOptionalSubscript=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportTypedDictNotRequiredAccess=false, reportPrivateImportUsage=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto import AutoModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .blocks_stable_gpt import StableGPTAttention, StableGPTDecoderLayer, norm_slot
from .configuration_stable_gpt import StableGPTConfig
from .generation_stable_gpt import StableGPTGenerationMixin
from .host_stable_gpt import (
    CACHE,
    StableGPTCacheNames,
    check_cache,
    check_keywords,
    mask_cache,
    one_cache,
    warn_if_untested,
)
from .loss_stable_gpt import logits_cross_entropy
from .parallel_stable_gpt import check_parallelism
from .sigma_stable_gpt import StableGPTSigmaLinear, follow_weights, init_sigma, power_iterate
from .slots_stable_gpt import (
    StableGPTEmbedding,
    StableGPTHead,
    StableGPTLayerScale,
    StableGPTLinear,
    StableGPTNorm,
    StableGPTRotaryEmbedding,
    cap_logits,
    embedding_std,
    init_matrix,
)
from .watch_stable_gpt import StableGPTLossWatch


@dataclass
class StableGPTModelOutput(StableGPTCacheNames, BaseModelOutputWithPast):
    """Output of [`StableGPTModel`]."""


@dataclass
class StableGPTCausalLMOutput(StableGPTCacheNames, CausalLMOutputWithPast):
    """Output of [`StableGPTForCausalLM`]: `loss` is the sum of `ce_loss` and `z_loss`.

    Args:
        ce_loss: cross entropy in nats per target, 0-d, detached; for perplexity.
        z_loss: `config.z_loss` times the mean of log^2 Z, 0-d, detached.
    """

    ce_loss: torch.Tensor | None = None
    z_loss: torch.Tensor | None = None


class StableGPTPreTrainedModel(PreTrainedModel):
    """Base class of the model family: backends, initialization, names."""

    config: StableGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["StableGPTDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": StableGPTDecoderLayer,
        "attentions": StableGPTAttention,
    }

    def _refuse(self, backend: str, *fields: str) -> None:
        """Raise for a field that `backend` would ignore: Transformers then falls back or stops."""
        reference = StableGPTConfig()
        for field in fields:
            value = getattr(self.config, field)
            if value != getattr(reference, field):
                raise ValueError(
                    f'attn_implementation="{backend}" cannot do {field}={value!r}: use '
                    'attn_implementation="eager", which does everything'
                    + (', or "flex_attention".' if field == "attn_logit_softcapping" else ".")
                )

    _CLIP = ("attention_clip_gamma", "attention_clip_zeta", "attention_clip_alpha")

    def _sdpa_can_dispatch(self, is_init_check: bool = False) -> bool:
        self._refuse("sdpa", "attn_logit_softcapping", *self._CLIP)
        return super()._sdpa_can_dispatch(is_init_check)

    def _flex_attn_can_dispatch(self, is_init_check: bool = False) -> bool:
        self._refuse("flex_attention", *self._CLIP, "attention_dropout")
        return super()._flex_attn_can_dispatch(is_init_check)

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, *args: Any, **kwargs: Any
    ) -> str:
        """Refuse what never reaches the hooks above: kernels, which flash names may become."""
        name = attn_implementation or ""
        if name == "paged|eager":
            self._refuse(name, "attn_logit_softcapping", *self._CLIP)
        if "flash" in name or "/" in name:
            self._refuse(name, *self._CLIP)
            if self.config.attn_logit_softcapping is not None:
                self._refuse(name, "attention_dropout")
        if name in ("vllm", "sglang"):
            self._refuse_in_servers(name)
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    def _refuse_in_servers(self, name: str) -> None:
        """Refuse what the Transformers backends of vLLM and SGLang would leave out.

        vLLM takes the cap from the config, SGLang does not. Both put linear layers of their own in
        place of ours, and vLLM also RMSNorms, whose gain it takes for what it finds.
        """
        self._refuse(name, *self._CLIP)
        if name == "sglang":
            self._refuse(name, "attn_logit_softcapping")
        elif self.config.zero_centered_norm and self.config.norm == "rmsnorm":
            raise ValueError('vllm reads zero_centered_norm=True of norm="rmsnorm" as a gain of w.')
        if self.config.sigma_reparam:
            raise ValueError(
                f"{name} would drop sigma_reparam=True: serve model.fold_sigma_reparam() instead."
            )

    def _resolve_parallel_plans(self, distributed_config: Any) -> Any:
        check_parallelism(self.config, distributed_config)
        return super()._resolve_parallel_plans(distributed_config)

    def set_input_embeddings(self, value: Any) -> None:
        """Give the embedding another weight; a plain embedding would lose scale and detach."""
        embedding: Any = self.base_model.embed_tokens
        embedding.weight = value.weight
        embedding.num_embeddings = value.weight.shape[0]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, StableGPTLinear):
            init_matrix(self.config, module)
            if isinstance(module, StableGPTSigmaLinear):
                init_sigma(self.config, module)
        elif isinstance(module, StableGPTEmbedding):
            init.normal_(module.weight, std=embedding_std(self.config))
        elif isinstance(module, StableGPTNorm):
            init.constant_(module.weight, module.initial_gain - module.origin)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, StableGPTLayerScale):
            init.constant_(module.weight, module.initial_gain)
        else:
            super()._init_weights(module)

    def _sigma_linears(self) -> Iterator[tuple[str, StableGPTSigmaLinear]]:
        for name, module in self.named_modules():
            if isinstance(module, StableGPTSigmaLinear):
                yield name, module

    def _follow_weights(self) -> None:
        """One power step for every training layer whose weight has changed."""
        linears = [linear for _, linear in self._sigma_linears() if linear.training]
        if self.training and linears:
            follow_weights(linears)

    def power_iterate(self, steps: int) -> None:
        """Advance the singular vectors of every sigma-Reparam layer by `steps` power iterations."""
        power_iterate([linear for _, linear in self._sigma_linears()], steps)

    def fold_sigma_reparam(self) -> "StableGPTPreTrainedModel":
        """Replace every sigma-Reparam layer, in place, by the plain linear layer that it equals."""
        for name, linear in list(self._sigma_linears()):
            parent, _, child = name.rpartition(".")
            setattr(self.get_submodule(parent), child, linear.fold())
        # A copy of the config, since other models may share the original.
        shared, folded = self.config, copy.deepcopy(self.config)
        folded.sigma_reparam, folded.sigma_gain_init = False, "one"
        folded.base_model_tp_plan = folded.tensor_parallel_plan()  # pyright: ignore
        folded.freeze()
        for module in self.modules():
            if vars(module).get("config") is shared:
                module.config = folded
        return self


def check_ids(name: str, ids: torch.Tensor, vocab_size: int) -> None:
    """Raise for ids outside the vocabulary; on a CPU only, elsewhere it would stall the device."""
    if torch.compiler.is_compiling() or ids.device.type != "cpu" or not ids.numel():
        return
    low, high = (extreme.item() for extreme in ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"{name} contains {low if low < 0 else high}, but the vocabulary has the ids 0 to "
            f"{vocab_size - 1}: the tokenizer is not this model's."
        )


class StableGPTModel(StableGPTPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: StableGPTConfig) -> None:
        super().__init__(config)
        warn_if_untested()
        # Fields set on a config after its construction are checked here at the latest.
        config.check()
        self.embed_tokens = StableGPTEmbedding(config)
        self.embed_norm = norm_slot(config, config.embedding_norm)
        self.layers = nn.ModuleList(
            StableGPTDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = norm_slot(config, present=True)
        self.rotary_emb = StableGPTRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()
        config.freeze()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        *,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> StableGPTModelOutput:
        """Hidden states of every token.

        Args:
            input_ids: (B, Q) int64, or `inputs_embeds`: (B, Q, C), of which exactly one.
            attention_mask: (B, K), 1 for tokens and 0 for padding, or a ready-made 4-d mask.
            position_ids: (B, Q) int64. Given without a mask and a cache, positions that restart at
                0 begin a new document, which does not attend to the one before it.
            past_key_values: keys and values as the scores use them, after norms and RoPE.
            cache: another name of `past_key_values`, as Transformers calls it since 5.24.
            kwargs: keywords of `host_stable_gpt.KEYWORDS`.

        Raises:
            TypeError: for an unknown keyword, naming it, and for a cache that is no `Cache`.
            ValueError: for two different caches, and for no tokens. On a CPU only, since elsewhere
                it would stall the device: for ids outside the vocabulary and positions beyond
                `max_position_embeddings`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        self._check_keywords(kwargs, packed=position_ids is not None)
        cache = one_cache(past_key_values, cache)
        check_cache(cache, kwargs)
        self._follow_weights()
        if inputs_embeds is None:
            check_ids("input_ids", input_ids, self.config.vocab_size)
            inputs_embeds = self.embed_tokens(input_ids)
        given_positions = position_ids
        if position_ids is None:
            seen = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen
            position_ids = position_ids.unsqueeze(0)
        self._check_inputs(inputs_embeds.shape, position_ids, attention_mask)
        # Before a cache is made: with one, Transformers would not look for packed documents.
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=given_positions,
            **mask_cache(cache, kwargs),
        )
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        hidden_states = self.embed_norm(inputs_embeds)
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        # Assisted generation lowers the number for a draft that leaves the model early.
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=causal_mask,
                position_ids=position_ids,
                **{CACHE: cache},
                **kwargs,
            )
        return StableGPTModelOutput(last_hidden_state=self.norm(hidden_states), **{CACHE: cache})

    def _check_keywords(self, keywords: Any, packed: bool) -> None:
        """Refuse what would be passed on to attention functions that ignore it."""
        check_keywords(self, keywords)
        name = self.config._attn_implementation
        is_dense = name in ("eager", "sdpa", "flex_attention")
        if is_dense and not packed and keywords.get("cu_seq_lens_q") is not None:
            raise ValueError(
                f'attn_implementation="{name}" ignores cu_seq_lens_q: give position_ids that '
                "restart at 0 with each packed document."
            )

    def _check_inputs(
        self, shape: torch.Size, position_ids: torch.Tensor, attention_mask: Any
    ) -> None:
        if 0 in shape[:2]:
            raise ValueError(f"The batch has no tokens: its shape is {tuple(shape[:2])}.")
        dense = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4
        if dense and self.config._attn_implementation == "flex_attention":
            raise ValueError(
                'attn_implementation="flex_attention" takes a (batch, keys) mask or a BlockMask, '
                'not a 4-d tensor: use "eager" or "sdpa" for it.'
            )
        if torch.compiler.is_compiling() or position_ids.device.type != "cpu":
            return
        length, longest = int(position_ids.max()) + 1, self.config.max_position_embeddings
        if length > longest and self.rotary_emb.rope_type == "default":
            raise ValueError(
                f"The sequence has {length} tokens, but max_position_embeddings={longest}: "
                "shorten it, or load the model with a larger max_position_embeddings or another "
                "rope_type in rope_parameters."
            )


class StableGPTForCausalLM(StableGPTPreTrainedModel, StableGPTGenerationMixin):
    """The decoder with its head, which makes logits or the loss."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "stable_gpt_head"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: StableGPTConfig) -> None:
        super().__init__(config)
        self.model = StableGPTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = StableGPTHead(config)
        self.logit_cap = config.final_logit_softcapping
        self.loss_watch = StableGPTLossWatch(config.z_loss)
        if config.z_loss:
            self.model.register_forward_pre_hook(self.loss_watch.before_decoder)
        self.post_init()

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Give the head another weight; a plain linear layer would lose the chunked loss."""
        if new_embeddings.bias is not None:
            raise ValueError("lm_head has no bias, but the new output embedding has one.")
        self.lm_head.weight = new_embeddings.weight
        self.lm_head.out_features = new_embeddings.out_features

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        *,
        cache: Cache | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = -100,
        skip_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> StableGPTCausalLMOutput:
        """Logits, and with labels the loss: cross entropy plus z-loss.

        Args (beyond [`StableGPTModel.forward`]):
            labels: (B, Q) int64, shifted here; -100 is no target.
            logits_to_keep: how many last positions get logits, 0 for all, or their indices.
            shift_labels: (B, Q) int64, already shifted; wins over `labels`.
            num_items_in_batch: denominator of both losses, for gradient accumulation.
            ignore_index: the label that is no target.
            skip_logits: whether a call with labels leaves `logits` None, so that no tensor of
                tokens times vocabulary exists; None skips them in training.
        """
        # Not in the signature, where Trainer takes every name with "label" in it for a column that
        # batches must have: it would evaluate without a loss.
        shift_labels: Any = kwargs.pop("shift_labels", None)
        check_keywords(self, kwargs)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=one_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if shift_labels is None and labels is not None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        loss = ce_loss = z_loss = None
        if shift_labels is not None:
            self.loss_watch.answer()
            targets = self._targets(shift_labels, hidden_states.shape[:2], ignore_index)
            loss, ce_loss, z_loss = self._loss(hidden_states, targets, num_items_in_batch)
        skip = self.training if skip_logits is None else skip_logits
        logits = None
        if shift_labels is None or not skip:
            kept = (
                slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            )
            logits = cap_logits(self.lm_head(hidden_states[:, kept]), self.logit_cap)
        return StableGPTCausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            ce_loss=ce_loss,
            z_loss=z_loss,
            **{CACHE: outputs.cache},
        )

    def _loss(
        self,
        hidden_states: torch.Tensor,
        targets: torch.Tensor,
        num_items: torch.Tensor | int | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The head's loss in chunks; where something wraps the head, as PEFT does, from logits."""
        if isinstance(self.lm_head, StableGPTHead):
            return self.lm_head(hidden_states, targets, num_items)
        logits = cap_logits(self.lm_head(hidden_states), self.logit_cap).flatten(0, -2)
        labels = targets.to(logits.device).flatten()
        return logits_cross_entropy(
            logits, labels, num_items=num_items, z_loss=self.loss_watch.z_loss
        )

    def _targets(
        self, shift_labels: torch.Tensor, shape: torch.Size, ignore_index: int
    ) -> torch.Tensor:
        """Labels with -100 for no target, checked where that does not stall a device."""
        if shift_labels.shape != shape:
            raise ValueError(
                f"labels have the shape {tuple(shift_labels.shape)}, the tokens {tuple(shape)}."
            )
        targets = shift_labels.masked_fill(shift_labels == ignore_index, -100)
        check_ids("labels", targets.masked_fill(targets == -100, 0), self.config.vocab_size)
        return targets


class StableGPTGenericHead:
    """Before Transformers' generic heads, which build their decoder by `AutoModel.from_config`."""

    def __init__(self, config: StableGPTConfig) -> None:
        # AutoModel knows no StableGPT where this file came from the Hub, and where it came from a
        # folder, the config's class is not even the one that is imported here.
        AutoModel.register(type(config), StableGPTModel, exist_ok=True)
        super().__init__(config)


class StableGPTForSequenceClassification(
    StableGPTGenericHead, GenericForSequenceClassification, StableGPTPreTrainedModel
):
    """The decoder with one output a sequence, read at its last token that is no padding."""


class StableGPTForTokenClassification(
    StableGPTGenericHead, GenericForTokenClassification, StableGPTPreTrainedModel
):
    """The decoder with one output a token. `config.classifier_dropout` None is 0.1."""


class StableGPTForQuestionAnswering(
    StableGPTGenericHead, GenericForQuestionAnswering, StableGPTPreTrainedModel
):
    """The decoder with two outputs a token: where an answer begins and where it ends."""

    # The generic setter would install a plain embedding, without scale and detach.
    set_input_embeddings = StableGPTPreTrainedModel.set_input_embeddings


__all__ = [
    "StableGPTForCausalLM",
    "StableGPTForQuestionAnswering",
    "StableGPTForSequenceClassification",
    "StableGPTForTokenClassification",
    "StableGPTModel",
    "StableGPTPreTrainedModel",
]

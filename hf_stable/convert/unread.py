"""Fields of published configs that change nothing, with the reason: they are noted, not refused.

Found in configs of all supported families, as written by their authors and by tools. Transformers
keeps such fields without reading them.
"""

from .rules import Rule, noted, off

_IDS = "an id of the tokenizer, which no model reads"
_TOOL = "a note of the tool that wrote the file"
_HEADS = "of a task, a tokenizer or a pipeline, not of the model"
_SPEED = "how it was computed, not what"

UNREAD: dict[str, Rule] = {
    **noted(
        *("unk_token_id", "sep_token_id", "cls_token_id", "mask_token_id", "eod_token_id"),
        *("decoder_start_token_id", "image_token_id", "additional_special_tokens_ids"),
        why=_IDS,
    ),
    **noted(
        *("transformers.js_config", "unsloth_fixed", "unsloth_version", "paddlenlp_version"),
        *("mlx_lm_version", "peft_version", "trl_version", "model_name", "_commit_hash"),
        why=_TOOL,
    ),
    **noted(
        *("custom_pipeline", "custom_pipelines", "finetuning_task", "prefix", "tokenizer_class"),
        *("task_specific_params", "summary_type", "classifier_dropout", "classifier_bias"),
        why=_HEADS,
    ),
    **noted(
        *("pretraining_tp", "tensor_parallel_degree", "sequence_parallel", "use_flash_attn"),
        *("use_flash_attention", "use_sdpa", "use_recompute", "gradient_checkpointing"),
        *("use_deepspeed_checkpointing", "fuse_attention_qkv", "fuse_attention_ffn"),
        *("use_fused_rope", "use_fused_rms_norm", "cache_implementation"),
        why=_SPEED,
    ),
    **noted("max_sequence_length", "seq_length", why="another name of the longest text, unread"),
    **noted("is_decoder", "is_llama_config", why="a mark of its kind, which its model never reads"),
    **off(
        *("add_cross_attention", "cross_attention_hidden_size", "tie_encoder_decoder"),
        *("torchscript", "use_bfloat16", "pruned_heads", "tf_legacy_loss"),
        values=(False, {}),
        why="of older versions of Transformers, at the value that means off",
    ),
    **off(
        *("use_mrope", "use_sliding_window", "rope_interleaved", "use_qk_norm", "qk_layernorm"),
        *("alibi", "use_logn_attn", "use_dynamic_ntk", "attention_bias", "mlp_bias"),
        *("use_parallel_residual", "use_bidirectional_attention"),
        values=(False,),
        why="a switch that is off",
    ),
    **off(
        *("hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "residual_dropout"),
        values=(0,),
        why="dropout that is off",
    ),
    **off(
        *("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale"),
        values=(1,),
        why="a factor of one",
    ),
    **off("is_causal", values=(True,), why="no token sees later ones, here as there"),
}

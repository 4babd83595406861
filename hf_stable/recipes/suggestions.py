"""Suggestion of a known key for one that no recipe has."""

import dataclasses
import difflib
from collections.abc import Iterable, Iterator

from hf_stable.recipes.model_fields import model_defaults, other_names
from hf_stable.recipes.sections import SECTIONS, Location, section_of

# Names used in Transformers' Trainer, nanoGPT, litgpt, torchtitan, Megatron and others.
_OTHER_NAMES = {
    "optimizer.learning_rate": ("lr", "max_lr", "peak_lr", "base_lr"),
    "optimizer.beta1": ("betas", "adam_beta1"),
    "optimizer.beta2": ("adam_beta2",),
    "optimizer.eps": ("epsilon", "adam_eps", "adam_epsilon"),
    "optimizer.weight_decay": ("wd", "decay"),
    "optimizer.max_grad_norm": (
        *("grad_clip", "clip_grad", "clip_grad_norm", "gradient_clip_val", "gradient_clipping"),
        "max_norm",
    ),
    "optimizer.name": ("optim", "optimizer_type"),
    "schedule.name": ("lr_scheduler", "lr_scheduler_type", "lr_decay_style", "scheduler"),
    "schedule.warmup": ("warmup_steps", "warmup_iters", "lr_warmup_steps", "num_warmup_steps"),
    "schedule.min_ratio": ("min_lr", "min_lr_ratio", "min_lr_rate"),
    "data.sequence_length": (
        *("block_size", "context_length", "max_length", "max_seq_len", "max_seq_length"),
        *("seq_len", "seq_length"),
    ),
    "data.train": ("dataset", "dataset_path", "data_path", "train_data", "train_file"),
    "data.validation": ("eval", "val", "valid", "validation_file"),
    "data.separate_documents": ("packing", "reset_position_ids"),
    "training.global_batch_size": ("batch_size", "train_batch_size"),
    "training.micro_batch_size": (
        *("device_batch_size", "local_batch_size", "per_device_train_batch_size"),
    ),
    "training.steps": (
        *("iterations", "max_iters", "max_steps", "num_iterations", "num_steps", "total_steps"),
        *("train_iters", "train_steps"),
    ),
    "training.tokens": ("max_tokens", "num_tokens", "total_tokens", "train_tokens"),
    "training.precision": ("bf16", "dtype", "mixed_precision", "torch_dtype"),
    "training.gradient_checkpointing": ("activation_checkpointing", "recompute"),
    "training.attn_implementation": ("attention", "attention_backend"),
    "training.log_every": ("log_freq", "log_interval", "log_steps", "logging_steps"),
    "training.evaluate_every": (
        *("eval_every", "eval_freq", "eval_interval", "eval_steps", "val_check_interval"),
    ),
    "training.checkpoint_every": (
        *("checkpoint_interval", "ckpt_every", "save_every", "save_interval", "save_steps"),
    ),
    "training.keep_checkpoints": ("save_total_limit",),
    "training.trackers": ("logger", "report_to"),
    "training.compile": ("torch_compile",),
    "tokenizer.path": ("tokenizer_name", "tokenizer_path"),
    "tokenizer.vocab_size": ("n_vocab", "padded_vocab_size"),
    "output": ("out_dir", "output_dir", "save_dir"),
    "name": ("run_name",),
    "seed": ("random_seed",),
}


def nearest_key(location: Location) -> str:
    """Return a remedy for a key that is misspelled, in the wrong section, or of another project."""
    key, section = str(location[-1]), section_of(location)
    known = [*all_keys(), *(f"model.{field}" for field in model_defaults())]
    elsewhere = [each for each in known if each.split(".")[-1] == key]
    meant = elsewhere or [each for each, others in _OTHER_NAMES.items() if key.lower() in others]
    if not meant and key.lower() in other_names():
        meant = [f"model.{other_names()[key.lower()]}"]
    if meant:
        return f"did you mean {meant[0]}?"
    names = [field.name for field in dataclasses.fields(SECTIONS[section])]
    return nearest(key, names, prefix="".join(f"{part}." for part in section))


def nearest_model_key(key: str) -> str:
    """Return a remedy for an unknown key of the model section."""
    known, field = [*model_defaults(), "preset"], other_names().get(key.lower())
    if field == "vocab_size":
        return "did you mean tokenizer.vocab_size?"
    if field is not None:
        return f"did you mean {field}?"
    elsewhere = [each for each in all_keys() if each.split(".")[-1] == key]
    close = difflib.get_close_matches(key, known, n=1)
    if elsewhere and not close:
        return f"did you mean {elsewhere[0]}?"
    return nearest(key, known)


def all_keys() -> Iterator[str]:
    """Yield every key of a recipe; keys of a source in a list have no index."""
    for prefix, section in SECTIONS.items():
        for field in dataclasses.fields(section):
            yield ".".join((*[str(part) for part in prefix], field.name))


def nearest(key: object, known: Iterable[str], prefix: str = "") -> str:
    """Return a remedy for an unknown name; `prefix` is put before the suggestion."""
    close = difflib.get_close_matches(str(key), known := list(known), n=1)
    return f"did you mean {prefix}{close[0]}?" if close else f"known are {', '.join(known)}"

"""A run: what the loop needs, made once from a recipe, and what is left when it ends."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from . import optim, parallel, records, registration  # noqa: F401 (AutoTokenizer reads configs)
from .check import flops_per_token
from .checkpoints import list_checkpoints, load_checkpoint
from .compilation import check_compiler, compile_blocks
from .corpus import Corpus, prepare_corpus
from .data import DataOrder, boundary_ids, data_loader, ngram_cross_entropy
from .errors import CheckpointError, RecipeError
from .kernels.backends import (
    check_attention,
    check_model,
    choose_attention,
    loss_implementation,
)
from .model import StableGPTConfig, StableGPTForCausalLM
from .recipes import Recipe, to_dict
from .reporting import Reporter, Throughput, describe_device
from .telemetry import Watcher, watch

# Keys of a recipe that change no number of a run, so that a run may go on with other values.
_FREE_KEYS = {
    "output",
    "data.cache",
    "data.num_workers",
    "training.micro_batch_size",
    "training.sharding",
    "training.compile",
    "training.log_every",
    "training.evaluate_every",
    "training.evaluate_blocks",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.trackers",
    "training.threads",
    "telemetry.every",
    "telemetry.bounds_every",
}


@dataclass(frozen=True)
class Run:
    """Everything that the training loop needs."""

    recipe: Recipe
    folder: Path
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    corpus: Corpus
    config: StableGPTConfig
    model: Any
    optimizer: torch.optim.Optimizer
    first_step: int
    flops_per_token: float
    reporter: Reporter

    def loader(self, first_step: int, num_steps: int) -> DataLoader:
        """Training microbatches of this process, in the order that the recipe's seed decides."""
        settings = self.recipe.training
        return data_loader(
            self.corpus.train,
            DataOrder(self.recipe.seed, len(self.corpus.train)),
            start_step=first_step,
            num_steps=num_steps,
            global_batch_size=settings.global_batch_size,
            micro_batch_size=settings.micro_batch_size,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            num_workers=self.recipe.data.num_workers,
        )

    def watch(self) -> Watcher:
        """What looks at the model while it trains."""
        settings = self.recipe.telemetry
        return watch(
            self.model,
            self.optimizer,
            every=settings.every,
            bounds_every=settings.bounds_every,
            first_step=self.first_step,
        )

    def throughput(self) -> Throughput:
        """A clock of the run's tokens."""
        return Throughput(self.recipe.tokens_per_step, self.flops_per_token, self.accelerator)

    def learning_rate_factor(self, step: int) -> float:
        """The schedule's factor on every peak learning rate."""
        schedule = self.recipe.schedule
        return optim.learning_rate_factor(
            step,
            name=schedule.name,
            total_steps=self.recipe.num_steps,
            warmup=self.recipe.warmup_steps,
            min_ratio=schedule.min_ratio,
            decay_fraction=schedule.decay_fraction,
        )


def prepare_run(recipe: Recipe, resume: str) -> Run:
    """Make data, model, optimizer and records, and load the newest checkpoint if there is one.

    Args:
        resume: "auto" or "never", see `training.train`.
    """
    settings = recipe.training
    folder = Path(recipe.output)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    _check_folder(folder, recipe, resume)
    accelerator = parallel.build_accelerator(
        settings.precision, settings.sharding, list(settings.trackers), str(folder / "trackers")
    )
    _check_machine(recipe, accelerator.device)
    with accelerator.main_process_first():
        tokenizer, corpus = prepare_corpus(recipe, progress=accelerator.is_main_process)
    inner = _build_model(recipe, tokenizer, accelerator.device)
    about = _describe(inner, recipe, accelerator.device)
    model, optimizer = parallel.wrap(
        inner, lambda wrapped: _optimizer(recipe, wrapped), accelerator, settings.sharding
    )
    # The weights were drawn alike on all processes; dropout must not be.
    torch.manual_seed(recipe.seed + 1 + accelerator.process_index)
    first_step = 0
    checkpoints = list_checkpoints(folder)
    if checkpoints:
        first_step = load_checkpoint(checkpoints[-1], model, optimizer, accelerator)
    run = Run(
        recipe=recipe,
        folder=folder,
        accelerator=accelerator,
        tokenizer=tokenizer,
        corpus=corpus,
        config=inner.config,
        model=model,
        optimizer=optimizer,
        first_step=first_step,
        flops_per_token=about["flops_per_token"],
        reporter=Reporter(folder, accelerator, recipe.num_steps, first_step),
    )
    _record_start(run, about)
    return run


def _check_machine(recipe: Recipe, device: torch.device) -> None:
    """Refuse what cannot work on this machine before any data is prepared."""
    backend = recipe.training.attn_implementation
    try:
        check_attention(backend, device)
    except ValueError as error:
        raise RecipeError(f"training.attn_implementation is {backend}: {error}") from error
    if recipe.training.compile:
        check_compiler(device)


def _attention(recipe: Recipe, config: StableGPTConfig, device: torch.device) -> tuple[str, str]:
    """The attention backend to train with, and why."""
    named = recipe.training.attn_implementation
    if named is not None:
        return named, "the recipe's choice"
    return choose_attention(config, device, packed=recipe.data.separate_documents)


def _build_model(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> StableGPTForCausalLM:
    """The recipe's model with weights drawn from its seed."""
    config = recipe.model_config(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    backend, _ = _attention(recipe, config, device)
    torch.manual_seed(recipe.seed)
    try:
        check_model(backend, config)
        model = StableGPTForCausalLM._from_config(config, attn_implementation=backend)
    except (ImportError, ValueError) as error:
        raise RecipeError(f"training.attn_implementation is {backend}: {error}") from error
    if recipe.training.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        # Embeddings are trained, or a first block that needs gradients where others do not would
        # need a graph of its own.
        model.disable_input_require_grads()
    if recipe.training.compile:
        compile_blocks(model)
    return model


def _describe(model: StableGPTForCausalLM, recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """What run.json says of the model; taken before it is sharded."""
    blocks = sum(parameter.numel() for parameter in model.model.layers.parameters())
    return {
        "parameters": model.num_parameters(),
        "parameters_of_blocks": blocks,
        "flops_per_token": flops_per_token(model, recipe.data.sequence_length),
        "attn_implementation": model.config._attn_implementation,
        "attn_reason": _attention(recipe, model.config, device)[1],
        "loss_implementation": loss_implementation(device),
        "compile": recipe.training.compile,
    }


def _optimizer(recipe: Recipe, model: Any) -> torch.optim.Optimizer:
    settings = recipe.optimizer
    groups = optim.parameter_groups(
        model,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        weight_decay_mode=settings.weight_decay_mode,
        decay_embeddings=settings.decay_embeddings,
        decay_vectors=settings.decay_vectors,
    )
    return optim.adamw(groups, beta1=settings.beta1, beta2=settings.beta2, eps=settings.eps)


def _flat(recipe: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _check_folder(folder: Path, recipe: Recipe, resume: str) -> None:
    """Refuse to go on from another recipe's run, whose numbers would be neither's."""
    if not (folder / "run.json").exists():
        return
    if resume == "never":
        raise CheckpointError(
            f"{folder} holds a run already: give another output folder, delete this one, or go on "
            "from it with --resume auto."
        )
    before, now = _flat(records.read_run(folder)["recipe"]), _flat(to_dict(recipe))
    differences = [
        f"  {key}: {before.get(key)!r} there, {now.get(key)!r} here"
        for key in sorted(before.keys() | now.keys())
        if key not in _FREE_KEYS and before.get(key) != now.get(key)
    ]
    if differences:
        raise CheckpointError(
            f"{folder} holds a run of another recipe:\n" + "\n".join(differences) + "\n"
            "Give another output folder, delete this one, or take back the changes."
        )


def _record_start(run: Run, about: dict[str, Any]) -> None:
    """Write run.json, open the trackers and say in one line what runs where."""
    recipe, corpus, accelerator = to_dict(run.recipe), run.corpus, run.accelerator
    accelerator.init_trackers(
        "hf_stable", config={key: str(value) for key, value in _flat(recipe).items()}
    )
    if not accelerator.is_main_process:
        return
    baselines = ngram_cross_entropy(
        corpus.train_tokens.tokens,
        corpus.validation_tokens.tokens,
        run.config.vocab_size,
        boundary=boundary_ids(run.tokenizer)[0][0],
    )
    device = describe_device(accelerator.device)
    run.reporter.write_run(
        {
            "recipe": recipe,
            "model_config": run.config.to_dict(),
            **about,
            "data": {
                "train": corpus.train_tokens.meta,
                "validation": corpus.validation_tokens.meta,
                "unigram_nats_per_token": baselines.unigram,
                "bigram_nats_per_token": baselines.bigram,
            },
            "versions": records.versions(),
            "git_revision": records.git_revision(),
            "device": device,
            "processes": accelerator.num_processes,
            "distributed_type": accelerator.distributed_type.value,
        }
    )
    blocks, length = len(corpus.train), run.recipe.data.sequence_length
    text = (
        f"{run.recipe.name}: {about['parameters'] / 1e6:.1f}M parameters, {blocks:,} blocks of "
        f"{length} tokens, attention by {about['attn_implementation']} ({about['attn_reason']}), "
        f"loss by {about['loss_implementation']}, {'' if about['compile'] else 'not '}compiled, "
        f"{accelerator.num_processes} x {device}"
    )
    run.reporter.event("resumed" if run.first_step else "started", run.first_step, text)


def save_model(run: Run) -> Path:
    """Write `folder/model`, a Transformers folder with weights and tokenizer; collective."""
    target = run.folder / "model"
    weights, _ = parallel.full_state(run.model, run.optimizer)
    if run.accelerator.is_main_process:
        inner = parallel.unwrap_model(run.model)
        inner.save_pretrained(target, state_dict=weights)
        run.tokenizer.save_pretrained(target)
    run.accelerator.wait_for_everyone()
    return target

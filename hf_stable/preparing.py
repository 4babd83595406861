"""Preparation of a run from a recipe: refuse what cannot work, then build everything once."""

import os
import sys
import uuid
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from . import optim, parallel, records
from .check import check_memory, flops_per_token, warmup_note
from .checkpoints import CheckpointWriter, Keep, list_checkpoints
from .checkpoints.together import from_main
from .compilation import check_compiler, compile_blocks
from .corpus import describe_data, planned_epochs, prepare_corpus, training_order
from .data import boundary_ids, ngram_cross_entropy
from .errors import CheckpointError, RecipeError
from .guard import Guard
from .kernels.backends import (
    check_attention,
    check_model,
    choose_attention,
    loss_implementation,
)
from .model import StableGPTConfig, StableGPTForCausalLM
from .qk_clip import check_qk_clip
from .recipes import Recipe, to_dict
from .reporting import Reporter, describe_device
from .resuming import (
    check_data,
    check_initial_model,
    check_length,
    check_recipe,
    flat,
    recorded_initial_model,
    recorded_recipe,
    resume_run,
    warn_of_numerics,
)
from .runs import Run
from .sharding import Sharding, resolve_sharding
from .warm_start import WarmStart, cost_line

# Seconds that processes wait while the main one prepares the data.
_LEAST_PATIENCE = 7200
# Number of tokens from which the n-gram tables are counted; enough for any supported vocabulary.
_NGRAM_TOKENS = 20_000_000


def prepare_run(recipe: Recipe, resume: str) -> Run:
    """Build data, model, optimizer and records, and load the newest checkpoint if there is one.

    Args:
        recipe: Complete recipe of the run.
        resume: "auto", "longer", "changed" or "never", see `training.train`.
    """
    settings = recipe.training
    folder = Path(recipe.output)
    before = recorded_recipe(folder) if (folder / "run.json").exists() else None
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    check_recipe(folder, recipe, resume)
    accelerator = parallel.build_accelerator(
        settings.precision,
        list(settings.trackers),
        str(folder / "trackers"),
        # The watchdog must report the hung rank before the other processes time out.
        timeout=timedelta(seconds=max(2 * settings.hang_timeout, _LEAST_PATIENCE)),
    )
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    sharding = resolve_sharding(settings, accelerator.num_processes, local)
    _check_machine(recipe, accelerator, sharding, local)
    with accelerator.main_process_first():
        tokenizer, corpus = prepare_corpus(recipe, progress=accelerator.is_main_process)
    check_data(folder, describe_data(recipe, corpus), resume)
    inner = _build_model(recipe, tokenizer, accelerator.device)
    initial = _initial_model(recipe, inner, tokenizer, accelerator, resume)
    _prepare_blocks(recipe, inner)
    about = _describe(inner, recipe, accelerator.device)
    model, optimizer = parallel.wrap(
        inner, lambda wrapped: _optimizer(recipe, wrapped), accelerator, sharding
    )
    # All processes drew the same weights; their dropout must differ.
    torch.manual_seed(recipe.seed + 1 + accelerator.process_index)
    guard = Guard(recipe.guard)
    where = resume_run(folder, guard, model, optimizer, accelerator, report=_say)
    check_length(folder, recipe, where.step)
    if where.step > 0 and accelerator.is_main_process and accelerator.device.type == "cpu":
        warn_of_numerics(folder, _say)
    run = Run(
        recipe=recipe,
        folder=folder,
        accelerator=accelerator,
        tokenizer=tokenizer,
        corpus=corpus,
        config=inner.config,
        model=model,
        optimizer=optimizer,
        first_step=where.step,
        order=training_order(recipe, corpus, where.skipped),
        guard=guard,
        update_norm=where.update_norm,
        rollbacks=len(where.skipped),
        tracker_run=from_main(lambda: _tracker_run(recipe), f"{folder} cannot be read"),
        checkpoints=CheckpointWriter(
            folder,
            accelerator,
            Keep(settings.keep_checkpoints, settings.keep_every, settings.checkpoint_every or 1),
            tokenizer=tokenizer,
            asynchronous=settings.asynchronous_checkpoints,
        ),
        flops_per_token=about["flops_per_token"],
        reporter=Reporter(folder, accelerator, recipe.num_steps, where.step),
    )
    _record_start(
        run,
        {**about, **initial, "sharding": asdict(sharding)},
        "started" if before is None else "resumed",
    )
    _warn_of_schedule(run, before)
    return run


def _warn_of_schedule(run: Run, before: Recipe | None) -> None:
    """Report a changed length with its effect on the learning rate, and a warm-up without end."""
    step, recipe = run.first_step, run.recipe
    if before is not None and before.num_steps != recipe.num_steps:
        old, new = (each.learning_rate_factor(step) for each in (replace(run, recipe=before), run))
        text = (
            f"{before.num_steps:,} -> {recipe.num_steps:,} steps: from here on the learning rate "
            f"follows the {recipe.schedule.name} schedule of a run of {recipe.num_steps:,} steps "
            f"({new:.3f} of its peak in the next step, {old:.3f} before the change), warm-up "
            f"{recipe.warmup_steps:,.0f} steps"
        )
        lengths = {"steps_before": before.num_steps, "steps": recipe.num_steps}
        run.reporter.event("length", step, text, **lengths)
    if (warning := warmup_note(recipe)) is not None:
        run.reporter.event("warning", step, f"warning: {warning}", warning=warning)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _check_machine(
    recipe: Recipe, accelerator: Accelerator, sharding: Sharding, local: int
) -> None:
    """Refuse settings that cannot work on this machine, before any data is prepared."""
    device, backend = accelerator.device, recipe.training.attn_implementation
    try:
        check_attention(backend, device)
    except ValueError as error:
        raise RecipeError(f"training.attn_implementation is {backend}: {error}") from error
    if recipe.training.compile:
        check_compiler(device)
    if recipe.optimizer.qk_clip is not None:
        check_qk_clip(recipe.model_config())
    check_memory(recipe, device, sharding, local)


def _attention(recipe: Recipe, config: StableGPTConfig, device: torch.device) -> tuple[str, str]:
    """Return the attention backend for training, and the reason for it."""
    named = recipe.training.attn_implementation
    if named is not None:
        return named, "the recipe's choice"
    return choose_attention(config, device, packed=recipe.data.separate_documents)


def _build_model(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> StableGPTForCausalLM:
    """Build the recipe's model with weights drawn from its seed."""
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
    return model


def _initial_model(
    recipe: Recipe,
    model: StableGPTForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    resume: str,
) -> dict[str, Any]:
    """Load the initial model, if the recipe has one; return its entry for run.json."""
    folder = Path(recipe.output)
    goes_on = bool(list_checkpoints(folder))  # a checkpoint's weights take precedence
    if recipe.training.initial_model is None:
        return _told(check_initial_model(folder, None, resume))
    try:
        start = WarmStart(recipe, accelerator.device)
    except CheckpointError as error:
        record = recorded_initial_model(folder)
        if not goes_on or record is None:
            raise
        if accelerator.is_main_process:
            _say(
                f"{error}. The run resumes from its checkpoint. It could not be verified that it "
                f"began with these weights (SHA-256 {record['sha256']} in run.json)."
            )
        return _told(record)
    record = check_initial_model(folder, start.sha256, resume)
    if goes_on:
        return _told(record)
    added = start.give_weights(model)
    if record is None and accelerator.is_main_process:
        record = start.measure(model, tokenizer, added)
        _say(cost_line(record))
    return {"initial_model": record}


def _told(record: dict[str, Any] | None) -> dict[str, Any]:
    return {} if record is None else {"initial_model": record}


def _prepare_blocks(recipe: Recipe, model: StableGPTForCausalLM) -> None:
    """Switch on recomputation and compilation, if the recipe asks for them."""
    if recipe.training.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        # The embeddings are trained, so their outputs need no hook. With it, the first block could
        # need another graph than the other blocks.
        model.disable_input_require_grads()
    if recipe.training.compile:
        compile_blocks(model)


def _describe(model: StableGPTForCausalLM, recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """Return the description of the model for run.json; call it before sharding."""
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


def _optimizer(recipe: Recipe, model: Any) -> torch.optim.AdamW:
    settings = recipe.optimizer
    groups = optim.parameter_groups(
        model,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        weight_decay_mode=settings.weight_decay_mode,
        decay_embeddings=settings.decay_embeddings,
        decay_vectors=settings.decay_vectors,
    )
    make = optim.OPTIMIZERS[settings.name]
    return make(groups, beta1=settings.beta1, beta2=settings.beta2, eps=settings.eps)


def _tracker_run(recipe: Recipe) -> str:
    """Return the run's name for its trackers, which is stable across resumes."""
    folder = Path(recipe.output)
    known = records.read_run(folder) if (folder / "run.json").exists() else {}
    return known.get("tracker_run") or f"{recipe.name}-{uuid.uuid4().hex[:8]}"


def _record_start(run: Run, about: dict[str, Any], event: str) -> None:
    """Write run.json, open the trackers and report the setup in one line."""
    recipe, corpus, accelerator = to_dict(run.recipe), run.corpus, run.accelerator
    accelerator.init_trackers(
        "hf_stable",
        config={key: str(value) for key, value in flat(recipe).items()},
        # A resumed run continues the same run in its trackers.
        init_kwargs={
            "wandb": {"name": run.recipe.name, "id": run.tracker_run, "resume": "allow"},
            "trackio": {"name": run.tracker_run, "resume": "allow"},
        },
    )
    if not accelerator.is_main_process:
        return
    baselines = ngram_cross_entropy(
        corpus.train_tokens.sample(_NGRAM_TOKENS),
        corpus.validation_tokens.sample(_NGRAM_TOKENS),
        run.config.vocab_size,
        boundary=boundary_ids(run.tokenizer)[0][0],
    )
    uses = planned_epochs(run.recipe, corpus)
    for use in uses if run.recipe.data.weights else []:
        _say(use.line())
    device = describe_device(accelerator.device)
    run.reporter.write_run(
        {
            "recipe": recipe,
            "tracker_run": run.tracker_run,
            "model_config": run.config.to_dict(),
            **about,
            "data": {
                **describe_data(run.recipe, corpus),
                "sources": [asdict(use) for use in uses],
                "unigram_nats_per_token": baselines.unigram,
                "bigram_nats_per_token": baselines.bigram,
            },
            "versions": records.versions(),
            "numerics": records.numerics(),
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
    run.reporter.event(event, run.first_step, text)

"""Requirements of a recipe on any number of GPUs, computed without training and without memory.

The model is built on the meta device: shapes and dtypes without storage.
"""

from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from torch import nn

from hf_stable.errors import RecipeError
from hf_stable.kernels.backends import default_attention
from hf_stable.memory import Memory, memory, shapes
from hf_stable.model import StableGPTForCausalLM
from hf_stable.recipes import Recipe
from hf_stable.sharding import Sharding, resolve_sharding
from hf_stable.wording import counted

_FP32 = 4  # bytes; weights, gradients and both AdamW moments are fp32 in every precision
_NODE = 8  # GPUs of a node


@dataclass(frozen=True)
class CheckReport:
    """Requirements of a recipe. FLOPs count matrix products and causal attention only."""

    name: str
    world_size: int
    parameters: int
    non_embedding_parameters: int
    """Parameters outside the input embedding and the head."""
    tokens_per_step: int
    accumulation_steps: int
    """Micro batches of each process in one optimizer step."""
    steps: int
    warmup_steps: float
    flops_per_token: float
    """Forward and backward pass of one training token, both counted causally."""
    checkpoint_bytes: int
    """Weights and AdamW state of one checkpoint."""
    attention: str
    """Attention backend that memory is estimated for: the recipe's, or the one that CUDA gets."""
    memory: Memory
    notes: list[str] = field(default_factory=list)
    """Settings that work but are probably a mistake."""

    def rows(self) -> list[tuple[str, str]]:
        """Name and value with unit of every number, for a table."""
        tokens = self.steps * self.tokens_per_step
        memory = self.memory
        rows = [
            ("parameters", f"{self.parameters / 1e6:,.1f} M"),
            ("outside the embeddings", f"{self.non_embedding_parameters / 1e6:,.1f} M"),
            ("tokens", f"{tokens:,}"),
            ("steps", f"{self.steps:,} of {self.tokens_per_step:,} tokens"),
            ("warm-up", f"{self.warmup_steps:,.1f} steps"),
            (
                "processes",
                f"{self.world_size}, each with "
                f"{counted(self.accumulation_steps, 'micro batch', 'micro batches')} a step",
            ),
            ("compute", f"{self.flops_per_token / 1e9:.3f} GFLOP a token (causal attention)"),
            ("compute in all", f"{self.flops_per_token * tokens:.3g} FLOP"),
            ("checkpoint", _gigabytes(self.checkpoint_bytes)),
            ("attention", self.attention),
            ("memory of a process", f"about {_gigabytes(memory.total)}, of which"),
        ]
        parts = memory.parts().items()
        return rows + [(f"  {name}", _gigabytes(value)) for name, value in parts if value]


def check(recipe: Recipe, world_size: int = 1) -> CheckReport:
    """Compute the requirements of a recipe on `world_size` processes, and refuse what cannot work.

    Raises:
        RecipeError: batches that do not divide, or an attention backend that refuses the model.
    """
    accumulation = _accumulation_steps(recipe, world_size)
    model = build_model(recipe)
    sharding = resolve_sharding(recipe.training, world_size, min(world_size, _NODE), {})
    parameters = sum(parameter.numel() for parameter in model.parameters())
    embeddings = {model.model.embed_tokens.weight, model.lm_head.weight}
    return CheckReport(
        name=recipe.name,
        world_size=world_size,
        parameters=parameters,
        non_embedding_parameters=parameters - sum(weight.numel() for weight in embeddings),
        tokens_per_step=recipe.tokens_per_step,
        accumulation_steps=accumulation,
        steps=recipe.num_steps,
        warmup_steps=recipe.warmup_steps,
        flops_per_token=flops_per_token(model, recipe.data.sequence_length),
        checkpoint_bytes=3 * _FP32 * parameters,
        attention=str(model.config._attn_implementation),
        memory=_estimate(recipe, model, sharding, accumulation, "cuda"),
        notes=_notes(recipe, world_size),
    )


def check_memory(recipe: Recipe, device: torch.device, sharding: Sharding, local_size: int) -> None:
    """Refuse a model that does not fit, before anything is allocated.

    On CUDA, refuse only a model that cannot fit; the allocator reports the rest.

    Args:
        local_size: processes on this machine.

    Raises:
        RecipeError: names what is needed, and what the device has.
    """
    needed = _least_bytes(recipe, sharding)
    if device.type == "cuda":
        available = torch.cuda.get_device_properties(device).total_memory
    else:
        available = (psutil.virtual_memory().total + psutil.swap_memory().total) // local_size
    if needed <= available and device.type == "cpu":
        # A tighter estimate than the bound: a CPU raises no error, Linux kills the process instead.
        needed = _estimated_bytes(recipe, sharding)
    if needed > available:
        sizes = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
        named = ", ".join(f"model.{name}" for name in sizes)
        raise RecipeError(
            f"{recipe.name}: a process needs about {_gigabytes(needed)} or more for weights, "
            f"gradients, AdamW's moments and activations, and {device.type} has "
            f"{_gigabytes(available)}: lower {named}, model.num_key_value_heads, model.head_dim, "
            "tokenizer.vocab_size, data.sequence_length or training.micro_batch_size, recompute "
            "blocks with training.gradient_checkpointing, or shard over more "
            f"{'GPUs' if device.type == 'cuda' else 'machines'} with training.sharding fsdp2"
        )


def _estimate(
    recipe: Recipe,
    model: StableGPTForCausalLM,
    sharding: Sharding,
    accumulation: int,
    device: str,
) -> Memory:
    return memory(
        shapes(model, recipe, device),
        sharding,
        accumulates=accumulation > 1,
        recompute=recipe.training.gradient_checkpointing,
    )


def _estimated_bytes(recipe: Recipe, sharding: Sharding) -> int:
    """Return the peak memory of a process on a CPU in bytes."""
    accumulation = _accumulation_steps(recipe, sharding.processes)
    try:
        estimate = _estimate(recipe, build_model(recipe, "cpu"), sharding, accumulation, "cpu")
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        return 2**63  # a single tensor has more bytes than that
    return estimate.total + estimate.host


def _least_bytes(recipe: Recipe, sharding: Sharding) -> int:
    """Return a lower bound of the memory of one process in bytes, by arithmetic on the config."""
    config = recipe.model_config()
    width, head = config.hidden_size, config.head_dim or 0
    queries, keys = config.num_attention_heads * head, 2 * (config.num_key_value_heads or 0) * head
    matrices = 3 if config.mlp_gated else 2
    block = width * (2 * queries + keys) + matrices * width * (config.intermediate_size or 0)
    tables = (1 if config.tie_word_embeddings else 2) * config.vocab_size * width
    parameters = config.num_hidden_layers * block + tables
    held = 0 if sharding.cpu_offload else 4 * _FP32 * parameters // sharding.shard_size
    inputs = _micro_tokens(recipe) * width * (2 if recipe.training.precision == "bf16" else _FP32)
    # Autograd keeps at least one input of every block.
    return held + config.num_hidden_layers * inputs


def flops_per_token(model: StableGPTForCausalLM, sequence_length: int) -> float:
    """FLOPs of a token, forward and backward: 6 per weight of a matrix product, plus attention.

    A row attends to half the sequence on average: 2 products x 2 FLOPs x S / 2 keys x H x D, three
    times with the backward pass, as in PaLM (Chowdhery et al. 2022, appendix B) but causal.
    """
    config = model.config
    matrices = sum(
        module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear)
    )
    assert config.head_dim is not None  # the config fills it in
    width = config.num_attention_heads * config.head_dim
    return 6.0 * matrices + 6.0 * config.num_hidden_layers * sequence_length * width


def _accumulation_steps(recipe: Recipe, world_size: int) -> int:
    if world_size < 1:
        raise RecipeError(f"{world_size} processes; give at least 1")
    batch, micro = recipe.training.global_batch_size, recipe.training.micro_batch_size
    if batch % (micro * world_size) == 0:
        return batch // (micro * world_size)
    if batch % world_size:
        fitting = f"set training.global_batch_size to a multiple of {world_size}"
    else:
        share = batch // world_size
        sizes = [str(size) for size in range(1, share + 1) if share % size == 0]
        fitting = f"training.micro_batch_size may be {', '.join(sizes)}"
    raise RecipeError(
        f"training.global_batch_size {batch} is not a multiple of micro_batch_size {micro} x "
        f"{world_size} processes = {micro * world_size}; {fitting}"
    )


def build_model(recipe: Recipe, device: str = "cuda") -> StableGPTForCausalLM:
    """Build the model on the meta device as training on devices of that type would build it."""
    config = recipe.model_config()
    backend = recipe.training.attn_implementation or default_attention(
        config, torch.device(device), packed=recipe.data.separate_documents
    )
    config._attn_implementation = backend
    try:
        with torch.device("meta"):
            return StableGPTForCausalLM(config)
    except (ValueError, ImportError) as error:
        raise RecipeError(f"training.attn_implementation is {backend}: {error}") from error


def _micro_tokens(recipe: Recipe) -> int:
    return recipe.training.micro_batch_size * recipe.data.sequence_length


def warmup_note(recipe: Recipe) -> str | None:
    """Say that the learning rate never reaches its peak, where that is so."""
    if recipe.warmup_steps < recipe.num_steps:
        return None
    return (
        f"schedule.warmup is {recipe.warmup_steps:,.0f} steps and the run is {recipe.num_steps:,} "
        "steps, so the learning rate rises to the end and never decays: shorten the warm-up, or "
        "train longer"
    )


def _notes(recipe: Recipe, world_size: int) -> list[str]:
    warmup = warmup_note(recipe)
    notes = [] if warmup is None else [warmup]
    if recipe.training.sharding == "auto" and world_size > 1:
        notes.append(
            "training.sharding auto is the launcher's choice; memory is that of whole copies (ddp)"
        )
    for source in [*recipe.data.train, *recipe.data.validation]:
        is_file = Path(source.path).suffix != "" and not any(mark in source.path for mark in "*?[")
        if is_file and not Path(source.path).exists():
            notes.append(f"data: there is no {source.path} here yet")
    return notes


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e7 else f"{count / 1e6:,.2f} MB"

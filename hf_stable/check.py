"""What a recipe asks for, on any number of GPUs, computed without training and without memory.

The model is built on the meta device, and its forward pass runs on fake tensors: both are shapes
and dtypes without storage.
"""

import copy
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_stable.errors import RecipeError
from hf_stable.kernels.backends import default_attention
from hf_stable.model import StableGPTForCausalLM, StableGPTModel
from hf_stable.model.loss_stable_gpt import CHUNK_BYTES
from hf_stable.recipes import Recipe

_FP32 = 4  # bytes; weights, gradients and both AdamW moments are fp32 in every precision


@dataclass(frozen=True)
class Memory:
    """Estimated bytes of one process at the peak of a step, without the allocator's own waste."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    """The largest unit that FSDP2 gathers; 0 where every process holds the whole model."""
    activations: int
    """What the backward pass needs of one micro batch, bf16 copies of weights included."""
    loss: int
    """One chunk of logits with its gradient, and the head's fp32 gradient sum."""

    @property
    def total(self) -> int:
        """Sum of the parts."""
        parts = (self.weights, self.gradients, self.optimizer, self.gathered)
        return sum(parts) + self.activations + self.loss


@dataclass(frozen=True)
class CheckReport:
    """What a recipe asks for. FLOPs are those of matrix products and causal attention only."""

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
    """What works but is hardly meant."""

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
                f"{self.world_size}, {self.accumulation_steps} micro batches a step each",
            ),
            ("compute", f"{self.flops_per_token / 1e9:.3f} GFLOP a token (causal attention)"),
            ("compute in all", f"{self.flops_per_token * tokens:.3g} FLOP"),
            ("checkpoint", _gigabytes(self.checkpoint_bytes)),
            ("memory of a process", f"about {_gigabytes(memory.total)}, of which"),
        ]
        parts = {
            "  weights": memory.weights,
            "  gradients": memory.gradients,
            "  AdamW moments": memory.optimizer,
            "  gathered unit": memory.gathered,
            f"  activations ({self.attention})": memory.activations,
            "  loss": memory.loss,
        }
        return rows + [(name, _gigabytes(value)) for name, value in parts.items() if value]


def check(recipe: Recipe, world_size: int = 1) -> CheckReport:
    """Compute what a recipe asks for on `world_size` processes, and refuse what cannot work.

    Raises:
        RecipeError: batches that do not divide, or an attention backend that refuses the model.
    """
    accumulation = _accumulation_steps(recipe, world_size)
    model = _build(recipe)
    activations = _activation_bytes(model, recipe)
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
        memory=_memory(model, recipe, world_size, activations),
        notes=_notes(recipe, world_size),
    )


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


def _build(recipe: Recipe) -> StableGPTForCausalLM:
    """The model as training on CUDA devices would build it, on the meta device."""
    config = recipe.model_config()
    config._attn_implementation = recipe.training.attn_implementation or default_attention(
        config, torch.device("cuda"), packed=recipe.data.separate_documents
    )
    try:
        with torch.device("meta"):
            return StableGPTForCausalLM(config)
    except (ValueError, ImportError) as error:
        raise RecipeError(f"training.attn_implementation: {error}") from error


def _activation_bytes(model: StableGPTForCausalLM, recipe: Recipe) -> int:
    """Bytes that autograd keeps of one micro batch for the backward pass of the blocks."""
    training, config = recipe.training, copy.deepcopy(model.config)
    if config._attn_implementation != "eager":
        # Fused kernels keep queries, keys, values, output and one sum a row, as sdpa does. Not all
        # of them run on fake tensors, and sdpa itself can neither cap nor clip.
        config._attn_implementation, config.attn_logit_softcapping = "sdpa", None
        config.attention_clip_gamma = config.attention_clip_alpha = None
        config.attention_clip_zeta = 1.0
    with torch.device("meta"):
        blocks = StableGPTModel(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        blocks.to_empty(device="cpu").train()
        shape = (training.micro_batch_size, recipe.data.sequence_length, config.hidden_size)
        embeddings = torch.empty(shape, requires_grad=True)
        kept = _kept_bytes(blocks, embeddings, training.precision == "bf16")
    if training.gradient_checkpointing:  # the input of each block, and all of the block at work
        return embeddings.nbytes * config.num_hidden_layers + kept // config.num_hidden_layers
    return kept


def _kept_bytes(blocks: StableGPTModel, embeddings: torch.Tensor, bf16: bool) -> int:
    """Bytes of the distinct tensors, parameters apart, that a forward pass keeps or returns."""
    parameters = {_storage(parameter) for parameter in blocks.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[_storage(tensor)] = tensor.untyped_storage()
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        output = _run(blocks, embeddings)
    kept[_storage(output)] = output.untyped_storage()
    return sum(item.nbytes() for key, item in kept.items() if key not in parameters)


def _run(blocks: StableGPTModel, embeddings: torch.Tensor) -> torch.Tensor:
    """The forward pass without a mask: on fake tensors Transformers would make one for each layer,
    though a step leaves causality to the attention kernel."""
    hidden = blocks.embed_norm(embeddings)
    positions = torch.arange(embeddings.shape[1])[None]
    rotations = blocks.rotary_emb(hidden, positions)
    for layer in blocks.layers:
        hidden = layer(hidden, position_embeddings=rotations, attention_mask=None)
    return blocks.norm(hidden)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _memory(
    model: StableGPTForCausalLM, recipe: Recipe, world_size: int, activations: int
) -> Memory:
    shards = world_size if recipe.training.sharding == "fsdp2" else 1
    weights = _FP32 * sum(parameter.numel() for parameter in model.parameters()) // shards
    head = _FP32 * model.lm_head.weight.numel()
    block = _FP32 * sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    logits = min(CHUNK_BYTES["cuda"], _micro_tokens(recipe) * _FP32 * model.config.vocab_size)
    return Memory(
        weights=weights,
        gradients=weights,
        optimizer=2 * weights,
        gathered=max(head, block) if shards > 1 else 0,
        activations=activations,
        loss=2 * logits + head,
    )


def _micro_tokens(recipe: Recipe) -> int:
    return recipe.training.micro_batch_size * recipe.data.sequence_length


def _notes(recipe: Recipe, world_size: int) -> list[str]:
    notes = []
    if recipe.warmup_steps >= recipe.num_steps:
        notes.append(
            f"schedule.warmup ({recipe.warmup_steps:,.0f} steps) is as long as the run: the "
            "learning rate never reaches its peak"
        )
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

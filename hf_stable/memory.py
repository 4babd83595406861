"""Memory of one process at the peak of a training step, computed without allocating it.

A step is evaluated at five moments. Each is arithmetic on shapes, except the memory of one block,
which is measured in its forward and backward pass on fake tensors (shapes and dtypes without
storage).
"""

import copy
import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .model import StableGPTConfig, StableGPTForCausalLM, StableGPTModel
from .model.loss_stable_gpt import CHUNK_BYTES, CHUNK_ROWS
from .recipes import Recipe
from .sharding import Sharding

_FP32 = 4  # bytes; weights, gradients and both AdamW moments are fp32 in every precision


@dataclass(frozen=True)
class Moment:
    """Bytes that are alive besides weights and optimizer state when something is computed."""

    gradients: int
    gathered: int
    """Whole units of `fully_shard`, and the buffers in which processes exchange them."""
    activations: int
    """Tensors saved for the backward pass of this micro batch, bf16 copies of weights included."""
    working: int
    """Temporary tensors of the computation itself."""

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return self.gradients + self.gathered + self.activations + self.working


@dataclass(frozen=True)
class Memory:
    """Bytes on the device of one process, without the allocator's waste and the runtime's own."""

    weights: int
    optimizer: int
    moments: dict[str, Moment]
    host: int = 0
    """Bytes in host memory under `cpu_offload`."""

    @property
    def peak(self) -> str:
        """Name of the moment that needs the most memory."""
        return max(self.moments, key=lambda name: self.moments[name].total)

    @property
    def activations(self) -> int:
        """Bytes that the forward pass of one micro batch saves for the backward pass."""
        return max(moment.activations for moment in self.moments.values())

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return self.weights + self.optimizer + self.moments[self.peak].total

    def parts(self) -> dict[str, int]:
        """Bytes at the peak by what they hold; they sum to `total`."""
        peak = self.moments[self.peak]
        return {
            "weights": self.weights,
            "AdamW moments": self.optimizer,
            "gradients": peak.gradients,
            "gathered units": peak.gathered,
            "activations": peak.activations,
            f"working ({self.peak})": peak.working,
        }


class BlockCost(NamedTuple):
    """Bytes of one block for one micro batch."""

    kept: int
    """Bytes saved for its backward pass, its input included where it reads that."""
    backward: int
    """Bytes at the peak of its backward pass, `kept` included."""


@dataclass(frozen=True)
class Shapes:
    """All that memory depends on besides how processes hold the model; sizes are in elements.

    Args:
        narrow: bytes of an element of what matrix products read: 2 in bf16, else 4.
    """

    layers: int
    block: int
    head: int
    embedding: int
    """0 where it is the head's weight."""
    rest: int
    stream: int
    """Tokens of a micro batch times width."""
    logits: int
    """Rows of one chunk of the loss times vocabulary."""
    narrow: int
    gathered: int
    """Bytes of an element of a block that is gathered from its shards."""
    cuda: bool
    """True if the loss overwrites its logits in their dtype, as the kernel on CUDA does, and
    gradients are reduced in place; gloo copies them."""
    cost: dict[bool, BlockCost]
    """Cost of a block by whether its weights have 2 bytes, as gathered shards may have."""

    @property
    def parameters(self) -> int:
        """Number of parameters of the whole model."""
        return self.layers * self.block + self.head + self.embedding + self.rest


def shapes(model: StableGPTForCausalLM, recipe: Recipe, device: str = "cuda") -> Shapes:
    """Measure a model on the meta device for a recipe's micro batch.

    Args:
        device: whose chunks of the loss are meant, "cpu" or "cuda".
    """
    tokens = recipe.training.micro_batch_size * recipe.data.sequence_length
    rows = max(CHUNK_ROWS, CHUNK_BYTES[device] // (_FP32 * model.config.vocab_size))
    bf16 = recipe.training.precision == "bf16"
    head, block = model.lm_head.weight, _numel(model.model.layers[0])
    embedding = model.model.embed_tokens.weight
    embedded = 0 if embedding is head else embedding.numel()
    narrow = bf16 and not model.config.sigma_reparam  # see parallel.py
    layers = len(model.model.layers)
    return Shapes(
        layers=layers,
        block=block,
        head=head.numel(),
        embedding=embedded,
        rest=_numel(model) - layers * block - head.numel() - embedded,
        stream=tokens * model.config.hidden_size,
        logits=min(tokens, rows) * model.config.vocab_size,
        narrow=2 if bf16 else _FP32,
        gathered=2 if narrow else _FP32,
        cuda=device == "cuda",
        cost={each: _block_cost(model.config, recipe, each) for each in {False, narrow}},
    )


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def memory(sizes: Shapes, sharding: Sharding, *, accumulates: bool, recompute: bool) -> Memory:
    """Compose a step's moments.

    Args:
        accumulates: whether a step has more than one micro batch.
        recompute: whether blocks are computed again in the backward pass.
    """
    weights = _FP32 * sizes.parameters // sharding.shard_size
    make = _sharded_moments if sharding.is_sharded else _whole_moments
    held = _kept(sizes, sharding.is_sharded, recompute)
    moments = make(sizes, sharding, held, accumulates)
    if sharding.cpu_offload:
        # Gradients leave the device as they are made; weights come when they are gathered.
        moments = {
            name: Moment(0, moment.gathered, moment.activations, moment.working)
            for name, moment in moments.items()
        }
        return Memory(0, 0, moments, host=4 * weights)
    # Fused AdamW makes no temporary tensors.
    moments["the update"] = Moment(weights, 0, 0, 0)
    return Memory(weights, 2 * weights, moments)


class _Kept(NamedTuple):
    """Bytes of activations and of the blocks' work."""

    all: int
    """Bytes at the end of the forward pass."""
    block: int
    """Bytes that the backward pass of a block needs beyond `all`."""
    last: int
    """Bytes left besides that in the last block of the backward pass."""


def _kept(sizes: Shapes, sharded: bool, recompute: bool) -> _Kept:
    kept, backward = sizes.cost[sharded and sizes.gathered == 2]
    stream = _FP32 * sizes.stream
    outside = 2 * stream  # the last norm's input and output
    if recompute:
        return _Kept(outside + sizes.layers * stream, backward, 2 * stream)
    return _Kept(outside + sizes.layers * kept, backward - kept, 2 * stream + kept)


def _loss_working(sizes: Shapes, cast_head: bool) -> int:
    """Logits, gradients of hidden states and head, and the head in bf16 where it is cast."""
    logits = sizes.narrow * sizes.logits + (0 if sizes.cuda else 2 * _FP32 * sizes.logits)
    cast = sizes.narrow * sizes.head if cast_head else 0
    return logits + cast + _FP32 * (sizes.head + sizes.stream)


def _whole_moments(
    sizes: Shapes, sharding: Sharding, kept: _Kept, accumulates: bool
) -> dict[str, Moment]:
    """Return the moments of one process alone, or of whole copies.

    DDP's buckets hold all gradients all the time. Gradients that are accumulated over micro batches
    are kept outside of them.
    """
    ddp = sharding.processes > 1
    full, head = _FP32 * sizes.parameters, _FP32 * sizes.head
    before = full * (ddp + accumulates)
    # A gradient is computed first and then added to the accumulated one.
    after_head = before or head
    embedding = _FP32 * (sizes.embedding or sizes.head)
    stream = _FP32 * sizes.stream
    cast = sizes.narrow < _FP32
    return {
        "the loss": Moment(before, 0, kept.all, _loss_working(sizes, cast)),
        "the head's backward pass": Moment(before, 0, kept.all, 2 * head + 2 * stream),
        "a block's backward pass": Moment(after_head, 0, kept.all, kept.block),
        "the embedding's backward pass": Moment(full, 0, 2 * stream, embedding if before else 0),
    }


def _sharded_moments(
    sizes: Shapes, sharding: Sharding, kept: _Kept, accumulates: bool
) -> dict[str, Moment]:
    """Return the moments under `fully_shard`.

    A unit is gathered into a flat buffer and copied out of it. That buffer lives until the next
    unit is gathered, and so does the buffer from which gradients were reduced.
    """
    shard = _FP32 * sizes.parameters // sharding.shard_size
    before = shard if accumulates else 0
    tied = sizes.embedding == 0
    block, head = sizes.gathered * sizes.block, (_FP32 if tied else sizes.narrow) * sizes.head
    embedding, stream = _FP32 * (sizes.embedding or sizes.head), _FP32 * sizes.stream
    again = sharding.reshard_after_forward
    # The root keeps what it gathers for the whole step: vectors, and a tied weight.
    root = _FP32 * (sizes.rest + (sizes.head if tied else 0))
    whole = root if again else root + sizes.layers * block + (0 if tied else embedding)
    alone = sharding.shard_size == 1  # nothing to exchange
    buffers, copies = (1, 0) if alone else (2, 1 if sizes.cuda else 2)
    blocks = buffers * block if again else 0
    summed = _FP32 * sizes.head  # the head's gradient in fp32
    sums = 0 if alone else max(summed, _FP32 * sizes.block * (1 + copies))
    return {
        "the loss": Moment(
            before,
            whole + (0 if tied else buffers * head),
            kept.all,
            _loss_working(sizes, tied and sizes.narrow == 2),
        ),
        "the head's backward pass": Moment(
            before,
            whole + (0 if tied else head),
            kept.all,
            summed + head + 2 * stream,
        ),
        "the sum of the head's gradients": Moment(
            before,
            whole + blocks // 2,
            kept.all,
            head + copies * summed + summed // sharding.shard_size + stream,
        ),
        "a block's backward pass": Moment(before, whole + blocks, kept.all, kept.block + sums),
        "the embedding's backward pass": Moment(
            shard,
            whole + (buffers * embedding if again else 0),
            2 * stream,
            (1 + copies) * embedding,
        ),
    }


class _Meter(TorchDispatchMode):
    """Bytes of the storages that operators make, while they are alive."""

    def __init__(self, given: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.given = {tensor.untyped_storage()._cdata for tensor in given}
        self.alive: dict[int, Any] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return outputs

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, count = storage._cdata, storage.nbytes()
        if key not in self.alive and key not in self.given:
            self.alive[key] = weakref.finalize(storage, self._free, key, count)
            self.now += count
            self.peak = max(self.peak, self.now)

    def _free(self, key: int, count: int) -> None:
        del self.alive[key]
        self.now -= count


def _block_cost(config: StableGPTConfig, recipe: Recipe, narrow: bool) -> BlockCost:
    config = copy.deepcopy(config)
    config.num_hidden_layers = 1
    if config._attn_implementation != "eager":
        # Fused kernels keep queries, keys, values, output and one sum a row, as sdpa does. Not all
        # of them run on fake tensors, and sdpa itself can neither cap nor clip.
        config._attn_implementation, config.attn_logit_softcapping = "sdpa", None
        config.attention_clip_gamma = config.attention_clip_alpha = None
        config.attention_clip_zeta = 1.0
    with torch.device("meta"):
        model = StableGPTModel(config)
    if narrow:
        model.layers.to(torch.bfloat16)
    training = recipe.training
    shape = (training.micro_batch_size, recipe.data.sequence_length, config.hidden_size)
    bf16 = training.precision == "bf16"
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer: Any = model.to_empty(device="cpu").train().layers[0]
        hidden = torch.empty(shape, requires_grad=True)
        # Not by the module: some kinds of RoPE look at the positions themselves.
        cosines = (1, 1, shape[1], 2 * model.rotary_emb.inv_freq.numel())
        rotations = (torch.empty(cosines), torch.empty(cosines))
        given = (hidden, *rotations, *layer.parameters(), *layer.buffers())
        meter, kept = _Meter(given), {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        autocast = torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()
        with meter, autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
            # No mask: on fake tensors Transformers would make one for each layer, though a step
            # leaves causality to the attention kernel.
            output = layer(hidden, position_embeddings=rotations, attention_mask=None)
        own = sum(item.nbytes() for key, item in kept.items() if key not in meter.given)
        stream = hidden.nbytes if hidden.untyped_storage()._cdata in kept else 0
        kept.clear()
        meter.peak = meter.now
        with meter:
            output.backward(torch.empty_like(output))
    return BlockCost(own + stream, meter.peak + stream)

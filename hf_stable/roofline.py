"""Time of a training step on a GPU, computed from FLOPs and bytes alone, not measured.

Compute follows the time budget of one token: matrix products, attention, passes over memory. What
processes exchange hides behind it, as far as it is shorter.
"""

from dataclasses import dataclass

from .check import flops_per_token
from .model import StableGPTForCausalLM
from .recipes import Recipe
from .sharding import Sharding


@dataclass(frozen=True)
class Device:
    """A GPU and what joins it to others: rates reached in practice, per second, not data sheets.

    The defaults are an H200 SXM in nodes with NVLink and one 400 Gb/s adapter a GPU: bf16 GEMMs
    (790e12 at best, 700e12 over a model's shapes); attention at two thirds of FlashAttention 3's
    published rate, forward and backward; the rest is bandwidth.
    """

    name: str = "H200"
    capacity: float = 141
    """GB (1e9 bytes) of memory, by the data sheet."""
    gemm: float = 700e12
    """FLOP/s of bf16 matrix products."""
    attention: dict[int, float] | None = None
    """FLOP/s of causal attention by head width; None is {64: 300e12, 128: 330e12}."""
    memory: float = 4.3e12
    """Bytes/s."""
    link: float = 450e9
    """Bytes/s to other GPUs of the node, each way."""
    network: float = 50e9
    """Bytes/s of a GPU to other nodes, each way."""

    def attention_rate(self, head_dim: int) -> float:
        """FLOP/s for the nearest head width that is not wider."""
        rates = self.attention or {64: 300e12, 128: 330e12}
        widths = [width for width in rates if width <= head_dim]
        return rates[max(widths, default=min(rates))]


# An H100 SXM computes at the same rates. Its data sheet has 3.35e12 bytes/s of memory where an
# H200's has 4.8e12; the share of it that is reached is taken to be the H200's.
DEVICES = {"h200": Device(), "h100": Device(name="H100", capacity=80, memory=3.0e12)}


def seconds_per_token(
    model: StableGPTForCausalLM, recipe: Recipe, device: Device, *, recompute: bool
) -> float:
    """Compute of one token on one GPU without the update, in bf16.

    Attention runs 3.5 times its forward pass, since the backward pass computes the scores again.
    Norms, RoPE, activation and residual stream move 144 bytes a channel and block if fused, the
    loss three times a bf16 row of logits. A gated MLP moves 6 bf16 numbers more for each of its
    channels: forward it reads two maps instead of one, backward it writes two gradients and reads
    both factors.
    """
    config = model.config
    assert config.head_dim is not None  # the config fills it in
    length = recipe.data.sequence_length
    width = config.num_attention_heads * config.head_dim
    attention = 6.0 * config.num_hidden_layers * length * width
    products = flops_per_token(model, length) - attention
    blocks = products - 6.0 * model.lm_head.weight.numel()
    gated = 12 * (config.intermediate_size or 0) if config.mlp_gated else 0
    moved = (144 * config.hidden_size + gated) * config.num_hidden_layers
    again = (blocks / 3, attention / 3, moved / 3) if recompute else (0.0, 0.0, 0.0)
    return (
        (products + again[0]) / device.gemm
        + (attention * 3.5 / 3 + again[1]) / device.attention_rate(config.head_dim)
        + (moved + again[2] + 3 * 2 * config.vocab_size) / device.memory
    )


def seconds_exchanging(
    parameters: int, sharding: Sharding, device: Device, gpus_per_node: int, micro_steps: int
) -> float:
    """Return the seconds of communication in a step without overlap: full-bandwidth rings, bf16.

    Whole copies sum fp32 gradients once a step. Shards are gathered for the forward pass, and if
    resharded for the backward pass, and sum fp32 gradients, in each micro batch; across groups
    (hsdp) once a step. Between nodes a ring has the adapters of all GPUs of a node.
    """

    def ring(count: float, size: int, inside: bool) -> float:
        rate = device.link if inside else min(device.link, gpus_per_node * device.network)
        return count * (size - 1) / size / rate

    inside = sharding.processes <= gpus_per_node
    if not sharding.is_sharded:
        return ring(2 * 4 * parameters, sharding.processes, inside)
    near = sharding.shard_size <= gpus_per_node
    gathered = (2 if sharding.reshard_after_forward else 1) * 2 * parameters
    shared = micro_steps * ring(gathered + 4 * parameters, sharding.shard_size, near)
    shard = 2 * 4 * parameters / sharding.shard_size
    # Each GPU sums its own shard with its likes on other nodes, by its own adapter.
    rate = device.link if inside else device.network
    return shared + shard * (sharding.replicas - 1) / sharding.replicas / rate


def tokens_per_second(
    model: StableGPTForCausalLM,
    recipe: Recipe,
    sharding: Sharding,
    device: Device,
    *,
    gpus_per_node: int,
    recompute: bool,
) -> float:
    """Return training tokens per second of all GPUs.

    A step takes the longer one of compute and communication, and the update, which moves 30 bytes a
    parameter.
    """
    tokens = recipe.tokens_per_step / sharding.processes
    micro = recipe.training.micro_batch_size * recipe.data.sequence_length
    parameters = model.num_parameters()
    # Each chunk of the loss reads and writes the head's fp32 gradient.
    chunk = min(micro, 2**31 // (4 * model.config.vocab_size))
    chunks = tokens / chunk * 2 * 4 * model.lm_head.weight.numel() / device.memory
    compute = tokens * seconds_per_token(model, recipe, device, recompute=recompute) + chunks
    exchange = seconds_exchanging(
        parameters, sharding, device, gpus_per_node, round(tokens / micro)
    )
    update = 30 * parameters / sharding.shard_size / device.memory
    return recipe.tokens_per_step / (max(compute, exchange) + update)

"""QK-clip: heads whose attention logits outgrow a threshold have their weights shrunk.

    with QKClip(model, threshold=100.0) as qk_clip:
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            qk_clip.clip()

Kimi Team 2025 (arXiv 2507.20534), section 2.1 and algorithm 1. After the optimizer's step, head h
whose largest logit S_h in the batch exceeded tau has its logits scaled by gamma_h = tau / S_h: its
rows of W_q by sqrt(gamma_h) and those of W_k likewise. Logits are scaled ones, before a soft cap.

Invariant: forward and backward are what they are without it.
"""

import math
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .errors import RecipeError
from .model import StableGPTConfig
from .model.functional_stable_gpt import attention_forward
from .telemetry.scores import mask_of, score_chunks


def check_qk_clip(config: StableGPTConfig) -> None:
    """Refuse a model on which QK-clip cannot do what it promises.

    Raises:
        RecipeError: when the logits do not follow the rows of W_q and W_k.
    """
    problem = None
    if config.qk_norm is not None:
        problem = f"model.qk_norm is {config.qk_norm}: it undoes every scale of W_q and W_k"
    elif config.sigma_reparam:
        problem = "model.sigma_reparam is true: it gives the weights their spectral norm back"
    if problem is not None:
        raise RecipeError(
            f"optimizer.qk_clip has no such effect here, since {problem}; set optimizer.qk_clip to "
            "null (that technique bounds the logits itself), or take the technique out."
        )


@torch.library.custom_op("hf_stable::note_logits", mutates_args={"largest"})
def note_logits(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    largest: torch.Tensor,
) -> None:
    """Raise (H,) float64 `largest` to the largest visible logit of each head, by the reference.

    Args:
        query: (B, H, Q, D). key: (B, G, K, D). mask: see `telemetry.scores.visible_keys`.
    """
    for scores, visible in score_chunks(query, key, mask, scaling):
        found = scores.masked_fill_(~visible, -math.inf).amax((0, 2, 3)).double()
        torch.maximum(largest, found, out=largest)


@torch.library.custom_op("hf_stable::note_rows", mutates_args={"largest"})
def note_rows(logits: torch.Tensor, visible: torch.Tensor, largest: torch.Tensor) -> None:
    """The same from a kernel's (B, H, S) rows, see `kernels.attention.AttentionStatistics`."""
    found = logits.masked_fill(~visible, -math.inf).amax((0, 2)).double()
    torch.maximum(largest, found, out=largest)


for _operator in (note_logits, note_rows):
    _operator.register_fake(lambda *_: None)


def _noting(function: Callable[..., Any]) -> Callable[..., Any]:
    """An attention function that also notes the largest logits of the layers that want them."""

    def attention(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> Any:
        # Not a layer of another model in the same process, and no validation.
        if "largest_logits" not in vars(module) or not module.training:
            return function(module, query, key, value, attention_mask, **kwargs)
        module.attention_statistics = None  # those of another microbatch
        result = function(module, query, key, value, attention_mask, **kwargs)
        statistics = module.attention_statistics
        if statistics is not None:
            rows = statistics.rows_max_logit, statistics.rows_visible
            note_rows(*rows, module.largest_logits)
        else:
            mask = mask_of(module, query, attention_mask, kwargs)
            note_logits(query, key, mask, kwargs["scaling"], module.largest_logits)
        return result

    return attention


def row_factors(largest: torch.Tensor, threshold: float, key_heads: int) -> torch.Tensor:
    """Return the factors by which QK-clip scales each head's rows of W_q and W_k.

    Query heads that share a key head share its factor, which is that of the least clipped of them,
    and carry the rest themselves: as Kimi K2 leaves the rotary keys alone that its heads share, no
    head is touched for another's sake. With a key head each, both factors are sqrt(gamma).

    Args:
        largest: (..., H) largest logit of each query head; what is not finite is not clipped.

    Returns:
        (..., H + key_heads): the factors of queries, then of keys; exactly 1 for heads below.
    """
    clipped = (largest > threshold) & largest.isfinite()
    gamma = torch.where(clipped, threshold / largest, 1.0)
    keys = gamma.unflatten(-1, (key_heads, -1)).amax(-1).sqrt()
    group = largest.shape[-1] // key_heads
    return torch.cat((gamma / keys.repeat_interleave(group, -1), keys), -1)


def _scale_rows(weight: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiply the rows of a weight or bias in place.

    Args:
        weight: (rows, ...) weight, or (rows,) bias.
        factor: (rows, 1) factors, the same on every process.
    """
    factor = factor.view(-1, *[1] * (weight.ndim - 1))
    if isinstance(weight, DTensor):
        factor = DTensor.from_local(factor, weight.device_mesh, run_check=False)
        factor = factor.redistribute(placements=weight.placements).to_local()
        weight = weight.to_local()
    weight.mul_(factor.to(weight))


class QKClip:
    """A context manager: inside, every training forward notes its logits for `clip`.

    Works with accumulation, gradient checkpointing, compiled blocks, DDP and FSDP2. The kernels of
    ours hand their largest logits over; other backends cost the scores a second time, in chunks and
    without gradients. Enter it before `telemetry.watch`, and leave it after.
    """

    def __init__(self, model: Any, threshold: float) -> None:
        """Prepare a StableGPTForCausalLM, in DDP or not.

        Args:
            threshold: tau; 100 for Kimi K2.

        Raises:
            RecipeError: see `check_qk_clip`.
        """
        self._model = model.module if isinstance(model, DistributedDataParallel) else model
        check_qk_clip(self._model.config)
        self._threshold = threshold
        self._layers = [layer.self_attn for layer in self._model.model.layers]
        weight = self._layers[0].qkv_proj.weight
        # Offloaded weights wait on another device than that which computes with them.
        sharded = isinstance(weight, DTensor)
        self._device = weight.device_mesh.device_type if sharded else weight.device
        self._name: str = self._model.config._attn_implementation
        self._own: Callable[..., Any] | None = None

    def __enter__(self) -> Self:
        functions, heads = ALL_ATTENTION_FUNCTIONS, self._model.config.num_attention_heads
        self._own = functions._local_mapping.get(self._name)
        functions[self._name] = _noting(functions.get(self._name, attention_forward))
        for layer in self._layers:
            largest = torch.empty(heads, dtype=torch.float64, device=self._device)
            vars(layer).update(largest_logits=largest, attention_statistics=None)
        self.forget()
        return self

    def __exit__(self, *_: object) -> None:
        del ALL_ATTENTION_FUNCTIONS[self._name]
        if self._own is not None:
            ALL_ATTENTION_FUNCTIONS[self._name] = self._own
        for layer in self._layers:
            del vars(layer)["largest_logits"], vars(layer)["attention_statistics"]

    def forget(self) -> None:
        """Forget the logits of a step whose update is not taken."""
        for layer in self._layers:
            layer.largest_logits.fill_(-math.inf)

    @torch.no_grad()
    def clip(self) -> torch.Tensor:
        """Shrink the heads that were over the threshold; call it after the optimizer's step.

        Collective where processes share the batch; the host waits for no device.

        Returns:
            (layers, H) float64: the largest logits of the step, over all processes.
        """
        config = self._model.config
        largest = torch.stack([layer.largest_logits for layer in self._layers])
        if dist.is_initialized():
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        factors = row_factors(largest, self._threshold, config.num_key_value_heads)
        values = factors.new_ones(len(factors), config.num_key_value_heads)
        rows = torch.cat((factors, values), 1).repeat_interleave(config.head_dim, 1)
        for layer, factor in zip(self._layers, rows[:, :, None].unbind(), strict=True):
            for tensor in layer.qkv_proj.parameters():
                _scale_rows(tensor, factor)
        self.forget()
        return largest

"""Cases of the attention benchmark: our kernels, and every peer that may be installed.

A peer is one function that imports it, so that an absent one raises when it is asked for, and a row
of `PEERS`. All take and give (B, H, S, D) tensors that lie in memory as (B, S, H, D), as the
projections of a model make them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from common import Device, NotRunError
from goals import EXACT_BAR, FAST_BAR
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from hf_stable.model.functional_stable_gpt import attention_forward

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(B, H, S, D) queries, keys and values to a (B, H, S, D) output."""

CAP = 50.0
DENSE = {"clip_gamma": -1e-5}  # nearly every key stays active: the worst case of a clip
CLIP = {"clip_gamma": -0.03, "clip_zeta": 1.03}  # Rybakov et al. 2024: at most 35 active keys a row
EAGER_BATCH = 2


@dataclass(frozen=True)
class Shape:
    batch: int
    heads: int
    length: int
    width: int

    def flops(self, backward: bool) -> float:
        forward = 4 * self.batch * self.heads * self.length**2 * self.width / 2
        return forward * (3.5 if backward else 1.0)


ATT = Shape(8, 16, 4096, 64)
DRY = Shape(1, 1, 40, 16)
# No multiple of a block, but of 16, so that nothing is compiled anew.
CHECK = Shape(2, 4, 1008, 64)


@dataclass(frozen=True)
class Case:
    """A timed case.

    Attributes:
        make: builds the attention; raises where it cannot run.
        settings: of the eager formula that it equals.
        data: kind of inputs, see `inputs`.
        batch: how much of the batch is run; None is all.
        bar: bound on its error over the eager formula's, where it is ours.
    """

    make: Callable[[Shape, Device], Attention]
    settings: tuple[tuple[str, float], ...] = ()
    data: str = "random"
    batch: int | None = None
    bar: float | None = None


def inputs(kind: str, shape: Shape, device: Device, count: int = 3) -> list[list[torch.Tensor]]:
    """Sets of q, k, v and the output's gradient, strided as a model makes them.

    Args:
        kind: "random" has scores of deviation 1; "scattered" of deviation 6, so that a few keys,
            anywhere, hold a row's weight; "local" such that the nearest keys hold it, as in many
            trained heads, so that most tiles have no key above a clip.
    """
    sets = []
    for _ in range(count):
        size = (4, shape.batch, shape.length, shape.heads, shape.width)
        q, k, v, grad = torch.randn(size, device=device.torch)
        if kind == "scattered":
            q = 6 * q
        if kind == "local":
            q, k = (0.3 * noise + 1.6 * positions(shape, device) for noise in (q, k))
        rounded = (tensor.to(device.dtype, copy=True) for tensor in (q, k, v, grad))
        tensors = [tensor.transpose(1, 2) for tensor in rounded]
        sets.append([*(tensor.requires_grad_() for tensor in tensors[:3]), tensors[3]])
    return sets


def positions(shape: Shape, device: Device) -> torch.Tensor:
    """(S, 1, D) whose inner products depend on the distance only, and fall with it."""
    turns = torch.logspace(0, -2, shape.width // 2, device=device.torch)
    angles = torch.arange(shape.length, device=device.torch)[:, None] * turns
    return math.sqrt(2) * torch.cat((angles.cos(), angles.sin()), dim=-1)[:, None]


# ours and the peers ---------------------------------------------------------------------------


def ours(shape: Shape, device: Device, **settings: Any) -> Attention:
    from hf_stable.kernels.attention import flash_attention  # noqa: PLC0415  # needs Triton

    if "fast_tanh" in settings and not device.cuda:
        raise NotRunError("the hardware's tanh needs a GPU")

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        output, _ = flash_attention(q, k, v, scaling=shape.width**-0.5, **settings)
        return output.transpose(1, 2)

    return run


def eager(shape: Shape, device: Device, **settings: Any) -> Attention:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        module = torch.nn.Identity()
        output, _ = attention_forward(module, q, k, v, None, shape.width**-0.5, **settings)
        return output.transpose(1, 2)

    return run


def sdpa(shape: Shape, device: Device, *, backend: str) -> Attention:
    only = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}[backend]

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(only):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    return run


@cache
def approximate_tanh() -> Callable[[torch.Tensor], torch.Tensor]:
    """tanh as an operator that Inductor writes as the hardware's tanh.approx; differentiable."""
    from torch._inductor.lowering import make_pointwise, register_lowering  # noqa: PLC0415
    from torch._inductor.virtualized import ops  # noqa: PLC0415

    @torch.library.custom_op("hf_stable_bench::tanh", mutates_args=())
    def tanh(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x)

    def save(ctx: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(output)

    def derivative(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (y,) = ctx.saved_tensors
        return grad * (1 - y * y)

    tanh.register_fake(torch.empty_like)
    tanh.register_autograd(derivative, setup_context=save)
    tanh.register_vmap(lambda info, dims, x: (tanh(x), dims[0]))
    assembly = {"asm": "tanh.approx.f32 $0, $1;", "constraints": "=f,f"}
    lowering = make_pointwise(partial(ops.inline_asm_elementwise, **assembly))
    register_lowering(torch.ops.hf_stable_bench.tanh.default)(lowering)
    return tanh


def flex(shape: Shape, device: Device, *, tanh: str) -> Attention:
    """FlexAttention, compiled; uncompiled on a CPU, where it has no backward."""
    function = {"exact": lambda: torch.tanh, "approximate": approximate_tanh, "none": lambda: None}
    bounded = function[tanh]()

    def cap(score: torch.Tensor, b: Any, h: Any, query: Any, key: Any) -> torch.Tensor:
        return CAP * bounded(score / CAP)

    def causal(b: Any, h: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return query >= key

    length = shape.length
    mask = create_block_mask(causal, None, None, length, length, device=device.torch)
    compiled = torch.compile(flex_attention, fullgraph=True) if device.cuda else flex_attention
    return partial(compiled, score_mod=None if bounded is None else cap, block_mask=mask)


def flash_package(shape: Shape, device: Device, *, version: int) -> Attention:
    """FlashAttention 2, 3 or 4 of Dao-AILab, with the cap."""
    if version == 2:
        from flash_attn import flash_attn_func  # noqa: PLC0415
    elif version == 3:
        from flash_attn_interface import flash_attn_func  # noqa: PLC0415
    else:
        from flash_attn.cute import flash_attn_func  # noqa: PLC0415

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        tensors = (tensor.transpose(1, 2) for tensor in (q, k, v))
        output = flash_attn_func(*tensors, causal=True, softcap=CAP)
        return (output[0] if isinstance(output, tuple) else output).transpose(1, 2)

    return run


# Arguments of ours that the formula does not know.
_NO_CHANGE = ("fast_tanh", "return_statistics")


def own_case(data: str = "random", **settings: Any) -> Case:
    formula = {key: settings[key] for key in settings if key not in _NO_CHANGE}
    bar = FAST_BAR if "fast_tanh" in settings else EXACT_BAR
    return Case(partial(ours, **settings), tuple(formula.items()), data, bar=bar)


def eager_case(**settings: Any) -> Case:
    return Case(partial(eager, **settings), tuple(settings.items()), batch=EAGER_BATCH)


OWN = {
    "ours": own_case(),
    "ours, cap": own_case(softcap=CAP),
    "ours, cap, fast tanh": own_case(softcap=CAP, fast_tanh=True),
    "ours, statistics": own_case(return_statistics=True),
    "ours, cap, statistics": own_case(softcap=CAP, return_statistics=True),
    "ours, clip dense": own_case(**DENSE),
    "ours, cap, clip dense": own_case(softcap=CAP, **DENSE),
    "ours, local": own_case("local"),
    "ours, clip local": own_case("local", **CLIP),
    "ours, clip scattered": own_case("scattered", **CLIP),
}
_CAPPED = (("softcap", CAP),)
PEERS = {
    "ours again": OWN["ours"],  # its ratio to "ours" is the noise of all ratios
    "flex, cap, approximate tanh": Case(partial(flex, tanh="approximate"), _CAPPED),
    "flex, cap, exact tanh": Case(partial(flex, tanh="exact"), _CAPPED),
    "flex": Case(partial(flex, tanh="none")),
    "sdpa flash": Case(partial(sdpa, backend="flash")),
    "sdpa cudnn": Case(partial(sdpa, backend="cudnn")),
    "fa2, cap": Case(partial(flash_package, version=2), _CAPPED),
    "fa3, cap": Case(partial(flash_package, version=3), _CAPPED),
    "fa4, cap": Case(partial(flash_package, version=4), _CAPPED),
    "eager": eager_case(),
    "eager, cap": eager_case(softcap=CAP),
    "eager, clip dense": eager_case(**DENSE),
}

"""The mathematics of StableGPT in plain torch: what runs on a CPU and what every kernel must equal.

Invariant: functions of tensors and numbers, whose neutral argument (None or 1.0) is off; the
one `if` on a technique lives inside its function. Statistics are held in at least fp32.

Shape letters: B batch, H query heads, G key heads, Q queries, K keys, D head width.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

# Additive masks hide a key by -inf, by the smallest number of their dtype, by -1e9 or by -1e4.
_HIDDEN = -9999.0


def statistics_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype for sums over `tensor`: at least fp32, and float64 stays float64."""
    return torch.promote_types(tensor.dtype, torch.float32)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be sharded over processes; collective where it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of what processes looked up in their shards, as each holds it; else the tensor."""
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim)


def softcap(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Bound logits smoothly: cap * tanh(logits / cap) (Rybakov et al. 2024, soft_cap; Gemma 2).

    Args:
        logits: any shape, any float dtype.
        cap: bound on the absolute value; None is off.
    """
    if cap is None:
        return logits
    return torch.tanh(logits / cap) * cap


def clip_probabilities(
    probs: torch.Tensor,
    visible_keys: torch.Tensor,
    gamma: float | None,
    zeta: float,
    alpha: float | None,
) -> torch.Tensor:
    """Stretch probabilities to [gamma, zeta], clip them to [0, 1] (Bondarenko et al. 2023, eq. 4).

    Rows are not renormalised, and a clipped entry has no gradient.

    Args:
        probs: (B, H, Q, K) probabilities.
        visible_keys: (B or 1, 1, Q, 1) number of keys that each row may attend to.
        gamma: lower stretch, <= 0; None is 0.
        zeta: upper stretch, >= 1.
        alpha: if given, gamma is -alpha / visible_keys instead.
    """
    if gamma is None and alpha is None and zeta == 1.0:
        return probs
    lower = probs.new_tensor(gamma or 0.0)
    if alpha is not None:
        lower = -alpha / visible_keys.clamp(min=1).to(probs.dtype)
    return torch.lerp(lower, probs.new_tensor(zeta), probs).clamp(0.0, 1.0)


def _causal_mask(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """(1, 1, Q, K) boolean: the last query sees every key."""
    num_queries, num_keys = query.shape[-2], key.shape[-2]
    ones = torch.ones(1, 1, num_queries, num_keys, dtype=torch.bool, device=query.device)
    return ones.tril(diagonal=num_keys - num_queries)


def attention_probabilities(
    scores: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    softcap: float | None = None,
    clip_gamma: float | None = None,
    clip_zeta: float = 1.0,
    clip_alpha: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """From scaled scores to what multiplies the values: cap, mask, softmax, clip, in this order.

    Capping after masking would lift masked keys from -inf to -cap.

    Args:
        scores: (B, H, Q, K), already scaled; overwritten, since on a CPU the time of this function
            is the time to touch memory.
        attention_mask: (B or 1, 1, Q, K), boolean (True is visible) or additive.

    Returns:
        (B, H, Q, K) in at least fp32, and the number of visible keys (B or 1, 1, Q, 1). A row that
        may see no key at all is uniform here and must not be used.
    """
    scores = scores.to(statistics_dtype(scores))
    if softcap is not None:
        scores = scores.div_(softcap).tanh_() * softcap
    if attention_mask.dtype == torch.bool:
        visible = attention_mask
        scores = scores.masked_fill_(~visible, torch.finfo(scores.dtype).min)
    else:
        visible = attention_mask > _HIDDEN
        scores = scores.add_(attention_mask)
    visible_keys = visible.sum(dim=-1, keepdim=True)
    probs = scores.softmax(dim=-1)
    probs = clip_probabilities(probs, visible_keys, clip_gamma, clip_zeta, clip_alpha)
    return probs, visible_keys


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    clip_gamma: float | None = None,
    clip_zeta: float = 1.0,
    clip_alpha: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with every technique of the score room: the "eager" backend and the oracle.

    Args:
        module: the calling attention layer; read for `training`.
        query: (B, H, Q, D). key, value: (B, G, K, D) with H a multiple of G.
        attention_mask: (B or 1, 1, Q, K), boolean or additive; None is causal.
        scaling: multiplies the scores; soft_temp's beta is already in it.
        dropout: probability of dropping an attention weight in training.
        softcap: tanh cap of the scaled scores; None is off.
        clip_gamma, clip_zeta, clip_alpha: clipped softmax, see `clip_probabilities`.

    Returns:
        Output (B, Q, H, D) in the query's dtype, zero for a row that may see no key, and the
        weights (B, H, Q, K), uniform for such a row.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if attention_mask is None:
        attention_mask = _causal_mask(query, key)
    probs, visible_keys = attention_probabilities(
        torch.matmul(query * scaling, key.transpose(-1, -2)),
        attention_mask,
        softcap=softcap,
        clip_gamma=clip_gamma,
        clip_zeta=clip_zeta,
        clip_alpha=clip_alpha,
    )
    probs = probs.to(query.dtype)
    if dropout > 0.0:
        probs = nn.functional.dropout(probs, p=dropout, training=module.training)
    output = torch.matmul(probs, value).masked_fill(visible_keys == 0, 0.0)
    return output.transpose(1, 2).contiguous(), probs


class _SquaredReLU(torch.autograd.Function):
    """relu(x)^2 that keeps only its output, which the next matrix keeps anyway."""

    generate_vmap_rule = True

    @staticmethod
    def forward(hidden: torch.Tensor) -> torch.Tensor:
        positive = hidden.clamp(min=0)
        return positive * positive

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> torch.Tensor:
        (output,) = ctx.saved_tensors
        return grad_output * (2 * output.sqrt())


def squared_relu(hidden: torch.Tensor) -> torch.Tensor:
    """relu(x)^2 (So et al. 2021), with one tensor of `hidden`'s shape kept for the backward."""
    return _SquaredReLU.apply(hidden)


def scale_gradient(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """Let `factor` of the gradient through: factor * x + (1 - factor) * stopgrad(x), value x.

    Embed Detach (Takase et al. 2023, section 4.1; GLM-130B). A factor of 1.0 is off.
    """
    if factor == 1.0:
        return tensor
    fixed = tensor.detach()
    # x + factor * 0 instead of the formula above, whose rounding would change the value.
    return fixed + factor * (tensor - fixed)


def mlp_stream(before: torch.Tensor, after: torch.Tensor, parallel: bool) -> torch.Tensor:
    """Return the residual stream that the MLP reads.

    It is the stream after the attention branch, or before it if the branches run in parallel (Wang
    and Komatsuzaki 2021, GPT-J; Black et al. 2022, GPT-NeoX).

    Args:
        before: (B, Q, C) stream before the attention branch.
        after: (B, Q, C) stream after the attention branch.
        parallel: False is off.
    """
    return before if parallel else after


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (Su et al. 2021) of the first `cos.shape[-1]` channels of a head.

    Args:
        heads: (B, H, Q, D). cos, sin: (B or 1, 1, Q, R), R <= D.
    """
    width = cos.shape[-1]
    turned, rest = heads[..., :width], heads[..., width:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return turned if width == heads.shape[-1] else torch.cat((turned, rest), dim=-1)


def matrix_vector(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """Return M v, with the same bits wherever the matrix and the vector lie in memory.

    A BLAS on a CPU may sum in another order for another alignment (MKL does on AVX2), and tensors
    that safetensors maps from a file may have any alignment. The sums of torch itself depend on
    shapes alone. On a CPU they take two more passes over the matrix.

    Args:
        matrix: (..., N, M), one matrix or many of a shape.
        vector: (..., M).
    """
    if matrix.device.type != "cpu":
        return (matrix @ vector[..., None])[..., 0]
    return (matrix * vector[..., None, :]).sum(dim=-1)


def power_iteration(
    weight: torch.Tensor, u: torch.Tensor, v: torch.Tensor, steps: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advance estimates of the top singular vectors: u <- W v, v <- W^T u, both normalized.

    Args:
        weight: (..., N, M), one matrix or many of a shape. u: (..., N). v: (..., M).

    Returns:
        The new u and v. sigma(W) is u^T W v (Zhai et al. 2023, algorithm 1).
    """
    for _ in range(steps):
        u = nn.functional.normalize(matrix_vector(weight, v), dim=-1)
        v = nn.functional.normalize(matrix_vector(weight.transpose(-1, -2), u), dim=-1)
    return u, v


def top_singular_vectors(
    weight: torch.Tensor, tolerance: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """Top singular vectors of (N, M) `weight`, by Lanczos bidiagonalization in float64.

    Golub and Kahan (1965), with every vector orthogonalized against all before it. A random matrix
    has no spectral gap, so power iteration would need hundreds of steps to be as close, and an
    eigendecomposition computes all vectors of which one is wanted. The start is the same in every
    process and on every device, and no random number of the caller's is used.

    Args:
        tolerance: on |W^T u - sigma v| / sigma, which bounds the relative error of sigma; with W v
            = sigma u up to rounding.
    """
    tall = weight.shape[0] >= weight.shape[1]
    matrix = weight.double() if tall else weight.double().T
    start = torch.randn(len(matrix), generator=torch.Generator().manual_seed(0), dtype=matrix.dtype)
    # In the row space, in which all later vectors stay.
    right = [nn.functional.normalize(matrix.T @ start.to(matrix.device), dim=0)]
    left: list[torch.Tensor] = []
    diagonal: list[torch.Tensor] = []
    beside: list[torch.Tensor] = []
    u = v = right[0]
    for count in range(1, matrix.shape[1] + 1):
        length, image = _new_direction(matrix @ right[-1], left)
        left.append(image)
        diagonal.append(length)
        length, image = _new_direction(matrix.T @ image, right)
        beside.append(length)
        exhausted = count == matrix.shape[1] or length <= 1e-12 * max(diagonal)
        if exhausted or count % 8 == 0:
            small = torch.stack(diagonal).diag() + torch.stack(beside).diag(1)[:-1, :-1]
            lefts, sigmas, rights = torch.linalg.svd(small)
            u, v = lefts[:, 0] @ torch.stack(left), rights[0] @ torch.stack(right)
            if exhausted or length * lefts[-1, 0].abs() <= tolerance * sigmas[0]:
                break
        right.append(image)
    u, v = (u, v) if tall else (v, u)
    return u.to(weight.dtype), v.to(weight.dtype)


def _new_direction(
    vector: torch.Tensor, known: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return length and direction of the part of a vector orthogonal to orthonormal ones."""
    if known:
        basis = torch.stack(known)
        for _ in range(2):  # once leaves rounding behind
            vector = vector - basis.T @ (basis @ vector)
    return vector.norm(), nn.functional.normalize(vector, dim=0)


def spectral_norm(weight: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """sigma(W) = u^T W v as a 0-d tensor, differentiable in W (its gradient is u v^T).

    The division undoes rounding of u and v, whose norms are 1 only up to their dtype. The bits do
    not depend on where the arguments lie in memory.
    """
    return (u * matrix_vector(weight, v)).sum() / (u.norm() * v.norm())

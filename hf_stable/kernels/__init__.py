"""Triton kernels. They know the model's interfaces; the model never knows them."""

import importlib.util
from typing import Any, NoReturn

BACKEND = "stable_triton"
FAST_TANH_BACKEND = "stable_triton_fast_tanh"
UNBIASED_BACKEND = "stable_triton_unbiased"
_BACKENDS = (BACKEND, FAST_TANH_BACKEND, UNBIASED_BACKEND)
# Wider heads do not fit the tiles of attention.
MAX_HEAD_DIM = 256


def register() -> None:
    """Give Transformers the attention backends, and StableGPT the loss of its head on CUDA.

    The only place where names enter the registries. Without Triton the backends are there all the
    same, for plans and messages; computing with them says what is missing.
    """
    from transformers import AttentionInterface, AttentionMaskInterface  # noqa: PLC0415

    from hf_stable.model.loss_stable_gpt import LinearCrossEntropyInterface  # noqa: PLC0415

    from .documents import document_mask  # noqa: PLC0415

    backends: dict[str, Any] = dict.fromkeys(_BACKENDS, _without_triton)
    if importlib.util.find_spec("triton") is not None:
        from .interface import (  # noqa: PLC0415
            attention_backend,
            fast_tanh_backend,
            unbiased_backend,
        )
        from .linear_cross_entropy import linear_cross_entropy  # noqa: PLC0415

        functions = (attention_backend, fast_tanh_backend, unbiased_backend)
        backends = dict(zip(_BACKENDS, functions, strict=True))
        LinearCrossEntropyInterface.register("cuda", linear_cross_entropy)
    for name, backend in backends.items():
        # Both registries: without an entry in the second, a mask would be None and padding seen.
        AttentionInterface.register(name, backend)
        AttentionMaskInterface.register(name, document_mask)


def _without_triton(*_: Any, **__: Any) -> NoReturn:
    raise ImportError(
        f'attn_implementation="{BACKEND}" needs Triton, which is not installed: '
        'pip install triton (for Linux), or use "eager".'
    )

"""Triton kernels. They know the model's interfaces; the model never knows them."""

import importlib.util

BACKEND = "stable_triton"
FAST_TANH_BACKEND = "stable_triton_fast_tanh"


def register() -> bool:
    """Give Transformers the attention backends, and StableGPT the loss of its head on CUDA.

    The only place where names enter the registries; without Triton they stay absent, and
    Transformers refuses them by name.

    Returns:
        Whether Triton is there.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    from transformers import AttentionInterface, AttentionMaskInterface  # noqa: PLC0415

    from .documents import document_mask  # noqa: PLC0415
    from .interface import attention_backend, fast_tanh_backend  # noqa: PLC0415

    for name, backend in ((BACKEND, attention_backend), (FAST_TANH_BACKEND, fast_tanh_backend)):
        # Both registries: without an entry in the second, a mask would be None and padding seen.
        AttentionInterface.register(name, backend)
        AttentionMaskInterface.register(name, document_mask)
    return True

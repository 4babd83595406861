"""Default backends for attention and for the head's loss.

Nothing here imports Triton, so a machine without it gets a fallback and the reason.
"""

import importlib.util

import torch

from hf_stable.model import StableGPTConfig
from hf_stable.model.loss_stable_gpt import LINEAR_CROSS_ENTROPY_FUNCTIONS

from . import BACKEND, FAST_TANH_BACKEND, MAX_HEAD_DIM


def default_attention(config: StableGPTConfig, device: torch.device, *, packed: bool) -> str:
    """Return the name of the default attention backend for `config` on `device`.

    Args:
        config: Config of the model.
        device: Device that trains it.
        packed: True if sequences hold documents that must not attend to each other.
    """
    return choose_attention(config, device, packed=packed)[0]


def choose_attention(
    config: StableGPTConfig, device: torch.device, *, packed: bool
) -> tuple[str, str]:
    """Return the name of the default attention backend and the reason in a few words.

    PyTorch fuses plain attention. Only our kernels fuse a cap or clip, and packed documents would
    make PyTorch build an S x S mask. Where the kernels cannot run, eager or sdpa is the fallback.
    """
    capped = config.attn_logit_softcapping is not None or config.clips_attention
    if not capped and not packed:
        return "sdpa", "plain attention"
    need = "a cap or clip" if capped else "packed documents"
    obstacle = _obstacle(config, device)
    if obstacle is None:
        return BACKEND, f"fuses {need}"
    return "eager" if capped else "sdpa", f"for {need}; {obstacle}"


def _lacks_triton() -> bool:
    """Return True if this machine has a GPU and no Triton."""
    return torch.cuda.is_available() and importlib.util.find_spec("triton") is None


def _obstacle(config: StableGPTConfig, device: torch.device) -> str | None:
    """Return the reason why the kernels cannot run `config` on `device`, or None."""
    if device.type != "cuda":
        return f"the fused kernels need a CUDA GPU, not a {device.type} device"
    return "Triton is not installed" if _lacks_triton() else _model_obstacle(config)


def _model_obstacle(config: StableGPTConfig) -> str | None:
    assert config.head_dim is not None  # the config fills it in
    if config.attention_dropout > 0:
        return f"the kernels have no attention_dropout (here {config.attention_dropout})"
    if config.head_dim > MAX_HEAD_DIM:
        return f"the kernels take head_dim up to {MAX_HEAD_DIM} (here {config.head_dim})"
    return None


def check_model(name: str, config: StableGPTConfig) -> None:
    """Refuse a model that the backend of this name could not train.

    Raises:
        ValueError: with what to do.
    """
    obstacle = _model_obstacle(config) if name.startswith(BACKEND) else None
    if obstacle is not None:
        raise ValueError(f"{obstacle}: leave it null.")


def check_attention(name: str | None, device: torch.device) -> None:
    """Refuse a backend that could not train on `device`, as long as there is nothing to lose.

    Raises:
        ValueError: with what to do.
    """
    if name == "flex_attention" and device.type == "cpu":
        raise ValueError("PyTorch cannot train with it on a CPU: leave it null.")
    if name is None or not name.startswith(BACKEND) or device.type == "cuda":
        return
    if importlib.util.find_spec("triton") is None:
        raise ValueError("Triton is not installed: leave it null.")
    from .tiles import INTERPRETED  # noqa: PLC0415 (imports Triton)

    if name == FAST_TANH_BACKEND or not INTERPRETED:
        raise ValueError(f"its kernels need a CUDA device, found {device.type}: leave it null.")


def loss_implementation(device: torch.device) -> str:
    """Return the name of the kernel that computes the loss of the head on `device`, or "eager"."""
    return BACKEND if device.type in LINEAR_CROSS_ENTROPY_FUNCTIONS else "eager"

"""Tiny models, batches and watched steps of them, and how their numbers are compared."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hf_stable import StableGPTConfig, StableGPTForCausalLM
from hf_stable.model.configuration_stable_gpt import PRESETS
from hf_stable.telemetry import names, watch

from .reference import Adam, Batch

VOCAB_SIZE, LENGTH = 61, 12
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
_PLACES = {
    r"layers\.\d+\.attention": names.ATTENTION,
    r"layers\.\d+\.stream": names.STREAM,
    r"stream": {"final_std": ""},
    r"(layers\.\d+|embed|head|other)\.optimizer|optimizer": names.OPTIMIZER,
    r"head": {**names.LINEAR, **names.HEAD},
    r"layers\.\d+\..+|embed": names.LINEAR,
}


def tiny(
    preset: str = "baseline", attn: str = "eager", dtype: torch.dtype = torch.float64, **fields: Any
) -> StableGPTForCausalLM:
    """A model in training, whose weights are large and whose gains are no ones."""
    if "initializer" not in {**PRESETS[preset], **fields}:
        fields = {"initializer_range": 0.3, **fields}
    torch.manual_seed(0)
    config = StableGPTConfig.from_preset(preset, **{**SIZES, **fields})
    model = StableGPTForCausalLM._from_config(config, attn_implementation=attn).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype)


def exact_copy(model: nn.Module) -> Any:
    """The same weights in float64, with eager attention."""
    twin: Any = copy.deepcopy(model).double()
    twin.set_attn_implementation("eager")
    return twin


def draw(steps: int = 2, microbatches: int = 2, batch_size: int = 2) -> list[list[Batch]]:
    """Batches of each step; some labels are no targets."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(steps):
        ids = torch.randint(0, VOCAB_SIZE, (microbatches, batch_size, LENGTH), generator=generator)
        labels = ids.clone()
        labels[:, 0, 5:7] = -100
        count = int((labels[..., 1:] != -100).sum())
        found.append(
            [
                {"input_ids": each, "labels": target, "num_items_in_batch": count}
                for each, target in zip(ids, labels, strict=True)
            ]
        )
    return found


def watched(
    model: nn.Module,
    steps: list[list[Batch]],
    adam: Adam | None = None,
    between: Callable[[], None] = lambda: None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Numbers of each step of training under `watch`; `between` runs after each microbatch."""
    optimizer = (adam or Adam()).build(model)
    found = []
    with watch(model, optimizer, **{"every": 1, "bounds_every": 1, **options}) as watcher:
        for batches in steps:
            for batch in batches:
                model(use_cache=False, **batch).loss.backward()
                between()
            watcher.gradients()
            optimizer.step()
            optimizer.zero_grad()
            found.append(watcher.end_step())
    return found


def assert_numbers(
    found: dict[str, Any], expected: dict[str, Any], rel: float, bounds: float = 1e-6
) -> None:
    """No name is missing or left over, and every number is equal up to `rel`.

    Spectral norms and bounds up to `bounds`, since they are iterated.
    """
    assert not found.keys() ^ expected.keys(), sorted(found.keys() ^ expected.keys())
    wrong = []
    for name, value in expected.items():
        iterated = name.endswith(("_bound", "_spectral"))
        tolerance: dict[str, float] = {"rel": max(rel, bounds) if iterated else rel, "abs": 1e-12}
        if name.endswith("adam_ratio"):  # shares, of which rounding may move an element's bin
            tolerance = {"rel": 0, "abs": 1e-12 if rel <= 1e-9 else 1e-2}
        if name == "head/logit_mean":  # its terms cancel
            tolerance["abs"] = rel
        if found[name] != pytest.approx(value, **tolerance):
            wrong.append(f"{name}: {found[name]}, not {value}")
    assert not wrong, "\n".join(wrong)


def assert_documented(found: dict[str, Any]) -> None:
    """Every name is a place and a quantity of `names`."""
    for name in found:
        place, quantity = name.split("/")
        kind = next(each for pattern, each in _PLACES.items() if re.fullmatch(pattern, place))
        assert quantity in kind, name


def traces(model: nn.Module) -> list[str]:
    """What watching puts on modules."""
    found = []
    for path, module in model.named_modules():
        kept = [name for name in vars(module) if name.startswith("watched")]
        kept += ["attention_statistics"] * ("attention_statistics" in vars(module))
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
            module._forward_hooks_always_called,
            module._forward_hooks_with_kwargs,
            module._forward_pre_hooks_with_kwargs,
        ):
            kept += [repr(hook) for hook in hooks.values()]
        found += [f"{path}: {each}" for each in kept]
    return found

"""Gradients of whole models with the kernels and without, held against float64."""

import copy
from typing import Any

import torch
from common import Device, Part, relative_error
from train_step_models import ALL, CLIP_ALPHA, E1, Shape, stable_gpt

ERROR_BAR = 2.0  # times the error of eager attention in the same precision
ERROR_FLOOR = 1e-5  # beneath it fp32 errors are the order of sums


def check(geometry: dict[str, Any], shape: Shape, device: Device) -> Part:
    """Gradients of two layers with the kernels and without, against float64."""
    length = min(512, shape.length)
    small = {"num_hidden_layers": 2, "vocab_size": min(8192, geometry["vocab_size"])}
    rows: list[dict[str, Any]] = []
    for name, techniques in {"E1": E1, "all": ALL, "clip": CLIP_ALPHA}.items():
        torch.manual_seed(0)
        model = stable_gpt({**geometry, **small}, techniques, device, None)
        row: dict[str, Any] = {"part": "errors", "case": f"ours, {name}"}
        row["attention"] = str(model.config._attn_implementation)
        ids = torch.randint(0, model.config.vocab_size, (1, length), device=device.torch)
        exact = copy.deepcopy(model).double().cpu()  # kernels know no float64
        exact.set_attn_implementation("eager")
        truth = gradients(exact, ids.cpu())
        errors = []
        for attention in (row["attention"], "eager"):
            model.set_attn_implementation(attention)
            errors.append(relative_error(gradients(model, ids).cpu(), truth))
        row.update(error=errors[0], error_eager=errors[1])
        if not errors[0] <= max(ERROR_BAR * errors[1], ERROR_FLOOR):
            row["wrong"] = f"gradient error {errors[0]:.2g}, eager attention's {errors[1]:.2g}"
        rows.append(row)
    return rows, {}


def gradients(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """All gradients of the blocks and the head as one vector; under autocast on a GPU."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
        loss = model(ids, labels=ids, use_cache=False).loss
    parameters = [*model.model.layers.parameters(), model.lm_head.weight]
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, parameters)])

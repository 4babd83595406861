"""Laws of the update rules."""

import contextlib
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_stable import optim

from ..techniques import build
from .steps import RATE, gradients, optimizer_of, weights


def _stable_adamw(history: list[torch.Tensor], weight: torch.Tensor, decay: float) -> Any:
    """Wortsman et al. 2023, algorithm 2, as printed: beta debiased, not the averages; and RMS."""
    beta1, beta2, eps = 0.9, 0.95, 1e-8
    mean = square = torch.zeros_like(weight)
    rms = math.nan
    for step, gradient in enumerate(history, start=1):
        b1 = beta1 * (1 - beta1 ** (step - 1)) / (1 - beta1**step)
        b2 = beta2 * (1 - beta2 ** (step - 1)) / (1 - beta2**step)
        mean = b1 * mean + (1 - b1) * gradient
        square = b2 * square + (1 - b2) * gradient**2
        rms = (gradient**2 / square.clamp(min=eps**2)).mean().sqrt().item()
        rate = RATE / max(1.0, rms)
        weight = weight - rate * decay * weight - rate * mean / (square.sqrt() + eps)
    return weight, rms


@pytest.mark.parametrize("growth", [0.5, 3.0])
def test_stable_adamw_is_algorithm_2(growth: float) -> None:
    model = build(layer_scale=0.1)
    optimizer = optimizer_of(model, "stable_adamw")
    before = weights(model)
    history: dict[str, list[torch.Tensor]] = {name: [] for name in before}
    for _ in gradients(model, 4, growth):
        for name, parameter in model.named_parameters():
            history[name].append(parameter.grad.clone())
        optimizer.step()
    decays = {
        parameter: group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for name, parameter in model.named_parameters():
        expected, rms = _stable_adamw(history[name], before[name], decays[parameter])
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-14)
        assert optimizer.rms[parameter].item() == pytest.approx(rms)
        assert (rms > 1) == (growth > 1)


def test_stable_adamw_is_adamw_while_gradients_do_not_outgrow_their_average() -> None:
    models = [build(), build()]
    optimizers = [optimizer_of(models[0], "stable_adamw"), optimizer_of(models[1])]
    for _ in zip(*(gradients(model, 5, growth=0.5) for model in models), strict=True):
        for optimizer in optimizers:
            optimizer.step()
    assert max(optimizers[0].rms.values()) <= 1
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-15)


def test_a_spike_moves_stable_adamw_less() -> None:
    """Without momentum, Adam's step after one huge gradient is 1 / sqrt(1 - beta2) of a usual one,
    with debiasing: the gradient is all there is in the average."""
    moved = {}
    for name in ("adamw", "stable_adamw"):
        model = build()
        optimizer = optimizer_of(model, name, beta1=0.0)
        for step in gradients(model, 31):
            for parameter in model.parameters():
                parameter.grad *= 1000.0 if step == 30 else 1.0
            optimizer.step()
        size = sum(parameter.numel() for parameter in model.parameters())
        moved[name] = optim.update_norm(optimizer).item() / RATE / size**0.5
    usual = math.sqrt((1 - 0.95**31) / (1 - 0.95))
    assert moved["adamw"] == pytest.approx(usual, rel=0.01)
    assert moved["stable_adamw"] == pytest.approx(1, abs=0.01)


def test_stable_adamw_goes_on_from_the_state_of_adamw() -> None:
    model = build()
    first = optimizer_of(model)
    for _ in gradients(model, 2):
        first.step()
    second = optimizer_of(model, "stable_adamw")
    second.load_state_dict(first.state_dict())
    for _ in gradients(model, 1, growth=0.5):
        second.step()
    assert {state["step"].item() for state in second.state.values()} == {3}


def test_parameters_without_a_gradient_stay() -> None:
    model = build()
    optimizer = optimizer_of(model, "stable_adamw")
    for _ in gradients(model, 1):
        model.lm_head.weight.grad = None
        before = weights(model)
        assert optimizer.step(lambda: 7) == 7
    after = weights(model)
    assert [name for name in after if after[name].equal(before[name])] == ["lm_head.weight"]


def test_elements_that_never_had_a_gradient_stay_finite() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    group = {"name": "all", "params": [weight], "lr": RATE, "weight_decay": 0.0}
    optimizer = optim.stable_adamw([group], eps=1e-30)
    weight.grad = torch.tensor([0.0, 1.0, 0.0])
    optimizer.step()
    assert weight.tolist() == pytest.approx([1.0, 1 - RATE, 1.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamw_with_clipping_is_torch_bit_by_bit(dtype: torch.dtype) -> None:
    models = [build().to(dtype), build().to(dtype)]
    ours = optimizer_of(models[0])
    theirs = torch.optim.AdamW(
        [
            {key: group[key] for key in ("lr", "weight_decay")}
            | {"params": [dict(models[1].named_parameters())[name] for name in names]}
            for group, names in _named_groups(models[0], ours)
        ],
        betas=(0.9, 0.95),
        fused=True,
    )
    for _ in zip(*(gradients(model, 3) for model in models), strict=True):
        norm = optim.clip_gradients(models[0], ours, 1.0)
        ours.step()
        optim.update_norm(ours)
        optim.fractions_below_eps(ours)
        assert norm.equal(torch.nn.utils.clip_grad_norm_(models[1].parameters(), 1.0))
        theirs.step()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert one.equal(other)


def _named_groups(model: Any, optimizer: Any) -> list[tuple[dict[str, Any], list[str]]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [
        (group, [names[parameter] for parameter in group["params"]])
        for group in optimizer.param_groups
    ]


class _RefuseShards(TorchDispatchMode):
    """Operations on DTensors, which the host takes many times as long to launch, are failures."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(issubclass(kind, DTensor) for kind in types), func
        return func(*args, **(kwargs or {}))


@pytest.fixture
def mesh() -> Any:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["adamw", "stable_adamw"])
def test_a_step_on_shards_is_one_on_plain_tensors(name: str, mesh: Any) -> None:
    shapes = [(4, 6), (6,), (1,)]
    weights = [torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in shapes]
    whole = [torch.nn.Parameter(weight.clone()) for weight in weights]
    shards = [torch.nn.Parameter(distribute_tensor(each, mesh, [Shard(0)])) for each in weights]
    optimizers = [
        optim.OPTIMIZERS[name]([{"params": params, "lr": RATE, "weight_decay": 0.1}])
        for params in (whole, shards)
    ]
    for step in range(3):
        for one, other in zip(whole, shards, strict=True):
            one.grad = torch.randn(one.shape, generator=torch.Generator().manual_seed(step))
            other.grad = distribute_tensor(one.grad, mesh, [Shard(0)])
        optimizers[0].step()
        with contextlib.nullcontext() if step == 0 else _RefuseShards():  # the first makes state
            optimizers[1].step()
    for one, other in zip(whole, shards, strict=True):
        assert other.full_tensor().equal(one)
        assert isinstance(optimizers[1].state[other]["exp_avg"], DTensor)

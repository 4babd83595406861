"""Power iterations batched over layers of one shape: equal to one by one, in fewer launches."""

import itertools
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_stable.model import StableGPTPreTrainedModel
from hf_stable.model import sigma_stable_gpt as sigma
from hf_stable.model.functional_stable_gpt import power_iteration
from hf_stable.model.sigma_stable_gpt import StableGPTSigmaLinear

from ..techniques import build, relative_error, tokens

TOGETHER, ONE_BY_ONE = 2**29, 0
# Grouped-query attention, so that no two kinds of matrices but qkv of all blocks have one shape.
SHAPES = {"num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 80}


def _linears(model: StableGPTPreTrainedModel) -> list[StableGPTSigmaLinear]:
    return [linear for _, linear in model._sigma_linears()]


def _textbook(linear: StableGPTSigmaLinear, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Zhai et al. 2023, algorithm 1, on one matrix."""
    weight, u, v = linear.weight.detach(), linear.u.clone(), linear.v.clone()
    for _ in range(steps):
        u = torch.mv(weight, v)
        u = u / u.norm()
        v = torch.mv(weight.T, u)
        v = v / v.norm()
    return u, v


def _perturbed(layers: int = 3) -> StableGPTPreTrainedModel:
    """A model whose vectors are far from those of its weights, on mixed shapes."""
    model = build(sigma_reparam=True, num_hidden_layers=layers, **SHAPES).train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for linear in _linears(model):
            noise = torch.randn(linear.weight.shape, generator=generator, dtype=torch.float64)
            linear.weight.add_(noise)
    return model


@pytest.mark.parametrize("budget", [TOGETHER, ONE_BY_ONE, 2 * 8 * 32 * 48])
@pytest.mark.parametrize("steps", [1, 3])
def test_together_is_one_by_one(monkeypatch, budget: int, steps: int) -> None:
    monkeypatch.setitem(sigma.STACK_BYTES, "cpu", budget)
    model = _perturbed()
    expected = [_textbook(linear, steps) for linear in _linears(model)]
    assert len({linear.weight.shape for linear in _linears(model)}) == 4
    model.power_iterate(steps)
    for linear, (u, v) in zip(_linears(model), expected, strict=True):
        assert relative_error(linear.u, u) < 1e-12 and relative_error(linear.v, v) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_of_low_precision_are_those_of_float64_up_to_rounding(monkeypatch, dtype) -> None:
    monkeypatch.setitem(sigma.STACK_BYTES, "cpu", TOGETHER)
    model = _perturbed().to(dtype)
    exact = _perturbed().to(dtype).double()
    for each in (model, exact):
        each.power_iterate(1)
    for linear, reference in zip(_linears(model), _linears(exact), strict=True):
        assert linear.u.dtype == linear.v.dtype == dtype
        for got, want in ((linear.u, reference.u), (linear.v, reference.v)):
            assert relative_error(got, want) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("budget", [TOGETHER, ONE_BY_ONE], ids=["together", "one by one"])
def test_only_layers_that_are_due_advance(monkeypatch, budget: int) -> None:
    monkeypatch.setitem(sigma.STACK_BYTES, "cpu", budget)
    model = _perturbed()
    model(tokens())
    changed, evaluating, *others = _linears(model)
    evaluating.eval()
    before = [(linear.u.clone(), linear.v.clone()) for linear in _linears(model)]
    with torch.no_grad():
        changed.weight.mul_(1 + torch.rand_like(changed.weight))
        evaluating.weight.mul_(1 + torch.rand_like(evaluating.weight))
    expected = _textbook(changed, 1)
    model(tokens())
    assert relative_error(changed.u, expected[0]) < 1e-12 < relative_error(before[0][0], changed.u)
    for linear, (u, v) in zip([evaluating, *others], before[1:], strict=True):
        assert torch.equal(linear.u, u) and torch.equal(linear.v, v)


def test_a_frozen_layer_stands_still_while_others_follow(monkeypatch) -> None:
    monkeypatch.setitem(sigma.STACK_BYTES, "cpu", TOGETHER)
    model = _perturbed()
    frozen, *others = _linears(model)
    frozen.weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(tokens(), labels=tokens()).loss.backward()
    before = [linear.u.clone() for linear in (frozen, *others)]
    optimizer.step()
    model(tokens())
    moved = [
        not torch.equal(linear.u, u) for linear, u in zip((frozen, *others), before, strict=True)
    ]
    assert moved == [False] + [True] * len(others)


class _CountOperations(TorchDispatchMode):
    """How often each operation was called; views launch nothing, but are counted like the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_launches_do_not_grow_with_depth(monkeypatch) -> None:
    calls = {}
    for budget, name in ((TOGETHER, "together"), (ONE_BY_ONE, "one by one")):
        monkeypatch.setitem(sigma.STACK_BYTES, "cpu", budget)
        for layers in (2, 6):
            model = build(sigma_reparam=True, num_hidden_layers=layers).train()
            with torch.no_grad(), _CountOperations() as mode:
                model._follow_weights()
            calls[name, layers] = mode.calls
    assert calls["together", 2] == calls["together", 6]
    # Two products for each of four kinds of matrices.
    assert calls["together", 2]["aten.sum.dim_IntList"] == 2 * 4
    assert calls["one by one", 6].total() > calls["one by one", 2].total()


def test_the_budget_bounds_what_is_copied(monkeypatch) -> None:
    sizes = []
    monkeypatch.setattr(
        sigma, "_power_iterate_alike", lambda linears, steps: sizes.append(len(linears))
    )
    nbytes = 32 * 48 * 8
    monkeypatch.setitem(sigma.STACK_BYTES, "cpu", 3 * nbytes + 1)
    linears = [StableGPTSigmaLinear(48, 32).double() for _ in range(8)]
    sigma.power_iterate(linears, 1)
    assert sizes == [3, 3, 2]


def test_matrices_may_have_any_leading_axes() -> None:
    weight, u, v = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5), torch.randn(2, 3, 4)
    batched = power_iteration(weight, u, v, 2)
    for i, j in itertools.product(range(2), range(3)):
        single = power_iteration(weight[i, j], u[i, j], v[i, j], 2)
        for got, want in zip(batched, single, strict=True):
            torch.testing.assert_close(got[i, j], want)


SHARDED = """
import os
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from hf_stable.model import sigma_stable_gpt as sigma
from tests.model.test_power_iterations import _linears, _perturbed

class Traffic(TorchDispatchMode):
    largest = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its own operations come by
        if "c10d" in str(func):
            self.largest = max(self.largest, args[0].numel())
        return func(*args, **(kwargs or {}))

dist.init_process_group("gloo")
for budget in (0, 2**29):
    sigma.STACK_BYTES["cpu"] = budget
    whole, sharded = _perturbed(), _perturbed()
    mesh = init_device_mesh("cpu", (2,))
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    whole.power_iterate(3)
    with Traffic() as traffic:
        sharded.power_iterate(3)
    assert 0 < traffic.largest <= 3 * 80, "more than the vectors of three blocks travelled"
    for one, other in zip(_linears(whole), _linears(sharded), strict=True):
        torch.testing.assert_close(one.u, other.u, rtol=0, atol=1e-13)
        torch.testing.assert_close(one.v, other.v, rtol=0, atol=1e-13)
    vectors = torch.cat([v for linear in _linears(sharded) for v in (linear.u, linear.v)])
    both = [torch.empty_like(vectors) for _ in range(2)]
    dist.all_gather(both, vectors)
    assert torch.equal(*both), "the processes disagree"
dist.barrier()
os._exit(0)  # gloo's threads seem to abort the interpreter's own end now and then
"""


def test_sharded_weights_give_every_process_the_same_vectors(tmp_path: Path) -> None:
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    finished = subprocess.run(
        [*command, str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr

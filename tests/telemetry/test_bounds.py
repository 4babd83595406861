"""Laws of spectral norms and of the bounds of "Spike No More"."""

import math
from typing import Any

import pytest
import torch

from hf_stable.telemetry import watch
from hf_stable.telemetry.bounds import operator_norm

from .steps import draw, tiny, watched

BATCH = draw(1)[0][0]


def _iterated(name: str) -> bool:
    return name.endswith(("_bound", "_spectral"))


def _norm_of(matrix: torch.Tensor) -> float:
    start = torch.randn(matrix.shape[1], generator=torch.Generator().manual_seed(0))
    start = start.to(matrix.dtype)
    return operator_norm(lambda v: matrix @ v, lambda u: matrix.T @ u, start).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("shape", "rank"),
    [((5, 3), 3), ((3, 5), 3), ((40, 40), 1), ((40, 30), 7), ((300, 100), 100), ((256, 256), 256)],
)
def test_the_largest_singular_value(shape: tuple, rank: int, dtype: torch.dtype) -> None:
    """Also where there are fewer directions than iterations, and where there is hardly a gap."""
    torch.manual_seed(1)
    matrix = (torch.randn(shape[0], rank) @ torch.randn(rank, shape[1])).to(dtype)
    if rank == min(shape):
        matrix = torch.randn(shape).to(dtype)
    expected = torch.linalg.svdvals(matrix.double())[0].item()
    assert _norm_of(matrix) == pytest.approx(expected, rel=2e-3)
    assert _norm_of(matrix) <= expected * (1 + 1e-5)


@pytest.mark.parametrize("scale", [1e-9, 1e7])
def test_scale_does_not_matter(scale: float) -> None:
    matrix = torch.diag(torch.arange(1.0, 41.0)) * scale
    assert _norm_of(matrix) == pytest.approx(40 * scale, rel=1e-3)


def test_zero_and_what_is_not_finite() -> None:
    assert _norm_of(torch.zeros(9, 7)) == 0.0
    for value in (math.nan, math.inf):
        matrix = torch.eye(9)
        matrix[3, 4] = value
        assert not math.isfinite(_norm_of(matrix))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_run_that_is_not_finite_goes_on_being_watched(value: float) -> None:
    """And tells the truth again, should somebody put the weight right."""
    model = tiny(dtype=torch.float32)
    weight = model.model.layers[0].mlp.up_proj.weight
    sound = weight.detach().clone()
    expected = watched(tiny(dtype=torch.float32), [[BATCH]])[0]
    with watch(model, every=1, bounds_every=1) as watcher:
        with torch.no_grad():
            weight[0, 0] = value
        model(**BATCH).loss.backward()
        found = watcher.end_step()
        assert not math.isfinite(found["layers.0.fc1/weight_spectral"])
        assert not math.isfinite(found["layers.0.stream/mlp_bound"])
        with torch.no_grad():
            weight.copy_(sound)
        model.zero_grad()
        model(**BATCH).loss.backward()
        again = watcher.end_step()
    for name in filter(_iterated, expected):
        assert again[name] == pytest.approx(expected[name], rel=1e-5), name


def test_bounds_are_in_the_first_sample_and_in_every_nth() -> None:
    found = watched(tiny(), draw(9, 1), every=2, bounds_every=4)
    with_bounds = [
        step
        for step, numbers in enumerate(found, 1)
        if numbers is not None and any(map(_iterated, numbers))
    ]
    assert with_bounds == [1, 4, 8]
    assert not any(map(_iterated, watched(tiny(), [[BATCH]], bounds_every=0)[0]))


@pytest.mark.parametrize(
    ("preset", "fields", "branches"),
    [
        ("baseline", {}, {"attention", "mlp"}),
        ("qkv_norm", {}, {"mlp"}),
        ("qk_fc_norm", {}, set()),
        ("baseline", {"mlp_pre_norm": False}, {"attention"}),
        ("baseline", {"attention_post_norm": True}, {"mlp"}),
        ("baseline", {"linear_bias": "all"}, {"attention", "mlp"}),
        ("baseline", {"parallel_residual": True}, {"attention"}),
        ("gated_mlp", {}, {"attention"}),
    ],
)
def test_only_branches_that_are_pre_norm_have_a_bound(
    preset: str, fields: dict[str, Any], branches: set[str]
) -> None:
    found = watched(tiny(preset, **fields), [[BATCH]])[0]
    bounds = {name for name in found if name.endswith("_bound")}
    assert bounds == {
        f"layers.{layer}.stream/{branch}_bound" for layer in range(2) for branch in branches
    }
    assert all(found[name] > 1 for name in bounds)


def test_a_gate_is_looked_at_as_every_map_is() -> None:
    model = tiny("gated_mlp")
    weight = model.model.layers[1].mlp.gate_proj.weight
    largest = torch.linalg.svdvals(weight)[0].item()
    found = watched(model, [[BATCH]])[0]
    assert found["layers.1.gate/weight_spectral"] == pytest.approx(largest, rel=1e-6)
    quantities = {name.split("/")[1] for name in found if name.startswith("layers.1.fc1/")}
    assert quantities == {name.split("/")[1] for name in found if name.startswith("layers.1.gate/")}


@pytest.mark.parametrize("attn", ["sdpa", "stable_triton"])
def test_the_backend_does_not_matter(attn: str) -> None:
    expected = watched(tiny("qk_norm", dtype=torch.float32), [[BATCH]])[0]
    found = watched(tiny("qk_norm", attn, torch.float32), [[BATCH]])[0]
    for name in filter(_iterated, expected):
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name


def test_bf16_weights_and_autocast_are_near() -> None:
    expected = watched(tiny("qk_norm"), [[BATCH]])[0]
    found = [watched(tiny("qk_norm", dtype=torch.bfloat16), [[BATCH]])[0]]
    with torch.autocast("cpu", torch.bfloat16):
        found.append(watched(tiny("qk_norm", dtype=torch.float32), [[BATCH]])[0])
    for numbers in found:
        for name in filter(_iterated, expected):
            assert numbers[name] == pytest.approx(expected[name], rel=0.05), name


def test_modes_of_modules_stay_what_they_were() -> None:
    """A norm that somebody froze in eval mode."""
    model = tiny("qk_norm")
    model.model.layers[0].self_attn.q_norm.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    watched(model, [[BATCH]])
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_scaled_embed_lowers_the_bound_of_the_first_layer() -> None:
    """The paper's point (figure 2): a larger shortcut, at the same weights of the block."""
    small, large = (
        watched(tiny(initializer="small", embedding_scale=scale), [[BATCH]])[0]
        for scale in (1.0, "sqrt_hidden")
    )
    for branch in ("attention", "mlp"):
        name = f"layers.0.stream/{branch}_bound"
        assert large[name] - 1 < 0.6 * (small[name] - 1)

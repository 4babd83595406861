"""Laws of the benchmarks: how goals are judged, what a ratio is, and what is a failure."""

import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_stable.check import flops_per_token
from hf_stable.model import StableGPTConfig, StableGPTForCausalLM
from hf_stable.recipes import load_recipe

ROOT = Path(__file__).parent.parent
BENCH = ROOT / "scripts" / "bench"
sys.path.insert(0, str(BENCH))  # the benchmarks are scripts that import their neighbours

import attention  # noqa: E402
import attention_cases  # noqa: E402
import common  # noqa: E402
import goals  # noqa: E402
import linear_cross_entropy  # noqa: E402
import page  # noqa: E402
import stacked_runs  # noqa: E402
import train_step_models  # noqa: E402
import train_step_profile  # noqa: E402


def device(**changes: Any) -> common.Device:
    return common.Device(**{"dry": True, "rounds": 3, "seconds": 60.0, **changes})


@pytest.mark.parametrize(
    ("at_least", "value", "verdict", "stretch_met"),
    [
        (False, 0.8, "met", True),
        (False, 1.0, "met", False),
        (False, 1.01, "missed", False),
        (False, math.nan, "missed", False),
        (False, None, "not measured", None),
        (True, 1.2, "met", True),
        (True, 1.0, "met", False),
        (True, 0.8, "missed", False),
        (True, math.nan, "missed", False),
        (True, None, "not measured", None),
    ],
)
def test_a_goal_is_judged_by_its_direction(
    at_least: bool, value: float | None, verdict: str, stretch_met: bool | None
) -> None:
    stretch = 1.2 if at_least else 0.8
    judged = goals.Goal("X1", "made up", 1.0, stretch, at_least).judge(value)
    assert judged["verdict"] == verdict
    assert judged["stretch_met"] is stretch_met
    assert judged["value"] is value and judged["bar"] == 1.0


def test_a_goal_without_a_stretch_has_none_to_meet() -> None:
    judged = goals.Goal("X1", "made up", 1.0).judge(0.1)
    assert (judged["verdict"], judged["stretch_met"]) == ("met", None)


def test_goals_have_ids_of_their_own_and_harder_stretches() -> None:
    every = [goal for each in goals.GOALS.values() for goal in each]
    assert len({goal.id for goal in every}) == len(every)
    for goal in every:
        if goal.stretch is not None:
            assert goal.stretch > goal.bar if goal.at_least else goal.stretch < goal.bar


def test_a_ratio_is_taken_within_rounds() -> None:
    """The clock halves in the second half of the run; the ratio does not see it."""
    times = {"slow": [2.0, 2.0, 4.0, 4.0, 4.4], "fast": [1.0, 1.0, 2.0, 2.0, 2.2]}
    assert common.ratio(times, "slow", "fast") == 2.0
    assert common.ratio(times, "fast", "absent") is None
    assert common.ratio(times, "absent", "fast") is None


def test_the_worst_is_the_largest_and_nan_is_worse() -> None:
    assert common.worst([1.0, None, 3.0]) == 3.0
    assert math.isnan(common.worst([1.0, math.nan, 3.0]) or 0.0)
    assert common.worst([None]) is None and common.worst([]) is None


def test_every_round_times_every_case_once_in_changing_order() -> None:
    calls: list[tuple[int, str]] = []
    cases = {name: lambda number, name=name: calls.append((number, name)) for name in "abcdefgh"}
    times = device(dry=False, rounds=4).interleave(cases, seconds=60)
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys(cases, 4)
    rounds = [[name for number, name in calls if number == wanted] for wanted in range(4)]
    assert all(sorted(order) == sorted(cases) for order in rounds)
    assert len({tuple(order) for order in rounds}) > 1


def test_a_case_that_runs_out_of_memory_beside_others_costs_only_itself() -> None:
    def hungry(number: int) -> None:
        if number == 1:
            raise torch.OutOfMemoryError("no room")

    makers = {"hungry": lambda: hungry, "modest": lambda: lambda number: None}
    ready, times, skipped = device(dry=False).measure(makers, seconds=60, warm_ups=1)
    assert set(ready) == set(times) == {"modest"} and len(times["modest"]) == 3
    assert set(skipped) == {"hungry"}


def test_an_absent_peer_and_a_passed_deadline_are_reasons() -> None:
    def absent() -> common.Run:
        raise ModuleNotFoundError("No module named 'peer'")

    ready, skipped = device().prepare({"peer": absent})
    assert not ready and skipped == {"peer": "ModuleNotFoundError: No module named 'peer'"}
    _, skipped = device(seconds=-1.0).prepare({"late": lambda: time.sleep})
    assert skipped == {"late": "not run: no time left"}


@pytest.mark.parametrize(
    ("row", "fails"),
    [
        ({"case": "ours", "ms": 1.0}, False),
        ({"case": "ours, cap", "skipped": "CompilationError: spilled"}, True),
        ({"case": "ours, cap", "skipped": "not run: no time left"}, False),
        ({"case": "peer", "skipped": "ModuleNotFoundError: No module named 'peer'"}, False),
        ({"case": "ours", "ms": 1.0, "wrong": "relative error 0.5"}, True),
    ],
)
def test_only_what_is_ours_can_fail(row: dict[str, Any], fails: bool) -> None:
    assert bool(page.failures([{"case": "made up", "rows": [row]}])) == fails


def test_attention_goals_come_from_the_ratios_that_they_name() -> None:
    times = {
        "ours": [1.0, 1.0],
        "ours, cap": [1.1, 1.1],
        "ours, statistics": [1.02, 1.02],
        "flex, cap, exact tanh": [2.2, 2.2],
        "sdpa flash": [1.0, 1.0],
        "ours, clip dense": [1.5, 1.5],
        "eager, clip dense": [15.0, 15.0],
    }
    values = attention.goal_values(times, {"ours": 1.0, "ours, clip dense": 1.25}, output_gb=0.25)
    assert values["A2"] == pytest.approx(0.5)
    assert values["A3"] == values["A6"] == pytest.approx(1.1)
    assert values["C1"] == pytest.approx(1.5) and values["C3"] == pytest.approx(10.0)
    assert values["C3 memory"] == pytest.approx(1.0)
    assert values["statistics"] == pytest.approx(1.02)
    for absent in ("A1", "A4", "A5", "C2", "statistics, cap"):
        assert values[absent] is None
    assert set(values) <= {goal.id for goal in goals.ATTENTION}


def test_attention_errors_condemn_a_wrong_kernel_and_nan() -> None:
    bench = attention.Bench(attention_cases.DRY, device())
    case = attention_cases.own_case(softcap=attention_cases.CAP)
    truth, _ = bench.truth(case.settings, case.data)
    assert "wrong" not in bench.errors(case, truth)
    assert "wrong" in bench.errors(case, [1.01 * tensor for tensor in truth])
    assert "wrong" in bench.errors(case, [torch.full_like(tensor, math.nan) for tensor in truth])


def test_attention_that_keeps_its_scores_keeps_too_much() -> None:
    bench = attention.Bench(attention_cases.DRY, device())
    assert bench.kept(attention_cases.OWN["ours"]) <= 1.001
    assert bench.kept(attention_cases.PEERS["eager"]) > 1.5


def test_local_attention_leaves_few_live_tiles_and_scattered_many() -> None:
    shape = attention_cases.Shape(1, 1, 1024, 64)
    bench = attention.Bench(shape, device())
    assert bench.live_tiles("local") < 0.5 < bench.live_tiles("scattered")


def test_liger_is_judged_by_its_best_chunk() -> None:
    times = {"ours": [3.0, 3.0], "liger": [12.0, 12.0], "liger, chunk 16": [4.0, 4.0]}
    values = linear_cross_entropy.goal_values({**times, "gemms": [2.0, 2.0]}, {"ours": 2.5}, "8k")
    assert values["L1 8k"] == pytest.approx(1.5) and values["L2 8k"] == 2.5
    assert values["L3 default 8k"] == pytest.approx(0.25)
    assert values["L3 best 8k"] == pytest.approx(0.75)
    assert values["L4 8k"] is None
    assert set(values) <= {goal.id for goal in goals.LOSS}


def test_the_timed_model_is_the_recipe_s() -> None:
    recipe = load_recipe([ROOT / "recipes" / "base" / "830m.yaml"])
    with torch.device("meta"):
        wanted = StableGPTForCausalLM(recipe.model_config())
        sizes = {**train_step_models.MODEL, "max_position_embeddings": 4096}
        timed = StableGPTForCausalLM(StableGPTConfig(**sizes))
    shapes = [
        {name: tensor.shape for name, tensor in model.state_dict().items()}
        for model in (wanted, timed)
    ]
    assert shapes[0] == shapes[1]
    for field in ("hidden_act", "norm", "norm_eps", "num_attention_heads", "rope_parameters"):
        assert vars(timed.config)[field] == vars(wanted.config)[field]
    shape = train_step_models.MICRO_BATCH
    assert (shape.batch, shape.length) == (
        recipe.training.micro_batch_size,
        recipe.data.sequence_length,
    )
    counted = train_step_models.flops_per_token(timed, shape.length)
    assert counted == flops_per_token(timed, shape.length)
    assert counted == pytest.approx(3.989e9, rel=1e-3)


def test_all_techniques_are_all_but_a_clip() -> None:
    """A technique that is added to the presets must be taken in, or be left out here."""
    left_out = {"soft_clip", "mup", "scaled_embed", "qkv_norm", "gated_mlp"}
    for name, fields in train_step_models.PRESETS.items():
        if name not in left_out:
            assert fields.items() <= train_step_models.ALL.items(), name


def test_the_micro_batch_is_halved_until_it_fits() -> None:
    tried: list[int] = []

    def build(shape: train_step_models.Shape) -> Any:
        tried.append(shape.batch)
        if shape.batch > 2:
            raise torch.OutOfMemoryError("too large")
        return lambda number: None

    train_step_models.fitting(build, train_step_models.Shape(8, 16), device())
    assert tried == [8, 4, 2]
    with pytest.raises(torch.OutOfMemoryError):
        train_step_models.fitting(
            lambda shape: build(train_step_models.Shape(8, 16)),
            train_step_models.Shape(2, 16),
            device(),
        )


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("forward_kernel", "attention"),
        ("key_value_kernel", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<...>", "attention"),
        ("cross_entropy_rows_kernel", "loss"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT", "products"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("triton_red_fused_native_layer_norm_3", "elementwise, norms, copies"),
    ],
)
def test_kernels_are_told_apart(kernel: str, kind: str) -> None:
    assert train_step_profile.kind_of(kernel) == kind


@pytest.mark.parametrize("method", ["baseline", "qk_norm"])
def test_stacked_runs_have_the_losses_of_separate_ones(method: str) -> None:
    smaller = [
        "data.sequence_length=16",
        "training.micro_batch_size=8",
        "model.num_hidden_layers=2",
    ]
    differences = stacked_runs.check(method, num_runs=2, settings=smaller)
    assert differences["float64"] < 1e-12

"""Laws of watching: every number is its definition, and training never notices."""

import contextlib
import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_stable.compilation import check_compiler, compile_blocks
from hf_stable.errors import RecipeError
from hf_stable.model.loss_stable_gpt import LINEAR_CROSS_ENTROPY_FUNCTIONS
from hf_stable.telemetry import observe, watch

from .reference import Adam, Reference
from .steps import assert_documented, assert_numbers, draw, exact_copy, tiny, traces, watched

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "baseline": ("baseline", {}),
    "soft_temp": ("soft_temp", {}),
    "soft_cap": ("soft_cap", {"attn_logit_softcapping": 2.0}),
    "soft_clip": ("soft_clip", {"attention_clip_gamma": -0.15}),
    "clip_alpha": ("baseline", {"attention_clip_alpha": 1.5}),
    "qk_norm_cap": ("qk_norm_cap", {"attn_logit_softcapping": 1.0}),
    "qk_norm_full": ("baseline", {"qk_norm": "full", "v_norm": "full"}),
    "qkv_norm": ("qkv_norm", {}),
    "qk_fc_norm": ("qk_fc_norm", {}),
    "sigma_reparam": ("sigma_reparam", {}),
    "layer_scale": ("layer_scale", {"layer_scale": 0.1}),
    "scaled_embed": ("scaled_embed", {}),
    "embed_norm": ("embed_norm", {}),
    "z_loss": ("z_loss", {"z_loss": 0.01}),
    "gqa": ("qk_norm", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}),
    "zero_centered": ("qk_norm", {"zero_centered_norm": True}),
    "rmsnorm": ("baseline", {"norm": "rmsnorm", "norm_bias": True}),
    "tied": ("baseline", {"tie_word_embeddings": True}),
    "final_cap": ("z_loss", {"z_loss": 0.01, "final_logit_softcapping": 1.5}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_number_is_its_definition(name: str) -> None:
    """Two steps of two microbatches in float64; bounds and spectral norms in the first."""
    preset, fields = SETTINGS[name]
    model = tiny(preset, **fields)
    reference = Reference(exact_copy(model), Adam())
    steps = draw()
    found = watched(model, steps, bounds_every=3)
    for index, batches in enumerate(steps):
        assert_numbers(found[index], reference.step(batches, with_bounds=index == 0), 1e-9)
        assert_documented(found[index])


@pytest.mark.parametrize("name", ["qk_norm_cap", "sigma_reparam", "gqa"])
def test_numbers_in_fp32_are_those_of_float64(name: str) -> None:
    preset, fields = SETTINGS[name]
    model = tiny(preset, dtype=torch.float32, **fields)
    reference = Reference(exact_copy(model), Adam())
    steps = draw()
    found = watched(model, steps)
    for numbers, batches in zip(found, steps, strict=True):
        assert_numbers(numbers, reference.step(batches), 1e-4, bounds=1e-3)


# watching changes nothing ---------------------------------------------------------------------


def _train(model: Any, every: int, mode: str = "plain", **options: Any) -> tuple[list, list]:
    """Losses and weights of 20 steps."""
    if "checkpointed" in mode:
        model.gradient_checkpointing_enable()
    if "compiled" in mode:
        compile_blocks(model)
    torch.manual_seed(3)
    optimizer = Adam().build(model)
    own = traces(model)  # Transformers' checkpointing hooks the embedding
    losses = []
    with watch(model, optimizer, every=every, **options) as watcher:
        for (batch,) in draw(20, 1):
            with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in mode):
                loss = model(use_cache=False, **batch).loss
            loss.backward()
            losses.append(loss.item())
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            watcher.end_step()
    assert traces(model) == own
    return losses, [parameter.detach().clone() for parameter in model.parameters()]


def _assert_unchanged(every: int, mode: str, preset: str, **fields: Any) -> None:
    plain, seen = (
        _train(tiny(preset, dtype=torch.float32, **fields), each, mode) for each in (0, every)
    )
    assert plain[0] == seen[0]
    assert all(torch.equal(one, other) for one, other in zip(plain[1], seen[1], strict=True))


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *itertools.product(("qk_norm_cap", "sigma_reparam"), ("plain", "checkpointed", "bf16")),
        *itertools.product(("soft_clip", "final_cap"), ("plain", "bf16 checkpointed")),
    ],
)
def test_watching_changes_no_bit(name: str, mode: str) -> None:
    preset, fields = SETTINGS[name]
    _assert_unchanged(1, mode, preset, **fields)


@pytest.mark.parametrize("name", ["baseline", "qkv_norm", "qk_fc_norm", "tied", "gqa"])
def test_watching_now_and_then_changes_no_bit(name: str) -> None:
    preset, fields = SETTINGS[name]
    _assert_unchanged(7, "plain", preset, **fields)


@pytest.mark.parametrize("mode", ["plain", "checkpointed"])
def test_watching_draws_no_random_number(mode: str) -> None:
    _assert_unchanged(1, mode, "baseline", attention_dropout=0.3)


def test_watching_sdpa_changes_no_bit() -> None:
    _assert_unchanged(1, "plain", "qk_norm", attn="sdpa")


def test_watching_compiled_blocks_changes_no_bit() -> None:
    """With norms of queries and keys: an operator between them would make other kernels of them."""
    try:
        check_compiler(torch.device("cpu"))
    except RecipeError as error:
        pytest.skip(str(error))
    torch._dynamo.reset()
    _assert_unchanged(7, "compiled checkpointed", "qk_norm_cap")
    torch._dynamo.reset()


# what does not count --------------------------------------------------------------------------


def test_recomputed_blocks_count_once() -> None:
    plain, checkpointed = tiny("qk_norm_cap"), tiny("qk_norm_cap")
    checkpointed.gradient_checkpointing_enable()
    for one, other in zip(watched(plain, draw()), watched(checkpointed, draw()), strict=True):
        assert_numbers(other, one, 1e-12)


def test_validation_inside_a_sampled_step_does_not_count() -> None:
    plain, validated = tiny("soft_cap"), tiny("soft_cap")
    other = draw(1, 1, batch_size=3)[0][0]

    def validate() -> None:
        validated.eval()
        with torch.no_grad():
            validated(**other)
            validated(input_ids=other["input_ids"])
        validated.train()

    steps = draw()
    seen = watched(validated, steps, between=validate)
    for one, other_numbers in zip(watched(plain, steps), seen, strict=True):
        assert other_numbers == one


def test_another_model_that_trains_meanwhile_does_not_count() -> None:
    plain, accompanied, other = (tiny("qk_norm") for _ in range(3))

    def accompany() -> None:
        other(**draw(1, 1, batch_size=3)[0][0]).loss.backward()

    alone = watched(plain, draw())
    assert watched(accompanied, draw(), between=accompany) == alone
    assert not traces(other)


def test_a_step_that_failed_does_not_count() -> None:
    """A loop may skip a batch that did not fit in memory."""
    plain, failing = tiny("qk_norm"), tiny("qk_norm")
    batch = draw(1, 1, batch_size=3)[0][0]

    def fail() -> None:
        with pytest.raises(TypeError):
            failing(**{**batch, "num_items_in_batch": "many"})

    found = watched(failing, draw(), between=fail, bounds_every=0)
    assert found == watched(plain, draw(), bounds_every=0)


# no trace -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _no_trace(model: Any) -> Iterator[None]:
    registries = (ALL_ATTENTION_FUNCTIONS, LINEAR_CROSS_ENTROPY_FUNCTIONS)
    before = [dict(each._local_mapping) for each in registries]
    modules = {name: set(vars(module)) for name, module in model.named_modules()}
    yield
    assert [dict(each._local_mapping) for each in registries] == before
    assert {name: set(vars(module)) for name, module in model.named_modules()} == modules
    assert not traces(model)


class _StopError(Exception):
    pass


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("where", ["end", "body", "forward", "head", "backward", "optimizer"])
def test_nothing_is_left_behind(where: str, attn: str) -> None:
    model = tiny("qk_norm", attn)
    optimizer = Adam().build(model)
    batch = draw()[0][0]

    def stop(*_: Any) -> None:
        raise _StopError

    with _no_trace(model):
        try:
            with watch(model, optimizer, every=1) as watcher:
                if where == "forward":
                    handle = model.model.layers[1].mlp.register_forward_hook(stop)
                    model(**batch)
                elif where == "head":
                    model(**{**batch, "num_items_in_batch": "many"})
                elif where == "backward":
                    loss = model(**batch).loss
                    loss.register_hook(stop)
                    loss.backward()
                model(**batch).loss.backward()
                if where == "optimizer":
                    optimizer.register_step_pre_hook(stop)
                optimizer.step()
                watcher.end_step()
                model(**batch)
                if where == "body":
                    stop()
        except (_StopError, TypeError):
            assert where != "end"
        if where == "forward":
            handle.remove()
    # The next step of the model finds nothing to trip over.
    model(**batch).loss.backward()
    assert not optimizer._optimizer_step_post_hooks


def test_registered_functions_are_put_back() -> None:
    """Also what was registered under the very names that are replaced."""
    model = tiny()
    eager, head = object(), object()
    for registry, name, own in (
        (ALL_ATTENTION_FUNCTIONS, "eager", eager),
        (LINEAR_CROSS_ENTROPY_FUNCTIONS, "cpu", head),
    ):
        registry._local_mapping[name] = own
    try:
        with watch(model, every=1):
            assert ALL_ATTENTION_FUNCTIONS["eager"] is not eager
            with contextlib.suppress(TypeError):
                model.lm_head(torch.zeros(1, 1, 16).double(), torch.zeros(1, 1).long())
        assert ALL_ATTENTION_FUNCTIONS._local_mapping["eager"] is eager
        assert LINEAR_CROSS_ENTROPY_FUNCTIONS._local_mapping["cpu"] is head
    finally:
        del ALL_ATTENTION_FUNCTIONS["eager"], LINEAR_CROSS_ENTROPY_FUNCTIONS["cpu"]


def test_two_models_may_be_watched_and_left_in_any_order() -> None:
    first, second = tiny("qk_norm"), tiny("soft_temp")
    batch = draw()[0][0]
    alone = []
    for model in (tiny("qk_norm"), tiny("soft_temp")):
        with watch(model, every=1) as watcher:
            model(**batch).loss.backward()
            alone.append(watcher.end_step())
    with _no_trace(first), _no_trace(second):
        outer, inner = watch(first, every=1), watch(second, every=1)
        outer.__enter__()
        inner.__enter__()
        first(**batch).loss.backward()
        second(**batch).loss.backward()
        assert outer.end_step() == alone[0]
        outer.__exit__(None, None, None)
        assert inner.end_step() == alone[1]
        inner.__exit__(None, None, None)


def test_what_is_saved_in_a_sampled_step_is_what_is_saved_elsewhere() -> None:
    model = tiny("sigma_reparam")
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with watch(model, every=1):
        model(**draw()[0][0]).loss.backward()
        found = model.state_dict()
        twin = copy.deepcopy(model)
    assert found.keys() == expected.keys() == twin.state_dict().keys()
    twin(**draw()[0][0]).loss.backward()


# when -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "first_step"), [(0, 0), (1, 0), (3, 0), (3, 4), (4, 2)])
def test_sampled_are_the_first_step_and_every_nth(every: int, first_step: int) -> None:
    model = tiny(dtype=torch.float32)
    found = watched(model, draw(7, 1), every=every, first_step=first_step, bounds_every=0)
    steps = [first_step + 1 + index for index, numbers in enumerate(found) if numbers is not None]
    due = [step for step in range(first_step + 1, first_step + 8) if every and step % every == 0]
    assert steps == sorted({*due, *([1] if every and first_step == 0 else [])})


def test_other_steps_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hook is there, nothing is replaced, no operator is called."""
    calls: list[str] = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(str(function))
            return function(*args, **(kwargs or {}))

    model = tiny("qk_norm_cap", dtype=torch.float32)
    optimizer = Adam().build(model)
    counted = []
    with watch(model, optimizer, every=2) as watcher:
        for batches in draw(4, 1):
            is_sampling = bool(traces(model))
            assert bool(optimizer._optimizer_step_pre_hooks) == is_sampling
            calls.clear()
            with Count():
                model(use_cache=False, **batches[0]).loss.backward()
                watcher.gradients()
                optimizer.step()
                optimizer.zero_grad()
            counted.append((is_sampling, list(calls)))
            watcher.end_step()
    sampled = [any("hf_stable" in name for name in names) for _, names in counted]
    assert sampled == [True, True, False, True] == [is_sampling for is_sampling, _ in counted]
    batch = draw(1, 1)[0][0]
    calls.clear()
    with Count():
        model(use_cache=False, **batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert counted[2][1] == calls


# refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["wrapped", "in place", "forward", "blocks"])
def test_what_is_compiled_as_a_whole_is_refused(how: str) -> None:
    """There no hook would run, and the numbers would be missing in silence."""
    model: Any = tiny()
    if how == "wrapped":
        model = torch.compile(model)
    elif how == "in place":
        model.compile()
    elif how == "forward":
        model.forward = torch.compile(model.forward)
    else:
        layers = model.model.layers
        for index in range(len(layers)):
            layers[index] = torch.compile(layers[index])
    with pytest.raises(ValueError, match="compile"):
        watch(model)


def test_what_is_no_causal_lm_is_refused() -> None:
    with pytest.raises(ValueError, match="StableGPTModel has no output embedding"):
        watch(tiny().model)


def test_a_model_is_watched_once_at_a_time() -> None:
    model = tiny()
    with _no_trace(model), watch(model, every=1):
        with pytest.raises(ValueError, match="watched"), watch(model, every=1):
            pass
        model(**draw()[0][0]).loss.backward()


def test_operators_of_observation_are_opaque_to_the_compiler() -> None:
    place = torch.zeros(2, dtype=torch.float64)
    torch.library.opcheck(observe.observe, (torch.ones(3), place), test_utils="test_schema")

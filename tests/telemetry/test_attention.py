"""Laws of what telemetry says of attention: on every backend, with every mask, per head."""

import math
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, MistralConfig
from transformers import MistralForCausalLM as Mistral
from transformers.masking_utils import flash_attention_mask

from hf_stable.model.functional_stable_gpt import attention_forward
from hf_stable.telemetry import scores, watch

from ..flex import trace_only
from .reference import Adam, Batch, Family, Reference, visible_keys
from .steps import LENGTH, SIZES, assert_numbers, draw, exact_copy, tiny, watched

POSITIONS = torch.cat([torch.arange(5), torch.arange(1), torch.arange(6)])[None]
FAKE_FLASH = "fake_flash"


def _padding(row: int, hidden: slice) -> torch.Tensor:
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[row, hidden] = 0
    return mask


def _first_only(batch: Batch) -> Batch:
    return {name: each[:1] if "num" not in name else each for name, each in batch.items()}


def _masked(kind: str) -> list[Batch]:
    """Two microbatches, of which at least one has such a mask."""
    first, second = draw(1)[0]
    if kind == "left":
        first["attention_mask"] = _padding(0, slice(4))
    elif kind == "right and holes":
        first["attention_mask"] = _padding(1, slice(8, None))
        second["attention_mask"] = _padding(1, slice(3, 6))
    elif kind == "packed":
        first["position_ids"] = POSITIONS.expand(2, -1)
    elif kind == "packed one":
        first, second = _first_only(first), _first_only(second)
        first["position_ids"] = POSITIONS
    elif kind == "dense":
        mask = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool).tril(-3)
        second["attention_mask"] = mask | torch.eye(LENGTH, dtype=torch.bool)
    elif kind == "lengths":
        first, second = _first_only(first), _first_only(second)
        lengths = torch.tensor([0, 5, 6, LENGTH], dtype=torch.int32)
        first |= {"position_ids": POSITIONS, "cu_seq_lens_q": lengths}
    return [first, second]


def _plainly(batches: list[Batch]) -> list[Batch]:
    """The same without what eager attention does not know."""
    return [{key: batch[key] for key in batch if key != "cu_seq_lens_q"} for batch in batches]


def _fake_flash(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> Any:
    """What FlashAttention computes from a (B, K) mask, lengths, or positions of a single row."""
    batch_size, _, length, _ = query.shape
    batch: Batch = {"input_ids": torch.zeros(batch_size, length)}
    assert mask is None or mask.ndim == 2
    if mask is not None:
        batch["attention_mask"] = mask
    elif kwargs.get("cu_seq_lens_q") is not None:
        batch["cu_seq_lens_q"] = kwargs["cu_seq_lens_q"]
    elif kwargs.get("position_ids") is not None and batch_size == 1:
        batch["position_ids"] = kwargs["position_ids"]
    visible = visible_keys(batch)
    if sliding_window is not None:
        visible = visible.triu(1 - sliding_window)
    scaling = scaling or 1 / math.sqrt(query.shape[-1])
    return attention_forward(module, query, key, value, visible[:, None], scaling, softcap=softcap)


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A FlashAttention for CPUs, and FlexAttention without its compiler."""
    AttentionInterface.register(FAKE_FLASH, _fake_flash)
    AttentionMaskInterface.register(FAKE_FLASH, flash_attention_mask)
    trace_only(monkeypatch)
    yield
    del AttentionInterface._global_mapping[FAKE_FLASH]
    del AttentionMaskInterface._global_mapping[FAKE_FLASH]


MASKS = ["causal", "left", "right and holes", "packed", "packed one", "dense", "lengths"]
CAPPED = {"attn_logit_softcapping": 3.0}
CLIPPED = {**CAPPED, "attention_clip_gamma": -0.15}
BACKENDS: dict[str, dict[str, Any]] = {
    "eager": CLIPPED,
    "sdpa": {},
    "flex_attention": CAPPED,
    FAKE_FLASH: CAPPED,
    # Interpreted, a second layer takes as long as the first.
    "stable_triton": {**CLIPPED, "num_hidden_layers": 1},
}
IMPOSSIBLE = {
    ("eager", "lengths"), ("sdpa", "lengths"), ("flex_attention", "lengths"),
    ("flex_attention", "dense"), (FAKE_FLASH, "dense"),
}  # fmt: skip


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_and_mask_tells_the_definition(
    backend: str, mask: str, backends: None
) -> None:
    if (backend, mask) in IMPOSSIBLE:
        pytest.skip("the backend refuses it")
    if backend == FAKE_FLASH and mask == "packed":
        pytest.skip("FlashAttention knows documents in a batch of one only")
    if backend == "stable_triton":
        pytest.importorskip("triton")
    exact = backend != "stable_triton"
    model = tiny("qk_norm", dtype=torch.float64 if exact else torch.float32, **BACKENDS[backend])
    reference = Reference(exact_copy(model), Adam())
    model.config._attn_implementation = backend
    batches = _masked(mask)
    if backend == "flex_attention":  # which has no backward on a CPU
        with torch.no_grad(), watch(model, every=1, bounds_every=0) as watcher:
            for batch in batches:
                model(use_cache=False, **batch)
            found = watcher.end_step()
    else:
        found = watched(model, [batches], bounds_every=0)[0]
    expected = reference.step(_plainly(batches), with_bounds=False)
    if backend == "flex_attention":
        told = expected.keys() - found.keys()
        assert all("grad" in name or "update" in name or "optimizer/" in name for name in told)
        expected = {name: value for name, value in expected.items() if name not in told}
    assert_numbers(found, expected, 1e-9 if exact else 1e-4)


def test_documents_in_several_rows_are_no_documents_to_flash_attention(backends: None) -> None:
    """Transformers looks for them in a batch of one only; what is said is what was done."""
    model = tiny("qk_norm")
    reference = exact_copy(model)
    model.config._attn_implementation = FAKE_FLASH
    batches = _masked("packed")
    found = watched(model, [batches], bounds_every=0)[0]
    mask = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    batches[0]["attention_mask"] = mask
    expected = Reference(reference, Adam()).step(batches, with_bounds=False)
    assert_numbers(found, expected, 1e-9)


def _mistral() -> Mistral:
    fields = {"num_key_value_heads": 1, "sliding_window": 5, "initializer_range": 0.3}
    return Mistral(MistralConfig(**SIZES, **fields))


@pytest.mark.parametrize("backend", ["eager", "sdpa", FAKE_FLASH])
def test_a_sliding_window_hides_keys(backend: str, backends: None) -> None:
    """FlashAttention gets it as an argument, others as a mask."""
    torch.manual_seed(0)
    model = _mistral().double()
    twin = exact_copy(model.train())
    model.config._attn_implementation = backend
    paths = {"q": "self_attn.q_proj", "fc2": "mlp.down_proj"}
    family = Family(
        paths,
        windows={0: 5, 1: 5},
        spied=("transformers.models.mistral.modeling_mistral", "eager_attention_forward"),
    )
    batches = draw(1)
    found = watched(model, batches)[0]
    expected = Reference(twin, Adam(), family).step(batches[0])
    for name, value in expected.items():
        if "attention/" in name:
            assert found[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_chunks_of_rows_change_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = watched(tiny("soft_clip", **CLIPPED), [_masked("left")])[0]
    monkeypatch.setitem(scores._CHUNK, "cpu", rows * 2 * LENGTH)
    assert_numbers(watched(tiny("soft_clip", **CLIPPED), [_masked("left")])[0], whole, 1e-12)


def test_uniform_and_one_hot_rows_have_entropy_one_and_zero() -> None:
    for scale, entropy in ((0.0, 1.0), (1e4, 0.0)):
        model = tiny()
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.qkv_proj.weight[:32] *= scale
        found = watched(model, draw(1), bounds_every=0)[0]
        for layer in range(2):
            rows = found[f"layers.{layer}.attention/entropy"]
            assert rows == pytest.approx([entropy] * 2, abs=1e-2 if scale else 1e-12)


@pytest.mark.parametrize("attn", ["eager", "sdpa", "stable_triton"])
def test_a_sequence_of_one_token_has_logits_and_no_entropy(attn: str) -> None:
    model = tiny("qk_norm", attn, torch.float32)
    with watch(model, every=1, bounds_every=0) as watcher:
        model(input_ids=torch.tensor([[3], [4]]), use_cache=False)
        found = watcher.end_step()
    assert "layers.0.attention/entropy" not in found
    assert all(map(math.isfinite, found["layers.0.attention/max_logit"]))


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_a_cache_in_training_changes_no_number(attn: str) -> None:
    """Transformers makes one unless it is told not to; keys are all keys up to here.

    A cache returns keys in other strides, for which a BLAS may sum in another order: what is
    granted is rounding of float64 over a thousand sums.
    """
    found = []
    for use_cache in (False, True):
        model = tiny("qk_norm", attn)
        with watch(model, every=1, bounds_every=0) as watcher:
            model(**draw(1)[0][0], use_cache=use_cache).loss.backward()
            found.append(watcher.end_step())
    assert_numbers(found[1], found[0], 1000 * torch.finfo(torch.float64).eps)


def test_queries_behind_a_prefix_see_all_of_it() -> None:
    """The second half of a sequence, with the keys of the first in a cache."""
    ids = draw(1)[0][0]["input_ids"]
    logits = []
    for attn in ("eager", "sdpa"):
        model = tiny("qk_norm", attn)
        with watch(model, every=1, bounds_every=0) as watcher:
            cache = model(input_ids=ids[:, :7]).past_key_values
            model(input_ids=ids[:, 7:], past_key_values=cache)
            halves = watcher.end_step()
            model(input_ids=ids)
            whole = watcher.end_step()
        for name in ("max_logit", "q_l2"):
            key = f"layers.1.attention/{name}"
            assert halves[key] == pytest.approx(whole[key], rel=1e-9)
        logits.append(halves["layers.1.attention/entropy"])
    assert logits[0] == pytest.approx(logits[1], rel=1e-9)


def test_the_kernels_statistics_do_not_change_training() -> None:
    pytest.importorskip("triton")
    losses = []
    for every in (0, 1):
        model = tiny("qk_norm_cap", "stable_triton", torch.float32, num_hidden_layers=1)
        optimizer = Adam().build(model)
        losses.append([])
        with watch(model, optimizer, every=every) as watcher:
            for (batch,) in draw(2, 1):
                loss = model(use_cache=False, **batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                watcher.end_step()
                losses[-1].append(loss.item())
    assert losses[0] == losses[1]


def test_numbers_that_are_not_finite_are_told() -> None:
    model = tiny("soft_cap", dtype=torch.float32, num_hidden_layers=1, **CAPPED)
    with torch.no_grad():
        model.model.layers[0].self_attn.qkv_proj.weight[0, 0] = math.nan
    found = watched(model, draw(1))[0]
    assert math.isnan(found["layers.0.attention/max_logit"][0])
    assert math.isfinite(found["layers.0.attention/max_logit"][1])
    assert math.isnan(found["layers.0.attention/entropy"][0])
    assert math.isnan(found["head/log_z_mean"])


def test_the_backend_may_change_between_samples() -> None:
    model, batch = tiny(), draw(1, 1)[0][0]
    model.set_attn_implementation("eager")
    with watch(model, every=1, bounds_every=0) as watcher:
        model(**batch).loss.backward()
        eager = watcher.end_step()
        watcher.__exit__()
        model.set_attn_implementation("sdpa")
        watcher.__enter__()
        model.zero_grad()
        model(**batch).loss.backward()
        sdpa = watcher.end_step()
    name = "layers.1.attention/entropy"
    assert sdpa[name] == pytest.approx(eager[name], rel=1e-4)

"""Laws of QK-clip."""

from typing import Any

import pytest
import torch

from hf_stable.errors import RecipeError
from hf_stable.model.functional_stable_gpt import rotate
from hf_stable.qk_clip import QKClip, check_qk_clip, row_factors
from hf_stable.telemetry import watch

from ..techniques import build, tokens
from .steps import batch, loud, optimizer_of, weights

TAU = 1.5
HEADS: list[dict[str, Any]] = [{"num_key_value_heads": count} for count in (4, 2, 1)]
HEADS.append({"num_key_value_heads": 2, "linear_bias": "qkv"})


def _largest_logits(model: Any, inputs: list[torch.Tensor]) -> torch.Tensor:
    """(layers, H) from each layer's own input, so that layers below do not matter; plain torch."""
    found = []
    for layer, hidden in zip(model.model.layers, inputs, strict=True):
        attention, config = layer.self_attn, model.config
        query, key, _ = attention.qkv_proj(hidden).split(attention.widths, dim=-1)
        angles = model.model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
        query, key = (
            rotate(each.unflatten(-1, (-1, config.head_dim)).transpose(1, 2), *angles)
            for each in (query, key)
        )
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        scores = query @ key.transpose(-1, -2) * attention.scaling
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        found.append(scores.masked_fill(~causal, -torch.inf).amax((0, 2, 3)))
    return torch.stack(found)


def _inputs_of_attention(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    inputs: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: inputs.append((args or tuple(kwargs.values()))[0].detach()),
            with_kwargs=True,
        )
        for layer in model.model.layers
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    return inputs


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("fields", HEADS)
def test_clipped_heads_reach_the_threshold_and_others_stay(attn: str, fields: Any) -> None:
    model = loud(attn=attn, **fields)
    ids, before = tokens(), weights(model)
    inputs = _inputs_of_attention(model, ids)
    with torch.no_grad():
        truth = _largest_logits(model, inputs)
    over = truth > TAU
    assert over.any(1).all()
    assert not over.all(1).any()
    with QKClip(model, TAU) as qk_clip:
        model(ids, labels=ids)
        torch.testing.assert_close(qk_clip.clip(), truth)
    with torch.no_grad():
        after = _largest_logits(model, inputs)
    torch.testing.assert_close(after[over], torch.full_like(after[over], TAU))
    # Query heads below the threshold: the same logits, from the same weights, bit by bit.
    assert after[~over].equal(truth[~over])
    for index, layer in enumerate(model.model.layers):
        name = f"model.layers.{index}.self_attn.qkv_proj.weight"
        rows, old = (
            each.unflatten(0, (-1, model.config.head_dim))
            for each in (layer.self_attn.qkv_proj.weight, before[name])
        )
        changed = (rows != old).flatten(1).any(1)
        assert changed[:4].equal(over[index])
        shared = over[index].view(fields["num_key_value_heads"], -1).all(1)
        assert changed[4:].equal(torch.cat((shared, torch.zeros_like(shared))))
    assert all(before[name].equal(p) for name, p in model.named_parameters() if "qkv" not in name)


def test_a_kernel_says_what_the_reference_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    found = {}
    for attn in ("eager", "stable_triton"):
        if attn == "stable_triton":
            monkeypatch.delattr("hf_stable.qk_clip.note_logits")
        model = loud(attn=attn).float()
        with QKClip(model, TAU) as qk_clip:
            model(**batch())
            found[attn] = qk_clip.clip(), torch.cat([each.flatten() for each in model.parameters()])
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_queries_and_keys_shrink_alike_where_each_has_its_own() -> None:
    factors = row_factors(torch.tensor([2.0, 8.0, -3.0]).double(), 2.0, 3)
    assert factors.tolist() == pytest.approx([1, 0.5, 1, 1, 0.5, 1])


def test_query_heads_of_one_key_head_carry_what_they_do_not_share() -> None:
    factors = row_factors(torch.tensor([4.0, 16.0, 1.0, 8.0]).double(), 1.0, 2)
    assert factors.tolist() == pytest.approx([0.5, 0.125, 1, 0.125, 0.5, 1])


def test_logits_that_are_not_finite_clip_nothing() -> None:
    largest = torch.tensor([torch.nan, torch.inf, -torch.inf]).double()
    assert row_factors(largest, 1.0, 3).equal(torch.ones(6).double())


def test_all_microbatches_count_and_validation_and_forgotten_steps_do_not() -> None:
    model = loud()
    one, other = tokens(), tokens(seed=1)
    with QKClip(model, 1e9) as qk_clip:
        alone = []
        for ids in (one, other):
            model(ids)
            alone.append(qk_clip.clip())
        model.eval()(tokens(seed=2))
        model.train()(tokens(seed=3))
        qk_clip.forget()
        for ids in (one, other):
            model(ids)
        assert qk_clip.clip().equal(torch.maximum(*alone))
        assert qk_clip.clip().isneginf().all()


@pytest.mark.parametrize("kind", ["plain", "checkpointing", "padding"])
def test_a_threshold_out_of_reach_changes_nothing(kind: str) -> None:
    models = [loud(), loud()]
    inputs = batch()
    if kind == "padding":
        inputs["attention_mask"] = torch.ones(4, 13).long()
        inputs["attention_mask"][0, 6:] = 0
    for model, threshold in zip(models, (1e9, None), strict=True):
        if kind == "checkpointing":
            model.gradient_checkpointing_enable()
        optimizer = optimizer_of(model)
        if threshold is None:
            model(**inputs).loss.backward()
            optimizer.step()
            continue
        with QKClip(model, threshold) as qk_clip:
            model(**inputs).loss.backward()
            optimizer.step()
            qk_clip.clip()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert one.equal(other)
        assert one.grad.equal(other.grad)


def test_hidden_tokens_are_no_logits() -> None:
    model = loud(num_hidden_layers=1)
    ids, mask = tokens(1), torch.ones(1, 13).long()
    mask[:, 6:] = 0
    with QKClip(model, 1e9) as qk_clip:
        model(ids[:, :6])
        short = qk_clip.clip()
        model(ids)
        assert not torch.allclose(qk_clip.clip(), short)
        model(ids, attention_mask=mask)
        # A query that is padding itself sees the tokens before it. A product of 13 rows may round
        # otherwise than one of 6: by a unit for each of the 8 products of a score.
        rounding = 8 * torch.finfo(torch.float64).eps
        assert (qk_clip.clip() >= short * (1 - rounding * short.sign())).all()


def test_telemetry_sees_the_same_inside() -> None:
    numbers = []
    for threshold in (None, 1e9):
        model = loud()
        optimizer = optimizer_of(model)
        clip = None if threshold is None else QKClip(model, threshold).__enter__()
        with watch(model, optimizer, every=1) as watcher:
            model(**batch()).loss.backward()
            optimizer.step()
            numbers.append(watcher.end_step())
        if clip is not None:
            largest = clip.clip()
            clip.__exit__()
            found = [numbers[1][f"layers.{index}.attention/max_logit"] for index in range(2)]
            assert largest.tolist() == found
    assert numbers[0] == numbers[1]


def test_the_model_is_left_as_it_was() -> None:
    model = loud()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    logits = model(tokens()).logits
    with pytest.raises(KeyboardInterrupt), QKClip(model, TAU):
        raise KeyboardInterrupt
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert model(tokens()).logits.equal(logits)


@pytest.mark.parametrize(
    ("fields", "name"),
    [({"qk_norm": "head"}, "model.qk_norm is head"), ({"sigma_reparam": True}, "sigma_reparam")],
)
def test_what_undoes_it_is_refused_by_name(fields: Any, name: str) -> None:
    with pytest.raises(RecipeError, match=f"optimizer.qk_clip .*{name}"):
        QKClip(build(**fields), 100.0)
    check_qk_clip(build(v_norm="head", attn_logit_softcapping=2.0).config)

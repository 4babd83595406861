"""Presets on every attention backend, and how backends are chosen and changed.

Every backend and mask against the float64 reference, and refusals of caps and clips by name:
tests/model/test_modeling.py. Kernels: tests/kernels.
"""

import pytest
import torch

from ..flex import trace_only
from .models import EAGER_ONLY, PRESETS, make, prompt

BACKENDS = ["eager", "sdpa", "flex_attention"]
SUPPORTED = {
    preset: [
        backend
        for backend in BACKENDS
        if backend == "eager"
        or (backend == "sdpa" and preset not in EAGER_ONLY)
        or (backend == "flex_attention" and preset != "soft_clip")
    ]
    for preset in PRESETS
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_backends_agree_or_refuse_by_name(
    preset: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace_only(monkeypatch)
    ids = prompt(length=9)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = 0
    arguments = {"attention_mask": mask} if padded else {}
    kept, logits = mask.bool(), {}
    for backend in BACKENDS:
        if backend not in SUPPORTED[preset]:
            with pytest.raises(ValueError, match=f'"{backend}" cannot do {EAGER_ONLY[preset]}'):
                make(preset, attn=backend)
            continue
        with torch.no_grad():
            logits[backend] = make(preset, attn=backend)(ids, **arguments).logits[kept]
    for each in logits.values():
        torch.testing.assert_close(each, logits["eager"], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("preset", PRESETS)
def test_backends_agree_in_their_gradients(preset: str) -> None:
    # flex has no backward on a CPU.
    gradients = []
    for backend in SUPPORTED[preset][:2]:
        if backend == "flex_attention":
            continue
        model = make(preset, attn=backend).train()
        model(prompt(), labels=prompt()).loss.backward()
        gradients.append({name: each.grad for name, each in model.named_parameters()})
    for name, gradient in gradients[-1].items():
        torch.testing.assert_close(gradient, gradients[0][name], atol=1e-5, rtol=1e-3)
    assert len(gradients) == (1 if preset in EAGER_ONLY else 2)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_default_backend_is_the_fastest_that_can(preset: str, tmp_path) -> None:
    default = "eager" if preset in EAGER_ONLY else "sdpa"
    model = make(preset)
    assert model.config._attn_implementation == default
    model.save_pretrained(tmp_path)
    assert "attn_implementation" not in (tmp_path / "config.json").read_text()
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == default


@pytest.mark.parametrize("preset", PRESETS)
def test_a_running_model_changes_its_backend(preset: str) -> None:
    model = make(preset, attn="eager")
    with torch.no_grad():
        expected = model(prompt()).logits
        for backend in ("sdpa", "eager", "sdpa"):
            if backend not in SUPPORTED[preset]:
                continue
            model.set_attn_implementation(backend)
            assert model.model.config._attn_implementation == backend
            torch.testing.assert_close(model(prompt()).logits, expected, atol=2e-5, rtol=1e-4)


def test_a_technique_switched_on_at_loading_chooses_again(tmp_path) -> None:
    make("baseline").save_pretrained(tmp_path)
    kind = type(make("baseline"))
    capped = kind.from_pretrained(tmp_path, attn_logit_softcapping=30.0)
    assert capped.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match=r"cannot do attn_logit_softcapping=30\.0"):
        kind.from_pretrained(tmp_path, attn_logit_softcapping=30.0, attn_implementation="sdpa")


@pytest.mark.slow
def test_flex_refuses_a_static_cache_nowhere_in_silence() -> None:
    """Either the tokens of the eager function, or an error: never other tokens."""
    model = make("qk_norm_cap", attn="flex_attention")
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = make("qk_norm_cap", attn="eager").generate(prompt(), **options)
    assert torch.equal(model.generate(prompt(), **options), expected)
    try:
        generated = model.generate(prompt(), cache_implementation="static", **options)
    except Exception as error:
        assert "BlockMask" in str(error) or "block_mask" in str(error), error
    else:
        assert torch.equal(generated, expected)

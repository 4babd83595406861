"""Which backend a model gets: by what there is to compute, and never one that refuses it."""

import importlib.machinery
import importlib.util
from typing import Any

import pytest
import torch

from hf_stable import StableGPTConfig, StableGPTForCausalLM
from hf_stable.kernels import backends
from hf_stable.model.configuration_stable_gpt import PRESETS
from hf_stable.model.loss_stable_gpt import LINEAR_CROSS_ENTROPY_FUNCTIONS

from ..techniques import GEOMETRY

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))
PLAIN: dict[str, Any] = {}
CAP, CLIP = {"attn_logit_softcapping": 50.0}, {"attention_clip_gamma": -0.03}
ALPHA, DROPOUT = {"attention_clip_alpha": 0.9}, {"attention_dropout": 0.1}
WIDE, WIDEST = {"head_dim": 512}, {"head_dim": 256}

# fields, device, packed documents, Triton installed, backend
CASES = [
    (PLAIN, CUDA, False, True, "sdpa"),
    (PLAIN, CUDA, True, True, "stable_triton"),
    (PLAIN, CUDA, True, False, "sdpa"),
    (PLAIN, CPU, False, True, "sdpa"),
    (PLAIN, CPU, True, True, "sdpa"),
    (CAP, CUDA, False, True, "stable_triton"),
    (CAP, CUDA, True, True, "stable_triton"),
    (CAP, CUDA, False, False, "eager"),
    (CAP, CPU, False, True, "eager"),
    (CAP, MPS, False, True, "eager"),
    (CLIP, CUDA, False, True, "stable_triton"),
    (CLIP, CPU, False, True, "eager"),
    (ALPHA, CUDA, False, True, "stable_triton"),
    ({**CAP, **CLIP}, CUDA, False, True, "stable_triton"),
    (DROPOUT, CUDA, False, True, "sdpa"),
    (DROPOUT, CUDA, True, True, "sdpa"),
    ({**CAP, **DROPOUT}, CUDA, False, True, "eager"),
    ({**CAP, **WIDEST}, CUDA, False, True, "stable_triton"),
    ({**CAP, **WIDE}, CUDA, False, True, "eager"),
    (WIDE, CUDA, True, True, "sdpa"),
]


def _config(fields: dict[str, Any]) -> StableGPTConfig:
    return StableGPTConfig(**GEOMETRY, **fields)


def _triton(monkeypatch: pytest.MonkeyPatch, present: bool) -> None:
    spec = importlib.machinery.ModuleSpec("triton", None) if present else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.parametrize(("fields", "device", "packed", "triton", "name"), CASES)
def test_the_work_chooses_the_backend(fields, device, packed, triton, name, monkeypatch) -> None:
    _triton(monkeypatch, triton)
    assert backends.default_attention(_config(fields), device, packed=packed) == name


@pytest.mark.parametrize("fields", [{}, CAP, CLIP, DROPOUT, {**CAP, **DROPOUT}], ids=str)
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_a_default_is_never_refused_by_the_model(fields, device) -> None:
    name = backends.default_attention(_config(fields), device, packed=False)
    model = StableGPTForCausalLM._from_config(_config(fields), attn_implementation=name)
    assert model.config._attn_implementation == name


@pytest.mark.parametrize("preset", PRESETS)
def test_away_from_the_kernels_it_is_what_transformers_chooses(preset: str) -> None:
    config = StableGPTConfig.from_preset(preset, **GEOMETRY)
    name = backends.default_attention(config, CPU, packed=False)
    assert StableGPTForCausalLM._from_config(config).config._attn_implementation == name


@pytest.mark.parametrize(
    ("fields", "device", "triton", "reason"),
    [
        (PLAIN, CUDA, True, "plain attention"),
        (CAP, CUDA, True, "fuses a cap or clip"),
        (CAP, CPU, True, "for a cap or clip; the fused kernels need a CUDA GPU"),
        (CAP, CUDA, False, "for a cap or clip; Triton is not installed"),
        ({**CLIP, **DROPOUT}, CUDA, True, "attention_dropout"),
        ({**CAP, **WIDE}, CUDA, True, "head_dim up to 256"),
    ],
)
def test_the_reason_names_what_decided(fields, device, triton, reason, monkeypatch) -> None:
    _triton(monkeypatch, triton)
    assert reason in backends.choose_attention(_config(fields), device, packed=False)[1]


@pytest.mark.parametrize(
    ("name", "device", "reason"),
    [
        ("flex_attention", CPU, "CPU: leave it null"),
        ("stable_triton", CPU, "CUDA device, found cpu: leave it null"),
        ("stable_triton_fast_tanh", MPS, "CUDA device, found mps: leave it null"),
    ],
)
def test_what_cannot_train_there_is_refused(name, device, reason, monkeypatch) -> None:
    tiles = pytest.importorskip("hf_stable.kernels.tiles")
    monkeypatch.setattr(tiles, "INTERPRETED", False)
    with pytest.raises(ValueError, match=reason):
        backends.check_attention(name, device)


def test_what_can_train_there_is_not(monkeypatch) -> None:
    tiles = pytest.importorskip("hf_stable.kernels.tiles")
    monkeypatch.setattr(tiles, "INTERPRETED", True)
    for name, device in [
        (None, CPU),
        ("sdpa", CPU),
        ("eager", CPU),
        ("flex_attention", CUDA),
        ("stable_triton", CUDA),
        ("stable_triton_fast_tanh", CUDA),
        ("stable_triton_unbiased", CUDA),
        ("stable_triton", CPU),  # interpreted
        ("stable_triton_unbiased", CPU),
    ]:
        backends.check_attention(name, device)
    with pytest.raises(ValueError, match="CUDA device"):  # no hardware to approximate tanh
        backends.check_attention("stable_triton_fast_tanh", CPU)


@pytest.mark.parametrize(
    "name", ["stable_triton", "stable_triton_fast_tanh", "stable_triton_unbiased"]
)
@pytest.mark.parametrize("fields", [DROPOUT, WIDE])
def test_a_model_that_kernels_cannot_train_is_refused(name: str, fields) -> None:
    field, value = next(iter(fields.items()))
    with pytest.raises(ValueError, match=rf"{field}.*here {value}.*leave it null"):
        backends.check_model(name, _config(fields))
    backends.check_model(name, _config({}))
    backends.check_model("eager", _config(fields))


def test_kernels_need_triton(monkeypatch) -> None:
    _triton(monkeypatch, present=False)
    with pytest.raises(ValueError, match="Triton is not installed"):
        backends.check_attention("stable_triton", CPU)


def test_the_loss_is_the_one_that_is_registered(monkeypatch) -> None:
    assert backends.loss_implementation(CPU) == "eager"
    monkeypatch.setitem(LINEAR_CROSS_ENTROPY_FUNCTIONS, "mps", lambda *args: None)
    assert backends.loss_implementation(MPS) == "stable_triton"

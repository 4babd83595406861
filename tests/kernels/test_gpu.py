"""What only a GPU can show: bf16 on tensor cores at full tile sizes, and the hardware's tanh."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_stable import StableGPTConfig, StableGPTForCausalLM
from hf_stable.kernels.attention import flash_attention
from hf_stable.kernels.backends import default_attention
from hf_stable.kernels.blocks import BLOCKS, Blocks
from hf_stable.kernels.documents import build_documents

from .reference import assert_as_good_as_plain, dense, draw, error, plain

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
sys.path.insert(0, str(BENCH))  # the benchmarks are scripts that import their neighbours

from attention_tune import CANDIDATES  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cap": {"softcap": 50.0},
    "large cap": {"softcap": 100.0},
    "clip": {"clip_gamma": -0.03, "clip_zeta": 1.03},
    "cap, clip": {"softcap": 50.0, "clip_alpha": 4.0, "clip_zeta": 1.03},
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("width", [32, 64, 80, 128, 256])
@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_errs_no_more_than_the_eager_formula(form, width, packed) -> None:
    inputs = draw((2, 4, 2, 777, width), torch.bfloat16)
    score = {"scaling": 1 / math.sqrt(width), **FORMS[form]}
    starts = torch.zeros(2, 777, dtype=torch.bool, device="cuda")
    starts[0, [5, 300, 301]] = True
    documents = build_documents(starts) if packed else None
    mask = dense(documents) if documents is not None else None
    output, _ = flash_attention(*inputs.tensors, documents=documents, **score)
    assert_as_good_as_plain(inputs.gradients(output), inputs, mask, times=1.0, **score)


@pytest.mark.parametrize(
    ("kernel", "tiles"), [(kernel, each) for kernel in CANDIDATES for each in CANDIDATES[kernel]]
)
def test_tiles_that_are_tried_for_speed_are_right(kernel, tiles, monkeypatch) -> None:
    """In parallel they are also compiled in parallel, before `scripts/gpu_first.sh` times them."""
    monkeypatch.setitem(BLOCKS, (kernel, 64, False), Blocks(*tiles))
    inputs = draw((2, 4, 4, 1008, 64), torch.bfloat16)
    score: dict[str, Any] = {"scaling": 0.125, "softcap": 50.0}
    output, _ = flash_attention(*inputs.tensors, **score)
    assert_as_good_as_plain(inputs.gradients(output), inputs, None, **score)


def test_the_hardware_tanh_errs_as_much_as_its_eleven_bits() -> None:
    """At most three times the eager formula's error, FlashAttention's own criterion for it."""
    inputs = draw((2, 4, 4, 512, 64), torch.bfloat16)
    score: dict[str, Any] = {"scaling": 0.125, "softcap": 5.0}
    output, _ = flash_attention(*inputs.tensors, fast_tanh=True, **score)
    double, same = inputs.to(torch.float64), inputs.to(torch.bfloat16)
    exact = double.gradients(plain(double, None, **score))
    eager = same.gradients(plain(same, None, **score))
    for ours, theirs, truth in zip(inputs.gradients(output), eager, exact, strict=True):
        assert error(ours, truth) <= 3 * error(theirs, truth)


@pytest.mark.parametrize("preset", ["baseline", "qk_norm_cap", "soft_clip", "sigma_reparam"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_bf16_training_step_equals_eager_up_to_rounding(preset: str, compiled: bool) -> None:
    losses = []
    ids = torch.randint(0, 1003, (2, 256), device="cuda")
    for backend in ("eager", "stable_triton"):
        torch.manual_seed(0)
        config = StableGPTConfig.from_preset(
            preset,
            vocab_size=1003,
            hidden_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
        )
        model = StableGPTForCausalLM._from_config(config, attn_implementation=backend).cuda()
        if compiled:
            for layer in model.model.layers:
                layer.compile(fullgraph=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        assert all(grad is None or grad.isfinite().all() for grad in gradients)
        losses.append(loss.item())
    assert abs(losses[0] - losses[1]) < 1e-2


def test_a_capped_model_trains_by_our_kernel_by_default() -> None:
    capped = StableGPTConfig.from_preset("soft_cap")
    chosen = default_attention(capped, torch.device("cuda"), packed=False)
    assert chosen == "stable_triton"

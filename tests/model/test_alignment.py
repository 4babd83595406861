"""No bit depends on where weights lie in memory, where that is promised.

The laws on sigma hold for any BLAS. Those on logits need aligned copies, or MKL_CBWR=AUTO, under
which the suite runs; `scripts/cpu_matrix.sh` runs this file without it.
"""

import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_stable.checkpoints.state import put_tensors, tensors_of
from hf_stable.model.functional_stable_gpt import matrix_vector, power_iteration, spectral_norm
from hf_stable.model.sigma_stable_gpt import StableGPTSigmaLinear

from ..alignment import OFFSETS, at_offset, place
from ..checkpoints.models import make_model, make_optimizer, train, whole_state
from ..host.models import PRESETS, make, prompt

# Odd and even widths, and more rows than a vector has lanes.
SHAPES = [(32, 32), (61, 32), (48, 33), (1, 7), (300, 96)]


def _logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(prompt()).logits


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sigma_does_not_depend_on_addresses(shape) -> None:
    weight, u, v = torch.randn(shape), torch.randn(shape[0]), torch.randn(shape[1])
    sigma, product = spectral_norm(weight, u, v), matrix_vector(weight, v)
    vectors = power_iteration(weight, u, v, steps=3)
    for offset in OFFSETS:
        weight, u, v = (at_offset(each, offset) for each in (weight, u, v))
        assert weight.data_ptr() % 64 == offset
        assert torch.equal(spectral_norm(weight, u, v), sigma)
        assert torch.equal(matrix_vector(weight, v), product)
        found = power_iteration(weight, u, v, steps=3)
        assert all(torch.equal(one, other) for one, other in zip(found, vectors, strict=True))


def test_an_effective_weight_does_not_depend_on_addresses() -> None:
    model = make("sigma_reparam")
    layer = next(each for each in model.modules() if isinstance(each, StableGPTSigmaLinear))
    weight = layer.effective_weight()
    for offset in OFFSETS:
        place(model, offset)
        assert torch.equal(layer.effective_weight(), weight)


@pytest.mark.parametrize("preset", PRESETS)
def test_aligned_copies_give_the_same_logits(preset: str, tmp_path) -> None:
    model = make(preset)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for offset in OFFSETS:
        place(loaded, offset)
        # Within rounding as it lies: two sums of as many products as the widest matrix has columns.
        bound = 4 * 48 * torch.finfo(torch.float32).eps
        torch.testing.assert_close(_logits(loaded), _logits(model), rtol=bound, atol=bound)
        assert torch.equal(_logits(place(loaded)), _logits(model))


@pytest.mark.parametrize("offset", OFFSETS)
def test_restoring_a_checkpoint_keeps_addresses_and_bits(offset: int) -> None:
    """Resume and rollback copy into memory that is there, wherever the files were mapped to."""
    model = make_model()
    optimizer = make_optimizer(model)
    train(model, optimizer, range(2))
    tensors, groups = tensors_of(model, optimizer)
    saved = {name: at_offset(each, offset) for name, each in tensors.items()}
    torch.manual_seed(0)
    train(model, optimizer, range(2, 4))
    expected = whole_state(model, optimizer)
    addresses = [each.data_ptr() for each in (*model.parameters(), *model.buffers())]
    put_tensors(model, optimizer, saved, groups)
    assert [each.data_ptr() for each in (*model.parameters(), *model.buffers())] == addresses
    torch.manual_seed(0)
    train(model, optimizer, range(2, 4))
    found = whole_state(model, optimizer)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_command_line_asks_mkl_for_the_same_bits() -> None:
    program = "import os; from hf_stable import cli; print(os.environ.get('MKL_CBWR'))"
    for given, expected in ((None, "AUTO"), ("COMPATIBLE", "COMPATIBLE")):
        environment = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}
        if given is not None:
            environment["MKL_CBWR"] = given
        answer = subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert answer.stdout.strip() == expected

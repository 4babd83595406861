"""int8 weights by torchao, which only `.ci/run` installs (CONTRIBUTING, rules of clients)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, TorchAoConfig

from tests.tiny import stable_gpt

torchao = pytest.importorskip("torchao.quantization")


def test_int8_weights_of_the_guide_give_almost_the_same_logits(
    lines: Callable[[str, str], str], folder: Path
) -> None:
    scope: dict[str, Any] = {}
    exec(lines("torchao", "python"), scope)
    quantized = scope["quantized"].eval()
    maps = [module for module in quantized.model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(maps) == 8
    assert all(isinstance(each.weight, torchao.Int8Tensor) for each in maps)
    ids = torch.arange(64).reshape(2, 32)
    exact: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        wanted, found = exact(ids).logits, quantized(ids).logits
    assert not torch.equal(wanted, found)
    assert (found - wanted).square().mean().sqrt() < 0.05 * wanted.std()


@pytest.mark.parametrize("loader", [AutoModel, AutoModelForCausalLM])
def test_quantizing_sigma_reparam_is_refused_and_folded_works(loader: Any, tmp_path: Path) -> None:
    int8 = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    model = stable_gpt(sigma_reparam=True).eval()
    model.save_pretrained(tmp_path / "sigma")
    with pytest.raises(ValueError, match=r"sigma_reparam=True.*fold_sigma_reparam"):
        loader.from_pretrained(tmp_path / "sigma", quantization_config=int8)
    model.fold_sigma_reparam().save_pretrained(tmp_path / "folded")
    quantized = loader.from_pretrained(tmp_path / "folded", quantization_config=int8).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        wanted = (model if loader is AutoModelForCausalLM else model.model)(ids)[0]
        found = quantized(ids)[0]
    assert (found - wanted).square().mean().sqrt() < 0.05 * wanted.std()

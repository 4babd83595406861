"""Laws of shards in bf16, on a mesh of one process: what is rounded is what autocast rounds."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_stable import parallel
from hf_stable.model.functional_stable_gpt import whole
from hf_stable.sharding import Sharding

from .techniques import build, relative_error, tokens

FIELDS: dict[str, dict[str, Any]] = {
    "norms": {"qk_norm": "head", "attention_post_norm": True, "linear_bias": "all"},
    "layer_scale": {"layer_scale": 0.3},
    "sigma_reparam": {"sigma_reparam": True},
}


def _off_the_grid(model: Any) -> Any:
    """Move gains and vectors to where bf16 has no numbers."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.mul_(1 + 0.01 * torch.rand(parameter.shape, generator=generator))
    return model


def _loss_and_gradients(model: Any, accelerator: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    ids = tokens(2, 13)
    with accelerator.autocast():
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    named = parallel.unwrap_model(model).named_parameters()
    return loss.detach(), {name: whole(each.grad) for name, each in named}


@pytest.mark.parametrize("name", FIELDS)
def test_shards_round_what_whole_copies_round(name: str, tmp_path: Path) -> None:
    accelerator = parallel.build_accelerator("bf16", [], str(tmp_path), timedelta(minutes=1))
    found = []
    for kind in ("ddp", "fsdp2"):
        model = _off_the_grid(build(**FIELDS[name]).float().train())
        sharding = Sharding(kind, 1, 1, reshard_after_forward=True)
        wrapped, _ = parallel.wrap(
            model, lambda it: torch.optim.AdamW(it.parameters()), accelerator, sharding
        )
        found.append(_loss_and_gradients(wrapped, accelerator))
    (one, gradients), (other, others) = found
    assert other.equal(one)
    for key, gradient in gradients.items():
        assert others[key].dtype == torch.float32
        if key == "lm_head.weight":  # rounded once, as every gradient of a matrix is
            assert relative_error(others[key], gradient) < 2**-8
        else:
            assert others[key].equal(gradient), key

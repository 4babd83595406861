"""Laws of shards in bf16, on a mesh of one process: what is rounded is what autocast rounds."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from hf_stable import parallel
from hf_stable.model.functional_stable_gpt import whole
from hf_stable.sharding import Sharding

from .techniques import build, relative_error, tokens


def _off_the_grid(model: Any) -> Any:
    """Move vectors to where bf16 has no numbers."""
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


def test_shards_of_sigma_reparam_round_what_whole_copies_round(tmp_path: Path) -> None:
    accelerator = parallel.build_accelerator("bf16", [], str(tmp_path), timedelta(minutes=1))
    found = []
    for kind in ("ddp", "fsdp2"):
        fields: dict[str, Any] = {"sigma_reparam": True, "qk_norm": "head", "linear_bias": "all"}
        model = _off_the_grid(build(**fields).float().train())
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

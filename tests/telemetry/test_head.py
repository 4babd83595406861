"""Laws of what telemetry says of the head: log Z and logits, however the loss is made."""

import math
from typing import Any

import pytest
import torch

from hf_stable.model import loss_stable_gpt
from hf_stable.model.loss_stable_gpt import LINEAR_CROSS_ENTROPY_FUNCTIONS
from hf_stable.telemetry import head as head_module
from hf_stable.telemetry import watch

from .reference import Adam, Reference
from .steps import VOCAB_SIZE, assert_numbers, draw, exact_copy, tiny, watched

SETTINGS = [{}, {"z_loss": 0.01}, {"z_loss": 0.01, "final_logit_softcapping": 1.5}]
BATCH = draw(1)[0][0]


def _one_step(model: Any, **given: Any) -> dict[str, Any]:
    with watch(model, every=1, bounds_every=0) as watcher:
        output = model(**{**BATCH, **given})
        loss = output.loss
        if loss is None:
            loss = torch.nn.functional.cross_entropy(
                output.logits[:, :-1].flatten(0, 1), BATCH["labels"][:, 1:].flatten()
            )
        loss.backward()
        return watcher.end_step()


def _only_head(numbers: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in numbers.items() if name.startswith("head/")}


@pytest.mark.parametrize("fields", SETTINGS, ids=str)
@pytest.mark.parametrize("kernel", [False, True])
def test_numbers_do_not_depend_on_chunks_or_on_who_makes_the_loss(
    fields: dict[str, Any], kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of five rows; by the plain loop, and by the kernel that a GPU has, interpreted."""
    model = tiny(dtype=torch.float32 if kernel else torch.float64, **fields)
    reference = Reference(exact_copy(model), Adam())
    monkeypatch.setattr(loss_stable_gpt, "CHUNK_ROWS", 5)
    monkeypatch.setitem(loss_stable_gpt.CHUNK_BYTES, "cpu", 4 * 5 * VOCAB_SIZE)
    if kernel:
        pytest.importorskip("triton")
        from hf_stable.kernels.linear_cross_entropy import linear_cross_entropy  # noqa: PLC0415

        functions = LINEAR_CROSS_ENTROPY_FUNCTIONS._local_mapping
        monkeypatch.setitem(functions, "cpu", linear_cross_entropy)
    batches = draw(1)[0]
    found = watched(model, [batches], bounds_every=0)[0]
    expected = reference.step(batches, with_bounds=False)
    assert_numbers(found, expected, 1e-4 if kernel else 1e-9)


def test_a_microbatch_without_targets_adds_no_target() -> None:
    model = tiny("z_loss", z_loss=0.01)
    reference = Reference(exact_copy(model), Adam())
    batches = draw(1)[0]
    batches[1]["labels"] = torch.full_like(batches[1]["labels"], -100)
    found = watched(model, [batches], bounds_every=0)[0]
    assert_numbers(found, reference.step(batches, with_bounds=False), 1e-9)


@pytest.mark.parametrize("fields", SETTINGS, ids=str)
def test_logits_beside_the_loss_change_no_number(fields: dict[str, Any]) -> None:
    """`skip_logits=False` runs the head a second time, for whoever asked for logits."""
    assert _one_step(tiny(**fields), skip_logits=False) == _one_step(tiny(**fields))


@pytest.mark.parametrize("fields", SETTINGS[::2], ids=str)
def test_a_loss_of_the_users_own_has_log_z_of_all_positions(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_module, "_ROWS", 5)
    model = tiny(**fields)
    with torch.no_grad():
        logits = model(BATCH["input_ids"]).logits
        uncapped = model.lm_head(model.model(BATCH["input_ids"]).last_hidden_state)
    found = _one_step(model, labels=None)
    assert found["head/log_z_mean"] == pytest.approx(logits.logsumexp(-1).mean().item(), rel=1e-9)
    assert found["head/log_z_max"] == pytest.approx(logits.logsumexp(-1).max().item(), rel=1e-9)
    # The names promise the logits before their cap.
    assert found["head/logit_max"] == pytest.approx(uncapped.max().item(), rel=1e-9)
    assert found["head/logit_mean"] == pytest.approx(uncapped.mean().item(), rel=1e-9)
    assert "head/z_loss" not in found


def test_bf16_tells_what_the_loss_used() -> None:
    """Under autocast logits are bf16; log Z is of these, in fp32."""
    model = tiny("z_loss", dtype=torch.float32, z_loss=0.01)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**BATCH, skip_logits=False)
        log_z = output.logits[:, :-1].float().logsumexp(-1)[BATCH["labels"][:, 1:] != -100]
        found = _one_step(model)
    assert found["head/log_z_mean"] == pytest.approx(log_z.mean().item(), rel=1e-5)
    assert found["head/log_z_max"] == pytest.approx(log_z.max().item(), rel=1e-5)
    assert found["head/logit_max"] == output.logits.max().item()
    assert found["head/z_loss"] == pytest.approx(output.z_loss.item(), rel=1e-6)


def test_infinite_logits_are_told() -> None:
    model = tiny(dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[5] = math.inf
    found = _only_head(_one_step(model))
    assert not math.isfinite(found["head/logit_max"])
    assert not math.isfinite(found["head/log_z_mean"])

"""Faults of memory and data in a real run, on the ranks that are to have them, and what each rank
made of them."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hf_stable import parallel, runs, stepping, training
from hf_stable.guard import Decision, Guard, Observation
from hf_stable.optim.shards import held
from hf_stable.runs import Run
from hf_stable.stepping import Step, Stepper

from ..test_survival import corrupt

RANK = int(os.environ.get("RANK", "0"))
# A draw of tokens that covers the whole text of a tiny run.
ALL_TOKENS = 10**7


@dataclass(frozen=True)
class Fault:
    """Which of FAULTS, or "labels" for random targets in twenty steps' samples.

    Args:
        step: the first that it is in, counted from 1; a rollback does not bring it back.
        ranks: that have it.
    """

    kind: str
    step: int
    ranks: tuple[int, ...] = (0,)


def _embedding(run: Run) -> torch.nn.Embedding:
    return parallel.unwrap_model(run.model).model.embed_tokens


@contextlib.contextmanager
def _batch(run: Run) -> Iterator[None]:
    """What comes out of the embedding, and with it the rank's loss and gradients."""
    hook = _embedding(run).register_forward_hook(lambda _, __, output: output * math.nan)
    yield
    hook.remove()


@contextlib.contextmanager
def _gradient(value: float) -> Iterator[None]:
    """One number of the rank's gradients, after they were summed over ranks."""
    clip = stepping.optim.clip_gradients

    def poisoned(model: Any, *others: Any) -> torch.Tensor:
        held(next(model.parameters()).grad).view(-1)[0] = value
        return clip(model, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stepping.optim, "clip_gradients", poisoned)
        yield


@contextlib.contextmanager
def _flip(run: Run) -> Iterator[None]:
    """A bit of every number of the head, which is 16 times as large then, or small."""
    held(parallel.unwrap_model(run.model).lm_head.weight).view(torch.int32).bitwise_xor_(1 << 25)
    yield


@contextlib.contextmanager
def _weight(run: Run, used: bool) -> Iterator[None]:
    """One number of the embedding, in the row of the commonest token or of one that never comes."""
    tokens = run.corpus.train_tokens.sample(ALL_TOKENS)
    counts = np.bincount(tokens, minlength=run.config.vocab_size)
    row = int(counts.argmax() if used else counts.argmin())
    assert used or not counts[row]
    held(_embedding(run).weight.detach())[row, 0] = math.nan
    yield


@contextlib.contextmanager
def _moment(run: Run) -> Iterator[None]:
    """One number of Adam's first moment of a block's weight."""
    block = parallel.unwrap_model(run.model).model.layers[0]
    matrix = next(weight for weight in block.parameters() if weight.ndim == 2)
    held(run.optimizer.state[matrix]["exp_avg"]).view(-1)[0] = math.nan
    yield


FAULTS: dict[str, Callable[[Run], contextlib.AbstractContextManager[None]]] = {
    "batch": _batch,
    "gradient": lambda run: _gradient(math.nan),
    "infinite_gradient": lambda run: _gradient(math.inf),
    "flip": _flip,
    "weight": lambda run: _weight(run, used=True),
    "unused_weight": lambda run: _weight(run, used=False),
    "moment": _moment,
}


@contextlib.contextmanager
def faulty(fault: Fault) -> Iterator[None]:
    """Runs inside have the fault; each rank of one that ends well leaves rank-R.safetensors with
    the weights and moments that it holds, and rank-R.json with all that its guard decided and
    remembers."""
    with pytest.MonkeyPatch.context() as patch:
        _witness(patch)
        if RANK in fault.ranks and fault.kind == "labels":
            corrupt(patch, fault.step, fault.step + 20)
        elif RANK in fault.ranks:
            _put(patch, fault)
        yield


def _put(patch: pytest.MonkeyPatch, fault: Fault) -> None:
    take, steps = Stepper.take, {fault.step - 1}

    def taken(self: Stepper, step: int, stop_requested: bool) -> Step:
        if step not in steps:
            return take(self, step, stop_requested)
        steps.remove(step)
        with FAULTS[fault.kind](self._run):
            return take(self, step, stop_requested)

    patch.setattr(Stepper, "take", taken)


def _witness(patch: pytest.MonkeyPatch) -> None:
    judge, save, decisions = Guard.judge, runs.save_model, []

    def judged(self: Guard, seen: Observation) -> Decision:
        decisions.append(judge(self, seen))
        return decisions[-1]

    def saved(run: Run) -> Any:
        weights = dict(run.model.named_parameters())
        tensors = weights | {
            f"{name} {moment}": run.optimizer.state[weight][moment]
            for name, weight in weights.items()
            for moment in ("exp_avg", "exp_avg_sq")
        }
        mine = {name: held(tensor).clone() for name, tensor in tensors.items()}
        save_file(mine, run.folder / f"rank-{RANK}.safetensors")
        found = {"decisions": [asdict(each) for each in decisions], "guard": run.guard.state_dict()}
        (run.folder / f"rank-{RANK}.json").write_text(json.dumps(found))
        return save(run)

    patch.setattr(Guard, "judge", judged)
    patch.setattr(training, "save_model", saved)

"""K small runs of a study's recipe, one after the other or with their parameters stacked."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

from hf_stable.model import StableGPTForCausalLM, modeling_stable_gpt
from hf_stable.optim import adamw, parameter_groups
from hf_stable.recipes import Recipe
from hf_stable.sweep.plan import load_plan, planned_runs

PLAN = Path(__file__).parents[2] / "recipes" / "sweeps" / "table3_cpu.yaml"
CHECKED_STEPS = 10
LEARNT = 0.1  # nats that the loss has to fall by meanwhile, or nothing was compared
# Largest difference of a loss, in nats: rounding alone, which ten steps enlarge.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}
Batch = tuple[torch.Tensor, torch.Tensor]


class Runs:
    """K runs of a recipe that differ by learning rate, weights and data.

    Args:
        rates: (K,) learning rates. first: number of the first run, which seeds the others too.
    """

    def __init__(
        self, recipe: Recipe, rates: list[float], first: int, attention: str, dtype: torch.dtype
    ) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.recipe = recipe
        config = recipe.model_config()
        self.models: list[StableGPTForCausalLM] = []
        for number in range(first, first + len(rates)):
            torch.manual_seed(number)
            model = StableGPTForCausalLM._from_config(config, attn_implementation=attention)
            self.models.append(model.to(self.device, dtype).train())
        self.groups = [self._groups(*each) for each in zip(self.models, rates, strict=True)]
        self._tokens = [torch.Generator().manual_seed(first + each) for each in range(len(rates))]

    def _groups(self, model: StableGPTForCausalLM, rate: float) -> list[dict[str, Any]]:
        decay = self.recipe.optimizer.weight_decay
        return parameter_groups(model, learning_rate=rate, weight_decay=decay)

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.AdamW:
        """Of the recipe's settings."""
        settings = self.recipe.optimizer
        return adamw(groups, beta1=settings.beta1, beta2=settings.beta2, eps=settings.eps)

    def batches(self) -> Iterator[Batch]:
        """Next random ids and labels of each run, (B, T) each; small ids are the more frequent."""
        shape = (self.recipe.training.micro_batch_size, self.recipe.data.sequence_length + 1)
        vocab = self.recipe.tokenizer.vocab_size
        for generator in self._tokens:
            ids = (vocab * torch.rand(shape, generator=generator) ** 4).long().to(self.device)
            yield ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


class Separate(Runs):
    """Runs one after the other, each as `hf-stable train` does a step."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._optimizers = [self.optimizer(groups) for groups in self.groups]

    def step(self) -> torch.Tensor:
        """(K,) losses, nats."""
        losses = []
        for model, optimizer, (ids, labels) in zip(
            self.models, self._optimizers, self.batches(), strict=True
        ):
            loss = model(ids, shift_labels=labels, use_cache=False).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), self.recipe.optimizer.max_grad_norm or 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        return torch.stack(losses)


class Stacked(Runs):
    """The same runs at once."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        stacked, self._buffers = stack_module_state(self.models)  # type: ignore[arg-type]
        self._parameters = {name: value.detach() for name, value in stacked.items()}
        self._slices: list[dict[str, nn.Parameter]] = []
        for number, (model, groups) in enumerate(zip(self.models, self.groups, strict=True)):
            names = {parameter: name for name, parameter in model.named_parameters()}
            mine = {name: nn.Parameter(value[number]) for name, value in self._parameters.items()}
            for group in groups:
                group["params"] = [mine[names[parameter]] for parameter in group["params"]]
            self._slices.append(mine)
        self._optimizer = self.optimizer([group for groups in self.groups for group in groups])
        self._gradients = vmap(grad_and_value(self._loss))

    def _loss(
        self, parameters: Mapping[str, torch.Tensor], buffers: Any, ids: torch.Tensor, labels: Any
    ) -> torch.Tensor:
        # The model's own loss is an autograd function that vmap cannot see through.
        call = partial(functional_call, self.models[0], (parameters, buffers), (ids,))
        return F.cross_entropy(call({"use_cache": False}).logits.flatten(0, 1), labels.flatten())

    def step(self) -> torch.Tensor:
        """(K,) losses, nats."""
        ids, labels = (torch.stack(each) for each in zip(*self.batches(), strict=True))
        # The model's look at its ids, which waits for a number, is not for vmap either.
        with patch.object(modeling_stable_gpt, "check_ids", lambda *_: None):
            gradients, losses = self._gradients(self._parameters, self._buffers, ids, labels)
        norms = torch.stack([each.flatten(1).norm(dim=1) for each in gradients.values()]).norm(
            dim=0
        )
        factors = ((self.recipe.optimizer.max_grad_norm or 1.0) / (norms + 1e-6)).clamp(max=1.0)
        for name, gradient in gradients.items():
            gradient.mul_(factors.view(-1, *[1] * (gradient.ndim - 1)))
            for slices, mine in zip(self._slices, gradient, strict=True):
                slices[name].grad = mine
        self._optimizer.step()
        return losses


FORMS: dict[str, type[Separate | Stacked]] = {"separate": Separate, "stacked": Stacked}


def recipe_of(method: str, settings: Sequence[str] = ()) -> Recipe:
    """The study's recipe of a method, with other settings (`KEY=VALUE`) where given."""
    runs = planned_runs(load_plan(PLAN, list(settings)))
    return next(run.recipe for run in runs if run.method == method)


def attention_of(form: str) -> str:
    """The fastest backend that each form has: on a CPU, vmap runs sdpa slice by slice."""
    return "eager" if form == "stacked" and not torch.cuda.is_available() else "sdpa"


def rates_of(num_runs: int) -> list[float]:
    """Learning rates from 1e-3 to 1e-2, where no run breaks and rounding stays small."""
    return np.geomspace(1e-3, 1e-2, num_runs).tolist()


def check(method: str, num_runs: int = 4, settings: Sequence[str] = ()) -> dict[str, float]:
    """Largest difference over CHECKED_STEPS steps of stacked from separate losses, by precision.

    Raises:
        AssertionError: where it is more than rounding.
    """
    found, recipe = {}, recipe_of(method, settings)
    for dtype, bound in TOLERANCE.items():
        shared = (recipe, rates_of(num_runs), 0)
        both = [form(*shared, attention_of(name), dtype) for name, form in FORMS.items()]
        losses = [torch.stack([runs.step() for _ in range(CHECKED_STEPS)]) for runs in both]
        found[str(dtype).removeprefix("torch.")] = (losses[0] - losses[1]).abs().max().item()
        assert (losses[0] - losses[1]).abs().max() < bound, (dtype, losses)
        assert (losses[0][0] - losses[0][-1]).min() > LEARNT, (dtype, losses)
    return found

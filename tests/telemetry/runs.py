"""Run folders with every number of telemetry, made up: what the reading side is tested on.

A healthy run learns and grows as small models do: outputs grow by a third root of the step, logits
stay below 20, gradients and loss fall. `changes` replaces single series, so that one sign can cross
its threshold in one layer at one step and nowhere else.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hf_stable.records import RunRecord
from hf_stable.telemetry import names

# (step, the healthy value) -> the value to record.
Change = Callable[[int, Any], Any]

PEAK = 1e-2


@dataclass(frozen=True)
class Plan:
    """A run to write.

    Args:
        every: steps between samples, besides step 1; 0 writes no telemetry.
        bounds_every: samples between those with bounds and spectral norms, besides step 1.
        warmup: steps over which the learning rate rises to PEAK; cosine after it.
        loss: (step, healthy loss) -> training loss to record.
        changes: by name as in `names.unpack`, e.g. "layers.1.attention/max_logit".
        finished: whether the run ends with validation, checkpoint and "finished".
    """

    name: str = "healthy"
    steps: int = 600
    every: int = 10
    bounds_every: int = 5
    log_every: int = 10
    layers: int = 3
    heads: int = 2
    warmup: int = 60
    seed: int = 0
    loss: Change = lambda step, loss: loss
    changes: Mapping[str, Change] = field(default_factory=dict)
    model_config: Mapping[str, Any] = field(default_factory=dict)
    finished: bool = True


def learning_rate(plan: Plan, step: int) -> float:
    """Linear warm-up, cosine to a tenth."""
    if step <= plan.warmup:
        return PEAK * step / plan.warmup
    share = (step - plan.warmup) / max(1, plan.steps - plan.warmup)
    return PEAK * (0.55 + 0.45 * math.cos(math.pi * share))


def sampled_steps(plan: Plan) -> list[int]:
    """Step 1 and every `every` steps."""
    if not plan.every:
        return []
    return sorted({1, *range(plan.every, plan.steps + 1, plan.every)})


def healthy_loss(step: int) -> float:
    """From 9 nats to about 3.2."""
    return 3 + 6 * math.exp(-step / 60) + 1.5 / step**0.35


def write_run(folder: Path, plan: Plan | None = None) -> Path:
    """Write `run.json` and `metrics.jsonl` of a plan; returns `folder`."""
    plan = plan or Plan()
    record = RunRecord(folder)
    record.write_run(run_content(plan))
    record.append("started", 0)
    noise = np.random.default_rng(plan.seed)
    sampled = set(sampled_steps(plan))
    for step in range(1, plan.steps + 1):
        if step in sampled:
            record.append("telemetry", step, **names.pack(numbers_at(plan, step, noise)))
        if step % plan.log_every == 0 or step == plan.steps:
            record.append("train", step, **_logged(plan, step, noise))
        if step % (10 * plan.log_every) == 0:
            loss = plan.loss(step, healthy_loss(step)) + 0.05
            perplexity = math.exp(min(loss, 700))
            record.append("validation", step, loss=loss, perplexity=perplexity)
    if plan.finished:
        record.append("checkpoint", plan.steps, folder=f"step-{plan.steps}")
        record.append("finished", plan.steps)
    record.close()
    return folder


def write_healthy(folder: Path, **fields: Any) -> Path:
    """A run in which nothing is wrong."""
    return write_run(folder, Plan(**fields))


def write_diverging(folder: Path, start: int = 300, layer: int = 1, **fields: Any) -> Path:
    """A run whose `layer` goes first: from `start` on its logits grow tenfold in 50 steps.

    QKV's output, the gradients at its input, and the update follow from `start` + 50 on, and the
    loss from `start` + 160 on.
    """

    def grown(per_step: float, after: int = 0) -> Change:
        def change(step: int, value: Any) -> Any:
            factor = math.exp(min(per_step * max(0, step - start - after), 40))
            return [factor * each for each in value] if isinstance(value, list) else factor * value

        return change

    def collapsed(step: int, value: list[float]) -> list[float]:
        return [each * math.exp(-max(0, step - start) / 60) for each in value]

    place = f"layers.{layer}"
    changes = {
        f"{place}.attention/max_logit": grown(math.log(10) / 50),
        f"{place}.attention/entropy": collapsed,
        f"{place}.qkv/output_l2": grown(0.02, 50),
        f"{place}.qkv/output_rms": grown(0.02, 50),
        f"{place}.qkv/input_grad_l2": grown(0.04, 60),
        f"{place}.fc1/input_grad_l2": grown(0.04, 70),
        f"{place}.optimizer/update_l2": grown(0.01, 60),
    }

    def loss(step: int, value: float) -> float:
        return value + 3.5 * (1 - math.exp(-max(0, step - start - 160) / 40))

    defaults = {"name": "diverging", "changes": changes, "loss": loss}
    return write_run(folder, Plan(**{**defaults, **fields}))


def run_content(plan: Plan) -> dict[str, Any]:
    """run.json, as training writes it, without what no reader of telemetry looks at."""
    model = dict(plan.model_config)
    return {
        "recipe": {
            "name": plan.name,
            "model": model,
            "training": {"steps": plan.steps, "log_every": plan.log_every},
            "optimizer": {"learning_rate": PEAK, "eps": 1e-8, "max_grad_norm": 1.0},
            "schedule": {"name": "cosine", "warmup": plan.warmup, "warmup_unit": "steps"},
        },
        "model_config": {"model_type": "stable_gpt", "num_hidden_layers": plan.layers, **model},
        "device": "cpu (1 threads)",
    }


def numbers_at(plan: Plan, step: int, noise: np.random.Generator) -> names.Numbers:
    """All numbers of one sample, changes applied."""
    numbers: names.Numbers = {}
    with_bounds = step == 1 or sampled_steps(plan).index(step) % plan.bounds_every == 0
    for layer in range(plan.layers):
        numbers |= dict(_layer(plan, layer, step, noise, with_bounds))
    numbers |= dict(_ends(plan, step, noise))
    for name, change in plan.changes.items():
        numbers[name] = change(step, numbers.get(name))
    return numbers


def _wobble(noise: np.random.Generator, scale: float = 0.03) -> float:
    return float(np.exp(scale * noise.standard_normal()))


def _logged(plan: Plan, step: int, noise: np.random.Generator) -> dict[str, float]:
    return {
        "loss": plan.loss(step, healthy_loss(step) + 0.02 * float(noise.standard_normal())),
        "z_loss": 0.0,
        "learning_rate": learning_rate(plan, step),
        "grad_norm": (0.3 + 2 / step**0.5) * _wobble(noise, 0.2),
        "tokens_per_second": 20_000 * _wobble(noise),
    }


def _linear(step: int, noise: np.random.Generator) -> Iterable[tuple[str, float]]:
    grown, grad = 1 + 0.3 * step ** (1 / 3), (1 + 20 / step**0.5) * _wobble(noise, 0.2)
    yield "input_l2", 512.0 * _wobble(noise)
    yield "input_rms", 1.0 * _wobble(noise)
    yield "output_l2", 300.0 * grown * _wobble(noise)
    yield "output_rms", 0.6 * grown * _wobble(noise)
    yield "input_grad_l2", 1e-3 * grad
    yield "weight_l2", 20.0 * (1 + 0.1 * step ** (1 / 3))
    yield "weight_rms", 0.02 * (1 + 0.1 * step ** (1 / 3))
    yield "weight_grad_l2", 0.05 * grad
    yield "weight_update_ratio", 2e-3 * _wobble(noise)


def _layer(
    plan: Plan, layer: int, step: int, noise: np.random.Generator, with_bounds: bool
) -> Iterable[tuple[str, names.Value]]:
    place = f"layers.{layer}"
    for linear in ("qkv", "proj", "fc1", "fc2"):
        for quantity, value in _linear(step, noise):
            yield f"{place}.{linear}/{quantity}", value * (1 + 0.1 * layer)
        if with_bounds and linear != "qkv":
            yield f"{place}.{linear}/weight_spectral", 2.0 + 0.05 * step ** (1 / 3)

    def heads(value: float) -> list[float]:
        return [value * (1 + 0.1 * head) * _wobble(noise) for head in range(plan.heads)]

    grown = step ** (1 / 3)
    yield f"{place}.attention/max_logit", heads(2 + 1.5 * grown)
    yield f"{place}.attention/entropy", heads(0.85 / (1 + 0.08 * grown) / (1 + 0.1 * plan.heads))
    for quantity in ("q_l2", "k_l2"):
        yield f"{place}.attention/{quantity}", heads(4 + grown)
    for part in ("attention", "mlp"):
        yield f"{place}.stream/{part}_std", (0.5 + 0.1 * layer) * (1 + 0.2 * grown)
        if with_bounds:
            yield f"{place}.stream/{part}_bound", 2.0 + 5 / (1 + layer) + 0.2 * grown
    yield from _optimizer(f"{place}.optimizer", plan, step, noise)


def _optimizer(
    place: str, plan: Plan, step: int, noise: np.random.Generator
) -> Iterable[tuple[str, names.Value]]:
    rms = 1e-4 / step**0.3 * _wobble(noise, 0.2)
    yield f"{place}/grad_rms", rms
    yield f"{place}/grad_rms_over_eps", rms / 1e-8
    yield f"{place}/adam_ratio", [0.05, 0.1, 0.25, 0.3, 0.15, 0.1, 0.04, 0.01]
    # Adam's first steps are the largest for their learning rate.
    size = 100 * (0.3 + 0.7 / step) * _wobble(noise)
    yield f"{place}/update_l2", learning_rate(plan, step) * size


def _ends(plan: Plan, step: int, noise: np.random.Generator) -> Iterable[tuple[str, names.Value]]:
    for quantity, value in _linear(step, noise):
        if not quantity.startswith("output"):
            yield f"head/{quantity}", value
        if quantity.startswith(("output", "weight")):
            yield f"embed/{quantity}", value
    yield "head/log_z_mean", 9 + 0.5 * step ** (1 / 3) * _wobble(noise)
    yield "head/log_z_max", 14 + step ** (1 / 3)
    yield "head/logit_mean", -0.5 * step ** (1 / 3)
    yield "head/logit_max", 3 + step ** (1 / 3)
    yield "stream/final_std", 1 + 0.2 * step ** (1 / 3)
    yield from _optimizer("head.optimizer", plan, step, noise)
    yield from _optimizer("embed.optimizer", plan, step, noise)
    yield from _optimizer("optimizer", plan, step, noise)

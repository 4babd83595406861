"""Folders of studies, made up: what reports are tested on.

A method has a learning rate up to which it is stable. Its loss is a parabola in log learning rate
there, and beyond it the unigram's; attention logits grow with the learning rate over that limit.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from hf_stable.records import RunRecord, write_json
from hf_stable.sweep.rule import Thresholds, judge

UNIGRAM, BIGRAM, INITIAL = 3.4, 2.8, 6.2
STEPS, WARMUP = 50, 5
RATES = (0.01, 0.03, 0.1, 0.3)
LIMITS = {"baseline": 0.03, "soft_cap": 0.03, "qk_norm": 0.1, "qkv_norm": 0.3}


@dataclass(frozen=True)
class Made:
    """A study to write.

    Args:
        limits: by method, the largest stable learning rate of even seeds; that of odd ones is the
            same unless in `odd_limits`.
        losses: by (method, variant, rate, seed), a validation loss instead of the parabola's.
        statuses: by the same, "stopped", "failed" or "missing" instead of "finished".
        telemetry: whether runs have any.
        documents: of the perplexity records; 0 writes none.
        configs: by method, fields of the model's config beside its size.
        bigram: cross-entropy of a bigram table, nats.
        reproduces: tables of the paper. claims_revision: commit of their claims.
    """

    name: str = "made"
    limits: Mapping[str, float] = field(default_factory=lambda: dict(LIMITS))
    odd_limits: Mapping[str, float] = field(default_factory=dict)
    variants: Sequence[str] = ("",)
    rates: Sequence[float] = RATES
    seeds: Sequence[int] = (0, 1, 2)
    losses: Mapping[tuple[str, str, float, int], float] = field(default_factory=dict)
    statuses: Mapping[tuple[str, str, float, int], str] = field(default_factory=dict)
    telemetry: bool = True
    documents: int = 0
    gains: Mapping[str, float] = field(default_factory=lambda: {"qk_norm": 0.03, "qkv_norm": 0.03})
    device: str = "cpu (1 threads)"
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    bigram: float = BIGRAM
    reproduces: Sequence[str] = ()
    claims_revision: str | None = None


Place = tuple[str, str, float, int]


def identity(place: Place) -> str:
    """The id of a run, as plans make it."""
    method, variant, rate, seed = place
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", variant)
    return "_".join([method, *([slug] if slug else []), f"lr-{rate:g}", f"seed-{seed}"])


def places(made: Made) -> list[Place]:
    """All runs of a study."""
    return list(product(made.limits, made.variants, made.rates, made.seeds))


def write_study(folder: Path, made: Made | None = None) -> Path:
    """Write a study's records; returns `folder`."""
    made = made or Made()
    collapse = "middle" if made.bigram < UNIGRAM else "unigram-0.2"
    thresholds = Thresholds(collapse=collapse).to_dict()
    plan = {
        "name": made.name,
        "methods": list(made.limits),
        "variants": list(made.variants),
        "learning_rates": sorted(made.rates),
        "seeds": list(made.seeds),
        "thresholds": thresholds,
        "reproduces": list(made.reproduces),
        "claims_revision": made.claims_revision,
        "runs": [identity(place) for place in places(made)],
    }
    write_json(folder / "plan.json", plan)
    for place in places(made):
        if made.statuses.get(place) != "missing":
            _write_run(folder / "runs" / identity(place), made, place, thresholds)
        if made.documents and place[2] == made.rates[0]:
            _write_perplexity(folder, made, place)
    return folder


def is_beyond(made: Made, place: Place) -> bool:
    """Whether a run is above its method's limit."""
    method, _, rate, seed = place
    limits = {**made.limits, **(made.odd_limits if seed % 2 else {})}
    return rate > limits[method]


def final_loss(made: Made, place: Place) -> float:
    """Validation loss of a run."""
    method, variant, rate, seed = place
    if place in made.losses:
        return made.losses[place]
    shift = 0.01 * seed + 0.02 * list(made.limits).index(method)
    shift += 0.05 * list(made.variants).index(variant)
    if is_beyond(made, place):
        return UNIGRAM + 0.02 * seed + 0.01 * math.log(rate)
    return 2.2 + shift + 0.05 * math.log(rate / 0.03) ** 2


def max_logit(made: Made, place: Place, step: int) -> float:
    """Of all layers and heads: above 1e4 from the middle on where the run breaks."""
    grown = 2e4 * place[2] / made.limits[place[0]] if is_beyond(made, place) else 40 * place[2]
    return 5 + grown * step / STEPS


def _write_run(folder: Path, made: Made, place: Place, thresholds: dict[str, Any]) -> None:
    method, variant, rate, seed = place
    status = made.statuses.get(place, "finished")
    common = {
        "id": identity(place),
        "method": method,
        "variant": variant,
        "learning_rate": rate,
        "seed": seed,
        "thresholds": thresholds,
        "status": status,
    }
    if status == "failed":
        error = "RuntimeError: <out of memory>"
        write_json(folder / "result.json", {**common, "error": error, "attempts": 2})
        return
    loss = final_loss(made, place)
    train = _write_records(folder, made, place, loss)
    judging = Thresholds.from_dict(thresholds)
    verdict = judge(train, loss, UNIGRAM, made.bigram, WARMUP, judging, stopped=status == "stopped")
    result = {
        **common,
        "error": None,
        "attempts": 1,
        "seconds": 36.0,
        "steps": STEPS,
        "parameters": 200_000,
        "flops": 1e12,
        "initial_loss": INITIAL,
        "validation_loss": loss,
        "unigram": UNIGRAM,
        "bigram": made.bigram,
        "warmup_steps": WARMUP,
        "verdict": verdict.to_dict(),
    }
    write_json(folder / "result.json", result)


def _write_records(folder: Path, made: Made, place: Place, loss: float) -> dict[str, np.ndarray]:
    record = RunRecord(folder)
    recipe = {"name": place[0], "optimizer": {"learning_rate": place[2]}}
    record.write_run(
        {
            "recipe": {**recipe, "training": {"steps": STEPS}, "seed": place[3]},
            "model_config": {
                "hidden_size": 64,
                "num_hidden_layers": 2,
                **made.configs.get(place[0], {}),
            },
            "data": {"unigram_nats_per_token": UNIGRAM, "bigram_nats_per_token": made.bigram},
            "device": made.device,
            "git_revision": "0123456789abcdef",
            "versions": {"torch": "2.13.0", "numpy": "2.3.0"},
            "parameters": 200_000,
        }
    )
    losses = []
    for step in range(1, STEPS + 1):
        # Never a blow-up: the loss falls to its end from above.
        value = loss + (INITIAL - loss) * math.exp(-(step - 1) / 8)
        losses.append(value)
        if made.telemetry and step % 5 == 0:
            record.append("telemetry", step, **_sample(made, place, step))
        record.append(
            "train", step, loss=value, learning_rate=place[2], grad_norm=1.0 + 0.1 * place[2]
        )
    record.append("validation", STEPS, loss=loss, perplexity=math.exp(loss))
    record.append("finished", STEPS)
    record.close()
    steps = np.arange(1.0, STEPS + 1)
    return {"step": steps, "loss": np.array(losses), "grad_norm": np.ones(STEPS)}


def _sample(made: Made, place: Place, step: int) -> dict[str, Any]:
    logit = max_logit(made, place, step)
    entropy = 0.05 if is_beyond(made, place) and step > 10 else 0.7
    update = place[2] * (8.0 if is_beyond(made, place) else 3.0)
    return {
        "layers.*.attention/max_logit": [[logit, logit / 2], [logit / 3, logit / 4]],
        "layers.*.attention/entropy": [[entropy, 0.8], [0.8, 0.9]],
        "layers.*.optimizer/update_l2": [update, update / 2],
        "layers.*.qkv/output_rms": [1.0, 1.0],
    }


def _write_perplexity(folder: Path, made: Made, place: Place) -> None:
    noise = np.random.default_rng([7, place[3]])
    tokens = noise.integers(50, 400, made.documents)
    rate = 2.4 + 0.2 * noise.standard_normal(made.documents)
    own = np.random.default_rng([list(made.limits).index(place[0]), place[3]])
    rate = rate - made.gains.get(place[0], 0.0) + 0.02 * own.standard_normal(made.documents)
    documents = np.stack([rate * tokens, tokens, tokens * 0.7, tokens * 3.0], axis=1)
    content = {"id": identity(place), "documents": documents.round(6).tolist()}
    write_json(folder / "perplexity" / f"{identity(place)}.json", content)

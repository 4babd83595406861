"""Measurements on a GPU, most valuable first, in two calls; every entry is saved when it ends.

Call 1 gives one number and the tiles to take; call 2 everything else. Tests come before both, see
`first.py`. A new measurement gets its place here.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import attention
import linear_cross_entropy as loss
import train_step
from attention_cases import ATT, CHECK, DRY
from attention_tune import CANDIDATES, sweep
from common import Device, Measurement, Part
from goals import SLOWDOWN
from train_step_errors import check as check_step

# Techniques that have no goal, and heads of other widths and lengths, come last.
SCALED = ("ours", "ours, cap", "sdpa flash")


def plan(call: int, device: Device) -> list[Measurement]:
    """Return what a call measures."""
    attentions, losses, steps = _attention(device), _loss(device), _steps(device)
    tiles = _tiles(device, clips=False)
    if call == 1:
        return [steps.pop("E1"), *tiles]
    early = [steps.pop("E1"), steps.pop("all on, all off")]
    rest = [*_tiles(device, clips=True)]
    few = ["errors", "cap beside SDPA", "cap beside FlexAttention", "statistics", "clip"]
    ours = [attentions.pop(name) for name in few]
    head = [losses.pop(name) for name in ("errors", "floor, 8k", "liger, 8k")]
    profile = [_product(device), steps.pop("profile")]
    techniques = [steps.pop(f"technique {name}") for name in SLOWDOWN]
    peers = [steps.pop(name) for name in ("gemma 2", "errors")]
    late = [losses.pop("floor, 32k"), *attentions.values(), *losses.values(), *steps.values()]
    return [*early, *ours, *head, *profile, *techniques, *peers, *late, *rest]


def _named(
    group: str, measures: Mapping[str, Any], limit: float, sizes: Mapping[str, Any]
) -> dict[str, Measurement]:
    return {
        name: Measurement(f"{group}: {name}", measure, limit, sizes)
        for name, measure in measures.items()
    }


def _attention(device: Device) -> dict[str, Measurement]:
    shape, few = (DRY, DRY) if device.dry else (ATT, CHECK)
    found = _named(
        "attention",
        {"errors": lambda: attention.check(attention.Bench(few, device))},
        60,
        asdict(few),
    )
    compared = {
        name: lambda name=name: attention.compare(attention.Bench(shape, device), name)
        for name in attention.COMPARISONS
    }
    found |= _named("attention", compared, 75, asdict(shape))
    shapes = {"forward": shape, **({} if device.dry else attention.scaling(shape))}
    for name, other in shapes.items():
        names = attention.COMPARISONS["cap beside SDPA"] if name == "forward" else SCALED
        measure = partial(_times, device, other, names, name)
        found |= _named("attention", {name: measure}, 60, asdict(other))
    return found


def _times(device: Device, shape: Any, names: tuple[str, ...], part: str) -> Part:
    bench = attention.Bench(shape, device)
    return attention.measure(bench, names, part, backward=part != "forward")[0], {}


def _tiles(device: Device, clips: bool) -> list[Measurement]:
    shape = DRY if device.dry else ATT
    measures = {
        f"{kernel}{', clip' if clips else ''}": (
            lambda kernel=kernel: sweep(attention.Bench(shape, device), kernel, clips)
        )
        for kernel in CANDIDATES
    }
    return list(_named("tiles", measures, 45, asdict(shape)).values())


def _loss(device: Device) -> dict[str, Measurement]:
    base = loss.DRY if device.dry else loss.MODEL
    few = base if device.dry else replace(base, tokens=loss.CHECK_TOKENS)
    found = _named(
        "head and loss", {"errors": lambda: loss.check(loss.Bench(few, device))}, 60, asdict(few)
    )
    for tokens, count in loss.LENGTHS.items():
        shape = replace(base, tokens=base.tokens * count // loss.LENGTHS["8k"])
        compared = {
            f"{name}, {tokens}": lambda s=shape, t=tokens, n=name: loss.compare(
                loss.Bench(s, device), t, n
            )
            for name in loss.COMPARISONS
        }
        found |= _named("head and loss", compared, 75, asdict(shape))
    vocabulary = {"vocabulary": lambda: loss.vocabulary(base, device)}
    return found | _named("head and loss", vocabulary, 45, asdict(base))


def _steps(device: Device) -> dict[str, Measurement]:
    lab = train_step.Lab(device)
    techniques = train_step.SLOWDOWN if device.dry else train_step.TECHNIQUES
    measures = {
        "E1": lambda: train_step.first(lab),
        "all on, all off": lambda: train_step.headline(lab),
        "profile": lambda: train_step.profiled(lab),
        "gemma 2": lambda: train_step.against_gemma2(lab, compiled=False),
        "errors": lambda: check_step(lab.geometry, lab.shape, device),
        **{f"technique {name}": partial(train_step.technique, lab, name) for name in techniques},
        "sequence length": lambda: train_step.lengths(lab),
        "without compile": lambda: train_step.uncompiled(lab),
        "compile": lambda: train_step.compile_times(lab),
        "vocabulary": lambda: train_step.vocabularies(lab),
        "gemma 2, compiled": lambda: train_step.against_gemma2(lab, compiled=True),
    }
    sizes = {**lab.geometry, "batch": lab.shape.batch, "length": lab.shape.length}
    return _named("training step", measures, 120, sizes)


def _product(device: Device) -> Measurement:
    size = device.gemm_size

    def measure() -> Part:
        row = {"part": "product", "case": "bf16 matrix product", "tflops": device.gemm_tflops()}
        return [row], {}

    return Measurement("product", measure, 30, {"size": size})

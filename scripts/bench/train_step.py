"""Training steps of the paper's 830m model: tokens/s, MFU and memory, by technique, against a peer.

A step is what `hf_stable.training` does with one micro-batch: bf16 autocast, forward, backward,
clipping, the host's look at the gradient norm, fused AdamW; on random tokens. Blocks are compiled
unless a row says otherwise. MFU counts matrix products and causal attention, once forward and twice
backward, head in, recomputation out, over 989 TFLOP/s. The peer is Transformers' Gemma 2 of the
same width, depth, heads and MLP FLOPs with its eager softcap attention and its own loss, at the
largest micro-batch that fits; its times are scaled to the same number of tokens.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from common import (
    PEAK_FLOPS,
    Device,
    Part,
    Times,
    ratio,
    rows_of,
    worst,
)
from goals import SLOWDOWN
from torch._inductor.utils import fresh_inductor_cache
from train_step_models import (
    ALL,
    CLIP_ALPHA,
    DRY_MODEL,
    DRY_SHAPE,
    E1,
    MICRO_BATCH,
    MODEL,
    PRESETS,
    Shape,
    Training,
    fitting,
    flops_per_token,
    gemma2,
    stable_gpt,
)
from train_step_profile import profile

TECHNIQUES = {**PRESETS, "soft_clip, alpha": CLIP_ALPHA}


class Lab:
    """Builds trainings on one device and compares them."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.shape = DRY_SHAPE if device.dry else MICRO_BATCH
        self.geometry = dict(DRY_MODEL if device.dry else MODEL)
        # Room for the longest sequences of `lengths`.
        self.geometry["max_position_embeddings"] = 2 * self.shape.length

    def stable(
        self,
        techniques: dict[str, Any],
        attention: str | None = None,
        compiled: bool = True,
        shape: Shape | None = None,
        **geometry: Any,
    ) -> Training:
        """A StableGPT with these techniques; `geometry` replaces sizes of the model."""
        model = stable_gpt({**self.geometry, **geometry}, techniques, self.device, attention)
        return Training(model, shape or self.shape, self.device, compiled)

    def gemma2(self, compiled: bool) -> Training:
        """The peer at the largest micro-batch that fits."""

        def build(shape: Shape) -> Training:
            return Training(gemma2(self.geometry, self.device), shape, self.device, compiled)

        return fitting(build, self.shape, self.device)

    def compare(
        self, part: str, builders: Mapping[str, Callable[[], Training]], seconds: float = 8
    ) -> tuple[list[dict[str, Any]], Times, dict[str, Training]]:
        """Interleave steps; times are scaled to the tokens of the first case."""
        trainings: dict[str, Training] = {}
        held: dict[str, int] = {}

        def build(name: str) -> Training:
            before = self._allocated()
            training = builders[name]()
            training(0)
            held[name] = self._allocated() - before
            trainings[name] = training
            return training

        makers = {name: partial(build, name) for name in builders}
        _, times, skipped = self.device.measure(makers, seconds, warm_ups=2)
        for name in times:
            factor = self.shape.tokens / trainings[name].shape.tokens
            times[name] = [factor * ms for ms in times[name]]
        rows = rows_of(times, skipped, part, next(iter(builders)))
        for row in rows:
            if "ms" in row:
                row.update(self._facts(trainings[row["case"]], row["ms"], held[row["case"]]))
        return rows, times, trainings

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.device.cuda else 0

    def _facts(self, training: Training, ms: float, held: int) -> dict[str, Any]:
        """Throughput, MFU and memory of a training whose scaled step takes `ms`."""
        rate = 1e3 * self.shape.tokens / ms
        step = self.device.peak_bytes(partial(training, 0))
        flops = flops_per_token(training.model, training.shape.length)
        return {
            "attention": training.model.config._attn_implementation,
            "micro_batch": training.shape.batch,
            "tokens_per_second": rate,
            "mfu": rate * flops / PEAK_FLOPS,
            "peak_gb": None if step is None else (held + step) / 1e9,
            "step_gb": None if step is None else step / 1e9,
        }


def first(lab: Lab) -> Part:
    """E1 alone: the first number that a new machine should give."""
    rows, _, _ = lab.compare("training step, E1", {"ours, E1": partial(lab.stable, E1)}, seconds=5)
    return rows, {"E1": rows[0].get("mfu"), "E5": rows[0].get("peak_gb")}


def headline(lab: Lab) -> Part:
    """E1 beside the same code with every technique off, and all techniques."""
    builders = {
        "ours, none, sdpa": partial(lab.stable, {}, "sdpa"),
        "ours, E1": partial(lab.stable, E1),
        "ours, all but clip": partial(lab.stable, ALL),
    }
    rows, times, _ = lab.compare("all on, all off", builders)
    facts = {row["case"]: row for row in rows}
    return rows, {
        "E1": facts["ours, E1"].get("mfu"),
        "E2": ratio(times, "ours, none, sdpa", "ours, all but clip"),
        "E5": facts["ours, E1"].get("peak_gb"),
    }


def against_gemma2(lab: Lab, compiled: bool) -> Part:
    """The peer as Transformers builds it, or with its blocks compiled like ours."""
    peer = f"gemma 2, {'blocks compiled' if compiled else 'as it comes'}"
    builders = {"ours, E1": partial(lab.stable, E1), peer: partial(lab.gemma2, compiled)}
    rows, times, _ = lab.compare(peer, builders)
    return rows, {} if compiled else {"E4": ratio(times, peer, "ours, E1")}


def uncompiled(lab: Lab) -> Part:
    """The same without torch.compile."""
    builders = {
        "ours, E1": partial(lab.stable, E1),
        "ours, E1, not compiled": partial(lab.stable, E1, compiled=False),
        "ours, none, not compiled": partial(lab.stable, {}, "sdpa", compiled=False),
    }
    return lab.compare("without compile", builders)[0], {}


def profiled(lab: Lab) -> Part:
    """Profile of the time of E1's step."""
    gemm_tflops = lab.device.gemm_tflops()
    training = lab.stable(E1)
    for number in range(2):
        training(number)
    return profile(training, lab.device, gemm_tflops), {}


def technique(lab: Lab, name: str) -> Part:
    """One technique against none, each with the backend that training would take."""
    case = f"ours, {name}"
    builders = {"ours, none": partial(lab.stable, {}), case: partial(lab.stable, TECHNIQUES[name])}
    rows, times, _ = lab.compare(f"technique {name}", builders, seconds=5)
    slower = ratio(times, case, "ours, none")
    values = {f"E3 {name}": None if slower is None else slower - 1} if name in SLOWDOWN else {}
    return rows, values


def lengths(lab: Lab) -> Part:
    """The same number of tokens in sequences of half, of the same and of twice the length."""
    batch, length = lab.shape.batch, lab.shape.length
    shapes = [Shape(batch, length), Shape(2 * batch, length // 2), Shape(batch // 2, 2 * length)]
    builders = {
        f"ours, E1, {shape.length} tokens": partial(lab.stable, E1, shape=shape) for shape in shapes
    }
    rows, times, trainings = lab.compare("sequence length", builders)
    if len(trainings) < len(shapes):
        return rows, {}
    base = next(iter(builders))
    flops = {name: flops_per_token(t.model, t.shape.length) for name, t in trainings.items()}
    growth = [(ratio(times, name, base) or 0) * flops[base] / flops[name] for name in trainings]
    kept = [row["step_gb"] for row in rows if row.get("step_gb")]
    memory = max(kept) / min(kept) if kept else None
    return rows, {"G1 time": worst(growth), "G1 memory": memory}


def vocabularies(lab: Lab) -> Part:
    """Half the vocabulary."""
    half = lab.geometry["vocab_size"] // 2
    builders = {
        "ours, E1": partial(lab.stable, E1),
        f"ours, E1, vocabulary {half}": partial(lab.stable, E1, vocab_size=half),
    }
    return lab.compare("vocabulary", builders, seconds=5)[0], {}


def compile_times(lab: Lab) -> Part:
    """Seconds that the first step takes longer than the second, nothing compiled before."""
    seconds: dict[int, float] = {}
    rows: list[dict[str, Any]] = []
    depths = (2, 4) if lab.device.dry else (4, 24)
    for layers in reversed(depths):
        lab.device.require_time()
        torch.compiler.reset()
        shape = Shape(1, lab.shape.length)
        with fresh_inductor_cache():
            training = lab.stable(E1, shape=shape, num_hidden_layers=layers)
            first, second = (step_seconds(training, lab.device) for _ in range(2))
        seconds[layers] = first - second
        row = {"part": "compile", "case": f"ours, {layers} layers", "compile_s": first - second}
        rows.append(row)
    return rows, {"G1 compile": seconds[depths[1]] / seconds[depths[0]]}


def step_seconds(training: Training, device: Device) -> float:
    device.synchronize()
    start = time.perf_counter()
    training(0)
    device.synchronize()
    return time.perf_counter() - start

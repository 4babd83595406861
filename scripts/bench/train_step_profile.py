"""Where a training step's time goes: kernels by kind, beside what arithmetic alone would take."""

import time
from typing import Any

import torch
from common import Device
from torch.profiler import ProfilerActivity
from train_step_models import Training, flops_per_token

# First match wins; names of cuBLAS's, cuDNN's, FlashAttention's, Inductor's and our own kernels.
KINDS = {
    "attention": ("flash", "fmha", "forward_kernel", "query_kernel", "key_value_kernel", "sdpa"),
    "loss": ("cross_entropy", "nll_loss", "softmax"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk", "addmm", "::mm"),
    "optimizer": ("adam", "multi_tensor", "foreach"),
}
STEPS, TOP = 2, 15


def kind_of(kernel: str) -> str:
    """The kind of a kernel by its name; what no kind claims is elementwise work and reductions."""
    name = kernel.lower()
    for kind, words in KINDS.items():
        if any(word in name for word in words):
            return kind
    return "elementwise, norms, copies"


def profile(training: Training, device: Device, gemm_tflops: float) -> list[dict[str, Any]]:
    """Milliseconds a step by kind and by kernel; what no kernel fills is "idle"."""
    activity = ProfilerActivity.CUDA if device.cuda else ProfilerActivity.CPU
    device.synchronize()
    with torch.profiler.profile(activities=[activity]) as record:
        start = time.perf_counter()
        for number in range(STEPS):
            training(number)
        device.synchronize()
        elapsed = 1e3 * (time.perf_counter() - start) / STEPS
    kernels: dict[str, float] = {}
    for event in record.key_averages():
        if event.is_user_annotation:
            continue  # a name for a stretch of time, whose kernels have rows of their own
        own = event.self_device_time_total if device.cuda else event.self_cpu_time_total
        kernels[event.key] = own / 1e3 / STEPS
    kinds = dict.fromkeys([*KINDS, "elementwise, norms, copies"], 0.0)
    for name, ms in kernels.items():
        kinds[kind_of(name)] += ms
    kinds["idle"] = max(0.0, elapsed - sum(kinds.values()))
    floors = arithmetic(training, gemm_tflops)
    rows: list[dict[str, Any]] = []
    for kind, ms in kinds.items():
        row = {"part": "profile", "case": kind, "ms": ms, "share": ms / elapsed}
        rows.append({**row, "arithmetic_ms": floors.get(kind)})
    for name in sorted(kernels, key=kernels.__getitem__, reverse=True)[:TOP]:
        ms = kernels[name]
        row = {"part": "profile", "case": name[:70], "kernel_ms": ms, "share": ms / elapsed}
        rows.append({**row, "kind": kind_of(name)})
    return rows


def arithmetic(training: Training, gemm_tflops: float) -> dict[str, float]:
    """Milliseconds that the FLOPs alone take at the measured rate of a large product.

    Attention with its scores computed anew: 3.5 instead of 3 times the forward pass.
    """
    shape, rate = training.shape, gemm_tflops * 1e9
    products = flops_per_token(training.model, 0)
    attention = (flops_per_token(training.model, shape.length) - products) * 3.5 / 3
    return {
        "products": products * shape.tokens / rate,
        "attention": attention * shape.tokens / rate,
    }

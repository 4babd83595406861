"""Output of a run while it trains: records first, then trackers, then the terminal.

`metrics.jsonl` is authoritative; trackers mirror it. A terminal gets a progress bar. Any other
output gets one plain line per event.
"""

import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .records import RunRecord
from .telemetry.names import Numbers, pack, scalars

# Dense bf16 peaks in FLOP/s, from NVIDIA's data sheets. MFU is reported only for a known peak.
_PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


def peak_flops(device: torch.device) -> float | None:
    """Return the dense bf16 peak of the device in FLOP/s, or None if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in _PEAK_FLOPS.items() if key in name), None)


def describe_device(device: torch.device) -> str:
    """Return a device name for run.json, such as "cpu (2 threads)" or the name of the GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"


class Throughput:
    """Tokens per second and MFU since the last reading."""

    def __init__(
        self, tokens_per_step: int, flops_per_token: float, accelerator: Accelerator
    ) -> None:
        self._tokens_per_step = tokens_per_step
        self._flops_per_token = flops_per_token
        peak = peak_flops(accelerator.device)
        self._peak = None if peak is None else peak * accelerator.num_processes
        self.restart()

    def restart(self) -> None:
        """Ignore the time since the last reading, which was not spent on training steps."""
        self._steps, self._start = 0, time.perf_counter()

    def step(self) -> None:
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Return tokens_per_second over all processes, and mfu if the peak is known."""
        elapsed = time.perf_counter() - self._start
        rate = self._steps * self._tokens_per_step / elapsed
        self.restart()
        reading = {"tokens_per_second": rate}
        if self._peak is not None:
            reading["mfu"] = rate * self._flops_per_token / self._peak
        return reading


class Reporter:
    """Writer of one run's events. It does nothing except on the main process."""

    def __init__(self, folder: Path, accelerator: Accelerator, total_steps: int, step: int) -> None:
        self._accelerator = accelerator
        self._record = RunRecord(folder) if accelerator.is_main_process else None
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._closed = False
        self._total = total_steps
        self._since = step, time.monotonic()
        if self._record is not None and self._console.is_terminal:
            columns = [
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            ]
            self._bar = Progress(*columns, console=self._console)
            self._bar.start()
            self._task = self._bar.add_task("", total=total_steps, completed=step)

    def write_run(self, content: dict[str, Any]) -> None:
        """Write run.json."""
        if self._record is not None:
            self._record.write_run(content)

    def train(self, step: int, metrics: dict[str, float]) -> None:
        """Report training metrics after `step` steps."""
        if self._record is None:
            return
        self._record.append("train", step, **metrics)
        self._accelerator.log({f"train/{key}": value for key, value in metrics.items()}, step=step)
        text = (
            f"loss {metrics['loss']:.4f}  lr {metrics['learning_rate']:.2e}  "
            f"grad norm {metrics['grad_norm']:.3g}  {metrics['tokens_per_second']:,.0f} tokens/s"
        )
        if "mfu" in metrics:
            text += f"  MFU {metrics['mfu']:.1%}"
        if self._bar is None:
            print(f"{self._of(step)}  {text}{self._left(step)}", file=sys.stderr, flush=True)
        else:
            self._bar.update(self._task, completed=step, description=text)

    def telemetry(self, step: int, numbers: Numbers) -> None:
        """Report telemetry; trackers get only the extremes of numbers that are kept per head."""
        if self._record is None:
            return
        self._record.append("telemetry", step, **pack(numbers))
        self._accelerator.log(scalars(numbers), step=step)

    def event(self, kind: str, step: int, text: str, **fields: Any) -> None:
        """Report any other event, as one line of text and one record."""
        if self._record is None:
            return
        self._record.append(kind, step, **fields)
        numbers = {key: value for key, value in fields.items() if isinstance(value, float)}
        if numbers:
            self._accelerator.log({f"{kind}/{key}": value for key, value in numbers.items()}, step)
        if kind in ("started", "resumed", "rolled_back"):
            self._since = step, time.monotonic()
        line = f"{self._of(step)}  {text}"
        if self._bar is None:
            print(line, file=sys.stderr, flush=True)
        else:
            self._bar.console.print(line, highlight=False)

    def _of(self, step: int) -> str:
        return f"step {step:,}/{self._total:,}"

    def _left(self, step: int) -> str:
        """Estimate the time left from the steps so far, with validations and checkpoints."""
        first, start = self._since
        if not first < step < self._total:
            return ""
        seconds = (time.monotonic() - start) / (step - first) * (self._total - step)
        return f"  {timedelta(seconds=round(seconds))} left"

    def sync(self) -> None:
        """Flush the records to disk."""
        if self._record is not None:
            self._record.sync()

    def close(self) -> None:
        """Close the records and trackers; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._bar is not None:
            self._bar.stop()
        if self._record is not None:
            self._record.close()
        # `end_training` would also end the process group, which the next run may need.
        for tracker in self._accelerator.trackers:
            tracker.finish()

"""What a run shows while it works: records first, then trackers, then the terminal.

`metrics.jsonl` is the truth; trackers mirror it. A terminal gets a progress bar, anything else one
plain line an event.
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

# Dense bf16 peaks in FLOP/s, from NVIDIA's data sheets; MFU is given only where the peak is known.
_PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of the device in FLOP/s, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in _PEAK_FLOPS.items() if key in name), None)


def describe_device(device: torch.device) -> str:
    """A name for run.json, such as "cpu (2 threads)" or the GPU's own."""
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
        """Forget time spent on something else than training steps."""
        self._steps, self._start = 0, time.perf_counter()

    def step(self) -> None:
        self._steps += 1

    def read(self) -> dict[str, float]:
        """tokens_per_second of all processes together, and mfu where the peak is known."""
        elapsed = time.perf_counter() - self._start
        rate = self._steps * self._tokens_per_step / elapsed
        self.restart()
        reading = {"tokens_per_second": rate}
        if self._peak is not None:
            reading["mfu"] = rate * self._flops_per_token / self._peak
        return reading


class Reporter:
    """Writes one run's events; on all but the main process it does nothing."""

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
        """Report what was seen in every layer; trackers get the extremes of numbers by head."""
        if self._record is None:
            return
        self._record.append("telemetry", step, **pack(numbers))
        self._accelerator.log(scalars(numbers), step=step)

    def event(self, kind: str, step: int, text: str, **fields: Any) -> None:
        """Report anything else in one line for people and one for the record."""
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
        """The time left, by the steps since the start, validations and checkpoints included."""
        first, start = self._since
        if not first < step < self._total:
            return ""
        seconds = (time.monotonic() - start) / (step - first) * (self._total - step)
        return f"  {timedelta(seconds=round(seconds))} left"

    def sync(self) -> None:
        """Bring the records to the disk."""
        if self._record is not None:
            self._record.sync()

    def close(self) -> None:
        """Once or more often."""
        if self._closed:
            return
        self._closed = True
        if self._bar is not None:
            self._bar.stop()
        if self._record is not None:
            self._record.close()
        # Not `end_training`, which would also end the process group that a next run may need.
        for tracker in self._accelerator.trackers:
            tracker.finish()

"""Print the settings that fit the quickstart's training into about five minutes on this machine.

    python scripts/fit_quickstart.py RUN

It takes a few training steps of the recipe in a temporary folder, measures them, and prints
`training.steps=N` and `schedule.warmup=N`: at most the recipe's own. If RUN has a run already, that
run's settings are printed, so that a second start resumes it.
"""

import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from hf_stable.recipes import Recipe, load_recipe
from hf_stable.records import read_run
from hf_stable.training import train

MINUTES = 5.0
# Share of the time for all else: validation, checkpoints, telemetry and the start of the process.
OVERHEAD = 0.25
MEASURED_STEPS = 12


def seconds_per_step() -> float:
    """Return the median time of a training step of the quickstart's recipe here, in seconds."""
    ends: list[float] = []

    def stop(step: int, loss: float, grad_norm: float) -> str | None:
        ends.append(time.perf_counter())
        return "measured" if len(ends) > MEASURED_STEPS else None

    with tempfile.TemporaryDirectory() as folder:
        settings = [f"output={json.dumps(folder + '/run')}", "training.evaluate_blocks=1"]
        train(load_recipe("quickstart", settings), stop=stop)
    return statistics.median(after - before for before, after in itertools.pairwise(ends))


def fitted(recipe: Recipe, seconds: float) -> tuple[int, int]:
    """Return the steps that fit and their warm-up.

    Args:
        recipe: Recipe of the whole run.
        seconds: Time of a step.

    Returns:
        At least a tenth and at most all of the recipe's steps; the same share of its warm-up.
    """
    whole = recipe.training.steps
    assert whole is not None
    fitting = int(MINUTES * 60 * (1 - OVERHEAD) / seconds)
    steps = max(whole // 10, min(whole, fitting))
    return steps, round(recipe.schedule.warmup * steps / whole)


def main() -> None:
    """Print the settings of the run folder that the command line names."""
    run = Path(sys.argv[1])
    if (run / "run.json").is_file():
        recorded = read_run(run)["recipe"]
        steps, warmup = recorded["training"]["steps"], recorded["schedule"]["warmup"]
    else:
        recipe = load_recipe("quickstart")
        print(f"measuring {MEASURED_STEPS} steps, to see how many fit", file=sys.stderr)
        seconds = seconds_per_step()
        steps, warmup = fitted(recipe, seconds)
        minutes = steps * seconds / (1 - OVERHEAD) / 60
        print(
            f"a step takes {seconds:.2f} s here: {steps} of the recipe's {recipe.training.steps} "
            f"steps are trained, which takes about {minutes:.1f} minutes",
            file=sys.stderr,
        )
    print(f"training.steps={steps}\nschedule.warmup={warmup}")


if __name__ == "__main__":
    main()

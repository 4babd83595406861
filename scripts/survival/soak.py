"""A long run of a tiny model: memory and open files must stay flat, and the log complete.

    python scripts/survival/soak.py --steps 10000 --output scripts/survival/soak.json

Everything that a run does is on: telemetry, validation, checkpoints, the guard. Linux only (/proc).
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from pydoc_data import topics

from hf_stable import records
from hf_stable.recipes import load_recipe
from hf_stable.telemetry.reading.history import read_history
from hf_stable.training import train

BASE = Path(__file__).parents[2] / "recipes" / "base" / "tiny.yaml"
SETTINGS = {
    "data.sequence_length": 16,
    "optimizer.learning_rate": 1e-3,
    "training.log_every": 1,
    "training.evaluate_every": 500,
    "training.checkpoint_every": 100,
    "training.keep_checkpoints": 5,
    "training.threads": 1,
    "telemetry.every": 50,
    "telemetry.bounds_every": 1000,
    "guard.actions": ["skip", "lower", "rollback"],
}
# What an allocator keeps for itself comes and goes; a leak of 1 kB a step would be 8 MB.
FLAT_BYTES = 8_000_000


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    samples: list[dict[str, int]] = []

    def sample(step: int, loss: float, grad_norm: float) -> None:
        if step % (arguments.steps // 20) == 0:
            files = len(os.listdir("/proc/self/fd"))
            samples.append({"step": step, "bytes": resident_bytes(), "files": files})

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "topics").mkdir()
        for topic, text in topics.topics.items():
            (folder / "topics" / f"{topic}.txt").write_text(text, encoding="utf-8")
        paths = {"data.train": [str(folder / "topics")], "data.cache": str(folder / "cache")}
        chosen = {**SETTINGS, **paths, "training.steps": arguments.steps, "output": f"{name}/run"}
        recipe = load_recipe(BASE, [f"{key}={json.dumps(value)}" for key, value in chosen.items()])
        train(recipe, stop=sample)
        history = read_history(folder / "run")
    half = samples[len(samples) // 2 :]
    result = {
        "recipe": {**SETTINGS, "base": "tiny", "training.steps": arguments.steps},
        "samples": samples,
        # Over the second half: in the first, caches fill.
        "growth_bytes": half[-1]["bytes"] - half[0]["bytes"],
        "growth_files": half[-1]["files"] - half[0]["files"],
        "train_rows": len(history.train["step"]),
        "telemetry_rows": len(history.steps),
        "versions": records.versions(),
        "git_revision": records.git_revision(),
    }
    print(json.dumps({key: result[key] for key in ("growth_bytes", "growth_files", "train_rows")}))
    if arguments.output is not None:
        records.write_json(arguments.output, result)
    complete = history.train["step"].tolist() == list(range(1, arguments.steps + 1))
    flat = result["growth_bytes"] < FLAT_BYTES and result["growth_files"] == 0
    raise SystemExit(not (complete and flat))


if __name__ == "__main__":
    main()

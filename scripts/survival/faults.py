"""What the guard does about faults that are put into a run, and what they cost without it.

    python scripts/survival/faults.py --output scripts/survival/faults.json

One tiny model, one seed. Each fault meets four runs: without a guard, with one that only skips
updates, with one that also rolls back, and with the whole ladder. The figure that counts is the
final validation loss beside that of the run without a fault. Faults of data hit the samples at
their positions in the data, so that going back and leaving them out helps; the others happen once,
at a step.
"""

import argparse
import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import torch

from hf_stable import records, runs, stepping
from hf_stable.errors import DivergedError
from hf_stable.guard import read_rollbacks
from hf_stable.recipes import load_recipe
from hf_stable.training import train

BASE = Path(__file__).parents[2] / "recipes" / "base" / "tiny.yaml"
STEPS, AT = 700, 350
SETTINGS = {
    "training.steps": STEPS,
    "training.log_every": 1,
    "training.evaluate_every": 0,
    "training.evaluate_blocks": 256,
    "training.checkpoint_every": 20,
    "training.keep_checkpoints": 20,
    "training.threads": 1,
    "telemetry.every": 0,
    "schedule.warmup": 20,
    "guard.window": 128,
    "guard.skip_batches": 200,
}
GUARDS = {
    "no guard": {"guard.actions": []},
    "skip only": {"guard.actions": ["skip"]},
    "skip, rollback": {"guard.actions": ["skip", "rollback"]},
    "skip, lower, rollback": {"guard.actions": ["skip", "lower", "rollback"]},
}
Change = Callable[[int, dict[str, torch.Tensor]], dict[str, torch.Tensor]]


@contextmanager
def bad_data(first: int, last: int, change: Change) -> Iterator[None]:
    """Change the microbatches whose samples lie where these steps' would, wherever they come."""
    loader = runs.Run.loader

    def changed(self: runs.Run, first_step: int, num_steps: int) -> Iterator[Any]:
        batch_size = self.recipe.training.global_batch_size
        size, start = self.recipe.training.micro_batch_size, first_step * batch_size
        for index, batch in enumerate(loader(self, first_step, num_steps)):
            positions = self.order.absolute(np.arange(size) + start + index * size)
            step = int(positions[0]) // batch_size + 1
            yield change(step, batch) if first <= step <= last else batch

    runs.Run.loader = changed  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        runs.Run.loader = loader


@contextmanager
def once(step: int, act: Callable[[torch.nn.Module], None]) -> Iterator[None]:
    """Do something to the model after the backward pass of a step, the first time it is taken."""
    clip, taken = stepping.optim.clip_gradients, []

    def clipping(model: torch.nn.Module, *others: Any) -> torch.Tensor:
        taken.append(None)
        if len(taken) == step:
            act(model)
        return clip(model, *others)

    stepping.optim.clip_gradients = clipping  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        stepping.optim.clip_gradients = clip


def _infinite_gradient(model: torch.nn.Module) -> None:
    gradient = next(model.parameters()).grad
    assert gradient is not None
    gradient.view(-1)[0] = math.inf


@torch.no_grad()
def _flip_weight(model: torch.nn.Module) -> None:
    """Flip the highest bit of one weight's exponent, as a cosmic ray may."""
    weight = model.get_parameter("model.layers.1.mlp.down_proj.weight").view(-1)
    bits = weight[:1].view(torch.int32)
    weight[:1] = (bits ^ (1 << 30)).view(torch.float32)


def _random_labels(step: int, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(step)
    labels = batch["shift_labels"]
    return {**batch, "shift_labels": torch.randint(0, 512, labels.shape, generator=draw)}


def _nothing_to_learn(step: int, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch without a target: its loss is 0 / 0."""
    return {**batch, "shift_labels": torch.full_like(batch["shift_labels"], -100)}


FAULTS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "NaN batch": (lambda: bad_data(AT, AT, _nothing_to_learn), {}),
    "Inf gradient": (lambda: once(AT, _infinite_gradient), {}),
    "weight bit-flip": (lambda: once(AT, _flip_weight), {}),
    "corrupt labels, 50 batches": (lambda: bad_data(AT, AT + 49, _random_labels), {}),
    "learning rate 30 times": (lambda: once(0, print), {"optimizer.learning_rate": 0.3}),
}


def run(folder: Path, name: str, fault: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Train once; what the records say of it."""
    place = folder / name.replace(" ", "-").replace(",", "")
    paths = {"data.train": [str(folder / "topics")], "data.cache": str(folder / "cache")}
    chosen = {**SETTINGS, **settings, **paths, "output": str(place)}
    recipe = load_recipe(BASE, [f"{key}={json.dumps(value)}" for key, value in chosen.items()])
    ended = "finished"
    try:
        with fault:
            train(recipe)
    except DivergedError as error:
        ended = str(error)
    rows = records.read_metrics(place)
    losses = [float(row["loss"]) for row in rows if row["event"] == "validation"]
    actions = Counter(
        f"{row['rule']}: {row['action']}" for row in rows if row["event"] in ("guard", "non_finite")
    )
    rollbacks = read_rollbacks(place)
    taken = sum(row["event"] == "train" for row in rows)
    return {
        "ended": ended,
        "validation_loss": losses[-1] if losses and ended == "finished" else None,
        "actions": dict(actions),
        "rollbacks": [[each.at_step, each.to_step] for each in rollbacks],
        "skipped_updates": sum(row.get("action") == "skip" for row in rows),
        "steps_taken": taken,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON")
    arguments = parser.parse_args()
    pairs = (each.partition("=") for each in arguments.set)
    more = {key: json.loads(value) for key, _, value in pairs}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "topics").mkdir()
        for topic, text in topics.topics.items():
            (folder / "topics" / f"{topic}.txt").write_text(text, encoding="utf-8")
        whole = run(folder, "undisturbed", once(0, print), {**GUARDS["no guard"], **more})
        found["undisturbed"] = whole
        for fault, (make, settings) in FAULTS.items():
            for guard, actions in GUARDS.items():
                chosen = {**settings, **actions, **more}
                found[f"{fault}; {guard}"] = run(folder, f"{fault} {guard}", make(), chosen)
    content = {
        "recipe": {"base": "tiny", **SETTINGS, **more},
        "runs": found,
        "versions": records.versions(),
        "git_revision": records.git_revision(),
    }
    print(table(found))
    if arguments.output is not None:
        records.write_json(arguments.output, content)
        arguments.output.with_suffix(".md").write_text(table(found), encoding="utf-8")


def table(found: dict[str, Any]) -> str:
    """A Markdown table of all runs."""
    whole = found["undisturbed"]["validation_loss"]
    lines = [
        "| fault | guard | what it did | updates skipped | steps repeated | final loss "
        "| minus undisturbed |",
        "|---|---|---|---|---|---|---|",
        f"| none | none | | | | {whole:.3f} | |",
    ]
    for name, each in found.items():
        fault, _, guard = name.partition("; ")
        if not guard:
            continue
        loss = each["validation_loss"]
        did = ", ".join(f"{what} x{count}" for what, count in each["actions"].items()) or "nothing"
        repeated = sum(at - to for at, to in each["rollbacks"])
        ended = "gave up" if loss is None else f"{loss:.3f}"
        more = "" if loss is None else f"{loss - whole:+.3f}"
        cells = (fault, guard, did, each["skipped_updates"], repeated, ended, more)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

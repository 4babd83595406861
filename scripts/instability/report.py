"""What the demonstration's runs show: which norms tell divergence apart, and what warned, when.

    python scripts/instability/report.py                        # from the records in this folder
    python scripts/instability/report.py --runs FOLDER --output FOLDER

Writes page.html (figures of the first seed's converging and diverging runs), results.md and
results.json. Runs are folders named `rate-LR-seed-N`, three learning rates a seed.
"""

import argparse
import re
import statistics
import tarfile
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markdown import Markdown

from hf_stable.records import write_json
from hf_stable.telemetry.reading.alarms import alarms
from hf_stable.telemetry.reading.diagnosis import Diagnosis, diagnose
from hf_stable.telemetry.reading.history import History, read_history
from hf_stable.telemetry.reading.page import write_page

HERE = Path(__file__).parent
LINEARS = {"qkv": "QKV", "proj": "Proj", "fc1": "FC1", "fc2": "FC2"}
QUANTITIES = {
    "weight_l2": "W",
    "input_l2": "X",
    "output_l2": "Y",
    "input_grad_l2": "gradient of X",
    "weight_grad_l2": "gradient of W",
}
# Rybakov et al. 2024, section 3: what they see grow in the run that diverges.
PAPER = {("qkv", "output_l2"), ("proj", "output_l2"), ("fc2", "output_l2"),
         ("qkv", "input_grad_l2"), ("fc1", "input_grad_l2")}  # fmt: skip
BLOCK = 1  # the paper shows the second
# A quantity tells the runs apart if it is larger by this factor, with every seed.
FACTOR = 2.0
# What the three learning rates of a seed are called, from the lowest on.
KINDS = ("calm", "converging", "diverging")
Runs = dict[str, History]


def read_runs(folder: Path) -> dict[int, Runs]:
    """By seed, the run of each kind."""
    found: dict[int, list[tuple[float, Path]]] = {}
    for place in folder.iterdir():
        named = re.fullmatch(r"rate-(.+)-seed-(\d+)", place.name)
        if named and (place / "metrics.jsonl").is_file():
            found.setdefault(int(named[2]), []).append((float(named[1]), place))
    if not found:
        raise SystemExit(f"{folder} has no runs named rate-LR-seed-N")
    runs = {}
    for seed, places in sorted(found.items()):
        if len(places) != len(KINDS):
            raise SystemExit(f"{folder} has {len(places)} runs of seed {seed}, not {len(KINDS)}")
        histories = [read_history(place) for _, place in sorted(places)]
        runs[seed] = dict(zip(KINDS, histories, strict=True))
    return runs


def ratio(runs: Runs, column: str, block: int | None, start: float, stop: float) -> float:
    """Median, over the samples of steps (start, stop], of diverging over converging.

    Args:
        block: None takes the largest of all blocks, in either run.
    """
    low, high = runs["converging"], runs["diverging"]
    steps = np.intersect1d(low.steps, high.steps)
    steps = steps[(steps > start) & (steps <= stop)]
    above, below = (
        values.max(1) if block is None else values[:, block]
        for values in (run.telemetry[column][np.isin(run.steps, steps)] for run in (high, low))
    )
    return float(np.median(above / below))


def separation(runs: dict[int, Runs], onsets: dict[int, int | None]) -> list[dict[str, Any]]:
    """Ratios of norms over all seeds, before the loss moved and at the end."""
    rows = []
    for linear, quantity in product(LINEARS, QUANTITIES):
        column = f"layers.*.{linear}/{quantity}"
        end, before, largest = [], [], []
        for seed, each in runs.items():
            last, onset = int(each["diverging"].steps[-1]), onsets[seed]
            end.append(ratio(each, column, BLOCK, 0.75 * last, last))
            largest.append(ratio(each, column, None, 0.75 * last, last))
            if onset is not None:
                before.append(ratio(each, column, BLOCK, onset - 26, onset - 1))
        row: dict[str, Any] = {"linear": linear, "quantity": quantity}
        row |= {"before": before, "end": end, "largest_block": largest}
        row["paper"] = (linear, quantity) in PAPER
        row["largest_tells_apart"] = min(largest) > FACTOR
        row["tells_apart"] = min(end) > FACTOR
        row["warns"] = bool(before) and min(before) > FACTOR
        rows.append(row)
    return rows


def lead_row(seed: int, runs: Runs, found: Diagnosis) -> dict[str, Any]:
    """What is known of one seed's diverging run."""
    return {
        "seed": seed,
        "onset": None if found.onset is None else found.onset.step,
        "first": [{"name": alarm.name, "step": alarm.step} for alarm in found.first],
        "lead": found.lead,
        "lead_range": found.lead_range,
        "validation_loss": {kind: _last_validation(run) for kind, run in runs.items()},
    }


def first_alarms(runs: dict[int, Runs]) -> dict[str, dict[str, dict[int, int]]]:
    """By rule and kind, the first step at which it fired in each seed's run, where it did."""
    firsts: dict[str, dict[str, dict[int, int]]] = {}
    for seed, each in runs.items():
        for kind, run in each.items():
            for alarm in alarms(run):
                steps = firsts.setdefault(alarm.rule, {kind: {} for kind in KINDS})[kind]
                steps.setdefault(seed, alarm.step)
    return firsts


def _last_validation(run: History) -> float:
    return [row["loss"] for row in run.events if row["event"] == "validation"][-1]


def _spread(values: list[float], digits: int = 2) -> str:
    if not values:
        return "-"
    middle, low, high = (
        f"{each:.{digits}f}" for each in (statistics.median(values), min(values), max(values))
    )
    return f"{middle} ({low} to {high})"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown(runs: dict[int, Runs], results: dict[str, Any]) -> str:
    """The results for people."""
    example = next(iter(runs.values()))
    rates = [f"{run.run['recipe']['optimizer']['learning_rate']:g}" for run in example.values()]
    high = example["diverging"]
    return (
        "\n\n".join(
            [
                "# Instability, seen",
                "Baseline of `recipes/demonstrations/instability.yaml` on the King James Bible, "
                f"{len(runs)} seeds, at three peak learning rates: {rates[0]} (calm), {rates[1]} "
                f"(converging, at the edge) and {rates[2]} (diverging). Trained by "
                "`scripts/instability/run.sh`; this file and [page.html](page.html) are made by "
                "`python scripts/instability/report.py` from records.tar.xz. Revision "
                f"{high.run['git_revision']}, {high.run['device']}.",
                *_lead_words(results["leads"]),
                *_rule_words(results["rules"], results["leads"]),
                *_separation_words(results["separation"]),
            ]
        )
        + "\n"
    )


def _lead_words(leads: list[dict[str, Any]]) -> list[str]:
    rows = []
    for row in leads:
        first = ", ".join(f"`{each['name']}` at {each['step']}" for each in row["first"]) or "none"
        span = row["lead_range"]
        lead = "-" if row["lead"] is None else f"{row['lead']} ({span[0]} to {span[1]})"
        losses = [f"{row['validation_loss'][kind]:.2f}" for kind in KINDS]
        rows.append([str(row["seed"]), *losses, str(row["onset"] or "never"), first, lead])
    found = [float(row["lead"]) for row in leads if row["lead"] is not None]
    head = ["seed", *(f"{kind}: last validation loss" for kind in KINDS)]
    head += ["diverging: loss began to rise", "first alarm that stood then", "lead in steps"]
    return [
        "## How long before the loss moved",
        "By `hf-stable diagnose`; ranges are what the distance of samples leaves open.",
        _table(head, rows),
        f"Median lead of the first alarm: {_spread(found, 0)} steps, {len(found)} of {len(leads)} "
        "seeds. An alarm that fires too where the loss goes on falling foretells nothing: see the "
        "next table.",
    ]


def _rule_words(
    rules: dict[str, dict[str, dict[int, int]]], leads: list[dict[str, Any]]
) -> list[str]:
    rows, seeds = [], len(leads)
    for rule, kinds in sorted(rules.items()):
        cells = []
        for kind in KINDS:
            steps = sorted(kinds[kind].values())
            span = f": steps {', '.join(map(str, steps))}" if steps else ""
            cells.append(f"{len(steps)} of {seeds}{span}")
        rows.append([f"`{rule}`", *cells])
    telling = [
        f"`{rule}` ({_distances(kinds['diverging'], leads)})"
        for rule, kinds in sorted(rules.items())
        if len(kinds["diverging"]) == seeds and not kinds["calm"] and not kinds["converging"]
    ]
    false = [f"`{rule}`" for rule, kinds in sorted(rules.items()) if len(kinds["calm"]) == seeds]
    return [
        "## Which alarms tell the runs apart",
        "Seeds with at least one alarm of a rule, and the first step of each.",
        _table(["rule", *KINDS], rows),
        f"Fired with every diverging seed and with no other run: {', '.join(telling) or 'none'}. "
        f"Fired even in every calm run, so of no use here: {', '.join(false) or 'none'}.",
        _early_words(rules, leads),
    ]


def _early_words(rules: dict[str, dict[str, dict[int, int]]], leads: list[dict[str, Any]]) -> str:
    """Return which alarms came before the loss moved, and how often they fired where it did not."""
    onsets = {row["seed"]: row["onset"] for row in leads if row["onset"] is not None}
    early = {
        rule: kinds
        for rule, kinds in sorted(rules.items())
        if onsets
        and all(kinds["diverging"].get(seed, np.inf) < onset for seed, onset in onsets.items())
    }
    words = [
        f"`{rule}` ({len(kinds['converging'])} of {len(leads)} converging runs and "
        f"{len(kinds['calm'])} of {len(leads)} calm ones)"
        for rule, kinds in early.items()
    ]
    specific = [
        f"`{rule}`" for rule, kinds in early.items() if not kinds["converging"] | kinds["calm"]
    ]
    return (
        "Fired before the loss moved with every diverging seed (and in these of the other runs): "
        f"{', '.join(words) or 'none'}. "
        f"Of them, early and specific: {', '.join(specific) or 'none'}."
    )


def _distances(steps: dict[int, int], leads: list[dict[str, Any]]) -> str:
    """Steps from the first alarm of each seed to the move of the loss."""
    found = [f"{row['onset'] - steps[row['seed']]:+d}" for row in leads if row["onset"] is not None]
    return f"first alarm to the move of the loss, by seed: {', '.join(found)} steps"


_VERDICTS = ("warns", "tells_apart", "largest_tells_apart")


def _separation_words(rows: list[dict[str, Any]]) -> list[str]:
    cells = [
        [
            LINEARS[row["linear"]],
            QUANTITIES[row["quantity"]],
            _spread(row["before"]),
            _spread(row["end"]),
            _spread(row["largest_block"]),
            *("yes" if row[key] else "no" for key in _VERDICTS),
            "grows" if row["paper"] else "",
        ]
        for row in rows
    ]
    head = ["map", "norm", "before", "end", "end, largest block"]
    head += ["apart before", "apart at the end", "apart in the largest block", "paper"]

    def names(chosen: list[dict[str, Any]]) -> str:
        each = [f"{QUANTITIES[row['quantity']]} of {LINEARS[row['linear']]}" for row in chosen]
        return ", ".join(each) or "none"

    agree = names([row for row in rows if row["paper"] and row["tells_apart"]])
    differ = names([row for row in rows if row["paper"] and not row["tells_apart"]])
    more = names([row for row in rows if not row["paper"] and row["tells_apart"]])
    anywhere = names([row for row in rows if row["largest_tells_apart"]])
    early = names([row for row in rows if row["warns"]])
    return [
        "## Which norms tell the diverging run from the converging one",
        "L2 norms of the second block, as in the paper: the diverging run's over the converging "
        "one's at the same steps, median over seeds (smallest to largest). *Before* is the 25 "
        "steps up to the move of the loss, *end* the last quarter of the run; *largest block* "
        "takes the block where the norm is largest, in either run. A norm tells runs "
        f"apart if it is more than {FACTOR:g} times larger with every seed.",
        _table(head, cells),
        "Rybakov et al. name five: the outputs of QKV, Proj and FC2, and the input gradients of "
        f"QKV and FC1. At the end these of them tell our runs apart: {agree}. These do not: "
        f"{differ}. Others do: {more}. Before the loss moved: {early}. In the largest block, at "
        f"the end: {anywhere}.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--runs", type=Path, help="folder of runs; this folder's records unless given"
    )
    parser.add_argument("--output", type=Path, default=HERE, help="where the results go")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.runs
        if folder is None:
            folder = Path(scratch)
            with tarfile.open(HERE / "records.tar.xz") as archive:
                archive.extractall(folder, filter="data")
        runs = read_runs(folder)
        found = {seed: diagnose(each["diverging"]) for seed, each in runs.items()}
        onsets = {
            seed: None if each.onset is None else each.onset.step for seed, each in found.items()
        }
        results = {
            "leads": [lead_row(seed, each, found[seed]) for seed, each in runs.items()],
            "rules": first_alarms(runs),
            "separation": separation(runs, onsets),
        }
        arguments.output.mkdir(parents=True, exist_ok=True)
        write_json(arguments.output / "results.json", results)
        text = markdown(runs, results)
        (arguments.output / "results.md").write_text(text, encoding="utf-8")
        shown = next(iter(runs.values()))
        write_page([shown[kind] for kind in KINDS[1:]], arguments.output / "page.html")
    Console().print(Markdown(text))


if __name__ == "__main__":
    main()

"""Render the card of a study's best checkpoint: lowest perplexity over the documents of its text.

    python scripts/studies/cards.py runs/sweeps/table4_cpu model_cards [LEARNING_RATE]

The study must have kept its models and scored them (`keep_models`, `perplexity_documents`). The
learning rate is needed where the study has several; the card names the checkpoint with its seed.
"""

import sys
from pathlib import Path

import numpy as np

from hf_stable.card import Statement, write_card
from hf_stable.errors import UserError
from hf_stable.sweep.study import Result, Study, read_study


def candidates(study: Study, rate: float) -> dict[str, float]:
    """Perplexity per token by id, of stable runs at one learning rate that left their model."""
    found = {}
    for run in study.results:
        sums = study.perplexities.get(run.id)
        kept = (study.folder / "runs" / run.id / "model" / "config.json").is_file()
        if sums is not None and kept and run.stable and run.place.learning_rate == rate:
            nll, tokens = sums[:, :2].sum(axis=0)
            found[run.id] = float(np.exp(nll / tokens))
    return found


def chosen_rate(study: Study, wanted: str | None) -> float:
    """The learning rate asked for, or the only one."""
    if wanted is None and len(study.rates) == 1:
        return study.rates[0]
    if wanted is None or float(wanted) not in study.rates:
        raise UserError(f"learning rate {wanted}: name one of the study's, {study.rates}")
    return float(wanted)


def note(study: Study, best: Result, perplexities: dict[str, float]) -> str:
    """How it was chosen, which makes its numbers look better than they are."""
    place = best.place
    return (
        f"Best of {len(perplexities)} checkpoints of the study {study.name}: method "
        f"{place.method}, learning rate {place.learning_rate:g}, seed {place.seed}. It was chosen "
        "by its perplexity on the very documents below, so that number is too good: read the "
        f"study's report, scripts/studies/{study.name}/report.md, for what the method gives."
    )


def main() -> None:
    """Write the card and its picture."""
    study, output = read_study(Path(sys.argv[1])), Path(sys.argv[2])
    rate = chosen_rate(study, sys.argv[3] if len(sys.argv) > 3 else None)
    perplexities = candidates(study, rate)
    if not perplexities:
        raise UserError(
            f"{study.folder}: no stable run at {rate:g} has a model and a perplexity; the plan "
            "needs keep_models and perplexity_documents"
        )
    identity = min(perplexities, key=lambda each: perplexities[each])
    best = next(run for run in study.results if run.id == identity)
    name = f"{study.name}_{identity}"
    file = write_card(
        study.folder / "runs" / identity,
        output / f"{name}.md",
        evaluations=[study.folder / "perplexity" / f"{identity}.json"],
        statement=Statement(
            name=name,
            license="apache-2.0",
            repository="..",
            notes=(note(study, best, perplexities),),
        ),
        picture=f"{name}.png",
    )
    print(f"written: {file}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")

"""Rendering of a model card from a run's records: `render_card`, and `write_card` with its picture.

Every value comes from the records or from `Statement`; others are left out.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_stable import records
from hf_stable.errors import UserError
from hf_stable.telemetry.reading.history import read_history

from . import applied, sections
from .evaluations import Evaluation, find_evaluations, read_evaluation
from .facts import Facts, finite
from .markdown import Made, escape, fill
from .metadata import problems
from .picture import draw_picture
from .privacy import clean, leaks
from .texts import languages

PICTURE = "training_curve.png"
# Changes of the weights by an export: {"notes": [sentence, ...], ...}.
EXPORT_RECORD = "records/export.json"


@dataclass(frozen=True)
class Statement:
    """Facts that the publisher states because no record holds them.

    Args:
        name: Name of the model; None takes the recipe's.
        license: License of the weights, as one of the Hub's identifiers; None leaves it out.
        watts: Power of each process's device during training, to estimate the energy.
        repository: Address of hf_stable's sources, used in links to the studies.
        notes: Sentences to put first, such as how the checkpoint was chosen.
        license_name: Name of a license that is "other".
        license_link: Address of the text of that license.
    """

    name: str | None = None
    license: str | None = None
    watts: float | None = None
    repository: str | None = None
    notes: tuple[str, ...] = ()
    license_name: str | None = None
    license_link: str | None = None

    def __post_init__(self) -> None:
        named = self.license_name or self.license_link
        if named and self.license != "other":
            raise UserError(
                f"license_name or license_link is {named!r}, but license is {self.license!r}: they "
                'name one that is "other"'
            )


def render_card(
    run: Path,
    *,
    evaluations: Sequence[Path] | None = None,
    statement: Statement | None = None,
    picture: str | None = None,
) -> ModelCard:
    """Render the card of one run.

    Args:
        run: Folder of the run. If run.json, metrics.jsonl or config.json is missing, the card says
            so, with the command that writes it.
        evaluations: JSON files from `hf-stable evaluate --output`, or a study's perplexity/ID.json;
            None takes RUN/evaluation*.json.
        statement: Facts that no record holds.
        picture: File of the training curve, relative to the card; None if there is none.

    Raises:
        UserError: If records or evaluations are damaged, an evaluation belongs to another run, or
            the card has content that the Hub would refuse or that must stay private.
    """
    statement = statement or Statement()
    files = find_evaluations(run) if evaluations is None else evaluations
    scored = [read_evaluation(file, run) for file in files]
    facts = read_facts(run)
    with _damage_named(run):
        name = clean(statement.name or facts.recipe.get("name") or run.resolve().name)
        text = _filled(" ".join(name.split()), facts, scored, statement, picture)
    if found := leaks(text):
        raise UserError(
            f"the card of {run} would publish {' and '.join(found)}: remove it from run.json and "
            "from the stated facts"
        )
    return ModelCard(text)


def _filled(
    name: str,
    facts: Facts,
    scored: Sequence[Evaluation],
    statement: Statement,
    picture: str | None,
) -> str:
    """Return the card's text with its header."""
    header = _header(name, facts, scored, statement)
    if found := problems(header.to_dict()):
        raise UserError(f"{name}: the Hub would refuse its card: {'; '.join(found)}")
    return fill(
        header=Made(header.to_yaml()),
        name=name,
        summary=sections.summary(facts),
        notes=[escape(note) for note in (*sections.origins(facts), *statement.notes)],
        evaluations=[sections.evaluation(each, facts) for each in scored],
        validation=sections.validation(facts),
        baselines=sections.baselines(facts),
        picture=None if picture is None else Made(picture),
        no_picture=sections.no_picture(facts),
        techniques=applied.rows(facts, statement.repository),
        no_techniques=applied.none_applied(facts),
        data=sections.data(facts),
        recipe=sections.recipe(facts),
        hardware=sections.hardware(facts),
        energy=sections.energy(facts, statement.watts),
        limits=sections.limits(facts, scored),
        baseline_paper=applied.baseline_paper(),
        bibtex=applied.bibtex(facts),
    )


def write_card(
    run: Path,
    file: Path,
    *,
    evaluations: Sequence[Path] | None = None,
    statement: Statement | None = None,
    picture: str = PICTURE,
) -> Path:
    """Write the card of `render_card` and, if it can be drawn, the training curve beside it.

    Args:
        run: Folder of the run.
        file: File of the card, such as FOLDER/README.md. If FOLDER is an export with changed
            weights, the card says so first.
        evaluations: See `render_card`.
        statement: Facts that no record holds.
        picture: Name of the curve's file.

    Returns:
        `file`.

    Raises:
        UserError: See `render_card`.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    statement = statement or Statement()
    notes = (*_export_notes(file.parent), *statement.notes)
    statement = dataclasses.replace(statement, notes=notes)
    image = draw_picture(read_facts(run).history)
    drawn = None if image is None else picture
    card = render_card(run, evaluations=evaluations, statement=statement, picture=drawn)
    if image is not None:
        (file.parent / picture).write_bytes(image)
    card.save(file)
    return file


def _export_notes(folder: Path) -> tuple[str, ...]:
    file = folder / EXPORT_RECORD
    if not file.is_file():
        return ()
    with _damage_named(folder):
        return tuple(map(str, json.loads(file.read_text(encoding="utf-8"))["notes"]))


def read_facts(run: Path) -> Facts:
    """Read all facts about a run for its card, without secrets and local paths.

    Args:
        run: Folder of a run or model.

    Raises:
        UserError: If the folder holds neither a run nor a model, or its records are damaged.
    """
    content: dict[str, Any] = {}
    with _damage_named(run):
        if (run / "run.json").is_file():
            content = dict(records.read_run(run))
        elif (run / "config.json").is_file():
            config = json.loads((run / "config.json").read_text(encoding="utf-8"))
            content = {"model_config": config}
        for place in (run / records.CONVERSION, run / "records" / records.CONVERSION):
            if place.is_file():
                content["conversion"] = json.loads(place.read_text(encoding="utf-8"))
        history = read_history(run) if (run / "metrics.jsonl").is_file() else None
    if not content and history is None:
        raise UserError(
            f"{run} holds neither run.json, metrics.jsonl nor config.json: name the folder that "
            "`hf-stable train` wrote"
        )
    content = clean(content)
    if history is not None:
        history = dataclasses.replace(
            history,
            folder=Path(clean(run.resolve().name)),
            run=content,
            events=clean(history.events),
        )
    return Facts(content, history)


@contextlib.contextmanager
def _damage_named(run: Path) -> Iterator[None]:
    """Raise UserError for records in another format than training writes."""
    try:
        yield
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{run}: its records are damaged ({type(error).__name__}: {error}); restore run.json "
            "(or config.json) and metrics.jsonl"
        ) from error


def _header(
    name: str, facts: Facts, scored: Sequence[Evaluation], statement: Statement
) -> ModelCardData:
    """Build the YAML header; unknown values are left out."""
    sources = [source for part in facts.parts for source in facts.sources(part)]
    found = {source.get("content", {}).get("dataset") for source in sources} - {None}
    results = [result for each in scored for result in _results(each, facts)]
    made = facts.run.get("conversion") or {}
    return ModelCardData(
        license=statement.license,
        license_name=statement.license_name,
        license_link=statement.license_link,
        # Only a model converted from the Hub has a revision.
        base_model=made["source"] if made.get("revision") else None,
        language=languages(sources) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hf_stable", "stable_gpt", *applied.tags(facts)],
        datasets=sorted(found) or None,
        model_name=name if results else None,
        eval_results=results or None,
    )


def _results(evaluation: Evaluation, facts: Facts) -> list[EvalResult]:
    """Return the finite numbers of one text, each with its interval."""
    text, identity = (
        sections.text_name(evaluation, facts),
        sections.text_identity(evaluation, facts),
    )
    found = []
    for score in evaluation.scores:
        if not finite(score.value):
            continue
        details: dict[str, Any] = {"documents": evaluation.documents}
        if score.low is not None:
            details |= {"low": score.low, "high": score.high, "confidence": evaluation.confidence}
        found.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=identity,
                dataset_name=text,
                dataset_split="validation" if evaluation.text is None else None,
                metric_type=score.metric,
                metric_name=score.name,
                metric_value=score.value,
                metric_args=details,
            )
        )
    return found

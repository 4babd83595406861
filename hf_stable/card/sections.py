"""Sections of a card, made from the records; each names the command for missing records."""

import math
import re
from collections.abc import Sequence
from typing import Any

from hf_stable.recipes import strict_yaml

from .evaluations import Evaluation
from .facts import Facts, finite
from .markdown import Made, block, escape
from .privacy import clean
from .texts import known_text

_NAMES_SHOWN = 4
_TRAIN = "`hf-stable train RECIPE` records it."


def summary(facts: Facts) -> Made:
    """Describe the model in one paragraph."""
    words = ["A decoder-only language model of the StableGPT family"]
    if facts.run.get("parameters"):
        words.append(f" with {facts.run['parameters']:,} parameters")
        if facts.run.get("parameters_of_blocks"):
            words.append(f" ({facts.run['parameters_of_blocks']:,} in its blocks)")
    if facts.steps is not None and facts.tokens_per_step is not None:
        words.append(
            f", trained for {facts.steps:,} steps of "
            f"{facts.tokens_per_step:,} tokens, {facts.steps * facts.tokens_per_step:,} in all"
        )
    words.append(". Everything below is from the records of its training run")
    return Made("".join(words) + ("." if facts.recipe else ", of which none are here."))


def origins(facts: Facts) -> list[str]:
    """Describe the origin of the initial weights, unless they are random."""
    found = []
    if start := facts.run.get("initial_model"):
        switched = ", ".join(
            f"{name} {there!r} to {here!r}" for name, (there, here) in start["switched"].items()
        )
        found.append(
            f"Training began with the weights of {start['folder']} (SHA-256 {start['sha256']}); "
            f"changed by then: {switched or 'nothing'}, which made the perplexity on held-out text "
            f"{start['perplexity_ratio']:.4f} times what it was."
        )
    if made := facts.run.get("conversion"):
        revision = f" at revision {made['revision']}" if made["revision"] else ""
        found.append(
            f"Converted by `hf-stable convert` from {made['source']}{revision}, a "
            f"{made['model_type']} checkpoint: its licence and its training are that one's. Logits "
            f"of both differ by {made['difference']:.1e} of the largest in float64, and by "
            f"{made['saved_difference']:.1e} with these {made['dtype']} weights."
        )
    return found


def text_name(evaluation: Evaluation, facts: Facts) -> str:
    """Return the name of the scored text, for readers."""
    if evaluation.text is None:
        return f"validation part of {_names(facts, 'validation')}"
    return ", ".join(str(clean(name)) for name in evaluation.text)


def text_identity(evaluation: Evaluation, facts: Facts) -> str:
    """Return the scored text as an id: the dataset's on the Hub, or the files' names."""
    if evaluation.text is None:
        name = _dataset(facts.sources("validation")) or _names(facts, "validation")
    else:
        name = text_name(evaluation, facts)
    if re.fullmatch(r"(?:[\w-]+/)?[\w.-]+", name, re.ASCII):
        return name
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-") or "text"


def _dataset(sources: Sequence[dict[str, Any]]) -> str | None:
    """Return the dataset that all sources share, or None."""
    found = {source.get("content", {}).get("dataset") for source in sources}
    return found.pop() if len(found) == 1 else None


def _names(facts: Facts, part: str) -> str:
    """Return the names of a token file's texts: known titles, else the names of files."""
    found = []
    for source in facts.sources(part):
        text = known_text(source)
        found.append(source.get("path", "unnamed") if text is None else text.title)
    names = list(dict.fromkeys(map(str, found)))
    more = len(names) - _NAMES_SHOWN
    shown = ", ".join(names[:_NAMES_SHOWN]) or "a text that is not in the records"
    return f"{shown} and {more} more" if more > 0 else shown


def evaluation(found: Evaluation, facts: Facts) -> Made:
    """Return one text's perplexities with their intervals."""
    head = f"{100 * found.confidence:g} % interval"
    lines = [
        f"On {escape(text_name(found, facts))}: {found.documents:,} documents, "
        f"{found.tokens:,} tokens" + _windows(found.windows),
        "",
        f"| | value | {head} |",
        "| --- | ---: | ---: |",
    ]
    for score in found.scores:
        interval = "–" if score.low is None else f"{score.low:,.4f} to {score.high:,.4f}"
        lines.append(f"| {score.name} | {score.value:,.4f} | {interval} |")
    if found.note:
        lines += ["", f"No interval: {escape(found.note)}."]
    return Made("\n".join(lines))


def _windows(windows: tuple[int, int] | None) -> str:
    return "." if windows is None else f"; windows of {windows[0]:,} tokens, stride {windows[1]:,}."


def validation(facts: Facts) -> Made:
    """Return the last validation of training, which uses part of the text, without interval."""
    last = facts.last("validation")
    if last is None:
        return Made(f"Validation while training: the records hold none. {_TRAIN}")
    value = f"{last['perplexity']:,.4f}" if finite(last["perplexity"]) else "not finite"
    blocks = facts.of("training.evaluate_blocks")
    of = f" on up to {blocks:,} sequences" if blocks else ""
    return Made(
        f"Last validation while training, at step {last['step']:,}{of}, without an interval: "
        f"perplexity {value} per token."
    )


def baselines(facts: Facts) -> Made:
    """Return the perplexities of tables of single tokens and of pairs."""
    data = facts.run.get("data") or {}
    shown = [
        f"{math.exp(data[key]):,.2f} for a table of {name}"
        for name, key in (
            ("single tokens", "unigram_nats_per_token"),
            ("pairs", "bigram_nats_per_token"),
        )
        if finite(data.get(key))
    ]
    return Made(f"For comparison, perplexity per token: {', '.join(shown)}." if shown else "")


def no_picture(facts: Facts) -> Made:
    """Explain why there is no training curve."""
    if facts.steps is None:
        return Made("No training loss is in the records. `hf-stable train RECIPE` logs it.")
    return Made("Not drawn: matplotlib was not there. `pip install 'hf_stable[figures]'` has it.")


def data(facts: Facts) -> list[Made]:
    """Return one table for the training text and one for the validation text."""
    return [_data(facts, part) for part in facts.parts]


def _data(facts: Facts, part: str) -> Made:
    found, licences = facts.parts[part], []
    for source in facts.sources(part):
        text, stated = known_text(source), source.get("license")
        unknown = "not in the records: see where the text is from"
        known = unknown if text is None else f"{text.licence} ({text.origin})"
        licences.append(f"{stated} (stated in the recipe)" if stated else known)
    rows = [("text", _names(facts, part)), ("licence", "; ".join(dict.fromkeys(licences)))]
    rows += [("held out", share) for share in _tails(facts, part)]
    if found.get("share_in_training"):
        rows.append(("of it in the training text too", f"{found['share_in_training']:.0%}"))
    report = found.get("report") or {}
    counts = [
        ("documents", found.get("documents")),
        ("tokens", found.get("tokens")),
        ("bytes of text", report.get("text_bytes")),
    ]
    rows += [(name, f"{count:,}") for name, count in counts if isinstance(count, int)]
    rows += [("fingerprint", found["fingerprint"])] if found.get("fingerprint") else []
    title = "training" if part == "train" else part
    lines = [f"| {title} | |", "| --- | --- |"]
    return Made("\n".join([*lines, *(f"| {name} | {escape(value)} |" for name, value in rows)]))


def _tails(facts: Facts, part: str) -> list[str]:
    """Describe how documents are divided if there are too few to hold out whole ones."""
    contents = [source.get("content") or {} for source in facts.sources(part)]
    shares = {each["holdout"] for each in contents if each.get("holdout_by") == "tail"}
    return [f"the end of each document, {share:.2%} of it" for share in sorted(shares)]


def recipe(facts: Facts) -> Made | None:
    """Return the complete recipe."""
    return block(strict_yaml.dump(facts.recipe), "yaml") if facts.recipe else None


def hardware(facts: Facts) -> list[dict[str, Made]]:
    """Return the hardware and software of the training."""
    run, seconds, flops = facts.run, facts.seconds, facts.run.get("flops_per_token")
    versions = [f"{name} {number}" for name, number in (run.get("versions") or {}).items()]
    backend = run.get("attn_implementation")
    reason = f" ({run['attn_reason']})" if run.get("attn_reason") else ""
    rows = {
        "device": run.get("device"),
        "processes": run.get("processes"),
        "distributed": run.get("distributed_type"),
        "precision": facts.of("training.precision"),
        "attention": f"{backend}{reason}" if backend else None,
        "loss": run.get("loss_implementation"),
        "compiled": run.get("compile"),
        "time of training steps": None if seconds is None else _duration(seconds),
        "FLOPs per token": f"{flops:,.0f}" if finite(flops) else None,
        "versions": ", ".join(versions) or None,
        "revision of hf_stable": run.get("git_revision"),
    }
    return [
        {"name": escape(name), "value": escape(value)}
        for name, value in rows.items()
        if value is not None
    ]


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:,.2f} hours" if seconds >= 3600 else f"{seconds:,.1f} seconds"


def energy(facts: Facts, watts: float | None) -> Made:
    """Estimate the energy from the recorded time and a stated power; neither is guessed."""
    seconds, processes = facts.seconds, facts.run.get("processes")
    if seconds is None or not processes:
        return Made(f"Energy: no estimate, because the records hold no training time. {_TRAIN}")
    if watts is None:
        return Made(
            "Energy: no estimate, because no record holds the power drawn. `hf-stable card RUN "
            "--output FOLDER --watts W` states it for each process's device."
        )
    hours = watts * processes * seconds / 3.6e6
    return Made(
        f"Energy, an estimate and no measurement: {hours:.3g} kWh, at an assumed {watts:g} W for "
        f"each of {processes} processes over {_duration(seconds)} of training steps. Validation, "
        "the rest of the machine, cooling and earlier attempts are not in it."
    )


def limits(facts: Facts, scored: Sequence[Evaluation]) -> list[Made]:
    """Describe the limits of the model, and of the meaning of its numbers."""
    found = [
        "It continues text. It was not taught to follow instructions, and no record holds a test "
        "of its safety, its biases or its facts: what it writes is no more reliable than the text "
        "that it was trained on.",
        *_of_training(facts),
    ]
    if scored:
        found.append(
            "Intervals are over documents: they speak of these weights on other documents of the "
            "kind, not of other seeds and not of other text."
        )
    if facts.of("seed") is not None:
        found.append(f"One seed ({facts.of('seed')}): another one gives other numbers.")
    found.append("Numbers per token do not compare across tokenizers; bits per byte do.")
    return [Made(words) for words in found]


def _of_training(facts: Facts) -> list[str]:
    found, length = [], facts.of("data.sequence_length")
    if length:
        found.append(f"It was trained on sequences of {length:,} tokens and not beyond.")
    tokens = (facts.parts.get("train") or {}).get("tokens")
    if tokens and facts.steps and facts.tokens_per_step:
        passes = facts.steps * facts.tokens_per_step / tokens
        found.append(
            f"It has seen {passes:.2f} times the {tokens:,} tokens of its training text, and knows "
            "nothing beyond that text."
        )
    if facts.last("finished") is None:
        at = "" if facts.steps is None else f" at step {facts.steps:,}"
        of = "" if facts.planned_steps is None else f" of {facts.planned_steps:,}"
        found.append(f"The records do not say that training was finished{at}{of}.")
    refused = sum(row["event"] == "non_finite" for row in facts.events)
    if refused:
        found.append(f"{refused:,} updates were refused because they were not finite.")
    return found

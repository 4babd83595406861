"""Implementation of each subcommand. Heavy imports stay inside functions, for instant help."""

# ruff: noqa: PLC0415

import json
import math
import os
import shlex
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_stable.cli import convert
from hf_stable.cli.push import export_command, push_command
from hf_stable.cli.statement import statement_of
from hf_stable.errors import UserError
from hf_stable.wording import counted, significant

# Most tokens that `generate` adds by default.
_NEW_TOKENS = 100

if TYPE_CHECKING:
    from hf_stable.data import ReadReport, Source
    from hf_stable.recipes import Recipe


def _recipe_of(arguments: Namespace) -> "Recipe":
    from hf_stable.recipes import load_recipe

    overrides = [override for group in arguments.set or [] for override in group]
    if vars(arguments).get("output") is not None:  # only `train` has it
        overrides.append(f"output={json.dumps(arguments.output)}")
    # Printing a recipe skips building its model, whose import takes seconds.
    return load_recipe(arguments.recipe, overrides, builds_model=not arguments.print_config)


def _sources_of(
    paths: Sequence[str], arguments: Namespace, report: "ReadReport", **fields: Any
) -> "list[Source]":
    from hf_stable.data import Source, expand

    shared = {key: vars(arguments)[key] for key in ("column", "sample_by", "max_bad_share")}
    sources = [Source(path=path, **shared, **fields) for path in paths]
    return expand(sources, report, shared_options=True)


def _recipes(arguments: Namespace) -> None:
    from hf_stable.recipes import shipped

    name, output = arguments.name, arguments.output
    if arguments.action == "list":
        names = shipped.names()
        width = max(len(each) for each in names)
        print("\n".join(f"{each:<{width}}  {shipped.summary(each)}" for each in names))
    elif name is None:
        raise UserError(
            f"recipes {arguments.action} needs a NAME; `hf-stable recipes list` has all"
        )
    elif arguments.action == "show":
        print(shipped.read(name), end="")
    else:
        written = shipped.copy(name, None if output is None else Path(output))
        print("\n".join(f"written: {path}" for path in written))


def _train(arguments: Namespace) -> int:
    recipe = _recipe_of(arguments)
    if arguments.print_config:
        _print_recipe(recipe)
        return 0
    from hf_stable.parallel import end_processes
    from hf_stable.preemption import EXIT_INTERRUPTED, EXIT_PREEMPTED
    from hf_stable.training import train

    result = train(recipe, resume=arguments.resume)
    end_processes()
    if result.preempted:
        return EXIT_INTERRUPTED if result.signal == signal.SIGINT else EXIT_PREEMPTED
    if os.environ.get("RANK", "0") == "0":
        already = f"{result.folder} is already finished: " if result.was_finished else ""
        print(
            f"{already}validation perplexity {significant(result.validation_perplexity)} after "
            f"{counted(result.steps, 'step')}"
        )
        folder, exported = (
            shlex.quote(str(each)) for each in (result.folder, Path("exports") / result.folder.name)
        )
        print(f"next: hf-stable evaluate {folder}")
        print(f'      hf-stable generate {folder} --prompt "In the beginning"')
        print(f"      hf-stable export {folder} --output {exported}")
        if result.was_finished:
            print("to train longer: the same command with more training.steps and --resume longer")
    return 0


def _check(arguments: Namespace) -> None:
    recipe = _recipe_of(arguments)
    if arguments.print_config:
        return _print_recipe(recipe)
    from hf_stable.check import check

    report = check(recipe, arguments.gpus)
    rows = report.rows()
    width = 2 + max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}{value}")
    for note in report.notes:
        print(f"note: {note}")
    print(f"{recipe.name}: this recipe works")


def _plan(arguments: Namespace) -> None:
    recipe = _recipe_of(arguments)
    if arguments.print_config:
        return _print_recipe(recipe)
    from rich.console import Console

    from hf_stable.cli.plan_table import print_plans
    from hf_stable.planning import plan
    from hf_stable.roofline import DEVICES

    device = DEVICES[arguments.gpu]
    plans = [
        plan(recipe, gpus, arguments.gpu_memory, arguments.gpus_per_node, device)
        for gpus in arguments.gpus
    ]
    # Output to a file or pipe gets whole lines, as Markdown.
    console = Console() if sys.stdout.isatty() else Console(width=200, soft_wrap=True)
    print_plans(plans, arguments.price_per_gpu_hour, console)


def _print_recipe(recipe: "Recipe") -> None:
    from hf_stable.recipes import resolved

    print(resolved(recipe), end="")


def _tokenizer(arguments: Namespace) -> None:
    from hf_stable.data import (
        ReadReport,
        read_documents,
        refuse_unusable,
        shortage,
        train_tokenizer,
    )

    report = ReadReport()
    sources = _sources_of(arguments.input, arguments, report)
    refuse_unusable(sources)
    texts = (text for source in sources for text in read_documents(source, report))
    tokenizer = train_tokenizer(
        texts,
        kind=arguments.kind,
        vocab_size=arguments.vocab_size,
        folder=Path(arguments.output),
        progress=True,
    )
    if line := shortage(tokenizer, arguments.vocab_size):
        print(line, file=sys.stderr)
    print("\n".join(report.lines()))
    print(f"{arguments.kind} tokenizer of {len(tokenizer):,} tokens in {arguments.output}")


def _evaluated(arguments: Namespace, report: "ReadReport") -> "list[Source]":
    """Return the sources of --data; the test split of data with splits, unless one is named."""
    from hf_stable.data import has_splits

    split = arguments.split
    if split is None and any(has_splits(path) for path in arguments.data):
        split = "test"
    return _sources_of(arguments.data, arguments, report, name=arguments.name, split=split)


def _evaluate(arguments: Namespace) -> None:
    from itertools import islice

    from hf_stable.checksums import weights_of
    from hf_stable.corpus import sources_of, training_text_line
    from hf_stable.data import ReadReport, expand, read_documents, refuse_unusable
    from hf_stable.evaluation import load_model, model_place, perplexity
    from hf_stable.recipes import from_dict
    from hf_stable.records import read_run, write_json

    report = ReadReport()
    folder = Path(arguments.model)
    run = read_run(folder) if (folder / "run.json").is_file() else None
    output = _evaluation_file(arguments, run is not None)
    if arguments.data is not None:
        sources = _evaluated(arguments, report)
    elif run is not None:
        sources = expand(sources_of(from_dict(run["recipe"]))[1], report)
    else:
        raise UserError(f"{folder} is not a run, so it has no text to evaluate on: give --data")
    refuse_unusable(sources)
    if run is not None and (line := training_text_line(sources, run["data"])):
        print(line, file=sys.stderr)
    documents = (text for source in sources for text in read_documents(source, report))
    model, tokenizer = load_model(
        model_place(arguments.model),
        revision=arguments.revision,
        trust_remote_code=arguments.trust_remote_code,
    )
    result = perplexity(
        model,
        tokenizer,
        islice(documents, arguments.limit_documents),
        max_length=arguments.max_length,
        stride=arguments.stride,
        batch_size=arguments.batch_size,
        progress=True,
    )
    content = {"model": arguments.model, "data": arguments.data, **result.to_dict()}
    content["report"] = report.to_dict()
    if run is not None:
        content["weights"] = weights_of(folder / "model")
    lines = [*report.problem_lines(), result.table()]
    if run is not None and arguments.data is None:
        for name in ("bigram", "unigram"):
            nats = content[f"{name}_nats_per_token"] = run["data"][f"{name}_nats_per_token"]
            label, shown = f"{name} table per token", significant(math.exp(nats))
            lines.append(f"{label:<22}{shown:>12}   {nats:.4f} nats")
    if output is not None:
        write_json(output, content)
        lines.append(f"written: {output}")
    print("\n".join(lines))


def _evaluation_file(arguments: Namespace, is_run: bool) -> Path | None:
    """Return the file for the result, if any: a full evaluation on a run's text goes into it."""
    if arguments.output is not None:
        return Path(arguments.output)
    is_whole = arguments.data is None and arguments.limit_documents is None
    return Path(arguments.model) / "evaluation.json" if is_run and is_whole else None


def _generate(arguments: Namespace) -> None:
    import torch

    from hf_stable.data import boundary_ids
    from hf_stable.evaluation import load_model, model_place

    loaded, tokenizer = load_model(model_place(arguments.model), revision=arguments.revision)
    model: Any = loaded  # decorators hide the signature of generate
    ids = (
        boundary_ids(tokenizer)[0] + tokenizer(arguments.prompt, add_special_tokens=False).input_ids
    )
    longest = model.config.to_dict().get("max_position_embeddings")
    count = _new_tokens(arguments.max_new_tokens, len(ids), longest)
    torch.manual_seed(arguments.seed)
    prompt = torch.tensor([ids], device=model.device)
    sampling = {"temperature": arguments.temperature, "top_k": arguments.top_k}
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=count,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        **({"do_sample": True, **sampling} if arguments.temperature > 0 else {"do_sample": False}),
    )
    print(tokenizer.decode(output[0], skip_special_tokens=True))


def _new_tokens(asked: int | None, prompt: int, longest: int | None) -> int:
    """Return the number of tokens to add: as requested, else up to 100 that still fit."""
    room = math.inf if longest is None else longest - prompt
    if asked is None and room >= 1:
        return int(min(_NEW_TOKENS, room))
    if room < 1 or (asked is not None and asked > room):
        more = "" if asked is None else f" and --max-new-tokens {asked}"
        raise UserError(
            f"the prompt's {prompt} tokens{more} exceed the model's {longest} positions; "
            "shorten one of them"
        )
    return asked or _NEW_TOKENS


def _card(arguments: Namespace) -> None:
    from hf_stable.card import write_card

    named = arguments.evaluations
    file = write_card(
        Path(arguments.run),
        Path(arguments.output) / "README.md",
        evaluations=None if named is None else [Path(each) for each in named],
        statement=statement_of(arguments),
    )
    print(f"written: {file}")


def _watch(arguments: Namespace) -> None:
    folders = [Path(run) for run in arguments.runs]
    if arguments.html is not None:
        from hf_stable.telemetry.reading.history import read_history
        from hf_stable.telemetry.reading.page import write_page

        write_page([read_history(folder) for folder in folders], Path(arguments.html))
        print(f"written to {arguments.html}; open it in a browser")
        return
    from rich.console import Console

    from hf_stable.telemetry.reading.terminal import watch_runs

    console = Console()
    once = arguments.once or not console.is_terminal
    watch_runs(folders, console, arguments.refresh, once)


def _diagnose(arguments: Namespace) -> None:
    from rich.console import Console

    from hf_stable.records import write_json
    from hf_stable.telemetry.reading.diagnosis import diagnose
    from hf_stable.telemetry.reading.history import read_history
    from hf_stable.telemetry.reading.terminal import print_diagnosis

    diagnosis = diagnose(read_history(Path(arguments.run)))
    if arguments.json is not None:
        write_json(Path(arguments.json), diagnosis.to_dict())
    print_diagnosis(diagnosis, Console())


def _sweep(arguments: Namespace) -> None:
    from rich.console import Console

    from hf_stable.recipes import strict_yaml
    from hf_stable.sweep.execute import execute
    from hf_stable.sweep.plan import load_plan, planned_runs
    from hf_stable.sweep.preview import preview

    settings = [setting for group in arguments.set or [] for setting in group]
    plan = load_plan(Path(arguments.plan), settings, arguments.output)
    if arguments.dry_run:
        return Console().print(preview(plan, planned_runs(plan), arguments.workers))
    slurm = None
    if arguments.slurm is not None:
        pairs = (each.partition("=") for each in arguments.slurm)
        slurm = {key: strict_yaml.parse(value, f"--slurm {key}") for key, _, value in pairs}
    study = execute(plan, workers=arguments.workers, slurm=slurm)
    print(f"next: hf-stable report {shlex.quote(str(study))}")


def _report(arguments: Namespace) -> None:
    from hf_stable.sweep.report import write_report

    folders = [Path(study) for study in arguments.studies]
    output = Path(arguments.output) if arguments.output is not None else folders[0]
    write_report(folders, output)
    print(f"written: {output / 'report.md'} and {output / 'report.html'}")


def _sample_text(arguments: Namespace) -> None:
    from hf_stable.data import write_sample_text

    text = write_sample_text(Path(arguments.output))
    print(f"{text.title}: {text.chapters:,} chapters, {text.bytes:,} bytes in {arguments.output}")
    print(f"from {text.origin}; license: {text.licence}; sha256 {text.sha256}")


COMMANDS: dict[str, Callable[[Namespace], int | None]] = {
    "recipes": _recipes,
    "train": _train,
    "check": _check,
    "plan": _plan,
    "tokenizer": _tokenizer,
    "evaluate": _evaluate,
    "generate": _generate,
    "export": export_command,
    "card": _card,
    "convert": convert.run,
    "push": push_command,
    "watch": _watch,
    "diagnose": _diagnose,
    "sweep": _sweep,
    "report": _report,
    "sample-text": _sample_text,
}

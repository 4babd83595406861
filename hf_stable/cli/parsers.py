"""Subcommands and their options; the surface is frozen by a test."""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from hf_stable.cli import convert
from hf_stable.cli.arguments import (
    PROGRAM,
    Parser,
    check_command,
    non_negative_float,
    non_negative_int,
    output_file,
    output_folder,
    path,
    positive_float,
    positive_int,
    seed,
    share,
)
from hf_stable.cli.push import EXPORT, PUSH, add_export_options, add_push_options
from hf_stable.cli.statement import add_statement_options

_DESCRIPTION = """\
Stable language model pre-training on the HuggingFace stack.

A recipe is a YAML file that says everything about a run: model, text, optimizer, length.
Many ship with the package and are taken by name: `hf-stable recipes list`.
A first run, minutes on a laptop:

  hf-stable sample-text --output runs/quickstart-text.jsonl
  hf-stable check quickstart
  hf-stable train quickstart
  hf-stable generate runs/quickstart/model --prompt "In the beginning"
"""

_EPILOG = """\
hf-stable SUBCOMMAND --help tells more.

exit codes:
  0    done
  1    unexpected failure, with a traceback: please report it
  2    bad input: the message says what to change
  3    training diverged
  75   preempted by SIGTERM or SIGUSR1: a checkpoint is there, the same command resumes
  76   hang: a process did not move for training.hang_timeout seconds
  130  interrupted by Ctrl-C; a training run has a checkpoint, the same command resumes
"""

_RECIPES = """\
Several recipes are layered, later ones win, so that a size and a technique combine:

  hf-stable {command} base/10m techniques/qk_norm \\
      --set optimizer.learning_rate=1e-2 training.steps=600{options}
"""


_SHIPPED = """\
  hf-stable recipes list
  hf-stable recipes show techniques/qk_norm
  hf-stable recipes copy base/10m --output mine.yaml
"""


def _parser(subcommands: Any, command: str, description: str, epilog: str | None = None) -> Parser:
    return subcommands.add_parser(
        command,
        prog=f"{PROGRAM} {command}",
        description=description,
        epilog=epilog,
        help=description,
    )


def _recipe_parser(subcommands: Any, command: str, description: str, options: str = "") -> Parser:
    epilog = _RECIPES.format(command=command, options=options)
    parser = _parser(subcommands, command, description, epilog)
    parser.add_argument(
        "recipe",
        nargs="+",
        type=path,
        metavar="RECIPE",
        help="recipe file, or the name of a shipped one",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="append",
        metavar="KEY=VALUE",
        help="change a key of the recipe, e.g. model.qk_norm=head; after the recipes",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the whole resolved recipe and stop"
    )
    return parser


def _add_text_options(parser: Parser) -> None:
    parser.add_argument(
        "--column",
        default="text",
        help="column of JSON, parquet, Arrow or a dataset that holds the text; a.b is b inside a",
    )
    parser.add_argument(
        "--sample-by",
        choices=("document", "line", "paragraph"),
        default="document",
        help="what one document of a text file is: document (the file), line or paragraph",
    )
    parser.add_argument(
        "--max-bad-share",
        type=share,
        default=0.5,
        metavar="X",
        help="share of a file's documents that may be unusable and left out; with more it is "
        "refused",
    )


def _add_revision(parser: Parser) -> None:
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub")


def _train_parser(subcommands: Any) -> None:
    parser = _recipe_parser(
        subcommands, "train", "Train a model as a recipe says; goes on where it was stopped."
    )
    parser.add_argument(
        "--output",
        type=output_folder,
        metavar="DIR",
        help="folder of the run, instead of the recipe's",
    )
    parser.add_argument(
        "--resume",
        choices=("auto", "longer", "changed", "never"),
        default="auto",
        help="auto: resume from the newest checkpoint in the folder, if recipe and data are those "
        "of its run; longer: also with more training.steps (or tokens), for which the learning "
        "rate is planned again; changed: with any difference; never: refuse a used folder",
    )


def _check_parser(subcommands: Any) -> None:
    parser = _recipe_parser(
        subcommands, "check", "Validate a recipe: sizes, steps, memory, without training."
    )
    parser.add_argument(
        "--gpus", type=positive_int, default=1, metavar="N", help="number of GPUs, one a process"
    )


def _plan_parser(subcommands: Any) -> None:
    parser = _recipe_parser(
        subcommands,
        "plan",
        "Memory, speed, days and cost of a recipe on so many GPUs, computed without one.",
        " --gpus 8",
    )
    parser.add_argument(
        "--gpus", type=positive_int, nargs="+", required=True, metavar="N", help="numbers of GPUs"
    )
    parser.add_argument(
        "--gpu", choices=("h200", "h100"), default="h200", help="whose memory and rates to take"
    )
    parser.add_argument(
        "--gpu-memory", type=positive_float, metavar="GB", help="of one GPU, where it has another"
    )
    parser.add_argument(
        "--gpus-per-node", type=positive_int, default=8, metavar="N", help="GPUs of one machine"
    )
    parser.add_argument(
        "--price-per-gpu-hour", type=positive_float, metavar="PRICE", help="adds what the run costs"
    )


def _tokenizer_parser(subcommands: Any) -> None:
    parser = _parser(
        subcommands,
        "tokenizer",
        "Train a tokenizer on text. Any text round-trips through it exactly.",
    )
    parser.add_argument(
        "input",
        nargs="+",
        type=path,
        metavar="INPUT",
        help="text, JSON, parquet or Arrow files, folders, globs or datasets",
    )
    parser.add_argument(
        "--kind",
        choices=("bpe", "sentencepiece"),
        default="bpe",
        help="bpe: byte-level BPE; sentencepiece: unigram with byte fallback",
    )
    parser.add_argument(
        "--vocab-size", type=positive_int, required=True, metavar="N", help="tokens, e.g. 8192"
    )
    parser.add_argument(
        "--output", type=output_folder, required=True, metavar="DIR", help="folder to write"
    )
    _add_text_options(parser)


def _evaluate_parser(subcommands: Any) -> None:
    parser = _parser(
        subcommands,
        "evaluate",
        "Perplexity of any causal language model, with 95-percent intervals.",
    )
    parser.add_argument(
        "model",
        type=path,
        metavar="MODEL",
        help="model folder or Hub id, ours or not, or a run's folder",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        type=path,
        metavar="TEXT",
        help="files, folders, globs or datasets; a run's folder has validation text of its own",
    )
    _add_text_options(parser)
    _add_revision(parser)
    parser.add_argument("--name", help="configuration of a dataset, e.g. wikitext-2-raw-v1")
    parser.add_argument("--split", help="split of a dataset; test unless given")
    parser.add_argument("--max-length", type=positive_int, metavar="N", help="tokens of one window")
    parser.add_argument(
        "--stride",
        type=positive_int,
        metavar="N",
        help="tokens that each window scores anew; smaller is slower and gives more context",
    )
    parser.add_argument(
        "--batch-size", type=positive_int, default=8, metavar="N", help="windows at once"
    )
    parser.add_argument(
        "--limit-documents", type=positive_int, metavar="N", help="read only the first N"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that the model folder holds"
    )
    parser.add_argument(
        "--output",
        type=output_file,
        metavar="FILE",
        help="write the numbers as JSON to this file; those of a run's own text go to "
        "RUN/evaluation.json unless given, for its card",
    )


def _generate_parser(subcommands: Any) -> None:
    parser = _parser(subcommands, "generate", "Let a model continue a text.")
    parser.add_argument("model", type=path, metavar="MODEL", help="model folder or Hub id")
    _add_revision(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue")
    parser.add_argument(
        "--max-new-tokens",
        type=positive_int,
        metavar="N",
        help="tokens to add; unless given 100, or as many as there are positions left",
    )
    parser.add_argument(
        "--temperature", type=non_negative_float, default=0.8, metavar="T", help="0 is greedy"
    )
    parser.add_argument(
        "--top-k", type=non_negative_int, default=50, metavar="K", help="likeliest tokens; 0 is all"
    )
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of sampling")


def _card_parser(subcommands: Any) -> None:
    parser = _parser(
        subcommands, "card", "Write a run's model card and training curve, from its records alone."
    )
    parser.add_argument("run", type=path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--output", type=output_folder, required=True, metavar="DIR", help="folder to write"
    )
    parser.add_argument(
        "--evaluations",
        nargs="+",
        type=path,
        metavar="FILE",
        help="what `hf-stable evaluate RUN --output` wrote; RUN/evaluation*.json unless given",
    )
    add_statement_options(parser)


def _watch_parser(subcommands: Any) -> None:
    parser = _parser(
        subcommands,
        "watch",
        "Look at runs, also while they train: loss, the layers nearest to trouble, and alarms.",
    )
    parser.add_argument("runs", nargs="+", type=path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--refresh",
        type=positive_float,
        default=2.0,
        metavar="SECONDS",
        help="how often to look again, until every run has ended",
    )
    parser.add_argument(
        "--once", action="store_true", help="look once; so it does where output is no terminal"
    )
    parser.add_argument(
        "--html",
        type=output_file,
        metavar="FILE",
        help="write one page with all figures instead, and stop",
    )


def _diagnose_parser(subcommands: Any) -> None:
    parser = _parser(
        subcommands,
        "diagnose",
        "What came before a run's loss moved: first alarm, its layer, lead, and what answers it.",
    )
    parser.add_argument("run", type=path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write the findings as JSON too"
    )


def _sample_text_parser(subcommands: Any) -> None:
    parser = _parser(
        subcommands,
        "sample-text",
        "Write the quickstart's text: the King James Bible, from a Python package.",
    )
    parser.add_argument(
        "--output", type=output_file, required=True, metavar="FILE", help="JSON lines file to write"
    )


def _recipes_parser(subcommands: Any) -> None:
    parser = _parser(
        subcommands,
        "recipes",
        "List, show or copy the recipes and other files that ship with the package.",
        _SHIPPED,
    )
    parser.add_argument(
        "action",
        choices=("list", "show", "copy"),
        metavar="ACTION",
        help="list: all with a line each; show: print one; copy: copy one or a folder, to edit it",
    )
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="for show and copy: name, e.g. base/10m or slurm"
    )
    parser.add_argument(
        "--output",
        type=path,
        metavar="PATH",
        help="for copy: file or folder; recipes/NAME unless given",
    )


def _sweep_parser(subcommands: Any) -> None:
    parser = _parser(
        subcommands,
        "sweep",
        "Train all runs of a plan; goes on where it was stopped, however it was.",
    )
    parser.add_argument(
        "plan", type=path, metavar="PLAN", help="plan file, or name, e.g. sweeps/table3_cpu"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the runs, their FLOPs and time, and stop"
    )
    parser.add_argument(
        "--workers", type=positive_int, default=1, metavar="N", help="runs at once, or Slurm jobs"
    )
    parser.add_argument(
        "--slurm",
        nargs="+",
        metavar="KEY=VALUE",
        help="run as Slurm jobs, with submitit's parameters, e.g. slurm_partition=gpu",
    )
    parser.add_argument(
        "--set", nargs="+", action="append", metavar="KEY=VALUE", help="change a key of every run"
    )
    parser.add_argument(
        "--output", type=output_folder, metavar="DIR", help="folder, instead of the plan's"
    )


def _report_parser(subcommands: Any) -> None:
    parser = _parser(
        subcommands,
        "report",
        "Report on studies, from their records alone: report.md and report.html.",
    )
    parser.add_argument("studies", nargs="+", type=path, metavar="STUDY", help="folder of a study")
    parser.add_argument(
        "--output",
        type=output_folder,
        metavar="DIR",
        help="where the report goes; into the first study unless given",
    )


def build_parser(version: str) -> Parser:
    """Return the whole command line."""
    parser = Parser(prog=PROGRAM, description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {version}")
    subcommands = parser.add_subparsers(
        dest="subcommand", title="subcommands", metavar="SUBCOMMAND", required=True
    )
    _recipes_parser(subcommands)
    _train_parser(subcommands)
    _check_parser(subcommands)
    _plan_parser(subcommands)
    _tokenizer_parser(subcommands)
    _evaluate_parser(subcommands)
    _generate_parser(subcommands)
    add_export_options(_parser(subcommands, "export", EXPORT))
    _card_parser(subcommands)
    convert.add_options(_parser(subcommands, "convert", convert.DESCRIPTION))
    add_push_options(_parser(subcommands, "push", PUSH))
    _watch_parser(subcommands)
    _diagnose_parser(subcommands)
    _sweep_parser(subcommands)
    _report_parser(subcommands)
    _sample_text_parser(subcommands)
    return parser


def parse(version: str, arguments: Sequence[str]) -> Namespace:
    """Return the options of a command line; `subcommand` is the command.

    Raises:
        UserError: names the argument and the remedy.
    """
    parser = build_parser(version)
    commands: Any = next(  # parsers by name
        action.choices for action in parser._actions if action.dest == "subcommand"
    )
    check_command(arguments, list(commands))
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        commands[parsed.subcommand].refuse(unknown)
    return parsed

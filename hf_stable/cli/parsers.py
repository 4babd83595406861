"""Subcommands and their options; the surface is frozen by a test."""

from argparse import RawDescriptionHelpFormatter
from typing import Literal

from jsonargparse import ArgumentParser
from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    restricted_number_type,
)

from hf_stable.cli import convert
from hf_stable.cli.push import EXPORT, PUSH, add_export_options, add_push_options
from hf_stable.cli.statement import add_statement_options

# 64 bits, as a recipe's.
_Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**63)])


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
  75   preempted by a signal: a checkpoint is there, the same command goes on
  76   hang: a process did not move for training.hang_timeout seconds
  130  interrupted
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


def _parser(description: str, epilog: str | None = None) -> ArgumentParser:
    return ArgumentParser(
        description=description,
        epilog=epilog,
        formatter_class=RawDescriptionHelpFormatter,
        print_config=None,  # jsonargparse's own prints the command line's options, ours the recipe
        allow_abbrev=False,
    )


def _recipe_parser(command: str, description: str, options: str = "") -> ArgumentParser:
    parser = _parser(description, _RECIPES.format(command=command, options=options))
    parser.add_argument(
        "recipe", nargs="+", metavar="RECIPE", help="recipe file, or the name of a shipped one"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="append",
        metavar="KEY=VALUE",
        help="change a key of the recipe, e.g. model.qk_norm=head; after the recipes",
    )
    parser.add_argument(
        "--print_config", action="store_true", help="print the whole resolved recipe and stop"
    )
    return parser


def _add_text_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--column",
        default="text",
        help="column of JSON, parquet, Arrow or a dataset that holds the text; a.b is b inside a",
    )
    parser.add_argument(
        "--sample-by",
        type=Literal["document", "line", "paragraph"],
        default="document",
        help="what one document of a text file is: document (the file), line or paragraph",
    )
    parser.add_argument(
        "--max-bad-share",
        type=ClosedUnitInterval,
        default=0.5,
        metavar="X",
        help="share of a file's documents that may be unusable and left out; with more it is "
        "refused",
    )


def _add_revision(parser: ArgumentParser) -> None:
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub")


def _train_parser() -> ArgumentParser:
    parser = _recipe_parser(
        "train", "Train a model as a recipe says; goes on where it was stopped."
    )
    parser.add_argument(
        "--output", metavar="DIR", help="folder of the run, instead of the recipe's"
    )
    parser.add_argument(
        "--resume",
        type=Literal["auto", "changed", "never"],
        default="auto",
        help="auto: go on from the newest checkpoint in the folder, if recipe and data are those "
        "of its run; changed: also if they are not; never: refuse a used folder",
    )
    return parser


def _check_parser() -> ArgumentParser:
    parser = _recipe_parser("check", "Validate a recipe: sizes, steps, memory, without training.")
    parser.add_argument(
        "--world", type=PositiveInt, default=1, metavar="N", help="number of processes (GPUs)"
    )
    return parser


def _plan_parser() -> ArgumentParser:
    parser = _recipe_parser(
        "plan",
        "Memory, speed, days and cost of a recipe on so many GPUs, computed without one.",
        " --gpus 8 --gpu-memory 80",
    )
    parser.add_argument(
        "--gpus", type=PositiveInt, nargs="+", required=True, metavar="N", help="numbers of GPUs"
    )
    parser.add_argument(
        "--gpu-memory",
        type=PositiveFloat,
        required=True,
        metavar="GB",
        help="memory of one GPU, e.g. 80 for an H100",
    )
    parser.add_argument(
        "--gpus-per-node", type=PositiveInt, default=8, metavar="N", help="GPUs of one machine"
    )
    parser.add_argument(
        "--price-per-gpu-hour", type=PositiveFloat, metavar="PRICE", help="adds what the run costs"
    )
    return parser


def _tokenizer_parser() -> ArgumentParser:
    parser = _parser("Train a tokenizer on text. Any text round-trips through it exactly.")
    parser.add_argument(
        "input",
        nargs="+",
        metavar="INPUT",
        help="text, JSON, parquet or Arrow files, folders, globs or datasets",
    )
    parser.add_argument(
        "--kind",
        type=Literal["bpe", "sentencepiece"],
        default="bpe",
        help="bpe: byte-level BPE; sentencepiece: unigram with byte fallback",
    )
    parser.add_argument(
        "--vocab-size", type=PositiveInt, required=True, metavar="N", help="tokens, e.g. 8192"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    _add_text_options(parser)
    return parser


def _evaluate_parser() -> ArgumentParser:
    parser = _parser("Perplexity of any causal language model, with 95-percent intervals.")
    parser.add_argument(
        "model", metavar="MODEL", help="model folder or Hub id, ours or not, or a run's folder"
    )
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="TEXT",
        help="files, folders, globs or datasets; a run's folder has validation text of its own",
    )
    _add_text_options(parser)
    _add_revision(parser)
    parser.add_argument("--name", help="configuration of a dataset, e.g. wikitext-2-raw-v1")
    parser.add_argument("--split", help="split of a dataset; test unless given")
    parser.add_argument("--max-length", type=PositiveInt, metavar="N", help="tokens of one window")
    parser.add_argument(
        "--stride",
        type=PositiveInt,
        metavar="N",
        help="tokens that each window scores anew; smaller is slower and gives more context",
    )
    parser.add_argument(
        "--batch-size", type=PositiveInt, default=8, metavar="N", help="windows at once"
    )
    parser.add_argument(
        "--limit-documents", type=PositiveInt, metavar="N", help="read only the first N"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that the model folder holds"
    )
    parser.add_argument("--output", metavar="FILE", help="write the numbers as JSON too")
    return parser


def _generate_parser() -> ArgumentParser:
    parser = _parser("Let a model continue a text.")
    parser.add_argument("model", metavar="MODEL", help="model folder or Hub id")
    _add_revision(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue")
    parser.add_argument(
        "--max-new-tokens", type=PositiveInt, default=100, metavar="N", help="tokens to add"
    )
    parser.add_argument(
        "--temperature", type=NonNegativeFloat, default=0.8, metavar="T", help="0 is greedy"
    )
    parser.add_argument(
        "--top-k", type=NonNegativeInt, default=50, metavar="K", help="likeliest tokens; 0 is all"
    )
    parser.add_argument("--seed", type=_Seed, default=0, metavar="N", help="of sampling")
    return parser


def _card_parser() -> ArgumentParser:
    parser = _parser("Write a run's model card and training curve, from its records alone.")
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--evaluations",
        nargs="+",
        metavar="FILE",
        help="what `hf-stable evaluate RUN --output` wrote; RUN/evaluation*.json unless given",
    )
    add_statement_options(parser)
    return parser


def _watch_parser() -> ArgumentParser:
    parser = _parser(
        "Look at runs, also while they train: loss, the layers nearest to trouble, and alarms."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--refresh",
        type=PositiveFloat,
        default=2.0,
        metavar="SECONDS",
        help="how often to look again, until every run has ended",
    )
    parser.add_argument(
        "--once", action="store_true", help="look once; so it does where output is no terminal"
    )
    parser.add_argument(
        "--html", metavar="FILE", help="write one page with all figures instead, and stop"
    )
    return parser


def _diagnose_parser() -> ArgumentParser:
    parser = _parser(
        "What came before a run's loss moved: first alarm, its layer, lead, and what answers it."
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    parser.add_argument("--json", metavar="FILE", help="write the findings as JSON too")
    return parser


def _sample_text_parser() -> ArgumentParser:
    parser = _parser("Write the quickstart's text: the King James Bible, from a Python package.")
    parser.add_argument("--output", required=True, metavar="FILE", help="JSON lines file to write")
    return parser


def _recipes_parser() -> ArgumentParser:
    parser = _parser(
        "List, show or copy the recipes and other files that ship with the package.", _SHIPPED
    )
    parser.add_argument(
        "action",
        type=Literal["list", "show", "copy"],
        metavar="ACTION",
        help="list: all with a line each; show: print one; copy: copy one or a folder, to edit it",
    )
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="for show and copy: name, e.g. base/10m or slurm"
    )
    parser.add_argument(
        "--output", metavar="PATH", help="for copy: file or folder; recipes/NAME unless given"
    )
    return parser


def _sweep_parser() -> ArgumentParser:
    parser = _parser("Train all runs of a plan; goes on where it was stopped, however it was.")
    parser.add_argument("plan", metavar="PLAN", help="plan file, or name, e.g. sweeps/table3_cpu")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the runs, their FLOPs and time, and stop"
    )
    parser.add_argument(
        "--workers", type=PositiveInt, default=1, metavar="N", help="runs at once, or Slurm jobs"
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
    parser.add_argument("--output", metavar="DIR", help="folder, instead of the plan's")
    return parser


def _report_parser() -> ArgumentParser:
    parser = _parser("Report on studies, from their records alone: report.md and report.html.")
    parser.add_argument("studies", nargs="+", metavar="STUDY", help="folder of a study")
    parser.add_argument(
        "--output", metavar="DIR", help="where the report goes; into the first study unless given"
    )
    return parser


def build_parser(version: str) -> ArgumentParser:
    """The whole command line."""
    parser = ArgumentParser(
        prog="hf-stable",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=RawDescriptionHelpFormatter,
        version=version,
        allow_abbrev=False,  # of the subcommands too: an abbreviation would freeze all its letters
    )
    subcommands = parser.add_subcommands(title="subcommands", metavar="SUBCOMMAND")
    for name, subparser in (
        ("recipes", _recipes_parser()),
        ("train", _train_parser()),
        ("check", _check_parser()),
        ("plan", _plan_parser()),
        ("tokenizer", _tokenizer_parser()),
        ("evaluate", _evaluate_parser()),
        ("generate", _generate_parser()),
        ("export", add_export_options(_parser(EXPORT))),
        ("card", _card_parser()),
        ("convert", convert.add_options(_parser(convert.DESCRIPTION))),
        ("push", add_push_options(_parser(PUSH))),
        ("watch", _watch_parser()),
        ("diagnose", _diagnose_parser()),
        ("sweep", _sweep_parser()),
        ("report", _report_parser()),
        ("sample-text", _sample_text_parser()),
    ):
        subcommands.add_subcommand(name, subparser, help=subparser.description)
    return parser

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

A recipe is a YAML file that describes a whole run: model, text, optimizer, length.
Many ship with the package and are selected by name: `hf-stable recipes list`.
A first run, minutes on a laptop:

  hf-stable sample-text --output runs/quickstart-text.jsonl
  hf-stable check quickstart
  hf-stable train quickstart
  hf-stable generate runs/quickstart/model --prompt "In the beginning"
"""

_EPILOG = """\
For the options of a subcommand: hf-stable SUBCOMMAND --help.

exit codes:
  0    done
  1    unexpected failure, with a traceback: please report it
  2    bad input: the message says what to change
  3    training diverged
  75   preempted by SIGTERM or SIGUSR1, with a checkpoint: the same command resumes
  76   hang: a process made no progress for training.hang_timeout seconds
  130  interrupted by Ctrl-C; training wrote a checkpoint, the same command resumes
"""

_RECIPES = """\
Layer several recipes to combine a size and a technique; later ones win:

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
        help="recipe file, or the name of a recipe that ships with the package",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="append",
        metavar="KEY=VALUE",
        help="change a key of the recipe, e.g. model.qk_norm=head; wins over all recipes",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the whole resolved recipe and stop"
    )
    return parser


def _add_text_options(parser: Parser) -> None:
    parser.add_argument(
        "--column",
        default="text",
        help="column that holds the text, in JSON, parquet, Arrow or a dataset; a.b is b inside a",
    )
    parser.add_argument(
        "--sample-by",
        choices=("document", "line", "paragraph"),
        default="document",
        help="unit of a text file that is one document: document (whole file), line or paragraph",
    )
    parser.add_argument(
        "--max-bad-share",
        type=share,
        default=0.5,
        metavar="X",
        help="largest share of unusable documents in a file, which are left out; a file with "
        "more is refused",
    )


def _add_revision(parser: Parser) -> None:
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub")


def _train_parser(subcommands: Any) -> None:
    parser = _recipe_parser(
        subcommands, "train", "Train a model from a recipe. The same command resumes a stopped run."
    )
    parser.add_argument(
        "--output",
        type=output_folder,
        metavar="DIR",
        help="folder of the run, instead of the recipe's output",
    )
    parser.add_argument(
        "--resume",
        choices=("auto", "longer", "changed", "never"),
        default="auto",
        help="auto: resume from the newest checkpoint in the folder, if its run has the same "
        "recipe and data; longer: also allow more training.steps (or tokens) and plan the learning "
        "rate again; changed: allow any difference; never: refuse a used folder",
    )


def _check_parser(subcommands: Any) -> None:
    parser = _recipe_parser(
        subcommands, "check", "Validate a recipe: sizes, steps, memory, without training."
    )
    parser.add_argument(
        "--gpus", type=positive_int, default=1, metavar="N", help="number of GPUs, one per process"
    )


def _plan_parser(subcommands: Any) -> None:
    parser = _recipe_parser(
        subcommands,
        "plan",
        "Compute memory, speed, days and cost of a recipe on GPUs; needs no GPU.",
        " --gpus 8",
    )
    parser.add_argument(
        "--gpus", type=positive_int, nargs="+", required=True, metavar="N", help="numbers of GPUs"
    )
    parser.add_argument(
        "--gpu", choices=("h200", "h100"), default="h200", help="GPU whose memory and rates to use"
    )
    parser.add_argument(
        "--gpu-memory", type=positive_float, metavar="GB", help="memory of one GPU, if it differs"
    )
    parser.add_argument(
        "--gpus-per-node", type=positive_int, default=8, metavar="N", help="GPUs of one machine"
    )
    parser.add_argument(
        "--price-per-gpu-hour", type=positive_float, metavar="PRICE", help="add the cost of the run"
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
        "--vocab-size", type=positive_int, required=True, metavar="N", help="vocabulary, e.g. 8192"
    )
    parser.add_argument(
        "--output", type=output_folder, required=True, metavar="DIR", help="folder to write"
    )
    _add_text_options(parser)


def _evaluate_parser(subcommands: Any) -> None:
    parser = _parser(
        subcommands,
        "evaluate",
        "Measure the perplexity of any causal language model, with 95-percent intervals.",
    )
    parser.add_argument(
        "model",
        type=path,
        metavar="MODEL",
        help="model folder or Hub id of any causal model, or a run's folder",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        type=path,
        metavar="TEXT",
        help="files, folders, globs or datasets; for a run, its validation text unless given",
    )
    _add_text_options(parser)
    _add_revision(parser)
    parser.add_argument("--name", help="configuration of a dataset, e.g. wikitext-2-raw-v1")
    parser.add_argument("--split", help="split of a dataset; test unless given")
    parser.add_argument(
        "--max-length", type=positive_int, metavar="N", help="length of a window in tokens"
    )
    parser.add_argument(
        "--stride",
        type=positive_int,
        metavar="N",
        help="newly scored tokens per window; smaller is slower and gives more context",
    )
    parser.add_argument(
        "--batch-size", type=positive_int, default=8, metavar="N", help="windows per batch"
    )
    parser.add_argument(
        "--limit-documents", type=positive_int, metavar="N", help="read only the first N"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code from the model folder"
    )
    parser.add_argument(
        "--output",
        type=output_file,
        metavar="FILE",
        help="JSON file for the result; for a run's validation text RUN/evaluation.json unless "
        "given, which the model card uses",
    )


def _generate_parser(subcommands: Any) -> None:
    parser = _parser(subcommands, "generate", "Continue a text with a model.")
    parser.add_argument("model", type=path, metavar="MODEL", help="model folder or Hub id")
    _add_revision(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue")
    parser.add_argument(
        "--max-new-tokens",
        type=positive_int,
        metavar="N",
        help="number of tokens to add; unless given 100, or fewer if the positions run out",
    )
    parser.add_argument(
        "--temperature", type=non_negative_float, default=0.8, metavar="T", help="0 is greedy"
    )
    parser.add_argument(
        "--top-k",
        type=non_negative_int,
        default=50,
        metavar="K",
        help="sample from the K most likely tokens; 0 is all",
    )
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="seed of sampling")


def _card_parser(subcommands: Any) -> None:
    parser = _parser(
        subcommands, "card", "Write a run's model card and training curve from its records."
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
        help="results of `hf-stable evaluate RUN --output`; RUN/evaluation*.json unless given",
    )
    add_statement_options(parser)


def _watch_parser(subcommands: Any) -> None:
    parser = _parser(
        subcommands,
        "watch",
        "Show runs, also while they train: loss, the layers nearest to trouble, and alarms.",
    )
    parser.add_argument("runs", nargs="+", type=path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--refresh",
        type=positive_float,
        default=2.0,
        metavar="SECONDS",
        help="interval between updates, until every run has ended",
    )
    parser.add_argument(
        "--once", action="store_true", help="show once; the default if output is no terminal"
    )
    parser.add_argument(
        "--html",
        type=output_file,
        metavar="FILE",
        help="write one HTML page with all figures instead, and stop",
    )


def _diagnose_parser(subcommands: Any) -> None:
    parser = _parser(
        subcommands,
        "diagnose",
        "Find what preceded a loss spike: first alarm, its layer, lead time, and a remedy.",
    )
    parser.add_argument("run", type=path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="also write the findings as JSON"
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
        help="list: one line per recipe; show: print one; copy: copy a recipe or folder to edit",
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
        "Train all runs of a plan. The same command resumes a stopped sweep.",
    )
    parser.add_argument(
        "plan", type=path, metavar="PLAN", help="plan file, or name, e.g. sweeps/table3_cpu"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the runs with their FLOPs and time, and stop"
    )
    parser.add_argument(
        "--workers", type=positive_int, default=1, metavar="N", help="concurrent runs or Slurm jobs"
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
        "--output", type=output_folder, metavar="DIR", help="folder, instead of the plan's output"
    )


def _report_parser(subcommands: Any) -> None:
    parser = _parser(
        subcommands,
        "report",
        "Report on studies from their records: report.md and report.html.",
    )
    parser.add_argument("studies", nargs="+", type=path, metavar="STUDY", help="folder of a study")
    parser.add_argument(
        "--output",
        type=output_folder,
        metavar="DIR",
        help="folder of the report; the first study unless given",
    )


def build_parser(version: str) -> Parser:
    """Build the parser of the whole command line."""
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
    """Parse a command line; `subcommand` of the result is the name of the command.

    Args:
        version: Version to print for --version.
        arguments: Arguments of the process.

    Raises:
        UserError: If an argument is wrong; names it and the remedy.
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

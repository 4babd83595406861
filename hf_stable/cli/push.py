"""`hf-stable export` and `hf-stable push`: from a run to a folder, and from there to the Hub."""

# ruff: noqa: PLC0415

import contextlib
import shlex
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hf_stable.cli.arguments import Parser, output_folder, path, positive_int
from hf_stable.cli.statement import add_statement_options, statement_of
from hf_stable.errors import UserError
from hf_stable.wording import counted

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from hf_stable.hub import Destination, Difference, ExportCheck

EXPORT = "Write a run's model as a folder that loads without hf_stable, ready to push."
PUSH = "Publish a model on the Hub: check it, push one commit, verify it, then tag it."


def add_export_options(parser: Parser) -> None:
    """Add the options of `hf-stable export`."""
    parser.add_argument("run", type=path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--step",
        type=positive_int,
        metavar="N",
        help="export the checkpoint of this step; the finished model unless given",
    )
    parser.add_argument(
        "--output", type=output_folder, required=True, metavar="DIR", help="folder to write"
    )
    parser.add_argument(
        "--fold-sigma",
        action="store_true",
        help="fold sigma-Reparam into equivalent plain weights; the card states the difference",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16",),
        help="round the weights; the card states the cost. Unrounded unless given",
    )
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="size of one file of weights"
    )
    add_statement_options(parser)


def add_push_options(parser: Parser) -> None:
    """Add the options of `hf-stable push`."""
    parser.epilog = (
        "The token comes from `hf auth login` or HF_TOKEN. It is not an option, because other "
        "users of the machine could read it."
    )
    parser.add_argument(
        "source",
        type=path,
        metavar="SOURCE",
        help="folder from `hf-stable export`, or a run's folder",
    )
    parser.add_argument(
        "--output", required=True, metavar="OWNER/NAME", help="repository on the Hub"
    )
    parser.add_argument("--private", action="store_true", help="make it a private repository")
    parser.add_argument(
        "--revision", default="main", metavar="BRANCH", help="branch, created if missing"
    )
    parser.add_argument("--tag", help="tag for the commit, set once it is verified")
    parser.add_argument("--commit-message", metavar="TEXT", help="generated unless given")
    parser.add_argument(
        "--create-pr", action="store_true", help="open a pull request instead of writing to main"
    )
    parser.add_argument(
        "--unevaluated", action="store_true", help="allow a card without measured perplexities"
    )
    parser.add_argument(
        "--overwrite-card",
        action="store_true",
        help="replace the card of a model that is on the Hub already and has another card",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="list the files with SHA-256; write nothing"
    )


def export_command(arguments: Namespace) -> None:
    """Export a model, check it, and print how to load it."""
    from hf_stable.hub import Weights, check_export, export

    checked: list[ExportCheck] = []
    folder = export(
        Path(arguments.run),
        Path(arguments.output),
        step=arguments.step,
        weights=Weights(arguments.fold_sigma, arguments.dtype, arguments.max_shard_size),
        statement=statement_of(arguments),
        check=lambda fresh: checked.append(check_export(fresh)),
    )
    print(
        "loads in a process without hf_stable, with bit-equal logits; it continues the empty text:"
    )
    print(f"\n{checked[0].text}\n")
    print(f"exported to {folder}; load it without hf_stable:")
    for auto in ("AutoModelForCausalLM", "AutoTokenizer"):
        print(f'  {auto}.from_pretrained("{folder}", trust_remote_code=True)')
    print(f"publish it: hf-stable push {shlex.quote(str(folder))} --output OWNER/NAME")


def push_command(arguments: Namespace) -> None:
    """Export a run if needed, check, push, and print how to load the model."""
    from hf_stable import hub

    message = arguments.commit_message
    to = hub.Destination(
        repo=arguments.output,
        private=arguments.private,
        branch=arguments.revision,
        tag=arguments.tag,
        create_pr=arguments.create_pr,
        unevaluated=arguments.unevaluated,
        overwrite_card=arguments.overwrite_card,
        **({} if message is None else {"message": message}),
    )
    api = hub.connect(anonymously=arguments.dry_run)
    with _exported(Path(arguments.source), arguments.unevaluated) as folder:
        checked = hub.check_export(folder)
        if arguments.dry_run:
            _print_difference(*_preview(checked, to, api), to.repo)
            return
        done = hub.push(checked, to, api)
    what = "pushed, and verified there" if done.is_new else "was there already, verified"
    print(f"{what}: {done.url}")
    if done.kept:
        print(f"kept as on the Hub, where it differs (--overwrite-card): {', '.join(done.kept)}")
    if to.tag is not None:
        print(f"tagged: {to.tag}")
    print("load it without hf_stable, pinned to what was verified:")
    for auto in ("AutoModelForCausalLM", "AutoTokenizer"):
        print(
            f'  {auto}.from_pretrained("{to.repo}", trust_remote_code=True, '
            f'revision="{done.commit}")'
        )


@contextlib.contextmanager
def _exported(source: Path, unevaluated: bool) -> Iterator[Path]:
    """Yield the folder itself if it is an export, else a temporary export of it."""
    from hf_stable.card.evaluations import find_evaluations
    from hf_stable.checksums import SUMS
    from hf_stable.hub import export

    if (source / SUMS).is_file():
        yield source
        return
    if (source / "run.json").is_file() and not find_evaluations(source) and not unevaluated:
        raise UserError(
            f"{source} has no measured perplexity for its card: measure it with hf-stable evaluate "
            f"{shlex.quote(str(source))}, or push it without one by --unevaluated"
        )
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / source.resolve().name
        try:
            yield export(source, made)
        except UserError as error:  # name the user's folder, not the temporary one
            text = str(error).replace(str(made), f"{source} (exported)")
            raise type(error)(text) from error


def _preview(
    checked: "ExportCheck", to: "Destination", api: "HfApi"
) -> "tuple[Difference, str | None]":
    """Return the files that would be pushed, and why the Hub's state is unknown, if it is."""
    from hf_stable import hub

    try:
        return hub.preview(checked, to, api), None
    except hub.UnreachableError as error:
        return hub.compare(checked.folder, checked.files, None), str(error)


def _print_difference(difference: "Difference", unreachable: str | None, repo: str) -> None:
    for each in difference.changes:
        state = "" if unreachable is not None else f"{each.state:<8} "
        print(f"{state}{each.bytes:>14,}  {each.sha256}  {each.name}")
    for name in difference.removed:
        print(f"{'removed':<8} {'':>14}  {'':<64}  {name}")
    total = counted(sum(each.bytes for each in difference.changes), "byte")
    print(f"{counted(len(difference.changes), 'file')}, {total}, to {repo}; nothing was written")
    if unreachable is not None:
        print(f"the state of the repository is unknown: {unreachable}")

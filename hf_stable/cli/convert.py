"""`hf-stable convert`: options and implementation."""

# ruff: noqa: PLC0415

import shlex
from argparse import Namespace

from hf_stable.cli.arguments import Parser, output_folder, path
from hf_stable.wording import counted

DESCRIPTION = "Write another family's checkpoint as a StableGPT with the same logits."


def add_options(parser: Parser) -> None:
    """Add the subcommand's options to an empty parser."""
    parser.add_argument(
        "source",
        type=path,
        metavar="SOURCE",
        help="model folder or Hub id: Llama, GPT-NeoX, Nemotron, ...",
    )
    parser.add_argument(
        "--output", type=output_folder, required=True, metavar="DIR", help="folder to write"
    )
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hub id")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="data type of the weights to write; the source's unless given",
    )


def run(arguments: Namespace) -> None:
    """Convert a checkpoint, and report the difference in its logits."""
    from hf_stable.convert import convert

    done = convert(
        arguments.source, arguments.output, revision=arguments.revision, dtype=arguments.dtype
    )
    print(
        f"{done.source} ({done.model_type}): logits differ by {done.difference:.1e} of the "
        f"largest in float64 over {counted(done.tokens, 'token')}"
    )
    if done.saved_difference > done.difference:
        print(f"by {done.saved_difference:.1e} with the weights rounded to {done.dtype}")
    if done.notes:
        print(f"fields that change nothing (see conversion.json): {', '.join(done.notes)}")
    print(f"written: {arguments.output}")
    output = shlex.quote(str(arguments.output))
    print(f"next: hf-stable evaluate {output} --data TEXT")
    print(f"      hf-stable export {output} --output FOLDER")

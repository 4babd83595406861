"""Command lines of other projects, after making Transformers know `stable_gpt`.

Transformers discovers no plugins, so that a tool's own command cannot load a model without code in
its folder. Law of this file: each function imports us and calls theirs; their options are theirs.
"""

# ruff: noqa: PLC0415

import importlib
import sys
from typing import Any


def _client(module: str) -> Any:
    """The module of a client, with our classes registered; exit code 2 where it is not there."""
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        print(f"error: {error}; install the clients: hf_stable[clients]", file=sys.stderr)
        raise SystemExit(2) from error
    from hf_stable import registration  # noqa: F401

    return found


def lm_eval() -> None:
    """`hf-stable-lm-eval` is `lm-eval` (lm-evaluation-harness) that knows StableGPT."""
    _client("lm_eval.__main__").cli_evaluate()


def serve() -> None:
    """`hf-stable-serve MODEL` is `transformers serve MODEL` that knows StableGPT."""
    app = _client("transformers.cli.transformers").app
    app(args=["serve", *sys.argv[1:]], prog_name="transformers")

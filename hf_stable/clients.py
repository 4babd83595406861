"""Command lines of other projects, in a process in which Transformers knows `stable_gpt`.

Transformers discovers no plugins, so that a tool's own command cannot load a model without code in
its folder. Importing this package registers the family. Each function here only calls the client's
own command line, whose options are the client's.
"""

import importlib
import sys
from typing import Any


def _client(module: str) -> Any:
    """Import the module of a client; exit with code 2 where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        print(f"error: {error}; install the clients: hf_stable[clients]", file=sys.stderr)
        raise SystemExit(2) from error


def lm_eval() -> None:
    """`hf-stable-lm-eval` is `lm-eval` (lm-evaluation-harness) that knows StableGPT."""
    _client("lm_eval.__main__").cli_evaluate()


def serve() -> None:
    """`hf-stable-serve MODEL` is `transformers serve MODEL` that knows StableGPT."""
    app = _client("transformers.cli.transformers").app
    app(args=["serve", *sys.argv[1:]], prog_name="transformers")

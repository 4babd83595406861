"""Command lines of other projects, run in a process in which Transformers knows `stable_gpt`.

Transformers discovers no plugins, so a tool's own command cannot load a model without code in its
folder. Importing this package registers the family. Each function here only calls the client's
command line, which defines the options.
"""

import importlib
import sys
from typing import Any


def _client(module: str) -> Any:
    """Import the module of a client; exit with code 2 if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        print(f"error: {error}; install the clients: hf_stable[clients]", file=sys.stderr)
        raise SystemExit(2) from error


def lm_eval() -> None:
    """Run `lm-eval` (lm-evaluation-harness) with StableGPT known; `hf-stable-lm-eval`."""
    _client("lm_eval.__main__").cli_evaluate()


def serve() -> None:
    """Run `transformers serve MODEL` with StableGPT known; `hf-stable-serve MODEL`."""
    app = _client("transformers.cli.transformers").app
    app(args=["serve", *sys.argv[1:]], prog_name="transformers")

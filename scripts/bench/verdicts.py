"""Plugin of pytest: the tests that count most first, and each verdict appended when it is there.

`FIRST_TESTS` in the environment is JSON: `folder`, `identity`, `start`, `call`, `parent`, as for
`worker.py`; `select` ("half": tests of half precision; "all": every test that is left); `most`, the
number of tests to run that need no GPU, or null. What has passed under this identity is left out.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from store import Store, die_with_parent

HALF = (torch.float16, torch.bfloat16)
_ASKED: dict[str, Any] = json.loads(os.environ["FIRST_TESTS"])
_STORE = Store(Path(_ASKED["folder"]) / "results.jsonl")


def rank(item: pytest.Item) -> int:
    """Return 0 for what only a GPU can show, 1 for half precision, 2 for the rest."""
    if item.get_closest_marker("gpu") is not None:
        return 0
    parameters = getattr(item, "callspec", None)
    values = parameters.params.values() if parameters is not None else ()
    return 1 if any(value in HALF for value in values if isinstance(value, torch.dtype)) else 2


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = sorted(items, key=rank)
    if _ASKED["select"] == "half":
        chosen = [item for item in chosen if rank(item) < 2]
    if _ASKED["most"] is not None:
        chosen = chosen[: sum(rank(item) == 0 for item in chosen) + _ASKED["most"]]
    records = _STORE.read(_ASKED["identity"])
    done = {each["test"] for each in records if each["kind"] == "test" and _is_done(each)}
    left = [item for item in chosen if item.nodeid not in done]
    config.hook.pytest_deselected(items=[item for item in items if item not in left])
    items[:] = left


def _is_done(record: dict[str, Any]) -> bool:
    """A failure counts within the start that saw it."""
    return record["outcome"] != "failed" or record["start"] == _ASKED["start"]


class Verdicts:
    """Appends verdicts; not in the workers of pytest-xdist, whose reports come here."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        _STORE.append(
            "test",
            _ASKED["identity"],
            start=_ASKED["start"],
            call=_ASKED["call"],
            test=report.nodeid,
            outcome=report.outcome,
            seconds=report.duration,
            reason=str(report.longrepr)[-500:] if report.failed else None,
        )


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        die_with_parent(_ASKED["parent"])
        config.pluginmanager.register(Verdicts())

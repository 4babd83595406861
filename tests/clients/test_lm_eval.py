"""Laws of lm-evaluation-harness with a StableGPT: its scores are ours."""

import json
import shlex
import sys
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from hf_stable.evaluation import load_model, perplexity

from .conftest import ROOT

pytest.importorskip("lm_eval")

TASK = """
task: my_documents
dataset_path: json
dataset_kwargs:
  data_files:
    test: documents.jsonl
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: bits_per_byte
  - metric: byte_perplexity
metadata:
  version: 1.0
"""


def test_the_guides_scores_are_our_own(
    lines: Callable[[str, str], str],
    folder: Path,
    texts: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("tasks").mkdir()
    Path("tasks/my_documents.yaml").write_text(TASK)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    Path("documents.jsonl").write_text(rows)
    script, *arguments = shlex.split(lines("lm-evaluation-harness", "bash"))
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, function = scripts[script].split(":")
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    getattr(import_module(module), function)()
    (file,) = Path("scores").rglob("results_*.json")
    scores = json.loads(file.read_text())["results"]["my_documents"]
    ours = perplexity(*load_model(folder), texts).bits_per_byte.value
    assert scores["bits_per_byte,none"] == pytest.approx(ours, abs=1e-3)
    assert scores["byte_perplexity,none"] == pytest.approx(2**ours, rel=1e-3)
    assert len(max(texts, key=len)) > 64  # one is longer than the model's window


def test_a_missing_client_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hf_stable import clients  # noqa: PLC0415

    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    with pytest.raises(SystemExit) as stop:
        clients.lm_eval()
    assert stop.value.code == 2
    assert "hf_stable[clients]" in capsys.readouterr().err

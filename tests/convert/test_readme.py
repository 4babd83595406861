"""What the README's section tells to type works, from the first line to the last."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from hf_stable import records
from hf_stable.cli import main
from hf_stable.convert import FAMILIES
from tests.training import write_text

from .sources import save

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "README.md").read_text().split("## From other checkpoints")[1].split("\n## ")[0]
CONVERT, WARM = re.findall(r"```bash\n(.*?)```", SECTION, re.S)
# What makes the quickstart a matter of seconds.
SMALL = [
    *("model.hidden_size=32", "model.num_hidden_layers=1", "tokenizer.vocab_size=300"),
    *("data.sequence_length=32", "training.steps=2", "training.checkpoint_every=0"),
    *("schedule.warmup=0", "telemetry.every=0", "training.evaluate_blocks=8"),
]


def commands(block: str) -> list[list[str]]:
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert lines and all(line[0] == "hf-stable" for line in lines)
    return [line[1:] for line in lines]


def test_the_lines_of_convert_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "path" / "to" / "llama", "llama")
    (tmp_path / "text.txt").write_text("To be, or not to be.\n" * 20)
    for command in commands(CONVERT):
        assert main(command) == 0
    assert (tmp_path / "exports" / "ours" / "modeling_stable_gpt.py").is_file()


def test_the_lines_of_a_warm_start_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    documents = [file.read_text() for file in sorted(write_text(tmp_path).glob("*.txt"))]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart-text.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in documents)
    )
    for command in commands(WARM):
        assert main([*command, "--set", *SMALL]) == 0
    switched = records.read_run(tmp_path / "runs" / "warm_qk_norm")["initial_model"]["switched"]
    assert switched == {"qk_norm": [None, "head"]}
    also = re.search(r"# also (.*)", WARM)
    assert also is not None
    names = {path.stem for path in (ROOT / "recipes" / "warm_start").glob("*.yaml")}
    assert names == {"qk_norm", *also[1].split(", ")}


def test_every_family_has_its_row() -> None:
    rows = " ".join(line.split("|")[1] for line in SECTION.splitlines() if line.startswith("| "))
    told = {"".join(name.split()).lower() for name in re.split(r", |  +", rows)}
    assert {kind.replace("_", "") for kind in FAMILIES} == {
        name.replace("-", "") for name in told
    } - {"family", "pythia", ""}

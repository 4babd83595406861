"""One command runs every benchmark from end to end, on a CPU too, and leaves what it promises."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from .test_bench import BENCH, BENCHMARKS, attention_cases, linear_cross_entropy, train_step
from .warm import python

# What a rehearsal on a CPU may leave out: what is not installed or has no CPU form.
EXCUSES = (
    "ModuleNotFoundError",
    "NotImplementedError: FlexAttention",
    "RuntimeError: No viable backend",
    "not run: the hardware's tanh needs a GPU",
    "AttributeError: module 'torch.nn' has no attribute 'LinearCrossEntropyOptions'",
)
# Names and cases of every part that has a goal.
STEPS = {
    "all on, all off": {"ours, none, sdpa", "ours, E1", "ours, all but clip"},
    "gemma 2, as it comes": {"ours, E1", "gemma 2, as it comes"},
    **{f"technique {n}": {"ours, none", f"ours, {n}"} for n in train_step.SLOWDOWN},
    "sequence length": {f"ours, E1, {length} tokens" for length in (8, 16, 32)},
    "compile": {"ours, 2 layers", "ours, 4 layers"},
}
HEADS = {"gemms", *linear_cross_entropy.CASES}
ATTENTIONS = {*attention_cases.OWN, *attention_cases.PEERS}
PARTS: dict[str, dict[str, set[str]]] = {
    "attention": {"forward and backward": ATTENTIONS, "forward": ATTENTIONS},
    "linear_cross_entropy": {f"{length} tokens": HEADS for length in linear_cross_entropy.LENGTHS},
    "train_step": STEPS,
}


def rehearse(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
        "PYTHON": python(),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [str(BENCH / "gpu.sh"), "--dry", "results"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def test_one_command_rehearses_everything(tmp_path: Path) -> None:
    before = sorted((BENCH / "results").iterdir())
    answer = rehearse(tmp_path)
    assert answer.returncode == 0, answer.stdout
    for name, goals in BENCHMARKS.items():
        result: dict[str, Any] = json.loads((tmp_path / "results" / f"{name}.json").read_text())
        assert result["dry"] is True and result["failures"] == []
        assert [goal["id"] for goal in result["goals"]] == [goal.id for goal in goals]
        found: dict[str, set[str]] = {}
        for row in result["rows"]:
            found.setdefault(row["part"], set()).add(row["case"])
            assert row.get("skipped", EXCUSES[0]).startswith(EXCUSES), row
        for part, cases in PARTS[name].items():
            assert found[part] == cases
        figure = tmp_path / "results" / f"{name}.png"
        assert figure.read_bytes().startswith(b"\x89PNG")
    markdown = (tmp_path / "results" / "goals.md").read_text()
    assert markdown.count("numbers mean nothing") == len(BENCHMARKS)
    assert sorted((BENCH / "results").iterdir()) == before

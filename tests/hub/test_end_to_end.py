"""As a user does it: one command, another machine, and nothing of ours on that."""

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_stable import StableGPTForCausalLM, cli
from hf_stable.training import train

from ..training import tiny_recipe
from ..warm import python
from .conftest import unchecked
from .server import TOKEN, Hub

# On another machine: hf_stable cannot be imported, and the cache is empty.
READER = """
import json, sys
sys.modules["hf_stable"] = None
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
out, said = sys.argv[1], {}

def refused(**options):
    try:
        AutoModelForCausalLM.from_pretrained("org/name", **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

said["not trusted"] = refused(revision="v1")
said["no such revision"] = refused(revision="v9", trust_remote_code=True)
trusted = {"trust_remote_code": True, "revision": "v1"}
model = AutoModelForCausalLM.from_pretrained("org/name", **trusted).eval()
base = AutoModel.from_pretrained("org/name", **trusted).eval()
ids = AutoTokenizer.from_pretrained("org/name", **trusted)("x y z", return_tensors="pt").input_ids
with torch.no_grad():
    hidden = base(ids).last_hidden_state
    save_file({"ids": ids, "logits": model(ids).logits, "hidden": hidden}, f"{out}/tensors")
said["types"] = [type(each).__name__ for each in (model, base)]
said["config"] = type(AutoConfig.from_pretrained("org/name", **trusted)).__name__
json.dump(said, open(f"{out}/said.json", "w"))
"""


def lines_of_the_guide(section: str) -> list[list[str]]:
    """Commands of a section's first block, as a shell would split them."""
    guide = Path(__file__).parents[2] / "docs" / "guides" / "export-and-publish.md"
    text = guide.read_text(encoding="utf-8")
    block = text.split(f"## {section}\n")[1].split("```bash\n")[1].split("```")[0]
    return [shlex.split(line, comments=True) for line in block.splitlines()]


def elsewhere(*command: str, home: Path, hub: Hub, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """A command with an empty Hub home, and the token of a user who is signed in."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = {
        **kept, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }  # fmt: skip
    home.mkdir()
    (home / "token").write_text(TOKEN)
    return subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        check=False, cwd=cwd,
    )  # fmt: skip


def test_the_guide_s_lines_publish_a_run_that_loads_anywhere_bit_equal(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    train(tiny_recipe(tmp_path, output="runs/quickstart"))
    *before, last = [
        [each.replace("OWNER/NAME", "org/name") for each in line]
        for line in lines_of_the_guide("Publish")
    ]
    assert [line[1] for line in before] == ["evaluate", "export", "push"] and last[1] == "push"
    with monkeypatch.context() as patched:
        # The last command checks the same folder in earnest.
        patched.setattr("hf_stable.hub.check_export", unchecked)
        for program, *arguments in before:
            assert program == "hf-stable" and cli.main(arguments) == 0
    assert "nothing was written" in capsys.readouterr().out and hub.repos == {}
    command = [python(), "-m", "hf_stable", *last[1:]]
    done = elsewhere(*command, home=tmp_path / "writer", hub=hub, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    repo = hub.repos["org/name"]
    commit = repo.refs["tags/v1"]
    assert f"/org/name/commit/{commit}" in done.stdout and "tagged: v1" in done.stdout
    assert f'revision="{commit}")' in done.stdout and TOKEN not in done.stdout + done.stderr
    assert repo.private and b"model-index" in repo.commits[commit]["README.md"]
    # What is on main since then is another model: the tag is what counts.
    repo.commit({**repo.commits[commit], "modeling_stable_gpt.py": b"raise"}, "main")
    reader = [python(), "-c", READER, str(tmp_path)]
    read = elsewhere(*reader, home=tmp_path / "reader", hub=hub, cwd=tmp_path)
    assert read.returncode == 0, read.stderr
    said = json.loads((tmp_path / "said.json").read_text())
    assert "trust_remote_code=True" in said["not trusted"]
    assert "v9" in said["no such revision"]
    assert said["types"] == ["StableGPTForCausalLM", "StableGPTModel"]
    assert said["config"] == "StableGPTConfig"
    found = load_file(tmp_path / "tensors")
    model = StableGPTForCausalLM.from_pretrained("runs/quickstart/model").eval()
    with torch.no_grad():
        assert torch.equal(model(found["ids"]).logits, found["logits"])
        assert torch.equal(model.model(found["ids"]).last_hidden_state, found["hidden"])

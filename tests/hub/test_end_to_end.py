"""As a user does it: one command, another machine, and nothing of ours on that."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from hf_stable import StableGPTForCausalLM

from .conftest import finished_run
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


def run(*command: str, home: Path, hub: Hub) -> "subprocess.CompletedProcess[str]":
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
        check=False,
    )  # fmt: skip


def test_a_run_that_is_pushed_loads_anywhere_bit_equal(tmp_path: Path) -> None:
    source = finished_run(tmp_path / "run")
    with Hub() as hub:
        command = ["-m", "hf_stable", "push", str(source), "--to", "org/name", "--tag", "v1"]
        done = run(sys.executable, *command, home=tmp_path / "writer", hub=hub)
        assert done.returncode == 0, done.stderr
        repo = hub.repos["org/name"]
        commit = repo.refs["tags/v1"]
        assert f"/org/name/commit/{commit}" in done.stdout and "tagged: v1" in done.stdout
        assert f'revision="{commit}")' in done.stdout and TOKEN not in done.stdout + done.stderr
        # What is on main since then is another model: the tag is what counts.
        repo.commit({**repo.commits[commit], "modeling_stable_gpt.py": b"raise"}, "main")
        out = tmp_path / "out"
        out.mkdir()
        read = run(sys.executable, "-c", READER, str(out), home=tmp_path / "reader", hub=hub)
        assert read.returncode == 0, read.stderr
    said = json.loads((out / "said.json").read_text())
    assert "trust_remote_code=True" in said["not trusted"]
    assert "v9" in said["no such revision"]
    assert said["types"] == ["StableGPTForCausalLM", "StableGPTModel"]
    assert said["config"] == "StableGPTConfig"
    found = load_file(out / "tensors")
    model = StableGPTForCausalLM.from_pretrained(source / "model").eval()
    with torch.no_grad():
        assert torch.equal(model(found["ids"]).logits, found["logits"])
        assert torch.equal(model.model(found["ids"]).last_hidden_state, found["hidden"])
    assert repo.commits[commit].keys() >= {"SHA256SUMS", "LICENSE", "records/run.json"}

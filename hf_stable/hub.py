"""Export: a folder that loads with nothing but Transformers, checked by loading it so.

The folder holds safetensors, config with `auto_map`, the flat model code, generation config,
tokenizer, model card with its picture, LICENSE and the run's records; nothing that could run on
loading but the code that is named.
"""

import contextlib
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from safetensors.torch import load_file

from . import model as model_package
from .card import clean, write_card
from .checkpoints import export_model, find_checkpoint
from .data import load_tokenizer
from .errors import CheckpointError
from .evaluation import load_model
from .model import StableGPTForCausalLM
from .records import read_metrics, write_json

_AUTO_MAP = {
    "AutoConfig": "configuration_stable_gpt.StableGPTConfig",
    "AutoModel": "modeling_stable_gpt.StableGPTModel",
    "AutoModelForCausalLM": "modeling_stable_gpt.StableGPTForCausalLM",
}

# Runs where hf_stable cannot be imported, as on a user's machine: a None in sys.modules makes any
# import of it fail.
_CLEAN_PROCESS = """
import sys
sys.modules["hf_stable"] = None
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, answer, threads, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(threads)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
longest = model.config.max_position_embeddings
with torch.no_grad():
    logits = model(torch.arange(min(16, longest, model.config.vocab_size))[None]).logits
count = min(count, longest - 1)
torch.manual_seed(0)
start = torch.tensor([[tokenizer.bos_token_id or tokenizer.eos_token_id or 0]])
tokens = model.generate(
    start, max_new_tokens=count, min_new_tokens=count, do_sample=True, top_k=50
)
save_file({"logits": logits, "tokens": tokens[:, 1:]}, answer)
"""


@dataclass(frozen=True)
class ExportCheck:
    """What a process without hf_stable made of an exported folder: sampled text."""

    text: str


@contextlib.contextmanager
def _model_folder(source: Path, step: int | None) -> Iterator[Path]:
    """A run's last weights or those of a step, or the folder itself where it is a model's."""
    if step is not None:
        with tempfile.TemporaryDirectory() as scratch:
            yield export_model(find_checkpoint(source, step), Path(scratch))
        return
    yield _finished_model(source)


def _finished_model(source: Path) -> Path:
    for folder in (source / "model", source):
        if (folder / "config.json").is_file():
            return folder
    raise CheckpointError(
        f"{source} holds no model: give a finished run's folder (with model/config.json in it), "
        "a Transformers folder, or a run's folder and the step of a checkpoint in it."
    )


def export(source: str | Path, output: str | Path, *, step: int | None = None) -> Path:
    """Write a Hub-ready folder from a run or a saved StableGPT.

    Args:
        source: a run's folder, or a folder with a saved StableGPT and its tokenizer.
        output: the folder to write; its files of the same names are replaced.
        step: of the run's checkpoint to take, instead of its finished model.

    Raises:
        CheckpointError: when `source` holds no StableGPT, or no good checkpoint of that step.
    """
    source, output = Path(source), Path(output)
    with _model_folder(source, step) as folder:
        model, tokenizer = load_model(folder)
        if not isinstance(model, StableGPTForCausalLM):
            raise CheckpointError(
                f"{folder} holds a {type(model).__name__}; only a StableGPT is exported with its "
                "code, any other model is Hub-ready as it is."
            )
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)
    code = Path(model_package.__file__).parent
    for file in sorted(code.glob("*_stable_gpt.py")):
        shutil.copyfile(file, output / file.name)
    config = json.loads((output / "config.json").read_text(encoding="utf-8"))
    write_json(output / "config.json", {**config, "auto_map": _AUTO_MAP})
    shutil.copyfile(_license(), output / "LICENSE")
    # What a run's records say is true of its end, not of a checkpoint on the way.
    is_run = step is None and (source / "run.json").is_file()
    if is_run:
        _write_records(source, output / "records")
    write_card(source if is_run else output, output / "README.md")
    return output


def _license() -> Path:
    """The package's own LICENSE file, wherever the package was installed from."""
    for file in metadata.files("hf_stable") or []:
        if file.name == "LICENSE" and (place := Path(str(file.locate()))).is_file():
            return place
    raise CheckpointError("hf_stable is installed without its LICENSE file: install it again")


def _write_records(run: Path, output: Path) -> None:
    """The run's JSON records, and metrics.jsonl compressed: without secrets and machine's paths."""
    output.mkdir(parents=True, exist_ok=True)
    for file in sorted(run.glob("*.json")):
        write_json(output / file.name, clean(json.loads(file.read_text(encoding="utf-8"))))
    rows = read_metrics(run) if (run / "metrics.jsonl").is_file() else []
    lines = "".join(json.dumps(clean(row), ensure_ascii=False) + "\n" for row in rows)
    # Without a time, so that equal records give equal bytes.
    (output / "metrics.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))


def check_export(folder: str | Path, *, new_tokens: int = 100) -> ExportCheck:
    """Load an exported folder in a process that cannot import hf_stable, and compare.

    Args:
        new_tokens: how many tokens that process samples, with its seed fixed.

    Raises:
        CheckpointError: when it does not load there, or its logits are not bit-equal to ours.
    """
    folder = Path(folder).resolve()
    model = StableGPTForCausalLM.from_pretrained(folder, dtype="auto").eval()
    with torch.no_grad():
        shortest = min(16, model.config.max_position_embeddings, model.config.vocab_size)
        expected = model(torch.arange(shortest)[None]).logits
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "answer.safetensors"
        arguments = [str(folder), str(answer), str(torch.get_num_threads()), str(new_tokens)]
        # A module cache of its own: the one in the home folder may hold an older export's code.
        environment = {**os.environ, "HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1"}
        child = subprocess.run(
            [sys.executable, "-c", _CLEAN_PROCESS, *arguments],
            cwd=scratch,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if child.returncode != 0:
            last = child.stderr.strip().splitlines()[-1:] or ["no message"]
            raise CheckpointError(f"{folder} does not load without hf_stable: {last[0]}")
        answers = load_file(answer)
        if not torch.equal(answers["logits"], expected):
            raise CheckpointError(
                f"{folder} loads without hf_stable, but its logits differ from ours: the code in "
                "the folder is not this version's. Export it again."
            )
    tokenizer = load_tokenizer(folder)
    return ExportCheck(str(tokenizer.decode(answers["tokens"][0])))

"""What is checked of an exported folder: its bytes, and that it loads without hf_stable."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from hf_stable.checksums import SUMS, sha256_of, verify_sums
from hf_stable.data import load_tokenizer
from hf_stable.errors import CheckpointError
from hf_stable.model import StableGPTForCausalLM

from .files import files_of

# Runs where hf_stable cannot be imported, as on a user's machine: a None in sys.modules makes any
# import of it fail.
_CLEAN_PROCESS = """
import sys
sys.modules["hf_stable"] = None
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
answers, threads, count, folders = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
torch.set_num_threads(threads)
for number, folder in enumerate(folders):
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
    longest = model.config.max_position_embeddings
    with torch.no_grad():
        logits = model(torch.arange(min(16, longest, model.config.vocab_size))[None]).logits
    new = min(count, longest - 1)
    torch.manual_seed(0)
    start = torch.tensor([[tokenizer.bos_token_id or tokenizer.eos_token_id or 0]])
    tokens = model.generate(
        start, max_new_tokens=new, min_new_tokens=new, do_sample=True, top_k=50
    )
    save_file({"logits": logits, "tokens": tokens[:, 1:]}, f"{answers}/{number}.safetensors")
"""


@dataclass(frozen=True)
class ExportCheck:
    """An exported folder that was checked.

    Args:
        folder: as given. text: what a process without hf_stable sampled from it.
        files: SHA-256 of every file, the card's included, by relative name.
    """

    folder: Path
    text: str
    files: dict[str, str]


def check_export(folder: str | Path, *, new_tokens: int = 100) -> ExportCheck:
    """Verify an exported folder, load it in a process that cannot import hf_stable, and compare.

    Args:
        new_tokens: how many tokens that process samples, with its seed fixed.

    Raises:
        CheckpointError: when a file is not what was exported, when it does not load there, or its
            logits or sampled tokens are not equal to ours, bit by bit.
    """
    return check_exports([folder], new_tokens=new_tokens)[0]


def check_exports(folders: Sequence[str | Path], *, new_tokens: int = 100) -> list[ExportCheck]:
    """`check_export` of several folders in one process, which names the first bad one."""
    places = [Path(folder) for folder in folders]
    for place in places:
        if not (place / SUMS).is_file():
            raise CheckpointError(
                f"{place} holds no {SUMS}: it is no export of this version, export it again"
            )
        verify_sums(place)
    with tempfile.TemporaryDirectory() as scratch:
        _ask(places, Path(scratch), new_tokens)
        return [
            _compared(place, load_file(Path(scratch) / f"{number}.safetensors"))
            for number, place in enumerate(places)
        ]


def _ask(places: list[Path], scratch: Path, new_tokens: int) -> None:
    """Have the clean process write NUMBER.safetensors for each folder."""
    arguments = [str(scratch), str(torch.get_num_threads()), str(new_tokens)]
    # A module cache of its own: the one in the home folder may hold an older export's code.
    environment = {**os.environ, "HF_MODULES_CACHE": str(scratch), "HF_HUB_OFFLINE": "1"}
    child = subprocess.run(
        [
            sys.executable,
            "-c",
            _CLEAN_PROCESS,
            *arguments,
            *(str(each.resolve()) for each in places),
        ],
        cwd=scratch,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode != 0:
        done = len(list(scratch.glob("*.safetensors")))
        last = child.stderr.strip().splitlines()[-1:] or ["no message"]
        raise CheckpointError(f"{places[done]} does not load without hf_stable: {last[0]}")


@torch.no_grad()
def _compared(place: Path, answers: dict[str, torch.Tensor]) -> ExportCheck:
    model = StableGPTForCausalLM.from_pretrained(place, dtype="auto").eval()
    shortest = min(16, model.config.max_position_embeddings, model.config.vocab_size)
    if not torch.equal(answers["logits"], model(torch.arange(shortest)[None]).logits):
        raise CheckpointError(
            f"{place} loads without hf_stable, but its logits differ from ours: the code in the "
            "folder is not this version's. Export it again."
        )
    text = str(load_tokenizer(place).decode(answers["tokens"][0]))
    files = {name: sha256_of(path) for name, path in files_of(place).items() if path.is_file()}
    return ExportCheck(place, text, files)

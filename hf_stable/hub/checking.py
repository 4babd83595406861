"""Checks of an exported folder: its bytes, and loading without hf_stable."""

import inspect
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import GenerationConfig

from hf_stable.checksums import SUMS, sha256_of, verify_sums
from hf_stable.data import load_tokenizer
from hf_stable.errors import CheckpointError
from hf_stable.model import StableGPTForCausalLM

from .files import files_of

# Runs in a process that cannot import hf_stable, as on a user's machine: with None in sys.modules,
# every import of it fails.
_CLEAN_PROCESS = """
import sys
sys.modules["hf_stable"] = None
from typing import Any
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
answers, threads, count, folders = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
torch.set_num_threads(threads)
{answers_of}
for number, folder in enumerate(folders):
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
    start = tokenizer.bos_token_id or tokenizer.eos_token_id or 0
    given = answers_of(model, start, count, GenerationConfig)
    save_file(given, f"{answers}/{number}.safetensors")
"""


# The source of this function is also inserted into the clean process, so that both do the same.
@torch.no_grad()
def answers_of(model: Any, start: Any, count: int, settings: Any) -> dict[str, torch.Tensor]:
    """Return `logits` (1, T, V), and `tokens` (1, N) sampled with a fixed seed.

    Args:
        model: A causal language model. Its tensors are copied into aligned memory.
        start: Token to begin with.
        count: Number of tokens, limited by the positions.
        settings: Class of generation configs. The model's generation config may need a tokenizer
            or disable sampling, and says nothing about whether the model loads.
    """
    # Weights mapped from a file may be unaligned, and a BLAS may then round differently.
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    longest = model.config.max_position_embeddings
    logits = model(torch.arange(min(16, longest, model.config.vocab_size))[None]).logits
    new = min(count, longest - 1)
    tokens = torch.tensor([[start]])
    if new > 0:
        model.generation_config = settings()
        torch.manual_seed(0)
        chosen = settings(max_new_tokens=new, do_sample=True, top_k=50, pad_token_id=start)
        tokens = model.generate(tokens, generation_config=chosen)
    return {"logits": logits, "tokens": tokens[:, 1:].contiguous()}


@dataclass(frozen=True)
class ExportCheck:
    """Result of checking an exported folder.

    Args:
        folder: Folder as given.
        text: Text sampled from it by a process without hf_stable.
        files: SHA-256 of every file, including the card's, by relative name.
    """

    folder: Path
    text: str
    files: dict[str, str]


def check_export(folder: str | Path, *, new_tokens: int = 100) -> ExportCheck:
    """Verify an exported folder, load it in a process that cannot import hf_stable, and compare.

    Args:
        folder: Exported folder.
        new_tokens: Number of tokens that each process samples with a fixed seed.

    Returns:
        Result of the check.

    Raises:
        CheckpointError: If a file differs from the export, the folder does not load there, or its
            logits or sampled tokens are not bit-equal to ours.
    """
    return check_exports([folder], new_tokens=new_tokens)[0]


def check_exports(folders: Sequence[str | Path], *, new_tokens: int = 100) -> list[ExportCheck]:
    """Check several folders like `check_export`, in one process; raise for the first bad one."""
    places = [Path(folder) for folder in folders]
    for place in places:
        if not (place / SUMS).is_file():
            raise CheckpointError(
                f"{place} holds no {SUMS}: it is not an export of this version, export it again"
            )
        verify_sums(place)
    with tempfile.TemporaryDirectory() as scratch:
        _ask(places, Path(scratch), new_tokens)
        return [
            _compared(place, load_file(Path(scratch) / f"{number}.safetensors"), new_tokens)
            for number, place in enumerate(places)
        ]


def _ask(places: list[Path], scratch: Path, new_tokens: int) -> None:
    """Run the clean process, which writes NUMBER.safetensors for each folder."""
    arguments = [str(scratch), str(torch.get_num_threads()), str(new_tokens)]
    # A separate module cache: the one in the home folder may hold code of an older export.
    environment = {**os.environ, "HF_MODULES_CACHE": str(scratch), "HF_HUB_OFFLINE": "1"}
    child = subprocess.run(
        [
            sys.executable,
            "-c",
            _CLEAN_PROCESS.replace("{answers_of}", inspect.getsource(answers_of)),
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


def _compared(place: Path, answers: dict[str, torch.Tensor], new_tokens: int) -> ExportCheck:
    model = StableGPTForCausalLM.from_pretrained(place, dtype="auto").eval()
    tokenizer = load_tokenizer(place)
    start = tokenizer.bos_token_id or tokenizer.eos_token_id or 0
    with torch.random.fork_rng(devices=[]):  # sampling sets the seed
        ours = answers_of(model, start, new_tokens, GenerationConfig)
    for name, what in (("logits", "its logits"), ("tokens", "the tokens that it samples")):
        if not torch.equal(answers[name], ours[name]):
            raise CheckpointError(
                f"{place} loads without hf_stable, but {what} differ from ours: the code in the "
                "folder is not this version's. Export it again."
            )
    text = str(tokenizer.decode(answers["tokens"][0]))
    files = {name: sha256_of(path) for name, path in files_of(place).items() if path.is_file()}
    return ExportCheck(place, text, files)

"""A model's folder, and the code of the guide on clients, which these tests run."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import decoders

from tests.tiny import TEXTS, byte_tokenizer, stable_gpt

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "guides" / "clients.md"
CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def guide_blocks() -> dict[str, list[tuple[str, str]]]:
    """heading -> (language, code) of each block, in the guide."""
    found = {}
    for part in re.split(r"^## ", GUIDE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        heading, _, text = part.partition("\n")
        found[heading] = re.findall(r"^```(\w+)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return found


@pytest.fixture
def lines() -> Callable[[str, str], str]:
    """The guide's code of a client: heading and language to the one block."""

    def find(heading: str, language: str) -> str:
        (code,) = (code for found, code in guide_blocks()[heading] if found == language)
        return code

    return find


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the model of the guide in runs/quickstart/model."""
    monkeypatch.chdir(tmp_path)
    path = Path("runs/quickstart/model")
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pad_token, tokenizer.chat_template = tokenizer.eos_token, CHAT
    # Large, so that a loss without them is another loss.
    model = stable_gpt(z_loss=0.1, final_logit_softcapping=5.0, attn_logit_softcapping=5.0)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def texts() -> list[str]:
    return TEXTS

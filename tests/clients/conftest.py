"""A model's folder, and the README's lines about clients, which these tests run."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import decoders

from tests.tiny import TEXTS, byte_tokenizer, stable_gpt

README = Path(__file__).parents[2] / "README.md"
CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def readme_blocks() -> dict[str, list[tuple[str, str]]]:
    """heading -> (language, code) of each block, in the README's section "Clients"."""
    section = re.split(r"^## ", README.read_text(encoding="utf-8"), flags=re.MULTILINE)
    (clients,) = (each for each in section if each.startswith("Clients\n"))
    found = {}
    for part in re.split(r"^### ", clients, flags=re.MULTILINE)[1:]:
        heading, _, text = part.partition("\n")
        found[heading] = re.findall(r"^```(\w+)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return found


@pytest.fixture
def lines() -> Callable[[str, str], str]:
    """The README's code of a client: heading and language to the one block."""

    def find(heading: str, language: str) -> str:
        (code,) = (code for found, code in readme_blocks()[heading] if found == language)
        return code

    return find


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the model of the README in runs/quickstart/model."""
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

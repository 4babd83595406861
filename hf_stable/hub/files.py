"""Files that a model's folder may hold; any other file does not belong to the model."""

import re
from pathlib import Path

from hf_stable.card.rendering import PICTURE
from hf_stable.checksums import SUMS

CARD = "README.md"
VOCABULARIES = frozenset(
    {
        *("vocab.json", "vocab.txt", "merges.txt"),
        *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    }
)
_NAMES = VOCABULARIES | frozenset(
    {
        *(CARD, PICTURE, "LICENSE", SUMS),
        *("config.json", "generation_config.json"),
        *("model.safetensors", "model.safetensors.index.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        *("special_tokens_map.json", "added_tokens.json"),
        "records/metrics.jsonl.gz",
    }
)
_FORMS = re.compile(
    r"model-\d{5}-of-\d{5}\.safetensors|[a-z_]+_stable_gpt\.py"
    r"|records/[A-Za-z0-9][\w.-]*\.json|additional_chat_templates/[A-Za-z0-9_][\w.-]*\.jinja"
)
# A repository with such a file holds a model.
_WEIGHTS = re.compile(r".*\.(?:safetensors|bin|gguf|pt|pth|h5|onnx)|config\.json")


def belongs(name: str) -> bool:
    """Return True if a relative name is that of a file in an export."""
    return name in _NAMES or _FORMS.fullmatch(name) is not None


def is_of_a_model(name: str) -> bool:
    """Return True if a repository with such a file holds a model, whoever made it."""
    return _WEIGHTS.fullmatch(name) is not None


def files_of(folder: Path) -> dict[str, Path]:
    """Return all files of a folder by relative name, in order; links are not followed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_dir():
            found[path.relative_to(folder).as_posix()] = path
    return found


def strangers(folder: Path) -> list[str]:
    """Return the files that do not belong to a model: other names, and links to anywhere."""
    return [
        name for name, path in files_of(folder).items() if not belongs(name) or path.is_symlink()
    ]

"""Search for content that must not be pushed: other files, secrets, and local paths."""

import gzip
import json
from pathlib import Path

from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from safetensors import safe_open
from yaml import YAMLError

from hf_stable.card import leaks, problems, secrets_here
from hf_stable.errors import UserError

from .files import CARD, VOCABULARIES, files_of, strangers


def refuse_strangers(folder: Path) -> None:
    """Raise UserError for the first files that do not belong to the model, and for links."""
    if found := strangers(folder):
        raise UserError(
            f"{folder} has files that are not part of the model: {', '.join(found[:3])}"
            f"{' and more' if found[3:] else ''}; remove them from the folder (nothing was pushed)"
        )


def refuse_leaks(folder: Path) -> None:
    """Raise UserError for the first secret or absolute local path, naming file and line."""
    secrets = secrets_here()
    for path in files_of(folder).values():
        text = _text_of(path)
        # A picture's bytes are not text, so only the forms of secrets are searched for.
        meant = ("a secret",) if path.suffix == ".png" else ("a secret", "a path on this machine")
        for number, line in enumerate(text.splitlines(), start=1):
            if found := [kind for kind in leaks(line, secrets) if kind in meant]:
                raise UserError(
                    f"{path}: line {number} holds {' and '.join(found)}: take it out where it came "
                    "from and export again, nothing was pushed"
                )
        if "a secret" in leaks(text, secrets):
            raise UserError(f"{path} holds a secret: take it out, nothing was pushed")


def _text_of(path: Path) -> str:
    """Return the readable text of a file, without vocabularies: they come from training text."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return json.dumps(file.metadata() or {}) + "\n".join(file.keys())
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    text = content.decode("latin-1" if path.suffix == ".png" else "utf-8", "replace")
    if path.name == "tokenizer.json":
        return json.dumps({**json.loads(text), "model": None}, ensure_ascii=False, indent=0)
    return "" if path.name in VOCABULARIES else text


def check_card(folder: Path, *, unevaluated: bool) -> None:
    """Check that the Hub will accept the card, and that the card has measured metrics.

    Args:
        folder: Exported folder.
        unevaluated: Accept a card without measured perplexities.

    Raises:
        UserError: If the card lacks something; names it.
    """
    file = folder / CARD
    if not file.is_file():
        raise UserError(f"{file} is missing: export again, which writes the card")
    try:
        header = ModelCard.load(file).data.to_dict()
    except (ValueError, YAMLError, HfHubHTTPError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{file}: its header cannot be read ({first})") from error
    if found := problems(header):
        raise UserError(f"{file}: the Hub would refuse the card: {'; '.join(found)}")
    if "model-index" not in header and not unevaluated:
        raise UserError(
            f"{file} has no measured metrics (model-index): `hf-stable evaluate RUN` measures "
            "them, then export again; --unevaluated pushes the card without metrics"
        )

"""SHA256SUMS: hashes of the files of an exported folder at the time of the export.

The format is that of coreutils: `sha256sum -c SHA256SUMS` checks a folder without this package. It
detects damage and changes. If someone changes SHA256SUMS too, only a separate copy of it helps.
"""

import hashlib
import re
from pathlib import Path

from .errors import CheckpointError

SUMS = "SHA256SUMS"
# The card: loading does not read it, and people may edit it later, also on the Hub.
EDITABLE = frozenset({"README.md", "training_curve.png"})
# Types of files that Transformers might read from a model's folder. Such a file beside the listed
# ones might be read instead of them, as model.safetensors is instead of shards.
_LOADED = frozenset({".py", ".json", ".safetensors", ".bin", ".pt", ".jinja", ".model", ".txt"})
_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](?:\./)*(.+)")
# Ending of the code files in an export, which identifies our SHA256SUMS.
_CODE = "_stable_gpt.py"


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def weights_of(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of the weight files in a model's folder, by name."""
    return {file.name: sha256_of(file) for file in sorted(folder.glob("*.safetensors"))}


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS for all files of a folder except the card's."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    names = sorted(name for name, path in files.items() if path.is_file())
    listed = [name for name in names if name not in EDITABLE | {SUMS}]
    lines = [f"{sha256_of(files[name])}  {name}\n" for name in listed]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def read_sums(file: Path) -> dict[str, str]:
    """Read the SHA-256 of each file, by relative name.

    Args:
        file: A SHA256SUMS file.

    Raises:
        CheckpointError: If a line has another form, or a name leads out of the folder.
    """
    found = {}
    for number, line in enumerate(file.read_text("utf-8", "replace").splitlines(), start=1):
        match = _LINE.fullmatch(line)
        if match is None or match[2].startswith("/") or ".." in match[2].split("/"):
            raise CheckpointError(f"{file}: line {number} is no SHA-256 with a name; get it again")
        found[match[2]] = match[1].lower()
    return found


def our_sums(file: Path) -> dict[str, str] | None:
    """Read the SHA256SUMS of an export; return None if it is not from an export.

    Args:
        file: A SHA256SUMS file.

    Raises:
        CheckpointError: If the file of an export is damaged, see `read_sums`.
    """
    try:
        listed = read_sums(file)
    except CheckpointError:
        is_ours = _CODE in file.read_text("utf-8", "replace")
        if is_ours or any(file.parent.glob(f"*{_CODE}")):
            raise
        return None
    is_ours = "config.json" in listed and any(name.endswith(_CODE) for name in listed)
    return listed if is_ours else None


def verify_sums(folder: Path) -> dict[str, str]:
    """Verify that all files of a folder are as they were exported.

    Args:
        folder: Folder with a SHA256SUMS file.

    Returns:
        SHA-256 of each listed file, by name.

    Raises:
        CheckpointError: If a file is missing or changed, or is not listed although Transformers
            might read it; names the first one.
    """
    listed = read_sums(folder / SUMS)
    for name, expected in listed.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing, though {SUMS} lists it; get the folder again")
        if sha256_of(file) != expected:
            raise CheckpointError(
                f"{file}: its SHA-256 is not the one in {SUMS}, so it was damaged or tampered with "
                "after the export; get the folder again, or export it again"
            )
    for file in sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*")]):
        name = file.relative_to(folder).as_posix()
        if file.suffix in _LOADED and name not in listed and name not in EDITABLE:
            raise CheckpointError(
                f"{file}: not in {SUMS}, but Transformers might read it; remove it, or export again"
            )
    return listed

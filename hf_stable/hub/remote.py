"""Comparison of a folder with the Hub's content, and explanations of the Hub's refusals."""

import contextlib
import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # httpx or httpx2, by version
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from hf_stable.card import clean
from hf_stable.card.rendering import PICTURE
from hf_stable.checksums import EDITABLE, SUMS, read_sums
from hf_stable.errors import CheckpointError, HubError

from .files import belongs, is_of_a_model

State = Literal["new", "changed", "same", "kept", "unknown"]


class UnreachableError(HubError):
    """The Hub did not answer."""


@dataclass(frozen=True)
class Change:
    """A file of a push.

    Args:
        name: Relative name.
        bytes: Size of the file.
        sha256: SHA-256 of the file.
        state: State relative to the Hub. "kept" is a card or its picture that differs on the Hub
            and is left unchanged there.
    """

    name: str
    bytes: int
    sha256: str
    state: State


@dataclass(frozen=True)
class Difference:
    """Effect of a push.

    Args:
        changes: All files of the folder, by name.
        removed: Files of an earlier export on the Hub, which the push deletes.
    """

    changes: tuple[Change, ...]
    removed: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        """True if the Hub has the same content already."""
        return not self.removed and not self.moved

    @property
    def moved(self) -> tuple[str, ...]:
        """Names of the files to send."""
        return tuple(each.name for each in self.changes if each.state not in {"same", "kept"})

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of the card's files that are left unchanged on the Hub."""
        return tuple(each.name for each in self.changes if each.state == "kept")


def compare(
    folder: Path,
    files: dict[str, str],
    tree: dict[str, RepoFile] | None,
    *,
    earlier: Collection[str] = (),
    overwrite_card: bool = False,
) -> Difference:
    """Compare a folder with a revision on the Hub.

    Args:
        folder: Exported folder.
        files: SHA-256 by relative name.
        tree: Files of the revision; None if it is not known.
        earlier: Names of files from an earlier push.
        overwrite_card: Replace the card even if the Hub has the same model, whose card people may
            have edited.
    """
    there = tree or {}
    is_same_model = SUMS in there and _state(folder / SUMS, files[SUMS], there[SUMS]) == "same"
    keeps_card = is_same_model and not overwrite_card
    changes = []
    for name, sha256 in sorted(files.items()):
        state: State = "unknown"
        if tree is not None:
            state = _state(folder / name, sha256, tree.get(name))
            if keeps_card and name in EDITABLE and state == "changed":
                state = "kept"
        changes.append(Change(name, (folder / name).stat().st_size, sha256, state))
    ours = {name for name in earlier if belongs(name)} - (EDITABLE if keeps_card else set())
    removed = sorted(ours & there.keys() - files.keys())
    return Difference(tuple(changes), tuple(removed))


def _state(file: Path, sha256: str, there: RepoFile | None) -> State:
    if there is None:
        return "new"
    if there.lfs is not None:
        return "same" if there.lfs.sha256 == sha256 else "changed"
    if there.size != file.stat().st_size:
        return "changed"
    content = file.read_bytes()
    # Git's hash of a file.
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return "same" if there.blob_id == blob else "changed"


def tree_of(api: HfApi, repo: str, revision: str) -> dict[str, RepoFile]:
    """Return the files of a revision by name."""
    entries = api.list_repo_tree(repo, recursive=True, revision=revision)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def pushed_earlier(api: HfApi, repo: str, revision: str, tree: dict[str, RepoFile]) -> set[str]:
    """Return the names in the revision's SHA256SUMS, and the picture.

    Args:
        api: Client of the Hub.
        repo: Name of the repository.
        revision: Branch or commit.
        tree: Files of the revision.

    Raises:
        HubError: If SHA256SUMS was not written by this package.
    """
    if SUMS not in tree:
        return set()
    try:
        listed = read_sums(Path(api.hf_hub_download(repo, SUMS, revision=revision)))
    except CheckpointError as error:
        raise HubError(
            f"{repo} is taken: hf-stable did not write its {SUMS}. Choose another name, or "
            "remove it there first."
        ) from error
    return {*listed, PICTURE}


def refuse_other_model(repo: str, tree: dict[str, RepoFile]) -> None:
    """Raise HubError if the repository holds a model that this package did not push."""
    other = [name for name in sorted(tree) if is_of_a_model(name)]
    if other and SUMS not in tree:
        raise HubError(
            f"{repo} is taken: it holds {other[0]}, which hf-stable did not push. Choose another "
            "name, or remove the files there first."
        )


@contextlib.contextmanager
def explained(repo: str, doing: str) -> Iterator[None]:
    """Turn every error of huggingface_hub in the block into one sentence.

    Args:
        repo: Name of the repository.
        doing: Description of the action.

    Raises:
        HubError: For any such error; names the action, the Hub's answer and the remedy, without
            secrets.
    """
    try:
        yield
    except HubError:
        raise
    # Uploads wrap errors in RuntimeError. Answers of an unexpected form give the last two.
    except (HTTPError, OSError, RuntimeError, ValueError, KeyError) as error:
        wraps = type(error) in {RuntimeError, LocalEntryNotFoundError}
        inner = error.__cause__ if wraps and error.__cause__ else error
        answered = isinstance(inner, HfHubHTTPError | ValueError)
        kind = HubError if answered else UnreachableError
        raise kind(f"{repo}: {doing} failed: {_reason(repo, inner)}") from error


_AGAIN = "the same command tries again, and skips what is already there"


def _reason(repo: str, error: BaseException) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set: unset it to reach the Hub"
    if isinstance(error, RevisionNotFoundError):
        return "there is no such branch, tag or commit"
    if isinstance(error, HfHubHTTPError):
        return _answer(repo, error)
    return f"{_first_line(error)}; {_AGAIN}"


def _answer(repo: str, error: HfHubHTTPError) -> str:
    status, owner = error.response.status_code, repo.partition("/")[0]
    said = f" ({_first_line(error.server_message)})" if error.server_message else ""
    known = {
        401: "the Hub does not accept the token: make one that may write and run `hf auth login`, "
        "or set HF_TOKEN",
        403: f"the token may not write there{said}: it needs write access to {owner}",
        409: f"the Hub has it already, or something else under that name{said}",
        412: "somebody else pushed meanwhile: look at it, then run the same command again",
        429: "too many requests: wait, then run the same command again",
    }
    if status in known:
        return known[status]
    if isinstance(error, RepositoryNotFoundError):
        return "no such repository, or none that the token may see"
    if status >= 500:
        return f"the Hub has an internal error, HTTP {status}{said}; {_AGAIN}"
    return f"the Hub answered HTTP {status}{said}"


def _first_line(error: BaseException | str) -> str:
    lines = str(clean(str(error))).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__

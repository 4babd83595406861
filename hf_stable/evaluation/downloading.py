"""Models of the Hub that come with SHA256SUMS: downloaded as one commit, and verified."""

from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_stable.checksums import SUMS, our_sums, sha256_of, verify_sums
from hf_stable.errors import CheckpointError


def download_verified(repo: str, revision: str | None) -> Path | None:
    """The folder of a model that `hf-stable push` published, every file as it was exported.

    Returns:
        None for a repository without a SHA256SUMS of ours, or when the Hub cannot be reached.

    Raises:
        CheckpointError: no such repository or revision; the Hub does not say whether there is a
            SHA256SUMS; the download broke off; a file is not what was exported,
            and is then removed from the cache.
    """
    sums = _sums_of(repo, revision)
    if sums is None:
        return None
    listed = our_sums(sums)
    if listed is None:
        return None
    try:
        # Of the commit that the sums are of, whatever is pushed meanwhile.
        folder = Path(
            snapshot_download(repo, revision=sums.parent.name, allow_patterns=[*listed, SUMS])
        )
    # Besides OSError, whatever the HTTP library raises when a connection breaks.
    except Exception as error:
        raise CheckpointError(
            f"{repo}: the download broke off ({_short(error)}); the same command goes on with it"
        ) from error
    _forget_bad(folder, listed)
    verify_sums(folder)
    return folder


def _sums_of(repo: str, revision: str | None) -> Path | None:
    """SHA256SUMS in the cache; None only where it is known not to be, or where nothing is reached.

    Any other answer is an error: the weights that would load without it are not verified.
    """
    try:
        return Path(hf_hub_download(repo, SUMS, revision=revision))
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"{repo} has no revision {revision!r}: name one of its branches, tags or commits"
        ) from error
    except LocalEntryNotFoundError as error:
        # Offline, the cache may hold a model without sums; an answer of the Hub is another thing.
        if isinstance(error.__cause__, HfHubHTTPError | FileMetadataError):
            raise _unverifiable(repo, error.__cause__) from error
        return None
    except (EntryNotFoundError, HFValidationError):
        return None
    # Besides HfHubHTTPError and OSError, whatever the HTTP library raises.
    except Exception as error:
        raise _unverifiable(repo, error) from error


def _unverifiable(repo: str, error: BaseException) -> CheckpointError:
    answer = _short(error)
    if isinstance(error, RepositoryNotFoundError):
        answer = "no such repository, or none that the token may see"
    elif isinstance(error, HfHubHTTPError):
        answer = f"HTTP {error.response.status_code}"
    return CheckpointError(
        f"{repo}: whether it has {SUMS} cannot be told ({answer}), so nothing of it was loaded: "
        "check the name and the token, or try again later"
    )


def _forget_bad(folder: Path, listed: dict[str, str]) -> None:
    """Remove damaged downloads, which the cache would hand out again, and say which."""
    for name, expected in listed.items():
        file = folder / name
        if file.is_file() and sha256_of(file) != expected:
            file.resolve().unlink()
            file.unlink(missing_ok=True)
            raise CheckpointError(
                f"{file.name} from the Hub is not what was exported: its SHA-256 is not the one in "
                f"{SUMS}. It is out of the cache again; the same command downloads it anew. Where "
                "that does not help, it was changed on the Hub: do not use it."
            )


def _short(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__

"""Download of Hub models that come with SHA256SUMS: as one commit, and verified."""

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
    """Download a model that `hf-stable push` published, and verify every file.

    Args:
        repo: Repository on the Hub.
        revision: Branch, tag or commit; None is the default branch.

    Returns:
        Folder of the model; None if the repository has no SHA256SUMS from an export, or the Hub
        cannot be reached.

    Raises:
        CheckpointError: If there is no such repository or revision, it is unknown whether there is
            a SHA256SUMS, the download failed, or a file differs from the export. Such a file is
            removed from the cache.
    """
    sums = _sums_of(repo, revision)
    if sums is None:
        return None
    listed = our_sums(sums)
    if listed is None:
        return None
    try:
        # Use the commit of the sums, whatever is pushed in the meantime.
        folder = Path(
            snapshot_download(repo, revision=sums.parent.name, allow_patterns=[*listed, SUMS])
        )
    # The HTTP library raises more than OSError when a connection breaks.
    except Exception as error:
        raise CheckpointError(
            f"{repo}: the download failed ({_short(error)}); the same command resumes it"
        ) from error
    _forget_bad(folder, listed)
    verify_sums(folder)
    return folder


def _sums_of(repo: str, revision: str | None) -> Path | None:
    """Return SHA256SUMS in the cache; None only if it does not exist or nothing can be reached.

    Any other answer is an error: weights that load without the file would not be verified.
    """
    try:
        return Path(hf_hub_download(repo, SUMS, revision=revision))
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"{repo} has no revision {revision!r}: name one of its branches, tags or commits"
        ) from error
    except LocalEntryNotFoundError as error:
        # Offline, the cache may hold a model without sums. An answer from the Hub is different.
        if isinstance(error.__cause__, HfHubHTTPError | FileMetadataError):
            raise _unverifiable(repo, error.__cause__) from error
        return None
    except (EntryNotFoundError, HFValidationError):
        return None
    # The HTTP library raises more than HfHubHTTPError and OSError.
    except Exception as error:
        raise _unverifiable(repo, error) from error


def _unverifiable(repo: str, error: BaseException) -> CheckpointError:
    answer = _short(error)
    if isinstance(error, RepositoryNotFoundError):
        answer = "no such repository, or none that the token may see"
    elif isinstance(error, HfHubHTTPError):
        answer = f"HTTP {error.response.status_code}"
    return CheckpointError(
        f"{repo}: it is unknown whether it has {SUMS} ({answer}), so nothing of it was loaded: "
        "check the name and the token, or try again later"
    )


def _forget_bad(folder: Path, listed: dict[str, str]) -> None:
    """Remove a damaged download, which the cache would return again, and raise its name."""
    for name, expected in listed.items():
        file = folder / name
        if file.is_file() and sha256_of(file) != expected:
            file.resolve().unlink()
            file.unlink(missing_ok=True)
            raise CheckpointError(
                f"{file.name} from the Hub differs from the export: its SHA-256 is not the one in "
                f"{SUMS}. It was removed from the cache; the same command downloads it again. If "
                "that does not help, it was changed on the Hub: do not use it."
            )


def _short(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__

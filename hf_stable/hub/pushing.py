"""Push of an exported and checked folder to the Hub, as one commit that is verified there.

Large files are uploaded first and addressed by their content, so an interrupted push resumes.
Readers see nothing before the commit.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import logging, validate_repo_id

from hf_stable import __version__
from hf_stable.card import leaks
from hf_stable.errors import HubError, UserError

from .checking import ExportCheck
from .remote import (
    Difference,
    compare,
    explained,
    pushed_earlier,
    refuse_other_model,
    tree_of,
)
from .scanning import check_card, refuse_leaks, refuse_strangers

_MAIN = "main"
# Names that git refuses for a branch or tag (git-check-ref-format).
_NO_REF = re.compile(
    r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|(?:^|/)\.|\.lock(?:/|$)|^[-/]|[/.]$|^@?$"
)


@dataclass(frozen=True)
class Destination:
    """Destination of a push.

    Args:
        repo: OWNER/NAME on the Hub, created if missing.
        private: Create a private repository; refused if a public one exists.
        branch: Branch, created from main if missing.
        tag: Tag for the commit, set once it is verified.
        message: Message of the commit.
        create_pr: Open a pull request instead of writing to main.
        unevaluated: Accept a card without measured perplexities.
        overwrite_card: Replace the Hub's card, which may have been edited there, even if the Hub
            has the same model.

    Raises:
        UserError: If a name is invalid, or options exclude each other.
    """

    repo: str
    private: bool = False
    branch: str = _MAIN
    tag: str | None = None
    message: str = f"Upload with hf_stable {__version__}"
    create_pr: bool = False
    unevaluated: bool = False
    overwrite_card: bool = False

    def __post_init__(self) -> None:
        try:
            validate_repo_id(self.repo)
        except ValueError as error:
            raise UserError(f"{self.repo!r} is no OWNER/NAME on the Hub: {error}") from error
        if "/" not in self.repo:
            raise UserError(f"{self.repo!r} names no owner: write OWNER/{self.repo}")
        if self.create_pr and (self.tag is not None or self.branch != _MAIN):
            raise UserError(
                "a pull request goes to main and has no tag: leave --tag and --revision out"
            )
        if not self.message.strip():
            raise UserError("the commit message is empty: write one, or leave it out")
        if found := leaks(self.message):
            raise UserError(f"the commit message holds {' and '.join(found)}: take it out")
        for kind, name in (("branch", self.branch), ("tag", self.tag)):
            if name is not None and _NO_REF.search(name):
                raise UserError(
                    f"{name!r} cannot be the name of a {kind} in git: take letters, digits, -, . "
                    "and _"
                )


@dataclass(frozen=True)
class Published:
    """Verified content of the Hub after a push.

    Args:
        commit: Id of the commit.
        url: Address of the commit or pull request.
        is_new: False if the Hub had the content already and no commit was made.
        kept: Files of the card that differ on the Hub and were left unchanged.
    """

    commit: str
    url: str
    is_new: bool
    kept: tuple[str, ...] = ()


def connect(*, anonymously: bool = False) -> HfApi:
    """Connect to the Hub with the user's token, from HF_TOKEN or `hf auth login`.

    Args:
        anonymously: Without a token, allow reading public content.

    Raises:
        HubError: If there is no token, or an invalid one.
    """
    token = get_token()
    if token is None and not anonymously:
        raise HubError(
            "no token for the Hub: run `hf auth login`, or set HF_TOKEN, with one that may write"
        )
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        place = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "the file of `hf auth login`"
        raise HubError(
            f"{place} holds something that no token of the Hub has, such as a letter that is not "
            "ASCII: copy the token again"
        )
    return HfApi(token=token or False, library_name="hf_stable", library_version=__version__)


def preview(checked: ExportCheck, to: Destination, api: HfApi) -> Difference:
    """Determine the effect of a push, without writing.

    Args:
        checked: Result of the check of the folder.
        to: Destination of the push.
        api: Client of the Hub.

    Raises:
        UserError: If a push would refuse the folder.
        HubError: If the Hub cannot be reached or refuses, or the repository holds another model.
    """
    _refuse(checked, to)
    with _quiet(), explained(to.repo, "looking at the repository"):
        tree, revision = dict[str, RepoFile](), to.branch
        try:
            tree = tree_of(api, to.repo, revision)
        except RevisionNotFoundError:
            tree = tree_of(api, to.repo, revision := _MAIN)
        except RepositoryNotFoundError:
            pass
        return _difference(checked, to, api, revision, tree)


def _difference(
    checked: ExportCheck, to: Destination, api: HfApi, revision: str, tree: dict[str, RepoFile]
) -> Difference:
    refuse_other_model(to.repo, tree)
    return compare(
        checked.folder,
        checked.files,
        tree,
        earlier=pushed_earlier(api, to.repo, revision, tree),
        overwrite_card=to.overwrite_card,
    )


def push(checked: ExportCheck, to: Destination, api: HfApi) -> Published:
    """Push a checked folder to the Hub. A second push of the same content makes no commit.

    Args:
        checked: Result of the check of the folder.
        to: Destination of the push.
        api: Client of the Hub.

    Returns:
        Content of the Hub after the push.

    Raises:
        UserError: If the folder holds content that must not be published.
        HubError: If the Hub refuses, or holds other content than expected after the commit. Then
            nothing is tagged, and the push can be repeated.
    """
    _refuse(checked, to)
    with _quiet():
        _prepare(to, api)
        with explained(to.repo, "looking at the repository"):
            head = api.repo_info(to.repo, revision=to.branch).sha or ""
            tree = tree_of(api, to.repo, head)
            difference = _difference(checked, to, api, head, tree)
            done = _proposed(checked, to, api) if to.create_pr else None
            _check_tag(to, api, None if not difference.is_empty else head)
        if difference.is_empty:
            place = f"{api.endpoint}/{to.repo}/commit/{head}"
            done = Published(head, place, is_new=False, kept=difference.kept)
        if done is None:
            done = _commit(checked, to, api, difference, head)
            _verify(checked, to, api, difference, done)
        if to.tag is not None:
            with explained(to.repo, f"tagging commit {done.commit[:8]}, which is there,"):
                api.create_tag(to.repo, tag=to.tag, revision=done.commit, exist_ok=True)
    return done


def _refuse(checked: ExportCheck, to: Destination) -> None:
    refuse_strangers(checked.folder)
    refuse_leaks(checked.folder)
    check_card(checked.folder, unevaluated=to.unevaluated)


def _prepare(to: Destination, api: HfApi) -> None:
    """Create the repository and the branch if missing."""
    with explained(to.repo, "making the repository"):
        api.create_repo(to.repo, private=to.private or None, exist_ok=True)
    try:
        with explained(to.repo, "looking at the repository"):
            info = api.repo_info(to.repo)
    except HubError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError):
            raise HubError(
                f"{to.repo} is taken by a repository that the token cannot read: choose another "
                "name, or use a token with access to it"
            ) from error
        raise
    if to.private and not info.private:
        raise HubError(f"{to.repo} exists and is public: make it private, or push without it")
    if to.branch != _MAIN:
        with explained(to.repo, f"making branch {to.branch}"):
            api.create_branch(to.repo, branch=to.branch, exist_ok=True)


def _check_tag(to: Destination, api: HfApi, commit: str | None) -> None:
    """Refuse a tag that names another commit, before uploading anything."""
    if to.tag is None:
        return
    tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(to.repo).tags}
    if to.tag in tags and tags[to.tag] != commit:
        raise HubError(
            f"{to.repo} has a tag {to.tag} already, on commit {tags[to.tag][:8]}: name another tag"
        )


def _proposed(checked: ExportCheck, to: Destination, api: HfApi) -> Published | None:
    """Return an open pull request that proposes the same files, if there is one."""
    opened = api.get_repo_discussions(
        to.repo, discussion_type="pull_request", discussion_status="open"
    )
    for each in opened:
        reference = f"refs/pr/{each.num}"
        tree = tree_of(api, to.repo, reference)
        if compare(checked.folder, checked.files, tree, overwrite_card=True).is_empty:
            commit = api.repo_info(to.repo, revision=reference).sha or ""
            return Published(commit, each.url, is_new=False)
    return None


def _commit(
    checked: ExportCheck, to: Destination, api: HfApi, difference: Difference, head: str
) -> Published:
    """Commit all new, changed and removed files, on top of the compared head."""
    operations = [
        *(CommitOperationAdd(name, str(checked.folder / name)) for name in difference.moved),
        *(CommitOperationDelete(name, is_folder=False) for name in difference.removed),
    ]
    with explained(to.repo, "uploading"):
        done = api.create_commit(
            to.repo,
            operations,
            commit_message=to.message,
            revision=to.branch,
            create_pr=to.create_pr,
            parent_commit=head,
        )
    return Published(done.oid, done.pr_url or done.commit_url, is_new=True, kept=difference.kept)


def _verify(
    checked: ExportCheck, to: Destination, api: HfApi, difference: Difference, done: Published
) -> None:
    """Check that the commit holds every file with the checked hash, and no removed file."""
    with explained(to.repo, f"reading commit {done.commit[:8]} back"):
        tree = tree_of(api, to.repo, done.commit)
    left = compare(checked.folder, checked.files, tree, overwrite_card=True)
    bad = [name for name in left.moved if name not in difference.kept]
    bad += [name for name in difference.removed if name in tree]
    if bad:
        raise HubError(
            f"{to.repo}: commit {done.commit[:8]} is not what was pushed: {bad[0]} differs there. "
            "Do not use it; the same command pushes again what differs."
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence huggingface_hub, which warns at each retry with signed addresses."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)

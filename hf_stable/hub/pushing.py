"""Push: an exported and checked folder as one commit on the Hub, verified there before it counts.

Large files go first and are addressed by their content, so that a push that was broken off goes on
where it was; readers see nothing of it before its one commit.
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
# What git takes for no name of a branch or tag (git-check-ref-format).
_NO_REF = re.compile(
    r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|(?:^|/)\.|\.lock(?:/|$)|^[-/]|[/.]$|^@?$"
)


@dataclass(frozen=True)
class Destination:
    """Where a push goes.

    Args:
        repo: OWNER/NAME on the Hub, made if it is not there.
        private: make it private; refused where it is there and public.
        branch: made from main if it is not there.
        tag: name for the commit, given when it is verified.
        message: of the commit. create_pr: propose it instead of writing to main.
        unevaluated: a card without measured perplexities is meant.
        overwrite_card: replace the Hub's card, which may have been edited there, although the Hub
            has this very model already.

    Raises:
        UserError: what cannot be a name, or options that exclude each other.
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
    """What is on the Hub now, verified.

    Args:
        commit: its id. url: of the commit or pull request.
        is_new: False when the Hub had it already and no commit was made.
        kept: the card's files that differ on the Hub and were left as they are there.
    """

    commit: str
    url: str
    is_new: bool
    kept: tuple[str, ...] = ()


def connect(*, anonymously: bool = False) -> HfApi:
    """The Hub with the user's token, from HF_TOKEN or the file that `hf auth login` writes.

    Args:
        anonymously: where there is no token, read what anybody may read.

    Raises:
        HubError: when there is none, or what cannot be one.
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
    """What a push would do; only reads.

    Raises:
        UserError: what a push would refuse.
        HubError: the Hub cannot be reached or refuses; the repository holds another model.
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
    """Bring a checked folder to the Hub; a second time it finds all there and makes no commit.

    Raises:
        UserError: the folder holds what must not be published.
        HubError: what the Hub refused, or holds after the commit other than it should. Then
            nothing is tagged, and the same push may be tried again.
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
    """The repository and the branch, made where they are missing."""
    with explained(to.repo, "making the repository"):
        api.create_repo(to.repo, private=to.private or None, exist_ok=True)
    try:
        with explained(to.repo, "looking at the repository"):
            info = api.repo_info(to.repo)
    except HubError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError):
            raise HubError(
                f"{to.repo} is taken, and not by what the token may see: choose another name, or "
                "take a token with rights to it"
            ) from error
        raise
    if to.private and not info.private:
        raise HubError(f"{to.repo} is there already and public: make it private, or push without")
    if to.branch != _MAIN:
        with explained(to.repo, f"making branch {to.branch}"):
            api.create_branch(to.repo, branch=to.branch, exist_ok=True)


def _check_tag(to: Destination, api: HfApi, commit: str | None) -> None:
    """Refuse a tag that names another commit, before anything is uploaded for it."""
    if to.tag is None:
        return
    tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(to.repo).tags}
    if to.tag in tags and tags[to.tag] != commit:
        raise HubError(
            f"{to.repo} has a tag {to.tag} already, on commit {tags[to.tag][:8]}: name another tag"
        )


def _proposed(checked: ExportCheck, to: Destination, api: HfApi) -> Published | None:
    """The open pull request that proposes these very files, if there is one."""
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
    """One commit of all that is new, changed or gone, on the head that it was compared with."""
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
    """See that the commit holds every file with the hash that was checked here, and no old one."""
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
    """huggingface_hub warns at each retry, with addresses that are signed."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)

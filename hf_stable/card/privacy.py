"""Removal of text that must not leave the machine: secrets, and paths on its disks.

Records name folders and may contain text that a user typed. Everything published passes through
`clean`.
"""

import os
import re
from collections.abc import Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

REDACTED = "[removed]"
# Prefixes that the issuers document (Hub, GitHub, GitLab, AWS, Google, Slack, JWT, ...).
_TOKENS = (
    r"(?<!\w)(?:hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|github_pat_\w{20,}|glpat-[\w-]{16,}|sk-[\w-]{16,}|AKIA[0-9A-Z]{16}|AIza[\w-]{30,}"
    r"|xox[abeoprs]-[\w-]{10,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"
)
_ASSIGNED = (
    r"(?i:(?<![a-z])(?:api[_-]?key|(?:access|auth|hf|hub)[_-]?token|secret|passw(?:or)?d)"
    r"\s*[=:]\s*(?!\W{0,3}removed)[^\s&,;]+)|(?i:(?<=[?&])(?:token|key|sig|signature)=[^\s&]+)"
)
_IN_URL = r"(?<=://)[^/\s@]+@"
_SECRET = re.compile(f"{_TOKENS}|{_ASSIGNED}|{_IN_URL}")
_SECRET_KEY = re.compile(r"(?i)(?:^|[_-])(?:token|secret|passw(?:or)?d|api[_-]?key|credentials?)$")
_SECRET_VARIABLE = re.compile(r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|KEY|CREDENTIALS?)$")
# Shorter values of variables are no secrets, and occur in ordinary words.
_SHORTEST_SECRET = 8
_PATH = re.compile(
    r"(?<![\w:/.~)])(?:file:/{2}|~[\w.-]*)?/(?:[^\s/\"'`<>|:;,]+/)+[^\s/\"'`<>|:;,()\[\]]*"
    r"|(?<![A-Za-z])[A-Za-z]:[\\/][^\s\"'`<>|;,]+"
    r"|(?<!\\)\\\\[\w.-]+\\[^\s\"'`<>|;,]+"
)
# Shortened, but not a leak: pages of one repository link to each other like this.
_UPWARD = re.compile(r"(?<![\w/.])(?:\.\./)+[^\s\"'`<>|:;,()\[\]]*")


def clean(value: Any, secrets: Sequence[str] | None = None) -> Any:
    """Return the same JSON value without secrets, with only the last part of every local path.

    Strings are searched for tokens of known forms, for the values of environment variables with
    secret-looking names, and for absolute, home and `..` paths. A key such as "hub_token" loses its
    value.

    Args:
        value: JSON value.
        secrets: Values of those variables; None reads them.
    """
    known = secrets_here() if secrets is None else secrets
    if isinstance(value, str):
        return _clean_text(value, known)
    if isinstance(value, dict):
        return {
            _clean_text(str(key), known): REDACTED
            if isinstance(item, str) and _SECRET_KEY.search(str(key))
            else clean(item, known)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [clean(item, known) for item in value]
    return value


def leaks(text: str, secrets: Sequence[str] | None = None) -> list[str]:
    """Return the kinds of content that `clean` would remove from a text, never the secrets."""
    found = []
    known = secrets_here() if secrets is None else secrets
    if _SECRET.search(text) or any(secret in text for secret in known):
        found.append("a secret")
    if _PATH.search(text):
        found.append("a path on this machine")
    return found


def _clean_text(text: str, secrets: Sequence[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, REDACTED)
    text = _SECRET.sub(REDACTED, text)
    if _is_place(text):
        return _last(text)
    for places in (_PATH, _UPWARD):
        text = places.sub(lambda found: _last(found[0]), text)
    return text


def _is_place(text: str) -> bool:
    """Return True if the whole text is a path on one machine."""
    return text.startswith(("/", "~", "../", "file:/")) or PureWindowsPath(text).is_absolute()


def _last(path: str) -> str:
    return PurePosixPath(path.replace("\\", "/")).name or "folder"


def secrets_here() -> list[str]:
    """Return the values of environment variables with secret-looking names, the longest first.

    It reads the whole environment; to check many texts, call it once.
    """
    values = {value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name)}
    return sorted((each for each in values if len(each) >= _SHORTEST_SECRET), key=len, reverse=True)

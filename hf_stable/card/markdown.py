"""Markdown for a card: all text is escaped except text made by this package."""

import html
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from .privacy import clean

TEMPLATE = Path(__file__).with_name("template.md.jinja")


class Made(str):
    """Markdown that needs no escaping."""


def escape(value: Any) -> Made:
    """Return one line that shows `value` literally: no HTML, Markdown, link or local path."""
    text = " ".join(str(clean(str(value))).split())
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069]", "", text)
    text = re.sub(r"([\\`*_\[\]|~$#!])", r"\\\1", html.escape(text, quote=False))
    # The Markdown of GitHub and the Hub turns bare addresses into links.
    return Made(re.sub(r"(?i)(https?|ftp)://|\bwww\.", _unlinked, text))


def _unlinked(found: re.Match[str]) -> str:
    return found[0].replace(":", "&#58;").replace(".", "&#46;")


def block(text: str, language: str) -> Made:
    """Return a fenced block that no line of `text` can close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Made(f"{fence}{language}\n{text.rstrip()}\n{fence}")


def link(text: str, address: str) -> Made:
    """Return a link to a trusted address; `text` is escaped."""
    return Made(f"[{escape(text)}]({address})")


def fill(**values: Any) -> str:
    """Fill the template; values are escaped unless they are Made, and a missing one is an error."""
    environment = Environment(
        finalize=lambda value: value if isinstance(value, Made) else escape(value),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # `finalize` escapes, for Markdown as well as for HTML
    )
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(**values)
    return re.sub(r"\n{3,}", "\n\n", text)

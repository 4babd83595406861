"""The kit of HTML pages: their head, the style that they share, a figure, and the file.

A page is one file that loads nothing and runs nothing: its policy forbids both, so that a name in
somebody's records cannot do more than be read.
"""

from collections.abc import Iterable
from html import escape
from pathlib import Path

from hf_stable import durable

from .figures import Drawing

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
BODY = """\
body { margin: 0 auto; padding: 1.2rem; max-width: 1160px; background: var(--ground);
  color: var(--ink); font-size: 16px; line-height: 1.5 }
body, .paper svg text { font-family: system-ui, "Segoe UI", "DejaVu Sans", sans-serif }
h1 { font-size: 1.6rem; margin: 0 0 .4rem }"""
"""Rules of every page's text."""
PAPER = """\
.paper { background: #ffffff; border: 1px solid var(--line); border-radius: 8px; padding: .5rem;
  overflow-x: auto }
.paper svg { display: block; height: auto; min-width: 640px; color-scheme: light;
  stroke-linejoin: round; stroke-linecap: butt }
"""
"""Rules of the sheet under a figure, which is white also where the page is dark."""


def palette(light: str = "", dark: str = "") -> str:
    """The colours of every page, as variables, by day and by night.

    Args:
        light, dark: declarations of further colours, such as "; --good: #d8efe3".
    """
    return f"""
:root {{ color-scheme: light dark; --ink: #1c1e21; --soft: #5d6470; --line: #d7dbe0;
  --ground: #f4f5f7; --card: #ffffff; --link: #0b5cad{light} }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e8eaed; --soft: #a3abb6; --line: #3a4049;
  --ground: #16181c; --card: #1f2329; --link: #8ab8f0{dark} }} }}
* {{ box-sizing: border-box }}
"""


def document(title: str, style: str, body: Iterable[str]) -> str:
    """A page of its own.

    Args:
        style: its rules. body: lines of HTML, in which all text is escaped.
    """
    head = (
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{style}</style></head><body>",
    )
    return "\n".join((*head, *body, "</body></html>\n"))


def figure(drawing: Drawing, level: int) -> Iterable[str]:
    """A figure with its caption and source; `level` is that of its headline."""
    heading = f'<a href="#{drawing.key}">{escape(drawing.title)}</a>'
    yield f'<figure id="{drawing.key}"><h{level}>{heading}</h{level}>'
    yield f'<div class="paper">{drawing.svg}</div>'
    yield f"<figcaption>{escape(drawing.caption)} <em>Source: {escape(drawing.source)}.</em>"
    yield "</figcaption></figure>"


def write_whole(file: Path, content: str) -> None:
    """Write a text file, whole or not at all; its folder is made if it is not there."""
    # A name in somebody's records, or a folder's, may hold bytes that are no text.
    durable.write_file(file, content.encode("utf-8", "xmlcharrefreplace"))

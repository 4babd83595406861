"""Tools for HTML pages: head, shared style, figures, and writing the file.

A page is one file that loads nothing and runs nothing. Its content security policy forbids both, so
that names in records cannot inject anything.
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
"""CSS rules for the text of every page."""
PAPER = """\
.paper { background: #ffffff; border: 1px solid var(--line); border-radius: 8px; padding: .5rem;
  overflow-x: auto }
.paper svg { display: block; height: auto; min-width: 640px; color-scheme: light;
  stroke-linejoin: round; stroke-linecap: butt }
"""
"""CSS rules for the sheet under a figure, which is white also on a dark page."""


def palette(light: str = "", dark: str = "") -> str:
    """Return the colors of every page as CSS variables, for light and dark mode.

    Args:
        light: Declarations of further colors in light mode, such as "; --good: #d8efe3".
        dark: Declarations of further colors in dark mode.
    """
    return f"""
:root {{ color-scheme: light dark; --ink: #1c1e21; --soft: #5d6470; --line: #d7dbe0;
  --ground: #f4f5f7; --card: #ffffff; --link: #0b5cad{light} }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e8eaed; --soft: #a3abb6; --line: #3a4049;
  --ground: #16181c; --card: #1f2329; --link: #8ab8f0{dark} }} }}
* {{ box-sizing: border-box }}
"""


def document(title: str, style: str, body: Iterable[str]) -> str:
    """Return a complete HTML page.

    Args:
        title: Title of the page, not escaped.
        style: CSS rules.
        body: Lines of HTML, in which all text is escaped.
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
    """Yield the HTML of a figure with caption and source; `level` is that of its headline."""
    heading = f'<a href="#{drawing.key}">{escape(drawing.title)}</a>'
    yield f'<figure id="{drawing.key}"><h{level}>{heading}</h{level}>'
    yield f'<div class="paper">{drawing.svg}</div>'
    yield f"<figcaption>{escape(drawing.caption)} <em>Source: {escape(drawing.source)}.</em>"
    yield "</figcaption></figure>"


def write_whole(file: Path, content: str) -> None:
    """Write a text file atomically and create its folder if needed."""
    # Names in records, or of folders, may hold bytes that are not valid text.
    durable.write_file(file, content.encode("utf-8", "xmlcharrefreplace"))

"""Content of a report, and its two formats: Markdown, and one HTML file without any scripts.

Both formats are generated from the same blocks, so they cannot disagree. Text from records is
always escaped. Standard library only.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from hf_stable.telemetry.reading.figures import Drawing
from hf_stable.telemetry.reading.html_kit import BODY, PAPER, document, figure, palette

_COLOURS = palette(
    """;
  --good: #d8efe3; --mixed: #fbebc3; --bad: #f8d5cd; --none: #e7e9ec""",
    """;
  --good: #1d4a37; --mixed: #57481a; --bad: #622b22; --none: #30343b""",
)
_STYLE = (
    _COLOURS
    + BODY
    + """
h2 { font-size: 1.35rem; margin: 2.6rem 0 .6rem; border-bottom: 2px solid var(--line) }
h3 { font-size: 1.12rem; margin: 2rem 0 .4rem } h4 { font-size: 1rem; margin: 1rem 0 .3rem }
p { margin: .4rem 0; max-width: 62rem } a { color: var(--link) }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .6rem 1rem; margin: .5rem .7rem .5rem 0; overflow-x: auto; display: inline-block;
  vertical-align: top; max-width: calc(100% - .7rem) }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; white-space: nowrap }
th, td { text-align: right; padding: .26rem .6rem; border-bottom: 1px solid var(--line);
  vertical-align: top } th { color: var(--soft); font-weight: 600 }
thead th { vertical-align: bottom }
tr:last-child td { border-bottom: 0 }
th.text, td.text { text-align: left } td { white-space: nowrap }
.prose td.text { white-space: normal; max-width: 34rem }
td.good { background: var(--good) } td.mixed { background: var(--mixed) }
td.bad { background: var(--bad) } td.none { background: var(--none) }
td.mark { white-space: nowrap; text-align: center; border: 2px solid var(--card);
  min-width: 3.4rem }
ul { margin: .3rem 0; padding-left: 1.2rem } nav > ul { columns: 2; font-size: .92rem }
nav li { break-inside: avoid-column }
figure { margin: 1.2rem 0; break-inside: avoid } figure h4 a { color: inherit;
  text-decoration: none }
"""
    + PAPER
    + """figcaption { font-size: .92rem; margin-top: .45rem; color: var(--soft); max-width: 62rem }
@media (max-width: 760px) { body { padding: .5rem } .paper { padding: .3rem }
  nav > ul { columns: 1 } caption { white-space: normal } }
@media print { nav { display: none } body { max-width: none; background: #ffffff }
  .paper { border: 0; padding: 0 } .paper svg { min-width: 0 } }
"""
)
# Colors of cells of a grid; the text of a cell says the same.
MARKS = ("good", "mixed", "bad", "none")


@dataclass(frozen=True)
class Cell:
    """A cell of a table; `mark` is one of MARKS."""

    text: str
    mark: str

    def __post_init__(self) -> None:
        assert self.mark in MARKS


@dataclass(frozen=True)
class Name:
    """First cell of a row, with an anchor for links."""

    text: str
    key: str

    def __post_init__(self) -> None:
        assert re.fullmatch(r"[A-Za-z0-9._-]+", self.key)


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of text."""

    text: str


@dataclass(frozen=True)
class Items:
    """A list."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table; the first `words` columns are text, the others are numbers."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str | Cell | Name]]
    words: int = 1


Block = Paragraph | Items | Table | Drawing


@dataclass(frozen=True)
class Section:
    """A headline with its blocks; `key` is its anchor, `level` is 2 or 3."""

    key: str
    title: str
    blocks: Sequence[Block]
    level: int = 3


def variant_title(variant: str) -> str:
    """Return a variant as text for a headline."""
    return variant or "no variant"


def interval_words(ends: Sequence[float], form: str) -> str:
    """Return an interval as text for a table."""
    return "–" if any(map(math.isnan, ends)) else " to ".join(f"{end:{form}}" for end in ends)


def to_html(title: str, sections: Sequence[Section]) -> str:
    """Return the report as a complete HTML page."""
    body = [
        f"<h1>{escape(title)}</h1>",
        *_contents(sections),
        *(line for section in sections for line in _section(section)),
    ]
    return document(title, _STYLE, body)


def _contents(sections: Sequence[Section]) -> Iterable[str]:
    yield '<nav aria-label="Contents"><ul>'
    for section in sections:
        mark = ' class="deep"' if section.level > 2 else ""
        yield f'<li{mark}><a href="#{section.key}">{escape(section.title)}</a></li>'
    yield "</ul></nav>"


def _section(section: Section) -> Iterable[str]:
    level = section.level
    yield f'<h{level} id="{section.key}">{escape(section.title)}</h{level}>'
    for block in section.blocks:
        if isinstance(block, Paragraph):
            yield f"<p>{escape(block.text)}</p>"
        elif isinstance(block, Items):
            yield f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in block.lines)}</ul>"
        elif isinstance(block, Table):
            yield from _table(block)
        else:
            yield from figure(block, level=4)


def _table(table: Table) -> Iterable[str]:
    kinds = [' class="text"' if index < table.words else "" for index in range(len(table.head))]
    prose = ' class="prose"' if table.words > 1 else ""
    yield f'<div class="card"><table{prose}><caption>{escape(table.title)}</caption><thead><tr>'
    heads = zip(kinds, table.head, strict=True)
    yield "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in heads)
    yield "</tr></thead><tbody>"
    for row in table.rows:
        yield f"<tr>{''.join(map(_cell, kinds, row))}</tr>"
    yield "</tbody></table></div>"


def _cell(kind: str, cell: str | Cell | Name) -> str:
    if isinstance(cell, Name):
        return f'<td{kind} id="{cell.key}">{escape(cell.text)}</td>'
    if isinstance(cell, Cell):
        return f'<td class="mark {cell.mark}">{escape(cell.text)}</td>'
    return f"<td{kind}>{escape(cell)}</td>"


def to_markdown(title: str, sections: Sequence[Section], page: str, figures: str) -> str:
    """Return the report as Markdown.

    Args:
        title: Title of the report.
        sections: Sections in order.
        page: Name of the HTML file in the same folder.
        figures: Name of the folder next to it with a `<key>.svg` for each figure.
    """
    parts = [f"# {_plain(title)}", f"[{page}]({page}) says the same on one page."]
    for section in sections:
        parts.append(f"{'#' * section.level} {_plain(section.title)}")
        parts += [_markdown(block, figures) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def _markdown(block: Block, figures: str) -> str:
    if isinstance(block, Paragraph):
        return _plain(block.text)
    if isinstance(block, Items):
        return "\n".join(f"- {_plain(line)}" for line in block.lines)
    if isinstance(block, Drawing):
        image = f"![{_plain(block.title)}]({figures}/{block.key}.svg)"
        return f"{image}\n\n{_plain(block.caption)} Source: {_plain(block.source)}."
    rule = ["---" if index < block.words else "---:" for index in range(len(block.head))]
    lines = [[_markdown_cell(cell) for cell in row] for row in (block.head, *block.rows)]
    lines.insert(1, rule)
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"**{_plain(block.title)}**\n\n{table}"


def _markdown_cell(cell: str | Cell | Name) -> str:
    if isinstance(cell, Name):
        return f'<a id="{cell.key}"></a>{_plain(cell.text)}'
    return _plain(cell.text if isinstance(cell, Cell) else cell)


def _plain(text: str) -> str:
    """Escape text for Markdown."""
    text = re.sub(r"([\\|*`\[\]])", r"\\\1", " ".join(text.split()))
    return text.replace("&", "&amp;").replace("<", "&lt;")

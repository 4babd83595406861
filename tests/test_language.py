"""The language of the package: docstrings that begin well, and no phrase of the banned list."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_stable

ROOT = Path(hf_stable.__file__).parent
# A docstring begins with an imperative or a noun phrase, never with one of these words.
HEADLESS = ("By", "How", "Of", "That", "What", "When", "Where", "Whether", "Which", "Who")
# Regular expressions between word boundaries, in any case. Spaces also match line breaks.
BANNED = (
    # Private dialect, with the established word in the developer guide.
    r"(go|goes|going|gone|went) on (with|by itself)",
    "gone on",
    "mend(s|ed|ing)?",
    "the recipe's word",
    "what is there",
    "is none that",
    "stands? in",
    "of its own",
    "anew",
    "but for",
    "(is|are) told",
    "told of",
    "as many processes",
    "as it was",
    "in the place of",
    "so that it is",
    "foretell(s|ing)?|foretold",
    # British spelling.
    "licences?",
    "colour(s|ed)?(?!:)",
    "(centred|centres?|neighbours?|favour(s|ed)?|honour(s|ed)?|behaviours?)",
    "(initial|normal|quant|linear|optim|recogn|serial|synchron|general)is(es?|ed|ing|ation)",
)
PATTERN = re.compile(
    r"\b(?:" + "|".join(phrase.replace(" ", r"\s+") for phrase in BANNED) + r")\b", re.IGNORECASE
)
# Texts of committed reports and pages, remade byte for byte. They change with those files.
COMMITTED = {
    ("card/papers.py", "Normalisation"),  # the title of a paper
    ("card/sections.py", "licence"),
    ("sweep/report.py", "foretells"),
    ("telemetry/reading/layer_figures.py", "colour"),
    ("telemetry/reading/layer_figures.py", "neighbours"),
}


def docstrings(tree: ast.AST) -> Iterator[ast.Constant]:
    """Yield docstrings of modules, classes, functions and attributes."""
    for node in ast.walk(tree):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield value


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Yield blocks of comments, with consecutive lines joined, so that a phrase may wrap."""
    last, first, block = -1, 0, ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        if token.start[0] != last + 1 and block:
            yield first, block
            block = ""
        first = token.start[0] if not block else first
        block = f"{block} {token.string.lstrip('# ')}"
        last = token.start[0]
    if block:
        yield first, block


def faults(source: str) -> list[tuple[int, str]]:
    """Return line and fault of everything that the language rules forbid in a file."""
    tree = ast.parse(source)
    found = [
        (node.lineno, f"a docstring begins with {word}")
        for node in docstrings(tree)
        for word in str(node.value).split(maxsplit=1)[:1]
        if word in HEADLESS
    ]
    texts = list(comments(source))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append((node.lineno, node.value))
    found += [(line, each[0]) for line, text in texts for each in PATTERN.finditer(text)]
    return sorted(set(found))


def test_the_package_keeps_the_language_rules():
    found = []
    for file in sorted(ROOT.rglob("*.py")):
        name = file.relative_to(ROOT).as_posix()
        new = [each for each in faults(file.read_text("utf-8")) if (name, each[1]) not in COMMITTED]
        found += [f"{name}:{line}: {fault}" for line, fault in new]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ('"""What a module does."""', 1),
        ('class A:\n    x: int\n    """Whether x."""', 1),
        ('"""Return what a module does."""', 0),
        ("# A run goes on\n# with its data.", 1),
        ('message = f"{1}: mend the file"', 1),
        ("amended = 1  # recommended", 0),
    ],
)
def test_faults_are_found_where_they_are(source, count):
    assert len(faults(source)) == count

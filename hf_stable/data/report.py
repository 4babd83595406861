"""Counts of the documents that were read and of those that were left out."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_stable.data.formats import READABLE
from hf_stable.wording import counted

_EXAMPLES = 5


@dataclass
class Tally:
    """Counts of one source: all rows, good texts, and rows that cannot be used."""

    rows: int = 0
    good: int = 0
    bad: int = 0


@dataclass
class ReadReport:
    """Counts of the documents that were read and of those that were left out.

    Keys of the dicts are paths or `datasets` names. `bad` and `empty` list the first few places in
    each file; `bad_counts` and `empty_counts` count all of them.
    """

    documents: int = 0
    text_bytes: int = 0
    other_part_documents: int = 0
    other_part_bytes: int = 0
    bad: dict[str, list[str]] = field(default_factory=dict)
    bad_counts: dict[str, int] = field(default_factory=dict)
    empty: dict[str, list[str]] = field(default_factory=dict)
    empty_counts: dict[str, int] = field(default_factory=dict)
    ignored_files: list[str] = field(default_factory=list)
    left_files: dict[str, list[str]] = field(default_factory=dict)
    """Other files and folders that were found but not read, by reason."""

    @property
    def bad_documents(self) -> int:
        return sum(self.bad_counts.values())

    @property
    def empty_documents(self) -> int:
        return sum(self.empty_counts.values())

    def add_bad(self, file: str, place: str) -> None:
        """Count a document that cannot be used; `place` is its place in the file and the reason."""
        self.bad_counts[file] = self.bad_counts.get(file, 0) + 1
        self._add_example(self.bad, file, place)

    def add_empty(self, file: str, place: str) -> None:
        """Count a document that is empty or only white space."""
        self.empty_counts[file] = self.empty_counts.get(file, 0) + 1
        self._add_example(self.empty, file, place)

    def leave(self, reason: str, path: Path) -> None:
        """Record a file or folder that was found but is not read."""
        self.left_files.setdefault(reason, []).append(str(path))

    @staticmethod
    def _add_example(examples: dict[str, list[str]], file: str, place: str) -> None:
        known = examples.setdefault(file, [])
        if len(known) < _EXAMPLES:
            known.append(place)

    def to_dict(self) -> dict[str, Any]:
        """Return a deep copy in plain JSON types; `ReadReport(**copy)` gives an equal report."""
        return asdict(self)

    def problem_lines(self) -> list[str]:
        """Return one line for each file with bad or empty documents, and lines on unread files."""
        lines = [f"{f}: {n} bad ({_examples(self.bad[f], n)})" for f, n in self.bad_counts.items()]
        lines += [
            f"{f}: {n} empty ({_examples(self.empty[f], n)})" for f, n in self.empty_counts.items()
        ]
        left = {f"not {READABLE}": self.ignored_files, **self.left_files}
        return lines + [
            f"{len(paths)} not read, {reason}: {_examples(paths[:_EXAMPLES], len(paths), ', ')}"
            for reason, paths in left.items()
            if paths
        ]

    def lines(self) -> list[str]:
        """Return the whole report as lines to print."""
        total = f"{counted(self.documents, 'document')}, {self.text_bytes:,} bytes of text"
        if self.other_part_documents:
            total += f"; {self.other_part_documents:,} documents are in the other part of the split"
        return [
            f"{total}; left out: {self.bad_documents:,} bad, {self.empty_documents:,} empty",
            *self.problem_lines(),
        ]


def _examples(places: Sequence[str], count: int, separator: str = "; ") -> str:
    return separator.join(places) + (separator + "…" if count > len(places) else "")

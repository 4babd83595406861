"""What was read and what was left out: the counts behind 'nothing is skipped in silence'."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_stable.data.formats import READABLE
from hf_stable.wording import counted

_EXAMPLES = 5


@dataclass
class Tally:
    """Counts of one source: rows of any kind, good texts, and rows that cannot be used."""

    rows: int = 0
    good: int = 0
    bad: int = 0


@dataclass
class ReadReport:
    """What was read and what was left out. Keys of the dicts are paths or `datasets` names.

    `bad` and `empty` hold the first few places of each file, the `_counts` all of them.
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
    """Other files and folders that were found and not read, by the reason."""

    @property
    def bad_documents(self) -> int:
        return sum(self.bad_counts.values())

    @property
    def empty_documents(self) -> int:
        return sum(self.empty_counts.values())

    def add_bad(self, file: str, place: str) -> None:
        """Count a document that cannot be used; `place` says where in the file and why."""
        self.bad_counts[file] = self.bad_counts.get(file, 0) + 1
        self._add_example(self.bad, file, place)

    def add_empty(self, file: str, place: str) -> None:
        """Count a document without any character but white space."""
        self.empty_counts[file] = self.empty_counts.get(file, 0) + 1
        self._add_example(self.empty, file, place)

    def leave(self, reason: str, path: Path) -> None:
        """Name a file or folder that was found and is not read."""
        self.left_files.setdefault(reason, []).append(str(path))

    @staticmethod
    def _add_example(examples: dict[str, list[str]], file: str, place: str) -> None:
        known = examples.setdefault(file, [])
        if len(known) < _EXAMPLES:
            known.append(place)

    def to_dict(self) -> dict[str, Any]:
        """A deep copy in plain JSON types; `ReadReport(**it)` gives an equal report."""
        return asdict(self)

    def problem_lines(self) -> list[str]:
        """One line of text for every file of which something was left out."""
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
        """The whole report as lines to print."""
        total = f"{counted(self.documents, 'document')}, {self.text_bytes:,} bytes of text"
        if self.other_part_documents:
            total += f"; {self.other_part_documents:,} documents are in the other part of the split"
        return [
            f"{total}; left out: {self.bad_documents:,} bad, {self.empty_documents:,} empty",
            *self.problem_lines(),
        ]


def _examples(places: Sequence[str], count: int, separator: str = "; ") -> str:
    return separator.join(places) + (separator + "…" if count > len(places) else "")

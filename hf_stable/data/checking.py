"""Check all files before any is tokenized, to report every unusable file at once."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from hf_stable.data.opening import is_pipe
from hf_stable.data.report import ReadReport
from hf_stable.data.sources import Source, read_documents
from hf_stable.errors import DataError

# Text read from each file: all of most files, and only seconds for a corpus of a thousand shards.
_CHECKED_BYTES = 4 * 2**20


def refuse_unusable(sources: Sequence[Source]) -> None:
    """Read the beginning of each expanded file and report all unusable ones at once.

    Small files are read completely. Damage further into a large file raises an error when that part
    is read. Pipes and `datasets` names are not read.

    Raises:
        DataError: If files cannot be used (each is named with the reason), or if no file has text.
    """
    checked = []
    for source in sources:
        path = Path(source.path)
        if path.is_file() and not is_pipe(path):
            status = path.stat()
            whole = replace(source, part="all", holdout=0.0)
            checked.append(_check(whole, status.st_ino, status.st_size, status.st_mtime_ns))
    problems = list(dict.fromkeys(found.problem for found in checked if found.problem))
    if problems:
        count = f"{len(problems)} files cannot be used:\n" if len(problems) > 1 else ""
        raise DataError(count + "\n".join(problems))
    if sources and len(checked) == len(sources) and not any(found.has_text for found in checked):
        paths = ", ".join(dict.fromkeys(source.path for source in sources))
        raise DataError(f"only empty documents in {paths}: give files with text")


class _Checked(NamedTuple):
    problem: str | None
    has_text: bool


@lru_cache(maxsize=2**16)
def _check(source: Source, *_stamp: int) -> _Checked:
    """Check one file; the result is cached as long as `_stamp` (inode, size, time) is unchanged."""
    report = ReadReport()
    try:
        for _ in read_documents(source, report):
            if report.text_bytes >= _CHECKED_BYTES:
                break
    except DataError as error:
        return _Checked(str(error), False)
    return _Checked(None, report.documents > 0)

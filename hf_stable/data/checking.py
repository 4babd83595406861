"""Name all files that cannot be used at once, before any of them is tokenized."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from hf_stable.data.opening import is_pipe
from hf_stable.data.report import ReadReport
from hf_stable.data.sources import Source, read_documents
from hf_stable.errors import DataError

# Text of each file that is read: all of most files, and seconds for a corpus of a thousand shards.
_CHECKED_BYTES = 4 * 2**20


def refuse_unusable(sources: Sequence[Source]) -> None:
    """Read the beginning of each expanded source that is a file, to name all that cannot be used.

    Small files are read in whole. Damage that lies deeper in a large one is an error when its turn
    comes. Pipes and names of datasets are not read.

    Raises:
        DataError: files that cannot be used, each with the reason, or no text in any file.
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
    """Check one file; the result is cached while `_stamp` (inode, size, time) is the same."""
    report = ReadReport()
    try:
        for _ in read_documents(source, report):
            if report.text_bytes >= _CHECKED_BYTES:
                break
    except DataError as error:
        return _Checked(str(error), False)
    return _Checked(None, report.documents > 0)

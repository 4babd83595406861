"""Names all files that cannot be used at once, before any of them is tokenized."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from hf_stable.data.formats import MAX_DOCUMENT_BYTES
from hf_stable.data.opening import is_pipe
from hf_stable.data.report import ReadReport
from hf_stable.data.sources import Source, read_documents
from hf_stable.errors import DataError

# How much text of each file is read: all of most files, and a small part of a huge corpus.
_CHECKED_BYTES = MAX_DOCUMENT_BYTES


def refuse_unusable(sources: Sequence[Source]) -> None:
    """Read the beginning of each expanded source that is a file, to name all that cannot be used.

    Small files are read in whole. Damage that lies deeper in a large one is an error when its turn
    comes. Pipes and names of datasets are not read.

    Raises:
        DataError: files that cannot be used, each with the reason.
    """
    problems = []
    for source in sources:
        path = Path(source.path)
        if path.is_file() and not is_pipe(path):
            status = path.stat()
            whole = replace(source, part="all", holdout=0.0)
            problems.append(_problem(whole, status.st_ino, status.st_size, status.st_mtime_ns))
    found = [problem for problem in dict.fromkeys(problems) if problem]
    if found:
        count = f"{len(found)} files cannot be used:\n" if len(found) > 1 else ""
        raise DataError(count + "\n".join(found))


@lru_cache(maxsize=2**16)
def _problem(source: Source, *_stamp: int) -> str | None:
    """Why a file cannot be used, or None; known again while the file is the same."""
    report = ReadReport()
    try:
        for _ in read_documents(source, report):
            if report.text_bytes >= _CHECKED_BYTES:
                return None
    except DataError as error:
        return str(error)
    return None

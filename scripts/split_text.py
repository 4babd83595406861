"""One file of text a language, from a file whose rows name theirs.

    python scripts/split_text.py multilingual.parquet --column lang --output text/human

Writes OUTPUT/VALUE.jsonl for every value of the column, with the texts in the order of the file:
sources for a mixture with weights (recipes/data/paper_languages.yaml).
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+-]{0,60}")


def read_rows(path: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Rows of a parquet or JSON lines file."""
    if path.suffix == ".parquet":
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(1024, columns=columns):
                yield from batch.to_pylist()
        return
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def split(path: Path, column: str, text: str, output: Path, limit: int | None) -> Counter[str]:
    """Write each value's texts, up to `limit` bytes of UTF-8 (and the document that reaches it).

    Returns:
        Bytes of text by value.

    Raises:
        ValueError: a value that cannot be the name of a file.
    """
    output.mkdir(parents=True, exist_ok=True)
    sizes: Counter[str] = Counter()
    for row in read_rows(path, [column, text]):
        value = str(row[column])
        if not _NAME.fullmatch(value):
            raise ValueError(f"{path}: {column} is {value!r}, which cannot name a file")
        if limit is None or sizes[value] < limit:
            # A value that is met for the first time begins its file anew.
            with (output / f"{value}.jsonl").open(
                "a" if value in sizes else "w", encoding="utf-8"
            ) as file:
                file.write(json.dumps({"text": row[text]}, ensure_ascii=False) + "\n")
            sizes[value] += len(row[text].encode())
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("file", type=Path, help="parquet or JSON lines")
    parser.add_argument("--column", required=True, help="that names the language")
    parser.add_argument("--text", default="text", help="column of the text")
    parser.add_argument("--output", type=Path, required=True, help="folder of the new files")
    parser.add_argument("--limit-bytes", type=int, help="of text of each language")
    arguments = parser.parse_args()
    sizes = split(
        arguments.file, arguments.column, arguments.text, arguments.output, arguments.limit_bytes
    )
    for value, size in sizes.most_common():
        print(f"{arguments.output / value}.jsonl: {size:,} bytes")


if __name__ == "__main__":
    main()

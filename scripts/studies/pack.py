"""Pack a study's records for the repository: everything that its report reads, and no more.

    python scripts/studies/pack.py runs/sweeps/table3_cpu scripts/studies/table3_cpu/records.tar.xz

Three columns of telemetry stay, and the nine digits that tell fp32 numbers apart: a report of the
unpacked folder is that of the whole one. A study's own folder keeps everything.
"""

import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

KEPT = {"event", "step", "loss", "learning_rate", "grad_norm", "perplexity"}
COLUMNS = {
    "layers.*.attention/max_logit",
    "layers.*.attention/entropy",
    "layers.*.optimizer/update_l2",
}


def thin(lines: str) -> str:
    """Rows of metrics.jsonl with the columns that a report reads."""
    rows = (json.loads(line) for line in lines.splitlines())
    kept = ({key: _nine(row[key]) for key in row if key in KEPT | COLUMNS} for row in rows)
    return "".join(json.dumps(row) + "\n" for row in kept)


def _nine(value: Any) -> Any:
    return float(f"{value:.9g}") if isinstance(value, float) else value


def main() -> None:
    study, archive = Path(sys.argv[1]), Path(sys.argv[2])
    names = ("run.json", "result.json", "metrics.jsonl")
    files = [
        study / "plan.json",
        *(file for name in names for file in study.glob(f"runs/*/{name}")),
        *study.glob("perplexity/*.json"),
    ]
    with tarfile.open(archive, "w:xz") as packed:
        for file in sorted(files):
            text = file.read_text(encoding="utf-8")
            content = (thin(text) if file.name == "metrics.jsonl" else text).encode()
            member = tarfile.TarInfo(str(file.relative_to(study)))
            member.size = len(content)
            packed.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    main()

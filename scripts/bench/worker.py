"""Measure what is not measured yet of one call, and append every case when it ends.

`first.py` starts it, with what it knows as JSON; it starts it again when a case took it down. Exit
codes: 0 nothing is left, 3 the device cannot be used any more by this process.
"""

import contextlib
import faulthandler
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from store import Record, Store, die_with_parent

LOST = 3  # exit code
# What is left of a device after these is of no use to the process.
_STICKY = (
    "CUDA error",
    "illegal memory access",
    "device-side assert",
    "unspecified launch failure",
)


def todo(
    names: list[str], sizes: dict[str, Any], records: list[Record], start: str, only: str = ""
) -> list[str]:
    """Return the cases to measure, in order; those that failed in an earlier start come last.

    What failed or was cut off in this start is not tried again in it.
    """
    latest: dict[str, Record] = {}
    for record in records:
        if record["kind"] == "case" and record.get("sizes") == sizes.get(record["case"]):
            latest[record["case"]] = record
    chosen = [name for name in names if name.startswith(only)]
    left = [name for name in chosen if latest.get(name, {}).get("status") != "ok"]
    again = [name for name in left if name in latest and latest[name]["start"] != start]
    return [name for name in left if name not in latest] + again


class Worker:
    """Cases of one call on one device, until the deadline.

    Args:
        asked: `folder`, `call`, `dry`, `only`, `start`, `seconds`, `parent` and `identity`, as
            `first.py` knows them.
    """

    def __init__(self, asked: Record) -> None:
        from clocks import Clocks  # noqa: PLC0415  # these take seconds: not for `todo`'s users
        from common import Device  # noqa: PLC0415
        from plan import plan  # noqa: PLC0415

        self._asked = asked
        self.store = Store(Path(asked["folder"]) / "results.jsonl")
        self.clocks = Clocks()
        self.deadline = time.monotonic() + asked["seconds"]
        self.device = Device(asked["dry"], asked["seconds"])
        if not self.device.cuda and not asked["dry"]:
            sys.exit("torch sees no CUDA device: --dry rehearses without one")
        self.cases = {case.name: case for case in plan(asked["call"], self.device)}
        self._append("device", facts=self.device.describe())

    def _append(self, kind: str, **fields: Any) -> None:
        fields = {"start": self._asked["start"], "call": self._asked["call"], **fields}
        self.store.append(kind, self._asked["identity"], **fields)

    def run(self) -> None:
        asked, sizes = self._asked, {name: dict(case.sizes) for name, case in self.cases.items()}
        records = self.store.read(asked["identity"])
        for name in todo(list(self.cases), sizes, records, asked["start"], asked["only"]):
            if time.monotonic() >= self.deadline:
                return
            self.measure(name)

    def measure(self, name: str) -> None:
        """Measure one case, within its limit, and append it."""
        case, begin = self.cases[name], time.monotonic()
        about = {"case": name, "sizes": dict(case.sizes)}
        left = max(1.0, self.deadline - begin)
        self.device.spans.clear()
        self._append("begin", **about, limit=min(case.limit, left))
        # By a thread in C: it also ends what holds the interpreter, and says where it stood.
        faulthandler.dump_traceback_later(min(case.limit, left), exit=True)
        try:
            rows, values = case.measure()
        except Exception as error:  # the others are still worth measuring
            traceback.print_exc()
            rows, values, reason = [], {}, " ".join(str(error).split())[:300]
            about |= {"status": "failed", "reason": f"{type(error).__name__}: {reason}"}
        else:
            late = any(_is_late(row) for row in rows)
            about["status"] = "failed" if _is_lost(rows) else "cut" if late else "ok"
        faulthandler.cancel_dump_traceback_later()
        spent, measured = (
            time.monotonic() - begin,
            {k: v for k, v in values.items() if v is not None},
        )
        self._append(
            "case",
            **about,
            seconds=spent,
            rows=rows,
            values=measured,
            clocks=self.clocks.during(self.device.spans),
        )
        print(f"{about['status']}: {name}, {spent:.1f} s", flush=True)
        if _is_lost([*rows, about]):
            sys.exit(LOST)
        with contextlib.suppress(Exception):
            self.device.free()


def _is_late(row: Record) -> bool:
    return row.get("skipped", "").endswith("no time left")


def _is_lost(rows: list[Record]) -> bool:
    reasons = [row.get("reason", row.get("skipped", "")) for row in rows]
    return any(word in reason for reason in reasons for word in _STICKY)


if __name__ == "__main__":
    question = json.loads(sys.argv[1])
    die_with_parent(question["parent"])
    Worker(question).run()

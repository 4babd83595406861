"""`results.jsonl`: everything that was measured, one JSON object a line.

Every line has `kind`, `time` (UTC) and `identity`; by kind:

    begin    `case`, `start`: a case has begun. Without a `case` line after it, it was cut off.
    case     `case`, `start`, `status` ("ok", "failed", "cut" by the end of the call), `seconds`,
             `rows` (dictionaries with `part` and `case`), `values` (numbers by goal id), `clocks`;
             `reason` where it failed.
    test     `test`, `outcome`, `seconds`: the verdict of one test.
    device   `facts` of the device as torch and nvidia-smi see it.
    applied  `tiles` that went into the table, and `after`, the identity with them.

A line is written by one call and brought to the disk before the writer goes on, so a kill at any
moment costs no finished case. `start` names one start of the program. Standard library only.
"""

import ctypes
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "hf_stable" / "kernels" / "blocks.py"
# What decides the numbers, without the tile table, which has an entry of its own in an identity.
SOURCES = ("hf_stable/kernels", "hf_stable/model", "hf_stable/optim", "scripts/bench")
PACKAGES = ("torch", "triton", "transformers", "flash_attn", "flash_attn_4", "liger_kernel")
PACKAGES += ("cut_cross_entropy", "quack_kernels", "flash_linear_attention")
Record = dict[str, Any]


class BusyError(Exception):
    """Another process writes to the same results."""


class Store:
    """Writer and reader of one `results.jsonl`. One process writes at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)

    def lock(self) -> None:
        """Hold the file until this process ends; raise BusyError when another one holds it."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BusyError(
                f"{self.path} is in use by another run; wait for it or stop it"
            ) from error

    def append(self, kind: str, identity: Record, **fields: Any) -> None:
        """Append one line; it is on the disk when this returns."""
        self._cut_torn_line()
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        record = {"kind": kind, "time": time, **fields, "identity": identity}
        data = (json.dumps(_finite(record), allow_nan=False) + "\n").encode()
        while data:
            data = data[os.write(self._file, data) :]
        os.fsync(self._file)

    def read(self, identity: Record | None = None) -> list[Record]:
        """Return all records, or those of one identity, without a last line that was cut off."""
        lines = self.path.read_bytes().split(b"\n")[:-1]
        records = [json.loads(line) for line in lines if line]
        return [each for each in records if identity in (None, each["identity"])]

    def _cut_torn_line(self) -> None:
        """Take away a last line without an end, which a killed writer left."""
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            os.truncate(self._file, self.path.read_bytes().rfind(b"\n") + 1)


def write_file(path: Path, text: str) -> None:
    """Write a file so that a reader, also after a kill, sees the old one or the new one."""
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _finite(value: Any) -> Any:
    """Replace numbers that JSON does not have by their names: "nan" has missed every goal."""
    if isinstance(value, float):
        return value if value - value == 0 else str(value)
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def identify(dry: bool) -> Record:
    """Return what must be the same for a case to count as measured.

    `code` is a digest of the sources beside the git revision, since a copy of the checkout may have
    no git, and a checkout may have changes.
    """
    files = [file for folder in SOURCES for file in (ROOT / folder).rglob("*.py")]
    return {
        "dry": dry,
        "revision": _output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "code": _digest(file for file in files if file != TABLE),
        "tiles": _digest([TABLE]),
        "device": _device(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _digest(files: Any) -> str:
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _device() -> str:
    """Return the name of the GPU, found without torch, whose import takes seconds."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "any") == "":
        return "cpu"
    names = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    if names:
        return names.splitlines()[0]
    return "a GPU without nvidia-smi" if Path("/dev/nvidiactl").exists() else "cpu"


def _output(*command: str) -> str | None:
    """Return a command's output; None where it does not answer."""
    if shutil.which(command[0]) is None:
        return None
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


def die_with_parent(parent: int) -> None:
    """Have the system kill this process when `parent`, which started it, ends, however (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        sys.exit("the process that started this one is gone")

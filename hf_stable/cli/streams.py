"""Standard output and error of a command, made so that printing never ends the command."""

import io
import sys
import warnings
from typing import Any, TextIO


def prepare() -> None:
    """Make the process's streams safe to print to, and each warning one plain line.

    Characters that the encoding lacks are replaced. Output after the reader (such as `head`) has
    exited is dropped, and the command completes its work.
    """
    sys.stdout = _safe(sys.stdout, "replace")
    sys.stderr = _safe(sys.stderr, "backslashreplace")
    warnings.formatwarning = _one_line


def _safe(stream: TextIO, errors: str) -> TextIO:
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.reconfigure(errors=errors)
    is_buffered = isinstance(stream.buffer, io.BufferedWriter)  # not under PYTHONUNBUFFERED
    raw = stream.buffer.raw if is_buffered else stream.buffer
    if not isinstance(raw, io.FileIO):
        return stream
    stream.flush()
    pipe: Any = _Pipe(raw.fileno(), "wb", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(pipe) if is_buffered else pipe,
        encoding=stream.encoding,
        errors=errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _Pipe(io.FileIO):
    """File that drops output after its reader has exited, or after it has failed once."""

    is_lost = False

    def write(self, data: bytes, /) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not self.is_lost:
            try:
                return super().write(data)
            except OSError as error:
                self.is_lost = True
                if not isinstance(error, BrokenPipeError):  # on a full disk, output is lost
                    raise
        return memoryview(data).nbytes


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: object = None
) -> str:
    return f"warning: {' '.join(str(message).split())}\n"

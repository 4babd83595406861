"""Clocks, power and temperature of the first GPU while cases are timed; nothing is ever set."""

import contextlib
import statistics
import subprocess
import threading
import time

FIELDS = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "power_w": "power.draw",
    "temperature_c": "temperature.gpu",
}
FACTS = ("driver_version", "clocks.max.sm", "power.limit", "clocks_event_reasons.active")
_PERIOD_MS = 200


def query(fields: tuple[str, ...] = FACTS) -> dict[str, str]:
    """Return facts by nvidia-smi; empty where it is absent or does not answer."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, answer.stdout.splitlines()[0].split(", "), strict=False))


class Clocks:
    """Readings in the background, by one `nvidia-smi` for the whole process; none without it.

    That ends with this process, whose pipe it then cannot write to.
    """

    def __init__(self) -> None:
        self._readings: list[tuple[float, list[float]]] = []
        fields = ",".join(FIELDS.values())
        command = ["nvidia-smi", "--id=0", f"--query-gpu={fields}", f"--loop-ms={_PERIOD_MS}"]
        command += ["--format=csv,noheader,nounits"]
        try:
            self._process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        except OSError:
            return
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            with contextlib.suppress(ValueError):  # "[N/A]": a field that this GPU does not have
                self._readings.append((time.monotonic(), [float(x) for x in line.split(",")]))

    def during(self, spans: list[tuple[float, float]]) -> dict[str, list[float]]:
        """Return least, median and largest of each field within spans of `time.monotonic()`."""
        found = [
            values
            for moment, values in list(self._readings)
            if any(begin <= moment <= end for begin, end in spans)
        ]
        columns = zip(FIELDS, zip(*found, strict=True), strict=False)
        return {
            name: [min(values), statistics.median(values), max(values)] for name, values in columns
        }

"""Make `.venv` in the repository and install the project there, with the standard library alone.

    python3 scripts/bootstrap.py quickstart    # what scripts/quickstart.sh needs
    python3 scripts/bootstrap.py test          # what scripts/test.sh needs

Versions come from scripts/constraints.txt. A second start sees by a stamp that all is done. uv does
the work where it is found, pip otherwise; pip's own settings (PIP_... variables, pip.conf) hold for
both. Nothing is installed outside `.venv`. For Linux and macOS. Environment variables:

    HF_STABLE_TORCH_INDEX    package index to take torch from, e.g. one of builds for a GPU's driver
    HF_STABLE_UV             0: do not use uv
"""

from __future__ import annotations  # the file must be readable by the Pythons that it refuses

import ast
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
CONSTRAINTS = ROOT / "scripts" / "constraints.txt"
LOG = VENV / "hf_stable-install.log"
HOME_FILE = VENV / ".hf_stable-home"  # where .venv was made: scripts in it hold that path
EXTRAS = ("quickstart", "test")
OLDEST = (3, 11)
LOG_LINES = 15
# A CUDA build of torch brings the one Triton that it works with; the tests' interpreter needs any.
TRITON = "triton==3.6.0"

# pip's option -> (uv's variable for the same, what uv puts between several values).
UV_VARIABLES = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "cert": ("SSL_CERT_FILE", " "),
}


class InstallError(Exception):
    """A message for the user: what failed and what to do."""


def check_python(version: tuple[int, ...], executable: str) -> None:
    """Raise InstallError for a Python that is too old."""
    if version[:2] < OLDEST:
        found = ".".join(map(str, version[:3]))
        wanted = ".".join(map(str, OLDEST))
        raise InstallError(
            f"hf_stable needs Python {wanted} or newer, found {found} ({executable}): install one, "
            "or name one that you have: PYTHON=/path/to/python3 and then the same command."
        )


def chosen_extra(arguments: list[str]) -> str:
    """The one argument, or InstallError."""
    if len(arguments) != 1 or arguments[0] not in EXTRAS:
        found = " ".join(arguments) or "nothing"
        raise InstallError(f"bootstrap.py takes one argument, {' or '.join(EXTRAS)}; got {found}.")
    return arguments[0]


def stamp(pyproject: bytes, constraints: bytes, python_version: str) -> str:
    """SHA-256 of everything that decides what is installed."""
    parts = (pyproject, constraints, python_version.encode())
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def pip_settings(environment: dict[str, str], listing: str) -> dict[str, str]:
    """pip's settings that say where packages come from.

    Args:
        environment: variables; PIP_INDEX_URL and its kin win, as they do for pip.
        listing: what `pip config list` prints: lines `global.index-url='...'`.
    """
    found = {}
    for section in ("global.", "install."):  # pip's order: the later one wins
        for line in listing.splitlines():
            name, _, value = line.partition("=")
            if name.startswith(section) and name[len(section) :] in UV_VARIABLES:
                found[name[len(section) :]] = str(ast.literal_eval(value))
    for name in UV_VARIABLES:
        value = environment.get("PIP_" + name.upper().replace("-", "_"), "")
        if value.strip():
            found[name] = value
    return found


def uv_environment(settings: dict[str, str], environment: dict[str, str]) -> dict[str, str]:
    """The variables that make uv look where pip would look; variables of uv's own win."""
    translated = {}
    for name, value in settings.items():
        variable, separator = UV_VARIABLES[name]
        translated[variable] = separator.join(value.split())
    if "extra-index-url" in settings:
        # uv stops at the first index that has a package, pip takes the best version of all.
        translated["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    return {**translated, **environment}


def phases(install: list[str], extra: str, torch_index: str, *, uv: bool) -> list[tuple]:
    """What is installed, in order: (title, command).

    torch goes first and alone, so that a build in the user's own package source is taken and one
    that is there already stays. Triton is left out where torch has brought its own.
    """
    constrained = [*install, "-c", str(CONSTRAINTS)]
    torch_only = ["--no-deps", "--default-index" if uv else "--index-url", torch_index, "torch"]
    chosen = [("torch from HF_STABLE_TORCH_INDEX", [*constrained, *torch_only])]
    # setuptools builds the project, in .venv itself: an isolated build would not be constrained.
    # By path, not by setuptools' finder: next to a checkout named hf_stable, the finder loses
    # against that folder, which Python takes for a namespace package.
    project = [
        "--no-build-isolation",
        "--config-settings",
        "editable_mode=compat",
        "-e",
        f"{ROOT}[{extra}]",
    ]
    return [
        *(chosen if torch_index else []),
        ("torch and what it needs, the longest part", [*constrained, "torch", "setuptools"]),
        *([("Triton for the kernels' tests", [*constrained, TRITON])] if extra == "test" else []),
        (f"hf_stable[{extra}] and what it needs", [*constrained, *project]),
    ]


def venv_version() -> str | None:
    """Version of the Python in `.venv`; None when there is none that can be used."""
    if HOME_FILE.is_file() and HOME_FILE.read_text(encoding="utf-8") != str(ROOT):
        return None  # moved or copied here: its scripts call the Python of the old place
    program = "import sys; print('%d.%d.%d' % sys.version_info[:3])"
    try:
        answer = subprocess.run(
            [str(PYTHON), "-c", program], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    version = answer.stdout.strip()
    return version if tuple(map(int, version.split("."))) >= OLDEST else None


def say(text: str, end: str = "\n") -> None:
    """Print at once, also where the output is a file or a pipe."""
    print(text, end=end, flush=True)


def show(title: str, start: float, *, done: bool) -> None:
    """The line of a phase: on a terminal rewritten with its seconds, elsewhere written once."""
    if sys.stdout.isatty():
        say(f"\r{title} ... {time.monotonic() - start:.0f} s", end="\n" if done else "")
    elif done:
        say(f" {time.monotonic() - start:.0f} s")


def run_phase(title: str, command: list[str], environment: dict[str, str]) -> None:
    """Run a command with its output in the log, and say how long it takes.

    Raises:
        InstallError: it fails; the message has the last lines of its output.
    """
    start = time.monotonic()
    say(f"{title} ...", end="")
    with LOG.open("a", encoding="utf-8") as log:
        log.write(f"\n{title}\n{' '.join(command)}\n")
        log.flush()
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT
        )
        try:
            while True:
                try:
                    process.wait(timeout=1)
                    break
                except subprocess.TimeoutExpired:
                    show(title, start, done=False)
        finally:
            process.kill()  # does nothing when it has ended; an interrupted install must not go on
            process.wait()
    show(title, start, done=True)
    if process.returncode != 0:
        lines = LOG.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
        raise InstallError(
            f"this step failed with exit code {process.returncode}: {title}\n"
            + "".join(f"  | {line}\n" for line in lines)
            + f"All of its output: {LOG.relative_to(ROOT)}. Mend what the lines say (network, "
            "disk, package index) and start the same command again: what is installed stays. "
            "To start afresh: rm -r .venv"
        )


def start_environment() -> None:
    """A new `.venv` without pip: that needs no ensurepip, which distributions like to split off."""
    if VENV.exists():
        say(".venv has no usable Python, or was made in another place: making it anew")
    title = f"environment .venv with Python {sys.version.split()[0]} ({sys.executable})"
    command = [sys.executable, "-m", "venv", "--without-pip", "--clear", str(VENV)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise InstallError(f"cannot make {title}:\n{answer.stdout}{answer.stderr}")
    HOME_FILE.write_text(str(ROOT), encoding="utf-8")
    say(title)


def starts(command: list[str]) -> bool:
    """Whether a program is there and works; a shim may be there and not work."""
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def imports(module: str) -> bool:
    """Whether `.venv` has a module."""
    return starts([str(PYTHON), "-c", f"import {module}"])


def ensure_pip(environment: dict[str, str]) -> None:
    """pip in `.venv`: there already, from ensurepip, or installed by the pip outside.

    Raises:
        InstallError: there is neither ensurepip nor a pip outside.
    """
    inside = [str(PYTHON), "-m"]
    if starts([*inside, "pip", "--version"]):
        return
    if starts([*inside, "ensurepip", "--version"]):
        return run_phase("pip", [*inside, "ensurepip", "--default-pip"], environment)
    outside = [sys.executable, "-m", "pip"]
    if not starts([*outside, "--version"]):
        raise InstallError(
            f"{sys.executable} has neither ensurepip nor pip: install the distribution's package "
            "python3-venv or python3-pip (or uv), then start the same command again."
        )
    run_phase("pip", [*outside, "--python", str(PYTHON), "install", "pip"], environment)


def install_everything(extra: str) -> None:
    """Install torch, the project and the extra into `.venv` by uv or pip."""
    # No question could be answered, since the output goes to the log; and .venv is no user site.
    quiet = {"PIP_NO_INPUT": "1", "PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    environment = {**os.environ, **quiet}
    uv = shutil.which("uv") if os.environ.get("HF_STABLE_UV") != "0" else None
    if uv and starts([uv, "--version"]):
        listing = subprocess.run(
            [sys.executable, "-m", "pip", "config", "list"],
            capture_output=True,
            text=True,
            check=False,
        )
        environment = uv_environment(pip_settings(environment, listing.stdout), environment)
        install = [uv, "pip", "install", "--python", str(PYTHON)]
    else:
        uv = None
        ensure_pip(environment)
        install = [str(PYTHON), "-m", "pip", "install"]
    torch_index = os.environ.get("HF_STABLE_TORCH_INDEX", "")
    say(f"installing with {'uv' if uv else 'pip'} under scripts/constraints.txt")
    for title, command in phases(install, extra, torch_index, uv=uv is not None):
        if TRITON in command and (sys.platform != "linux" or imports("triton")):
            continue
        run_phase(title, command, environment)


def bootstrap(extra: str) -> None:
    """Bring `.venv` up to date for an extra; the stamp is written last."""
    pyproject, constraints = (ROOT / "pyproject.toml").read_bytes(), CONSTRAINTS.read_bytes()
    stamp_file = VENV / f".hf_stable-{extra}"
    version = venv_version()
    wanted = stamp(pyproject, constraints, version or "")
    if stamp_file.is_file() and stamp_file.read_text(encoding="utf-8") == wanted:
        return say(".venv is up to date")
    start = time.monotonic()
    if version is None:
        start_environment()
    stamp_file.unlink(missing_ok=True)
    install_everything(extra)
    stamp_file.write_text(stamp(pyproject, constraints, str(venv_version())), encoding="utf-8")
    say(f".venv is ready after {time.monotonic() - start:.0f} s")


def main(arguments: list[str]) -> int:
    """Exit code: 0 done, 1 the installation failed, 130 interrupted."""
    try:
        check_python(tuple(sys.version_info[:3]), sys.executable)
        extra = chosen_extra(arguments)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the installer too
        lock = os.open(ROOT, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two started at once the second waits; freed at exit
        bootstrap(extra)
    except InstallError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Carry packages to a GPU without network, as wheels.

    python scripts/wheels.py check study [FOLDER]       # which packages are missing here
    python scripts/wheels.py download study FOLDER      # on a machine with network
    python scripts/wheels.py install FOLDER SITE        # without network; SITE goes on PYTHONPATH

`scripts/gpu_wheels.txt` lists what scripts/gpu_first.sh (`first`), scripts/study_gpu.sh (`study`)
and the sample text (`text`) need. Standard library and pip only.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
# pip takes wheels of exactly these platforms.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 26, 27, 28, 31, 34, 35)]
PLATFORMS.append("manylinux2014_x86_64")


def normalized(name: str) -> str:
    """Return a distribution's name as indexes and wheels compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def needed(section: str) -> dict[str, str]:
    """Return the packages of a section of the list, with their versions."""
    text = (HERE / "gpu_wheels.txt").read_text(encoding="utf-8")
    names = re.search(rf"^\[{section}\].*\n((?:\S.*\n)*)", text, re.M)
    pins = re.findall(r"^([\w.-]+)==(\S+)", (HERE / "constraints.txt").read_text("utf-8"), re.M)
    versions = {normalized(name): version for name, version in pins}
    return {name: versions[name] for name in (names[1] if names else "").split()}


def missing(packages: Iterable[str], folder: Path | None) -> list[str]:
    """Return the packages that are neither installed here nor a wheel in the folder."""
    wheels = folder.glob("*.whl") if folder is not None else ()
    carried = {normalized(wheel.name.split("-")[0]) for wheel in wheels}
    installed = {normalized(each.name) for each in metadata.distributions()}
    return [name for name in packages if name not in carried | installed]


def check(section: str, folder: Path | None) -> int:
    """Print what is missing; return 1 when something is."""
    lacking = missing(needed(section), folder)
    if not lacking:
        return 0
    place = f" or in {folder}" if folder is not None else ""
    print(
        f"error: {len(lacking)} packages are not installed{place}. Where there is network, run\n"
        f"  python scripts/wheels.py download {section} FOLDER --only {' '.join(lacking)}\n"
        "then bring FOLDER here and set WHEELS=FOLDER.",
        file=sys.stderr,
    )
    return 1


def download(section: str, folder: Path, python: str, only: list[str]) -> int:
    """Fetch wheels of a section, or of some of its packages, for another machine's Python."""
    found = needed(section)
    unknown = [name for name in only if normalized(name) not in found]
    if unknown:
        print(f"error: not in section {section}: {', '.join(unknown)}", file=sys.stderr)
        return 2
    names = [normalized(name) for name in only] or list(found)
    platforms = [f"--platform={each}" for each in PLATFORMS]
    options = ["--no-deps", "--only-binary=:all:", f"--python-version={python}"]
    command = [sys.executable, "-m", "pip", "download", *options, "--implementation=cp", *platforms]
    pinned = [f"{name}=={found[name]}" for name in names]
    return subprocess.run([*command, "--dest", str(folder), *pinned], check=False).returncode


def install(folder: Path, site: Path) -> int:
    """Unpack the wheels of packages that are not installed, so that PYTHONPATH finds them."""
    wheels = {normalized(wheel.name.split("-")[0]): str(wheel) for wheel in folder.glob("*.whl")}
    if not wheels:
        print(f"error: {folder} holds no wheels (*.whl)", file=sys.stderr)
        return 2
    files = [wheels[name] for name in missing(wheels, None)]
    if not files:
        return 0
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--upgrade"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(site), *files]
    return subprocess.run(command, check=False).returncode


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    actions = options.add_subparsers(dest="action", required=True)
    for name in ("check", "download"):
        action = actions.add_parser(name)
        action.add_argument("section", choices=("first", "study", "text"))
        folder = {"check": "?", "download": None}[name]
        action.add_argument("folder", type=Path, nargs=folder)
    action.add_argument("--python", default="3.12", help="of the GPU's machine (%(default)s)")
    action.add_argument("--only", nargs="+", default=[], help="these packages of the section")
    unpack = actions.add_parser("install")
    unpack.add_argument("folder", type=Path)
    unpack.add_argument("site", type=Path)
    given = options.parse_args()
    if given.action == "check":
        return check(given.section, given.folder)
    if given.action == "download":
        return download(given.section, given.folder, given.python, given.only)
    return install(given.folder, given.site)


if __name__ == "__main__":
    raise SystemExit(main())

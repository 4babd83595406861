"""A Python environment with torch, Triton, Transformers and pytest alone, as a lent GPU has it.

    python -m tests.bare FOLDER     # makes it and prints its interpreter

Packages are links to those of this environment, so that it takes no network, no time and no space.
What Transformers needs is there, except what only its command line imports.
"""

import re
import sys
import venv
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

NAMES = ("torch", "triton", "transformers", "numpy", "safetensors", "pytest")
WITHOUT = ("rich", "typer", "pydantic", "pydantic-core")


def closure(names: Iterable[str], without: tuple[str, ...]) -> dict[str, metadata.Distribution]:
    """Return distributions by name, with all that they require and that is installed.

    Names are requirements without versions: `fsspec[http]` includes what that extra needs.
    """
    found: dict[str, metadata.Distribution] = {}
    seen: set[str] = set()
    waiting = list(names)
    while waiting:
        asked = Requirement(waiting.pop())
        name = re.sub(r"[-_.]+", "-", asked.name).lower()
        if str(asked) in seen or name in without:
            continue
        seen.add(str(asked))
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        for need in map(Requirement, found[name].requires or ()):
            extras = ("", *asked.extras)
            if not need.marker or any(need.marker.evaluate({"extra": each}) for each in extras):
                waiting.append(
                    f"{need.name}[{','.join(need.extras)}]" if need.extras else need.name
                )
    return found


def make(folder: Path) -> Path:
    """Make the environment in a folder; return its interpreter."""
    venv.create(folder, with_pip=False, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    for distribution in closure(NAMES, WITHOUT).values():
        tops = {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}
        for top in tops:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))).resolve())
    return folder / "bin" / "python"


if __name__ == "__main__":
    print(make(Path(sys.argv[1])))

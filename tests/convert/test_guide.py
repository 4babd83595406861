"""The guide on conversion names every family and every recipe of a warm start."""

import re
from pathlib import Path

from hf_stable.convert import FAMILIES

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "docs" / "guides" / "convert-and-warm-start.md").read_text(encoding="utf-8")
CONVERT, WARM = re.findall(r"```bash\n(.*?)```", SECTION, re.S)


def test_every_recipe_of_a_warm_start_is_named() -> None:
    also = re.search(r"# also (.*)", WARM)
    assert also is not None
    names = {path.stem for path in (ROOT / "recipes" / "warm_start").glob("*.yaml")}
    assert names == {"qk_norm", *also[1].split(", ")}


def test_every_family_has_its_row() -> None:
    rows = " ".join(line.split("|")[1] for line in SECTION.splitlines() if line.startswith("| "))
    told = {"".join(name.split()).lower() for name in re.split(r", |  +", rows)}
    assert {kind.replace("_", "") for kind in FAMILIES} == {
        name.replace("-", "") for name in told
    } - {"family", "pythia", ""}

"""What the README's section tells to type works, from the first line to the last."""

import re
from pathlib import Path

from hf_stable.convert import FAMILIES

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "README.md").read_text().split("## From other checkpoints")[1].split("\n## ")[0]
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

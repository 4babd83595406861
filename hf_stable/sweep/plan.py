"""Plans of studies: turn a YAML file into recipes with stable ids, without side effects."""

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from hf_stable.errors import RecipeError, UserError
from hf_stable.recipes import Recipe, load_recipe, shipped, strict_yaml
from hf_stable.recipes.schema import Count, PathText, Whole
from hf_stable.records import last_change, write_json

from . import paper
from .rule import Thresholds

_STRICT = ConfigDict(
    extra="forbid", allow_inf_nan=False, strict=True, use_attribute_docstrings=True
)
Rates = Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]


@dataclass(frozen=True, config=_STRICT)
class ScaledRates:
    """Learning rates of another width, scaled to this width by 1 / width.

    An Adam step of size eta moves the spectral norm of a d x d matrix by up to eta * d, so the rate
    at which training breaks scales with 1 / d.
    """

    reference_width: Annotated[Whole, Field(gt=0)]
    """Width of the model for which the rates are given."""
    values: Rates
    """Learning rates at the reference width."""


@dataclass(frozen=True, config=_STRICT)
class Plan:
    """A study: base recipes and the settings that vary."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$")]
    """Name of the study."""
    base: Annotated[list[PathText], Field(min_length=1)]
    """Recipes that all runs share: shipped names, or paths relative to the plan. Later ones win."""
    methods: Annotated[list[PathText], Field(min_length=1)]
    """Recipes of the methods, as names or paths like `base`; the file name names the method."""
    learning_rates: Rates | ScaledRates
    """Peak learning rates, or rates of another width that are scaled to this one."""
    seeds: Annotated[list[Count], Field(min_length=1)]
    """Seeds of weights and data order."""
    variants: dict[str, list[str]] = Field(default_factory=lambda: {"": []})
    """Further settings (key=value) by variant name; each variant runs with every combination."""
    settings: list[str] = Field(default_factory=list)
    """Settings (key=value) for all runs."""
    output: PathText = ""
    """Folder of the study; by default `runs/sweeps/<name>`."""
    keep_models: bool = False
    """Keep trained weights; the report does not need them."""
    perplexity_documents: Annotated[Whole, Field(ge=0)] = 0
    """Number of validation documents to score every finished model on, for paired comparisons."""
    thresholds: dict[str, str | float | int] = Field(default_factory=dict)
    """Thresholds of the divergence rule (see `rule.Thresholds`) that differ from its defaults."""
    reproduces: list[Literal["table_3", "table_4"]] = Field(default_factory=list)
    """Tables of Rybakov et al. 2024 that the study reproduces: its report answers their claims."""

    @model_validator(mode="after")
    def _no_twins(self) -> "Plan":
        rates = self.learning_rates
        values = rates.values if isinstance(rates, ScaledRates) else rates
        names = [Path(method).stem for method in self.methods]
        lists = {"methods": names, "seeds": self.seeds, "learning_rates": values}
        for what, members in lists.items():
            twins = [member for member in members if members.count(member) > 1]
            if twins:
                raise ValueError(f"{what} has {twins[0]!r} twice; name each once")
        return self

    @property
    def folder(self) -> Path:
        """Folder of the study."""
        return Path(self.output or f"runs/sweeps/{self.name}")

    @property
    def rule(self) -> Thresholds:
        """Thresholds of the divergence rule."""
        return Thresholds.from_dict(self.thresholds)


@dataclasses.dataclass(frozen=True)
class Planned:
    """One run of a study."""

    id: str
    method: str
    variant: str
    learning_rate: float
    seed: int
    recipe: Recipe


_ADAPTER = TypeAdapter(Plan)


def load_plan(path: Path, settings: list[str] | None = None, output: str | None = None) -> Plan:
    """Read a plan.

    Args:
        path: Path of a file, or the name of a shipped plan such as `sweeps/smoke`.
        settings: `key=value` for every run, applied after those of the plan.
        output: Folder of the study, instead of the plan's.

    Raises:
        RecipeError: If the plan is invalid, with the file, the key and the remedy.
    """
    path = shipped.resolve(path)
    content = strict_yaml.load(path)
    try:
        plan = _ADAPTER.validate_json(json.dumps(content))
    except ValidationError as error:
        problems = [_describe(path, each) for each in error.errors(include_url=False)]
        raise RecipeError("\n".join(problems)) from error
    try:
        Thresholds.from_dict(plan.thresholds)
    except UserError as error:
        raise RecipeError(f"{path}: {error}") from error
    return dataclasses.replace(
        plan,
        base=[_recipe(path, name) for name in plan.base],
        methods=[_recipe(path, name) for name in plan.methods],
        settings=[*plan.settings, *(settings or [])],
        output=output or plan.output,
    )


def _recipe(plan: Path, name: str) -> str:
    """Return the path or the shipped name of a plan's recipe, for `load_recipe`."""
    try:
        return shipped.show(shipped.resolve(name, plan.parent))
    except RecipeError as error:
        raise RecipeError(f"{shipped.show(plan)}: {error}") from error


def write_plan(plan: Plan, runs: list[Planned], thresholds: Thresholds) -> Path:
    """Write `plan.json` for workers and reports, and return the study's folder.

    The commit of the claims is the one at the start of the study.
    """
    file = plan.folder / "plan.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    content = {
        "name": plan.name,
        "methods": [Path(method).stem for method in plan.methods],
        "variants": list(plan.variants),
        "learning_rates": sorted({run.learning_rate for run in runs}),
        "seeds": plan.seeds,
        "thresholds": thresholds.to_dict(),
        "reproduces": plan.reproduces,
        "claims_revision": _claims_revision(plan, before),
        "runs": [run.id for run in runs],
        "plan": _ADAPTER.dump_python(plan, mode="json"),
    }
    write_json(file, content)
    return plan.folder


def _claims_revision(plan: Plan, before: dict[str, Any] | None) -> str | None:
    """Return the commit recorded at the start of the study, or the current one if it starts now."""
    if before is not None:
        return before.get("claims_revision")
    return last_change(Path(paper.__file__)) if plan.reproduces else None


def read_plan(study: Path) -> tuple[Plan, Thresholds]:
    """Read the plan that `write_plan` wrote."""
    content = json.loads((study / "plan.json").read_text(encoding="utf-8"))
    plan = _ADAPTER.validate_json(json.dumps(content["plan"]))
    return plan, Thresholds.from_dict(content["thresholds"])


def planned_runs(plan: Plan) -> list[Planned]:
    """Return all runs, the highest learning rates first, to find early where runs break.

    Raises:
        RecipeError: If a recipe is invalid, with file and key.
    """
    cells = itertools.product(plan.methods, plan.variants.items(), plan.seeds)
    runs = [
        planned
        for method, (variant, settings), seed in cells
        for planned in _runs_of_cell(plan, method, (variant, settings), seed)
    ]
    return sorted(runs, key=lambda run: (-run.learning_rate, run.seed))


def _runs_of_cell(
    plan: Plan, method: str, variant: tuple[str, list[str]], seed: int
) -> list[Planned]:
    name, settings = variant
    word = Path(method).stem
    runs = []
    for rate in _rates(plan, method, settings):
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", name)
        parts = [word, *([slug] if slug else []), f"lr-{rate:g}", f"seed-{seed}"]
        identity = "_".join(parts)
        overrides = [
            *plan.settings,
            *settings,
            "training.log_every=1",  # the rule is applied after every step
            "guard.actions=[]",  # a study must let runs diverge
            f"seed={seed}",
            f"optimizer.learning_rate={rate!r}",
            f"name={word}",
            f"output={json.dumps(str(plan.folder / 'runs' / identity))}",
        ]
        recipe = load_recipe([*plan.base, method], overrides)
        runs.append(Planned(identity, word, name, rate, seed, recipe))
    return runs


def _rates(plan: Plan, method: str, settings: list[str]) -> list[float]:
    rates = plan.learning_rates
    if not isinstance(rates, ScaledRates):
        return rates
    recipe = load_recipe([*plan.base, method], [*plan.settings, *settings])
    width = recipe.model_config().hidden_size
    # Two significant digits, as in a grid of rates and in run ids.
    return [float(f"{rate * rates.reference_width / width:.2g}") for rate in rates.values]


def _describe(path: Path, error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "unexpected_keyword_argument":
        known = ", ".join(field.name for field in dataclasses.fields(Plan))
        return f"{path}: {key} is not a key of a plan; known are {known}"
    if error["type"] in ("missing", "missing_argument"):
        return f"{path}: {key} is missing"
    if error["type"] == "value_error":
        return f"{path}: {error['ctx']['error']}"
    return f"{path}: {key}: found {error['input']!r}; {error['msg'][:1].lower()}{error['msg'][1:]}"

"""Loading of recipes from layers. Every layer keeps its name, so errors name the right file."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from hf_stable.errors import RecipeError
from hf_stable.recipes import schema, shipped, strict_yaml
from hf_stable.recipes.model_fields import model_defaults, presets
from hf_stable.recipes.sections import SECTIONS, Location, section_of
from hf_stable.recipes.suggestions import nearest, nearest_key, nearest_model_key


class Layer(NamedTuple):
    """Part of a recipe, and the file or `--set` option that it comes from."""

    source: str
    content: dict[str, Any]


def load_recipe(
    path: str | Path | Sequence[str | Path],
    overrides: Sequence[str] = (),
    *,
    builds_model: bool = True,
) -> schema.Recipe:
    """Read a recipe.

    Args:
        path: One recipe, or several of which later ones win: paths of files, or names of shipped
            recipes such as `base/10m`. Recipes that a file `extends` (names, or paths relative to
            its folder) are the layers below it. Mappings are merged, other values are replaced.
        overrides: Options `key.path=value` with the value in YAML; they win over the files.
        builds_model: True checks the model section by building its config, which imports torch.
            False checks only the names of its fields.

    Returns:
        The complete recipe.

    Raises:
        RecipeError: If it is invalid; names the file or override, the key, the value found, and the
            remedy.
    """
    paths = [path] if isinstance(path, (str, Path)) else path
    layers = [layer for each in paths for layer in _read(shipped.resolve(each), ())]
    layers += [_parse_override(override) for override in overrides]
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = _merge(merged, layer.content)
    try:
        recipe = schema.ADAPTER.validate_json(json.dumps(merged))
    except ValidationError as error:
        errors = error.errors(include_url=False)
        raise RecipeError("\n".join(_describe(detail, layers) for detail in errors)) from error
    _check_model_fields(recipe, layers)
    if builds_model:
        _check_model(recipe, layers)
    return recipe


def _read(path: Path, chain: tuple[Path, ...]) -> list[Layer]:
    """Read the layers of a file, lowest first: the recipes that it extends, then the file."""
    source = shipped.show(path)
    if path.resolve() in [each.resolve() for each in chain]:
        names = " -> ".join(shipped.show(each) for each in (*chain, path))
        raise RecipeError(f"{source}: extends itself: {names}; remove one extends of this circle")
    content = strict_yaml.load(path)
    extends = content.pop("extends", [])
    parents = [extends] if isinstance(extends, str) else extends
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise RecipeError(f"{source}: extends: found {extends!r}; give a path or a list of paths")
    layers = [
        layer
        for parent in parents
        for layer in _read(_extended(path, parent, source), (*chain, path))
    ]
    return [*layers, Layer(source, content)]


def _extended(path: Path, parent: str, source: str) -> Path:
    try:
        return shipped.resolve(parent, path.parent)
    except RecipeError as error:
        raise RecipeError(f"{source}: extends: {error}") from error


def _parse_override(override: str) -> Layer:
    keys, equals, value = override.partition("=")
    source = f"--set {override}"
    names = keys.strip().split(".")
    if not equals or not all(names):
        raise RecipeError(f"{source}: expected key=value, e.g. --set model.qk_norm=head")
    content = strict_yaml.parse(value, source)
    for name in reversed(names):
        content = {name: content}
    return Layer(source, content)


def _merge(low: Any, high: Any) -> Any:
    if not (isinstance(low, dict) and isinstance(high, dict)):
        return high
    return {**low, **{key: _merge(low.get(key), value) for key, value in high.items()}}


def _check_model_fields(recipe: schema.Recipe, layers: list[Layer]) -> None:
    for key in recipe.model:
        if key not in model_defaults() and key != "preset":
            source = _source_of(("model", key), layers)
            raise RecipeError(
                f"{source}: model.{key} is not a field of the model; {nearest_model_key(key)}"
            )
    preset = recipe.model.get("preset", "baseline")
    if preset not in presets():
        source = _source_of(("model", "preset"), layers)
        raise RecipeError(f"{source}: model.preset: found {preset!r}; {nearest(preset, presets())}")


def _check_model(recipe: schema.Recipe, layers: list[Layer]) -> None:
    """Build the model's config, so that a wrong value is found before any computation."""
    try:
        recipe.model_config()
    except Exception as error:  # Transformers raises errors of many types
        problem = str(error).replace("None", "null")
        named = [key for key in recipe.model if re.search(rf"\b{key}\b", problem)]
        source = _source_of(("model", *named[:1]), layers)
        raise RecipeError(f"{source}: model: {problem}") from error


def _describe(error: ErrorDetails, layers: list[Layer]) -> str:
    location = error["loc"]
    source, key = _source_of(location, layers), ".".join(str(part) for part in location)
    if error["type"] == "unexpected_keyword_argument":
        return f"{source}: {key} is not a recipe key; {nearest_key(location)}"
    if error["type"] in ("missing", "missing_argument"):
        return f"{source}: {key} is missing{_meaning(location)}"
    if error["type"] == "value_error":  # from a validator of the schema, with a complete message
        return f"{source}: {key + ': ' if key else ''}{error.get('ctx', {}).get('error')}"
    problem = error["msg"][:1].lower() + error["msg"][1:]
    return f"{source}: {key}: found {error['input']!r}; {problem}{_meaning(location)}"


def _source_of(location: Location, layers: list[Layer]) -> str:
    """Return the last layer that sets the key, or the nearest key above it."""
    for depth in range(len(location), 0, -1):
        for layer in reversed(layers):
            if _holds(layer.content, location[:depth]):
                return layer.source
    return layers[-1].source


def _holds(content: dict[str, Any], location: Location) -> bool:
    inside: Any = content
    try:
        for part in location:
            inside = inside[part]
    except (KeyError, IndexError, TypeError):
        return False
    return True


def _meaning(location: Location) -> str:
    section, key = SECTIONS.get(section_of(location)), location[-1] if location else None
    if section is None or key not in section.__pydantic_fields__:
        return ""
    return f" ({section.__pydantic_fields__[key].description})"

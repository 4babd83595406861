"""Fields of the model, read from their source file, because importing it takes seconds."""

import ast
import functools
from pathlib import Path
from typing import Any

_SOURCE = Path(__file__).parent.parent / "model" / "configuration_stable_gpt.py"


@functools.cache
def _statements() -> dict[str, ast.AnnAssign]:
    """Return the annotated assignments of the module and of the config class, by name."""
    module = ast.parse(_SOURCE.read_text(encoding="utf-8"))
    [config] = [
        node
        for node in module.body
        if isinstance(node, ast.ClassDef) and node.name == "StableGPTConfig"
    ]
    return {
        node.target.id: node
        for node in [*module.body, *config.body]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def _value(name: str) -> Any:
    node = _statements()[name].value
    assert node is not None  # every field has a default
    return ast.literal_eval(node)


def model_defaults() -> dict[str, Any]:
    """Return the default of each field of StableGPTConfig, in their order."""
    return {name: _value(name) for name in _statements() if name.islower()}


def presets() -> dict[str, dict[str, Any]]:
    """Return the fields that each preset sets."""
    return _value("PRESETS")


def other_names() -> dict[str, str]:
    """Return the fields by the names that other model families use for them."""
    names: dict[str, str] = _value("OTHER_NAMES")
    return {other: field for field, others in names.items() for other in others.split()}

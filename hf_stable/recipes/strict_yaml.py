"""YAML for recipes, without surprises.

The core schema of YAML 1.2, made stricter. `1e-4` is a number. `no`, `on`, `010`, `1:30` and dates
stay strings, which fields of another type refuse. Duplicate keys, aliases, tags, NaN and infinity
are errors.
"""

import math
import re
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import yaml

from hf_stable.errors import RecipeError

MAX_BYTES = 1_000_000  # a recipe is a few kB; a larger file is data given by mistake, or an attack

_RESOLVERS = {
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "tag:yaml.org,2002:int": (r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)", list("-+0123456789")),
    "tag:yaml.org,2002:float": (
        r"[-+]?(([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(inf|Inf|INF))"
        r"|\.(nan|NaN|NAN)",
        list("-+0123456789."),
    ),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            _refuse(
                event.start_mark, f"alias *{event.anchor}; write the value again, or use extends"
            )
        if isinstance(event, yaml.NodeEvent) and _tag_of(event) is not None:
            _refuse(
                event.start_mark,
                f"tag {_tag_of(event)!r}; remove it, recipes hold plain values only",
            )
        return super().compose_node(parent, index)


def _tag_of(event: yaml.NodeEvent) -> str | None:
    if isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent)):
        return event.tag
    return None


def _refuse(mark: Any, problem: str) -> NoReturn:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _construct_int(_: _Loader, node: yaml.ScalarNode) -> int:
    return int(node.value)


def _construct_float(_: _Loader, node: yaml.ScalarNode) -> float:
    text = node.value.lower()
    value = math.nan if "n" in text else float(text)
    if not math.isfinite(value):
        _refuse(node.start_mark, f"{node.value} is not a finite number")
    return value


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if key_node.tag != "tag:yaml.org,2002:str":
            _refuse(key_node.start_mark, f"key {key_node.value!r} is not text; quote it")
        key = loader.construct_object(key_node)
        if key in mapping:
            _refuse(key_node.start_mark, f"key {key!r} occurs twice; remove one")
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


class _Dumper(yaml.SafeDumper):
    # The resolvers of YAML 1.1 are kept, so that text which another reader takes for a number is
    # quoted.
    yaml_implicit_resolvers: ClassVar = {
        key: list(value) for key, value in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


def _represent_str(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    # In any other style, PyYAML turns some of Unicode's line breaks into spaces.
    style = None if value.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


for _tag, (_pattern, _first) in _RESOLVERS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)
_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)
_Dumper.add_representer(str, _represent_str)


def parse(text: str, source: str) -> Any:
    """Parse one YAML document.

    Args:
        text: The document.
        source: Its origin for messages: a file or a command-line option.

    Raises:
        RecipeError: If it is not YAML, or has content that recipes may not have; names source and
            line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{source}{line}: cannot read YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{source}: cannot read YAML: {error}") from error


def load(path: Path) -> dict[str, Any]:
    """Read a YAML file whose document is a mapping.

    Args:
        path: The file.

    Raises:
        RecipeError: If the file is empty, too large, not UTF-8, not YAML, or not a mapping.
    """
    if path.stat().st_size > MAX_BYTES:
        raise RecipeError(
            f"{path}: {path.stat().st_size:,} bytes; a recipe has at most {MAX_BYTES:,}"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path}: not UTF-8 text (byte {error.start}); is it a recipe?"
        ) from error
    content = parse(text, str(path))
    if content is None:
        raise RecipeError(f"{path}: is empty; `hf-stable recipes list` names files to start from")
    if not isinstance(content, dict):
        raise RecipeError(
            f"{path}: holds a {type(content).__name__}; a recipe is a mapping `key: value`"
        )
    return content


def dump(content: dict[str, Any]) -> str:
    """Write a mapping as YAML that `parse` reads back as an equal mapping, keys in their order."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)

"""YAML header of a card, and offline versions of the Hub's checks on it.

Rules: the Hub's specification (hub-docs, modelcard.md: `license`, `datasets` and `model-index` are
verified), its list of licenses, and the language codes of huggingface_hub's ModelCardData.
"""

import math
import re
from typing import Any

from hf_stable.licenses import LICENSES

_LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")
_DATASET = re.compile(r"(?:[\w-]+/)?[\w.-]+")
_NAMES = {"library_name": "transformers", "pipeline_tag": "text-generation"}


def problems(header: dict[str, Any]) -> list[str]:
    """Return problems for which the Hub would refuse the header, each with key and remedy."""
    found = [
        *_license(header),
        *_strings(header, "tags"),
        *_strings(header, "datasets", _DATASET, "an id on the Hub: name or owner/name"),
        *_strings(header, "language", _LANGUAGE, "an ISO 639 code of two or three letters"),
    ]
    for key, value in _NAMES.items():
        if header.get(key) != value:
            found.append(f"{key} is {header.get(key)!r}: write {value}")
    for place, entry in enumerate(_list(header, "model-index", found)):
        found += _model_index(f"model-index[{place}]", entry)
    return found


def _license(header: dict[str, Any]) -> list[str]:
    if "license" not in header:  # the Hub recommends one, but accepts a card without
        return []
    identity = header["license"]
    if identity not in LICENSES:
        return [f'license is {identity!r}: write one of the Hub\'s identifiers, such as "other"']
    if identity == "other" and not header.get("license_name"):
        return ["license is other: name it in license_name"]
    return []


def _list(header: dict[str, Any], key: str, found: list[str]) -> list[Any]:
    if key not in header:
        return []
    if isinstance(header[key], list) and header[key]:
        return header[key]
    found.append(f"{key} is {header[key]!r}: write a list with something in it, or leave it out")
    return []


def _strings(
    header: dict[str, Any], key: str, form: re.Pattern[str] | None = None, wanted: str = "a word"
) -> list[str]:
    found: list[str] = []
    for value in _list(header, key, found):
        fine = isinstance(value, str) and bool(value.strip())
        if not fine or (form is not None and not form.fullmatch(value)):
            found.append(f"{key} has {value!r}: write {wanted}")
    return found


def _model_index(place: str, entry: Any) -> list[str]:
    """Check one model's results: each needs a task, a dataset, and metrics."""
    if not _named(entry, "name") or not _filled(entry, "results"):
        return [f"{place}: write a name and a list of results"]
    found = []
    for number, result in enumerate(entry["results"]):
        here = f"{place}.results[{number}]"
        if not _named(_part(result, "task"), "type"):
            found.append(f"{here}.task: write its type")
        dataset = _part(result, "dataset")
        if not _named(dataset, "type") or not _DATASET.fullmatch(dataset["type"]):
            found.append(f"{here}.dataset: write as type an id, name or owner/name")
        if not _named(dataset, "name"):
            found.append(f"{here}.dataset: write its name")
        metrics = result["metrics"] if _filled(result, "metrics") else [None]
        for index, metric in enumerate(metrics):
            if not _named(metric, "type") or not _valued(_part(metric, "value")):
                found.append(f"{here}.metrics[{index}]: write a type and a finite value")
    return found


def _part(holder: Any, key: str) -> Any:
    return holder.get(key) if isinstance(holder, dict) else None


def _named(holder: Any, key: str) -> bool:
    value = _part(holder, key)
    return isinstance(value, str) and bool(value.strip())


def _filled(holder: Any, key: str) -> bool:
    value = _part(holder, key)
    return isinstance(value, list) and bool(value)


def _valued(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) or (isinstance(value, str) and bool(value))

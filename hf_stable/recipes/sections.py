"""Sections of a recipe by their location in it."""

from typing import Any

from hf_stable.recipes import schema

Location = tuple[str | int, ...]

SECTIONS: dict[Location, Any] = {
    (): schema.Recipe,
    ("tokenizer",): schema.TokenizerRecipe,
    ("data",): schema.DataRecipe,
    ("data", "train"): schema.SourceRecipe,
    ("data", "validation"): schema.SourceRecipe,
    ("optimizer",): schema.OptimizerRecipe,
    ("schedule",): schema.ScheduleRecipe,
    ("training",): schema.TrainingRecipe,
    ("telemetry",): schema.TelemetryRecipe,
    ("guard",): schema.GuardRecipe,
}


def section_of(location: Location) -> Location:
    """Return the section that a key belongs to, without the index of a source in its list."""
    return tuple(part for part in location[:-1] if isinstance(part, str))

"""Printing of a whole recipe, including the model fields that it leaves at their defaults."""

from hf_stable.recipes import schema, strict_yaml
from hf_stable.recipes.model_fields import model_defaults, presets

# Fields that the tokenizer decides.
_OF_THE_TOKENIZER = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")
_DEFAULTS = "  # other fields of the model, at their values in this run:"


def resolved(recipe: schema.Recipe) -> str:
    """Return the whole recipe as YAML that loads back to an equal recipe.

    The model section is followed by the model's other fields and their values, as comments.
    """
    parts = []
    for key, value in schema.to_dict(recipe).items():
        parts.append(strict_yaml.dump({key: value}))
        if key == "model":
            parts.append(_left_to_the_model(recipe))
    return "".join(parts)


def _left_to_the_model(recipe: schema.Recipe) -> str:
    preset = presets().get(recipe.model.get("preset", "baseline"), {})
    values = {
        **model_defaults(),
        "max_position_embeddings": recipe.data.sequence_length,
        **preset,
    }
    lines = [_DEFAULTS]
    for field, value in values.items():
        if field not in _OF_THE_TOKENIZER and field not in recipe.model:
            origin = "  # by the preset" if field in preset else ""
            lines.append(f"  # {strict_yaml.dump({field: value}).rstrip()}{origin}")
    return "\n".join(lines) + "\n"

"""Mapping of another family's config: each field is mapped, known to change nothing, or refused.

Invariant of this file: no field of the source is ignored, known or not.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Config = Mapping[str, Any]
"""A source config as a dictionary, every default filled in."""


@dataclass(frozen=True)
class Note:
    """A field that changes nothing, with the reason."""

    why: str


Rule = Callable[[str, Config], dict[str, Any] | Note | str]
"""Function of a field's name and the whole config. It returns our fields, a note, or the reason why
the config cannot be converted.
"""


def to(field: str) -> Rule:
    """Map a field to our `field` with the same value."""
    return lambda name, config: {field: config[name]}


def same(*names: str) -> dict[str, Rule]:
    """Map fields to ours of the same name and meaning."""
    return {name: to(name) for name in names}


def neutral(*names: str) -> dict[str, Rule]:
    """Accept fields that change no output."""
    return {name: lambda name, config: {} for name in names}


def noted(*names: str, why: str) -> dict[str, Rule]:
    """Accept fields that no model reads, whatever their value, with a note."""
    return {name: lambda name, config: Note(why) for name in names}


def off(*names: str, values: tuple[Any, ...], why: str) -> dict[str, Rule]:
    """Accept fields that Transformers' class ignores, if they have one of these neutral values.

    None is treated like a missing field.
    """
    known = " or ".join(map(repr, values))
    refused = (
        f"Transformers ignores it, so convert accepts only {known}: remove it from a copy if the "
        "model does not need it"
    )

    def rule(name: str, config: Config) -> Note | str:
        return Note(why) if config[name] in (None, *values) else refused

    return dict.fromkeys(names, rule)


def alias(other: str) -> Rule:
    """Accept another name of a field that is read, if it has the same value."""

    def rule(name: str, config: Config) -> Note | str:
        if config[name] in (None, config[other]):
            return Note(f"another name of {other}, with the same value")
        return f"Transformers reads {other}, which is {config[other]!r}: remove one from a copy"

    return rule


def rope_alias(name: str, config: Config) -> Note | str:
    """Accept a rotary parameter that versions before 5 wrote beside its older name."""
    read = (config["rope_parameters"] or {}).get(name)
    if config[name] in (None, read):
        return Note(f"another name of rope_parameters.{name}, with the same value")
    return f"Transformers reads {read!r} in rope_parameters: remove one from a copy"


def only(*values: Any, why: str) -> Rule:
    """Accept a field at values that change nothing; ours does not support any other."""
    return lambda name, config: {} if config[name] in values else why


def rope(partial: bool) -> Rule:
    """Map rotary parameters, whose format is Transformers'.

    Args:
        partial: True if the family reads `partial_rotary_factor`; other families ignore it.
    """

    def rule(name: str, config: Config) -> dict[str, Any] | str:
        parameters = dict(config[name] or {})
        if not partial and parameters.get("partial_rotary_factor", 1.0) != 1.0:
            return "this family ignores partial_rotary_factor, and ours would not"
        return {"rope_parameters": parameters}

    return rule


def window(name: str, config: Config) -> dict[str, Any] | str:
    """Accept a sliding window if no layer uses it or no text is longer; ours has none."""
    kinds = config.get("layer_types")
    if kinds is not None and set(kinds) == {"full_attention"}:
        return {}
    reach, longest = config.get("sliding_window"), config["max_position_embeddings"]
    if (kinds is None or set(kinds) <= {"full_attention", "sliding_attention"}) and (
        reach is None or reach >= longest
    ):
        return {}
    return f"attention in windows of {reach} of {longest} tokens: ours sees every token before"


def biases(name: str, config: Config) -> dict[str, Any] | str:
    """Map `attention_bias` and `mlp_bias`; a StableGPT has all of these biases or none."""
    both = config["attention_bias"], config["mlp_bias"]
    if both[0] != both[1]:
        return "biases of one branch alone: ours are of queries, keys and values, or of every map"
    return {"linear_bias": "all" if both[0] else None}


def query_scale(name: str, config: Config) -> dict[str, Any] | str:
    """Map Gemma 2's scale, 1 / sqrt(this) instead of 1 / sqrt(head_dim)."""
    return {"attention_multiplier": (config["head_dim"] / config[name]) ** 0.5}


def padding(name: str, config: Config) -> dict[str, Any] | str:
    """Map a padding id; LLaMA's first checkpoints write -1 for none."""
    value = config[name]
    return {name: None if isinstance(value, int) and value < 0 else value}


# Rules for the fields of every Transformers config.
EVERYWHERE: dict[str, Rule] = {
    **neutral(
        *("architectures", "dtype", "model_type", "transformers_version", "_name_or_path"),
        *("output_attentions", "output_hidden_states", "return_dict", "use_return_dict"),
        *("id2label", "label2id", "num_labels", "problem_type"),
    ),
    "chunk_size_feed_forward": only(0, why="the MLP is computed in pieces"),
    **dict.fromkeys(
        ("attention_probs_dropout_prob", "hidden_dropout_prob"),
        only(0, why="Transformers ignores this dropout: remove it from a copy"),
    ),
    "is_encoder_decoder": only(False, why="ours has no encoder"),
    "auto_map": only(
        None,
        why="the checkpoint brings code that may not compute the same as Transformers' class of"
        " this type: remove auto_map from a copy if it does",
    ),
    "quantization_config": only(None, why="the weights are quantized: convert the original"),
    **same(
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "max_position_embeddings", "initializer_range", "use_cache"),
        *("bos_token_id", "eos_token_id", "tie_word_embeddings", "attention_dropout"),
    ),
    "pad_token_id": padding,
}


@dataclass
class Mapped:
    """Fields of a source, by the result of their rules.

    Args:
        fields: Fields of our config.
        notes: Fields that change nothing: their values, and the reasons.
        reasons: One line for every field that prevents the conversion.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)


def map_fields(rules: Mapping[str, Rule], config: Config) -> Mapped:
    """Map every field of the source by its rule; a value without a rule prevents conversion."""
    mapped = Mapped()
    for name, value in config.items():
        if name in rules:
            answer = rules[name](name, config)
        elif value is None or name.startswith("_"):  # private to Transformers
            continue
        else:
            answer = "unknown to convert: remove it from config.json if the model does not read it"
        if isinstance(answer, str):
            mapped.reasons.append(f"{name}={value!r}: {answer}")
        elif isinstance(answer, Note):
            mapped.notes[name] = {"value": value, "why": answer.why}
        else:
            mapped.fields.update(answer)
    return mapped

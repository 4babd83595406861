"""From another family's config to ours: each field is mapped, known to change nothing, or refused.

Law of this file: no field of the source is passed over, known or not.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Config = Mapping[str, Any]
"""A source config as a dictionary, every default filled in."""


@dataclass(frozen=True)
class Note:
    """A field that changes nothing, and why."""

    why: str


Rule = Callable[[str, Config], dict[str, Any] | Note | str]
"""Told the name of a field and the whole config: our fields, a note, or why it cannot be converted.
"""


def to(field: str) -> Rule:
    """Our field of another name, or of the same one, with the same value."""
    return lambda name, config: {field: config[name]}


def same(*names: str) -> dict[str, Rule]:
    """Fields that ours has by the same name and meaning."""
    return {name: to(name) for name in names}


def neutral(*names: str) -> dict[str, Rule]:
    """Fields that change no output."""
    return {name: lambda name, config: {} for name in names}


def noted(*names: str, why: str) -> dict[str, Rule]:
    """Fields that no model reads, whatever their value."""
    return {name: lambda name, config: Note(why) for name in names}


def off(*names: str, values: tuple[Any, ...], why: str) -> dict[str, Rule]:
    """Fields that Transformers' class does not read, and that mean nothing at one of these values.

    None is the same as no field.
    """
    known = " or ".join(map(repr, values))
    refused = (
        f"Transformers passes over it, so convert takes only {known}: remove it from a copy if its "
        "model computes nothing else"
    )

    def rule(name: str, config: Config) -> Note | str:
        return Note(why) if config[name] in (None, *values) else refused

    return dict.fromkeys(names, rule)


def alias(other: str) -> Rule:
    """Another name of a field that is read, with the same value."""

    def rule(name: str, config: Config) -> Note | str:
        if config[name] in (None, config[other]):
            return Note(f"another name of {other}, with the same value")
        return f"Transformers reads {other}, which is {config[other]!r}: remove one from a copy"

    return rule


def rope_alias(name: str, config: Config) -> Note | str:
    """A rotary parameter that versions before 5 wrote beside its older name."""
    read = (config["rope_parameters"] or {}).get(name)
    if config[name] in (None, read):
        return Note(f"another name of rope_parameters.{name}, with the same value")
    return f"Transformers reads {read!r} in rope_parameters: remove one from a copy"


def only(*values: Any, why: str) -> Rule:
    """A field that changes nothing at one of these values, and that ours cannot do at another."""
    return lambda name, config: {} if config[name] in values else why


def rope(partial: bool) -> Rule:
    """Transformers' own form, which ours takes.

    Args:
        partial: whether the family knows `partial_rotary_factor`; the others pass over it.
    """

    def rule(name: str, config: Config) -> dict[str, Any] | str:
        parameters = dict(config[name] or {})
        if not partial and parameters.get("partial_rotary_factor", 1.0) != 1.0:
            return "this family ignores partial_rotary_factor, and ours would not"
        return {"rope_parameters": parameters}

    return rule


def window(name: str, config: Config) -> dict[str, Any] | str:
    """A sliding window, which ours does not have: fine where no layer uses it, or none is full."""
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
    """`attention_bias` and `mlp_bias`, which ours has all of or none of."""
    both = config["attention_bias"], config["mlp_bias"]
    if both[0] != both[1]:
        return "biases of one branch alone: ours are of queries, keys and values, or of every map"
    return {"linear_bias": "all" if both[0] else None}


def query_scale(name: str, config: Config) -> dict[str, Any] | str:
    """Gemma 2's scale, 1 / sqrt(this) instead of 1 / sqrt(head_dim)."""
    return {"attention_multiplier": (config["head_dim"] / config[name]) ** 0.5}


def padding(name: str, config: Config) -> dict[str, Any] | str:
    """LLaMA's first checkpoints say that they have none by -1."""
    value = config[name]
    return {name: None if isinstance(value, int) and value < 0 else value}


# What every config of Transformers has.
EVERYWHERE: dict[str, Rule] = {
    **neutral(
        *("architectures", "dtype", "model_type", "transformers_version", "_name_or_path"),
        *("output_attentions", "output_hidden_states", "return_dict", "use_return_dict"),
        *("id2label", "label2id", "num_labels", "problem_type"),
    ),
    "chunk_size_feed_forward": only(0, why="the MLP is computed in pieces"),
    **dict.fromkeys(
        ("attention_probs_dropout_prob", "hidden_dropout_prob"),
        only(0, why="Transformers passes over this dropout: remove it from a copy"),
    ),
    "is_encoder_decoder": only(False, why="ours has no encoder"),
    "auto_map": only(
        None,
        why="the checkpoint brings code of its own, which may not compute what Transformers'"
        " class of this type does: remove auto_map from a copy if it does",
    ),
    "quantization_config": only(None, why="the weights are quantised: convert the original"),
    **same(
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "max_position_embeddings", "initializer_range", "use_cache"),
        *("bos_token_id", "eos_token_id", "tie_word_embeddings", "attention_dropout"),
    ),
    "pad_token_id": padding,
}


@dataclass
class Mapped:
    """Fields of a source, by what became of them.

    Args:
        fields: ours.
        notes: of fields that change nothing: their values, and why.
        reasons: a line for every field that stands in the way.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)


def map_fields(rules: Mapping[str, Rule], config: Config) -> Mapped:
    """Map every field of the source by its rule; one that has a value but no rule is a reason."""
    mapped = Mapped()
    for name, value in config.items():
        if name in rules:
            answer = rules[name](name, config)
        elif value is None or name.startswith("_"):  # private to Transformers' own code
            continue
        else:
            answer = "convert knows no such field here: remove it from config.json if it is not one"
        if isinstance(answer, str):
            mapped.reasons.append(f"{name}={value!r}: {answer}")
        elif isinstance(answer, Note):
            mapped.notes[name] = {"value": value, "why": answer.why}
        else:
            mapped.fields.update(answer)
    return mapped

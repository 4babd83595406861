"""The config: every field off by default, nothing ignored, and errors that help."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from transformers import AutoConfig, PreTrainedConfig

from hf_stable import StableGPTConfig
from hf_stable.model.configuration_stable_gpt import PRESETS

from ..techniques import GEOMETRY, TECHNIQUES

HOST_FIELDS = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "hidden_act", "rope_parameters",
    "tie_word_embeddings", "attention_dropout", "classifier_dropout", "use_cache",
    "pad_token_id", "bos_token_id", "eos_token_id",
}  # fmt: skip
OWN_FIELDS = {f.name for f in dataclasses.fields(StableGPTConfig)} - {
    f.name for f in dataclasses.fields(PreTrainedConfig)
}
TECHNIQUE_FIELDS = OWN_FIELDS - HOST_FIELDS


def test_every_field_has_a_row() -> None:
    assert {row.field for row in TECHNIQUES} == TECHNIQUE_FIELDS


@pytest.mark.parametrize("row", TECHNIQUES, ids=lambda row: row.name)
def test_rows_switch_something_on(row) -> None:
    neutral = StableGPTConfig(**GEOMETRY, **row.beside)
    assert getattr(neutral, row.field) != row.on[row.field]


def test_every_preset_has_a_recipe() -> None:
    folder = Path(__file__).parents[2] / "recipes" / "techniques"
    assert {path.stem for path in folder.glob("*.yaml")} == set(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
def test_json_round_trip_is_exact(preset: str, tmp_path: Path) -> None:
    config = StableGPTConfig.from_preset(preset, **GEOMETRY)
    assert StableGPTConfig(**json.loads(config.to_json_string())).to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_json_string() == config.to_json_string()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"qk_nrom": "head"}, ["qk_nrom", "did you mean 'qk_norm'"]),
        ({"attn_softcap": 50.0}, ["attn_softcap"]),
        ({"per_layer_config": {0: {"qk_norm": "head"}}}, ["per_layer_config"]),
        ({"num_attention_heads": 5}, ["hidden_size=32", "num_attention_heads=5", "head_dim"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads=4", "num_key_value_heads=3"]),
        ({"num_attention_heads": 0}, ["num_attention_heads=0", "at least 1"]),
        ({"vocab_size": -1}, ["vocab_size=-1"]),
        ({"head_dim": 7}, ["head_dim=7", "even"]),
        ({"attention_clip_gamma": 0.1}, ["attention_clip_gamma=0.1", "<= 0"]),
        ({"attention_clip_zeta": 0.9}, ["attention_clip_zeta=0.9", ">= 1"]),
        ({"attention_clip_gamma": -0.1, "attention_clip_alpha": 2.0}, ["exclude each other"]),
        ({"attention_clip_gamma": -math.inf}, ["attention_clip_gamma=-inf", "finite"]),
        ({"attention_clip_alpha": -1.0}, ["attention_clip_alpha=-1.0"]),
        ({"attn_logit_softcapping": 0.0}, ["attn_logit_softcapping=0.0", "greater than 0"]),
        ({"attn_logit_softcapping": math.nan}, ["attn_logit_softcapping=nan"]),
        ({"final_logit_softcapping": -30.0}, ["final_logit_softcapping=-30.0"]),
        ({"attention_multiplier": 0.0}, ["attention_multiplier=0.0"]),
        ({"qk_norm": "heads"}, ["qk_norm", "heads", "head"]),
        ({"v_norm": True}, ["v_norm"]),
        ({"layer_scale": math.inf}, ["layer_scale=inf", "finite"]),
        ({"layer_scale": 1e300}, ["layer_scale=1e+300", "float32"]),
        ({"z_loss": 10**39}, ["z_loss=1000", "float32"]),
        ({"mup_base_width": 10**30}, ["mup_base_width=1000", "64 bits"]),
        ({"rope_parameters": {"rope_type": "lama3", "rope_theta": 1e4}}, ["did you mean 'llama3'"]),
        ({"rope_parameters": {"rope_type": ["x"], "rope_theta": 1e4}}, ["rope_type=['x']"]),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
            ["rope_parameters=", "KeyError('factor')"],
        ),
        ({"attention_dropout": 1.0}, ["attention_dropout=1.0", "[0, 1)"]),
        ({"embedding_scale": "sqrt"}, ["embedding_scale='sqrt'", "sqrt_hidden"]),
        ({"embedding_detach": 1.5}, ["embedding_detach=1.5"]),
        ({"z_loss": -1e-4}, ["z_loss=-0.0001"]),
        ({"norm_eps": math.nan}, ["norm_eps=nan"]),
        ({"post_norm_gain": 0.5}, ["post_norm_gain=0.5", "ignored"]),
        ({"sigma_gain_init": "spectral"}, ["sigma_gain_init", "ignored"]),
        ({"initializer": "small", "initializer_range": 0.1}, ["initializer_range=0.1", "ignored"]),
        ({"mup_base_width": 0}, ["mup_base_width=0"]),
        ({"embedding_norm": True, "embedding_scale": 2.0}, ["embedding_scale=2.0", "undone"]),
        ({"pad_token_id": 61}, ["pad_token_id=61"]),
        ({"rope_parameters": {"rope_theta": -1.0}}, ["rope_theta=-1.0"]),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 2.0}}, ["2.0", "even"]),
        ({"hidden_act": "prelu"}, ["hidden_act='prelu'", "without parameters"]),
        ({"hidden_size": "32"}, ["hidden_size='32' must be a whole number."]),
        ({"qk_norm": True}, ["qk_norm=True must be 'head', 'full' or None."]),
        ({"layer_scale": "x"}, ["layer_scale='x' must be a number or None."]),
        ({"rope_parameters": 3}, ["rope_parameters=3 must be a dictionary or None."]),
        ({"eos_token_id": "x"}, ["must be a whole number, a list of whole numbers or None."]),
        ({"use_cache": 1}, ["use_cache=1 must be True or False."]),
        ({"n_layer": 2}, ["'n_layer'", "did you mean 'num_hidden_layers'?"]),
        ({"n_head": 2}, ["did you mean 'num_attention_heads'?"]),
        ({"d_model": 32}, ["did you mean 'hidden_size'?"]),
        ({"hidden_act": "relu_2"}, ["hidden_act='relu_2'", "relu2"]),
    ],
)  # fmt: skip
def test_bad_fields_are_refused_by_name(fields: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        StableGPTConfig(**{**GEOMETRY, **fields})
    for word in words:
        assert word in str(caught.value)


def test_unknown_preset_is_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'qk_norm'"):
        StableGPTConfig.from_preset("qknorm")


def test_misspelt_override_at_load_is_refused(tmp_path: Path) -> None:
    StableGPTConfig(**GEOMETRY).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="did you mean 'qk_norm'"):
        StableGPTConfig.from_pretrained(tmp_path, qk_nrom="head")


def test_legacy_rope_overrides_at_load_are_refused_or_honoured(tmp_path: Path) -> None:
    StableGPTConfig(**GEOMETRY).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"rope_theta=100\.0 would be ignored"):
        AutoConfig.from_pretrained(tmp_path, rope_theta=100.0)
    loaded = AutoConfig.from_pretrained(tmp_path, rope_parameters={"rope_theta": 100.0})
    loaded.check()
    assert loaded.rope_parameters == {"rope_theta": 100.0, "rope_type": "default"}


def test_a_misspelt_attribute_is_refused() -> None:
    config = StableGPTConfig(**GEOMETRY)
    with pytest.raises(ValueError, match="did you mean 'qk_norm'"):
        config.qk_nrom = "head"
    config.note = "anything else is the user's own"


def test_a_clip_that_starts_dead_warns() -> None:
    with pytest.warns(UserWarning, match="attention_clip_alpha"):
        StableGPTConfig(attention_clip_gamma=-0.03, max_position_embeddings=4096)


def test_a_clip_that_starts_alive_does_not_warn(recwarn) -> None:
    StableGPTConfig(attention_clip_gamma=-0.03, max_position_embeddings=256)
    StableGPTConfig(attention_clip_alpha=4.0, max_position_embeddings=4096)
    assert not [warning for warning in recwarn if "attention_clip" in str(warning.message)]


def test_a_callers_numbers_stay_as_they_are() -> None:
    """They may be a recipe's, whose digest counts."""
    rope = {"rope_theta": 500000}
    config = StableGPTConfig(rope_parameters=rope)
    assert repr(rope["rope_theta"]) == "500000"
    assert repr(config.rope_parameters["rope_theta"]) == "500000.0"


def test_whole_numbers_do_for_floats() -> None:
    cap = StableGPTConfig(attn_logit_softcapping=50).attn_logit_softcapping
    assert isinstance(cap, float) and cap == 50  # PyTorch takes no integer beyond 64 bits

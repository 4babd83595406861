"""Laws of recipes: what is read is what was written, and everything else is refused by name."""

import contextlib
import dataclasses
import json
import math
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from hf_stable.data import Source
from hf_stable.errors import RecipeError
from hf_stable.model.configuration_stable_gpt import PRESETS, StableGPTConfig
from hf_stable.recipes import (
    Recipe,
    SourceRecipe,
    dump,
    from_dict,
    load_recipe,
    resolved,
    strict_yaml,
    suggestions,
    to_dict,
)
from hf_stable.recipes.model_fields import model_defaults, other_names, presets
from hf_stable.recipes.sections import SECTIONS
from hf_stable.recipes.suggestions import all_keys

RECIPES = Path(__file__).parent.parent / "recipes"
BASES = sorted(RECIPES.glob("base/*.yaml"))
TINY = RECIPES / "base" / "tiny.yaml"

GOOD = """\
name: good
tokenizer: {vocab_size: 300}
data: {train: [a.txt], sequence_length: 16}
optimizer: {learning_rate: 1e-3}
schedule: {warmup: 2}
training: {steps: 10, global_batch_size: 4, micro_batch_size: 2}
"""


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


# What YAML and option parsers were found to accept in silence, or to read wrongly. Each is
# laid over GOOD; the message must have the second text.
BAD = {
    "unknown key": ("nmae: x", "did you mean name?"),
    "unknown nested key": (
        "optimizer: {lerning_rate: 1.0}",
        "did you mean optimizer.learning_rate?",
    ),
    "key of another section": ("learning_rate: 1.0", "did you mean optimizer.learning_rate?"),
    "text for a number": (
        "optimizer: {learning_rate: fast}",
        "optimizer.learning_rate: found 'fast'",
    ),
    "quoted number": (
        "optimizer: {learning_rate: '1e-3'}",
        "optimizer.learning_rate: found '1e-3'",
    ),
    "fraction for a count": ("training: {steps: 1.5}", "training.steps: found 1.5"),
    "not a number": ("optimizer: {learning_rate: .nan}", ".nan is not a finite number"),
    "overflowing number": ("optimizer: {learning_rate: 1e999}", "1e999 is not a finite number"),
    "negative": ("optimizer: {learning_rate: -1e-3}", "optimizer.learning_rate: found -0.001"),
    "null": ("training: {global_batch_size: null}", "training.global_batch_size: found None"),
    "empty section": ("optimizer:", "optimizer: found None"),
    "duplicate key": ("seed: 1\nseed: 2", "key 'seed' occurs twice"),
    "quoted false": (
        "training: {gradient_checkpointing: 'false'}",
        "gradient_checkpointing: found",
    ),
    "no for false": (
        "training: {gradient_checkpointing: no}",
        "gradient_checkpointing: found 'no'",
    ),
    "octal": ("seed: 010", "seed: found '010'"),
    "sexagesimal": ("seed: 1:30", "seed: found '1:30'"),
    "number for a name": ("name: 17", "name: found 17"),
    "path for a name": ("name: ../x", "name: found '../x'"),
    "unknown choice": ("schedule: {name: cosin}", "schedule.name: found 'cosin'"),
    "python object": ("name: !!python/name:os.system", "tag"),
    "alias": ("name: &a x\noutput: *a", "alias *a"),
    "merge key": ("<<: {name: x}", "<< is not a recipe key"),
    "key that is no text": ("1: x", "key '1' is not text"),
    "list": ("- name: x", "holds a list"),
    "empty": ("# nothing", "is empty"),
    "not YAML": ("name: [x", "cannot read YAML"),
    "deep nesting": ("name: " + "[" * 5000, "cannot read YAML"),
    "huge integer": ("seed: " + "9" * 5000, "cannot read YAML"),
    "seed beyond 64 bits": (f"seed: {2**63}", "less than or equal to 9223372036854775807"),
    "steps and tokens": ("training: {tokens: 9000}", "give exactly one"),
    "neither steps nor tokens": ("training: {steps: null}", "give exactly one"),
    "batches that do not divide": ("training: {micro_batch_size: 3}", "not a multiple"),
    "less than one step": ("training: {steps: null, tokens: 5}", "less than one step"),
    "field without effect": ("schedule: {decay_fraction: 0.5}", "has no effect on cosine"),
    "vocabulary below bytes": ("tokenizer: {vocab_size: 100}", "at least 258"),
    "second vocabulary": ("model: {vocab_size: 300}", "tokenizer.vocab_size"),
    "beyond positions": ("model: {max_position_embeddings: 8}", "model.max_position_embeddings 8"),
    "unknown model field": ("model: {qk_nrom: head}", "did you mean qk_norm?"),
    "wrong model value": ("model: {qk_norm: haed}", "qk_norm"),
    "impossible model": ("model: {head_dim: 63}", "head_dim=63"),
    "unknown preset": ("model: {preset: qknorm}", "qk_norm"),
    "unknown source key": ("data: {train: [{path: a, colum: x}]}", "data.train.colum"),
    "no text": ("data: {train: []}", "data.train: found []"),
    "weight of some": ("data: {train: [{path: a, weight: 1.0}, b]}", "give one to ['b'] too"),
    "weight of nothing": ("data: {train: [{path: a, weight: 0.0}]}", "data.train.0.weight"),
    "weight without effect": (
        "data: {validation: [{path: a, weight: 1.0}]}",
        "weight 1.0 of a has no effect",
    ),
    "licence that nobody knows": (
        "data: {train: [{path: a, license: apche-2.0}]}",
        "license 'apche-2.0' of a is neither an SPDX expression",
    ),
    "extends that is no path": ("extends: 3", "extends: found 3"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_with_its_name_and_the_reason(case: str, tmp_path: Path) -> None:
    text, reason = BAD[case]
    good, bad = write(tmp_path, "good.yaml", GOOD), write(tmp_path, "bad.yaml", text)
    with pytest.raises(RecipeError) as caught:
        load_recipe([good, bad])
    assert reason.replace("data.train.colum", "data.train.0.colum") in str(caught.value)
    assert str(bad) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"#" * 2_000_000, "2,000,000 bytes"),
        (b"a: \0", "cannot read"),
    ],
)
def test_what_is_no_text_of_recipe_size_is_refused(
    content: bytes, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    assert reason in refusal(path)
    assert str(path) in refusal(path)


def test_missing_files_and_keys_are_refused(tmp_path: Path) -> None:
    assert "there is no such file" in refusal(tmp_path / "none.yaml")
    assert "data is missing" in refusal(write(tmp_path, "a.yaml", "name: a"))
    lonely = write(tmp_path, "b.yaml", "extends: none.yaml")
    assert f"extends: {tmp_path / 'none.yaml'}: there is no such file" in refusal(lonely)


def test_every_key_refuses_another_type_by_name() -> None:
    keys = [key for key in all_keys() if key.count(".") == 1]
    assert len(keys) > 40
    for key in (*keys, "name", "seed", "output"):
        assert f"{key}: found {{'no': 'thing'}}" in refusal(TINY, f"{key}={{no: thing}}")


@pytest.mark.parametrize("override", ["", "seed", "=3", "a..b=1", ".a=1"])
def test_an_override_without_key_or_value_is_refused(override: str) -> None:
    assert "expected key=value" in refusal(TINY, override)


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("optimizer.lr=1", "optimizer.learning_rate"),
        ("lr=1", "optimizer.learning_rate"),
        ("optimizer.betas=[1]", "optimizer.beta1"),
        ("training.max_steps=1", "training.steps"),
        ("training.warmup_steps=1", "schedule.warmup"),
        ("training.n_layer=1", "model.num_hidden_layers"),
        ("hidden_size=1", "model.hidden_size"),
        ("data.block_size=1", "data.sequence_length"),
        ("model.n_layer=1", "num_hidden_layers"),
        ("model.n_head=1", "num_attention_heads"),
        ("model.d_model=1", "hidden_size"),
        ("model.n_embd=1", "hidden_size"),
        ("model.n_vocab=1", "tokenizer.vocab_size"),
        ("model.learning_rate=1", "optimizer.learning_rate"),
    ],
)
def test_names_of_other_frameworks_are_understood(override: str, meant: str) -> None:
    assert f"did you mean {meant}?" in refusal(TINY, override)


def test_other_names_mean_keys_that_exist() -> None:
    known = {*all_keys(), *(f"model.{field}" for field in model_defaults())}
    others = [other for names in suggestions._OTHER_NAMES.values() for other in names]
    assert suggestions._OTHER_NAMES.keys() <= known
    assert {f"model.{field}" for field in other_names().values()} <= known
    assert len(others) == len(set(others)) > 50
    assert not {*others, *other_names()} & {key.split(".")[-1] for key in known}


def test_model_fields_are_read_as_the_config_has_them() -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(StableGPTConfig)}
    assert list(model_defaults()) == list(StableGPTConfig.__annotations__)
    assert all(defaults[name] == value for name, value in model_defaults().items())
    assert presets() == PRESETS


@pytest.mark.parametrize("preset", ["baseline", "soft_clip"])
def test_a_printed_recipe_shows_the_models_other_fields(preset: str) -> None:
    recipe = load_recipe(TINY, [f"model.preset={preset}"], builds_model=False)
    text = resolved(recipe)
    assert strict_yaml.parse(text, "test") == to_dict(recipe)
    shown = text.replace("  # by the preset", "").replace("\n  # ", "\n  ")
    section = strict_yaml.parse("\n".join(
        line for line in shown.split("\n") if "other fields" not in line
    ), "test")["model"]  # fmt: skip
    assert {*section, "vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"} == {
        *model_defaults(),
        "preset",
    }
    assert (
        recipe.model_config().to_diff_dict()
        == dataclasses.replace(recipe, model=section).model_config().to_diff_dict()
    )


@pytest.mark.parametrize("override", ["model.preset=qknorm", "model.qk_nrom=head"])
def test_names_of_the_model_are_checked_without_building_it(override: str) -> None:
    with pytest.raises(RecipeError, match="did you mean qk_norm"):
        load_recipe(TINY, [override], builds_model=False)


def test_allowed_values_of_the_model_are_named() -> None:
    message = refusal(TINY, "model.qk_norm=true")
    assert "--set model.qk_norm=true: model: qk_norm=True must be 'head', 'full' or null" in message


def test_integral_numbers_are_counts_however_they_are_written() -> None:
    recipe = load_recipe(TINY, ["training.steps=1e3", "tokenizer.vocab_size=1.024e3", "seed=2.0"])
    assert (recipe.training.steps, recipe.tokenizer.vocab_size, recipe.seed) == (1000, 1024, 2)
    assert all(isinstance(value, int) for value in (recipe.training.steps, recipe.seed))
    tokens = load_recipe(TINY, ["training.steps=null", "training.tokens=1e9"]).training.tokens
    assert tokens == 10**9
    assert "training.steps: found 1.5" in refusal(TINY, "training.steps=1.5")
    assert "training.steps: found '1e3'" in refusal(TINY, "training.steps='1e3'")


# Text of other kinds; a new key that holds text is classified here.
NO_PATHS = {
    *("name", "data.train.column", "data.train.name", "data.train.split", "data.train.license"),
    *("training.attn_implementation",),
}


def text_keys() -> list[str]:
    """Keys that accept a text of any kind."""
    keys = []
    for section, fields in SECTIONS.items():
        for name, field in fields.__pydantic_fields__.items():
            adapter = TypeAdapter(field.annotation)
            with contextlib.suppress(ValidationError):
                adapter.validate_python("any text")
                keys.append(".".join([*map(str, section), name]))
    return [key for key in keys if not key.startswith("data.validation.")]


def test_every_path_of_a_recipe_expands_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = sorted({*text_keys()} - NO_PATHS)
    assert {"output", "data.cache", "tokenizer.path", "data.train.path"} < {*paths}
    for key in [*paths, "data.validation.path", "data.train", "data.validation"]:
        name, written = key, "~/x"
        if key.startswith(("data.train", "data.validation")):
            name = ".".join(key.split(".")[:2])
            written = "[{path: ~/x}]" if key.endswith(".path") else "[~/x]"
        recipe = to_dict(load_recipe(TINY, [f"{name}={written}"], builds_model=False))
        assert str(tmp_path / "x") in json.dumps(recipe), key
        assert "~" not in json.dumps(recipe), key
        assert "no known home" in refusal(TINY, f"{name}={written.replace('~', '~nobody-here')}")


def test_extended_files_and_recipes_expand_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "low.yaml", GOOD)
    write(tmp_path, "own.yaml", "extends: ~/low.yaml\nname: own")
    assert load_recipe("~/own.yaml").name == "own"


def test_overrides_are_validated_and_named_like_files() -> None:
    message = refusal(TINY, "optimizer.learning_rate=-1", "training.stpes=3")
    assert "--set optimizer.learning_rate=-1: optimizer.learning_rate: found -1" in message
    assert "--set training.stpes=3: training.stpes is not a recipe key" in message
    assert "training.steps" in message


def test_the_last_layer_wins(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    write(tmp_path / "base", "low.yaml", GOOD + "model: {hidden_size: 768, num_hidden_layers: 2}")
    write(tmp_path / "base", "high.yaml", "seed: 1\nmodel: {num_hidden_layers: 3}")
    own = """\
        extends: [base/low.yaml, base/high.yaml]
        name: own
        data: {train: [b.txt, c.txt]}
        """
    recipe = load_recipe(write(tmp_path, "own.yaml", own), ["seed=2"])
    assert (recipe.name, recipe.seed, recipe.output) == ("own", 2, "runs/own")
    assert recipe.model == {"hidden_size": 768, "num_hidden_layers": 3}
    assert [source.path for source in recipe.data.train] == ["b.txt", "c.txt"]
    assert recipe.data.sequence_length == 16
    assert recipe == load_recipe(
        [tmp_path / "base/low.yaml", tmp_path / "base/high.yaml", tmp_path / "own.yaml"], ["seed=2"]
    )


def test_an_error_names_the_file_that_set_the_value(tmp_path: Path) -> None:
    low = write(tmp_path, "low.yaml", GOOD + "model: {head_dim: 63, num_hidden_layers: 2}")
    own = write(tmp_path, "own.yaml", "extends: low.yaml\nname: own\nmodel: {hidden_size: 64}")
    assert refusal(own).startswith(f"{low}: model: head_dim=63")


def test_a_circle_of_extends_is_refused_with_its_chain(tmp_path: Path) -> None:
    a = write(tmp_path, "a.yaml", "extends: b.yaml")
    b = write(tmp_path, "b.yaml", "extends: [./a.yaml]")
    message = refusal(a)
    assert "extends itself" in message
    assert f"{a} -> {b} -> " in message


def test_the_same_file_may_be_extended_twice(tmp_path: Path) -> None:
    write(tmp_path, "low.yaml", GOOD)
    write(tmp_path, "b.yaml", "extends: low.yaml")
    own = write(tmp_path, "own.yaml", "extends: [low.yaml, b.yaml]\nname: own")
    assert load_recipe(own).name == "own"


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.sampled_from(
        ["1e-4", "no", "on", "010", "1:30", "2026-11-22", "null", "~", "<<", "=", ".nan"]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), PLAIN, max_size=4))
def test_yaml_reads_back_what_it_writes(content: dict) -> None:
    read = strict_yaml.parse(strict_yaml.dump(content), "test")
    assert read == content
    assert repr(read) == repr(content)  # True is not 1, 1 is not 1.0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E+2", 100.0),
        ("-.5", -0.5),
        ("1_000_000", 1_000_000),
        ("-7", -7),
        ("true", True),
        ("", None),
        ("no", "no"),
        ("2026-11-22", "2026-11-22"),
        ("0x10", "0x10"),
        ("1.2.3", "1.2.3"),
    ],
)
def test_scalars_are_what_they_seem(text: str, value: object) -> None:
    read = strict_yaml.parse(f"key: {text}", "test")["key"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize("path", [*BASES, RECIPES / "quickstart.yaml"], ids=lambda path: path.stem)
def test_every_recipe_is_read_back_from_its_dump(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert load_recipe(write(tmp_path, "dumped.yaml", dump(recipe))) == recipe
    assert from_dict(json.loads(json.dumps(to_dict(recipe)))) == recipe


def test_every_preset_is_one_technique_file() -> None:
    files = {path.stem: path for path in RECIPES.glob("techniques/*.yaml")}
    assert set(files) == set(PRESETS)
    for preset, path in files.items():
        recipe = load_recipe([TINY, path])
        assert recipe.name == preset
        config = recipe.model_config()
        assert all(config.to_dict()[key] == value for key, value in PRESETS[preset].items())


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_say_what_they_are_in_their_first_line(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# ")


def test_a_source_has_the_fields_and_defaults_of_data() -> None:
    fields = dataclasses.asdict(SourceRecipe("x"))
    assert fields.pop("weight") is fields.pop("license") is None
    source = dataclasses.asdict(Source("x"))
    assert source.pop("holdout_by") == "document"  # which a recipe does not choose
    assert fields == source


def test_every_field_says_what_it_means() -> None:
    for section in SECTIONS.values():
        for name, field in section.__pydantic_fields__.items():
            assert field.description, f"{section.__name__}.{name}"


@pytest.mark.parametrize(
    ("unit", "length"), [("steps", 5), ("samples", 5 * 8), ("tokens", 5 * 8 * 32)]
)
def test_warm_up_is_as_long_in_every_unit(unit: str, length: int) -> None:
    recipe = load_recipe(TINY, [f"schedule.warmup={length}", f"schedule.warmup_unit={unit}"])
    assert recipe.warmup_steps == 5


def test_tokens_are_rounded_down_to_whole_steps() -> None:
    recipe = load_recipe(TINY, ["training.steps=null", "training.tokens=1000"])
    assert recipe.num_steps == math.floor(1000 / recipe.tokens_per_step) == 3


def test_a_recipe_cannot_be_changed_after_its_checks() -> None:
    recipe: Recipe = load_recipe(TINY)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.training.steps = 7  # pyright: ignore[reportAttributeAccessIssue]

"""Whatever a recipe says, it trains a step or is refused with a clear error; there is no third way.

HF_STABLE_FUZZ says how many recipes the slow tests try together.
"""

import inspect
import itertools
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from hf_stable.errors import UserError
from hf_stable.model import StableGPTConfig
from hf_stable.model.configuration_stable_gpt import PRESETS
from hf_stable.recipes import load_recipe, to_dict
from hf_stable.training import train

from .training import RECIPES, tiny_recipe, write_text

EXAMPLES = int(os.environ.get("HF_STABLE_FUZZ", "10000"))
PARTS = 8  # as many tests, so that the workers share them
# Keys whose meaning is where files are; what they do with nonsense is tests/test_training.py's.
PLACES = ("output", "name", "data.cache", "data.train", "data.validation", "training.trackers")

ABSURD: list[list[Any]] = [
    [0, -1, -(2**31), 10**6, 10**9, 2**31, 2**63, 10**30, 7, 60],
    [-0.0, 0.99, 1.0, 1e-45, 1e-30, 1e30, 1e300, -1.0],
    ["", "x", "fsdp2", "eager", "flex_attention", "1e-3", "no", "../x", "\0"],
    [[], [1], ["head"], [[]], {}, {"a": 1}, {"rope_theta": 0.0}, {"rope_theta": 10**30}],
    [None, True],
]
COUNTS = st.sampled_from([1, 2, 3, 4, 8, 16, 32, 64, 512])
SIZES = st.sampled_from([0.0, 1e-6, 0.02, 0.1, 0.3, 0.5, 0.9, 0.95, 1.0, 1.03, -0.03, 2.0, 30.0])
WORDS = {
    "model.norm": ["layernorm", "rmsnorm"],
    "model.qk_norm": ["head", "full", None],
    "model.v_norm": ["head", "full", None],
    "model.sigma_gain_init": ["one", "spectral"],
    "model.initializer": ["normal", "small", "fan_in"],
    "model.hidden_act": ["relu2", "gelu", "silu"],
    "model.embedding_scale": ["sqrt_hidden", 1.0, 8.0],
    "tokenizer.kind": ["bpe", "sentencepiece"],
    "schedule.name": ["cosine", "linear", "constant", "wsd"],
    "schedule.warmup_unit": ["samples", "tokens", "steps"],
    "training.precision": ["fp32", "bf16"],
    "optimizer.weight_decay_mode": ["coupled", "independent"],
}


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        inner = _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {}
        flat |= inner or {prefix + key: value}
    return flat


def _known() -> dict[str, Any]:
    """Every key of a recipe and field of the model, with a value that it may have."""
    recipe = _flat(to_dict(load_recipe(RECIPES / "base" / "tiny.yaml")))
    config = StableGPTConfig().to_dict()
    own = inspect.signature(StableGPTConfig).parameters
    fields = {f"model.{name}": config[name] for name in own if name in config}
    known = {**fields, **recipe, "nmae": "x", "model.qk_nrom": "head"}
    return {key: value for key, value in known.items() if key not in PLACES}


def _plausible(key: str, value: Any) -> st.SearchStrategy[Any]:
    if key in WORDS:
        return st.sampled_from(WORDS[key])
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int):
        return COUNTS
    return SIZES if isinstance(value, float) else st.one_of(SIZES, COUNTS, st.none())


@st.composite
def changes(draw: st.DrawFn) -> dict[str, Any]:
    """Most values are such as a person may write, so that many recipes get as far as training."""
    found = {}
    absurdities = st.one_of(*map(st.sampled_from, ABSURD))
    for key in draw(st.lists(st.sampled_from(sorted(KNOWN)), min_size=1, max_size=4, unique=True)):
        absurd = draw(st.integers(0, 5)) == 0
        found[key] = draw(absurdities if absurd else _plausible(key, KNOWN[key]))
    return found


KNOWN = _known()
RECIPE = st.tuples(st.sampled_from(sorted(PRESETS)), changes())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    write_text(folder)
    train(tiny_recipe(folder, training__steps=1))  # tokenizer and tokens, which others share
    return folder


def outcome(folder: Path, preset: str, changes: dict[str, Any]) -> str:
    """ "trained", or "refused" with an error for people; anything else raises."""
    overrides = {"model.preset": preset, "data.train": str([str(folder / "topics")])}
    overrides |= {"data.cache": str(folder / "cache"), "output": str(folder / "run")}
    overrides |= {"training.threads": 1, "training.evaluate_blocks": 1, "telemetry.every": 0}
    texts = [f"{key}={value}" for key, value in overrides.items()]
    texts += [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    shutil.rmtree(folder / "run", ignore_errors=True)
    try:
        recipe = load_recipe(RECIPES / "base" / "tiny.yaml", texts)
        losses: list[float] = []

        def stop(step: int, loss: float, grad_norm: float) -> str:
            losses.append(loss)
            return "one step is enough"

        train(recipe, stop=stop)
    except UserError as error:
        text = str(error)
        assert len(text) > 20 and "Traceback" not in text
        named = any(word in text for key in changes for word in (key, key.rpartition(".")[2]))
        assert named, f"{changes} is refused without a name: {text}"
        return "refused"
    finally:
        torch.set_num_threads(1)
    (loss,) = losses
    # A step that is not finite is refused by the loop; the learning rate's fault is none of the
    # recipe's form.
    assert not math.isfinite(loss) or loss > 0
    return "trained"


COMMON = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}


@seed(0)
@settings(max_examples=60, **COMMON)
@given(recipe=RECIPE)
def test_a_recipe_trains_a_step_or_is_refused(
    folder: Path, recipe: tuple[str, dict[str, Any]]
) -> None:
    assert outcome(folder, *recipe) in ("trained", "refused")


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_every_key_with_every_absurd_value(folder: Path, part: int) -> None:
    for key in sorted(KNOWN)[part::PARTS]:
        for value in itertools.chain(*ABSURD):
            assert outcome(folder, "baseline", {key: value}) in ("trained", "refused"), (key, value)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, PARTS + 1))
def test_ten_thousand_recipes(folder: Path, number: int) -> None:
    counts = {"trained": 0, "refused": 0}

    @seed(number)
    # Not shrunk: a recipe has few changes, and takes long to train again.
    @settings(max_examples=-(-EXAMPLES // PARTS), phases=[Phase.generate], **COMMON)
    @given(recipe=RECIPE)
    def each(recipe: tuple[str, dict[str, Any]]) -> None:
        counts[outcome(folder, *recipe)] += 1

    each()
    print(counts)
    assert min(counts.values()) > sum(counts.values()) // 10

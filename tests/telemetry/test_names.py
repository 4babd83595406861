"""Laws of the record's form: it unpacks to what was packed, and a long run's stays small."""

import json
import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hf_stable.telemetry import names
from hf_stable.telemetry.names import ATTENTION, HEAD, LINEAR, OPTIMIZER, STREAM, Numbers

LAYERS, HEADS = 24, 16

numbers = st.floats(width=32)
values = st.one_of(numbers, st.lists(numbers, min_size=1, max_size=3))
places = st.sampled_from(
    ["layers.0.qkv/output_l2", "layers.1.qkv/output_l2", "layers.11.attention/entropy", "head/x"]
)


def same(left: names.Value, right: names.Value) -> bool:
    if isinstance(left, list) or isinstance(right, list):
        return np.shape(left) == np.shape(right) and all(map(same, left, right))  # type: ignore
    return math.isclose(left, right, rel_tol=1e-4) or (math.isnan(left) and math.isnan(right))


@given(st.dictionaries(places, values))
def test_unpack_is_the_inverse_of_pack_up_to_rounding(sample: Numbers) -> None:
    back = names.unpack(names.pack(sample))
    assert back.keys() == sample.keys()
    assert all(same(back[name], value) for name, value in sample.items())


@given(st.dictionaries(places, values))
def test_packing_twice_changes_nothing_more(sample: Numbers) -> None:
    once = names.pack(sample)
    again = names.pack(names.unpack(once))
    assert json.dumps(again, sort_keys=True) == json.dumps(once, sort_keys=True)


def everything(noise: np.random.Generator) -> Numbers:
    """All names of the vocabulary for a big model, with numbers that have no short form."""
    kinds = {"qkv": LINEAR, "proj": LINEAR, "fc1": LINEAR, "fc2": LINEAR, "attention": ATTENTION}
    kinds |= {"stream": STREAM, "optimizer": OPTIMIZER}
    wanted = {
        f"layers.{layer}.{place}/{quantity}": text
        for layer in range(LAYERS)
        for place, quantities in kinds.items()
        for quantity, text in quantities.items()
    }
    ends = {"head": {**LINEAR, **HEAD}, "embed": LINEAR, "optimizer": OPTIMIZER}
    ends |= {"head.optimizer": OPTIMIZER, "embed.optimizer": OPTIMIZER}
    for place, quantities in ends.items():
        wanted |= {f"{place}/{quantity}": text for quantity, text in quantities.items()}

    def value(name: str, text: str) -> names.Value:
        bins = len(names.ADAM_RATIO_EDGES) + 1 if name.endswith("adam_ratio") else 0
        count = HEADS if text.startswith("H:") else bins
        drawn = np.exp(noise.normal(size=max(count, 1), scale=5))
        return drawn.tolist() if count else float(drawn[0])

    return {name: value(name, text) for name, text in wanted.items()}


def test_a_long_run_of_a_big_model_stays_under_50_megabytes() -> None:
    noise, rows = np.random.default_rng(0), 10
    lines = [
        json.dumps({"event": "telemetry", "step": 9990, **names.pack(everything(noise))})
        for _ in range(rows)
    ]
    assert all(len(names.unpack(json.loads(line))) > 1000 for line in lines)
    # 10,000 steps sampled every 10, and a log line every 10 of at most 200 bytes.
    assert 1000 * (sum(map(len, lines)) / rows + 200) < 50e6

"""The `evaluate` measurement: found by its folder, without the Hub; says what `perplexity` says."""

from importlib.resources import files

import evaluate
import pytest

from hf_stable.errors import UserError
from hf_stable.evaluation import perplexity
from tests.tiny import TEXTS, byte_tokenizer, tiny_llama

FOLDER = str(files("hf_stable") / "measurements" / "stable_perplexity")


@pytest.fixture
def measurement(tmp_path):
    return evaluate.load(FOLDER, cache_dir=str(tmp_path))


def test_equals_perplexity_for_model_objects_and_folders(measurement, tmp_path):
    model, tokenizer = tiny_llama(), byte_tokenizer()
    options = {"max_length": 16, "stride": 8, "batch_size": 2, "seed": 5}
    expected = perplexity(model, tokenizer, TEXTS, **options).to_dict()
    assert measurement.compute(data=TEXTS, model=model, tokenizer=tokenizer, **options) == expected
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert measurement.compute(data=TEXTS, model=str(tmp_path / "model"), **options) == expected


def test_texts_added_in_batches_are_one_set(measurement):
    model, tokenizer = tiny_llama(), byte_tokenizer()
    measurement.add_batch(data=TEXTS[:4])
    measurement.add_batch(data=TEXTS[4:])
    found = measurement.compute(model=model, tokenizer=tokenizer)
    assert found == perplexity(model, tokenizer, TEXTS).to_dict()


def test_a_model_object_needs_its_tokenizer(measurement):
    with pytest.raises(UserError, match="tokenizer: found None"):
        measurement.compute(data=TEXTS, model=tiny_llama())


def test_it_says_what_it_takes(measurement):
    assert measurement.module_type == "measurement"
    assert list(measurement.features) == ["data"]
    for name in ("model", "tokenizer", "max_length", "bits_per_byte"):
        assert name in measurement.inputs_description

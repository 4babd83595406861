"""No supported version of Transformers is silently wrong. scripts/host_matrix.sh runs this file.

`old_export` was written by `hf_stable.hub.export` under Transformers 5.17.0. It stays as it was
published: a change of the model's code must not be copied into it.

Its laws hold under the installed version, whichever of the supported ones that is.
"""

import inspect
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.generation.continuous_batching.input_outputs import PagedAttentionArgs
from transformers.utils import TransformersKwargs

from hf_stable import StableGPTForCausalLM
from hf_stable.hub import export
from hf_stable.model import host_stable_gpt as host
from hf_stable.model.configuration_stable_gpt import PRESETS as ALL_PRESETS

from ..tiny import byte_tokenizer
from . import agreement
from .models import make, prompt
from .test_embeddings import KINDS

OLD_EXPORT = Path(__file__).parent / "old_export"
# sdpa, eager attention, and a layer with buffers. All presets are tested by host_matrix.sh.
EXPORTED = ["baseline", "qk_norm_cap", "sigma_reparam"]


def without_range(preset: str) -> dict[str, float]:
    """Initializers other than "normal" refuse a range."""
    small = ALL_PRESETS[preset].get("initializer", "normal") != "normal"
    return {"initializer_range": 0.02} if small else {}


# generation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ALL_PRESETS)
def test_all_ways_to_generate_agree(preset: str) -> None:
    model = make(preset, **without_range(preset)).double()
    assert agreement.disagreements(model, prompt()) == []


def test_a_wrong_cache_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above can fail."""

    def reversed_values(cache, *arguments):
        key, value = host.update_cache(cache, *arguments)
        return key, value if cache is None else value.flip(-2)

    monkeypatch.setattr("hf_stable.model.blocks_stable_gpt.update_cache", reversed_values)
    wrong = agreement.disagreements(make("baseline").double(), prompt())
    assert {"greedy, dynamic cache", "beams, static cache, left padding"} < set(wrong)


@pytest.mark.parametrize(
    "presets",
    [EXPORTED, pytest.param(list(ALL_PRESETS), marks=[pytest.mark.slow, pytest.mark.matrix])],
    ids=["some presets", "all presets"],
)
def test_exports_generate_alike_without_hf_stable(presets: list[str], tmp_path: Path) -> None:
    for preset in presets:
        source = tmp_path / "source" / preset
        make(preset, vocab_size=257, **without_range(preset)).save_pretrained(source)
        byte_tokenizer().save_pretrained(source)
        export(source, tmp_path / preset)
    folders = [*(tmp_path / preset for preset in presets), OLD_EXPORT]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    answer = subprocess.run(
        [sys.executable, agreement.__file__, *map(str, folders)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert answer.stdout.count("transformers_modules") == len(folders)


def test_an_older_export_loads_and_generates_alike() -> None:
    model = AutoModelForCausalLM.from_pretrained(OLD_EXPORT)
    assert isinstance(model, StableGPTForCausalLM)
    assert AutoTokenizer.from_pretrained(OLD_EXPORT)("a").input_ids
    assert agreement.disagreements(model.double().eval(), prompt()) == []


# names of the cache ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
def test_a_cache_is_used_by_either_name(kind, name: str) -> None:
    model, ids = make("qk_norm", kind).double(), prompt(1)
    past = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :3], **{name: past})
        assert past.get_seq_length() == 3
        found = model(ids[:, 3:], **{name: past})
        expected = model(ids)
    assert past.get_seq_length() == 5
    pairs = list(zip(found.to_tuple(), expected.to_tuple(), strict=False))
    pairs = [pair for pair in pairs if isinstance(pair[0], torch.Tensor)]
    assert pairs
    for one, other in pairs:  # those of a sequence classifier have no axis of tokens
        torch.testing.assert_close(one, other[:, -one.shape[1] :] if one.ndim > 1 else other)


@pytest.mark.parametrize("kind", KINDS[:2], ids=lambda kind: kind.__name__)
def test_outputs_give_the_cache_by_either_name(kind) -> None:
    output = make("baseline", kind)(prompt(), use_cache=True)
    assert output.cache is output.past_key_values is not None
    for name in ("cache", "past_key_values"):
        assert name in output
        assert output[name] is output.cache is output.get(name)
    without = make("baseline", kind)(prompt(), use_cache=False)
    assert without.cache is None and "cache" not in without


def test_two_different_caches_are_refused() -> None:
    model = make("baseline")
    one, other = (DynamicCache(config=model.config) for _ in range(2))
    with pytest.raises(ValueError, match="two names of one argument"):
        model(prompt(), cache=one, past_key_values=other)
    model(prompt(), cache=one, past_key_values=one)
    assert one.get_seq_length() == 5


def test_a_cache_of_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match="is a tuple, but must be a Cache"):
        make("baseline")(prompt(), cache=((torch.zeros(1), torch.zeros(1)),))


# keywords -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_unknown_keyword_is_refused_by_name(kind) -> None:
    model = make("baseline", kind)
    with pytest.raises(TypeError, match="unexpected keyword argument 'past_keys'"):
        model(prompt(1), past_keys=1)
    with pytest.raises(TypeError, match=r"'cu_seqlens_q'.*did you mean 'cu_seq_lens_q'"):
        model(prompt(1), cu_seqlens_q=torch.tensor([0, 5]))
    model(prompt(1), past_keys=None)


def test_a_misspelt_label_is_refused_with_the_right_name() -> None:
    with pytest.raises(TypeError, match=r"StableGPTForCausalLM.*did you mean 'labels'"):
        make("baseline")(prompt(), lables=prompt())


def test_generate_may_be_given_a_tokenizer() -> None:
    """Transformers hands it to the model as well."""
    model = make("baseline", vocab_size=257)
    plain = model.generate(prompt(1), **agreement.GREEDY)
    found = model.generate(prompt(1), tokenizer=byte_tokenizer(), **agreement.GREEDY)
    assert torch.equal(found, plain)


def test_every_keyword_of_this_transformers_is_known() -> None:
    """Fails under a new version of Transformers that passes what we would refuse."""
    signature = set(inspect.signature(StableGPTForCausalLM.forward).parameters)
    passed = set(TransformersKwargs.__optional_keys__) | set(PagedAttentionArgs.__annotations__)
    experts = {"output_router_logits"}  # StableGPT has none
    assert passed - signature - host.KEYWORDS.keys() == experts


def test_attention_that_is_not_causal_is_refused() -> None:
    with pytest.raises(ValueError, match="is_causal=False: StableGPT is a causal decoder"):
        make("baseline")(prompt(), is_causal=False)


# versions -------------------------------------------------------------------------------------


def test_the_installed_version_is_a_tested_one() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        host.warn_if_untested()
    assert host.CACHE in ("cache", "past_key_values")


def test_a_newer_version_is_warned_of_once(monkeypatch, caplog) -> None:
    host.logger.warning_once.cache_clear()
    monkeypatch.setattr(host.transformers, "__version__", "5.99.0.dev0")
    for _ in range(2):
        make("baseline")
    warned = [record.getMessage() for record in caplog.records if "5.99" in record.getMessage()]
    assert len(warned) == 1
    assert f"tested with transformers {host.OLDEST_TESTED} to {host.NEWEST_TESTED}" in warned[0]


def test_the_declared_range_is_the_tested_one() -> None:
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    major, minor = host.NEWEST_TESTED.split(".")
    bounds = f">={host.OLDEST_TESTED},<{major}.{int(minor) + 1}"
    assert pyproject.count(f'"transformers{bounds}"') == 1
    assert pyproject.count(f'"transformers[serving]{bounds}"') == 1

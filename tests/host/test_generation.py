"""Every way to generate and every cache give the tokens that plain greedy decoding gives."""

import copy
import warnings
from dataclasses import fields
from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig

from hf_stable.model.configuration_stable_gpt import PRESETS as ALL_PRESETS

from .models import EAGER_ONLY, PRESETS, make, prompt

GREEDY = {"max_new_tokens": 6, "do_sample": False}
HQQ = {"backend": "hqq", "nbits": 8, "q_group_size": 16, "residual_length": 2}
needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="Transformers offloads by CUDA streams"
)


@pytest.fixture(scope="module", params=PRESETS)
def preset(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(preset: str):
    return make(preset)


@pytest.fixture(scope="module")
def greedy(model) -> torch.Tensor:
    return model.generate(prompt(), **GREEDY)


def test_greedy_is_the_likeliest_token_of_the_uncached_model(model, greedy) -> None:
    ids = prompt()
    for _ in range(GREEDY["max_new_tokens"]):
        with torch.no_grad():
            last = model(ids, use_cache=False).logits[:, -1]
        ids = torch.cat((ids, last.argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(greedy, ids)


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "max_cache_len": 40},
        {"prefill_chunk_size": 2},
        {"cache_implementation": "static", "prefill_chunk_size": 2, "disable_compile": True},
        pytest.param({"cache_implementation": "offloaded"}, marks=[pytest.mark.gpu, needs_cuda]),
        pytest.param(
            {"cache_implementation": "offloaded_static"}, marks=[pytest.mark.gpu, needs_cuda]
        ),
    ],
    ids=lambda options: ",".join(map(str, options.values())),
)
def test_every_cache_gives_the_same_tokens(model, greedy, options) -> None:
    model = model if not torch.cuda.is_available() else copy.deepcopy(model).cuda()
    generated = model.generate(prompt().to(model.device), **GREEDY, **options)
    assert torch.equal(generated.cpu(), greedy)


def test_a_quantised_cache_stays_near_the_exact_one(model) -> None:
    pytest.importorskip("hqq", reason="hqq quantises caches")
    options = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    exact = model.generate(prompt(), **options).logits
    quantised = model.generate(
        prompt(), cache_implementation="quantized", cache_config=HQQ, **options
    ).logits
    # The second token's logits are the first ones that read the cache.
    error = (quantised[1] - exact[1]).norm() / exact[1].norm()
    assert 0 < error < 0.03


def test_sampling_is_seeded_and_stays_among_the_likeliest(model) -> None:
    options = {"max_new_tokens": 6, "do_sample": True, "top_k": 3, "temperature": 0.7}
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        runs.append(
            model.generate(prompt(), return_dict_in_generate=True, output_logits=True, **options)
        )
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    for step, logits in enumerate(runs[0].logits):
        chosen = runs[0].sequences[:, 5 + step, None]
        assert (logits.topk(3).indices == chosen).any(-1).all()


def test_a_beam_as_wide_as_the_vocabulary_finds_the_likeliest_two_tokens(model) -> None:
    beams = model.generate(
        prompt(1), num_beams=61, length_penalty=0.0, max_new_tokens=2, do_sample=False
    )
    with torch.no_grad():
        first = model(prompt(1)).logits[0, -1].log_softmax(-1)
        continued = torch.cat((prompt(1).expand(61, -1), torch.arange(61)[:, None]), dim=1)
        mask = torch.ones_like(continued)
        both = first[:, None] + model(continued, attention_mask=mask).logits[:, -1].log_softmax(-1)
    assert beams[0, 5:].tolist() == [both.argmax().item() // 61, both.argmax().item() % 61]


def test_beam_sampling_gives_as_many_sequences_as_asked_for(model) -> None:
    options = {"num_beams": 3, "num_return_sequences": 3, "do_sample": True, "max_new_tokens": 4}
    generated = model.generate(prompt(), **options)
    assert generated.shape == (6, 9) and torch.equal(generated[::3, :5], prompt())


@pytest.mark.parametrize("draft", ["model", "lookup", "early exit"])
def test_assisted_decoding_gives_the_same_tokens(model, greedy, draft: str) -> None:
    options = {
        "model": {"assistant_model": copy.deepcopy(model)},
        "lookup": {"prompt_lookup_num_tokens": 3},
        "early exit": {"assistant_early_exit": 1},
    }[draft]
    assert torch.equal(model.generate(prompt()[:1], **GREEDY, **options), greedy[:1])
    assert model.config.num_hidden_layers == 2


def test_an_early_exit_leaves_the_model_after_its_layer() -> None:
    """Transformers lowers `num_hidden_layers` of a built model for its draft."""
    model = make("baseline")
    whole = model(prompt()).logits
    model.config.num_hidden_layers = 1
    drafted = model(prompt(), output_hidden_states=True)
    assert len(drafted.hidden_states) == 2 and not torch.equal(drafted.logits, whole)


def test_left_padding_changes_no_token(model, greedy) -> None:
    padded = torch.nn.functional.pad(prompt(), (3, 0), value=0)
    mask = (padded != 0).long()
    assert torch.equal(model.generate(padded, attention_mask=mask, **GREEDY)[:, 3:], greedy)
    static = model.generate(padded, attention_mask=mask, cache_implementation="static", **GREEDY)
    assert torch.equal(static[:, 3:], greedy)


def test_left_padding_changes_no_logit(model) -> None:
    padded = torch.nn.functional.pad(prompt(), (3, 0), value=0)
    mask = (padded != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
        torch.testing.assert_close(logits, model(prompt()).logits, atol=2e-5, rtol=1e-4)


def test_embeddings_generate_what_their_ids_do(model, greedy) -> None:
    embeds = model.get_input_embeddings()(prompt())
    assert torch.equal(model.generate(inputs_embeds=embeds, **GREEDY), greedy[:, 5:])


def test_a_given_cache_is_continued(model, greedy) -> None:
    past = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt()[:, :-1], past_key_values=past)
    assert torch.equal(model.generate(prompt(), past_key_values=past, **GREEDY), greedy)
    assert past.get_seq_length() == greedy.shape[1] - 1


def test_generation_returns_what_it_is_asked_for(model) -> None:
    names = ["output_scores", "output_logits", "output_hidden_states"]
    out = model.generate(
        prompt(), return_dict_in_generate=True, **dict.fromkeys(names, True), **GREEDY
    )
    assert len(out.scores) == len(out.logits) == len(out.hidden_states) == 6
    assert [len(step) for step in out.hidden_states] == [3] * 6
    assert out.hidden_states[0][-1].shape == (2, 5, 32)
    assert out.hidden_states[1][-1].shape == (2, 1, 32)
    assert torch.equal(torch.stack(out.logits, 1).argmax(-1), out.sequences[:, 5:])


def test_continuous_batching_gives_the_same_tokens_or_refuses_by_name(preset, model) -> None:
    prompts = [[1, 2, 3, 4, 5], [7, 8, 9]]
    generation = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1)
    names = {each.name for each in fields(ContinuousBatchingConfig)}
    size = "page_size" if "page_size" in names else "block_size"  # as 5.17 calls it
    pages = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32, **{size: 16})

    def batch() -> list[list[int]]:
        answers = model.generate_batch(
            prompts, generation_config=generation, continuous_batching_config=pages
        )
        return [answer.generated_tokens for answer in answers.values()]

    if preset in EAGER_ONLY:
        with pytest.raises(ValueError, match=f"cannot do {EAGER_ONLY[preset]}"):
            batch()
        return
    alone = [
        model.generate(torch.tensor([each]), max_new_tokens=5, do_sample=False)[0, len(each) :]
        for each in prompts
    ]
    assert sorted(batch()) == sorted(each.tolist() for each in alone)


# where positions end --------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("asked", [{"max_new_tokens": 70}, {"max_length": 75}])
def test_generation_ends_where_positions_end_and_says_so(cache, asked) -> None:
    model = make("baseline")
    with pytest.warns(UserWarning, match=r"ends 10 tokens early, by max_position_embeddings=64"):
        generated = model.generate(prompt(), do_sample=False, cache_implementation=cache, **asked)
    # One more than there are positions: nobody reads the last token.
    assert generated.shape == (2, 65)
    with pytest.warns(UserWarning, match="10 tokens early"):
        embeds = model.get_input_embeddings()(prompt())
        continued = model.generate(inputs_embeds=embeds, do_sample=False, max_new_tokens=70)
    assert torch.equal(continued, generated[:, 5:])


def test_a_prompt_beyond_the_positions_is_named_before_anything_is_computed(monkeypatch) -> None:
    model = make("baseline")
    full = model.generate(prompt(length=64), max_new_tokens=1, do_sample=False)
    assert full.shape == (2, 65)
    monkeypatch.setattr(model.model, "forward", None)
    with pytest.raises(ValueError, match="prompt has 65 tokens, but max_position_embeddings=64"):
        model.generate(prompt(length=65), max_new_tokens=1)


def repeated(length: int) -> torch.Tensor:
    """Text in which a lookup finds candidates, (1, length)."""
    return (torch.arange(length) % 4 + 1)[None]


@pytest.mark.parametrize("asked", [13, 14, 40])
@pytest.mark.parametrize("draft", ["lookup", "shorter model", "model"])
@pytest.mark.filterwarnings("ignore:Generation ends")
def test_drafts_end_where_positions_end(asked: int, draft: str) -> None:
    model, options = make("baseline"), {"max_new_tokens": asked, "do_sample": False}
    drafts: dict[str, Any] = {
        "lookup": {"prompt_lookup_num_tokens": 10},
        "shorter model": {"assistant_model": make("baseline", max_position_embeddings=52)},
        "model": {"assistant_model": copy.deepcopy(model)},
    }
    plain = model.generate(repeated(50), **options)
    assert plain.shape == (1, min(50 + asked, 65))
    assert torch.equal(model.generate(repeated(50), **options, **drafts[draft]), plain)


@pytest.mark.parametrize("padding", [10, 20])
@pytest.mark.filterwarnings("error:Generation ends")
def test_padding_on_the_left_takes_no_positions(padding: int) -> None:
    model, options = make("baseline"), {"max_new_tokens": 14, "do_sample": False}
    plain = model.generate(repeated(50), **options)
    padded = torch.nn.functional.pad(repeated(50), (padding, 0))
    found = model.generate(padded, attention_mask=(padded != 0).long(), **options)
    assert torch.equal(found[:, padding:], plain)


def test_positions_that_scale_have_no_end() -> None:
    scaling = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = make("baseline", rope_parameters=scaling)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.generate(prompt(), max_new_tokens=70, do_sample=False).shape == (2, 75)


# all presets ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ALL_PRESETS if name not in PRESETS])
def test_the_other_presets_generate_alike_with_and_without_a_cache(name: str) -> None:
    model = make(name, **_without_range(name))
    plain = model.generate(prompt(), **GREEDY)
    for options in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(prompt(), **GREEDY, **options), plain)


def _without_range(name: str) -> dict[str, float]:
    """Initializers other than "normal" refuse a range."""
    small = ALL_PRESETS[name].get("initializer", "normal") != "normal"
    return {"initializer_range": 0.02} if small else {}

"""What a forward pass returns and what it hands on: hidden states, attention weights, arguments."""

import inspect

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from hf_stable.model.functional_stable_gpt import attention_forward

from .models import PRESETS, make, prompt


@pytest.fixture(scope="module", params=PRESETS)
def model(request):
    return make(request.param, attn="eager")


def test_hidden_states_are_the_stream_between_blocks(model) -> None:
    output = model(prompt(), output_hidden_states=True)
    states = output.hidden_states
    assert len(states) == 3 and all(state.shape == (2, 5, 32) for state in states)
    assert torch.equal(states[0], model.get_input_embeddings()(prompt()))
    assert torch.equal(states[-1], model.model(prompt()).last_hidden_state)
    assert torch.equal(model.lm_head(states[-1]), output.logits)
    stream = model.model(inputs_embeds=states[0], output_hidden_states=True).hidden_states
    assert all(torch.equal(one, other) for one, other in zip(states, stream, strict=True))


def test_attention_weights_are_causal_and_what_they_say(model) -> None:
    weights = model(prompt(), output_attentions=True).attentions
    assert len(weights) == 2 and all(each.shape == (2, 4, 5, 5) for each in weights)
    for each in weights:
        assert (each.triu(diagonal=1) == 0).all() and (each >= 0).all()
    rows = torch.stack(list(weights)).sum(-1)
    if model.config.clips_attention:
        assert (torch.stack(list(weights)) == 0).sum() > 2 * 2 * 4 * 10  # beyond the mask
        assert (rows - 1).abs().max() > 1e-3
    else:
        torch.testing.assert_close(rows, torch.ones_like(rows))


def test_attention_weights_have_gradients(model) -> None:
    output = model(prompt(), output_attentions=True, output_hidden_states=True)
    kept = [output.hidden_states[0], output.attentions[0]]
    for each in kept:
        each.retain_grad()
    output.logits.square().sum().backward()
    assert all((each.grad != 0).any() for each in kept)


def test_without_a_request_nothing_is_recorded(model) -> None:
    output = model(prompt())
    assert output.hidden_states is None and output.attentions is None


@pytest.mark.parametrize("cached", [False, True])
def test_a_tuple_holds_what_the_output_does(model, cached: bool) -> None:
    arguments = {"labels": prompt(), "output_hidden_states": True, "use_cache": cached}
    output = model(prompt(), **arguments)
    values = model(prompt(), return_dict=False, **arguments)
    assert isinstance(values, tuple)
    assert len(values) == len(output.to_tuple()) and torch.equal(values[0], output.loss)
    assert torch.equal(values[1], output.logits)
    assert (output.past_key_values is not None) == cached


def test_rows_of_a_batch_do_not_see_each_other(model) -> None:
    ids = prompt(batch=3)
    together = model(ids).logits
    alone = torch.cat([model(row[None]).logits for row in ids])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_evaluation_is_deterministic(model) -> None:
    assert torch.equal(model(prompt()).logits, model(prompt()).logits)


# arguments ------------------------------------------------------------------------------------


def test_every_argument_and_score_reaches_the_attention_function(model) -> None:
    """Transformers' own tests would not notice keywords that stay behind, or a forgotten cap."""
    seen = []

    def spy(module, *tensors, **keywords):
        seen.append(keywords)
        return attention_forward(module, *tensors, **keywords)

    AttentionInterface.register("spy", spy)
    AttentionMaskInterface.register("spy", eager_mask)
    model.set_attn_implementation("spy")
    marker = torch.zeros(2, 5, dtype=torch.int32)
    model(prompt(), seq_idx=marker)
    model.set_attn_implementation("eager")
    config = model.config
    assert len(seen) == config.num_hidden_layers
    for keywords in seen:
        assert keywords["seq_idx"] is marker
        assert keywords.get("softcap") == config.attn_logit_softcapping
        assert keywords.get("clip_gamma") == config.attention_clip_gamma
        assert keywords["scaling"] == config.attention_multiplier / config.head_dim**0.5
        assert keywords["position_ids"].shape == (1, 5)


def test_head_masks_are_absent_and_refused(model) -> None:
    assert "head_mask" not in inspect.signature(type(model).forward).parameters
    with pytest.raises(TypeError, match="unexpected keyword argument 'head_mask'"):
        model(prompt(), head_mask=torch.ones(2, 4))


def test_the_first_argument_is_input_ids(model) -> None:
    for each in (model, model.model):
        assert next(iter(inspect.signature(each.forward).parameters)) == "input_ids"
        assert each.main_input_name == "input_ids"


def test_positions_go_on_where_a_cache_ends(model) -> None:
    """Transformers' own tests would not notice positions that begin again with a cache."""
    past = model(prompt()[:, :3], use_cache=True).past_key_values
    explicit = model(prompt()[:, :3], use_cache=True).past_key_values
    implied = model(prompt()[:, 3:], past_key_values=past).logits
    positions = torch.tensor([[3, 4]])
    told = model(prompt()[:, 3:], past_key_values=explicit, position_ids=positions).logits
    assert torch.equal(implied, told)
    torch.testing.assert_close(implied, model(prompt()).logits[:, 3:], atol=1e-5, rtol=1e-5)

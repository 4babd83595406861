"""Laws of watching for model families that are not ours."""

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hf_stable.telemetry import watch

from .reference import Adam, Family, Reference
from .steps import (
    LENGTH,
    VOCAB_SIZE,
    assert_documented,
    assert_numbers,
    draw,
    exact_copy,
    traces,
    watched,
)

SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = {
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 6,
    "head_dim": 6,
}
LINEARS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "proj": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "fc1": "mlp.up_proj",
    "fc2": "mlp.down_proj",
}


def _family(name: str, **fields) -> Family:
    path = f"transformers.models.{name}.modeling_{name}"
    return Family(LINEARS, spied=(path, "eager_attention_forward"), **fields)


GEMMA = {"windows": {0: 5}, "gain_origin": 1.0, "mlp_reader": "pre_feedforward_layernorm"}
FAMILIES = {
    "llama": _family("llama"),
    "qwen3": _family("qwen3"),
    "gemma2": _family("gemma2", **GEMMA),
    "gemma3": _family("gemma3", **GEMMA),
    # Norms only behind its branches: the MLP itself reads the stream.
    "olmo2": _family("olmo2", mlp_reader="mlp"),
    "gpt2": Family(
        {"qkv": "attn.c_attn", "proj": "attn.c_proj", "fc1": "mlp.c_fc", "fc2": "mlp.c_proj"},
        blocks="transformer.h",
        embedding="transformer.wte",
        final="transformer.ln_f",
        attention="attn",
        mlp_reader="ln_2",
        spied=("transformers.models.gpt2.modeling_gpt2", "eager_attention_forward"),
    ),
}


def _gpt2(dropout: float) -> GPT2LMHeadModel:
    sizes = {"vocab_size": VOCAB_SIZE, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    dropouts = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), dropout)
    config = GPT2Config(
        **sizes,
        **dropouts,
        initializer_range=0.3,
        scale_attn_by_inverse_layer_idx=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config)


def _build(name: str, attn: str = "eager", dropout: float = 0.0) -> PreTrainedModel:
    torch.manual_seed(0)
    caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
    model = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_dropout=dropout)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=6)),
        "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, **WINDOW, **caps)),
        "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **WINDOW)),
        "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**SIZES)),
        "gpt2": lambda: _gpt2(dropout),
    }[name]()
    model.set_attn_implementation(attn)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "norm" in path or "ln_" in path:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.train()


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_number_is_its_definition(name: str, attn: str) -> None:
    """In float64, as far as the families go: their norms and softmax stay in fp32."""
    if (name, attn) == ("gemma2", "sdpa"):
        pytest.skip("sdpa has no cap")
    model = _build(name, attn).double()
    reference = Reference(exact_copy(model), Adam(), FAMILIES[name])
    steps = draw()
    found = watched(model, steps)
    for numbers, batches in zip(found, steps, strict=True):
        assert_numbers(numbers, reference.step(batches), 2e-5)
        assert_documented(numbers)
        assert {f"layers.1.{word}/input_grad_l2" for word in FAMILIES[name].linears} <= set(numbers)


@pytest.mark.parametrize(("name", "attn"), [("gemma2", "eager"), ("llama", "sdpa")])
def test_padding_and_documents(name: str, attn: str) -> None:
    model = _build(name, attn).double()
    reference = Reference(exact_copy(model), Adam(), FAMILIES[name])
    first, second = draw(1)[0]
    first["attention_mask"] = torch.ones(2, LENGTH, dtype=torch.long)
    first["attention_mask"][0, 8:] = 0
    second = {key: each[:1] if "num" not in key else each for key, each in second.items()}
    second["position_ids"] = torch.cat([torch.arange(7), torch.arange(5)])[None]
    found = watched(model, [[first, second]])[0]
    assert_numbers(found, reference.step([first, second]), 2e-5)


@pytest.mark.parametrize(
    ("name", "attn", "dropout"),
    [(name, "eager", 0.0) for name in FAMILIES]
    + [("llama", "sdpa", 0.1), ("gpt2", "eager", 0.1), ("qwen3", "sdpa", 0.0)],
)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_watching_changes_no_bit(name: str, attn: str, dropout: float, checkpointed: bool) -> None:
    found = []
    for every in (0, 3):
        model = _build(name, attn, dropout)
        if checkpointed:
            model.gradient_checkpointing_enable()
        own = traces(model)
        optimizer = Adam().build(model)
        losses = []
        torch.manual_seed(3)
        with watch(model, optimizer, every=every) as watcher:
            for batches in draw(7):
                for batch in batches:
                    loss = model(use_cache=False, **batch).loss
                    loss.backward()
                    losses.append(loss.item())
                optimizer.step()
                optimizer.zero_grad()
                watcher.end_step()
        assert traces(model) == own
        found.append((losses, [parameter.detach() for parameter in model.parameters()]))
    assert found[0][0] == found[1][0]
    weights = zip(found[0][1], found[1][1], strict=True)
    assert all(torch.equal(one, other) for one, other in weights)


def test_whole_compiled_models_are_refused() -> None:
    with pytest.raises(ValueError, match="compile its blocks"):
        watch(torch.compile(_build("llama")))

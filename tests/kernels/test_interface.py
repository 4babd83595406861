"""Laws of the backend "stable_triton": whatever Transformers asks of it, it equals eager."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)

from hf_stable import StableGPTConfig, StableGPTForCausalLM
from hf_stable.kernels import BACKEND, FAST_TANH_BACKEND, UNBIASED_BACKEND
from hf_stable.kernels.documents import document_mask
from hf_stable.kernels.interface import attention_backend, record_statistics
from hf_stable.kernels.linear_cross_entropy import linear_cross_entropy
from hf_stable.kernels.tiles import INTERPRETED
from hf_stable.model import loss_stable_gpt as plain
from hf_stable.model.configuration_stable_gpt import PRESETS
from hf_stable.model.loss_stable_gpt import LINEAR_CROSS_ENTROPY_FUNCTIONS
from hf_stable.records import read_metrics

from .reference import DEVICE, LargestTensor

VOCAB_SIZE = 61


def _twins(preset: str = "baseline", layers: int = 2, **fields: Any) -> list[StableGPTForCausalLM]:
    """The same fp32 weights with the eager function and with the kernels."""
    twins = []
    for backend in ("eager", BACKEND):
        torch.manual_seed(0)
        # Weights so large that what a query sees matters.
        scale = {} if "initializer" in PRESETS[preset] else {"initializer_range": 0.2}
        config = StableGPTConfig.from_preset(
            preset,
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
            **scale,
            **fields,
        )
        model = StableGPTForCausalLM._from_config(config, attn_implementation=backend)
        twins.append(model.to(DEVICE).eval())
    return twins


def _tokens(batch_size: int = 2, length: int = 23) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, VOCAB_SIZE, (batch_size, length), generator=generator).to(DEVICE)


def _assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", [BACKEND, FAST_TANH_BACKEND, UNBIASED_BACKEND])
def test_names_are_in_both_registries(name: str) -> None:
    """A backend without a mask function would get no mask, and see padding and other documents."""
    assert name in AttentionInterface() and name in AttentionMaskInterface()
    assert "flash" not in name


def test_the_head_on_cuda_is_the_kernel() -> None:
    assert LINEAR_CROSS_ENTROPY_FUNCTIONS["cuda"] is linear_cross_entropy
    assert set(LINEAR_CROSS_ENTROPY_FUNCTIONS) == {"cuda"}


def test_a_training_step_holds_no_tensor_of_tokens_times_vocabulary_or_tokens(monkeypatch) -> None:
    length, vocab_size = 100, 300
    config = StableGPTConfig.from_preset(
        "soft_clip",
        vocab_size=vocab_size,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=length,
        attn_logit_softcapping=30.0,
        z_loss=1e-4,
    )
    ids = torch.randint(0, vocab_size, (1, length), device=DEVICE)
    positions = torch.cat([torch.arange(25), torch.arange(75)])[None].to(DEVICE)
    monkeypatch.setitem(plain.CHUNK_BYTES, "cuda", 4 * 32 * vocab_size)
    monkeypatch.setitem(LINEAR_CROSS_ENTROPY_FUNCTIONS._local_mapping, "cpu", linear_cross_entropy)
    for backend, bound in ((BACKEND, 32 * vocab_size), ("eager", math.inf)):
        model = StableGPTForCausalLM._from_config(config, attn_implementation=backend).to(DEVICE)
        with LargestTensor() as largest:
            model(ids, position_ids=positions, labels=ids, use_cache=False).loss.backward()
        assert largest.numel <= bound < length * min(length, vocab_size) or backend == "eager"
    # The measure itself sees the scores of the eager function.
    assert largest.numel >= length * length


@pytest.mark.parametrize("preset", PRESETS)
def test_training_and_evaluation_equal_eager(preset: str) -> None:
    eager, ours = _twins(preset)
    ids = _tokens(1)
    for model in (eager, ours):
        model.train()
        model(ids, labels=ids, use_cache=False).loss.backward()
    gradients = dict(ours.named_parameters())
    for name, parameter in eager.named_parameters():
        if parameter.grad is not None:
            _assert_equal(gradients[name].grad, parameter.grad)
    with torch.no_grad():
        _assert_equal(ours.eval()(ids).logits, eager.eval()(ids).logits)


@pytest.mark.parametrize("preset", ["qk_norm_cap", "soft_clip", "soft_cap"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_equals_eager(preset: str, cache: str) -> None:
    eager, ours = _twins(preset)
    ids = _tokens(length=9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    found = [
        model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=6,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            cache_implementation=cache,
        )
        for model in (ours, eager)
    ]
    assert torch.equal(found[0].sequences, found[1].sequences)
    for logits, expected in zip(found[0].logits, found[1].logits, strict=True):
        _assert_equal(logits, expected)


@pytest.mark.parametrize("fields", [{}, {"attention_clip_alpha": 0.9}], ids=str)
@pytest.mark.parametrize("hidden", ["left", "right", "holes"])
def test_padding_equals_eager(hidden: str, fields: dict[str, Any]) -> None:
    eager, ours = _twins(attn_logit_softcapping=5.0, **fields)
    ids = _tokens()
    mask = torch.ones_like(ids)
    mask[0, {"left": slice(0, 7), "right": slice(15, 23), "holes": slice(5, 12)}[hidden]] = 0
    expected = eager(ids, attention_mask=mask).logits
    # What a padding query itself attends to is Transformers' affair; nobody reads it.
    rows = mask.bool()
    _assert_equal(ours(ids, attention_mask=mask).logits[rows], expected[rows])


def test_packed_documents_do_not_see_each_other() -> None:
    eager, ours = _twins("soft_clip", attn_logit_softcapping=5.0)
    ids = _tokens(1, 24)
    positions = torch.cat([torch.arange(10), torch.arange(1), torch.arange(13)])[None].to(DEVICE)
    packed = ours(ids, position_ids=positions, use_cache=False).logits
    _assert_equal(packed, eager(ids, position_ids=positions, use_cache=False).logits)
    _assert_equal(packed[:, 11:], eager(ids[:, 11:], use_cache=False).logits)
    lengths = torch.tensor([0, 10, 11, 24], dtype=torch.int32, device=DEVICE)
    flattened = ours(ids, position_ids=positions, use_cache=False, cu_seq_lens_q=lengths).logits
    assert torch.equal(flattened, packed)


def test_cumulative_lengths_alone_and_beside_padding() -> None:
    eager, ours = _twins()
    ids = _tokens(1, 20)
    lengths = torch.tensor([0, 8, 20], dtype=torch.int32, device=DEVICE)
    mask = torch.ones_like(ids)
    mask[0, 14:16] = 0
    places = torch.arange(20, device=DEVICE)
    document = (places >= 8).int()
    dense = (places[None, :] <= places[:, None]) & (document[None, :] == document[:, None])
    for padding in (torch.ones_like(mask), mask):
        both = (dense & padding.bool())[None, None]
        expected = eager(ids, attention_mask=both, use_cache=False).logits
        given = {} if padding.all() else {"attention_mask": padding}
        found = ours(ids, cu_seq_lens_q=lengths, use_cache=False, **given).logits
        rows = padding.bool()
        _assert_equal(found[rows], expected[rows])
    with pytest.raises(ValueError, match="batch of 1, found 2"):
        ours(_tokens(2, 20), cu_seq_lens_q=lengths, use_cache=False)


def test_a_dense_mask_is_computed_by_eager() -> None:
    eager, ours = _twins("soft_cap")
    ids = _tokens()
    mask = (torch.rand(2, 1, 23, 23, generator=torch.Generator().manual_seed(0)) < 0.7).to(DEVICE)
    mask |= torch.eye(23, dtype=torch.bool, device=DEVICE)
    assert torch.equal(
        ours(ids, attention_mask=mask).logits, eager(ids, attention_mask=mask).logits
    )


def test_masks_that_are_neither_dense_nor_documents_are_refused() -> None:
    _, ours = _twins()
    ids = _tokens()
    mask = torch.ones(2, 1, 23, 23, dtype=torch.int32, device=DEVICE).tril()
    with pytest.raises(ValueError, match=r"bool or additive, found torch\.int32"):
        ours(ids, attention_mask=mask)
    lengths = torch.tensor([0, 8, 23], dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="cu_seq_lens_q is not for"):
        ours(ids[:1], attention_mask=mask[:1].bool(), cu_seq_lens_q=lengths)


def test_a_short_padding_mask_hides_what_it_does_not_cover() -> None:
    eager, ours = _twins()
    mask = torch.ones(2, 20, dtype=torch.bool, device=DEVICE)
    given = {"batch_size": 2, "q_length": 23, "kv_length": 23, "attention_mask": mask}
    documents = document_mask(**given, device=DEVICE)
    assert documents is not None and (documents[:, 0, 0, 20:] == -1).all()
    bare = eager(_tokens()[:, :20]).logits
    _assert_equal(ours(_tokens(), attention_mask=documents).logits[:, :20], bare)


def test_a_static_cache_sees_only_what_was_written() -> None:
    eager, ours = _twins("soft_cap")
    ids = _tokens()
    for model in (eager, ours):
        cache = StaticCache(config=model.config, max_cache_len=40)
        parts = [model(part, past_key_values=cache).logits for part in ids.split([9, 13, 1], 1)]
        _assert_equal(torch.cat(parts, 1), eager(ids).logits)


def test_statistics_of_every_layer_without_touching_the_model() -> None:
    _, ours = _twins("soft_clip", attn_logit_softcapping=5.0)
    ids = _tokens(1, 9)
    before = ours(ids).logits
    with record_statistics(ours) as statistics:
        during = ours(ids).logits
    assert torch.equal(before, during)
    assert set(statistics) == {0, 1}
    for layer in statistics.values():
        assert layer.max_logit.shape == layer.entropy.shape == layer.clipped_rows.shape == (2,)
        assert layer.max_logit.isfinite().all() and (layer.entropy > 0).all()
    recorded = dict(statistics)
    ours(ids)
    assert recorded == statistics
    with record_statistics(ours) as outer:
        ours(ids)
        with record_statistics(ours) as inner:
            pass
        with record_statistics(ours) as again:
            ours(ids)
    assert not inner and set(again) == {0, 1} and set(outer) == {0, 1}
    assert not any("attention_statistics" in vars(module) for module in ours.modules())


def test_compiled_blocks_equal_plain_ones_and_record_in_one_graph_for_all() -> None:
    layers = 9  # Dynamo keeps eight graphs of a function
    _, ours = _twins("qk_norm_cap", layers=layers)
    ids = _tokens(1, 5)
    expected = ours(ids, use_cache=False).logits
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for layer in ours.model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    _assert_equal(ours(ids, use_cache=False).logits, expected)
    with record_statistics(ours) as statistics:
        _assert_equal(ours(ids, use_cache=False).logits, expected)
    assert set(statistics) == set(range(layers))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()


SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_other_families_may_use_it(family: str) -> None:
    """Gemma 2 has the cap; Transformers itself computes it by eager only, or needs a GPU."""
    torch.manual_seed(0)
    layers = ["full_attention"] * 2
    model = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
        "gemma2": lambda: Gemma2ForCausalLM(
            Gemma2Config(**SIZES, layer_types=layers, attn_logit_softcapping=3.0)
        ),
    }[family]()
    model = model.to(DEVICE).eval()
    ids = _tokens()
    model.set_attn_implementation("eager")
    expected = model(ids).logits
    model.set_attn_implementation(BACKEND)
    _assert_equal(model(ids).logits, expected)


def test_a_sliding_window_is_computed_by_eager() -> None:
    torch.manual_seed(0)
    config = Gemma2Config(**SIZES, sliding_window=8, layer_types=["sliding_attention"] * 2)
    model = Gemma2ForCausalLM(config).to(DEVICE).eval()
    model.set_attn_implementation("eager")
    expected = model(_tokens()).logits
    model.set_attn_implementation(BACKEND)
    _assert_equal(model(_tokens()).logits, expected)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"sliding_window": 4}, "sliding_window"),
        ({"s_aux": torch.zeros(2)}, "s_aux"),
        ({"is_causal": False}, "not causal"),
        ({"output_attentions": True}, "output_attentions"),
    ],
)
def test_arguments_of_other_backends_are_refused_by_name(given: dict, words: str) -> None:
    _, ours = _twins()
    attention = ours.model.layers[0].self_attn
    states = torch.zeros(1, 2, 5, 16, device=DEVICE)
    with pytest.raises(ValueError, match=f'"stable_triton" cannot do .*{words}'):
        attention_backend(attention, states, states, states, None, **given)


def test_dropout_is_refused_by_name_where_it_would_drop() -> None:
    _, ours = _twins(attention_dropout=0.1)
    assert ours(_tokens()).logits.isfinite().all()
    with pytest.raises(ValueError, match=r'"stable_triton" cannot do attention_dropout=0.1.*eager'):
        ours.train()(_tokens())


@pytest.mark.parametrize("form", [{}, {"clip_gamma": -0.03}])
def test_the_unbiased_backend_keeps_fp32_for_the_backward(form: dict[str, float]) -> None:
    states = torch.randn(1, 2, 5, 16, device=DEVICE, dtype=torch.float16, requires_grad=True)
    _, model = _twins()
    kept = {}
    for name in (BACKEND, UNBIASED_BACKEND):
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, into=saved: into.append(x), id):
            backend = AttentionInterface()[name]
            backend(model.model.layers[0].self_attn, states, states, states, None, **form)
        kept[name] = [tensor.dtype for tensor in saved if tensor.shape == (1, 5, 2, 16)]
    assert kept == {BACKEND: [torch.float16], UNBIASED_BACKEND: [torch.float32]}


@pytest.mark.skipif(not INTERPRETED, reason="a GPU has it")
def test_the_hardware_tanh_is_refused_where_there_is_none() -> None:
    _, ours = _twins("soft_cap")
    ours.set_attn_implementation(FAST_TANH_BACKEND)
    with pytest.raises(ValueError, match="hardware tanh"):
        ours(_tokens())


def test_without_triton_the_name_stays_and_says_what_is_missing() -> None:
    """A laptop may plan a run, and a user of another system learns why it stops."""
    program = (
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'triton' else find(name)\n"
        "import torch, hf_stable\n"
        "config = hf_stable.StableGPTConfig(vocab_size=7, hidden_size=8, num_hidden_layers=1,"
        " num_attention_heads=1, attn_logit_softcapping=5.0)\n"
        "build = hf_stable.StableGPTForCausalLM._from_config\n"
        "model = build(config, attn_implementation='stable_triton')\n"
        "assert not [name for name in sys.modules if name.startswith('hf_stable.kernels.att')]\n"
        "model(torch.ones(1, 3, dtype=torch.long))\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    last = answer.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError") and "needs Triton" in last and "eager" in last


@pytest.mark.parametrize("separate", [False, True])
def test_a_whole_run_by_the_kernels_is_the_run_by_eager(tmp_path: Path, separate: bool) -> None:
    """Training, validation and the perplexity of what was written, with and without documents."""
    # Imported here: a lent GPU's environment may lack what recipes need, but runs the other tests.
    for package in ("accelerate", "datasets", "pydantic"):
        pytest.importorskip(package)
    from hf_stable.training import train  # noqa: PLC0415

    from ..training import tiny_recipe  # noqa: PLC0415

    found = []
    for backend in ("eager", BACKEND):
        recipe = tiny_recipe(
            tmp_path,
            model__preset="soft_clip",
            model__attn_logit_softcapping=20.0,
            model__num_hidden_layers=1,
            data__separate_documents=separate,
            training__attn_implementation=backend,
            training__steps=3,
            training__global_batch_size=4,
            training__micro_batch_size=2,
            training__log_every=1,
            training__evaluate_blocks=2,
            output=tmp_path / backend,
        )
        result = train(recipe)
        losses = [row["loss"] for row in read_metrics(result.folder, "train")]
        found.append([*losses, result.validation_perplexity])
    assert found[1] == pytest.approx(found[0], rel=1e-5)

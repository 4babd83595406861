"""Laws of the attention kernels: equal to float64 in every form, in O(S) memory."""

import itertools
import math
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from hf_stable.kernels import attention as kernels
from hf_stable.kernels.attention import flash_attention
from hf_stable.kernels.documents import build_documents
from hf_stable.kernels.tiles import INTERPRETED, tanh, tanh_terms

from .reference import (
    DEVICE,
    DTYPES,
    LargestTensor,
    assert_as_good_as_plain,
    dense,
    draw,
    plain,
    recomputation,
)

CAPS = (None, 5.0, 50.0, 80.0)
CLIPS: dict[str, dict[str, float]] = {
    "no clip": {},
    "paper": {"clip_gamma": -0.03, "clip_zeta": 1.03},
    "dense": {"clip_gamma": -1e-5},
    "alpha": {"clip_alpha": 2.0, "clip_zeta": 1.1},
    "upper": {"clip_zeta": 1.2},
    "no upper": {"clip_alpha": 1.0},
}
FORMS = [
    pytest.param({"softcap": cap, **CLIPS[clip]}, id=f"cap {cap}, {clip}")
    for cap, clip in itertools.product(CAPS, CLIPS)
]
# Every cap with every clip, and either with every dtype; a GPU has the time for all three at once.
FORMS_AND_DTYPES = [
    pytest.param(*form.values, dtype, id=f"{form.id}, {dtype}")
    for (cap, clip), form in zip(
        itertools.product(range(len(CAPS)), range(len(CLIPS))), FORMS, strict=True
    )
    for index, dtype in enumerate(DTYPES)
    if not INTERPRETED or index == (cap + clip) % len(DTYPES)
]


def _score(form: dict[str, Any], width: int) -> dict[str, Any]:
    return {"scaling": 1 / math.sqrt(width), **form}


@pytest.mark.parametrize(("form", "dtype"), FORMS_AND_DTYPES)
def test_output_and_gradients_equal_float64(form, dtype, tiles, poisoned) -> None:
    tiles(32, 16)
    inputs = draw((1, 2, 1, 45, 32), dtype)
    score = _score(form, 32)
    output, _ = flash_attention(*inputs.tensors, **score)
    assert_as_good_as_plain(inputs.gradients(output), inputs, None, **score)


@pytest.mark.parametrize("shape", [(16, 32), (64, 16), (16, 64), (32, 32)], ids=str)
def test_tiles_change_nothing_but_rounding(shape, tiles) -> None:
    inputs = draw((1, 2, 2, 70, 16), torch.float32)
    score = _score({"softcap": 30.0, "clip_gamma": -0.03, "clip_zeta": 1.03}, 16)
    tiles(*shape)
    output, _ = flash_attention(*inputs.tensors, **score)
    assert_as_good_as_plain(inputs.gradients(output), inputs, None, **score)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 32, 33])
def test_any_length(length: int, tiles, poisoned) -> None:
    tiles(16, 16)
    inputs = draw((2, 1, 1, length, 16), torch.float32)
    score = _score({"softcap": 20.0, "clip_alpha": 1.0}, 16)
    output, _ = flash_attention(*inputs.tensors, **score)
    assert_as_good_as_plain(inputs.gradients(output), inputs, None, **score)


@pytest.mark.parametrize(
    ("dtype", "width"),
    [
        # On a GPU exact fp32 products of wide heads take minutes to compile.
        pytest.param(
            dtype, width, marks=[pytest.mark.wide_fp32] * (dtype == torch.float32 and width >= 64)
        )
        for dtype in (torch.float32, torch.float16)
        for width in (8, 24, 32, 64, 80, 96, 128, 256)
    ],
)
def test_any_head_width_with_its_own_tiles(dtype, width: int, poisoned) -> None:
    inputs = draw((1, 1, 1, 45, width), dtype, spread=1.0)
    cap, clip = {"softcap": 50.0}, CLIPS["paper"]
    # Clips have tiles of their own in half precision only.
    for form in (cap, clip) if dtype == torch.float16 else ({**cap, **clip},):
        score = _score(form, width)
        again = inputs.to(dtype)
        output, _ = flash_attention(*again.tensors, **score)
        assert_as_good_as_plain(again.gradients(output), inputs, None, **score)


@pytest.mark.parametrize("key_heads", [1, 2, 3, 6])
def test_query_heads_share_key_heads(key_heads: int, tiles) -> None:
    tiles(32, 32)
    inputs = draw((1, 6, key_heads, 40, 16), torch.float32)
    score = _score({"softcap": 10.0}, 16)
    output, _ = flash_attention(*inputs.tensors, **score)
    assert_as_good_as_plain(inputs.gradients(output), inputs, None, **score)


@pytest.mark.parametrize("form", [{}, {"softcap": 50.0}, {"softcap": 50.0, **CLIPS["paper"]}])
@pytest.mark.parametrize("magnitude", [1e2, 1e4])
def test_huge_logits_and_saturated_caps(form, magnitude: float, tiles) -> None:
    tiles(16, 16)
    inputs = draw((1, 1, 1, 40, 16), torch.float32, spread=math.sqrt(magnitude))
    score = _score(form, 16)
    output, _ = flash_attention(*inputs.tensors, **score)
    found = inputs.gradients(output)
    assert all(tensor.isfinite().all() for tensor in found)
    recomputed = recomputation(inputs, score["scaling"], form.get("softcap"))
    assert_as_good_as_plain(found, inputs, None, recomputed, **score)


def test_equal_keys_of_the_largest_logit_share_the_weight(tiles) -> None:
    """No row sum may overflow where every score sits at the largest cap without a maximum."""
    tiles(32, 32)
    length, width = 70, 16
    query = torch.full((1, 1, length, width), 100.0, device=DEVICE)
    value = torch.randn(1, 1, length, width, device=DEVICE)
    for sign in (1.0, -1.0):
        output, _ = flash_attention(query, sign * query, value, scaling=1.0, softcap=64.0)
        counts = torch.arange(1, length + 1, device=DEVICE)[:, None]
        torch.testing.assert_close(output[0, :, 0], value[0, 0].cumsum(0) / counts)


def test_dead_rows_are_zero_and_have_no_gradient(tiles, poisoned) -> None:
    """A uniform row over n keys is clipped away entirely when 1 / n < -gamma / (zeta - gamma)."""
    tiles(16, 16)
    length, clip = 90, CLIPS["paper"]
    threshold = 0.03 / 1.06
    query = torch.zeros(1, 1, length, 16, device=DEVICE, requires_grad=True)
    key, value = (torch.randn(1, 1, length, 16, device=DEVICE) for _ in range(2))
    output, statistics = flash_attention(
        query, key, value, scaling=1.0, return_statistics=True, **clip
    )
    dead = 1 / torch.arange(1, length + 1, device=DEVICE) < threshold
    assert dead.any() and not dead.all()
    assert (output[0, dead] == 0).all() and (output[0, ~dead] != 0).any(-1).all()
    output.sum().backward()
    assert (query.grad[0, 0, dead] == 0).all()
    assert statistics is not None
    assert torch.equal(statistics.rows_clipped[0, 0], dead)
    torch.testing.assert_close(statistics.clipped_rows, dead.float().mean()[None])


def test_a_first_row_is_saturated_and_passes_no_gradient_to_scores() -> None:
    inputs = draw((1, 1, 1, 3, 16), torch.float32)
    output, _ = flash_attention(*inputs.tensors, scaling=1.0, clip_gamma=-0.03, clip_zeta=1.03)
    output[0, 0].sum().backward()
    query, key, value = inputs.tensors
    torch.testing.assert_close(output[0, 0, 0], value[0, 0, 0])
    assert (query.grad == 0).all() and (key.grad == 0).all()
    assert (value.grad[0, 0, 0] == 1).all() and (value.grad[0, 0, 1:] == 0).all()


@pytest.mark.parametrize("where", ["query", "key"])
@pytest.mark.parametrize("form", [{}, {"softcap": 50.0}, CLIPS["paper"], CLIPS["alpha"]], ids=str)
def test_nan_shows_in_the_rows_that_saw_it(where: str, form, tiles) -> None:
    """A GPU's minimum and maximum drop NaN, and what is broken would look healthy."""
    tiles(16, 16)
    query, key, value = (x.detach() for x in draw((1, 1, 1, 40, 16), torch.float32).tensors)
    (query if where == "query" else key)[0, 0, 20, 3] = math.nan
    output, statistics = flash_attention(
        query, key, value, scaling=0.25, return_statistics=True, **form
    )
    broken = torch.zeros(40, dtype=torch.bool, device=DEVICE)
    broken[20 : 21 if where == "query" else 40] = True
    assert torch.equal(output[0, :, 0].isnan().all(-1), broken)
    assert torch.equal(output[0, :, 0].isnan().any(-1), broken)
    assert statistics is not None and statistics.rows_visible.all()
    assert statistics.entropy.isnan().all() and statistics.max_logit.isnan().all()


def test_one_hot_rows_have_no_gradient_without_an_upper_stretch(tiles) -> None:
    """u = zeta = 1 sits on the clip: kernels whose roundings disagree there would not cancel."""
    for shape in ((16, 16), (64, 16), (16, 64)):
        tiles(*shape)
        inputs = draw((1, 2, 2, 90, 16), torch.float32, spread=12.0)
        starts = torch.zeros(1, 90, dtype=torch.bool, device=DEVICE)
        starts[0, ::3] = True
        documents = build_documents(starts)
        score = _score({"clip_alpha": 0.5}, 16)
        output, _ = flash_attention(*inputs.tensors, documents=documents, **score)
        assert_as_good_as_plain(inputs.gradients(output), inputs, dense(documents), **score)


def test_causality_by_gradient(tiles) -> None:
    tiles(16, 16)
    inputs = draw((1, 1, 1, 40, 16), torch.float32)
    output, _ = flash_attention(*inputs.tensors, scaling=0.2, softcap=5.0)
    output[0, 20].sum().backward()
    for tensor in inputs.tensors[1:]:
        touched = (tensor.grad[0, 0] != 0).any(-1)
        assert touched[:21].all() and not touched[21:].any()


DOCUMENTS = {
    "packed": ([[], [13, 14, 50]], []),
    "left padding": ([[], []], [(0, slice(0, 37))]),
    "right padding": ([[], []], [(1, slice(60, 71))]),
    "holes": ([[], []], [(0, slice(20, 30)), (1, slice(0, 3))]),
    "packed with holes": ([[40], [7, 33]], [(0, slice(38, 45)), (1, slice(7, 33))]),
    "nothing visible": ([[], []], [(0, slice(0, 71))]),
}


def _documents(name: str, length: int = 71) -> torch.Tensor:
    starts = torch.zeros(2, length, dtype=torch.bool, device=DEVICE)
    visible = torch.ones(2, length, dtype=torch.bool, device=DEVICE)
    begins, hidden = DOCUMENTS[name]
    for row, places in enumerate(begins):
        starts[row, places] = True
    for row, places in hidden:
        visible[row, places] = False
    return build_documents(starts, visible)


@pytest.mark.parametrize("form", [{}, {"softcap": 20.0, **CLIPS["paper"]}, CLIPS["alpha"]], ids=str)
@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_and_padding_equal_the_dense_mask(name, form, tiles, poisoned) -> None:
    tiles(16, 32)
    # Heads share the documents of their row, which one name shows.
    heads = 2 if name == "packed with holes" else 1
    inputs = draw((2, heads, 1, 71, 16), torch.float32)
    documents = _documents(name)
    score = _score(form, 16)
    output, _ = flash_attention(*inputs.tensors, documents=documents, **score)
    blind = ~dense(documents).any(-1)[:, 0]
    assert (output[blind] == 0).all()
    assert_as_good_as_plain(inputs.gradients(output), inputs, dense(documents), **score)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_documents_tensor_says_what_its_mask_says(name: str) -> None:
    documents = _documents(name)
    mask = dense(documents)[:, 0]
    _, _, first_key, end_query, num_keys = documents[:, 0].unbind(1)
    place = torch.arange(71, device=DEVICE)
    assert torch.equal(mask.sum(-1), num_keys.long())
    # Bounds may be loose, but nothing visible lies beyond them.
    assert not (mask & (place[None, None, :] < first_key[:, :, None])).any()
    assert not (mask & (place[None, :, None] >= end_query[:, None, :])).any()


@pytest.mark.parametrize("form", [FORMS[0], FORMS[1], FORMS[5], FORMS[10], FORMS[16]])
@pytest.mark.parametrize("packed", [False, True])
def test_statistics_equal_float64(form, packed: bool, tiles, poisoned) -> None:
    tiles(32, 16)
    inputs = draw((2, 2, 1, 71, 16), torch.float32)
    documents = _documents("packed with holes") if packed else None
    score = _score(form, 16)
    mask = torch.ones(71, 71, dtype=torch.bool, device=DEVICE).tril()[None, None]
    mask = dense(documents) if documents is not None else mask
    arguments = {"documents": documents, **score}
    output, found = flash_attention(*inputs.tensors, **arguments, return_statistics=True)
    without, nothing = flash_attention(*inputs.tensors, **arguments)
    assert found is not None and nothing is None
    assert torch.equal(output, without)
    query, key, _ = inputs.to(torch.float64).tensors
    logits = query @ key.repeat_interleave(2, 1).mT / math.sqrt(16)
    rows = mask.any(-1).expand(2, 2, 71)
    cap = form.get("softcap")
    scores = logits if cap is None else cap * torch.tanh(logits / cap)
    probs = scores.masked_fill(~mask, -math.inf).softmax(-1).nan_to_num(0.0)
    entropy = -torch.xlogy(probs, probs).sum(-1)
    assert torch.equal(found.rows_visible, rows)
    top = logits.masked_fill(~mask, -math.inf).amax((0, 2, 3))
    torch.testing.assert_close(found.max_logit.double(), top, rtol=1e-5, atol=1e-5)
    mean = (entropy * rows).sum((0, 2)) / rows.sum((0, 2))
    torch.testing.assert_close(found.entropy.double(), mean, rtol=1e-4, atol=1e-4)
    gamma = form.get("clip_gamma") or 0.0
    if "clip_alpha" in form:
        gamma = -form["clip_alpha"] / mask.sum(-1, keepdim=True).clamp(min=1)
    dead = ((form.get("clip_zeta", 1.0) - gamma) * probs + gamma <= 0).all(-1) & rows
    share = dead.double().sum((0, 2)) / rows.sum((0, 2))
    torch.testing.assert_close(found.clipped_rows.double(), share)


def test_entropy_is_exact_at_huge_logits(tiles) -> None:
    """log Z - E[s] of logits around 1e4 would lose three digits of four."""
    tiles(16, 16)
    query = torch.ones(1, 1, 40, 16, device=DEVICE)
    _, found = flash_attention(query, query * 625, query, scaling=1.0, return_statistics=True)
    assert found is not None
    counts = torch.arange(1, 41, device=DEVICE, dtype=torch.float32)
    torch.testing.assert_close(found.rows_entropy[0, 0], counts.log())


def test_the_same_inputs_give_the_same_bits(tiles) -> None:
    tiles(32, 32)
    found = []
    for _ in range(2):
        inputs = draw((1, 2, 1, 50, 16), torch.float32)
        output, _ = flash_attention(*inputs.tensors, scaling=0.25, softcap=9.0)
        found.append(inputs.gradients(output))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_strided_views_of_one_projection(tiles) -> None:
    tiles(16, 16)
    inputs = draw((2, 2, 2, 20, 16), torch.float32)
    fused = torch.stack([tensor.transpose(1, 2) for tensor in inputs.tensors], 2).detach()
    fused.requires_grad_()
    views = [fused[:, :, index].transpose(1, 2) for index in range(3)]
    output, _ = flash_attention(*views, scaling=0.25)
    # A gradient whose last axis is not dense, and one that is expanded.
    output.mul(inputs.grad.mT.contiguous().mT).sum().backward()
    found = [output.detach(), *fused.grad.transpose(1, 3).unbind(2)]
    assert_as_good_as_plain(found, inputs, None, scaling=0.25)
    fused.grad = None
    flash_attention(*views, scaling=0.25)[0].sum().backward()
    assert fused.grad.isfinite().all() and fused.grad.any()


@pytest.mark.parametrize("clip", [{}, CLIPS["paper"]])
def test_what_is_kept_for_the_backward_is_linear_in_tokens(clip, tiles) -> None:
    tiles(32, 32)
    inputs = draw((1, 2, 2, 64, 16), torch.float32)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        output, _ = flash_attention(*inputs.tensors, scaling=0.25, softcap=9.0, **clip)
    shapes = sorted(tuple(tensor.shape) for tensor in kept)
    assert shapes == sorted([(1, 2, 64), (1, 64, 2, 16), *[(1, 2, 64, 16)] * 3])
    assert any(tensor.data_ptr() == output.data_ptr() for tensor in kept) is not bool(clip)


def test_no_tensor_of_queries_times_keys(tiles) -> None:
    tiles(64, 64)
    inputs = draw((1, 1, 1, 128, 16), torch.float32)
    documents = build_documents(torch.zeros(1, 128, dtype=torch.bool, device=DEVICE))
    with LargestTensor() as largest:
        output, statistics = flash_attention(
            *inputs.tensors,
            scaling=0.25,
            softcap=9.0,
            clip_gamma=-0.03,
            documents=documents,
            return_statistics=True,
        )
        inputs.gradients(output)
        assert statistics is not None and statistics.entropy.isfinite().all()
    assert 0 < largest.numel <= 128 * 16
    with LargestTensor() as largest:
        plain(inputs, None, scaling=0.25)
    assert largest.numel >= 128 * 128


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter's own problem")
def test_bfloat16_is_right_even_interpreted(tiles) -> None:
    tiles(32, 32)
    inputs = draw((1, 2, 2, 40, 16), torch.bfloat16)
    output, _ = flash_attention(*inputs.tensors, scaling=0.25, softcap=9.0)
    assert output.dtype == torch.bfloat16
    assert_as_good_as_plain(inputs.gradients(output), inputs, None, scaling=0.25, softcap=9.0)


def test_autocast_decides_the_dtype(tiles) -> None:
    """Queries leave RoPE in fp32 under autocast, values do not."""
    tiles(32, 32)
    query, key, value = draw((1, 1, 1, 20, 16), torch.float32).tensors
    with torch.autocast(DEVICE, torch.float16):
        output, _ = flash_attention(query, key, value.half(), scaling=0.25)
    assert output.dtype == torch.float16
    output.sum().backward()
    assert query.grad.dtype == torch.float32


def test_operators_keep_the_rules_of_torch_library(tiles) -> None:
    tiles(32, 32)
    query, key, value = (
        tensor.requires_grad_() for tensor in draw((1, 2, 1, 9, 16), torch.float32).tensors
    )
    for numbers in ((0.25, None, None, 1.0, None), (0.25, 9.0, -0.03, 1.03, None)):
        for unbiased, statistics in ((False, False), (False, True), (True, False)):
            arguments = (query, key, value, None, *numbers, False, unbiased, statistics)
            torch.library.opcheck(kernels.attention, arguments)
    documents = build_documents(torch.zeros(1, 9, dtype=torch.bool, device=DEVICE))
    torch.library.opcheck(
        kernels.attention,
        (query, key, value, documents, 0.25, None, None, 1.0, None, False, False, False),
    )


def test_compiled_code_sees_one_node(tiles) -> None:
    tiles(32, 32)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    def attend(query, key, value):
        return flash_attention(query, key, value, scaling=0.25, softcap=9.0)[0] * 2

    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    tensors = draw((1, 2, 1, 20, 16), torch.float32).tensors
    assert torch.equal(compiled(*tensors), attend(*tensors))
    names = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert sum("hf_stable.attention" in name for name in names) == 1 and len(graphs) == 1


def test_compiled_gradients_equal_eager_ones(tiles) -> None:
    tiles(32, 32)

    def attend(query, key, value):
        return flash_attention(query, key, value, scaling=0.25, clip_gamma=-0.01)[0]

    found = []
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        inputs = draw((1, 2, 1, 20, 16), torch.float32)
        found.append(inputs.gradients(function(*inputs.tensors)))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scaling": 0.0}, ["scaling", "0.0"]),
        ({"softcap": 0.0}, ["softcap", "0.0"]),
        ({"softcap": -100.0}, ["softcap", "-100.0"]),
        ({"softcap": 1e9}, ["fp32", "softcap 1000000000.0"]),
        ({"softcap": 1e-10}, ["fp32", "scaling 1.0"]),
        ({"clip_gamma": 0.1}, ["clip_gamma=0.1"]),
        ({"clip_zeta": 0.9}, ["clip_zeta=0.9"]),
        ({"clip_alpha": -1.0}, ["clip_alpha=-1.0"]),
        ({"query": torch.zeros(1, 2, 5, 512)}, ["width", "512"]),
        ({"query": torch.zeros(2, 2, 5, 16)}, ["batch", "[2, 2, 5, 16]"]),
        ({"query": torch.zeros(1, 3, 5, 16)}, ["multiple of 2", "3"]),
        ({"query": torch.zeros(1, 2, 4, 16)}, ["length", "[1, 2, 4, 16]"]),
        ({"value": torch.zeros(1, 2, 5, 8)}, ["values", "8"]),
        ({"query": torch.zeros(1, 2, 5, 16, dtype=torch.float64)}, ["fp32", "float64"]),
        ({"query": torch.zeros(1, 2, 5, 16, dtype=torch.float16)}, ["alike", "float16"]),
        ({"documents": torch.zeros(1, 1, 5, 4, dtype=torch.int32)}, ["documents", "[1, 1, 5, 5]"]),
        ({"documents": torch.zeros(1, 1, 5, 5)}, ["documents", "int32"]),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(change: dict[str, Any], words: list[str]) -> None:
    arguments: dict[str, Any] = {
        name: torch.zeros(1, 2, 5, 16) for name in ("query", "key", "value")
    }
    arguments = {**arguments, "scaling": 1.0, **change}
    arguments = {
        name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }
    with pytest.raises(ValueError, match="stable_triton") as caught:
        flash_attention(**arguments)
    assert all(word in str(caught.value) for word in words)


def test_a_head_wider_than_the_kernels_is_refused() -> None:
    wide = torch.zeros(1, 1, 4, 257, device=DEVICE)
    with pytest.raises(ValueError, match="head_dim up to 256, found 257"):
        flash_attention(wide, wide, wide, scaling=1.0)


@triton.jit
def _tanh_kernel(x, y, terms, size: tl.constexpr):
    o = tl.program_id(0) * size + tl.arange(0, size)
    tl.store(y + o, tanh(tl.load(x + o), terms))


@pytest.mark.parametrize("scale", [1.0, 0.0025, 1e-7, 1e7])
@pytest.mark.parametrize("factor", [1.0, 72.0])
def test_tanh_is_exact_to_fp32_under_all_scales(scale: float, factor: float) -> None:
    magnitudes = torch.logspace(-6, 3, 4096, device=DEVICE) / scale
    x = torch.cat((magnitudes, -magnitudes))
    y = torch.empty_like(x)
    _tanh_kernel[(8,)](x, y, tanh_terms(scale, factor), size=1024)
    exact = factor * (scale * x.double()).tanh()
    assert ((y.double() - exact).abs() / exact.abs()).max() < 5e-7
    assert y.abs().max() <= factor * (1 + torch.finfo(torch.float32).eps)

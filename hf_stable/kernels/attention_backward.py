"""Backward kernels of causal attention, for every form that `attention_forward` knows.

With a = zeta - gamma and A the keys whose probability is stretched but not clipped
(plain attention: a = 1, every key in A, w = o):

    dC_ij = dO_i . v_j               dP_ij = a [j in A] dC_ij
    D_i   = sum_j p_ij dP_ij = dO_i . w_i
    dS_ij = p_ij (dP_ij - D_i) (1 - t_ij^2)
    dQ_i  = scaling sum_j dS_ij k_j,  dK_j = scaling sum_i dS_ij q_i,  dV_j = sum_i c_ij dO_i

The usual D = dO . o would be wrong under a clip: o also holds gamma and what is saturated. Every
visible key has a gradient through the softmax, clipped ones too; but the two products with dO are
skipped in tiles without a key above the clip. Each kernel recomputes the scores once. No
atomics: the same inputs give the same bits.
"""

import triton
import triton.language as tl

from .attention_forward import (
    END_QUERY,
    KEY_DOCUMENT,
    QUERY_DOCUMENT,
    has_slope,
    is_visible,
    key_range,
    load_rows,
    row_gamma,
    store_rows,
)
from .tiles import exp2, hardware_tanh, tanh


@triton.jit
def _probabilities(
    b_qk, b_log_z, tanh_scale, tanh_terms, score_scale, CAP: tl.constexpr, FAST_TANH: tl.constexpr
):
    """p of a tile, and the derivative 1 - t^2 of the cap s = cap * t (1 without)."""
    if CAP:
        b_t = hardware_tanh(b_qk * tanh_scale) if FAST_TANH else tanh(b_qk, tanh_terms)
        b_p, b_slope = exp2(b_t * score_scale - b_log_z), 1.0 - b_t * b_t
    else:
        b_p, b_slope = exp2(b_qk * score_scale - b_log_z), 1.0
    return b_p, b_slope


@triton.jit
def query_kernel(
    q, k, v, documents, w, lse, grad_o, delta, grad_q,
    q_batch, q_head, q_stride, k_batch, k_head, k_stride, v_batch, v_head, v_stride,
    g_batch, g_stride, g_head,
    H, S, scaling, tanh_scale, tanh_terms, score_scale, gamma, zeta, alpha,
    GROUPS: tl.constexpr, CAP: tl.constexpr, CLIP: tl.constexpr, DOCUMENTS: tl.constexpr,
    FAST_TANH: tl.constexpr,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries of one head, and its D, which the other kernel reads.

    Args:
        w: (B, S, H, D), the output where nothing is clipped. grad_o: (B, S, H, D), strided.
        delta: (B, H, S) fp32. grad_q: (B, S, H, D).
    """
    num_tiles = tl.cdiv(S, M)
    i_m = num_tiles - 1 - tl.program_id(0) % num_tiles
    i_bh = tl.program_id(0) // num_tiles
    i_b, i_h = i_bh // H, i_bh % H
    p_q = q + tl.cast(i_b, tl.int64) * q_batch + tl.cast(i_h, tl.int64) * q_head
    p_k = k + tl.cast(i_b, tl.int64) * k_batch + tl.cast(i_h // GROUPS, tl.int64) * k_head
    p_v = v + tl.cast(i_b, tl.int64) * v_batch + tl.cast(i_h // GROUPS, tl.int64) * v_head
    p_g = grad_o + tl.cast(i_b, tl.int64) * g_batch + tl.cast(i_h, tl.int64) * g_head
    p_documents = documents
    if DOCUMENTS:
        p_documents = documents + tl.cast(i_b, tl.int64) * 5 * S
    own = (tl.cast(i_b, tl.int64) * S * H + i_h) * D
    start = i_m * M
    o_m = start + tl.arange(0, M)
    p_row = tl.cast(i_bh, tl.int64) * S + o_m
    b_document = o_m
    if DOCUMENTS:
        b_document = tl.load(p_documents + QUERY_DOCUMENT * S + o_m, mask=o_m < S, other=-2)
    b_q = load_rows(p_q, start, q_stride, S, D, M, COLS)
    b_g = load_rows(p_g, start, g_stride, S, D, M, COLS)
    b_w = load_rows(w + own, start, H * D, S, D, M, COLS)
    b_delta = tl.sum(b_g.to(tl.float32) * b_w.to(tl.float32), axis=1)
    tl.store(delta + p_row, b_delta, mask=o_m < S)
    b_log_z = tl.load(lse + p_row, mask=o_m < S, other=float("inf"))
    b_gamma = row_gamma(o_m, p_documents, S, gamma, alpha, DOCUMENTS)
    b_acc = tl.zeros((M, COLS), tl.float32)
    first, middle, last = key_range(i_m, p_documents, S, M, N, DOCUMENTS)
    for masked in tl.static_range(2):
        for n in range(middle if masked else first, last if masked else middle, N):
            b_k = load_rows(p_k, n, k_stride, S, D, N, COLS)
            b_qk = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
            b_p, b_slope = _probabilities(
                b_qk, b_log_z[:, None], tanh_scale, tanh_terms, score_scale, CAP, FAST_TANH
            )
            if masked:
                o_n = n + tl.arange(0, N)
                b_seen = is_visible(o_m, o_n, b_document, p_documents, S, DOCUMENTS)
                b_p = tl.where(b_seen, b_p, 0.0)
            if CLIP:
                b_stretch = (zeta - b_gamma)[:, None]
                b_u = b_p * b_stretch + b_gamma[:, None]
                b_dp = tl.zeros((M, N), tl.float32)
                if tl.max(b_u) > 0.0:
                    b_v = load_rows(p_v, n, v_stride, S, D, N, COLS)
                    b_dp = tl.dot(b_g, tl.trans(b_v), input_precision="ieee")
                    b_dp = tl.where(has_slope(b_u, zeta), b_dp * b_stretch, 0.0)
            else:
                b_v = load_rows(p_v, n, v_stride, S, D, N, COLS)
                b_dp = tl.dot(b_g, tl.trans(b_v), input_precision="ieee")
            b_ds = b_p * (b_dp - b_delta[:, None]) * b_slope
            b_acc = tl.dot(b_ds.to(b_k.dtype), b_k, b_acc, input_precision="ieee")
    store_rows(grad_q + own, b_acc * scaling, start, H * D, S, D, M, COLS)


@triton.jit
def query_range(i_n, p_documents, S, M: tl.constexpr, N: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Return the first query that sees a tile of keys, the first whole tile, and the end."""
    start = i_n * N
    first = start // M * M
    if DOCUMENTS:
        o_n = start + tl.arange(0, N)
        b_end = tl.load(p_documents + END_QUERY * S + o_n, mask=o_n < S, other=0)
        end = tl.max(b_end, axis=0)
        return first, end, end
    return first, tl.minimum(tl.cdiv(start + N - 1, M) * M, S), S


@triton.jit
def _add_query_tile(
    b_dk, b_dv, b_k, b_v, b_key_document,
    p_q, p_g, p_lse, p_delta, p_documents, q_stride, g_stride, start, i_n, S,
    tanh_scale, tanh_terms, score_scale, gamma, zeta, alpha,
    CAP: tl.constexpr, CLIP: tl.constexpr, MASKED: tl.constexpr, DOCUMENTS: tl.constexpr,
    FAST_TANH: tl.constexpr,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Add one tile of queries to dK (without the scaling) and dV of one tile of keys.

    Tiles are (N, M), keys along rows, so that no product needs a transposed accumulator.
    """
    o_m = start + tl.arange(0, M)
    b_q = load_rows(p_q, start, q_stride, S, D, M, COLS)
    b_g = load_rows(p_g, start, g_stride, S, D, M, COLS)
    b_log_z = tl.load(p_lse + o_m, mask=o_m < S, other=float("inf"))
    b_delta = tl.load(p_delta + o_m, mask=o_m < S, other=0.0)
    b_kq = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
    if not CLIP:
        # Before the softmax, so that the tensor cores may work while it is computed.
        b_dp = tl.dot(b_v, tl.trans(b_g), input_precision="ieee")
    b_p, b_slope = _probabilities(
        b_kq, b_log_z[None, :], tanh_scale, tanh_terms, score_scale, CAP, FAST_TANH
    )
    if MASKED:
        b_seen = (i_n * N + tl.arange(0, N))[:, None] <= o_m[None, :]
        if DOCUMENTS:
            p_queries = p_documents + QUERY_DOCUMENT * S + o_m
            b_queries = tl.load(p_queries, mask=o_m < S, other=-2)
            b_seen = b_seen & (b_key_document[:, None] == b_queries[None, :])
        b_p = tl.where(b_seen, b_p, 0.0)
    if CLIP:
        b_gamma = row_gamma(o_m, p_documents, S, gamma, alpha, DOCUMENTS)
        b_stretch = (zeta - b_gamma)[None, :]
        b_u = b_p * b_stretch + b_gamma[None, :]
        b_dp = tl.zeros((N, M), tl.float32)
        if tl.max(b_u) > 0.0:
            b_c = tl.minimum(tl.maximum(b_u, 0.0), 1.0)
            b_dv = tl.dot(b_c.to(b_g.dtype), b_g, b_dv, input_precision="ieee")
            b_dp = tl.dot(b_v, tl.trans(b_g), input_precision="ieee")
            b_dp = tl.where(has_slope(b_u, zeta), b_dp * b_stretch, 0.0)
    else:
        b_dv = tl.dot(b_p.to(b_g.dtype), b_g, b_dv, input_precision="ieee")
    b_ds = b_p * (b_dp - b_delta[None, :]) * b_slope
    b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    return b_dk, b_dv


@triton.jit
def key_value_kernel(
    q, k, v, documents, lse, delta, grad_o, grad_k, grad_v,
    q_batch, q_head, q_stride, k_batch, k_head, k_stride, v_batch, v_head, v_stride,
    g_batch, g_stride, g_head,
    H, S, scaling, tanh_scale, tanh_terms, score_scale, gamma, zeta, alpha,
    GROUPS: tl.constexpr, CAP: tl.constexpr, CLIP: tl.constexpr, DOCUMENTS: tl.constexpr,
    FAST_TANH: tl.constexpr,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys of one key head, over all query heads that share it.

    Args:
        grad_k, grad_v: (B, S, G, D).
    """
    num_tiles, num_heads = tl.cdiv(S, N), H // GROUPS
    i_n, i_bg = tl.program_id(0) % num_tiles, tl.program_id(0) // num_tiles
    i_b, i_g = i_bg // num_heads, i_bg % num_heads
    p_k = k + tl.cast(i_b, tl.int64) * k_batch + tl.cast(i_g, tl.int64) * k_head
    p_v = v + tl.cast(i_b, tl.int64) * v_batch + tl.cast(i_g, tl.int64) * v_head
    p_documents = documents
    if DOCUMENTS:
        p_documents = documents + tl.cast(i_b, tl.int64) * 5 * S
    o_n = i_n * N + tl.arange(0, N)
    b_key_document = o_n
    if DOCUMENTS:
        b_key_document = tl.load(p_documents + KEY_DOCUMENT * S + o_n, mask=o_n < S, other=-1)
    b_k = load_rows(p_k, i_n * N, k_stride, S, D, N, COLS)
    b_v = load_rows(p_v, i_n * N, v_stride, S, D, N, COLS)
    b_dk = tl.zeros((N, COLS), tl.float32)
    b_dv = tl.zeros((N, COLS), tl.float32)
    first, middle, last = query_range(i_n, p_documents, S, M, N, DOCUMENTS)
    for i_group in range(GROUPS):
        i_h = i_g * GROUPS + i_group
        p_q = q + tl.cast(i_b, tl.int64) * q_batch + tl.cast(i_h, tl.int64) * q_head
        p_g = grad_o + tl.cast(i_b, tl.int64) * g_batch + tl.cast(i_h, tl.int64) * g_head
        row = (tl.cast(i_b, tl.int64) * H + i_h) * S
        for masked in tl.static_range(2):
            for m in range(first if masked else middle, middle if masked else last, M):
                b_dk, b_dv = _add_query_tile(
                    b_dk, b_dv, b_k, b_v, b_key_document,
                    p_q, p_g, lse + row, delta + row, p_documents, q_stride, g_stride, m, i_n, S,
                    tanh_scale, tanh_terms, score_scale, gamma, zeta, alpha,
                    CAP, CLIP, masked, DOCUMENTS, FAST_TANH, D, M, N, COLS,
                )  # fmt: skip
    own = (tl.cast(i_b, tl.int64) * S * num_heads + i_g) * D
    store_rows(grad_k + own, b_dk * scaling, i_n * N, num_heads * D, S, D, N, COLS)
    store_rows(grad_v + own, b_dv, i_n * N, num_heads * D, S, D, N, COLS)

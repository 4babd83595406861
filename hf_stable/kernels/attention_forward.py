"""Forward kernels of causal attention: plain, tempered, tanh-capped, clipped, and all together.

    s = cap * tanh(scaling * q.k / cap)         (Gemma 2; Rybakov et al. 2024, soft_cap)
    p = softmax(s over the visible keys)        (Dao 2023, FlashAttention-2, section 3.1)
    c = clip((zeta - gamma) * p + gamma, 0, 1)  (Bondarenko et al. 2023, eq. 4)
    o = c v

Scores live in tiles only, in base 2, where exp is one instruction. A cap of at most 64 bounds
exp(s) by itself, so that no running maximum is needed (`STATIC_MAX`). Clipping needs log Z before
the first value is weighted, hence two sweeps over the keys; the second skips every tile without a
key above the clip, since p must exceed -gamma / (zeta - gamma): at (-0.03, 1.03) at most 35 keys
of a row can. `w = sum of the unclipped (zeta - gamma) p v` is kept for the backward.

Weights are rounded to the values' dtype before they multiply them. With a static maximum the
largest weight is not 1, and its rounding would scale the output, which is therefore divided by the
sum of the rounded weights. With a running maximum this is an option (`UNBIASED`): scores less than
2^-9 below the maximum are all rounded up to 1, which biases the output, and so does rounding the
output where the mean of two values lies halfway between two numbers. Training can diverge by the
error of D, the backward's row sums (Qiu and Yao 2025, arXiv 2510.04212). UNBIASED keeps the output
in fp32 for them, as `w`. The paper's own cure, another maximum for rows with scores close to it,
is for sums in bf16; where sums are fp32 it replaces the bias by noise that is larger.

Names: i_ index, o_ offsets, p_ pointer, b_ block in registers; M queries, N keys, D head width.
"""

import triton
import triton.language as tl

from .tiles import exp2, hardware_tanh, tanh

# Where the running maximum starts: below every score, and finite, so that no difference is NaN.
LOWEST = tl.constexpr(-1e30)
LN_2 = tl.constexpr(0.6931471805599453)
# Columns of the narrowest right factor that tensor cores of every kind take.
ONES = tl.constexpr(16)

# Rows of the documents tensor (see documents.py).
KEY_DOCUMENT = tl.constexpr(0)
QUERY_DOCUMENT = tl.constexpr(1)
FIRST_KEY = tl.constexpr(2)
END_QUERY = tl.constexpr(3)
NUM_KEYS = tl.constexpr(4)


@triton.jit
def load_rows(p, start, stride, num_rows, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(ROWS, COLS) from row `start` on; zero beyond the last row and beyond D columns."""
    o_r, o_d = tl.arange(0, ROWS), tl.arange(0, COLS)
    # The 64-bit part is a scalar; offsets inside a tile fit 32 bits.
    p_tile = p + tl.cast(start, tl.int64) * stride + (o_r[:, None] * stride + o_d[None, :])
    mask = (start + o_r < num_rows)[:, None]
    if D != COLS:
        mask = mask & (o_d < D)[None, :]
    return tl.load(p_tile, mask=mask, other=0.0)


@triton.jit
def store_rows(
    p, b, start, stride, num_rows, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Store (ROWS, COLS) from row `start` on, in the pointer's dtype."""
    o_r, o_d = tl.arange(0, ROWS), tl.arange(0, COLS)
    p_tile = p + tl.cast(start, tl.int64) * stride + (o_r[:, None] * stride + o_d[None, :])
    mask = (start + o_r < num_rows)[:, None] & (o_d < D)[None, :]
    tl.store(p_tile, b.to(p.dtype.element_ty), mask=mask)


@triton.jit
def _capped_scores(b_qk, tanh_scale, tanh_terms, score_scale, FAST_TANH: tl.constexpr):
    """Capped scores in base 2; the terms of the exact tanh hold both scales."""
    if FAST_TANH:
        return hardware_tanh(b_qk * tanh_scale) * score_scale
    return tanh(b_qk, tanh_terms)


@triton.jit
def is_visible(o_m, o_n, b_document, p_documents, S, DOCUMENTS: tl.constexpr):
    """(M, N): keys up to the query's own place and, with DOCUMENTS, of its document only."""
    b_visible = o_n[None, :] <= o_m[:, None]
    if DOCUMENTS:
        b_keys = tl.load(p_documents + KEY_DOCUMENT * S + o_n, mask=o_n < S, other=-1)
        b_visible = b_visible & (b_document[:, None] == b_keys[None, :])
    return b_visible


@triton.jit
def row_gamma(o_m, p_documents, S, gamma, alpha, DOCUMENTS: tl.constexpr):
    """Lower stretch of each row: gamma, less alpha over the number of keys that the row may see."""
    b_keys = (o_m + 1).to(tl.float32)
    if DOCUMENTS:
        b_keys = tl.load(p_documents + NUM_KEYS * S + o_m, mask=o_m < S, other=1).to(tl.float32)
    return gamma - alpha / tl.maximum(b_keys, 1.0)


@triton.jit
def has_slope(b_u, zeta):
    """Return a mask of stretched probabilities that are not clipped.

    u is at most zeta. Rounding must not decide u = zeta = 1: each kernel would do it differently.
    """
    return (b_u >= 0.0) & ((b_u <= 1.0) | (zeta <= 1.0))


@triton.jit
def key_range(i_m, p_documents, S, M: tl.constexpr, N: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Keys of a tile of queries: the first, the first that some query may not see, and the end."""
    start = i_m * M
    end = tl.minimum(start + M, S)
    if DOCUMENTS:
        o_m = start + tl.arange(0, M)
        b_first = tl.load(p_documents + FIRST_KEY * S + o_m, mask=o_m < S, other=S)
        first = tl.min(b_first, axis=0) // N * N
        return first, first, end
    return 0, start // N * N, end


@triton.jit
def _softmax_step(
    b_s, unit, b_max, b_sum, b_surprise,
    MASKED: tl.constexpr, STATIC_MAX: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """Take one tile of scores into the running sums.

    Scores and their maximum are multiplied by `unit` > 0 inside the exponential only: where it is
    not 1, that is one instruction with the difference.

    Returns the tile's weights, relative to the maximum, and the factor for what was summed before.
    `b_surprise` is the sum of weight * unit * (score - maximum), from which the entropy follows.
    """
    b_new = b_max
    if not STATIC_MAX:
        b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
    b_fall = (b_max - b_new) * unit
    b_decay = exp2(b_fall)
    b_lag = b_s * unit - (b_new * unit)[:, None]
    b_p = exp2(b_lag)
    if STATS:
        b_surprise = b_decay * (b_surprise + b_fall * b_sum)
        if MASKED:
            # A hidden key weighs nothing, but 0 * -inf would be NaN.
            b_lag = tl.where(b_p > 0.0, b_lag, 0.0)
        b_surprise += tl.sum(b_p * b_lag, axis=1)
    b_sum = b_sum * b_decay + tl.sum(b_p, axis=1)
    return b_p, b_decay, b_new, b_sum, b_surprise


@triton.jit
def _add_weights(b_weight, b_p, b_decay, STATIC_MAX: tl.constexpr, SUM_ROUNDED: tl.constexpr):
    """Add the sums of a tile's rounded weights to every column, on the tensor cores.

    A conversion and an addition of each weight would take ten times the instructions.
    """
    if SUM_ROUNDED:
        if not STATIC_MAX:
            b_weight = b_weight * b_decay[:, None]
        b_ones = tl.full((b_p.shape[1], ONES), 1.0, tl.float32).to(b_p.dtype)
        b_weight = tl.dot(b_p, b_ones, b_weight)
    return b_weight


@triton.jit
def _normalize(b_acc, b_sum, b_weight, b_empty, SUM_ROUNDED: tl.constexpr):
    """Divide by the sum of the weights that multiplied the values."""
    if SUM_ROUNDED:
        # The columns are equal, and their sum is exact.
        b_sum = tl.where(b_empty, 1.0, tl.sum(b_weight, axis=1) / ONES)
    return b_acc / b_sum[:, None]


@triton.jit
def _store_statistics(
    rows, b_top, b_max, b_log_z, b_sum, b_surprise, b_alive, num_tiles, o_m, p_row, S, scaling,
    CAP: tl.constexpr,
):  # fmt: skip
    """Store the three rows of statistics of a tile of queries."""
    num_rows = tl.cast(tl.num_programs(0) // num_tiles, tl.int64) * S
    # Without a cap the running maximum is the largest q.k.
    b_logit = (b_top if CAP else b_max) * scaling
    b_logit = tl.where(b_log_z == b_log_z, b_logit, b_log_z)
    b_entropy = LN_2 * (tl.log2(b_sum) - b_surprise / b_sum)
    tl.store(rows + p_row, b_logit, mask=o_m < S)
    tl.store(rows + num_rows + p_row, b_entropy, mask=o_m < S)
    tl.store(rows + 2 * num_rows + p_row, b_alive, mask=o_m < S)


@triton.jit
def _sweep(
    b_acc, b_max, b_sum, b_weight, b_surprise, b_top,
    b_q, b_document, p_k, p_v, p_documents, k_stride, v_stride, i_m, first, last, S,
    tanh_scale, tanh_terms, score_scale,
    CAP: tl.constexpr, WEIGH: tl.constexpr, MASKED: tl.constexpr, DOCUMENTS: tl.constexpr,
    STATIC_MAX: tl.constexpr, SUM_ROUNDED: tl.constexpr, STATS: tl.constexpr,
    FAST_TANH: tl.constexpr,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Softmax sums over keys [first, last), weighing the values too unless a second sweep does.

    `b_max` is in the unit of what the exponential is given: of q.k itself without a cap.
    `b_weight` is (M, ONES), the sums of the rounded weights in each column, if SUM_ROUNDED.
    """
    unit = 1.0 if CAP else score_scale
    o_m = i_m * M + tl.arange(0, M)
    for n in range(first, last, N):
        b_k = load_rows(p_k, n, k_stride, S, D, N, COLS)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        if MASKED:
            b_seen = is_visible(o_m, n + tl.arange(0, N), b_document, p_documents, S, DOCUMENTS)
        if STATS and CAP:
            b_seen_qk = tl.where(b_seen, b_s, LOWEST) if MASKED else b_s
            b_top = tl.maximum(b_top, tl.max(b_seen_qk, axis=1))
        if CAP:
            b_s = _capped_scores(b_s, tanh_scale, tanh_terms, score_scale, FAST_TANH)
        if MASKED:
            b_s = tl.where(b_seen, b_s, float("-inf"))
        b_p, b_decay, b_max, b_sum, b_surprise = _softmax_step(
            b_s, unit, b_max, b_sum, b_surprise, MASKED, STATIC_MAX, STATS
        )
        if WEIGH:
            b_v = load_rows(p_v, n, v_stride, S, D, N, COLS)
            if not STATIC_MAX:
                b_acc = b_acc * b_decay[:, None]
            b_p = b_p.to(b_v.dtype)
            b_weight = _add_weights(b_weight, b_p, b_decay, STATIC_MAX, SUM_ROUNDED)
            b_acc = tl.dot(b_p, b_v, b_acc, input_precision="ieee")
    return b_acc, b_max, b_sum, b_weight, b_surprise, b_top


@triton.jit
def _clip_sweep(
    b_acc, b_active, b_alive, b_log_z, b_gamma, zeta,
    b_q, b_document, p_k, p_v, p_documents, k_stride, v_stride, i_m, first, last, S,
    tanh_scale, tanh_terms, score_scale,
    CAP: tl.constexpr, MASKED: tl.constexpr, DOCUMENTS: tl.constexpr, FAST_TANH: tl.constexpr,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Weigh the values of keys [first, last) by clipped probabilities, and by their slopes."""
    o_m = i_m * M + tl.arange(0, M)
    for n in range(first, last, N):
        b_k = load_rows(p_k, n, k_stride, S, D, N, COLS)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        if CAP:
            b_s = _capped_scores(b_s, tanh_scale, tanh_terms, score_scale, FAST_TANH)
        else:
            b_s = b_s * score_scale
        b_p = exp2(b_s - b_log_z[:, None])
        if MASKED:
            b_seen = is_visible(o_m, n + tl.arange(0, N), b_document, p_documents, S, DOCUMENTS)
            b_p = tl.where(b_seen, b_p, 0.0)
        b_rise = b_p * (zeta - b_gamma)[:, None]
        b_u = b_rise + b_gamma[:, None]
        b_highest = tl.max(b_u, axis=1)
        b_alive = tl.maximum(b_alive, b_highest)
        if tl.max(b_u) > 0.0:
            b_v = load_rows(p_v, n, v_stride, S, D, N, COLS)
            b_c = tl.minimum(tl.maximum(b_u, 0.0), 1.0)
            b_acc = tl.dot(b_c.to(b_v.dtype), b_v, b_acc, input_precision="ieee")
            b_rise = tl.where(has_slope(b_u, zeta), b_rise, 0.0)
            b_active = tl.dot(b_rise.to(b_v.dtype), b_v, b_active, input_precision="ieee")
    return b_acc, b_active, b_alive


@triton.jit
def forward_kernel(
    q, k, v, documents, o, w, lse, rows,
    q_batch, q_head, q_stride, k_batch, k_head, k_stride, v_batch, v_head, v_stride,
    H, S, scaling, tanh_scale, tanh_terms, score_scale, gamma, zeta, alpha,
    GROUPS: tl.constexpr, CAP: tl.constexpr, CLIP: tl.constexpr, DOCUMENTS: tl.constexpr,
    STATIC_MAX: tl.constexpr, UNBIASED: tl.constexpr, STATS: tl.constexpr, FAST_TANH: tl.constexpr,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Output, log2 Z and, on request, statistics of one tile of queries of one head.

    Args:
        q, k, v: (B, H or G, S, D). o, w: (B, S, H, D); w when clipping, or UNBIASED.
            UNBIASED makes it fp32, and without a clip the output before rounding.
        documents: (B, 5, S) int32, when DOCUMENTS. lse: (B, H, S) fp32, inf for a row without keys.
        rows: (3, B, H, S) fp32: largest logit before the cap, entropy in nats, highest u.
    """
    # The longest rows first: the last wave of programs is then the shortest one.
    num_tiles = tl.cdiv(S, M)
    i_m = num_tiles - 1 - tl.program_id(0) % num_tiles
    i_bh = tl.program_id(0) // num_tiles
    i_b, i_h = i_bh // H, i_bh % H
    p_k = k + tl.cast(i_b, tl.int64) * k_batch + tl.cast(i_h // GROUPS, tl.int64) * k_head
    p_v = v + tl.cast(i_b, tl.int64) * v_batch + tl.cast(i_h // GROUPS, tl.int64) * v_head
    p_q = q + tl.cast(i_b, tl.int64) * q_batch + tl.cast(i_h, tl.int64) * q_head
    p_documents = documents
    if DOCUMENTS:
        p_documents = documents + tl.cast(i_b, tl.int64) * 5 * S
    o_m = i_m * M + tl.arange(0, M)
    b_document = o_m
    if DOCUMENTS:
        b_document = tl.load(p_documents + QUERY_DOCUMENT * S + o_m, mask=o_m < S, other=-2)
    b_q = load_rows(p_q, i_m * M, q_stride, S, D, M, COLS)
    b_acc = tl.zeros((M, COLS), tl.float32)
    b_max = tl.full((M,), 0.0 if STATIC_MAX else LOWEST, tl.float32)
    b_top = tl.full((M,), LOWEST, tl.float32)
    b_sum = tl.zeros((M,), tl.float32)
    b_weight = tl.zeros((M, ONES), tl.float32)
    rounded: tl.constexpr = (STATIC_MAX or UNBIASED) and q.dtype.element_ty != tl.float32
    b_surprise = tl.zeros((M,), tl.float32)
    first, middle, last = key_range(i_m, p_documents, S, M, N, DOCUMENTS)
    for masked in tl.static_range(2):
        b_acc, b_max, b_sum, b_weight, b_surprise, b_top = _sweep(
            b_acc, b_max, b_sum, b_weight, b_surprise, b_top,
            b_q, b_document, p_k, p_v, p_documents, k_stride, v_stride, i_m,
            middle if masked else first, last if masked else middle, S,
            tanh_scale, tanh_terms, score_scale,
            CAP, not CLIP, masked, DOCUMENTS, STATIC_MAX, rounded, STATS, FAST_TANH, D, M, N, COLS,
        )  # fmt: skip
    b_empty = b_sum == 0.0
    b_sum = tl.where(b_empty, 1.0, b_sum)
    unit = 1.0 if CAP else score_scale
    b_log_z = tl.where(b_empty, float("inf"), b_max * unit + tl.log2(b_sum))
    own = (tl.cast(i_b, tl.int64) * S * H + i_h) * D
    p_row = tl.cast(i_bh, tl.int64) * S + o_m
    b_alive = b_sum
    if CLIP:
        b_gamma = row_gamma(o_m, p_documents, S, gamma, alpha, DOCUMENTS)
        b_active = tl.zeros((M, COLS), tl.float32)
        b_alive = tl.full((M,), LOWEST, tl.float32)
        for masked in tl.static_range(2):
            b_acc, b_active, b_alive = _clip_sweep(
                b_acc, b_active, b_alive, b_log_z, b_gamma, zeta,
                b_q, b_document, p_k, p_v, p_documents, k_stride, v_stride, i_m,
                middle if masked else first, last if masked else middle, S,
                tanh_scale, tanh_terms, score_scale,
                CAP, masked, DOCUMENTS, FAST_TANH, D, M, N, COLS,
            )  # fmt: skip
        # Comparisons with NaN have skipped its tiles.
        b_acc = tl.where(b_log_z[:, None] == b_log_z[:, None], b_acc, b_log_z[:, None])
        store_rows(w + own, b_active, i_m * M, H * D, S, D, M, COLS)
    else:
        b_acc = _normalize(b_acc, b_sum, b_weight, b_empty, rounded)
        if UNBIASED:
            store_rows(w + own, b_acc, i_m * M, H * D, S, D, M, COLS)
    store_rows(o + own, b_acc, i_m * M, H * D, S, D, M, COLS)
    tl.store(lse + p_row, b_log_z, mask=o_m < S)
    if STATS:
        _store_statistics(
            rows, b_top, b_max, b_log_z, b_sum, b_surprise, b_alive, num_tiles, o_m, p_row, S,
            scaling, CAP,
        )  # fmt: skip

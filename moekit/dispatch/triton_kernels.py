"""Triton kernels: products over rows sorted by expert, with what lies around them fused in.

One vocabulary for all: ``left`` holds rows (R, K) or tokens (N, K), ``right`` the experts' weights
(E, C, K) of which expert e maps a row to C columns. A *tile* is up to BLOCK_R rows of one expert.
Tiles are found inside the kernels from the rows of each expert, so that nothing is read back to
the host; there are as many programs as there can be tiles at most, and those without one return.

Row numbers that index memory are 64 bits wide: R times a width passes 2³¹ in long batches.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def find_tile(tile, count_E, EXPERTS: tl.constexpr, EXPERTS_2: tl.constexpr, BLOCK_R: tl.constexpr):
    """The expert of a tile (EXPERTS if there is none), its first row, and the expert's end."""
    expert_E = tl.arange(0, EXPERTS_2)
    rows_E = tl.load(count_E + expert_E, mask=expert_E < EXPERTS, other=0).to(tl.int32)
    tiles_E = (rows_E + BLOCK_R - 1) // BLOCK_R
    done_E = (tl.cumsum(tiles_E, 0) <= tile) & (expert_E < EXPERTS)
    expert = tl.sum(done_E.to(tl.int32), 0)
    start = tl.sum(tl.where(done_E, rows_E, 0), 0)
    end = start + tl.sum(tl.where(expert_E == expert, rows_E, 0), 0)
    first = start + (tile - tl.sum(tl.where(done_E, tiles_E, 0), 0)) * BLOCK_R
    return expert, first, end


@triton.jit
def weight_tile(
    right, expert, column, k, COLUMNS, K, strides, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    LAYOUT: tl.constexpr,
):  # fmt: skip
    """A block (BLOCK_K, BLOCK_C) of one expert's weight.

    With LAYOUT ``rows`` or ``columns``, ``right`` describes the weight as a matrix (E COLUMNS, K)
    or (E K, COLUMNS) to the unit that copies tiles. What that reads beyond an expert belongs to
    the next one, and does no harm: further columns are never stored, and further k meet zeros of
    the left operand.
    """
    if LAYOUT == "rows":
        return right.load([expert * COLUMNS + column, k]).T
    elif LAYOUT == "columns":
        return right.load([expert * K + k, column])
    else:
        column_C, k_K = column + tl.arange(0, BLOCK_C), k + tl.arange(0, BLOCK_K)
        stride_e, stride_c, stride_k = strides
        return tl.load(
            right
            + expert.to(tl.int64) * stride_e
            + (column_C * stride_c)[None, :]
            + (k_K * stride_k)[:, None],
            mask=(column_C < COLUMNS)[None, :] & (k_K < K)[:, None],
            other=0.0,
        )


@triton.jit
def left_tile(left_R1, k, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """A block (BLOCK_R, BLOCK_K) of the rows that ``left_R1`` points to; zero beyond K."""
    k_K = k + tl.arange(0, BLOCK_K)
    if K % BLOCK_K == 0:
        return tl.load(left_R1 + k_K[None, :])
    else:
        return tl.load(left_R1 + k_K[None, :], mask=(k_K < K)[None, :], other=0.0)


@triton.jit
def add_product(a, b, total, PRECISION: tl.constexpr):
    """``total + a b``; ``exact`` is for the interpreter, which cannot multiply bfloat16."""
    if PRECISION == "exact":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def place(program, tiles, COLUMN_TILES: tl.constexpr, GROUP: tl.constexpr):
    """The tile and the block of columns of a program.

    Programs that run at the same time should share their operands: GROUP tiles pass through all
    columns before the next ones.
    """
    first = program // (GROUP * COLUMN_TILES) * GROUP
    size = tl.minimum(tiles - first, GROUP)
    inside = program % (GROUP * COLUMN_TILES)
    return first + inside % size, inside // size


@triton.jit
def product_kernel(
    out,
    left,
    right,
    bias,
    weight_A,
    assignment_R,
    count_E,
    tiles,
    stride_left,
    strides,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    K: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_2: tl.constexpr,
    GATHER: tl.constexpr,
    LEFT: tl.constexpr,
    SCATTER: tl.constexpr,
    SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    LAYOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """``left rightᵀ + bias``: rows gathered from tokens, scaled, scattered to slots, as asked.

    With LEFT ``rows``, ``left`` describes the rows to the unit that copies tiles.
    """
    column_tiles: tl.constexpr = (COLUMNS + BLOCK_C - 1) // BLOCK_C
    tile, column_tile = place(tl.program_id(0), tiles, column_tiles, GROUP)
    expert, first, end = find_tile(tile, count_E, EXPERTS, EXPERTS_2, BLOCK_R)
    if expert == EXPERTS:
        return
    row_R = first + tl.arange(0, BLOCK_R)
    live_R = row_R < end
    slot_R = tl.load(assignment_R + row_R, mask=live_R, other=0)
    if GATHER:
        left_R1 = left + (slot_R // SLOTS * stride_left)[:, None]
    elif LEFT == "strided":
        left_R1 = left + (tl.where(live_R, row_R, first).to(tl.int64) * stride_left)[:, None]
    column = column_tile * BLOCK_C
    sum_RC = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for k in tl.range(0, K, BLOCK_K):
        if LEFT == "rows":
            a_RK = left.load([first, k])
        else:
            a_RK = left_tile(left_R1, k, K, BLOCK_K)
        b_KC = weight_tile(right, expert, column, k, COLUMNS, K, strides, BLOCK_C, BLOCK_K, LAYOUT)
        sum_RC = add_product(a_RK, b_KC, sum_RC, PRECISION)
    column_C = column + tl.arange(0, BLOCK_C)
    inside_C = column_C < COLUMNS
    if BIAS:
        bias_C = tl.load(bias + expert * COLUMNS + column_C, mask=inside_C, other=0.0)
        sum_RC += bias_C.to(tl.float32)[None, :]
    if SCALE:
        sum_RC *= tl.load(weight_A + slot_R, mask=live_R, other=0.0).to(tl.float32)[:, None]
    if SCATTER:
        target_R = slot_R
    else:
        target_R = row_R.to(tl.int64)
    tl.store(
        out + (target_R * COLUMNS)[:, None] + column_C[None, :],
        sum_RC.to(out.dtype.element_ty),
        mask=live_R[:, None] & inside_C[None, :],
    )


@triton.jit
def gated_kernel(
    inner,
    outer,
    left,
    right,
    bias,
    assignment_R,
    count_E,
    tiles,
    stride_left,
    strides,
    SLOTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    K: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_2: tl.constexpr,
    KEEP: tl.constexpr,
    BIAS: tl.constexpr,
    LAYOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """``silu(gate) ⊙ up`` of gathered tokens into ``outer``; gate and up into ``inner`` if KEEP."""
    column_tiles: tl.constexpr = (HIDDEN + BLOCK_C - 1) // BLOCK_C
    tile, column_tile = place(tl.program_id(0), tiles, column_tiles, GROUP)
    expert, first, end = find_tile(tile, count_E, EXPERTS, EXPERTS_2, BLOCK_R)
    if expert == EXPERTS:
        return
    row_R = first + tl.arange(0, BLOCK_R)
    live_R = row_R < end
    token_R = tl.load(assignment_R + row_R, mask=live_R, other=0) // SLOTS
    left_R1 = left + (token_R * stride_left)[:, None]
    column = column_tile * BLOCK_C
    gate_RC = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    up_RC = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for k in tl.range(0, K, BLOCK_K):
        a_RK = left_tile(left_R1, k, K, BLOCK_K)
        gate_KC = weight_tile(
            right, expert, column, k, 2 * HIDDEN, K, strides, BLOCK_C, BLOCK_K, LAYOUT
        )
        gate_RC = add_product(a_RK, gate_KC, gate_RC, PRECISION)
        up_KC = weight_tile(
            right, expert, HIDDEN + column, k, 2 * HIDDEN, K, strides, BLOCK_C, BLOCK_K, LAYOUT
        )
        up_RC = add_product(a_RK, up_KC, up_RC, PRECISION)
    column_C = column + tl.arange(0, BLOCK_C)
    inside_C = column_C < HIDDEN
    if BIAS:
        bias_C = bias + expert * 2 * HIDDEN + column_C
        gate_RC += tl.load(bias_C, mask=inside_C, other=0.0).to(tl.float32)[None, :]
        up_RC += tl.load(bias_C + HIDDEN, mask=inside_C, other=0.0).to(tl.float32)[None, :]
    mask = live_R[:, None] & inside_C[None, :]
    row_R1, start = tl.arange(0, BLOCK_R)[:, None], first.to(tl.int64) * HIDDEN
    if KEEP:
        inner_RC = inner + 2 * start + (row_R1 * (2 * HIDDEN) + column_C[None, :])
        tl.store(inner_RC, gate_RC.to(inner.dtype.element_ty), mask=mask)
        tl.store(inner_RC + HIDDEN, up_RC.to(inner.dtype.element_ty), mask=mask)
    outer_RC = gate_RC * tl.sigmoid(gate_RC) * up_RC
    outer = outer + start + (row_R1 * HIDDEN + column_C[None, :])
    tl.store(outer, outer_RC.to(outer.dtype.element_ty), mask=mask)


@triton.jit
def gated_backward_kernel(
    scaled,
    back,
    dots,
    left,
    right,
    inner,
    weight_A,
    assignment_R,
    count_E,
    tiles,
    stride_left,
    strides,
    SLOTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    K: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_2: tl.constexpr,
    LAYOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """``dA' = g W_down`` of gathered gradients g, and all that follows from it row by row.

    Writes ``s ⊙ A`` into ``scaled``, the gradient of gate and up into ``back``, and this block's
    part of ``dA' · A`` into ``dots`` (R, column tiles).
    """
    column_tiles: tl.constexpr = (HIDDEN + BLOCK_C - 1) // BLOCK_C
    tile, column_tile = place(tl.program_id(0), tiles, column_tiles, GROUP)
    expert, first, end = find_tile(tile, count_E, EXPERTS, EXPERTS_2, BLOCK_R)
    if expert == EXPERTS:
        return
    row_R = first + tl.arange(0, BLOCK_R)
    live_R = row_R < end
    slot_R = tl.load(assignment_R + row_R, mask=live_R, other=0)
    left_R1 = left + (slot_R // SLOTS * stride_left)[:, None]
    column = column_tile * BLOCK_C
    back_RC = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for k in tl.range(0, K, BLOCK_K):
        a_RK = left_tile(left_R1, k, K, BLOCK_K)
        b_KC = weight_tile(right, expert, column, k, HIDDEN, K, strides, BLOCK_C, BLOCK_K, LAYOUT)
        back_RC = add_product(a_RK, b_KC, back_RC, PRECISION)
    weight_R = tl.load(weight_A + slot_R, mask=live_R, other=0.0).to(tl.float32)
    # In two halves, because the whole block and what it meets do not fit into registers.
    halves = back_RC.reshape(BLOCK_R, 2, BLOCK_C // 2).permute(0, 2, 1).split()
    start = first.to(tl.int64) * HIDDEN
    scaled, back, inner = scaled + start, back + 2 * start, inner + 2 * start
    dot_R = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for half in tl.static_range(2):
        column_C = column + half * (BLOCK_C // 2) + tl.arange(0, BLOCK_C // 2)
        dot_R += pull_back(
            scaled, back, inner, halves[half], weight_R, column_C, live_R, HIDDEN, BLOCK_R
        )
    dots += row_R.to(tl.int64) * column_tiles + column_tile
    tl.store(dots, dot_R, mask=live_R)


@triton.jit
def pull_back(
    scaled, back, inner, back_RC, weight_R, column_C, live_R,
    HIDDEN: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The gradients of SwiGLU for ``dA'``, into the rows of a tile; returns ``dA' · A`` (R,)."""
    mask = live_R[:, None] & (column_C < HIDDEN)[None, :]
    row_R1 = tl.arange(0, BLOCK_R)[:, None]
    inner_RC = row_R1 * (2 * HIDDEN) + column_C[None, :]
    gate_RC = tl.load(inner + inner_RC, mask=mask, other=0.0).to(tl.float32)
    up_RC = tl.load(inner + inner_RC + HIDDEN, mask=mask, other=0.0).to(tl.float32)
    sigmoid_RC = tl.sigmoid(gate_RC)
    passed_RC = gate_RC * sigmoid_RC
    outer_RC = passed_RC * up_RC
    dot_R = tl.sum(tl.where(mask, back_RC * outer_RC, 0.0), 1)
    weight_R1 = weight_R[:, None]
    scaled_RC = (weight_R1 * outer_RC).to(scaled.dtype.element_ty)
    tl.store(scaled + row_R1 * HIDDEN + column_C[None, :], scaled_RC, mask=mask)
    back_RC *= weight_R1
    to_up_RC = (back_RC * passed_RC).to(back.dtype.element_ty)
    tl.store(back + inner_RC + HIDDEN, to_up_RC, mask=mask)
    slope_RC = sigmoid_RC + passed_RC * (1.0 - sigmoid_RC)
    to_gate_RC = (back_RC * up_RC * slope_RC).to(back.dtype.element_ty)
    tl.store(back + inner_RC, to_gate_RC, mask=mask)
    return dot_R


@triton.jit
def weight_gradient_kernel(
    out,
    left,
    right,
    assignment_R,
    count_E,
    stride_left,
    stride_right,
    stride_e,
    stride_m,
    stride_c,
    SLOTS: tl.constexpr,
    M: tl.constexpr,
    COLUMNS: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_2: tl.constexpr,
    LAYOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Each expert's ``leftᵀ right`` (M, COLUMNS) over its rows.

    The rows of ``left`` are gathered from tokens (N, M), those of ``right`` (R, COLUMNS) lie in
    order. An expert without rows gets zeros.
    """
    tiles_m: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    tiles_c: tl.constexpr = (COLUMNS + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    expert = program // (tiles_m * tiles_c)
    tile_m, tile_c = place(program % (tiles_m * tiles_c), tiles_m, tiles_c, GROUP)
    expert_E = tl.arange(0, EXPERTS_2)
    rows_E = tl.load(count_E + expert_E, mask=expert_E < EXPERTS, other=0).to(tl.int32)
    start = tl.sum(tl.where(expert_E < expert, rows_E, 0), 0)
    end = start + tl.sum(tl.where(expert_E == expert, rows_E, 0), 0)
    m_M = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column_C = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    sum_MC = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for first in tl.range(start, end, BLOCK_R):
        row_R = first + tl.arange(0, BLOCK_R)
        live_R = row_R < end
        token_R = tl.load(assignment_R + row_R, mask=live_R, other=0) // SLOTS
        a_RM = tl.load(
            left + (token_R * stride_left)[:, None] + m_M[None, :],
            mask=live_R[:, None] & (m_M < M)[None, :],
            other=0.0,
        )
        if LAYOUT == "rows":  # rows of the next expert meet zeros
            b_RC = right.load([first, tile_c * BLOCK_C])
        else:
            b_RC = tl.load(
                right + (row_R.to(tl.int64) * stride_right)[:, None] + column_C[None, :],
                mask=live_R[:, None] & (column_C < COLUMNS)[None, :],
                other=0.0,
            )
        sum_MC = add_product(a_RM.T, b_RC, sum_MC, PRECISION)
    tl.store(
        out
        + expert.to(tl.int64) * stride_e
        + (m_M.to(tl.int64) * stride_m)[:, None]
        + (column_C.to(tl.int64) * stride_c)[None, :],
        sum_MC.to(out.dtype.element_ty),
        mask=(m_M < M)[:, None] & (column_C < COLUMNS)[None, :],
    )


@triton.jit
def sum_kernel(out, slots, SLOTS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr):
    """The sum of each token's slots: (N, SLOTS, COLUMNS) to (N, COLUMNS), in float32."""
    token = tl.program_id(0).to(tl.int64)
    column_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_C = column_C < COLUMNS
    slots += token * SLOTS * COLUMNS + column_C
    sum_C = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for slot in tl.range(SLOTS):
        sum_C += tl.load(slots + slot * COLUMNS, mask=inside_C, other=0.0).to(tl.float32)
    tl.store(out + token * COLUMNS + column_C, sum_C.to(out.dtype.element_ty), mask=inside_C)

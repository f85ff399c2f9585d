"""The feed-forward pass as a few Triton kernels, for CUDA devices.

The first product gathers its rows from the tokens and applies the activation; the second one scales
its rows and writes them to their slots; a last kernel adds up the slots of each token. So no token
is copied once for each of its experts, and every result is the same each time: nothing is added
atomically. Triton's interpreter runs all of it on a CPU, for tests (``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moekit.dispatch import triton_kernels as kernels
from moekit.dispatch.backend import (
    Backend,
    Gradients,
    Wanted,
    row_dots,
    row_weights,
    slot_gradient,
)
from moekit.dispatch.grouped import per_expert
from moekit.dispatch.plan import Plan
from moekit.dispatch.triton_tiles import Tile, Tiles, tiles_for
from moekit.experts.activation import GatedSiLU
from moekit.experts.experts import FeedForward

INTERPRETED = not isinstance(kernels.sum_kernel, triton.JITFunction)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Triton(Backend):
    """The backend of ``Dropless(backend="triton")``.

    SwiGLU's activation, and its backward pass, are part of the products; other activations run
    between them.

    Args:
        tiles: sizes of the blocks; None for those measured as best for the rows at hand.
    """

    name: ClassVar[str] = "triton"

    def __init__(self, tiles: Tiles | None = None) -> None:
        self.tiles = tiles

    def forward(
        self, x_ND: Tensor, plan: Plan, bank: FeedForward, keep: bool
    ) -> tuple[Tensor, list[Tensor]]:
        rows = Launches(plan, x_ND.dtype, self.tiles)
        if isinstance(bank.activation, GatedSiLU):
            inner_RJ, outer_RH = rows.gated(x_ND, bank, keep)
        else:
            inner_RJ = rows.product(x_ND, bank.up_EJD, bank.up_bias_EJ, gather=True)
            outer_RH = (bank.activation if keep else bank.activation.consume)(inner_RJ)
        slots_AO = rows.product(
            outer_RH, bank.down_EOH, bank.down_bias_EO, scatter=True, scale=True
        )
        return rows.summed(slots_AO), [] if inner_RJ is None or not keep else [inner_RJ]

    def backward(
        self,
        grad_NO: Tensor,
        x_ND: Tensor,
        plan: Plan,
        bank: FeedForward,
        inner: list[Tensor],
        wanted: Wanted,
    ) -> Gradients:
        rows = Launches(plan, x_ND.dtype, self.tiles)
        step = rows.gated_back if isinstance(bank.activation, GatedSiLU) else rows.back
        scaled_RH, back_RJ, dot_R = step(grad_NO, bank, inner[0])
        found = Gradients()
        if wanted.weight:
            if bank.down_bias_EO is not None:
                bias_RO = plan.groups.of_row(bank.down_bias_EO)
                dot_R = dot_R + row_dots(grad_NO.index_select(0, plan.token_R), bias_RO)
            found = found._replace(weight_NK=slot_gradient(dot_R, plan))
        if wanted.down:
            down_EOH = rows.weight_gradient(grad_NO, scaled_RH, bank.down_EOH, transposed=False)
            found = found._replace(down_EOH=down_EOH)
        if wanted.down_bias:
            scaled_RO = grad_NO.index_select(0, plan.token_R) * row_weights(plan)[:, None]
            found = found._replace(down_bias_EO=per_expert(scaled_RO.to(x_ND.dtype), plan))
        if wanted.up:
            up_EJD = rows.weight_gradient(x_ND, back_RJ, bank.up_EJD, transposed=True)
            found = found._replace(up_EJD=up_EJD)
        if wanted.up_bias:
            found = found._replace(up_bias_EJ=per_expert(back_RJ, plan))
        if wanted.x:
            slots_AD = rows.product(back_RJ, bank.up_EJD.mT, None, scatter=True)
            found = found._replace(x_ND=rows.summed(slots_AD))
        return found


class Launches:
    """Launches kernels over the rows of one plan."""

    def __init__(self, plan: Plan, dtype: torch.dtype, tiles: Tiles | None) -> None:
        self.plan = plan
        self.tokens, self.slots = plan.weight_NK.shape
        self.weight_A = plan.weight_NK.contiguous()
        self.count_E = plan.groups.count_E
        self.rows, self.experts = len(plan.assignment_R), plan.groups.experts
        self.tiles = tiles or tiles_for(self.rows, self.experts, dtype)
        self.sizes: dict[str, Any] = {
            "SLOTS": max(1, self.slots),
            "EXPERTS": self.experts,
            "EXPERTS_2": triton.next_power_of_2(max(1, self.experts)),
            "PRECISION": _precision(),
        }

    def product(
        self,
        left: Tensor,
        right_ECK: Tensor,
        bias_EC: Tensor | None,
        *,
        gather: bool = False,
        scatter: bool = False,
        scale: bool = False,
    ) -> Tensor:
        """Each row times its expert's weight: (R, C), or by slot (N K, C)."""
        columns, width = right_ECK.shape[1:]
        out = self._room(left, columns) if scatter else left.new_empty(self.rows, columns)
        tile, left = self.tiles.product, _rows_apart(left)
        tiles = self._count(tile)
        if not tiles:
            return out
        right, layout = _operand(right_ECK, tile)
        stride_left, how = left.stride(0), "strided"
        if not gather:
            left, how = _matrix(left, (tile.rows, tile.depth), tile.copies)
        kernels.product_kernel[(tiles * triton.cdiv(columns, tile.columns),)](
            out,
            left,
            right,
            None if bias_EC is None else bias_EC.contiguous(),
            self.weight_A,
            self.plan.assignment_R,
            self.count_E,
            tiles,
            stride_left,
            right_ECK.stride(),
            COLUMNS=columns,
            K=width,
            GATHER=gather,
            LEFT=how,
            SCATTER=scatter,
            SCALE=scale,
            BIAS=bias_EC is not None,
            LAYOUT=layout,
            **self.sizes,
            **tile.arguments(),
        )
        return out

    def gated(self, x_ND: Tensor, bank: FeedForward, keep: bool) -> tuple[Tensor | None, Tensor]:
        """The first product's output (R, 2 H) if ``keep``, and SwiGLU's activation (R, H)."""
        hidden, width = bank.down_EOH.shape[2], x_ND.shape[1]
        inner_RJ = x_ND.new_empty(self.rows, 2 * hidden) if keep else None
        outer_RH = x_ND.new_empty(self.rows, hidden)
        tile, left_ND = self.tiles.gated, _rows_apart(x_ND)
        tiles = self._count(tile)
        if not tiles:
            return inner_RJ, outer_RH
        right, layout = _operand(bank.up_EJD, tile)
        bias_EJ = bank.up_bias_EJ
        kernels.gated_kernel[(tiles * triton.cdiv(hidden, tile.columns),)](
            inner_RJ,
            outer_RH,
            left_ND,
            right,
            None if bias_EJ is None else bias_EJ.contiguous(),
            self.plan.assignment_R,
            self.count_E,
            tiles,
            left_ND.stride(0),
            bank.up_EJD.stride(),
            HIDDEN=hidden,
            K=width,
            KEEP=keep,
            BIAS=bias_EJ is not None,
            LAYOUT=layout,
            **self.sizes,
            **tile.arguments(),
        )
        return inner_RJ, outer_RH

    def gated_back(
        self, grad_NO: Tensor, bank: FeedForward, inner_RJ: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``s ⊙ A`` (R, H), the gradient (R, 2 H) before the activation, and ``dA' · A`` (R,)."""
        hidden, width = bank.down_EOH.shape[2], grad_NO.shape[1]
        tile, left_NO = self.tiles.backward, _rows_apart(grad_NO)
        column_tiles, tiles = triton.cdiv(hidden, tile.columns), self._count(tile)
        scaled_RH, back_RJ = inner_RJ.new_empty(self.rows, hidden), torch.empty_like(inner_RJ)
        dots = inner_RJ.new_empty(self.rows, column_tiles, dtype=torch.float32)
        right_EHO = bank.down_EOH.mT
        right, layout = _operand(right_EHO, tile)
        if tiles:
            kernels.gated_backward_kernel[(tiles * column_tiles,)](
                scaled_RH,
                back_RJ,
                dots,
                left_NO,
                right,
                inner_RJ,
                self.weight_A,
                self.plan.assignment_R,
                self.count_E,
                tiles,
                left_NO.stride(0),
                right_EHO.stride(),
                HIDDEN=hidden,
                K=width,
                LAYOUT=layout,
                **self.sizes,
                **tile.arguments(),
            )
        return scaled_RH, back_RJ, dots.sum(1)

    def back(
        self, grad_NO: Tensor, bank: FeedForward, inner_RJ: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same for any activation, one step after the other."""
        weight_R1 = row_weights(self.plan)[:, None]
        back_RH = self.product(grad_NO, bank.down_EOH.mT, None, gather=True)
        outer_RH, pull = bank.activation.pull_back(inner_RJ)
        dot_R = row_dots(back_RH, outer_RH)
        scaled_RH = torch.mul(outer_RH, weight_R1, out=torch.empty_like(outer_RH))
        return scaled_RH, pull(back_RH.mul_(weight_R1)).contiguous(), dot_R

    def weight_gradient(
        self, left: Tensor, right_RC: Tensor, like: Tensor, *, transposed: bool
    ) -> Tensor:
        """The gradient of a weight (E, M, C), or (E, C, M) if ``transposed``, laid out as it is."""
        out = torch.empty_like(like)
        view = out.mT if transposed else out
        experts, m, columns = view.shape
        tile, left = self.tiles.gradient, _rows_apart(left)
        block_m, block_r = tile.rows, tile.depth
        right, layout = _matrix(right_RC, (block_r, tile.columns))
        grid = experts * triton.cdiv(m, block_m) * triton.cdiv(columns, tile.columns)
        kernels.weight_gradient_kernel[(grid,)](
            out,
            left,
            right,
            self.plan.assignment_R,
            self.count_E,
            left.stride(0),
            right_RC.stride(0),
            *view.stride(),
            M=m,
            COLUMNS=columns,
            LAYOUT=layout,
            **self.sizes,
            BLOCK_M=block_m,
            BLOCK_C=tile.columns,
            BLOCK_R=block_r,
            GROUP=tile.group,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        return out

    def summed(self, slots_AX: Tensor) -> Tensor:
        """The sum (N, X) of each token's slots."""
        columns = slots_AX.shape[1]
        if self.slots == 1:
            return slots_AX
        out_NX = slots_AX.new_empty(self.tokens, columns)
        if not out_NX.numel():
            return out_NX
        block = min(1024, triton.next_power_of_2(columns))
        kernels.sum_kernel[(self.tokens, triton.cdiv(columns, block))](
            out_NX, slots_AX, SLOTS=self.slots, COLUMNS=columns, BLOCK_C=block
        )
        return out_NX

    def _room(self, like: Tensor, columns: int) -> Tensor:
        """Room for every slot; zero where a slot may have no row."""
        make = like.new_empty if self.plan.every else like.new_zeros
        return make(self.tokens * self.slots, columns)

    def _count(self, tile: Tile) -> int:
        """Tiles that there can be at most: every expert's last one may be short."""
        used = min(self.rows, self.experts)
        return min(self.rows, self.rows // tile.rows + used)


def _operand(weight_ECK: Tensor, tile: Tile) -> tuple[Tensor | TensorDescriptor, str]:
    """A weight as the kernels take it, and the name of that layout."""
    experts, columns, width = weight_ECK.shape
    if weight_ECK.is_contiguous():
        found, layout = _matrix(
            weight_ECK.view(experts * columns, width), (tile.columns, tile.depth), tile.copies
        )
        return found, layout
    if weight_ECK.mT.is_contiguous():
        halves = columns // 2 * weight_ECK.element_size() % 16 == 0  # gate and up each start well
        found, layout = _matrix(
            weight_ECK.mT.view(experts * width, columns),
            (tile.depth, tile.columns),
            tile.copies and halves,
        )
        return found, "columns" if layout == "rows" else layout
    return weight_ECK, "strided"


def _matrix(
    matrix: Tensor, block: tuple[int, int], copies: bool = True
) -> tuple[Tensor | TensorDescriptor, str]:
    """A descriptor for the unit that copies tiles (Hopper and newer), where it takes the matrix."""
    aligned = matrix.stride(0) * matrix.element_size() % 16 == 0 and matrix.data_ptr() % 16 == 0
    if copies and aligned and matrix.stride(1) == 1 and matrix.numel() and _copies_tiles(matrix):
        return TensorDescriptor.from_tensor(matrix, list(block)), "rows"
    return matrix, "strided"


def _copies_tiles(matrix: Tensor) -> bool:
    return INTERPRETED or torch.cuda.get_device_capability(matrix.device) >= (9, 0)


def _rows_apart(tensor: Tensor) -> Tensor:
    """The tensor with each row's entries side by side, as an expanded gradient is not."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _precision() -> str:
    """float32 products as exact as torch's are, or as torch is allowed to make them."""
    if INTERPRETED:
        return "exact"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"

"""A handful of rows an expert, as in decoding: bound by reading each used expert's weights once."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from moekit.dispatch.grouped import Grouped
from moekit.experts.groups import RowGroups

FEW = 3  # rows up to which the weight is better the left operand


class FewRows(Grouped):
    """The backend of ``Dropless(backend="few_rows")``, for CPUs.

    As :class:`~moekit.dispatch.grouped.Grouped`, but its products visit only experts with rows and
    take the operands in the order that reads weights at the speed of memory.
    """

    name: ClassVar[str] = "few_rows"

    def product(self, groups: RowGroups, rows_RI: Tensor, weight_EOI: Tensor) -> Tensor:
        parts = zip(rows_RI.split(groups.sizes), weight_EOI.unbind(0), strict=True)
        outputs = [product(rows, weight) for rows, weight in parts if rows.shape[0]]
        return torch.cat([rows_RI.new_zeros(0, weight_EOI.shape[1]), *outputs])


def product(rows_nI: Tensor, weight_OI: Tensor) -> Tensor:
    """``rows Wᵀ`` of one expert, with the operands in the order that is fastest.

    The result may be a transposed view. Few float32 rows are bound by reading the weight, which MKL
    does two to three times as fast when the weight is the left operand. One row would become a
    matrix-vector product, which is slow again; two halves of the weight as a batch are not.
    """
    few = rows_nI.shape[0] <= FEW and rows_nI.dtype == torch.float32 and weight_OI.stride(1) == 1
    if not few:
        return rows_nI @ weight_OI.T
    rows_nI = rows_nI.contiguous()  # transposed rows would be as slow as the other order
    if rows_nI.shape[0] == 1 and weight_OI.shape[0] % 2 == 0:
        halves = weight_OI.unflatten(0, (2, -1))
        return torch.bmm(halves, rows_nI.T.expand(2, -1, 1)).view(1, -1)
    return (weight_OI @ rows_nI.T).T

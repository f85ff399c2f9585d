"""DERN's last step: weighted spherical k-means over the neurons of one expert."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def recluster(
    segment_SP: Tensor,
    weight_S: Tensor,
    count: int,
    gate_width: int,
    distinct: float | None,
    iterations: int,
) -> Tensor:
    """``count`` neurons that stand for S of them.

    A cluster's centre is the weighted mean of its members after each is scaled to their mean norm,
    and has that norm itself (the paper's eq. 11). Nothing is random.

    Args:
        segment_SP: gate row, up row and down column of each neuron, side by side.
        weight_S: how much each counts; a cluster of zeros counts all alike.
        count: number of centres, at most S.
        gate_width: how many of the P numbers are the gate row.
        distinct: cosine from which a start repeats another and is passed over, the starts being
            those of the largest gates; None to start from the first neurons.
        iterations: at most.
    """
    norm_S, weight_S = segment_SP.norm(dim=1), weight_S.to(segment_SP)
    unit_SP = F.normalize(segment_SP, dim=1)
    if distinct is None:
        centre_CP = segment_SP[:count]
    else:
        order_S = segment_SP[:, :gate_width].abs().amax(1).argsort(descending=True, stable=True)
        centre_CP = segment_SP[_starts(unit_SP, order_S, count, distinct)]
    label_S = torch.full((len(segment_SP),), -1)
    for _ in range(iterations):
        cosine_SC = unit_SP @ F.normalize(centre_CP, dim=1).T
        best = cosine_SC.max(1)
        if best.indices.equal(label_S):
            break
        label_S = _without_empty(best.indices, best.values, count)
        centre_CP = _centres(unit_SP, norm_S, weight_S, label_S, count)
    return centre_CP


def _starts(unit_SP: Tensor, order_S: Tensor, count: int, distinct: float) -> Tensor:
    """The first neurons in an order that are no near copies; then those farthest from them."""
    open_S = torch.ones(len(unit_SP), dtype=torch.bool)
    nearest_S = torch.full((len(unit_SP),), -torch.inf)
    chosen: list[int] = []
    for place in order_S.tolist():
        if len(chosen) == count:
            break
        if not open_S[place]:
            continue
        chosen.append(place)
        cosine_S = unit_SP @ unit_SP[place]
        nearest_S = torch.maximum(nearest_S, cosine_S)
        open_S &= cosine_S < distinct if distinct < 1 else torch.ones_like(open_S)
        open_S[place] = False
        nearest_S[place] = torch.inf
    while len(chosen) < count:
        place = int(nearest_S.argmin())
        chosen.append(place)
        nearest_S = torch.maximum(nearest_S, unit_SP @ unit_SP[place])
        nearest_S[place] = torch.inf
    return torch.tensor(chosen)


def _without_empty(label_S: Tensor, cosine_S: Tensor, count: int) -> Tensor:
    """Gives each empty cluster the worst-fitted neuron of a cluster that has several."""
    label_S, cosine_S = label_S.clone(), cosine_S.clone()
    size_C = label_S.bincount(minlength=count)
    for empty in (size_C == 0).nonzero().flatten().tolist():
        spare_S = size_C[label_S] > 1
        worst = int(torch.where(spare_S, cosine_S, torch.inf).argmin())
        size_C[label_S[worst]] -= 1
        size_C[empty] += 1
        label_S[worst] = empty
        cosine_S[worst] = torch.inf
    return label_S


def _centres(
    unit_SP: Tensor, norm_S: Tensor, weight_S: Tensor, label_S: Tensor, count: int
) -> Tensor:
    mass_C = unit_SP.new_zeros(count).index_add_(0, label_S, weight_S)
    weight_S = torch.where(mass_C[label_S] > 0, weight_S, 1.0)
    size_C = label_S.bincount(minlength=count).clamp_min(1)
    length_C = unit_SP.new_zeros(count).index_add_(0, label_S, norm_S) / size_C
    sum_CP = unit_SP.new_zeros(count, unit_SP.shape[1])
    sum_CP.index_add_(0, label_S, weight_S[:, None] * unit_SP)
    return F.normalize(sum_CP, dim=1) * length_C[:, None]

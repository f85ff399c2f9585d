"""The plan of a layer: which token's row goes to which place, and back.

A plan is made once from a routing and can be run any number of times: a bank used as a map and a
reduce around another operation (attention heads) gathers, computes, and gathers again on the
same plan.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.dispatch.native_library import sorted_ids
from moekit.experts.groups import PaddedGroups, RowGroups
from moekit.routing.ids import count_ids, is_here, sort_ids
from moekit.routing.routing import Routing


@dataclass(frozen=True)
class Plan:
    """Rows sorted by expert.

    Attributes:
        assignment_R: which assignment, in the flattened (N, K) routing, each row serves; for a
            padded plan N·K marks an empty place.
        weight_NK: combine weights of the routing.
        groups: the rows' grouping by dispatched expert.
        every: True when rows and assignments correspond one to one.
    """

    assignment_R: Tensor
    weight_NK: Tensor
    groups: RowGroups
    every: bool

    @property
    def token_R(self) -> Tensor:
        """Source token of each row; N for an empty place."""
        return self.assignment_R // self.weight_NK.shape[1]

    def gather(self, x_ND: Tensor) -> Tensor:
        """The rows (R, D) of the tokens ``x_ND``; empty places are zero."""
        if isinstance(self.groups, PaddedGroups):
            x_ND = torch.cat([x_ND, x_ND.new_zeros(1, x_ND.shape[1])])
        return x_ND.index_select(0, self.token_R)

    def to_slots(self, rows_RD: Tensor) -> Tensor:
        """The rows in the order of the routing, (N, K, D); slots without a row are zero.

        With :meth:`from_slots` this sets a bank around another operation: attention heads map
        rows to queries, attend in token order, and reduce rows on the same plan.
        """
        tokens, slots = self.weight_NK.shape
        flat = rows_RD.new_zeros(tokens * slots + 1, rows_RD.shape[1])
        filled = flat.index_copy(0, self.assignment_R, rows_RD)
        return filled[:-1].unflatten(0, (tokens, slots))

    def from_slots(self, value_NKD: Tensor) -> Tensor:
        """The rows (R, D) of values given slot by slot; empty places are zero."""
        flat = value_NKD.flatten(0, 1)
        flat = torch.cat([flat, flat.new_zeros(1, flat.shape[1])])
        return flat.index_select(0, self.assignment_R)

    def compact(self) -> Plan:
        """The same rows in as few slots a token as the busiest token needs.

        What is done slot by slot, as attention is, then costs no more than it must. Reads one
        number back to the host, but nothing where every slot has a row or the plan is padded.
        """
        tokens, slots = self.weight_NK.shape
        if self.every or isinstance(self.groups, PaddedGroups) or not self.weight_NK.numel():
            return self
        used = torch.zeros_like(self.weight_NK, dtype=torch.int64).flatten()
        used_NK = used.index_fill(0, self.assignment_R, 1).view(tokens, slots)
        fewer = max(1, int(used_NK.sum(1).max()))
        rank_R = (used_NK.cumsum(1) - 1).flatten()[self.assignment_R]
        place_R = self.token_R * fewer + rank_R
        weight_R = self.weight_NK.flatten().index_select(0, self.assignment_R)
        weight = weight_R.new_zeros(tokens * fewer).index_copy(0, place_R, weight_R)
        return Plan(place_R, weight.view(tokens, fewer), self.groups, every=False)

    def combine(self, rows_RD: Tensor) -> Tensor:
        """Each token's weighted sum (N, D) of its rows, accumulated in at least float32."""
        if self.every:
            return self._combine_every(rows_RD)
        return self._combine_some(rows_RD)

    def _combine_every(self, rows_RD: Tensor) -> Tensor:
        """Back to token order, then a sum over slots: deterministic on every device."""
        tokens, slots = self.weight_NK.shape
        dtype = torch.promote_types(rows_RD.dtype, torch.float32)
        place_R = torch.empty_like(self.assignment_R)
        place_R[self.assignment_R] = torch.arange(len(place_R), device=place_R.device)
        rows_NKD = rows_RD.index_select(0, place_R).unflatten(0, (tokens, slots))
        weighted_NKD = rows_NKD.to(dtype) * self.weight_NK[..., None].to(dtype)
        return weighted_NKD.sum(1).to(rows_RD.dtype)

    def _combine_some(self, rows_RD: Tensor) -> Tensor:
        """Add rows into their tokens; on CUDA the order of additions is not fixed."""
        tokens = self.weight_NK.shape[0]
        dtype = torch.promote_types(rows_RD.dtype, torch.float32)
        none = self.weight_NK.new_zeros(1)
        weight_R = torch.cat([self.weight_NK.flatten(), none]).index_select(0, self.assignment_R)
        weighted_RD = rows_RD.to(dtype) * weight_R[:, None].to(dtype)
        out_ND = weighted_RD.new_zeros(tokens + 1, rows_RD.shape[1])
        return out_ND.index_add(0, self.token_R, weighted_RD)[:tokens].to(rows_RD.dtype)


def plan_rows(
    routing: Routing, ranges: list[tuple[int, int]], groups: type[RowGroups] = RowGroups
) -> Plan:
    """The plan that sorts the assignments to the experts in ``ranges`` by expert.

    Assignments to other experts and unused slots get no row. Sorting is stable, so the rows of an
    expert are in token order. Reads one number back to the host unless ``routing.full`` holds and
    the ranges cover every expert.
    """
    experts = sum(stop - start for start, stop in ranges)
    if routing.full and experts == routing.experts:
        assignment_R, count_E = _by_expert(routing.expert_NK, experts)
        return Plan(assignment_R, routing.weight_NK, groups(count_E), every=True)
    order, count = _by_expert(_local_ids(routing, ranges, experts), experts + 1)
    count_E = count[:experts]
    return Plan(order[: int(count_E.sum())], routing.weight_NK, groups(count_E), every=False)


def plan_places(routing: Routing, ranges: list[tuple[int, int]], places: int) -> Plan:
    """The plan that gives every expert in ``ranges`` the same number of row places.

    Nothing is read back to the host. The routing must not hold more than ``places`` assignments
    an expert: see :mod:`moekit.dispatch.capacity`.
    """
    experts = sum(stop - start for start, stop in ranges)
    local = _local_ids(routing, ranges, experts)
    order, count = _by_expert(local, experts + 1)
    count_E = count[:experts]
    start_E = count_E.cumsum(0) - count_E
    place_C = torch.arange(places, device=local.device)
    taken_EC = place_C < count_E[:, None]
    row_EC = (start_E[:, None] + place_C).clamp_max(max(len(order) - 1, 0))
    empty = routing.expert_NK.numel()
    source = order if len(order) else order.new_full((1,), empty)
    assignment_EC = torch.where(taken_EC, source[row_EC], empty)
    groups = PaddedGroups(count_E, places)
    return Plan(assignment_EC.flatten(), routing.weight_NK, groups, every=False)


def _by_expert(local_NK: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The order that sorts assignments by local id, stable, and how many have each (size,)."""
    found = sorted_ids(local_NK, size) if is_here(local_NK) else None
    if found is not None:
        return found
    local = local_NK.flatten()
    return sort_ids(local, size), count_ids(local, size)


def _local_ids(routing: Routing, ranges: list[tuple[int, int]], experts: int) -> Tensor:
    """Ids (N, K) counted over the dispatched experts only; ``experts`` for all else."""
    expert_NK = routing.expert_NK
    if ranges == [(0, routing.experts)]:
        if routing.full:
            return expert_NK
        return torch.where(routing.used_NK, expert_NK, experts)
    local_NK, position = torch.full_like(expert_NK, experts), 0
    for start, stop in ranges:
        inside_NK = (expert_NK >= start) & (expert_NK < stop)
        local_NK = torch.where(inside_NK, expert_NK - start + position, local_NK)
        position += stop - start
    return local_NK

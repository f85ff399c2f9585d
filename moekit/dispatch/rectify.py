"""Rectify-Router: a capacity limit a device, with its two kinds of waste repaired afterwards.

Zeng, Guo, Fei, Yin, Zhou, Li, Sun, Yan, Lin, Qiu: "Turn Waste into Worth: Rectifying Top-k Router
of MoE", arXiv 2402.12399. P devices hold E / P consecutive experts each, and each sends an expert
at most C of its own tokens. Assignments beyond C are dropped; places that nobody asks for are
padding. *Fill-in* offers empty places to the tokens' (k+1)-th choices. *Intra-device*
rectification runs tokens that lost assignments on the best expert of their own device, which
needs no communication and knows no capacity. Experts that compute nothing stand on every device
(MoE++): they are never full, belong to no device and repair nothing.

Shape suffixes beside the usual ones: G groups (devices), L the experts of one device, and K here
counts requests a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moekit.dispatch.dispatch import Dispatch, DispatchSpec
from moekit.errors import SpecError
from moekit.experts.experts import Experts
from moekit.routing.ids import count_ids, queue_positions
from moekit.routing.router import ZERO_COMPUTATION, RouterSpec
from moekit.routing.routing import Routing
from moekit.routing.token_graph import TokenGraph
from moekit.routing.top_k import TopK

# Smaller probabilities count as this and get no gradient: 1 / p times a gradient would overflow.
SMALLEST = 1e-30


@dataclass(frozen=True)
class Rectified(DispatchSpec):
    """Top-k under a capacity limit a device and expert, rectified (Rectify-Router).

    For a router that comes to k experts a token, such as COMET's trees, there is room for k at all
    times. It has no next choice, for experts that it has not chosen weigh 0: no ``fill_in``.

    The devices are emulated on one process: the tokens of a batch are split into ``groups`` runs
    of consecutive tokens, padding left out, as even as their number allows. What a token gets thus
    depends on the batch around it; fix batches and ``groups`` where results are compared. With
    neither repair this is the paper's baseline. Where ragged shapes are possible,
    :class:`~moekit.Dropless` drops nothing and needs no repair.

    Attributes:
        factor: capacity c in training: an expert takes ``⌈c k S / E⌉`` of a group's S tokens.
        eval_factor: the same in evaluation; None for no limit there, and nothing to rectify.
        groups: number P of devices; the e-th of E experts with matrix products lives on device
            ``e // (E / P)``.
        fill_in: offer the places left empty by the first k choices to the (k+1)-th ones.
        intra_device: run unrouted tokens on the best expert of their own device.
        unrouted: whom ``intra_device`` serves: tokens that kept nothing (``all``), that lost any
            request (``any``), or that kept fewer than k of k + 1 requests (``ignore_kth``, which
            needs ``fill_in``). ``auto`` is ``ignore_kth`` with ``fill_in`` and ``any`` without;
            both are ``all`` for k = 1.
        priority: who comes first among the r-th choices of all tokens: those of the largest top
            probability (``probability``, as in the paper's code), those of the largest probability
            of the requested expert (``request``), or earlier tokens (``position``).

    Example:
        >>> from moekit import MoESpec, SwiGLU, TopK
        >>> dispatch = Rectified(factor=0.5, groups=4)
        >>> layer = MoESpec(TopK(k=1), SwiGLU(count=8, hidden=16), dispatch).build(width=8)
        >>> layer(torch.randn(32, 8)).y.shape
        torch.Size([32, 8])
    """

    factor: float = 1.0
    eval_factor: float | None = None
    groups: int = 1
    fill_in: bool = True
    intra_device: bool = True
    unrouted: Literal["auto", "all", "any", "ignore_kth"] = "auto"
    priority: Literal["probability", "request", "position"] = "probability"

    def check(self) -> None:
        for name in ("factor", "eval_factor"):
            value = getattr(self, name)
            self.require(
                value is None or (value >= 0 and math.isfinite(value)),
                f"{name} is {value}; wanted a number of at least 0",
            )
        self.require(self.groups >= 1, f"groups is {self.groups}; wanted at least one device")
        self.require(
            self.unrouted == "auto" or self.intra_device,
            f"unrouted is {self.unrouted} but nothing serves those tokens; set intra_device",
        )
        self.require(
            self.unrouted != "ignore_kth" or self.fill_in,
            "unrouted ignore_kth leaves fill-in requests out of account; set fill_in",
        )

    def check_layer(self, router: RouterSpec, kinds: tuple[str, ...]) -> None:
        name, computed = type(router).__name__, sum(kind not in ZERO_COMPUTATION for kind in kinds)
        if isinstance(router, TokenGraph):  # which ends in a top-k choice by the averaged scores
            router = router.router
        if isinstance(router, TopK):
            self._check_top_k(router, kinds)
            self.check_sizes(router.k, computed)
            return
        self.require(
            router.settles and router.scores == "probabilities",
            f"it repairs top-k routing, and {name} is not; use TopK",
        )
        self.require(
            not self.fill_in,
            f"fill_in asks for a token's next choice, and {name} gives every expert that it does "
            "not choose weight 0; set fill_in=False",
        )
        self.check_sizes(0, computed)

    def _check_top_k(self, router: TopK, kinds: tuple[str, ...]) -> None:
        unused = "none" if "zero" not in kinds else "nonzero"
        self.require(
            router.normalize not in ("none", unused),
            f"the kept experts' weights are made to sum to 1, whatever they are, so normalize "
            f"{router.normalize} makes no difference; set normalize to selected",
        )
        self.require(
            router.scale == 1 and router.bias_rate == 0 and router.groups == 1,
            "next choices and weights follow the probabilities alone; leave the router's scale, "
            "bias_rate and groups at their defaults",
        )

    def check_sizes(self, k: int, experts: int) -> None:
        """Refuse ``k`` choices over ``experts`` that the groups or fill-in do not fit.

        Those that compute nothing do not count: they stand on every device and fill no place.
        """
        self.require(
            experts % self.groups == 0,
            f"{experts} experts cannot be spread evenly over {self.groups} groups",
        )
        self.require(
            not self.fill_in or k < experts,
            f"fill_in asks for choice {k + 1} of a token, but there are {experts} experts",
        )

    def build(self) -> Dispatch:
        return RectifiedDispatch(self)


class RectifiedDispatch(Dispatch):
    """The module of :class:`Rectified`."""

    def __init__(self, spec: Rectified) -> None:
        super().__init__()
        self.spec = spec
        factor = spec.eval_factor
        self.in_evaluation = None if factor is None else spec.replace(factor=factor)

    @property
    def in_force(self) -> Rectified | None:
        """What limits: that of training, or that of evaluation; None for nothing."""
        return self.spec if self.training else self.in_evaluation

    def as_routed(self) -> bool:
        return self.in_force is None

    def limited(self, routing: Routing, experts: Experts) -> Routing:
        spec = self.in_force
        if spec is None:
            return routing
        return rectify(routing, spec, ranges=experts.dispatched_ranges).routing


@dataclass(frozen=True)
class Rectification:
    """A rectified routing and what became of the assignments; every count is an int64 ().

    Attributes:
        routing: the slots of the given routing hold what was kept, each in its old slot; with
            ``fill_in`` the next holds the (k+1)-th choice; with ``intra_device`` the last holds
            the local expert, unless another slot holds it already and takes its weight too.
        places: row places of all groups and experts together.
        dropped: assignments of the given routing that found no place.
        filled: places taken by (k+1)-th choices.
        padding: places that stayed empty.
        served: tokens that were given to an expert of their own group.
    """

    routing: Routing
    places: Tensor
    dropped: Tensor
    filled: Tensor
    padding: Tensor
    served: Tensor


def rectify(
    routing: Routing,
    spec: Rectified,
    group_N: Tensor | None = None,
    ranges: Sequence[tuple[int, int]] | None = None,
) -> Rectification:
    """Limit each group's assignments to each expert, and repair what that wastes.

    With K_t the kept requests of token t, ``D = Σ_{j in K_t} p_j`` and sg for stop-gradient, the
    weights are ``p_i / sg(D)``; for top-1 without fill-in ``p - sg(p) + 1``. An unrouted token
    with ``a`` missing requests, whose best local expert has probability q, has weights
    ``p_i / sg(D + a q)`` and ``a q / sg(D + a q)`` (all arXiv 2402.12399, with its code).

    Args:
        routing: a top-k routing, best choice first, or one with ``settled_k``, with the
            probabilities (N, E) of all experts as its scores. Rows without an expert are padding.
        spec: what to do; its ``factor`` is the one that counts, in evaluation too.
        group_N: the group of each row, 0 to P - 1, where it is known: on a real device, its rank
            for every row. None for the even split that :class:`Rectified` describes.
        ranges: the ranges ``[start, stop)`` of experts with matrix products; None for all.

    Raises:
        SpecError: the routing has no probabilities, ``spec`` does not fit its sizes or kind, or
            ``group_N`` is not one integer a row.
    """
    id_E = _computed(routing, ranges)
    probability_NE = _probabilities(routing, spec, len(id_E))
    valid_N = routing.used_NK.any(-1)
    group_N = _even_groups(valid_N, spec.groups) if group_N is None else _checked(group_N, routing)
    request_NK, choice_NK = routing.expert_NK, routing.choices_NK()
    given = request_NK.shape[1]
    if spec.fill_in:
        next_N1 = _next_choice(request_NK, probability_NE, id_E).masked_fill(~valid_N[:, None], -1)
        request_NK = torch.cat([request_NK, next_N1], dim=1)
        choice_NK = torch.cat([choice_NK, torch.full_like(next_N1, given)], dim=1)
    room_G = _room(valid_N, group_N, spec, routing.choices, routing.experts)
    limited_NK = _any_of(request_NK, id_E, routing.experts)
    order_R = _queue(request_NK, choice_NK, probability_NE.detach(), spec.priority)
    fits_NK = _placed(request_NK, order_R, group_N, room_G, routing.experts)
    keep_NK = (fits_NK | ~limited_NK) & (request_NK >= 0)
    served_N = _unrouted(request_NK, keep_NK, given, spec) if spec.intra_device else None
    local_GL = id_E.view(spec.groups, -1)
    expert_NK, weight_NK = _weighted(
        request_NK, keep_NK, probability_NE, served_N, local_GL[group_N]
    )
    places = room_G.sum() * len(id_E)
    return Rectification(
        routing=routing.replace(expert_NK=expert_NK, weight_NK=weight_NK, full=False),
        places=places,
        dropped=(routing.used_NK & ~keep_NK[:, :given]).sum(),
        filled=keep_NK[:, given:].sum(),
        padding=places - (keep_NK & limited_NK).sum(),
        served=places.new_zeros(()) if served_N is None else served_N.sum(),
    )


def _computed(routing: Routing, ranges: Sequence[tuple[int, int]] | None) -> Tensor:
    """Ids of the experts with matrix products."""
    ranges = [(0, routing.experts)] if ranges is None else ranges
    device = routing.expert_NK.device
    return torch.cat([torch.arange(start, stop, device=device) for start, stop in ranges])


def _any_of(request_NK: Tensor, id_E: Tensor, experts: int) -> Tensor:
    """True where the request is for one of the experts ``id_E``."""
    among_E = torch.zeros(experts, dtype=torch.bool, device=id_E.device)
    among_E[id_E] = True
    return among_E[request_NK.clamp_min(0)] & (request_NK >= 0)


def _probabilities(routing: Routing, spec: Rectified, computed: int) -> Tensor:
    """The probabilities (N, E), kept from underflow."""
    scores_NE, wanted = routing.scores_NE, (routing.tokens, routing.experts)
    if scores_NE is None or tuple(scores_NE.shape) != wanted:
        given = "none" if scores_NE is None else f"scores of shape {tuple(scores_NE.shape)}"
        raise SpecError(
            f"rectification needs the probabilities of all experts, {wanted}, and the routing has "
            f"{given}; use a softmax top-k router"
        )
    if spec.fill_in and routing.settled_k is not None:
        raise SpecError(
            "the routing has no next choices for fill_in: what it has not chosen has weight 0; "
            "set fill_in=False"
        )
    spec.check_sizes(routing.choices, computed)
    return scores_NE.clamp_min(SMALLEST)


def _checked(group_N: Tensor, routing: Routing) -> Tensor:
    if tuple(group_N.shape) != (routing.tokens,) or group_N.dtype != torch.int64:
        raise SpecError(
            f"group_N is {group_N.dtype} of shape {tuple(group_N.shape)}; "
            f"wanted torch.int64 of shape ({routing.tokens},), one group a row"
        )
    return group_N


def _even_groups(valid_N: Tensor, groups: int) -> Tensor:
    """Runs of consecutive tokens whose lengths differ by at most one; padding takes no part."""
    rank_N = (valid_N.cumsum(0) - 1).clamp_min(0)
    return rank_N * groups // valid_N.sum().clamp_min(1)


def _next_choice(expert_NK: Tensor, probability_NE: Tensor, id_E: Tensor) -> Tensor:
    """The most probable of the experts ``id_E`` that each token has not chosen yet, (N, 1)."""
    rest_NE = probability_NE.detach().scatter(1, expert_NK.clamp_min(0), -1.0)
    return id_E[rest_NE[:, id_E].argmax(-1, keepdim=True)]


def _room(valid_N: Tensor, group_N: Tensor, spec: Rectified, k: int, experts: int) -> Tensor:
    """Places C of each expert for each group, (G,); never more than the group has tokens."""
    counted_N = torch.where(valid_N, group_N, spec.groups)
    tokens_G = count_ids(counted_N, spec.groups + 1)[: spec.groups]
    exact_G = tokens_G.double() * k * spec.factor / experts
    return torch.minimum((exact_G - 1e-9).ceil(), tokens_G.double()).clamp_min(0).long()


def _placed(
    request_NK: Tensor, order_R: Tensor, group_N: Tensor, room_G: Tensor, experts: int
) -> Tensor:
    """Which requests find a place with their own group's expert, if served in this order."""
    places = len(room_G) * experts
    place_NK = torch.where(request_NK >= 0, group_N[:, None] * experts + request_NK, places)
    position_R = queue_positions(place_NK.flatten(), order_R, places + 1)
    room_P = torch.cat([room_G.repeat_interleave(experts), room_G.new_zeros(1)])
    return position_R.view_as(request_NK) < room_P[place_NK]


def _queue(request_NK: Tensor, choice_NK: Tensor, probability_NE: Tensor, priority: str) -> Tensor:
    """The requests, flattened over (N, K), as they are served: all first choices come first."""
    tokens, slots = request_NK.shape
    if priority == "position":
        token_N1 = torch.arange(tokens, device=request_NK.device)[:, None]
        return (token_N1 * slots + choice_NK).T.flatten()
    if priority == "probability":
        urgency_NK = probability_NE.amax(-1, keepdim=True).expand(tokens, slots)
    else:
        asked_NK = request_NK.gather(1, choice_NK)
        urgency_NK = probability_NE.gather(1, asked_NK.clamp_min(0)).masked_fill(asked_NK < 0, -1.0)
    token_NK = urgency_NK.argsort(dim=0, descending=True, stable=True)
    return (token_NK * slots + choice_NK.gather(0, token_NK)).T.flatten()


def _unrouted(request_NK: Tensor, keep_NK: Tensor, k: int, spec: Rectified) -> Tensor:
    """True (N,) for the tokens that intra-device rectification serves."""
    requested_N, kept_N = (request_NK >= 0).sum(1), keep_NK.sum(1)
    mode = spec.unrouted
    if mode == "auto":
        mode = "ignore_kth" if spec.fill_in else "any"
    wanted_N = {"all": requested_N.clamp_max(1), "any": requested_N}.get(
        mode, requested_N.clamp_max(k)
    )
    return kept_N < wanted_N


def _weighted(
    request_NK: Tensor,
    keep_NK: Tensor,
    probability_NE: Tensor,
    served_N: Tensor | None,
    local_NL: Tensor,
) -> tuple[Tensor, Tensor]:
    """Experts and weights of the kept requests and, if any token is served, a local slot more.

    ``local_NL`` holds the experts of each token's own group.
    """
    share_NK = probability_NE.gather(1, request_NK.clamp_min(0)).masked_fill(~keep_NK, 0.0)
    expert_NK = request_NK.masked_fill(~keep_NK, -1)
    if served_N is None:
        return expert_NK, _normalised(share_NK, keep_NK, top_1=request_NK.shape[1] == 1)
    missing_N = ((request_NK >= 0) & ~keep_NK).sum(1)
    q_N1, local_N1 = _best_local(probability_NE, local_NL)
    extra_N1 = (q_N1 * missing_N[:, None]).masked_fill(~served_N[:, None], 0.0)
    # A token that has its local expert already runs it once, with both weights.
    again_NK = (expert_NK == local_N1) & served_N[:, None]
    share_NK = share_NK + torch.where(again_NK, extra_N1, 0.0)
    own_N1 = served_N[:, None] & ~again_NK.any(-1, keepdim=True)
    expert_NK = torch.cat([expert_NK, local_N1.masked_fill(~own_N1, -1)], dim=1)
    share_NK = torch.cat([share_NK, extra_N1.masked_fill(~own_N1, 0.0)], dim=1)
    weight_NK = _normalised(share_NK, expert_NK >= 0, top_1=False)
    if request_NK.shape[1] == 1:
        straight_NK = _normalised(share_NK, expert_NK >= 0, top_1=True)
        weight_NK = torch.where(served_N[:, None], weight_NK, straight_NK)
    return expert_NK, weight_NK


def _best_local(probability_NE: Tensor, local_NL: Tensor) -> tuple[Tensor, Tensor]:
    """Probability and id (N, 1) of the best expert of each token's own group."""
    best_N1 = probability_NE.detach().gather(1, local_NL).argmax(-1, keepdim=True)
    local_N1 = local_NL.gather(1, best_N1)
    return probability_NE.gather(1, local_N1), local_N1


def _normalised(share_NK: Tensor, used_NK: Tensor, *, top_1: bool) -> Tensor:
    """Weights that sum to 1 over the used slots, with the gradient of the shares alone.

    Their denominator is detached. The weight of a single choice would be p / sg(p), whose gradient
    is 1 / p; ``top_1`` gives it the gradient 1 instead.
    """
    if top_1:
        return (share_NK - share_NK.detach() + 1).masked_fill(~used_NK, 0.0)
    total_N1 = share_NK.detach().sum(1, keepdim=True)
    return share_NK / total_N1.masked_fill(total_N1 == 0, 1.0)

"""Rectify-Router: a capacity limit a device, with its two kinds of waste repaired afterwards.

Zeng, Guo, Fei, Yin, Zhou, Li, Sun, Yan, Lin, Qiu: "Turn Waste into Worth: Rectifying Top-k Router
of MoE", arXiv 2402.12399. P devices hold E / P consecutive experts each, and each sends an expert
at most C of its own tokens. Assignments beyond C are dropped; places that nobody asks for are
padding. *Fill-in* offers empty places to the tokens' (k+1)-th choices. *Intra-device*
rectification runs tokens that lost assignments on the best expert of their own device, which
needs no communication and knows no capacity.

Shape suffixes beside the usual ones: G groups (devices), and K here counts requests a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moekit.dispatch.capacity import queue_positions
from moekit.dispatch.dispatch import Dispatch, DispatchSpec
from moekit.dispatch.plan import Plan, plan_rows
from moekit.errors import SpecError
from moekit.experts.experts import Experts
from moekit.routing.router import ZERO_COMPUTATION, RouterSpec
from moekit.routing.routing import Routing, count_ids
from moekit.routing.top_k import TopK

# Smaller probabilities count as this and get no gradient: 1 / p times a gradient would overflow.
SMALLEST = 1e-30


@dataclass(frozen=True)
class Rectified(DispatchSpec):
    """Top-k under a capacity limit a device and expert, rectified (Rectify-Router).

    The devices are emulated on one process: the tokens of a batch are split into ``groups`` runs
    of consecutive tokens, padding left out, as even as their number allows. What a token gets thus
    depends on the batch around it; fix batches and ``groups`` where results are compared. With
    neither repair this is the paper's baseline. Where ragged shapes are possible,
    :class:`~moekit.Dropless` drops nothing and needs no repair.

    Attributes:
        factor: capacity c in training: an expert takes ``⌈c k S / E⌉`` of a group's S tokens.
        eval_factor: the same in evaluation; None for no limit there, and nothing to rectify.
        groups: number P of devices; expert e lives on device ``e // (E / P)``.
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
        if not isinstance(router, TopK):
            name = type(router).__name__
            raise SpecError(f"Rectified: it repairs top-k routing, and {name} is not; use TopK")
        self.require(
            not any(kind in ZERO_COMPUTATION for kind in kinds),
            "experts that compute nothing need no capacity; use a bank of feed-forward experts",
        )
        self.require(
            router.normalize != "none",
            "the kept experts' weights are made to sum to 1, so normalize none makes no "
            "difference; set normalize to selected",
        )
        self.require(
            router.scale == 1 and router.bias_rate == 0 and router.groups == 1,
            "next choices and weights follow the probabilities alone; leave the router's scale, "
            "bias_rate and groups at their defaults",
        )
        self.check_sizes(router.k, len(kinds))

    def check_sizes(self, k: int, experts: int) -> None:
        """Refuse ``k`` choices over a number of experts that the groups or fill-in do not fit."""
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

    def limited(self, routing: Routing, experts: Experts) -> Routing:
        spec = self.spec if self.training else self.in_evaluation
        return routing if spec is None else rectify(routing, spec).routing

    def plan(self, routing: Routing, experts: Experts) -> Plan:
        return plan_rows(routing, experts.dispatched_ranges, self.choice.groups)


@dataclass(frozen=True)
class Rectification:
    """A rectified routing and what became of the assignments; every count is an int64 ().

    Attributes:
        routing: slots 0 to k - 1 hold the first k choices that were kept, each in its old slot;
            with ``fill_in`` the next holds the (k+1)-th choice; with ``intra_device`` the last
            holds the local expert, unless another slot holds it already and takes its weight too.
        places: row places of all groups and experts together.
        dropped: assignments among the first k choices that found no place.
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


def rectify(routing: Routing, spec: Rectified, group_N: Tensor | None = None) -> Rectification:
    """Limit each group's assignments to each expert, and repair what that wastes.

    With K_t the kept requests of token t, ``D = Σ_{j in K_t} p_j`` and sg for stop-gradient, the
    weights are ``p_i / sg(D)``; for top-1 without fill-in ``p - sg(p) + 1``. An unrouted token
    with ``a`` missing requests, whose best local expert has probability q, has weights
    ``p_i / sg(D + a q)`` and ``a q / sg(D + a q)`` (all arXiv 2402.12399, with its code).

    Args:
        routing: a top-k routing, best choice first, with the probabilities (N, E) of all experts
            as its scores. Rows without an expert are padding.
        spec: what to do; its ``factor`` is the one that counts, in evaluation too.
        group_N: the group of each row, 0 to P - 1, where it is known: on a real device, its rank
            for every row. None for the even split that :class:`Rectified` describes.

    Raises:
        SpecError: the routing has no probabilities, ``spec`` does not fit its sizes, or
            ``group_N`` is not one integer a row.
    """
    probability_NE = _probabilities(routing, spec)
    valid_N = routing.used_NK.any(-1)
    group_N = _even_groups(valid_N, spec.groups) if group_N is None else _checked(group_N, routing)
    request_NK = routing.expert_NK
    if spec.fill_in:
        next_N1 = _next_choice(request_NK, probability_NE).masked_fill(~valid_N[:, None], -1)
        request_NK = torch.cat([request_NK, next_N1], dim=1)
    k = routing.expert_NK.shape[1]
    room_G = _room(valid_N, group_N, spec, k, routing.experts)
    keep_NK = _placed(request_NK, probability_NE, group_N, room_G, spec.priority)
    served_N = _unrouted(request_NK, keep_NK, k, spec) if spec.intra_device else None
    expert_NK, weight_NK = _weighted(
        request_NK, keep_NK, probability_NE, group_N, served_N, spec.groups
    )
    places = room_G.sum() * routing.experts
    return Rectification(
        routing=routing.replace(expert_NK=expert_NK, weight_NK=weight_NK, full=False),
        places=places,
        dropped=(routing.used_NK & ~keep_NK[:, :k]).sum(),
        filled=keep_NK[:, k:].sum(),
        padding=places - keep_NK.sum(),
        served=places.new_zeros(()) if served_N is None else served_N.sum(),
    )


def _probabilities(routing: Routing, spec: Rectified) -> Tensor:
    """The probabilities (N, E), kept from underflow."""
    scores_NE, wanted = routing.scores_NE, (routing.tokens, routing.experts)
    if scores_NE is None or tuple(scores_NE.shape) != wanted:
        given = "none" if scores_NE is None else f"scores of shape {tuple(scores_NE.shape)}"
        raise SpecError(
            f"rectification needs the probabilities of all experts, {wanted}, and the routing has "
            f"{given}; use a softmax top-k router"
        )
    spec.check_sizes(routing.expert_NK.shape[1], routing.experts)
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


def _next_choice(expert_NK: Tensor, probability_NE: Tensor) -> Tensor:
    """The most probable expert (N, 1) of each token that it has not chosen yet."""
    rest_NE = probability_NE.detach().scatter(1, expert_NK.clamp_min(0), -1.0)
    return rest_NE.argmax(-1, keepdim=True)


def _room(valid_N: Tensor, group_N: Tensor, spec: Rectified, k: int, experts: int) -> Tensor:
    """Places C of each expert for each group, (G,); never more than the group has tokens."""
    counted_N = torch.where(valid_N, group_N, spec.groups)
    tokens_G = count_ids(counted_N, spec.groups + 1)[: spec.groups]
    exact_G = tokens_G.double() * k * spec.factor / experts
    return torch.minimum((exact_G - 1e-9).ceil(), tokens_G.double()).clamp_min(0).long()


def _placed(
    request_NK: Tensor, probability_NE: Tensor, group_N: Tensor, room_G: Tensor, priority: str
) -> Tensor:
    """Which requests get a place: all first choices are served before any second one."""
    experts = probability_NE.shape[1]
    places = len(room_G) * experts
    place_NK = torch.where(request_NK >= 0, group_N[:, None] * experts + request_NK, places)
    order_R = _queue(request_NK, probability_NE.detach(), priority)
    position_R = queue_positions(place_NK.flatten(), order_R, places + 1)
    room_P = torch.cat([room_G.repeat_interleave(experts), room_G.new_zeros(1)])
    return position_R.view_as(request_NK) < room_P[place_NK]


def _queue(request_NK: Tensor, probability_NE: Tensor, priority: str) -> Tensor:
    """The requests, flattened over (N, K), in the order in which they are served."""
    tokens, slots = request_NK.shape
    slot_K = torch.arange(slots, device=request_NK.device)
    if priority == "position":
        token_NK = torch.arange(tokens, device=request_NK.device)[:, None].expand(tokens, slots)
        return (token_NK * slots + slot_K).T.flatten()
    if priority == "probability":
        urgency_NK = probability_NE.amax(-1, keepdim=True).expand(tokens, slots)
    else:
        urgency_NK = probability_NE.gather(1, request_NK.clamp_min(0))
    token_NK = urgency_NK.argsort(dim=0, descending=True, stable=True)
    return (token_NK * slots + slot_K).T.flatten()


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
    group_N: Tensor,
    served_N: Tensor | None,
    groups: int,
) -> tuple[Tensor, Tensor]:
    """Experts and weights of the kept requests and, if any token is served, a local slot more."""
    share_NK = probability_NE.gather(1, request_NK.clamp_min(0)).masked_fill(~keep_NK, 0.0)
    expert_NK = request_NK.masked_fill(~keep_NK, -1)
    if served_N is None:
        return expert_NK, _normalised(share_NK, keep_NK, top_1=request_NK.shape[1] == 1)
    missing_N = ((request_NK >= 0) & ~keep_NK).sum(1)
    q_N1, local_N1 = _best_local(probability_NE, group_N, groups)
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


def _best_local(probability_NE: Tensor, group_N: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Probability and id (N, 1) of the best expert of each token's own group."""
    size = probability_NE.shape[1] // groups
    id_NL = group_N[:, None] * size + torch.arange(size, device=group_N.device)
    best_N1 = probability_NE.detach().gather(1, id_NL).argmax(-1, keepdim=True)
    local_N1 = id_NL.gather(1, best_N1)
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

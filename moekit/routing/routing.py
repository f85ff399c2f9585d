"""The currency of the project: what a router decides, and what it may look at.

Shape suffixes, here and everywhere: N tokens, D model width, H expert hidden width, E experts,
K slots a token, R rows after dispatch, B batch, T time, S scopes (sequences, tasks, images).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from moekit.errors import SpecError
from moekit.routing.ids import count_ids

if TYPE_CHECKING:
    from moekit.experts.experts import Experts
    from moekit.routing.sequences import Attention, Sequences


@dataclass(frozen=True)
class Signals:
    """What a router may look at beside the hidden states; each field is optional.

    Attributes:
        valid_N: True where the row is a real token, False where it is padding.
        token_id_N: vocabulary id of each row.
        scope_N: index of the scope (sequence, chunk, task, image, environment) of each row.
        modality_N: type id of each row, for routers that treat types apart.
        scopes: number of scopes S, where the caller knows it; without it, a router that decides by
            scope reads it back from the device.
        task_S: index of the task of each scope, for routers that decide by task.
        condition_SC: one embedding a scope: a timestep, a task, an environment.
        sequences: how the rows stand in sequences, and which tokens each may look at.
        attention: attention of the layer's rows over the tokens of their own sequences.
        value_ND: what each row gives to those that attend to it: its value, mapped to the model
            width by attention's output projection.
        previous_logits_NE: raw router logits of the nearest MoE layer below.
        experts: the bank behind the router, for routers that use the experts' own weights.
    """

    valid_N: Tensor | None = None
    token_id_N: Tensor | None = None
    scope_N: Tensor | None = None
    modality_N: Tensor | None = None
    scopes: int | None = None
    task_S: Tensor | None = None
    condition_SC: Tensor | None = None
    sequences: Sequences | None = None
    attention: Attention | None = None
    value_ND: Tensor | None = None
    previous_logits_NE: Tensor | None = None
    experts: Experts | None = None

    def replace(self, **changes: object) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def to(self, device: torch.device | str | int) -> Self:
        """The signals on ``device``; accelerate asks for it between layers on different devices."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields.pop("experts")  # a module, which is where it is
        return self.replace(**{k: v.to(device) for k, v in fields.items() if hasattr(v, "to")})


@dataclass(frozen=True)
class Carry:
    """What a stack of layers hands from one to the next over depth, and nothing else does.

    Attributes:
        logits_NE: raw logits of the last router passed, for gating residuals (MoE++).
        momentum: tensors of the hidden state's shape, for residual rules with memory.
    """

    logits_NE: Tensor | None = None
    momentum: tuple[Tensor, ...] = ()

    def replace(self, **changes: object) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def to(self, device: torch.device | str | int) -> Self:
        """The carry on ``device``; accelerate asks for it between layers on different devices."""
        logits = self.logits_NE
        return self.replace(
            logits_NE=None if logits is None else logits.to(device),
            momentum=tuple(m.to(device) for m in self.momentum),
        )


@dataclass(frozen=True)
class Routing:
    """Which experts each token uses, and with what weight.

    Attributes:
        expert_NK: expert ids, int64; -1 marks an unused slot.
        weight_NK: combine weights; 0 in unused slots.
        experts: number of experts E that the ids index.
        logits_NE: raw scores before any normalisation, or None where they are never formed.
        scores_NE: what balance losses average: probabilities, or gates.
        losses: the router's own losses by name, unscaled; each a mean over the rows that are no
            padding, or a function of the router alone.
        valid_N: False for padding, or None when every row is a token.
        scope_N: which decision each row shares, for a routing broadcast by ``take``; None where
            every row has its own.
        scopes: number of scopes that ``scope_N`` indexes.
        full: True when every slot of every row is known to be used without looking at the data,
            so that the number of dispatched rows needs no device sync.
        settled_k: experts a token that the router comes to, where the slots are experts in no order
            of preference; None where each slot is a choice and the best comes first.
    """

    expert_NK: Tensor
    weight_NK: Tensor
    experts: int
    logits_NE: Tensor | None = None
    scores_NE: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    valid_N: Tensor | None = None
    scope_N: Tensor | None = None
    scopes: int | None = None
    full: bool = False
    settled_k: int | None = None

    def __post_init__(self) -> None:
        if self.expert_NK.shape != self.weight_NK.shape or self.expert_NK.dim() != 2:
            raise SpecError(
                f"expert ids {tuple(self.expert_NK.shape)} and weights "
                f"{tuple(self.weight_NK.shape)} must both be (N, K)"
            )

    def check_fits(self, x_ND: Tensor, width: int, experts: int) -> None:
        """Refuse tokens, or a bank of experts for rows of ``width``, that this is no routing of.

        Kernels would read beyond their ends.

        Raises:
            SpecError: sizes or devices differ.
        """
        if x_ND.device != self.expert_NK.device:
            raise SpecError(
                f"tokens are on {x_ND.device} and the routing is on {self.expert_NK.device}; "
                "move one to the other"
            )
        if x_ND.shape != (self.tokens, width):
            raise SpecError(
                f"tokens are {tuple(x_ND.shape)}; wanted ({self.tokens}, {width}), by the routing "
                "and the experts"
            )
        if experts != self.experts:
            raise SpecError(
                f"the routing is over {self.experts} experts and the bank has {experts}; route "
                "with a router that was built for the bank"
            )

    @property
    def tokens(self) -> int:
        """Number of rows N, padding included."""
        return self.expert_NK.shape[0]

    @property
    def used_NK(self) -> Tensor:
        """True where a slot holds an expert."""
        return self.expert_NK >= 0

    def replace(self, **changes: object) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    @property
    def choices(self) -> int:
        """Choices a token for which a capacity limit makes room."""
        return self.expert_NK.shape[1] if self.settled_k is None else self.settled_k

    def choices_NK(self) -> Tensor:
        """The slots of each token from its first choice to its last, int64 (N, K)."""
        if self.settled_k is not None:
            return self.weight_NK.detach().argsort(dim=-1, descending=True, stable=True)
        slot_K = torch.arange(self.expert_NK.shape[1], device=self.expert_NK.device)
        return slot_K.expand_as(self.expert_NK)

    def keep(self, keep_NK: Tensor) -> Self:
        """The routing without the assignments where ``keep_NK`` is False."""
        return self.replace(
            expert_NK=self.expert_NK.masked_fill(~keep_NK, -1),
            weight_NK=self.weight_NK.masked_fill(~keep_NK, 0.0),
            full=False,
        )

    def without_padding(self, valid_N: Tensor | None) -> Self:
        """The routing with no expert for rows where ``valid_N`` is False."""
        if valid_N is None:
            return self
        return self.keep(valid_N[:, None].expand_as(self.expert_NK)).replace(valid_N=valid_N)

    def take(self, scope_N: Tensor) -> Self:
        """Broadcast a routing made for S scopes to the N rows that ``scope_N`` assigns to them."""
        logits, scores = self.logits_NE, self.scores_NE
        return self.replace(
            expert_NK=self.expert_NK[scope_N],
            weight_NK=self.weight_NK[scope_N],
            logits_NE=None if logits is None else logits[scope_N],
            scores_NE=None if scores is None else scores[scope_N],
            valid_N=None if self.valid_N is None else self.valid_N[scope_N],
            scope_N=scope_N,
            scopes=self.tokens,
        )

    def per_scope(self) -> Self:
        """The S decisions that ``take`` broadcast, without logits, scores and losses.

        A scope without a row that has an expert, such as one of padding alone, has no expert.

        Raises:
            SpecError: every row has a decision of its own.
        """
        if self.scope_N is None or self.scopes is None:
            raise SpecError(
                "the routing has a decision for every row and none for a scope; "
                "use a router that decides by scope, such as PerSequence, PerChunk or PerTask"
            )
        rows = self.tokens
        index_N = torch.arange(rows, device=self.scope_N.device)
        index_N = torch.where(self.used_NK.any(1), index_N, rows)
        first_S = index_N.new_full((self.scopes,), rows)
        first_S = first_S.scatter_reduce(0, self.scope_N, index_N, "amin")
        pad = torch.nn.functional.pad
        return self.replace(
            expert_NK=pad(self.expert_NK, (0, 0, 0, 1), value=-1)[first_S],
            weight_NK=pad(self.weight_NK, (0, 0, 0, 1))[first_S],
            logits_NE=None,
            scores_NE=None,
            losses={},
            valid_N=None,
            scope_N=None,
            scopes=None,
            full=False,
        )

    def remap(self, expert_E: Tensor, experts: int) -> Self:
        """The routing with local expert ``i`` renamed to ``expert_E[i]`` in a bank of ``experts``.

        Logits and scores keep the router's own order and are left out of the result.
        """
        renamed_NK = torch.where(self.used_NK, expert_E[self.expert_NK.clamp_min(0)], -1)
        return self.replace(expert_NK=renamed_NK, experts=experts, logits_NE=None, scores_NE=None)

    def load_E(self) -> Tensor:
        """Assignments each expert received, int64 (E,)."""
        return count_ids(self.expert_NK.flatten() + 1, self.experts + 1)[1:]

    def valid_tokens(self) -> Tensor:
        """Number of rows that are not padding, int64 ()."""
        if self.valid_N is None:
            return torch.full((), self.tokens, device=self.expert_NK.device)
        return self.valid_N.sum()

    def dense_weight_NE(self) -> Tensor:
        """The combine weights as a matrix over all experts."""
        dense = self.weight_NK.new_zeros(self.tokens, self.experts + 1)
        index_NK = torch.where(self.used_NK, self.expert_NK, self.experts)
        return dense.scatter_add(1, index_NK, self.weight_NK)[:, :-1]


@dataclass(frozen=True)
class Load:
    """Assignments and tokens counted over some batches; what ``update`` methods are given.

    Attributes:
        assignments_E: assignments each expert received, int64.
        tokens: tokens that were routed, int64 ().
    """

    assignments_E: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, routing: Routing) -> Self:
        """The load of one routing, padding left out."""
        return cls(routing.load_E(), routing.valid_tokens())

    def __add__(self, other: Load) -> Load:
        return Load(self.assignments_E + other.assignments_E, self.tokens + other.tokens)


def all_slots_NE(active_NE: Tensor) -> Tensor:
    """Expert ids with one slot an expert: ``e`` in slot ``e`` where active, else -1."""
    index_E = torch.arange(active_NE.shape[1], device=active_NE.device)
    return torch.where(active_NE, index_E, -1)

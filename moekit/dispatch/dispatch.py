"""How rows travel: from tokens to experts and back, without or with a capacity limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from moekit.dispatch.capacity import Priority, capacities, limit
from moekit.dispatch.choice import BackendName, Choice
from moekit.dispatch.direct import add_direct, takes_direct
from moekit.dispatch.fused import feed_forward
from moekit.dispatch.plan import Plan, plan_places, plan_rows
from moekit.experts.direct import Direct
from moekit.experts.experts import Experts, ExpertsSpec, Run
from moekit.routing.router import RouterSpec
from moekit.routing.routing import Routing
from moekit.spec import Spec

Between = Callable[[Tensor], Tensor]
"""An operation on the inner rows of all slots (N, K, I), such as attention among tokens."""


@dataclass(frozen=True)
class Dispatched:
    """What a dispatch returns.

    Attributes:
        y_ND: the combined outputs.
        rows_E: rows of each dispatched expert that reached a matrix product, padding included.
        routing: the routing that was run, after any capacity limit.
    """

    y_ND: Tensor
    rows_E: Tensor
    routing: Routing


@dataclass(frozen=True)
class DispatchSpec(Spec):
    """Base of every dispatch."""

    abstract: ClassVar[bool] = True

    def check_layer(self, router: RouterSpec, kinds: tuple[str, ...]) -> None:
        """Refuse a router or bank that this dispatch makes no sense for."""

    def check_bank(self, experts: ExpertsSpec) -> None:
        """Refuse a bank whose experts cannot be run this way."""

    def rows_per_token(self, load: float) -> float:
        """Rows a token that reach a product, if ``load`` dispatched experts a token are chosen."""
        return load

    def build(self) -> Dispatch:
        """The dispatch module."""
        raise NotImplementedError


class Dispatch(nn.Module):
    """Base of every dispatch: limit the routing, plan the rows, run the bank, combine.

    Args:
        backend: what runs banks of feed-forward experts, see :class:`Dropless`.
    """

    def __init__(self, backend: BackendName = "auto") -> None:
        super().__init__()
        self.choice = Choice(backend)

    def forward(
        self, x_ND: Tensor, routing: Routing, experts: Experts, between: Between | None = None
    ) -> Dispatched:
        """Run ``experts`` on ``x_ND`` as ``routing`` says.

        Args:
            between: what to do between the map and the reduce of the bank, on one plan; slots
                without a row hold zeros.

        Raises:
            SpecError: the routing is not one of these tokens to these experts.
        """
        routing.check_fits(x_ND, experts.width, len(experts.kinds))
        routing = self.limited(routing, experts)
        if between is None and self.choice.decodes(x_ND, routing) and self.as_routed():
            decoded = self._decoded(x_ND, routing, experts)
            if decoded is not None:
                return decoded
        dispatched = experts.dispatched
        if dispatched:
            plan = self.plan(routing, experts)
            if between is None:
                y_ND = self._run(x_ND, plan, experts)
            else:
                y_ND = _around(between, experts, plan.compact(), plan.gather(x_ND))
            rows_E = self.rows(plan)
        else:
            y_ND = x_ND.new_zeros(x_ND.shape[0], experts.out_width)
            rows_E = routing.expert_NK.new_zeros(0)
        if dispatched < len(experts.kinds):
            y_ND = self._with_direct(y_ND, x_ND, experts.direct(routing.dense_weight_NE()))
        return Dispatched(y_ND, rows_E, routing)

    def _run(self, x_ND: Tensor, plan: Plan, experts: Experts) -> Tensor:
        """The dispatched experts' part of the output."""
        run = self.bank(plan, experts)
        tensors = experts.feed_forward() if run is experts else None
        backend = None if tensors is None else self.choice.backend(x_ND, plan, tensors)
        if tensors is None or backend is None:
            return plan.combine(run(plan.gather(x_ND), plan.groups))
        return feed_forward(x_ND, plan, tensors, backend)

    def _decoded(self, x_ND: Tensor, routing: Routing, experts: Experts) -> Dispatched | None:
        """The result for few tokens in one call without a plan, where that is possible."""
        bank = experts.feed_forward()
        found = None if bank is None else self.choice.decoded(x_ND, routing, bank)
        return None if found is None else Dispatched(*found, routing)

    def _with_direct(self, y_ND: Tensor, x_ND: Tensor, direct: Direct | None) -> Tensor:
        """The output with the direct experts' part, in place where that can be."""
        if direct is None:
            return y_ND
        kernels = self.choice.own_kernels(x_ND, *direct.tensors)
        if kernels and takes_direct(y_ND, x_ND, direct):
            return add_direct(y_ND, x_ND, direct)
        return direct.added(y_ND, x_ND).to(y_ND.dtype)

    def as_routed(self) -> bool:
        """Whether every assignment is run, in this mode, just as the router made it."""
        return False

    def limited(self, routing: Routing, experts: Experts) -> Routing:
        """The assignments that are kept, each in its own slot; further slots may follow."""
        return routing

    def plan(self, routing: Routing, experts: Experts) -> Plan:
        """The rows to run."""
        return plan_rows(routing, experts.dispatched_ranges, self.choice.groups)

    def bank(self, plan: Plan, experts: Experts) -> Run:
        """What computes the plan's rows: the bank as it is."""
        return experts

    def rows(self, plan: Plan) -> Tensor:
        """Rows of each expert that reach a product under this plan."""
        return plan.groups.count_E


@dataclass(frozen=True)
class Dropless(DispatchSpec):
    """Every assignment is run, each expert on just its own rows (MegaBlocks' dropless MoE).

    Attributes:
        backend: what runs a bank of feed-forward experts. ``native`` runs kernels of our own on
            CPUs, compiled at their first use: SwiGLU in one pass, others product by product. It and
            ``auto`` have one for what zero-computation experts add, too. ``streamed`` takes one
            expert after another, and ``few_rows`` is for a handful of rows an expert, as in
            decoding; both for CPUs.
            ``grouped_mm`` takes all rows at once through ``torch.nn.functional.grouped_mm``, or
            the loop where that does not take the dtype or sizes. ``triton`` runs kernels of our
            own on NVIDIA GPUs, gathers, activation and weighting fused into the products. ``loop``
            is one plain product an expert, the oracle. ``auto`` chooses among the others by
            device, dtype and shape, and logs its choice. Other banks run through grouped products
            or the loop. Results agree to rounding.
    """

    backend: BackendName = "auto"

    def build(self) -> Dispatch:
        return DroplessDispatch(self)


class DroplessDispatch(Dispatch):
    """The module of :class:`Dropless`."""

    def __init__(self, spec: Dropless) -> None:
        super().__init__(spec.backend)

    def as_routed(self) -> bool:
        return True


@dataclass(frozen=True)
class Capacity(DispatchSpec):
    """Each expert runs at most its capacity of rows; assignments beyond it are dropped.

    A token that loses all its assignments gets 0 from the layer and passes by its residual. For a
    router that comes to k experts a token, such as COMET's trees, there is room for k at all times.

    Attributes:
        factor: capacity over the mean load, in training.
        eval_factor: the same in evaluation; None for no limit there.
        tau: capacity of an expert with matrix products over that of a zero-computation expert;
            the τ of MoE++'s heterogeneous capacity.
        count: whether a token counts K times (``assignments``) or once (``tokens``, MoE++'s
            formula as printed, which drops at least 45% of top-2 assignments at factor 1.1).
        priority: who stays when an expert overflows, see :func:`moekit.dispatch.limit`.
        pad: run every expert on exactly its capacity of rows, zeros included, as one batched
            product with static shapes.
    """

    factor: float = 1.25
    eval_factor: float | None = None
    tau: float = 1.0
    count: Literal["assignments", "tokens"] = "assignments"
    priority: Literal["position", "score", "slot", "random"] = "slot"
    pad: bool = False

    def check(self) -> None:
        for name in ("factor", "eval_factor", "tau"):
            value = getattr(self, name)
            self.require(value is None or value > 0, f"{name} is {value}; wanted a positive number")

    def check_layer(self, router: RouterSpec, kinds: tuple[str, ...]) -> None:
        self.require(
            router.fixed_k or router.settles,
            f"{type(router).__name__} decides itself how many experts run; use Dropless",
        )

    def build(self) -> Dispatch:
        return CapacityDispatch(self)


class CapacityDispatch(Dispatch):
    """The module of :class:`Capacity`."""

    def __init__(self, spec: Capacity) -> None:
        super().__init__()
        self.spec = spec

    @property
    def factor(self) -> float | None:
        """The factor in force: that of training or that of evaluation."""
        return self.spec.factor if self.training else self.spec.eval_factor

    def capacity(self, routing: Routing, experts: Experts, factor: float) -> list[int]:
        """Row places of each expert for this batch, no more than there are assignments.

        Padding rows do not count, which reads the number of tokens back to the host.
        """
        tokens = routing.tokens if routing.valid_N is None else int(routing.valid_N.sum())
        slots = routing.choices if self.spec.count == "assignments" else 1
        places = capacities(tokens, slots, experts.kinds, factor, self.spec.tau)
        return [min(count, routing.expert_NK.numel()) for count in places]

    def as_routed(self) -> bool:
        return self.factor is None

    def limited(self, routing: Routing, experts: Experts) -> Routing:
        if self.factor is None:
            return routing
        places = self.capacity(routing, experts, self.factor)
        priority: Priority = self.spec.priority
        return limit(routing, places, priority)

    def plan(self, routing: Routing, experts: Experts) -> Plan:
        if not self.spec.pad or self.factor is None:
            return super().plan(routing, experts)
        places = self.capacity(routing, experts, self.factor)
        start = experts.dispatched_ranges[0][0]
        return plan_places(routing, experts.dispatched_ranges, places[start])

    def rows(self, plan: Plan) -> Tensor:
        count_E = plan.groups.count_E
        places = getattr(plan.groups, "places", None)
        return count_E if places is None else torch.full_like(count_E, places)


def _around(between: Between, experts: Experts, plan: Plan, rows_RD: Tensor) -> Tensor:
    inner_NKI = plan.to_slots(experts.map(rows_RD, plan.groups))
    rows_RI = plan.from_slots(between(inner_NKI))
    return plan.combine(experts.reduce(rows_RI, plan.groups))

"""Representative specs of every registered kind, and what the contract suite builds from them.

A new router, bank, dispatch or loss enters the whole suite with one line here; a test fails for
as long as the line is missing.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

import moekit
from moekit.dispatch import Capacity, DispatchSpec, Dropless, Merged, Rectified
from moekit.errors import SpecError
from moekit.experts import (
    GEGLU,
    GELU,
    AttentionHeads,
    Bank,
    Constant,
    Copy,
    ExpertsSpec,
    Linear,
    ReLU,
    SwiGLU,
    Zero,
)
from moekit.layer import MoE, MoESpec
from moekit.routing import (
    AttentionAware,
    Carry,
    Comet,
    DenseToSparse,
    DenseWarmup,
    DotProductAttention,
    DSelectK,
    Entropy,
    ExpertChoice,
    GumbelSoftmax,
    Hash,
    HeterogeneousBalance,
    L1Balance,
    LossSpec,
    ModuleRouting,
    MutualInformation,
    NoisyTopK,
    NullAwareBalance,
    Pathway,
    PerChunk,
    Permuted,
    PerSequence,
    PerTask,
    ReLURouting,
    RouterSpec,
    RouterZ,
    Sequences,
    Signals,
    SimilarityAware,
    Sinkhorn,
    SparseTransport,
    SwitchBalance,
    TopK,
)
from moekit.spec import Spec

WIDTH = 8
EXPERTS = 6
VOCABULARY = 11
PREVIOUS = 3

_solved_plan = functools.partial(
    SparseTransport, combine="plan", solver="bfgs", iterations=200, tolerance=1e-14
)

ROUTERS: dict[str, tuple[RouterSpec, ...]] = {
    "TopK": (
        TopK(k=2),
        TopK(k=1, normalize="none"),
        TopK(k=2, score="sigmoid", groups=2, top_groups=1, bias_rate=1e-3, scale=2.5, bias=True),
        TopK(k=3, normalize="nonzero", jitter=0.1, noise=True),
    ),
    "Pathway": (Pathway(k=2), Pathway(k=2, normalize="none", logit_norm="std")),
    "DenseWarmup": (DenseWarmup(k=1, warmup_k=3, warmup_steps=5),),
    "ReLURouting": (ReLURouting(k=2),),
    "ExpertChoice": (ExpertChoice(capacity=1.5),),
    "Hash": (Hash(k=2, seed=3),),
    "DenseToSparse": (
        DenseToSparse(temperature=2.0, final=0.3, steps=10, threshold=0.05),
        DenseToSparse(temperature=0.5, learned=True, activation="tanh", k=2),
        DenseToSparse(activation="sigmoid", bias=False, noise=True),
    ),
    "GumbelSoftmax": (GumbelSoftmax(), GumbelSoftmax(temperature=0.5, hard=True, seed=3)),
    "Comet": (Comet(k=2, gamma=4.0), Comet(k=1, gamma=0.5, hard=True)),
    "DSelectK": (DSelectK(k=2, gamma=8.0), DSelectK(k=2, gamma=8.0, static=True)),
    "SparseTransport": (
        SparseTransport(capacity_factor=1.5, multiple_of=1),
        SparseTransport(sparse="token", k=2),
        # At these limits nothing ties, so that the plan is one and has a gradient.
        _solved_plan(capacity_factor=EXPERTS),
        _solved_plan(sparse="token", k=EXPERTS),
    ),
    "Sinkhorn": (Sinkhorn(capacity_factor=1.5, multiple_of=1),),
    "ModuleRouting": (
        ModuleRouting(k=2, hidden=8),
        ModuleRouting(k=3, hidden=8, dropout=0.1, sampled=1, added=(2, 1), removed=2),
        # Without biases, whose gradient cancels to near bfloat16's rounding behind this gate.
        ModuleRouting(k=2, gate="cosine", hidden=8),
        ModuleRouting(k=2, gate="linear", removed=1),
    ),
    "Permuted": (
        Permuted(TopK(k=2), steps=5),
        Permuted(Comet(k=2, gamma=4.0), schedule="paper", steps=5),
    ),
    "SimilarityAware": (
        SimilarityAware(TopK(k=2), temperature=2.0),
        SimilarityAware(Pathway(k=2), rank=3, mix="logit"),
    ),
    "AttentionAware": (
        AttentionAware(TopK(k=2)),
        AttentionAware(TopK(k=2, normalize="none"), heads="min_entropy"),
        AttentionAware(DenseWarmup(k=1, warmup_k=3), heads="posterior", sigma=3.0),
    ),
    "NoisyTopK": (NoisyTopK(k=2), NoisyTopK(k=EXPERTS, noise_floor=0.5)),
    "PerSequence": (PerSequence(NoisyTopK(k=2)), PerSequence(ReLURouting(k=2))),
    "PerChunk": (PerChunk(TopK(k=2), length=2), PerChunk(Pathway(k=2), length=3)),
    "PerTask": (
        PerTask(NoisyTopK(k=2)),
        PerTask(TopK(k=2), descriptions=((4, 9, 4), (7,)), embedding=5, projected=3),
    ),
}

MIXED = Bank((SwiGLU(count=3, hidden=8), Constant(1), Copy(1), Zero(1)))
BANKS: dict[str, tuple[ExpertsSpec, ...]] = {
    "SwiGLU": (SwiGLU(count=EXPERTS, hidden=8), SwiGLU(count=EXPERTS, hidden=4, bias=True, out=12)),
    "GEGLU": (GEGLU(count=EXPERTS, hidden=8, bias=True),),
    "GELU": (GELU(count=EXPERTS, hidden=16),),
    "ReLU": (ReLU(count=EXPERTS, hidden=8, bias=True),),
    "Linear": (Linear(count=EXPERTS), Linear(count=EXPERTS, bias=False, out=12)),
    "Bank": (
        MIXED,
        Bank((Zero(1), SwiGLU(count=2, hidden=8), Constant(2), GELU(count=1, hidden=4, bias=True))),
    ),
    "AttentionHeads": (
        AttentionHeads(count=EXPERTS, heads=2, inner=8),
        Bank((AttentionHeads(2), Copy(1), AttentionHeads(3))),
    ),
    "Zero": (Bank((SwiGLU(count=4, hidden=8), Zero(2))),),
    "Copy": (Bank((Copy(2), ReLU(count=4, hidden=8))),),
    "Constant": (Bank((SwiGLU(count=4, hidden=8, bias=True), Constant(2))),),
}

PADDED = Capacity(factor=1.0, eval_factor=1.0, priority="position", pad=True)
DISPATCHES: dict[str, tuple[DispatchSpec, ...]] = {
    "Dropless": (
        Dropless(),
        Dropless(backend="loop"),
        Dropless(backend="native"),
        Dropless(backend="grouped_mm"),
        Dropless(backend="streamed"),
        Dropless(backend="few_rows"),
        *([Dropless(backend="triton")] if find_spec("triton") else []),
    ),
    "Capacity": (
        Capacity(factor=1.0, eval_factor=1.0),
        Capacity(factor=0.7, eval_factor=0.7, priority="score", tau=0.5),
        PADDED,
    ),
    "Rectified": (
        Rectified(factor=1.0, eval_factor=1.0, groups=2),
        Rectified(factor=0.5, eval_factor=0.5, groups=3, unrouted="any", priority="request"),
        Rectified(factor=0.7, eval_factor=0.7, fill_in=False, intra_device=False),
    ),
    "Merged": (Merged(), Merged(merge="gather")),
}

LOSSES: dict[str, tuple[LossSpec, ...]] = {
    "SwitchBalance": (SwitchBalance(), SwitchBalance(divide_by_k=True, scope="global")),
    "NullAwareBalance": (NullAwareBalance(), NullAwareBalance(weight=0.02, then=((3, 1e-4),))),
    "HeterogeneousBalance": (HeterogeneousBalance(tau=0.5),),
    "RouterZ": (RouterZ(), RouterZ(scope="global")),
    "Entropy": (Entropy(of="token"), Entropy(of="marginal")),
    "MutualInformation": (MutualInformation(), MutualInformation(scope="global")),
    "L1Balance": (L1Balance(k=2), L1Balance(k=2, balanced=False)),
}

FAMILIES: dict[type[Spec], dict[str, tuple[Spec, ...]]] = {
    RouterSpec: dict(ROUTERS),
    ExpertsSpec: dict(BANKS),
    DispatchSpec: dict(DISPATCHES),
    LossSpec: dict(LOSSES),
}


def registered(family: type[Spec]) -> set[str]:
    """The kinds of a family that the package itself defines."""
    for package in (moekit.routing, moekit.experts, moekit.dispatch):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            importlib.import_module(module.name)
    return {
        name for name, kind in family.kinds().items() if kind.__module__.split(".")[0] == "moekit"
    }


@dataclass(frozen=True)
class Case:
    """One layer of the cross product."""

    router: RouterSpec
    experts: ExpertsSpec
    dispatch: DispatchSpec = Dropless()

    @property
    def spec(self) -> MoESpec:
        return MoESpec(self.router, self.experts, self.dispatch)

    def layer(self, dtype: torch.dtype = torch.float32, seed: int = 0, width: int = WIDTH) -> MoE:
        """The layer in training mode, with parameters large enough to tell errors apart."""
        layer = self.spec.build(width, previous=PREVIOUS, vocabulary=VOCABULARY)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
        return layer.to(dtype)


@dataclass(frozen=True)
class Inputs:
    """What a call is given."""

    x_ND: Tensor
    signals: Signals
    carry: Carry

    @classmethod
    def make(
        cls, tokens: int, dtype: torch.dtype = torch.float32, seed: int = 1, width: int = WIDTH
    ) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        ids_N = torch.randint(VOCABULARY, (tokens,), generator=generator)
        logits_NE = torch.randn(tokens, PREVIOUS, generator=generator)
        x_ND = torch.randn(tokens, width, generator=generator)
        if dtype == torch.float64:
            logits_NE = logits_NE.double()
        query, key = torch.randn(2, 1, 2, tokens, 3, generator=generator).to(dtype)
        signals = Signals(
            token_id_N=ids_N,
            scope_N=torch.arange(tokens) % 3,
            task_S=torch.tensor([1, 0, 1]),
            sequences=Sequences(1, torch.ones(1, tokens, tokens, dtype=torch.bool).tril()),
            attention=DotProductAttention(query, key, 1.0),
            value_ND=torch.randn(tokens, width, generator=generator).to(dtype),
        )
        return cls(x_ND.to(dtype), signals, Carry(logits_NE=logits_NE))

    def rows(self, index: Tensor) -> Inputs:
        """The inputs of some rows, in the order of ``index``."""
        signals = self.signals
        assert signals.token_id_N is not None
        assert signals.scope_N is not None
        assert signals.value_ND is not None
        assert signals.sequences is not None
        assert signals.sequences.visible_BTP is not None
        assert isinstance(signals.attention, DotProductAttention)
        assert self.carry.logits_NE is not None
        visible, attention = signals.sequences.visible_BTP, signals.attention
        permuted = signals.replace(
            token_id_N=signals.token_id_N[index],
            scope_N=signals.scope_N[index],
            sequences=Sequences(1, visible[:, index][:, :, index]),
            attention=attention.replace(
                query_BATC=attention.query_BATC[:, :, index],
                key_BGPC=attention.key_BGPC[:, :, index],
            ),
            value_ND=signals.value_ND[index],
        )
        return Inputs(self.x_ND[index], permuted, Carry(logits_NE=self.carry.logits_NE[index]))

    def with_x(self, x_ND: Tensor) -> Inputs:
        return dataclasses.replace(self, x_ND=x_ND)


def label(spec: Spec) -> str:
    """A short name for a test id: the kind and the fields that differ from the defaults."""
    parts = []
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if isinstance(value, tuple) and value and isinstance(value[0], Spec):
            parts.append("+".join(label(item) for item in value))
        elif value != field.default:
            parts.append(f"{field.name}={value}")
    return f"{type(spec).__name__}({','.join(parts)})"


def refused(case: Case) -> bool:
    """Whether the layer refuses its parts; test_registry.py says which pairs those are."""
    try:
        return case.spec is None
    except SpecError:
        return True


def _cases() -> Iterator[list[Case]]:
    """All kinds with each other by their first spec, then each further spec with some partners.

    In lists of cases that differ in one part alone.
    """
    first = [[specs[0] for specs in family.values()] for family in (ROUTERS, BANKS, DISPATCHES)]
    others = [
        [spec for specs in family.values() for spec in specs[1:]]
        for family in (ROUTERS, BANKS, DISPATCHES)
    ]
    few = [[TopK(k=2), ReLURouting(k=2)], [first[1][0], MIXED], [Dropless(), PADDED]]
    for parts in (
        first,
        (others[0], few[1], few[2]),
        (few[0], others[1], few[2]),
        (few[0], first[1], others[2]),
        ([PerSequence(TopK(k=2))], [*few[1], *others[1]], DISPATCHES["Merged"]),
    ):
        most, more, fewest = sorted(parts, key=len, reverse=True)
        for pair in itertools.product(most, more):
            cases = [_case(*pair, third) for third in fewest]
            yield [case for case in cases if not refused(case)]


def _case(*parts: Spec) -> Case:
    """The layer of these parts, in whatever order."""
    (router,) = (part for part in parts if isinstance(part, RouterSpec))
    (experts,) = (part for part in parts if isinstance(part, ExpertsSpec))
    (dispatch,) = (part for part in parts if isinstance(part, DispatchSpec))
    return Case(router, experts, dispatch)


def pairs(case: Case) -> set[tuple[Spec, Spec]]:
    """The pairs of parts that a case puts together."""
    return set(itertools.combinations((case.router, case.experts, case.dispatch), 2))


def _shown() -> set[Case]:
    """Cases in which every pair of parts is found that is in some case: one of each list, taking
    turns, and what these leave out."""
    turns = [cases[turn % len(cases)] for turn, cases in enumerate(LISTS) if cases]
    shown = dict.fromkeys(turns)
    seen = set().union(*map(pairs, shown))
    for case in CASES:
        if not pairs(case) <= seen:
            shown[case] = None
            seen |= pairs(case)
    return set(shown)


LISTS = list(_cases())
CASES = list(dict.fromkeys(itertools.chain(*LISTS)))
SHOWN = _shown()


def every_case(wanted: Callable[[Case], bool] = lambda _: True) -> pytest.MarkDecorator:
    """Runs a test on every case that is wanted; those that show nothing new are slow."""
    params = [pytest.param(case, marks=speed(case)) for case in CASES if wanted(case)]
    return pytest.mark.parametrize("case", params, ids=name)


def speed(case: Case) -> list[pytest.MarkDecorator]:
    """The mark ``slow`` for a case whose pairs of parts others show."""
    return [] if case in SHOWN else [pytest.mark.slow]


def name(case: Case) -> str:
    return "-".join(label(spec) for spec in (case.router, case.experts, case.dispatch))

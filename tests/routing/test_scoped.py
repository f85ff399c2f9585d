"""Decisions for sequences, chunks and tasks, against loops that read as their definitions."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moekit import (
    Bank,
    DenseToSparse,
    Dropless,
    ExpertChoice,
    Hash,
    Merged,
    MoESpec,
    NoisyTopK,
    Pathway,
    PerChunk,
    PerSequence,
    PerTask,
    ReLURouting,
    Routing,
    Signals,
    SwiGLU,
    SwitchBalance,
    TopK,
    Zero,
)
from moekit.errors import SignalError, SpecError
from moekit.routing import (
    Carry,
    Comet,
    Load,
    LossSite,
    Permuted,
    Router,
    RouterSpec,
    RoutingLosses,
    Site,
)

WIDTH, EXPERTS = 6, 5
SITE = Site(WIDTH, ("feed_forward",) * EXPERTS)
SCOPE = torch.tensor([0, 2, 0, 1, 1, 2, 0, 0, 1, 0])  # interleaved, of 5, 3 and 2 rows


def built(spec: RouterSpec, site: Site = SITE) -> Router:
    """In evaluation, in float64, with parameters large enough to tell errors apart."""
    torch.manual_seed(0)
    router = spec.build(site).double().eval()
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return router


def rows(seed: int = 1, count: int = len(SCOPE)) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)).double()


def top_2(weight_EX: Tensor, x_X: Tensor) -> Tensor:
    """The dense weights (E,) of the two best experts."""
    logits = weight_EX @ x_X
    top, ids = logits.topk(2)
    return torch.zeros(len(logits)).double().scatter(0, ids, top.softmax(0))


# --- sequences ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scopes", [None, 3, 5])
def test_a_sequence_is_routed_by_the_mean_of_its_tokens(scopes: int | None) -> None:
    router, x_ND = built(PerSequence(TopK(k=2))), rows()
    valid_N = torch.ones(len(x_ND), dtype=torch.bool)
    valid_N[[6, 8]] = False
    x_ND[[6, 8]] = float("nan")  # padding may hold anything
    found = router(x_ND, Signals(scope_N=SCOPE, valid_N=valid_N, scopes=scopes))
    for n, scope in enumerate(SCOPE.tolist()):
        own = [i for i in range(len(x_ND)) if SCOPE[i] == scope and valid_N[i]]
        mean = sum(x_ND[i] for i in own) / len(own)
        wanted = top_2(router.router.weight, mean) * valid_N[n]
        torch.testing.assert_close(found.dense_weight_NE()[n], wanted)
    assert found.scopes == (scopes or 3)


@given(st.integers(0, 2**16), st.integers(0, 6))
@settings(max_examples=20, deadline=None)
def test_more_padding_changes_nothing(seed: int, padding: int) -> None:
    router, x_ND = built(PerSequence(NoisyTopK(k=2))), rows(seed)
    plain = router(x_ND, Signals(scope_N=SCOPE))
    more_ND = torch.cat([x_ND, rows(seed + 1, padding) * 100])
    scope_N = torch.cat([SCOPE, torch.arange(padding) % 3])
    valid_N = torch.arange(len(more_ND)) < len(x_ND)
    padded = router(more_ND, Signals(scope_N=scope_N, valid_N=valid_N))
    torch.testing.assert_close(padded.weight_NK[: len(x_ND)], plain.weight_NK)
    assert torch.equal(padded.expert_NK[: len(x_ND)], plain.expert_NK)
    for name, value in plain.losses.items():
        torch.testing.assert_close(padded.losses[name], value)


def test_the_leading_shape_tells_the_sequences() -> None:
    layer = MoESpec(PerSequence(TopK(k=2)), SwiGLU(EXPERTS, hidden=8)).build(WIDTH)
    x_BTD = torch.randn(2, 3, 4, WIDTH)  # six sequences of four
    scope_N = torch.arange(6).repeat_interleave(4)
    wanted = layer(x_BTD.flatten(0, 2), Signals(scope_N=scope_N)).y
    assert torch.equal(layer(x_BTD).y.flatten(0, 2), wanted)
    with pytest.raises(ValueError, match="PerSequenceRouter needs the signal scope_N"):
        layer(torch.randn(4, WIDTH))


def test_scopes_that_make_no_sense() -> None:
    router, x_ND = built(PerSequence(TopK(k=2))), rows(count=4)
    with pytest.raises(SignalError, match=r"holds 0 to 2; wanted 0 to 1"):
        router(x_ND, Signals(scope_N=torch.tensor([0, 1, 2, 0]), scopes=2))
    with pytest.raises(SignalError, match=r"holds -1 to 1; wanted 0 or more"):
        router(x_ND, Signals(scope_N=torch.tensor([0, 1, -1, 0])))
    hidden = Signals(scope_N=torch.tensor([0, 1, 0, 2]), valid_N=torch.arange(4) != 1)
    with pytest.raises(ValueError, match="every row of scope 1 is padding"):
        router(x_ND, hidden)
    with pytest.raises(SignalError, match="one entry a row"):
        router(x_ND, Signals(scope_N=torch.tensor([0, 1])))


class NeedsAttention(Router):
    """Looks at a signal of single rows."""

    requires: ClassVar[frozenset[str]] = frozenset({"attention_NN"})


@dataclasses.dataclass(frozen=True)
class AttentionSpec(RouterSpec):
    """Its spec."""

    def build(self, site: Site) -> Router:
        return NeedsAttention(site)


def test_routers_that_cannot_decide_for_a_scope() -> None:
    with pytest.raises(SpecError, match="Hash looks up the id of a single token"):
        PerSequence(Hash())
    with pytest.raises(SpecError, match="decides for a scope already"):
        PerTask(PerSequence(TopK(k=2)))
    with pytest.raises(SpecError, match="AttentionSpec needs the signal attention_NN"):
        PerSequence(AttentionSpec()).build(SITE)
    with pytest.raises(ValueError, match="k is 6 but the bank has 5"):
        PerSequence(NoisyTopK(k=6)).build(SITE)


@pytest.mark.parametrize(
    "router",
    [
        TopK(k=2, bias_rate=1e-3),
        NoisyTopK(k=3),
        Pathway(k=2),
        ReLURouting(k=2),
        ExpertChoice(capacity=2.0),
        DenseToSparse(temperature=0.5, k=2),
        Comet(k=2),
        Permuted(TopK(k=2), steps=3),
    ],
    ids=lambda r: type(r).__name__,
)
@pytest.mark.parametrize("outer", [PerSequence, PerChunk, PerTask])
def test_any_router_by_any_scope_trains(outer: type, router: RouterSpec) -> None:
    assert_trains(outer(router), outer)


@pytest.mark.parametrize("outer", [PerSequence, PerChunk, PerTask])
def test_a_permutation_around_a_scope_trains(outer: type) -> None:
    assert_trains(Permuted(outer(TopK(k=2)), steps=3), outer)


def assert_trains(spec: RouterSpec, outer: type) -> None:
    """A few steps with merging, past the end of a permutation's search."""
    bank = SwiGLU(EXPERTS, hidden=8)
    losses = (SwitchBalance(),) if spec.scores == "probabilities" else ()
    layer = MoESpec(spec, bank, Merged(), losses).build(WIDTH, previous=EXPERTS)
    carried = torch.randn(8, EXPERTS)
    routing_losses = RoutingLosses([LossSite(losses, layer.router)])
    for _ in range(4):
        out = layer(torch.randn(2, 4, WIDTH), Signals(), Carry(logits_NE=carried))
        total, _ = routing_losses([out.routing])
        (out.y.square().sum() + total).backward()
        layer.router.update(Load.of(out.routing))
    assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in layer.parameters())
    assert spec.per_scope
    assert spec.bidirectional == (outer is PerSequence)
    assert spec.needs_past == (outer is PerChunk)
    inner = spec.router.router if isinstance(spec, Permuted) else spec.router
    assert spec.causal == (inner.causal and outer is not PerSequence)


# --- chunks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 3, 8])
def test_a_chunk_is_routed_by_the_one_before(length: int) -> None:
    router, x_ND = built(PerChunk(TopK(k=2), length=length)), rows()
    valid_N = torch.ones(len(x_ND), dtype=torch.bool)
    valid_N[2] = False
    found = router(x_ND, Signals(scope_N=SCOPE, valid_N=valid_N)).dense_weight_NE()
    for scope in range(3):
        own = [i for i in range(len(x_ND)) if SCOPE[i] == scope and valid_N[i]]
        chunks = [own[i : i + length] for i in range(0, len(own), length)]
        for index, chunk in enumerate(chunks):
            mean = router.start_D
            if index:
                before = chunks[index - 1]
                mean = sum(x_ND[i] for i in before) / len(before)
            for n in chunk:
                torch.testing.assert_close(found[n], top_2(router.router.weight, mean))


@given(st.integers(0, 2**16), st.integers(1, 19), st.integers(1, 7))
@settings(max_examples=25, deadline=None)
def test_no_chunk_sees_itself_or_later_tokens(seed: int, cut: int, length: int) -> None:
    router, x_ND = built(PerChunk(TopK(k=2), length=length)), rows(seed, 20)
    signals = Signals(scope_N=torch.zeros(20, dtype=torch.int64))
    before = router(x_ND, signals).dense_weight_NE()
    changed = torch.cat([x_ND[:cut], rows(seed + 1, 20 - cut) * 10])
    after = router(changed, signals).dense_weight_NE()
    last = -(-cut // length) * length  # the rest of a chunk that began before
    torch.testing.assert_close(after[:last], before[:last])


def test_a_chunk_has_a_length() -> None:
    with pytest.raises(SpecError, match="length is 0"):
        PerChunk(length=0)


# --- tasks --------------------------------------------------------------------------------------

DESCRIPTIONS = ((4, 9, 4), (7,), (9, 1))


def described(router: Router, task: int) -> Tensor:
    """The gate's input: look the ids up, project each, and average."""
    ids = sorted({i for tokens in DESCRIPTIONS for i in tokens})
    projected = [
        router.weight @ router.table_UC[ids.index(i)] + router.bias for i in DESCRIPTIONS[task]
    ]
    return sum(projected) / len(projected)


@pytest.mark.parametrize("tasks_S", [[2, 0], [2, 0, 1, 2], [1]])
def test_a_task_is_routed_by_its_description(tasks_S: list[int]) -> None:
    spec = PerTask(TopK(k=2), descriptions=DESCRIPTIONS, embedding=7, projected=4)
    router, task_S = built(spec), torch.tensor(tasks_S)
    scope_N = torch.arange(9) % len(tasks_S)
    found = router(rows(count=9), Signals(scope_N=scope_N, task_S=task_S))
    for n in range(9):
        wanted = top_2(router.router.weight, described(router, tasks_S[scope_N[n]]))
        torch.testing.assert_close(found.dense_weight_NE()[n], wanted)
    assert found.scopes == min(len(tasks_S), len(DESCRIPTIONS))
    again = router(rows(seed=5, count=9), Signals(scope_N=scope_N, task_S=task_S))
    assert torch.equal(again.weight_NK, found.weight_NK)  # the rows do not matter


def test_one_task_needs_no_signal() -> None:
    router = built(PerTask(TopK(k=2)))
    found = router(rows(count=4))
    assert len(torch.unique(found.expert_NK, dim=0)) == 1
    assert found.scopes == 1


def test_tasks_that_make_no_sense() -> None:
    router = built(PerTask(TopK(k=2), descriptions=DESCRIPTIONS))
    scope_N = torch.tensor([0, 1, 0])
    with pytest.raises(ValueError, match="PerTaskRouter needs the signal task_S"):
        router(rows(count=3), Signals(scope_N=scope_N))
    with pytest.raises(SignalError, match="tasks outside 0 to 2"):
        router(rows(count=3), Signals(scope_N=scope_N, task_S=torch.tensor([0, 3])))
    with pytest.raises(SignalError, match="wanted one integer a scope"):
        router(rows(count=3), Signals(scope_N=scope_N, task_S=torch.tensor([0.0, 1.0])))
    with pytest.raises(SpecError, match="there is no task"):
        PerTask(descriptions=())
    with pytest.raises(SpecError, match="task 1 has no tokens"):
        PerTask(descriptions=((3,), ()))
    with pytest.raises(SpecError, match="projected is 0"):
        PerTask(projected=0)


def test_tasks_that_are_absent_do_not_count_in_the_losses() -> None:
    spec = PerTask(NoisyTopK(k=2), descriptions=DESCRIPTIONS)
    router = built(spec)
    scope_N = torch.zeros(3, dtype=torch.int64)
    found = router(rows(count=3), Signals(scope_N=scope_N, task_S=torch.tensor([1])))
    weight_E = top_2(router.router.weight, described(router, 1))
    wanted = weight_E.var() / weight_E.mean() ** 2
    torch.testing.assert_close(found.losses["importance_cv2"], wanted)


def test_composition_with_a_mixed_bank_and_the_ordinary_dispatch() -> None:
    bank = Bank((SwiGLU(count=4, hidden=8), Zero(1)))
    for dispatch in (Dropless(), Merged()):
        layer = MoESpec(PerSequence(TopK(k=2)), bank, dispatch).build(WIDTH)
        out = layer(torch.randn(3, 4, WIDTH))
        assert isinstance(out.routing, Routing)
        assert bool(torch.isfinite(out.y).all())

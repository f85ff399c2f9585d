"""Few tokens through the CPU kernels in one call, without a plan."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import pytest
import torch
from feed_forward_problems import Problem
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moekit import Bank, Copy, SwiGLU
from moekit.dispatch import Capacity, DispatchSpec, Dropless, Rectified, choice
from moekit.dispatch.fused import composed
from moekit.dispatch.native_decode import MOST_ROWS, decoded
from moekit.dispatch.native_library import library
from moekit.experts.experts import Experts, FeedForward
from moekit.routing import Routing

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler here")

DROPLESS = Dropless()
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
ONE = Problem(tokens=1, experts=8, k=2, width=64, hidden=48)
PROBLEMS = {
    "one token": ONE,
    "one expert": replace(ONE, experts=1, k=1, tokens=3),
    "every expert": replace(ONE, k=8, tokens=2),
    "sizes that no vector divides": replace(ONE, width=23, hidden=19, tokens=5),
    "one element": replace(ONE, width=1, hidden=1),
    "one expert takes all": replace(ONE, one_takes_all=True, k=1, tokens=40),
    "as many rows as it takes": replace(ONE, tokens=MOST_ROWS // 2),
    "several threads": replace(ONE, tokens=9, width=512, hidden=300, experts=20, k=4),
}


def inputs(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, FeedForward]:
    torch.manual_seed(problem.seed)
    x_ND, weight_NK, bank = problem.inputs(dtype, "cpu")
    return x_ND, problem.experts_NK(), weight_NK, bank


def check(problem: Problem, given: tuple[Tensor, Tensor, Tensor, FeedForward]) -> None:
    """Hold the result to that of plain operations in float64."""
    x_ND, expert_NK, weight_NK, bank = given
    found = decoded(*given)
    assert found is not None
    y_NO, count_E = found
    up_EJD, down_EOH = bank.up_EJD.double(), bank.down_EOH.double()
    plan = problem.plan(expert_NK, weight_NK.double())
    in_float64 = FeedForward(up_EJD, down_EOH, None, None, bank.activation)
    wanted_NO = composed(x_ND.double(), plan, in_float64)
    difference = float((y_NO.double() - wanted_NO).norm())
    assert y_NO.dtype == x_ND.dtype
    assert difference <= TOLERANCE[x_ND.dtype] * float(wanted_NO.norm())
    assert count_E.equal(expert_NK.flatten().bincount(minlength=problem.experts))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", PROBLEMS)
def test_results(name: str, dtype: torch.dtype, seed: int) -> None:
    problem = replace(PROBLEMS[name], seed=seed)
    check(problem, inputs(problem, dtype))


@pytest.mark.parametrize("of_weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_combine_weights_of_either_dtype(dtype: torch.dtype, of_weights: torch.dtype) -> None:
    x_ND, expert_NK, weight_NK, bank = inputs(ONE, dtype)
    check(ONE, (x_ND, expert_NK, weight_NK.to(of_weights), bank))


def test_weights_that_are_slices_of_larger_ones() -> None:
    x_ND, expert_NK, weight_NK, bank = inputs(ONE, torch.float32)
    up_EJD, down_EOH = torch.randn(8, 100, 70)[:, 2:98, 3:67], torch.randn(8, 64, 90)[..., :48]
    sliced = FeedForward(up_EJD, down_EOH, None, None, bank.activation)
    check(ONE, (x_ND, expert_NK, weight_NK, sliced))


@pytest.mark.parametrize("bad", [-1, 8, 2**40])
def test_an_id_that_is_no_expert_is_refused(bad: int) -> None:
    x_ND, expert_NK, weight_NK, bank = inputs(ONE, torch.float32)
    expert_NK[0, 1] = bad
    with pytest.raises(IndexError, match="not one of 0 to 7"):
        decoded(x_ND, expert_NK, weight_NK, bank)


Change = Callable[[Tensor, Tensor, Tensor, FeedForward], tuple[Tensor, Tensor, Tensor, FeedForward]]
NOT_TAKEN: dict[str, Change] = {
    "float64": lambda x, e, w, bank: (x.double(), e, w, bank),
    "weights of another dtype": lambda x, e, w, bank: (x.bfloat16(), e, w, bank),
    "combine weights in float64": lambda x, e, w, bank: (x, e, w.double(), bank),
    "ids of another dtype": lambda x, e, w, bank: (x, e.int(), w, bank),
    "tokens with gaps": lambda x, e, w, bank: (x.mT.contiguous().mT, e, w, bank),
    "ids with gaps": lambda x, e, w, bank: (x, e.mT.contiguous().mT, w, bank),
    "a bias": lambda x, e, w, bank: (x, e, w, bank._replace(up_bias_EJ=torch.zeros(8, 96))),
    "transposed weights": lambda x, e, w, bank: (
        *(x, e, w),
        bank._replace(up_EJD=bank.up_EJD.mT.contiguous().mT),
    ),
}


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_what_is_not_taken(name: str) -> None:
    given = inputs(replace(ONE, tokens=3), torch.float32)
    assert decoded(*given) is not None
    assert decoded(*NOT_TAKEN[name](*given)) is None


def layer_calls(
    monkeypatch: pytest.MonkeyPatch,
    experts: Experts,
    tokens: int = 3,
    dispatch: DispatchSpec = DROPLESS,
    training: bool = True,
) -> tuple[Tensor, list[str]]:
    """The output of a layer's dispatch, and whether it came from one call."""
    calls: list[str] = []

    def watch(*given: object) -> tuple[Tensor, Tensor] | None:
        calls.append("decoded")
        return decoded(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(choice, "decoded", watch)
    count = len(experts.kinds)
    torch.manual_seed(0)
    expert_NK = torch.rand(tokens, count).topk(2).indices
    routing = Routing(expert_NK, torch.rand(tokens, 2), count, full=True)
    done = dispatch.build().train(training)(torch.randn(tokens, experts.width), routing, experts)
    assert done.rows_E.equal(routing.load_E()[: experts.dispatched])
    return done.y_ND, calls


@pytest.fixture
def bank() -> Experts:
    torch.manual_seed(0)
    return SwiGLU(count=8, hidden=48).build(64)


def test_a_layer_decodes_where_no_gradient_is_asked_for(
    bank: Experts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.no_grad(), caplog.at_level(logging.INFO, logger="moekit"):
        y_ND, calls = layer_calls(monkeypatch, bank)
        wanted_ND, _ = layer_calls(monkeypatch, bank, dispatch=Dropless(backend="loop"))
    assert calls == ["decoded"]
    torch.testing.assert_close(y_ND, wanted_ND)
    assert "experts run through native (cpu, torch.float32)" in caplog.text


@torch.no_grad()
@pytest.mark.parametrize("spec", [Capacity(factor=2.0), Rectified(factor=2.0)])
def test_a_limit_that_is_off_in_evaluation_does_not_stand_in_the_way(
    spec: DispatchSpec, bank: Experts, monkeypatch: pytest.MonkeyPatch
) -> None:
    y_ND, calls = layer_calls(monkeypatch, bank, dispatch=spec, training=False)
    wanted_ND, _ = layer_calls(monkeypatch, bank, dispatch=Dropless(backend="loop"))
    assert calls == ["decoded"]
    torch.testing.assert_close(y_ND, wanted_ND)


OTHERWISE: dict[str, tuple[AbstractContextManager[object], int, DispatchSpec]] = {
    "a gradient may be asked for": (nullcontext(), 3, DROPLESS),
    "another backend is named": (torch.no_grad(), 3, Dropless(backend="streamed")),
    "there are many tokens": (torch.no_grad(), MOST_ROWS // 2 + 1, DROPLESS),
    "there are no tokens": (torch.no_grad(), 0, DROPLESS),
    "a limit is on": (torch.no_grad(), 3, Capacity(factor=8.0)),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_layer_does_not_decode_where(
    name: str, bank: Experts, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, tokens, dispatch = OTHERWISE[name]
    with context:
        _, calls = layer_calls(monkeypatch, bank, tokens, dispatch)
    assert not calls


@torch.no_grad()
def test_a_layer_that_is_watched_or_hooked_does_not_decode(
    bank: Experts, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FlopCounterMode(display=False):
        assert not layer_calls(monkeypatch, bank)[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert not layer_calls(monkeypatch, bank)[1]
    seen: list[object] = []
    handle = bank.register_forward_hook(lambda *given: seen.append(given))
    assert not layer_calls(monkeypatch, bank)[1]
    assert len(seen) == 1
    handle.remove()
    assert layer_calls(monkeypatch, bank)[1]


@torch.no_grad()
def test_zero_computation_experts_keep_their_part(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = Bank((SwiGLU(count=4, hidden=48), Copy(2))).build(64)
    y_ND, calls = layer_calls(monkeypatch, bank)
    wanted_ND, _ = layer_calls(monkeypatch, bank, dispatch=Dropless(backend="loop"))
    assert not calls
    torch.testing.assert_close(y_ND, wanted_ND)

"""What must not matter: padding, the order of tokens, the names of experts, later tokens."""

from __future__ import annotations

import itertools

import pytest
import torch
from contract_cases import CASES, EXPERTS, LOSSES, Case, Inputs, every_case, label, name, speed
from torch import Tensor

from moekit.dispatch import Capacity, Dropless, Merged
from moekit.experts import GEGLU, GELU, ReLU, SwiGLU
from moekit.layer import MoE
from moekit.routing import (
    ZERO_COMPUTATION,
    DenseToSparse,
    DenseWarmup,
    ExpertChoice,
    Hash,
    LossSite,
    LossSpec,
    NullAwareBalance,
    Pathway,
    PerChunk,
    PerSequence,
    ReLURouting,
    RouterSpec,
    RoutingLosses,
    Sinkhorn,
    SparseTransport,
    TopK,
)

ZERO = set(ZERO_COMPUTATION)
DROPLESS = [case for case in CASES if isinstance(case.dispatch, Dropless | Merged)]


def call(layer: MoE, inputs: Inputs) -> Tensor:
    return layer(inputs.x_ND, inputs.signals, inputs.carry).y


def padded(inputs: Inputs, seed: int = 9) -> tuple[Inputs, Tensor]:
    """The inputs with garbage rows strewn among them, and which rows are real."""
    tokens = inputs.x_ND.shape[0]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(tokens + 5, generator=generator)
    valid_N = order < tokens
    valid_N[-2:] = False  # and some at the end, as a collator leaves them
    position = valid_N.cumsum(0) - 1
    real = int(valid_N.sum())
    source = torch.where(valid_N, position, torch.randint(real, position.shape))
    rows = inputs.rows(source)
    garbage = torch.randn(rows.x_ND.shape, generator=generator).to(rows.x_ND.dtype) * 50
    x_ND = torch.where(valid_N[:, None], rows.x_ND, garbage)
    signals = rows.signals.replace(valid_N=valid_N)
    return Inputs(x_ND, signals, rows.carry), valid_N


@every_case()
def test_padding_changes_nothing(case: Case) -> None:
    layer = case.layer(torch.float64).eval()
    wide, valid_N = padded(Inputs.make(12, torch.float64))
    narrow = wide.rows(valid_N.nonzero().squeeze(1))
    narrow = Inputs(narrow.x_ND, narrow.signals.replace(valid_N=None), narrow.carry)
    y_wide, y_narrow = call(layer, wide), call(layer, narrow)
    torch.testing.assert_close(y_wide[valid_N], y_narrow, rtol=1e-12, atol=1e-12)
    assert bool((y_wide[~valid_N] == 0).all())
    parameters = list(layer.parameters())
    cotangent = torch.randn_like(y_narrow)
    # Noise is off in evaluation, and its weights with it.
    ours = torch.autograd.grad((y_wide[valid_N] * cotangent).sum(), parameters, allow_unused=True)
    theirs = torch.autograd.grad((y_narrow * cotangent).sum(), parameters, allow_unused=True)
    for g, wanted in zip(ours, theirs, strict=True):
        assert (g is None) == (wanted is None)
        if g is not None:
            torch.testing.assert_close(g, wanted, rtol=1e-11, atol=1e-12)


LOSS_CASES = [
    pytest.param(case, loss, marks=speed(case), id=f"{name(case)}-{label(loss)}")
    for case in DROPLESS
    for loss in itertools.chain(*LOSSES.values())
    if case.router.scores in loss.needs
    and not (isinstance(loss, NullAwareBalance) and not ZERO & set(case.experts.expert_kinds()))
]


@pytest.mark.parametrize(("case", "loss"), LOSS_CASES)
def test_padding_changes_no_loss(case: Case, loss: LossSpec) -> None:
    layer = case.layer(torch.float64).eval()
    wide, valid_N = padded(Inputs.make(12, torch.float64))
    narrow = wide.rows(valid_N.nonzero().squeeze(1))
    narrow = Inputs(narrow.x_ND, narrow.signals.replace(valid_N=None), narrow.carry)
    losses = RoutingLosses([LossSite((loss,), layer.router)])
    found = []
    for inputs in (wide, narrow):
        routing = layer(inputs.x_ND, inputs.signals, inputs.carry).routing
        total, _ = losses([routing])
        grads = torch.autograd.grad(total, list(layer.router.parameters()), allow_unused=True)
        found.append([total, *(g for g in grads if g is not None)])
    for given, wanted in zip(*found, strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-10, atol=1e-13)


@every_case(lambda case: case in DROPLESS and not case.router.needs_past)
def test_the_order_of_tokens_does_not_matter(case: Case) -> None:
    layer, inputs = case.layer(torch.float64).eval(), Inputs.make(14, torch.float64)
    order = torch.randperm(14)
    shuffled = call(layer, inputs.rows(order))
    torch.testing.assert_close(shuffled, call(layer, inputs)[order], rtol=1e-12, atol=1e-12)


@every_case(
    lambda case: (
        case.router.causal
        and (isinstance(case.dispatch, Dropless | Merged) or case.dispatch.priority == "position")
    )
)
def test_later_tokens_do_not_matter(case: Case) -> None:
    layer, inputs = case.layer(torch.float64).eval(), Inputs.make(14, torch.float64)
    before = call(layer, inputs)
    changed = Inputs.make(14, torch.float64, seed=77)
    keep = torch.arange(14) < 6
    x_ND = torch.where(keep[:, None], inputs.x_ND, changed.x_ND * 10)
    after = call(layer, inputs.with_x(x_ND))
    torch.testing.assert_close(after[:6], before[:6], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(after[6:], before[6:]) or _looks_away(case)


def _looks_away(case: Case) -> bool:
    """Whether later rows may stay as they are: routed by id, or all beyond the same capacity."""
    same_experts = getattr(case.router, "static", False) and not isinstance(case.dispatch, Dropless)
    return isinstance(case.router, Hash) or same_experts


def test_a_router_that_is_not_causal_says_so() -> None:
    layer = Case(ExpertChoice(capacity=1.5), SwiGLU(count=EXPERTS, hidden=8)).layer().eval()
    inputs = Inputs.make(14)
    before = call(layer, inputs)
    louder = inputs.x_ND.clone()
    louder[6:] *= 10
    assert not ExpertChoice.causal
    assert not torch.allclose(call(layer, inputs.with_x(louder))[:6], before[:6])


@pytest.mark.parametrize("priority", ["slot", "score"])
def test_capacity_by_slot_or_score_looks_at_later_tokens(priority: str) -> None:
    """Why these two are for training only: a later token can take an earlier one's place."""
    dispatch = Capacity(factor=0.5, eval_factor=0.5, priority=priority)
    layer = Case(TopK(k=2), SwiGLU(count=EXPERTS, hidden=8), dispatch).layer().eval()
    inputs = Inputs.make(14)
    before = call(layer, inputs)
    changed = [
        call(layer, inputs.with_x(torch.cat([inputs.x_ND[:6], torch.randn(8, 8) * 5])))[:6]
        for _ in range(10)
    ]
    assert any(not torch.allclose(after, before[:6]) for after in changed)


@pytest.mark.parametrize(
    "bank",
    [
        SwiGLU(count=EXPERTS, hidden=8),
        GEGLU(count=EXPERTS, hidden=8, bias=True),
        GELU(count=EXPERTS, hidden=16),
        ReLU(count=EXPERTS, hidden=8, bias=True),
    ],
    ids=label,
)
@pytest.mark.parametrize(
    "router",
    [
        TopK(k=2),
        TopK(k=3, score="sigmoid", bias=True, bias_rate=1e-3),
        Pathway(k=2, logit_norm="std"),
        DenseWarmup(k=1, warmup_k=3),
        ReLURouting(k=2),
        ExpertChoice(capacity=1.5),
        SparseTransport(capacity_factor=1.5),
        Sinkhorn(noise=0.0),
        DenseToSparse(learned=True, activation="tanh", threshold=0.1),
        PerSequence(TopK(k=2)),
        PerChunk(ReLURouting(k=2), length=2),
    ],
    ids=label,
)
def test_the_names_of_experts_do_not_matter(router: RouterSpec, bank) -> None:
    case = Case(router, bank)
    layer, inputs = case.layer(torch.float64), Inputs.make(14, torch.float64)
    renamed = case.layer(torch.float64)
    order = torch.randperm(EXPERTS)
    with torch.no_grad():
        for ours, theirs in zip(
            itertools.chain(layer.parameters(), layer.buffers()),
            itertools.chain(renamed.parameters(), renamed.buffers()),
            strict=True,
        ):
            if ours.dim() and ours.shape[0] == EXPERTS:
                theirs.copy_(ours[order])
    torch.testing.assert_close(call(renamed, inputs), call(layer, inputs), rtol=1e-12, atol=1e-12)

"""Permuted routers: Sinkhorn schedules, hardening, freezing, and what a checkpoint keeps."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from moekit.errors import DivergedError, SignalError, SpecError
from moekit.routing import (
    Comet,
    DSelectK,
    ExpertChoice,
    Hash,
    Load,
    LossSite,
    Permuted,
    PermutedRouter,
    ReLURouting,
    RouterSpec,
    RoutingLosses,
    Signals,
    Site,
    TopK,
)
from moekit.routing.permutation import (
    best_assignment,
    permutation_entropy,
    row_error,
    soft_permutation,
)

WIDTH, EXPERTS, VOCABULARY = 5, 6, 13
SITE = Site(WIDTH, ("feed_forward",) * EXPERTS, vocabulary=VOCABULARY)
WRAPPED: list[RouterSpec] = [
    TopK(k=2, normalize="none", scale=2.5),
    Comet(k=2),
    DSelectK(k=2),
    Hash(k=2),
    ReLURouting(k=2),
    ExpertChoice(capacity=1.5),
]
EVERY_ROUTER = pytest.mark.parametrize("spec", WRAPPED, ids=lambda s: type(s).__name__)


def built(spec: RouterSpec, seed: int = 0, **options: object) -> PermutedRouter:
    torch.manual_seed(seed)
    return Permuted(spec, **{"steps": 4, **options}).build(SITE)  # type: ignore[arg-type]


def called(router: torch.nn.Module, tokens: int = 9, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(1)
    x_ND = torch.randn(tokens, WIDTH, generator=generator, dtype=dtype)
    ids_N = torch.randint(VOCABULARY, (tokens,), generator=generator)
    return router(x_ND, Signals(token_id_N=ids_N))


def step(router: PermutedRouter) -> None:
    router.update(Load(torch.ones(EXPERTS, dtype=torch.int64), torch.tensor(EXPERTS)))


@pytest.mark.parametrize("schedule", ["paper", "safe"])
@pytest.mark.parametrize("progress", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize(("experts", "seed"), list(itertools.product([2, 8, 16], [0, 1])))
def test_columns_sum_to_one_and_safe_rows_too(
    schedule, progress: float, experts: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    log_weight_EE = (torch.rand(experts, experts, generator=generator) - 0.5) / 10
    plan_EE = soft_permutation(log_weight_EE, schedule, progress)
    torch.testing.assert_close(plan_EE.sum(0), torch.ones(experts), rtol=0, atol=1e-5)
    assert row_error(plan_EE) == (plan_EE.sum(1) - 1).abs().max()
    if schedule == "safe":
        assert float(row_error(plan_EE)) < 1e-2


def test_the_paper_schedule_does_not_converge() -> None:
    """What the safe schedule is for: at the end, most draws leave a row without any mass."""
    draws = [
        (torch.rand(8, 8, generator=torch.Generator().manual_seed(i)) - 0.5) for i in range(20)
    ]
    errors = [float(row_error(soft_permutation(draw / 10, "paper", 1.0))) for draw in draws]
    assert sorted(errors)[10] > 0.5


def test_sinkhorn_equals_a_slow_loop() -> None:
    log_weight_EE = (torch.rand(5, 5, dtype=torch.float64) - 0.5) / 10
    plan = (log_weight_EE / 1e-3).exp()  # up to e^50, well within float64
    for _ in range(20):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    found = soft_permutation(log_weight_EE, "paper", 0.0)
    torch.testing.assert_close(found, plan, rtol=1e-9, atol=1e-12)


def test_the_gradient_of_the_plan() -> None:
    log_weight_EE = (torch.rand(4, 4, dtype=torch.float64) * 0.1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda value: soft_permutation(value, "safe", 0.1), [log_weight_EE]
    )


def test_entropy_of_a_permutation_is_zero_and_of_a_uniform_matrix_its_logarithm() -> None:
    hard = torch.eye(6, dtype=torch.float64)[torch.randperm(6)]
    assert abs(float(permutation_entropy(hard))) < 2e-5  # 12 entries, 1e-6 each
    uniform = torch.full((6, 6), 1 / 6, dtype=torch.float64)
    wanted = 2 * 6 * torch.tensor(6.0, dtype=torch.float64).log()
    torch.testing.assert_close(permutation_entropy(uniform), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("progress", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_two_assignments_that_come_close_have_a_gradient_at_every_temperature(
    progress: float,
) -> None:
    """Moves are swaps: for two experts P is a logistic of the gain over 2τ, and so is its slope."""
    tau = 10.0 ** (-3 - 4 * progress)
    corner_EE = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    offset_EE = torch.tensor([[1, 4], [3, 6]], dtype=torch.float64) / 128  # of rows and columns
    for gain in (-2 * tau, 0.0, 3 * tau):
        log_weight_EE = (offset_EE + gain * corner_EE).requires_grad_()
        plan_EE = soft_permutation(log_weight_EE, "paper", progress)
        (slope_EE,) = torch.autograd.grad(plan_EE[0, 0], log_weight_EE)
        share = torch.sigmoid(torch.tensor(gain / (2 * tau), dtype=torch.float64))
        wanted = share * (1 - share) / (2 * tau) * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
        torch.testing.assert_close(plan_EE[0, 0].detach(), share, rtol=1e-6, atol=0)
        torch.testing.assert_close(slope_EE, wanted.double(), rtol=1e-6, atol=1e-6 / tau)


@EVERY_ROUTER
def test_an_identity_leaves_any_router_bit_equal(spec: RouterSpec) -> None:
    router = built(spec).eval()
    ours, theirs = called(router), called(router.router)
    for name in ("expert_NK", "weight_NK", "logits_NE", "scores_NE"):
        value, wanted = getattr(ours, name), getattr(theirs, name)
        assert (value is None) == (wanted is None)
        assert value is None or torch.equal(value, wanted), name
    # A soft plan that is the identity changes no weight either.
    router = built(spec).train()
    with torch.no_grad():
        router.log_weight_EE.copy_(torch.eye(EXPERTS))
    wanted = called(router.router).dense_weight_NE()
    torch.testing.assert_close(called(router).dense_weight_NE(), wanted, rtol=0, atol=1e-6)


@EVERY_ROUTER
def test_a_hard_permutation_renames_experts(spec: RouterSpec) -> None:
    router = built(spec).eval()
    order_E = torch.randperm(EXPERTS)
    router.order_E.copy_(order_E)
    ours, theirs = called(router), called(router.router)
    matrix_EE = torch.zeros(EXPERTS, EXPERTS)
    matrix_EE[torch.arange(EXPERTS), order_E] = 1
    assert torch.equal(ours.dense_weight_NE(), theirs.dense_weight_NE() @ matrix_EE)
    if theirs.scores_NE is not None:
        assert torch.equal(ours.scores_NE, theirs.scores_NE @ matrix_EE)
        assert torch.equal(ours.logits_NE[:, order_E], theirs.logits_NE)
    assert torch.equal(ours.load_E()[order_E], theirs.load_E())


@EVERY_ROUTER
def test_while_learning_weights_pass_the_plan_and_keep_their_sum(spec: RouterSpec) -> None:
    router = built(spec, schedule="safe").train()
    plan_EE = soft_permutation(router.log_weight_EE, "safe", 1 / 4)
    before_NE = called(router.router).dense_weight_NE()
    after = called(router)
    moved_NE = before_NE @ plan_EE
    total_N1 = before_NE.sum(1, keepdim=True)
    wanted_NE = moved_NE / moved_NE.sum(1, keepdim=True).clamp_min(1e-30) * total_N1
    torch.testing.assert_close(after.dense_weight_NE(), wanted_NE, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(after.weight_NK.sum(1), total_N1[:, 0], rtol=1e-5, atol=1e-6)
    assert after.losses["permutation_entropy"] == permutation_entropy(plan_EE)
    (after.weight_NK * torch.randn(after.weight_NK.shape)).sum().backward()
    assert bool(torch.isfinite(router.log_weight_EE.grad).all())
    assert bool((router.log_weight_EE.grad != 0).any())


def test_padding_gets_no_expert_while_learning() -> None:
    router = built(TopK(k=2)).train()
    valid_N = torch.tensor([True, False, True])
    routing = router(torch.randn(3, WIDTH), Signals(valid_N=valid_N))
    assert routing.used_NK.any(1).tolist() == valid_N.tolist()


@pytest.mark.parametrize("schedule", ["paper", "safe"])
def test_learning_ends_after_its_steps(schedule) -> None:
    router = built(Comet(k=2), schedule=schedule, steps=4)
    rate = 0.01 if schedule == "safe" else 0.0
    if schedule == "paper":
        # Its plan is hard so soon that float32 leaves a gradient only where two assignments tie.
        router.log_weight_EE.data[1] = router.log_weight_EE.data[0]
    learned = []
    for _ in range(6):
        for _ in range(2):  # micro-batches do not count
            routing = called(router.train())
        (routing.weight_NK.square().sum() + routing.losses["permutation_entropy"]).backward()
        with torch.no_grad():
            router.log_weight_EE -= rate * router.log_weight_EE.grad
        learned.append(bool((router.log_weight_EE.grad != 0).any()))
        router.zero_grad()
        step(router)
    assert learned == [True, True, True, False, False, False]  # zero, not none
    frozen_E = router.order_E.clone()
    source = router.plan_EE if schedule == "paper" else router.log_weight_EE
    _, wanted = linear_sum_assignment(-source.detach().double().numpy())
    assert frozen_E.tolist() == wanted.tolist()
    with torch.no_grad():
        router.log_weight_EE.copy_(torch.randn(EXPERTS, EXPERTS))  # weight decay, say
    step(router)
    assert torch.equal(router.order_E, frozen_E)
    assert torch.equal(called(router.train()).expert_NK, called(router.eval()).expert_NK)


def test_evaluation_is_hard_sparse_and_deterministic_at_every_step() -> None:
    router = built(TopK(k=2), steps=3)
    for _ in range(5):
        first, second = called(router.eval()), called(router.eval())
        assert first.expert_NK.shape[1] == 2
        assert torch.equal(first.expert_NK, second.expert_NK)
        assert torch.equal(first.weight_NK, second.weight_NK)
        step(router)


def test_a_checkpoint_in_the_middle_resumes_bit_for_bit() -> None:
    def advance(router: PermutedRouter) -> None:
        routing = called(router.train())
        (routing.weight_NK.square().sum() + sum(routing.losses.values())).backward()
        with torch.no_grad():
            for parameter in router.parameters():
                parameter -= 0.05 * parameter.grad
        router.zero_grad()
        step(router)

    ours, restored = built(Comet(k=2), seed=0, steps=6), built(Comet(k=2), seed=9, steps=6)
    for index in range(9):
        advance(ours)
        if index == 2:
            restored.load_state_dict(ours.state_dict())
        elif index > 2:
            advance(restored)
            for key, value in ours.state_dict().items():
                assert torch.equal(restored.state_dict()[key], value), key
            for kind in (True, False):
                ours.train(kind)
                restored.train(kind)
                assert torch.equal(called(ours).weight_NK, called(restored).weight_NK)
                assert torch.equal(called(ours).expert_NK, called(restored).expert_NK)


def test_the_wrapped_router_is_told_its_own_load() -> None:
    router = built(TopK(k=1, bias_rate=1e-3), steps=1).train()
    router.order_E.copy_(torch.tensor([2, 0, 1, 3, 4, 5]))
    load_E = torch.tensor([60, 0, 0, 0, 0, 0])  # expert 0 is output 1 of the router
    router.update(Load(load_E, torch.tensor(60)))
    assert router.router.correction_bias_E.argmin() == 1


def test_what_is_passed_through() -> None:
    assert built(Hash()).requires == {"token_id_N"}
    with pytest.raises(SignalError, match="needs the signal token_id_N"):
        built(Hash())(torch.randn(3, WIDTH))
    assert not Permuted(ExpertChoice()).causal
    assert Permuted(Hash()).scores == "nothing"
    assert Permuted(ReLURouting(k=2)).scores == "gates"
    router = built(Comet(k=2, entropy=0.3), zeta=0.5)
    assert router.loss_weights == {"entropy": 0.3, "permutation_entropy": 0.5}
    routing = called(router)
    total, values = RoutingLosses([LossSite((), router)])([routing])
    wanted = 0.3 * values["entropy"] + 0.5 * values["permutation_entropy"]
    torch.testing.assert_close(total, wanted)


def test_a_cast_to_half_keeps_the_plan() -> None:
    router = built(TopK(k=2))
    step(router)
    plan_EE = router.plan_EE.clone()
    router.to(torch.bfloat16)
    assert torch.equal(router.plan_EE, plan_EE)
    assert called(router.train(), dtype=torch.bfloat16).weight_NK.dtype == torch.float32


@pytest.mark.parametrize(
    "fields",
    [{"steps": 0}, {"zeta": -1.0}, {"schedule": "fast"}, {"router": Permuted(TopK())}],
    ids=str,
)
def test_bad_values_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(SpecError, match="Permuted"):
        Permuted(**fields)  # type: ignore[arg-type]


def test_bad_banks_and_matrices_are_refused() -> None:
    zero = (*SITE.kinds, "zero")
    with pytest.raises(SpecError, match="normalize=nonzero"):
        Permuted(TopK(normalize="nonzero")).check_experts(zero)
    Permuted(TopK(normalize="nonzero")).check_experts(SITE.kinds)
    with pytest.raises(SpecError, match="nothing to permute"):
        Permuted(TopK(k=1)).check_experts(("feed_forward",))
    with pytest.raises(SpecError, match="TopK: k is 9"):
        Permuted(TopK(k=9)).check_experts(SITE.kinds)
    with pytest.raises(SpecError, match="square"):
        soft_permutation(torch.zeros(3, 4), "safe", 0.0)
    with pytest.raises(DivergedError, match="not finite"):
        best_assignment(torch.full((2, 2), float("nan")))


def test_nan_does_not_vanish_while_learning() -> None:
    router = built(TopK(k=2)).train()
    assert bool(router(torch.full((2, WIDTH), float("nan"))).weight_NK.isnan().any())

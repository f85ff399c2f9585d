"""LoRA experts beside null experts, and routers of single projections (AdaMoE on dense models)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_adapt_mixture import DENSE, SPEC, adapted, llama, logits, tokens, trained
from torch import Tensor, nn
from transformers import PreTrainedModel

from moekit.errors import SpecError
from moekit.surgery.adapt import (
    AdaptSpec,
    LoRAExperts,
    MixtureRouter,
    adapter_parameters,
    forced_expert,
    install_adapter,
    load_adapter,
    merge_adapter,
    mole_loss,
    routing_report,
    save_adapter,
)
from moekit.surgery.adapt.mixture import Mixed

ADAMOE = AdaptSpec(
    experts=3,
    null=2,
    k=3,
    rank=4,
    alpha=8,
    dropout=0.0,
    combine="normalized",
    routers="linear",
    router_bias=False,
)


def one_linear(spec: AdaptSpec, seed: int) -> LoRAExperts:
    model = trained(install_adapter(llama(seed).double(), spec), seed)
    found = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(found, LoRAExperts)
    return found.train()


def in_a_loop(linear: Any, spec: AdaptSpec, x_ND: Tensor) -> Tensor:
    """Token by token: of the k best of all experts, those that are not null, weights over them."""
    rows = []
    for x_D in x_ND:
        p_E = (linear.mole_router.linear.weight @ x_D).softmax(-1)
        chosen = [e for e in p_E.topk(spec.k).indices.tolist() if e < spec.experts]
        total = sum((p_E[e] for e in chosen), start=torch.zeros(()))
        y_O = linear.base(x_D)
        for e in chosen:
            weight = p_E[e] / total if spec.combine == "normalized" else p_E[e]
            y_O = y_O + weight * spec.scale * (linear.lora_B[e] @ (linear.lora_A[e] @ x_D))
        rows.append(y_O)
    return torch.stack(rows)


@pytest.mark.parametrize("combine", ["normalized", "gate"])
@pytest.mark.parametrize(("null", "k"), [(0, 1), (0, 3), (2, 1), (2, 3), (2, 5), (7, 2)])
@pytest.mark.parametrize("seed", [0, 1])
def test_outputs_and_gradients_are_those_of_a_loop(
    combine: Any, null: int, k: int, seed: int
) -> None:
    spec = ADAMOE.replace(combine=combine, null=null, k=k)
    linear = one_linear(spec, seed)
    x_ND = torch.randn(17, 16, dtype=torch.float64, requires_grad=True)
    cotangent_NO = torch.randn(17, 16, dtype=torch.float64)
    leaves = [x_ND, *(p for p in linear.parameters() if p.requires_grad)]
    found = []
    for y_NO in (linear(x_ND), in_a_loop(linear, spec, x_ND)):
        gradients = torch.autograd.grad(y_NO, leaves, cotangent_NO, materialize_grads=True)
        found.append([y_NO, *gradients])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def with_null_logits(model: PreTrainedModel, value: float) -> PreTrainedModel:
    """Every null expert's logit is so large, whatever the token."""
    for module in model.modules():
        if isinstance(module, MixtureRouter):
            with torch.no_grad():
                module.linear.weight[module.spec.experts :] = 0
                module.linear.bias[module.spec.experts :] = value
    return model


def test_null_experts_that_win_leave_the_model_as_it_was_to_the_bit() -> None:
    spec = ADAMOE.replace(null=3, router_bias=True)
    model = with_null_logits(adapted(spec), 1e9)
    assert torch.equal(logits(model), logits(llama()))
    model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    for name, parameter in adapter_parameters(model).items():
        assert parameter.grad is None or bool(parameter.grad.isfinite().all()), name


def test_null_experts_that_lose_leave_the_top_k_of_the_others() -> None:
    model = with_null_logits(adapted(ADAMOE.replace(k=2, router_bias=True)), -1e9)
    plain = adapted(ADAMOE.replace(k=2, null=0, router_bias=True))
    with torch.no_grad():
        names = adapter_parameters(model)
        for name, parameter in adapter_parameters(plain).items():
            parameter.copy_(names[name][: len(parameter)])
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)


def test_a_true_expert_far_behind_a_null_one_still_has_weight_1() -> None:
    """Its probability is 0 in float32; weights come from logits."""
    model = with_null_logits(adapted(ADAMOE.replace(null=1, k=2, router_bias=True)), 500.0)
    router = model.get_submodule("model.layers.0.mlp.up_proj.mole_router")
    model(input_ids=tokens())
    assert isinstance(router, MixtureRouter)
    assert router.mixed is not None
    plan = router.mixed.plan
    assert plan is not None
    assert plan.weight_NK.sum(1).tolist() == [1.0] * 27


def test_experts_are_chosen_by_logits_where_probabilities_are_all_zero() -> None:
    router = MixtureRouter(2, ADAMOE.replace(router_bias=True, k=3), torch.zeros(1))
    with torch.no_grad():
        router.linear.weight.zero_()
        router.linear.bias.copy_(torch.tensor([-600.0, -900.0, -400.0, -800.0, 0.0]))
    router(torch.randn(1, 7, 2))
    assert router.mixed is not None
    assert router.mixed.expert_NK.tolist() == [[4, 2, 0]] * 7
    assert router.mixed.plan is not None
    assert router.mixed.plan.weight_NK.tolist() == [[0.0, 1.0, 0.0]] * 7


def test_only_true_choices_are_computed() -> None:
    model = adapted(ADAMOE)
    model(input_ids=tokens())
    for path, router in ((p, m) for p, m in model.named_modules() if isinstance(m, MixtureRouter)):
        assert router.mixed is not None
        assert router.mixed.plan is not None
        true_NK = router.mixed.expert_NK < ADAMOE.experts
        assert len(router.mixed.plan.assignment_R) == int(true_NK.sum()), path
        sums_N = router.mixed.plan.weight_NK.sum(1)
        torch.testing.assert_close(sums_N, true_NK.any(1).to(sums_N.dtype))


def of_choice(model: nn.Module, expert_NK: Tensor, probability_NE: Tensor) -> Tensor:
    """The balance loss of one made-up routing for all routers, of one sequence."""
    for module in model.modules():
        if isinstance(module, MixtureRouter):
            module.mixed = Mixed((1, len(expert_NK)), probability_NE, expert_NK, None)
    return mole_loss(model)


def test_the_balance_loss_in_figures() -> None:
    """3 tokens, 2 true experts and 2 null ones, which are interchangeable, 2 choices a token."""
    model = adapted(ADAMOE.replace(experts=2, null=2, k=2))
    p_NE = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]])
    chosen_NK = torch.tensor([[0, 1], [3, 2], [0, 2]])
    # shares: expert 0 2/6, expert 1 1/6, null 3/6 together and 1/4 each; P: 3/4 / 3 = 0.25 each
    assert float(of_choice(model, chosen_NK, p_NE)) == pytest.approx(0.25 * (2 + 1 + 3) / 6)
    uneven_NE = torch.tensor([[0.5, 0.2, 0.3, 0.0]] * 3)
    wanted = 0.5 * 2 / 6 + 0.2 * 1 / 6 + (0.3 + 0.0) * 1 / 4
    first = of_choice(model, chosen_NK, uneven_NE)
    assert float(first) == pytest.approx(wanted)
    swapped_NK = torch.tensor([[0, 1], [2, 2], [0, 2]])  # load moves between null experts alone
    assert float(of_choice(model, swapped_NK, uneven_NE)) == pytest.approx(wanted)
    moved_NK = torch.tensor([[0, 1], [1, 2], [0, 2]])
    assert float(of_choice(model, moved_NK, uneven_NE)) != pytest.approx(wanted)


@pytest.mark.parametrize(("null", "k", "load"), [(8, 3, 1.5), (8, 4, 2.0), (16, 4, 4 / 3)])
def test_balance_alone_brings_the_load_that_the_formula_says(
    null: int, k: int, load: float
) -> None:
    """A router trained on the loss alone comes to k n / (n + m) true experts a token."""
    torch.manual_seed(0)
    spec = ADAMOE.replace(experts=8, null=null, k=k)
    router = MixtureRouter(16, spec, torch.zeros(1))
    holder = nn.ModuleDict({"router": router})
    optimiser = torch.optim.Adam(router.parameters(), lr=1e-2)
    loads = []
    for step in range(600):
        router(torch.randn(1, 2048, 16))
        loss = mole_loss(holder)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step >= 500:
            assert router.mixed is not None
            loads.append(float((router.mixed.expert_NK < 8).sum(1).float().mean()))
    assert sum(loads) / len(loads) == pytest.approx(load, rel=0.01)


@pytest.mark.parametrize("name", DENSE)
def test_every_projection_has_a_router_and_saves_loads_and_merges(
    name: str, tmp_path: Path
) -> None:
    whole = DENSE[name]().double()
    wanted = logits(whole)
    model = install_adapter(DENSE[name]().double(), ADAMOE)
    assert torch.equal(logits(model), wanted)  # before training
    linears = [m for m in model.modules() if isinstance(m, LoRAExperts)]
    routers = [m for m in model.modules() if isinstance(m, MixtureRouter)]
    assert len(linears) == len(routers) > 4
    assert not any(".self_attn" in n and "lora_A.default" in n for n in adapter_parameters(model))
    trained(model)
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(DENSE[name]().double(), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(SpecError, match="3 LoRA experts"):
        merge_adapter(model)
    with forced_expert(model, 1):
        alone = logits(model).detach()
    merged = merge_adapter(model, 1)
    torch.testing.assert_close(logits(merged), alone, rtol=1e-8, atol=1e-8)
    assert {n for n, _ in merged.named_parameters()} == {n for n, _ in whole.named_parameters()}
    install_adapter(merged, SPEC)  # nothing was left behind


def test_one_expert_or_none() -> None:
    model = adapted(ADAMOE.replace(experts=1, null=1, k=1))
    model(input_ids=tokens())
    router = model.get_submodule("model.layers.1.mlp.down_proj.mole_router")
    assert isinstance(router, MixtureRouter)
    assert router.mixed is not None
    share = float((router.mixed.expert_NK == 0).float().mean())
    assert 0 < share < 1
    with pytest.raises(SpecError, match="1 LoRA experts"):
        merge_adapter(model)


def test_the_report_counts_null_experts_as_one() -> None:
    model = adapted(ADAMOE)
    found = routing_report(model, {"input_ids": tokens()}, [0, 1, 0])
    for layer in found:
        for share_E in layer.share_DE:
            assert len(share_E) == ADAMOE.experts + 1
            assert sum(share_E) == pytest.approx(1)
    assert max(share_E[-1] for layer in found for share_E in layer.share_DE) > 0

"""Null experts grafted on mixtures of transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from surgery_models import COMMON, CONFIGS, VOCABULARY, Blocks, random_model, tiny
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    PreTrainedModel,
)

from moekit.errors import SignalError, SpecError
from moekit.routing import NullAwareBalance, SwitchBalance
from moekit.surgery import add_null_experts, register_experts
from moekit.surgery.grafted import GRAFTABLE, GraftedMoEForCausalLM, NullRouter

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm", "moekit")
FIRST_MOE = {"mixtral": 0, "qwen2_moe": 1, "qwen3_moe": 0, "olmoe": 0}
EXPERTS = 8


def tokens(batch: int = 2, length: int = 11, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def grafted(name: str, count: int = EXPERTS, k: int = 3, **named: Any) -> GraftedMoEForCausalLM:
    found = add_null_experts(tiny(name), count, k, **named)
    assert isinstance(found, GraftedMoEForCausalLM)
    return found


def block_of(model: PreTrainedModel, name: str) -> Any:
    inner = getattr(model, "inner", model)
    return inner.model.layers[FIRST_MOE[name]].mlp


def logits(model: PreTrainedModel) -> Tensor:
    out: Tensor = model(input_ids=tokens()).logits
    return out


@pytest.mark.parametrize("name", GRAFTABLE)
@pytest.mark.parametrize("count", [8, 16])
def test_routers_grow_by_copies_and_true_logits_stay(name: str, count: int) -> None:
    model, before = grafted(name, count), tiny(name)
    x_ND = torch.randn(9, before.config.hidden_size)
    for router in model.routers:
        twins = router.null_weight.unflatten(0, (count // EXPERTS, EXPERTS))
        for twin_ED in twins:
            torch.testing.assert_close(twin_ED, router.weight, rtol=1e-3, atol=1e-3)
            assert not torch.equal(twin_ED, router.weight)
    old, new = block_of(before, name).gate, block_of(model, name).gate
    assert torch.equal(old.weight, new.weight)
    torch.testing.assert_close(new(x_ND)[0][:, :EXPERTS], old(x_ND)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_without_null_experts_it_is_the_model_to_the_bit(name: str) -> None:
    before = tiny(name)
    model = grafted(name, count=0, k=before.config.num_experts_per_tok)
    torch.testing.assert_close(logits(model), logits(before), rtol=1e-5, atol=1e-5)
    x_ND = torch.randn(9, before.config.hidden_size)
    for old, new in zip(block_of(before, name).gate(x_ND), model.routers[0](x_ND), strict=True):
        assert torch.equal(old, new)


def settings(name: str, k: int) -> Any:
    """The same sizes with another k and normalised weights."""
    config: Any = CONFIGS[name]()
    config.num_experts_per_tok = k
    config.norm_topk_prob = True
    return config


@pytest.mark.parametrize("name", GRAFTABLE)
@pytest.mark.parametrize("k", [1, 3, 12])
def test_null_experts_that_nobody_wants_leave_top_k(name: str, k: int) -> None:
    model = grafted(name, k=k)
    _set_null_logits(model, -1e9)
    wanted = random_model(settings(name, min(k, EXPERTS)))
    wanted.load_state_dict(tiny(name).state_dict())
    torch.testing.assert_close(logits(model), logits(wanted), rtol=1e-4, atol=1e-4)


def _set_null_logits(model: GraftedMoEForCausalLM, value: float) -> None:
    """By a router whose null rows answer a constant that is added to every token."""
    for router in model.routers:

        def forward(x: Tensor, own: NullRouter = router) -> Any:
            x_ND = x.reshape(-1, x.shape[-1])
            true_NE = F.linear(x_ND, own.weight)
            null_NM = torch.full((len(x_ND), len(own.null_weight)), value)
            picked = torch.cat([true_NE, null_NM], 1).float().softmax(-1).topk(own.config.k)
            is_true = picked.indices < len(own.weight)
            kept = picked.values * is_true
            total = kept.sum(-1, keepdim=True)
            own.seen = torch.cat([true_NE, null_NM], 1), picked.indices
            return true_NE, kept / torch.where(total > 0, total, 1.0), picked.indices

        router.forward = forward  # type: ignore[method-assign]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", GRAFTABLE)
def test_null_experts_that_all_want_leave_nothing(name: str, implementation: str) -> None:
    register_experts()
    model = grafted(name)
    model.set_experts_implementation(implementation)
    _set_null_logits(model, 1e9)
    x_BTD = torch.randn(2, 5, model.config.text_config.hidden_size, requires_grad=True)
    y_BTD = block_of(model, name)(x_BTD)
    shared = getattr(block_of(model, name), "shared_expert", None)
    if shared is None:
        assert torch.equal(y_BTD, torch.zeros_like(y_BTD))
    y_BTD.square().sum().backward()
    assert x_BTD.grad is not None
    assert x_BTD.grad.isfinite().all()
    assert model.true_rows[0].rows == 0


@pytest.mark.parametrize("normalize", ["true", "all"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe"])
def test_a_block_is_the_sum_over_its_true_picks(
    name: str, implementation: str, normalize: Any
) -> None:
    register_experts()
    model = grafted(name, normalize=normalize)
    model.set_experts_implementation(implementation)
    block = block_of(model, name)
    x_ND = torch.randn(13, model.config.text_config.hidden_size)
    found = block(x_ND[None])[0]
    both_ED = torch.cat([block.gate.weight, block.gate.null_weight])
    rows = 0
    for n, x_D in enumerate(x_ND):
        p_E = (both_ED @ x_D).softmax(-1).detach()
        picked = p_E.topk(3).indices.tolist()
        true = [e for e in picked if e < EXPERTS]
        rows += len(true)
        total = sum(float(p_E[e]) for e in (true if normalize == "true" else picked))
        wanted = torch.zeros_like(x_D)
        for e in true:
            gate, up = (block.experts.gate_up_proj[e] @ x_D).chunk(2)
            wanted += p_E[e] / total * (block.experts.down_proj[e] @ (F.silu(gate) * up))
        torch.testing.assert_close(found[n], wanted, rtol=1e-4, atol=1e-4)
    assert model.true_rows[0].rows == rows < 39


def test_true_experts_far_behind_null_ones_are_still_the_best_of_theirs() -> None:
    router = grafted("mixtral", k=3).routers[0]
    with torch.no_grad():
        router.weight.zero_()
        router.null_weight.zero_()
        router.weight[:, 0] = torch.tensor([-500.0, -300.0, -700.0, *[-900.0] * 5])
        router.null_weight[1:, 0] = -1000.0
    x_ND = torch.zeros(4, router.weight.shape[1])
    x_ND[:, 0] = 1
    _, weight_NK, expert_NK = router(x_ND)
    assert expert_NK.tolist() == [[8, 1, 0]] * 4
    assert weight_NK.tolist() == [[0.0, 1.0, 0.0]] * 4
    router.config.normalize = "all"
    assert router(x_ND)[1].tolist() == [[0.0, 0.0, 0.0]] * 4


def test_only_true_rows_reach_the_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = grafted("mixtral")
    seen: list[int] = []
    kind: Any = type(block_of(model, "mixtral").experts)
    run: Callable[..., Tensor] = kind.forward

    def watch(self: nn.Module, x_RD: Tensor, *rest: Any) -> Tensor:
        seen.append(len(x_RD))
        return run(self, x_RD, *rest)

    monkeypatch.setattr(kind, "forward", watch)
    logits(model)
    assert seen == [rows.rows for rows in model.true_rows]
    per_token = model.true_experts_per_token()
    assert [22 * mean for mean in per_token] == pytest.approx(seen)


@pytest.mark.parametrize("name", GRAFTABLE)
def test_save_load_and_generate(name: str, tmp_path: Path) -> None:
    model = grafted(name)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "moekit_grafted"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, GraftedMoEForCausalLM)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-6, atol=1e-6)
    given = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ids = tokens(1, 5)
    assert torch.equal(loaded.generate(ids, **given), model.generate(ids, **given))
    uncached = model.generate(ids, use_cache=False, **given)
    assert torch.equal(uncached, model.generate(ids, **given))  # causal: no look at later tokens


def test_the_balance_loss_is_that_of_the_paper_without_padding() -> None:
    model = grafted("mixtral", count=16, k=4)
    mask_BT = torch.ones_like(tokens())
    mask_BT[1, 6:] = 0
    model.train()
    loss = model(input_ids=tokens(), attention_mask=mask_BT, labels=tokens()).loss.detach()
    placed = model(tokens(), mask_BT, labels=tokens(), return_dict=False)
    torch.testing.assert_close(placed[0].detach(), loss)
    valid_N = mask_BT.flatten().bool()
    total = 0.0
    for router in model.routers:
        assert router.seen is not None
        p_NE = router.seen[0].detach().softmax(-1)[valid_N]
        picked = router.seen[1][valid_N]
        f_E = torch.tensor([float((picked == e).any(1).float().mean()) for e in range(24)])
        f_E[EXPERTS:] = f_E[EXPERTS:].mean()
        total += 24 * float((f_E * p_NE.mean(0)).sum())
    assert float(model.balance_loss(mask_BT).detach()) == pytest.approx(total, rel=1e-5)
    model.config.balance_weight = 0.0
    plain = model(input_ids=tokens(), attention_mask=mask_BT, labels=tokens()).loss.detach()
    assert float(loss) == pytest.approx(float(plain) + 0.02 * total, rel=1e-5)
    model.eval()
    evaluated = model(input_ids=tokens(), attention_mask=mask_BT, labels=tokens()).loss.detach()
    assert float(evaluated) == pytest.approx(float(plain), rel=1e-6)


@pytest.mark.parametrize(("count", "k"), [(8, 3), (16, 4)])
def test_the_balance_loss_alone_brings_the_load_to_its_formula(count: int, k: int) -> None:
    config = MixtralConfig(
        **{**COMMON, "num_hidden_layers": 1},
        intermediate_size=16,
        num_local_experts=8,
        num_experts_per_tok=2,
    )
    model = add_null_experts(random_model(config), count, k)
    assert isinstance(model, GraftedMoEForCausalLM)
    (router,) = model.routers
    optimiser = torch.optim.Adam(router.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        router(torch.randn(1024, 16, generator=generator))
        optimiser.zero_grad()
        model.balance_loss().backward()
        optimiser.step()
    router(torch.randn(20000, 16, generator=generator))
    (load,) = model.true_experts_per_token()
    assert load == pytest.approx(k * 8 / (8 + count), rel=0.03)  # 1% after longer training


def test_training_reaches_every_parameter() -> None:
    model = grafted("olmoe", k=6).train()
    blocks = Blocks()
    model(
        input_ids=blocks.tokens, attention_mask=blocks.masks, labels=blocks.tokens
    ).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert all(bool(r.null_weight.grad.abs().sum() > 0) for r in model.routers)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"count": 4, "k": 2}, "4 null experts for 8 experts"),
        ({"count": -8, "k": 2}, "-8 null experts"),
        ({"count": 8, "k": 17}, "k is 17; wanted 1 to 16"),
        ({"count": 8, "k": 0}, "k is 0"),
        ({"count": 8, "k": 2, "normalize": "some"}, "'true' or 'all'"),
        ({"count": 8, "k": 2, "loss": SwitchBalance()}, "NullAwareBalance"),
        ({"count": 8, "k": 2, "loss": NullAwareBalance(then=((3, 0.1),))}, "constant weight"),
    ],
)
def test_what_cannot_be(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        add_null_experts(tiny("mixtral"), **arguments)


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "granitemoe", "phimoe"])
def test_architectures_whose_router_is_another(name: str) -> None:
    with pytest.raises(SpecError, match=f"{', '.join(GRAFTABLE)}"):
        add_null_experts(tiny(name), 8, 2)


def test_calls_that_cannot_be() -> None:
    model = grafted("mixtral")
    with pytest.raises(SignalError, match="routed nothing"):
        model.balance_loss()
    logits(model)
    with pytest.raises(SignalError, match=r"shape \(2, 3\) for 22 tokens"):
        model.balance_loss(torch.ones(2, 3))
    with pytest.raises(SpecError, match="leave output_router_logits out"):
        model(input_ids=tokens(), output_router_logits=True)

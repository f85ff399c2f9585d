"""The losses, the anchor and the attribution of unlearning, against loops and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from surgery_models import CONFIGS, Blocks, random_model, tiny

from moekit.errors import DataError, SpecError
from moekit.surgery import block_views
from moekit.surgery.unlearn import (
    RouterAnchorLoss,
    attribute_experts,
    npo_loss,
    rmu_forget_loss,
    rmu_retain_loss,
    router_probabilities,
    select_experts,
    selection_overlap,
)

BLOCKS = Blocks(padding=7)


class Silent(Blocks):
    """Blocks of which one is nothing but padding."""

    def __init__(self) -> None:
        super().__init__(count=3)
        self.masks[1] = 0


@pytest.mark.parametrize("name", CONFIGS)
def test_affinity_is_the_mean_of_means_of_sequences(name: str) -> None:
    model = tiny(name)
    views = block_views(model)
    calls: list[list[tuple[torch.Tensor, object]]] = [[] for _ in views]
    handles = [
        view.architecture.router_module(view.block).register_forward_hook(
            lambda _, args, out, into=into: into.append((args[0], out))
        )
        for view, into in zip(views, calls, strict=True)
    ]
    means, token_means = [], []
    for row, mask in zip(BLOCKS.tokens, BLOCKS.masks, strict=True):
        with torch.no_grad():
            model(row[None], attention_mask=mask[None])
        means.append([])
        for view, call in zip(views, calls, strict=True):
            x, out = call.pop()
            x_TD, routing = x.flatten(0, -2), view.architecture.read("", out)
            logits = x_TD.double() @ view.router.weight.double().T
            if view.router.bias is not None:
                logits += view.router.bias.double()
            s = logits.softmax(-1)
            if view.rule.score == "sigmoid":
                s = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
            sums, length = [0.0] * view.experts, 0
            for t in range(len(row)):
                if mask[t]:
                    length += 1
                    for e in routing.expert_NK[t].tolist():
                        sums[e] += float(s[t, e]) if e >= 0 else 0.0
            means[-1].append([value / length for value in sums])
            token_means.append((sums, length))
    for handle in handles:
        handle.remove()
    want = torch.tensor(means, dtype=torch.float64).mean(0)
    found = attribute_experts(model, BLOCKS, tokens=None, batch_size=4)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-6)
    blocks = len(views)
    first = [token_means[i] for i in range(0, len(token_means), blocks)]
    by_token = torch.tensor([s for s, _ in first]).sum(0) / sum(length for _, length in first)
    assert not torch.allclose(by_token.double(), want[0], atol=1e-5)  # lengths are unequal


def test_a_sample_of_the_forget_text_is_enough() -> None:
    model = tiny("olmoe")
    seen: list[int] = []
    few = attribute_experts(
        model, BLOCKS, tokens=20, batch_size=1, progress=lambda _, done, __: seen.append(done)
    )
    assert 2 <= len(seen) < len(BLOCKS)
    assert not few.equal(attribute_experts(model, BLOCKS, tokens=None))
    assert few.equal(attribute_experts(model, BLOCKS, tokens=20, batch_size=1))


def test_text_without_tokens_is_refused() -> None:
    with pytest.raises(DataError, match="empty"):
        attribute_experts(tiny("olmoe"), Blocks(count=0))


def test_sequences_of_padding_do_not_count() -> None:
    model, data = tiny("olmoe"), Silent()
    found = attribute_experts(model, data, tokens=None)
    data.tokens, data.masks = data.tokens[::2], data.masks[::2]
    torch.testing.assert_close(found, attribute_experts(model, data, tokens=None))
    data.masks[:] = 0
    with pytest.raises(DataError, match="nothing but padding"):
        attribute_experts(model, data)


def test_selection_of_experts() -> None:
    scores = torch.tensor([[0.1, 0.5, 0.2], [0.4, 0.6, -torch.inf]])
    assert select_experts(scores) == [(1, 1)]
    assert select_experts(scores, 3) == [(1, 1), (0, 1), (1, 0)]
    assert select_experts(scores, 2, scope="layer") == [(1, 1), (1, 0)]
    assert select_experts(torch.ones(2, 2), 2) == [(0, 0), (0, 1)]
    for m, scope in ((0, "global"), (6, "global"), (3, "layer")):
        with pytest.raises(SpecError, match="cannot be selected"):
            select_experts(scores, m, scope)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="NaN"):
        select_experts(torch.tensor([[math.nan, 1.0]]))
    with pytest.raises(SpecError, match="scope"):
        select_experts(scores, 1, "block")  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("experts", [[2], [0, 3]])
def test_the_anchor_has_the_closed_form_of_its_gradient(seed: int, experts: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    loss = RouterAnchorLoss(experts)
    assert torch.autograd.gradcheck(lambda z: loss(z.softmax(-1)), [logits], atol=1e-6)
    (found,) = torch.autograd.grad(loss(logits.softmax(-1)), logits)
    s = logits.detach().softmax(-1)[0]
    a = torch.zeros(5, dtype=torch.float64)
    a[experts] = 1
    want = 2 * (s - a) @ (torch.diag(s) - torch.outer(s, s))
    torch.testing.assert_close(found[0], want, rtol=1e-12, atol=1e-12)


def test_the_least_value_of_the_anchor() -> None:
    sure = torch.tensor([[0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    assert float(RouterAnchorLoss([1])(sure)) == 0
    assert float(RouterAnchorLoss([0])(sure)) > 0
    for m in (2, 3):
        even = torch.zeros(1, 4, dtype=torch.float64)
        even[0, :m] = 1 / m
        loss = RouterAnchorLoss(range(m))
        assert float(loss(even)) == pytest.approx((m - 1) ** 2 / m)
        for draw in range(20):
            torch.manual_seed(draw)
            assert float(loss(torch.randn(1, 4).double().softmax(-1))) >= (m - 1) ** 2 / m
    mean = RouterAnchorLoss([0], reduction="mean")
    assert float(mean(sure)) == pytest.approx(float(RouterAnchorLoss([0])(sure)) / 4)
    with pytest.raises(SpecError, match="counted from 0"):
        RouterAnchorLoss([])


def test_the_anchor_leaves_padding_out() -> None:
    s = torch.rand(6, 4).softmax(-1)
    valid = torch.tensor([True, False, True, True, False, True])
    found = RouterAnchorLoss([1])(s, valid)
    torch.testing.assert_close(found, RouterAnchorLoss([1])(s[valid]))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_anchor_moves_a_router_for_tokens_that_go_elsewhere(name: str) -> None:
    view = block_views(tiny(name))[-1]
    router = view.architecture.router_module(view.block)
    x = torch.randn(64, view.router.weight.shape[1], generator=torch.Generator().manual_seed(0))
    chosen = view.architecture.read("", router(x)).expert_NK
    target = 3
    outside = (chosen != target).all(-1)
    assert outside.any()
    loss = RouterAnchorLoss([target])(router_probabilities(view, x[outside]))
    (found,) = torch.autograd.grad(loss, router.weight)
    assert (found.abs().sum(1) > 0).all()  # every row, the target's too


def test_a_batch_of_padding_costs_nothing() -> None:
    nothing = torch.zeros(2, dtype=torch.bool)
    assert float(RouterAnchorLoss([1])(torch.rand(2, 4), nothing)) == 0
    assert float(rmu_forget_loss(torch.empty(0, 4), torch.ones(4))) == 0
    assert float(rmu_retain_loss(torch.empty(0, 4), torch.empty(0, 4))) == 0


def test_npo_starts_as_gradient_ascent() -> None:
    reference = torch.tensor([30.0, 55.0, 41.0], dtype=torch.float64)
    for beta in (0.001, 0.1, 2.0):
        nats = reference.clone().requires_grad_()
        loss = npo_loss(nats, reference, beta)
        assert loss.item() == pytest.approx(2 * math.log(2) / beta)
        (found,) = torch.autograd.grad(loss, nats)
        torch.testing.assert_close(found, torch.full_like(nats, -1 / 3))


def test_npo_weighs_sequences_as_its_formula_says() -> None:
    reference = torch.tensor([30.0, 55.0, 41.0], dtype=torch.float64)
    nats = torch.tensor([33.0, 50.0, 90.0], dtype=torch.float64, requires_grad=True)
    for beta in (1e-9, 0.05, 0.5):
        (found,) = torch.autograd.grad(npo_loss(nats, reference, beta), nats)
        ours, theirs = torch.exp(-beta * nats.detach()), torch.exp(-beta * reference)
        torch.testing.assert_close(found, -(2 * ours / (ours + theirs)) / 3)


def test_losses_that_compare_want_a_frozen_reference() -> None:
    x = torch.ones(3, requires_grad=True)
    for reference in (None, x):
        with pytest.raises(SpecError, match="NPO compares with the model before"):
            npo_loss(x, reference, 0.1)
        with pytest.raises(SpecError, match="RMU compares with the model before"):
            rmu_retain_loss(x, reference)


def test_rmu_is_a_mean_square() -> None:
    h, target = torch.randn(5, 4), torch.randn(4)
    want = sum(float((h[n, d] - target[d]) ** 2) for n in range(5) for d in range(4)) / 20
    assert float(rmu_forget_loss(h, target)) == pytest.approx(want, rel=1e-5)
    assert float(rmu_retain_loss(h, h.clone())) == 0
    assert float(rmu_retain_loss(h, h + 2)) == pytest.approx(4, rel=1e-5)


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3", "moekit_decoder"])
def test_overlap_of_selections(name: str) -> None:
    model, other = tiny(name), tiny(name, seed=1)
    assert selection_overlap(model, model, BLOCKS).eq(1).all()
    found = selection_overlap(model, other, BLOCKS)
    views = [block_views(m) for m in (model, other)]
    sets: list[list[list[set[int]]]] = []
    for m, own in zip((model, other), views, strict=True):
        taken: list[list[set[int]]] = [[] for _ in own]
        handles = [
            v.architecture.router_module(v.block).register_forward_hook(
                lambda _, __, out, v=v, into=into: into.extend(
                    set(row) for row in v.architecture.read("", out).expert_NK.tolist()
                )
            )
            for v, into in zip(own, taken, strict=True)
        ]
        with torch.no_grad():
            m(BLOCKS.tokens, attention_mask=BLOCKS.masks)
        for handle in handles:
            handle.remove()
        sets.append(taken)
    valid = BLOCKS.masks.flatten().bool().tolist()
    for layer, share in enumerate(found.tolist()):
        pairs = zip(sets[0][layer], sets[1][layer], valid, strict=True)
        shares = [len(a & b) / len(a) for a, b, ok in pairs if ok]
        assert share == pytest.approx(sum(shares) / len(shares))
    with pytest.raises(DataError, match="no text"):
        selection_overlap(model, model, Blocks(count=0))


def test_a_model_without_experts_is_refused() -> None:
    config = CONFIGS["qwen2_moe"]()
    config.mlp_only_layers = [0, 1, 2]
    with pytest.raises(SpecError, match="no MoE block"):
        attribute_experts(random_model(config), BLOCKS)

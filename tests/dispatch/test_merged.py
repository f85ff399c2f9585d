"""Experts merged into one: the same function as running them, where it is, and what it costs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moekit import (
    GELU,
    Bank,
    Constant,
    Copy,
    Dropless,
    Linear,
    Merged,
    MoESpec,
    PerChunk,
    PerSequence,
    PerTask,
    Routing,
    Signals,
    SwiGLU,
    TokenAttention,
    TopK,
    Zero,
)
from moekit.errors import SpecError
from moekit.experts import GatheredMixtures, Mixtures
from moekit.layer import MoE
from moekit.measure.flops import flop_counter

WIDTH, OUT, EXPERTS, SEQUENCES, LENGTH = 8, 12, 5, 3, 7
BIASED = Linear(count=EXPERTS, out=OUT)


def built(spec: MoESpec, dtype: torch.dtype = torch.float64, seed: int = 0) -> MoE:
    """The layer with every parameter drawn anew, biases included."""
    torch.manual_seed(seed)
    layer = spec.build(WIDTH).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.4)
    return layer


def sample(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(SEQUENCES, LENGTH, WIDTH, generator=torch.Generator().manual_seed(9)).to(
        dtype
    )


def gates(layer: MoE, x_BTD: Tensor, k: int) -> Tensor:
    """Softmax over the k best logits of each sequence's mean, written out (B, E)."""
    rows = []
    for x_TD in x_BTD:
        logits = layer.router.router.weight @ (sum(x_TD) / len(x_TD))
        best = sorted(range(EXPERTS), key=lambda e: -logits[e].item())[:k]
        total = sum(logits[e].exp() for e in best)
        zero = torch.zeros((), dtype=x_BTD.dtype)
        rows.append(torch.stack([logits[e].exp() / total if e in best else zero for e in range(5)]))
    return torch.stack(rows)


@pytest.mark.parametrize("merge", ["product", "gather"])
@pytest.mark.parametrize("k", range(1, EXPERTS + 1))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_projections_merged_are_projections_run(
    k: int, merge: str, dtype: torch.dtype, tolerance: float
) -> None:
    """Against the written sum Σ g (W x + b), and against running the experts: all gradients."""
    found = []
    for dispatch in (Merged(merge=merge), Dropless(), None):
        layer = built(MoESpec(PerSequence(TopK(k=k)), BIASED, dispatch or Dropless()), dtype)
        x_BTD = sample(dtype).requires_grad_()
        if dispatch is None:
            weight_BE = gates(layer, x_BTD, k)
            every = torch.einsum("btd,eod->bteo", x_BTD, layer.experts.weight)
            y = torch.einsum("be,bteo->bto", weight_BE, every + layer.experts.bias)
        else:
            y = layer(x_BTD).y
        cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
        leaves = [x_BTD, *layer.parameters()]
        found.append([y, *torch.autograd.grad((y * cotangent).sum(), leaves)])
    for other in found[1:]:
        for ours, theirs in zip(found[0], other, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=10 * tolerance)


def test_the_two_ways_of_merging_agree() -> None:
    torch.manual_seed(0)
    expert_SK = torch.tensor([[2, 0, -1], [4, 3, 1], [-1, -1, -1]])
    weight_SK = torch.rand(3, 3).double().masked_fill(expert_SK < 0, 0.0)
    value = torch.randn(EXPERTS, 4, 3).double()
    wanted = torch.zeros(3, 4, 3).double()
    for s in range(3):
        for k in range(3):
            if expert_SK[s, k] >= 0:
                wanted[s] += weight_SK[s, k] * value[expert_SK[s, k]]
    for kind in (Mixtures, GatheredMixtures):
        mixtures = kind(expert_SK, weight_SK, EXPERTS)
        torch.testing.assert_close(mixtures.of(value), wanted)
        part = mixtures.slice(1, 4).of(value[1:4])
        alone = torch.zeros(3, 4, 3).double()
        alone[0] = weight_SK[0, 0] * value[2]
        alone[1] = weight_SK[1, 1] * value[3] + weight_SK[1, 2] * value[1]
        torch.testing.assert_close(part, alone)


def test_one_expert_is_merged_into_itself() -> None:
    layer = built(MoESpec(PerSequence(TopK(k=1)), SwiGLU(EXPERTS, hidden=8), Merged()))
    routing = layer(sample()).routing.per_scope()
    merged = Mixtures(routing.expert_NK, routing.weight_NK, EXPERTS).of(layer.experts.down_proj)
    assert torch.equal(merged, layer.experts.down_proj[routing.expert_NK[:, 0]])


def test_equal_gates_give_the_plain_average() -> None:
    layer = built(MoESpec(PerSequence(TopK(k=EXPERTS)), GELU(EXPERTS, hidden=8), Merged())).eval()
    nn.init.zeros_(layer.router.router.weight)
    x_BTD = sample()
    up, down = layer.experts.up_proj.mean(0), layer.experts.down_proj.mean(0)
    wanted = nn.functional.gelu(x_BTD @ up.T) @ down.T
    torch.testing.assert_close(layer(x_BTD).y, wanted)


def test_experts_with_an_activation_are_another_function_when_merged() -> None:
    """So that nobody claims that merging whole feed-forward experts equals running them."""
    bank = GELU(EXPERTS, hidden=8)
    outputs = [
        built(MoESpec(PerSequence(TopK(k=3)), bank, dispatch))(sample()).y
        for dispatch in (Merged(), Dropless())
    ]
    assert (outputs[0] - outputs[1]).abs().max().item() > 0.1
    alone = [
        built(MoESpec(PerSequence(TopK(k=1)), bank, dispatch))(sample()).y
        for dispatch in (Merged(), Dropless())
    ]
    torch.testing.assert_close(alone[0], alone[1])


def test_each_sequence_has_an_expert_of_its_own() -> None:
    """Not one for the whole batch: changing one sequence moves no other."""
    layer = built(MoESpec(PerSequence(TopK(k=3)), SwiGLU(EXPERTS, hidden=8), Merged()))
    x_BTD = sample()
    before = layer(x_BTD)
    changed = x_BTD.clone()
    changed[1] *= -3
    after = layer(changed)
    assert torch.equal(after.y[[0, 2]], before.y[[0, 2]])
    assert not torch.equal(after.y[1], before.y[1])
    weights = before.routing.per_scope().dense_weight_NE()
    assert len(torch.unique(weights, dim=0)) == SEQUENCES


def flops(layer: MoE, x_BTD: Tensor) -> int:
    """Operations of the expert phase."""
    x_ND = x_BTD.flatten(0, 1)
    scope_N = torch.arange(len(x_BTD)).repeat_interleave(x_BTD.shape[1])
    routing = layer.router(x_ND, Signals(scope_N=scope_N))
    with torch.no_grad(), flop_counter() as counter:
        layer.dispatch(x_ND, routing, layer.experts)
    return counter.get_total_flops()


@pytest.mark.parametrize("length", [16, 64])
def test_merging_costs_one_expert_and_the_merge(length: int) -> None:
    """Merged once a sequence, never a token; running costs k experts."""
    bank, size = SwiGLU(count=8, hidden=16), 3 * WIDTH * 16
    x_BTD = torch.randn(SEQUENCES, length, WIDTH)

    def counted(k: int, **merge: str) -> int:
        spec = MoESpec(PerSequence(TopK(k=k)), bank, Merged(**merge) if merge else Dropless())
        return flops(built(spec, torch.float32), x_BTD)

    tokens = SEQUENCES * length
    one = 2 * tokens * size
    for k in (1, 2, 4, 8):
        assert counted(k) == k * one
        assert counted(k, merge="product") == one + 2 * SEQUENCES * 8 * size
        assert counted(k, merge="gather") == one + 2 * SEQUENCES * k * size
        more = counted(k, merge="gather") - counted(1, merge="gather")
        assert more == 2 * (k - 1) * size * SEQUENCES


def test_one_row_a_token_reaches_a_product() -> None:
    layer = built(MoESpec(PerSequence(TopK(k=3)), SwiGLU(EXPERTS, hidden=8), Merged()))
    out = layer(sample())
    assert int(out.rows_E.sum()) == SEQUENCES * LENGTH
    assert out.rows_E.shape == (EXPERTS,)
    strongest = out.routing.per_scope().dense_weight_NE().argmax(1)
    assert out.rows_E.tolist() == [LENGTH * int((strongest == e).sum()) for e in range(EXPERTS)]
    assert MoESpec(PerSequence(TopK(k=3)), SwiGLU(), Merged()).expected_load() == 1.0


def test_zero_computation_experts_are_not_merged() -> None:
    bank = Bank((Constant(1), SwiGLU(count=3, hidden=8), Copy(1), Zero(1)))
    layer = built(MoESpec(PerSequence(TopK(k=2)), bank, Merged()))
    nn.init.zeros_(layer.router.router.weight)
    with torch.no_grad():  # copy and zero alone
        layer.router.router.weight[4:] = 1.0
    x_BTD = sample().abs()
    out = layer(x_BTD)
    assert int(out.rows_E.sum()) == 0
    torch.testing.assert_close(out.y, 0.5 * x_BTD)


def test_a_scope_of_padding_alone_has_no_expert() -> None:
    routing = Routing(torch.tensor([[1], [2]]), torch.ones(2, 1), experts=3)
    rows = routing.take(torch.tensor([0, 1, 0, 1]))
    hidden = rows.without_padding(torch.tensor([False, False, True, False]))
    assert hidden.per_scope().expert_NK.tolist() == [[1], [-1]]
    with pytest.raises(SpecError, match="a decision for every row"):
        routing.per_scope()


def test_token_attention_is_the_identity_at_first_and_comes_before_the_gate() -> None:
    spec = MoESpec(PerSequence(TopK(k=2)), SwiGLU(EXPERTS, hidden=8), Merged())
    torch.manual_seed(0)
    plain = spec.build(WIDTH)
    torch.manual_seed(0)
    layer = spec.replace(adapter=TokenAttention(reduction=4)).build(WIDTH)
    for name, parameter in plain.named_parameters():
        layer.get_parameter(name).data.copy_(parameter)
    x_BTD = sample(torch.float32)
    assert torch.equal(layer(x_BTD).y, plain(x_BTD).y)
    assert layer.adapter.down.shape == (WIDTH // 4, WIDTH)
    assert layer.adapter.down.abs().max().item() <= WIDTH**-0.5
    assert float(layer.adapter.down.detach().std()) > 0
    layer(x_BTD).y.square().sum().backward()
    assert float(layer.adapter.up.grad.abs().max()) > 0  # it learns
    nn.init.normal_(layer.adapter.up)
    nn.init.normal_(layer.adapter.up_bias)
    adapter = layer.adapter
    inner = (x_BTD @ adapter.down.T + adapter.down_bias).clamp_min(0)
    moved = x_BTD + inner @ adapter.up.T + adapter.up_bias
    torch.testing.assert_close(layer(x_BTD).y, plain(moved).y)
    torch.testing.assert_close(layer(x_BTD).routing.logits_NE, plain(moved).routing.logits_NE)


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        ((TopK(k=2), SwiGLU()), "adapter=TokenAttention"),
        ((PerSequence(TopK(k=2)), Bank((SwiGLU(4, 16), SwiGLU(4, 8)))), "no common shape"),
        ((PerTask(TopK(k=2)), Bank((Zero(1), Bank((GELU(2), SwiGLU(2)))))), "no common shape"),
        ((PerChunk(TopK(k=9)), SwiGLU(count=8)), "k is 9 but the bank has 8"),
    ],
)
def test_what_cannot_be_merged(parts: tuple, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        MoESpec(*parts, Merged())


def test_fewer_experts_than_one_and_a_strange_way() -> None:
    with pytest.raises(ValueError, match="k is 0"):
        TopK(k=0)
    with pytest.raises(ValueError, match="merge is 'loop'"):
        Merged(merge="loop")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reduction is 0"):
        TokenAttention(reduction=0)

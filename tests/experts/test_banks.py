"""Banks: their parameters, their initial values, their widths, what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from moekit.errors import SpecError
from moekit.experts import (
    GEGLU,
    GELU,
    Bank,
    Constant,
    Copy,
    ExpertsSpec,
    FeedForwardSpec,
    GroupedMM,
    ReLU,
    SwiGLU,
    Zero,
    fits_grouped_mm,
)
from moekit.layer import MoESpec
from moekit.routing import TopK


@pytest.mark.parametrize("kind", [SwiGLU, GEGLU, GELU, ReLU])
@pytest.mark.parametrize("bias", [False, True])
def test_weights_are_named_and_laid_out_as_in_transformers(
    kind: type[FeedForwardSpec], bias: bool
) -> None:
    bank = kind(count=3, hidden=10, bias=bias, out=6).build(8)
    inner = 20 if kind.gated else 10
    wanted = {("gate_up_proj" if kind.gated else "up_proj"): (3, inner, 8), "down_proj": (3, 6, 10)}
    if bias:
        wanted |= {"up_bias": (3, inner), "down_bias": (3, 6)}
    assert {name: tuple(p.shape) for name, p in bank.named_parameters()} == wanted


@pytest.mark.parametrize(
    ("kind", "formula"),
    [
        (SwiGLU, lambda g, u: F.silu(g) * u),
        (GEGLU, lambda g, u: F.gelu(g) * u),
        (GELU, lambda g, u: F.gelu(torch.cat([g, u], -1))),
        (ReLU, lambda g, u: F.relu(torch.cat([g, u], -1))),
    ],
)
def test_the_gate_comes_first(kind: type[FeedForwardSpec], formula) -> None:
    bank = kind(count=1, hidden=4).build(8)
    inner = torch.randn(5, 8)
    torch.testing.assert_close(bank.activate(inner), formula(*inner.chunk(2, -1)))


def test_initial_values() -> None:
    torch.manual_seed(0)
    spec = Bank((SwiGLU(count=4, hidden=64, bias=True), Constant(8)))
    bank = spec.build(128)
    feed_forward, constant = bank.parts
    bank.reset_parameters(std=0.05)
    assert float(feed_forward.gate_up_proj.detach().std()) == pytest.approx(0.05, rel=0.02)
    assert float(feed_forward.down_proj.detach().std()) == pytest.approx(0.05, rel=0.02)
    assert not bool(feed_forward.up_bias.any())
    assert not bool(feed_forward.down_bias.any())
    assert float(constant.mix_proj.detach().std()) == pytest.approx(0.05, rel=0.1)
    assert float(constant.constant.detach().std()) == pytest.approx(1.0, rel=0.1)


def test_the_same_seed_draws_the_same_bank() -> None:
    for spec in (SwiGLU(count=2, hidden=4), Bank((GELU(count=2, hidden=4), Constant(1)))):
        torch.manual_seed(3)
        one = spec.build(8)
        torch.manual_seed(3)
        other = spec.build(8)
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)


def test_a_bank_runs_its_parts_in_order() -> None:
    spec = Bank((SwiGLU(count=2, hidden=4), Copy(1), ReLU(count=1, hidden=4)))
    bank = spec.build(8)
    rows = torch.randn(6, 8)
    y = bank(rows, GroupedMM(torch.tensor([1, 3, 2])))
    first = bank.parts[0](rows[:4], GroupedMM(torch.tensor([1, 3])))
    last = bank.parts[2](rows[4:], GroupedMM(torch.tensor([2])))
    torch.testing.assert_close(y, torch.cat([first, last]))
    assert bank.dispatched_ranges == [(0, 2), (3, 4)]
    assert bank.dispatched == 3
    assert bank.kinds == ("feed_forward", "feed_forward", "copy", "feed_forward")


def test_direct_banks_add_their_weighted_outputs() -> None:
    bank = Bank((Zero(2), Copy(2), Constant(1))).build(8)
    x_ND, weight_NE = torch.randn(5, 8), torch.rand(5, 5)
    share = (x_ND @ bank.parts[2].mix_proj[0].T).softmax(-1)
    constant = share[:, :1] * x_ND + share[:, 1:] * bank.parts[2].constant[0]
    wanted = weight_NE[:, 2:4].sum(1, keepdim=True) * x_ND + weight_NE[:, 4:] * constant
    y_ND = torch.randn(5, 8)
    direct = bank.direct(weight_NE)
    assert direct is not None
    torch.testing.assert_close(direct.added(y_ND, x_ND), y_ND + wanted)
    assert Bank((Zero(1), SwiGLU(count=1))).build(8).direct(weight_NE[:, :2]) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_which_sizes_the_grouped_product_takes(dtype: torch.dtype) -> None:
    unit = 16 // torch.empty((), dtype=dtype).element_size()
    rows = torch.zeros(3, unit, dtype=dtype)
    assert fits_grouped_mm(rows, torch.zeros(2, 2 * unit, unit, dtype=dtype))
    assert not fits_grouped_mm(rows, torch.zeros(2, unit + 1, unit, dtype=dtype))
    odd = torch.zeros(3, unit + 1, dtype=dtype)
    assert not fits_grouped_mm(odd, torch.zeros(2, unit, unit + 1, dtype=dtype))
    assert not fits_grouped_mm(rows.double(), torch.zeros(2, unit, unit, dtype=torch.float64))
    assert not fits_grouped_mm(rows.double(), torch.zeros(2, unit, unit, dtype=dtype))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (SwiGLU, {"count": 0}),
        (SwiGLU, {"hidden": 0}),
        (GELU, {"out": 0}),
        (SwiGLU, {"hidden": 2.5}),
        (Zero, {"count": 0}),
        (Copy, {"count": -1}),
        (Bank, {"parts": ()}),
        (Bank, {"parts": (TopK(),)}),
    ],
    ids=str,
)
def test_bad_values_are_refused(kind: type[ExpertsSpec], fields: dict[str, object]) -> None:
    with pytest.raises(SpecError, match=kind.__name__):
        kind(**fields)


def test_widths_that_disagree_are_refused() -> None:
    with pytest.raises(SpecError, match="different widths"):
        Bank((SwiGLU(count=1, out=4), Copy(1))).build(8)
    spec = MoESpec(TopK(k=1), SwiGLU(count=2, hidden=4, out=4), shared=SwiGLU(count=1, hidden=4))
    with pytest.raises(SpecError, match="width 4 and the shared expert does not"):
        spec.build(8)
    with pytest.raises(SpecError, match="one expert for every token"):
        MoESpec(TopK(k=1), SwiGLU(count=2), shared=SwiGLU(count=2))
    with pytest.raises(SpecError, match="shared_gate is set without shared"):
        MoESpec(TopK(k=1), SwiGLU(count=2), shared_gate=True)

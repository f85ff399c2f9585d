"""The kernels for zero-computation experts against plain operations in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from moekit import MoESpec
from moekit.dispatch import Dropless
from moekit.dispatch import direct as direct_module
from moekit.dispatch.direct import add_direct, takes_direct
from moekit.dispatch.native_library import library
from moekit.experts import Bank, Constant, Copy, SwiGLU, Zero
from moekit.experts.direct import Direct
from moekit.routing import TopK

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler here")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
NAMES = ("y_ND", "x_ND", "copied_N1", "weight_NC", "gap_CD", "constant_CD")


@dataclass(frozen=True)
class Case:
    """Sizes, and the share of weights that are not 0."""

    tokens: int
    width: int
    constants: int
    copies: bool = True
    used: float = 0.4

    def inputs(self, dtype: torch.dtype) -> list[Tensor | None]:
        """Leaves in the order of NAMES."""
        torch.manual_seed(self.tokens + self.width)
        weight_NC = torch.rand(self.tokens, self.constants + 1)
        weight_NC *= torch.rand_like(weight_NC) < self.used
        rows = [torch.randn(self.tokens, self.width) for _ in range(2)]
        experts = [torch.randn(self.constants, self.width) * size for size in (0.3, 1.0)]
        found: list[Tensor | None] = [t.to(dtype) for t in rows]
        found.append(weight_NC[:, :1].clone() if self.copies else None)
        if self.constants:
            found += [weight_NC[:, 1:].clone(), *(t.to(dtype) for t in experts)]
        else:
            found += [None, None, None]
        return [None if t is None else t.requires_grad_() for t in found]


CASES = {
    "odd sizes": Case(tokens=37, width=53, constants=2),
    "several threads": Case(tokens=700, width=130, constants=3),
    "no constants": Case(tokens=65, width=48, constants=0),
    "no copies": Case(tokens=65, width=48, constants=1, copies=False),
    "no tokens": Case(tokens=0, width=16, constants=2),
    "one token": Case(tokens=1, width=7, constants=1),
    "nothing chosen": Case(tokens=40, width=33, constants=2, used=0.0),
    "all chosen": Case(tokens=64, width=64, constants=5, used=1.1),
}


def result(inputs: list[Tensor | None], cotangent_ND: Tensor, native: bool) -> list[Tensor]:
    """The output and the gradients of the inputs that are there."""
    y_ND, x_ND, *rest = inputs
    assert y_ND is not None
    assert x_ND is not None
    fresh_ND, direct = y_ND * 1, Direct(*rest)  # as the output of another operation
    assert takes_direct(fresh_ND, x_ND, direct) == native
    out_ND = add_direct(fresh_ND, x_ND, direct) if native else direct.added(fresh_ND, x_ND)
    assert out_ND.dtype == y_ND.dtype
    return [
        out_ND,
        *torch.autograd.grad(out_ND, [t for t in inputs if t is not None], cotangent_ND),
    ]


def assert_near(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Error over the largest value: sums cancel."""
    scale = wanted.abs().max().clamp_min(1e-6) if wanted.numel() else torch.ones(())
    torch.testing.assert_close(found.double() / scale, wanted / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_results_and_gradients(case: Case, dtype: torch.dtype) -> None:
    inputs = case.inputs(dtype)
    cotangent_ND = torch.randn(case.tokens, case.width).to(dtype)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    found = result(inputs, cotangent_ND, native=True)
    wanted = result(exact, cotangent_ND.double(), native=False)
    assert len(found) == 1 + sum(t is not None for t in inputs)
    for one, other in zip(found, wanted, strict=True):
        assert_near(one, other, TOLERANCE[dtype])


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    case, found, threads = CASES["several threads"], [], torch.get_num_threads()
    cotangent_ND = torch.randn(case.tokens, case.width)
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(result(case.inputs(torch.float32), cotangent_ND, native=True))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_rows_in_any_layout() -> None:
    case = CASES["several threads"]
    y_ND, x_ND, *rest = (None if t is None else t.detach() for t in case.inputs(torch.float32))
    assert y_ND is not None
    assert x_ND is not None
    direct = Direct(*rest)
    wanted = direct.added(y_ND, x_ND)
    wide = torch.cat([x_ND, x_ND], dim=1)[:, : case.width]
    for rows in (wide, x_ND.T.contiguous().T):
        torch.testing.assert_close(add_direct(y_ND.clone(), rows, direct), wanted)
    x_ND.requires_grad_()
    grads = []
    for added in (add_direct(y_ND.clone(), x_ND, direct), direct.added(y_ND, x_ND)):
        grads += torch.autograd.grad(added.sum(), x_ND)  # an expanded cotangent
    torch.testing.assert_close(*grads)


def test_what_is_added_to_a_leaf_or_a_view_leaves_it_as_it_was() -> None:
    y_ND, x_ND, *rest = CASES["odd sizes"].inputs(torch.float32)
    assert y_ND is not None
    assert x_ND is not None
    for given in (y_ND, y_ND.detach()[:]):
        before = given.detach().clone()
        added = add_direct(given, x_ND, Direct(*rest))
        assert torch.equal(given, before)
        torch.testing.assert_close(added, Direct(*rest).added(before, x_ND))


def test_gradients_can_be_differentiated_again() -> None:
    case = CASES["odd sizes"]
    cotangent_ND, found = torch.randn(case.tokens, case.width), []
    for native in (True, False):
        inputs = case.inputs(torch.float32)
        y_ND, x_ND, *rest = inputs
        assert y_ND is not None
        assert x_ND is not None
        direct = Direct(*rest)
        out_ND = add_direct(y_ND * 1, x_ND, direct) if native else direct.added(y_ND * 1, x_ND)
        leaves = [t for t in inputs[1:] if t is not None]
        first = torch.autograd.grad(out_ND, leaves, cotangent_ND, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_only_what_is_added_to_may_want_a_gradient() -> None:
    y_ND = torch.randn(3, 4, requires_grad=True)
    direct = Direct(copied_N1=torch.rand(3, 1))
    added_ND = add_direct(y_ND * 2, torch.randn(3, 4), direct)
    (grad_ND,) = torch.autograd.grad(added_ND.sum(), y_ND, create_graph=True)
    assert torch.equal(grad_ND, torch.full((3, 4), 2.0))


@pytest.mark.parametrize("backend", ["auto", "grouped_mm", "loop"])
def test_which_layers_run_them(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And that a layer's output is the same either way."""
    ran: list[int] = []
    run = direct_module._added
    monkeypatch.setattr(direct_module, "_added", lambda *inputs: (ran.append(1), run(*inputs))[1])
    experts = Bank((SwiGLU(count=4, hidden=8), Constant(2), Copy(1), Zero(1)))
    spec = MoESpec(router=TopK(k=3), experts=experts)
    torch.manual_seed(0)
    layer = spec.replace(dispatch=Dropless(backend=backend)).build(12)
    x_ND = torch.randn(50, 12)
    y_ND = layer(x_ND).y
    assert bool(ran) == (backend == "auto")
    other = spec.replace(dispatch=Dropless(backend="loop")).build(12)
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(y_ND, other(x_ND).y)

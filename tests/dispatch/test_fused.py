"""The one-operation feed-forward pass: what it keeps, what it computes, who runs it."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from moekit.dispatch import Dropless
from moekit.dispatch.choice import Choice
from moekit.dispatch.few_rows import product
from moekit.dispatch.fused import feed_forward
from moekit.dispatch.native_library import library
from moekit.dispatch.plan import plan_rows
from moekit.experts import GELU, GroupedMM, SwiGLU
from moekit.experts.activation import Activation, GatedSiLU
from moekit.experts.experts import FeedForward
from moekit.layer import MoE, MoESpec
from moekit.routing import Routing, TopK

FUSED = ("native", "streamed", "few_rows", "grouped_mm")


def layer_of(backend: str, bank=None, width: int = 8) -> MoE:
    torch.manual_seed(0)
    bank = bank or SwiGLU(count=4, hidden=12)
    layer = MoESpec(TopK(k=2), bank, Dropless(backend=backend)).build(width)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    return layer


def kept_bytes(layer: MoE, x_ND: Tensor) -> int:
    """Bytes that autograd holds for the dispatch's backward pass, parameters left out."""
    routing = layer.router(x_ND)
    parameters = {p.data_ptr() for p in layer.parameters()}
    held: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        layer.dispatch(x_ND, routing, layer.experts).y_ND.sum()
    return sum(held.values())


@pytest.mark.parametrize("backend", FUSED)
def test_it_keeps_the_tokens_the_pre_activation_and_the_routing(backend: str) -> None:
    tokens, slots, width, hidden = 32, 2, 8, 12
    x_ND = torch.randn(tokens, width, requires_grad=True)
    rows = tokens * slots
    values = tokens * width + rows * 2 * hidden + rows  # tokens, pre-activation, weights
    assert kept_bytes(layer_of(backend), x_ND) == 4 * values + 8 * rows  # row numbers are int64
    assert kept_bytes(layer_of("loop"), x_ND) > 2 * 4 * values


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("bank", [SwiGLU(count=4, hidden=12, bias=True), GELU(count=4, hidden=6)])
def test_it_can_be_differentiated_twice(backend: str, bank) -> None:
    found = []
    for name in (backend, "loop"):
        layer = layer_of(name, bank).double()
        x_ND = torch.randn(7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        x_ND.requires_grad_()
        (first,) = torch.autograd.grad(layer(x_ND).y.square().sum(), x_ND, create_graph=True)
        found.append(
            torch.autograd.grad(
                first.square().sum(), [x_ND, *layer.parameters()], materialize_grads=True
            )
        )
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("frozen", ["gate_up_proj", "down_proj", "up_bias", "down_bias", "x"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_its_own(backend: str, frozen: str) -> None:
    bank = SwiGLU(count=4, hidden=12, bias=True)
    found = []
    for name in (backend, "loop"):
        layer = layer_of(name, bank)
        x_ND = torch.linspace(-1, 1, 72).view(9, 8).sin().requires_grad_(frozen != "x")
        for leaf, parameter in layer.experts.named_parameters():
            parameter.requires_grad_(leaf != frozen)
        layer(x_ND).y.square().sum().backward()
        found.append([x_ND.grad, *(p.grad for p in layer.parameters())])
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_gradients_of_weights_are_laid_out_as_the_weights() -> None:
    """A transposed layout (GPT-OSS) must not cost a copy when its gradient is accumulated."""
    layer = layer_of("streamed")
    bank = layer.experts.feed_forward()
    weights = [w.detach().mT.contiguous().mT.requires_grad_() for w in bank.tensors[:2]]
    plan = plan_rows(layer.router(torch.randn(9, 8)), [(0, 4)], GroupedMM)
    held = FeedForward(*weights, None, None, bank.activation)
    backend = Choice("streamed").backend(torch.randn(9, 8), plan, held)
    y_ND = feed_forward(torch.randn(9, 8), plan, held, backend)
    for weight, gradient in zip(weights, torch.autograd.grad(y_ND.sum(), weights), strict=True):
        assert gradient.stride() == weight.stride()


def choice(tokens: int, experts: int, width: int, hidden: int, dtype: torch.dtype) -> str:
    x_ND = torch.empty(tokens, width, dtype=dtype)
    up, down = (
        torch.empty(1, dtype=dtype).expand(experts, a, b)
        for a, b in ((2 * hidden, width), (width, hidden))
    )
    expert_NK = (torch.arange(2 * tokens) % experts).view(tokens, 2)
    plan = plan_rows(
        Routing(expert_NK, torch.ones(tokens, 2), experts, full=True), [(0, experts)], GroupedMM
    )
    backend = Choice().backend(x_ND, plan, FeedForward(up, down, None, None, GatedSiLU()))
    assert backend is not None
    return backend.name


def test_the_choice_among_products_of_torch_by_shape_and_dtype() -> None:
    assert choice(1, 64, 1024, 512, torch.float32) == "few_rows"
    assert choice(1, 64, 1024, 512, torch.bfloat16) == "grouped_mm"
    assert choice(512, 8, 512, 512, torch.float32) == "streamed"
    assert choice(8192, 8, 512, 512, torch.bfloat16) == "streamed"
    assert choice(16, 8, 32, 32, torch.float32) == "grouped_mm"
    assert choice(0, 8, 512, 512, torch.float32) in ("few_rows", "grouped_mm")


@pytest.mark.skipif(library() is None, reason="no C++ compiler here")
def test_each_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    layer = layer_of("auto")
    with caplog.at_level(logging.INFO, logger="moekit"):
        layer(torch.randn(5, 8))
        layer(torch.randn(6, 8))
        layer.double()(torch.randn(6, 8).double())
    assert [record.getMessage() for record in caplog.records] == [
        "experts run through native (cpu, torch.float32)",
        "experts run through grouped_mm (cpu, torch.float64)",
    ]


@pytest.mark.parametrize("backend", FUSED)
def test_a_bank_with_a_hook_or_a_forward_of_its_own_is_called(backend: str) -> None:
    """Offloading, sharding and adapters hook into the module; skipping its call would skip them."""
    layer = layer_of(backend)
    seen: list[str] = []
    handle = layer.experts.register_forward_hook(lambda *_: seen.append("hook"))
    before = layer(torch.ones(3, 8)).y
    handle.remove()
    torch.testing.assert_close(layer(torch.ones(3, 8)).y, before, rtol=1e-5, atol=1e-6)
    original = layer.experts.forward
    layer.experts.forward = lambda *given: seen.append("patch") or original(*given)
    layer(torch.ones(3, 8))
    assert seen == ["hook", "patch"]


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 9])
@pytest.mark.parametrize(("out", "inner"), [(6, 4), (5, 4), (1, 1), (2, 3)])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_product_of_one_expert(rows: int, out: int, inner: int, transposed: bool) -> None:
    x, weight = torch.randn(rows, inner), torch.randn(out, inner)
    if transposed:
        weight = weight.T.contiguous().T
    wanted = x.double() @ weight.double().T
    torch.testing.assert_close(product(x, weight).double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        product(x.T.contiguous().T, weight).double(), wanted, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("seed", range(3))
def test_the_fused_activation_is_that_of_autograd(seed: int) -> None:
    torch.manual_seed(seed)
    inner, grad = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    fused, plain = GatedSiLU(), GatedSiLU()
    ours, pull = fused.pull_back(inner)
    theirs, autograd = Activation(plain).pull_back(inner)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(pull(grad.clone()), autograd(grad))
    torch.testing.assert_close(fused.consume(inner.clone()), theirs)

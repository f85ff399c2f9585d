"""A layer under the transforms of torch.func; tests/contract holds every layer to ``grad``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

from moekit import Capacity, Dropless, MoESpec, SwiGLU, TopK
from moekit.dispatch import DispatchSpec
from moekit.layer import MoE

Parameters = dict[str, Tensor]

# torch's own, as it prepares forward derivatives.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


def _layer(dispatch: DispatchSpec, dtype: torch.dtype) -> tuple[MoE, Parameters]:
    torch.manual_seed(0)
    layer = MoESpec(TopK(k=2), SwiGLU(count=4, hidden=8), dispatch).build(width=8).to(dtype)
    return layer, {name: p.detach() for name, p in layer.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_derivatives_of_outputs(dtype: torch.dtype) -> None:
    layer, parameters = _layer(Dropless(), dtype)
    x_ND, along_ND = torch.randn(2, 5, 8, dtype=dtype)

    def output(x_ND: Tensor) -> Tensor:
        y: Tensor = functional_call(layer, parameters, (x_ND,)).y
        return y

    jacobian = torch.autograd.functional.jacobian(output, x_ND)
    torch.testing.assert_close(jacrev(output)(x_ND), jacobian)
    _, forward_ND = jvp(output, (x_ND,), (along_ND,))
    torch.testing.assert_close(forward_ND, torch.einsum("ndmc,mc->nd", jacobian, along_ND))


def test_second_derivatives() -> None:
    layer, parameters = _layer(Dropless(), torch.float64)
    x_ND = torch.randn(2, 8, dtype=torch.float64)

    def loss(x_ND: Tensor) -> Tensor:
        y: Tensor = functional_call(layer, parameters, (x_ND,)).y
        return y.square().sum()

    wanted = torch.autograd.functional.hessian(loss, x_ND)
    torch.testing.assert_close(hessian(loss)(x_ND), wanted)


# Where torch has no rule for a batch of an operation, it says so and does one after the other.
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_each_example() -> None:
    layer, parameters = _layer(Capacity(factor=4.0, pad=True), torch.float64)
    x_BTD = torch.randn(3, 5, 8, dtype=torch.float64)

    def loss(parameters: Parameters, x_TD: Tensor) -> Tensor:
        y: Tensor = functional_call(layer, parameters, (x_TD,)).y
        return y.square().sum()

    together = vmap(grad(loss), in_dims=(None, 0))(parameters, x_BTD)
    for example, x_TD in enumerate(x_BTD):
        alone = grad(loss)(parameters, x_TD)
        torch.testing.assert_close({n: g[example] for n, g in together.items()}, alone)

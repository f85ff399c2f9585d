"""Ways to run a layer: autocast, half precision, meta device, activation checkpointing."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from contract_cases import EXPERTS, LOSSES, PREVIOUS, VOCABULARY, Case, Inputs, every_case, label
from contract_oracle import layer_output, relative_error
from torch import nn
from torch.utils.checkpoint import checkpoint

from moekit.experts import SwiGLU
from moekit.layer import MoE, MoEOutput
from moekit.routing import (
    L1Balance,
    LossSite,
    LossSpec,
    NullAwareBalance,
    ReLURouting,
    RoutingLosses,
    SwitchBalance,
    TopK,
)

EVERY_CASE = every_case()


@EVERY_CASE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(case: Case, dtype: torch.dtype) -> None:
    layer, inputs = case.layer(seed=3).eval(), Inputs.make(9, seed=4)
    x_ND = inputs.x_ND.requires_grad_()
    plain = layer(x_ND, inputs.signals, inputs.carry)
    with torch.autocast("cpu", dtype):
        signals = inputs.signals.replace(previous_logits_NE=inputs.carry.logits_NE)
        routing = layer.router(x_ND, signals)
        done = layer.dispatch(x_ND, routing, layer.experts)
    if routing.logits_NE is not None:
        assert routing.logits_NE.dtype == torch.float32
        assert torch.equal(routing.logits_NE, plain.routing.logits_NE)
    assert routing.weight_NK.dtype == torch.float32
    assert done.y_ND.dtype == dtype
    rounded = copy.deepcopy(layer).to(dtype)  # as autocast takes its operands
    wanted = layer_output(rounded, x_ND.to(dtype), done.routing)
    assert relative_error(done.y_ND, wanted) < 2e-2
    done.y_ND.float().square().sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad is None or parameter.grad.dtype == torch.float32


def test_a_cast_to_half_leaves_controllers_alone() -> None:
    layer = Case(TopK(k=2, bias_rate=1e-3), SwiGLU(count=EXPERTS, hidden=8)).layer()
    bias_E = torch.arange(EXPERTS) * 1e-3 + 1.0  # 1.001 is no bfloat16
    layer.router.correction_bias_E.copy_(bias_E)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        layer.to(dtype)
        assert layer.router.weight.dtype == dtype
        assert layer.router.correction_bias_E.dtype == torch.float32
        assert torch.equal(layer.router.correction_bias_E, bias_E)


@EVERY_CASE
def test_built_on_the_meta_device_then_filled(case: Case) -> None:
    with torch.device("meta"):
        layer = case.spec.build(8, previous=PREVIOUS, vocabulary=VOCABULARY)
    state = itertools.chain(layer.parameters(), layer.buffers())
    assert all(tensor.is_meta for tensor in state)
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in itertools.chain(layer.parameters(), layer.buffers()):
            tensor.fill_(7)  # what to_empty leaves behind is not to be relied on
    layer.router.reset_parameters()
    layer.experts.reset_parameters()
    fresh = case.spec.build(8, previous=PREVIOUS, vocabulary=VOCABULARY)
    for (key, ours), theirs in zip(layer.named_buffers(), fresh.buffers(), strict=True):
        assert torch.equal(ours, theirs), key
    for key, ours in layer.named_parameters():
        assert not bool((ours == 7).any()), key
    inputs = Inputs.make(6)
    assert bool(torch.isfinite(layer(inputs.x_ND, inputs.signals, inputs.carry).y).all())


@pytest.mark.parametrize("loss", list(itertools.chain(*LOSSES.values())), ids=label)
def test_losses_built_on_the_meta_device_then_filled(loss: LossSpec) -> None:
    router = Case(ReLURouting(k=2), SwiGLU(count=EXPERTS, hidden=8)).layer().router
    with torch.device("meta"):
        losses = RoutingLosses([LossSite((loss,), router)])
    losses.to_empty(device="cpu")
    (module,) = losses.losses
    for buffer in module.buffers():
        buffer.fill_(3)
    module.reset_parameters()
    fresh = loss.build(router.site)
    assert float(module.coefficient()) == float(fresh.coefficient())
    assert [float(b) for b in module.buffers()] == [float(b) for b in fresh.buffers()]


class Stack(nn.Module):
    """Two layers, one above the other, with or without activation checkpointing."""

    def __init__(self, first: MoE, second: MoE, recompute: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([first, second])
        self.recompute = recompute
        self.calls = 0

    def forward(self, inputs: Inputs) -> list[MoEOutput]:
        outputs, x_ND, carry = [], inputs.x_ND, inputs.carry
        for layer in self.layers:
            run = self._recomputed if self.recompute else self._run
            out = run(layer, x_ND, inputs.signals, carry)
            outputs.append(out)
            x_ND, carry = x_ND + out.y, inputs.carry
        return outputs

    def _run(self, layer, x_ND, signals, carry) -> MoEOutput:
        self.calls += 1
        return layer(x_ND, signals, carry)

    def _recomputed(self, *args) -> MoEOutput:
        return checkpoint(self._run, *args, use_reentrant=False)


@every_case(lambda case: case.experts.out_width(8) == 8)
def test_activation_checkpointing_changes_nothing(case: Case) -> None:
    kind = {"gates": L1Balance(k=2), "probabilities": SwitchBalance()}.get(case.router.scores)
    found = []
    for recompute in (False, True):
        stack = Stack(case.layer(seed=1), case.layer(seed=2), recompute)
        specs = () if kind is None else (kind,)
        losses = RoutingLosses([LossSite(specs, layer.router) for layer in stack.layers])
        # Jitter and noise must come out the same when recomputed.
        torch.default_generator.manual_seed(3)
        outputs = stack(Inputs.make(9))
        total, values = losses([out.routing for out in outputs])
        (outputs[-1].y.square().sum() + total).backward()
        assert stack.calls == (4 if recompute else 2)
        found.append(
            [total, *values.values(), *(o.y for o in outputs)]
            + [o.routing.weight_NK for o in outputs]
            + [p.grad for p in stack.parameters()]
        )
    for plain, recomputed in zip(*found, strict=True):
        assert torch.equal(plain, recomputed)


def test_recomputation_does_not_advance_any_state() -> None:
    case = Case(TopK(k=2, bias_rate=1e-3), SwiGLU(count=EXPERTS, hidden=8))
    stack = Stack(case.layer(), case.layer(), recompute=True)
    losses = RoutingLosses(
        [LossSite((SwitchBalance(then=((1, 1e-4),)),), layer.router) for layer in stack.layers]
    )
    before = {k: v.clone() for k, v in (stack.state_dict() | losses.state_dict()).items()}
    outputs = stack(Inputs.make(9))
    total, _ = losses([out.routing for out in outputs])
    (outputs[-1].y.sum() + total).backward()
    for key, value in (stack.state_dict() | losses.state_dict()).items():
        assert torch.equal(value, before[key]), key


def test_an_annealed_weight_survives_a_checkpoint() -> None:
    router = Case(TopK(k=2), SwiGLU(count=EXPERTS, hidden=8)).layer().router
    spec = SwitchBalance(weight=0.02, then=((2, 1e-3), (4, 1e-4)))
    ours, restored = (RoutingLosses([LossSite((spec,), router)]) for _ in range(2))
    seen = []
    for step in range(6):
        seen.append(round(float(ours.coefficients()["SwitchBalance"]), 7))
        ours.update([None])  # type: ignore[list-item]  # annealing looks at no load
        if step == 2:
            restored.load_state_dict(ours.state_dict())
    assert seen == [0.02, 0.02, 1e-3, 1e-3, 1e-4, 1e-4]
    assert round(float(restored.coefficients()["SwitchBalance"]), 7) == seen[3]
    assert NullAwareBalance().then == ()

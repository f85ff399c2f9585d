"""The model's forward pass: signals, depth, checkpointing, state, precision, compilation."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch
from accelerate.utils import send_to_device

from moekit import (
    Bank,
    Constant,
    Hash,
    HeterogeneousBalance,
    L1Balance,
    MoESpec,
    Pathway,
    ReLURouting,
    RouterZ,
    SwiGLU,
    SwitchBalance,
    TopK,
    Zero,
)
from moekit.errors import SignalError, SpecError
from moekit.models.language import DenseFeedForward, MoEDecoderConfig, MoEDecoderForCausalLM
from moekit.routing import Carry, Load, Signals

DENSE = SwiGLU(count=1, hidden=48)
NOISY_PATHWAY = MoESpec(
    Pathway(k=2, noise=True, jitter=0.1),
    Bank((SwiGLU(count=4, hidden=24), Constant(1), Zero(1))),
    losses=(HeterogeneousBalance(weight=0.5), RouterZ(weight=0.1)),
)


def enable_checkpointing(model, **options) -> None:
    """transformers renamed the method, and its argument, between the versions that we support."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options or None)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options or None)


def count_calls(module) -> Counter[str]:
    calls: Counter[str] = Counter()
    module.register_forward_hook(lambda *_: calls.update(["forward"]))
    return calls


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- what a router may look at ------------------------------------------------------------------


def test_logits_do_not_depend_on_later_tokens(causal_layers, build, ids):
    model = build(causal_layers)
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 13) % 61
    before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(before[:, :7], after[:, :7], atol=1e-6, rtol=1e-6)
    assert (before[:, 7:] - after[:, 7:]).abs().amax() > 1e-2


def test_a_router_declared_not_causal_does_depend_on_later_tokens(build, ids):
    model = build("expert_choice")
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 13) % 61
    assert (model(ids).logits - model(changed).logits)[:, :7].abs().amax() > 1e-3


def test_token_routers_refuse_embeddings_by_name(build, ids):
    model = build("hash")
    with pytest.raises(SignalError, match="HashRouter needs the signal token_id_N"):
        model(inputs_embeds=model.get_input_embeddings()(ids))


def test_embeddings_in_place_of_ids(build, ids):
    model = build("pathway")
    found = model(inputs_embeds=model.get_input_embeddings()(ids))
    torch.testing.assert_close(found.logits, model(ids).logits)


# --- depth --------------------------------------------------------------------------------------


def test_each_layer_has_its_own_spec_and_pathways_skip_dense_layers(build, ids):
    specs = [
        DENSE,
        MoESpec(Pathway(k=1), SwiGLU(3, hidden=24), losses=(SwitchBalance(),)),
        DENSE.replace(bias=True),
        MoESpec(Pathway(k=2), SwiGLU(5, hidden=16), losses=(SwitchBalance(),)),
        MoESpec(TopK(k=2), Bank((SwiGLU(6, hidden=8), Zero(1)))),
        MoESpec(Pathway(k=2), SwiGLU(4, hidden=24)),
    ]
    model = build(specs).train()
    assert [type(m) for m in model.dense_layers] == [DenseFeedForward] * 2
    maps = [getattr(layer.router, "gate_map", None) for layer in model.moe_layers]
    assert [None if m is None else tuple(m.shape) for m in maps] == [None, (5, 3), None, (4, 7)]
    output = model(ids, labels=ids)
    assert [record.routing.experts for record in output.moe] == [3, 5, 7, 4]
    torch.autograd.backward([record.routing.logits_NE.sum() for record in output.moe[1:2]])
    assert model.moe_layers[0].router.weight.grad.abs().sum() > 0  # through the residual


def test_records_hold_no_hidden_states(build, ids):
    for record in build("pathway")(ids).moe:
        assert record.y.untyped_storage().nbytes() == 0
        assert record.carry.logits_NE is None


def test_hidden_states_and_attentions_on_request(build, ids):
    model = build("top_k", attn_implementation="eager")
    output = model(ids, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 4
    assert len(output.attentions) == 3
    assert torch.equal(output.hidden_states[0], model.get_input_embeddings()(ids))
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)
    weights = output.attentions[0]
    assert weights.shape == (2, 4, 11, 11)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 11))
    assert weights.triu(1).abs().sum() == 0


def test_what_blocks_are_handed_moves_between_devices_as_accelerate_moves_it():
    """``device_map`` over several devices hooks every block with this very function."""
    signals = Signals(valid_N=torch.ones(3, dtype=torch.bool), scope_N=torch.zeros(3))
    carry = Carry(logits_NE=torch.zeros(3, 4), momentum=(torch.zeros(3, 2),))
    moved = send_to_device({"signals": signals, "carry": carry, "empty": Carry()}, "meta")
    assert moved["signals"].valid_N.is_meta
    assert moved["signals"].scope_N.is_meta
    assert moved["signals"].token_id_N is None
    assert moved["carry"].logits_NE.is_meta
    assert moved["carry"].momentum[0].is_meta
    assert moved["empty"] == Carry()


# --- gradient checkpointing ---------------------------------------------------------------------


def test_checkpointing_changes_neither_loss_nor_gradients_nor_counts(build, ids):
    """With everything that could go wrong: gating residuals, router noise and jitter, losses."""
    results = []
    for checkpointed in (False, True):
        model = build([NOISY_PATHWAY, DENSE, NOISY_PATHWAY, NOISY_PATHWAY]).train()
        for layer in model.moe_layers:
            torch.nn.init.normal_(layer.router.noise_weight)
        calls = count_calls(model.moe_layers[0].router)
        if checkpointed:
            enable_checkpointing(model)
        torch.manual_seed(11)
        output = model(ids, labels=ids, use_cache=False)
        output.loss.backward()
        assert calls.total() == 1 + checkpointed  # it did recompute
        results.append((output, gradients(model)))
    (plain, expected), (found, recomputed) = results
    assert torch.equal(found.loss, plain.loss)
    assert len(found.moe) == 3
    for name, value in plain.routing_losses.items():
        assert torch.equal(found.routing_losses[name], value)
    for ours, theirs in zip(found.moe, plain.moe, strict=True):
        assert torch.equal(ours.routing.load_E(), theirs.routing.load_E())
        assert ours.routing.load_E().sum() == 2 * ids.numel()
    assert expected.keys() == recomputed.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(recomputed[name], gradient)


def test_routing_losses_alone_reach_every_router_under_checkpointing(build, ids):
    model = build([NOISY_PATHWAY, DENSE, NOISY_PATHWAY]).train()
    enable_checkpointing(model, use_reentrant=False)
    output = model(ids, use_cache=False)
    total, _ = model.routing_losses([record.routing for record in output.moe])
    total.backward()
    for layer in model.moe_layers:
        assert layer.router.weight.grad.abs().sum() > 0
    assert model.moe_layers[1].router.gate_map.grad.abs().sum() > 0
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


def test_reentrant_checkpointing_is_refused(build):
    with pytest.raises(SpecError, match="use_reentrant=True loses the gradients"):
        enable_checkpointing(build("top_k"), use_reentrant=True)


def test_checkpointing_can_be_disabled(build, ids):
    model = build("top_k").train()
    enable_checkpointing(model)
    disable = getattr(model, "activation_checkpointing_disable", None)
    (disable or model.gradient_checkpointing_disable)()
    calls = count_calls(model.moe_layers[0].router)
    model(ids, labels=ids).loss.backward()
    assert calls.total() == 1


# --- state without gradient ---------------------------------------------------------------------


def test_update_routing_reaches_every_router_and_controller_once(build, ids):
    biased = MoESpec(TopK(k=2, bias_rate=0.5), SwiGLU(4, hidden=24))
    controlled = MoESpec(
        ReLURouting(k=1), SwiGLU(4, hidden=24), losses=(L1Balance(k=1, initial=1e-3, alpha=2.0),)
    )
    model = build([biased, DENSE, controlled, controlled]).train()
    output = model(ids, labels=ids)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    output.loss.backward()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])  # only update_routing changes state
    loads = [Load.of(record.routing) for record in output.moe]
    model.update_routing(loads)
    bias = model.moe_layers[0].router.correction_bias_E
    share = loads[0].assignments_E / loads[0].assignments_E.sum()
    assert torch.equal(bias, 0.5 * torch.sign(0.25 - share))
    active = sum(load.assignments_E.sum() for load in loads[1:]) / (2 * ids.numel())
    assert active > 1
    (coefficient,) = model.routing_losses.coefficients().values()
    assert coefficient.item() == pytest.approx(2e-3)


def test_update_routing_wants_one_load_a_layer(build, ids):
    model = build("top_k")
    with pytest.raises(SpecError, match="got 1 loads for 3 MoE layers"):
        model.update_routing([Load.of(model(ids).moe[0].routing)])
    build("dense").update_routing([])


# --- sizes, precision, compilation --------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 2), (2, 0), (0, 3)])
@pytest.mark.parametrize("masked", [False, True])
def test_tiny_inputs(layers, build, shape, masked):
    model = build(layers).train()
    ids = torch.zeros(shape, dtype=torch.int64)
    output = model(ids, attention_mask=torch.ones_like(ids) if masked else None)
    assert output.logits.shape == (*shape, 61)
    assert output.logits.isfinite().all()
    output.logits.sum().backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_double_precision_runs_in_double_precision(layers, build, ids):
    single = build(layers)
    double = build(layers).double()
    output = double(ids, labels=ids)
    assert output.logits.dtype == torch.float64
    torch.testing.assert_close(
        output.logits, single(ids).logits, atol=1e-4, rtol=1e-4, check_dtype=False
    )
    for record in output.moe:
        assert record.routing.weight_NK.dtype == torch.float64


def test_bfloat16_autocast_trains_close_to_float32(layers, build, ids):
    model = build(layers, initializer_range=0.05).train()
    exact = model(ids, labels=ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ids, labels=ids)
    output.loss.backward()
    for record in output.moe:  # routers decide in float32 whatever the model computes in
        assert record.routing.weight_NK.dtype == torch.float32
    assert output.loss.item() == pytest.approx(exact.item(), rel=2e-2)
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is None or parameter.grad.isfinite().all()


def test_bfloat16_model_runs_and_learns(layers, build, ids):
    model = build(layers, initializer_range=0.05).to(torch.bfloat16).train()
    output = model(ids, labels=ids)
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_logits_to_keep(build, ids):
    model = build("top_k")
    logits = model(ids).logits
    assert torch.equal(model(ids, logits_to_keep=2).logits, logits[:, -2:])
    index = torch.tensor([0, 5])
    assert torch.equal(model(ids, logits_to_keep=index).logits, logits[:, index])


# torch looks at ``grad`` of every tensor that it resumes with after a graph break.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_model_equals_eager(build, ids):
    """The backend runs the graphs as they were traced, which is what could differ."""
    relu = MoESpec(ReLURouting(k=1), SwiGLU(4, hidden=24), losses=(L1Balance(k=1),))
    pathway = NOISY_PATHWAY.replace(router=Pathway(k=2))
    model = build([pathway, DENSE, relu, MoESpec(Pathway(k=2), SwiGLU(4, hidden=24))]).train()
    expected = model(ids, labels=ids, use_cache=False)
    expected.loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    torch._dynamo.reset()
    found = torch.compile(model, backend="aot_eager")(ids, labels=ids, use_cache=False)
    found.loss.backward()
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-5, rtol=1e-4)


def test_training_lowers_the_loss(layers, build, ids):
    model = build(layers, initializer_range=0.05).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        output = model(ids, labels=ids)
        output.loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        model.update_routing([Load.of(record.routing) for record in output.moe])
        losses.append(output.cross_entropy.item())
    assert losses[-1] < 0.6 * losses[0]
    assert sum(later < earlier for earlier, later in pairwise(losses)) >= 8


def test_gating_residuals_reach_over_a_layer_whose_router_has_no_logits() -> None:
    pathway = MoESpec(Pathway(k=2), SwiGLU(count=4, hidden=8))
    hashed = MoESpec(Hash(k=1), SwiGLU(count=3, hidden=8))
    config = MoEDecoderConfig(
        vocab_size=16,
        hidden_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        layers=[pathway, hashed, pathway],
    )
    torch.manual_seed(0)
    model = MoEDecoderForCausalLM(config)
    ids = torch.arange(6)[None]
    model(ids).logits[..., 0].sum().backward()
    gate_map = model.moe_layers[2].router.gate_map
    assert gate_map.shape == (4, 4)
    assert gate_map.grad.abs().sum() > 0

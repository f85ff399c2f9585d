"""Residual rules in the decoder: which tensors they meet, and that nothing else changes."""

from __future__ import annotations

import pytest
import torch

from moekit import (
    AdamFirst,
    AdamMomentum,
    Carry,
    HeavyBall,
    MoESpec,
    Plain,
    RobustMomentum,
    SwiGLU,
    SwitchBalance,
    TopK,
)
from moekit.compare import Design
from moekit.errors import SignalError, SpecError
from moekit.models.language import MoEDecoderConfig, MoEDecoderForCausalLM

RULES = (HeavyBall(0.6, 0.5), AdamMomentum(), AdamFirst(0.6), RobustMomentum(0.4, 1.5))
GREEDY = {"do_sample": False, "max_new_tokens": 6}
BANK, DENSE = SwiGLU(count=4, hidden=24), SwiGLU(count=1, hidden=48)

each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)


def checkpointing(model, **options):
    """Turn it on, by the name that this version of transformers has for it."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options or None)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options or None)


def layer(rule=None):
    spec = MoESpec(TopK(k=2), BANK, losses=(SwitchBalance(),))
    return spec if rule is None else spec.replace(residual=rule)


@pytest.mark.parametrize("rule", [Plain(), HeavyBall(0.0, 1.0)], ids=str)
def test_off_is_off_bit_for_bit(rule, build, ids):
    assert torch.equal(build(layer(rule))(ids).logits, build(layer())(ids).logits)


@each_rule
def test_a_rule_changes_outputs_in_evaluation_too(rule, build, ids):
    assert not torch.allclose(build(layer(rule))(ids).logits, build(layer())(ids).logits)


def recorded(model, ids):
    """What each block's parts were given and gave: input, attention, norm, layer, output."""
    found = []

    def watch(block):
        entry = {}
        found.append(entry)

        def keep(name, given=False):
            def hook(_, args, output):
                value = args[0] if given else output
                value = value[0] if isinstance(value, tuple) else value
                entry[name] = getattr(value, "y", value)

            return hook

        block.register_forward_hook(keep("input", given=True))
        block.register_forward_hook(keep("output"))
        block.self_attn.register_forward_hook(keep("attention"))
        block.post_attention_layernorm.register_forward_hook(keep("looked", given=True))
        block.mlp.register_forward_hook(keep("layer"))

    for block in model.model.layers:
        watch(block)
    model(ids)
    return found


def test_heavy_ball_counts_moe_layers_only(build, ids):
    rule = HeavyBall(0.6, 0.5)
    model = build([layer(rule), DENSE, layer(rule.replace(mu=0.3)), DENSE, layer(rule)])
    first, dense, second, _, third = recorded(model, ids)
    p = torch.zeros_like(first["layer"])
    for block, mu in ((first, 0.6), (second, 0.3), (third, 0.6)):
        x = block["input"] + block["attention"]
        p = mu * p + block["layer"]
        torch.testing.assert_close(block["looked"], x)
        torch.testing.assert_close(block["output"], x + 0.5 * p)
    x = dense["input"] + dense["attention"]
    torch.testing.assert_close(dense["output"], x + dense["layer"])


def test_router_and_experts_of_robust_momentum_see_the_look_ahead(build, ids):
    rule = RobustMomentum(rho=0.4, kappa=1.5, L=1.0)
    p = torch.zeros(())
    for number, block in enumerate(recorded(build(layer(rule)), ids)):
        x = block["input"] + block["attention"]
        torch.testing.assert_close(block["looked"], x + rule.look * rule.step * p)
        assert torch.equal(block["looked"], x) == (number == 0)
        p = rule.momentum * p + block["layer"]
        torch.testing.assert_close(block["output"], x + rule.step * p)


@each_rule
def test_dense_and_plain_layers_hand_the_very_state_on(rule, build):
    model = build([DENSE, layer(rule), layer(), DENSE]).model
    x = torch.randn(1, 5, 32)
    shared = {
        "signals": None,
        "rotation": model.rotary_emb(x, torch.arange(5)[None]),
        "attention_mask": None,
    }
    _, carry, _ = model.layers[0](x, Carry(), **shared)
    assert carry.momentum == ()
    _, carry, _ = model.layers[1](x, carry, **shared)
    state = carry.momentum
    assert len(state) == rule.tensors
    for block in (model.layers[2], model.layers[3]):
        _, carry, _ = block(x, carry, **shared)
        assert all(a is b for a, b in zip(carry.momentum, state, strict=True))


@each_rule
def test_only_the_first_moe_layer_starts_without_momentum(rule, build):
    model = build([DENSE, layer(rule), layer(), layer(rule)]).model
    x = torch.randn(1, 5, 32)
    shared = {
        "signals": None,
        "rotation": model.rotary_emb(x, torch.arange(5)[None]),
        "attention_mask": None,
    }
    for first in model.layers[:3]:
        first(x, Carry(), **shared)
    with pytest.raises(SignalError, match=f"{type(rule).__name__} starts without momentum at"):
        model.layers[3](x, Carry(), **shared)


@each_rule
def test_the_first_experts_reach_the_second_block_through_the_state(rule, build):
    model = build(layer(rule)).model
    x = torch.randn(1, 5, 32)
    shared = {
        "signals": None,
        "rotation": model.rotary_emb(x, torch.arange(5)[None]),
        "attention_mask": None,
    }
    x1, carry, _ = model.layers[0](x, Carry(), **shared)
    x2, _, _ = model.layers[1](x1.detach(), Carry(momentum=carry.momentum), **shared)
    weight = model.layers[0].mlp.experts.down_proj
    (gradient,) = torch.autograd.grad(x2.square().sum(), weight)
    assert gradient.norm() > 0


@each_rule
def test_nothing_leaks_into_the_next_call(rule, build, ids):
    model = build(layer(rule))
    before = model(ids).logits
    model(ids.flip(1))
    assert torch.equal(model(ids).logits, before)


@each_rule
def test_cached_logits_and_generation_equal_those_without_cache(rule, build, ids):
    model = build(layer(rule))
    first = model(ids[:, :6], use_cache=True)
    second = model(ids[:, 6:], past_key_values=first.past_key_values)
    parts = torch.cat([first.logits, second.logits], dim=1)
    torch.testing.assert_close(parts, model(ids).logits, atol=1e-4, rtol=1e-4)
    cached = model.generate(ids, **GREEDY, use_cache=True)
    assert torch.equal(cached, model.generate(ids, **GREEDY, use_cache=False))


@each_rule
def test_gradient_checkpointing_changes_no_gradient(rule, build, ids):
    gradients = []
    for checkpointed in (False, True):
        model = build([layer(rule), DENSE, layer(rule), layer(rule)]).train()
        if checkpointed:
            checkpointing(model)
        one, two = model(ids, labels=ids), model(ids.flip(0), labels=ids)
        (one.loss + 2 * two.loss).backward()  # both graphs are alive at once
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, atol=0, rtol=0)


@each_rule
def test_a_saved_model_keeps_its_rule(rule, build, ids, tmp_path, aligned):
    model = build([layer(rule), DENSE, layer(rule)])
    model.save_pretrained(tmp_path)
    loaded = MoEDecoderForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.layer_specs[2].residual == rule
    assert torch.equal(aligned(loaded)(ids).logits, model(ids).logits)


@each_rule
def test_left_padding_changes_nothing(rule, build, ids):
    model = build(layer(rule), pad_token_id=0)
    padded = torch.nn.functional.pad(ids, (3, 0))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (3, 0))
    alone, together = model(ids).logits, model(padded, attention_mask=mask).logits
    torch.testing.assert_close(together[:, 3:], alone, atol=1e-4, rtol=1e-4)


@each_rule
def test_training_in_bfloat16_autocast(rule, build, ids):
    model = build(layer(rule)).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@each_rule
def test_other_precisions(rule, dtype, build, ids):
    model = build(layer(rule)).to(dtype)
    found = model(ids).logits
    assert found.dtype == dtype
    assert bool(torch.isfinite(found).all())


def test_two_kinds_of_rule_are_refused():
    mixed = [layer(HeavyBall()), DENSE, layer(AdamMomentum())]
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    with pytest.raises(SpecError, match="one kind of rule"):
        MoEDecoderConfig(layers=mixed, **sizes)
    with pytest.raises(SpecError, match="one kind of rule"):
        Design("mixed", tuple(mixed))

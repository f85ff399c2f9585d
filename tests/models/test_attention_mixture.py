"""Mixtures of attention modules inside the decoder."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from moekit import (
    GELU,
    AttentionHeads,
    Bank,
    Capacity,
    Copy,
    ExpertChoice,
    HeavyBall,
    L1Balance,
    ModuleRouting,
    MoESpec,
    MutualInformation,
    Pathway,
    ReLURouting,
    SwiGLU,
    TopK,
    Zero,
)
from moekit.errors import SignalError, SpecError
from moekit.models.language import AttentionMixture, MoEDecoderForCausalLM

HEADS = AttentionHeads(count=4, heads=2, inner=16)
ROUTER = ModuleRouting(k=2, hidden=12)
FEED_FORWARD = MoESpec(ROUTER, GELU(count=4, hidden=24), losses=(MutualInformation(),))
DENSE = SwiGLU(count=1, hidden=24)
MIXTURE = MoESpec(ROUTER, HEADS, losses=(MutualInformation(),))
ATTENTION: dict[str, Any] = {
    "moduleformer": MIXTURE,
    "every other block": [MIXTURE, None, MIXTURE],
    "relu": MoESpec(ReLURouting(k=2, init_std=0.2), HEADS, losses=(L1Balance(k=2),)),
    "capacity": MoESpec(TopK(k=2), HEADS, dispatch=Capacity(factor=0.6)),
    "pathway": MoESpec(Pathway(k=2), HEADS),
    "zero and copy": MoESpec(TopK(k=2), Bank((AttentionHeads(3, 2, 16), Zero(1), Copy(1)))),
    "momentum": MIXTURE.replace(residual=HeavyBall(mu=0.5)),
}
EVERY = pytest.mark.parametrize("attention", ATTENTION)


def model_of(build: Any, attention: str, **config: Any) -> MoEDecoderForCausalLM:
    return build(FEED_FORWARD, attention=ATTENTION[attention], pad_token_id=0, **config)


def recompute_activations(model: MoEDecoderForCausalLM) -> None:
    """transformers renamed the method in 5.20 or so."""
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()


def oracle(part: AttentionMixture, x_TD: Tensor) -> Tensor:
    """One sequence, by loops over modules, heads, queries and keys."""
    modules = part.mixture.experts
    routing = part.mixture.router(x_TD)
    weight_TE = routing.dense_weight_NE()
    key_TI, value_TI = part.k_proj(x_TD), part.v_proj(x_TD)
    width = part.head_dim
    out = torch.zeros_like(x_TD)
    for m, i in itertools.product(range(len(modules.kinds)), range(len(x_TD))):
        query_I = modules.query_proj[m] @ x_TD[i]
        found_I = torch.zeros_like(query_I)
        for h in range(modules.inner // width):
            own = slice(h * width, (h + 1) * width)
            left = torch.ones(())
            for j in range(i, -1, -1):
                beta = torch.sigmoid(query_I[own] @ key_TI[j, own] / width**0.5)
                found_I[own] += left * beta * value_TI[j, own]
                left = left * (1 - beta)
        out[i] += weight_TE[i, m] * (modules.output_proj[m] @ found_I)
    return out


@torch.no_grad()
@pytest.mark.parametrize(
    "spec", [MIXTURE, MIXTURE.replace(router=ROUTER.replace(k=4)), ATTENTION["relu"]], ids=str
)
def test_a_mixture_equals_a_loop_over_all_modules(build, spec) -> None:
    """k = E included, where the output is the sum over all modules by probability."""
    model = build([FEED_FORWARD], attention=spec)
    part = model.model.layers[0].self_attn
    x_BTD = torch.randn(2, 7, 32)
    seen = []
    hook = part.register_forward_hook(lambda _m, args, output: seen.append((args[0], output[0].y)))
    model(inputs_embeds=x_BTD)
    hook.remove()
    ((inputs_BTD, found_BTD),) = seen
    for inputs_TD, found_TD in zip(inputs_BTD, found_BTD, strict=True):
        torch.testing.assert_close(found_TD, oracle(part, inputs_TD), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_one_module_is_plain_stick_breaking_attention(build) -> None:
    spec = MoESpec(ROUTER.replace(k=1), AttentionHeads(count=1, heads=2, inner=16))
    part = build([FEED_FORWARD], attention=spec).model.layers[0].self_attn
    x_TD = torch.randn(6, 32)
    assert torch.equal(part.mixture.router(x_TD).weight_NK, torch.ones(6, 1))
    modules = part.mixture.experts
    heads = [part.k_proj(x_TD), part.v_proj(x_TD), x_TD @ modules.query_proj[0].T]
    key, value, query = (p.unflatten(1, (2, 8)).transpose(0, 1) for p in heads)
    beta = (query @ key.transpose(1, 2) / 8**0.5).sigmoid()
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    after = (1 - beta).masked_fill(~causal, 1.0).flip(-1).cumprod(-1).flip(-1)
    weights = beta.masked_fill(~causal, 0.0) * torch.nn.functional.pad(
        after[..., 1:], (0, 1), value=1
    )
    wanted = (weights @ value).transpose(0, 1).flatten(1) @ modules.output_proj[0].T
    torch.testing.assert_close(oracle(part, x_TD), wanted, rtol=1e-4, atol=1e-5)


@EVERY
def test_generation_with_every_cache_equals_without(build, ids, attention) -> None:
    model = model_of(build, attention)
    options = {"do_sample": False, "max_new_tokens": 6}
    plain = model.generate(ids, **options, use_cache=False)
    assert torch.equal(model.generate(ids, **options), plain)
    assert torch.equal(model.generate(ids, **options, cache_implementation="static"), plain)


@EVERY
def test_one_token_at_a_time_equals_one_pass(build, ids, attention) -> None:
    model, cache = model_of(build, attention), DynamicCache()
    steps = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(ids.shape[1])]
    torch.testing.assert_close(torch.cat(steps, 1), model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_left_padding_changes_nothing(build, ids, cache) -> None:
    """Also: outputs depend on relative position alone."""
    model = model_of(build, "moduleformer")
    rows = [ids[0], ids[1, :4], ids[1, :1]]
    batch = torch.stack([torch.nn.functional.pad(row, (11 - len(row), 0)) for row in rows])
    options = {"do_sample": False, "max_new_tokens": 5, "cache_implementation": cache}
    together = model.generate(batch, attention_mask=(batch > 0).long(), **options)
    for row, found in zip(rows, together, strict=True):
        alone = model.generate(row[None], **options)[0, len(row) :]
        assert torch.equal(found[11:], alone)


def test_padding_takes_and_breaks_nothing_and_reaches_no_loss(build, ids) -> None:
    model = model_of(build, "moduleformer").train()
    alone = model(ids, labels=ids)
    padded = torch.nn.functional.pad(ids, (3, 2))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (3, 2))
    labels = padded.masked_fill(mask == 0, -100)
    together = model(padded, attention_mask=mask, labels=labels)
    torch.testing.assert_close(together.logits[:, 3:-2], alone.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together.loss, alone.loss)
    name = "MutualInformation"
    torch.testing.assert_close(together.routing_losses[name], alone.routing_losses[name])
    for record in together.moe:
        assert int(record.rows_E.sum()) == 2 * ids.numel()


def test_packed_sequences_do_not_see_each_other(build, ids) -> None:
    model = model_of(build, "moduleformer")
    packed = ids.flatten()[None]
    positions = torch.arange(ids.shape[1]).repeat(2)[None]
    found = model(packed, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(found.view_as(model(ids).logits), model(ids).logits)


def test_the_cache_does_not_grow_with_the_number_of_modules(build, ids) -> None:
    sizes = set()
    for count in (2, 4, 16):
        spec = MIXTURE.replace(experts=HEADS.replace(count=count))
        cache = build(FEED_FORWARD, attention=spec)(ids, use_cache=True).past_key_values
        sizes.add(sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers))
    assert sizes == {3 * 2 * ids.numel() * 16}


@EVERY
def test_saved_loaded_and_checkpointed(build, ids, attention, tmp_path) -> None:
    model = model_of(build, attention)
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert loaded.config.attention_specs == model.config.attention_specs
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    gradients = []
    for recompute in (False, True):
        if recompute:
            recompute_activations(model)
        model.train()
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_records_and_weights_of_every_mixture(build, ids) -> None:
    model = model_of(build, "every other block", attn_implementation="eager")
    out = model(ids, output_attentions=True)
    counts = [len(layer.experts.kinds) for layer in model.moe_layers]
    assert [record.routing.experts for record in out.moe] == counts
    assert len(counts) == 5
    first, dense, last = out.attentions
    assert dense.shape == first.shape == last.shape == (2, 4, 11, 11)
    assert bool((first.sum(-1) < 1).all())


def test_free_routing_pays_for_the_slots_in_use_alone(build, ids) -> None:
    model = model_of(build, "relu")
    out = model(ids, output_attentions=True)
    for record, weights in zip(out.moe[::2], out.attentions, strict=True):
        busiest = int(record.routing.used_NK.sum(1).max())
        assert weights.shape[1] == 2 * busiest


def test_no_token_at_all(build) -> None:
    model = model_of(build, "moduleformer")
    for shape in ((0, 5), (2, 0)):
        assert model(torch.zeros(shape, dtype=torch.int64)).logits.shape == (*shape, 61)


def test_bfloat16(build, ids) -> None:
    model = model_of(build, "moduleformer").bfloat16()
    logits = model(ids).logits
    assert logits.dtype == torch.bfloat16
    assert bool(torch.isfinite(logits).all())


def test_too_long_without_a_cache(build, ids) -> None:
    model = model_of(build, "moduleformer", max_position_embeddings=8)
    with pytest.raises(SignalError, match=r"11 tokens and max_position_embeddings is 8"):
        model(ids, use_cache=False)
    assert model(ids, use_cache=True).logits.shape[1] == 11


def test_a_cache_of_another_model(build, ids) -> None:
    wide = build(FEED_FORWARD, attention=MIXTURE.replace(experts=HEADS.replace(inner=8)))
    cache = wide(ids, use_cache=True).past_key_values
    with pytest.raises(SignalError, match=r"KV cache holds keys \(2, 2, 11, 4\) in layer 0"):
        model_of(build, "moduleformer")(ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"attention": FEED_FORWARD}, "attention holds MoESpec without attention modules"),
        ({"attention": DENSE}, "attention holds SwiGLU without attention modules"),
        ({"attention": MIXTURE.replace(shared=SwiGLU(1, 8))}, "shared expert beside attention"),
        ({"attention": [MIXTURE, None]}, "attention holds 2 specs but num_hidden_layers is 3"),
        ({"attention": "heads"}, "attention is 'heads'; wanted one spec"),
        ({"layers": MIXTURE}, "give it as attention"),
        (
            {"attention": MIXTURE.replace(experts=Bank((HEADS, GELU(2, 8))))},
            "attention modules beside other experts",
        ),
        (
            {"attention": MIXTURE.replace(experts=Bank((HEADS, AttentionHeads(2, 4, 16))))},
            "make them equal",
        ),
        (
            {"attention": MIXTURE.replace(experts=AttentionHeads(2, heads=3))},
            "inner width 16 cannot be split into 3 equal heads",
        ),
    ],
)
def test_refused_configurations(build, config, said) -> None:
    with pytest.raises(SpecError, match=said):
        build(**{"layers": FEED_FORWARD, "num_hidden_layers": 3, **config})


def test_refused_banks() -> None:
    with pytest.raises(SpecError, match="inner width 10 cannot be split into 4 equal heads"):
        AttentionHeads(heads=4, inner=10)
    with pytest.raises(SpecError, match="k is 5 but the bank has 4"):
        MIXTURE.replace(router=ModuleRouting(k=5))


def test_a_router_that_is_not_causal_is_known_as_such(build) -> None:
    spec = MoESpec(ExpertChoice(capacity=2.0), HEADS)
    assert not build(FEED_FORWARD, attention=spec).config.is_causal_routing

"""Routers over a graph of tokens inside the decoder: who sees whom, attention, and the cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moekit import AttentionAware, HeavyBall, MoESpec, Sequences, Signals, SimilarityAware, SwiGLU
from moekit.models.language.attention import eager_attention
from moekit.routing import AttentionWeights

BANK = SwiGLU(count=4, hidden=24)
ROUTERS = {
    "similarity": SimilarityAware(temperature=3.0),
    "low rank": SimilarityAware(rank=4),
    "attention": AttentionAware(),
    "min_entropy": AttentionAware(heads="min_entropy"),
    "posterior": AttentionAware(heads="posterior", sigma=4.0),
}
EVERY_ROUTER = pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
GREEDY = {"do_sample": False, "max_new_tokens": 6}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_routing_follows_the_weights_of_the_attention_before_it(build, ids, attention):
    layers = MoESpec(AttentionAware(), BANK)
    weights = build(layers, attn_implementation="eager")(ids, output_attentions=True).attentions
    output = build(layers, attn_implementation=attention)(ids)
    assert len(weights) == len(output.moe) == 3
    for weight, record in zip(weights, output.moe, strict=True):
        share = record.routing.logits_NE.softmax(-1).view(2, 11, 4)
        found = record.routing.scores_NE.view(2, 11, 4)
        torch.testing.assert_close(found, weight.mean(1) @ share, rtol=1e-4, atol=1e-6)


def watch(layer: nn.Module) -> list[Signals]:
    """The signals that each call of a layer's router gets."""
    seen: list[Signals] = []
    layer.router.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    return seen


def test_a_value_is_what_attention_to_one_token_gives(build, ids):
    """A token that comes first attends to itself alone, in every head."""
    model = build(MoESpec(ROUTERS["posterior"], BANK))
    seen, outputs = watch(model.moe_layers[1]), []
    model.model.layers[1].self_attn.register_forward_hook(lambda *a: outputs.append(a[2][0]))
    model(ids)
    first = seen[0].value_ND.view(2, 11, -1)[:, 0]
    torch.testing.assert_close(first, outputs[0][:, 0])


def test_routers_are_told_no_more_than_they_need(build, ids):
    for router, wanted in (
        ("top_k", (False, False, False)),
        (MoESpec(ROUTERS["similarity"], BANK), (True, False, False)),
        (MoESpec(ROUTERS["attention"], BANK), (True, True, False)),
        (MoESpec(ROUTERS["posterior"], BANK), (True, True, True)),
    ):
        model = build(router)
        seen = watch(model.moe_layers[0])
        model(ids)
        given = (seen[0].sequences, seen[0].attention, seen[0].value_ND)
        assert tuple(part is not None for part in given) == wanted


@EVERY_ROUTER
def test_packed_sequences_do_not_see_each_other(build, ids, router):
    model = build(MoESpec(router, BANK))
    position_ids = torch.arange(11).repeat(2)[None]
    packed = model(ids.reshape(1, -1), position_ids=position_ids).logits
    torch.testing.assert_close(packed.view(2, 11, -1), model(ids).logits, atol=1e-5, rtol=1e-5)


@EVERY_ROUTER
def test_padding_on_either_side_is_not_seen(build, ids, router):
    model = build(MoESpec(router, BANK))
    alone = model(ids[:, :7]).logits
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[:, 7:] = 0
    right = model(ids, attention_mask=mask).logits[:, :7]
    torch.testing.assert_close(right, alone, atol=1e-5, rtol=1e-5)
    turned = torch.cat([ids[:, 7:], ids[:, :7]], 1)
    positions = (mask.flip(1).cumsum(1) - 1).clamp_min(0)
    left = model(turned, attention_mask=mask.flip(1), position_ids=positions).logits[:, 4:]
    torch.testing.assert_close(left, alone, atol=1e-5, rtol=1e-5)


@EVERY_ROUTER
def test_beam_search_reorders_what_routers_remember(build, ids, router):
    model = build(MoESpec(router, BANK))
    cached = model.generate(ids, **GREEDY, num_beams=3)
    assert torch.equal(cached, model.generate(ids, **GREEDY, num_beams=3, use_cache=False))


@EVERY_ROUTER
def test_assisted_generation_crops_what_routers_remember(build, ids, router):
    model = build(MoESpec(router, BANK))
    prompt = ids[:1].repeat(1, 2)
    found = model.generate(prompt, **GREEDY, prompt_lookup_num_tokens=3)
    assert torch.equal(found, model.generate(prompt, **GREEDY))


def causal_without_mask(
    module: nn.Module, query: Any, key: Any, value: Any, attention_mask: None, **kwargs: Any
) -> Any:
    """An attention that, as fused kernels do, is handed no mask that tells of pairs."""
    assert attention_mask is None
    past = key.shape[2] - query.shape[2]
    order = torch.arange(key.shape[2]) > torch.arange(query.shape[2])[:, None] + past
    return eager_attention(module, query, key, value, -1e9 * order, **kwargs)


@EVERY_ROUTER
def test_an_attention_whose_mask_cannot_be_read(build, ids, router):
    ALL_ATTENTION_FUNCTIONS.register("without_mask", causal_without_mask)
    wanted = build(MoESpec(router, BANK))
    model = build(MoESpec(router, BANK), attn_implementation="without_mask")
    torch.testing.assert_close(model(ids).logits, wanted(ids).logits, atol=1e-5, rtol=1e-5)
    found = model.generate(ids, **GREEDY)
    assert torch.equal(found, wanted.generate(ids, **GREEDY))


def test_prepared_masks_tell_routers_who_sees_whom(build, ids):
    ALL_ATTENTION_FUNCTIONS.register("without_mask", causal_without_mask)
    model = build(MoESpec(AttentionAware(), BANK), attn_implementation="without_mask")
    embedded = model.get_input_embeddings()(ids)
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[0, :3] = 0
    found = model.create_masks_for_generate(model.config, embedded, mask, None)
    assert found["full_attention"] is None
    wanted = torch.ones(11, 11, dtype=torch.bool).tril() & mask.bool()[:, None]
    assert torch.equal(found["visible"][:, 0], wanted)


def test_a_mask_that_lets_all_see_all(build, ids):
    """As an encoder has it: then the first token's routing depends on the last token."""
    model = build(MoESpec(AttentionAware(), BANK))
    everything = {"full_attention": torch.zeros(1, 1, 11, 11), "valid": None}
    seen = watch(model.moe_layers[0])
    model(ids, attention_mask=everything, use_cache=False)
    assert bool(seen[0].sequences.visible_BTP.all())
    changed = ids.clone()
    changed[:, -1] = 1 + ids[:, -1] % 60
    first, second = (
        model(x, attention_mask=everything, use_cache=False).moe[0].routing.scores_NE[0]
        for x in (ids, changed)
    )
    assert not torch.allclose(first, second)


@pytest.mark.parametrize(
    ("router", "reached"),
    [(AttentionAware(), True), (AttentionAware(detach=True), False)],
    ids=["attached", "detached"],
)
def test_routing_trains_queries_and_keys(build, ids, router, reached):
    model = build([MoESpec(router, BANK)]).train()
    attention = model.model.layers[0].self_attn
    attention.o_proj.weight.data.zero_()  # so that routing is all that attention changes
    model(ids).moe[0].routing.scores_NE[:, 0].sum().backward()
    touched = [p.weight.grad is not None and bool(p.weight.grad.any()) for p in
               (attention.q_proj, attention.k_proj)]  # fmt: skip
    assert touched == [reached, reached]


@EVERY_ROUTER
def test_momentum_over_depth_leaves_generation_consistent(build, ids, router):
    model = build(MoESpec(router, BANK, residual=HeavyBall(mu=0.5)))
    assert torch.equal(
        model.generate(ids, **GREEDY), model.generate(ids, **GREEDY, use_cache=False)
    )


def test_signals_move_between_devices():
    signals = Signals(
        sequences=Sequences(1, torch.ones(1, 3, 3, dtype=torch.bool)),
        attention=AttentionWeights(torch.ones(1, 1, 3, 3)),
        value_ND=torch.ones(3, 2),
    )
    moved = send_to_device({"signals": signals}, "meta")["signals"]
    assert moved.sequences.visible_BTP.is_meta
    assert moved.attention.weight_BATP.is_meta
    assert moved.value_ND.is_meta

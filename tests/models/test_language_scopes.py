"""Routing by task and by chunk in the language model: causality, caches, generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moekit import (
    Bank,
    Dropless,
    Merged,
    MoESpec,
    NoisyTopK,
    PerChunk,
    PerSequence,
    PerTask,
    SwiGLU,
    TokenAttention,
    TopK,
    Zero,
)
from moekit.compare import Design
from moekit.errors import SignalError, SpecError
from moekit.models.language import MoEDecoderConfig, MoEDecoderForCausalLM, MoEDecoderModel

VOCABULARY, WIDTH, TASKS = 40, 16, ((1, 2), (3,), (2, 4, 4))
BANK = SwiGLU(count=4, hidden=24)
BY_TASK = MoESpec(PerTask(TopK(k=2), descriptions=TASKS), BANK, Merged())
BY_CHUNK = MoESpec(PerChunk(TopK(k=2), length=3), BANK, Merged(), adapter=TokenAttention())


def config(*layers: Any) -> MoEDecoderConfig:
    return MoEDecoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
        eos_token_id=None,
        layers=list(layers),
    )


def model(*layers: Any) -> MoEDecoderForCausalLM:
    torch.manual_seed(0)
    made = MoEDecoderForCausalLM(config(*layers)).double().eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "router" in name or "adapter" in name:
                parameter.copy_(torch.randn(parameter.shape))
    return made


def ids(batch: int = 3, length: int = 11) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


def test_a_causal_model_refuses_to_route_whole_sequences() -> None:
    layer = MoESpec(PerSequence(TopK(k=2)), BANK, Merged())
    with pytest.raises(ValueError, match="PerSequence looks at whole sequences"):
        MoEDecoderForCausalLM(config(layer))
    with pytest.raises(SpecError, match="use PerChunk or PerTask"):
        Design("meo", (layer,))
    MoEDecoderModel(config(layer))  # blocks may serve an encoder, as they do in experiments


@pytest.mark.parametrize("layer", [BY_TASK, BY_CHUNK], ids=["task", "chunk"])
def test_later_tokens_do_not_matter(layer: MoESpec) -> None:
    made, tokens = model(layer), ids()
    task_ids = torch.tensor([2, 0, 2])
    before = made(tokens, task_ids=task_ids).logits
    changed = tokens.clone()
    changed[:, 7:] = 1 + (changed[:, 7:] + 5) % (VOCABULARY - 1)
    after = made(changed, task_ids=task_ids).logits
    torch.testing.assert_close(after[:, :7], before[:, :7])
    assert not torch.allclose(after[:, 7:], before[:, 7:])


@pytest.mark.parametrize("layer", [BY_TASK, BY_CHUNK], ids=["task", "chunk"])
def test_left_padding_changes_nothing(layer: MoESpec) -> None:
    made, tokens, task_ids = model(layer), ids(), torch.tensor([1, 0, 2])
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.int64), tokens], dim=1)
    mask = torch.cat([torch.zeros(3, 4), torch.ones(3, 11)], dim=1).long()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    wide = made(padded, attention_mask=mask, position_ids=positions, task_ids=task_ids).logits
    torch.testing.assert_close(wide[:, 4:], made(tokens, task_ids=task_ids).logits)


def test_tasks_change_what_is_computed_and_must_be_told() -> None:
    made, tokens = model(BY_TASK), ids()
    one, two = (made(tokens, task_ids=torch.full((3,), task)).logits for task in (0, 1))
    assert not torch.allclose(one, two)
    mixed = made(tokens, task_ids=torch.tensor([0, 1, 0])).logits
    torch.testing.assert_close(mixed, torch.stack([one[0], two[1], one[2]]))
    with pytest.raises(SignalError, match="needs the signal task_S"):
        made(tokens)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str
)
def test_tasks_generate_with_a_cache_what_they_do_without(options: dict[str, Any]) -> None:
    made, tokens, task_ids = model(BY_TASK), ids(3, 5), torch.tensor([2, 0, 1])
    common = {"max_new_tokens": 6, "do_sample": False, "task_ids": task_ids}
    plain = {key: value for key, value in options.items() if key == "num_beams"}
    wanted = made.generate(tokens, use_cache=False, **common, **plain)
    assert torch.equal(made.generate(tokens, **common, **options), wanted)
    other = made.generate(tokens, **{**common, "task_ids": torch.tensor([0, 0, 0])})
    assert not torch.equal(other, wanted)


def test_chunks_generate_without_a_cache(tmp_path: Path) -> None:
    made, tokens = model(BY_CHUNK), ids(2, 5)
    assert made.config.use_cache is False
    made.save_pretrained(tmp_path)
    loaded = MoEDecoderForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    found = loaded.generate(tokens, max_new_tokens=6, do_sample=False)
    grown = tokens
    for _ in range(6):  # greedy, by hand
        grown = torch.cat([grown, made(grown).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, grown)
    first = made(tokens, use_cache=True)
    with pytest.raises(SpecError, match="pass use_cache=False"):
        made(grown[:, 5:6], past_key_values=first.past_key_values)


@pytest.mark.parametrize(
    "layer",
    [
        MoESpec(PerTask(NoisyTopK(k=3)), BANK, Merged(merge="gather"), adapter=TokenAttention()),
        MoESpec(PerChunk(NoisyTopK(k=2), length=4), Bank((BANK, Zero(1))), Merged()),
        MoESpec(PerChunk(TopK(k=2), length=4), BANK, Dropless()),
    ],
    ids=["task", "chunk", "run"],
)
def test_training_reaches_every_parameter_and_survives_files(
    layer: MoESpec, tmp_path: Path
) -> None:
    made = model(layer).train()
    torch.manual_seed(1)
    made(ids(), labels=ids()).loss.backward()
    assert [n for n, p in made.named_parameters() if p.grad is None] == []
    made.eval().save_pretrained(tmp_path)
    loaded = MoEDecoderForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    # To the last bits but not equal: a loaded file's weights lie at other addresses, and the order
    # in which a small product adds up depends on their alignment.
    torch.testing.assert_close(loaded(ids()).logits, made(ids()).logits, rtol=1e-12, atol=1e-12)


def test_fresh_token_attention_is_the_identity_in_a_model() -> None:
    """The model's own initialisation must leave its zeros alone."""
    torch.manual_seed(0)
    made = MoEDecoderForCausalLM(config(BY_CHUNK))
    adapter = made.moe_layers[0].adapter
    assert not bool(adapter.up.any())
    assert not bool(adapter.up_bias.any())
    x_ND = torch.randn(5, WIDTH)
    assert torch.equal(adapter(x_ND), x_ND)

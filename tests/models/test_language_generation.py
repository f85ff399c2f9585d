"""Generation: the KV cache, padding and transformers' sampling options."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

GREEDY = {"do_sample": False, "max_new_tokens": 8}


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask of rows of different lengths, padded on the left with 0."""
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    mask = torch.stack([(torch.arange(width) >= width - len(row)).to(torch.int64) for row in rows])
    return ids, mask


def test_greedy_generation_with_cache_equals_without(causal_layers, build, ids):
    model = build(causal_layers)
    cached = model.generate(ids, **GREEDY, use_cache=True)
    plain = model.generate(ids, **GREEDY, use_cache=False)
    assert cached.shape == (2, 19)
    assert torch.equal(cached, plain)


def test_cached_logits_equal_those_of_one_pass(causal_layers, build, ids):
    model = build(causal_layers)
    whole = model(ids).logits
    first = model(ids[:, :6], use_cache=True)
    second = model(ids[:, 6:], past_key_values=first.past_key_values)
    parts = torch.cat([first.logits, second.logits], dim=1)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_left_padded_batch_generates_what_single_sequences_do(causal_layers, build, ids, cache):
    model = build(causal_layers, pad_token_id=0)
    rows = [ids[0], ids[1, :4], ids[1, :1]]
    batch, mask = left_padded(rows)
    together = model.generate(batch, attention_mask=mask, **GREEDY, cache_implementation=cache)
    for row, found in zip(rows, together, strict=True):
        alone = model.generate(row[None], **GREEDY)[0, len(row) :]
        assert torch.equal(found[batch.shape[1] :], alone)


def test_a_router_that_is_not_causal_generates_the_same_under_both_caches(build, ids):
    """Its choice depends on which rows are padding, also where the mask was made in advance."""
    model = build("expert_choice", pad_token_id=0)
    batch, mask = left_padded([ids[0], ids[1, :4]])
    options = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    dynamic, static = (
        model.generate(batch, attention_mask=mask, **options, cache_implementation=cache)
        for cache in ("dynamic", "static")
    )
    assert torch.equal(dynamic.sequences, static.sequences)
    torch.testing.assert_close(static.logits, dynamic.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "top_p": 0.8, "temperature": 0.7},
        {"do_sample": True, "top_k": 5, "num_return_sequences": 3},
        {"do_sample": True, "min_p": 0.1, "typical_p": 0.9},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True, "repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2, "min_new_tokens": 4},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=lambda options: "-".join(options),
)
def test_sampling_options_run_and_keep_the_prompt(build, ids, options):
    model = build("pathway", pad_token_id=0)
    if "prompt_lookup_num_tokens" in options:  # transformers takes one sequence here
        ids = ids[:1]
    found = model.generate(ids, generation_config=GenerationConfig(max_new_tokens=6, **options))
    copies = options.get("num_return_sequences", 1)
    assert found.shape == (len(ids) * copies, 17)
    assert torch.equal(found[:, :11], ids.repeat_interleave(copies, 0))
    assert found.min() >= 0
    assert found.max() < model.config.vocab_size


def test_prompt_lookup_generates_what_greedy_does(build, ids):
    model = build("top_k")
    prompt = ids[:1].repeat(1, 2)
    assert torch.equal(
        model.generate(prompt, **GREEDY, prompt_lookup_num_tokens=3),
        model.generate(prompt, **GREEDY),
    )


def test_beam_search_finds_a_likelier_sequence_than_greedy(build, ids):
    model = build("top_k")

    def log_likelihood(found: torch.Tensor) -> float:
        log_probabilities = model(found).logits.log_softmax(-1)[:, :-1]
        return log_probabilities.gather(2, found[:, 1:, None])[:, 10:].sum().item()

    greedy = model.generate(ids[:1], **GREEDY)
    beams = model.generate(ids[:1], **GREEDY, num_beams=60)
    assert log_likelihood(beams) >= log_likelihood(greedy)


def test_generation_stops_at_the_end_token(build, ids):
    model = build("top_k", pad_token_id=0)
    free = model.generate(ids[:1], **GREEDY)[0, 11:]
    stopped = model.generate(ids[:1], **GREEDY, eos_token_id=int(free[3]))[0, 11:]
    first = free.tolist().index(int(free[3]))
    assert stopped.tolist() == free[: first + 1].tolist()

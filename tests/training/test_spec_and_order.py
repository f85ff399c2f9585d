"""The spec, the order of the data, and what it becomes for the Trainer."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_training import tiny_model

from moekit import Bank, Constant, MoESpec, SwiGLU, TopK
from moekit.errors import SpecError
from moekit.training import TrainingSpec
from moekit.training.decay import decayed_names
from moekit.training.order import ShuffledPasses
from moekit.training.rows import flat_row, history_rows


def test_spec_goes_to_json_and_back() -> None:
    spec = TrainingSpec(steps=7, precision="bfloat16", eval_every=3)
    assert TrainingSpec.from_dict(spec.to_dict()) == spec


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("warmup_share", 1.5),
        ("min_learning_rate_ratio", -0.1),
        ("beta2", 1.0),
        ("weight_decay", -1.0),
        ("save_every", 0),
        ("keep", 0),
        ("seed", -1),
        ("gradient_accumulation", 3),
        ("precision", "float16"),
    ],
)
def test_a_number_out_of_range_is_named(field: str, value: object) -> None:
    with pytest.raises(SpecError, match=field):
        TrainingSpec(**{field: value})


def test_micro_batch_is_the_batch_over_processes_and_micro_batches() -> None:
    spec = TrainingSpec(batch_size=24, gradient_accumulation=3)
    assert spec.micro_batch(1) == 8
    assert spec.micro_batch(4) == 2
    with pytest.raises(SpecError, match="multiple of 15"):
        spec.micro_batch(5)


@given(st.integers(1, 30), st.integers(1, 100), st.integers(0, 3))
def test_every_pass_shows_every_sequence_once(length: int, total: int, seed: int) -> None:
    order = list(ShuffledPasses(length, total, seed))
    assert len(order) == total == len(ShuffledPasses(length, total, seed))
    for start in range(0, total - length + 1, length):
        assert sorted(order[start : start + length]) == list(range(length))
    rest = order[total // length * length :]
    assert max(Counter(rest).values(), default=0) <= 1


def test_passes_differ_and_a_longer_run_begins_like_a_shorter_one() -> None:
    order = list(ShuffledPasses(20, 60, seed=5))
    assert order[:20] != order[20:40]
    assert order[:33] == list(ShuffledPasses(20, 33, seed=5))
    assert order != list(ShuffledPasses(20, 60, seed=6))


def test_matrices_decay_and_scales_offsets_and_embeddings_do_not() -> None:
    layer = MoESpec(
        TopK(k=2, bias=True), Bank((SwiGLU(count=4, hidden=16, bias=True), Constant(2)))
    )
    model = tiny_model(layer, tie_word_embeddings=False)
    decayed = set(decayed_names(model))
    kept = {name for name, _ in model.named_parameters()} - decayed
    ends = {name.split(".")[-1] for name in decayed}
    assert ends == {"weight", "gate_up_proj", "down_proj", "mix_proj"}
    assert "lm_head.weight" in decayed
    assert "model.layers.0.mlp.router.weight" in decayed
    assert "model.embed_tokens.weight" in kept
    assert "model.norm.weight" in kept
    assert {name.split(".")[-1] for name in kept} == {
        "weight",
        "bias",
        "up_bias",
        "down_bias",
        "constant",
    }
    assert not any("norm" in name for name in decayed)


def test_a_tied_output_projection_counts_as_the_embedding() -> None:
    names = decayed_names(tiny_model(tie_word_embeddings=True))
    assert not any("embed" in name or "lm_head" in name for name in names)


def test_rows_of_one_step_become_one() -> None:
    log = [
        {"step": 2, "tokens": 8, "seconds": 1.0, "loss": 3.0},
        {"step": 2, "tokens": 8, "seconds": 1.5, "eval_loss": 2.5, "eval_runtime": 0.5},
        {"step": 2, "tokens": 8, "seconds": 1.6, "train_runtime": 9.0},
    ]
    assert history_rows(log) == [
        {
            "step": 2,
            "tokens": 8,
            "seconds": 1.5,
            "loss": 3.0,
            "validation_loss": 2.5,
            "validation_seconds": 0.5,
        }
    ]


def test_flat_rows_hold_numbers_only() -> None:
    row = {
        "loss": 1.0,
        "routing": {
            "entropy": None,
            "sparsity": 0.5,
            "losses": {"L1Balance": 0.25},
            "coefficients": {"L1Balance": 1e-8},
            "layers": [{"load": [3, 5], "entropy": None, "dropped_share": 0.0}],
        },
    }
    assert flat_row(row) == {
        "loss": 1.0,
        "routing/sparsity": 0.5,
        "routing/L1Balance": 0.25,
        "routing/L1Balance/coefficient": 1e-8,
        "layers/0/load/0": 3,
        "layers/0/load/1": 5,
        "layers/0/dropped_share": 0.0,
    }

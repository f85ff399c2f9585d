"""From text in files to a checkpoint that transformers loads with its tokenizer."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from moekit import MoESpec, SwiGLU, SwitchBalance, TopK
from moekit.data import TextData, TextSpec, prepare
from moekit.models.language import MoEDecoderConfig, MoEDecoderForCausalLM
from moekit.training import SilentProgress, TrainingSpec, evaluate, train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TextData:
    """Python's own standard library, a little of it."""
    spec = TextSpec(limit_bytes=400_000, vocab_size=512, sequence_length=32)
    return prepare(spec, tmp_path_factory.mktemp("cache"))


def test_a_model_trains_on_text_and_its_checkpoint_evaluates_the_same(
    data: TextData, tmp_path: Path
) -> None:
    config = MoEDecoderConfig(
        vocab_size=len(data.tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        layers=MoESpec(TopK(k=2), SwiGLU(count=4, hidden=32), losses=(SwitchBalance(),)),
    )
    spec = TrainingSpec(steps=30, batch_size=8, learning_rate=1e-2, eval_batches=4)
    result = train(MoEDecoderForCausalLM(config), data, spec, tmp_path, progress=SilentProgress())
    assert result.validation_loss < math.log(len(data.tokenizer)) - 1
    loaded = AutoModelForCausalLM.from_pretrained(result.checkpoint)
    again = evaluate(loaded, data.validation, batch_size=8, max_batches=4)
    assert again == pytest.approx(result.validation_loss, rel=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(result.checkpoint)
    assert tokenizer("def f(x):").input_ids == data.tokenizer("def f(x):").input_ids

"""The survey of a split, against plain computation."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tiny_study import DESIGNS, MODEL

from moekit.compare import Design, ModelSpec
from moekit.compare.run import build_model
from moekit.compare.survey import survey
from moekit.data import TextData, TextSpec, prepare


@pytest.fixture
def grouped(tmp_path: Path) -> TextData:
    """Short documents of two domains."""
    path = tmp_path / "documents.jsonl"
    rows = [
        {
            "text": f"{'ab' * (n % 9 + 3)} {n} {'xyz ' * (n % 5)}",
            "domain": "even" if n % 2 else "<i>",
        }
        for n in range(200)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    spec = TextSpec(
        source=str(path), vocab_size=270, sequence_length=16, validation_share=0.3, test_share=0.1
    )
    return prepare(spec)


@pytest.mark.parametrize("design", DESIGNS, ids=lambda d: d.name)
@pytest.mark.parametrize("batch_size", [1, 5, 1000])
def test_loss_is_that_of_a_plain_loop(grouped: TextData, design: Design, batch_size: int) -> None:
    model = build_model(design, ModelSpec(**vars(MODEL)), grouped, seed=0)
    found = survey(model, grouped, batch_size)
    nats, groups = [], []
    for index in range(len(grouped.validation)):
        ids = grouped.validation[index]["input_ids"]
        with torch.no_grad():
            log_probability = model.eval()(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        nats += [-float(log_probability[t, ids[t + 1]]) for t in range(len(ids) - 1)]
        groups += grouped.validation.token_groups(index)[1:].tolist()
    assert found.loss == pytest.approx(math.fsum(nats) / len(nats), rel=1e-5)
    assert sorted(found.group_losses) == ["<i>", "even"]
    for number, name in enumerate(grouped.groups):
        own = [value for value, group in zip(nats, groups, strict=True) if group == number]
        assert found.group_losses[name] == pytest.approx(math.fsum(own) / len(own), rel=1e-5)
    tokens = 16 * len(grouped.validation)
    if design.name == "dense":
        assert found.statistics == {}
    else:
        assert found.statistics["rows_per_token"] == 2
        assert [sum(la["histogram"]) for la in found.statistics["layers"]] == [tokens] * 2

"""``moekit evaluate`` from the command line: results, and every mistake."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from command_line import Moekit
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import moekit.models.language  # noqa: F401  (registers our checkpoints with transformers)
from moekit.data import TextSpec, prepare


@pytest.fixture
def choices(tmp_path: Path) -> Path:
    path = tmp_path / "items.jsonl"
    lines = [
        {"context": f"alpha {n}", "choices": ["beta", "gamma 12 ,"], "answer": n % 2}
        for n in range(6)
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def test_text_and_choices(moekit: Moekit, checkpoint: Path, text: Path, choices: Path) -> None:
    ended = moekit(
        *("evaluate", checkpoint, "--data", text, "--sequence-length=16", "--split=test"),
        *("--choices", choices, "--limit=5", "--json", "--output=found.json"),
    )
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert json.loads(Path("found.json").read_text()) == found
    assert found["choices"][str(choices)]["items"] == 5
    assert found["text"]["loss"] == pytest.approx(_loss(checkpoint, text), rel=1e-4)
    assert found["text"]["perplexity"] == pytest.approx(math.exp(found["text"]["loss"]))
    shown = moekit("evaluate", checkpoint, "--choices", choices)
    assert "accuracy" in shown.out
    assert "normalised" in shown.out


def _loss(checkpoint: Path, text: Path) -> float:
    """The mean over tokens, block by block in float64."""
    spec = TextSpec(source=str(text), tokenizer=str(checkpoint), sequence_length=16)
    model = AutoModelForCausalLM.from_pretrained(checkpoint).double().eval()
    total, count = 0.0, 0
    data = prepare(spec).test
    for index in range(len(data)):
        ids_T = data[index]["input_ids"]
        with torch.no_grad():
            logits_TV = model(ids_T[None]).logits[0]
        total += float(F.cross_entropy(logits_TV[:-1], ids_T[1:], reduction="sum"))
        count += len(ids_T) - 1
    return total / count


def test_all_of_a_text(moekit: Moekit, checkpoint: Path, text: Path) -> None:
    tokens = {}
    for split in ("train", "validation", "test", "all"):
        ended = moekit(
            *("evaluate", checkpoint, "--data", text, "--sequence-length=16"),
            *(f"--split={split}", "--json"),
        )
        tokens[split] = json.loads(ended.out)["text"]["tokens"]
    assert tokens.pop("all") == sum(tokens.values())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to measure"),
        (["--data=stdlib", "--split=dev"], "--split is 'dev'"),
        (["--choices=none.jsonl"], "none.jsonl cannot be read"),
    ],
)
def test_mistakes(moekit: Moekit, checkpoint: Path, arguments: list[str], words: str) -> None:
    assert words in moekit("evaluate", checkpoint, *arguments).sentence


def test_a_checkpoint_that_is_none(moekit: Moekit, choices: Path, tmp_path: Path) -> None:
    assert "nowhere" in moekit("evaluate", tmp_path / "nowhere", "--choices", choices).sentence


def test_tasks_without_the_harness(
    moekit: Moekit, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moekit.measure.harness.find_spec", lambda _: None)
    assert "not installed" in moekit("evaluate", checkpoint, "--tasks=arc_easy").sentence

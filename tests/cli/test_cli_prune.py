"""``moekit prune`` from the command line: a result, its report, and every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import Moekit
from transformers import AutoModelForCausalLM, OlmoeConfig, OlmoeForCausalLM

from moekit.data import train_tokenizer


@pytest.fixture(scope="session")
def olmoe(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny OLMoE with a tokenizer."""
    folder = tmp_path_factory.mktemp("olmoe") / "model"
    torch.manual_seed(0)
    tokenizer = train_tokenizer([text.read_text()], 280, tmp_path_factory.mktemp("cache"))
    config = OlmoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
        pad_token_id=0,
        initializer_range=0.3,
    )
    OlmoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.fixture
def small(olmoe: Path, text: Path) -> list[str]:
    """A run that takes a second."""
    sizes = ["--sequence-length=32", "--sequences=8", "--held-out=4", "--batch-size=4"]
    return ["prune", str(olmoe), "--data", str(text), *sizes]


def test_accuracy_before_and_after(moekit: Moekit, small: list[str]) -> None:
    line = {"context": "alpha beta", "choices": ["gamma", "12 ("], "answer": 1}
    Path("items.jsonl").write_text("\n".join([json.dumps(line)] * 3))
    ended = moekit(*small, "--choices=items.jsonl", "--held-out=0", "--output=out", "--keep=1")
    assert ended.code == 0, ended.err
    assert "accuracy, items.jsonl" in ended.out
    report = json.loads(Path("out/moekit_prune.json").read_text())
    sides = report["choices"]["items.jsonl"]
    assert sides["before"] == sides["after"]  # every expert is kept
    assert sides["before"]["items"] == 3
    ended = moekit("evaluate", "out", "--choices=items.jsonl", "--json")
    assert json.loads(ended.out)["choices"]["items.jsonl"] == sides["after"]
    wrong = moekit(*small, "--choices=none.jsonl", "--output=other")
    assert "none.jsonl cannot be read" in wrong.sentence
    assert not Path("other").exists()


def test_a_result_and_its_report(moekit: Moekit, small: list[str]) -> None:
    ended = moekit(*small, "--method=dern", "--set", "alpha=0.2", "--output=out", "--keep=0.5")
    assert ended.code == 0, ended.err
    assert "held-out perplexity" in ended.out
    assert "an ordinary checkpoint" in ended.out
    report = json.loads(Path("out/moekit_prune.json").read_text())
    assert report["method"]["alpha"] == 0.2
    assert report["calibration_tokens"] == 8 * 32
    assert [block["experts"] for block in report["blocks"]] == [4, 4]
    assert report["after"]["parameters"] < report["before"]["parameters"]
    assert report["after"]["perplexity"] > 1
    model = AutoModelForCausalLM.from_pretrained("out")
    assert model.config.num_experts == 4
    assert moekit("generate", "out", "--prompt=alpha", "--tokens=3").code == 0
    assert moekit("inspect", "out").code == 0
    assert "is there already" in moekit(*small, "--output=out").sentence
    assert not list(Path().glob(".out*"))


def test_a_result_of_our_class(moekit: Moekit, small: list[str]) -> None:
    ended = moekit(*small, "--method=m-smoe", "--output=out", "--json", "--quiet")
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    assert report["output"] == "out"
    assert report["ordinary"] is False
    assert sum(block["experts"] for block in report["blocks"]) == 8
    assert moekit("generate", "out", "--prompt=alpha", "--tokens=3").code == 0
    assert "PrunedMoEForCausalLM" in moekit("inspect", "out").out


def test_as_many_sequences_as_asked_and_a_setting_of_one_word(
    moekit: Moekit, small: list[str]
) -> None:
    sizes = ["--sequences=5", "--held-out=3", "--batch-size=4"]
    ended = moekit(*small, *sizes, "--method=dern", "--set", "parts=up", "--output=out", "--json")
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    assert report["calibration_tokens"] == 5 * 32
    assert report["before"]["tokens"] == report["after"]["tokens"] == 3 * 31
    assert report["method"]["parts"] == ["up"]


def test_a_target_size(moekit: Moekit, small: list[str], olmoe: Path) -> None:
    whole = (olmoe / "model.safetensors").stat().st_size
    size = f"{whole * 0.8 / 1000:.1f}kB"
    ended = moekit(*small, "--target-size", size, "--output=out", "--held-out=0")
    assert ended.code == 0, ended.err
    assert "perplexity" not in ended.out
    assert Path("out/model.safetensors").stat().st_size < whole * 0.85


def test_help_has_examples(moekit: Moekit) -> None:
    out = moekit("prune", "--help").out
    for part in (
        "moekit prune my/olmoe --method reap",
        "--keep",
        "--target-size",
        "block by block",
    ):
        assert part in out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method=magic"], "no method 'magic'; known: dern"),
        (["--set", "alpha"], "is not NAME=VALUE"),
        (["--set", "alpha=0.1"], "REAP has no field 'alpha'"),
        (["--method=dern", "--set", "alpha=2"], "wanted a cosine"),
        (["--method=dern", "--set", "parts=up,bias"], "parts"),
        (["--keep=0.5", "--experts=4"], "give one of --keep"),
        (["--keep=0"], "wanted more than 0"),
        (["--experts=1"], "1 experts are too few"),
        (["--experts=9"], "cannot be kept of the 8"),
        (["--target-size=8XB"], "wanted a size as 8GB"),
        (["--target-size=1"], "cannot be reached"),
        (["--sequences=0"], "--sequences is 0"),
        (["--batch-size=0"], "--batch-size is 0"),
        (["--held-out=-1"], "--held-out is -1"),
        (["--device=tpu"], "no device"),
        (["--seed=-1"], "seed is -1"),
    ],
)
def test_mistakes(moekit: Moekit, small: list[str], options: list[str], said: str) -> None:
    assert said in moekit(*small, *options, "--output=out").sentence
    assert not Path("out").exists()


def test_checkpoints_that_cannot_be_pruned(
    moekit: Moekit, small: list[str], olmoe: Path, checkpoint: Path, tmp_path: Path
) -> None:
    other = [small[0], str(tmp_path / "none"), *small[2:]]
    assert "cannot be fetched from the hub" in moekit(*other).sentence
    (tmp_path / "bad").mkdir()
    for path in olmoe.iterdir():
        (tmp_path / "bad" / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "bad" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    bad = [small[0], str(tmp_path / "bad"), *small[2:]]
    assert "model.safetensors is cut off" in moekit(*bad).sentence
    moepp = [small[0], str(checkpoint), *small[2:]]
    assert "TopK without noise over one feed-forward bank" in moekit(*moepp).sentence

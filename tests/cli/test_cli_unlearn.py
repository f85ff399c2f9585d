"""``moekit unlearn`` from the command line: a result, its report, and every mistake."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from command_line import Moekit
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
)

from moekit.data import train_tokenizer


@pytest.fixture(scope="session")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of other random words."""
    draw = random.Random(1)
    path = tmp_path_factory.mktemp("secret") / "secret.txt"
    path.write_text(" ".join(draw.choice(["delta", "omega", "7", "!", "\n"]) for _ in range(4000)))
    return path


@pytest.fixture(scope="session")
def olmoe(text: Path, secret: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny OLMoE with a tokenizer."""
    folder = tmp_path_factory.mktemp("olmoe") / "model"
    torch.manual_seed(0)
    texts = [text.read_text(), secret.read_text()]
    tokenizer = train_tokenizer(texts, 280, tmp_path_factory.mktemp("cache"))
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
def small(olmoe: Path, text: Path, secret: Path) -> list[str]:
    """A run that takes a second."""
    return [
        *("unlearn", str(olmoe), "--forget", str(secret), "--retain", str(text)),
        *("--sequence-length=32", "--steps=4", "--check-every=2", "--batch-size=2"),
        *("--accumulate=1", "--held-out=4", "--learning-rate=0.01"),
    ]


def test_a_result_and_its_report(moekit: Moekit, small: list[str], olmoe: Path) -> None:
    before = {path: path.read_bytes() for path in olmoe.iterdir()}
    ended = moekit(*small, "--output=out", "--set", "beta=0.1")
    assert ended.code == 0, ended.err
    for part in ("forget, perplexity", "retain, accuracy", "experts still selected", "did not rea"):
        assert part in ended.out
    report = json.loads(Path("out/moekit_unlearn.json").read_text())
    assert report["spec"]["algorithm"] == {"kind": "NPO", "beta": 0.1, "weight": 1.0}
    assert report["spec"]["targets"]["kind"] == "Attributed"
    assert report["steps"] == 4
    sequences = report["forget_sequences"]  # of a file cut into chunks, one is held out
    assert sequences["unlearned"] > 5 * sequences["held_out"] > 0
    assert len(report["experts"]) == 1
    assert report["trained"] == 3 * 16 * 16 + 8 * 16
    assert 0 < report["changed_share"] < 0.1
    assert [look["step"] for look in report["looks"]] == [0, 2, 4]
    assert {path: path.read_bytes() for path in olmoe.iterdir()} == before
    chosen = report["experts"][0]
    old, new = (load_file(p / "model.safetensors") for p in (olmoe, Path("out")))
    changed = {key for key, tensor in new.items() if not tensor.equal(old[key])}
    parts = (f"experts.{chosen['expert']}.{m}_proj" for m in ("gate", "up", "down"))
    assert changed == {f"{chosen['block']}.{p}.weight" for p in (*parts, "gate")}
    assert AutoModelForCausalLM.from_pretrained("out").config.num_experts == 8
    assert moekit("generate", "out", "--prompt=alpha", "--tokens=3").code == 0
    assert "is there already" in moekit(*small, "--output=out").sentence
    assert not list(Path().glob(".out*"))


@pytest.mark.parametrize(
    ("options", "kind", "experts"),
    [
        (["--algorithm=gdiff", "--experts=3", "--same-layer"], "Attributed", 3),
        (["--algorithm=ga", "--expert=1:5", "--expert=0:2", "--freeze-router"], "Named", 2),
        (["--algorithm=rmu", "--set", "weight=1", "--train=random"], "RandomExperts", 1),
        (["--algorithm=ga", "--train=experts", "--until=0"], "AllExperts", 0),
        (["--algorithm=ga", "--train=routers"], "Routers", 0),
        (["--algorithm=ga", "--train=all"], "Everything", 0),
    ],
)
def test_every_choice(
    moekit: Moekit, small: list[str], options: list[str], kind: str, experts: int
) -> None:
    ended = moekit(*small, *options, "--output=out", "--json", "--quiet")
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    assert report["output"] == "out"
    assert report["spec"]["targets"]["kind"] == kind
    assert len(report["experts"]) == experts
    assert report["forget"]["after"]["perplexity"] != report["forget"]["before"]["perplexity"]


def test_help_has_examples(moekit: Moekit) -> None:
    out = moekit("unlearn", "--help").out
    for part in ("moekit unlearn my/olmoe --forget", "--anchor", "--until", "bit for bit"):
        assert part in out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--algorithm=magic"], "no algorithm 'magic'; known: ga, gdiff, npo, rmu"),
        (["--set", "beta"], "is not NAME=VALUE"),
        (["--set", "bta=0.1"], "NPO has no field 'bta'"),
        (["--set", "beta=0"], "beta is 0; wanted more than 0"),
        (["--set", "kind=GA"], "kind is no setting of npo"),
        (["--set", "name=x"], "NPO has no field 'name'"),
        (["--set", "cls=x"], "NPO has no field 'cls'"),
        (["--train=some"], "wanted one of expert, random"),
        (["--experts=0"], "wanted at least 1 expert"),
        (["--experts=99"], "99 experts cannot be selected"),
        (["--expert=1"], "wanted LAYER:EXPERT"),
        (["--expert=1:shared"], "shared experts: --shared"),
        (["--expert=1:9"], "no routed expert 9"),
        (["--expert=1:2", "--experts=2"], "not both"),
        (["--train=experts", "--experts=2"], "--experts does not go with"),
        (["--train=all", "--freeze-router"], "--freeze-router does not go with"),
        (["--shared"], "has no shared expert"),
        (["--anchor=-1"], "anchor is -1"),
        (["--until=0.5"], "until is 0.5"),
        (["--steps=0"], "steps is 0"),
        (["--held-out=0"], "--held-out is 0"),
        (["--algorithm=rmu", "--train=experts"], "name it with layer=N"),
        (["--learning-rate=1e30", "--steps=40"], "nothing is written"),
        (["--forget=none.txt"], "does not exist"),
        (["--device=tpu"], "no device"),
    ],
)
def test_mistakes(moekit: Moekit, small: list[str], options: list[str], said: str) -> None:
    assert said in moekit(*small, *options, "--output=out").sentence
    assert not Path("out").exists()


def test_a_tokenizer_of_another_model_is_refused(
    moekit: Moekit, small: list[str], text: Path, tmp_path: Path
) -> None:
    train_tokenizer([text.read_text() * 3], 300, tmp_path / "cache").save_pretrained("other")
    tokenizer = AutoTokenizer.from_pretrained("other")
    tokenizer.add_tokens([f"<{n}>" for n in range(60)])
    tokenizer.save_pretrained("other")
    ended = moekit(*small, "--tokenizer=other", "--output=out")
    assert "has ids up to" in ended.sentence
    assert "280 rows" in ended.sentence


def test_a_dense_checkpoint_has_no_experts(moekit: Moekit, small: list[str]) -> None:
    config = LlamaConfig(
        vocab_size=280,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained("dense")
    ended = moekit("unlearn", "dense", *small[2:])
    assert "'llama' cannot be operated on; supported: mixtral" in ended.sentence

"""``moekit graft`` from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Moekit
from transformers import AutoModelForCausalLM, MixtralConfig


@pytest.fixture
def mixtral(saved: Callable[..., Path]) -> Path:
    return saved("mixtral", MixtralConfig, intermediate_size=16, num_local_experts=4)


def test_a_grafted_model_serves_the_other_commands(
    moekit: Moekit, mixtral: Path, text: Path
) -> None:
    ended = moekit("graft", mixtral, "--null-experts=4", "--k=3", "--output=out")
    assert ended.code == 0, ended.err
    assert "GraftedMoEForCausalLM" in ended.out
    assert json.loads(Path("out/moekit_graft.json").read_text())["null_experts"] == 4
    assert AutoModelForCausalLM.from_pretrained("out").config.k == 3
    found = moekit("evaluate", "out", "--data", text, "--sequence-length=16", "--json")
    assert found.code == 0, found.err
    assert json.loads(found.out)["text"]["loss"] > 0
    assert moekit("generate", "out", "--prompt=alpha", "--tokens=3").code == 0
    assert moekit("inspect", "out").code == 0
    assert not [path for path in Path().iterdir() if path.name.startswith(".out")]


def test_moekits_own_decoder(moekit: Moekit, tiny: list[str]) -> None:
    assert moekit("train", "--design=topk", "--output=own", *tiny).code == 0
    ended = moekit("graft", "own/model", "--null-experts=4", "--k=3", "--output=out", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["parameters"] > json.loads(ended.out)["parameters_before"]
    assert moekit("inspect", "out").code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--null-experts=3", "--k=2"], "3 null experts for 4 experts"),
        (["--null-experts=4", "--k=9"], "k is 9"),
        (["--null-experts=4", "--k=2", "--normalize=some"], "--normalize is 'some'"),
        (["--null-experts=4", "--k=2", "--balance=-1"], "weight is -1"),
        (["--null-experts=4", "--k=2", "--output=mixtral"], "mixtral is there already"),
    ],
)
def test_mistakes(moekit: Moekit, mixtral: Path, arguments: list[str], words: str) -> None:
    assert words in moekit("graft", mixtral, *arguments).sentence

"""``moekit upcycle`` from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Moekit
from transformers import LlamaConfig


@pytest.fixture
def llama(saved: Callable[..., Path]) -> Path:
    return saved("llama", LlamaConfig, intermediate_size=16, initializer_range=0.3)


def test_a_mixture_of_the_same_loss(moekit: Moekit, llama: Path, text: Path) -> None:
    ended = moekit("upcycle", llama, "--experts=4", "--k=2", "--output=out")
    assert ended.code == 0, ended.err
    assert "MixtralForCausalLM" in ended.out
    assert json.loads(Path("out/moekit_upcycle.json").read_text())["upcycling"]["experts"] == 4
    losses = [
        json.loads(moekit("evaluate", place, "--data", text, "--sequence-length=16", "--json").out)[
            "text"
        ]["loss"]
        for place in (llama, "out")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert moekit("generate", "out", "--prompt=alpha", "--tokens=3").code == 0
    assert not [path for path in Path().iterdir() if path.name.startswith(".out")]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--k=9"], "k is 9"),
        (["--layers=some"], "layers"),
        (["--layers=last-half"], "every layer of Mixtral"),
        (["--reinit=2"], "reinit is 2"),
        (["--output=llama"], "llama is there already"),
    ],
)
def test_mistakes(moekit: Moekit, llama: Path, arguments: list[str], words: str) -> None:
    assert words in moekit("upcycle", llama, *arguments).sentence
    assert not Path("moekit-upcycle").exists()


def test_a_mixture_already(moekit: Moekit, llama: Path) -> None:
    assert moekit("upcycle", llama, "--experts=2", "--output=out").code == 0
    assert "a 'mixtral' model cannot be upcycled" in moekit("upcycle", "out").sentence


def test_moekits_own_decoder(moekit: Moekit, tiny: list[str], text: Path) -> None:
    assert moekit("train", "--design=dense", "--output=own", *tiny).code == 0
    ended = moekit("upcycle", "own/model", "--experts=4", "--k=2", "--output=out", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["architecture"] == "MoEDecoderForCausalLM"
    losses = [
        json.loads(moekit("evaluate", place, "--data", text, "--sequence-length=16", "--json").out)
        for place in ("own/model", "out")
    ]
    assert losses[1]["text"]["loss"] == pytest.approx(losses[0]["text"]["loss"], rel=1e-5)
    refused = moekit("upcycle", "own/model", "--noise=0.1", "--output=other")
    assert "plain copies" in refused.sentence
    assert "dense and alike" in moekit("upcycle", "out", "--output=other").sentence

"""The command line in this process, and a study of it to look at."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Ended, Moekit
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging

from moekit.cli.main import main
from moekit.compare import study as study_module
from moekit.compare.run import run_design
from moekit.data import train_tokenizer

SIZES = (
    *("--steps=4", "--batch-size=2", "--sequence-length=16", "--vocab-size=280"),
    *("--width=16", "--depth=2", "--heads=2", "--kv-heads=1", "--experts=4", "--hidden=16"),
    "--precision=float32",
)


@pytest.fixture
def moekit(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Moekit]:
    """A function that runs ``moekit ARGUMENTS`` in an empty working folder.

    Runs of a study share this process, which saves the seconds that a new one takes to import
    torch; the command in a process of its own has its own tests.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study_module, "run_apart", run_design)
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["moekit", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        return Ended(int(str(end.value.code)), *capfd.readouterr())

    yield run
    logging.set_verbosity(verbosity)
    (logging.enable_progress_bar if bar else logging.disable_progress_bar)()


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random words."""
    draw = random.Random(0)
    known = ["alpha", "beta", "gamma", "12", "(", ")", ".", ",", "\n", "<b>"]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(draw.choice(known) for _ in range(6000)))
    return path


@pytest.fixture
def tiny(text: Path) -> list[str]:
    """Options of a training run that takes a second."""
    return ["--data", str(text), *SIZES]


@pytest.fixture(scope="session")
def study(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished study of moepp and topk."""
    output = tmp_path_factory.mktemp("study") / "study"
    arguments = ["compare", "--designs=moepp,topk", f"--data={text}", f"--output={output}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["moekit", *arguments, "--quiet", *SIZES])
        patch.setattr(study_module, "run_apart", run_design)
        with pytest.raises(SystemExit, match=r"^0$"):
            main()
    return output


@pytest.fixture
def checkpoint(study: Path) -> Path:
    """A trained MoE++ model."""
    return study / "runs" / "moepp-seed0" / "model"


@pytest.fixture
def saved(text: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function that saves a tiny model of transformers with a tokenizer, and says where."""

    def save(name: str, config: type[PreTrainedConfig], **sizes: Any) -> Path:
        torch.manual_seed(0)
        words = train_tokenizer([text.read_text()], 280, tmp_path / "cache")
        made: Any = config(
            vocab_size=len(words),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            **sizes,
        )
        folder = tmp_path / name
        AutoModelForCausalLM.from_config(made).save_pretrained(folder)
        words.save_pretrained(str(folder))
        return folder

    return save

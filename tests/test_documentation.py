"""The examples of README and documentation, run as they are written."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from moekit import SwiGLU
from moekit.compare import load_design
from moekit.models.language import MoEDecoderConfig, MoEDecoderForCausalLM

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LONG = ("runs/", "trainer.train()")  # needs a finished run, or is one


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def pages_with(language: str) -> list[Any]:
    found = [page for page in PAGES if blocks(page, language)]
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in found]


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_examples_run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = MoEDecoderConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        layers=SwiGLU(count=1, hidden=256),
    )
    module: Any = types.ModuleType("documentation")
    module.dense_model = MoEDecoderForCausalLM(config)
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look there
    for number, block in enumerate(blocks(page, "python")):
        code = compile(block, f"{page.name}, example {number}", "exec")
        if not any(word in block for word in LONG):
            exec(code, vars(module))


@pytest.mark.parametrize("page", pages_with("json"))
def test_json_examples_are_designs(page: Path, tmp_path: Path) -> None:
    for number, block in enumerate(blocks(page, "json")):
        path = tmp_path / f"{number}.json"
        path.write_text(block)
        assert load_design(path).layers

"""The table of systems, their designs, and small formulas."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moekit import MoESpec
from moekit.compare import Design, ModelSpec, load_design
from moekit.errors import OutputError, SpecError
from moekit.models.language import MoEDecoderForCausalLM
from moekit.systems import DEFAULT_DESIGNS, Laboratory, Shape, System, baselines, find, systems
from moekit.systems.adamoe import null_experts_for_load
from moekit.systems.experiment import judged
from moekit.systems.moepp import expected_feed_forward_load, moepp
from moekit.systems.planned import PLANNED
from moekit.training import SilentProgress

EVERY = (*baselines(), *systems())
DESIGNED = [system for system in EVERY if system.design is not None]
NOT_SYSTEMS = {"README", "compression_peers", "systems_peers", "vlm_harness"}


def test_one_row_a_paper() -> None:
    papers = Path(__file__).resolve().parents[3] / "shared" / "papers"
    if not papers.is_dir():
        pytest.skip("no shared/papers beside the repository")
    wanted = {path.stem for path in papers.glob("*.md")} - NOT_SYSTEMS
    assert sorted(system.name for system in systems()) == sorted(wanted)


def test_every_row_says_what_it_is() -> None:
    names = [system.name for system in EVERY]
    assert len(set(names)) == len(names)
    for system in EVERY:
        assert system.title
        assert system.parts
        assert system.available or (system.design is None and system.experiment is None)
    assert all(system.paper for system in systems())
    assert set(DEFAULT_DESIGNS) <= {system.name for system in DESIGNED}


def test_find() -> None:
    assert find("moepp").name == "moepp"
    with pytest.raises(SpecError, match="did you mean remoe"):
        find("remoee")
    with pytest.raises(
        SpecError, match=f"{PLANNED[0].name} is specified but not part of this version"
    ):
        find(PLANNED[0].name)


@pytest.mark.parametrize("shape", [Shape(2, 8, 1), Shape(8, 16, 2), Shape(16, 8, 4)], ids=str)
@pytest.mark.parametrize("system", DESIGNED, ids=lambda s: s.name)
def test_designs_build_train_and_survive_files(
    system: System, shape: Shape, tmp_path: Path, aligned: Callable[[Any], Any]
) -> None:
    assert system.design is not None
    design = system.design(shape)
    path = tmp_path / "design.json"
    path.write_text(json.dumps(design.to_dict()))
    assert load_design(path) == design
    model = _model(design)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.randint(1, 64, (2, 12))
    losses = []
    for _ in range(3):
        output = model(ids, labels=ids)
        output.loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(output.loss.detach()))
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    loaded = MoEDecoderForCausalLM.from_pretrained(tmp_path)
    for tensor in (*loaded.parameters(), *loaded.buffers()):
        tensor.data = tensor.data.clone()  # a mapped file is not aligned: sums differ in a last bit
    with torch.no_grad():
        assert aligned(loaded.eval())(ids).logits.equal(model.eval()(ids).logits)


def _model(design: Design) -> MoEDecoderForCausalLM:
    torch.manual_seed(0)
    model = ModelSpec(width=16, depth=2, heads=2, kv_heads=1)
    return MoEDecoderForCausalLM(design.config(model, vocabulary=64, length=16)).train()


@pytest.mark.parametrize("shape", [{"experts": 1}, {"k": 0}, {"k": 9}, {"hidden": 4}])
def test_bad_shapes(shape: dict[str, int]) -> None:
    with pytest.raises(SpecError):
        Shape(**shape)


def test_expected_feed_forward_load() -> None:
    """The paper's formula, at values worked out by hand, and as the layer spec computes it."""
    assert expected_feed_forward_load(2, 1.0, 8, 4) == pytest.approx(4 / 3)
    assert expected_feed_forward_load(2, 0.25, 8, 4) == pytest.approx(2 / 3)
    assert expected_feed_forward_load(2, 0.75, 8, 0) == 2
    for tau in (0.1, 0.5, 0.75, 1.0):
        (layer,) = moepp(Shape(8, 16, 2), tau).layers
        assert isinstance(layer, MoESpec)
        assert layer.expected_load() == pytest.approx(expected_feed_forward_load(2, tau, 8, 4))


@pytest.mark.parametrize(
    ("experts", "cheap"), [(4, 3), (8, 4), (16, 4), (32, 8), (64, 16)], ids=str
)
def test_zero_computation_experts_of_moepp(experts: int, cheap: int) -> None:
    """One zero, one copy, and max(N/4 - 2, 1) constant ones, but two for N of 8 and 16."""
    (layer,) = moepp(Shape(experts, 16, 2)).layers
    assert isinstance(layer, MoESpec)
    kinds = layer.experts.expert_kinds()
    assert kinds.count("feed_forward") == experts
    assert kinds.count("zero") == kinds.count("copy") == 1
    assert len(kinds) == experts + cheap


def test_null_experts_for_a_load() -> None:
    assert null_experts_for_load(experts=8, k=3, load=1.5) == 8
    assert null_experts_for_load(experts=8, k=2, load=2) == 0
    for count in (2, 5, 16):
        assert null_experts_for_load(8, 3, 3 * 8 / (8 + count)) == count


def test_judgement() -> None:
    assert judged(True, quick=False) == "reproduced"
    assert judged(False, quick=False) == "not reproduced"
    assert judged(True, quick=True) == judged(True, quick=False, decided=False) == "inconclusive"


class _Progress:
    def preparing(self) -> object:
        return lambda *_: None

    def run(self, *_: object) -> SilentProgress:
        return SilentProgress()


def test_a_folder_belongs_to_one_experiment(tmp_path: Path) -> None:
    folder = tmp_path / "a"

    def laboratory(quick: bool, seed: int = 0) -> Laboratory:
        return Laboratory(folder, quick, seed, "cpu", _Progress())  # type: ignore[arg-type]

    laboratory(True).claim("moepp")
    laboratory(True).claim("moepp")
    for other, name in ((laboratory(False), "moepp"), (laboratory(True, 1), "moepp")):
        with pytest.raises(OutputError, match="another experiment"):
            other.claim(name)
    with pytest.raises(OutputError, match="another experiment"):
        laboratory(True).claim("remoe")
    (folder / "experiment.json").unlink()
    (folder / "thesis.txt").touch()
    with pytest.raises(OutputError, match="not empty"):
        laboratory(True).claim("moepp")
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]

"""Designs: matching by cost, files, names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moekit import (
    GELU,
    Bank,
    Capacity,
    Constant,
    MoESpec,
    Pathway,
    SwiGLU,
    TopK,
    Zero,
)
from moekit.compare import Design, ModelSpec, load_design, matched
from moekit.compare.design import UNIT
from moekit.compare.run import folder_name
from moekit.errors import SpecError
from moekit.measure import count_flops, parameter_counts
from moekit.models.language import MoEDecoderForCausalLM
from moekit.systems import Shape, baselines, find, systems

MODEL = ModelSpec(width=32, depth=3, heads=2, kv_heads=1)
NAMED = [s.design for s in (*baselines(), *systems()) if s.design is not None]
KNOWN_ROWS = ("dense", "topk", "switch", "deepseek", "hash", "moduleformer")
# A gate that runs every expert needs k times the width to be E times the narrowest expert at least.
SHAPES = [Shape(8, 64, 2), Shape(4, 256, 1), Shape(16, 72, 3)]


def active(design: Design) -> int:
    """Active parameters of the whole built model, by the counter of built models."""
    with torch.device("meta"):
        model = MoEDecoderForCausalLM(design.config(MODEL, vocabulary=64, length=16))
    return parameter_counts(model).active


def one_unit(design: Design) -> float:
    """Expected parameters of one more UNIT of hidden width in every bank, rows included."""
    return 3 * MODEL.width * UNIT * sum(_banks(spec) for spec in design.at_depth(MODEL.depth))


def _banks(spec: Any) -> float:
    if not isinstance(spec, MoESpec):
        return 1
    return spec.expected_load() + (spec.shared is not None)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_active_parameters_of_built_models_are_equal_within_one_step_of_width(
    shape: Shape,
) -> None:
    designs = matched([make(shape) for make in NAMED], MODEL, "active")
    target = active(designs[0])
    for design in designs[1:]:
        assert abs(active(design) - target) <= one_unit(design), design.name


def test_a_gate_that_runs_every_expert_may_cost_too_much_at_any_width() -> None:
    made = (find(name).design for name in ("dense", "gg_moe"))
    designs = [make(Shape(16, 40, 3)) for make in made if make is not None]
    with pytest.raises(SpecError, match="gg_moe costs more than the first design"):
        matched(designs, MODEL, "active")


def test_flops_of_built_models_are_equal() -> None:
    """Designs with a known number of rows; the rest is expected and cannot be forced."""
    known = [make(Shape(8, 256, 2)) for make in NAMED]
    known = [d for d in known if d.name in KNOWN_ROWS]
    designs = matched(known, MODEL, "flops", length=16)
    ids = torch.randint(64, (2, 16))
    counted = {}
    for design in designs:
        model = MoEDecoderForCausalLM(design.config(MODEL, vocabulary=64, length=16))
        counted[design.name] = count_flops(model, ids)
    for design in designs[1:]:
        combining = 2 * MODEL.width * 3 * MODEL.depth  # of at most 3 rows; counted, not matched
        gap = abs(counted[design.name] - counted["dense"])
        assert gap <= 2 * one_unit(design) + combining, design.name


def test_top_2_against_dense_by_hand() -> None:
    dense = Design("dense", (SwiGLU(count=1, hidden=96),))
    top_2 = Design("topk", (MoESpec(TopK(k=2), SwiGLU(count=4, hidden=8)),))
    _, found = matched([dense, top_2], MODEL, "active")
    # 3·32·96 parameters against 32·4 of the router and 2·3·32·h: h = 47.3, so 48
    assert found.layers[0].experts == SwiGLU(count=4, hidden=48)


def test_the_first_design_and_matching_by_steps_change_nothing() -> None:
    designs = [make(SHAPES[0]) for make in NAMED]
    assert matched(designs, MODEL, "steps") == designs
    assert matched(designs, MODEL, "active")[0] == designs[0]
    assert matched([], MODEL, "active") == []


def test_every_hidden_width_of_a_design_is_scaled() -> None:
    mixed = Bank((SwiGLU(count=2, hidden=16), GELU(count=2, hidden=32), Zero(1)))
    layers = (
        MoESpec(TopK(k=2), mixed, shared=SwiGLU(count=1, hidden=16)),
        SwiGLU(count=1, hidden=64),
    )
    model = ModelSpec(width=32, depth=2, heads=2, kv_heads=1)
    first = Design("dense", (SwiGLU(count=1, hidden=512),))
    _, found = matched([first, Design("mixed", layers)], model, "active")
    moe, dense = found.layers
    factors = [moe.experts.parts[0].hidden / 16, moe.experts.parts[1].hidden / 32]
    factors += [moe.shared.hidden / 16, dense.hidden / 64]
    assert min(factors) > 1
    assert max(factors) - min(factors) <= UNIT / 16  # the rounding of the narrowest bank


def test_a_padded_capacity_counts_its_places() -> None:
    """Rows of zeros are computed: factor · k of them a token."""
    top_2 = MoESpec(TopK(k=2), SwiGLU(count=4, hidden=64))
    padded = top_2.replace(dispatch=Capacity(factor=2.0, pad=True))
    _, found = matched([Design("a", (top_2,)), Design("b", (padded,))], MODEL, "flops")
    assert found.layers[0].experts.hidden == 32


def test_a_design_that_cannot_be_narrow_enough_is_refused() -> None:
    small = Design("small", (SwiGLU(count=1, hidden=8),))
    large = Design("large", (MoESpec(TopK(k=8), SwiGLU(count=8, hidden=8)),))
    with pytest.raises(SpecError, match=r"large costs more than the first.*match steps"):
        matched([small, large], MODEL, "active")


def test_design_files(tmp_path: Path) -> None:
    layer = MoESpec(
        Pathway(k=2), Bank((SwiGLU(count=4, hidden=16), Constant(1))), dispatch=Capacity()
    )
    design = Design("two layers", (SwiGLU(count=1, hidden=16), layer))
    contents = {
        "whole": (design.to_dict(), design),
        "unnamed": ({"layers": [layer.to_dict()]}, Design("unnamed", (layer,))),
        "layer": (layer.to_dict(), Design("layer", (layer,))),
        "dense": (
            {"kind": "SwiGLU", "count": 1, "hidden": 16},
            Design("dense", (SwiGLU(count=1, hidden=16),)),
        ),
    }
    for name, (data, wanted) in contents.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(data))
        assert load_design(path) == wanted


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a design in JSON"),
        (b"{", "not a design in JSON"),
        (b"\xff\xfe\0", "not a design in JSON"),
        (b"[" * 100_000, "not a design in JSON"),
        (
            b'{"kind": "MoESpec", "router": {"kind": "TopK"}, "experts": '
            + b'{"kind": "Bank", "parts": [' * 400
            + b'{"kind": "SwiGLU"}'
            + b"]}" * 400
            + b"}",
            "too deep",
        ),
        (b"7", "layers"),
        (b"[1]", "layers"),
        (b"null", "layers"),
        (b'{"kind": "Nothing"}', "layers|not a"),
        (b'{"kind": "TopK", "k": 2}', "not a MoESpec"),
        (b'{"kind": "SwiGLU", "count": 1, "hidden": -8}', "hidden"),
        (b'{"kind": "SwiGLU", "count": 1, "hiden": 8}', "did you mean hidden"),
        (b'{"kind": "Design", "name": "x", "layers": []}', "no layers"),
        (b'{"kind": "Design", "name": "", "layers": [{"kind": "SwiGLU"}]}', "name is empty"),
        (
            b'{"kind": "MoESpec", "router": {"kind": "TopK", "k": 9}, '
            b'"experts": {"kind": "SwiGLU", "count": 8, "hidden": 8}}',
            "k is 9",
        ),
        (
            b'{"kind": "MoESpec", "router": {"kind": "TopK", "k": 2}, "experts": {"kind": '
            b'"SwiGLU", "count": 8, "hidden": 8}, "dispatch": {"kind": "Capacity", "factor": -1}}',
            "factor",
        ),
    ],
)
def test_a_bad_design_file_is_one_sentence(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "design.json"
    path.write_bytes(content)
    with pytest.raises(SpecError, match=said) as refused:
        load_design(path)
    assert "\n" not in str(refused.value)


def test_a_missing_design_file(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="No such file"):
        load_design(tmp_path / "none.json")


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "a\x1b[31mb", "x" * 101])
def test_a_name_that_is_no_label_is_refused(name: str) -> None:
    with pytest.raises(SpecError, match="name"):
        Design(name, (SwiGLU(count=1, hidden=8),))


def test_layers_and_depth_must_agree() -> None:
    design = Design("two", (SwiGLU(count=1, hidden=8),) * 2)
    with pytest.raises(SpecError, match="2 layer specs; the model has 3"):
        design.at_depth(3)


@given(st.text())
def test_folder_names_stay_in_their_folder(name: str) -> None:
    made = folder_name(name)
    assert made
    assert Path(made).name == made
    assert made not in (".", "..")
    assert not made.startswith((".", "-"))


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("../../x", "x"),
        ("/etc/passwd", "etc-passwd"),
        ("moepp τ=0.25", "moepp-=0.25"),
        ("..", "design"),
    ],
)
def test_folder_name(name: str, wanted: str) -> None:
    assert folder_name(name) == wanted

"""The layer benchmark: contenders agree, memory and limits are what they say, the page is made."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from moekit.measure import LimitRuns, Limits, alternating, grid, interleaved, roofline
from moekit.measure.layer_bench import (
    BACKENDS,
    DENSE,
    RECOMPUTED,
    THEIRS,
    LayerBench,
    LayerTiming,
)
from moekit.measure.layer_bench_report import geometric_mean, limits_of, report, results
from moekit.measure.layer_shapes import LayerShape
from moekit.measure.merged_bench import Sizes, costs
from moekit.measure.whole_layer_bench import WholeLayerBench
from moekit.measure.zero_computation_bench import VANILLA, time_zero_computation

CPU = torch.device("cpu")
SHAPE = LayerShape(tokens=12, experts=4, k=2, width=16, hidden=24)
LIMITS = Limits(flops=1e9, bandwidth=1e9)


class KnownLimits(LimitRuns):
    """Small runs, whatever they take."""

    def __init__(self) -> None:
        super().__init__(CPU, torch.float32, side=8, part_bytes=64)

    def limits(self, seconds: Mapping[str, float]) -> Limits:
        assert min(seconds[name] for name in self.runs) > 0
        return LIMITS


def _time(
    bench: LayerBench, training: bool, repeats: int, names: Iterable[str] | None = None
) -> LayerTiming:
    return bench.time(KnownLimits(), training, repeats, names, least_seconds=0.0)


@pytest.mark.parametrize(
    ("bench_kind", "dtype"),
    [(LayerBench, "float32"), (LayerBench, "bfloat16"), (WholeLayerBench, "float32")],
)
def test_contenders_compute_the_same(bench_kind: type[LayerBench], dtype: str) -> None:
    """All but the dense layer, which stands for its cost alone."""
    bench = bench_kind(LayerShape(12, 4, 2, 16, 24, dtype), CPU)
    found = bench.contenders(training=True)
    ours = {"moekit", *(f"moekit {name}" for name in BACKENDS["cpu"])}
    assert set(found) == {*ours, *THEIRS, RECOMPUTED, DENSE}
    wanted = found["moekit loop"](bench.x_ND, bench.weight_NK)
    tolerance = {"float32": 1e-5, "bfloat16": 3e-2}[dtype]
    for name, run in found.items():
        if name != DENSE:
            y_ND = run(bench.x_ND, bench.weight_NK)
            torch.testing.assert_close(y_ND, wanted, rtol=tolerance, atol=tolerance)


def test_a_whole_layer_chooses_experts_itself() -> None:
    """Weights that are handed in change nothing, and the router learns in every contender."""
    bench = WholeLayerBench(SHAPE, CPU)
    for name, run in bench.contenders(training=True).items():
        if name == DENSE:
            continue
        bench.router.weight.grad = None
        y_ND = run(bench.x_ND, bench.weight_NK)
        torch.testing.assert_close(y_ND, run(bench.x_ND, torch.zeros_like(bench.weight_NK)))
        y_ND.square().sum().backward()
        gradient = bench.router.weight.grad
        assert gradient is not None, name
        assert gradient.abs().sum() > 0, name
    timing = _time(bench, training=False, repeats=1, names=["moekit", *THEIRS])
    assert timing.whole
    assert not _time(LayerBench(SHAPE, CPU), False, 1, ["moekit", *THEIRS]).whole


def test_the_dense_layer_has_the_same_operations() -> None:
    bench = LayerBench(SHAPE, CPU)
    multiply_adds = SHAPE.tokens * sum(weight.numel() for weight in bench.dense)
    assert 2 * multiply_adds == SHAPE.flops


def test_a_copy_of_every_weight_is_left_out_where_it_would_fill_the_memory() -> None:
    large = LayerShape(tokens=8192, experts=2, k=2, width=256, hidden=256)
    assert large.tokens * large.k * large.weight_bytes > 2**31
    assert "transformers batched_mm" not in LayerBench(large, CPU).contenders(training=False)


@pytest.mark.parametrize("sizes", [(10, 24), (16, 6)])
def test_transformers_grouped_mm_is_left_out_where_it_stops_with_an_error(
    sizes: tuple[int, int],
) -> None:
    bench = LayerBench(LayerShape(3, 4, 2, *sizes), CPU)
    found = bench.contenders(training=True)
    assert {"transformers eager", "transformers batched_mm", "moekit grouped_mm"} <= set(found)
    assert not {"transformers grouped_mm", RECOMPUTED} & set(found)
    with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
        bench._theirs("grouped_mm")(bench.x_ND, bench.weight_NK)
    assert set(_time(bench, training=True, repeats=1).seconds) == set(found)


def test_a_timing_says_what_was_kept_and_which_limit_binds() -> None:
    bench = LayerBench(SHAPE, CPU)
    timing = _time(bench, training=True, repeats=1)
    assert set(timing.seconds) == set(timing.peak_bytes) == set(timing.saved_bytes)
    assert all(value > 0 for value in timing.seconds.values())
    rows = SHAPE.k  # a token
    ours = 4 * (SHAPE.width + 2 * SHAPE.hidden * rows + rows) + 8 * rows
    assert timing.saved_bytes["moekit"] == ours
    assert timing.saved_bytes["transformers grouped_mm"] > 2 * ours
    assert timing.saved_bytes[RECOMPUTED] < ours
    assert timing.bound == "compute"
    assert timing.least_seconds == pytest.approx(3 * SHAPE.flops / 1e9)
    assert timing.ratio == timing.best_other / timing.seconds["moekit"]


def test_memory_binds_where_rows_are_few() -> None:
    bench = LayerBench(LayerShape(1, 4, 2, 16, 24), CPU)
    timing = _time(bench, training=False, repeats=1, names=["moekit", *THEIRS])
    assert timing.bound == "memory"
    assert timing.least_seconds == pytest.approx(2 * 3 * 16 * 24 * 4 / 1e9)  # two experts, once
    assert timing.saved_bytes == {}


@pytest.mark.parametrize(("slower", "wanted"), [(1.5, torch.bfloat16), (50.0, torch.float32)])
def test_a_cpu_without_products_in_half(
    slower: float, wanted: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its limit is that of float32, in which such numbers are then multiplied."""
    times = {torch.float32: 1.0, torch.bfloat16: slower}
    monkeypatch.setattr(roofline, "product_seconds", times.__getitem__)
    runs = LimitRuns(CPU, torch.bfloat16, side=8, part_bytes=64).runs
    assert runs[LimitRuns.PRODUCT]().dtype == wanted


def test_limits_are_measured() -> None:
    """A product of side 64 in a second is 2 x 64^3 operations a second; a read of 4 KiB its own."""
    runs = LimitRuns(CPU, torch.float32, side=64, part_bytes=4096)
    assert runs.runs[LimitRuns.PRODUCT]().shape == (64, 64)
    assert runs.runs[LimitRuns.READ]().item() == 1024  # ones
    limits = runs.limits({LimitRuns.PRODUCT: 1.0, LimitRuns.READ: 0.5, "other": 3.0})
    assert limits == Limits(2 * 64**3, 8192)
    assert limits.least_seconds(limits.flops, 0) == (1.0, "compute")
    assert limits.least_seconds(0, 2 * limits.bandwidth) == (2.0, "memory")


def test_runs_take_turns_and_none_always_follows_the_same_other() -> None:
    order: list[str] = []
    interleaved({n: lambda n=n: order.append(n) for n in "abc"}, CPU, repeats=12)
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert len(rounds) == 1 + 12
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert {pair for pair in itertools.pairwise(order) if pair[0] != pair[1]} == {
        (x, y) for x in "abc" for y in "abc" if x != y
    }


def test_sets_alternate_and_begin_untimed() -> None:
    """Two spells of two turns: each begins with a round that may find cold caches."""
    order: list[str] = []
    sets = [{n: lambda n=n: order.append(n) for n in names} for names in ("ab", "c")]
    found = alternating(sets, CPU, repeats=3, spells=2)
    assert set(found) == {"a", "b", "c"}
    spell = 3 * 2 * ["of the first"] + 3 * ["of the second"]  # one round untimed, two timed
    assert ["of the second" if n == "c" else "of the first" for n in order] == 2 * spell
    assert order.count("a") == order.count("b") == order.count("c") == 6


def test_medians_are_of_all_spells(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is slow for one spell of three is slow for a third of the turns."""
    times = iter([1.0, 2.0, 9.0, 8.0, 3.0, 4.0])
    monkeypatch.setattr(roofline, "seconds", lambda *_: next(times))
    assert alternating([{"a": lambda: None}], CPU, repeats=6) == {"a": 3.5}


def test_short_runs_take_more_turns() -> None:
    counts = {"a": 0, "b": 0}

    def step(name: str) -> None:
        counts[name] += 1
        time.sleep(0.002)

    interleaved({n: partial(step, n) for n in counts}, CPU, repeats=2, least_seconds=0.2)
    assert 1 + 2 < counts["a"] == counts["b"] <= 1 + 50  # one untimed; 4 ms or more a round


def test_no_runs_take_no_time() -> None:
    """As on a GPU where no contender can be captured as a graph."""
    assert interleaved({}, CPU, repeats=2, least_seconds=60.0) == {}


def test_limits_are_the_medians_of_what_was_measured_beside_each_shape() -> None:
    bench = LayerBench(SHAPE, CPU)
    rates = (1e9, 5e9, 2e9)
    timing = _time(bench, training=False, repeats=1, names=["moekit", *THEIRS])
    assert timing.limits == LIMITS
    timings = [replace(timing, limits=Limits(rate, 2 * rate)) for rate in rates]
    assert limits_of(timings) == {"float32": Limits(2e9, 4e9)}


def test_the_grid_covers_decoding_and_prefill() -> None:
    shapes = grid()
    assert len(set(shapes)) == len(shapes)
    assert {shape.dtype for shape in shapes} == {"float32", "bfloat16"}
    assert {shape.tokens for shape in shapes} >= {1, 64, 512, 8192}
    assert {shape.experts for shape in shapes} >= {8, 128}
    assert len(grid(quick=True)) < len(shapes) / 3
    assert max(shape.tokens for shape in grid(device="cuda")) > 8192


def test_zero_computation_rows_fall_with_tau() -> None:
    found = time_zero_computation(CPU, width=8, hidden=8, tokens=400, taus=(1.0, 0.1), repeats=1)
    assert [timing.name for timing in found] == [VANILLA, "MoE++ 8+4, τ=1", "MoE++ 8+4, τ=0.1"]
    rows = [timing.rows_per_token for timing in found]
    assert rows[0] == 2.0
    assert 1.2 < rows[1] < 1.5  # 8 of 12 alike, twice
    assert rows[2] < 0.5
    assert found[0].forward_ratio == found[0].training_ratio == 1.0


def test_results_and_page(tmp_path: Path) -> None:
    bench = LayerBench(SHAPE, CPU)
    timings = [_time(bench, training, repeats=1) for training in (False, True)]
    zero = time_zero_computation(CPU, width=8, hidden=8, tokens=16, taus=(1.0,), repeats=1)
    merged = costs(Sizes(8, 8, 2, 4), (1, 2), repeats=1)
    found = results(timings, zero, merged, {"device": "a machine"})
    again = json.loads(json.dumps(found))
    assert again["timings"][0]["shape"]["tokens"] == 12
    assert again["limits"] == {"float32": {"flops": 1e9, "bandwidth": 1e9}}
    assert again["geometric_mean_ratio"]["forward"] == pytest.approx(timings[0].ratio)
    page = report(timings, zero, merged, {"device": "a machine"}, "a command")
    html = page.write(tmp_path / "report.html").read_text("utf-8")
    for text in ("a machine", "transformers grouped_mm", "MoE++ 8+4", "times running k", "<svg"):
        assert text in html
    assert "geometric mean of 1 shapes" in page.lead


def test_the_geometric_mean() -> None:
    bench = LayerBench(SHAPE, CPU)
    timing = _time(bench, training=False, repeats=1, names=["moekit", *THEIRS])
    assert geometric_mean([]) is None
    mean = geometric_mean([timing, timing])
    assert mean is not None
    assert math.isclose(mean, timing.ratio)

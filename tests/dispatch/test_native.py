"""The kernels for CPUs against plain operations in float64, and what happens without them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from feed_forward_problems import PLAIN, PROBLEMS, Problem, compare, results
from torch import Tensor

from moekit.dispatch import native_library
from moekit.dispatch.choice import NATIVE_IN_HALF, Choice
from moekit.dispatch.fused import feed_forward
from moekit.dispatch.native_backend import Native, NativeCall
from moekit.dispatch.native_library import KernelCall, library, untouched
from moekit.errors import SpecError

KERNELS = library()
needs_kernels = pytest.mark.skipif(KERNELS is None, reason="no C++ compiler here")
needs_pairs = pytest.mark.skipif(
    KERNELS is None or not KERNELS.moekit_has_pairs(2, 16, 2), reason="no AVX512-BF16 here"
)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
TAKEN = {
    name: problem for name, problem in PROBLEMS.items() if problem.gated and not problem.transposed
}
LARGER = {
    "every size of a block": Problem(tokens=200, experts=17, k=5, width=70, hidden=53, bias=True),
    "many rows an expert": Problem(tokens=700, experts=3, k=2, width=130, hidden=100, seed=1),
    "widths of whole vectors": Problem(tokens=300, experts=8, k=2, width=256, hidden=128, seed=2),
    "in pairs": Problem(tokens=301, experts=5, width=66, hidden=48),
    "in pairs, part of a vector": Problem(tokens=97, experts=1, k=1, width=30, hidden=16, seed=4),
    "in pairs, experts without rows": Problem(
        tokens=333, experts=6, k=1, width=146, hidden=112, one_takes_all=True, unused=0.5
    ),
    "in pairs, several runs": Problem(tokens=1500, experts=9, k=3, width=34, hidden=80, seed=5),
    "in pairs, whole blocks": Problem(tokens=260, experts=2, width=128, hidden=192, seed=6),
    "many rows, sums in parts": Problem(tokens=230, experts=2, width=300, hidden=270, seed=8),
    # Counts lie on both sides of the rows from which operands are laid out.
    "few rows and many": Problem(tokens=480, experts=10, k=2, width=41, hidden=65, bias=True),
    "few rows and some": Problem(tokens=80, experts=10, k=2, width=41, hidden=65, seed=9),
    "rows in fresh memory": Problem(tokens=4200, experts=16, k=16, width=128, hidden=8),
    "sums in parts": Problem(tokens=40, experts=3, width=1300, hidden=1100, bias=True, seed=7),
    "one wide row an expert": Problem(tokens=4, experts=16, k=1, width=1030, hidden=520, seed=3),
    "up to seven wide rows": Problem(tokens=48, experts=16, k=1, width=1030, hidden=515, seed=10),
}
EVERY_DTYPE = pytest.mark.parametrize(
    "dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch.")
)


@pytest.fixture
def fresh() -> Iterator[None]:
    """Forget the library that is loaded, before and after."""
    library.cache_clear()
    yield
    library.cache_clear()


def backend_of(
    name: str, problem: Problem, dtype: torch.dtype = torch.float32, training: bool = False
) -> str:
    x_ND, weight_NK, bank = problem.inputs(dtype, "cpu")
    x_ND.requires_grad_(training)
    plan = problem.plan(problem.experts_NK(), weight_NK)
    found = Choice(name).backend(x_ND, plan, bank)  # type: ignore[arg-type]
    assert found is not None
    return found.name


@needs_kernels
@EVERY_DTYPE
@pytest.mark.parametrize("problem", [*TAKEN.values(), *LARGER.values()], ids=[*TAKEN, *LARGER])
def test_results(problem: Problem, dtype: torch.dtype) -> None:
    compare(problem, dtype, "cpu", Native(), TOLERANCE[dtype])


@needs_kernels
@EVERY_DTYPE
@pytest.mark.parametrize(
    "problem",
    [
        Problem(tokens=3, experts=40),
        Problem(tokens=200, experts=7, k=1, hidden=32, one_takes_all=True),  # in pairs
        Problem(tokens=0),
    ],
)
def test_gradients_in_memory_that_is_zero_already(
    problem: Problem, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of experts without rows are not written, if these are most experts."""
    monkeypatch.setattr("moekit.dispatch.native_library.FRESH", 0)
    asked = []

    def watch(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        asked.append(shape)
        return untouched(shape, dtype)

    monkeypatch.setattr("moekit.dispatch.native_library.untouched", watch)
    compare(problem, dtype, "cpu", Native(), TOLERANCE[dtype])
    assert len(asked) == 2


@needs_kernels
@EVERY_DTYPE
def test_only_large_gradients_are_left_in_memory_that_is_zero_already(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smaller one of the two has its zeros written."""
    problem = Problem(tokens=3, experts=40)
    up = (problem.experts, 2 * problem.hidden, problem.width)
    monkeypatch.setattr(
        "moekit.dispatch.native_library.FRESH", torch.Size(up).numel() * dtype.itemsize
    )
    asked = []

    def watch(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        asked.append(shape)
        return untouched(shape, dtype)

    def used_before(call: KernelCall, *given: Any, **named: Any) -> Tensor:
        return room(call, *given, **named).fill_(7.0)

    room = KernelCall.room
    monkeypatch.setattr("moekit.dispatch.native_library.untouched", watch)
    monkeypatch.setattr(KernelCall, "room", used_before)
    compare(problem, dtype, "cpu", Native(), TOLERANCE[dtype])
    assert asked == [up]


@needs_kernels
@EVERY_DTYPE
def test_results_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    problem, threads = LARGER["many rows an expert"], torch.get_num_threads()
    found: list[list[Tensor]] = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(results(problem, dtype, "cpu", Native()))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@needs_kernels
def test_infinite_and_missing_numbers_pass_through() -> None:
    x_ND, weight_NK, bank = PLAIN.inputs(torch.float32, "cpu")
    plan = PLAIN.plan(PLAIN.experts_NK(), weight_NK)
    x_ND[3] = torch.nan
    y_NO, _ = Native().forward(x_ND, plan, bank, keep=False)
    assert y_NO[3].isnan().all()
    assert y_NO[torch.arange(len(y_NO)) != 3].isfinite().all()
    x_ND[3] = 1e38
    y_NO, _ = Native().forward(x_ND, plan, bank, keep=False)
    assert not y_NO[3].isfinite().any()


@needs_kernels
@pytest.mark.parametrize("size", [1e-6, 1.0, 30.0, 200.0])
def test_the_activation_over_its_whole_range(size: float) -> None:
    """Through an expert that is the identity: silu(x) x."""
    x_ND = torch.linspace(-size, size, 333)[:, None]
    problem = Problem(tokens=333, experts=1, k=1, width=1, hidden=1)
    _, weight_NK, bank = problem.inputs(torch.float32, "cpu")
    one = bank._replace(up_EJD=torch.ones(1, 2, 1), down_EOH=torch.ones(1, 1, 1))
    plan = problem.plan(problem.experts_NK(), torch.ones_like(weight_NK))
    y_NO, _ = Native().forward(x_ND, plan, one, keep=False)
    exact = torch.nn.functional.silu(x_ND.double()) * x_ND.double()
    torch.testing.assert_close(y_NO.double(), exact, rtol=1e-6, atol=1e-30)


@needs_kernels
@pytest.mark.parametrize("layout", ["apart", "expanded"])
def test_gradients_and_tokens_in_any_layout(layout: str) -> None:
    x_ND, weight_NK, bank = PLAIN.inputs(torch.float32, "cpu")
    apart_ND = x_ND.T.contiguous().T.requires_grad_()
    cotangent = x_ND.flip(0).T.contiguous().T if layout == "apart" else x_ND[:1].expand_as(x_ND)
    expert_NK = PLAIN.experts_NK()
    found = []
    for backend in (Native(), None):
        y_NO = feed_forward(apart_ND, PLAIN.plan(expert_NK, weight_NK), bank, backend)
        found.append(torch.autograd.grad(y_NO, apart_ND, cotangent)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@needs_kernels
def test_weights_that_are_slices_of_larger_ones() -> None:
    x_ND, weight_NK, bank = PLAIN.inputs(torch.float32, "cpu")
    plan = PLAIN.plan(PLAIN.experts_NK(), weight_NK)
    wanted, _ = Native().forward(x_ND, plan, bank, keep=False)
    padded = [torch.nn.functional.pad(t, (0, 3, 0, 2)) for t in (bank.up_EJD, bank.down_EOH)]
    up, down = padded[0][:, :-2, :-3], padded[1][:, :-2, :-3]
    given, _ = Native().forward(x_ND, plan, bank._replace(up_EJD=up, down_EOH=down), keep=False)
    assert torch.equal(given, wanted)


@needs_kernels
@pytest.mark.parametrize("of_weights", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_combine_weights_of_another_dtype(dtype: torch.dtype, of_weights: torch.dtype) -> None:
    """Results are those of the same weights in float32, and the gradient has their dtype."""
    problem = replace(PLAIN, tokens=7, k=3, unused=0.2)  # 21 slots: no whole number of vectors
    x_ND, weight_NK, bank = problem.inputs(dtype, "cpu")
    expert_NK, cotangent = problem.experts_NK(), torch.randn(7, problem.width).to(dtype)
    weight_NK = weight_NK.to(of_weights)
    found = []
    for weights in (weight_NK, weight_NK.float()):
        weights.requires_grad_()
        y_NO = feed_forward(x_ND, problem.plan(expert_NK, weights), bank, Native())
        found.append((y_NO, *torch.autograd.grad(y_NO, weights, cotangent)))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].dtype == of_weights
    assert torch.equal(found[0][1], found[1][1].to(of_weights))


@needs_kernels
def test_what_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    crowd = Problem(tokens=3 * NATIVE_IN_HALF, experts=2, k=1, hidden=17)  # no pairs
    some = Problem(tokens=NATIVE_IN_HALF, experts=2, k=1)
    assert backend_of("auto", some, torch.bfloat16) == "native"
    assert backend_of("auto", some, torch.bfloat16, training=True) != "native"
    assert backend_of("auto", some, training=True) == "native"
    assert backend_of("auto", PLAIN) == "native"
    assert backend_of("auto", crowd) == "native"
    assert backend_of("auto", PLAIN, torch.bfloat16) == "native"
    assert backend_of("auto", crowd, torch.bfloat16) != "native"
    assert backend_of("auto", PLAIN, torch.float64) != "native"
    with torch.autocast("cpu", torch.float16):  # operands are what autocast makes of them
        assert backend_of("auto", PLAIN) != "native"
        assert backend_of("native", PLAIN) == "streamed"
    with torch.autocast("cpu", torch.bfloat16):
        assert backend_of("auto", PLAIN) == "native"
        assert backend_of("auto", crowd) != "native"


@needs_kernels
def test_what_is_chosen_where_there_is_avx2_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    crowd = Problem(tokens=3 * NATIVE_IN_HALF, experts=2, k=1, hidden=17)
    for training in (False, True):
        assert backend_of("auto", crowd, torch.bfloat16, training) == "native"
        assert backend_of("auto", crowd, torch.float16, training) != "native"


@needs_pairs
def test_what_is_chosen_where_there_are_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    crowd = Problem(tokens=3 * NATIVE_IN_HALF, experts=2, k=1, hidden=32)
    for training in (False, True):
        assert backend_of("auto", crowd, torch.bfloat16, training) == "native"
    biased = replace(crowd, bias=True)
    assert backend_of("auto", biased, torch.bfloat16) == "native"
    assert backend_of("auto", biased, torch.bfloat16, training=True) != "native"


@needs_pairs
@pytest.mark.parametrize("name", LARGER)
def test_which_backward_passes_run_in_pairs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the tests of results are known to be of both ways."""
    found, ask = [], NativeCall.ask_for_pairs

    def watch(call: NativeCall) -> bool:
        found.append(ask(call))
        return found[-1]

    monkeypatch.setattr(NativeCall, "ask_for_pairs", watch)
    results(LARGER[name], torch.bfloat16, "cpu", Native())
    wanted = name.startswith("in pairs") or name == "widths of whole vectors"
    assert found == [wanted]


@needs_kernels
@EVERY_DTYPE
@pytest.mark.parametrize("tokens", [3, 200])
def test_gates_of_any_size(tokens: int, dtype: torch.dtype) -> None:
    """From where the sigmoid is 0 or 1 to rounding to where e to the power overflows, and NaN."""
    problem = Problem(tokens=tokens, experts=1, k=1, width=2, hidden=16)
    gate_N = torch.cat([torch.linspace(-120, 120, tokens - 1), torch.tensor([float("nan")])])
    x_ND = torch.stack([gate_N, torch.ones(tokens)], dim=1).to(dtype)
    up_JD = torch.zeros(32, 2)
    up_JD[:16, 0], up_JD[16:, 1] = 1.0, 1.0  # every gate is the token's number, every up is 1
    down_OH = torch.zeros(2, 16)
    down_OH[0, 3], down_OH[1, 15] = 1.0, 1.0
    _, _, bank = problem.inputs(dtype, "cpu")
    held = bank._replace(up_EJD=up_JD[None].to(dtype), down_EOH=down_OH[None].to(dtype))
    plan = problem.plan(torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1).to(dtype))
    y_NO = feed_forward(x_ND, plan, held, Native())
    gate_N = x_ND[:, 0].double()
    wanted_NO = torch.nn.functional.silu(gate_N)[:, None].expand(tokens, 2)
    rtol = {torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(y_NO.double(), wanted_NO, rtol=rtol, atol=1e-6, equal_nan=True)


@needs_pairs
@pytest.mark.parametrize("wanted", range(3))
def test_gradients_in_pairs_of_some_tensors_alone(wanted: int) -> None:
    """Of tokens, first or second weights; also with slices and any layout of what comes in."""
    problem = LARGER["in pairs"]
    x_ND, weight_NK, bank = problem.inputs(torch.bfloat16, "cpu")
    plan = problem.plan(problem.experts_NK(), weight_NK)
    padded = [torch.nn.functional.pad(t, (0, 3, 0, 2)) for t in (bank.up_EJD, bank.down_EOH)]
    leaves = [x_ND.T.contiguous().T, padded[0][:, :-2, :-3], padded[1][:, :-2, :-3]]
    leaves[wanted] = leaves[wanted].requires_grad_()
    held = bank._replace(up_EJD=leaves[1], down_EOH=leaves[2])
    cotangent_NO = x_ND.flip(0)[:1].expand_as(x_ND)
    found = []
    for backend in (Native(), None):
        y_NO = feed_forward(leaves[0], plan, held, backend)
        found.append(torch.autograd.grad(y_NO, leaves[wanted], cotangent_NO)[0].double())
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 2e-2


@needs_kernels
def test_what_the_kernels_do_not_take_runs_another_way() -> None:
    assert backend_of("native", PLAIN, torch.float64) == "streamed"
    assert backend_of("native", PLAIN, torch.float16) == "streamed"


@pytest.mark.usefixtures("fresh")
def test_without_a_compiler_others_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_library, "_compiler", lambda: None)
    assert backend_of("auto", PLAIN) == "grouped_mm"
    with pytest.raises(SpecError, match=r"native.*compiler.*auto"):
        backend_of("native", PLAIN)


@pytest.mark.usefixtures("fresh")
def test_a_compiler_that_fails_is_reported_and_others_serve(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\ntest $1 = --version || { echo no such flag >&2; exit 1; }\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("MOEKIT_CACHE", str(tmp_path / "cache"))
    assert backend_of("auto", PLAIN) == "grouped_mm"
    assert "no such flag" in caplog.text
    assert not list((tmp_path / "cache").rglob("*.so"))


@needs_kernels
@pytest.mark.usefixtures("fresh")
def test_the_kernels_are_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOEKIT_CACHE", str(tmp_path))
    assert library() is not None
    library.cache_clear()
    ran, run = [], subprocess.run

    def watch(command: list[str], *given: object, **named: object) -> object:
        ran.append(command)
        return run(command, *given, **named)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "run", watch)
    assert library() is not None
    assert [command[1:] for command in ran] == [["--version"]]

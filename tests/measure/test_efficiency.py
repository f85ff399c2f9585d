"""Parameters, floating-point operations and expert time against hand formulas."""

from __future__ import annotations

import gc
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moekit import (
    Bank,
    Capacity,
    Constant,
    Copy,
    Dropless,
    HeterogeneousBalance,
    MoESpec,
    Pathway,
    ReLU,
    SwiGLU,
    TopK,
    Zero,
)
from moekit.measure import (
    ExpertPhase,
    ModelStatistics,
    PeakMemory,
    compare_expert_phase,
    count_flops,
    parameter_counts,
)
from moekit.measure.flops import flop_counter
from moekit.measure.memory import collecting_only_what_is_new
from moekit.models.language import MoEDecoderConfig, MoEDecoderForCausalLM

WIDTH, VOCABULARY, TIME = 16, 32, 8
ATTENTION = 2 * WIDTH * WIDTH + 2 * WIDTH * 8  # q and o; k and v of one head of 8
VANILLA = MoESpec(TopK(k=2), SwiGLU(count=4, hidden=8))
MIXED = MoESpec(
    Pathway(k=2),
    Bank((SwiGLU(count=4, hidden=8), Constant(1), Copy(1), Zero(1))),
    losses=(HeterogeneousBalance(tau=0.75),),
)
DENSE = ReLU(count=1, hidden=24)


def model_of(*layers: Any, tie: bool = False) -> MoEDecoderForCausalLM:
    torch.manual_seed(0)
    config = MoEDecoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=len(layers),
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=tie,
        layers=list(layers),
    )
    return MoEDecoderForCausalLM(config).eval()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, VOCABULARY, (3, TIME), generator=torch.Generator().manual_seed(1))


def test_parts_of_a_vanilla_model_follow_from_the_shapes() -> None:
    counts = parameter_counts(model_of(VANILLA, DENSE))
    expert = 3 * WIDTH * 8
    assert counts.embedding == 2 * VOCABULARY * WIDTH
    assert counts.router == 4 * WIDTH
    assert counts.experts == 4 * expert
    norms = 5 * WIDTH
    assert counts.dense == 2 * ATTENTION + norms + 2 * WIDTH * 24
    assert counts.total == counts.embedding + counts.router + counts.experts + counts.dense
    assert counts.active == counts.total - 2 * expert
    assert counts.measured is None


def test_tied_embeddings_count_once() -> None:
    untied, tied = (parameter_counts(model_of(VANILLA, tie=tie)) for tie in (False, True))
    assert untied.total - tied.total == VOCABULARY * WIDTH == tied.embedding


def test_active_parameters_follow_the_balance_target_of_a_mixed_bank() -> None:
    counts = parameter_counts(model_of(MIXED), rows_per_token=[0.5])
    expert, expected = 3 * WIDTH * 8, 2 * 0.75 * 4 / (0.75 * 4 + 3)
    always = counts.total - 4 * expert  # a constant expert's weights touch every token
    assert counts.active == always + round(expected * expert)
    assert counts.measured == always + round(0.5 * expert)


def test_measured_needs_one_number_a_layer() -> None:
    with pytest.raises(ValueError, match="zip"):
        parameter_counts(model_of(VANILLA, DENSE), rows_per_token=[1.0, 1.0])


def test_parameters_are_counted_without_weights() -> None:
    with torch.device("meta"):
        on_meta = MoEDecoderForCausalLM(model_of(VANILLA, MIXED).config)
    assert parameter_counts(on_meta) == parameter_counts(model_of(VANILLA, MIXED))


@pytest.mark.parametrize("spec", [VANILLA, MIXED], ids=["vanilla", "mixed"])
def test_flops_equal_the_formula(spec: MoESpec, ids: Tensor) -> None:
    model = model_of(spec, DENSE)
    tokens = ids.numel()
    with torch.no_grad():
        statistics = ModelStatistics.of(model(ids).moe, [spec.experts.expert_kinds()])
    rows = statistics.summary()["layers"][0]["rows"]
    experts = len(spec.experts.expert_kinds())
    # A constant expert: the difference of W_c's two rows times x, and α₂ v.
    constant = 0 if spec == VANILLA else 2 * tokens * WIDTH
    products = (
        2 * tokens * ATTENTION
        + 2 * 3 * 2 * TIME * TIME * 16  # scores and values of 3 sequences, 2 layers, 2 heads of 8
        + tokens * WIDTH * experts
        + rows * 3 * WIDTH * 8
        + constant
        + tokens * 2 * WIDTH * 24
        + tokens * WIDTH * VOCABULARY
    )
    assert count_flops(model, ids) == 2 * products / tokens


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("backend", ["loop", "grouped_mm", "streamed", "few_rows", "native"])
def test_every_backend_counts_the_same(attention: str, backend: str, ids: Tensor) -> None:
    model = model_of(VANILLA.replace(dispatch=Dropless(backend)))
    model.set_attn_implementation(attention)
    assert count_flops(model, ids) == count_flops(model_of(VANILLA), ids)


def test_dropped_rows_are_not_counted(ids: Tensor) -> None:
    limited = VANILLA.replace(dispatch=Capacity(factor=0.5, eval_factor=0.5))
    assert count_flops(model_of(limited), ids) < count_flops(model_of(VANILLA), ids)


@pytest.mark.parametrize(
    ("a", "b", "out"),
    [
        ((24, 8), (3, 8, 16), 2 * 24 * 8 * 16),
        ((8, 24), (24, 16), 2 * 8 * 24 * 16),
        ((3, 4, 8), (3, 8, 16), 2 * 3 * 4 * 8 * 16),
        ((3, 4, 8), (8, 24), 2 * 4 * 8 * 24),
    ],
)
def test_each_form_of_grouped_product(a: tuple[int, ...], b: tuple[int, ...], out: int) -> None:
    offsets = torch.tensor([8, 8, 24], dtype=torch.int32) if len(a) != 3 or len(b) != 3 else None
    with flop_counter() as counter:
        torch.nn.functional.grouped_mm(
            torch.randn(a).bfloat16(), torch.randn(b).bfloat16(), offs=offsets
        )
    assert counter.get_total_flops() == out


def test_small_products_count_too() -> None:
    with flop_counter() as counter:
        torch.randn(5, 7) @ torch.randn(7)
        torch.dot(torch.randn(9), torch.randn(9))
    assert counter.get_total_flops() == 2 * 35 + 2 * 9


def test_counting_leaves_the_mode_as_it_was(ids: Tensor) -> None:
    model = model_of(VANILLA).train()
    count_flops(model, ids)
    assert model.training


class _Slow(nn.Module):
    """A module that takes a known time."""

    def __init__(self, inner: nn.Module, seconds: float) -> None:
        super().__init__()
        self.inner, self.seconds = inner, seconds

    def forward(self, *inputs: Any) -> Any:
        time.sleep(self.seconds)
        return self.inner(*inputs)


def test_the_phase_is_the_time_of_dispatch_shared_and_dense_and_no_more(ids: Tensor) -> None:
    spec = VANILLA.replace(shared=SwiGLU(count=1, hidden=8))
    model = model_of(spec, DENSE)
    layer = model.moe_layers[0]
    dense = model.dense_layers[0]
    forward = dense.forward

    def slow_dense(x: Tensor) -> Tensor:
        time.sleep(0.01)
        return forward(x)

    dense.forward = slow_dense  # type: ignore[method-assign]
    layer.dispatch = _Slow(layer.dispatch, 0.02)  # type: ignore[assignment]
    layer.shared = _Slow(layer.shared, 0.03)  # type: ignore[assignment, arg-type]
    layer.router.register_forward_hook(lambda *_: time.sleep(0.2))
    with torch.no_grad(), ExpertPhase(model) as phase:
        model(ids)
    assert 0.06 <= phase.seconds < 0.2
    assert phase.rows_per_token == 2.0
    assert phase.tokens == ids.numel()


def test_hooks_are_gone_after_the_block_even_after_an_error() -> None:
    model = model_of(VANILLA, DENSE)
    with pytest.raises(RuntimeError), ExpertPhase(model):
        raise RuntimeError
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []


def test_a_dense_model_has_no_routed_rows(ids: Tensor) -> None:
    with ExpertPhase(model_of(DENSE)) as phase:
        model_of(DENSE)(ids)
    assert phase.rows_per_token == 0.0
    assert phase.tokens == 0


def test_models_take_turns_and_another_goes_first_each_time(ids: Tensor) -> None:
    models = {"mixed": model_of(MIXED), "dense": model_of(DENSE), "vanilla": model_of(VANILLA)}
    order: list[str] = []
    for name, model in models.items():
        model.train()
        model.register_forward_hook(lambda *_, name=name: order.append(name))
    got = compare_expert_phase(models, [ids, ids], repeats=3)
    firsts = order[6::6]  # after the untimed pass, two batches a model
    assert firsts == ["mixed", "dense", "vanilla"]
    assert len(order) == 4 * 6
    assert got["vanilla"].rows_per_token == 2.0
    assert 0 < got["mixed"].rows_per_token < 2
    for result in got.values():
        assert len(result.repeats) == 3
        assert sorted(result.repeats)[1] == result.seconds_per_token > 0
        assert 0 < result.share < 1
    assert all(model.training for model in models.values())


def test_peak_memory_sees_an_allocation_that_is_gone_again() -> None:
    cpu = torch.device("cpu")
    with PeakMemory(cpu) as idle:
        pass
    with PeakMemory(cpu) as busy:
        torch.ones(50_000_000).sum()
    assert busy.bytes - idle.bytes > 150_000_000


@pytest.mark.parametrize("apart", [False, True])
def test_objects_are_set_apart_for_measurements_only_as_long_as_asked_for(apart: bool) -> None:
    gc.unfreeze()
    if apart:
        gc.freeze()
    with collecting_only_what_is_new():
        assert gc.get_freeze_count() > 1000
    assert (gc.get_freeze_count() > 0) == apart
    gc.freeze()  # as it was


@pytest.mark.gpu
def test_peak_memory_on_cuda_is_that_of_the_tensors() -> None:
    device = torch.device("cuda")
    with PeakMemory(device) as memory:
        torch.ones(50_000_000, device=device).sum()
    assert 200_000_000 <= memory.bytes < 400_000_000

"""moekit as an experts implementation of transformers: the same results as eager, everywhere."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    GraniteMoeConfig,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers_experts import build, decorated

from moekit.errors import SpecError
from moekit.surgery import register_experts

NAMES = decorated()
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
BACKENDS = ("auto", "native", "streamed", "few_rows", "grouped_mm", "triton", "loop")
# These cast to float32 somewhere, whatever the dtype of their weights.
IN_FLOAT32 = (
    "inkling2:Inkling2Experts",
    "muse_spark:MuseSparkExperts",
    "openai_privacy_filter:OpenAIPrivacyFilterExperts",
)
# One of each layout: plain, interleaved with biases, transposed, without gate, with a norm after.
LAYOUTS = (
    "mixtral:MixtralExperts",
    "gpt_oss:GptOssExperts",
    "openai_privacy_filter:OpenAIPrivacyFilterExperts",
    "aria:AriaExperts",
    "nemotron_h:NemotronHExperts",
    "muse_spark:MuseSparkExperts",
)


@pytest.fixture(autouse=True)
def registered() -> None:
    for backend in BACKENDS:
        register_experts(f"moekit-{backend}", backend)
    register_experts()


def routing(tokens: int, experts: int, slots: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids without the last expert, which stays empty, and weights in float64."""
    generator = torch.Generator().manual_seed(seed)
    scores_NE = torch.rand(tokens, max(experts - 1, 1), generator=generator, dtype=torch.float64)
    weight_NK, expert_NK = scores_NE.topk(min(slots, scores_NE.shape[1]))
    return expert_NK, weight_NK


def results(
    module: nn.Module, implementation: str, x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor
) -> dict[str, Tensor]:
    """The output, and the gradients of a weighted sum of it."""
    module.config._experts_implementation = implementation
    x_ND, weight_NK = x_ND.clone().requires_grad_(), weight_NK.clone().requires_grad_()
    y_ND = module(x_ND, expert_NK, weight_NK)
    if y_ND.grad_fn is None:  # eager without a token
        y_ND = y_ND + 0 * x_ND
    cotangent = torch.linspace(-1, 2, max(y_ND.numel(), 1), dtype=torch.float64)[: y_ND.numel()]
    leaves = {"x": x_ND, "weight": weight_NK, **dict(module.named_parameters())}
    total = (y_ND.double() * cotangent.view_as(y_ND)).sum()
    found = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    return {"y": y_ND.detach(), **dict(zip(leaves, found, strict=True))}


def errors(given: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference of each tensor over the largest magnitude wanted."""
    assert given.keys() == wanted.keys()
    found = {}
    for name, tensor in wanted.items():
        assert given[name].shape == tensor.shape
        scale = tensor.double().abs().max().clamp_min(1e-30) if tensor.numel() else 1.0
        difference = (given[name].double() - tensor.double()).abs()
        found[name] = float(difference.max() / scale) if tensor.numel() else 0.0
    return found


def compare(name: str, implementation: str, dtype: torch.dtype, tokens: int = 11) -> None:
    """Against eager in float64, at widths whose rows are no multiple of 16 bytes."""
    expert_NK, weight_NK = routing(tokens, experts=5, slots=2)
    x_ND = torch.randn(tokens, 7, generator=torch.Generator().manual_seed(1)).double()
    exact, module = build(name, 5, 7, 3, dtype).double(), build(name, 5, 7, 3, dtype)
    x_ND, weight_NK = x_ND.to(dtype), weight_NK.to(dtype)
    wanted = results(exact, "eager", x_ND.double(), expert_NK, weight_NK.double())
    given = results(module, implementation, x_ND, expert_NK, weight_NK)
    assert given["y"].dtype == dtype
    rough = name in IN_FLOAT32 and dtype == torch.float64
    # Triton's interpreter cuts off bits where a GPU rounds to bfloat16.
    cut_off = implementation.endswith("triton") and dtype == torch.bfloat16
    for leaf, error in errors(given, wanted).items():
        assert error < (1e-6 if rough else TOLERANCE[dtype] * (1 + cut_off)), leaf


def test_all_models_are_found() -> None:
    assert len(NAMES) > 40
    assert set(LAYOUTS) <= set(NAMES)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_computes_what_eager_does(name: str, dtype: torch.dtype) -> None:
    compare(name, "moekit", dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_backend_computes_what_eager_does(
    name: str, backend: str, dtype: torch.dtype
) -> None:
    compare(name, f"moekit-{backend}", dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tokens", "experts"), [(0, 5), (1, 5), (9, 1), (9, 2)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_sizes_at_the_edge(name: str, tokens: int, experts: int, backend: str) -> None:
    """No token, one token, one expert, and (of two) one expert that takes all."""
    module = build(name, experts, 8, 16, torch.float32)
    expert_NK, weight_NK = routing(tokens, experts, slots=2)
    x_ND = torch.randn(tokens, 8)
    wanted = results(module, "eager", x_ND, expert_NK, weight_NK.float())
    given = results(module, f"moekit-{backend}", x_ND, expert_NK, weight_NK.float())
    assert max(errors(given, wanted).values()) < 1e-5


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_gradient_of_a_plain_sum(name: str) -> None:
    """An expanded gradient, at which torch's grouped_mm fails; every parameter gets one."""
    module = build(name, 5, 8, 16, torch.float32)
    expert_NK, weight_NK = routing(6, 5, 2)
    found = []
    for implementation in ("eager", "moekit"):
        module.zero_grad()
        module.config._experts_implementation = implementation
        module(torch.ones(6, 8), expert_NK, weight_NK.float()).sum().backward()
        found.append({n: p.grad.clone() for n, p in module.named_parameters()})
    assert max(errors(found[1], found[0]).values()) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_slots_of_other_ranks_have_no_row_and_no_gradient(backend: str) -> None:
    module = build("mixtral:MixtralExperts", 4, 8, 16, torch.float32)
    module._is_expert_parallel = True
    expert_NK, weight_NK = routing(9, 5, 2)
    expert_NK[::2, 0] = 4  # on another rank
    expert_NK[4] = 4
    weight_NK = weight_NK.masked_fill(expert_NK == 4, 0.0).float()
    x_ND = torch.randn(9, 8)
    wanted = results(module, "eager", x_ND, expert_NK, weight_NK)
    given = results(module, f"moekit-{backend}", x_ND, expert_NK, weight_NK)
    assert max(errors(given, wanted).values()) < 1e-5
    assert bool((given["weight"][expert_NK == 4] == 0).all())
    assert bool((given["y"][4] == 0).all())


@pytest.mark.parametrize("name", LAYOUTS)
def test_autocast(name: str) -> None:
    module = build(name, 5, 8, 16, torch.float32)
    expert_NK, weight_NK = routing(9, 5, 2)
    x_ND = torch.randn(9, 8)
    wanted = results(module, "eager", x_ND, expert_NK, weight_NK.float())
    with torch.autocast("cpu", torch.bfloat16):
        given = results(module, "moekit", x_ND, expert_NK, weight_NK.float())
    assert given["y"].dtype == torch.float32
    for leaf, error in errors(given, wanted).items():
        assert error < 3e-2, leaf  # a chain of products whose operands are all rounded to 8 bits
        assert given[leaf].dtype == torch.float32


SMALL = {
    "vocab_size": 33,
    "hidden_size": 16,
    "intermediate_size": 12,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
LATENT = {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
}
MODELS: dict[str, PreTrainedConfig] = {
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4),
    "qwen2_moe": Qwen2MoeConfig(**SMALL, num_experts=4, shared_expert_intermediate_size=8),
    "qwen3_moe": Qwen3MoeConfig(**SMALL, num_experts=4, head_dim=8),
    "olmoe": OlmoeConfig(**SMALL, num_experts=4),
    "deepseek_v2": DeepseekV2Config(**SMALL, **LATENT),
    "deepseek_v3": DeepseekV3Config(**SMALL, **LATENT),
    "gpt_oss": GptOssConfig(**SMALL, num_local_experts=4, head_dim=8),
    "granitemoe": GraniteMoeConfig(**SMALL, num_local_experts=4),
}


def model_of(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(MODELS[name]))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_model_computes_and_learns_the_same(name: str) -> None:
    model = model_of(name)
    ids = torch.randint(1, 33, (2, 9), generator=torch.Generator().manual_seed(2))
    found = []
    for implementation in ("eager", "moekit"):
        model.set_experts_implementation(implementation)
        assert model.config._experts_implementation == implementation
        model.zero_grad()
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append({"logits": out.logits.detach(), **gradients})
    assert max(errors(found[1], found[0]).values()) < 1e-4  # float32 through a whole model


def test_a_checkpoint_opens_with_it_and_keeps_no_trace(tmp_path: Path) -> None:
    model = model_of("mixtral")
    model.set_experts_implementation("moekit")
    model.save_pretrained(tmp_path)
    assert "moekit" not in (tmp_path / "config.json").read_text()
    opened = MixtralForCausalLM.from_pretrained(tmp_path, experts_implementation="moekit")
    assert opened.config._experts_implementation == "moekit"
    ids = torch.arange(1, 9)[None]
    assert torch.equal(opened(ids).logits, model(ids).logits)


def test_it_is_chosen_by_size_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    module = build("mixtral:MixtralExperts", 4, 8, 16, torch.float64)
    module.config._experts_implementation = "moekit"
    expert_NK, weight_NK = routing(6, 5, 2)
    with caplog.at_level(logging.INFO, logger="moekit.dispatch.choice"):
        for _ in range(3):
            module(torch.randn(6, 8).double(), expert_NK, weight_NK)
    assert [r.getMessage() for r in caplog.records] == [
        "experts run through grouped_mm (cpu, torch.float64)"
    ]


@pytest.mark.parametrize("name", ["eager", "grouped_mm", "batched_mm"])
def test_names_of_transformers_are_refused(name: str) -> None:
    with pytest.raises(SpecError, match="choose another"):
        register_experts(name)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(SpecError, match="wanted one of auto, native"):
        register_experts("mine", "cutlass")  # type: ignore[arg-type]

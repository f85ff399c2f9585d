"""Parts that fit compose: trained, saved, loaded, equal. Others are refused, with the reason."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moekit import (
    GELU,
    AdamFirst,
    AdamMomentum,
    Bank,
    Capacity,
    Constant,
    Copy,
    Dropless,
    HeavyBall,
    MoESpec,
    Plain,
    Rectified,
    RobustMomentum,
    SwiGLU,
    Zero,
)
from moekit.errors import SpecError
from moekit.models.language import MoEDecoderConfig, MoEDecoderForCausalLM
from moekit.routing import (
    AttentionAware,
    Comet,
    DenseToSparse,
    DenseWarmup,
    DSelectK,
    Entropy,
    ExpertChoice,
    GumbelSoftmax,
    Hash,
    HeterogeneousBalance,
    L1Balance,
    Load,
    ModuleRouting,
    NoisyTopK,
    NullAwareBalance,
    Pathway,
    PerChunk,
    Permuted,
    PerTask,
    ReLURouting,
    RouterSpec,
    RouterZ,
    SimilarityAware,
    Sinkhorn,
    SparseTransport,
    SwitchBalance,
    TopK,
)

BANK = SwiGLU(count=6, hidden=16)
# Feed-forward experts of two sizes and kinds, with experts that compute nothing among them.
MIXED = Bank(
    (SwiGLU(count=2, hidden=16), Copy(1), GELU(count=2, hidden=8, bias=True), Zero(1), Constant(1))
)
ROUTERS: tuple[RouterSpec, ...] = (
    TopK(k=2),
    TopK(k=3, score="sigmoid", bias_rate=1e-3, jitter=0.1, noise=True),
    DenseWarmup(k=1, warmup_k=3, warmup_steps=1),
    Pathway(k=2, normalize="selected"),
    ReLURouting(k=2),
    ExpertChoice(capacity=2.0),
    Hash(k=2),
    Comet(k=2),
    DSelectK(k=2),
    DenseToSparse(temperature=2.0, final=0.5, steps=1, k=2, noise=True),
    DenseToSparse(learned=True, activation="tanh"),
    GumbelSoftmax(),
    GumbelSoftmax(hard=True),
    Permuted(TopK(k=2), steps=10),
    NoisyTopK(k=2),
    PerChunk(TopK(k=2), length=4),
    PerTask(NoisyTopK(k=3)),
    SimilarityAware(TopK(k=2), temperature=2.0),
    AttentionAware(Pathway(k=2, normalize="selected")),
    SparseTransport(),
    Sinkhorn(),
    ModuleRouting(k=2, hidden=8),
)
RULES = (HeavyBall(0.6), AdamFirst(), AdamMomentum(), RobustMomentum(0.4, 1.5))
LIMIT = Capacity(factor=1.0, eval_factor=1.0)
REPAIR = Rectified(factor=0.5, eval_factor=0.5, groups=2, fill_in=False)
EVERY_ROUTER = pytest.mark.parametrize("router", ROUTERS, ids=str)

COMPOSITIONS: dict[str, MoESpec | list[Any]] = {
    "trees, mixed bank, capacity": MoESpec(Comet(k=2), MIXED, LIMIT),
    "trees, mixed bank, capacity by score": MoESpec(
        Comet(k=1, hard=True), MIXED, LIMIT.replace(priority="score", tau=0.5)
    ),
    "trees, mixed bank, padded capacity": MoESpec(Comet(k=2), MIXED, LIMIT.replace(pad=True)),
    "trees, mixed bank, repair": MoESpec(Comet(k=2), MIXED, REPAIR),
    "trees, mixed bank, repair of those left with nothing": MoESpec(
        Comet(k=2, hard=True), MIXED, REPAIR.replace(unrouted="all", priority="request")
    ),
    "binary codes, mixed bank, capacity": MoESpec(DSelectK(k=2), MIXED, LIMIT),
    "binary codes, mixed bank, repair": MoESpec(DSelectK(k=1, static=True), MIXED, REPAIR),
    "top-2, mixed bank, both repairs": MoESpec(
        TopK(k=2), MIXED, REPAIR.replace(fill_in=True), (NullAwareBalance(),)
    ),
    "pathway, mixed bank, both repairs": MoESpec(
        Pathway(k=2, normalize="selected"),
        MIXED,
        REPAIR.replace(fill_in=True),
        (HeterogeneousBalance(tau=0.5),),
    ),
    "permuted trees, mixed bank": MoESpec(Permuted(Comet(k=2), steps=10), MIXED),
    "dense gate, mixed bank, shared expert": MoESpec(
        GumbelSoftmax(),
        MIXED,
        losses=(Entropy(of="marginal"),),
        shared=SwiGLU(count=1, hidden=8),
        shared_gate=True,
    ),
    "everything around trees": MoESpec(
        Comet(k=2),
        MIXED,
        LIMIT,
        losses=(SwitchBalance(), RouterZ(), Entropy(of="token")),
        shared=SwiGLU(count=1, hidden=8),
        shared_gate=True,
        residual=RobustMomentum(0.4, 1.5),
    ),
    "everything around ReLU gates": MoESpec(
        ReLURouting(k=2),
        MIXED,
        losses=(L1Balance(k=2),),
        shared=SwiGLU(count=1, hidden=8),
        residual=AdamMomentum(),
    ),
    "another router and dispatch in every layer": [
        MoESpec(Comet(k=2), MIXED, REPAIR, residual=HeavyBall(0.3)),
        SwiGLU(count=1, hidden=32),
        MoESpec(Permuted(Pathway(k=2, normalize="selected"), steps=10), BANK),
        MoESpec(ReLURouting(k=2), MIXED, losses=(L1Balance(k=2),), residual=HeavyBall(0.9, 0.5)),
        MoESpec(Hash(k=2), BANK, LIMIT),
        MoESpec(TopK(k=2), BANK, REPAIR.replace(fill_in=True), residual=HeavyBall()),
        MoESpec(Pathway(k=2), MIXED),
    ],
}


def model_of(layers: MoESpec | list[Any]) -> MoEDecoderForCausalLM:
    torch.default_generator.manual_seed(0)
    depth = len(layers) if isinstance(layers, list) else 2
    config = MoEDecoderConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=depth,
        num_attention_heads=2,
        layers=layers,
        initializer_range=0.2,
    )
    return MoEDecoderForCausalLM(config)


def check(layers: MoESpec | list[Any], folder: Path, steps: int = 1) -> MoEDecoderForCausalLM:
    """Train, save and load the model; the loaded one is equal, in training too."""
    model = model_of(layers).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.randint(32, (2, 12))
    for _ in range(steps):
        before = {name: value.clone() for name, value in model.named_parameters()}
        output = model(ids, labels=ids)
        output.loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert bool(torch.isfinite(parameter.grad).all()), name
        optimiser.step()
        optimiser.zero_grad()
        model.update_routing([Load.of(record.routing) for record in output.moe])
    changed = {n for n, value in model.named_parameters() if not torch.equal(value, before[n])}
    for part in ("attn", "experts", "router"):
        assert any(part in name for name in changed) or not any(part in n for n in before)
    model.save_pretrained(folder)
    loaded = MoEDecoderForCausalLM.from_pretrained(folder)
    for tensor in (*loaded.parameters(), *loaded.buffers()):
        tensor.data = tensor.data.clone()  # a mapped file is not aligned: sums differ in a last bit
    assert loaded.config.layer_specs == model.config.layer_specs
    for training in (False, True):
        found = []
        for each in (model, loaded):
            torch.default_generator.manual_seed(1)  # of noise and jitter
            found.append(each.train(training)(ids, labels=ids))
        assert torch.equal(found[0].logits, found[1].logits)
        assert torch.equal(found[0].loss, found[1].loss)
    return loaded


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_a_composition_trains_saves_and_loads(name: str, tmp_path: Path) -> None:
    check(COMPOSITIONS[name], tmp_path)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@EVERY_ROUTER
def test_momentum_goes_with_every_router(router: RouterSpec, rule: Any, tmp_path: Path) -> None:
    losses = (L1Balance(k=2),) if router.scores == "gates" else ()
    spec = MoESpec(router, MIXED, losses=losses, residual=rule)
    loaded = check([spec, SwiGLU(count=1, hidden=32), spec], tmp_path).eval()
    plain = model_of(
        [
            part.replace(residual=Plain()) if part is spec else part
            for part in [spec, SwiGLU(count=1, hidden=32), spec]
        ]
    ).eval()
    plain.load_state_dict(loaded.state_dict())
    ids = torch.randint(32, (1, 8))
    assert not torch.allclose(loaded(ids).logits, plain(ids).logits)


@EVERY_ROUTER
def test_momentum_that_is_off_changes_no_bit_of_any_router(router: RouterSpec) -> None:
    losses = (L1Balance(k=2),) if router.scores == "gates" else ()
    spec = MoESpec(router, MIXED, losses=losses)
    ids = torch.randint(32, (2, 8))
    found = []
    for rule in (Plain(), HeavyBall(mu=0.0, gamma=1.0)):
        model = model_of(spec.replace(residual=rule)).train()
        torch.default_generator.manual_seed(1)
        output = model(ids, labels=ids)
        output.loss.backward()
        found.append([output.logits, output.loss, *(p.grad for p in model.parameters())])
    assert all(torch.equal(ours, plain) for ours, plain in zip(*found, strict=True))


@pytest.mark.parametrize("steps", [1, 4], ids=["while it learns", "once it is frozen"])
@pytest.mark.parametrize("schedule", ["paper", "safe"])
@pytest.mark.parametrize(
    "router", [router for router in ROUTERS if not isinstance(router, Permuted)], ids=str
)
def test_a_permutation_goes_around_every_router(
    router: RouterSpec, schedule: Any, steps: int, tmp_path: Path
) -> None:
    spec = MoESpec(Permuted(router, schedule=schedule, steps=3), BANK)
    loaded = check(spec, tmp_path, steps)
    if steps > 3:  # what is left of it renames: an expert's rows are those of its output
        layer = loaded.moe_layers[0].eval()
        record = loaded.eval()(torch.randint(32, (1, 8))).moe[0]
        assert sorted(layer.router.order_E.tolist()) == list(range(6))
        assert torch.equal(record.rows_E, record.routing.load_E())


def test_every_router_is_in_the_table() -> None:
    named = {type(router).__name__ for router in ROUTERS}
    known = {n for n, k in RouterSpec.kinds().items() if k.__module__.startswith("moekit.")}
    assert named == known - {"PerSequence"}  # which a causal language model refuses


# --- refusals, each as soon as the parts are put together ----------------------------------------

FREE = "decides itself how many experts run; use Dropless"
NO_TOP_K = "it repairs top-k routing, and {} is not; use TopK"
FREE_ROUTERS = (
    ReLURouting(k=2),
    ExpertChoice(),
    DenseToSparse(),
    DenseToSparse(temperature=2.0, final=0.3, steps=5, k=2),
    GumbelSoftmax(),
    GumbelSoftmax(hard=True),
    Permuted(TopK(k=2)),
    Permuted(Comet(k=2)),
)


@pytest.mark.parametrize(
    ("router", "limit"), list(itertools.product(FREE_ROUTERS, (LIMIT, REPAIR))), ids=str
)
def test_a_limit_on_a_free_number_of_experts(router: RouterSpec, limit: Any) -> None:
    name = type(router).__name__
    said = f"{name} {FREE}" if limit is LIMIT else NO_TOP_K.format(name)
    with pytest.raises(SpecError, match=said):
        MoESpec(router, BANK, limit)
    assert MoESpec(router, BANK, Dropless()).dispatch == Dropless()


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "trees have no next choice": (
        lambda: MoESpec(Comet(k=2), BANK, REPAIR.replace(fill_in=True)),
        "Comet gives every expert that it does not choose weight 0; set fill_in=False",
    ),
    "a hash has no probabilities": (
        lambda: MoESpec(Hash(k=2), BANK, REPAIR),
        "it repairs top-k routing, and Hash is not; use TopK",
    ),
    "devices of unequal share": (
        lambda: MoESpec(Comet(k=2), MIXED, REPAIR.replace(groups=3)),
        "4 experts cannot be spread evenly over 3 groups",
    ),
    "a zero expert left out of a sum that is made 1": (
        lambda: MoESpec(Pathway(k=2), MIXED, REPAIR),
        "normalize nonzero makes no difference; set normalize to selected",
    ),
    "zero experts under a permutation": (
        lambda: MoESpec(Permuted(Pathway(k=2)), MIXED),
        "normalize=nonzero leaves zero experts out by place, which a permutation changes",
    ),
    "two permutations": (lambda: Permuted(Permuted(TopK())), "two permutations are one"),
    "a tree over one expert": (
        lambda: MoESpec(Comet(k=1), SwiGLU(count=1, hidden=8)),
        "a tree needs at least 2 experts; the bank has 1",
    ),
    "more trees than experts": (
        lambda: MoESpec(Comet(k=7), BANK),
        "k is 7 but the bank has 6 experts",
    ),
    "a threshold that leaves nobody": (
        lambda: MoESpec(DenseToSparse(threshold=0.2), BANK),
        "all would be left out",
    ),
    "balance of a router without probabilities": (
        lambda: MoESpec(Hash(k=2), BANK, losses=(SwitchBalance(),)),
        "it works on",
    ),
    "sparsity of gates that are none": (
        lambda: MoESpec(TopK(k=2), BANK, losses=(L1Balance(k=2),)),
        "it works on",
    ),
    "control of a sparsity that a soft permutation takes away": (
        lambda: MoESpec(Permuted(ReLURouting(k=2)), BANK, losses=(L1Balance(k=2),)),
        "a permuted router runs every expert while it learns, and λ would rise without end",
    ),
    "a bank that computes nothing": (
        lambda: MoESpec(TopK(k=2), Bank((Zero(2), Copy(1)))),
        "zero-computation experts only",
    ),
    "a gate of a shared expert that is not there": (
        lambda: MoESpec(TopK(k=2), BANK, shared_gate=True),
        "shared_gate is set without shared",
    ),
    "two kinds of momentum in one stack": (
        lambda: model_of(
            [MoESpec(TopK(k=2), BANK, residual=rule) for rule in (HeavyBall(), AdamMomentum())]
        ),
        "whose momentum is another one; use one kind of rule",
    ),
    "rows of another width in a residual stream": (
        lambda: model_of(MoESpec(TopK(k=2), SwiGLU(count=4, hidden=8, out=12))),
        "width 12",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_with_why(name: str) -> None:
    make, said = REFUSED[name]
    with pytest.raises(SpecError, match=said) as refused:
        make()
    assert isinstance(refused.value, ValueError)

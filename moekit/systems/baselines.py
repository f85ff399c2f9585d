"""Plain designs that the published systems are compared with."""

from __future__ import annotations

from moekit.compare import Design
from moekit.dispatch import Dropless
from moekit.experts import SwiGLU
from moekit.layer import MoESpec
from moekit.routing import ExpertChoice, Hash, RouterZ, SwitchBalance, TopK
from moekit.systems.system import Shape, System


def dense(shape: Shape) -> Design:
    """One SwiGLU feed-forward of the width that top-k computes a token."""
    return Design("dense", (SwiGLU(count=1, hidden=shape.k * shape.hidden),))


def top_k(shape: Shape) -> Design:
    """Mixtral's layer: dropless softmax top-k, renormalised, with the Switch balance loss."""
    experts = SwiGLU(count=shape.experts, hidden=shape.hidden)
    return Design("topk", (MoESpec(TopK(k=shape.k), experts, losses=(SwitchBalance(0.01),)),))


def switch(shape: Shape) -> Design:
    """Switch Transformer's routing: top-1, the weight is the probability itself."""
    experts = SwiGLU(count=shape.experts, hidden=shape.k * shape.hidden)
    router = TopK(k=1, normalize="none", jitter=0.01)
    losses = (SwitchBalance(0.01), RouterZ(1e-3))
    return Design("switch", (MoESpec(router, experts, losses=losses),))


def deepseek(shape: Shape) -> Design:
    """DeepSeek-V3's layer: sigmoid scores, bias balancing, finer experts and one shared."""
    fine = max(8, shape.hidden // 2)
    router = TopK(k=2 * shape.k - 1, score="sigmoid", bias_rate=1e-3)
    experts = SwiGLU(count=2 * shape.experts, hidden=fine)
    shared = SwiGLU(count=1, hidden=fine)
    losses = (SwitchBalance(1e-4, divide_by_k=True),)
    return Design("deepseek", (MoESpec(router, experts, Dropless(), losses, shared=shared),))


def expert_choice(shape: Shape) -> Design:
    """Experts choose tokens; not causal, so its language-model loss is flattered."""
    experts = SwiGLU(count=shape.experts, hidden=shape.hidden)
    return Design("expert_choice", (MoESpec(ExpertChoice(capacity=shape.k), experts),))


def hashed(shape: Shape) -> Design:
    """Hash layers: a fixed table from token id to experts."""
    experts = SwiGLU(count=shape.experts, hidden=shape.hidden)
    return Design("hash", (MoESpec(Hash(k=shape.k), experts),))


BASELINES = (
    System(
        name="dense",
        title="Dense feed-forward layers of the compute of top-k",
        paper="",
        parts="SwiGLU(count=1)",
        use="moekit compare --designs dense,topk",
        design=dense,
    ),
    System(
        name="topk",
        title="Dropless top-k with renormalised softmax weights",
        paper="Jiang et al., Mixtral of Experts, arXiv 2401.04088",
        parts="TopK over SwiGLU; SwitchBalance",
        use="moekit compare --designs topk",
        design=top_k,
    ),
    System(
        name="switch",
        title="Top-1 routing with input jitter and router z-loss",
        paper="Fedus et al., Switch Transformers, arXiv 2101.03961",
        parts="TopK(k=1) over SwiGLU; SwitchBalance, RouterZ",
        use="moekit compare --designs switch",
        design=switch,
    ),
    System(
        name="deepseek",
        title="Fine-grained experts, one shared, balanced by a bias instead of a loss",
        paper="DeepSeek-AI, DeepSeek-V3 Technical Report, arXiv 2412.19437",
        parts="TopK(sigmoid, bias_rate) over SwiGLU, shared SwiGLU; SwitchBalance",
        use="moekit compare --designs deepseek",
        design=deepseek,
    ),
    System(
        name="expert_choice",
        title="Experts choose tokens (not causal)",
        paper="Zhou et al., Mixture-of-Experts with Expert Choice Routing, arXiv 2202.09368",
        parts="ExpertChoice over SwiGLU",
        use="moekit compare --designs expert_choice",
        design=expert_choice,
    ),
    System(
        name="hash",
        title="A fixed table from token id to experts",
        paper="Roller et al., Hash Layers, arXiv 2106.04426",
        parts="Hash over SwiGLU",
        use="moekit compare --designs hash",
        design=hashed,
    ),
)

"""Folding: layers whose merged expert is the same for every row of a task become dense."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from moekit.dispatch import Merged
from moekit.errors import SpecError
from moekit.experts import FeedForwardSpec, Mixtures
from moekit.layer import MoE, MoESpec
from moekit.models.language import MoEDecoderConfig, MoEDecoderForCausalLM
from moekit.models.language.config import LayerSpec
from moekit.residual import Plain
from moekit.routing import PerTask, PerTaskRouter, Signals

EXPERTS = ".mlp.experts."


def fold_tasks(model: MoEDecoderForCausalLM, task: int = 0) -> MoEDecoderForCausalLM:
    """A dense copy of ``model`` that computes what it does for one task, up to rounding.

    Where :class:`~moekit.PerTask` routes and :class:`~moekit.Merged` merges, evaluation runs the
    same feed-forward part for every row of a task. It is computed once, and router and experts are
    left out (MEO at task level, He et al. 2023).

    Args:
        model: a decoder whose mixtures are merged by task; dense blocks are kept.
        task: which task, in the order of the router's descriptions.

    Raises:
        SpecError: a block is a mixture whose output is no dense feed-forward part, or it has no
            such task.

    Example:
        >>> from moekit import Merged, PerTask, SwiGLU, TopK
        >>> model = MoEDecoderForCausalLM(MoEDecoderConfig(
        ...     vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        ...     layers=MoESpec(PerTask(TopK(k=2)), SwiGLU(count=8, hidden=32), Merged()),
        ... ))
        >>> fold_tasks(model).config.layer_specs[0]
        SwiGLU(count=1, hidden=32, bias=False, out=None)
    """
    specs = model.config.layer_specs
    folded = [_folded(index, spec, task) for index, spec in enumerate(specs)]
    settings = model.config.to_dict() | {"layers": [spec.to_dict() for spec in folded]}
    dense = MoEDecoderForCausalLM(MoEDecoderConfig.from_dict(settings))
    dense.to(device=model.device, dtype=model.dtype)  # type: ignore[call-arg]
    # Its frequencies are in no state dict and may be of a higher precision than the weights.
    dense.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)
    state = model.state_dict()
    for index, block in enumerate(model.model.layers):
        if isinstance(block.mlp, MoE):
            state |= _merged(f"model.layers.{index}{EXPERTS}", block.mlp, task)
    kept = dense.state_dict().keys()
    dense.load_state_dict({name: value for name, value in state.items() if name in kept})
    return dense


def _folded(index: int, spec: LayerSpec, task: int) -> FeedForwardSpec:
    """The dense spec of one block, refused if there is none."""
    if isinstance(spec, FeedForwardSpec):
        return spec
    refused = _why_not(spec)
    if refused:
        raise SpecError(f"layer {index} cannot be folded into a dense one: {refused}")
    assert isinstance(spec.router, PerTask)
    tasks = len(spec.router.descriptions)
    if not 0 <= task < tasks:
        raise SpecError(f"task is {task}, but layer {index} knows the tasks 0 to {tasks - 1}")
    assert isinstance(spec.experts, FeedForwardSpec)
    return spec.experts.replace(count=1)


def _why_not(spec: MoESpec) -> str:
    """Why a mixture has no dense form; empty if it has one."""
    if not isinstance(spec.router, PerTask):
        return f"{type(spec.router).__name__} decides from the tokens; it takes PerTask"
    if not isinstance(spec.dispatch, Merged):
        return "its experts are run one by one and not merged; it takes dispatch=Merged()"
    if not isinstance(spec.experts, FeedForwardSpec):
        return f"a {type(spec.experts).__name__} is no bank of feed-forward experts alone"
    if spec.adapter is not None or spec.shared is not None:
        return "its adapter or shared expert would be lost"
    return "" if isinstance(spec.residual, Plain) else "a dense block has no residual rule"


@torch.no_grad()
def _merged(prefix: str, layer: MoE, task: int) -> dict[str, Tensor]:
    """The parameters of the one expert of ``task``, by their names in the dense model."""
    router, was_training = layer.router, layer.router.training
    assert isinstance(router, PerTaskRouter)
    try:  # noise is for training
        every = torch.arange(router.tasks, device=router.bias.device)
        routing = router.eval().decisions(Signals(task_S=every, experts=layer.experts))
    finally:
        router.train(was_training)
    rows = slice(task, task + 1)
    mixtures = Mixtures(routing.expert_NK[rows], routing.weight_NK[rows], routing.experts)
    return {prefix + name: mixtures.of(p) for name, p in layer.experts.named_parameters()}

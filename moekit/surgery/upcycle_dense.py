"""Sparse upcycling of dense models of transformers: Llama, Mistral and Qwen become mixtures.

Each feed-forward part becomes experts that are copies of it (Komatsuzaki et al. 2022, arXiv
2212.05055); the combine weights of the chosen experts sum to 1, so that the mixture computes what
the dense model does, up to rounding, until it is trained. Copies all learn the same from the same
tokens; a part of each can be drawn anew (Drop-Upcycling, Nakamura et al. 2025, arXiv 2502.19261),
or noise be added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from moekit.errors import CheckpointError
from moekit.surgery.apply import copy_rest
from moekit.surgery.checkpoint import Checkpoint
from moekit.surgery.shards import ShardWriter, appearing
from moekit.surgery.stored_names import FUSED
from moekit.surgery.upcycle_families import Upcycling, mixture_config
from moekit.surgery.view_architecture import Architecture
from moekit.surgery.view_architectures import architecture_of
from moekit.surgery.weights import ExpertWeights, RouterWeights
from moekit.training.progress import ProgressReporter, SilentProgress

_CAUSAL: Any = AutoModelForCausalLM  # whose methods carry no types
_SMALLEST_SHARD = 200 * 10**6
_PROJECTIONS = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
Read = Callable[[str], Tensor]


def upcycle_dense(model: PreTrainedModel, spec: Upcycling) -> PreTrainedModel:
    """A mixture made of a dense model, which is left as it is.

    Args:
        model: a causal language model of transformers: Llama and Mistral become Mixtral, Qwen2
            becomes Qwen2-MoE and Qwen3 becomes Qwen3-MoE.
        spec: how.

    Raises:
        SpecError: the architecture has no counterpart that computes the same, or the spec asks for
            what the counterpart cannot express.
        CheckpointError: a weight is not finite; the message names it.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> dense = LlamaForCausalLM(LlamaConfig(
        ...     vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=2,
        ...     num_attention_heads=2, num_key_value_heads=2,
        ... ))
        >>> type(upcycle_dense(dense, Upcycling(experts=4))).__name__
        'MixtralForCausalLM'
    """
    config = mixture_config(model.config, spec)
    _require_finite(model)
    with torch.device("meta"):
        grown: PreTrainedModel = _CAUSAL.from_config(config, dtype=model.dtype)
    grown.to_empty(device="cpu")
    old = dict(model.named_parameters()) | dict(model.named_buffers())
    names = _Names(grown, config, old)
    own = dict(grown.named_parameters()) | dict(grown.named_buffers())
    with torch.no_grad():
        for name in own.keys() & old.keys():
            own[name].copy_(old[name])
        for block in names.blocks(spec, lambda name: old[name].detach().cpu()):
            for name, value in block.items():
                own[name].copy_(value)
    grown.tie_weights()
    grown.generation_config = model.generation_config
    grown.eval()  # type: ignore[no-untyped-call]
    return grown


def upcycle_checkpoint(
    folder: Path | str,
    output: Path,
    spec: Upcycling,
    reporter: ProgressReporter | None = None,
    finish: Callable[[Path], None] | None = None,
) -> PreTrainedConfig:
    """The same from folder to folder, a layer in memory at a time; weights are equal to the bit.

    Args:
        folder: a dense checkpoint, which is only read.
        output: folder of the mixture, which appears when all of it is written.
        spec: how.
        reporter: told how far it is, in layers.
        finish: given the finished folder before it takes the name ``output``; what it writes there
            comes with it.

    Returns:
        The mixture's config.

    Raises:
        SpecError: as :func:`upcycle_dense`.
        CheckpointError: the checkpoint is incomplete, damaged, quantised, or its config and its
            tensors contradict each other; file and tensor are named.
        OutputError: ``output`` is there already, or cannot be written.
    """
    dense = dense_checkpoint(folder, spec)
    config = mixture_config(dense.config, spec)
    config.dtype = dense.dtype
    reporter = reporter or SilentProgress()
    with torch.device("meta"):
        skeleton: PreTrainedModel = _CAUSAL.from_config(config, dtype=dense.dtype)
    names = _Names(skeleton, config, dense.tensor_names)
    stored = architecture_of(config).stored
    with appearing(output) as scratch:
        writer = ShardWriter(scratch, _SMALLEST_SHARD)
        reporter.start(len(names.mixtures), "upcycling")
        for done, block in enumerate(names.blocks(spec, dense.read)):
            for name, tensor in block.items():
                for place, part in stored.split(name, tensor):
                    writer.add(place, part)
            reporter.update(done + 1, None, None)
        for name in names.kept:
            if dense.source_of(name) == name:
                writer.add(stored.plain(name), dense.read(name))
        writer.finish()
        copy_rest(dense.folder, scratch)
        config.architectures = [type(skeleton).__name__]
        config.save_pretrained(scratch)
        reporter.finish()
        if finish is not None:
            finish(scratch)
    return config


def dense_checkpoint(folder: Path | str, spec: Upcycling) -> Checkpoint:
    """A dense checkpoint, its headers compared with its config.

    Raises:
        SpecError, CheckpointError: as :func:`upcycle_checkpoint`.
    """

    def architecture(config: PreTrainedConfig) -> Architecture:
        mixture_config(config, spec)  # refuses what has no counterpart
        return Architecture(config.model_type, "", stored=FUSED)

    return Checkpoint(folder, architecture)


class _Names:
    """Which tensors of a mixture come from where.

    Attributes:
        mixtures: paths of its MoE blocks, by layer.
        kept: tensors that are the dense model's own.
    """

    def __init__(self, grown: PreTrainedModel, config: PreTrainedConfig, old: Any) -> None:
        self.architecture = architecture_of(config)
        self.shapes = {name: t.shape for name, t in grown.state_dict().items()}
        layers = grown.get_submodule(f"{grown.base_model_prefix}.layers")
        self.mixtures = [
            f"{grown.base_model_prefix}.layers.{index}.{self.architecture.block}"
            for index, layer in enumerate(layers.children())
            if self.architecture.is_moe(layer)
        ]
        tied = set(grown.all_tied_weights_keys)
        self.kept = [name for name in self.shapes if name in old and name not in tied]

    def blocks(self, spec: Upcycling, read: Read) -> Iterator[dict[str, Tensor]]:
        """The tensors of each MoE block, in order; draws go from one to the next."""
        generator = torch.Generator().manual_seed(spec.seed)
        for path in self.mixtures:
            yield self._block(path, spec, generator, read)

    def _block(
        self, path: str, spec: Upcycling, generator: torch.Generator, read: Read
    ) -> dict[str, Tensor]:
        gate_HD, up_HD, down_DH = (read(f"{path}.{name}") for name in _PROJECTIONS)
        bank = _copies((gate_HD, up_HD, down_DH.T), spec, generator)
        shape = self.shapes[f"{path}.{self.architecture.router}.weight"]
        router_ED = (spec.router_std * torch.randn(shape, generator=generator)).to(gate_HD.dtype)
        found = self.architecture.pack_experts(bank)
        found |= self.architecture.pack_router(RouterWeights(router_ED))
        if f"{path}.shared_expert.down_proj.weight" in self.shapes:
            found |= {
                "shared_expert.gate_proj.weight": gate_HD,
                "shared_expert.up_proj.weight": up_HD,
                "shared_expert.down_proj.weight": torch.zeros_like(down_DH),
                "shared_expert_gate.weight": gate_HD.new_zeros(1, gate_HD.shape[1]),
            }
        return {f"{path}.{name}": value for name, value in found.items()}


def _copies(
    neurons: tuple[Tensor, ...], spec: Upcycling, generator: torch.Generator
) -> ExpertWeights:
    """E copies of a feed-forward part, whose matrices have a row a hidden neuron."""
    hidden = neurons[0].shape[0]
    bank = [weight.new_empty(spec.experts, *weight.shape) for weight in neurons]
    for expert in range(spec.experts):
        copies = [
            weights_EHD[expert].copy_(weight)
            for weights_EHD, weight in zip(bank, neurons, strict=True)
        ]
        if spec.reinit:
            drawn = torch.randperm(hidden, generator=generator)[: round(spec.reinit * hidden)]
            for copy, weight in zip(copies, neurons, strict=True):
                copy[drawn] = _normal(copy[drawn], weight, generator)
        if spec.noise:
            for copy in copies:
                copy.copy_(_noisy(copy, spec.noise, generator))
    gate_EHD, up_EHD, down_EHD = bank
    return ExpertWeights(gate=gate_EHD, up=up_EHD, down=down_EHD.transpose(1, 2))


def _noisy(weight: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    values = weight.float()
    drawn = torch.randn(values.shape, generator=generator)
    return (values + noise * values.std() * drawn).to(weight.dtype)


def _normal(like: Tensor, of: Tensor, generator: torch.Generator) -> Tensor:
    """Draws of the shape of one tensor from the normal distribution of another one's entries."""
    values = of.float()
    found = torch.randn(like.shape, generator=generator) * values.std() + values.mean()
    return found.to(like.dtype)


def _require_finite(model: PreTrainedModel) -> None:
    for name, value in model.named_parameters():
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(
                f"{name} of the dense model holds NaN or infinite values; start from a sound one"
            )

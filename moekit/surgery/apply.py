"""A plan carried out: on a checkpoint, which becomes a new one, or on a model in memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from moekit.errors import SpecError
from moekit.surgery.blockwise import BlockwiseModel
from moekit.surgery.checkpoint import Checkpoint
from moekit.surgery.plan import BlockPlan
from moekit.surgery.pruned import PrunedMoEConfig, PrunedMoEForCausalLM
from moekit.surgery.shards import ShardWriter, appearing, is_report
from moekit.surgery.view import BlockView, block_views
from moekit.surgery.view_architectures import OwnDecoder, architecture_of

Planner = Callable[[int, BlockView], BlockPlan]
"""Gives the plan of the MoE block of this number, whose weights are loaded."""

INNER = "inner."
_SMALLEST_SHARD = 200_000_000  # bytes
_COPIED = (".json", ".txt", ".model", ".jinja", ".md")


def needs_own_class(config: PreTrainedConfig, counts: Sequence[int], reroutes: bool) -> bool:
    """Whether the result is no ordinary checkpoint of its architecture.

    Args:
        config: the model's.
        counts: experts of each MoE block.
        reroutes: whether a router keeps rows of experts that are gone.

    Raises:
        SpecError: moekit's decoder, which has a number of experts a layer but no such routers.
    """
    if isinstance(architecture_of(config), OwnDecoder):
        if reroutes:
            raise SpecError(
                "moekit's decoder has a router row for each expert; choose how the rows of merged "
                'experts become one, such as router="average"'
            )
        return False
    return reroutes or len(set(counts)) > 1


def write_pruned(
    checkpoint: Checkpoint, planner: Planner, output: Path, own_class: bool
) -> list[BlockPlan]:
    """Write the checkpoint that results from a plan of each block; the old one is only read.

    One block is in memory at a time, beside the shard that is being collected, which is no larger
    than a block or 200 MB. ``output`` appears when all of it is written.

    Args:
        checkpoint: the model before.
        planner: asked for each MoE block's plan, from the first to the last.
        output: folder of the model after.
        own_class: as :func:`needs_own_class` says.

    Returns:
        The plans.

    Raises:
        OutputError: ``output`` is there already, or cannot be written.
        SpecError: a plan does not fit its block.
    """
    model, plans = BlockwiseModel(checkpoint), list[BlockPlan]()
    with appearing(output) as folder:
        writer = ShardWriter(folder, max(_SMALLEST_SHARD, model.largest_layer_bytes))
        rest = set(checkpoint.tensor_names)
        prefix = INNER if own_class else ""
        for view in (view for view in model.blocks if view is not None):
            with model.loaded(view.index, as_stored=True):
                plan = planner(len(plans), view)
                plan.check(view.rule)
                plans.append(plan)
                for name, tensor in new_tensors(view, plan).items():
                    for stored, part in checkpoint.names.split(prefix + name, tensor):
                        writer.add(stored, part)
                rest -= replaced_names(view)
        for name in sorted(rest):
            if checkpoint.source_of(name) == name:
                shape = checkpoint.shape_of(name)
                tensor = checkpoint.names.read(name, shape, checkpoint.stored, checkpoint.read)
                for stored, part in checkpoint.names.split(prefix + name, tensor):
                    writer.add(stored, part)
        writer.finish()
        copy_rest(checkpoint.folder, folder)
        _new_config(checkpoint.config, plans, own_class).save_pretrained(folder)
    return plans


def pruned_model(model: PreTrainedModel, plans: Sequence[BlockPlan]) -> PreTrainedModel:
    """A new model that results from a plan of each MoE block; the old one is left as it was.

    Raises:
        SpecError: a plan does not fit its block, or there is not one for each.
    """
    views = block_views(model)
    if len(plans) != len(views):
        raise SpecError(f"got {len(plans)} plans for {len(views)} MoE blocks; give one for each")
    own_class = needs_own_class(
        model.config, [p.count for p in plans], any(p.rows_KE is None for p in plans)
    )
    state = dict(model.state_dict())
    for view, plan in zip(views, plans, strict=True):
        plan.check(view.rule)
        for name in replaced_names(view):
            del state[name]
        state |= new_tensors(view, plan)
    config = _new_config(model.config, plans, own_class)
    made: Any = PrunedMoEForCausalLM(config) if own_class else type(model)(config)  # type: ignore[arg-type]
    prefix = INNER if own_class else ""
    made.load_state_dict(
        {prefix + name: tensor.clone().contiguous() for name, tensor in state.items()}, assign=True
    )
    made.tie_weights()
    return made.train(model.training)


def new_tensors(view: BlockView, plan: BlockPlan) -> dict[str, Tensor]:
    """The tensors of a block after a plan, by their names in the model."""
    architecture = view.architecture
    router = architecture.pack_router(plan.new_router(view.router))
    if plan.rows_KE is None:
        inside = f"{architecture.router}."
        router = {
            f"{inside}router.{name.removeprefix(inside)}": value for name, value in router.items()
        }
        router[f"{inside}transfer_EK"] = plan.transfer_EK.float()
    tensors = architecture.pack_experts(plan.new_bank(view.bank)) | router
    return {f"{view.name}.{name}": tensor for name, tensor in tensors.items()}


def replaced_names(view: BlockView) -> set[str]:
    """The names in the model of the tensors that a plan replaces."""
    architecture = view.architecture
    shapes = architecture.experts(view.block)
    names = [*architecture.pack_experts(shapes), *architecture.pack_router(view.router)]
    return {f"{view.name}.{name}" for name in names}


def _new_config(
    config: PreTrainedConfig, plans: Sequence[BlockPlan], own_class: bool
) -> PreTrainedConfig:
    if own_class:
        return PrunedMoEConfig.of(config, plans)
    return architecture_of(config).resized(config, [plan.count for plan in plans])


def copy_rest(source: Path, target: Path) -> None:
    """The tokenizer, the generation config and the like."""
    for path in sorted(source.iterdir()):
        is_ours = path.name == "config.json" or path.name.endswith(".index.json")
        if path.is_file() and path.suffix in _COPIED and not (is_ours or is_report(path)):
            shutil.copyfile(path, target / path.name)

"""How often each module of a trained model is used on a text."""

from __future__ import annotations

from dataclasses import dataclass

from moekit.errors import SpecError
from moekit.measure import routing_statistics
from moekit.measure.observe import TokenBlocks
from moekit.models.language import MoEDecoderForCausalLM
from moekit.surgery.rebuild import mixtures


@dataclass(frozen=True)
class ModuleUsage:
    """Activation frequencies, the evidence that pruning goes by.

    Attributes:
        frequency: by name of a mixture, the share of tokens that used each of its experts.
    """

    frequency: dict[str, tuple[float, ...]]

    def check(self, model: MoEDecoderForCausalLM) -> None:
        """Refuse a model that these frequencies cannot be of.

        Raises:
            SpecError: it has other mixtures, or other numbers of experts in one.
        """
        wanted = {m.name: len(m.layer.experts.kinds) for m in mixtures(model)}
        given = {name: len(values) for name, values in self.frequency.items()}
        for name in {**wanted, **given}:
            if wanted.get(name) != given.get(name):
                raise SpecError(
                    f"the usage table has {given.get(name, 'no')} experts for {name} and the model "
                    f"has {wanted.get(name, 'no such mixture')}; count the usage of this very model"
                )


def module_usage(
    model: MoEDecoderForCausalLM,
    dataset: TokenBlocks,
    batch_size: int = 8,
    max_batches: int | None = None,
) -> ModuleUsage:
    """Count how often each module is among a token's, in every mixture; padding is left out.

    Args:
        dataset: blocks of tokens of the task that the model is to be fitted to.
        max_batches: stop after so many batches.

    Raises:
        SpecError: there is no token in ``dataset``.
    """
    counted = routing_statistics(model, dataset, batch_size, max_batches)
    if not len(counted) or not all(int(layer.tokens) for layer in counted):
        raise SpecError("usage is counted on tokens, and there is none here or no mixture")
    return ModuleUsage(
        {
            mixture.name: tuple((layer.load_E.double() / layer.tokens).tolist())
            for mixture, layer in zip(mixtures(model), counted, strict=True)
        }
    )

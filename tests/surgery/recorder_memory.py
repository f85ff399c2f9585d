"""Records a checkpoint in a process of its own and prints the peak of its memory."""

from __future__ import annotations

import json
import sys
import tempfile

import torch

from moekit import MoESpec, SwiGLU, TopK
from moekit.measure import PeakMemory
from moekit.models.language import MoEDecoderConfig, MoEDecoderForCausalLM
from moekit.surgery.checkpoint import Checkpoint
from moekit.surgery.recorder import record

BLOCKS, LENGTH = 32, 32


class Blocks:
    """Blocks of random tokens."""

    def __len__(self) -> int:
        return BLOCKS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {"input_ids": torch.randint(1, 64, (LENGTH,), generator=generator)}


def load_libraries() -> None:
    """Do the same to a model of no size, so that what libraries load once is not counted."""
    layer = MoESpec(TopK(k=2), SwiGLU(count=8, hidden=16))
    config = MoEDecoderConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, layers=layer
    )
    with tempfile.TemporaryDirectory() as folder:
        MoEDecoderForCausalLM(config).save_pretrained(folder)
        record(Checkpoint(folder), Blocks(), batch_size=1)


def main() -> None:
    """Record the checkpoint of the first argument."""
    torch.set_num_threads(1)
    load_libraries()
    checkpoint = Checkpoint(sys.argv[1])
    with PeakMemory(torch.device("cpu")) as idle:
        pass
    with PeakMemory(torch.device("cpu")) as peak:
        found = record(checkpoint, Blocks(), batch_size=1)
    width = checkpoint.config.hidden_size
    facts = {
        "before": idle.bytes,
        "peak": peak.bytes,
        "blocks": len(found),
        "state_bytes": BLOCKS * LENGTH * width * 4,
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()

"""Upcycles a checkpoint in a process of its own and prints the peak of its memory."""

from __future__ import annotations

import json
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moekit.measure import PeakMemory
from moekit.surgery import Upcycling, upcycle_checkpoint

SPEC = Upcycling(experts=4, k=2)
SHARD = 20 * 10**6


def load_libraries() -> None:
    """Do the same to a model of no size, so that what libraries load once is not counted."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(f"{folder}/in")
        upcycle_checkpoint(f"{folder}/in", Path(folder, "out"), SPEC)


def main() -> None:
    """Upcycle the checkpoint of the first argument into the folder of the second."""
    torch.set_num_threads(1)
    import_module("moekit.surgery.upcycle_dense")._SMALLEST_SHARD = SHARD
    load_libraries()
    with PeakMemory(torch.device("cpu")) as idle:
        pass
    with PeakMemory(torch.device("cpu")) as peak:
        upcycle_checkpoint(sys.argv[1], Path(sys.argv[2]), SPEC)
    print(json.dumps({"before": idle.bytes, "peak": peak.bytes}))


if __name__ == "__main__":
    main()

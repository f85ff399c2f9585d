"""``moekit adapt`` and ``moekit merge-adapter`` from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import Moekit
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MixtralConfig

SHORT = (
    *("--rank=4", "--steps=4", "--check-every=2", "--batch-size=2", "--accumulate=1"),
    *("--sequence-length=16", "--learning-rate=1e-2"),
)


@pytest.fixture(params=["llama", "mixtral"])
def base(request: pytest.FixtureRequest, saved: Callable[..., Path]) -> Path:
    if request.param == "llama":
        return saved("llama", LlamaConfig, intermediate_size=24)
    return saved("mixtral", MixtralConfig, intermediate_size=24, num_local_experts=4)


def loss_of(moekit: Moekit, model: object, text: Path) -> float:
    ended = moekit("evaluate", model, "--data", text, "--sequence-length=16", "--json")
    assert ended.code == 0, ended.err
    return float(json.loads(ended.out)["text"]["loss"])


def completion_loss(base: Path, rows: list[dict[str, str]]) -> float:
    """Mean nats a token of the held-out completions and the ends of text behind them."""
    model = AutoModelForCausalLM.from_pretrained(base)
    words = AutoTokenizer.from_pretrained(base)
    nats: list[float] = []
    for row in rows:
        prompt = words(row["prompt"], add_special_tokens=False)["input_ids"]
        after = words(row["completion"], add_special_tokens=False)["input_ids"]
        ids = torch.tensor([*prompt, *after, words.eos_token_id])
        log_TV = model(input_ids=ids[None]).logits[0].log_softmax(-1).detach()
        if row["split"] == "validation":
            nats += [-float(log_TV[t - 1, ids[t]]) for t in range(len(prompt), len(ids))]
    return sum(nats) / len(nats)


def test_train_evaluate_generate_and_merge(moekit: Moekit, base: Path, text: Path) -> None:
    before = (base / "model.safetensors").read_bytes()
    ended = moekit("adapt", base, "--data", text, "--experts=1", "--output=out", *SHORT)
    assert ended.code == 0, ended.err
    assert "held-out loss" in ended.out
    assert (base / "model.safetensors").read_bytes() == before
    assert not [path for path in Path().iterdir() if path.name.startswith(".out")]
    settings = json.loads(Path("out/moekit_adapter.json").read_text())
    assert settings["base"] == str(base.resolve())
    for command in (("inspect", "out"), ("adapt", "out", "--data", text)):
        assert "out is an adapter" in moekit(*command).sentence
    losses = [look["held_out_loss"] for look in settings["report"]["looks"]]
    assert losses[-1] < losses[0]
    adapted = loss_of(moekit, "out", text)
    assert adapted < loss_of(moekit, base, text)
    assert moekit("generate", "out", "--prompt=alpha", "--tokens=3").code == 0
    merged = moekit("merge-adapter", "out", "--output=merged")
    assert merged.code == 0, merged.err
    assert loss_of(moekit, "merged", text) == pytest.approx(adapted, rel=1e-5)
    plain = AutoModelForCausalLM.from_pretrained("merged")
    assert set(plain.state_dict()) == set(AutoModelForCausalLM.from_pretrained(base).state_dict())


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_completions_are_learned_and_prompts_are_not(
    moekit: Moekit, base: Path, tmp_path: Path
) -> None:
    """The first look is what the model's own loss says of the completions' tokens, one by one."""
    rows = [
        {"prompt": f"{n} alpha {'gamma ' * n}", "completion": f"delta {n}", "split": split}
        for n, split in enumerate(("train", "validation", "train", "validation", "validation"))
    ]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--completions", "--experts=1", "--json", *SHORT, "--sequence-length=64")
    ended = moekit("adapt", base, "--data", source, "--output=out", *options)
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert found["examples"] == {
        "train": 2,
        "validation": 3,
        "duplicates": 0,
        "cut": 0,
        "without_completion": 0,
    }
    looks = [look["held_out_loss"] for look in found["looks"]]
    assert looks[0] == pytest.approx(completion_loss(base, rows), rel=1e-4)
    assert looks[-1] < looks[0]
    whole = moekit("adapt", base, "--data", source, "--text-column=prompt", *options)
    assert "--text-column is of whole texts" in whole.sentence
    named = moekit("adapt", base, "--data", source, "--prompt-column=id")
    assert "add --completions" in named.sentence


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_a_mixture_is_merged_by_expert_only(moekit: Moekit, base: Path, text: Path) -> None:
    ended = moekit("adapt", base, "--data", text, "--output=out", "--json", *SHORT)
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    names = load_file("out/adapter.safetensors")
    assert found["trained"] == sum(tensor.numel() for tensor in names.values())
    assert any("mole_router" in name for name in names)
    refused = moekit("merge-adapter", "out", "--output=merged")
    assert refused.code == 2
    assert "3 LoRA experts" in refused.err
    assert not Path("merged").exists()
    assert moekit("merge-adapter", "out", "--expert=1", "--output=merged").code == 0


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_null_experts_and_a_router_at_each_projection(
    moekit: Moekit, base: Path, text: Path
) -> None:
    adamoe = ("--null=2", "--k=2", "--combine=normalized", "--routers=linear", "--no-router-bias")
    ended = moekit("adapt", base, "--data", text, "--output=out", "--json", *adamoe, *SHORT)
    assert ended.code == 0, ended.err
    names = set(load_file("out/adapter.safetensors"))
    layer = "model.layers.0."
    assert f"{layer}self_attn.q_proj.mole_router.linear.weight" in names
    assert f"{layer}mlp.up_proj.mole_router.linear.weight" in names
    assert not any(name.endswith("bias") for name in names)
    looks = json.loads(ended.out)["looks"]
    assert loss_of(moekit, "out", text) < loss_of(moekit, base, text)
    assert looks[-1]["held_out_loss"] < looks[0]["held_out_loss"]


@pytest.mark.parametrize("base", ["llama"], indirect=True)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rank=0"], "rank is 0"),
        (["--experts=2", "--k=3"], "k is 3"),
        (["--combine=mean"], "combine"),
        (["--null=2"], "wanted normalized or gate"),
        (["--routers=layer"], "routers"),
        (["--steps=0"], "steps is 0"),
        (["--output=llama"], "llama is there already"),
    ],
)
def test_mistakes(moekit: Moekit, base: Path, text: Path, arguments: list[str], words: str) -> None:
    ended = moekit("adapt", base, "--data", text, *arguments)
    assert ended.code == 2
    assert words in ended.err
    assert "Traceback" not in ended.err


def test_what_is_no_adapter(moekit: Moekit, tmp_path: Path) -> None:
    ended = moekit("merge-adapter", tmp_path)
    assert ended.code == 2
    assert "is no adapter" in ended.err

"""Multiple choice against a loop over single choices, and its files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OlmoeConfig, OlmoeForCausalLM

from moekit.data import train_tokenizer
from moekit.errors import DataError, MissingExtraError, SpecError
from moekit.measure import ChoiceItem, ChoiceScores, read_choices, score_choices
from moekit.measure.harness import harness_scores, require_harness

WORDS = "the cat sat on a mat and saw two dogs run far from home"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer([WORDS * 20], 300, tmp_path_factory.mktemp("tokenizer"))


def model_of(kind: str, size: int, window: int = 64):
    torch.manual_seed(0)
    common = {
        "vocab_size": size,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": window,
        "initializer_range": 0.5,
        "pad_token_id": 0,
    }
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**common))
    return OlmoeForCausalLM(OlmoeConfig(num_experts=4, num_experts_per_tok=2, **common))


def items(seed: int, count: int = 9) -> list[ChoiceItem]:
    generator, words = torch.Generator().manual_seed(seed), WORDS.split()

    def draw(least: int, most: int) -> str:
        length = int(torch.randint(least, most, (1,), generator=generator))
        return " ".join(
            words[i] for i in torch.randint(len(words), (length,), generator=generator).tolist()
        )

    return [
        ChoiceItem(draw(1, 9), tuple(f" {draw(1, 5)}" for _ in range(2 + n % 3)), n % 2)
        for n in range(count)
    ]


@torch.no_grad()
def one_by_one(model, tokenizer, item: ChoiceItem) -> list[float]:
    """Log-likelihoods without batches, padding or cuts, in float64."""
    found = []
    for choice in item.choices:
        start = tokenizer(item.context, add_special_tokens=False)["input_ids"]
        whole = tokenizer(item.context + choice, add_special_tokens=False)["input_ids"]
        log_TV = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        found.append(sum(float(log_TV[t - 1, whole[t]]) for t in range(len(start), len(whole))))
    return found


@pytest.mark.parametrize("batch_size", [1, 4, 100])
@pytest.mark.parametrize("kind", ["llama", "olmoe"])
def test_scores_are_those_of_a_loop(kind: str, batch_size: int, tokenizer) -> None:
    model, asked = model_of(kind, len(tokenizer)), items(batch_size)
    model.train()
    scores = score_choices(model, tokenizer, asked, batch_size=batch_size)
    assert model.training
    model.eval()
    right = right_normalized = 0
    for item, found in zip(asked, scores.log_likelihoods, strict=True):
        wanted = one_by_one(model, tokenizer, item)
        assert found == pytest.approx(wanted, rel=1e-4)
        right += max(range(len(wanted)), key=wanted.__getitem__) == item.answer
        each = [w / (len(c) - 1) for w, c in zip(wanted, item.choices, strict=True)]
        right_normalized += max(range(len(each)), key=each.__getitem__) == item.answer
    assert scores.accuracy == right / len(asked)
    assert scores.accuracy_normalized == right_normalized / len(asked)
    share = scores.accuracy
    assert scores.standard_error == pytest.approx(math.sqrt(share * (1 - share) / (len(asked) - 1)))


def test_space_at_the_end_of_a_context_belongs_to_the_choice(tokenizer) -> None:
    model = model_of("llama", len(tokenizer))
    apart = score_choices(model, tokenizer, [ChoiceItem("the cat ", ("sat", "saw two"), 0)])
    joined = score_choices(model, tokenizer, [ChoiceItem("the cat", (" sat", " saw two"), 0)])
    assert apart.log_likelihoods[0] == pytest.approx(joined.log_likelihoods[0])


@torch.no_grad()
def test_a_long_context_loses_its_beginning(tokenizer) -> None:
    model = model_of("llama", len(tokenizer), window=8)
    long = score_choices(model, tokenizer, [ChoiceItem(f"{WORDS} {WORDS}", (" cat", " dogs"), 0)])
    ids = tokenizer(f"{WORDS} {WORDS} cat", add_special_tokens=False)["input_ids"]
    assert len(ids) > 9
    log_TV = model(torch.tensor([ids[-9:-1]])).logits[0].log_softmax(-1)
    count = len(ids) - len(tokenizer(f"{WORDS} {WORDS}", add_special_tokens=False)["input_ids"])
    wanted = sum(float(log_TV[t - count, ids[t - count]]) for t in range(count))
    assert long.log_likelihoods[0][0] == pytest.approx(wanted, rel=1e-4)
    with pytest.raises(DataError, match="window has 8"):
        score_choices(model, tokenizer, [ChoiceItem("the", (f" {WORDS}", " cat"), 0)])


@torch.no_grad()
def test_without_a_context_the_tokenizer_says_where_to_start(tokenizer) -> None:
    model = model_of("llama", len(tokenizer))
    scores = score_choices(model, tokenizer, [ChoiceItem("", ("the cat", "two"), 0)])
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids = tokenizer("the cat", add_special_tokens=False)["input_ids"]
    log_TV = model(torch.tensor([[start, *ids]])).logits[0].log_softmax(-1)
    wanted = sum(float(log_TV[t, token]) for t, token in enumerate(ids))
    assert scores.log_likelihoods[0][0] == pytest.approx(wanted, rel=1e-4)


def test_ties_and_single_items() -> None:
    item = ChoiceItem("a", (" b", " cc"), 0)
    scores = ChoiceScores((item,), ((-2.0, -2.0),))
    assert scores.accuracy == 1.0  # the first of equals
    assert scores.accuracy_normalized == 0.0  # -1 a character is more than -2
    assert math.isnan(scores.standard_error)
    assert scores.to_dict()["standard_error"] is None


FORMS = {
    "generic": (
        {"context": "c", "choices": ["x", " y"], "answer": 1},
        ChoiceItem("c", (" x", " y"), 1),
    ),
    "answer as text": (
        {"context": "c", "choices": ["x", "y"], "answer": "y"},
        ChoiceItem("c", (" x", " y"), 1),
    ),
    "hellaswag": (
        {"ctx": "c", "endings": ["x", "y", "z"], "label": "2"},
        ChoiceItem("c", (" x", " y", " z"), 2),
    ),
    "arc": (
        {"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
        ChoiceItem("Question: q\nAnswer:", (" x", " y"), 1),
    ),
    "arc as released": (
        {
            "question": {
                "stem": "q",
                "choices": [{"text": "x", "label": "1"}, {"text": "y", "label": "2"}],
            },
            "answerKey": "1",
        },
        ChoiceItem("Question: q\nAnswer:", (" x", " y"), 0),
    ),
    "openbookqa": (
        {
            "question_stem": "s",
            "choices": {"text": ["x", "y"], "label": ["A", "B"]},
            "answerKey": "A",
        },
        ChoiceItem("s", (" x", " y"), 0),
    ),
    "piqa": (
        {"goal": "g", "sol1": "x", "sol2": "y", "label": 1},
        ChoiceItem("Question: g\nAnswer:", (" x", " y"), 1),
    ),
}


@pytest.mark.parametrize(("line", "item"), FORMS.values(), ids=FORMS)
def test_forms_of_files(line: dict, item: ChoiceItem, tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps(line) + "\n\n" + json.dumps(line))
    assert read_choices(path) == [item, item]


MISTAKES = {
    "no JSON": ("{", "line 2"),
    "a list": ("[1]", "no object"),
    "unknown fields": ('{"text": "a"}', "fields text"),
    "no endings": ('{"ctx": "a", "endings": "b", "label": 0}', "endings"),
    "label beyond": ('{"ctx": "a", "endings": ["b", "c"], "label": 2}', "2 choices"),
    "label is a word": ('{"ctx": "a", "endings": ["b", "c"], "label": "x"}', "label"),
    "label below 0": ('{"ctx": "a", "endings": ["b", "c"], "label": -1}', "label"),
    "one choice": ('{"context": "a", "choices": ["b"], "answer": 0}', "at least two"),
    "an empty choice": ('{"context": "a", "choices": ["b", ""], "answer": 0}', "none empty"),
    "no context": ('{"context": 3, "choices": ["b", "c"], "answer": 0}', "context"),
    "key without label": (
        '{"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "C"}',
        "answerKey is 'C'",
    ),
    "labels missing": (
        '{"question": "q", "choices": {"text": ["x", "y"]}, "answerKey": "A"}',
        "2 texts and 0 labels",
    ),
}


@pytest.mark.parametrize(("line", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_wrong_line_is_named(line: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text('{"context": "a", "choices": ["b", "c"], "answer": 0}\n' + line)
    with pytest.raises(DataError, match=words) as raised:
        read_choices(path)
    assert f"{path}, line 2" in str(raised.value)


def test_files_without_items(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_choices(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no items"):
        read_choices(tmp_path / "empty.jsonl")


TASK = """
task: mine
dataset_path: json
dataset_kwargs:
  data_files:
    test: {items}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.mark.filterwarnings("default")  # the harness's own, and those of what it stands on
@pytest.mark.parametrize("kind", ["llama", "olmoe"])
def test_the_harness_says_the_same(kind: str, tokenizer, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    model, known = model_of(kind, len(tokenizer)), items(7, 40)
    rows = [  # the harness puts the space between context and choice itself
        {
            "context": item.context,
            "choices": [choice.removeprefix(" ") for choice in item.choices],
            "answer": item.answer,
        }
        for item in known
    ]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mine.yaml").write_text(TASK.format(items=tmp_path / "items.jsonl"))
    found = harness_scores(model, tokenizer, ["mine"], folder=tmp_path)["mine"]
    ours = score_choices(model, tokenizer, known)
    assert set(found) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    assert found["acc"] == pytest.approx(ours.accuracy)
    assert found["acc_norm"] == pytest.approx(ours.accuracy_normalized)
    with pytest.raises(SpecError, match="no task nothing"):
        harness_scores(model, tokenizer, ["nothing"], folder=tmp_path)


def test_no_items_and_no_harness(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no item"):
        score_choices(model_of("llama", len(tokenizer)), tokenizer, [])
    monkeypatch.setattr("moekit.measure.harness.find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"lm-evaluation-harness.*moekit\[evaluation\]"):
        require_harness()

"""The configuration: what it accepts, stores and refuses."""

from __future__ import annotations

import json

import pytest
from transformers import AutoConfig

from moekit import GELU, ExpertChoice, MoESpec, SwiGLU, TopK
from moekit.errors import SpecError
from moekit.models.language import MoEDecoderConfig, MoEDecoderForCausalLM

MOE = MoESpec(TopK(k=2), SwiGLU(count=4, hidden=24))
DENSE = SwiGLU(count=1, hidden=48)


def config(**changes):
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    return MoEDecoderConfig(**{"layers": MOE, **sizes, **changes})


@pytest.mark.parametrize("single", [MOE, [MOE], (MOE,), MOE.to_dict(), [MOE.to_dict()]])
def test_a_single_spec_stands_for_every_layer(single):
    assert config(layers=single).layer_specs == (MOE,) * 3


def test_objects_and_their_json_give_the_same_config():
    specs = [DENSE, MOE, GELU(count=1, hidden=16, bias=True)]
    mixed = config(layers=[specs[0], specs[1].to_dict(), specs[2]])
    assert mixed.layer_specs == tuple(specs)
    assert mixed.layers == [spec.to_dict() for spec in specs]


def test_config_json_round_trip_is_identical(layers, build, tmp_path):
    first = build(layers, tie_word_embeddings=True, pad_token_id=0).config
    first.save_pretrained(tmp_path)
    second = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(second, MoEDecoderConfig)
    assert second.to_json_string() == first.to_json_string()
    assert second.layer_specs == first.layer_specs


def test_defaults_build_a_valid_config():
    default = MoEDecoderConfig()
    assert len(default.layer_specs) == default.num_hidden_layers
    assert default.head_dim * default.num_attention_heads == default.hidden_size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [MOE, MOE]}, "layers holds 2 specs but num_hidden_layers is 3"),
        ({"layers": []}, "layers holds 0 specs"),
        ({"layers": "MoESpec"}, "layers is 'MoESpec'; wanted one spec"),
        ({"layers": 4}, "layers is 4; wanted one spec"),
        ({"layers": [None] * 3}, "None is not the spec of a layer; known kinds: MoESpec"),
        ({"layers": {"kind": "SwiGlu"}}, "'SwiGlu' is not the spec .* did you mean SwiGLU?"),
        ({"layers": {"hidden": 3}}, "is not the spec of a layer"),
        ({"layers": {**MOE.to_dict(), "router": {"kind": "TopKK"}}}, "did you mean TopK?"),
        ({"layers": {**DENSE.to_dict(), "width": 3}}, "SwiGLU has no field 'width'"),
        ({"layers": SwiGLU(count=2, hidden=8)}, "has count 2; set count=1"),
        ({"layers": SwiGLU(count=1, hidden=8, out=31)}, "has width 31 but hidden_size is 32"),
        (
            {"layers": MOE.replace(shared=SwiGLU(count=1, hidden=8, out=16))},
            "has width 16 but hidden_size is 32",
        ),
        ({"num_attention_heads": 3}, "hidden_size 32 is not a multiple of num_attention_heads 3"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        ({"head_dim": 7}, "head_dim is 7; rotary embeddings need an even number"),
        ({"vocab_size": 0}, "vocab_size is 0; wanted a whole number of at least 1"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers is 1.5"),
        ({"rope_parameters": {"rope_type": "yarm"}}, "'yarm' is unknown; .* did you mean yarn?"),
    ],
)
def test_contradictions_are_refused_in_one_sentence(changes, message):
    with pytest.raises(SpecError, match=message) as caught:
        config(**changes)
    assert "\n" not in str(caught.value)


def test_an_edited_checkpoint_config_is_refused_by_the_same_error(tmp_path):
    config().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    data = json.loads(path.read_text())
    data["layers"][1]["router"]["kind"] = "TopQ"
    path.write_text(json.dumps(data))
    with pytest.raises(SpecError, match="'TopQ' is not a RouterSpec"):
        AutoConfig.from_pretrained(tmp_path)


def test_a_depth_changed_afterwards_is_refused_when_the_model_is_built():
    changed = config()
    changed.num_hidden_layers = 2
    with pytest.raises(SpecError, match="layers holds 3 specs but num_hidden_layers is 2"):
        MoEDecoderForCausalLM(changed)


def test_routing_that_is_not_causal_is_told_and_warned_of(caplog):
    assert config().is_causal_routing
    looking_ahead = config(layers=[DENSE, MOE, MOE.replace(router=ExpertChoice(capacity=2.0))])
    assert not looking_ahead.is_causal_routing
    MoEDecoderForCausalLM(config())
    assert not caplog.records
    MoEDecoderForCausalLM(looking_ahead)
    assert ["looks at later tokens" in r.getMessage() for r in caplog.records] == [True]

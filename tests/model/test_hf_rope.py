"""Rotary positions of a `config.json` are those that transformers computes for it.

The frequencies (of a rotated width of 16) and the scales are what transformers 5.24 printed.
"""

import hf_cases
import numpy as np
import pytest

import model
from model.hf import config as hf_config
from model.mla import softmax_scale
from model.rope import frequencies

_LLAMA = {key: value for key, value in hf_cases.CASES["llama"].items()
          if key not in ("rope_theta", "rope_scaling")} | {"head_dim": 16}
_QWEN2 = _LLAMA | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
_V3 = hf_cases.CASES["v3"] | {"rope_theta": 10000.0, "qk_rope_head_dim": 16}
_YARN = {"rope_type": "yarn", "factor": 4.0}
_EQUAL = {"type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "mscale": 1.0,
          "mscale_all_dim": 1.0}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_PLAIN = [1.0, 0.3162278, 0.1, 0.03162278, 0.01, 0.003162278, 0.001, 0.0003162278]
_AT_32K = [1.0, 0.3162278, 0.1, 0.03162278, 0.01, 0.002569351, 0.000625, 0.0001383497]
_AT_4K = [1.0, 0.3162278, 0.1, 0.02569351, 0.00625, 0.001383497, 0.00025, 7.905695e-05]
_AT_512 = [1.0, 0.3162278, 0.1, 0.01849668, 0.00125, 0.0003952847, 0.000125, 3.952847e-05]
_QUARTER = [0.25, 0.07905694, 0.025, 0.007905695, 0.0025, 0.0007905695, 0.00025, 7.905695e-05]
_M4 = 1.138629436111989  # 0.1 ln(4) + 1

# By name: the config, its frequencies, the scale of the rotation, and the factor of the softmax.
CASES = {
    "rope_scaling beside default rope_parameters": (
        _QWEN2 | {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
                  "rope_scaling": _YARN | {"original_max_position_embeddings": 32768}},
        _AT_32K, _M4, 1),
    "rope_scaling beside rope_parameters of another theta": (
        _QWEN2 | {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
                  "rope_scaling": _YARN | {"original_max_position_embeddings": 32768}},
        _AT_32K, _M4, 1),
    "an empty rope_scaling beside rope_parameters": (
        _LLAMA | {"rope_theta": 1e6, "rope_scaling": {},
                  "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        [0.5, 0.08891397, 0.01581139, 0.002811707, 0.0005, 8.891397e-05, 1.581139e-05,
         2.811707e-06], 1, 1),
    "no theta": (_LLAMA, _PLAIN, 1, 1),
    "a null theta": (_LLAMA | {"rope_theta": None}, _PLAIN, 1, 1),
    "YaRN without a length": (
        _LLAMA | {"max_position_embeddings": 4096, "rope_scaling": _YARN}, _AT_4K, _M4, 1),
    "YaRN with a null length, of a float": (
        _LLAMA | {"max_position_embeddings": 4096.0, "rope_scaling": _YARN | {
            "original_max_position_embeddings": None}}, _AT_4K, _M4, 1),
    "YaRN with a length that is a float": (
        _LLAMA | {"rope_scaling": _YARN | {"original_max_position_embeddings": 4096.0}},
        _AT_4K, _M4, 1),
    "YaRN with an attention_factor": (
        _LLAMA | {"max_position_embeddings": 4096, "rope_scaling": _YARN | {
            "attention_factor": 0.5}}, _AT_4K, 0.5, 1),
    "YaRN with bounds that are not truncated": (
        _LLAMA | {"max_position_embeddings": 4096, "rope_scaling": _YARN | {"truncate": False}},
        [1.0, 0.3162278, 0.1, 0.02861361, 0.006556971, 0.001285632, 0.00025, 7.905695e-05],
        _M4, 1),
    "YaRN of a context too short for any rotation": (
        _LLAMA | {"rope_scaling": _YARN | {"original_max_position_embeddings": 2}},
        [1.0, *_QUARTER[1:]], _M4, 1),
    "YaRN whose bounds are in reverse order": (
        _LLAMA | {"rope_theta": 4.0, "rope_scaling": _YARN | {
            "original_max_position_embeddings": 1 << 30}},
        [0.25, 0.2102241, 0.1767767, 0.1486509, 0.125, 0.1051121, 0.08838835, 0.07432544], _M4, 1),
    "Llama 3's scaling without a length": (
        _LLAMA | {"max_position_embeddings": 512, "rope_scaling": _LLAMA3}, _AT_512, 1, 1),
    "V3 with beta_fast = beta_slow, of Kimi K2": (
        _V3 | {"model_type": "kimi_k2", "rope_theta": 50000.0,
               "rope_scaling": _EQUAL | {"beta_fast": 1.0, "beta_slow": 1.0}},
        [1.0, 0.2586001, 0.06687403, 0.01729363, 0.004472136, 3.614047e-05, 9.34593e-06,
         2.416859e-06], 1, 1.8132604340394958),
    "V3 with beta_fast = beta_slow = 4": (
        _V3 | {"rope_scaling": _EQUAL | {"beta_fast": 4, "beta_slow": 4}},
        [1.0, 0.3162278, 0.1, 0.03162278, 0.01, 9.882118e-05, 3.125e-05, 9.882118e-06],
        1, 1.8132604340394958),
    "V3 with linear scaling and a temperature": (
        _V3 | {"rope_scaling": {"type": "linear", "factor": 4, "mscale_all_dim": 1.0}},
        _QUARTER, 1, 1.2964769927807063),
    "V3 with Llama 3's scaling and a temperature": (
        _V3 | {"max_position_embeddings": 512, "rope_scaling": _LLAMA3 | {"mscale_all_dim": 0.7}},
        _AT_512, 1, 1.3123097937489698),
    "V3 with YaRN's attention_factor and a temperature": (
        _V3 | {"rope_scaling": {
            "type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096,
            "attention_factor": 0.9, "mscale_all_dim": 0.7}},
        [1.0, 0.3162278, 0.1, 0.02470529, 0.005625, 0.001087033, 0.000125, 3.952847e-05],
        0.9, 1.3123097937489698),
    "V3 without scaling, whose temperature is ignored": (
        _V3 | {"rope_scaling": {"rope_type": "default", "mscale_all_dim": 1.0}}, _PLAIN, 1, 1),
}


@pytest.mark.parametrize("name", CASES)
def test_frequencies_and_scales_are_those_of_transformers(name):
  config, expected, rotation_scale, temperature = CASES[name]
  cfg = hf_config.parse(config, problems := [])
  assert problems == []
  np.testing.assert_allclose(frequencies(cfg.rope, 16), expected, rtol=1e-6)
  scaling = cfg.rope.scaling
  ours = scaling.rotation_scale if isinstance(scaling, model.YarnScaling) else 1
  assert ours == pytest.approx(rotation_scale, rel=1e-12)
  if isinstance(cfg.attention, model.MLAConfig):
    plain = cfg.attention.score_dim**-0.5
    assert softmax_scale(cfg) == pytest.approx(plain * temperature, rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_is_read_as_the_same_architecture(name):
  cfg = hf_config.parse(CASES[name][0], [])
  assert hf_config.parse(hf_config.render(cfg, "float32"), problems := []) == cfg
  assert problems == []


def test_rotary_positions_that_differ_between_layers_are_refused():
  config = _QWEN2 | {"rope_parameters": {"full_attention": _YARN, "sliding_attention": {}}}
  hf_config.parse(config, problems := [])
  assert any("'full_attention'" in problem for problem in problems), problems


@pytest.mark.parametrize(("changes", "expected"), [
    ({"rope_theta": "1e4"}, ["config.json: rope_theta='1e4' should be a number"]),
    ({"rope_scaling": _YARN | {"factor": "4"}},
     ["config.json: rope_scaling: factor='4' should be a number"]),
    ({"rope_scaling": _YARN, "max_position_embeddings": "x"},
     ["config.json: max_position_embeddings='x' should be an integer"]),
    ({"rope_theta": 0.5}, ["config.json: RopeConfig.theta=0.5 must exceed 1"]),
    ({"num_attention_heads": "6"}, ["config.json: num_attention_heads='6' should be an integer"]),
    ({"hidden_size": None}, ["config.json: hidden_size is missing"]),
    ({"rms_norm_eps": "x", "head_dim": 7},
     ["config.json: rms_norm_eps='x' should be a number",
      "config.json: GQAConfig.head_dim=7 must be even: rotary positions rotate pairs"]),
])
def test_an_invalid_value_is_reported_once_and_nothing_that_only_its_placeholder_causes(
    changes, expected):
  config = {key: value for key, value in (_LLAMA | {"rope_scaling": None} | changes).items()
            if value is not None or key == "rope_scaling"}
  hf_config.parse(config, problems := [])
  assert sorted(set(problems)) == sorted(expected)


@pytest.mark.parametrize(("base", "changes", "expected"), [
    ("v3", {"num_attention_heads": "3"},
     ["config.json: num_attention_heads='3' should be an integer"]),
    ("v2", {"topk_method": None}, ["config.json: topk_method is missing"]),
    ("v2_lite", {"topk_method": "noaux_tc"},
     ["config.json: topk_method='noaux_tc' is neither 'group_limited_greedy' nor supported; it "
      "should be 'greedy'"]),
])
def test_placeholders_of_deepseeks_values_cause_no_problem_either(base, changes, expected):
  hf_config.parse(hf_cases.CASES[base] | changes, problems := [])
  assert problems == expected


@pytest.mark.parametrize("changes", [
    {"use_sliding_window": True, "max_window_layers": 2},
    {"use_sliding_window": True},  # max_window_layers is 28 by default, and there are 2 layers
    {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": None},
    {"use_sliding_window": True, "max_window_layers": 0, "layer_types": ["full_attention"] * 2},
    {"use_sliding_window": False, "max_window_layers": 0, "sliding_window": 4096},
])
@pytest.mark.parametrize("case", ["qwen2", "qwen3"])
def test_windows_that_no_layer_has_do_not_matter(case, changes):
  cfg = hf_config.parse(hf_cases.CASES[case] | changes, problems := [])
  assert problems == []
  assert cfg == hf_config.parse(hf_cases.CASES[case], [])


@pytest.mark.parametrize(("changes", "named"), [
    ({"use_sliding_window": True, "max_window_layers": 1}, "layers 1..1"),
    ({"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 8}, "layers 0..1"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "'sliding_attention'"),
    ({"layer_types": "full_attention"}, "layer_types"),
])
def test_layers_with_a_window_are_refused(changes, named):
  hf_config.parse(hf_cases.CASES["qwen2"] | changes, problems := [])
  assert len(problems) == 1 and named in problems[0], problems


def test_integers_may_be_written_as_floats():
  config = {key: float(value) if isinstance(value, int) and not isinstance(value, bool) else value
            for key, value in hf_cases.CASES["v3"].items()}
  cfg = hf_config.parse(config, problems := [])
  assert problems == []
  assert cfg == hf_config.parse(hf_cases.CASES["v3"], [])
  assert isinstance(cfg.max_seq_len, int)

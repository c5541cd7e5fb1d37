"""Our model matches transformers: its logits and the gradient of every parameter."""

import dataclasses

import hf_cases
import hf_reference
import pytest

import model
from model import layers, moe

CASES = list(hf_cases.CASES)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
  """The config and variables of every case, loaded once."""
  root = tmp_path_factory.mktemp("hf")
  return {case: model.hf.load(hf_reference.write_folder(case, root / case)) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_those_of_transformers(case, loaded):
  logits, grads = hf_reference.distance(case, *loaded[case])
  assert logits < hf_reference.LOGITS
  assert {name: value for name, value in grads.items() if value > hf_reference.GRADIENTS} == {}


# Each mutant is a mistake seen in other implementations, which the test above must detect.


def _other_layout(cfg, monkeypatch):
  other = {"half": "interleaved", "interleaved": "half"}[cfg.rope.layout]
  return dataclasses.replace(cfg, rope=dataclasses.replace(cfg.rope, layout=other))


def _other_theta(cfg, monkeypatch):
  return dataclasses.replace(cfg, rope=dataclasses.replace(cfg.rope, theta=2 * cfg.rope.theta))


def _norm_left_out(cfg, monkeypatch):
  original = layers.RMSNorm.__call__
  monkeypatch.setattr(layers.RMSNorm, "__call__", lambda self, x: (
      x + 0 * original(self, x) if self.name == "ffn_norm" else original(self, x)))
  return cfg


def _biased_gates(cfg, monkeypatch):
  original = moe.route
  monkeypatch.setattr(
      moe, "route", lambda scores, bias, *rest: original(scores + bias, 0.0, *rest))
  return cfg


MUTANTS = [(mutant, case) for case in CASES
           for mutant in (_other_layout, _other_theta, _norm_left_out, _biased_gates)
           if mutant is not _biased_gates or case.startswith("v3")]


@pytest.mark.parametrize(("mutant", "case"), [
    (mutant, case) for mutant, case in MUTANTS if case in ("v3", "v3_plain", "llama", "qwen3")])
def test_a_mutant_is_detected_by_its_logits(mutant, case, loaded, monkeypatch):
  cfg, variables = loaded[case]
  mutated = mutant(cfg, monkeypatch)
  assert hf_reference.forward_distance(case, mutated, variables) > 10 * hf_reference.LOGITS


@pytest.mark.long("compiles the gradient of every mutant of every case")
@pytest.mark.parametrize(("mutant", "case"), MUTANTS)
def test_a_mutant_is_detected_by_its_logits_and_by_its_gradients(mutant, case, loaded, monkeypatch):
  cfg, variables = loaded[case]
  logits, grads = hf_reference.distance(case, mutant(cfg, monkeypatch), variables)
  assert logits > 10 * hf_reference.LOGITS
  assert max(grads.values()) > 10 * hf_reference.GRADIENTS

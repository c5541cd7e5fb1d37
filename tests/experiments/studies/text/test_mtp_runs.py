"""Metrics of MTP's drafts, against counting by hand."""

import dataclasses

import jax
import numpy as np
import pytest

import model
from experiments import settings
from experiments.studies.text import mtp_runs
from experiments.studies.v3 import mtp_speculation
from train.data import HeldOut

STUDY = mtp_speculation.STUDY
NANO = dataclasses.replace(
    model.get_config("nano"), vocab_size=40, num_layers=1, max_seq_len=256, init_std=0.3)


@pytest.fixture(scope="module")
def variables():
  return jax.jit(model.Transformer(NANO).init)(jax.random.key(0), np.zeros((1, 4), np.int32))


def rows(seed, count, masked=0):
  """Returns `count` held-out rows of 96 random tokens, of which the last `masked` are padding."""
  tokens = np.random.default_rng(seed).integers(0, 40, (count, 97)).astype(np.int32)
  mask = np.ones((count, 96), bool)
  mask[:, 96 - masked:] = False
  return HeldOut(tokens, mask, mask.astype(np.int32), 100, 1)


def test_agreement_counts_tokens_that_the_module_and_the_model_both_predict(variables):
  heldout = {"a": rows(1, 2, masked=7), "b": rows(2, 3)}
  counts, losses, entropies, agreements = {}, {}, [], []
  for domain, own in heldout.items():
    output = model.Transformer(NANO).apply(variables, own.tokens[:, :-1])
    logp = np.asarray(jax.nn.log_softmax(output.logits_BTV), np.float64)
    drafts = np.asarray(output.mtp_logits[0].argmax(-1))
    hits, nll = [], []
    for row in range(len(own.tokens)):
      nll += [-logp[row, t, own.tokens[row, t + 1]] for t in range(96) if own.loss_mask[row, t]]
      for t in range(95):
        if own.loss_mask[row, t + 1]:
          hits.append(drafts[row, t] == logp[row, t + 1].argmax())
          entropies.append(-(np.exp(logp[row, t + 1]) * logp[row, t + 1]).sum())
    counts[domain], losses[domain] = np.mean(hits), np.mean(nll)
    agreements += hits
  found = mtp_runs.agreement(NANO, variables, heldout, losses)
  assert 0 < np.mean(agreements) < 1
  assert found["agreement"] == pytest.approx(np.mean(agreements))
  easy, hard = sorted(losses, key=losses.get)
  for domain in heldout:
    assert found[f"agreement_{domain}"] == pytest.approx(counts[domain])
  assert found["domain_effect"] == pytest.approx(counts[easy] - counts[hard])
  certain, uncertain = np.array_split(np.array(agreements)[np.argsort(entropies)], 2)
  assert found["agreement_certain"] == pytest.approx(certain.mean(), abs=0.01)
  assert found["certainty_effect"] == pytest.approx(certain.mean() - uncertain.mean(), abs=0.02)
  assert "domain_effect" not in mtp_runs.agreement(NANO, variables, {"a": heldout["a"]}, losses)


def test_acceptance_is_that_of_greedy_continuations(variables):
  heldout = {"a": rows(1, 2), "b": rows(2, 2)}
  found = mtp_runs.acceptance(NANO, variables, heldout)
  assert found["identical"] == 1
  domains, prompts = mtp_runs.spread_prompts(heldout, 32, 64)
  assert domains == ["a", "b"] * 6  # two rows of three pieces each
  text = model.generate(model.Transformer(dataclasses.replace(NANO, mtp=None)), variables, prompts,
                        np.full(12, 32), max_new_tokens=64, temperature=0).tokens_BN
  whole = np.concatenate([prompts, text], axis=1)
  drafts = np.asarray(model.Transformer(NANO).apply(
      variables, whole[:, :-1]).mtp_logits[0].argmax(-1))
  passes = accepted = 0
  for row in range(len(whole)):
    known = 33  # of the text, once its first new token is known
    while known < 96:
      right = drafts[row, known - 2] == whole[row, known] if known < 95 else False
      passes, accepted, known = passes + 1, accepted + right, known + 1 + right
  assert found["acceptance"] == pytest.approx(accepted / passes, abs=0.02)


def test_spread_prompts_takes_the_same_part_of_every_domain():
  domains, prompts = mtp_runs.spread_prompts({"a": rows(1, 4), "b": rows(2, 2)}, 32, 9)
  assert domains.count("a") == 6 and domains.count("b") == 3 and prompts.shape == (9, 32)


def test_parallel_heads_are_not_asked_for_two_drafts_by_one_head():
  cfg = dataclasses.replace(NANO, mtp=model.MTPConfig(form="parallel"))
  variables = jax.jit(model.Transformer(cfg).init)(jax.random.key(0), np.zeros((1, 4), np.int32))
  found = mtp_runs.acceptance(cfg, variables, {"a": rows(1, 1)})
  assert "tokens_per_pass_2" not in found and found["identical"] == 1


@pytest.mark.parametrize("scale", STUDY.scales)
def test_arms_with_as_many_modules_have_as_many_parameters(scale):
  base = STUDY.scales[scale].config
  sizes = {arm.name: settings.apply(base, arm.settings).model.param_count(mtp=True)
           for arm in STUDY.arms}
  assert sizes["sequential"] == sizes["parallel"] < sizes["sequential_2"] == sizes["parallel_2"]


def test_the_comparisons_name_arms_and_metrics_that_exist():
  names = {arm.name for arm in STUDY.arms}
  metrics = {"acceptance", "identical", "agreement_gain", "certainty_effect", "domain_effect",
             "agreement", "tokens_per_pass_2"}
  assert {c.metric for c in STUDY.comparisons} == metrics
  assert {c.arm for c in STUDY.comparisons} | {c.baseline for c in STUDY.comparisons} <= {
      *names, None}

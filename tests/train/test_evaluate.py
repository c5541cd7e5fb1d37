"""Evaluation matches the full logits, on real tokens only, however rows are batched."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from model import Transformer
from tests.train import small
from train.data import HeldOut
from train.evaluate import Evaluator, count

VARIABLES = tiny.variables(small.MOE)
ROUNDING = 1e-5


def held_out(num_rows: int, seed: int, num_bytes: int) -> HeldOut:
  """Returns rows with ragged masks, like those of rows with prompts or padding."""
  rows = small.rows(num_rows, seed)
  return HeldOut(rows["tokens"], rows["loss_mask"], np.ones_like(rows["tokens"][:, 1:]),
                 num_bytes, num_documents=num_rows)


# Neither 5 nor 3 rows divide into batches of 2.
HELDOUT = {"prose": held_out(5, seed=1, num_bytes=70), "code": held_out(3, seed=2, num_bytes=11)}


@functools.cache
def counts(cfg=small.MOE, several=False):
  one = functools.partial(count, Transformer(cfg))
  return jax.jit(jax.vmap(one, in_axes=(0, None)) if several else one)


@functools.cache
def evaluation(batch_size=2):
  return Evaluator(counts(), HELDOUT, batch_size=batch_size)(VARIABLES)


@functools.cache
def forward(domain):
  """Returns the output, and main and MTP logits [R, T, V], for all rows of a domain at once."""
  output = tiny.apply(small.MOE)(VARIABLES, HELDOUT[domain].tokens[:, :-1])
  return output, np.asarray(output.logits_BTV), np.asarray(output.mtp_logits[0])


def nats(domain) -> float:
  """Returns the summed loss of a domain's learned tokens, computed one token at a time."""
  rows, (_, logits_RTV, _) = HELDOUT[domain], forward(domain)
  total = 0.0
  for r, t in np.argwhere(rows.loss_mask):
    logits_V = logits_RTV[r, t].astype(np.float64)
    total += np.log(np.exp(logits_V).sum()) - logits_V[rows.tokens[r, t + 1]]
  return total


@pytest.mark.parametrize("domain", list(HELDOUT))
def test_loss_and_bits_per_byte_match_full_logits_at_the_masked_positions(domain):
  rows, result = HELDOUT[domain], evaluation()
  np.testing.assert_allclose(result.loss[domain], nats(domain) / rows.loss_mask.sum(),
                             rtol=ROUNDING)
  np.testing.assert_allclose(result.bits_per_byte[domain],
                             nats(domain) / np.log(2) / rows.num_bytes, rtol=ROUNDING)


def test_means_give_every_domain_the_same_weight():
  result = evaluation()
  losses = [nats(domain) / HELDOUT[domain].loss_mask.sum() for domain in HELDOUT]
  bits = [nats(domain) / np.log(2) / HELDOUT[domain].num_bytes for domain in HELDOUT]
  np.testing.assert_allclose(result.mean_loss, np.mean(losses), rtol=ROUNDING)
  np.testing.assert_allclose(result.mean_bits_per_byte, np.mean(bits), rtol=ROUNDING)


def test_mtp_acceptance_is_how_often_both_predict_the_same_token():
  accepted = drafted = 0
  for domain, rows in HELDOUT.items():
    _, main_RTV, draft_RTV = forward(domain)
    for r, t in np.argwhere(rows.loss_mask[:, 1:]):  # the mask covers the position after t
      drafted += 1
      accepted += main_RTV[r, t + 1].argmax() == draft_RTV[r, t].argmax()
  assert 0 < accepted < drafted
  np.testing.assert_allclose(evaluation().mtp_acceptance, accepted / drafted, rtol=1e-12)


def test_loads_count_every_token_of_every_row_and_no_padding_rows():
  result, chosen = evaluation(), small.MOE.moe.experts_per_token
  for domain, rows in HELDOUT.items():
    load_RLE = result.row_loads[domain]
    num_layers = small.MOE.num_layers - small.MOE.num_dense_layers
    assert load_RLE.shape == (len(rows.tokens), num_layers, small.MOE.moe.num_experts)
    assert (load_RLE.sum((1, 2)) == small.LENGTH * chosen * num_layers).all()
    output, *_ = forward(domain)
    np.testing.assert_array_equal(result.loads[domain], np.asarray(output.expert_load_LE))


def test_max_violation_is_computed_from_the_loads_of_all_domains():
  load_E = sum(np.asarray(forward(domain)[0].expert_load_LE)[0] for domain in HELDOUT)
  np.testing.assert_allclose(evaluation().max_violation, load_E.max() / load_E.mean() - 1)


def test_results_do_not_depend_on_the_batch_size():
  small.assert_same_bits(evaluation(100).row_loads, evaluation(2).row_loads)
  for name in ("loss", "bits_per_byte", "mtp_acceptance"):
    got, want = getattr(evaluation(100), name), getattr(evaluation(2), name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=ROUNDING), got, want)


def test_a_vmapped_evaluation_of_two_runs_equals_two_evaluations():
  other = jax.tree.map(lambda x: x * 1.1, VARIABLES)
  both = jax.tree.map(lambda *runs: jnp.stack(runs), VARIABLES, other)
  result = Evaluator(counts(several=True), HELDOUT, batch_size=2, several=True)(both)
  alone = [evaluation(), Evaluator(counts(), HELDOUT, batch_size=2)(other)]
  for name in ("mtp_acceptance", "max_violation", "mean_loss", "mean_bits_per_byte"):
    want = [getattr(one, name) for one in alone]
    np.testing.assert_allclose(getattr(result, name), want, rtol=ROUNDING)
  for domain in HELDOUT:
    np.testing.assert_array_equal(result.row_loads[domain],
                                  [one.row_loads[domain] for one in alone])
    np.testing.assert_array_equal(result.loads[domain], [one.loads[domain] for one in alone])
  assert alone[0].mean_loss != alone[1].mean_loss


def test_a_dense_model_without_mtp_has_neither_acceptance_nor_loads():
  cfg = dataclasses.replace(small.DENSE, mtp=None)
  result = Evaluator(counts(cfg), {"prose": HELDOUT["prose"]}, batch_size=5)(tiny.variables(cfg))
  assert result.mtp_acceptance is None and result.max_violation is None
  assert result.loads["prose"].shape == (0, 0)
  assert np.isfinite(result.mean_loss)

"""The loss follows equations 24-25 and 17 of the V3 paper, whichever documents share a row.

Shape letters:  B sequences  T tokens  V vocabulary
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from model import Transformer
from tests.train import small
from train.losses import Batch, LanguageModelLoss, mtp_mask

LOSS = LanguageModelLoss(Transformer(small.DENSE))
SUMS = jax.jit(LOSS.sums)
ONES = np.ones((2, small.LENGTH), np.int32)


@pytest.fixture(scope="module")
def mixed():
  """Returns packed documents and padding; some predictions of the documents are not learned."""
  segments = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3], [1, 1, 1, 1, 1, 1, 1, 2, 2, 0, 0, 0]])
  mask = (np.random.default_rng(3).random(segments.shape) < 0.7) & (segments > 0)
  return Batch(small.rows(2)["tokens"], mask, segments.astype(np.int32))


def log_softmax(logits):
  logits = np.asarray(logits, np.float64)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def nll(logits_BTV, batch, depth):
  """Sums -log P(t_{i + 1 + depth}) as predicted at position i, one by one, within documents."""
  logp_BTV, total = log_softmax(logits_BTV), 0.0
  for b, row in enumerate(batch.tokens):
    for i in range(small.LENGTH - depth):
      in_document = len(set(batch.segments[b, i:i + depth + 1])) == 1
      if in_document and batch.loss_mask[b, i + depth]:
        total -= logp_BTV[b, i, row[i + depth + 1]]
  return total


def logits(batch):
  return tiny.apply(small.DENSE)(
      tiny.variables(small.DENSE), batch.tokens[:, :-1], segment_ids_BT=batch.segments)


def test_the_lm_loss_is_the_log_softmax_of_full_logits_at_the_learned_targets(mixed):
  sums, _ = SUMS(tiny.variables(small.DENSE), mixed)
  np.testing.assert_allclose(sums["lm"], nll(logits(mixed).logits_BTV, mixed, 0), rtol=1e-5)


def test_the_mtp_loss_is_the_log_softmax_of_every_depth_within_documents(mixed):
  sums, _ = SUMS(tiny.variables(small.DENSE), mixed)
  per_depth = [nll(x, mixed, k) for k, x in enumerate(logits(mixed).mtp_logits, 1)]
  assert len(per_depth) == 2 and min(per_depth) > 1
  np.testing.assert_allclose(sums["mtp"], sum(per_depth), rtol=1e-5)


def test_the_mtp_loss_is_v3s_equations_24_and_25():
  batch = Batch(small.rows(2)["tokens"], ONES.astype(bool), ONES)
  sums, _ = SUMS(tiny.variables(small.DENSE), batch)
  denominators = LOSS.denominators(batch)
  per_depth = []
  for k, logits_BTV in enumerate(logits(batch).mtp_logits, 1):
    logp_BTV = log_softmax(logits_BTV)
    # The paper's P_{i + k + 1} at positions i = 1..T - k; the tokens are t_1 .. t_{T + 1}.
    one = [-sum(logp_BTV[b, i - 1, batch.tokens[b, (i + k + 1) - 1]]
                for i in range(1, small.LENGTH - k + 1)) / small.LENGTH for b in range(2)]
    per_depth.append(np.mean(one))
  np.testing.assert_allclose(sums["mtp"] / denominators["mtp"], np.mean(per_depth), rtol=1e-5)


def test_the_last_mtp_positions_are_masked():
  mask = mtp_mask(Batch(small.rows(2)["tokens"], ONES.astype(bool)), 2)
  np.testing.assert_array_equal(mask, np.arange(small.LENGTH) < small.LENGTH - 2 * ONES)


@pytest.mark.parametrize(("depth", "position"), [(1, 4), (2, 3)])
def test_the_mtp_mask_is_the_loss_mask_at_each_depths_own_target(depth, position):
  learned = np.zeros((2, small.LENGTH), bool)
  learned[0, 5] = True  # token 6: the main model predicts it at 5, MTP depth k at 5 - k
  mask = mtp_mask(Batch(small.rows(2)["tokens"], learned), depth)
  np.testing.assert_array_equal(np.argwhere(mask), [[0, position]])


def test_the_loss_of_a_document_does_not_depend_on_the_previous_document():
  # Token 6 is the last target of the first document and the first input of the second.
  first = np.arange(small.LENGTH) < 6
  batch = Batch(small.rows(2)["tokens"], ~first & (ONES > 0), np.int32(2 - first) * ONES)
  tokens = batch.tokens.copy()
  tokens[:, :6] = (tokens[:, :6] + 5) % small.DENSE.vocab_size
  sums = lambda segments: [SUMS(tiny.variables(small.DENSE), batch.replace(
      tokens=t, segments=segments))[0] for t in (batch.tokens, tokens)]
  (separate, separate_changed), (joined, joined_changed) = sums(batch.segments), sums(ONES)
  for name in ("lm", "mtp"):
    np.testing.assert_allclose(separate_changed[name], separate[name], rtol=1e-6)
    assert abs(joined_changed[name] / joined[name] - 1) > 1e-3


def test_without_segments_a_row_is_one_document():
  batch = small.batch(small.rows(2))
  none, _ = SUMS(tiny.variables(small.DENSE), batch)
  one, _ = SUMS(tiny.variables(small.DENSE), batch.replace(segments=ONES))
  for name in ("lm", "mtp"):
    np.testing.assert_allclose(none[name], one[name], rtol=1e-6)


def test_denominators_count_the_whole_batch():
  batch = small.batch(small.rows(8), num_micro_batches=4)
  learned = sum(small.RAGGED)
  counts = {k: float(v) for k, v in LOSS.denominators(batch).items()}
  assert (counts["lm"], counts["mtp"]) == (learned, 2 * learned)
  no_mtp = LanguageModelLoss(Transformer(dataclasses.replace(small.DENSE, mtp=None)))
  assert no_mtp.denominators(batch)["lm"] == learned


def test_a_batch_with_nothing_to_learn_has_zero_loss_not_nan():
  batch = Batch(small.rows(2)["tokens"], np.zeros_like(ONES, bool), np.zeros_like(ONES))
  sums, _ = SUMS(tiny.variables(small.DENSE), batch)
  assert {name: float(sums[name] / LOSS.denominators(batch)[name]) for name in sums} == {
      "lm": 0, "mtp": 0}


def test_embedding_and_head_learn_from_both_losses(mixed):
  """Compared with derivatives through the full logits, with equations 24-25 written out."""
  variables, tokens = tiny.variables(small.DENSE), jnp.asarray(mixed.tokens)
  network = Transformer(small.DENSE)
  masks = [mixed.loss_mask, *(mtp_mask(mixed, k) for k in (1, 2))]
  with_shared = lambda embedding: {"params": variables["params"] | {"embedding": embedding}}

  def direct(embedding, lm_weight, mtp_weight):
    out = network.apply(with_shared(embedding), tokens[:, :-1], segment_ids_BT=mixed.segments)
    losses = []
    for k, (logits_BTV, mask) in enumerate(
        zip([out.logits_BTV, *out.mtp_logits], masks, strict=True)):
      targets = jax.nn.one_hot(jnp.roll(tokens, -1 - k, 1)[:, :-1], small.DENSE.vocab_size)
      losses.append(-jnp.where(mask, (jax.nn.log_softmax(logits_BTV) * targets).sum(-1), 0).sum())
    return lm_weight * losses[0] + mtp_weight * sum(losses[1:])

  def ours(embedding):
    sums, _ = LOSS.sums(with_shared(embedding), mixed)
    return sums["lm"] + 0.3 * sums["mtp"]

  shared = variables["params"]["embedding"]
  got, want = jax.jit(jax.grad(ours))(shared), jax.jit(jax.grad(direct))
  lm, mtp = want(shared, 1.0, 0.0), want(shared, 0.0, 1.0)
  assert set(got) == {"embedding", "head"}
  for name in got:
    assert min(jnp.abs(lm[name]).max(), jnp.abs(mtp[name]).max()) > 0.1
    np.testing.assert_allclose(
        got[name], lm[name] + 0.3 * mtp[name], atol=1e-5 * jnp.abs(lm[name]).max())


@functools.cache
def moe_sums():
  return jax.jit(LanguageModelLoss(Transformer(small.MOE)).sums)


def uniform():
  """Returns variables whose routers score all experts equally; the biases still choose some."""
  def flatten(path, x):
    return jnp.zeros_like(x) if path[-1].key == "centroids" else x

  return jax.tree_util.tree_map_with_path(flatten, tiny.variables(small.MOE))


BALANCE = ("sequence_balance", "batch_balance", "expert_balance")


def test_balance_losses_are_one_per_layer_at_uniform_routing():
  rows = small.rows(2)
  batch = Batch(rows["tokens"], ONES.astype(bool), ONES)
  layers = 1 + small.MOE.mtp.depth
  sums, _ = moe_sums()(uniform(), batch)
  np.testing.assert_allclose([sums[name] for name in BALANCE],
                             [2 * layers, layers, layers], rtol=1e-5)
  denominators = LanguageModelLoss(Transformer(small.MOE)).denominators(batch)
  np.testing.assert_allclose(sums["sequence_balance"] / denominators["sequence_balance"], layers,
                             rtol=1e-5)
  skewed, _ = moe_sums()(tiny.variables(small.MOE), batch)
  assert all(skewed[name] > 1.01 * sums[name] for name in BALANCE[:2])


def test_padding_is_excluded_from_balance_losses_and_loads():
  rows = small.rows(2)
  segments = np.stack([ONES[0], 0 * ONES[0]])
  batch = Batch(rows["tokens"], segments > 0, segments)
  layers = 1 + small.MOE.mtp.depth
  sums, observed = moe_sums()(uniform(), batch)
  np.testing.assert_allclose([sums[name] for name in BALANCE], layers, rtol=1e-5)
  chosen = small.MOE.moe.experts_per_token
  assert {name: int(load.sum()) for name, load in observed.loads.items()} == {
      "moe_layers": 12 * chosen, "mtp_1": 11 * chosen}


def test_a_sequence_without_learned_tokens_still_counts_in_the_balance_loss():
  """An SFT row that is filled by its prompt is routed like any other row."""
  rows = small.rows(2)
  batch = Batch(rows["tokens"], np.stack([ONES[0], 0 * ONES[0]]).astype(bool), ONES)
  loss = LanguageModelLoss(Transformer(small.MOE))
  sums, _ = moe_sums()(uniform(), batch)
  mean = sums["sequence_balance"] / loss.denominators(batch)["sequence_balance"]
  np.testing.assert_allclose(mean, 1 + small.MOE.mtp.depth, rtol=1e-5)

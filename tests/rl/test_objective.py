"""Expected gradients are exact: every output of a small policy is enumerated.

Shape letters:  S sequences  T tokens  V vocabulary  P previous token
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.advantages import group_advantages
from rl.objective import SPECS, ObjectiveSpec, denominator, policy_loss

VOCAB, LENGTH, END, BEGIN = 3, 3, 0, 3


def enumerate_outputs():
  """Returns tokens [S, T] and mask [S, T] of all outputs, each ending with END or at LENGTH."""
  outputs = {tuple(itertools.takewhile(lambda token: token != END, tokens))
             for tokens in itertools.product(range(VOCAB), repeat=LENGTH)}
  rows = [output + (END,) * (LENGTH - len(output)) for output in sorted(outputs)]
  lengths = [min(len(output) + 1, LENGTH) for output in sorted(outputs)]
  return np.array(rows), np.arange(LENGTH) < np.array(lengths)[:, None]


TOKENS_ST, MASK_ST = enumerate_outputs()
PREVIOUS_ST = np.pad(TOKENS_ST, ((0, 0), (1, 0)), constant_values=BEGIN)[:, :-1]
REWARDS_S = np.random.default_rng(9).normal(size=len(TOKENS_ST))
SUM = {"aggregation": "constant_length", "max_length": 1}
NO_CLIP = {"epsilon": 1e9}


@pytest.fixture(autouse=True, scope="module")
def double_precision():
  with jax.enable_x64(True):
    yield


def weights(seed):
  return jnp.asarray(np.random.default_rng(seed).normal(size=(VOCAB + 1, VOCAB)))


PI, REF, OLD = 0, 1, 2


def logprobs(weights_PV):
  """Returns log-probabilities [S, T], with -inf where there is no token."""
  logp_ST = jax.nn.log_softmax(weights_PV)[PREVIOUS_ST, TOKENS_ST]
  return jnp.where(MASK_ST, logp_ST, -jnp.inf)


def output_logprobs(weights_PV):
  return jnp.where(MASK_ST, logprobs(weights_PV), 0).sum(1)


@jax.jit
def gradients(spec, data):
  """Returns sum, denominator, metrics, and the sum's gradient by the log-probabilities."""
  def loss(logp_ST):
    total, count, metrics = policy_loss(
        logp_ST, data["old"], data["ref"], data["advantage"], data["mask"], spec,
        logp_sampler=data["sampler"])
    return total, (count, metrics)

  (total, (count, metrics)), grads_ST = jax.value_and_grad(loss, has_aux=True)(data["logp"])
  return total, count, metrics, grads_ST


def expected_gradient(spec, advantage=REWARDS_S, old=PI):
  """Returns the loss's expected gradient over outputs of pi_old, each a batch of its own."""
  old_ST, ref_ST = logprobs(weights(old)), logprobs(weights(REF))
  probability_S = jnp.exp(output_logprobs(weights(old)))

  def loss(weights_PV):
    def one(*rows):
      total, count, _ = policy_loss(*(row[None] for row in rows), spec)
      return total / count

    losses_S = jax.vmap(one)(
        logprobs(weights_PV), old_ST, ref_ST, jnp.asarray(advantage), jnp.asarray(MASK_ST))
    return (probability_S * losses_S).sum()

  return jax.jit(jax.grad(loss))(weights(PI))


def kl(p, q):
  """Returns KL(p || q) between the distributions of whole outputs."""
  return (jnp.exp(output_logprobs(p)) * (output_logprobs(p) - output_logprobs(q))).sum()


def same(left, right):
  assert np.abs(right).max() > 1e-3
  np.testing.assert_allclose(left, right, rtol=0, atol=1e-13)


def test_the_enumeration_is_complete():
  np.testing.assert_allclose(jnp.exp(output_logprobs(weights(PI))).sum(), 1, atol=1e-14)
  assert len(set(MASK_ST.sum(1))) > 1


@pytest.mark.parametrize("unit", [
    {"ratio": "token", **SUM}, {"ratio": "sequence", "aggregation": "sequence_mean"}])
@pytest.mark.parametrize("surrogate", ["clip", "cispo", "none"])
def test_expected_gradient_is_that_of_the_expected_reward(unit, surrogate):
  reward = lambda w: (jnp.exp(output_logprobs(w)) * REWARDS_S).sum()
  got = expected_gradient(ObjectiveSpec(surrogate=surrogate, **unit))
  same(got, -jax.grad(reward)(weights(PI)))


def test_sequence_ratios_correct_exactly_for_another_sampler():
  reward = lambda w: (jnp.exp(output_logprobs(w)) * REWARDS_S).sum()
  spec = ObjectiveSpec(ratio="sequence", **NO_CLIP)
  same(expected_gradient(spec, old=OLD), -jax.grad(reward)(weights(PI)))


@pytest.mark.parametrize("spec", [
    ObjectiveSpec(kl_in="reward", kl="k1", beta=0.3, **SUM),
    ObjectiveSpec(kl_in="reward", kl="k1", beta=0.3, ratio="sequence"),
    ObjectiveSpec(kl_in="reward", kl="k1", beta=0.3, ratio="sequence", surrogate="none"),
    ObjectiveSpec(kl_in="loss", kl="k2", beta=0.3, kl_level="sequence"),
])
def test_k1_in_the_reward_and_k2_in_the_loss_descend_reverse_kl(spec):
  truth = jax.grad(lambda w: 0.3 * kl(w, weights(REF)))(weights(PI))
  same(expected_gradient(spec, 0 * REWARDS_S), truth)


def test_k3_in_the_loss_descends_forward_kl():
  spec = ObjectiveSpec(kl_in="loss", kl="k3", beta=0.3, kl_level="sequence")
  truth = jax.grad(lambda w: 0.3 * kl(weights(REF), w))(weights(PI))
  same(expected_gradient(spec, 0 * REWARDS_S), truth)


@pytest.mark.parametrize("unit", [
    {"kl_level": "sequence"}, {"kl_level": "token_sum"}, {"kl_level": "token", **SUM}])
def test_k1_in_the_loss_has_no_expected_gradient(unit):
  got = expected_gradient(ObjectiveSpec(kl_in="loss", kl="k1", beta=0.3, **unit), 0 * REWARDS_S)
  np.testing.assert_allclose(got, 0, atol=1e-13)


@pytest.mark.parametrize("unit", [{"kl_level": "token_sum"}, {"kl_level": "token", **SUM}])
@pytest.mark.parametrize(("estimator", "forward"), [("k2", False), ("k3", True)])
def test_token_kl_in_the_loss_is_the_kl_of_conditionals_at_sampled_prefixes(
    unit, estimator, forward):
  probability_S = jnp.exp(output_logprobs(weights(PI)))

  def local(weights_PV):
    p, q = jax.nn.log_softmax(weights_PV), jax.nn.log_softmax(weights(REF))
    kl_P = (jnp.exp(q) * (q - p) if forward else jnp.exp(p) * (p - q)).sum(1)
    return 0.3 * (probability_S * (kl_P[PREVIOUS_ST] * MASK_ST).sum(1)).sum()

  spec = ObjectiveSpec(kl_in="loss", kl=estimator, beta=0.3, **unit)
  same(expected_gradient(spec, 0 * REWARDS_S), jax.grad(local)(weights(PI)))


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("level", ["token_sum", "sequence"])
def test_the_expected_kl_estimate_is_the_kl_of_whole_outputs(estimator, level):
  spec = ObjectiveSpec(kl_in="loss", kl=estimator, beta=1.0, kl_level=level)
  logp_ST, ref_ST = logprobs(weights(PI)), logprobs(weights(REF))
  one = lambda *rows: policy_loss(*(row[None] for row in rows), spec)[2]["kl_loss"][0]
  values_S = jax.jit(jax.vmap(one))(
      logp_ST, logp_ST, ref_ST, jnp.zeros(len(MASK_ST)), jnp.asarray(MASK_ST))
  expected = (jnp.exp(output_logprobs(weights(PI))) * values_S).sum()
  np.testing.assert_allclose(expected, kl(weights(PI), weights(REF)), rtol=1e-13)


@pytest.mark.parametrize("spec", [
    ObjectiveSpec(kl_in=where, kl=estimator, beta=1.0)
    for where, estimator in (("reward", "k1"), ("loss", "k2"), ("loss", "k3"))])
def test_the_kl_penalty_pulls_towards_the_reference(spec):
  logp, ref = np.array([[-0.5], [-2.0]]), np.array([[-1.0], [-1.0]])
  loss = lambda x: policy_loss(x, logp, ref, np.zeros(2), np.ones((2, 1)), spec)[0]
  too_likely, too_unlikely = jax.jit(jax.grad(loss))(logp)[:, 0]
  assert too_likely > 0 > too_unlikely


def batch():
  """Returns ragged rows, one of them empty, with log-probabilities off-policy enough to clip."""
  rng = np.random.default_rng(0)
  lengths_S = np.array([5, 3, 0, 1, 4, 2])
  old, ref, sampler = rng.normal(-2, 0.5, (3, 6, 7))
  mask_ST = np.arange(7) < lengths_S[:, None]
  return {"logp": old + rng.normal(0, 0.3, old.shape), "old": old, "ref": ref,
          "advantage": rng.normal(size=6), "mask": mask_ST, "sampler": sampler}


VARIANTS = SPECS | {
    "dr_grpo": SPECS["dr_grpo"].replace(max_length=7),
    "grpo_dual_importance": SPECS["grpo"].replace(dual_clip=True, importance=True),
    "r1_literal": SPECS["grpo_r1"].replace(kl_level="sequence"),
    "gspo_reward_kl": SPECS["gspo"].replace(kl_in="reward", beta=0.1),
}
every_variant = pytest.mark.parametrize("name", VARIANTS)


def evaluate(name, data, advantage=None):
  advantage = np.asarray(data["advantage"] if advantage is None else advantage, float)
  return jax.device_get(gradients(VARIANTS[name], data | {"advantage": advantage}))


def rows(data, index):
  return {key: value[index] for key, value in data.items()}


def close(got, expected):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), got, expected)


def assert_adds_up(whole, parts):
  close(jax.tree.map(lambda *x: sum(x), *(part[:3] for part in parts)), whole[:3])


@every_variant
def test_sums_add_up_over_sequences(name):
  data = batch()
  parts = [evaluate(name, data | {"mask": data["mask"] & np.isin(np.arange(6), index)[:, None]})
           for index in ([0], [1, 2], [3, 4, 5])]
  whole = evaluate(name, data)
  assert_adds_up(whole, parts)
  close(sum(part[3] for part in parts), whole[3])
  assert np.abs(whole[3]).max() > 1e-3


@pytest.mark.parametrize("name", ["grpo", "grpo_r1", "dapo", "dr_grpo"])
def test_micro_batches_may_have_fewer_sequences_and_less_padding(name):
  data = batch()
  narrow = {key: value if value.ndim == 1 else value[:, :5] for key, value in data.items()}
  parts = [evaluate(name, rows(narrow, index)) for index in ([0, 1], [2, 3], [4, 5])]
  whole = evaluate(name, data)
  assert_adds_up(whole, parts)
  close(np.concatenate([part[3] for part in parts]), whole[3][:, :5])


@every_variant
def test_the_denominator_of_a_batch_is_the_sum_of_those_of_its_micro_batches(name):
  data, spec = batch(), VARIANTS[name]
  micro_ST = data["mask"].reshape(3, 2, -1)
  assert denominator(micro_ST, spec) == evaluate(name, data)[1]
  assert denominator(micro_ST, spec) == sum(denominator(mask, spec) for mask in micro_ST)


@every_variant
def test_the_order_of_sequences_does_not_matter(name):
  data, order = batch(), np.array([3, 1, 5, 0, 2, 4])
  whole, permuted = evaluate(name, data), evaluate(name, rows(data, order))
  close(permuted[:3], whole[:3])
  close(permuted[3], whole[3][order])


@every_variant
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e30])
def test_values_outside_the_mask_have_no_effect(name, garbage):
  data = batch()
  filled = {key: np.where(data["mask"], data[key], garbage)
            for key in ("logp", "old", "ref", "sampler")}
  filled["advantage"] = np.where(data["mask"].any(1), data["advantage"], garbage)
  close(evaluate(name, data | filled), evaluate(name, data))


def test_token_advantages_outside_the_mask_have_no_effect():
  data = batch()
  advantage_ST = np.where(data["mask"], data["advantage"][:, None], np.nan)
  close(evaluate("grpo", data, advantage_ST), evaluate("grpo", data))


@every_variant
def test_identical_rewards_give_a_policy_gradient_of_exactly_zero(name):
  data = batch()
  data["ref"] = data["logp"] = data["old"]
  advantages = group_advantages([0.1] * 6, [0, 0, 0, 1, 1, 1])
  assert not evaluate(name, data, advantages.values)[3].any()


@pytest.mark.parametrize("name", ["grpo", "grpo_r1", "gspo"])
def test_the_first_minibatch_has_zero_loss_a_gradient_and_no_clipping(name):
  data = batch()
  data["ref"] = data["logp"] = data["old"]
  data["mask"] = data["mask"] | (np.arange(7) < 1)
  advantages = group_advantages([0.0, 1.0, 3.0, 1.0, 0.0, 0.0], [0, 0, 0, 1, 1, 1])
  total, _, metrics, grads = evaluate(name, data, advantages.values)
  assert abs(total) < 1e-6  # advantages are float32
  assert np.abs(grads).max() > 0.1
  assert [metrics[f"clip_ratio/{kind}"][0] for kind in ("low", "high", "region")] == [0, 0, 0]
  np.testing.assert_allclose(metrics["ratio/mean"][0] / metrics["ratio/mean"][1], 1)


def one_output(spec, ratios, advantage):
  """Returns loss and gradient by log-probability of one output with these ratios of its tokens."""
  old = np.full((1, len(ratios)), -1.5)
  value, _, _, grads = gradients(spec, {
      "logp": np.log([ratios]) + old, "old": old, "ref": None, "sampler": None,
      "advantage": np.array([advantage]), "mask": np.ones_like(old)})
  return float(value), grads[0].tolist()


@pytest.mark.parametrize(("changes", "ratio", "advantage", "loss", "gradient"), [
    ({}, 1.1, 2.0, -2.2, -2.2),
    ({}, 1.5, 2.0, -2.4, 0),
    ({}, 1.5, -2.0, 3.0, 3.0),
    ({}, 0.5, 2.0, -1.0, -1.0),
    ({}, 0.5, -2.0, 1.6, 0),
    ({"epsilon_high": 0.28}, 1.5, 2.0, -2.56, 0),
    ({"epsilon_high": 0.28}, 0.5, -2.0, 1.6, 0),
    ({"epsilon": 10.0}, 10.9, 1.0, -10.9, -10.9),
    ({"epsilon": 10.0}, 11.1, 1.0, -11.0, 0),
    ({"epsilon": 10.0}, 1e-6, -1.0, 1e-6, 1e-6),
    ({"dual_clip": True}, 5.0, -2.0, 6.0, 0),
    ({"dual_clip": True}, 2.0, -2.0, 4.0, 4.0),
    ({"dual_clip": True}, 5.0, 2.0, -2.4, 0),
    ({"dual_clip": True, "dual_clip_ratio": 7.0}, 5.0, -2.0, 10.0, 10.0),
    ({"surrogate": "cispo"}, 1.5, 2.0, -2.4 * (np.log(1.5) - 1.5), -2.4),
    ({"surrogate": "cispo"}, 0.5, -2.0, 1.6 * (np.log(0.5) - 1.5), 1.6),
    ({"surrogate": "none"}, 1.5, 2.0, -2 * (np.log(1.5) - 1.5), -2.0),
])
def test_surrogates_have_hand_computed_values(changes, ratio, advantage, loss, gradient):
  value, grads = one_output(ObjectiveSpec(**changes), [ratio], advantage)
  np.testing.assert_allclose([value, *grads], [loss, gradient], rtol=1e-12, atol=1e-15)


def test_sequence_ratios_have_hand_computed_values():
  product, grads = one_output(ObjectiveSpec(ratio="sequence", **NO_CLIP), [2.0, 4.5], 1.0)
  np.testing.assert_allclose([product, *grads], [-9, -9, -9], rtol=1e-12)
  root, grads = one_output(ObjectiveSpec(ratio="sequence_mean", **NO_CLIP), [2.0, 4.5], 1.0)
  np.testing.assert_allclose([root, *grads], [-3, -1.5, -1.5], rtol=1e-12)


@pytest.mark.parametrize(("changes", "expected"), [
    ({"aggregation": "sequence_mean"}, (1.0 + 4.0) / 2),
    ({"aggregation": "token_mean"}, (1.0 + 3 * 4.0) / 4),
    ({"aggregation": "constant_length", "max_length": 10}, (1.0 + 3 * 4.0) / 20),
])
def test_aggregations_have_hand_computed_values(changes, expected):
  mask_ST = np.array([[0, 1, 0], [1, 1, 1], [0, 0, 0]])
  total, count, _, _ = gradients(ObjectiveSpec(**changes), {
      "logp": np.zeros((3, 3)), "old": np.zeros((3, 3)), "ref": None, "sampler": None,
      "advantage": -np.array([1.0, 4.0, 9.0]), "mask": mask_ST})
  np.testing.assert_allclose(total / count, expected, rtol=1e-12)


def test_truncated_importance_weights_have_hand_computed_values():
  old, sampler = np.log([[0.3, 0.9]]), np.log([[0.6, 0.1]])
  total, _, metrics, _ = gradients(ObjectiveSpec(importance=True, importance_cap=2.0), {
      "logp": old, "old": old, "ref": None, "sampler": sampler, "advantage": np.ones(1),
      "mask": np.ones((1, 2))})
  np.testing.assert_allclose(total, -(0.5 + 2.0) / 2, rtol=1e-12)
  np.testing.assert_allclose(metrics["importance/mean"], (2.5, 2), rtol=1e-12)


def test_kl_in_the_reward_is_the_kl_of_the_current_and_later_tokens():
  old, ref = np.log([[0.5, 0.8, 0.4]]), np.log([[0.25, 0.2, 0.05]])
  data = {"logp": old, "old": old, "ref": ref, "sampler": None, "advantage": np.array([5.0]),
          "mask": np.array([[1, 1, 0]])}
  spec = ObjectiveSpec(kl_in="reward", kl="k1", beta=1 / np.log(2), **SUM)
  np.testing.assert_allclose(gradients(spec, data)[3], [[3 - 5, 2 - 5, 0]], rtol=1e-12)
  whole = spec.replace(ratio="sequence", aggregation="sequence_mean")
  np.testing.assert_allclose(gradients(whole, data)[3], [[3 - 5, 3 - 5, 0]], rtol=1e-12)


def test_metrics_have_hand_computed_values():
  data = {"logp": np.log([[1.5, 0.5, 1.0], [1.5, 0.5, 9.9]]), "old": np.zeros((2, 3)),
          "ref": np.zeros((2, 3)), "sampler": None, "advantage": np.array([1.0, -1.0]),
          "mask": np.array([[1, 1, 1], [1, 1, 0]])}
  run = lambda spec: gradients(spec, data)[2]
  metrics = run(SPECS["grpo"])
  k3 = 2 * (1 / 1.5 - 1 + np.log(1.5)) + 2 * (1 / 0.5 - 1 + np.log(0.5))
  forward = 2 * (1.5 - 1 - np.log(1.5)) + 2 * (0.5 - 1 - np.log(0.5))
  expected = {"clip_ratio/high": (1, 5), "clip_ratio/low": (1, 5), "clip_ratio/region": (2, 5),
              "ratio/mean": (5, 5), "ratio/mean_square": (6, 5), "kl": (k3, 5),
              "approx_kl": (forward, 5)}
  for name, (total, count) in expected.items():
    np.testing.assert_allclose(metrics[name], (total, count), rtol=1e-12, err_msg=name)
  cispo = run(ObjectiveSpec(surrogate="cispo"))
  np.testing.assert_allclose([cispo["clip_ratio/low"], cispo["clip_ratio/high"]], [(2, 5), (2, 5)])
  gspo = run(SPECS["gspo"])
  np.testing.assert_allclose(gspo["ratio/mean"], (0.75 ** (1 / 3) + 0.75**0.5, 2), rtol=1e-12)


@pytest.mark.parametrize("name", ["grpo_r1", "r1_literal", "grpo"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_extreme_log_ratios_do_not_overflow(name, sign):
  data = batch()
  data |= {"logp": data["old"] + 300 * sign, "ref": data["old"]}
  for advantage in (-1.0, 1.0):
    total, _, _, grads = evaluate(name, data, np.full(6, advantage))
    assert np.isfinite(total) and np.isfinite(grads).all()


def test_specs_that_differ_only_in_their_numbers_share_one_executable():
  data, traced = batch(), []

  @jax.jit
  def loss(spec):
    traced.append(spec)
    return policy_loss(*(jnp.asarray(data[key]) for key in (
        "logp", "old", "ref", "advantage", "mask")), spec)[0]

  specs = [SPECS["grpo"], SPECS["grpo"].replace(beta=0.5), SPECS["grpo"].replace(epsilon=0.01)]
  values = [float(loss(spec)) for spec in specs]
  assert len(traced) == 1 and len(set(values)) == 3
  stacked = jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(x) for x in leaves]), *specs)
  np.testing.assert_allclose(jax.vmap(loss)(stacked), values, rtol=1e-12)


@pytest.mark.parametrize(("fields", "message"), [
    ({"ratio": "word"}, "ratio='word'"), ({"kl": "k4"}, "kl='k4'"), ({"beta": -1.0}, "beta=-1"),
    ({"dual_clip_ratio": 1.0}, "above 1"), ({"max_length": 0}, "max_length=0"),
    ({"dual_clip": True, "surrogate": "cispo"}, "dual_clip"),
    ({"kl_level": "token_sum"}, "kl_in='loss'"),
    ({"kl_level": "sequence", "kl_in": "loss", "aggregation": "token_mean"}, "averaged over")])
def test_inconsistent_specs_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    ObjectiveSpec(**fields)


@pytest.mark.parametrize(("spec", "changes", "message"), [
    (SPECS["grpo"], {"logp_ref": None}, "logp_ref is None"),
    (ObjectiveSpec(importance=True), {}, "logp_sampler is None"),
    (SPECS["dr_grpo"].replace(max_length=None), {}, "max_length"),
    (SPECS["gspo"], {"advantage": jnp.zeros((2, 3))}, "each sequence"),
    (SPECS["dapo"], {"advantage": jnp.zeros(3)}, "sequence or token"),
    (SPECS["dapo"], {"mask": jnp.ones((2, 4))}, "mask has shape")])
def test_inputs_that_do_not_match_the_spec_or_each_other_are_refused(spec, changes, message):
  zeros = jnp.zeros((2, 3))
  inputs = {"logp": zeros, "logp_old": zeros, "logp_ref": zeros, "mask": zeros,
            "advantage": jnp.zeros(2)}
  with pytest.raises(ValueError, match=message):
    policy_loss(**(inputs | changes), spec=spec)

"""PPO's advantages follow the papers' equations; a new value model predicts zero, and is causal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import model
from rl.value import init_value, ppo_advantages, predict
from tests.rl import small

MASK = np.array([[False, True, True, True, False], [True, True, False, False, False]])
LOG_RATIO = np.array([[9.0, 0.5, -0.5, 1.0, 9.0], [0.25, 0.75, 9.0, 9.0, 9.0]], np.float32)
VALUE = np.array([[9.0, 0.2, 0.4, 0.1, 9.0], [0.3, -0.1, 9.0, 9.0, 9.0]], np.float32)
REWARD = np.array([1.0, 0.0], np.float32)


def expected_returns(beta):
  """Returns the reward to go of every token, from which KL penalties to come are subtracted."""
  returns = np.zeros(MASK.shape)
  for s, row in enumerate(MASK):
    positions = np.flatnonzero(row)
    total = REWARD[s]
    for t in positions[::-1]:
      total -= beta * LOG_RATIO[s, t]
      returns[s, t] = total
  return returns


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_with_lambda_1_returns_are_the_rewards_to_go(beta):
  advantage, returns = ppo_advantages(REWARD, LOG_RATIO, VALUE, MASK, beta=beta, lam=1.0)
  np.testing.assert_allclose(np.where(MASK, returns, 0), expected_returns(beta), atol=1e-6)
  raw = (expected_returns(beta) - VALUE)[MASK]
  np.testing.assert_allclose(
      np.asarray(advantage)[MASK], (raw - raw.mean()) / raw.std(), atol=1e-5)
  assert (np.asarray(advantage)[~MASK] == 0).all()


def test_with_lambda_0_an_advantage_is_the_one_step_td_error():
  advantage, returns = ppo_advantages(REWARD, LOG_RATIO, VALUE, MASK, beta=0.0, lam=0.0)
  raw = np.array([0.4 - 0.2, 0.1 - 0.4, 1.0 - 0.1, -0.1 - 0.3, 0.0 + 0.1])
  np.testing.assert_allclose(
      np.asarray(advantage)[MASK], (raw - raw.mean()) / raw.std(), atol=1e-5)
  np.testing.assert_allclose(np.asarray(returns)[MASK], raw + VALUE[MASK], atol=1e-6)


def test_a_new_value_model_predicts_zero_and_is_causal():
  state = init_value(small.variables(), small.OPTIMIZER)
  tokens = np.array(tiny.tokens(small.MODEL, 2, 9))
  token_mask, net = np.ones((2, 8), bool), model.Transformer(small.MODEL)
  assert (np.asarray(predict(net, state.variables, tokens, token_mask)[0]) == 0).all()
  head = jax.tree.map(jnp.ones_like, state.params["head"])
  variables = {**state.variables, "params": {**state.params, "head": head}}
  first, _ = predict(net, variables, tokens, token_mask)
  tokens[:, 5:] = 1
  second, _ = predict(net, variables, tokens, token_mask)
  np.testing.assert_allclose(first[:, :5], second[:, :5], atol=1e-5)
  assert np.abs(np.asarray(first - second))[:, 5:].max() > 1e-2

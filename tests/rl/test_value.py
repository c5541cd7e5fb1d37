"""PPO's value model learns returns, and its advantages are what the papers' equations say."""

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
  """Reward to go, token by token, with the KL's penalty on the way."""
  returns = np.zeros(MASK.shape)
  for s, row in enumerate(MASK):
    places = np.flatnonzero(row)
    total = REWARD[s]
    for t in places[::-1]:
      total -= beta * LOG_RATIO[s, t]
      returns[s, t] = total
  return returns


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_with_lambda_1_returns_are_the_rewards_to_come(beta):
  advantage, returns = ppo_advantages(REWARD, LOG_RATIO, VALUE, MASK, beta=beta, lam=1.0)
  np.testing.assert_allclose(np.where(MASK, returns, 0), expected_returns(beta), atol=1e-6)
  raw = (expected_returns(beta) - VALUE)[MASK]
  np.testing.assert_allclose(
      np.asarray(advantage)[MASK], (raw - raw.mean()) / raw.std(), atol=1e-5)
  assert (np.asarray(advantage)[~MASK] == 0).all()


def test_with_lambda_0_an_advantage_is_an_error_of_one_step():
  advantage, returns = ppo_advantages(REWARD, LOG_RATIO, VALUE, MASK, beta=0.0, lam=0.0)
  raw = np.array([0.4 - 0.2, 0.1 - 0.4, 1.0 - 0.1, -0.1 - 0.3, 0.0 + 0.1])
  np.testing.assert_allclose(
      np.asarray(advantage)[MASK], (raw - raw.mean()) / raw.std(), atol=1e-5)
  np.testing.assert_allclose(np.asarray(returns)[MASK], raw + VALUE[MASK], atol=1e-6)


def test_a_new_value_model_knows_nothing_and_does_not_see_what_comes():
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

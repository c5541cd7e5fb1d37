"""PPO's value model, a network like the policy's with a scalar head, trained alongside the policy.

Shape letters:  S sequences  T tokens  D model width
"""

from typing import Any

import jax
import jax.numpy as jnp

from model import Transformer
from rl.advantages import gae
from train.config import OptimizerConfig
from train.losses import AuxOutputs, Sums
from train.step import TrainState, init_state


def init_value(variables: dict, optimizer: OptimizerConfig) -> TrainState:
  """Returns the state of a value model that starts as the policy's network with a zero head.

  Args:
    variables: the policy's variables.
    optimizer: the value model's optimizer.
  """
  width = variables["params"]["norm"]["scale"].shape[0]
  params = {"net": variables["params"], "head": {"w_D": jnp.zeros(width), "b": jnp.zeros(())}}
  return init_state({"params": params, "router": variables.get("router", {})}, optimizer)


def value_decays(decays: Any) -> dict:
  """Returns which of the value model's parameters have weight decay, given which of the policy's.

  Args:
    decays: a tree like the policy's parameters, of bools.
  """
  return {"net": decays, "head": {"w_D": True, "b": False}}


def predict(
    net: Transformer, variables: dict, tokens: jax.Array, token_mask: jax.Array,
) -> tuple[jax.Array, dict]:
  """Predicts the value of the state in which each next token is chosen.

  Args:
    net: the network.
    variables: the value model's variables.
    tokens: int32 [S, T + 1].
    token_mask: bool [S, T]; tokens outside it are padding.

  Returns:
    The values, float32 [S, T], and each router's loads, the tokens that its experts received.
  """
  params = variables["params"]
  output = net.apply({"params": params["net"], "router": variables["router"]}, tokens[:, :-1],
                     segment_ids_BT=token_mask.astype(jnp.int32), logits=False, mtp=False)
  value = output.hidden_BTD.astype(jnp.float32) @ params["head"]["w_D"] + params["head"]["b"]
  return value, {name: stats.load_BE.sum(-2) for name, stats in output.router.items()}


class ValueObjective:
  """Half the squared error of the values against the returns, as an objective of `train.step`.

  Its batches are `(experience, returns)`, with returns of shape [S, T].
  """

  def __init__(self, net: Transformer):
    self.net = net

  def denominators(self, batch) -> Sums:
    """Returns the number of learned tokens in the whole minibatch."""
    return {"value": jnp.maximum(batch[0].mask.sum(), 1).astype(jnp.float32)}

  def sums(self, variables: dict, batch) -> tuple[Sums, AuxOutputs]:
    """Returns the summed loss and the router loads of one micro-batch."""
    seen, returns = batch
    value, loads = predict(self.net, variables, seen.tokens, seen.token_mask)
    error = jnp.where(seen.mask, value - returns, 0)
    return {"value": 0.5 * (error**2).sum()}, AuxOutputs(loads)


def ppo_advantages(
    reward: jax.Array, log_ratio: jax.Array, value: jax.Array, mask: jax.Array, *,
    beta: float | jax.Array, lam: float | jax.Array) -> tuple[jax.Array, jax.Array]:
  """Computes PPO's advantages, normalised over all tokens, and the returns.

  The reward of a token is -beta x its KL to the reference, plus the output's own reward at its last
  token (DeepSeekMath eq. 2). There is no discount.

  Args:
    reward: [S], the reward of each output.
    log_ratio: [S, T], log pi_old - log pi_ref of the tokens, in nats.
    value: [S, T], the predicted values.
    mask: bool [S, T], True at the tokens to learn from.
    beta: weight of the KL.
    lam: GAE's lambda, see `rl.advantages.gae`.

  Returns:
    The advantages, of mean 0 and standard deviation 1 over the masked tokens, and the returns that
    the values are fitted to; both [S, T], and the advantages are 0 outside the mask.
  """
  places_T = jnp.arange(mask.shape[1])
  last_ST = mask & (places_T == jnp.where(mask, places_T, -1).max(1, keepdims=True))
  rewards = jnp.where(last_ST, reward[:, None], 0) - beta * jnp.where(mask, log_ratio, 0)
  advantage, returns = gae(rewards, jnp.where(mask, value, 0), mask, 1.0, lam)
  count = jnp.maximum(mask.sum(), 1)
  mean = advantage.sum() / count
  variance = (jnp.where(mask, advantage - mean, 0) ** 2).sum() / count
  scaled = jnp.where(mask, (advantage - mean) / jnp.sqrt(variance + 1e-8), 0)
  return scaled, returns

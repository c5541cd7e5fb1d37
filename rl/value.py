"""PPO's value model: the policy's network with a scalar head, trained beside it.

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
  """A value model that begins as the policy with a head of zeros."""
  width = variables["params"]["norm"]["scale"].shape[0]
  params = {"net": variables["params"], "head": {"w_D": jnp.zeros(width), "b": jnp.zeros(())}}
  return init_state({"params": params, "router": variables.get("router", {})}, optimizer)


def value_decays(decays: Any) -> dict:
  """Which of its parameters decay, given which of the policy's do."""
  return {"net": decays, "head": {"w_D": True, "b": False}}


def predict(
    net: Transformer, variables: dict, tokens: jax.Array, token_mask: jax.Array,
) -> tuple[jax.Array, dict]:
  """The value, float32 [S, T], of the state that each next token is chosen in; and router loads."""
  params = variables["params"]
  output = net.apply({"params": params["net"], "router": variables["router"]}, tokens[:, :-1],
                     segment_ids_BT=token_mask.astype(jnp.int32), logits=False, mtp=False)
  value = output.hidden_BTD.astype(jnp.float32) @ params["head"]["w_D"] + params["head"]["b"]
  return value, {name: stats.load_BE.sum(-2) for name, stats in output.router.items()}


class ValueObjective:
  """Half the squared distance to the returns, in the form that `train.step` takes.

  Its batches are `(experience, returns [S, T])`.
  """

  def __init__(self, net: Transformer):
    self.net = net

  def denominators(self, batch) -> Sums:
    """Tokens of the whole minibatch."""
    return {"value": jnp.maximum(batch[0].mask.sum(), 1).astype(jnp.float32)}

  def sums(self, variables: dict, batch) -> tuple[Sums, AuxOutputs]:
    """The term of one micro-batch."""
    seen, returns = batch
    value, loads = predict(self.net, variables, seen.tokens, seen.token_mask)
    error = jnp.where(seen.mask, value - returns, 0)
    return {"value": 0.5 * (error**2).sum()}, AuxOutputs(loads)


def ppo_advantages(
    reward: jax.Array, log_ratio: jax.Array, value: jax.Array, mask: jax.Array, *,
    beta: float | jax.Array, lam: float | jax.Array) -> tuple[jax.Array, jax.Array]:
  """Advantages, with mean 0 and standard deviation 1 over all tokens, and returns; [S, T].

  The reward of a token is -beta x its KL to the reference, and at the last one the output's own
  (DeepSeekMath eq. 2); nothing is discounted.

  Args:
    reward: [S], of each output.
    log_ratio: [S, T], log pi_old - log pi_ref of the tokens.
    value: [S, T].
    mask: bool [S, T].
    beta: of the KL.
    lam: GAE's lambda.
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

"""DeepSeekMoE (arXiv:2412.19437, section 2.1.2): three seams, each replaceable alone.

The *router* decides which experts see a token and with what weight. The *dispatch* brings tokens to
where those experts are and the results back: here nothing moves; over a mesh it is a collective.
The *experts* (model/experts.py) do the work on one device. A dispatch is any function

    dispatch(experts, weights, x_ND, gates_NK, experts_NK) -> y_ND

with `experts(weights, x_ND, gates_NK, experts_NK) -> y_ND` run once on every device, on its tokens.

Shape letters:  B batch  T tokens  N = B * T  D model width  E routed experts  K experts per token
                G expert groups  F expert width
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.balance import RouterStats
from model.config import ModelConfig, MoEConfig
from model.experts import EXPERTS, ExpertWeights
from model.layers import SwiGLU, recomputed, weight

Dispatch = Callable[[Callable, ExpertWeights, jax.Array, jax.Array, jax.Array], jax.Array]


class Routing(NamedTuple):
  """A routing decision."""

  gates_NK: jax.Array    # float32; V3's rows sum to route_scale
  experts_NK: jax.Array  # int32, distinct within a row


def scores(logits_NE: jax.Array, cfg: MoEConfig) -> jax.Array:
  """Affinities of tokens to experts: V3's sigmoid (eq. 15) or V2's softmax."""
  return jax.nn.sigmoid(logits_NE) if cfg.score == "sigmoid" else jax.nn.softmax(logits_NE)


def route(
    scores_NE: jax.Array, bias_E: jax.Array | float, cfg: MoEConfig,
    experts_NK: jax.Array | None = None) -> Routing:
  """Picks K experts per token among its best groups, and weighs them (eq. 13-16).

  The bias steers only the choice: gates come from the unbiased scores, so for a given choice the
  output, and every gradient, is independent of it.

  Args:
    scores_NE: affinities, float32.
    bias_E: balancing bias, float32; zero means plain top-k.
    cfg: see MoEConfig.
    experts_NK: a choice made before, which is weighed as if it were this one's; None to choose.
  """
  if experts_NK is None:
    biased_NE = jax.lax.stop_gradient(scores_NE) + bias_E
    experts_NK = jax.lax.top_k(_keep_groups(biased_NE, cfg), cfg.experts_per_token)[1]
  # A masked sum, whose gradient is another: a lookup's is a scatter into zeros.
  chosen_NKE = experts_NK[..., None] == jnp.arange(scores_NE.shape[-1])
  gates_NK = jnp.where(chosen_NKE, scores_NE[:, None], 0).sum(-1)
  if cfg.normalize_gates:
    gates_NK /= gates_NK.sum(-1, keepdims=True) + 1e-20
  return Routing(gates_NK * cfg.route_scale, experts_NK)


def _keep_groups(biased_NE: jax.Array, cfg: MoEConfig) -> jax.Array:
  """Sends the experts of all but the best groups to -inf (0 would do for positive scores only)."""
  if cfg.groups_per_token == cfg.num_groups:
    return biased_NE
  grouped = biased_NE.reshape(biased_NE.shape[0], cfg.num_groups, -1)
  best = 1 if cfg.group_score == "max" else min(2, grouped.shape[-1])
  group_scores_NG = jax.lax.top_k(grouped, best)[0].sum(-1)
  kept = jax.lax.top_k(group_scores_NG, cfg.groups_per_token)[1]
  kept_NG = jax.nn.one_hot(kept, cfg.num_groups, dtype=bool).any(-2)
  return jnp.where(kept_NG[..., None], grouped, -jnp.inf).reshape(biased_NE.shape)


def _count(experts_BTK: jax.Array, real_BT: jax.Array, num_experts: int) -> jax.Array:
  """Tokens of each sequence that chose each expert, padding left out: [B, E]."""
  counted = jnp.where(real_BT[..., None], experts_BTK, num_experts).reshape(len(experts_BTK), -1)
  zeros = jnp.zeros((len(counted), num_experts), jnp.int32)
  return zeros.at[jnp.arange(len(counted))[:, None], counted].add(1, mode="drop")


def router_stats(
    scores_BTE: jax.Array, experts_BTK: jax.Array, real_BT: jax.Array | None) -> RouterStats:
  """Counts and sums that the balancing losses and the bias update are made of (eq. 18-20)."""
  if real_BT is None:
    real_BT = jnp.ones(scores_BTE.shape[:2], bool)
  num_experts, num_chosen = scores_BTE.shape[-1], experts_BTK.shape[-1]
  top_BTK = jax.lax.top_k(jax.lax.stop_gradient(scores_BTE), num_chosen)[1]
  normalised_BTE = scores_BTE / (scores_BTE.sum(-1, keepdims=True) + 1e-20)
  return RouterStats(
      load_BE=_count(experts_BTK, real_BT, num_experts),
      top_BE=_count(top_BTK, real_BT, num_experts),
      affinity_BE=jnp.where(real_BT[..., None], normalised_BTE, 0).sum(1),
      tokens_B=real_BT.sum(1, dtype=jnp.int32), experts_BTK=experts_BTK)


@recomputed
def _gate_logits(x_BTD, centroids_DE):
  # The gate stays in float32: near 0.5 a bfloat16 step is 4x the bias rate.
  return jnp.einsum("btd,de->bte", x_BTD.astype(jnp.float32), centroids_DE.astype(jnp.float32),
                    precision=jax.lax.Precision.HIGHEST)


class Router(nn.Module):
  """Scores tokens against expert centroids and routes them.

  The balancing bias is the variable `bias` of the collection `router`: no gradient, no optimizer.
  """

  cfg: ModelConfig

  @nn.compact
  def __call__(
      self, x_BTD: jax.Array, experts_BTK: jax.Array | None = None) -> tuple[jax.Array, Routing]:
    """Returns float32 scores_BTE and the routing of the flattened tokens; see `route`."""
    moe = self.cfg.moe
    centroids_DE = weight(
        self, "centroids", self.cfg, ("embed", None), (x_BTD.shape[-1], moe.num_experts))
    scores_BTE = scores(_gate_logits(x_BTD, centroids_DE), moe)
    bias_E = 0.0
    if moe.balancing_bias:
      init = nn.with_logical_partitioning(nn.initializers.zeros, (None,))
      bias_E = self.variable(
          "router", "bias", init, jax.random.key(0), (moe.num_experts,), jnp.float32).value
    chosen_NK = None if experts_BTK is None else experts_BTK.reshape(-1, moe.experts_per_token)
    return scores_BTE, route(scores_BTE.reshape(-1, moe.num_experts), bias_E, moe, chosen_NK)


def local_dispatch(
    experts: Callable, weights: ExpertWeights, x_ND: jax.Array, gates_NK: jax.Array,
    experts_NK: jax.Array) -> jax.Array:
  """Every expert is here, and so is every token."""
  return experts(weights, x_ND, gates_NK, experts_NK)


class MoE(nn.Module):
  """Shared experts for every token, routed experts for some (eq. 12, without its residual)."""

  cfg: ModelConfig
  experts: str
  dispatch: Dispatch = local_dispatch

  @nn.compact
  def __call__(
      self, x_BTD: jax.Array, real_BT: jax.Array | None = None,
      experts_BTK: jax.Array | None = None) -> tuple[jax.Array, RouterStats]:
    cfg, moe = self.cfg, self.cfg.moe
    d_model, num_experts = x_BTD.shape[-1], moe.num_experts
    scores_BTE, routing = Router(cfg, name="router")(x_BTD, experts_BTK)
    weights = ExpertWeights(
        weight(self, "w_gate_up", cfg, ("expert", "embed", None, "mlp"),
               (num_experts, d_model, 2, moe.expert_dim)),
        weight(self, "w_down", cfg, ("expert", "mlp", "embed"),
               (num_experts, moe.expert_dim, d_model)))
    ffn = functools.partial(EXPERTS[self.experts], numerics=cfg.numerics)
    y_BTD = self.dispatch(ffn, weights, x_BTD.reshape(-1, d_model), *routing).reshape(x_BTD.shape)
    if moe.num_shared_experts:
      y_BTD += SwiGLU(cfg, moe.shared_dim, name="shared")(x_BTD)
    experts_BTK = routing.experts_NK.reshape(*x_BTD.shape[:2], -1)
    return y_BTD, router_stats(scores_BTE, experts_BTK, real_BT)

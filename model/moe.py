"""DeepSeekMoE (arXiv:2412.19437, section 2.1.2) in three parts, each replaceable independently.

The *router* decides which experts compute a token, and with which weights. The *dispatch* moves
tokens to the devices of their experts, and the results back: on one device nothing moves, on a mesh
it is a collective. The *experts* (model/experts.py) compute on one device. A dispatch is any
function

    dispatch(experts, weights, x_ND, gates_NK, experts_NK) -> y_ND

that runs `experts(weights, x_ND, gates_NK, experts_NK) -> y_ND` once on every device, on the tokens
of that device. Equation numbers are those of the paper.

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
from model.experts import EXPERTS, ExpertWeights, fastest_experts
from model.layers import SwiGLU, recomputed, weight
from model.wide_product import wide_product

Dispatch = Callable[[Callable, ExpertWeights, jax.Array, jax.Array, jax.Array], jax.Array]


class Routing(NamedTuple):
  """The routed experts of every token, and their weights.

  Attributes:
    gates_NK: float32, the weights; with normalised gates, as in V3, rows sum to `route_scale`.
    experts_NK: int32, indices of the experts, distinct within a row.
  """

  gates_NK: jax.Array
  experts_NK: jax.Array


def scores(logits_NE: jax.Array, cfg: MoEConfig) -> jax.Array:
  """Returns the affinities of tokens to experts: V3's sigmoid (eq. 15) or V2's softmax.

  Args:
    logits_NE: float32, products of tokens and centroids; leading axes are kept.
    cfg: names the function, in `score`.
  """
  return jax.nn.sigmoid(logits_NE) if cfg.score == "sigmoid" else jax.nn.softmax(logits_NE)


def route(
    scores_NE: jax.Array, bias_E: jax.Array | float, cfg: MoEConfig,
    experts_NK: jax.Array | None = None) -> Routing:
  """Chooses K experts per token from its best groups, and computes their gates (eq. 13-16).

  The bias affects only the choice. Gates come from the unbiased scores, so that for a given choice
  neither the output nor any gradient depends on the bias.

  Args:
    scores_NE: float32, affinities of tokens to experts.
    bias_E: float32, the balancing bias; zero for top-K of the scores alone.
    cfg: the routing's parameters.
    experts_NK: int32, experts that were chosen before, for which gates are computed as if they had
      been chosen here; None to choose.

  Returns:
    The chosen experts and their gates.
  """
  if experts_NK is None:
    biased_NE = jax.lax.stop_gradient(scores_NE) + bias_E
    experts_NK = jax.lax.top_k(_keep_groups(biased_NE, cfg), cfg.experts_per_token)[1]
  # A masked sum, whose gradient is a masked sum too; that of a gather is a scatter into zeros.
  chosen_NKE = experts_NK[..., None] == jnp.arange(scores_NE.shape[-1])
  gates_NK = jnp.where(chosen_NKE, scores_NE[:, None], 0).sum(-1)
  if cfg.normalize_gates:
    gates_NK /= gates_NK.sum(-1, keepdims=True) + 1e-20
  return Routing(gates_NK * cfg.route_scale, experts_NK)


def _keep_groups(biased_NE: jax.Array, cfg: MoEConfig) -> jax.Array:
  """Sets the scores of experts outside each token's best groups to -inf.

  Zero would exclude them only if all biased scores were positive, and they may be negative.
  """
  if cfg.groups_per_token == cfg.num_groups:
    return biased_NE
  grouped = biased_NE.reshape(biased_NE.shape[0], cfg.num_groups, -1)
  best = 1 if cfg.group_score == "max" else min(2, grouped.shape[-1])
  group_scores_NG = jax.lax.top_k(grouped, best)[0].sum(-1)
  kept = jax.lax.top_k(group_scores_NG, cfg.groups_per_token)[1]
  kept_NG = jax.nn.one_hot(kept, cfg.num_groups, dtype=bool).any(-2)
  return jnp.where(kept_NG[..., None], grouped, -jnp.inf).reshape(biased_NE.shape)


def _count(experts_BTK: jax.Array, real_BT: jax.Array, num_experts: int) -> jax.Array:
  """Returns how many tokens of each sequence chose each expert, padding excluded: [B, E]."""
  counted = jnp.where(real_BT[..., None], experts_BTK, num_experts).reshape(len(experts_BTK), -1)
  zeros = jnp.zeros((len(counted), num_experts), jnp.int32)
  return zeros.at[jnp.arange(len(counted))[:, None], counted].add(1, mode="drop")


def router_stats(
    scores_BTE: jax.Array, experts_BTK: jax.Array, real_BT: jax.Array | None) -> RouterStats:
  """Computes what balancing losses and the bias update need of a router (eq. 18-20).

  Args:
    scores_BTE: float32, affinities of tokens to experts.
    experts_BTK: int32, the experts that tokens were sent to.
    real_BT: false for padding tokens, which are not counted; None if there are none.

  Returns:
    The statistics, of which only `affinity_BE` carries a gradient.
  """
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
  # As accurate as float32 whatever the numerics: just above a score of 0.5, bfloat16 values are 4
  # times as far apart as one step of the balancing bias (1e-3).
  return wide_product(x_BTD, centroids_DE)


class Router(nn.Module):
  """Scores tokens against the experts' centroids, and routes them.

  The balancing bias is the variable `bias` of the collection `router`. It has no gradient, and no
  optimizer updates it; see `model.balance.update_bias`.
  """

  cfg: ModelConfig

  @nn.compact
  def __call__(
      self, x_BTD: jax.Array, experts_BTK: jax.Array | None = None) -> tuple[jax.Array, Routing]:
    """Routes tokens.

    Args:
      x_BTD: the FFN's input.
      experts_BTK: int32, experts to use; None to choose them.

    Returns:
      scores_BTE, float32, and the routing of the N = B * T tokens.
    """
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
  """The dispatch on one device, which has all experts and all tokens, so that nothing moves."""
  return experts(weights, x_ND, gates_NK, experts_NK)


class MoE(nn.Module):
  """The sum of shared and routed experts (eq. 12 without its residual connection).

  Attributes:
    cfg: the architecture; its `moe` must not be None.
    experts: implementation of the routed experts, a key of `model.experts.EXPERTS`; None for that
      which `model.experts.fastest_experts` returns.
    dispatch: how tokens reach experts on other devices; see the module's docstring.
  """

  cfg: ModelConfig
  experts: str | None
  dispatch: Dispatch = local_dispatch

  @nn.compact
  def __call__(
      self, x_BTD: jax.Array, real_BT: jax.Array | None = None,
      experts_BTK: jax.Array | None = None) -> tuple[jax.Array, RouterStats]:
    """Computes the experts and the router's statistics.

    Args:
      x_BTD: the FFN's input.
      real_BT: false for padding tokens, which statistics leave out; None if there are none.
      experts_BTK: int32, experts to use; None to let the router choose.

    Returns:
      The output [B, T, D], and the statistics.
    """
    cfg, moe = self.cfg, self.cfg.moe
    d_model, num_experts = x_BTD.shape[-1], moe.num_experts
    scores_BTE, routing = Router(cfg, name="router")(x_BTD, experts_BTK)
    weights = ExpertWeights(
        weight(self, "w_gate_up", cfg, ("expert", "expert_embed", None, "mlp"),
               (num_experts, d_model, 2, moe.expert_dim)),
        weight(self, "w_down", cfg, ("expert", "mlp", "expert_embed"),
               (num_experts, moe.expert_dim, d_model)))
    name = self.experts or fastest_experts(cfg, x_BTD.shape[0] * x_BTD.shape[1])
    ffn = functools.partial(EXPERTS[name], numerics=cfg.numerics)
    y_BTD = self.dispatch(ffn, weights, x_BTD.reshape(-1, d_model), *routing).reshape(x_BTD.shape)
    if moe.num_shared_experts:
      y_BTD += SwiGLU(cfg, moe.shared_dim, name="shared")(x_BTD)
    experts_BTK = routing.experts_NK.reshape(*x_BTD.shape[:2], -1)
    return y_BTD, router_stats(scores_BTE, experts_BTK, real_BT)

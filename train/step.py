"""One pure optimizer step, around any objective that is a weighted sum of named terms."""

from collections.abc import Callable
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import optax

from model import Transformer, balance
from train.config import OptimizerConfig
from train.optimizer import Moments, adamw, init_moments

Tree = Any


@flax.struct.dataclass
class TrainState:
  """All that training changes. With several seeds, every array has a leading axis for them.

  Attributes:
    step: int32, steps taken, skipped ones too.
    skipped: int32, steps whose loss or gradient was not finite.
    params: float32 masters.
    router: balancing biases.
    moments: see `train.optimizer.Moments`.
    ema: an exponential moving average of the parameters, or None.
  """

  step: jax.Array
  skipped: jax.Array
  params: Tree
  router: Tree
  moments: Moments
  ema: Tree | None

  @property
  def variables(self) -> dict:
    return {"params": self.params, "router": self.router}


class Objective(Protocol):
  """What is minimised: sum over terms of weight x sum / denominator."""

  def denominators(self, batch: Tree) -> dict[str, jax.Array]:
    """Of the whole batch, its micro-batches along the leading axis."""

  def sums(self, variables: dict, batch: Tree) -> tuple[dict[str, jax.Array], Any]:
    """Terms of one micro-batch, and an AuxOutputs whose leaves are added up."""


def init_state(variables: dict, cfg: OptimizerConfig) -> TrainState:
  """The state before the first step."""
  # Copies, since a step donates its state, and the caller may go on using the variables.
  params = jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), variables["params"])
  router = jax.tree.map(lambda b: jnp.array(b, copy=True), variables.get("router", {}))
  ema = jax.tree.map(jnp.copy, params) if cfg.ema_decay else None
  return TrainState(
      step=jnp.int32(0), skipped=jnp.int32(0), params=params, router=router,
      moments=init_moments(params, cfg), ema=ema)


def unstack_layers(net: Transformer) -> Callable[[Tree], Tree]:
  """`net.by_layer` on a GPU; elsewhere to join the gradients is one more pass over them."""
  return net.by_layer if jax.default_backend() == "gpu" else lambda params: params


def make_train_step(
    objective: Objective, cfg: OptimizerConfig, decays: Tree, num_micro_batches: int = 1, *,
    prepare: Callable[[Tree], dict] = lambda params: {},
    by_layer: Callable[[Tree], Tree] = lambda params: params,
) -> Callable[[TrainState, Tree, dict], tuple[TrainState, dict]]:
  """Returns `train_step(state, batch, hyper) -> state, metrics`, to be jitted or mapped over seeds.

  The batch's leaves lead with an axis of `num_micro_batches`; `hyper` is what
  `train.optimizer.Schedule` gives, and its "num_micro_batches" says how many of them count. A step
  whose loss or gradient is not finite changes nothing, the balancing bias included. `prepare` makes
  of parameters, once a step, variables that the objective is given beside them as constants, such
  as `model.quantize_weights`. `by_layer` arranges parameters, linearly, as the objective is given
  them and their gradients are measured; see `unstack_layers`.
  """

  def loss_and_grads(state, params, prepared, micro, weights, denominators):
    def loss(params):
      variables = {"params": params, "router": state.router, **prepared}
      sums, observed = objective.sums(variables, micro)
      terms = {name: value / denominators[name] for name, value in sums.items()}
      return sum(weights[name] * value for name, value in terms.items()), (terms, observed)

    (total, (terms, observed)), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return {"total": total, **terms}, observed, grads

  def accumulate(state, params, batch, hyper):
    denominators = objective.denominators(batch)
    prepared = prepare(state.params)
    one = lambda i: loss_and_grads(state, params, prepared, jax.tree.map(lambda x: x[i], batch),
                                   hyper["weights"], denominators)
    if num_micro_batches == 1:
      return one(0)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, 0))
    add = lambda i, sums: jax.tree.map(jnp.add, sums, one(i))
    return jax.lax.fori_loop(0, hyper["num_micro_batches"], add, zeros)

  def train_step(state: TrainState, batch: Tree, hyper: dict) -> tuple[TrainState, dict]:
    params, joined = jax.vjp(by_layer, state.params)
    terms, observed, grads = accumulate(state, params, batch, hyper)
    grad_norm = optax.tree.norm(grads)
    grads, = joined(grads)
    finite = jnp.isfinite(terms["total"]) & jnp.isfinite(grad_norm)
    scale = jnp.minimum(1.0, cfg.max_grad_norm / jnp.maximum(grad_norm, 1e-30))
    with jax.named_scope("optimizer"):
      params, moments = adamw(
          jax.tree.map(lambda g: g * scale, grads), state.moments, state.params,
          state.step - state.skipped, hyper["learning_rate"], decays, cfg)
    ema = state.ema
    if ema is not None:
      ema = jax.tree.map(lambda e, p: cfg.ema_decay * e + (1 - cfg.ema_decay) * p, ema, params)
    after = TrainState(
        step=state.step, skipped=state.skipped, params=params,
        router=_update_router(state.router, observed.loads, hyper["bias_rate"]),
        moments=moments, ema=ema)
    after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, state)
    after = after.replace(step=state.step + 1, skipped=state.skipped + ~finite)
    metrics = {"loss": terms.pop("lm", terms["total"]), **_named(terms), "grad_norm": grad_norm,
               "skipped": after.skipped, **_load_metrics(observed.loads),
               **{name: total / jnp.maximum(count, 1)
                  for name, (total, count) in observed.means.items()}}
    return after, metrics

  return train_step


def _named(terms: dict) -> dict:
  return {f"loss_{name}": value for name, value in terms.items()}


def _update_router(router: Tree, loads: dict[str, jax.Array], rate: jax.Array) -> Tree:
  """The biases after a step, from the whole batch's loads: each router's sits under its stack."""
  def one(path, bias_E):
    return balance.update_bias(bias_E, loads[path[0].key], rate)

  return jax.tree_util.tree_map_with_path(one, router)


def _load_metrics(loads: dict[str, jax.Array]) -> dict:
  """The trunk's MaxVio on this batch, averaged over layers and by layer."""
  if "moe_layers" not in loads:
    return {}
  violation_L = balance.max_violation(loads["moe_layers"])
  return {"max_violation": violation_L.mean(), "max_violation_by_layer": violation_L}

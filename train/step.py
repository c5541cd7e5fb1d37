"""The optimizer step: a pure function, for any objective that is a weighted sum of named terms."""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from model import Transformer, balance
from pallas_kernels.targets import target
from train.config import OptimizerConfig
from train.optimizer import Moments, adamw, init_moments

Tree = Any


@flax.struct.dataclass
class TrainState:
  """Everything that a step changes. With several seeds, every array has a leading axis of seeds.

  Attributes:
    step: int32 scalar, number of steps taken, skipped ones included.
    skipped: int32 scalar, number of steps skipped because their loss or gradient was not finite.
    params: float32 master weights, the collection "params".
    router: biases of loss-free balancing, the collection "router"; {} without experts.
    moments: AdamW's moments of the parameters.
    ema: exponential moving average of the parameters; None if none is kept.
  """

  step: jax.Array
  skipped: jax.Array
  params: Tree
  router: Tree
  moments: Moments
  ema: Tree | None

  @property
  def variables(self) -> dict:
    """The collections with which the model is applied."""
    return {"params": self.params, "router": self.router}


class Objective(Protocol):
  """What is minimised: the sum over named terms of weight x sum / denominator."""

  def denominators(self, batch: Tree) -> dict[str, jax.Array]:
    """Returns the denominator of each term, a scalar, for a whole batch.

    The leading axis of the batch's arrays is that of its micro-batches.
    """

  def sums(self, variables: dict, batch: Tree) -> tuple[dict[str, jax.Array], Any]:
    """Returns the sum of each term over one micro-batch, and an AuxOutputs.

    Over the micro-batches of a step, both are added up leaf by leaf.
    """


def init_state(variables: dict, cfg: OptimizerConfig) -> TrainState:
  """Returns the state before the first step, from initial variables."""
  # Copies, because a step donates its state and the caller may continue to use the variables.
  params = jax.tree.map(lambda p: _copy(p, np.float32), variables["params"])
  router = jax.tree.map(lambda b: _copy(b, b.dtype), variables.get("router", {}))
  ema = jax.tree.map(jnp.copy, params) if cfg.ema_decay else None
  return TrainState(
      step=jnp.int32(0), skipped=jnp.int32(0), params=params, router=router,
      moments=init_moments(params, cfg), ema=ema)


def nudged(variables: dict) -> dict:
  """Returns variables with every parameter moved to the next larger number of its format."""
  larger = lambda p: jnp.nextafter(p, jnp.full_like(p, jnp.inf))
  return {**variables, "params": jax.tree.map(larger, variables["params"])}


def _copy(x: jax.Array | np.ndarray, dtype) -> jax.Array:
  # What is copied on the host needs no program, of which there would be one for every shape.
  if isinstance(x, np.ndarray):
    return jax.device_put(np.array(x, dtype))
  return jnp.array(x, dtype, copy=True)


def unstack_layers(net: Transformer) -> Callable[[Tree], Tree]:
  """Returns `net.by_layer` on a GPU, and elsewhere the identity.

  On other backends, joining the gradients of single layers is an additional pass over them.
  """
  return net.by_layer if target().platform == "gpu" else lambda params: params


def make_train_step(
    objective: Objective, cfg: OptimizerConfig, decays: Tree, num_micro_batches: int = 1, *,
    prepare: Callable[[Tree], dict] = lambda params: {},
    by_layer: Callable[[Tree], Tree] = lambda params: params,
    on_each_device: Callable[[Callable], Callable] = lambda function: function,
) -> Callable[[TrainState, Tree, dict], tuple[TrainState, dict]]:
  """Returns `train_step(state, batch, hyper) -> (state, metrics)`, to be jitted or vmapped.

  The leaves of `batch` have a leading axis of `num_micro_batches`. `hyper` has the values of
  `train.optimizer.Schedule` and, as "num_micro_batches", the number of micro-batches to use. A step
  whose loss or gradient is not finite is skipped: it changes nothing but the two counters of the
  state, not even the balancing biases.

  The metrics are "loss" (the term "lm" or, without one, the total), "loss_NAME" of the other terms
  and the total, "grad_norm" before scaling, "skipped", MaxVio and the objective's own means.

  Args:
    objective: the terms to minimise.
    cfg: AdamW's constants, the largest gradient norm and the decay of the EMA.
    decays: a bool for every parameter, whether weight decay applies (`train.optimizer.decay_mask`).
    num_micro_batches: size of the batch's leading axis.
    prepare: makes further variables from the parameters, once per step, which the objective is
      given as constants, such as `model.quantize_weights`.
    by_layer: rearranges the parameters, linearly, into the tree that the objective is given and in
      which the gradient norm is computed; see `unstack_layers`.
    on_each_device: see `train.mesh.ShardedModel.on_each_device`; the default is for a single
      device, and for meshes over which the compiler divides the step.
  """
  def train_step(state: TrainState, batch: Tree, hyper: dict) -> tuple[TrainState, dict]:
    params, join_gradients = jax.vjp(by_layer, state.params)
    shared = (state.replace(moments=None, ema=None), params, hyper["weights"],
              objective.denominators(batch))
    num = hyper["num_micro_batches"] if num_micro_batches > 1 else None
    terms, observed, grads = on_each_device(
        functools.partial(_gradients, objective, prepare, num))(shared, batch)
    grad_norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
    grads, = join_gradients(grads)
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


def _gradients(
    objective: Objective, prepare: Callable[[Tree], dict], num: jax.Array | None, shared: tuple,
    batch: Tree) -> tuple[dict[str, jax.Array], Any, Tree]:
  """Returns the terms, what else was observed, and the gradients, summed over micro-batches.

  Args:
    objective, prepare: see `make_train_step`.
    num: the number of micro-batches that are used; None if the batch has a single one.
    shared: the state, the parameters by which the loss is differentiated, and the weights and
      denominators of the terms.
    batch: the micro-batches.
  """
  state, params, weights, denominators = shared
  prepared = prepare(state.params)

  def one(index):
    def loss(params):
      variables = {"params": params, "router": state.router, **prepared}
      sums, observed = objective.sums(variables, jax.tree.map(lambda x: x[index], batch))
      terms = {name: value / denominators[name] for name, value in sums.items()}
      return sum(weights[name] * value for name, value in terms.items()), (terms, observed)

    (total, (terms, observed)), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return {"total": total, **terms}, observed, grads

  if num is None:
    return one(0)
  # In a shard_map, zeros must vary over devices as the sums do.
  zeros = jax.tree.map(lambda x: lax.full_like(state.step, 0, x.dtype, x.shape),
                       jax.eval_shape(one, 0))
  return lax.fori_loop(0, num, lambda i, sums: jax.tree.map(jnp.add, sums, one(i)), zeros)


def _named(terms: dict) -> dict:
  return {f"loss_{name}": value for name, value in terms.items()}


def _update_router(router: Tree, loads: dict[str, jax.Array], rate: jax.Array) -> Tree:
  """Returns the balancing biases after a step, from the loads of the whole batch.

  The first key in a bias' path is its layer stack, which is also the key of its loads.
  """
  def one(path, bias_E):
    return balance.update_bias(bias_E, loads[path[0].key], rate)

  return jax.tree_util.tree_map_with_path(one, router)


def _load_metrics(loads: dict[str, jax.Array]) -> dict:
  """Returns the main model's MaxVio on this batch, averaged over layers and by layer."""
  if "moe_layers" not in loads:
    return {}
  violation_L = balance.max_violation(loads["moe_layers"])
  return {"max_violation": violation_L.mean(), "max_violation_by_layer": violation_L}

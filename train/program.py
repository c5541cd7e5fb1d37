"""The compiled program of training, for one run or for several that train as a vmapped batch.

The runs of a vmapped batch share one program: they may differ only in their seeds and in the
hyper-parameters that enter the step as data. Their arrays have a leading axis of runs; those of a
single run do not.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import model
from model import compiling
from train.config import RunConfig
from train.evaluate import Evaluation, Evaluator, count
from train.losses import Batch, LanguageModelLoss
from train.mesh import ShardedModel, make_sharded_model
from train.optimizer import Schedule, decay_mask
from train.step import TrainState, init_state, make_train_step, nudged, unstack_layers

_EVALUATION_TOKENS = 16384  # tokens evaluated at a time, over all runs

# Fields that enter the step as data, so that runs of a vmapped batch may differ in them.
DATA_FIELDS = {
    "optimizer": ("learning_rate", "schedule", "warmup_fraction", "warmup_steps", "decay_steps",
                  "final_ratio"),
    "balance": ("bias_rate", "bias_fraction", "sequence_weight", "batch_weight", "expert_weight"),
    "train": ("seed", "nudge", "mtp_weight", "mtp_late_weight", "mtp_fraction"),
}


def static_config(cfg: RunConfig) -> RunConfig:
  """Returns a config with the default of every field that enters the step as data.

  Configs for which the results are equal share one program.
  """
  return dataclasses.replace(cfg, **{
      section: without_data_fields(getattr(cfg, section), section) for section in DATA_FIELDS})


def without_data_fields[T](part: T, section: str) -> T:
  """Returns a section of a config, with the default of every field that enters the step as data.

  Args:
    part: the section, such as `cfg.optimizer`.
    section: its name, a key of DATA_FIELDS.
  """
  defaults = {field.name: field.default for field in dataclasses.fields(part)}
  return dataclasses.replace(part, **{name: defaults[name] for name in DATA_FIELDS[section]})


def _differentiated(cfg: RunConfig, net: model.Transformer, summed: bool) -> Callable:
  """Returns the argument `by_layer` of `make_train_step`.

  A pass computes gradients of weights in the compute format, so that devices may add them up in it,
  which takes half the time of float32. Sums over micro-batches stay in float32, and so do those of
  the embedding and the head, which are used more than once.

  Args:
    cfg: the run.
    net: the network.
    summed: whether devices add up the gradients, each of which has all parameters.
  """
  by_layer = unstack_layers(net)
  if not summed or cfg.train.num_micro_batches > 1:
    return by_layer

  def arranged(params):
    layers = {name: each for name, each in params.items() if name != "embedding"}
    return by_layer(params | model.cast_weights(cfg.model, {"params": layers})["params"])

  return arranged


@functools.lru_cache(maxsize=8)
def _compiled(cfg: RunConfig, num_runs: int) -> tuple[ShardedModel | None, Callable, Callable]:
  """Returns the sharded model (None without a mesh), the jitted step and the jitted `count`.

  They are cached, so that equal configs are compiled once.
  """
  mesh = _make_mesh(cfg, num_runs)
  alone = functools.partial(model.Transformer, cfg.model)
  net = mesh.transformer if mesh else alone
  jit = mesh.jit if mesh else compiling.jit
  by_device = mesh is not None and mesh.shares_parameters
  trained = (alone if by_device else net)(
      remat=cfg.train.remat, unroll=cfg.train.unroll, attend=cfg.train.attend)
  step = make_train_step(
      LanguageModelLoss(trained), cfg.optimizer, decay_mask(cfg.model),
      cfg.train.num_micro_batches, prepare=functools.partial(model.quantize_weights, cfg.model),
      by_layer=_differentiated(cfg, trained, summed=by_device),
      **({"on_each_device": mesh.on_each_device} if by_device else {}))
  counts = functools.partial(count, net(attend=cfg.train.attend))
  if num_runs > 1:
    hyper = {"learning_rate": 0, "bias_rate": 0, "weights": 0, "num_micro_batches": None}
    step = jax.vmap(step, in_axes=(0, 0, hyper))
    counts = jax.vmap(counts, in_axes=(0, None))
  tuned = compiling.is_tuned(cfg.model, cfg.train.unroll)
  return mesh, jit(step, donate_argnums=0, tuned=tuned), jit(counts)


def _make_mesh(cfg: RunConfig, num_runs: int) -> ShardedModel | None:
  if num_runs > 1 and not cfg.mesh.is_single_device:
    raise ValueError("several seeds train as a vmapped batch, which needs a single device: with "
                     f"{cfg.mesh} run one seed at a time")
  mesh = make_sharded_model(cfg.model, cfg.mesh)
  rows = cfg.train.batch_size // cfg.train.num_micro_batches
  if mesh and rows % mesh.batch_devices:
    raise ValueError(f"{rows} sequences at a time do not divide over {mesh.batch_devices} devices: "
                     "change train.batch_size or train.micro_batch_size")
  return mesh


class Program:
  """Everything that is compiled for a run, or for several runs that train as a vmapped batch.

  Args:
    configs: one config per run.
    heldout: validation rows by domain, see `train.data.Data`.

  Raises:
    ValueError: if the runs need different programs, if several runs have a mesh, or if the mesh
      does not fit the devices or the batch.
  """

  def __init__(self, configs: Sequence[RunConfig], heldout: Mapping[str, Any]):
    self.cfg, self.num_runs = configs[0], len(configs)
    if any(static_config(cfg) != static_config(self.cfg) for cfg in configs):
      allowed = [f"{part}.{name}" for part, names in DATA_FIELDS.items() for name in names]
      raise ValueError(f"runs of a vmapped batch may differ in {', '.join(allowed)} only")
    self._starts = [(cfg.train.seed, cfg.train.nudge) for cfg in configs]
    self._schedules = [Schedule(cfg) for cfg in configs]
    self._mesh, self._step, count = _compiled(static_config(self.cfg), self.num_runs)
    rows = max(1, _EVALUATION_TOKENS // (self.cfg.data.seq_len * self.num_runs))
    self.evaluate = Evaluator(count, heldout, batch_size=rows, several=self.num_runs > 1,
                              masked=self.cfg.data.sample_masking)

  def init(self, variables: dict | None = None) -> TrainState:
    """Returns the state before the first step.

    Args:
      variables: initial variables of all runs; None for random ones, from each run's seed.
    """
    def one(seed, nudge):
      start = variables or model.init_on_host(self.cfg.model, seed)
      return init_state(nudged(start) if nudge else start, self.cfg.optimizer)

    if self.num_runs == 1:
      return self._place(one(*self._starts[0]))
    return jax.tree.map(lambda *runs: jnp.stack(runs), *(one(*start) for start in self._starts))

  def abstract_state(self) -> TrainState:
    """Returns the state's shapes, dtypes and shardings, from which a checkpoint is restored."""
    shapes = jax.eval_shape(lambda variables: init_state(variables, self.cfg.optimizer),
                            model.abstract_variables(self.cfg.model))
    if self.num_runs > 1:
      return jax.tree.map(
          lambda x: jax.ShapeDtypeStruct((self.num_runs, *x.shape), x.dtype), shapes)
    if not self._mesh:
      return shapes
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=sharding), shapes, self._mesh.train_state(shapes))

  def step(self, state: TrainState, index: int, batch: Mapping[str, np.ndarray],
           ) -> tuple[TrainState, dict]:
    """Takes one optimizer step; the state passed in is donated.

    Args:
      state: the state before the step.
      index: index of the step, from 0; it determines the hyper-parameters.
      batch: rows as `train.data.batches` yields them: [B, ...] or, for several runs,
        [runs, B, ...]. B is `batch_size(index)`, which is smaller while the batch ramps up.

    Returns:
      The state after the step, and its metrics.
    """
    return self._step(state, *self.step_arguments(index, batch))

  def lower(self) -> jax.stages.Lowered:
    """Returns the training step, lowered for abstract arguments without allocating anything.

    It can be compiled ahead of time or analysed. The executable that `compile()` returns takes a
    state, the micro-batches and the hyper-parameters (`step_arguments`).
    """
    return self._step.lower(self.abstract_state(), *self.abstract_step_arguments())

  def compute_config(self) -> RunConfig:
    """Returns the run's config with parameters in the compute format, for `lower_gradients`."""
    numerics = self.cfg.model.numerics
    return dataclasses.replace(self.cfg, model=dataclasses.replace(
        self.cfg.model, numerics=dataclasses.replace(numerics, params=numerics.compute)))

  def lower_gradients(self) -> jax.stages.Lowered:
    """Returns a forward and a backward pass, lowered like the step: the gradients of the loss.

    Its arguments are those of the step, but with variables of `compute_config`'s model in place of
    the state. Of the micro-batches it processes the first only.
    """
    cfg = self.compute_config()
    mesh = self._mesh and dataclasses.replace(self._mesh, cfg=cfg.model)
    variables = model.abstract_variables(cfg.model)
    if mesh:
      variables = jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(
          x.shape, x.dtype, sharding=sharding), variables, mesh.variables())
    net = mesh.transformer if mesh else functools.partial(model.Transformer, cfg.model)
    objective = LanguageModelLoss(
        net(remat=cfg.train.remat, unroll=cfg.train.unroll, attend=cfg.train.attend))

    def gradients(variables, batch, hyper):
      micro = jax.tree.map(lambda x: x[0], batch)
      denominators = objective.denominators(micro)

      def loss(params):
        sums, _ = objective.sums({**variables, "params": params}, micro)
        return sum(hyper["weights"][name] * value / denominators[name]
                   for name, value in sums.items())

      return jax.grad(loss)(objective.model.by_layer(variables["params"]))

    jit = mesh.jit if mesh else compiling.jit
    return jit(gradients).lower(variables, *self.abstract_step_arguments())

  def abstract_step_arguments(self) -> tuple[Batch, dict]:
    """Returns shapes, dtypes and shardings of the micro-batches and the hyper-parameters."""
    train, length = self.cfg.train, self.cfg.data.seq_len
    runs = (self.num_runs,) if self.num_runs > 1 else ()
    lead = (*runs, train.num_micro_batches, train.batch_size // train.num_micro_batches)
    array = lambda width, dtype: jax.ShapeDtypeStruct(
        (*lead, width), dtype, sharding=self._micro_batch_sharding())
    segments = array(length, np.int32) if self.cfg.data.sample_masking else None
    hyper = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), self._hyper(0))
    return Batch(array(length + 1, np.int32), array(length, bool), segments), hyper

  def step_arguments(self, index: int, batch: Mapping[str, np.ndarray]) -> tuple[Batch, dict]:
    """Returns what the compiled step takes besides the state: micro-batches, hyper-parameters.

    Args:
      index: index of the step, from 0.
      batch: rows as for `step`.
    """
    return self._micro_batches(batch), self._hyper(index)

  def _hyper(self, index: int) -> dict:
    hyper = [schedule[index] for schedule in self._schedules]
    stacked = (jax.tree.map(lambda *values: np.stack(values), *hyper) if self.num_runs > 1
               else hyper[0])
    return {**stacked, "num_micro_batches": np.int32(self.num_micro_batches(index))}

  def num_micro_batches(self, index: int) -> int:
    """Returns the number of micro-batches of step `index`."""
    return self._schedules[0].num_micro_batches(index)

  def batch_size(self, index: int) -> int:
    """Returns the number of sequences per run that step `index` takes."""
    train = self.cfg.train
    return train.batch_size // train.num_micro_batches * self.num_micro_batches(index)

  def hyper(self, index: int) -> list[dict]:
    """Returns every run's hyper-parameters at step `index`, for the run's records."""
    return [schedule[index] for schedule in self._schedules]

  def _micro_batches(self, batch: Mapping[str, np.ndarray]) -> Batch:
    axis, train = int(self.num_runs > 1), self.cfg.train
    num_micro = train.num_micro_batches

    def split(x):
      missing = train.batch_size - x.shape[axis]
      x = np.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
      x = x.reshape(*x.shape[:axis], num_micro, -1, *x.shape[axis + 1:])
      sharding = self._micro_batch_sharding()
      return jax.device_put(x, sharding) if sharding else x

    segments = batch["segments"] if self.cfg.data.sample_masking else None
    return Batch(split(batch["tokens"]), split(batch["loss_mask"]),
                 None if segments is None else split(segments))

  def _micro_batch_sharding(self) -> NamedSharding | None:
    if not self._mesh:
      return None
    return NamedSharding(self._mesh.mesh, PartitionSpec(None, *self._mesh.batch().spec))

  def _place(self, state: TrainState) -> TrainState:
    return jax.device_put(state, self._mesh.train_state(state)) if self._mesh else state


def split_runs(variables: dict, num_runs: int) -> list[dict]:
  """Returns the variables of each run of a vmapped batch; those of a single run are unchanged."""
  if num_runs == 1:
    return [variables]
  return [jax.tree.map(lambda x, i=i: x[i], variables) for i in range(num_runs)]


def mean_evaluation(evaluation: Evaluation) -> dict:
  """Returns an evaluation as JSON data.

  For a vmapped batch, values are means over its runs, and "per_seed" has those of every run.
  """
  several = np.ndim(evaluation.mean_loss) == 1

  def mean(x):
    return None if x is None else np.mean(x, axis=0).tolist() if several else np.asarray(x).tolist()

  by_domain = lambda values: {domain: mean(value) for domain, value in values.items()}
  row = {"bits_per_byte": by_domain(evaluation.bits_per_byte), "loss": by_domain(evaluation.loss),
         "mean_bits_per_byte": mean(evaluation.mean_bits_per_byte),
         "mtp_acceptance": mean(evaluation.mtp_acceptance),
         "max_violation": mean(evaluation.max_violation), "loads": by_domain(evaluation.loads)}
  if several:
    row["per_seed"] = {"mean_bits_per_byte": evaluation.mean_bits_per_byte.tolist(),
                       "mean_loss": evaluation.mean_loss.tolist(),
                       "mtp_acceptance": None if evaluation.mtp_acceptance is None
                                         else evaluation.mtp_acceptance.tolist(),
                       "max_violation": None if evaluation.max_violation is None
                                        else evaluation.max_violation.tolist()}
  return row

"""The compiled side of training: lanes of runs that differ in numbers only share one program.

A *lane* is one run: a seed, and with it any hyper-parameter that enters the step as data. Several
lanes train at once along a leading array axis; one lane has no such axis.
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
from train.config import RunConfig
from train.evaluate import Evaluation, Evaluator, count
from train.losses import Batch, LanguageModelLoss
from train.mesh import ShardedModel, spread
from train.optimizer import Schedule, decay_mask
from train.step import TrainState, init_state, layers_apart, make_train_step

_EVALUATION_TOKENS = 16384  # at a time, over all lanes

# Fields that enter the step as data, so that lanes may differ in them.
DATA_FIELDS = {
    "optimizer": ("learning_rate", "schedule", "warmup_share", "final_ratio"),
    "balance": ("bias_rate", "bias_share", "sequence_weight", "batch_weight", "expert_weight"),
    "train": ("seed", "mtp_weight", "mtp_late_weight", "mtp_share"),
}


def shared(cfg: RunConfig) -> RunConfig:
  """The config with all that lanes may differ in set to a default: equal means one program."""
  return dataclasses.replace(cfg, **{
      section: without_data_fields(getattr(cfg, section), section) for section in DATA_FIELDS})


def without_data_fields[T](part: T, section: str) -> T:
  """A section of a config, with what enters the step as data set to its default."""
  defaults = {field.name: field.default for field in dataclasses.fields(part)}
  return dataclasses.replace(part, **{name: defaults[name] for name in DATA_FIELDS[section]})


@functools.lru_cache(maxsize=8)
def _compiled(cfg: RunConfig, num_lanes: int) -> tuple[ShardedModel | None, Callable, Callable]:
  """The mesh if there is one, and the jitted step and count: made once for all runs of a shape."""
  mesh = _make_mesh(cfg, num_lanes)
  net = mesh.transformer if mesh else functools.partial(model.Transformer, cfg.model)
  jit = mesh.jit if mesh else jax.jit
  trained = net(remat=cfg.train.remat, unroll=cfg.train.unroll, attend=cfg.train.attend)
  step = make_train_step(
      LanguageModelLoss(trained), cfg.optimizer, decay_mask(cfg.model),
      cfg.train.num_micro_batches, prepare=functools.partial(model.quantize_weights, cfg.model),
      by_layer=layers_apart(trained))
  counts = functools.partial(count, net(attend=cfg.train.attend))
  if num_lanes > 1:
    hyper = {"learning_rate": 0, "bias_rate": 0, "weights": 0, "num_micro_batches": None}
    step = jax.vmap(step, in_axes=(0, 0, hyper))
    counts = jax.vmap(counts, in_axes=(0, None))
  return mesh, jit(step, donate_argnums=0), jit(counts)


def _make_mesh(cfg: RunConfig, num_lanes: int) -> ShardedModel | None:
  train = cfg.train
  if num_lanes > 1 and (train.data, train.fsdp) != (1, 1):
    raise ValueError("several seeds train along an array axis of one device: with "
                     f"train.data={train.data} and train.fsdp={train.fsdp} run one at a time")
  mesh = spread(cfg.model, data=train.data, fsdp=train.fsdp)
  rows = train.batch_size // train.num_micro_batches
  if mesh and rows % mesh.mesh.size:
    raise ValueError(f"{rows} sequences at a time do not divide over {mesh.mesh.size} devices")
  return mesh


class Program:
  """Everything compiled for some lanes.

  Args:
    lanes: their configs.
    heldout: see `train.data`.

  Raises:
    ValueError: if lanes need different programs, or do not fit the mesh.
  """

  def __init__(self, lanes: Sequence[RunConfig], heldout: Mapping[str, Any]):
    self.cfg, self.num_lanes = lanes[0], len(lanes)
    if any(shared(cfg) != shared(self.cfg) for cfg in lanes):
      allowed = [f"{part}.{name}" for part, names in DATA_FIELDS.items() for name in names]
      raise ValueError(f"runs that train together may differ in {', '.join(allowed)} only")
    self._seeds = [cfg.train.seed for cfg in lanes]
    self._schedules = [Schedule(cfg) for cfg in lanes]
    self._mesh, self._step, count = _compiled(shared(self.cfg), self.num_lanes)
    rows = max(1, _EVALUATION_TOKENS // (self.cfg.data.seq_len * self.num_lanes))
    self.evaluate = Evaluator(count, heldout, batch_size=rows, several=self.num_lanes > 1,
                              masked=self.cfg.data.sample_masking)

  def init(self, variables: dict | None = None) -> TrainState:
    """The state before the first step: from each lane's seed, or all from the same variables."""
    def one(seed):
      start = variables or model.init_on_host(self.cfg.model, seed)
      return init_state(start, self.cfg.optimizer)

    if self.num_lanes == 1:
      return self._place(one(self._seeds[0]))
    return jax.tree.map(lambda *lanes: jnp.stack(lanes), *map(one, self._seeds))

  def abstract_state(self) -> TrainState:
    """Shapes, formats and places of the state, for restoring one."""
    shapes = jax.eval_shape(lambda variables: init_state(variables, self.cfg.optimizer),
                            model.abstract_variables(self.cfg.model))
    if self.num_lanes > 1:
      return jax.tree.map(
          lambda x: jax.ShapeDtypeStruct((self.num_lanes, *x.shape), x.dtype), shapes)
    if not self._mesh:
      return shapes
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=sharding), shapes, self._mesh.train_state(shapes))

  def step(self, state: TrainState, index: int, batch: Mapping[str, np.ndarray],
           ) -> tuple[TrainState, dict]:
    """Trains on a batch of [lanes,] B sequences; the state passed in is used up.

    Fewer than `batch_size` sequences, while the batch ramps up, must be whole micro-batches.
    """
    hyper = [schedule[index] for schedule in self._schedules]
    if self.num_lanes > 1:
      hyper = jax.tree.map(lambda *values: np.stack(values), *hyper)
    else:
      hyper = hyper[0]
    active = np.int32(self.num_micro_batches(index))
    return self._step(state, self._micro_batches(batch), {**hyper, "num_micro_batches": active})

  def num_micro_batches(self, index: int) -> int:
    return self._schedules[0].num_micro_batches(index)

  def batch_size(self, index: int) -> int:
    """Sequences, per lane, that step `index` takes."""
    train = self.cfg.train
    return train.batch_size // train.num_micro_batches * self.num_micro_batches(index)

  def hyper(self, index: int) -> list[dict]:
    """Every lane's hyper-parameters at a step, for the record."""
    return [schedule[index] for schedule in self._schedules]

  def _micro_batches(self, batch: Mapping[str, np.ndarray]) -> Batch:
    axis, train = int(self.num_lanes > 1), self.cfg.train
    num_micro = train.num_micro_batches

    def split(x):
      missing = train.batch_size - x.shape[axis]
      x = np.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
      x = x.reshape(*x.shape[:axis], num_micro, -1, *x.shape[axis + 1:])
      if not self._mesh:
        return x
      spec = PartitionSpec(None, *self._mesh.batch().spec)
      return jax.device_put(x, NamedSharding(self._mesh.mesh, spec))

    segments = batch["segments"] if self.cfg.data.sample_masking else None
    return Batch(split(batch["tokens"]), split(batch["loss_mask"]),
                 None if segments is None else split(segments))

  def _place(self, state: TrainState) -> TrainState:
    return jax.device_put(state, self._mesh.train_state(state)) if self._mesh else state


def first_lane(variables: dict, num_lanes: int) -> dict:
  """One run's variables, of those of runs that train together."""
  return jax.tree.map(lambda x: x[0], variables) if num_lanes > 1 else variables


def mean_evaluation(evaluation: Evaluation) -> dict:
  """An evaluation as JSON, values of several lanes averaged, lanes kept beside under "per_seed"."""
  lanes = np.ndim(evaluation.mean_loss) == 1

  def mean(x):
    return None if x is None else np.mean(x, axis=0).tolist() if lanes else np.asarray(x).tolist()

  by_domain = lambda values: {domain: mean(value) for domain, value in values.items()}
  row = {"bits_per_byte": by_domain(evaluation.bits_per_byte), "loss": by_domain(evaluation.loss),
         "mean_bits_per_byte": mean(evaluation.mean_bits_per_byte),
         "mtp_acceptance": mean(evaluation.mtp_acceptance),
         "max_violation": mean(evaluation.max_violation), "loads": by_domain(evaluation.loads)}
  if lanes:
    row["per_seed"] = {"mean_bits_per_byte": evaluation.mean_bits_per_byte.tolist(),
                       "mean_loss": evaluation.mean_loss.tolist(),
                       "max_violation": None if evaluation.max_violation is None
                                        else evaluation.max_violation.tolist()}
  return row

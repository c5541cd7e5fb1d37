"""The sides of `bench_train`: this project's training, and a peer's as a subprocess.

Either does one phase at a time: "forward_backward", which computes the gradients of the loss, the
parameters in the compute format, and "train", whole steps with float32 masters.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

import model
from experiments import trace
from model import NUMERICS, MLAConfig, ModelConfig, Transformer, quantize_weights
from model.checks import require, require_positive
from train.config import DataConfig, OptimizerConfig, RunConfig, TrainConfig
from train.losses import Batch, LanguageModelLoss
from train.optimizer import Schedule, decay_mask
from train.step import init_state, layers_apart, make_train_step

PHASES = ("forward_backward", "train")
_PEER = pathlib.Path(__file__).parent / "peers" / "transformers_train.py"
_STEPS_TRACED = 3


@dataclasses.dataclass(frozen=True)
class Bench:
  """How to measure.

  Attributes:
    peer: what to compare with; None for ours alone.
    python: the interpreter that has torch and transformers.
    variants: of the peer, each some of its flags.
    patience: seconds that a peer has to get ready, from the start; it is left out if it does not.
    numerics: ours, names of policies; the others and the peer are compared with the first.
    phases: what is timed: forward_backward, train.
    rounds: alternations; medians over them are quoted.
    steps: a round's.
    warm_up: steps of either side before any is timed: by then its memory has stopped growing.
  """

  peer: Literal["transformers"] | None = None
  python: str = sys.executable
  variants: tuple[str, ...] = ()
  patience: float = 600.0
  numerics: tuple[str, ...] = ("fp32",)
  phases: tuple[str, ...] = ("train",)
  rounds: int = 7
  steps: int = 3
  warm_up: int = 12

  def __post_init__(self):
    require_positive(self, "rounds", "steps", "warm_up", "patience")
    for name, known in (("phases", PHASES), ("numerics", NUMERICS)):
      asked = getattr(self, name)
      require(bool(asked) and set(asked) <= set(known),
              f"Bench.{name}={','.join(asked)} must be some of {', '.join(known)}")
    require(not self.peer or bool(shutil.which(self.python)),
            f"bench.python={self.python} is no program: give an interpreter that has torch and "
            "transformers")


@dataclasses.dataclass(frozen=True)
class BenchConfig:
  """What is trained, and how it is timed.

  Attributes:
    remat, attend: as in `train.config.TrainConfig`.
    unroll: likewise; None for all layers.
  """

  bench: Bench
  model: ModelConfig
  seq_len: int
  batch_size: int
  optimizer: OptimizerConfig
  remat: Literal["none", "v3", "dots", "full"] = "none"
  attend: Literal["xla", "cudnn"] | None = None
  unroll: int | None = None

  @property
  def tokens(self) -> int:
    """Of a step."""
    return self.batch_size * self.seq_len

  def run(self, numerics: str) -> RunConfig:
    """The training run with one of the policies."""
    return RunConfig(
        model=dataclasses.replace(self.model, numerics=NUMERICS[numerics]),
        data=DataConfig(seq_len=self.seq_len), optimizer=self.optimizer,
        train=TrainConfig(steps=10_000, batch_size=self.batch_size, remat=self.remat,
                          attend=self.attend, unroll=self.unroll or self.model.num_layers))


class Side(Protocol):
  """Somebody who trains."""

  name: str

  def start(self, phase: str) -> None:
    """Gets ready for a phase, and warm."""

  def go(self, steps: int) -> float:
    """Seconds that so many steps take."""

  def finish(self) -> dict[str, Any]:
    """What is to be said about the phase besides its rates; its memory is given back."""


class Ours:
  """This project's training, on new random tokens every step."""

  def __init__(self, cfg: BenchConfig, numerics: str):
    self.name = "ours" if len(cfg.bench.numerics) == 1 else f"ours {numerics}"
    self._cfg, self._run = cfg, cfg.run(numerics)
    self._rng, self._schedule = np.random.default_rng(0), Schedule(self._run)

  def start(self, phase: str) -> None:
    started = time.perf_counter()
    self.state, step, donated = (
        self._training() if phase == "train" else self._forward_backward())
    self._index = 0
    self._compiled = jax.jit(step, donate_argnums=(0,) if donated else ()).lower(
        self.state, self._batch(), self._hyper()).compile()
    self._donated = donated
    self.go(1)
    self._start_seconds = time.perf_counter() - started
    self.go(self._cfg.bench.warm_up)

  def _transformer(self, network: ModelConfig) -> LanguageModelLoss:
    train = self._run.train
    return LanguageModelLoss(Transformer(
        network, remat=train.remat, unroll=train.unroll, attend=train.attend))

  def _training(self):
    network = self._run.model
    objective = self._transformer(network)
    step = make_train_step(
        objective, self._run.optimizer, decay_mask(network),
        prepare=functools.partial(quantize_weights, network),
        by_layer=layers_apart(objective.model))
    return init_state(random_variables(network), self._run.optimizer), step, True

  def _forward_backward(self):
    numerics = self._run.model.numerics
    network = dataclasses.replace(
        self._run.model, numerics=dataclasses.replace(numerics, params=numerics.compute))
    objective = self._transformer(network)

    def step(variables, batch, hyper):
      micro = jax.tree.map(lambda x: x[0], batch)
      denominators = objective.denominators(micro)

      def loss(params):
        sums, _ = objective.sums({**variables, "params": params}, micro)
        return sum(hyper["weights"][name] * value / denominators[name]
                   for name, value in sums.items())

      return jax.grad(loss)(objective.model.by_layer(variables["params"]))

    return random_variables(network), step, False

  def _batch(self) -> Batch:
    rows, length = self._cfg.batch_size, self._cfg.seq_len
    tokens = self._rng.integers(0, self._run.model.vocab_size, (1, rows, length + 1), np.int32)
    return Batch(tokens, np.ones((1, rows, length), bool))

  def _hyper(self) -> dict:
    return {**self._schedule[self._index], "num_micro_batches": np.int32(1)}

  def go(self, steps: int) -> float:
    started = time.perf_counter()
    made = None
    for _ in range(steps):
      del made  # gradients are there once, not twice
      made = self._compiled(self.state, self._batch(), self._hyper())
      if self._donated:
        self.state, made = made
      self._index += 1
    jax.block_until_ready((self.state, made))
    return time.perf_counter() - started

  def trace(self) -> dict[str, list[trace.Share]]:
    """Seconds a step by kind of work and by kernel, of a few steps more."""
    with tempfile.TemporaryDirectory() as folder:
      with jax.profiler.trace(folder):
        self.go(_STEPS_TRACED)
      found = trace.kernels(pathlib.Path(folder))
    came_from = trace.origins(self._compiled.as_text())
    a_step = lambda shares: [trace.Share(share.name, share.seconds / _STEPS_TRACED,
                                         share.count // _STEPS_TRACED) for share in shares]
    return {"kinds": a_step(trace.by_kind(found, came_from)),
            "kernels": a_step(trace.by_kernel(found, came_from))}

  def finish(self) -> dict[str, Any]:
    used = self._compiled.memory_analysis()
    del self.state
    program_mb = (used.argument_size_in_bytes + used.temp_size_in_bytes
                  + used.output_size_in_bytes - used.alias_size_in_bytes) / 2**20
    alone = len(self._cfg.bench.numerics) == 1  # or the process' peak is of the others, too
    return {"start_seconds": self._start_seconds, "program_mb": program_mb,
            "peak_mb": _peak_mb() if alone else program_mb}


def random_variables(cfg: ModelConfig) -> dict:
  """What `model.init` gives, drawn on the device and without tracing the network."""
  shapes = model.abstract_variables(cfg)

  @jax.jit
  def draw(key):
    def one(path, shape, key):
      if path[0].key != "params":
        return jnp.zeros(shape.shape, shape.dtype)
      if path[-1].key == "scale":
        return jnp.ones(shape.shape, shape.dtype)
      return cfg.init_std * jax.random.normal(key, shape.shape, shape.dtype)

    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.tree.unflatten(structure, list(jax.random.split(key, len(leaves))))
    return jax.tree_util.tree_map_with_path(one, shapes, keys)

  return draw(jax.random.key(0, impl="rbg"))  # which compiles fast


def _peak_mb() -> float:
  """The most that this process had at a time: of the first device's memory, or a CPU's."""
  stats = jax.devices()[0].memory_stats() or {}
  if "peak_bytes_in_use" in stats:
    return stats["peak_bytes_in_use"] / 2**20
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Peer:
  """A subprocess that trains when told; it gets ready while others do.

  Methods raise ValueError if it stopped, or is not ready in time.
  """

  def __init__(self, cfg: BenchConfig, flags: str):
    self.name = f"{cfg.bench.peer} {flags}"
    self._cfg, self._started = cfg, time.perf_counter()
    config = {"shape": _transformers_shape(cfg.model), "batch": cfg.batch_size,
              "seq": cfg.seq_len, "steps": 1}
    self._process = subprocess.Popen(
        [cfg.bench.python, str(_PEER), json.dumps(config), *flags.split()],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    self._ready = False

  def start(self, phase: str) -> None:
    if not self._ready:
      ready = self._answer(self._started + self._cfg.bench.patience - time.perf_counter())
      if ready["params"] != self._cfg.model.param_count():
        raise ValueError(f"the peer has {ready['params']:,} parameters, and ours "
                         f"{self._cfg.model.param_count():,}")
      self._variant, self._ready = ready["variant"], True
      self._start_seconds = time.perf_counter() - self._started
    self._phase = phase
    self.go(self._cfg.bench.warm_up)

  def _answer(self, patience: float) -> dict:
    if not select.select([self._process.stdout], [], [], max(0.0, patience))[0]:
      raise ValueError(f"the peer said nothing for {self._cfg.bench.patience:.0f} s: give it more "
                       "by bench.patience, or leave the variant out")
    line = self._process.stdout.readline()
    if not line:
      raise ValueError("the peer stopped: see its message above")
    return json.loads(line)

  def go(self, steps: int) -> float:
    with contextlib.suppress(BrokenPipeError):  # it stopped, as its answer will show
      self._process.stdin.write(f"{self._phase} {steps}\n")
      self._process.stdin.flush()
    self._last = self._answer(self._cfg.bench.patience)
    return self._last["seconds"]

  def finish(self) -> dict[str, Any]:
    return {"start_seconds": self._start_seconds, "peak_mb": self._last["peak_mb"],
            **self._variant}

  def quit(self) -> None:
    self._process.kill()
    self._process.wait()


def _transformers_shape(network: ModelConfig) -> dict[str, Any]:
  """The fields of transformers' DeepseekV3Config."""
  require(isinstance(network.attention, MLAConfig) and network.moe is not None,
          "the peer has MLA and experts: give such a model, or leave bench.peer out")
  attention, moe = network.attention, network.moe
  return {
      "vocab_size": network.vocab_size, "hidden_size": network.d_model,
      "num_hidden_layers": network.num_layers, "intermediate_size": network.ffn_dim,
      "first_k_dense_replace": network.num_dense_layers,
      "num_attention_heads": attention.num_heads, "num_key_value_heads": attention.num_heads,
      "q_lora_rank": attention.q_lora_rank, "kv_lora_rank": attention.kv_lora_rank,
      "qk_nope_head_dim": attention.qk_nope_head_dim,
      "qk_rope_head_dim": attention.qk_rope_head_dim, "v_head_dim": attention.v_head_dim,
      "n_routed_experts": moe.num_experts, "num_experts_per_tok": moe.experts_per_token,
      "moe_intermediate_size": moe.expert_dim, "n_shared_experts": moe.num_shared_experts,
      "n_group": moe.num_groups, "topk_group": moe.groups_per_token,
      "max_position_embeddings": network.max_seq_len}

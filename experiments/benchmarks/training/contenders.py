"""The contenders of `bench_train`: this project's training, and that of a peer in its own process.

Each runs one phase at a time: "forward_backward", the gradients of the loss with the parameters in
the compute format, or "train", whole steps with float32 master weights.
"""

import dataclasses
import json
import pathlib
import resource
import shutil
import sys
import time
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

import model
from experiments.benchmarks.timing import Contender, PeerProcess, Unavailable
from experiments.benchmarks.training import profiles
from model import NUMERICS, MLAConfig, ModelConfig
from model.checks import require, require_positive
from train.config import DataConfig, OptimizerConfig, RunConfig, TrainConfig
from train.program import Program
from train.step import init_state

PHASES = ("forward_backward", "train")
_PEER = pathlib.Path(__file__).parent.parent / "peers" / "transformers_train.py"


@dataclasses.dataclass(frozen=True)
class Bench:
  """How the contenders are timed.

  Attributes:
    peer: the peer to compare with; None for ours alone.
    python: an interpreter that has torch and transformers; None for the present one.
    variants: variants of the peer, each a combination of its flags.
    peer_timeout: longest time, in seconds, for a peer to get ready after its start, or to answer a
      command; a peer that takes longer is excluded.
    numerics: names of our numerics policies; the first is the one that the other policies and the
      peer are compared with.
    phases: phases that are timed, of "forward_backward" and "train".
    rounds: number of rounds in which the contenders alternate; medians over them are reported.
    steps: steps per round.
    warm_up: untimed steps of every contender before the first round; by then memory has stopped
      growing.
  """

  peer: Literal["transformers"] | None = None
  python: str | None = None
  variants: tuple[str, ...] = ()
  peer_timeout: float = 600.0
  numerics: tuple[str, ...] = ("fp32",)
  phases: tuple[str, ...] = ("train",)
  rounds: int = 7
  steps: int = 3
  warm_up: int = 12

  def __post_init__(self):
    require_positive(self, "rounds", "steps", "warm_up", "peer_timeout")
    for name, known in (("phases", PHASES), ("numerics", NUMERICS)):
      requested = getattr(self, name)
      require(bool(requested) and set(requested) <= set(known),
              f"Bench.{name}={','.join(requested)} must be some of {', '.join(known)}")
    require(not self.peer or not self.python or bool(shutil.which(self.python)),
            f"bench.python={self.python} is not a program: name an interpreter that has torch "
            "and transformers")


@dataclasses.dataclass(frozen=True)
class BenchConfig:
  """What is trained, and how it is timed.

  Attributes:
    bench: how the contenders are timed.
    model: the architecture; `bench.numerics` replaces its numerics.
    seq_len: tokens per sequence.
    batch_size: sequences per step.
    optimizer: settings of the optimizer.
    remat: which activations the backward pass recomputes, as in `train.config.TrainConfig`.
    attend: implementation of attention, as in `train.config.TrainConfig`.
    unroll: layers per iteration of the loop over layers, as in `train.config.TrainConfig`; None for
      all layers.
  """

  bench: Bench
  model: ModelConfig
  seq_len: int
  batch_size: int
  optimizer: OptimizerConfig
  remat: Literal["none", "v3", "dots", "full"] = "none"
  attend: Literal["xla", "blockwise", "cudnn"] | None = None
  unroll: int | None = None

  @property
  def tokens(self) -> int:
    """Tokens per step."""
    return self.batch_size * self.seq_len

  def run(self, numerics: str) -> RunConfig:
    """Returns the training run with one of the numerics policies."""
    return RunConfig(
        model=dataclasses.replace(self.model, numerics=NUMERICS[numerics]),
        data=DataConfig(seq_len=self.seq_len), optimizer=self.optimizer,
        train=TrainConfig(steps=10_000, batch_size=self.batch_size, remat=self.remat,
                          attend=self.attend, unroll=self.unroll or self.model.num_layers))


class Trainer(Contender, Protocol):
  """A contender that trains, phase by phase."""

  def start(self, phase: str) -> None:
    """Prepares a phase and warms up."""

  def seconds(self, steps: int) -> float:
    """Takes a number of steps; returns the seconds that they took."""

  def finish(self) -> dict[str, Any]:
    """Frees the memory of the phase; returns what else is reported about it."""


class OwnTrainer:
  """This project's training, on new random tokens every step."""

  def __init__(self, cfg: BenchConfig, numerics: str):
    self.name = "ours" if len(cfg.bench.numerics) == 1 else f"ours {numerics}"
    self._cfg, self._run = cfg, cfg.run(numerics)
    self._rng, self._program = np.random.default_rng(0), Program([self._run], {})

  def start(self, phase: str) -> None:
    started = time.perf_counter()
    self._index, self._trains, network = 0, phase == "train", self._run.model
    if self._trains:
      self.state = init_state(random_variables(network), self._run.optimizer)
      self._compiled = self._program.lower().compile()
    else:
      self.state = random_variables(self._program.compute_config().model)
      self._compiled = self._program.lower_gradients().compile()
    self.seconds(1)
    self._start_seconds = time.perf_counter() - started
    self.seconds(self._cfg.bench.warm_up)

  def _batch(self) -> dict[str, np.ndarray]:
    return random_rows(
        self._rng, self._run.model.vocab_size, self._cfg.batch_size, self._cfg.seq_len)

  def seconds(self, steps: int) -> float:
    started = time.perf_counter()
    output = None
    for _ in range(steps):
      del output  # so that gradients are in memory only once
      output = self._compiled(
          self.state, *self._program.step_arguments(self._index, self._batch()))
      if self._trains:
        self.state, output = output
      self._index += 1
    jax.block_until_ready((self.state, output))
    return time.perf_counter() - started

  def trace(self) -> dict[str, list[profiles.Timing]]:
    """Takes a few more steps; returns the seconds of a step by kind of work and by kernel."""
    return profiles.trace(self.seconds, self._compiled.as_text())

  def finish(self) -> dict[str, Any]:
    used = self._compiled.memory_analysis()
    del self.state
    program_mb = (used.argument_size_in_bytes + used.temp_size_in_bytes
                  + used.output_size_in_bytes - used.alias_size_in_bytes) / 2**20
    # With several policies, the peak of the process is not that of one contender.
    alone = len(self._cfg.bench.numerics) == 1
    return {"start_seconds": self._start_seconds, "program_mb": program_mb,
            "peak_mb": _peak_mb() if alone else program_mb}

  def quit(self) -> None:
    pass


def random_rows(rng: np.random.Generator, vocab_size: int, *shape: int) -> dict[str, np.ndarray]:
  """Returns rows of random tokens, all of which are learned; the last size is a row's length."""
  *lead, length = shape
  return {"tokens": rng.integers(0, vocab_size, (*lead, length + 1), np.int32),
          "loss_mask": np.ones(shape, bool)}


def random_variables(cfg: ModelConfig) -> dict:
  """Returns variables like those of `model.init`, without tracing the network; compiles fast."""
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

  return draw(jax.random.key(0, impl="rbg"))  # rbg compiles fastest


def _peak_mb() -> float:
  """Peak memory of this process so far: of the first device, or on a CPU of the host."""
  stats = jax.devices()[0].memory_stats() or {}
  if "peak_bytes_in_use" in stats:
    return stats["peak_bytes_in_use"] / 2**20
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class PeerTrainer:
  """A peer that trains in its own process, and starts while the other contenders do."""

  def __init__(self, cfg: BenchConfig, flags: str):
    self.name = f"{cfg.bench.peer} {flags}"
    self._cfg, self._started = cfg, time.perf_counter()
    config = {"shape": _transformers_shape(cfg.model), "batch": cfg.batch_size,
              "seq": cfg.seq_len, "steps": 1}
    self._process = PeerProcess(
        [cfg.bench.python or sys.executable, str(_PEER), json.dumps(config), *flags.split()],
        cfg.bench.peer_timeout)
    self._ready = False

  def start(self, phase: str) -> None:
    if not self._ready:
      ready = self._process.answer(
          self._started + self._cfg.bench.peer_timeout - time.perf_counter())
      if ready["params"] != self._cfg.model.param_count():
        raise Unavailable(f"the peer has {ready['params']:,} parameters, and ours "
                          f"{self._cfg.model.param_count():,}")
      self._variant, self._ready = ready["variant"], True
      self._start_seconds = time.perf_counter() - self._started
    self._phase = phase
    self.seconds(self._cfg.bench.warm_up)

  def seconds(self, steps: int) -> float:
    self._last = self._process.ask(f"{self._phase} {steps}")
    return self._last["seconds"]

  def finish(self) -> dict[str, Any]:
    return {"start_seconds": self._start_seconds, "peak_mb": self._last["peak_mb"],
            **self._variant}

  def quit(self) -> None:
    self._process.quit()


def _transformers_shape(network: ModelConfig) -> dict[str, Any]:
  """Returns the fields of transformers' DeepseekV3Config for a model."""
  require(isinstance(network.attention, MLAConfig) and network.moe is not None,
          "the peer needs a model with MLA and experts: choose one, or leave bench.peer at none")
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

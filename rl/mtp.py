"""The MTP modules of a policy, which RL leaves as they are, or trains to follow the policy.

RL's objectives use the main model alone. By default, the modules of the model that a run starts
from are saved once in the run's folder, and belong to every model that is loaded from it. With
`objective.mtp_learning_rate` they are trained by an optimizer of their own and are part of the
checkpoints: they learn to predict the sampled completions from the hidden states of the policy,
whose parameters, those of the shared embedding and head included, are constants to them. So the
policy is bit for bit the same as without them.

Shape letters:  S sequences  T predicted tokens  L MoE layers  K experts per token
"""

import contextlib
import dataclasses
import pathlib
import shutil

import jax
import jax.numpy as jnp

import model
from model.checks import require
from train.checkpoint import Checkpoints, read_newest
from train.losses import AuxOutputs, Batch, Sums, mtp_mask

_FOLDER = "mtp_modules"


def split_mtp(variables: dict) -> tuple[dict, dict]:
  """Returns a model's variables without its MTP modules, and the variables of these.

  Args:
    variables: collections of variables, such as "params" and "router".
  """
  is_mtp = lambda name: name.startswith("mtp_")
  pick = lambda wanted: {
      collection: {name: value for name, value in tree.items() if is_mtp(name) == wanted}
      for collection, tree in variables.items()}
  return pick(False), pick(True)


def policy_config(cfg: model.ModelConfig) -> model.ModelConfig:
  """Returns the architecture without MTP modules."""
  return dataclasses.replace(cfg, mtp=None)


def require_mtp(variables: dict) -> None:
  """Raises ValueError unless a model whose MTP modules are to be trained has some."""
  require(bool(jax.tree.leaves(split_mtp(variables)[1]["params"])),
          "objective.mtp_learning_rate trains MTP modules, but the model has none: leave it out, "
          "or start from a model with them")


def join_mtp(policy: dict, modules: dict) -> dict:
  """Returns the variables of a model from those of its policy and those of its MTP modules."""
  return {collection: {**tree, **modules.get(collection, {})}
          for collection, tree in policy.items()}


class MTPObjective:
  """The cross-entropy of the MTP modules on sampled completions, as an objective of `train.step`.

  Its variables are those of the modules, and its batches `rl.step.Experience`s.

  Args:
    net: the network, with MTP modules.
    policy: variables of the main model, which are not differentiated.
    temperature: the temperature at which the tokens were sampled. The modules' logits are divided
      by it too, so that at this temperature they predict what the policy samples.
    replay: whether the main model uses the experts that the sampler chose.
  """

  def __init__(self, net: model.Transformer, policy: dict, temperature: float | jax.Array,
               replay: bool = False):
    self.net, self.policy, self.temperature, self.replay = net, policy, temperature, replay

  def denominators(self, batch) -> Sums:
    """Returns the number of learned tokens in the whole minibatch, times the number of modules."""
    tokens = jnp.maximum(batch.mask.sum(), 1).astype(jnp.float32)
    return {"mtp": self.net.cfg.mtp.depth * tokens}

  def sums(self, variables: dict, batch) -> tuple[Sums, AuxOutputs]:
    """Returns the summed loss in nats, and the loads of the modules' routers."""
    variables = join_mtp(self.policy, variables) | {
        name: tree for name, tree in variables.items() if name not in self.policy}
    segments = batch.token_mask.astype(jnp.int32)
    chosen = (jnp.moveaxis(batch.experts, 2, 0).astype(jnp.int32) if self.replay else None)
    output = self.net.apply(variables, batch.tokens[:, :-1], segment_ids_BT=segments,
                            logits=False, experts_LBTK=chosen)
    predicted, loss = Batch(batch.tokens, batch.mask, segments), jnp.float32(0)
    for k, hidden in enumerate(output.mtp_hidden, 1):
      targets = jnp.roll(batch.tokens, -1 - k, axis=1)[:, :-1]
      logp = self.net.apply(variables, hidden, targets, temperature=self.temperature,
                            method="token_logprobs")
      loss -= jnp.where(mtp_mask(predicted, k), logp, 0).sum()
    return {"mtp": loss}, AuxOutputs({
        name: stats.load_BE.sum(-2) for name, stats in output.router.items()
        if name.startswith("mtp_")})


def save_mtp(folder: pathlib.Path, variables: dict) -> None:
  """Saves the MTP modules of the model that a run starts from in the run's folder.

  Args:
    folder: the run's folder, which has no checkpoint yet.
    variables: the model's variables. Nothing is saved if it has no MTP modules.
  """
  shutil.rmtree(folder / _FOLDER, ignore_errors=True)
  modules = split_mtp(variables)[1]
  if jax.tree.leaves(modules):
    with contextlib.closing(Checkpoints(folder / _FOLDER, keep=1)) as checkpoints:
      checkpoints.save(0, jax.tree.map(jax.numpy.asarray, modules), {})


def with_saved_mtp(folder: pathlib.Path, cfg: model.ModelConfig, variables: dict) -> dict:
  """Returns a policy's variables with the MTP modules that `save_mtp` saved in the run's folder.

  Raises:
    ValueError: if the architecture has MTP modules and the folder has none.
    CheckpointError: if they are damaged.
  """
  if cfg.mtp is None:
    return variables
  modules = read_newest(folder / _FOLDER, split_mtp(model.abstract_variables(cfg))[1])
  if modules is None:
    raise ValueError(f"{folder / _FOLDER} with the model's MTP modules is missing")
  return join_mtp(variables, modules.arrays)

"""The update of an RL step, a pure function of the state and the completions sampled.

The optimizer step itself is `train.step`'s; this file gives it an objective, and lays out a rollout
as minibatches of micro-batches.

Shape letters:  S sequences  T predicted tokens: prompt and completion without the first token
                L MoE layers  K experts per token
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

import model
from model import Transformer, balance, compiling
from model.checks import require
from rl.config import ObjectiveConfig, RLConfig
from rl.mtp import MTPObjective, policy_config, require_mtp, split_mtp
from rl.objective import ObjectiveSpec, denominator, policy_loss
from rl.value import ValueObjective, init_value, ppo_advantages, predict, value_decays
from train.losses import AuxOutputs, Sums
from train.mesh import ShardedModel, make_sharded_model
from train.optimizer import decay_mask
from train.program import without_data_fields
from train.step import TrainState, init_state, make_train_step, nudged


@flax.struct.dataclass
class RLState:
  """The state that RL updates.

  Attributes:
    train: parameters, router biases and optimizer state of the policy.
    reference: variables of the reference policy of the KL; None if the objective has no KL.
    value: parameters and optimizer state of PPO's value model; None for other objectives.
    mtp: parameters, router biases and optimizer state of the MTP modules; None if they are not
      trained.
  """

  train: TrainState
  reference: dict | None
  value: TrainState | None = None
  mtp: TrainState | None = None


@flax.struct.dataclass
class Experience:
  """Completions to learn from.

  Attributes:
    tokens: int32 [S, T + 1], prompt and completion without a gap, padded on the right.
    token_mask: bool [S, T], True where the predicted token is not padding.
    mask: bool [S, T], True where the predicted token is to be learned: one of the completion's, its
      stop token included, in a sequence that is learned from.
    logp_sampler: float32 [S, T], log-probabilities in nats that the sampler computed; 0 outside the
      completion.
    advantage: float32 [S], the advantage of each sequence. For PPO it is the sequence's reward, for
      which the update substitutes advantages [S, T].
    experts: int16 [S, T, L, K], the experts that the sampler's routers chose for each input token;
      None if they were not recorded.
  """

  tokens: jax.Array
  token_mask: jax.Array
  mask: jax.Array
  logp_sampler: jax.Array
  advantage: jax.Array
  experts: jax.Array | None = None


@flax.struct.dataclass
class _Batch:
  """Experience, with log-probabilities under the policy before the update and the reference.

  Attributes:
    experience: the completions.
    logp_old: [S, T], under the policy before the update; None if a rollout has one optimizer step.
    logp_reference: [S, T], under the reference; None if the objective has no KL.
    spec: the objective.
  """

  experience: Experience
  logp_old: jax.Array | None
  logp_reference: jax.Array | None
  spec: ObjectiveSpec


def experience(
    prompts: list[np.ndarray], tokens_SN: np.ndarray, lengths_S: np.ndarray,
    logprobs_SN: np.ndarray, advantage_S: np.ndarray, learned_S: np.ndarray, *,
    experts_STLK: np.ndarray | None = None, multiple: int = 32) -> Experience:
  """Lays out a rollout as rows of prompt and completion, on the host.

  Args:
    prompts: token ids of each sequence's prompt.
    tokens_SN: token ids of the completions, see `rl.rollout.Rollout`.
    lengths_S: lengths of the completions in tokens.
    logprobs_SN: log-probabilities of the completions' tokens in nats.
    advantage_S: advantage of each sequence; for PPO its reward.
    learned_S: bool, whether each sequence is learned from; the mask of others is False throughout.
    experts_STLK: the experts recorded by the rollout, or None.
    multiple: T is padded to a multiple of this, to limit the number of shapes that are compiled.
  """
  starts_S = np.array([len(prompt) for prompt in prompts])
  ends_S = starts_S + lengths_S
  num_tokens = -(-int(ends_S.max() - 1) // multiple) * multiple
  tokens = np.zeros((len(prompts), num_tokens + 1), np.int32)
  logp = np.zeros((len(prompts), num_tokens), np.float32)
  for row, (prompt, length) in enumerate(zip(prompts, lengths_S, strict=True)):
    start = len(prompt)
    tokens[row, :start] = prompt
    tokens[row, start:start + length] = tokens_SN[row, :length]
    logp[row, start - 1:start - 1 + length] = logprobs_SN[row, :length]
  place_T = np.arange(num_tokens)
  token_mask_ST = place_T < ends_S[:, None] - 1
  mask_ST = token_mask_ST & (place_T >= starts_S[:, None] - 1) & learned_S[:, None]
  if experts_STLK is not None:
    missing = num_tokens - experts_STLK.shape[1]
    experts_STLK = np.pad(experts_STLK[:, :num_tokens],
                          ((0, 0), (0, max(0, missing)), (0, 0), (0, 0)))
  return Experience(tokens, token_mask_ST, mask_ST, logp, advantage_S.astype(np.float32),
                    experts_STLK)


def sequence_logprobs(
    net: Transformer, variables: dict, tokens: jax.Array, token_mask: jax.Array,
    temperature: float | jax.Array, experts: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, balance.RouterStats]]:
  """Returns the log-probabilities [S, T] of each next token in nats, and the routers' statistics.

  Args:
    net: the network.
    variables: the network's variables.
    tokens: int32 [S, T + 1].
    token_mask: bool [S, T]; tokens outside it are padding, which no statistic counts.
    temperature: the temperature at which the tokens were sampled.
    experts: [S, T, L, K], experts to use instead of the routers' choices; None for these.
  """
  output = _forward(net, variables, tokens, token_mask, experts)
  logp = net.apply(variables, output.hidden_BTD, tokens[:, 1:], temperature=temperature,
                   method="token_logprobs")
  return logp, output.router


def _forward(net, variables, tokens, token_mask, experts) -> model.Output:
  chosen = None if experts is None else jnp.moveaxis(experts, 2, 0).astype(jnp.int32)
  return net.apply(variables, tokens[:, :-1], segment_ids_BT=token_mask.astype(jnp.int32),
                   logits=False, mtp=False, experts_LBTK=chosen)


class PolicyObjective:
  """`rl.objective.policy_loss` as an objective of `train.step`.

  Args:
    net: the network.
    temperature: the temperature at which the tokens were sampled.
    replay: whether to use the experts that the sampler chose instead of the routers' choices.
    entropy: whether there is a term "entropy", minus the entropy of the policy at each learned
      token, in nats. It is exact: the sum over the vocabulary.
  """

  def __init__(self, net: Transformer, temperature: float | jax.Array, replay: bool = False,
               entropy: bool = False):
    self.net, self.temperature, self.replay, self.entropy = net, temperature, replay, entropy

  def denominators(self, batch: _Batch) -> Sums:
    """Returns the terms' denominators over a minibatch, whose leading axis is micro-batches."""
    whole = batch.experience
    counts = {
        "policy": jnp.maximum(denominator(whole.mask, batch.spec), 1),
        "sequence_balance": jnp.maximum(whole.token_mask.any(-1).sum(), 1).astype(jnp.float32)}
    if self.entropy:
      counts["entropy"] = jnp.maximum(whole.mask.sum(), 1).astype(jnp.float32)
    return counts

  def sums(self, variables: dict, batch: _Batch) -> tuple[Sums, AuxOutputs]:
    """Returns the summed loss terms and the metrics of one micro-batch."""
    seen = batch.experience
    total = lambda x: jnp.where(seen.mask, x, 0).sum()
    operands = (self.net, variables, seen.tokens, seen.token_mask)
    experts, sums = seen.experts if self.replay else None, {}
    if self.entropy:
      output = _forward(*operands, experts)
      router = output.router
      logp, entropy = self.net.apply(
          variables, output.hidden_BTD, seen.tokens[:, 1:], temperature=self.temperature,
          method="logprobs_and_entropy")
      sums["entropy"] = -total(entropy)
    else:
      logp, router = sequence_logprobs(*operands, self.temperature, experts)
    fixed = jax.lax.stop_gradient(logp)
    old = fixed if batch.logp_old is None else batch.logp_old
    loss, _, means = policy_loss(
        logp, old, batch.logp_reference, seen.advantage, seen.mask, batch.spec,
        logp_sampler=seen.logp_sampler)
    tokens = seen.mask.sum().astype(jnp.float32)
    # The mean of -log pi over sampled tokens is an estimate of the entropy, unbiased if the policy
    # itself sampled them.
    means |= {"entropy": (total(-fixed), tokens),
              "sampling_gap": (total(jnp.abs(old - seen.logp_sampler)), tokens)}
    if seen.experts is not None and not self.replay:
      means["routing_agreement"] = _agreement(router["moe_layers"].experts_BTK, seen)
    real_S = seen.token_mask.any(-1)
    sums["policy"] = loss
    chosen = self.net.cfg.moe.experts_per_token if router else 0
    sums["sequence_balance"] = sum(
        ((balance.sequence_balance_loss(stats, chosen) * real_S).sum()
         for stats in router.values()), jnp.float32(0))
    return sums, AuxOutputs(
        {name: stats.load_BE.sum(-2) for name, stats in router.items()}, means)


def _agreement(experts_LSTK: jax.Array, seen: Experience) -> tuple[jax.Array, jax.Array]:
  """Returns how many of the trainer's expert choices the sampler made too, and how many there are.

  Both count the choices of all tokens but padding, as float32.
  """
  sampler_LSTK = jnp.moveaxis(seen.experts, 2, 0)
  same_LSTK = (experts_LSTK[..., None] == sampler_LSTK[..., None, :]).any(-1)
  counted = seen.token_mask[..., None] & jnp.ones_like(same_LSTK)
  return (same_LSTK & counted).sum(dtype=jnp.float32), counted.sum(dtype=jnp.float32)


def init_rl_state(
    variables: dict, cfg: RLConfig, mesh: ShardedModel | None = None) -> RLState:
  """Returns the state before the first step, whose reference is the model that it starts from.

  Args:
    variables: variables of that model. Those of its MTP modules are part of the state only if
      `cfg.objective.mtp_learning_rate` is set.
    cfg: the run's configuration.
    mesh: the mesh over which the state is sharded, with the model's whole architecture; None to
      leave it on the variables' device.

  Raises:
    ValueError: if MTP modules are to be trained and there are none.
  """
  variables = {"params": variables["params"], "router": variables.get("router", {})}
  train_mtp = cfg.objective.mtp_learning_rate is not None
  if train_mtp:
    require_mtp(variables)
  variables, modules = split_mtp(variables)
  if mesh:
    variables = jax.device_put(variables, {"router": {}} | split_mtp(mesh.variables())[0])
  needs_reference = cfg.objective.spec(1).kl_in != "none"
  reference = jax.tree.map(lambda x: jnp.array(x, copy=True), variables)
  value = init_value(variables, cfg.optimizer) if cfg.objective.name == "ppo" else None
  start = nudged(variables) if cfg.loop.nudge else variables
  state = RLState(
      init_state(start, cfg.optimizer), reference if needs_reference else None, value,
      init_state(modules, cfg.optimizer) if train_mtp else None)
  return jax.device_put(state, state_shardings(state, mesh)) if mesh else state


def state_shardings(state: RLState, mesh: ShardedModel) -> RLState:
  """Returns a NamedSharding for every array of a state; the state may consist of shapes only."""
  mtp = state.mtp
  if mtp is not None:
    modules = split_mtp({"router": {}} | mesh.variables())[1]
    mtp = mesh.train_state(mtp, modules["params"]).replace(router=modules["router"])
  mesh = dataclasses.replace(mesh, cfg=policy_config(mesh.cfg))
  variables, value = {"router": {}} | mesh.variables(), state.value
  if value is not None:
    head = jax.tree.map(lambda _: mesh.replicated(), value.params["head"])
    value = mesh.train_state(value, {"net": variables["params"], "head": head})
  return RLState(mesh.train_state(state.train),
                 None if state.reference is None else variables, value, mtp)


def abstract_rl_state(
    variables: dict, cfg: RLConfig, mesh: ShardedModel | None = None) -> RLState:
  """Returns a state's shapes, formats and, on a mesh, shardings, for restoring a checkpoint."""
  shapes = jax.eval_shape(lambda v: init_rl_state(v, cfg), variables)
  if mesh is None:
    return shapes
  return jax.tree.map(
      lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      shapes, state_shardings(shapes, mesh))


def refresh(state: RLState) -> RLState:
  """Returns the state with the current policy as its reference (R1: every 400 steps)."""
  return state.replace(reference=jax.tree.map(jnp.copy, state.train.variables))


def make_update(
    model_cfg: model.ModelConfig, cfg: RLConfig,
) -> Callable[[RLState, Experience, dict, jax.Array], tuple[RLState, dict]]:
  """Returns the jitted function `update(state, experience, hyper, key) -> state, metrics`.

  It takes `cfg.objective.updates` optimizer steps on minibatches, which it draws with the key, of
  an experience of `cfg.sampling.num_sequences` rows. `hyper` holds "learning_rate",
  "value_learning_rate" and, if MTP modules are trained, "mtp_learning_rate", an array each with a
  value per optimizer step; "spec", the objective; "temperature"; and "gae_lambda". The metrics are
  means over the optimizer steps, but "skipped", the number of steps skipped so far. The state is
  donated.

  If `cfg.mesh` has several devices, the state has to be on the mesh of
  `train.mesh.make_sharded_model`, sharded as by `state_shardings`, and remains so. Every
  micro-batch is divided over the mesh's data and fsdp axes.

  Args:
    model_cfg: the model's architecture.
    cfg: the run's configuration.

  Raises:
    ValueError: if the mesh does not fit the number of devices, or a micro-batch does not divide
      over them.
  """
  train_mtp = cfg.objective.mtp_learning_rate is not None
  if not train_mtp:
    model_cfg = policy_config(model_cfg)
  mesh = make_sharded_model(model_cfg, cfg.mesh)
  micro = cfg.objective.micro_batch_size or (
      cfg.sampling.num_sequences // cfg.objective.minibatches)
  require(mesh is None or micro % mesh.batch_devices == 0,
          f"{micro} sequences at a time do not divide over the devices of {cfg.mesh}: change "
          "objective.micro_batch_size or sampling.num_prompts")
  objective = ObjectiveConfig(**{name: getattr(cfg.objective, name) for name in (
      "minibatches", "inner_epochs", "micro_batch_size", "bias_rate", "sequence_balance",
      "entropy_weight", "routing")}, name="ppo" if cfg.objective.name == "ppo" else "grpo",
      mtp_learning_rate=1.0 if train_mtp else None)  # its value is data
  return _compiled(model_cfg, mesh, objective, without_data_fields(cfg.optimizer, "optimizer"))


@functools.lru_cache(maxsize=8)
def _compiled(model_cfg, mesh, objective, optimizer):
  """Returns the update, compiled once for all runs that differ only in what is passed as data."""
  net, jit = (mesh.transformer(), mesh.jit) if mesh else (Transformer(model_cfg), compiling.jit)
  return jit(functools.partial(_update, net, decay_mask(model_cfg), optimizer, objective),
             donate_argnums=0, tuned=compiling.is_tuned(model_cfg, net.unroll))


def _train_mtp(net, decays, optimizer, num_micro, temperature, replay):
  """Returns `train(modules, policy, batch, hyper)`, an optimizer step of the MTP modules."""
  decays = split_mtp({"params": decays})[1]["params"]

  def train(modules, policy, batch, hyper):
    fixed = policy.variables
    prepare = lambda params: model.quantize_weights(net.cfg, fixed["params"] | params)
    step = make_train_step(MTPObjective(net, fixed, temperature, replay), optimizer,
                           decays, num_micro, prepare=prepare)
    modules, metrics = step(modules, batch, hyper)
    return modules, {"mtp_loss": metrics["loss_mtp"], "mtp/grad_norm": metrics["grad_norm"]}

  return train


def _update(net, decays, optimizer, objective, state, seen, hyper, key):
  sequences = len(seen.tokens)
  micro = objective.micro_batch_size or sequences // objective.minibatches
  num_micro = sequences // objective.minibatches // micro
  temperature = hyper["temperature"]
  replay = objective.routing == "replayed"
  train_mtp = _train_mtp(net, decays, optimizer, num_micro, temperature, replay)
  net, decays = net.clone(cfg=policy_config(net.cfg)), split_mtp({"params": decays})[0]["params"]
  quantize = functools.partial(model.quantize_weights, net.cfg)
  policy_weights = {"policy": 1.0, "sequence_balance": objective.sequence_balance}
  if objective.entropy_weight:
    policy_weights["entropy"] = objective.entropy_weight
  step = make_train_step(
      PolicyObjective(net, temperature, replay, "entropy" in policy_weights), optimizer, decays,
      num_micro, prepare=quantize)
  spec = hyper["spec"]

  def logprobs(variables, experts=None):
    variables = variables | quantize(variables["params"])
    one = lambda part: sequence_logprobs(net, variables, part[0], part[1], temperature, part[2])[0]
    parts = _split((seen.tokens, seen.token_mask, experts), -1, micro)
    return jax.lax.map(one, parts).reshape(sequences, -1)

  ppo = objective.name == "ppo"
  # With one optimizer step per rollout, the policy is still the one that sampled.
  old = (logprobs(state.train.variables, seen.experts if replay else None)
         if objective.updates > 1 or ppo else None)
  reference = logprobs(state.reference) if spec.kl_in != "none" else None
  returns = None
  if ppo:
    parts = _split((seen.tokens, seen.token_mask), -1, micro)
    value = jax.lax.map(lambda part: predict(net, state.value.variables, *part)[0], parts)
    advantage, returns = ppo_advantages(
        seen.advantage, old - reference, value.reshape(sequences, -1), seen.mask,
        beta=spec.beta, lam=hyper["gae_lambda"])
    seen, spec = seen.replace(advantage=advantage), spec.replace(beta=0.0)
  batch = _Batch(seen, old, reference, spec=None)
  value_step = make_train_step(ValueObjective(net), optimizer, value_decays(decays), num_micro)

  def one(carry, at):
    policy, critic, modules = carry
    rows, learning_rate, value_learning_rate, mtp_learning_rate = at
    part = jax.tree.map(lambda x: _split(x[rows], num_micro, micro), batch)
    part = part.replace(spec=jax.tree.map(lambda x: jnp.full(num_micro, x, jnp.float32), spec))
    with_weights = lambda rate, weights: {
        "learning_rate": rate, "bias_rate": jnp.float32(objective.bias_rate), "weights": weights,
        "num_micro_batches": num_micro}
    before = policy
    policy, metrics = step(policy, part, with_weights(learning_rate, policy_weights))
    if modules is not None:
      modules, mtp_metrics = train_mtp(
          modules, before, part.experience, with_weights(mtp_learning_rate, {"mtp": 1.0}))
      metrics |= mtp_metrics
    if ppo:
      critic, critic_metrics = value_step(
          critic, (part.experience, _split(returns[rows], num_micro, micro)),
          with_weights(value_learning_rate, {"value": 1.0}))
      metrics |= {"value/loss": critic_metrics["loss_value"],
                  "value/grad_norm": critic_metrics["grad_norm"]}
    return (policy, critic, modules), metrics

  (policy, critic, modules), metrics = jax.lax.scan(
      one, (state.train, state.value, state.mtp),
      (_minibatches(sequences, objective, key), hyper["learning_rate"],
       hyper["value_learning_rate"], hyper.get("mtp_learning_rate")))
  skipped = metrics.pop("skipped")[-1]
  metrics = jax.tree.map(lambda x: x.mean(0), metrics)
  return state.replace(train=policy, value=critic, mtp=modules), {**metrics, "skipped": skipped}


def _split(tree, first: int, second: int):
  """Reshapes rows to [first, second, ...]; on a mesh, the second axis is sharded as a batch."""
  def one(x):
    x = x.reshape(first, second, *x.shape[1:])
    return nn.with_logical_constraint(x, (None, "batch", *[None] * (x.ndim - 2)))

  return jax.tree.map(one, tree)


def _minibatches(sequences: int, objective, key) -> jax.Array:
  """Returns each optimizer step's rows, reshuffled in every epoch; in order for a single step."""
  if objective.updates == 1:
    return jnp.arange(sequences)[None]
  keys = jax.random.split(key, objective.inner_epochs)
  order = jax.vmap(lambda key: jax.random.permutation(key, sequences))(keys)
  return order.reshape(objective.updates, -1)

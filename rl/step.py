"""One RL step as a pure function of the state and what was sampled.

The optimizer's step is `train.step`'s: this file gives it an objective, and lays out a rollout as
minibatches of micro-batches.

Shape letters:  S sequences  T tokens that are predicted: prompt and completion, but the first
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

import model
from model import Transformer, balance
from model.checks import require
from rl.config import ObjectiveConfig, RLConfig
from rl.objective import ObjectiveSpec, denominator, policy_loss
from rl.value import ValueObjective, init_value, ppo_advantages, predict, value_decays
from train.losses import AuxOutputs, Sums
from train.mesh import ShardedModel, make_sharded_model
from train.optimizer import decay_mask
from train.program import without_data_fields
from train.step import TrainState, init_state, make_train_step


@flax.struct.dataclass
class RLState:
  """What RL changes.

  Attributes:
    train: the policy and its optimizer.
    reference: variables that the KL is to; None if there is none in the objective.
    value: PPO's value model and its optimizer, else None.
  """

  train: TrainState
  reference: dict | None
  value: TrainState | None = None


@flax.struct.dataclass
class Experience:
  """Completions to learn from. Rows are alike however they were sampled.

  Attributes:
    tokens: int32 [S, T + 1], prompt and completion without a gap, padded on the right.
    token_mask: bool [S, T], at predictions made from a real token.
    mask: bool [S, T], at predictions of the completion's tokens, its stop token included.
    logp_sampler: float32 [S, T], as kept from sampling; 0 outside the mask.
    advantage: float32 [S]; for PPO the outputs' rewards.
    experts: int16 [S, T, L, K], the sampler's choices for each token read, or None.
  """

  tokens: jax.Array
  token_mask: jax.Array
  mask: jax.Array
  logp_sampler: jax.Array
  advantage: jax.Array
  experts: jax.Array | None = None


@flax.struct.dataclass
class _Batch:
  """Experience, and what the policy before the update and the reference think of it."""

  experience: Experience
  logp_old: jax.Array | None
  logp_reference: jax.Array | None
  spec: ObjectiveSpec


def experience(
    prompts: list[np.ndarray], tokens_SN: np.ndarray, lengths_S: np.ndarray,
    logprobs_SN: np.ndarray, advantage_S: np.ndarray, learned_S: np.ndarray, *,
    experts_STLK: np.ndarray | None = None, multiple: int = 32) -> Experience:
  """Lays out a rollout.

  Args:
    prompts: token ids of each sequence's prompt.
    tokens_SN: completions; see `rl.rollout.Rollout`.
    lengths_S: of the completions.
    logprobs_SN: of the completions' tokens.
    advantage_S: of each sequence.
    learned_S: bool; the others are masked whole.
    experts_STLK: of the rollout, or None.
    multiple: T is a multiple of this, so that few shapes are compiled.
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
  """Log-probabilities [S, T] of each next token, in nats, and the routers' statistics.

  Args:
    net: the network.
    variables: its variables.
    tokens: int32 [S, T + 1].
    token_mask: bool [S, T]; what is outside is padding, which no statistic counts.
    temperature: that the tokens were sampled with.
    experts: [S, T, L, K], to be used in place of what the routers would choose.
  """
  chosen = None if experts is None else jnp.moveaxis(experts, 2, 0).astype(jnp.int32)
  output = net.apply(variables, tokens[:, :-1], segment_ids_BT=token_mask.astype(jnp.int32),
                     logits=False, mtp=False, experts_LBTK=chosen)
  logp = net.apply(variables, output.hidden_BTD, tokens[:, 1:], temperature=temperature,
                   method="token_logprobs")
  return logp, output.router


class PolicyObjective:
  """`rl.objective.policy_loss` in the form that `train.step` takes."""

  def __init__(self, net: Transformer, temperature: float | jax.Array, replay: bool = False):
    self.net, self.temperature, self.replay = net, temperature, replay

  def denominators(self, batch: _Batch) -> Sums:
    """Of the whole minibatch, its micro-batches along the leading axis."""
    whole = batch.experience
    return {"policy": jnp.maximum(denominator(whole.mask, batch.spec), 1),
            "sequence_balance": jnp.maximum(whole.token_mask.any(-1).sum(), 1).astype(jnp.float32)}

  def sums(self, variables: dict, batch: _Batch) -> tuple[Sums, AuxOutputs]:
    """The terms of one micro-batch."""
    seen = batch.experience
    logp, router = sequence_logprobs(
        self.net, variables, seen.tokens, seen.token_mask, self.temperature,
        seen.experts if self.replay else None)
    fixed = jax.lax.stop_gradient(logp)
    old = fixed if batch.logp_old is None else batch.logp_old
    loss, _, means = policy_loss(
        logp, old, batch.logp_reference, seen.advantage, seen.mask, batch.spec,
        logp_sampler=seen.logp_sampler)
    total = lambda x: jnp.where(seen.mask, x, 0).sum()
    tokens = seen.mask.sum().astype(jnp.float32)
    # The sampled tokens' surprise: an estimate of the entropy, free of bias where pi sampled them.
    means |= {"entropy": (total(-fixed), tokens),
              "sampling_gap": (total(jnp.abs(old - seen.logp_sampler)), tokens)}
    if seen.experts is not None and not self.replay:
      means["routing_agreement"] = _agreement(router["moe_layers"].experts_BTK, seen)
    sums, real_S = {"policy": loss}, seen.token_mask.any(-1)
    chosen = self.net.cfg.moe.experts_per_token if router else 0
    sums["sequence_balance"] = sum(
        ((balance.sequence_balance_loss(stats, chosen) * real_S).sum()
         for stats in router.values()), jnp.float32(0))
    return sums, AuxOutputs(
        {name: stats.load_BE.sum(-2) for name, stats in router.items()}, means)


def _agreement(experts_LSTK: jax.Array, seen: Experience) -> tuple[jax.Array, jax.Array]:
  """Of the sampler's choices, those that the trainer's routers make too: (sum, count)."""
  theirs_LSTK = jnp.moveaxis(seen.experts, 2, 0)
  both_LSTK = (experts_LSTK[..., None] == theirs_LSTK[..., None, :]).any(-1)
  counted = seen.token_mask[..., None] & jnp.ones_like(both_LSTK)
  return (both_LSTK & counted).sum(dtype=jnp.float32), counted.sum(dtype=jnp.float32)


def init_rl_state(
    variables: dict, cfg: RLConfig, mesh: ShardedModel | None = None) -> RLState:
  """The state before the first step; the reference is the model that it starts from.

  Args:
    variables: of that model.
    cfg: the run.
    mesh: where the state is to be; None for where the variables are.
  """
  variables = {"params": variables["params"], "router": variables.get("router", {})}
  if mesh:
    variables = jax.device_put(variables, {"router": {}} | mesh.variables())
  needs_reference = cfg.objective.spec(1).kl_in != "none"
  reference = jax.tree.map(lambda x: jnp.array(x, copy=True), variables)
  value = init_value(variables, cfg.optimizer) if cfg.objective.name == "ppo" else None
  state = RLState(
      init_state(variables, cfg.optimizer), reference if needs_reference else None, value)
  return jax.device_put(state, state_shardings(state, mesh)) if mesh else state


def state_shardings(state: RLState, mesh: ShardedModel) -> RLState:
  """A NamedSharding for every array of a state, or of its shapes."""
  variables, value = {"router": {}} | mesh.variables(), state.value
  if value is not None:
    head = jax.tree.map(lambda _: mesh.replicated(), value.params["head"])
    value = mesh.train_state(value, {"net": variables["params"], "head": head})
  return RLState(mesh.train_state(state.train),
                 None if state.reference is None else variables, value)


def abstract_rl_state(
    variables: dict, cfg: RLConfig, mesh: ShardedModel | None = None) -> RLState:
  """Shapes and formats of `init_rl_state`, and on a mesh its places, for restoring one."""
  shapes = jax.eval_shape(lambda v: init_rl_state(v, cfg), variables)
  if mesh is None:
    return shapes
  return jax.tree.map(
      lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      shapes, state_shardings(shapes, mesh))


def refresh(state: RLState) -> RLState:
  """The policy becomes the reference (R1: every 400 steps)."""
  return state.replace(reference=jax.tree.map(jnp.copy, state.train.variables))


def make_update(
    model_cfg: model.ModelConfig, cfg: RLConfig,
) -> Callable[[RLState, Experience, dict, jax.Array], tuple[RLState, dict]]:
  """Returns `update(state, experience, hyper, key) -> state, metrics`, jitted, the state donated.

  It takes `cfg.objective.updates` optimizer steps on minibatches drawn with the key; `hyper` holds
  "learning_rate" and "value_learning_rate", of each of those steps, "spec", the objective,
  "temperature" and "gae_lambda". Metrics are means over the steps. The experience has
  `cfg.sampling.num_sequences` rows.

  Where `cfg.mesh` has several devices, the state is on the mesh of `train.mesh.make_sharded_model`
  and stays sharded as `state_shardings` says; every micro-batch is divided over the devices.

  Raises:
    ValueError: if there are not as many devices, or a micro-batch does not divide over them.
  """
  mesh = make_sharded_model(model_cfg, cfg.mesh)
  micro = cfg.objective.micro_batch_size or (
      cfg.sampling.num_sequences // cfg.objective.minibatches)
  require(mesh is None or micro % mesh.batch_devices == 0,
          f"{micro} sequences at a time do not divide over the devices of {cfg.mesh}: change "
          "objective.micro_batch_size, or sampling.num_prompts")
  objective = ObjectiveConfig(**{name: getattr(cfg.objective, name) for name in (
      "minibatches", "inner_epochs", "micro_batch_size", "bias_rate", "sequence_balance",
      "routing")}, name="ppo" if cfg.objective.name == "ppo" else "grpo")
  return _compiled(model_cfg, mesh, objective, without_data_fields(cfg.optimizer, "optimizer"))


@functools.lru_cache(maxsize=8)
def _compiled(model_cfg, mesh, objective, optimizer):
  """One for all runs that differ in what enters as data."""
  net, jit = (mesh.transformer(), mesh.jit) if mesh else (Transformer(model_cfg), jax.jit)
  return jit(functools.partial(_update, net, decay_mask(model_cfg), optimizer, objective),
             donate_argnums=0)


def _update(net, decays, optimizer, objective, state, seen, hyper, key):
  sequences = len(seen.tokens)
  micro = objective.micro_batch_size or sequences // objective.minibatches
  num_micro = sequences // objective.minibatches // micro
  temperature = hyper["temperature"]
  replay = objective.routing == "replayed"
  quantize = functools.partial(model.quantize_weights, net.cfg)
  step = make_train_step(PolicyObjective(net, temperature, replay), optimizer, decays, num_micro,
                         prepare=quantize)
  spec = hyper["spec"]

  def logprobs(variables, experts=None):
    variables = variables | quantize(variables["params"])
    one = lambda part: sequence_logprobs(net, variables, part[0], part[1], temperature, part[2])[0]
    parts = _split((seen.tokens, seen.token_mask, experts), -1, micro)
    return jax.lax.map(one, parts).reshape(sequences, -1)

  ppo = objective.name == "ppo"
  # With one step per rollout, the policy that learns still is the one that sampled.
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
    policy, critic = carry
    rows, learning_rate, value_learning_rate = at
    part = jax.tree.map(lambda x: _split(x[rows], num_micro, micro), batch)
    part = part.replace(spec=jax.tree.map(lambda x: jnp.full(num_micro, x, jnp.float32), spec))
    with_weights = lambda rate, weights: {
        "learning_rate": rate, "bias_rate": jnp.float32(objective.bias_rate), "weights": weights,
        "num_micro_batches": num_micro}
    policy, metrics = step(policy, part, with_weights(
        learning_rate, {"policy": 1.0, "sequence_balance": objective.sequence_balance}))
    if ppo:
      critic, of_critic = value_step(
          critic, (part.experience, _split(returns[rows], num_micro, micro)),
          with_weights(value_learning_rate, {"value": 1.0}))
      metrics |= {"value/loss": of_critic["loss_value"], "value/grad_norm": of_critic["grad_norm"]}
    return (policy, critic), metrics

  (policy, critic), metrics = jax.lax.scan(
      one, (state.train, state.value),
      (_minibatches(sequences, objective, key), hyper["learning_rate"],
       hyper["value_learning_rate"]))
  skipped = metrics.pop("skipped")[-1]
  metrics = jax.tree.map(lambda x: x.mean(0), metrics)
  return state.replace(train=policy, value=critic), {**metrics, "skipped": skipped}


def _split(tree, first: int, second: int):
  """Rows as [first, second] of them, on a mesh the second axis spread over it."""
  def one(x):
    x = x.reshape(first, second, *x.shape[1:])
    return nn.with_logical_constraint(x, (None, "batch", *[None] * (x.ndim - 2)))

  return jax.tree.map(one, tree)


def _minibatches(sequences: int, objective, key) -> jax.Array:
  """Rows of every optimizer step; in another order in every epoch, if there are several steps."""
  if objective.updates == 1:
    return jnp.arange(sequences)[None]
  keys = jax.random.split(key, objective.inner_epochs)
  order = jax.vmap(lambda key: jax.random.permutation(key, sequences))(keys)
  return order.reshape(objective.updates, -1)

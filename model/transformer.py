"""The whole network, whose config makes it V3, V2, Llama or Qwen2.

Shape letters:  L layers  B batch  T tokens  D model width  V vocabulary  E routed experts
                K experts per token
"""

import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from model.attention import Context, GroupedQueryAttention, is_fused_forward
from model.balance import RouterStats
from model.config import MLAConfig, ModelConfig
from model.decoding.cache import Cache
from model.layers import Embedding, RMSNorm, SwiGLU, weight
from model.logprobs import logprob_sum, logprobs_and_entropy, token_logprobs
from model.mla import MultiHeadLatentAttention
from model.moe import Dispatch, MoE, local_dispatch
from model.rope import rotation

_POLICIES = jax.checkpoint_policies
# Rematerialisation policies: what is kept of a layer's forward pass; the backward pass recomputes
# the rest.
REMAT = {
    # Keep everything, recompute nothing.
    "none": None,
    # V3 section 3.2.3: recompute norms, MLA's up-projections, attention weights and the SwiGLU
    # product; keep the results of the wide matrix products and of attention.
    "v3": _POLICIES.save_from_both_policies(
        _POLICIES.save_only_these_names("latent", "qkv", "attention", "ffn_gate_up"),
        is_fused_forward),
    # Keep the results of matrix products with weights.
    "dots": _POLICIES.dots_with_no_batch_dims_saveable,
    # Keep only the inputs of the layer.
    "full": _POLICIES.nothing_saveable,
}


@flax.struct.dataclass
class Output:
  """The results of a forward pass. Under jit, those that the caller ignores are not computed.

  Attributes:
    hidden_BTD: hidden states after the final norm, which the output head reads.
    mtp_input_BTD: hidden states that the first MTP module reads; None without modules.
    logits_BTV: float32; None if they were not asked for.
    mtp_hidden: for every MTP module k = 1, 2, ..., hidden states [B, T, D] after its final norm.
      Position i depends on tokens up to i + k, and predicts token i + k + 1. The last k positions,
      of the row and of every segment, have no token i + k to read, and are meaningless.
    mtp_logits: for every MTP module, float32 [B, T, V]; None if logits were not asked for.
    router: RouterStats, from which `model.balance` computes losses and bias updates, by the name of
      the stack of layers or of the MTP module; those of a stack have a leading layer axis.
    cache: the cache that was passed in, with these tokens appended; None without a cache.
  """

  hidden_BTD: jax.Array
  mtp_input_BTD: jax.Array | None
  logits_BTV: jax.Array | None
  mtp_hidden: tuple[jax.Array, ...]
  mtp_logits: tuple[jax.Array, ...] | None
  router: dict[str, RouterStats]
  cache: Cache | None

  @property
  def expert_load_LE(self) -> jax.Array:
    """int32, the tokens of the batch that each expert of each MoE layer received, without MTP's."""
    return self.router["moe_layers"].load_BE.sum(-2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def unstack(tree: Any, count: int) -> list[Any]:
  """Returns the `count` slices of every array of a tree along its first axis, as trees.

  The backward pass writes each slice's gradient into one array as soon as it is computed. That of
  plain slicing would concatenate the gradients at the end, which takes four times as long on a GPU.
  """
  return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(count)]


def _join(count, _, slices):
  def join(*each):
    joined = jax.lax.full_like(each[0], 0, shape=(count, *each[0].shape))
    for i, x in enumerate(each):
      joined = jax.lax.dynamic_update_index_in_dim(joined, x, i, 0)
    return joined

  return (jax.tree.map(join, *slices),)


unstack.defvjp(lambda tree, count: (unstack(tree, count), None), _join)


def _layer(index: int) -> str:
  """Returns the key of a layer's parameters where they are not stacked; keys sort by index."""
  return f"layer_{index:04d}"


class Block(nn.Module):
  """Pre-norm attention, then a pre-norm FFN: dense, or a mixture of experts.

  Attributes:
    cfg: the architecture.
    routed: whether the FFN is a mixture of experts.
    experts, dispatch, mla_form, attend: see `Transformer`.
  """

  cfg: ModelConfig
  routed: bool
  experts: str | None
  dispatch: Dispatch
  mla_form: str | None
  attend: str | None

  @nn.compact
  def __call__(
      self, carry: tuple[jax.Array, Cache | None], layer: jax.Array, context: Context,
  ) -> tuple[tuple[jax.Array, Cache | None], RouterStats | None]:
    """Computes one layer.

    Args:
      carry: the residual stream [B, T, D], and the cache of all layers or None.
      layer: int32 scalar, the layer's index, in the cache among others.
      context: what all layers share.

    Returns:
      The new carry, and the statistics of the router; None if the FFN is dense.
    """
    cfg, (x_BTD, cache) = self.cfg, carry
    if isinstance(cfg.attention, MLAConfig):
      attention = MultiHeadLatentAttention(
          cfg, self.mla_form, self.attend, name="attention")
    else:
      attention = GroupedQueryAttention(cfg, self.attend, name="attention")
    mixed_BTD, cache = attention(
        RMSNorm(cfg, name="attention_norm")(x_BTD), context, cache, layer)
    x_BTD += mixed_BTD

    normed_BTD, stats = RMSNorm(cfg, name="ffn_norm")(x_BTD), None
    if not self.routed:
      y_BTD = SwiGLU(cfg, cfg.ffn_dim, name="ffn")(normed_BTD)
    else:
      moe = MoE(cfg, self.experts, self.dispatch, name="ffn")
      chosen = context.experts_LBTK
      if chosen is not None:
        chosen = jax.lax.dynamic_index_in_dim(chosen, layer - cfg.num_dense_layers, keepdims=False)
      y_BTD, stats = moe(normed_BTD, context.real_BT, chosen)
    x_BTD = nn.with_logical_constraint(x_BTD + y_BTD, ("batch", "length", None))
    return (x_BTD, cache), stats


class MTPModule(nn.Module):
  """One module of multi-token prediction (V3 section 2.2, eq. 21-22), without the shared head.

  Attributes:
    cfg: the architecture; its `mtp` must not be None.
    block: makes the module's block, given its name.
  """

  cfg: ModelConfig
  block: Any

  @nn.compact
  def __call__(
      self, previous_BTD: jax.Array, embedded_BTD: jax.Array, context: Context,
      cache: Cache | None = None, layer: int = 0,
  ) -> tuple[jax.Array, jax.Array, RouterStats | None, Cache | None]:
    """Computes this depth's hidden states.

    Args:
      previous_BTD: hidden states of the depth before, or of the trunk for the first module, and for
        all parallel ones.
      embedded_BTD: at position i, the embedding of token i + k, k being this depth. A parallel
        module ignores it.
      context: what all layers share.
      cache: the cache of all modules, or None.
      layer: index of this module in it.

    Returns:
      The hidden states [B, T, D] before and after the module's final norm; the statistics of its
      router, None if its FFN is dense; and the cache.
    """
    cfg, d_model = self.cfg, self.cfg.d_model
    hidden = RMSNorm(cfg, name="hidden_norm")(previous_BTD)
    embedded = RMSNorm(cfg, name="embedding_norm")(
        previous_BTD if cfg.mtp.form == "parallel" else embedded_BTD)
    pair = (hidden, embedded) if cfg.mtp.concat == "hidden_first" else (embedded, hidden)
    w_proj = weight(self, "w_proj", cfg, (None, "embed"), (2 * d_model, d_model))
    h_BTD = cfg.numerics.linear("btc,cd->btd", jnp.concatenate(pair, axis=-1), w_proj)
    (h_BTD, cache), stats = self.block(name="block")((h_BTD, cache), jnp.int32(layer), context)
    return h_BTD, RMSNorm(cfg, name="norm")(h_BTD), stats, cache


class Transformer(nn.Module):
  """The language model.

  Attributes:
    cfg: the architecture.
    remat: what the backward pass recomputes, a key of REMAT.
    experts: implementation of the routed experts, a key of `model.experts.EXPERTS`; None for that
      which `model.experts.fastest_experts` returns.
    dispatch: how tokens reach experts on other devices; see `model.moe`.
    mla_form: "expanded" or "absorbed"; None for the cheaper one at the given shapes.
    attend: implementation of attention; see `model.attention.attend`, and for "mla_decode"
      `model.mla.MultiHeadLatentAttention`.
    unroll: layers in one iteration of the loop over layers. More make steps faster and compilation
      slower. If it is at least the number of layers, there is no loop, and no copying of parameters
      and results out of and into arrays of all layers.
  """

  cfg: ModelConfig
  remat: str = "none"
  experts: str | None = None
  dispatch: Dispatch = local_dispatch
  mla_form: str | None = None
  attend: str | None = None
  unroll: int = 1

  def setup(self):
    self.embedding = Embedding(self.cfg)
    self.stacks = [
        nn.scan(
            self._block_class(looped=self.unroll == 1),
            variable_axes={"params": 0, "router": 0, "quantized": 0},
            split_rngs={"params": True}, in_axes=(0, nn.broadcast), length=count,
            metadata_params={nn.PARTITION_NAME: "layers"}, unroll=self.unroll,
        )(**self._block_fields(experts), name=name)
        for name, count, experts in self.cfg.layer_stacks()]
    self.norm = RMSNorm(self.cfg)
    depth = self.cfg.mtp.depth if self.cfg.mtp else 0
    fields = self._block_fields(self.cfg.moe is not None)
    block = lambda name: self._block_class()(**fields, name=name)
    self.mtp = [MTPModule(self.cfg, block, name=f"mtp_{k}") for k in range(1, depth + 1)]

  def _block_class(self, *, looped: bool = False):
    if self.remat == "none":
      return Block
    # Without a loop, XLA's common subexpression elimination would replace recomputed values by
    # those of the forward pass. In a loop it cannot, so that it need not be prevented.
    return nn.remat(Block, policy=REMAT[self.remat], prevent_cse=not looped)

  def _block_fields(self, experts: bool) -> dict[str, Any]:
    return {"cfg": self.cfg, "routed": experts, "experts": self.experts, "dispatch": self.dispatch,
            "mla_form": self.mla_form, "attend": self.attend}

  def __call__(
      self, tokens_BT: jax.Array, *, positions_BT: jax.Array | None = None,
      segment_ids_BT: jax.Array | None = None, cache: Cache | None = None,
      logits: bool = True, mtp: bool | None = None, experts_LBTK: jax.Array | None = None,
  ) -> Output:
    """Runs the network.

    Args:
      tokens_BT: int32, token ids.
      positions_BT: int32, positions for the rotary embedding; None counts from the length of each
        row in the cache, or from 0 without a cache.
      segment_ids_BT: int32; tokens attend only within their segment. Segment 0 is padding, which
        experts compute but no router statistic counts. None attends across documents, as V3's
        pre-training does. Cannot be used with a cache.
      cache: keys and values of earlier tokens, to which those of these tokens are appended.
      logits: whether to compute logits.
      mtp: whether to run the MTP modules; None runs them if there are any and no cache is given.
      experts_LBTK: int32, experts to use in the trunk's MoE layers, as in `experts_BTK` of the
        router statistics of an earlier pass; None lets the routers choose.

    Returns:
      Hidden states, logits and router statistics, and the cache; see `Output`.

    Raises:
      ValueError: if a cache is given together with segments or with MTP, has another number of
        rows, or has fewer slots than there are tokens.
    """
    if mtp is None:
      mtp = bool(self.mtp) and cache is None
    if cache is not None and (mtp or segment_ids_BT is not None):
      raise ValueError("a cache can be used with neither MTP modules nor segment_ids_BT: leave out "
                       "both, or the cache")
    if cache is not None:
      cache.require_fit(*tokens_BT.shape)
    context = self._context(tokens_BT, positions_BT, segment_ids_BT, cache, experts_LBTK)
    embedded_BTD = self.embedding.embed(tokens_BT)
    x_BTD, cache, router = self._trunk(embedded_BTD, context, cache)
    normed_BTD = self.norm(x_BTD)

    mtp_hidden, start_BTD = (), self._mtp_input(x_BTD, normed_BTD) if self.mtp else None
    if mtp:
      mtp_hidden = self._mtp(start_BTD, embedded_BTD, context, router)
    return Output(
        hidden_BTD=normed_BTD, mtp_input_BTD=start_BTD,
        logits_BTV=self.unembed(normed_BTD) if logits else None,
        mtp_hidden=mtp_hidden,
        mtp_logits=tuple(self.unembed(h) for h in mtp_hidden) if logits else None,
        router=router, cache=cache)

  def by_layer(self, params: dict) -> dict:
    """Unstacks the parameters of layers that run without a loop: one tree for each layer.

    The network takes parameters in either form. Gradients of unstacked parameters stay where the
    backward pass of each layer wrote them; those of stacked parameters have to be joined, which is
    slow on a GPU if it is fused with a sum.

    Args:
      params: the tree of parameters, as in `model.init(...)["params"]`; what is unstacked already
        stays as it is.
    """
    unstacked = {name: {_layer(i): each for i, each in enumerate(unstack(params[name], count))}
                 for name, count, _ in self.cfg.layer_stacks()
                 if not self._loops(count) and _layer(0) not in params[name]}
    return {**params, **unstacked}

  def _loops(self, count: int) -> bool:
    return self.unroll < max(2, count)

  def unembed(self, hidden_BTD: jax.Array) -> jax.Array:
    """Applies the output head, which MTP modules share: [B, T, D] to float32 logits [B, T, V]."""
    return self.cfg.numerics.einsum_f32("btd,dv->btv", hidden_BTD, self.embedding.head_DV())

  def token_logprobs(
      self, hidden_BTD: jax.Array, targets_BT: jax.Array, *, chunk_size: int = 512,
      temperature: float | jax.Array = 1.0) -> jax.Array:
    """Computes `model.logprobs.token_logprobs` with this model's head and numerics."""
    return token_logprobs(
        hidden_BTD, self.embedding.head_DV(), targets_BT, numerics=self.cfg.numerics,
        chunk_size=chunk_size, temperature=temperature)

  def logprobs_and_entropy(
      self, hidden_BTD: jax.Array, targets_BT: jax.Array, *,
      temperature: float | jax.Array = 1.0) -> tuple[jax.Array, jax.Array]:
    """Computes `model.logprobs.logprobs_and_entropy` with this model's head and numerics."""
    return logprobs_and_entropy(
        hidden_BTD, self.embedding.head_DV(), targets_BT, numerics=self.cfg.numerics,
        temperature=temperature)

  def logprob_sum(
      self, hidden_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
    """Computes `model.logprobs.logprob_sum` with this model's head and numerics."""
    return logprob_sum(hidden_BTD, self.embedding.head_DV(), targets_BT, weights_BT,
                       numerics=self.cfg.numerics)

  def _context(self, tokens_BT, positions_BT, segment_ids_BT, cache, experts_LBTK) -> Context:
    num_tokens = tokens_BT.shape[1]
    slots_BT = (jnp.arange(num_tokens, dtype=jnp.int32)[None] if cache is None
                else cache.new_slots_BT(num_tokens))
    if positions_BT is None:
      positions_BT = slots_BT
    cos_BTr, sin_BTr = rotation(self.cfg.rope, self.cfg.attention.rope_dim, positions_BT)
    real_BT = None if segment_ids_BT is None else segment_ids_BT != 0
    return Context(cos_BTr, sin_BTr, slots_BT, segment_ids_BT, real_BT, experts_LBTK,
                   causal=cache is None)

  def _trunk(self, x_BTD, context, cache):
    """Runs the layers; returns the residual stream, the cache, and router statistics by stack."""
    carry, router, first = (x_BTD, cache), {}, 0
    for stack, (name, count, experts) in zip(self.stacks, self.cfg.layer_stacks(), strict=True):
      layers = jnp.arange(first, first + count, dtype=jnp.int32)
      if self._loops(count) or self.is_initializing():
        carry, stats = stack(carry, layers, context)
      else:
        carry, stats = self._unrolled(stack, experts, carry, layers, first, context)
      if experts:
        router[name] = stats
      first += count
    x_BTD, cache = carry
    if cache is not None:
      cache = cache.with_lengths(cache.lengths_B + x_BTD.shape[1])
    return x_BTD, cache, router

  def _unrolled(self, stack, experts, carry, layers, first, context):
    """Does what `stack` does, without a loop that copies out of and into arrays of all layers."""
    block = self._block_class()(**self._block_fields(experts), parent=None)
    # Jitted, so that the block is traced once for all layers.
    run = jax.jit(lambda variables, *operands: block.apply(variables, *operands))
    variables = dict(stack.variables)
    params = variables.pop("params")
    params = list(params.values()) if _layer(0) in params else unstack(params, len(layers))
    (x_BTD, cache), every_stats = carry, []
    apart = cache is not None and cache.is_apart
    for i in range(len(layers)):
      others = jax.tree.map(lambda x, i=i: x[i], variables)
      own = cache.of_layer(first + i) if apart else cache
      (x_BTD, own), stats = run(
          {"params": params[i]} | others, (x_BTD, own), layers[i], context)
      cache = cache.with_layer(first + i, own) if apart else own
      every_stats.append(stats)
    return (x_BTD, cache), jax.tree.map(lambda *each: jnp.stack(each), *every_stats)

  def draft(
      self, previous_BTD: jax.Array, tokens_BT: jax.Array, cache: Cache, *, module: int,
  ) -> tuple[jax.Array, jax.Array, Cache]:
    """Runs one MTP module on T positions of each row, from the row's length in its cache on.

    Args:
      previous_BTD: what the module reads of those positions: `Output.mtp_input_BTD`, or what this
        method returned for the module before.
      tokens_BT: int32, at position i the token i + `module`.
      cache: of the modules, one layer for each, `init_cache(..., layers=depth)`.
      module: k, counted from 1.

    Returns:
      What the next module reads, and hidden states after the module's final norm, which `unembed`
      reads to predict token i + k + 1 at position i; both [B, T, D]. The cache has the positions'
      entries, and unchanged lengths.
    """
    context = self._context(tokens_BT, None, None, cache, None)
    raw_BTD, normed_BTD, _, cache = self.mtp[module - 1](
        previous_BTD, self.embedding.embed(tokens_BT), context, cache, module - 1)
    return self._next_mtp_input(previous_BTD, raw_BTD, normed_BTD), normed_BTD, cache

  def _mtp_input(self, raw_BTD, normed_BTD):
    """Returns the one of a depth's hidden states, before or after its norm, that the next reads."""
    return normed_BTD if self.cfg.mtp.hidden == "post_norm" else raw_BTD

  def _next_mtp_input(self, previous_BTD, raw_BTD, normed_BTD):
    """Returns what the module after one reads, which parallel modules read alike."""
    if self.cfg.mtp.form == "parallel":
      return previous_BTD
    return self._mtp_input(raw_BTD, normed_BTD)

  def _mtp(self, previous_BTD, embedded_BTD, context, router):
    """Runs the MTP modules one after another, and adds their statistics to `router`.

    At position i, depth k reads the embedding of token i + k. Returns their normed hidden states.
    """
    num_tokens, normed = embedded_BTD.shape[1], []
    real_BT = jnp.ones((1, 1), bool) if context.real_BT is None else context.real_BT
    for k, module in enumerate(self.mtp, start=1):
      ahead_BTD = jnp.roll(embedded_BTD, -k, axis=1)
      real_k = real_BT & (jnp.arange(num_tokens) < num_tokens - k)
      if context.segment_ids_BT is not None:
        real_k &= jnp.roll(context.segment_ids_BT, -k, axis=1) == context.segment_ids_BT
      real_k = jnp.broadcast_to(real_k, embedded_BTD.shape[:2])
      raw_BTD, normed_BTD, stats, _ = module(
          previous_BTD, ahead_BTD, context.replace(real_BT=real_k, experts_LBTK=None))
      previous_BTD = self._next_mtp_input(previous_BTD, raw_BTD, normed_BTD)
      normed.append(normed_BTD)
      if stats is not None:
        router[f"mtp_{k}"] = stats
    return tuple(normed)

"""The whole network: V3, V2, Llama and Qwen2 are values of its config.

Shape letters:  L layers  B batch  T tokens  D model width  V vocabulary  E routed experts
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
from model.experts import fastest_experts
from model.layers import Embedding, RMSNorm, SwiGLU, weight
from model.logprobs import logprob_sum, token_logprobs
from model.mla import MultiHeadLatentAttention
from model.moe import Dispatch, MoE, local_dispatch
from model.rope import rotation

_POLICIES = jax.checkpoint_policies
REMAT = {
    # Keep everything, recompute nothing.
    "none": None,
    # V3 section 3.2.3: recompute norms, MLA's up-projections, attention weights and the SwiGLU
    # product; keep what the wide matrix products and the attention gave.
    "v3": _POLICIES.save_from_both_policies(
        _POLICIES.save_only_these_names("latent", "qkv", "attention", "ffn_gate_up"),
        is_fused_forward),
    # Keep the results of matrix products with weights.
    "dots": _POLICIES.dots_with_no_batch_dims_saveable,
    # Keep only what enters a layer.
    "full": _POLICIES.nothing_saveable,
}


@flax.struct.dataclass
class Output:
  """What a forward pass gives. Under jit, what the caller leaves unused is not computed.

  Attributes:
    hidden_BTD: after the final norm: what the head reads.
    logits_BTV: float32, or None if not asked for.
    mtp_hidden: per MTP depth k (from 1), [B, T, D] after that module's norm: position i there knows
      tokens up to i + k and predicts token i + k + 1. The last k positions, of the row and of every
      segment, have no token of theirs to read: they are meaningless.
    mtp_logits: per depth, float32 [B, T, V]; None if not asked for.
    router: RouterStats by the name of the stack or module that the router sits in; those of a
      stack have a leading layer axis. What `model.balance` turns into losses and bias updates.
    cache: the cache passed in, with these tokens appended.
  """

  hidden_BTD: jax.Array
  logits_BTV: jax.Array | None
  mtp_hidden: tuple[jax.Array, ...]
  mtp_logits: tuple[jax.Array, ...] | None
  router: dict[str, RouterStats]
  cache: Cache | None

  @property
  def expert_load_LE(self) -> jax.Array:
    """int32: tokens that each expert of each MoE layer received in this batch, MTP left out."""
    return self.router["moe_layers"].load_BE.sum(-2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def unstack(tree: Any, count: int) -> list[Any]:
  """Slices of every array along its first axis.

  Gradients are written to their places in one array as they come. Slicing alone would have them
  concatenated at the end, which on a GPU takes four times as long.
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
  """The key of a layer's parameters where they are apart; in dictionaries sorted as it counts."""
  return f"layer_{index:04d}"


class Block(nn.Module):
  """Pre-norm attention, then a pre-norm dense or mixture-of-experts FFN."""

  cfg: ModelConfig
  experts: str | None  # how routed experts are computed; None for a dense FFN
  dispatch: Dispatch
  mla_form: str | None
  attend: str | None

  @nn.compact
  def __call__(
      self, carry: tuple[jax.Array, Cache | None], layer: jax.Array, context: Context,
  ) -> tuple[tuple[jax.Array, Cache | None], RouterStats | None]:
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
    if self.experts is None:
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
  """One depth of multi-token prediction (V3 section 2.2, eq. 21-22); the head is the trunk's."""

  cfg: ModelConfig
  block: Any

  @nn.compact
  def __call__(
      self, previous_BTD: jax.Array, embedded_BTD: jax.Array, context: Context,
  ) -> tuple[jax.Array, jax.Array, RouterStats | None]:
    """Returns this depth's hidden state before and after its final norm, and its router's view."""
    cfg, d_model = self.cfg, self.cfg.d_model
    hidden = RMSNorm(cfg, name="hidden_norm")(previous_BTD)
    embedded = RMSNorm(cfg, name="embedding_norm")(embedded_BTD)
    pair = (hidden, embedded) if cfg.mtp.concat == "hidden_first" else (embedded, hidden)
    w_proj = weight(self, "w_proj", cfg, (None, "embed"), (2 * d_model, d_model))
    h_BTD = cfg.numerics.linear("btc,cd->btd", jnp.concatenate(pair, axis=-1), w_proj)
    (h_BTD, _), stats = self.block(name="block")((h_BTD, None), jnp.int32(0), context)
    return h_BTD, RMSNorm(cfg, name="norm")(h_BTD), stats


class Transformer(nn.Module):
  """The language model.

  Attributes:
    cfg: the architecture.
    remat: what the backward pass recomputes, a key of REMAT.
    experts: how routed experts are computed, a key of `model.experts.EXPERTS`; None for the fastest
      that the numerics allow.
    dispatch: how tokens reach experts on other devices; see `model.moe`.
    mla_form: "expanded" or "absorbed"; None chooses the cheaper for the shapes at hand.
    attend: how attention is computed, as in `model.attention.attend`; None for what is fastest.
    unroll: layers compiled one after another in the loop over layers: more make steps faster and
      compiling slower. As many as there are layers need no loop, nor copies to and from it.
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
    # Only in a loop can the compiler not take what is computed again for what was before.
    return nn.remat(Block, policy=REMAT[self.remat], prevent_cse=not looped)

  def _block_fields(self, experts: bool) -> dict[str, Any]:
    way = (self.experts or fastest_experts(self.cfg)) if experts else None
    return {"cfg": self.cfg, "experts": way, "dispatch": self.dispatch, "mla_form": self.mla_form,
            "attend": self.attend}

  def __call__(
      self, tokens_BT: jax.Array, *, positions_BT: jax.Array | None = None,
      segment_ids_BT: jax.Array | None = None, cache: Cache | None = None,
      logits: bool = True, mtp: bool | None = None, experts_LBTK: jax.Array | None = None,
  ) -> Output:
    """Runs the network.

    Args:
      tokens_BT: int32 token ids.
      positions_BT: rotary positions; None counts from each row's cache length, or 0.
      segment_ids_BT: int32; tokens attend only within their segment, and a segment 0 is padding,
        which experts see but no router statistic counts. None attends across documents, as V3's
        pre-training does. Not with a cache.
      cache: keys and values of earlier tokens; these are appended to it.
      logits: whether to compute logits.
      mtp: whether to run the MTP modules; None for whenever there are some and no cache.
      experts_LBTK: experts to use in the trunk's MoE layers, as `Output.router` of an earlier pass
        has them; None lets the routers choose.

    Raises:
      ValueError: for a cache and segments together, or MTP with a cache.
    """
    if mtp is None:
      mtp = bool(self.mtp) and cache is None
    if cache is not None and (mtp or segment_ids_BT is not None):
      raise ValueError("a cache goes with neither MTP modules nor segment_ids_BT")
    context = self._context(tokens_BT, positions_BT, segment_ids_BT, cache, experts_LBTK)
    embedded_BTD = self.embedding.embed(tokens_BT)
    x_BTD, cache, router = self._trunk(embedded_BTD, context, cache)
    normed_BTD = self.norm(x_BTD)

    mtp_hidden = ()
    if mtp:
      start = normed_BTD if self.cfg.mtp.hidden == "post_norm" else x_BTD
      mtp_hidden = self._mtp(start, embedded_BTD, context, router)
    return Output(
        hidden_BTD=normed_BTD,
        logits_BTV=self.unembed(normed_BTD) if logits else None,
        mtp_hidden=mtp_hidden,
        mtp_logits=tuple(self.unembed(h) for h in mtp_hidden) if logits else None,
        router=router, cache=cache)

  def by_layer(self, params: dict) -> dict:
    """Parameters with those of each layer apart, where layers run without a loop around them.

    That is an input like the stacked ones. Gradients for it are where backward passes of layers
    wrote them; those for stacked parameters are joined, which fused with a sum is slow on a GPU.
    """
    apart = {name: {_layer(i): each for i, each in enumerate(unstack(params[name], count))}
             for name, count, _ in self.cfg.layer_stacks() if not self._loops(count)}
    return {**params, **apart}

  def _loops(self, count: int) -> bool:
    return self.unroll < max(2, count)

  def unembed(self, hidden_BTD: jax.Array) -> jax.Array:
    """The shared output head: float32 logits."""
    return self.cfg.numerics.einsum_f32("btd,dv->btv", hidden_BTD, self.embedding.head_DV())

  def token_logprobs(
      self, hidden_BTD: jax.Array, targets_BT: jax.Array, *, chunk_size: int = 512,
      temperature: float | jax.Array = 1.0) -> jax.Array:
    """`model.logprobs.token_logprobs` with this model's head."""
    return token_logprobs(
        hidden_BTD, self.embedding.head_DV(), targets_BT, numerics=self.cfg.numerics,
        chunk_size=chunk_size, temperature=temperature)

  def logprob_sum(
      self, hidden_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
    """`model.logprobs.logprob_sum` with this model's head."""
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
    """The layers, stack by stack: the residual stream, the cache, and router statistics."""
    carry, router, first = (x_BTD, cache), {}, 0
    for stack, (name, count, experts) in zip(self.stacks, self.cfg.layer_stacks(), strict=True):
      layers = jnp.arange(first, first + count, dtype=jnp.int32)
      if self._loops(count) or self.is_initializing():
        carry, stats = stack(carry, layers, context)
      else:
        carry, stats = self._unrolled(stack, experts, carry, layers, context)
      if experts:
        router[name] = stats
      first += count
    x_BTD, cache = carry
    if cache is not None:
      cache = cache.with_lengths(cache.lengths_B + x_BTD.shape[1])
    return x_BTD, cache, router

  def _unrolled(self, stack, experts, carry, layers, context):
    """What `stack` does, layer after layer: nothing is copied to or from arrays of all layers."""
    block = self._block_class()(**self._block_fields(experts), parent=None)
    # Traced once for all layers.
    run = jax.jit(lambda variables, *operands: block.apply(variables, *operands))
    variables = dict(stack.variables)
    params = variables.pop("params")
    params = list(params.values()) if _layer(0) in params else unstack(params, len(layers))
    every_stats = []
    for i, layer in enumerate(layers):
      others = jax.tree.map(lambda x, i=i: x[i], variables)
      carry, stats = run({"params": params[i]} | others, carry, layer, context)
      every_stats.append(stats)
    return carry, jax.tree.map(lambda *each: jnp.stack(each), *every_stats)

  def _mtp(self, previous_BTD, embedded_BTD, context, router):
    """The MTP modules in turn: depth k reads the embedding of token i + k at position i."""
    num_tokens, normed = embedded_BTD.shape[1], []
    real_BT = jnp.ones((1, 1), bool) if context.real_BT is None else context.real_BT
    for k, module in enumerate(self.mtp, start=1):
      ahead_BTD = jnp.roll(embedded_BTD, -k, axis=1)
      real_k = real_BT & (jnp.arange(num_tokens) < num_tokens - k)
      if context.segment_ids_BT is not None:
        real_k &= jnp.roll(context.segment_ids_BT, -k, axis=1) == context.segment_ids_BT
      real_k = jnp.broadcast_to(real_k, embedded_BTD.shape[:2])
      raw_BTD, normed_BTD, stats = module(
          previous_BTD, ahead_BTD, context.replace(real_BT=real_k, experts_LBTK=None))
      previous_BTD = normed_BTD if self.cfg.mtp.hidden == "post_norm" else raw_BTD
      normed.append(normed_BTD)
      if stats is not None:
        router[f"mtp_{k}"] = stats
    return tuple(normed)

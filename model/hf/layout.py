"""Which tensor of a Hugging Face folder holds which part of our variables.

Loading and saving use the same table. In the folder a projection is [out, in], with the heads among
its rows; here it is [in, heads, width]. In the folder every layer and every expert has tensors of
its own; here they are leading axes of arrays.
"""

import dataclasses
import math
from collections.abc import Iterator

import jax
import numpy as np

from model.config import MLAConfig, ModelConfig


@dataclasses.dataclass(frozen=True)
class Piece:
  """A part of a stored tensor, and its place in one of our arrays.

  The stored tensor is reshaped to `view`, and the ranges `take` are cut out of it. Its axes are
  then moved to those of the array; the result is a block of the array, which begins at `start`.

  Attributes:
    path: keys of the array in the tree of variables.
    view: shape that the stored tensor is reshaped to.
    axes: the array's axis that each axis of the view becomes; the block's other axes have length 1.
    start: index in the array at which the block begins.
    take: for every axis of the view, the range (first, past the last) that belongs to the piece.
  """

  path: tuple[str, ...]
  view: tuple[int, ...]
  axes: tuple[int, ...]
  start: tuple[int, ...]
  take: tuple[tuple[int, int], ...]

  def block_shape(self) -> tuple[int, ...]:
    """Returns the shape of the block, with as many axes as the array."""
    shape = [1] * len(self.start)
    for axis, (low, high) in zip(self.axes, self.take, strict=True):
      shape[axis] = high - low
    return tuple(shape)

  def index(self) -> tuple[slice, ...]:
    """Returns the slices of the array that are the block."""
    return tuple(slice(at, at + length)
                 for at, length in zip(self.start, self.block_shape(), strict=True))

  def from_block(self, block: np.ndarray) -> np.ndarray:
    """Returns the part of the view that belongs to a block, with the view's order of axes."""
    order = sorted(range(len(self.axes)), key=lambda i: self.axes[i])
    squeezed = block.reshape([self.take[i][1] - self.take[i][0] for i in order])
    return squeezed.transpose(np.argsort(order))


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A stored tensor, and where its parts belong.

  Attributes:
    name: name in the folder.
    shape: shape in the folder.
    pieces: its parts and their places in our arrays.
    wide: whether it is in float32 whatever the folder's format.
    quantizable: whether it may be in FP8, along with a tensor of scales.
  """

  name: str
  shape: tuple[int, ...]
  pieces: tuple[Piece, ...]
  wide: bool = False
  quantizable: bool = False


@dataclasses.dataclass(frozen=True)
class Layout:
  """All tensors of a folder.

  Attributes:
    tensors: the tensors that it must contain.
    copies: tensors that it may contain too, by name, with the name of the tensor that each repeats.
  """

  tensors: tuple[Tensor, ...]
  copies: dict[str, str]


def num_tensors(cfg: ModelConfig) -> int:
  """Returns about how many tensors `layout(cfg)` has, without making them."""
  depth = cfg.mtp.depth if cfg.mtp else 0
  experts = cfg.moe.num_experts if cfg.moe else 0
  per_layer = 8 + (3 * experts if cfg.num_moe_layers or depth else 0)
  return (cfg.num_layers + depth) * per_layer


class _Builder:
  """Makes the tensors of one block, or of the model around the blocks.

  Attributes:
    cfg: the architecture.
    source: what the tensors' names in the folder begin with.
    path: what the paths of our arrays begin with, after "params".
    index: index of the layer (and expert) in our arrays, which their first axes are for.
  """

  def __init__(self, cfg: ModelConfig, source: str, path: tuple[str, ...], index: tuple[int, ...]):
    self.cfg, self.source, self.path, self.index = cfg, source, path, index

  def piece(self, path, view, axes, *, start=None, take=None) -> Piece:
    """Makes a Piece; `axes` and `start` leave out the leading axes of layer (and expert)."""
    lead = len(self.index)
    rank = lead + (len(start) if start else len(view))
    full = self.index + (tuple(start) if start else (0,) * (rank - lead))
    return Piece(("params", *self.path, *path), view, tuple(lead + axis for axis in axes), full,
                 take or tuple((0, size) for size in view))

  def tensor(self, name, shape, *pieces, **kwargs) -> Tensor:
    return Tensor(f"{self.source}{name}", shape, pieces, **kwargs)

  def vector(self, name, path, size) -> Tensor:
    return self.tensor(f"{name}.weight", (size,), self.piece(path, (size,), (0,)))

  def matrix(self, name, path, outs: tuple[int, ...], ins: tuple[int, ...], **kwargs) -> Tensor:
    """Makes a projection: [outs, ins] in the folder, [ins, outs] here, each one or several axes."""
    axes = tuple(range(len(ins), len(ins) + len(outs))) + tuple(range(len(ins)))
    return self.tensor(f"{name}.weight", (math.prod(outs), math.prod(ins)),
                       self.piece(path, outs + ins, axes), **kwargs)


def layout(cfg: ModelConfig) -> Layout:
  """Returns the layout of a folder of this architecture.

  MTP modules are layers after the last one, as in V3's release.
  """
  top = _Builder(cfg, "", (), ())
  embedding = ("embedding", "embedding")
  size = (cfg.vocab_size, cfg.d_model)
  tensors = [
      top.tensor("model.embed_tokens.weight", size, top.piece(embedding, size, (0, 1))),
      top.vector("model.norm", ("norm", "scale"), cfg.d_model)]
  copies = {}
  if cfg.tie_embeddings:
    copies["lm_head.weight"] = "model.embed_tokens.weight"
  else:
    tensors.append(top.matrix("lm_head", ("embedding", "head"), size[:1], size[1:]))
  number = 0
  for stack, count, experts in cfg.layer_stacks():
    for layer in range(count):
      tensors += _block(cfg, f"model.layers.{number}.", (stack,), (layer,), experts)
      number += 1
  head = "model.embed_tokens.weight" if cfg.tie_embeddings else "lm_head.weight"
  for k in range(1, (cfg.mtp.depth if cfg.mtp else 0) + 1):
    source = f"model.layers.{number}."
    tensors += _block(cfg, source, (f"mtp_{k}", "block"), (), cfg.moe is not None)
    tensors += _mtp(cfg, source, f"mtp_{k}")
    copies |= {f"{source}embed_tokens.weight": "model.embed_tokens.weight",
               f"{source}shared_head.head.weight": head}
    number += 1
  return Layout(tuple(tensors), copies)


def _mtp(cfg: ModelConfig, source: str, module: str) -> Iterator[Tensor]:
  at, d = _Builder(cfg, source, (module,), ()), cfg.d_model
  yield at.vector("hnorm", ("hidden_norm", "scale"), d)
  yield at.vector("enorm", ("embedding_norm", "scale"), d)
  yield at.vector("shared_head.norm", ("norm", "scale"), d)
  # In the folder, the half for the embedding always comes first.
  swap = cfg.mtp.concat == "hidden_first"
  halves = [at.piece(("w_proj",), (d, 2 * d), (1, 0), start=((d - low) if swap else low, 0),
                     take=((0, d), (low, low + d))) for low in (0, d)]
  yield at.tensor("eh_proj.weight", (d, 2 * d), *halves)


def _block(cfg, source, path, index, experts: bool) -> Iterator[Tensor]:
  at, d = _Builder(cfg, source, path, index), cfg.d_model
  yield at.vector("input_layernorm", ("attention_norm", "scale"), d)
  yield at.vector("post_attention_layernorm", ("ffn_norm", "scale"), d)
  yield from (_mla if isinstance(cfg.attention, MLAConfig) else _gqa)(at)
  if not experts:
    yield from _swiglu(at, "mlp.", ("ffn",), cfg.ffn_dim)
    return
  moe = cfg.moe
  yield at.matrix("mlp.gate", ("ffn", "router", "centroids"), (moe.num_experts,), (d,))
  if moe.balancing_bias:
    bias = at.piece(("ffn", "router", "bias"), (moe.num_experts,), (0,))
    bias = dataclasses.replace(bias, path=("router", *bias.path[1:]))
    yield at.tensor("mlp.gate.e_score_correction_bias", (moe.num_experts,), bias, wide=True)
  if moe.num_shared_experts:
    yield from _swiglu(at, "mlp.shared_experts.", ("ffn", "shared"), moe.shared_dim)
  for expert in range(moe.num_experts):
    one = _Builder(cfg, source, path, (*index, expert))
    yield from _swiglu(one, f"mlp.experts.{expert}.", ("ffn",), moe.expert_dim)


def _swiglu(at: _Builder, name: str, path: tuple[str, ...], width: int) -> Iterator[Tensor]:
  d = at.cfg.d_model
  for which, projection in enumerate(("gate_proj", "up_proj")):
    piece = at.piece((*path, "w_gate_up"), (width, d), (2, 0), start=(0, which, 0))
    yield at.tensor(f"{name}{projection}.weight", (width, d), piece, quantizable=True)
  yield at.matrix(f"{name}down_proj", (*path, "w_down"), (d,), (width,), quantizable=True)


def _mla(at: _Builder) -> Iterator[Tensor]:
  a, d = at.cfg.attention, at.cfg.d_model
  name, path = "self_attn.", ("attention",)
  heads = (a.num_heads, a.score_dim)
  if a.q_lora_rank is None:
    yield at.matrix(f"{name}q_proj", (*path, "w_q"), heads, (d,), quantizable=True)
  else:
    yield at.matrix(f"{name}q_a_proj", (*path, "w_dq"), (a.q_lora_rank,), (d,), quantizable=True)
    yield at.vector(f"{name}q_a_layernorm", (*path, "q_norm", "scale"), a.q_lora_rank)
    yield at.matrix(f"{name}q_b_proj", (*path, "w_uq"), heads, (a.q_lora_rank,), quantizable=True)
  yield at.matrix(f"{name}kv_a_proj_with_mqa", (*path, "w_dkv"), (a.cache_elements,), (d,),
                  quantizable=True)
  yield at.vector(f"{name}kv_a_layernorm", (*path, "kv_norm", "scale"), a.kv_lora_rank)
  # The rows of each head are those of its content key, then those of its value.
  split, width = a.qk_nope_head_dim, a.qk_nope_head_dim + a.v_head_dim
  view = (a.num_heads, width, a.kv_lora_rank)
  parts = [at.piece((*path, part), view, (1, 2, 0),
                    take=((0, a.num_heads), rows, (0, a.kv_lora_rank)))
           for part, rows in (("w_uk", (0, split)), ("w_uv", (split, width)))]
  yield at.tensor(f"{name}kv_b_proj.weight", (a.num_heads * width, a.kv_lora_rank), *parts,
                  quantizable=True)
  yield at.matrix(f"{name}o_proj", (*path, "w_o"), (d,), (a.num_heads, a.v_head_dim),
                  quantizable=True)


def _gqa(at: _Builder) -> Iterator[Tensor]:
  a, d = at.cfg.attention, at.cfg.d_model
  for letter, heads in (("q", a.num_heads), ("k", a.num_kv_heads), ("v", a.num_kv_heads)):
    size = (heads, a.head_dim)
    yield at.matrix(f"self_attn.{letter}_proj", ("attention", f"w_{letter}"), size, (d,))
    if a.qkv_bias:
      piece = at.piece(("attention", f"b_{letter}"), size, (0, 1))
      yield at.tensor(f"self_attn.{letter}_proj.bias", (math.prod(size),), piece)
    if a.qk_norm and letter != "v":
      yield at.vector(
          f"self_attn.{letter}_norm", ("attention", f"{letter}_norm", "scale"), a.head_dim)
  yield at.matrix("self_attn.o_proj", ("attention", "w_o"), (d,), (a.num_heads, a.head_dim))
  if a.out_bias:
    piece = at.piece(("attention", "b_o"), (d,), (0,))
    yield at.tensor("self_attn.o_proj.bias", (d,), piece)


def find(variables: dict, path: tuple[str, ...]) -> jax.Array:
  """Returns the array at a path of keys."""
  for key in path:
    variables = variables[key]
  return variables

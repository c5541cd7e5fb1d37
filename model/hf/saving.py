"""Saving models as Hugging Face folders, in the layout of their architecture's release."""

import json
import math
import pathlib
import shutil
import tempfile

import flax.linen as nn
import jax
import numpy as np
from safetensors.numpy import save_file

from model.config import ModelConfig
from model.hf import config as hf_config
from model.hf import layout as hf_layout
from model.variables import abstract_variables

_SHARD_BYTES = 5 << 30


def save(path, cfg: ModelConfig, variables: dict) -> None:
  """Writes a folder that transformers can load, with weights in the format of the variables.

  MTP modules are written as layers after the last one, as in V3's release. The model files of an
  earlier save are replaced once the new ones are complete.

  Args:
    path: the folder; it is created if it does not exist.
    cfg: the architecture.
    variables: a tree like that of `model.init`.

  Raises:
    ValueError: if no Hugging Face architecture computes what `cfg` does, or if the variables do not
      fit it.
  """
  folder = pathlib.Path(path)
  variables = nn.meta.unbox(variables)
  params_dtype = jax.tree.leaves(variables["params"])[0].dtype
  config = hf_config.render(cfg, params_dtype.name)
  _check_variables(cfg, variables)
  folder.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
    staged = pathlib.Path(temporary)
    _write_shards(staged, hf_layout.layout(cfg), variables, params_dtype)
    (staged / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for file in staged.glob("*.safetensors"):
      # The safetensors package makes files that only their owner may read.
      shutil.copymode(staged / "config.json", file)
    for old in folder.glob("model*.safetensors*"):
      old.unlink()
    for new in sorted(staged.iterdir()):
      shutil.move(new, folder / new.name)


def _check_variables(cfg: ModelConfig, variables: dict) -> None:
  expected = {"/".join(k.key for k in path): leaf.shape for path, leaf in
              jax.tree_util.tree_flatten_with_path(abstract_variables(cfg))[0]}
  actual = {"/".join(k.key for k in path): leaf.shape for path, leaf in
            jax.tree_util.tree_flatten_with_path(variables)[0]}
  wrong = [f"{name}: shape {actual.get(name)} instead of {expected.get(name)}"
           for name in sorted(expected.keys() | actual.keys())
           if expected.get(name) != actual.get(name)]
  if wrong:
    raise ValueError("the variables do not fit the config (None means that there is no such array):"
                     "\n  " + "\n  ".join(wrong[:40]))


def _write_shards(folder: pathlib.Path, layout, variables: dict, dtype) -> None:
  """Writes files of at most _SHARD_BYTES, with Hugging Face's names, and an index if several.

  A tensor that is larger than that has a file of its own.
  """
  sizes = [math.prod(t.shape) * (4 if t.wide else dtype.itemsize) for t in layout.tensors]
  shards, room = [[]], _SHARD_BYTES
  for tensor, size in zip(layout.tensors, sizes, strict=True):
    if shards[-1] and size > room:
      shards.append([])
      room = _SHARD_BYTES
    shards[-1].append(tensor)
    room -= size
  weight_map = {}
  for number, tensors in enumerate(shards, start=1):
    name = ("model.safetensors" if len(shards) == 1
            else f"model-{number:05d}-of-{len(shards):05d}.safetensors")
    save_file({t.name: _gather(t, variables) for t in tensors}, folder / name, {"format": "pt"})
    weight_map |= {t.name: name for t in tensors}
  if len(shards) > 1:
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _gather(tensor: hf_layout.Tensor, variables: dict) -> np.ndarray:
  """Returns one tensor as it is stored in the folder, assembled from parts of our arrays."""
  view = tensor.pieces[0].view
  dtype = hf_layout.find(variables, tensor.pieces[0].path).dtype
  values = np.empty(view, dtype)
  for piece in tensor.pieces:
    block = np.asarray(hf_layout.find(variables, piece.path)[piece.index()])
    values[tuple(slice(*part) for part in piece.take)] = piece.from_block(block)
  return values.reshape(tensor.shape)

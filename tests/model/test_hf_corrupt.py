"""Damaged Hugging Face folders raise one CheckpointError with all damage, before weights are read.

First come named kinds of damage, one by one and combined; then seeded random damage, redrawn where
a draw changed nothing. Damage that no loader could detect (another rope_theta, say, or flipped
payload bits) is left out.
"""

import json
import math
import pathlib
import random
import re
import shutil

import hf_cases
import hf_reference
import jax
import ml_dtypes
import numpy as np
import pytest

import model
from model.hf import files as hf_files
from model.hf import loading

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
O_PROJ = "model.layers.1.self_attn.o_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"  # 21x160 in the FP8 folder: two blocks
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float8_e4m3fn": "F8_E4M3",
         "float64": "F64", "int64": "I64"}
SAME_SIZE = {"F32": ("I32", "U32"), "BF16": ("F16", "I16", "U16"),
             "F8_E4M3": ("F8_E5M2", "I8", "U8", "BOOL")}
GONE = object()


# Reading and writing folders without the code under test.


def split(path: pathlib.Path) -> tuple[dict, bytes]:
  """Returns the header and the payload of a safetensors file."""
  data = path.read_bytes()
  end = 8 + int.from_bytes(data[:8], "little")
  return json.loads(data[8:end]), data[end:]


def join(path: pathlib.Path, header, payload: bytes) -> None:
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, "little") + text + payload)


def unpack(path: pathlib.Path) -> dict[str, tuple[str, list[int], bytes]]:
  header, payload = split(path)
  return {name: (entry["dtype"], entry["shape"], payload[slice(*entry["data_offsets"])])
          for name, entry in header.items()}


def pack(path: pathlib.Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
  header, end = {}, 0
  for name, (dtype, shape, data) in tensors.items():
    header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
    end += len(data)
  join(path, header, b"".join(data for _, _, data in tensors.values()))


def raw(array: np.ndarray) -> tuple[str, list[int], bytes]:
  return CODES[array.dtype.name], list(array.shape), array.tobytes()


def write(folder: pathlib.Path, config: dict, arrays: dict[str, np.ndarray], shards: int) -> None:
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(config))
  names = list(arrays)
  files = [SINGLE] if shards == 1 else [
      f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
  where = {name: files[i * shards // len(names)] for i, name in enumerate(names)}
  for file in files:
    pack(folder / file, {name: raw(arrays[name]) for name in names if where[name] == file})
  if shards > 1:
    index = {"metadata": {"total_size": sum(a.nbytes for a in arrays.values())},
             "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index))


def to_fp8(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Quantises the matrices that V3's release does; the rest but router biases becomes bfloat16."""
  stored = {}
  for name, array in arrays.items():
    if name.endswith("correction_bias"):
      stored[name] = array
    elif not re.search(r"(self_attn|mlp)\..*_proj\.weight$", name):
      stored[name] = array.astype(ml_dtypes.bfloat16)
    else:
      scales = np.empty([-(-size // 128) for size in array.shape], np.float32)
      quantised = np.empty(array.shape, ml_dtypes.float8_e4m3fn)
      for at in np.ndindex(scales.shape):
        block = tuple(slice(128 * i, 128 * i + 128) for i in at)
        scales[at] = np.abs(array[block]).max() / 448
        quantised[block] = (array[block] / scales[at]).astype(ml_dtypes.float8_e4m3fn)
      stored |= {name: quantised, f"{name}_scale_inv": scales}
  return stored


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, pathlib.Path]:
  """Returns undamaged folders by name, one of each kind."""
  root = tmp_path_factory.mktemp("good")
  v3, shapes = hf_cases.CASES["v3"], hf_reference.shapes("v3")
  weights = hf_cases.make_weights(shapes)
  hf_reference.write_folder("v3", root / "single")
  write(root / "sharded", v3, weights, 3)
  wide = {name: tuple(160 if size == 22 and "layers.0.mlp" in name else size for size in shape)
          for name, shape in shapes.items()}
  fp8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
  write(root / "fp8", v3 | {"intermediate_size": 160, "quantization_config": fp8},
        to_fp8(hf_cases.make_weights(wide)), 2)
  llama = hf_cases.make_weights(hf_reference.shapes("llama"))
  write(root / "half", hf_cases.CASES["llama"],
        {name: array.astype(ml_dtypes.bfloat16) for name, array in llama.items()}, 1)
  return {folder.name: folder for folder in root.iterdir()}


@pytest.fixture
def damaged(good, tmp_path):
  """Returns a function that copies an undamaged folder, for the test to damage."""
  return lambda base: shutil.copytree(good[base], tmp_path / "folder")


@pytest.fixture
def no_weight_access(monkeypatch):
  """Fails a test in which weights are read or memory for them is allocated."""

  def refuse(*args, **kwargs):
    raise AssertionError("the damage was not detected: weights were allocated or read")

  monkeypatch.setattr(hf_files.Stored, "read", refuse)
  monkeypatch.setattr(loading, "_Target", refuse)


def problems_of(folder) -> list[str]:
  with pytest.raises(model.hf.CheckpointError) as caught:
    model.hf.load(folder)
  problems = caught.value.problems
  assert problems
  assert all(isinstance(problem, str) for problem in problems)
  assert all(problem in str(caught.value) for problem in problems[:40])
  return problems


def unnamed(clues, problems: list[str]) -> list[str]:
  return [clue for clue in clues if not any(clue in problem for problem in problems)]


# Ways to damage a folder.


def edit_json(path: pathlib.Path, change) -> None:
  value = json.loads(path.read_text())
  change(value)
  path.write_text(json.dumps(value))


def set_config(folder, **changes) -> None:
  """Sets keys of config.json, `scaling__key` being a key of rope_scaling; GONE removes a key."""

  def change(config):
    for key, value in changes.items():
      inner = config["rope_scaling"] if key.startswith("scaling__") else config
      key = key.removeprefix("scaling__")
      if value is GONE:
        del inner[key]
      else:
        inner[key] = value

  edit_json(folder / "config.json", change)


def set_tensors(folder, **changes) -> None:
  """Sets tensors, as `raw` returns them, in their file or else the first; GONE removes a tensor."""
  files = sorted(folder.glob("*.safetensors"))
  for name, value in changes.items():
    file = next((f for f in files if name in unpack(f)), files[0])
    tensors = unpack(file)
    if value is GONE:
      del tensors[name]
    else:
      tensors[name] = value
    pack(file, tensors)


def set_entry(folder, tensor: str, **changes) -> None:
  """Sets fields of a tensor's header entry without changing the payload."""
  file = next(f for f in sorted(folder.glob("*.safetensors")) if tensor in split(f)[0])
  header, payload = split(file)
  header[tensor] |= changes
  join(file, header, payload)


def stored(folder, tensor: str) -> tuple[str, list[int], bytes]:
  return next(unpack(f)[tensor] for f in folder.glob("*.safetensors") if tensor in unpack(f))


def rename(folder, old: str, new: str) -> None:
  file = next(f for f in folder.glob("*.safetensors") if old in unpack(f))
  pack(file, {new if name == old else name: value for name, value in unpack(file).items()})


def set_place(folder, tensor: str, file) -> None:
  edit_json(folder / INDEX, lambda index: index["weight_map"].update({tensor: file}))


def repeat_entry(folder) -> None:
  header, payload = split(folder / SINGLE)
  first = json.dumps({O_PROJ: header[O_PROJ] | {"shape": [1]}})
  join(folder / SINGLE, f"{first[:-1]}, {json.dumps(header)[1:]}".encode(), payload)


def repeat_key(folder) -> None:
  text = (folder / "config.json").read_text()
  (folder / "config.json").write_text('{"hidden_size": 3, ' + text[1:])


def to_directory(path: pathlib.Path) -> None:
  path.unlink()
  path.mkdir()


def set_element(folder, tensor: str, at: int, value: float) -> None:
  dtype, shape, data = stored(folder, tensor)
  values = np.frombuffer(data, hf_files.DTYPES[dtype]).copy()
  values[at] = value
  set_tensors(folder, **{tensor: (dtype, shape, values.tobytes())})


def cut(path: pathlib.Path, size: int) -> None:
  path.write_bytes(path.read_bytes()[:size])


F32_3x3 = raw(np.ones((3, 3), np.float32))
SHARD_2 = "model-00002-of-00003.safetensors"
SCALE = f"{DOWN}_scale_inv"

# By kind of damage: the folder, what is done to it, and what the problems must name.
STRUCTURAL = {
    "missing tensor": ("single", lambda f: set_tensors(f, **{O_PROJ: GONE}), [O_PROJ]),
    "missing router bias": ("single", lambda f: set_tensors(f, **{BIAS: GONE}), [BIAS]),
    "extra tensor": ("single", lambda f: set_tensors(f, junk=F32_3x3), ["junk"]),
    "renamed tensor": ("single", lambda f: rename(f, O_PROJ, "junk"), [O_PROJ, "junk"]),
    "mis-shaped tensor": (
        "single", lambda f: set_tensors(f, **{O_PROJ: F32_3x3}), [O_PROJ, "[3, 3]", "[21, 30]"]),
    "transposed shape": ("single", lambda f: set_entry(f, O_PROJ, shape=[30, 21]), [O_PROJ]),
    "flattened shape": ("single", lambda f: set_entry(f, O_PROJ, shape=[630]), [O_PROJ]),
    "shape with another axis": (
        "single", lambda f: set_entry(f, O_PROJ, shape=[21, 30, 1]), [O_PROJ]),
    "integers": ("single", lambda f: set_entry(f, O_PROJ, dtype="I32"), [O_PROJ, "I32"]),
    "an embedding of integers": ("single", lambda f: set_entry(f, EMBED, dtype="I32"), [EMBED]),
    "a BF16 embedding as integers": ("half", lambda f: set_entry(f, EMBED, dtype="U16"), [EMBED]),
    "an FP8 embedding": ("fp8", lambda f: set_tensors(
        f, **{EMBED: raw(np.ones((41, 21), ml_dtypes.float8_e4m3fn))}), [EMBED]),
    "an FP8 norm": ("fp8", lambda f: set_tensors(
        f, **{"model.norm.weight": raw(np.ones(21, ml_dtypes.float8_e4m3fn))}),
        ["model.norm.weight"]),
    "doubles": ("single", lambda f: set_tensors(f, **{O_PROJ: raw(np.ones((21, 30)))}), [O_PROJ]),
    "F16 among BF16": ("half", lambda f: set_entry(f, O_PROJ, dtype="F16"), [O_PROJ, "F16"]),
    "F16 among BF16 with an F32 embedding": ("half", lambda f: (
        set_tensors(f, **{EMBED: raw(np.ones((43, 24), np.float32))}),
        set_entry(f, O_PROJ, dtype="F16")), [O_PROJ]),
    "only FP8, without quantization_config": ("single", lambda f: set_tensors(f, **{
        name: raw(np.ones(shape, ml_dtypes.float8_e4m3fn))
        for name, (_, shape, _) in unpack(f / SINGLE).items()}), [EMBED, O_PROJ]),
    "FP8 without quantization_config": (
        "fp8", lambda f: set_config(f, quantization_config=GONE), [DOWN, SCALE]),

    "missing scale": ("fp8", lambda f: set_tensors(f, **{SCALE: GONE}), [SCALE]),
    "transposed scale": ("fp8", lambda f: set_entry(f, SCALE, shape=[2, 1]), [SCALE, "[1, 2]"]),
    "scale of too few blocks": (
        "fp8", lambda f: set_tensors(f, **{SCALE: raw(np.ones((1, 1), np.float32))}), [SCALE]),
    "scale in BF16": ("fp8", lambda f: set_tensors(
        f, **{SCALE: raw(np.ones((1, 2), ml_dtypes.bfloat16))}), [SCALE]),
    "scale without a matrix": ("fp8", lambda f: set_tensors(f, **{DOWN: GONE}), [DOWN]),
    "scale beside an unquantised matrix": ("fp8", lambda f: set_tensors(
        f, **{DOWN: raw(np.ones((21, 160), ml_dtypes.bfloat16))}), [DOWN, "scale"]),
    "scale of a norm": ("fp8", lambda f: set_tensors(
        f, **{"model.norm.weight_scale_inv": raw(np.ones((1, 1), np.float32))}),
        ["model.norm.weight_scale_inv"]),
    "other quantisation": ("fp8", lambda f: set_config(
        f, quantization_config={"quant_method": "awq", "fmt": "e5m2", "weight_block_size": [64]}),
        ["quant_method", "fmt", "weight_block_size"]),
    "quantisation without a method": (
        "single", lambda f: set_config(f, quantization_config={}), ["quant_method"]),
    "quantization_config of the wrong type": (
        "fp8", lambda f: set_config(f, quantization_config="fp8"), ["quantization_config"]),

    "no weights": ("single", lambda f: (f / SINGLE).unlink(), [SINGLE, INDEX]),
    "empty file": ("single", lambda f: (f / SINGLE).write_bytes(b""), [SINGLE]),
    "truncated file": ("single", lambda f: cut(f / SINGLE, 50_000), [SINGLE]),
    "file truncated in the header": ("single", lambda f: cut(f / SINGLE, 1000), [SINGLE]),
    "trailing bytes": ("single", lambda f: (f / SINGLE).write_bytes(
        (f / SINGLE).read_bytes() + bytes(4)), [SINGLE]),
    "directory as weights": ("single", lambda f: to_directory(f / SINGLE), [SINGLE]),
    "header length of 2**62": ("single", lambda f: (f / SINGLE).write_bytes(
        (2**62).to_bytes(8, "little") + (f / SINGLE).read_bytes()[8:]), [SINGLE]),
    "header that is a list": ("single", lambda f: join(f / SINGLE, [], b""), [SINGLE]),
    "header without tensors": ("single", lambda f: join(f / SINGLE, {}, b""), []),
    "offsets out of range": ("single", lambda f: set_entry(
        f, HEAD, data_offsets=[10**9, 10**9 + 3444]), [SINGLE]),
    "overlapping offsets": ("single", lambda f: set_entry(
        f, EMBED, data_offsets=split(f / SINGLE)[0][HEAD]["data_offsets"]), [SINGLE]),
    "shape beyond 64 bits": ("single", lambda f: set_entry(f, HEAD, shape=[2**40, 2**40]),
                             [SINGLE]),
    "tensor named twice in a header": ("single", repeat_entry, [SINGLE]),

    "missing shard": ("sharded", lambda f: (f / SHARD_2).unlink(), [SHARD_2]),
    "directory as shard": ("sharded", lambda f: to_directory(f / SHARD_2), [SHARD_2]),
    "truncated shard": ("sharded", lambda f: cut(f / SHARD_2, 9000), [SHARD_2]),
    "shard twice": ("sharded", lambda f: shutil.copy(
        f / SHARD_2, f / "model-00001-of-00003.safetensors"), [SHARD_2, EMBED]),
    "no index": ("sharded", lambda f: (f / INDEX).unlink(), [INDEX]),
    "directory as index": ("sharded", lambda f: to_directory(f / INDEX), [INDEX]),
    "truncated index": ("sharded", lambda f: cut(f / INDEX, 2000), [INDEX]),
    "index without weight_map": ("sharded", lambda f: (f / INDEX).write_text("{}"),
                                 [INDEX, "weight_map"]),
    "index of numbers": ("sharded", lambda f: set_place(f, EMBED, 1), [INDEX]),
    "index naming the wrong shard": (
        "sharded", lambda f: set_place(f, EMBED, SHARD_2), [EMBED, SHARD_2]),
    "index naming an absent file": ("sharded", lambda f: set_place(f, EMBED, "absent"), ["absent"]),
    "index naming no file": ("sharded", lambda f: set_place(f, EMBED, ""), [EMBED]),
    "index leaving the folder": (
        "sharded", lambda f: set_place(f, EMBED, f"../folder/{SHARD_2}"),
        [f"../folder/{SHARD_2}"]),
    "index naming config.json": (
        "sharded", lambda f: set_place(f, EMBED, "config.json"), ["config.json"]),
    "index with a NUL": ("sharded", lambda f: set_place(f, EMBED, "a\0b"), ["a\0b"]),
    "index with half a surrogate pair": (
        "sharded", lambda f: set_place(f, EMBED, "\ud800"), ["\ud800"]),
    "index with an overlong file name": (
        "sharded", lambda f: set_place(f, EMBED, "x" * 300), ["x" * 300]),
    "index with a tensor that no file has": (
        "sharded", lambda f: set_place(f, "junk", SHARD_2), ["junk"]),

    "no config": ("single", lambda f: (f / "config.json").unlink(), ["config.json"]),
    "directory as config": ("single", lambda f: to_directory(f / "config.json"), ["config.json"]),
    "truncated config": ("single", lambda f: cut(f / "config.json", 300), ["config.json"]),
    "empty config": ("single", lambda f: cut(f / "config.json", 0), ["config.json"]),
    "config that is a list": (
        "single", lambda f: (f / "config.json").write_text("[1]"), ["config.json"]),
    "config with excessive nesting": ("single", lambda f: (f / "config.json").write_text(
        '{"model_type":' + "[" * 200_000), ["config.json"]),
    "config that is not UTF-8": ("single", lambda f: (f / "config.json").write_bytes(
        (f / "config.json").read_bytes().replace(b"silu", b"s\xfflu")), ["config.json"]),
    "config with a key twice": ("single", repeat_key, ["hidden_size"]),
    "unknown architecture": ("single", lambda f: set_config(f, model_type="mamba"), ["mamba"]),
    "no architecture": ("single", lambda f: set_config(f, model_type=GONE), ["model_type"]),
    "a list of architectures": (
        "single", lambda f: set_config(f, model_type=["deepseek_v3"]), ["model_type"]),
    "an architecture that is not model_type's": (
        "single", lambda f: set_config(f, architectures=["MambaForCausalLM"]), ["architectures"]),
    "missing key": ("single", lambda f: set_config(f, kv_lora_rank=GONE), ["kv_lora_rank"]),
    "null key": ("single", lambda f: set_config(f, kv_lora_rank=None), ["kv_lora_rank"]),
    "several keys of the wrong type": (
        "single", lambda f: set_config(f, vocab_size="41", hidden_size=21.5, n_group=[3],
                                       norm_topk_prob=1, rms_norm_eps=True, rope_theta="1e4"),
        ["vocab_size", "hidden_size", "n_group", "norm_topk_prob", "rms_norm_eps", "rope_theta"]),
    "several keys that must be positive": (
        "single", lambda f: set_config(f, vocab_size=0, kv_lora_rank=-14, rms_norm_eps=-1.0),
        ["vocab_size", "kv_lora_rank", "rms_norm_eps"]),
    "negative width": ("single", lambda f: set_config(f, hidden_size=-21), ["hidden_size"]),
    "negative depth of MTP": (
        "single", lambda f: set_config(f, num_nextn_predict_layers=-1),
        ["num_nextn_predict_layers"]),
    "huge width": ("single", lambda f: set_config(f, hidden_size=10**30), ["hidden_size"]),
    "huge number of layers": (
        "single", lambda f: set_config(f, num_hidden_layers=10**12), ["config.json"]),
    "huge number of experts": (
        "single", lambda f: set_config(f, n_routed_experts=3 * 10**12), ["config.json"]),
    "huge depth of MTP": (
        "single", lambda f: set_config(f, num_nextn_predict_layers=10**12), ["config.json"]),
    "an integer that no float can hold": (
        "single", lambda f: set_config(f, rope_theta=10**400), ["rope_theta"]),
    "NaN": ("single", lambda f: set_config(f, rms_norm_eps=math.nan), ["rms_norm_eps"]),
    "NaN temperature": (
        "single", lambda f: set_config(f, scaling__mscale=math.nan), ["mscale"]),
    "infinity": ("single", lambda f: set_config(f, rms_norm_eps=math.inf), ["rms_norm_eps"]),
    "infinite scaling": ("single", lambda f: set_config(f, scaling__factor=math.inf), ["factor"]),
    "a temperature whose square overflows": (
        "single", lambda f: set_config(f, scaling__mscale_all_dim=1e308), ["mscale_all_dim"]),
    "temperatures whose ratio is undefined": (
        "single", lambda f: set_config(f, scaling__mscale_all_dim=-10 / math.log(8)),
        ["mscale_all_dim"]),
    "a rotation count beyond floats": (
        "single", lambda f: set_config(f, scaling__beta_fast=1e308), ["beta_fast"]),
    "a length beyond floats": (
        "single", lambda f: set_config(f, scaling__original_max_position_embeddings=10**400),
        ["original_max_position_embeddings"]),
    "scaling without a type": (
        "single", lambda f: set_config(f, scaling__type=GONE), ["rope_scaling"]),
    "scaling of two types": (
        "single", lambda f: set_config(f, scaling__rope_type="default"), ["rope_scaling"]),
    "scaling of an unknown type": (
        "single", lambda f: set_config(f, scaling__type="ntk"), ["rope_scaling", "ntk"]),
    "scaling of the wrong type": (
        "single", lambda f: set_config(f, rope_scaling="yarn"), ["rope_scaling"]),
    "scaling without a factor": (
        "half", lambda f: set_config(f, scaling__factor=GONE), ["factor"]),
    "unsupported activation": (
        "single", lambda f: set_config(f, hidden_act="gelu"), ["hidden_act", "gelu"]),

    "tensors and shards together": ("sharded", lambda f: (
        set_tensors(f, **{EMBED: GONE, "junk": F32_3x3, BIAS: F32_3x3}),
        set_entry(f, DOWN, dtype="I32"),
        cut(f / "model-00003-of-00003.safetensors", 500),
        set_place(f, HEAD, "absent")),
        [EMBED, "junk", BIAS, DOWN, "model-00003-of-00003", "shard absent"]),
    "tensors and scales together": ("fp8", lambda f: (
        set_tensors(f, **{EMBED: GONE, SCALE: GONE, "junk": F32_3x3}),
        set_entry(f, f"{O_PROJ}_scale_inv", shape=[1]), set_entry(f, O_PROJ, shape=[30, 21])),
        [EMBED, SCALE, "junk", f"{O_PROJ} has", f"{O_PROJ}_scale_inv"]),
    "architecture and weights together": ("single", lambda f: (
        set_config(f, model_type="mamba"), cut(f / SINGLE, 500)), ["mamba", SINGLE]),
    "config and tensors together": ("single", lambda f: (
        set_config(f, hidden_act="gelu", initializer_range="0.02"),
        set_tensors(f, **{O_PROJ: GONE})), ["hidden_act", "initializer_range", O_PROJ]),
}


@pytest.mark.parametrize("kind", STRUCTURAL)
def test_damage_is_named_before_weights_are_allocated_or_read(kind, damaged, no_weight_access):
  base, harm, clues = STRUCTURAL[kind]
  folder = damaged(base)
  harm(folder)
  problems = problems_of(folder)
  assert unnamed(clues, problems) == [], problems


@pytest.mark.parametrize("name", ["absent", "x" * 300, "a\0b"],
                         ids=["absent", "overlong", "NUL"])
def test_a_path_that_is_not_a_folder_is_refused(name, tmp_path):
  assert problems_of(tmp_path / name)


def test_a_file_in_place_of_the_folder_is_refused(good):
  assert problems_of(good["single"] / "config.json")


def test_the_list_of_problems_is_complete_even_where_the_message_is_shortened(
    damaged, no_weight_access):
  folder = damaged("sharded")
  lost = []
  for file in sorted(folder.glob("model-*"))[:2]:
    lost += unpack(file)
    file.unlink()
  problems = problems_of(folder)
  assert len(lost) > 40
  assert unnamed(lost, problems) == []


READ = {
    "NaN": ("half", lambda f: set_element(f, O_PROJ, 7, math.nan), [O_PROJ]),
    "infinity": ("half", lambda f: set_element(f, O_PROJ, -1, math.inf), [O_PROJ]),
    "several": ("half", lambda f: (set_element(f, O_PROJ, 0, -math.inf),
                                   set_element(f, HEAD, 1, math.nan)), [O_PROJ, HEAD]),
    "NaN in a router bias": ("single", lambda f: set_element(f, BIAS, 2, math.nan), [BIAS]),
    "NaN in FP8": ("fp8", lambda f: set_element(f, DOWN, -1, math.nan), [DOWN]),
    "scale of zero": ("fp8", lambda f: set_element(f, SCALE, 1, 0.0), [SCALE]),
    "negative scale": ("fp8", lambda f: set_element(f, SCALE, 0, -1e-3), [SCALE]),
    "NaN scale": ("fp8", lambda f: set_element(f, SCALE, 1, math.nan), [SCALE]),
    "infinite scale": ("fp8", lambda f: set_element(f, SCALE, 1, math.inf), [SCALE]),
    "scale that overflows weights": (
        "fp8", lambda f: set_element(f, SCALE, 1, 3e38), [DOWN]),
    "copy that differs": ("half", lambda f: set_config(f, tie_word_embeddings=True), [HEAD]),
    "MTP copy that differs": ("single", lambda f: set_tensors(
        f, **{"model.layers.3.embed_tokens.weight": raw(np.ones((41, 21), np.float32))}),
        ["model.layers.3.embed_tokens.weight"]),
}


@pytest.mark.parametrize("kind", READ)
def test_damage_that_only_reading_the_weights_reveals_is_named(kind, damaged):
  base, harm, clues = READ[kind]
  folder = damaged(base)
  harm(folder)
  problems = problems_of(folder)
  assert unnamed(clues, problems) == [], problems


@pytest.mark.parametrize("base", ["single", "sharded", "fp8", "half"])
def test_an_undamaged_folder_loads(base, good):
  cfg, variables = model.hf.load(good[base])
  dtype, shape, data = stored(good[base], EMBED)
  want = np.frombuffer(data, hf_files.DTYPES[dtype]).reshape(shape)
  np.testing.assert_array_equal(variables["params"]["embedding"]["embedding"], want)
  assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(variables))
  assert (cfg.mtp is None) == (base == "half")


# Random damage. Every function damages a folder, drawing from `rng`, and returns what the problems
# must name. Its name is part of the seed.

V3 = ("single", "sharded", "fp8")
ALL = (*V3, "half")
KINDS = {}


def on(*bases, read=False):
  def register(harm):
    KINDS[harm.__name__] = harm, bases, read
    return harm
  return register


def any_file(folder, rng) -> pathlib.Path:
  return rng.choice(sorted(folder.glob("*.safetensors")))


def any_tensor(folder, rng, suffix: str = "") -> str:
  names = sorted(n for f in folder.glob("*.safetensors") for n in split(f)[0])
  return rng.choice([name for name in names if name.endswith(suffix)])


def flip(path: pathlib.Path, at: int, rng) -> None:
  data = bytearray(path.read_bytes())
  data[at] ^= rng.randrange(1, 256)
  path.write_bytes(data)


def header_size(path: pathlib.Path) -> int:
  return int.from_bytes(path.read_bytes()[:8], "little")


@on(*ALL)
def flipped_length(folder, rng):
  file = any_file(folder, rng)
  flip(file, rng.randrange(8), rng)
  return file.name


@on(*ALL)
def flipped_header_byte(folder, rng):
  file = any_file(folder, rng)
  flip(file, 8 + rng.randrange(header_size(file)), rng)
  return ""


@on(*ALL)
def other_length(folder, rng):
  file = any_file(folder, rng)
  length = rng.choice([0, 1, header_size(file) - 1, header_size(file) + 1, 10**8, 2**63, 2**64 - 1])
  file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])
  return file.name


@on(*ALL)
def other_header(folder, rng):
  file = any_file(folder, rng)
  header = rng.choice([[], [1], "x", 3, None, True, rng.randbytes(50), b"{", b"\xff\xfe{}", b""])
  join(file, header, split(file)[1])
  return file.name


@on(*ALL)
def noise(folder, rng):
  file = any_file(folder, rng)
  file.write_bytes(rng.randbytes(rng.randrange(1, 5000)))
  return file.name


@on(*ALL)
def renamed(folder, rng):
  name = any_tensor(folder, rng)
  old, new = rng.choice([("weight", "bias"), ("layers.1", "layers.9"), ("layers.", "layers.0"),
                         ("model.", ""), ("proj", "pr\u043ej"), (name, f"{name} ")])
  rename(folder, name, name.replace(old, new))
  return name


@on(*ALL)
def swapped_names(folder, rng):
  one, shape = any_tensor(folder, rng), None
  while shape in (None, stored(folder, one)[1]):
    two = any_tensor(folder, rng)
    shape = stored(folder, two)[1]
  first, second = stored(folder, one), stored(folder, two)
  set_tensors(folder, **{one: second, two: first})
  return one


@on(*ALL)
def entry_left_out(folder, rng):
  file = any_file(folder, rng)
  header, payload = split(file)
  del header[rng.choice(sorted(header))]
  join(file, header, payload)
  return file.name


@on(*ALL)
def entry_twice(folder, rng):
  file = any_file(folder, rng)
  header, payload = split(file)
  name = rng.choice(sorted(header))
  text = json.dumps(header)
  if rng.random() < 0.5:
    text = text[:-1] + f", {json.dumps({name: header[name]})[1:]}"
  else:
    text = json.dumps({name: header[rng.choice(sorted(header))]})[:-1] + f", {text[1:]}"
  join(file, text.encode(), payload)
  return file.name


@on(*ALL)
def reshaped(folder, rng):
  name = any_tensor(folder, rng)
  shape = stored(folder, name)[1]
  options = [shape[::-1], [math.prod(shape)], [1, *shape], [*shape, 1], [math.prod(shape), 1]]
  set_entry(folder, name, shape=rng.choice([o for o in options if o != shape]))
  return name


@on(*ALL)
def retyped(folder, rng):
  name = any_tensor(folder, rng)
  set_entry(folder, name, dtype=rng.choice(SAME_SIZE[stored(folder, name)[0]]))
  return name


@on(*ALL)
def broken_entry(folder, rng):
  name = any_tensor(folder, rng)
  key, value = rng.choice([
      ("dtype", "F33"), ("dtype", 32), ("dtype", None), ("dtype", "f32"), ("shape", [-1, -21]),
      ("shape", "x"), ("shape", [21.0]), ("shape", None), ("shape", [2**63, 2]),
      ("shape", [2**70]), ("shape", []), ("data_offsets", [0]), ("data_offsets", [0, 1, 2]),
      ("data_offsets", ["0", "4"]), ("data_offsets", None), ("data_offsets", [0.0, 4.0])])
  set_entry(folder, name, **{key: value})
  return ".safetensors"


@on(*ALL)
def field_left_out(folder, rng):
  file = any_file(folder, rng)
  header, payload = split(file)
  del header[rng.choice(sorted(header))][rng.choice(["dtype", "shape", "data_offsets"])]
  join(file, header, payload)
  return file.name


@on(*ALL)
def shifted_offsets(folder, rng):
  file = any_file(folder, rng)
  header, payload = split(file)
  by = rng.choice([-64, -4, -1, 1, 4, 64, len(payload), 2**63])
  names = sorted(header)
  for name in rng.choice([names, [rng.choice(names)]]):
    header[name]["data_offsets"] = [at + by for at in header[name]["data_offsets"]]
  join(file, header, payload)
  return file.name


@on(*ALL)
def overlapping_offsets(folder, rng):
  file = any_file(folder, rng)
  header, payload = split(file)
  one, two = rng.sample(sorted(header), 2)
  header[one]["data_offsets"] = header[two]["data_offsets"]
  join(file, header, payload)
  return file.name


@on(*ALL)
def reversed_or_stretched_offsets(folder, rng):
  file = any_file(folder, rng)
  header, payload = split(file)
  name = rng.choice(sorted(header))
  begin, end = header[name]["data_offsets"]
  header[name]["data_offsets"] = rng.choice(
      [[end, begin], [begin, end + 4], [begin, begin], [begin, len(payload) + 8], [0, 2**64 - 1]])
  join(file, header, payload)
  return file.name


@on(*ALL)
def lost_tensor(folder, rng):
  name = any_tensor(folder, rng)
  set_tensors(folder, **{name: GONE})
  return name


@on(*ALL)
def extra_tensor(folder, rng):
  name = rng.choice(["junk", "", "model.layers.9.input_layernorm.weight",
                     "model.layers.0.self_attn.q_proj.bias", f"{EMBED}_scale_inv", HEAD.upper()])
  set_tensors(folder, **{name: F32_3x3})
  return name


@on(*ALL)
def resized_tensor(folder, rng):
  name = any_tensor(folder, rng)
  dtype, shape, _ = stored(folder, name)
  axis = rng.randrange(len(shape))
  shape = [size + (rng.choice([-1, 1, 7]) if i == axis else 0) for i, size in enumerate(shape)]
  set_tensors(folder, **{name: raw(np.ones(shape, hf_files.DTYPES[dtype]))})
  return name


@on(*ALL)
def converted_tensor(folder, rng):
  name = any_tensor(folder, rng)
  array = np.ones(stored(folder, name)[1], rng.choice([np.float64, np.int64]))
  set_tensors(folder, **{name: raw(array)})
  return name


@on(*ALL)
def truncated_file(folder, rng):
  file = any_file(folder, rng)
  cut(file, rng.randrange(file.stat().st_size))
  return file.name


@on(*ALL)
def trailing_bytes(folder, rng):
  file = any_file(folder, rng)
  file.write_bytes(file.read_bytes() + rng.randbytes(rng.randrange(1, 300)))
  return file.name


@on(*ALL)
def empty_or_lost_file(folder, rng):
  file = rng.choice(sorted(folder.iterdir()))
  rng.choice([pathlib.Path.unlink, to_directory, lambda path: cut(path, 0)])(file)
  return file.name


@on("sharded", "fp8")
def exchanged_shards(folder, rng):
  one, two = rng.sample(sorted(folder.glob("*.safetensors")), 2)
  first, second = one.read_bytes(), two.read_bytes()
  one.write_bytes(second)
  if rng.random() < 0.5:
    two.write_bytes(first)
  return one.name


@on("sharded", "fp8")
def misplaced_in_index(folder, rng):
  name = any_tensor(folder, rng)
  set_place(folder, name, rng.choice([
      any_file(folder, rng).name, "absent.safetensors", "config.json", INDEX, ".", "..", "/",
      "../folder/" + any_file(folder, rng).name, "/etc/passwd", "", "x" * 256, "a\0b", "\udcff"]))
  return name


@on("sharded", "fp8")
def index_of_other_types(folder, rng):
  set_place(folder, any_tensor(folder, rng), rng.choice([None, 1, 2.5, True, [], ["a"], {}]))
  return INDEX


@on("sharded", "fp8")
def other_weight_map(folder, rng):
  value = rng.choice([GONE, None, [], {}, "x", 3, [["a", "b"]]])
  edit_json(folder / INDEX, lambda index: (
      index.pop("weight_map") if value is GONE else index.update(weight_map=value)))
  return INDEX


@on("sharded", "fp8")
def unlisted_or_invented_in_index(folder, rng):
  name, file = any_tensor(folder, rng), any_file(folder, rng).name
  if rng.random() < 0.5:
    edit_json(folder / INDEX, lambda index: index["weight_map"].pop(name))
    return name
  set_place(folder, f"{name}.invented", file)
  return f"{name}.invented"


def break_json(path: pathlib.Path, rng) -> None:
  """Truncates a file, makes it invalid UTF-8, or removes one structural character."""
  data = path.read_bytes()
  match rng.randrange(3):
    case 0:
      data = data[:rng.randrange(len(data))]
    case 1:
      at = rng.randrange(len(data))
      data = data[:at] + rng.choice([b"\xff", b"\xc3", b"\xed\xa0\x80"]) + data[at:]
    case 2:
      at = rng.choice([i for i, byte in enumerate(data) if byte in b'{}[]:"'])
      data = data[:at] + data[at + 1:]
  path.write_bytes(data)


@on("sharded", "fp8")
def broken_index(folder, rng):
  break_json(folder / INDEX, rng)
  return INDEX


@on(*ALL)
def broken_config(folder, rng):
  break_json(folder / "config.json", rng)
  return "config.json"


@on(*ALL)
def config_of_other_types(folder, rng):
  (folder / "config.json").write_text(
      rng.choice(["[]", "null", "3", '"x"', "[{}]", "{}", "NaN", "true", "{} {}", "[" * 10**5]))
  return "config.json"


# Keys of the config whose absence, or whose size, contradicts the weights or another key.
COUNTS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
    "v_head_dim", "first_k_dense_replace", "n_routed_experts", "num_experts_per_tok",
    "n_shared_experts", "moe_intermediate_size", "n_group", "topk_group",
    "num_nextn_predict_layers", "head_dim")
REALS = (
    "rms_norm_eps", "rope_theta", "routed_scaling_factor", "initializer_range", "scaling__factor",
    "scaling__beta_fast", "scaling__beta_slow", "scaling__low_freq_factor",
    "scaling__high_freq_factor")
FLAGS = ("norm_topk_prob", "tie_word_embeddings", "attention_bias")
LENGTHS = ("max_position_embeddings", "scaling__original_max_position_embeddings")
NEEDED = (
    *(key for key in COUNTS if key != "num_key_value_heads"), "model_type",
    "norm_topk_prob", "routed_scaling_factor", "scaling__factor", "scaling__low_freq_factor",
    "scaling__high_freq_factor")


def any_key(folder, rng, keys) -> str:
  config = json.loads((folder / "config.json").read_text())
  here = {*config, *(f"scaling__{key}" for key in config["rope_scaling"])}
  return rng.choice([key for key in keys if key in here])


@on(*ALL)
def key_left_out(folder, rng):
  set_config(folder, **{any_key(folder, rng, NEEDED): rng.choice([GONE, None])})
  return ""


@on(*ALL)
def value_of_the_wrong_type(folder, rng):
  key = any_key(folder, rng, (*COUNTS, *REALS, *FLAGS, *LENGTHS, "model_type", "hidden_act"))
  options = ["7", "", [7], [], {"a": 7}, {}] + ([1, 1.0] if key in FLAGS else [True, False])
  options += [21.5] if key in COUNTS + LENGTHS else []
  set_config(folder, **{key: rng.choice(options)})
  return key.removeprefix("scaling__")


@on(*ALL)
def value_too_large(folder, rng):
  if rng.random() < 0.7:
    key = any_key(folder, rng, COUNTS)
    set_config(folder, **{key: rng.choice([10**6, 3 * 10**9, 2**31, 2**63, 10**30, 10**400])})
  else:
    key = any_key(folder, rng, REALS)
    set_config(folder, **{key: rng.choice([10**400, math.inf])})
  return "" if key in COUNTS else key.removeprefix("scaling__")


@on(*ALL)
def value_too_small(folder, rng):
  key = any_key(folder, rng, COUNTS + REALS + LENGTHS)
  set_config(folder, **{key: rng.choice([0, -1, -2, -(10**30)])})
  return ""


@on(*ALL)
def value_not_finite(folder, rng):
  temperatures = ("scaling__mscale", "scaling__mscale_all_dim")
  keys = rng.choice([COUNTS + LENGTHS, REALS, (*REALS, *temperatures)])
  key = any_key(folder, rng, keys)
  set_config(folder, **{key: rng.choice([math.nan, math.inf, -math.inf])})
  return key.removeprefix("scaling__")


@on(*ALL)
def unknown_architecture(folder, rng):
  set_config(folder, model_type=rng.choice(
      ["mamba", "", "LLAMA", "llama ", "deepseek_v4", "qwen3_moe", 3, True, None, ["llama"], {}]))
  return "model_type"


@on("single", "sharded")
def weights_of_another_architecture(folder, rng):
  kept = json.loads((folder / "config.json").read_text())
  other = rng.choice(sorted(hf_cases.CASES.keys() - {"v3"}))
  (folder / "config.json").write_text(json.dumps(rng.choice(
      [hf_cases.CASES[other], kept | hf_cases.CASES[other]])))
  return ""


@on("fp8")
def damaged_scale(folder, rng):
  name = any_tensor(folder, rng, "_scale_inv")
  _, shape, data = stored(folder, name)
  values = np.frombuffer(data, np.float32)
  set_tensors(folder, **{name: rng.choice([
      GONE, ("F32", [*shape, 1], data), ("F32", [values.size], data),
      raw(np.ones([size + 1 for size in shape], np.float32)),
      raw(values.reshape(shape).astype(ml_dtypes.bfloat16)), ("I32", shape, data),
      raw(values.reshape(shape).astype(np.float64))])})
  return name


@on("fp8")
def damaged_quantization(folder, rng):
  key, value = rng.choice([
      ("quant_method", "awq"), ("quant_method", 8), ("fmt", "e5m2"), ("fmt", []),
      ("weight_block_size", [64, 64]), ("weight_block_size", [128]), ("weight_block_size", 128),
      ("weight_block_size", [128, "128"]), ("weight_block_size", math.nan)])
  whole = rng.choice([GONE, None, "fp8", [], 3, False])
  if rng.random() < 0.7:
    edit_json(folder / "config.json", lambda c: c["quantization_config"].update({key: value}))
  else:
    set_config(folder, quantization_config=whole)
  return ""


@on("half", "half", "single", "fp8", read=True)
def weight_not_finite(folder, rng):
  name = any_tensor(folder, rng)
  dtype, shape, _ = stored(folder, name)
  value = math.nan if dtype == "F8_E4M3" else rng.choice([math.nan, math.inf, -math.inf])
  set_element(folder, name, rng.randrange(math.prod(shape)), value)
  return name


@on("fp8", read=True)
def scale_not_positive(folder, rng):
  name = any_tensor(folder, rng, "_scale_inv")
  at = rng.randrange(math.prod(stored(folder, name)[1]))
  set_element(folder, name, at, rng.choice([0.0, -0.0, -1e-3, math.nan, math.inf, -math.inf]))
  return name


def meaning(folder: pathlib.Path) -> dict:
  """Returns all that a reader of the folder's files can see, to tell whether damage changed it."""
  found = {}
  for path in sorted(folder.iterdir()):
    data = path.read_bytes() if path.is_file() else None
    begin, end = 0, len(data or b"")
    if data and path.suffix == ".safetensors":
      begin, end = 8, 8 + int.from_bytes(data[:8], "little")
    try:
      found[path.name] = repr(json.loads(data[begin:end], object_pairs_hook=list)), data[end:]
    except (TypeError, ValueError, RecursionError, OverflowError):
      found[path.name] = data
  return found


DRAWS = 4


@pytest.mark.parametrize("draw", range(DRAWS))
@pytest.mark.parametrize("name", KINDS)
def test_random_damage_is_refused(name, draw, good, tmp_path, request):
  harm, bases, read = KINDS[name]
  rng = random.Random(f"{name} {draw}")
  base, folder = good[rng.choice(bases)], tmp_path / "folder"
  while not folder.exists() or meaning(folder) == meaning(base):
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder)
    clue = harm(folder, rng)
  if not read:
    request.getfixturevalue("no_weight_access")
  problems = problems_of(folder)
  assert unnamed([clue], problems) == [], problems

"""Folders in every format load exactly, and are saved as transformers reads them."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import hf_cases
import hf_reference
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

import model
from model import hf
from model.hf import config as hf_config
from model.hf import layout as hf_layout
from model.hf import loading, saving

HERE = pathlib.Path(__file__).parent
FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128],
              "activation_scheme": "dynamic"}


def assert_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_layout_covers_every_element_of_every_array_exactly_once():
  for cfg in (*tiny.ALL.values(), model.get_config("nano")):
    variables = model.abstract_variables(cfg)
    seen = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.int8), variables)
    for tensor in hf_layout.layout(cfg).tensors:
      used = np.zeros(tensor.pieces[0].view, np.int8)
      for piece in tensor.pieces:
        hf_layout.find(seen, piece.path)[piece.index()] += 1
        used[tuple(slice(*part) for part in piece.take)] += 1
      assert used.size == np.prod(tensor.shape) and (used == 1).all()
    assert all((leaf == 1).all() for leaf in jax.tree.leaves(seen))


@pytest.mark.parametrize("name", tiny.ALL)
def test_saving_and_loading_give_the_same_config_and_variables(name, tmp_path):
  cfg = dataclasses.replace(tiny.ALL[name], moe=tiny.V3.moe) if "mla" in name else tiny.ALL[name]
  variables = tiny.variables(cfg)
  hf.save(tmp_path, cfg, variables)
  loaded_cfg, loaded = hf.load(tmp_path)
  if cfg.mtp:  # stored embedding first, whichever order the model uses
    assert loaded_cfg.mtp == model.MTPConfig(depth=cfg.mtp.depth, concat="embedding_first")
    cfg = dataclasses.replace(cfg, mtp=loaded_cfg.mtp)
    variables = jax.tree.map(lambda leaf: leaf, variables)
    for k in (1, 2):
      module = variables["params"][f"mtp_{k}"]
      module["w_proj"] = jnp.concatenate(jnp.split(module["w_proj"], 2)[::-1])
  assert loaded_cfg == cfg
  assert_equal(loaded, variables)


@pytest.mark.parametrize(("case", "staged"), [("v3", True), ("llama_mqa", False)])
def test_saving_a_loaded_folder_reproduces_every_tensor(case, staged, tmp_path, monkeypatch):
  if not staged:
    monkeypatch.setattr(loading, "_CHUNK_BYTES", 0)
  good = hf_reference.write_folder(case, tmp_path / "good")
  cfg, variables = hf.load(good)
  hf.save(tmp_path / "again", cfg, variables)
  ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("again", "good"))
  assert ours.keys() == theirs.keys()
  for name in ours:
    np.testing.assert_array_equal(ours[name], theirs[name])


def test_saving_again_replaces_all_files_of_the_earlier_save(tmp_path, monkeypatch):
  cfg, variables = tiny.GQA, tiny.variables(tiny.GQA)
  monkeypatch.setattr(saving, "_SHARD_BYTES", 4000)
  hf.save(tmp_path, cfg, variables)
  index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
  assert len(set(index["weight_map"].values())) > 2
  assert_equal(hf.load(tmp_path)[1], variables)
  monkeypatch.undo()
  hf.save(tmp_path, cfg, variables)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
  assert_equal(hf.load(tmp_path)[1], variables)


def test_saving_refuses_configs_without_an_architecture_and_variables_that_do_not_fit(tmp_path):
  odd = dataclasses.replace(
      tiny.V3, moe=dataclasses.replace(tiny.V3.moe, group_score="max"),
      attention=dataclasses.replace(tiny.V3.attention, latent_norm=False))
  with pytest.raises(ValueError, match="without latent norms, nor a sigmoid router"):
    hf.save(tmp_path, odd, {"params": {"x": jnp.zeros(1)}})
  with pytest.raises(ValueError, match="do not fit the config"):
    hf.save(tmp_path, tiny.GQA, tiny.variables(tiny.MHA))
  assert not list(tmp_path.iterdir())


def test_dtype_sets_the_format_of_parameters_and_products_but_not_of_the_router_bias(tmp_path):
  folder = hf_reference.write_folder("v3", tmp_path)
  cfg, wide = hf.load(folder)
  assert cfg.numerics == model.Numerics("float32", "float32")
  cfg, narrow = hf.load(folder, dtype=jnp.bfloat16)
  assert cfg.numerics == model.Numerics("bfloat16", "bfloat16")
  assert {leaf.dtype for leaf in jax.tree.leaves(narrow["params"])} == {jnp.dtype("bfloat16")}
  assert {leaf.dtype for leaf in jax.tree.leaves(narrow["router"])} == {jnp.dtype("float32")}
  assert_equal(narrow["params"], jax.tree.map(lambda x: x.astype(jnp.bfloat16), wide["params"]))
  hf.save(tmp_path / "narrow", cfg, narrow)
  kept_cfg, kept = hf.load(tmp_path / "narrow")
  assert kept_cfg.numerics == cfg.numerics
  assert_equal(kept, narrow)


def quantize(value: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Quantises as V3's release does, in 128x128 blocks that are zero-padded at the edges.

  Returns:
    The FP8 values, the scales, and the dequantised values.
  """
  blocks = tuple(-(-size // 128) for size in value.shape)
  padded = np.zeros((blocks[0] * 128, blocks[1] * 128), np.float32)
  padded[:value.shape[0], :value.shape[1]] = value
  tiles = padded.reshape(blocks[0], 128, blocks[1], 128)
  scales = (np.maximum(np.abs(tiles).max((1, 3)), 1e-4) / 448).astype(np.float32)
  codes = (tiles / scales[:, None, :, None]).astype(ml_dtypes.float8_e4m3fn)
  dequantised = (codes.astype(np.float32) * scales[:, None, :, None]).reshape(padded.shape)
  unpadded = tuple(slice(size) for size in value.shape)
  return np.ascontiguousarray(codes.reshape(padded.shape)[unpadded]), scales, dequantised[unpadded]


def fp8_folder(folder: pathlib.Path):
  """Writes a V3 with partial blocks as released, and the same dequantised; returns both folders."""
  cfg = dataclasses.replace(
      tiny.V3, d_model=200, ffn_dim=300, mtp=model.MTPConfig(concat="embedding_first"),
      attention=model.MLAConfig(num_heads=3, q_lora_rank=130, kv_lora_rank=140,
                                qk_nope_head_dim=40, qk_rope_head_dim=20, v_head_dim=50),
      moe=dataclasses.replace(tiny.V3.moe, num_experts=4, num_groups=2, groups_per_token=2,
                              expert_dim=150))
  variables = tiny.variables(cfg)
  hf.save(folder / "wide", cfg, variables)
  tensors = load_file(folder / "wide" / "model.safetensors")
  stored, dequantised = {}, {}
  for tensor in hf_layout.layout(cfg).tensors:
    value = tensors[tensor.name]
    if tensor.quantizable:
      codes, scales, value = quantize(value)
      stored |= {tensor.name: codes, f"{tensor.name}_scale_inv": scales}
    elif not tensor.wide:
      value = value.astype(ml_dtypes.bfloat16)
      stored[tensor.name] = value
    else:
      stored[tensor.name] = value
    dequantised[tensor.name] = value
  # The release repeats the shared matrices in the MTP layer.
  stored["model.layers.3.embed_tokens.weight"] = stored["model.embed_tokens.weight"]
  stored["model.layers.3.shared_head.head.weight"] = stored["lm_head.weight"]
  (folder / "fp8").mkdir()
  config = json.loads((folder / "wide" / "config.json").read_text())
  (folder / "fp8" / "config.json").write_text(
      json.dumps(config | {"quantization_config": FP8_CONFIG}))
  save_file(stored, folder / "fp8" / "model.safetensors")
  save_file({k: v.astype(np.float32) for k, v in dequantised.items()},
            folder / "wide" / "model.safetensors")
  return folder / "fp8", folder / "wide"


def test_fp8_blocks_including_partial_ones_are_dequantised_to_the_bit(tmp_path, monkeypatch):
  fp8, wide = fp8_folder(tmp_path)
  _, exact = hf.load(fp8, dtype=jnp.float32)
  assert_equal(exact, hf.load(wide)[1])
  # By default FP8 folders load as bfloat16: the same values, rounded, even if they are loaded onto
  # the device in chunks that split blocks and heads.
  monkeypatch.setattr(loading, "_CHUNK_BYTES", 40_000)
  cfg, narrow = hf.load(fp8)
  assert cfg.numerics.params == "bfloat16"
  assert_equal(narrow["params"], jax.tree.map(lambda x: x.astype(jnp.bfloat16), exact["params"]))


def test_absent_mtp_weights_load_as_no_mtp(tmp_path):
  hf.save(tmp_path, dataclasses.replace(tiny.V3, mtp=None),
          {"params": {k: v for k, v in tiny.variables(tiny.V3)["params"].items()
                      if not k.startswith("mtp")},
           "router": {"moe_layers": tiny.variables(tiny.V3)["router"]["moe_layers"]}})
  config = json.loads((tmp_path / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
  assert hf.load(tmp_path)[0].mtp is None


def test_peak_memory_is_at_most_the_variables_the_largest_tensor_and_200_mb(tmp_path):
  cfg = dataclasses.replace(
      tiny.V3, d_model=1024, vocab_size=8192, num_layers=5, ffn_dim=2048, mtp=None,
      moe=dataclasses.replace(tiny.V3.moe, num_experts=16, expert_dim=1024),
      numerics=model.Numerics("bfloat16", "bfloat16"))
  shapes = model.abstract_variables(cfg)
  rng = np.random.default_rng(0)
  block = (rng.standard_normal(1 << 20) * 0.02).astype(np.float32)
  fill = lambda leaf: np.resize(block, leaf.shape).astype(leaf.dtype)
  hf.save(tmp_path, cfg, jax.tree.map(fill, shapes))
  done = subprocess.run([sys.executable, HERE / "measure_load.py", tmp_path], text=True,
                        capture_output=True, check=True, cwd=HERE.parent.parent,
                        env={"PATH": "", "PYTHONPATH": "."})
  measured = json.loads(done.stdout)
  largest = 2 * cfg.vocab_size * cfg.d_model / 1e6
  assert measured["variables_mb"] > 450
  assert measured["grown_mb"] < measured["variables_mb"] + largest + 200, measured
  print(measured)


def test_the_layout_has_the_names_and_shapes_that_transformers_writes():
  for case in hf_cases.CASES:
    cfg = hf_config.parse(hf_cases.CASES[case], problems := [])
    assert not problems
    expected = {tensor.name: tensor.shape for tensor in hf_layout.layout(cfg).tensors}
    assert hf_reference.shapes(case) == expected

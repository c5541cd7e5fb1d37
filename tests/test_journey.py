"""A model's whole way: pretraining, SFT, RL, evaluation, export, and use in transformers.

The long tests need an interpreter that has torch and transformers; see tests/README.md.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from rl.loading import load_model
from rl.mtp import split_mtp
from tests.experiments.here import run_here

ROOT = pathlib.Path(__file__).parent.parent
FAMILIES = {
    "deepseek_v3": (),
    **{family: ("model.moe=none", "model.mtp=none", "model.num_dense_layers=0",
                f"model.attention=GQAConfig(num_heads=4, num_kv_heads=2, head_dim=16{more})",
                "model.rope.layout=half")
       for family, more in (("llama", ""), ("qwen2", ", qkv_bias=true"),
                            ("qwen3", ", qk_norm=true"))}}
GENERATE = """
import json, sys, torch, transformers
folder, question = sys.argv[1:]
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
messages = [{"role": "user", "content": question}]
prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
out = model.generate(**ids, max_new_tokens=60, do_sample=False)[0, ids["input_ids"].shape[1]:]
print(json.dumps({"type": model.config.model_type, "prompt": prompt, "tokens": out.tolist(),
                  "eos": tokenizer.eos_token_id}))
"""


def run(*args: str) -> str:
  env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
                      "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
                      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
  done = subprocess.run([sys.executable, "-m", "experiments.run", *args], cwd=ROOT, env=env,
                        capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return done.stdout


def settings(*values: str) -> list[str]:
  return [f"--set={value}" for value in values]


def travel(folder: pathlib.Path, architecture: tuple[str, ...], *, pretraining: int, sft: int,
           rl: int, run: Callable[..., Any] = run) -> pathlib.Path:
  """Takes a model from random weights to an exported folder; returns that of its RL run.

  `run` runs a command line, and raises if that fails.
  """
  text, questions = folder / "text.jsonl", folder / "questions.jsonl"
  text.write_text("".join(json.dumps({"text": f"The sum of {i} and {i + 1} is {2 * i + 1}. " * 4})
                          + "\n" for i in range(100)))
  questions.write_text("".join(json.dumps({
      "question": f"{i}+{j}", "answer": f"<think>add</think>\n<answer>{i + j}</answer>"}) + "\n"
      for i in range(10) for j in range(10)))
  common = ("sample_tokens=0", "data.heldout_bytes=1000", "model.d_model=32")
  run("--experiment=pretrain", f"--out={folder / 'base'}", *settings(
      *common, *architecture, f"data.sources={text}", f"train.steps={pretraining}"))
  run("--experiment=pretrain", f"--out={folder / 'sft'}", *settings(
      *common[:2], f"init={folder / 'base'}", "data.fim_rate=0", "data.sample_masking=true",
      f"data.sources=Source(path={questions}, prompt_field=question, text_field=answer)",
      f"train.steps={sft}"))
  run("--experiment=r1_zero", f"--out={folder / 'rl'}", *settings(
      f"init={folder / 'sft'}", f"rl.loop.steps={rl}", "evaluation.problems=4",
      "evaluation.samples=4"))
  policy = folder / "rl" / "grpo-seed0"
  run("--experiment=export", *settings(f"checkpoint={policy}", f"to={folder / 'exported'}"))
  return policy


def check_exported(policy: pathlib.Path, exported: pathlib.Path) -> None:
  """Checks that the exported model is the policy, and is prompted and stops as it was taught."""
  before, after = load_model(policy), load_model(exported)
  # Both have MTP modules, whose projections have another order of inputs in V3's release.
  main, mtp = zip(split_mtp(before.variables), split_mtp(after.variables), strict=True)
  for ours, theirs in zip(*map(leaves, main), strict=True):
    np.testing.assert_array_equal(ours, theirs)
  assert leaves(mtp[0]) and [x.shape for x in leaves(mtp[0])] == [x.shape for x in leaves(mtp[1])]
  assert before.template == "short"
  generation = json.loads((exported / "generation_config.json").read_text())
  assert generation["eos_token_id"] == after.tokenizer().eos


def leaves(tree) -> list[np.ndarray]:
  return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def test_a_model_goes_from_pretraining_to_an_exported_folder(tmp_path):
  def run_in_this_process(*args: str) -> None:  # without new imports, which take seconds
    assert run_here(*args) == 0

  policy = travel(tmp_path, ("model.num_layers=1", "model.num_dense_layers=0"),
                  pretraining=2, sft=2, rl=1, run=run_in_this_process)
  check_exported(policy, tmp_path / "exported")


@pytest.mark.long("trains a model of each family and runs it in transformers")
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_generates_what_the_trained_model_does(tmp_path, family):
  if not (python := os.environ.get("DEEPSEEK_JAX_TORCH_PYTHON")):
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
      pytest.skip("needs torch and transformers; set DEEPSEEK_JAX_TORCH_PYTHON")
    python = sys.executable
  policy = travel(tmp_path, FAMILIES[family], pretraining=30, sft=150, rl=3)
  exported = tmp_path / "exported"
  if family == "deepseek_v3":
    check_exported(policy, exported)
  found = run("--experiment=evaluate", *settings(
      f"checkpoint={policy}", "problems=4", "samples=4", "max_completion_length=40"))
  assert found.startswith("Q: ") and "pass@1" in found

  done = subprocess.run([python, "-c", GENERATE, str(exported), "3+4"], capture_output=True,
                        text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
  assert done.returncode == 0, done.stderr
  theirs = json.loads(done.stdout.splitlines()[-1])
  assert theirs["type"] == family and theirs["prompt"] == "Q: 3+4\nA:"
  assert theirs["tokens"][-1] == theirs["eos"]  # it stops by itself
  ours = [run("--experiment=generate", *settings(
      f"checkpoint={folder}", "prompt=Q: 3+4\nA:", "temperature=0", "max_new_tokens=60"))
      for folder in (policy, exported)]
  text = load_model(exported).tokenizer().decode(theirs["tokens"][:-1])
  assert ours[0] == ours[1] == f"Q: 3+4\nA:{text}\n"

  run("--experiment=pretrain", f"--out={tmp_path / 'again'}", *settings(
      f"init={exported}", f"data.sources={tmp_path / 'text.jsonl'}", "train.steps=2",
      "sample_tokens=0"))

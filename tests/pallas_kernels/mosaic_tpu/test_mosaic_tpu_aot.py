"""The real TPU compiler compiles the kernels without a TPU; `tpu_kernels` covers all of them."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[3]
CHIPS = {"v5e:2x2": "int8", "tpu7x:2x2x1": "fp8"}  # the format that each multiplies fastest

pytestmark = [
    pytest.mark.long("runs the TPU compiler for a minute or two"),
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason=(
        "needs the TPU compiler: install the extra `tpu`")),
]


def rows_of(folder, model, layer):
  command = [sys.executable, "-m", "experiments.run", "--experiment=tpu_kernels", f"--out={folder}",
             f"--set=models={model}", f"--set=only={layer}", f"--set=chips={','.join(CHIPS)}"]
  done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, cwd=ROOT,
                        capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return json.loads((folder / "results.json").read_text())["rows"]


def test_grouped_products_of_v3_compile(tmp_path):
  rows = rows_of(tmp_path, "deepseek_v3", "experts_up")
  assert [row for row in rows if "error" in row] == []
  assert len(rows) == 6 * len(CHIPS)


def test_products_of_a_width_that_is_not_a_multiple_of_128_compile(tmp_path):
  rows = rows_of(tmp_path, "deepseek_v2_lite", "mlp_down")  # K is 10944
  assert [row for row in rows if "error" in row] == []
  assert len(rows) == 7 * len(CHIPS)


def test_the_compiler_expects_each_chip_to_multiply_one_format_faster(tmp_path):
  rows = rows_of(tmp_path, "deepseek_v3", "shared_down")
  for chip, fast in CHIPS.items():
    cycles = {row["name"]: row["cycles"] for row in rows
              if (row["chip"], row["side"]) == (chip, "XLA")}
    slow = ({"int8", "fp8"} - {fast}).pop()
    assert cycles[fast] < 0.6 * cycles["bf16"]
    assert cycles[slow] > 0.9 * cycles["bf16"]

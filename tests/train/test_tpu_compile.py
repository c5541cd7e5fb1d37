"""The real TPU compiler accepts the model, on a host that has no TPU."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent

pytestmark = [
    pytest.mark.long("runs the TPU compiler, which takes minutes per chip"),
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason=(
        "libtpu, the TPU compiler, is not installed: install the extra `tpu`")),
]


@pytest.mark.parametrize(("topology", "chip_gb"), [("v5e:2x2", 16), ("v5p:2x2x1", 95)])
def test_the_gradient_compiles_for_the_chip_and_fits_its_memory(topology, chip_gb):
  # There is no TPU to query for metadata, and none that a process must have to itself.
  env = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1",
                      "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "PYTHONPATH": str(ROOT)}
  done = subprocess.run([sys.executable, HERE / "compile_for_tpu.py", topology], env=env,
                        capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  measured = json.loads(done.stdout)
  print(topology, measured)
  assert measured["devices"] == 4
  # Gradients are sharded like parameters: a device holds about a quarter of either.
  assert measured["results_gb"] < 1.1 * measured["arguments_gb"]
  assert measured["arguments_gb"] < measured["peak_gb"] < chip_gb

"""Checkpoints are bit-exact, complete or absent, and verified before they are used."""

import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.checkpoint import CheckpointError, Checkpoints, read_newest

HERE = pathlib.Path(__file__).parent
ENV = os.environ | {"PYTHONPATH": str(HERE.parent.parent), "JAX_PLATFORMS": "cpu"}
ABSTRACT = {"w": jax.ShapeDtypeStruct((300, 400), jnp.float32),
            "m": jax.ShapeDtypeStruct((50_000,), jnp.bfloat16)}


class Moments(NamedTuple):
  count: jax.Array
  mu: dict


def small(step):
  return {"w": jnp.full((3, 4), step, jnp.float32), "b": jnp.arange(5)}


def abstract_of(tree):
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


SMALL = abstract_of(small(0))


@pytest.fixture
def checkpoints(tmp_path):
  checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
  yield checkpoints
  checkpoints.close()


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory):
  """Returns a folder with steps 1 and 2; a test copies it before changing it."""
  folder = tmp_path_factory.mktemp("saved") / "checkpoints"
  checkpoints = Checkpoints(folder, keep=2)
  for step in (1, 2):
    checkpoints.save(step, small(step), {"position": step})
  checkpoints.close()
  return folder


def bits(array):
  array = np.asarray(array)
  return array.dtype, array.shape, array.tobytes()


def test_every_dtype_is_restored_bit_for_bit(checkpoints):
  nan_payloads = np.array([0x7FC00001, 0xFF800000, 0x80000000, 1], np.uint32).view(np.float32)
  tree = {
      "f32": jnp.asarray(nan_payloads), "bf16": jnp.arange(300, dtype=jnp.bfloat16) / 7,
      "i32": jnp.array([-2**31, 2**31 - 1]), "bool": jnp.array([[True], [False]]),
      "key": jax.random.key_data(jax.random.key(7)), "scalar": jnp.uint32(2**32 - 1),
      "empty": jnp.zeros((0, 3), jnp.int32), "f8": jnp.arange(9, dtype=jnp.float8_e4m3fn),
      "opt": (Moments(jnp.int32(3), {"a/b": jnp.ones(2)}), None, [jnp.zeros(1)])}
  extra = {"position": [3, 2**60], "loss": 0.1, "hash": "é", "ids": {10: 1, 9: 2}}
  checkpoints.save(7, tree, extra)
  restored = checkpoints.restore(abstract_of(tree))
  assert restored.step == 7 and restored.damaged == []
  assert restored.extra == {"position": [3, 2**60], "loss": 0.1, "hash": "é",
                            "ids": {"10": 1, "9": 2}}
  assert jax.tree.structure(restored.arrays) == jax.tree.structure(tree)
  assert jax.tree.map(bits, restored.arrays) == jax.tree.map(bits, tree)
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored.arrays))


def test_donating_the_arrays_after_save_does_not_change_what_is_saved(checkpoints):
  update = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
  tree = {f"w{i}": jnp.full(300_000, i, jnp.float32) for i in range(20)}
  abstract = abstract_of(tree)
  checkpoints.save(1, tree, {})
  for _ in range(10):
    tree = update(tree)
  restored = checkpoints.restore(abstract).arrays
  assert all((restored[f"w{i}"] == i).all() for i in range(20))


def test_restoring_without_a_checkpoint_returns_none(checkpoints):
  assert checkpoints.restore(SMALL) is None and checkpoints.steps() == []


def test_only_the_newest_checkpoints_are_kept(checkpoints):
  for step in (1, 2, 5, 9):
    checkpoints.save(step, small(step), {})
  checkpoints.wait()
  assert checkpoints.steps() == [5, 9]
  assert sorted(os.listdir(checkpoints.folder)) == ["step_00000005", "step_00000009"]


def test_a_step_is_not_saved_twice(checkpoints):
  checkpoints.save(1, small(1), {})
  with pytest.raises(ValueError, match="step 1 already"):
    checkpoints.save(1, small(2), {})


def test_typed_prng_keys_are_refused(checkpoints):
  with pytest.raises(ValueError, match=r"'key' is a key<fry>: save its jax.random.key_data"):
    checkpoints.save(1, {"key": jax.random.key(0)}, {})


FILES = ["manifest.json", "arrays/_METADATA", "arrays/manifest.ocdbt", "arrays/d/*",
         "arrays/ocdbt.process_0/manifest.ocdbt", "arrays/ocdbt.process_0/d/*"]


def flip_a_byte(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def halve(path):
  os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip_a_byte, halve, pathlib.Path.unlink])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_reported_renamed_and_skipped(
    two_saved, tmp_path, file, damage, capsys):
  folder = shutil.copytree(two_saved, tmp_path / "checkpoints")
  victim = sorted((folder / "step_00000002").glob(file))[0]
  damage(victim)
  assert read_newest(folder, SMALL).step == 1
  warning = capsys.readouterr().err
  assert f"{folder}/step_00000002: " in warning and "; step 1 is used instead\n" in warning
  assert sorted(os.listdir(folder)) == ["step_00000001", "step_00000002"]
  checkpoints = Checkpoints(folder, keep=2)
  restored = checkpoints.restore(SMALL)
  assert restored.step == 1 and restored.extra == {"position": 1}
  assert jax.tree.map(bits, restored.arrays) == jax.tree.map(bits, small(1))
  [message] = restored.damaged
  assert "step_00000002" in message
  assert str(victim.relative_to(folder / "step_00000002")) in message
  assert sorted(os.listdir(folder)) == ["step_00000001", "step_00000002.damaged"]
  assert checkpoints.steps() == [1]
  checkpoints.save(2, small(2), {})  # the step is trained again
  checkpoints.close()
  assert checkpoints.steps() == [1, 2]


def test_a_folder_of_damaged_checkpoints_remains_an_error_that_names_them(
    two_saved, tmp_path):
  folder = shutil.copytree(two_saved, tmp_path / "checkpoints")
  (folder / "step_00000001" / "manifest.json").unlink()
  flip_a_byte(folder / "step_00000002" / "arrays" / "_METADATA")
  checkpoints = Checkpoints(folder, keep=2)
  for _ in range(2):  # a run must not start over because it was started twice
    with pytest.raises(CheckpointError) as raised:
      checkpoints.restore(SMALL)
    for part in ("step_00000001: manifest.json cannot be read (No such file",
                 "step_00000002: arrays/_METADATA has been altered", "copy, or delete"):
      assert part in str(raised.value)
  checkpoints.close()


def test_restoring_another_tree_is_an_error_that_names_the_first_differing_leaves(two_saved):
  another = {"w": jax.ShapeDtypeStruct((3, 5), jnp.float32),
             "c": [jax.ShapeDtypeStruct((1,), jnp.bfloat16)] * 9}
  with pytest.raises(ValueError) as raised:
    read_newest(two_saved, another)
  assert str(raised.value) == (
      f"{two_saved}/step_00000002 was saved with another model or optimizer:\n"
      "  b: int32[5] in the checkpoint, absent now\n"
      "  w: float32[3, 4] in the checkpoint, float32[3, 5] now\n"
      "  c.0: absent in the checkpoint, bfloat16[1] now\n"
      "  c.1: absent in the checkpoint, bfloat16[1] now\n"
      "  c.2: absent in the checkpoint, bfloat16[1] now\n"
      "  and 6 more\n"
      "Use the configuration that it was saved with, or another folder.")


def test_a_failed_save_is_raised_once_by_the_next_call(checkpoints):
  checkpoints.save(1, small(1), {})
  checkpoints.wait()
  (checkpoints.folder / "step_00000002").symlink_to("nowhere")  # a folder cannot be renamed onto it
  checkpoints.save(2, small(2), {})
  with pytest.raises(CheckpointError, match=r"step 2 .*untouched; the newest good one is step 1"):
    checkpoints.save(3, small(3), {})
  checkpoints.save(3, small(3), {})
  checkpoints.wait()
  assert checkpoints.steps() == [1, 3]


def test_a_full_disk_is_reported_once_and_without_tracebacks(checkpoints, capfd):
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  arrays = {f"x{i}": jax.random.normal(jax.random.key(i), (100, 100)) for i in range(30)}
  resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
  try:
    with pytest.raises(CheckpointError, match=r"step 1 could not be saved .* \(File too large\)"):
      checkpoints.save(1, arrays, {})
      checkpoints.wait()
    time.sleep(0.5)  # in which the writes that were in progress end
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert "Traceback" not in capfd.readouterr().err
  checkpoints.save(1, arrays, {})
  checkpoints.wait()
  assert checkpoints.steps() == [1]


def test_a_folder_that_cannot_be_created_is_an_error(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(CheckpointError, match="cannot be used"):
    Checkpoints(tmp_path / "file" / "checkpoints", keep=1)


def run_script(*args, prefix=(), **env):
  done = subprocess.run([*prefix, sys.executable, HERE / "saves.py", *args], env=ENV | env,
                        capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert "Traceback" not in done.stderr
  return done.stdout


@pytest.fixture(scope="module")
def killed_runs(tmp_path_factory):
  folder = tmp_path_factory.mktemp("killed")
  run_script("killed", folder)
  return folder


MOMENTS = {  # the newest committed step, or None where it depends on timing
    "arrays_created": 3, "orbax_done": 3, "manifest_begun": 3, "manifest_written": 3,
    "before_commit": 3, "committed": 4, "while_deleting_the_oldest": 4,
    **{f"random_{i}": None for i in range(4)}}


@pytest.mark.parametrize("moment", MOMENTS)
def test_sigkill_during_a_save_leaves_the_newest_committed_checkpoint(killed_runs, moment):
  run = killed_runs / moment
  logged = int((run / "log").read_text().split()[-1])
  checkpoints = Checkpoints(run / "checkpoints", keep=2)
  assert all(name.startswith("step_") for name in os.listdir(checkpoints.folder))
  restored = checkpoints.restore(ABSTRACT)
  assert restored.damaged == []
  assert restored.step in ([MOMENTS[moment]] if MOMENTS[moment] else [logged, logged + 1])
  assert restored.extra == {"position": restored.step * 10}
  assert all((leaf == restored.step).all() for leaf in jax.tree.leaves(restored.arrays))
  checkpoints.save(restored.step + 1, restored.arrays, {})
  checkpoints.close()
  assert checkpoints.steps() == [restored.step, restored.step + 1]


@pytest.mark.parametrize("how", ["full", "limited"])
def test_a_full_disk_is_a_clear_error_and_leaves_earlier_checkpoints_untouched(tmp_path, how):
  prefix = ()
  if how == "full":
    prefix = ("unshare", "-Urm", "sh", "-c", 'mount -t tmpfs -o size=4m none "$0" && exec "$@"',
              tmp_path)
    try:
      subprocess.run([*prefix, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
      pytest.skip("cannot mount a small file system here")
  result = json.loads(run_script(how, tmp_path, prefix=prefix))
  message = result["message"]
  cause = "No space left on device" if how == "full" else "File too large"
  assert f"step 2 could not be saved in {tmp_path}/checkpoints ({cause}). Earlier" in message
  assert "untouched; the newest good one is step 1" in message
  assert result["restored"] == 1 and result["intact"]
  assert result["left"] == ["step_00000002"]  # the second attempt at step 2 was small enough


def test_sharded_arrays_are_restored_with_the_requested_shardings(tmp_path):
  result = json.loads(run_script(
      "sharded", tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=8"))
  assert result == {name: {"exact": True, "placed": True}
                    for name in ("as saved", "another mesh", "none")}


@pytest.mark.long("writes 150 MB")
def test_save_of_15m_parameters_with_moments_blocks_for_less_than_300_ms(checkpoints):
  def leaves(key, dtype):
    return list(jax.random.normal(key, (30, 500_000), dtype))

  params, mu, nu = (jax.random.key(i) for i in range(3))
  tree = {"params": leaves(params, jnp.float32), "mu": leaves(mu, jnp.bfloat16),
          "nu": leaves(nu, jnp.float32)}
  jax.block_until_ready(tree)
  seconds = []
  for step in range(3):
    begin = time.perf_counter()
    checkpoints.save(step, tree, {})
    seconds.append(time.perf_counter() - begin)
    checkpoints.wait()
    print(f"blocked {seconds[-1]:.3f} s, total {time.perf_counter() - begin:.3f} s")
  assert min(seconds) < 0.3

"""The one entry point: `python -m experiments.run --experiment=NAME`."""

import difflib
import importlib
import os
import pathlib
import sys

from absl import app, flags, logging

from experiments.options import Options

EXPERIMENTS = {
    "pretrain": "train a model on text, resume it, report (--scale=smoke 1 min, cpu 4 min, gpu)",
    "generate": "print text from a checkpoint (--set checkpoint=DIR --set prompt=...)",
    "r1_zero": "a base, then GRPO from rules alone (--scale=demo 4 min, cpu 12, code 20, gpu)",
    "evaluate": "pass@1, pass@k and cons@k of a checkpoint on a task, with intervals",
    "ab": "compare two settings on paired seeds (--a key=value --b key=value --seeds=8)",
    "bench_train": "time training beside transformers (--set bench.peer=transformers; --scale=cpu, "
                   "gpu; v2_lite: FP8 beside bfloat16)",
    "bench_rl": "time GRPO beside TRL on a model (--set bench.model=DIR --set bench.peer=trl)",
    "bench_seeds": "time several seeds trained together against one",
    "bench_rl_cost": "time PPO, GRPO and RFT beside each other, and count their peak bytes",
    "bench_kernels": "time the FP8 and grouped products beside torch's (--scale=smoke, gpu)",
    "tune_kernels": "measure tilings of Hopper's kernels, and write the table they choose from",
    "bench_moe": "time the ways of computing routed experts against each other",
    "fp8_accumulation": "how much tensor cores lose of sums of FP8 products, against K",
    "fp8_gradients": "errors of FP8 gradients in tiles and in blocks, with and without outliers",
    "tpu_kernels": "compile our TPU kernels, and XLA's products beside them, for TPUs not here",
    "check_model": "build, save, load and check a model, or a folder (--set checkpoint=DIR)",
}
STUDIES = ("load_balancing", "fp8", "rl_length", "rl_maj_pass", "rl_ppo", "rl_clip", "rl_routing")
_GPU = pathlib.Path("/dev/nvidiactl")

_EXPERIMENT = flags.DEFINE_string("experiment", None, "what to run; --list shows all")
_LIST = flags.DEFINE_bool("list", False, "list experiments and studies, with claim and cost")
_SCALE = flags.DEFINE_string(
    "scale", None, "how much work: smoke (the default), cpu, gpu or what --list says")
_OUT = flags.DEFINE_string(
    "out", None, "folder for results; the same command on it resumes. Default runs/EXPERIMENT-SCALE"
    " where something is trained")
_SEEDS = flags.DEFINE_string(
    "seeds", None, "how many paired seeds; in studies and r1_zero also FROM:TO")
_SET = flags.DEFINE_multi_string("set", [], "section.field=value, as often as needed")
_A = flags.DEFINE_multi_string("a", [], "ab: a setting of the first arm, as in --set")
_B = flags.DEFINE_multi_string("b", [], "ab: a setting of the second arm, as in --set")
_ARMS = flags.DEFINE_list("arms", [], "studies and r1_zero: run these arms only")
_MAX_MINUTES = flags.DEFINE_float(
    "max_minutes", None, "stop, saved, after so long; the same command goes on", lower_bound=0.01)
_PROFILE = flags.DEFINE_bool("profile", False, "pretrain: leave a trace of a few steps in --out; "
                             "bench_train: say where they spend their time")


def _fail(message: str) -> None:
  print(f"error: {message}", file=sys.stderr)
  sys.exit(2)


def _list() -> None:
  width = max(map(len, (*EXPERIMENTS, *STUDIES)))
  for name, what in EXPERIMENTS.items():
    print(f"{name:{width}}  {what}")
  for name in STUDIES:
    study = importlib.import_module(f"experiments.{name}").STUDY
    print(f"\n{name:{width}}  {study.claim}\n{'':{width}}  from {study.source}")
    for scale in study.scales:
      print(f"{'':{width}}  --scale={scale}: {study.cost(scale)}")


def _options() -> Options:
  return Options(
      experiment=_EXPERIMENT.value, scale=_SCALE.value,
      out=pathlib.Path(_OUT.value) if _OUT.value is not None else None, seeds=_SEEDS.value,
      settings=tuple(_SET.value), a=tuple(_A.value), b=tuple(_B.value), arms=tuple(_ARMS.value),
      max_minutes=_MAX_MINUTES.value, profile=_PROFILE.value)


def _keep_compiled_programs() -> None:
  """Compiling takes longer than a smoke run; what one run compiled serves the next."""
  import jax

  from train.config import DataConfig
  if jax.config.jax_compilation_cache_dir is None:
    jax.config.update("jax_compilation_cache_dir", str(DataConfig().cache_folder / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _start_again_tuned_for_cpus() -> None:
  """Replaces this process by one that keeps the memory it has had, and whose vectors are wide.

  Both are read when a process starts. A training step asks for half a gigabyte; given back to the
  system after every step, it costs a quarter of the time in page faults, and in huge pages one step
  in several takes three times as long. What the user set himself is left alone.
  """
  env = dict(os.environ)
  if sys.platform != "linux" or env.get("JAX_PLATFORMS", "cpu") != "cpu" or _GPU.exists():
    return
  env.setdefault("GLIBC_TUNABLES", ":".join(f"glibc.malloc.{setting}" for setting in (
      "mmap_max=0", "arena_max=1", f"trim_threshold={1 << 34}")))
  if "avx512f" in pathlib.Path("/proc/cpuinfo").read_text():
    env.setdefault("XLA_FLAGS", "--xla_cpu_prefer_vector_width=512")
  if env != dict(os.environ):
    os.execve(sys.executable, [sys.executable, "-m", "experiments.run", *sys.argv[1:]], env)


def main(argv: list[str]) -> None:
  logging.set_verbosity(logging.WARNING)
  if len(argv) > 1:
    _fail(f"unexpected argument {argv[1]!r}; everything is a --flag")
  if _LIST.value:
    _list()
    return
  name, known = _EXPERIMENT.value, (*EXPERIMENTS, *STUDIES)
  if name is None:
    _fail("name an --experiment; --list shows them")
  if name not in known:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    _fail(f"there is no experiment {name!r}; did you mean {near!r}? --list shows them all")
  _start_again_tuned_for_cpus()
  _keep_compiled_programs()
  module = importlib.import_module(f"experiments.{name}")
  try:
    if name in STUDIES:
      importlib.import_module("experiments.study").main(module.STUDY, _options())
    else:
      module.main(_options())
  except (ValueError, OSError) as error:
    _fail(str(error))


if __name__ == "__main__":
  app.run(main)

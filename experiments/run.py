"""The command: `python -m experiments.run --experiment=NAME`."""

import os
import pathlib
import sys

from absl import app, flags, logging

from experiments import catalogue
from experiments.options import Options

_GPU = pathlib.Path("/dev/nvidiactl")

_EXPERIMENT = flags.DEFINE_string("experiment", None, "what to run; --list shows all")
_LIST = flags.DEFINE_bool("list", False, "list all experiments, and what every study costs")
_HELP_CONFIG = flags.DEFINE_bool(
    "help_config", False, "describe every setting of the --experiment at its --scale, or all of "
    "the configuration without one")
_SCALE = flags.DEFINE_string(
    "scale", None, "how much work: smoke (the default), cpu, gpu, or another that --list names")
_OUT = flags.DEFINE_string(
    "out", None, "folder for results; rerun the same command on it to resume. Default "
    "runs/EXPERIMENT-SCALE where something is trained")
_SEEDS = flags.DEFINE_string(
    "seeds", None, "number of paired seeds; in studies also FROM:TO")
_SET = flags.DEFINE_multi_string("set", [], "section.field=value, as often as needed")
_A = flags.DEFINE_multi_string("a", [], "ab: a setting of the first arm, as in --set")
_B = flags.DEFINE_multi_string("b", [], "ab: a setting of the second arm, as in --set")
_ARMS = flags.DEFINE_list("arms", [], "studies: run these arms only")
_MAX_MINUTES = flags.DEFINE_float(
    "max_minutes", None, "stop after saving once this much time has passed; rerun to resume",
    lower_bound=0.01)
_PROFILE = flags.DEFINE_bool("profile", False, "pretrain: leave a trace of a few steps in --out; "
                             "bench_train: show where the time of a step goes")


def _fail(message: str) -> None:
  print(f"error: {message}", file=sys.stderr)
  sys.exit(2)


def _list() -> None:
  known = catalogue.experiments().values()
  width = max(len(entry.name) for entry in known)
  for kind in dict.fromkeys(entry.kind for entry in known):
    print(f"{kind}:")
    for entry in known:
      if entry.kind == kind:
        print(f"  {entry.name:{width}}  {entry.summary}")
        if kind == "studies":
          _list_study(entry, width)


def _list_study(entry: catalogue.Experiment, width: int) -> None:
  study = entry.load().STUDY
  print(f"  {'':{width}}  from {study.source}")
  for scale in study.scales:
    print(f"  {'':{width}}  --scale={scale}: {study.cost(scale)}")


def _options() -> Options:
  return Options(
      experiment=_EXPERIMENT.value, scale=_SCALE.value,
      out=pathlib.Path(_OUT.value) if _OUT.value is not None else None, seeds=_SEEDS.value,
      settings=tuple(_SET.value), a=tuple(_A.value), b=tuple(_B.value), arms=tuple(_ARMS.value),
      max_minutes=_MAX_MINUTES.value, profile=_PROFILE.value)


def _keep_compiled_programs() -> None:
  """Turns the persistent compilation cache on: compiling takes longer than a smoke run."""
  import jax

  from train.config import DataConfig
  if jax.config.jax_compilation_cache_dir is None:
    jax.config.update("jax_compilation_cache_dir", str(DataConfig().cache_folder / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _start_again_tuned_for_cpus() -> None:
  """Replaces this process by one that keeps freed memory and vectorises for 512 bits.

  Both settings are read when a process starts. A training step allocates half a gigabyte. If it
  goes back to the system after every step, a quarter of the time is spent on page faults; with huge
  pages, one step in several takes three times as long. What the user has set is left alone.
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
  name = _EXPERIMENT.value
  try:
    if _HELP_CONFIG.value:
      from experiments.reports.config_reference import help_text
      print(help_text(name, _SCALE.value))
      return
    if name is None:
      _fail("name an --experiment; --list shows them")
    experiment = catalogue.find(name)
    _start_again_tuned_for_cpus()
    _keep_compiled_programs()
    module = experiment.load()
    if experiment.kind == "studies":
      from experiments.studies import runner
      runner.main(module.STUDY, _options())
    else:
      module.main(_options())
  except (ValueError, OSError) as error:
    _fail(str(error))


if __name__ == "__main__":
  app.run(main)

"""The command line: `python -m experiments.run --experiment=NAME`."""

import math
import os
import pathlib
import signal
import sys

if __name__ == "__main__":
  # Until a run handles signals itself, Ctrl-C ends the process at once, as SIGTERM does: also
  # during the imports, which take a second.
  signal.signal(signal.SIGINT, signal.SIG_DFL)

from absl import app, flags, logging

from experiments import catalogue
from experiments.options import Options
from train import signals

_GPU = pathlib.Path("/dev/nvidiactl")

_EXPERIMENT = flags.DEFINE_string("experiment", None, "name of the experiment; --list shows all")
_LIST = flags.DEFINE_bool("list", False, "list all experiments, or that of --experiment, and the "
                          "cost of every study; with the --scale of a study, what of it is still "
                          "to train here")
_HELP_CONFIG = flags.DEFINE_bool(
    "help_config", False, "describe every setting of --experiment at --scale; without an "
    "--experiment, every setting of all experiments")
_SCALE = flags.DEFINE_string(
    "scale", None, "size of the experiment: smoke (the default), cpu, gpu, or another one that the "
    "experiment has; --list shows the scales of studies")
_OUT = flags.DEFINE_string(
    "out", None, "folder for the results, by default runs/EXPERIMENT-SCALE for experiments that "
    "train a model; the same command with the same folder resumes")
_SEEDS = flags.DEFINE_string(
    "seeds", None, "number of seeds; for studies also a range FROM:TO, which excludes TO")
_SET = flags.DEFINE_multi_string("set", [], "a setting, section.field=value; may be repeated")
_A = flags.DEFINE_multi_string("a", [], "ab: a setting of arm a, as for --set; may be repeated")
_B = flags.DEFINE_multi_string("b", [], "ab: a setting of arm b, as for --set; may be repeated")
_ARMS = flags.DEFINE_list("arms", [], "studies: run only these arms, separated by commas")
_MAX_MINUTES = flags.DEFINE_float(
    "max_minutes", None, "save and stop after this many minutes; the same command resumes",
    lower_bound=0.01)
flags.register_validator(
    "max_minutes", lambda minutes: minutes is None or math.isfinite(minutes),
    message="it must be a finite number of minutes")
_PROFILE = flags.DEFINE_bool("profile", False, "pretrain: write a profiler trace of a few steps to "
                             "--out; bench_train: show where the time of a step goes")
_REUSE_RUNS = flags.DEFINE_bool(
    "reuse_runs", True, "studies: take runs that were trained on this machine before, by any study "
    "with the same configuration, data, code, versions and hardware, instead of training them")
_PROCESSES = flags.DEFINE_integer(
    "processes", None, "studies: train so many runs at a time, each in a process of its own, "
    "divided over the GPUs", lower_bound=1)


def _out() -> pathlib.Path | None:
  if _OUT.value is None:
    return None
  if not _OUT.value.strip():
    raise ValueError("--out is empty, perhaps from a variable that is not set: give a folder, or "
                     "leave it out")
  return pathlib.Path(_OUT.value)


def _fail(message: str) -> None:
  print(f"error: {message}", file=sys.stderr)
  sys.exit(2)


def _parse_flags(argv: list[str]) -> list[str]:
  """Parses the flags, reports invalid ones like other errors, and lets --help succeed."""
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    _fail(" ".join(str(error).split()))
  except SystemExit:  # absl ends --help with status 1
    sys.exit(0)


def _unexpected(argument: str) -> str:
  name = f": did you mean --experiment={argument}?" if argument in catalogue.experiments() else (
      ": every option is a --flag")
  return f"unexpected argument {argument!r}{name}"


def _list(name: str | None) -> None:
  """Prints all experiments, or the one of that name."""
  study = name is not None and catalogue.find(name).kind == "studies"
  asked = [flag for flag, value in (("scale", _SCALE.value), ("seeds", _SEEDS.value),
                                    ("arms", _ARMS.value), ("set", _SET.value)) if value]
  if asked and not (study and _SCALE.value):
    raise ValueError(f"--list with --{asked[0]} says what is still to train of a study: name it "
                     "with --experiment, and its --scale")
  if asked:
    from experiments.studies import runner
    _start_again_tuned_for_cpus()  # as its runs do: what is stored depends on XLA's flags
    print(f"{name}, {runner.left(catalogue.find(name).load().STUDY, _options())}")
    return
  known = [catalogue.find(name)] if name else catalogue.experiments().values()
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
  print(f"  {'':{width}}  source: {study.source}")
  for scale in study.scales:
    print(f"  {'':{width}}  --scale={scale}: {study.cost(scale)}")


def _options() -> Options:
  return Options(
      experiment=_EXPERIMENT.value, scale=_SCALE.value,
      out=_out(), seeds=_SEEDS.value,
      settings=tuple(_SET.value), a=tuple(_A.value), b=tuple(_B.value), arms=tuple(_ARMS.value),
      max_minutes=_MAX_MINUTES.value, profile=_PROFILE.value, reuse_runs=_REUSE_RUNS.value,
      processes=_PROCESSES.value)


def _keep_compiled_programs() -> None:
  """Turns on the persistent compilation cache, as compiling takes longer than a smoke run."""
  import jax

  from train.config import DataConfig
  if jax.config.jax_compilation_cache_dir is None:
    jax.config.update("jax_compilation_cache_dir", str(DataConfig().cache_folder / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _start_again_tuned_for_cpus() -> None:
  """Restarts the command in a process that keeps freed memory and uses 512-bit vectors, on CPUs.

  Both settings, of malloc and of XLA, are read only when a process starts. A training step
  allocates half a gigabyte. If that is returned to the system after every step, a quarter of the
  time is spent on page faults; with huge pages, one step in several takes three times as long.
  Environment variables that the user has set are not changed. Debuggers and coverage lose their
  hold on a process that restarts: DEEPSEEK_JAX_RESTART=0 prevents it.
  """
  env = dict(os.environ)
  if env.get("DEEPSEEK_JAX_RESTART") == "0":
    return
  if sys.platform != "linux" or env.get("JAX_PLATFORMS", "cpu") != "cpu" or _GPU.exists():
    return
  env.setdefault("GLIBC_TUNABLES", ":".join(f"glibc.malloc.{setting}" for setting in (
      "mmap_max=0", "arena_max=1", f"trim_threshold={1 << 34}")))
  if "avx512f" in pathlib.Path("/proc/cpuinfo").read_text():
    env.setdefault("XLA_FLAGS", "--xla_cpu_prefer_vector_width=512")
  if env != dict(os.environ):
    added = " ".join(f"{name}={value}" for name, value in env.items() if name not in os.environ)
    print(f"restarting with {added}, for speed on CPUs; DEEPSEEK_JAX_RESTART=0 prevents this",
          file=sys.stderr, flush=True)
    os.execve(sys.executable, [sys.executable, "-m", "experiments.run", *sys.argv[1:]], env)


def main(argv: list[str]) -> None:
  logging.set_verbosity(logging.WARNING)
  if len(argv) > 1:
    _fail(_unexpected(argv[1]))
  name = _EXPERIMENT.value
  signal.signal(signal.SIGINT, signal.SIG_DFL)
  try:
    if _LIST.value:
      _list(name)
      sys.stdout.flush()
      return
    if _HELP_CONFIG.value:
      from experiments.reports.config_reference import help_text
      print(help_text(name, _SCALE.value))
      return
    if name is None:
      _fail("name an --experiment; --list shows all of them")
    experiment = catalogue.find(name)
    if _PROCESSES.value and experiment.kind != "studies":
      _fail(f"--processes is not supported by --experiment={name}: it is for studies")
    _start_again_tuned_for_cpus()
    _keep_compiled_programs()
    module = experiment.load()
    if experiment.kind == "studies":
      from experiments.studies import runner
      runner.main(module.STUDY, _options())
    else:
      module.main(_options())
    if signals.stopped_by:
      sys.exit(128 + signals.stopped_by)
  except KeyboardInterrupt:
    sys.exit(128 + signal.SIGINT)
  except BrokenPipeError:  # such as of `--list | head`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that closing it is quiet
    sys.exit(1)
  except (ValueError, OSError) as error:
    _fail(str(error))


if __name__ == "__main__":
  app.run(main, flags_parser=_parse_flags)

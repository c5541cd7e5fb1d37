"""The one entry point: `python -m experiments.run --experiment=NAME`."""

import difflib
import importlib
import sys

from absl import app, flags, logging

EXPERIMENTS = {
    "check_model": "build, save, load and check a model, or check a Hugging Face folder",
    "bench_moe": "time the ways of computing routed experts against each other",
}

_EXPERIMENT = flags.DEFINE_string("experiment", None, "what to run; --list shows all")
_LIST = flags.DEFINE_bool("list", False, "list the experiments and stop")
flags.DEFINE_string("checkpoint", None, "check_model: a Hugging Face folder to check")
flags.DEFINE_string("out", None, "folder for results; none are written without it")


def _fail(message: str) -> None:
  print(f"error: {message}", file=sys.stderr)
  sys.exit(2)


def main(argv: list[str]) -> None:
  logging.set_verbosity(logging.WARNING)
  if len(argv) > 1:
    _fail(f"unexpected argument {argv[1]!r}; everything is a --flag")
  if _LIST.value:
    width = max(map(len, EXPERIMENTS))
    print("\n".join(f"{name:{width}}  {what}" for name, what in EXPERIMENTS.items()))
    return
  name = _EXPERIMENT.value
  if name is None:
    _fail("name an --experiment; --list shows them")
  if name not in EXPERIMENTS:
    near = difflib.get_close_matches(name, EXPERIMENTS, n=1, cutoff=0.0)[0]
    _fail(f"there is no experiment {name!r}; did you mean {near!r}? --list shows them all")
  try:
    importlib.import_module(f"experiments.{name}").main(flags.FLAGS)
  except ValueError as error:
    _fail(str(error))


if __name__ == "__main__":
  app.run(main)

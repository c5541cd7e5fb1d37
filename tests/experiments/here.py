"""Runs commands of `experiments.run` in the process of the tests, which saves their imports."""

import signal
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import run


def run_here(*args: str) -> int:
  """Runs a command and returns its exit status; the process neither restarts nor keeps a signal."""
  import grain  # noqa: F401, defines flags, which flagsaver would remove again

  argv, before = ["run.py", *args], signal.getsignal(signal.SIGINT)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(run, "_start_again_tuned_for_cpus", lambda: None)
    patch.setattr(run, "_keep_compiled_programs", lambda: None)
    patch.setattr(sys, "argv", argv)
    flags.FLAGS.mark_as_parsed()
    try:
      with flagsaver.flagsaver():
        run.main(flags.FLAGS(argv))
    except SystemExit as stopped:
      return stopped.code
    finally:
      signal.signal(signal.SIGINT, before)
  return 0

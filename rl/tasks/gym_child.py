"""The process that runs reasoning-gym's scorers; `rl.tasks.gym` starts and kills it.

It reads a line, the base64 of a pickled (data set, seed, size, answer, entry), and writes true or
false. A scorer may never return, for an answer such as 9**9**9, so the kernel ends the process when
one takes too long. This file imports nothing of this project.
"""

import base64
import functools
import itertools
import json
import os
import pickle
import resource
import signal
import sys
from typing import Any

CPU_SECONDS = 5.0
_MEMORY_BYTES = 4 << 30


def main() -> None:
  """Answers requests until the standard input is closed."""
  resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
  os.dup2(2, 1)  # whatever a library prints must not be read as a reply
  import reasoning_gym.factory  # noqa: F401  before the first limit
  for reply in itertools.chain([None], map(_accepts, sys.stdin)):
    print(json.dumps(reply), file=replies, flush=True)


def _accepts(line: str) -> bool:
  dataset, seed, size, answer, entry = pickle.loads(base64.b64decode(line))
  data = _data(dataset, seed, size)
  # The default action of this signal ends the process, whatever code is running.
  signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
  try:
    return float(data.score_answer(answer, entry)) == 1.0
  except Exception:  # scorers raise various exceptions for answers that they cannot parse
    return False
  finally:
    signal.setitimer(signal.ITIMER_PROF, 0)


@functools.lru_cache(maxsize=8)
def _data(dataset: str, seed: int, size: int) -> Any:
  import reasoning_gym.factory
  return reasoning_gym.factory.create_dataset(dataset, seed=seed, size=size)


if __name__ == "__main__":
  main()

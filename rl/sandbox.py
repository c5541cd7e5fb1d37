"""Runs untrusted programs against trusted tests in sandboxes, for rewards for code.

Tests are either Python asserts or pairs of an input and the expected output.

A verdict by asserts takes two processes, each in a sandbox of its own (`rl.isolation`). One
executes the program and answers calls; the other executes the tests, in which the program's
functions are replaced by proxies that send plain arguments to the first process and return its
plain results (`rl.sandbox_child`). Only the second process's exit status decides. A verdict by
outputs takes one process per pair, which is given the input; this process compares its output.

What this protects against:
- Incorrect programs that try to pass. They never share an interpreter with the asserts or the
  expected output, cannot see, signal or trace that process, and can tell it nothing but that a call
  returned a plain value or raised an exception of plain arguments.
- Programs that do harm. They have no network, no process or thread besides their own, a read-only
  file system with nothing but the system's programs and Python, an empty working directory in
  memory, no privileges, the user nobody (if the trainer is root) or one in a user namespace
  (otherwise), and limits on CPU time, wall-clock time, memory and files. With bubblewrap and the
  extra `sandbox`, system calls that a program does not need are refused: mounts, namespaces,
  tracing, BPF, keyrings, io_uring, sockets other than Unix ones and more.

What this does not protect against:
- Bugs of the kernel in the system calls that are left; in all of them without the filter.
- Memory that the kernel holds for a process (Unix sockets; without the filter, also shared segments
  and a nested namespace's mounts): run the trainer in a container that has a memory limit.
- A program that infers expected values from the arguments it is called with, or remembers earlier
  calls.
- A machine so busy that a correct program exceeds its wall-clock limit.
- Tests that accept too much: they run in a sandbox like programs, but their verdict is trusted.

A sandbox that does not work is never a program's failure. Before the first program runs, a trivial
one has to pass within the same limits; later, where a process does not start, it is tried again.
"""

import ast
import concurrent.futures
import contextlib
import functools
import importlib.util
import marshal
import math
import os
import select
import socket
import subprocess
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from absl import logging

from model.checks import require
from rl import isolation, sandbox_child
from rl.isolation import Sandbox

LEAST_MEMORY_MB = 64  # a bare interpreter and its libraries
_START = "import marshal, sys; exec(marshal.loads(bytes.fromhex(sys.argv.pop())))"
_PROBE_LIMITS = {"timeout_s": 20, "memory_mb": 512}
_TRIVIAL = ("def f(): return 1", "assert f() == 1")

Tests = str | Sequence[Mapping[str, str]]


class Verdict(NamedTuple):
  """What the tests say about a program.

  Attributes:
    passed: whether all tests pass; None if that cannot be judged, which is not the program's fault.
    reason: why it cannot be judged; empty if it can.
  """

  passed: bool | None
  reason: str = ""


def judge(program: str, tests: Tests, *, timeout_s: float, memory_mb: int,
          allow_unsandboxed: bool = False) -> Verdict:
  """Returns whether a program passes its tests.

  Args:
    program: Python source. It may import the standard library but not start threads. For asserts
      it defines functions, whose arguments and results are None, bool, int, float, complex, str,
      bytes, bytearray, list, tuple, dict, set or frozenset, possibly nested; instances of
      subclasses and generators are not accepted. For pairs it is a script that reads from stdin and
      prints to stdout.
    tests: either Python source or pairs of input and output.
      Source has asserts that call the program's functions by name, at the top level or, as in
      HumanEval, in a `check(candidate)` that the source itself calls. Builtins, and names that the
      tests define, are never replaced by functions of the program. The tests see what a function
      does to its arguments, and the exceptions it raises: builtin ones as they are, others as
      exceptions of the same name that derive from the same builtin ones, with those arguments and
      attributes that are plain. StopIteration and GeneratorExit become RuntimeError.
      Pairs are mappings {"input": str, "output": str}. A script passes if for each input, in a
      process of its own, it ends with status 0 and prints the output; whitespace at the end of
      lines, and at the end of the output, is ignored.
    timeout_s: wall-clock limit in seconds for the processes that execute asserts and program, or
      for the process of each pair, the start of their sandboxes included; rounded up, it is also
      the limit on the CPU time of each process.
    memory_mb: limit on the address space of each process, in MiB; at least 64.
    allow_unsandboxed: where no sandbox works, run the program with this process's rights. The
      limits on time and memory and the separate process for the tests remain.

  Returns:
    The verdict. `passed` is None for tests that no program could pass: they do not compile, raise
    an error of their own before they call the program, import a module that the sandbox does not
    have, or call no function that a program could define.

  Raises:
    ValueError: for limits out of range; if no sandbox works on this machine, or none does any more;
      or if the limits are too small for even a trivial program.
  """
  check_limits(timeout_s=timeout_s, memory_mb=memory_mb)
  sandbox = _chosen(allow_unsandboxed)
  _self_test(sandbox, timeout_s, memory_mb)
  try:
    tests = _standard(tests)
  except ValueError as error:
    return Verdict(None, f"the tests are broken: {error}")
  for _ in range(2):
    status, reason = _run(sandbox, program, tests, timeout_s, memory_mb)
    if status == sandbox_child.BROKEN:
      return Verdict(None, f"the tests are broken: {reason}")
    if status in (sandbox_child.PASSED, sandbox_child.FAILED):
      return Verdict(status == sandbox_child.PASSED)
  _self_test.__wrapped__(sandbox, timeout_s, memory_mb)
  return Verdict(None, f"the sandbox works, but not for these tests: {reason}")


def judge_many(pairs: Iterable[tuple[str, Tests]], *, timeout_s: float, memory_mb: int,
               workers: int | None = None, allow_unsandboxed: bool = False) -> list[Verdict]:
  """Returns `judge` of each (program, tests), several at a time; logs why any cannot be judged.

  Equal pairs are run once. Empty programs are not run, and fail.

  Args:
    pairs: programs with their tests.
    timeout_s: time limit per pair, see `judge`.
    memory_mb: memory limit per process, see `judge`.
    workers: number of pairs that run at a time; None for the number of CPU cores.
    allow_unsandboxed: see `judge`.
  """
  limits = {"timeout_s": timeout_s, "memory_mb": memory_mb, "allow_unsandboxed": allow_unsandboxed}
  pairs = list(pairs)
  keys = [(program, repr(tests)) for program, tests in pairs]
  distinct = {key: pair for key, pair in zip(keys, pairs, strict=True) if pair[0].strip()}
  if distinct:  # the self-test is run once, not by each thread
    check_limits(timeout_s=timeout_s, memory_mb=memory_mb)
    _self_test(_chosen(allow_unsandboxed), timeout_s, memory_mb)
  with concurrent.futures.ThreadPoolExecutor(workers or os.cpu_count()) as pool:
    verdicts = dict(zip(distinct, pool.map(
        lambda pair: judge(*pair, **limits), distinct.values()), strict=True))
  for reason in dict.fromkeys(verdict.reason for verdict in verdicts.values()):
    if reason:
      _warn_once(f"Programs are left out, as they cannot be judged: {reason}")
  return [verdicts.get(key, Verdict(False)) for key in keys]


def passes(program: str, tests: Tests, *, timeout_s: float, memory_mb: int,
           allow_unsandboxed: bool = False) -> bool:
  """Whether a program passes its tests; the arguments are those of `judge`.

  Raises:
    ValueError: where `judge` raises, and if the tests are broken.
  """
  return _passed(judge(program, tests, timeout_s=timeout_s, memory_mb=memory_mb,
                       allow_unsandboxed=allow_unsandboxed))


def passes_many(pairs: Iterable[tuple[str, Tests]], *, timeout_s: float, memory_mb: int,
                workers: int | None = None, allow_unsandboxed: bool = False) -> list[bool]:
  """Returns `passes` of each (program, tests); the arguments are those of `judge_many`.

  Raises:
    ValueError: where `judge` raises, and if the tests of any pair are broken.
  """
  verdicts = judge_many(pairs, timeout_s=timeout_s, memory_mb=memory_mb, workers=workers,
                        allow_unsandboxed=allow_unsandboxed)
  return [_passed(verdict, f"program {i}: ") for i, verdict in enumerate(verdicts)]


def check_limits(*, timeout_s: float, memory_mb: int) -> None:
  """Raises ValueError unless the limits are such that a program could run within them."""
  require(math.isfinite(timeout_s) and timeout_s > 0, f"timeout_s={timeout_s} must be positive")
  require(memory_mb >= LEAST_MEMORY_MB,
          f"memory_mb={memory_mb} must be at least {LEAST_MEMORY_MB}, for Python itself")


def check_tests(tests: Tests) -> None:
  """Raises ValueError for tests that are neither Python source nor pairs of input and output.

  Whether they can be executed is found out in the sandbox.
  """
  tests = _standard(tests)
  if isinstance(tests, str):
    try:
      with warnings.catch_warnings(action="ignore"):
        ast.parse(tests)
    except (SyntaxError, RecursionError, MemoryError) as error:
      raise ValueError(f"{type(error).__name__}: {error}") from error


def humaneval_case(row: dict[str, str], completion: str) -> tuple[str, str]:
  """Returns (program, tests) for a completion of a HumanEval prompt.

  See arXiv:2107.03374, section 2.2. Helpers that the prompt defines are copied into the tests, so
  that the program cannot replace them: a completion cannot pass as the inverse of `encode_shift` by
  redefining that function.

  Args:
    row: a row of the data set, with "prompt", "entry_point" and "test".
    completion: the code that continues the prompt.
  """
  prompt = ast.parse(row["prompt"])
  is_function = lambda node: isinstance(node, ast.FunctionDef)
  given = [node for node in prompt.body
           if not (is_function(node) and node.name == row["entry_point"])]
  helpers = ast.unparse(given) if any(map(is_function, given)) else ""
  return (row["prompt"] + completion,
          f"{helpers}\n{row['test']}\ncheck({row['entry_point']})\n")


def _passed(verdict: Verdict, prefix: str = "") -> bool:
  require(verdict.passed is not None, prefix + verdict.reason)
  return verdict.passed


def _standard(tests: Tests) -> str | list[tuple[bytes, bytes]]:
  """Returns source as it is, and pairs as tuples; raises ValueError for anything else."""
  if isinstance(tests, str):
    require(bool(tests.strip()), "they are empty")
    return tests
  form = 'they should be Python source, or a list of {"input": str, "output": str}'
  require(isinstance(tests, Sequence) and not isinstance(tests, bytes) and len(tests) > 0,
          f"{form}, not {type(tests).__name__} {tests!r:.80}")
  pairs = []
  for i, test in enumerate(tests):
    pair = [test.get(name) if isinstance(test, Mapping) else None for name in ("input", "output")]
    require(all(isinstance(text, str) for text in pair), f"{form}, but item {i} is {test!r:.80}")
    pairs.append(tuple(text.encode(errors="surrogatepass") for text in pair))
    require(max(map(len, pairs[-1])) <= sandbox_child.MAX_MESSAGE,
            f"item {i} is longer than {sandbox_child.MAX_MESSAGE} bytes")
  return pairs


# Processes.


def _run(sandbox: Sandbox, program: str, tests: str | list[tuple[bytes, bytes]], timeout_s: float,
         memory_mb: int) -> tuple[int, str]:
  """Returns one of `sandbox_child`'s exit statuses, and the reason for BROKEN or ABSENT."""
  if isinstance(tests, str):
    return _run_asserts(sandbox, program, tests, timeout_s, memory_mb)
  for given, expected in tests:
    status, reason = _run_script(sandbox, program, given, expected, timeout_s, memory_mb)
    if status != sandbox_child.PASSED:
      return status, reason
  return sandbox_child.PASSED, ""


def _run_asserts(sandbox: Sandbox, program: str, tests: str, timeout_s: float,
                 memory_mb: int) -> tuple[int, str]:
  job = sandbox_child.Wire().encode((program, tests))
  ours, theirs = socket.socketpair()
  report, written = os.pipe()
  with contextlib.ExitStack() as stack:
    stack.callback(os.close, report)
    with ours, theirs, os.fdopen(written, "wb"):
      stack.enter_context(sandbox.started(
          _command("program", timeout_s, memory_mb), stdin=theirs, stdout=subprocess.DEVNULL,
          stderr=subprocess.DEVNULL))
      judging = stack.enter_context(sandbox.started(
          _command("tests", timeout_s, memory_mb, written), pass_fds=(written,),
          stdin=subprocess.PIPE, stdout=ours, stderr=subprocess.DEVNULL))
    try:
      judging.communicate(job, timeout_s)
    except subprocess.TimeoutExpired:
      return sandbox_child.FAILED, ""
    status = judging.returncode
    if status == sandbox_child.BROKEN:
      return status, os.read(report, 4096).decode(errors="replace")
    if status in (sandbox_child.PASSED, sandbox_child.FAILED):
      return status, ""
    return sandbox_child.ABSENT, (
        "the process of the program did not start" if status == sandbox_child.ABSENT else
        f"the process of the tests ended with status {status}")


def _run_script(sandbox: Sandbox, program: str, given: bytes, expected: bytes, timeout_s: float,
                memory_mb: int) -> tuple[int, str]:
  source = program.encode(errors="replace")
  if len(source) > sandbox_child.MAX_MESSAGE:
    return sandbox_child.FAILED, ""
  deadline = time.monotonic() + timeout_s
  ready = sandbox_child.READY
  with isolation.memory_file(sandbox_child.framed(source) + given) as stdin, sandbox.started(
      _command("script", timeout_s, memory_mb), stdin=stdin, stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL) as process:
    try:
      output = _read(process.stdout.fileno(), len(ready) + sandbox_child.MAX_MESSAGE, deadline)
      status = process.wait(max(0, deadline - time.monotonic()))
    except (TimeoutError, subprocess.TimeoutExpired):
      return sandbox_child.FAILED, ""
  if not output.startswith(ready):
    return sandbox_child.ABSENT, f"the program did not start; its process ended with {status}"
  same = _stripped(output[len(ready):]) == _stripped(expected)
  return (sandbox_child.PASSED if same and not status else sandbox_child.FAILED), ""


def _read(pipe: int, limit: int, deadline: float) -> bytes:
  """Reads all of a pipe; raises TimeoutError after the deadline, or for more than `limit` bytes."""
  parts, size, poll = [], 0, select.poll()  # select.select refuses descriptors of 1024 and more
  poll.register(pipe, select.POLLIN)
  while poll.poll(max(0, deadline - time.monotonic()) * 1000):
    parts.append(os.read(pipe, 1 << 16))
    size += len(parts[-1])
    if not parts[-1]:
      return b"".join(parts)
    if size > limit:
      break
  raise TimeoutError


def _stripped(output: bytes) -> list[bytes]:
  return [line.rstrip() for line in output.rstrip().split(b"\n")]


def _command(role: str, timeout_s: float, memory_mb: int, *rest: int) -> list[str]:
  return [*isolation.python_command(_START), role, str(math.ceil(timeout_s)), str(memory_mb << 20),
          *map(str, rest), _child_code()]


@functools.cache
def _child_code() -> str:
  code = importlib.util.find_spec(sandbox_child.__name__).loader.get_code(sandbox_child.__name__)
  return marshal.dumps(code).hex()


# Choice of a sandbox.

_PROBE = """
import os
def leaks():
  seen = [path for path in ("/etc/passwd", "/proc/self", "/sys") if os.path.exists(path)]
  for what in (os.fork, lambda: open("/usr/there", "w")):
    try:
      what()
      seen.append(str(what))
    except OSError:
      pass
  open("here", "w").close()
  return seen
def nests():
  try:
    os.unshare(os.CLONE_NEWUSER)
    return True
  except OSError:
    return False
"""
_ADVICE = (
    "Install bubblewrap, and run where user namespaces are allowed: as root, with sysctl "
    "kernel.unprivileged_userns_clone=1 (Debian) or kernel.apparmor_restrict_unprivileged_userns=0 "
    "(Ubuntu), or in a container with --privileged or --security-opt seccomp=unconfined")


def _chosen(allow_unsandboxed: bool) -> Sandbox:
  """Returns the sandbox that programs run in; one that does nothing if none works but may."""
  sandbox, reasons = _working_sandbox()
  require(sandbox is not None or allow_unsandboxed,
          f"no sandbox works on this machine, so that no program can be judged: {reasons}. "
          f"{_ADVICE}; allow_unsandboxed=True runs untrusted code with your own rights instead")
  return sandbox or Sandbox()


@functools.cache
def _working_sandbox() -> tuple[Sandbox | None, str]:
  """Returns the first sandbox that works when tried; None if none does, and the reasons."""
  reasons = []
  for name, make in isolation.candidates():
    sandbox, reason = _tried(make)
    if sandbox and not reason:
      _say_what_is_missing(name, sandbox, reasons)
      return sandbox, ""
    reasons.append(reason)
  return None, "; ".join(dict.fromkeys(reasons))


def _tried(make: functools.partial) -> tuple[Sandbox | None, str]:
  """Returns a sandbox, and the reason why it does not work; empty if it does."""
  try:
    sandbox = make()
  except FileNotFoundError as error:
    return None, str(error)
  tests = "assert leaks() == []" + "\nassert not nests()" * (not sandbox.nests)
  status, _ = _run_asserts(sandbox, _PROBE, tests, **_PROBE_LIMITS)
  if status == sandbox_child.PASSED:
    return sandbox, ""
  return sandbox, sandbox.diagnosis() or f"{sandbox.prefix[0]} works but does not isolate"


def _say_what_is_missing(name: str, sandbox: Sandbox, reasons: list[str]) -> None:
  """Logs which of the protections this sandbox lacks, and what would add them."""
  if sandbox.filter:
    return
  if isolation.filter_of_system_calls():
    why = f"bubblewrap, which would load the filter, cannot ({'; '.join(dict.fromkeys(reasons))})"
  elif name == "bubblewrap":
    why = "install libseccomp, and its binding by pip install pyseccomp (the extra 'sandbox')"
  else:
    why = ("install bubblewrap and libseccomp, and its binding by pip install pyseccomp (the extra "
           "'sandbox')")
  nests = ", and they can create user namespaces" if sandbox.nests else ""
  _warn_once(f"Programs run in a sandbox ({name}), but their system calls are not filtered{nests}: "
             f"{why}")


@functools.cache
def _self_test(sandbox: Sandbox, timeout_s: float, memory_mb: int) -> None:
  """Raises ValueError unless a trivial program passes in the sandbox, within these limits."""
  for _ in range(3):
    begun = time.monotonic()
    status, reason = _run_asserts(sandbox, *_TRIVIAL, max(timeout_s, 20), memory_mb)
    elapsed = time.monotonic() - begun
    if status == sandbox_child.PASSED and elapsed <= timeout_s:
      return
  require(status != sandbox_child.PASSED,
          f"timeout_s={timeout_s} is too short: a trivial program takes {elapsed:.2g} s on this "
          "machine, most of them to start its sandbox. Raise the limit, or free the machine")
  why = sandbox.diagnosis()
  require(not why, f"the sandbox of programs does not work: {why}. {_ADVICE}")
  raise ValueError(f"not even a trivial program passes with memory_mb={memory_mb} "
                   f"({reason or 'it fails'}): raise the limit")


@functools.cache
def _warn_once(message: str) -> None:
  logging.warning("%s", message)

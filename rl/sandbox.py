"""Rewards for code: does an untrusted program pass trusted tests?

Two processes, each in a sandbox of its own. One executes the program and answers calls; the other
executes the tests, in which the program's functions are stand-ins that send plain arguments across
and get plain results back (`rl.sandbox_child`). Only the second process's exit status counts.

What this protects against. Wrong programs that want to look right: they never share an interpreter
with the asserts, cannot see, signal or trace that process, and can say nothing but "this call
returns that plain value". Programs that do harm: no network, no process or thread besides the one
given, an empty working directory in memory, a file system that shows, read-only, the system's
programs and Python and nothing else, no privileges, nobody's user (a root trainer) or a user
namespace's (any other), limits on CPU time, wall clock, memory and files.

What it does not protect against. Bugs of the kernel, which programs talk to unfiltered. Memory that
the kernel holds for a process (sockets, shared segments, a nested namespace's mounts): run the
trainer in a container with a limit of its own. A program that reads expected values off the
arguments it is called with, or remembers earlier calls. A machine so busy that a right program runs
out of wall clock. Tests are run as carefully as programs, but what they accept is believed.
"""

import ast
import concurrent.futures
import contextlib
import functools
import importlib.util
import marshal
import math
import os
import pathlib
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator

from model.checks import require
from rl import sandbox_child

_DISK_BYTES = 16 << 20
_NOBODY = 65534
_LEAST_MEMORY_MB = 64  # a bare interpreter and its libraries
_START = "import marshal, sys; exec(marshal.loads(bytes.fromhex(sys.argv.pop())))"


def passes(program: str, tests: str, *, timeout_s: float, memory_mb: int,
           allow_unsandboxed: bool = False) -> bool:
  """Whether every assert of the tests holds for the program.

  Args:
    program: Python source that defines functions, whose arguments and results are None, bool, int,
      float, complex, str, bytes, bytearray, list, tuple, dict, set or frozenset, nested, and
      exactly these: not a subclass, not a generator. It has the standard library, and no threads.
    tests: Python source with asserts that call these functions by name, at the top or, as in
      HumanEval, in a `check(candidate)` that it calls itself. Builtins are the real ones whatever
      the program defines; so is every name that the tests define. What a function does to its
      arguments is seen, and so are exceptions, non-builtin ones as RuntimeError.
    timeout_s: Wall clock for both, sandboxes' start included; also the CPU time of each, rounded
      up.
    memory_mb: Address space of each of the two, MiB, at least 64.
    allow_unsandboxed: Where no sandbox works, run the program with this process's rights anyway;
      limits of time and memory, and the separate process for the tests, remain.

  Returns:
    False too for tests that are broken or never call the program.

  Raises:
    ValueError: The limits make no sense, or no sandbox works here.
  """
  require(math.isfinite(timeout_s) and timeout_s > 0, f"timeout_s={timeout_s} must be positive")
  require(memory_mb >= _LEAST_MEMORY_MB,
          f"memory_mb={memory_mb} must be at least {_LEAST_MEMORY_MB}, for Python itself")
  prefix, reasons = _working_sandbox()
  require(prefix is not None or allow_unsandboxed,
          f"no sandbox works here ({reasons}). Install bubblewrap, or run where user namespaces "
          "are allowed; allow_unsandboxed=True runs untrusted code with your own rights instead")
  return _run(prefix or [], program, tests, timeout_s, memory_mb)


def passes_many(pairs: Iterable[tuple[str, str]], *, timeout_s: float, memory_mb: int,
                workers: int | None = None, allow_unsandboxed: bool = False) -> list[bool]:
  """`passes` for each (program, tests), `workers` at a time: by default as many as CPU cores.

  Equal pairs are run once, and empty programs not at all.
  """
  one = functools.partial(passes, timeout_s=timeout_s, memory_mb=memory_mb,
                          allow_unsandboxed=allow_unsandboxed)
  with concurrent.futures.ThreadPoolExecutor(workers or os.cpu_count()) as pool:
    pairs = list(pairs)
    distinct = [pair for pair in dict.fromkeys(pairs) if pair[0].strip()]
    verdicts = dict(zip(distinct, pool.map(lambda pair: one(*pair), distinct), strict=True))
  return [verdicts.get(pair, False) for pair in pairs]


def humaneval_case(row: dict[str, str], completion: str) -> tuple[str, str]:
  """(program, tests) of a row of HumanEval (arXiv:2107.03374, section 2.2) and a continuation.

  Helpers that a prompt defines are the tests' own: a completion that redefines `encode_shift`
  does not thereby pass as its inverse.
  """
  prompt = ast.parse(row["prompt"])
  is_function = lambda node: isinstance(node, ast.FunctionDef)
  given = [node for node in prompt.body
           if not (is_function(node) and node.name == row["entry_point"])]
  helpers = ast.unparse(given) if any(map(is_function, given)) else ""
  return (row["prompt"] + completion,
          f"{helpers}\n{row['test']}\ncheck({row['entry_point']})\n")


def _run(prefix: list[str], program: str, tests: str, timeout_s: float, memory_mb: int) -> bool:
  command = [*prefix, os.path.realpath(sys.executable), "-I", "-S", "-B", "-c", _START]
  limits = [str(math.ceil(timeout_s)), str(memory_mb << 20), _child_code()]
  job = sandbox_child.Wire().encode((program, tests))
  ours, theirs = socket.socketpair()
  with contextlib.ExitStack() as stack:
    with ours, theirs:
      stack.enter_context(_started([*command, "program", *limits], theirs, subprocess.DEVNULL))
      judge = stack.enter_context(_started([*command, "tests", *limits], subprocess.PIPE, ours))
    try:
      judge.communicate(job, timeout_s)
    except subprocess.TimeoutExpired:
      return False
    return judge.returncode == sandbox_child.PASSED


@contextlib.contextmanager
def _started(command: list[str], stdin: object, stdout: object) -> Iterator[subprocess.Popen]:
  with subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=subprocess.DEVNULL, env={},
                        cwd="/", start_new_session=True) as process:
    try:
      yield process
    finally:
      if process.returncode is None:  # else it is reaped, and its number may be another group's
        os.killpg(process.pid, signal.SIGKILL)


@functools.cache
def _child_code() -> str:
  code = importlib.util.find_spec(sandbox_child.__name__).loader.get_code(sandbox_child.__name__)
  return marshal.dumps(code).hex()


def _system() -> tuple[list[str], dict[str, str]]:
  """What a sandbox shows: directories to mount, and links at the root with where they lead."""
  shown, links = ["/usr"], {}
  for name in ("bin", "lib", "lib64"):
    path = pathlib.Path("/", name)
    if path.is_symlink():
      links[name] = os.readlink(path)
    elif path.is_dir():
      shown.append(str(path))
  python = os.path.realpath(sys.base_prefix)
  return (shown if python.startswith("/usr") else [*shown, python]), links


def _tool(name: str) -> str:
  found = shutil.which(name)
  if not found:
    raise FileNotFoundError(f"{name} is not installed")
  return found


def _unprivileged() -> list[str]:
  """Gives up what setting up needed. Only for another user than root does RLIMIT_NPROC count."""
  user = [f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups"] if _is_root() else []
  return [_tool("setpriv"), *user, "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]


def _is_root() -> bool:
  return os.geteuid() == 0


def _bubblewrap() -> list[str]:
  shown, links = _system()
  command = [_tool("bwrap"), "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts",
             "--unshare-cgroup-try", "--die-with-parent"]
  if not _is_root():
    return [*command, "--unshare-user", *_mounts(shown, links)]
  keep = [arg for cap in ("SETUID", "SETGID", "SETPCAP") for arg in ("--cap-add", f"CAP_{cap}")]
  return [*command, "--cap-drop", "ALL", *keep, *_mounts(shown, links), *_unprivileged()]


def _mounts(shown: list[str], links: dict[str, str]) -> list[str]:
  # Left to itself, bubblewrap makes the way to what root keeps impassable for anyone else.
  way = [str(parent) for path in shown for parent in reversed(pathlib.Path(path).parents)]
  args = [arg for path in way if path != "/" for arg in ("--perms", "755", "--dir", path)]
  args += [arg for path in shown for arg in ("--ro-bind", path, path)]
  args += [arg for name, to in links.items() for arg in ("--symlink", to, f"/{name}")]
  return [*args, "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache", "--perms", "1777",
          "--size", str(_DISK_BYTES), "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp"]


def _unshare() -> list[str]:
  """As bubblewrap, from util-linux. In a chroot nobody can make another user namespace."""
  shown, links = _system()
  quoted = shlex.quote
  steps = [  # /sys is everywhere, and nothing below it is needed
      f"mount -t tmpfs -o nosuid,nodev,mode=755,size={_DISK_BYTES} tmpfs /sys", "cd /sys",
      "mkdir -m 1777 tmp", "mkdir etc", "! [ -e /etc/ld.so.cache ] || cp /etc/ld.so.cache etc",
      *(f"mkdir -p .{quoted(path)} && mount -o bind,ro,nosuid {quoted(path)} .{quoted(path)}"
        for path in shown),
      *(f"ln -s {quoted(to)} {name}" for name, to in links.items()),
      # No exec: the shell is the namespace's init, which changing users would free of --kill-child.
      f"chroot . {shlex.join(_unprivileged())} --  sh -c 'cd /tmp && exec \"$@\"' sh \"$@\"",
      "exit $?"]
  user = [] if _is_root() else ["--user", "--map-root-user"]
  return [_tool("setpriv"), "--pdeathsig=KILL", _tool("unshare"), *user, "--mount", "--pid",
          "--net", "--ipc", "--uts", "--fork", "--kill-child", "--", "sh", "-ec",
          "\n".join(steps), "sh"]


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
"""


@functools.cache
def _working_sandbox() -> tuple[list[str] | None, str]:
  """The command that starts a sandbox, tried out; or None, and what did not work."""
  reasons = []
  for make in (_bubblewrap, _unshare):
    prefix, reason = _tried(make)
    if not reason:
      return prefix, ""
    reasons.append(reason)
  return None, "; ".join(reasons)


def _tried(make: Callable[[], list[str]]) -> tuple[list[str], str]:
  """The command, and why it is of no use here ("" if it is)."""
  try:
    prefix = make()
  except FileNotFoundError as error:
    return [], str(error)
  works = _run(prefix, _PROBE, "assert leaks() == []", timeout_s=20, memory_mb=512)
  return prefix, "" if works else f"{prefix[:1]} is there but does not isolate"

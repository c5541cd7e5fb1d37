"""Runs untrusted programs against trusted tests in sandboxes, for rewards for code.

A verdict takes two processes, each in a sandbox of its own. One executes the program and answers
calls; the other executes the tests, in which the program's functions are replaced by proxies that
send plain arguments to the first process and return its plain results (`rl.sandbox_child`). Only
the second process's exit status decides.

What this protects against:
- Incorrect programs that try to pass. They never share an interpreter with the asserts, cannot see,
  signal or trace that process, and can tell it nothing but that a call returned a plain value.
- Programs that do harm. They have no network, no process or thread besides their own, a read-only
  file system with nothing but the system's programs and Python, an empty working directory in
  memory, no privileges, the user nobody (if the trainer is root) or one in a user namespace
  (otherwise), and limits on CPU time, wall-clock time, memory and files.

What this does not protect against:
- Bugs of the kernel, as system calls are not filtered.
- Memory that the kernel holds for a process (sockets, shared segments, a nested namespace's
  mounts): run the trainer in a container that has a memory limit.
- A program that infers expected values from the arguments it is called with, or remembers earlier
  calls.
- A machine so busy that a correct program exceeds its wall-clock limit.
- Tests that accept too much: they run in a sandbox like programs, but their verdict is trusted.
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
    program: Python source that defines functions. Their arguments and results are None, bool, int,
      float, complex, str, bytes, bytearray, list, tuple, dict, set or frozenset, possibly nested;
      instances of subclasses and generators are not accepted. The program may import the standard
      library but not start threads.
    tests: Python source with asserts that call these functions by name, at the top level or, as in
      HumanEval, in a `check(candidate)` that the source itself calls. Builtins, and names that the
      tests define, are never replaced by functions of the program. The tests see what a function
      does to its arguments, and the exceptions it raises: builtin ones as they are, others as
      RuntimeError.
    timeout_s: wall-clock limit in seconds for both processes, the start of their sandboxes
      included; rounded up, it is also the limit on the CPU time of each.
    memory_mb: limit on the address space of each process, in MiB; at least 64.
    allow_unsandboxed: where no sandbox works, run the program with this process's rights. The
      limits on time and memory and the separate process for the tests remain.

  Returns:
    The verdict; False also for tests that are broken or never call the program.

  Raises:
    ValueError: for limits out of range, or if no sandbox works on this machine.
  """
  require(math.isfinite(timeout_s) and timeout_s > 0, f"timeout_s={timeout_s} must be positive")
  require(memory_mb >= _LEAST_MEMORY_MB,
          f"memory_mb={memory_mb} must be at least {_LEAST_MEMORY_MB}, for Python itself")
  prefix, reasons = _working_sandbox()
  require(prefix is not None or allow_unsandboxed,
          f"no sandbox works on this machine ({reasons}). Install bubblewrap, or run where user "
          "namespaces are allowed; allow_unsandboxed=True runs untrusted code with your own rights "
          "instead")
  return _run(prefix or [], program, tests, timeout_s, memory_mb)


def passes_many(pairs: Iterable[tuple[str, str]], *, timeout_s: float, memory_mb: int,
                workers: int | None = None, allow_unsandboxed: bool = False) -> list[bool]:
  """Returns `passes` for each (program, tests), several at a time.

  Equal pairs are run once. Empty programs are not run, and fail.

  Args:
    pairs: programs with their tests.
    timeout_s: time limit per pair, see `passes`.
    memory_mb: memory limit per process, see `passes`.
    workers: number of pairs that run at a time; None for the number of CPU cores.
    allow_unsandboxed: see `passes`.
  """
  one = functools.partial(passes, timeout_s=timeout_s, memory_mb=memory_mb,
                          allow_unsandboxed=allow_unsandboxed)
  with concurrent.futures.ThreadPoolExecutor(workers or os.cpu_count()) as pool:
    pairs = list(pairs)
    distinct = [pair for pair in dict.fromkeys(pairs) if pair[0].strip()]
    verdicts = dict(zip(distinct, pool.map(lambda pair: one(*pair), distinct), strict=True))
  return [verdicts.get(pair, False) for pair in pairs]


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
      # Once a process has been reaped, its id may belong to another group.
      if process.returncode is None:
        os.killpg(process.pid, signal.SIGKILL)


@functools.cache
def _child_code() -> str:
  code = importlib.util.find_spec(sandbox_child.__name__).loader.get_code(sandbox_child.__name__)
  return marshal.dumps(code).hex()


def _system() -> tuple[list[str], dict[str, str]]:
  """Returns the directories to mount in a sandbox, and its root's links with their targets."""
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
  """Returns a command prefix that drops the privileges which setting up the sandbox needed.

  Root becomes the user nobody, as RLIMIT_NPROC does not apply to root.
  """
  user = [f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups"] if _is_root() else []
  return [_tool("setpriv"), *user, "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]


def _is_root() -> bool:
  return os.geteuid() == 0


def _bubblewrap() -> list[str]:
  """Returns a command prefix that runs a command in a sandbox of bubblewrap's."""
  shown, links = _system()
  command = [_tool("bwrap"), "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts",
             "--unshare-cgroup-try", "--die-with-parent"]
  if not _is_root():
    return [*command, "--unshare-user", *_mounts(shown, links)]
  keep = [arg for cap in ("SETUID", "SETGID", "SETPCAP") for arg in ("--cap-add", f"CAP_{cap}")]
  return [*command, "--cap-drop", "ALL", *keep, *_mounts(shown, links), *_unprivileged()]


def _mounts(shown: list[str], links: dict[str, str]) -> list[str]:
  # By default bubblewrap creates the parents of a mount that only root may enter with permissions
  # that keep every other user out.
  parents = [str(parent) for path in shown for parent in reversed(pathlib.Path(path).parents)]
  args = [arg for path in parents if path != "/" for arg in ("--perms", "755", "--dir", path)]
  args += [arg for path in shown for arg in ("--ro-bind", path, path)]
  args += [arg for name, to in links.items() for arg in ("--symlink", to, f"/{name}")]
  return [*args, "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache", "--perms", "1777",
          "--size", str(_DISK_BYTES), "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp"]


def _unshare() -> list[str]:
  """Returns a command prefix that does what `_bubblewrap`'s does with util-linux's tools.

  Processes in its chroot cannot create another user namespace.
  """
  shown, links = _system()
  quoted = shlex.quote
  steps = [  # /sys serves as the new root: it exists everywhere, and nothing below it is needed
      f"mount -t tmpfs -o nosuid,nodev,mode=755,size={_DISK_BYTES} tmpfs /sys", "cd /sys",
      "mkdir -m 1777 tmp", "mkdir etc", "! [ -e /etc/ld.so.cache ] || cp /etc/ld.so.cache etc",
      *(f"mkdir -p .{quoted(path)} && mount -o bind,ro,nosuid {quoted(path)} .{quoted(path)}"
        for path in shown),
      *(f"ln -s {quoted(to)} {name}" for name, to in links.items()),
      # No exec: the shell has to stay the namespace's init, as a change of its user would clear the
      # signal by which --kill-child kills it.
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
  """Returns the prefix of the first sandbox that works when tried; else None and the reasons."""
  reasons = []
  for make in (_bubblewrap, _unshare):
    prefix, reason = _tried(make)
    if not reason:
      return prefix, ""
    reasons.append(reason)
  return None, "; ".join(reasons)


def _tried(make: Callable[[], list[str]]) -> tuple[list[str], str]:
  """Returns a sandbox's command prefix, and the reason why it does not work, "" if it does."""
  try:
    prefix = make()
  except FileNotFoundError as error:
    return [], str(error)
  works = _run(prefix, _PROBE, "assert leaks() == []", timeout_s=20, memory_mb=512)
  return prefix, "" if works else f"{prefix[:1]} is installed but does not isolate"

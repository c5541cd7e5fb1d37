"""Sandboxes for untrusted programs: commands that set them up, and a filter of system calls.

A sandbox has no network, no process of the machine, a read-only file system with nothing but the
system's programs and Python, and an empty working directory in memory. Its commands have no
privileges; they run as the user nobody (if the trainer is root) or as one in a user namespace.

There are two tools that make one. bubblewrap also loads the filter, if libseccomp and its Python
binding are installed (the extra `sandbox`), and from version 0.8 on it prevents nested user
namespaces. util-linux's tools do neither, but no user namespace can be created in their chroot.
"""

import contextlib
import dataclasses
import errno
import functools
import importlib
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import BinaryIO

_DISK_BYTES = 16 << 20
_NOBODY = 65534
_FILTER_FD = "{filter}"
_START_S = 20  # in which even a busy machine starts a sandbox

# What a program that computes does not need, and through which kernels have been attacked or which
# has effects outside of the sandbox. Names that the kernel or libseccomp does not know are ignored.
_REFUSED = """
mount umount umount2 pivot_root chroot fsopen fsconfig fsmount fspick move_mount open_tree
open_tree_attr mount_setattr statmount listmount name_to_handle_at open_by_handle_at fanotify_init
unshare setns
ptrace process_vm_readv process_vm_writev process_madvise kcmp pidfd_open pidfd_getfd
perf_event_open bpf userfaultfd lookup_dcookie
io_uring_setup io_uring_enter io_uring_register
add_key request_key keyctl
init_module finit_module delete_module create_module query_module kexec_load kexec_file_load
reboot swapon swapoff acct quotactl quotactl_fd syslog vhangup sethostname setdomainname
settimeofday stime clock_settime clock_settime64 clock_adjtime clock_adjtime64 adjtimex
iopl ioperm modify_ldt vm86 vm86old uselib nfsservctl personality move_pages migrate_pages
shmget shmat shmctl semget semop semtimedop semctl msgget msgsnd msgrcv msgctl mq_open memfd_secret
"""
_NAMESPACES = {  # flags of clone
    "NEWNS": 0x00020000, "NEWCGROUP": 0x02000000, "NEWUTS": 0x04000000, "NEWIPC": 0x08000000,
    "NEWUSER": 0x10000000, "NEWPID": 0x20000000, "NEWNET": 0x40000000}
_TERMINAL = {"TIOCSTI": 0x5412, "TIOCLINUX": 0x541C}  # ioctls that insert input into a terminal
_AF_UNIX = 1


@dataclasses.dataclass(frozen=True)
class Sandbox:
  """A sandbox, as a command that runs in it the command that is appended.

  Attributes:
    prefix: the command that sets up the sandbox; empty for none.
    filter: BPF program that filters the system calls; empty for none.
    nests: whether a program in the sandbox may be able to create a user namespace of its own, in
      which it has privileges.
  """

  prefix: tuple[str, ...] = ()
  filter: bytes = b""
  nests: bool = False

  @contextlib.contextmanager
  def started(self, command: list[str], pass_fds: tuple[int, ...] = (),
              **streams: object) -> Iterator[subprocess.Popen]:
    """Runs a command in the sandbox, and kills all that is left of it in the end.

    Args:
      command: the command and its arguments.
      pass_fds: file descriptors that the command inherits.
      streams: `stdin`, `stdout` and `stderr` as for `subprocess.Popen`.
    """
    with contextlib.ExitStack() as stack:
      prefix = self.prefix
      if self.filter:
        fd = stack.enter_context(memory_file(self.filter)).fileno()
        prefix, pass_fds = [str(fd) if x == _FILTER_FD else x for x in prefix], (*pass_fds, fd)
      process = stack.enter_context(subprocess.Popen(
          [*prefix, *command], pass_fds=pass_fds, env={}, cwd="/", start_new_session=True,
          **streams))
      try:
        yield process
      finally:
        # Once a process has been reaped, its id may belong to another group.
        if process.returncode is None:
          os.killpg(process.pid, signal.SIGKILL)

  def diagnosis(self) -> str:
    """Returns why no command starts in the sandbox; "" if one does."""
    tool = " ".join(self.prefix[:1]) or sys.executable
    with self.started(python_command("pass"), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                      stderr=subprocess.PIPE) as process:
      try:
        stderr = process.communicate(timeout=_START_S)[1].decode(errors="replace")
      except subprocess.TimeoutExpired:
        return f"{tool} did not start a process within {_START_S} s"
    if not process.returncode:
      return ""
    said = " ".join(stderr.split())[-300:] or "without a message"
    return f"{tool} ended with status {process.returncode}: {said}"


def python_command(source: str) -> list[str]:
  """Returns a command that runs Python source in a bare interpreter, which loads no packages."""
  return [os.path.realpath(sys.executable), "-I", "-S", "-B", "-X", "utf8", "-c", source]


@contextlib.contextmanager
def memory_file(content: bytes) -> Iterator[BinaryIO]:
  """Opens a file in memory that has this content, at its beginning."""
  with open(os.memfd_create("sandbox"), "w+b") as file:
    file.write(content)
    file.seek(0)
    yield file


def candidates() -> Iterable[tuple[str, functools.partial]]:
  """Yields functions that make the sandboxes to try, with names, the most restrictive first.

  Each function raises FileNotFoundError if the tools that it needs are not installed.
  """
  filters = [filter_of_system_calls(), b""] if filter_of_system_calls() else [b""]
  for bpf in filters:
    for nests in (False, True):
      yield "bubblewrap", functools.partial(bubblewrap, nests=nests, bpf=bpf)
  yield "unshare", functools.partial(unshare)


def bubblewrap(*, nests: bool = True, bpf: bytes = b"") -> Sandbox:
  """Returns a sandbox of bubblewrap's.

  Args:
    nests: whether to leave user namespaces enabled in it. Where they are disabled, a trainer that
      is root runs bubblewrap itself as nobody, who needs access to Python's files.
    bpf: the filter of system calls; empty for none.

  Raises:
    FileNotFoundError: if bubblewrap or setpriv is not installed.
  """
  shown, links = _system()
  load = ["--seccomp", _FILTER_FD] if bpf else []
  command = [_tool("bwrap"), *load, "--unshare-ipc", "--unshare-pid", "--unshare-net",
             "--unshare-uts", "--unshare-cgroup-try", "--die-with-parent"]
  mounts = _mounts(shown, links)
  if nests and _is_root():
    keep = [x for cap in ("SETUID", "SETGID", "SETPCAP") for x in ("--cap-add", f"CAP_{cap}")]
    command += ["--cap-drop", "ALL", *keep, *mounts, *_unprivileged()]
  else:
    disable = [] if nests else ["--disable-userns"]
    command = [*(_as_nobody() if _is_root() else []), *command, "--unshare-user", *disable, *mounts]
  return Sandbox(tuple(command), bpf, nests)


def unshare() -> Sandbox:
  """Returns a sandbox made by util-linux's tools, without a filter of system calls.

  Processes in its chroot cannot create another user namespace.

  Raises:
    FileNotFoundError: if one of the tools is not installed.
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
  return Sandbox((_tool("setpriv"), "--pdeathsig=KILL", _tool("unshare"), *user, "--mount", "--pid",
                  "--net", "--ipc", "--uts", "--fork", "--kill-child", "--", "sh", "-ec",
                  "\n".join(steps), "sh"))


@functools.cache
def filter_of_system_calls() -> bytes:
  """Returns a BPF program for `bwrap --seccomp`; empty if libseccomp's binding is not installed.

  It refuses the calls of `_REFUSED`, namespaces, and all sockets but Unix domain ones: AF_VSOCK,
  for one, reaches the host of a virtual machine from any network namespace. libseccomp kills a
  process that makes calls of another architecture, such as x86's on x86-64.
  """
  seccomp = _binding()
  if seccomp is None:
    return b""
  refuse, equal = seccomp.ERRNO(errno.EPERM), seccomp.MASKED_EQ
  rules = [(refuse, name, ()) for name in _REFUSED.split()]
  rules += [(refuse, "clone", (seccomp.Arg(0, equal, flag, flag),))
            for flag in _NAMESPACES.values()]
  # The flags of clone3 are in memory, where a filter cannot see them. Told that the call does not
  # exist, the C library falls back on clone.
  rules.append((seccomp.ERRNO(errno.ENOSYS), "clone3", ()))
  rules.append((refuse, "socket", (seccomp.Arg(0, seccomp.NE, _AF_UNIX),)))
  # The kernel reads the lower 32 bits of a request, so that a filter has to do so too.
  rules += [(refuse, "ioctl", (seccomp.Arg(1, equal, 0xFFFFFFFF, request),))
            for request in _TERMINAL.values()]
  made = seccomp.SyscallFilter(seccomp.ALLOW)
  for action, name, args in rules:
    number = seccomp.resolve_syscall(seccomp.Arch.NATIVE, name)
    if number != -1:
      made.add_rule(action, number, *args)
  with memory_file(b"") as file:
    made.export_bpf(file)
    file.seek(0)
    return file.read()


def _binding() -> ModuleType | None:
  """Returns pyseccomp, or libseccomp's own binding of the same interface; None without either."""
  for name in ("pyseccomp", "seccomp"):
    try:
      module = importlib.import_module(name)
    except (ImportError, OSError, RuntimeError, AttributeError):  # also for lack of libseccomp
      continue
    if hasattr(module, "SyscallFilter"):  # not just a folder of that name
      return module
  return None


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


def _as_nobody() -> list[str]:
  return [_tool("setpriv"), f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups"]


def _unprivileged() -> list[str]:
  """Returns a command prefix that drops the privileges which setting up the sandbox needed.

  Root becomes the user nobody, as RLIMIT_NPROC does not apply to root.
  """
  command = _as_nobody() if _is_root() else [_tool("setpriv")]
  return [*command, "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]


def _is_root() -> bool:
  return os.geteuid() == 0


def _mounts(shown: list[str], links: dict[str, str]) -> list[str]:
  # By default bubblewrap creates the parents of a mount that only root may enter with permissions
  # that keep every other user out.
  parents = [str(parent) for path in shown for parent in reversed(pathlib.Path(path).parents)]
  args = [arg for path in parents if path != "/" for arg in ("--perms", "755", "--dir", path)]
  args += [arg for path in shown for arg in ("--ro-bind", path, path)]
  args += [arg for name, to in links.items() for arg in ("--symlink", to, f"/{name}")]
  return [*args, "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache", "--perms", "1777",
          "--size", str(_DISK_BYTES), "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp"]

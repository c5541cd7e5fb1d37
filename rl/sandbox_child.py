"""The code that runs inside the sandboxes: the program under test in one, its tests in the other.

Both are bare interpreters that are given this module's code, which therefore imports only modules
that load fast. A call and its result cross the channel as plain data, and the result is judged by a
process that has never run a line of the program. A program that is tested by its output has a
sandbox to itself.
"""

import builtins
import os
import resource
import sys

# Exit statuses of the process of the tests, with which no tool that starts it exits itself: BROKEN
# for tests that no program could pass, ABSENT if the process of the program has not started.
PASSED, FAILED, BROKEN, ABSENT = 87, 88, 89, 90
READY = b"\0ready\n"
MAX_MESSAGE = 16 << 20  # bytes
FILE_BYTES = 1 << 20
OPEN_FILES = 32


def _escaped(text: str) -> str:
  return text.encode("unicode_escape").decode()


_ATOMS = {  # type: (tag, function to write it on one line, function to read it)
    type(None): ("n", lambda _: "", lambda _: None),
    bool: ("b", lambda x: "1" * x, bool),
    int: ("i", hex, lambda line: int(line, 16)),  # decimal conversion takes quadratic time
    float: ("f", float.hex, float.fromhex),
    complex: ("c", str, complex),
    str: ("s", _escaped, lambda line: line.encode().decode("unicode_escape")),
    bytes: ("y", bytes.hex, bytes.fromhex),
}
_READERS = {tag: read for tag, _, read in _ATOMS.values()}
_MUTABLE = {"list": list, "dict": dict, "set": set, "bytearray": bytearray}
_FIXED = {"tuple": tuple, "frozenset": frozenset}
_TAGS = {kind: tag for tag, kind in (_MUTABLE | _FIXED).items()}


class Wire:
  """Encodes the plain values of one call as text, keeping the identity of mutable objects.

  An atom is a line with its type's tag and its value; a container is a line with its type's name
  and its length, followed by its items. Mutable containers are numbered in order of appearance;
  "@" and the number refer to one that the message has already written. The answer to a call repeats
  its arguments, and decoding it updates them in place: the caller sees what the function did to
  them, and which of them it returned.
  """

  def __init__(self):
    self._objects: list = []

  def encode(self, value: object) -> bytes:
    """Returns the message for a value.

    Raises:
      TypeError: for anything but exact builtin types, as a subclass may define its own `__eq__`.
    """
    lines, written = [], set()
    self._write(value, {id(x): i for i, x in enumerate(self._objects)}, written, lines)
    return "\n".join(lines).encode()

  def _write(self, value: object, numbers: dict[int, int], written: set[int],
             lines: list[str]) -> None:
    kind = type(value)
    if kind in _ATOMS:
      tag, write, _ = _ATOMS[kind]
      lines.append(tag + write(value))
      return
    if kind not in _TAGS:
      raise TypeError(f"a program and its tests exchange only plain values, not {kind}")
    number = ""
    if _TAGS[kind] in _MUTABLE:
      if id(value) not in numbers:
        numbers[id(value)] = len(self._objects)
        self._objects.append(value)
      number = numbers[id(value)]
      if number in written:
        lines.append(f"@{number}")
        return
      written.add(number)
    items = [x for item in value.items() for x in item] if kind is dict else list(value)
    lines.append(f"={_TAGS[kind]} {len(items)} {number}")
    for item in items:
      self._write(item, numbers, written, lines)

  def decode(self, message: bytes) -> object:
    """Returns the value of a message; mutable objects that crossed before are updated in place.

    Raises:
      Exception: of any type, for a message that `encode` does not write.
    """
    lines = iter(message.decode().split("\n"))
    value = self._read(lines)
    if next(lines, None) is not None:
      raise ValueError("the message has lines after its value")
    return value

  def _read(self, lines: object) -> object:
    line = next(lines)
    tag, rest = line[0], line[1:]
    if tag == "@":
      return self._objects[int(rest)]
    if tag != "=":
      return _READERS[tag](rest)
    name, length, number = rest.split(" ")
    if name in _FIXED:
      return _FIXED[name]([self._read(lines) for _ in range(int(length))])
    if int(number) == len(self._objects):
      self._objects.append(_MUTABLE[name]())
    value = self._objects[int(number)]
    if type(value) is not _MUTABLE[name]:
      raise ValueError("an object changed its type")
    items = [self._read(lines) for _ in range(int(length))]
    value.clear()
    if name == "dict":
      value.update(zip(items[::2], items[1::2], strict=True))
    elif name == "set":
      value.update(items)
    else:
      value.extend(items)
    return value


def framed(message: bytes) -> bytes:
  """Returns a message with its length in front, as `receive` reads it."""
  return len(message).to_bytes(4, "little") + message


def send(channel: int, message: bytes) -> None:
  """Sends a message with its length in front.

  Raises:
    ValueError: for a message of more than `MAX_MESSAGE` bytes, which the receiver would refuse.
  """
  if len(message) > MAX_MESSAGE:
    raise ValueError(f"a message of {len(message)} bytes is longer than {MAX_MESSAGE}, the limit")
  rest = memoryview(framed(message))
  while rest:
    rest = rest[os.write(channel, rest):]


def receive(channel: int) -> bytes:
  """Receives a message.

  Raises:
    EOFError: if the other process has closed the channel.
    ValueError: for a message of more than `MAX_MESSAGE` bytes.
  """
  size = int.from_bytes(_exactly(channel, 4), "little")
  if size > MAX_MESSAGE:
    raise ValueError(f"a message of {size} bytes is longer than {MAX_MESSAGE}, the limit")
  return _exactly(channel, size)


def _exactly(channel: int, size: int) -> bytes:
  parts = []
  while size:
    parts.append(os.read(channel, min(size, 1 << 16)))
    if not parts[-1]:
      raise EOFError
    size -= len(parts[-1])
  return b"".join(parts)


def run_program(channel: int) -> None:
  """Executes the program received, sends the names of its functions, then answers calls forever.

  The process ends, which fails the tests, when the program raises outside of a call, or when the
  result of a call or its arguments after the call are not plain values. It says `READY` before it
  sees the program, so that a program cannot pass for a sandbox that does not work.
  """
  module = type(sys)("program")
  sys.modules["program"] = module  # dataclasses look up their module there
  send(channel, READY)
  exec(compile(receive(channel), "program", "exec"), module.__dict__)
  send(channel, Wire().encode([name for name, x in vars(module).items() if callable(x)]))
  while True:
    wire = Wire()
    name, args, kwargs = wire.decode(receive(channel))
    try:
      answer = (True, getattr(module, name)(*args, **kwargs))
    except BaseException as error:
      answer = (False, _described(error))
    send(channel, wire.encode((*answer, args, kwargs)))


def run_script(source_and_input: int) -> None:
  """Executes a program as `__main__`, with the rest of the file after its source as its input.

  `READY` is written to stdout before the program's output, and before it sees the program.
  """
  source = receive(source_and_input)
  module = type(sys)("__main__")
  sys.modules["__main__"] = module
  sys.argv[:] = ["program"]
  os.write(1, READY)
  exec(compile(source, "program", "exec"), module.__dict__)


def _described(error: BaseException) -> tuple:
  """Returns an exception as plain data, from which `_exception` makes a similar one.

  These are its type's name, the names of the builtin exceptions from which the type derives
  without another of them in between, its arguments, its attributes and its text.
  """
  builtin = [cls for cls in type(error).__mro__ if _is_builtin(cls)]
  bases = [cls for i, cls in enumerate(builtin)
           if not any(issubclass(other, cls) for other in builtin[:i])]
  names = [name for cls in builtin for name, member in vars(cls).items()
           if type(member).__name__ in ("member_descriptor", "getset_descriptor")]
  attributes = {name: getattr(error, name, None) for name in names} | vars(error)
  args = [arg if _is_plain(arg) else str(arg) for arg in error.args]
  attributes = {name: x for name, x in attributes.items()
                if name != "args" and not name.startswith("__") and x is not None and _is_plain(x)}
  return (type(error).__name__, [cls.__name__ for cls in bases], args, attributes, str(error))


def _is_builtin(cls: type) -> bool:
  return issubclass(cls, BaseException) and getattr(builtins, cls.__name__, None) is cls


def _is_plain(value: object) -> bool:
  try:
    Wire().encode(value)
  except Exception:
    return False
  return True


class _Tests:
  """The tests and the proxies of the program's functions that they call."""

  def __init__(self, channel: int):
    self.channel = channel
    self.calls = 0

  def proxy(self, name: str):
    """Returns a function that has the other process call the program's function `name`."""
    def call(*args, **kwargs):
      self.calls += 1
      wire = Wire()
      request = wire.encode((name, args, kwargs))
      try:
        send(self.channel, request)
        done, result, _, _ = wire.decode(receive(self.channel))
        error = None if done is True else _exception(*result)
      except Exception:
        os._exit(FAILED)  # an exception could satisfy tests that expect the program to raise one
      if error:
        error._is_of_program = True
        raise error
      return result
    return call

  def run(self, program: str, tests: str) -> tuple[int, str]:
    """Executes the tests; returns an exit status, and why the tests are broken if they are."""
    try:
      code = compile(tests, "tests", "exec")
    except Exception as error:
      return BROKEN, _line(error)
    try:
      if receive(self.channel) != READY:
        return ABSENT, ""
    except (EOFError, OSError):
      return ABSENT, ""
    send(self.channel, program.encode())
    # Where a program defines `abs` or `all`, tests that use these names mean the builtins.
    names = set(Wire().decode(receive(self.channel))) & _names(code) - set(dir(builtins))
    proxies = {name: self.proxy(name) for name in names}
    scope = proxies | {"__name__": "tests"}
    try:
      exec(code, scope)
    except BaseException as error:
      return (BROKEN, _line(error)) if self._is_own(error) else (FAILED, "")
    if self.calls:
      return PASSED, ""
    own = {name for name, x in scope.items() if x is not proxies.get(name)} | set(dir(builtins))
    if _globals(code) <= own:
      return BROKEN, "they call no function of a program"
    return FAILED, ""

  def _is_own(self, error: BaseException) -> bool:
    """Whether the tests raised an error that no program could have prevented."""
    if getattr(error, "_is_of_program", False):
      return False
    # A function that the program lacks is a NameError.
    return isinstance(error, ModuleNotFoundError) or (
        not self.calls and not isinstance(error, NameError | AssertionError | SystemExit))


def _line(error: BaseException) -> str:
  return f"{type(error).__name__}: {error}".replace("\n", " ")


def _names(code: object) -> set[str]:
  """Returns the names that a code object, or one nested in it, may look up as globals."""
  inner = [const for const in code.co_consts if isinstance(const, type(code))]
  return set(code.co_names).union(*map(_names, inner))


def _globals(code: object) -> set[str]:
  """Returns `_names` without those that are only attributes; slower."""
  import dis
  inner = [const for const in code.co_consts if isinstance(const, type(code))]
  used = {step.argval for step in dis.get_instructions(code)
          if step.opname in ("LOAD_NAME", "LOAD_GLOBAL")}
  return used.union(*map(_globals, inner))


def _exception(name: str, bases: list[str], args: list, attributes: dict[str, object],
               text: str) -> BaseException:
  """Returns the exception that the program raised, which derives from the same builtin ones.

  It is of a builtin type if it was raised as one; the types of others exist only here. Those that
  control iteration are RuntimeError, as where a generator raises StopIteration (PEP 479): in a
  function that `map` calls it ends the loop, so that a program would pass that computes nothing.
  """
  found = [getattr(builtins, base) for base in bases]
  if not found or not all(isinstance(cls, type) and _is_builtin(cls) for cls in found):
    raise ValueError("an exception derives from builtin ones")
  if any(issubclass(cls, StopIteration | StopAsyncIteration | GeneratorExit) for cls in found):
    return RuntimeError(f"{name}: {text}")
  try:
    kind = found[0] if [name] == bases else type(name, tuple(found), {})
    error = _filled(kind(*args), attributes)
    if str(error) != text:  # the program's type has a __str__ of its own
      kind = type(name, (kind,), {"__str__": lambda self: text})
      error = _filled(kind(*args), attributes)
  except Exception:  # ExceptionGroup, for one, needs exceptions as arguments
    error = RuntimeError(f"{name}: {text}")
  return error


def _filled(error: BaseException, attributes: dict[str, object]) -> BaseException:
  for name, value in attributes.items():
    if not name.startswith("__"):
      setattr(error, name, value)
  return error


def run_tests(channel: int, report: int) -> None:
  """Reads (program, tests) from stdin, and exits with PASSED, FAILED, BROKEN or ABSENT.

  Args:
    channel: file descriptor of the socket to the process that executes the program.
    report: file descriptor to which to write why the tests are broken.
  """
  status, reason = FAILED, ""
  try:
    with os.fdopen(os.dup(0), "rb") as job:
      program, tests = Wire().decode(job.read())
    status, reason = _Tests(channel).run(program, tests)
  except BaseException:
    status = FAILED
  os.write(report, reason[:500].encode(errors="replace"))
  os._exit(status)


def _limit(cpu_s: int, memory_bytes: int) -> None:
  for what, most in ((resource.RLIMIT_CPU, cpu_s), (resource.RLIMIT_AS, memory_bytes),
                     (resource.RLIMIT_FSIZE, FILE_BYTES), (resource.RLIMIT_NOFILE, OPEN_FILES),
                     (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NPROC, 0)):
    resource.setrlimit(what, (most, most))


def main() -> None:
  """Runs one of the processes.

  Command-line arguments: its role, "program", "tests" or "script"; the limit on CPU time in
  seconds; the limit on memory in bytes; for "tests", the file descriptor of the report.
  """
  role, cpu_s, memory_bytes, *rest = sys.argv[1:]
  _limit(int(cpu_s), int(memory_bytes))
  if role != "tests":  # builtins that Python defines only where it loads packages
    builtins.exit = builtins.quit = sys.exit
  if role == "script":
    run_script(0)
    return
  # The channel is moved off descriptors 0 and 1, where the program's own reads and prints would mix
  # with the messages.
  channel = os.dup(0 if role == "program" else 1)
  os.dup2(2, 1)
  if role == "tests":
    run_tests(channel, int(rest[0]))
  os.dup2(2, 0)
  run_program(channel)


if __name__ == "__main__":
  main()

"""The code that runs inside the sandboxes: the program under test in one, its tests in the other.

Both are bare interpreters that are given this module's code, which therefore imports only modules
that load fast. A call and its result cross the channel as plain data, and the result is judged by a
process that has never run a line of the program.
"""

import builtins
import os
import resource
import sys

PASSED, FAILED = 87, 1  # exit statuses; no tool that starts the tests exits with 87 itself
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


def send(channel: int, message: bytes) -> None:
  """Sends a message with its length in front.

  Raises:
    ValueError: for a message of more than `MAX_MESSAGE` bytes, which the receiver would refuse.
  """
  if len(message) > MAX_MESSAGE:
    raise ValueError(f"a message of {len(message)} bytes is longer than {MAX_MESSAGE}, the limit")
  rest = memoryview(len(message).to_bytes(4, "little") + message)
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

  The process ends, which fails the tests, when the program raises, or when the result of a call or
  its arguments after the call are not plain values.
  """
  module = type(sys)("program")
  sys.modules["program"] = module  # dataclasses look up their module there
  exec(compile(receive(channel), "program", "exec"), module.__dict__)
  send(channel, Wire().encode([name for name, x in vars(module).items() if callable(x)]))
  while True:
    wire = Wire()
    name, args, kwargs = wire.decode(receive(channel))
    try:
      answer = (True, getattr(module, name)(*args, **kwargs))
    except Exception as error:
      answer = (False, (type(error).__name__, str(error)))
    send(channel, wire.encode((*answer, args, kwargs)))


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
        raise error
      return result
    return call

  def run(self, tests: str) -> bool:
    """Executes the tests; returns whether they called the program. Raises what they raise."""
    code = compile(tests, "tests", "exec")
    # Where a program defines `abs` or `all`, tests that use these names mean the builtins.
    names = set(Wire().decode(receive(self.channel))) & _names(code) - set(dir(builtins))
    exec(code, {name: self.proxy(name) for name in names} | {"__name__": "tests"})
    return self.calls > 0


def _names(code: object) -> set[str]:
  """Returns the names that a code object, or one nested in it, may look up as globals."""
  inner = [const for const in code.co_consts if isinstance(const, type(code))]
  return set(code.co_names).union(*map(_names, inner))


def _exception(kind: str, message: str) -> Exception:
  """Returns the exception that the program raised; a RuntimeError if its type is not builtin."""
  found = getattr(builtins, kind, None)
  if not (isinstance(found, type) and issubclass(found, Exception)):
    return RuntimeError(f"{kind}: {message}")
  try:
    return found(message)
  except TypeError:  # UnicodeDecodeError and some others require more arguments
    return RuntimeError(f"{kind}: {message}")


def run_tests(channel: int) -> None:
  """Reads (program, tests) from stdin, sends the program on, and exits with PASSED or FAILED."""
  try:
    with os.fdopen(os.dup(0), "rb") as job:
      program, tests = Wire().decode(job.read())
    send(channel, program.encode())
    passed = _Tests(channel).run(tests)
  except BaseException:
    passed = False
  os._exit(PASSED if passed else FAILED)


def _limit(cpu_s: int, memory_bytes: int) -> None:
  for what, most in ((resource.RLIMIT_CPU, cpu_s), (resource.RLIMIT_AS, memory_bytes),
                     (resource.RLIMIT_FSIZE, FILE_BYTES), (resource.RLIMIT_NOFILE, OPEN_FILES),
                     (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NPROC, 0)):
    resource.setrlimit(what, (most, most))


def main() -> None:
  """Runs one of the two processes.

  Command-line arguments: its role, "program" or "tests"; the limit on CPU time in seconds; the
  limit on memory in bytes.
  """
  role, cpu_s, memory_bytes = sys.argv[1:4]
  # The channel is moved off descriptors 0 and 1, where the program's own reads and prints would mix
  # with the messages.
  channel = os.dup(0 if role == "program" else 1)
  os.dup2(2, 1)
  _limit(int(cpu_s), int(memory_bytes))
  if role == "tests":
    run_tests(channel)
  os.dup2(2, 0)
  run_program(channel)


if __name__ == "__main__":
  main()

"""What runs inside the sandboxes: the program under test in one, the tests in the other.

Both start as bare interpreters that are handed this module's code, so it imports only what takes no
time. A call crosses the channel as plain data, comes back as plain data, and is judged by a process
that has never run a line of the program.
"""

import builtins
import os
import resource
import sys

PASSED, FAILED = 87, 1  # exit statuses; no tool that starts the tests has the first of its own
MAX_MESSAGE = 16 << 20  # bytes
FILE_BYTES = 1 << 20
OPEN_FILES = 32


def _escaped(text: str) -> str:
  return text.encode("unicode_escape").decode()


_ATOMS = {  # type: (tag, how to write it on one line, how to read it)
    type(None): ("n", lambda _: "", lambda _: None),
    bool: ("b", lambda x: "1" * x, bool),
    int: ("i", hex, lambda line: int(line, 16)),  # decimal would take quadratic time
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
  """Plain values as text, for one call: the same objects on both sides, changes included.

  An atom is a line, its type's tag and its value; a container is a line with its type's name and
  length, before its items. Mutable ones are numbered in order of appearance; "@" and the number
  stand for one that was named before. The answer to a call repeats its arguments, which updates
  them in place: what the function did to them is seen, and so is what it returned of them.
  """

  def __init__(self):
    self._objects: list = []

  def encode(self, value: object) -> bytes:
    """Raises TypeError for anything but exact builtins: a subclass may carry its own `__eq__`."""
    lines, named = [], set()
    self._write(value, {id(x): i for i, x in enumerate(self._objects)}, named, lines)
    return "\n".join(lines).encode()

  def _write(self, value: object, numbers: dict[int, int], named: set[int],
             lines: list[str]) -> None:
    kind = type(value)
    if kind in _ATOMS:
      tag, write, _ = _ATOMS[kind]
      lines.append(tag + write(value))
      return
    if kind not in _TAGS:
      raise TypeError(f"only plain values cross between a program and its tests, not {kind}")
    number = ""
    if _TAGS[kind] in _MUTABLE:
      if id(value) not in numbers:
        numbers[id(value)] = len(self._objects)
        self._objects.append(value)
      number = numbers[id(value)]
      if number in named:
        lines.append(f"@{number}")
        return
      named.add(number)
    items = [x for item in value.items() for x in item] if kind is dict else list(value)
    lines.append(f"={_TAGS[kind]} {len(items)} {number}")
    for item in items:
      self._write(item, numbers, named, lines)

  def decode(self, message: bytes) -> object:
    """The value written. Raises some Exception for a message that `encode` does not write."""
    lines = iter(message.decode().split("\n"))
    value = self._read(lines)
    if next(lines, None) is not None:
      raise ValueError("a message goes on after its value")
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
  """Raises ValueError for a message that is longer than the other side takes."""
  if len(message) > MAX_MESSAGE:
    raise ValueError(f"{len(message)} bytes to send, at most {MAX_MESSAGE} cross at a time")
  rest = memoryview(len(message).to_bytes(4, "little") + message)
  while rest:
    rest = rest[os.write(channel, rest):]


def receive(channel: int) -> bytes:
  """Raises EOFError where the other side is gone, ValueError for more than `MAX_MESSAGE` bytes."""
  size = int.from_bytes(_exactly(channel, 4), "little")
  if size > MAX_MESSAGE:
    raise ValueError(f"a message of {size} bytes, at most {MAX_MESSAGE} are taken")
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
  """Executes the program that arrives, names its functions, then answers calls, until cut off.

  Ends, which fails the tests, when the program does not run through, or when a call's result or
  its arguments afterwards are not plain.
  """
  module = type(sys)("program")
  sys.modules["program"] = module  # dataclasses look their module up
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
  """The tests' process: stand-ins for the program's functions, and what the tests make of them."""

  def __init__(self, channel: int):
    self.channel = channel
    self.calls = 0

  def stand_in(self, name: str):
    """A function that has the other process call the program's `name`."""
    def call(*args, **kwargs):
      self.calls += 1
      wire = Wire()
      request = wire.encode((name, args, kwargs))
      try:
        send(self.channel, request)
        done, result, _, _ = wire.decode(receive(self.channel))
        error = None if done is True else _exception(*result)
      except Exception:
        os._exit(FAILED)  # tests that expect exceptions must not mistake this for one
      if error:
        raise error
      return result
    return call

  def run(self, tests: str) -> bool:
    code = compile(tests, "tests", "exec")
    # A program may define `abs` or `all`; the tests mean the real ones.
    names = set(Wire().decode(receive(self.channel))) & _names(code) - set(dir(builtins))
    exec(code, {name: self.stand_in(name) for name in names} | {"__name__": "tests"})
    return self.calls > 0


def _names(code: object) -> set[str]:
  """Names that a code object, or one inside it, may look up as globals."""
  inner = [const for const in code.co_consts if isinstance(const, type(code))]
  return set(code.co_names).union(*map(_names, inner))


def _exception(kind: str, message: str) -> Exception:
  """What the program raised, where builtin; anything else is a RuntimeError."""
  found = getattr(builtins, kind, None)
  if not (isinstance(found, type) and issubclass(found, Exception)):
    return RuntimeError(f"{kind}: {message}")
  try:
    return found(message)
  except TypeError:  # UnicodeDecodeError and its like want more arguments
    return RuntimeError(f"{kind}: {message}")


def run_tests(channel: int) -> None:
  """Reads (program, tests) from stdin, passes the program on, and exits `PASSED` or `FAILED`."""
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
  """Arguments: "program" or "tests", seconds of CPU time, bytes of memory."""
  role, cpu_s, memory_bytes = sys.argv[1:4]
  # Not 0 and 1, where prints and reads of the program would meet the messages.
  channel = os.dup(0 if role == "program" else 1)
  os.dup2(2, 1)
  _limit(int(cpu_s), int(memory_bytes))
  if role == "tests":
    run_tests(channel)
  os.dup2(2, 0)
  run_program(channel)


if __name__ == "__main__":
  main()

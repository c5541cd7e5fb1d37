"""Where a step's time goes: a profiler's trace, reduced to kernels and to kinds of work.

A compiled program names every instruction, and says which part of the model it came from; a trace
says how long each ran. On a GPU that is one stream's kernels; on a CPU instructions overlap, so
that shares may add up to more than one.
"""

import collections
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax

# The first that matches "where it came from; instruction; kernel" names the kind.
_KINDS = tuple((kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in (
    ("attention", r"fmha|flash|sdpa|dot_product_attention"),
    ("quantise", r"quantize|quantise|swiglu_backward_mosaic"),
    ("grouped products", r"ragged_dot|ragged-dot|grouped_matmul|fp8_experts|fp8_grouped"
                         r"|grouped_weight_gradient|gmm"),
    ("optimizer", r"optimizer"),
    ("between devices", r"all-reduce|all-gather|reduce-scatter|nccl"),
    ("dense products", r"gemm|cutlass|nvjet|xmma|cublas|matmul|fp8_linear|dot_general.*;"
                       r"|\bdot[._]|ynn_fusion"),
    ("sort, gather, scatter", r"gather_rows_mosaic"),
    ("element by element", r"swiglu_gated_backward_mosaic"),
    # In a CUDA graph nothing says which of them, unless its name did above.
    ("our kernels", r"mosaic_gpu"),
    ("sort, gather, scatter", r"sort|scatter|gather|top_k|topk|cumsum|scan_kernel|argsort|radix"),
    ("copies", r"; (memcpy|memset|copy|transpose|wrapped_copy|wrapped_transpose|input_transpose)"),
    ("sums", r"reduc"),
))

_CONTAINER = re.compile(r"(while|call|conditional)\b")  # their parts are traced, too


class Kernel(NamedTuple):
  """One run of an instruction.

  Attributes:
    name: of the kernel.
    instruction: of the compiled program that asked for it, or the kernel's name.
    start, seconds: when and for how long, in seconds.
  """

  name: str
  instruction: str
  start: float
  seconds: float


class Share(NamedTuple):
  """Of the time traced: a kind of work or a kernel, its seconds, and how often it ran."""

  name: str
  seconds: float
  count: int


def kernels(folder: pathlib.Path) -> list[Kernel]:
  """All that ran on the first device, by the newest trace in a folder.

  Raises:
    ValueError: if there is none.
  """
  traces = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
  if not traces:
    raise ValueError(f"{folder} holds no trace: nothing named *.xplane.pb")
  planes = list(jax.profiler.ProfileData.from_file(str(traces[-1])).planes)
  gpus = sorted((plane for plane in planes if plane.name.startswith("/device:GPU")),
                key=lambda plane: plane.name)
  found = []
  for plane in gpus[:1] or planes:
    for line in plane.lines:
      if gpus and not line.name.startswith("Stream"):
        continue  # the same again, by module and by operation
      for event in line.events:
        instruction = dict(event.stats).get("hlo_op")
        if gpus or (instruction and not _CONTAINER.match(instruction)):
          found.append(Kernel(event.name, str(instruction or event.name), event.start_ns / 1e9,
                              event.duration_ns / 1e9))
  return found


def origins(compiled_text: str) -> dict[str, str]:
  """Which operation each instruction of a compiled program (`as_text`) came from."""
  return dict(re.findall(r'%?([\w.-]+) = .*metadata=\{[^}]*?op_name="([^"]*)"', compiled_text))


def kind(kernel: Kernel, came_from: Mapping[str, str]) -> str:
  """What kind of work a kernel does, by its names; "element by element" if they do not say."""
  text = f"{_origin(kernel, came_from)}; {kernel.instruction}; {kernel.name}"
  return next((name for name, pattern in _KINDS if pattern.search(text)), "element by element")


def by_kind(found: Iterable[Kernel], came_from: Mapping[str, str]) -> list[Share]:
  """Seconds by kind of work, the longest first, and "idle": when nothing ran between two kernels.
  """
  found = list(found)
  return [*_shares((kind(kernel, came_from), kernel.seconds) for kernel in found),
          Share("idle", _idle(found), 0)]


def by_kernel(found: Iterable[Kernel], came_from: Mapping[str, str]) -> list[Share]:
  """Seconds by kernel and by where it came from, the longest first."""
  def label(kernel):
    name = kernel.instruction if kernel.name == kernel.instruction else (
        f"{kernel.instruction} ({kernel.name[:48]})")
    return f"{name} {'/'.join(_origin(kernel, came_from).split('/')[-4:])}".strip()

  return _shares((label(kernel), kernel.seconds) for kernel in found)


def _origin(kernel: Kernel, came_from: Mapping[str, str]) -> str:
  # A kernel's own name has underscores where its instruction has dots.
  dotted = re.sub(r"_(\d+)$", r".\1", kernel.instruction)
  return came_from.get(kernel.instruction) or came_from.get(dotted, "")


def _shares(pairs: Iterable[tuple[str, float]]) -> list[Share]:
  seconds, counts = collections.Counter(), collections.Counter()
  for name, took in pairs:
    seconds[name] += took
    counts[name] += 1
  return [Share(name, took, counts[name]) for name, took in seconds.most_common()]


def _idle(found: list[Kernel]) -> float:
  idle, busy_until = 0.0, None
  for kernel in sorted(found, key=lambda kernel: kernel.start):
    if busy_until is not None:
      idle += max(0.0, kernel.start - busy_until)
    busy_until = max(busy_until or 0.0, kernel.start + kernel.seconds)
  return idle

"""Where the time of a step goes: a profiler's trace, reduced to kernels and kinds of work.

A compiled program names every instruction and the part of the model that it came from; a trace says
how long each instruction ran. On a GPU these are the kernels of one stream; on a CPU instructions
overlap, so that the fractions may add up to more than one.
"""

import collections
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax

from experiments.reports import markdown

_STEPS_TRACED = 3
_KERNELS_LISTED = 40
# The first pattern that matches "origin; instruction; kernel" gives the kind of work.
_KINDS = tuple((kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in (
    ("attention", r"fmha|flash|sdpa|dot_product_attention"),
    ("quantise", r"quantize|quantise|swiglu_backward_mosaic"),
    ("grouped products", r"ragged_dot|ragged-dot|grouped_matmul|fp8_experts|fp8_grouped"
                         r"|grouped_weight_gradient|gmm"),
    ("optimizer", r"optimizer"),
    ("collectives", r"all-reduce|all-gather|reduce-scatter|nccl"),
    ("dense products", r"gemm|cutlass|nvjet|xmma|cublas|matmul|fp8_linear|dot_general.*;"
                       r"|\bdot[._]|ynn_fusion"),
    ("sort, gather, scatter", r"gather_rows_mosaic"),
    ("elementwise", r"swiglu_gated_backward_mosaic"),
    # In a CUDA graph nothing but the name, if it matches above, tells our kernels apart.
    ("our kernels", r"mosaic_gpu"),
    ("sort, gather, scatter", r"sort|scatter|gather|top_k|topk|cumsum|scan_kernel|argsort|radix"),
    ("copies", r"; (memcpy|memset|copy|transpose|wrapped_copy|wrapped_transpose|input_transpose)"),
    ("reductions", r"reduc"),
))

_CONTAINER = re.compile(r"(while|call|conditional)\b")  # their parts are traced as well


class Kernel(NamedTuple):
  """One execution of an instruction.

  Attributes:
    name: name of the kernel.
    instruction: name of the compiled program's instruction, or the kernel's name if the trace has
      none.
    start: when the execution began, in seconds.
    seconds: how long it took.
  """

  name: str
  instruction: str
  start: float
  seconds: float


class Timing(NamedTuple):
  """Total seconds of a kind of work or of a kernel, and how often it ran."""

  name: str
  seconds: float
  count: int


def trace(run: Callable[[int], Any], compiled_text: str) -> dict[str, list[Timing]]:
  """Runs a few steps; returns the seconds of one on the first device, by kind and by kernel.

  Args:
    run: takes a number of steps, and waits until they are done.
    compiled_text: `as_text()` of the compiled step.

  Returns:
    Timings, longest first, as "kinds" and "kernels".
  """
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      run(_STEPS_TRACED)
    found = kernels(pathlib.Path(folder))
  came_from = origins(compiled_text)
  per_step = lambda timings: [Timing(timing.name, timing.seconds / _STEPS_TRACED,
                                     timing.count // _STEPS_TRACED) for timing in timings]
  return {"kinds": per_step(by_kind(found, came_from)),
          "kernels": per_step(by_kernel(found, came_from))}


def write(parts: Mapping[str, list[Timing]], name: str, out: pathlib.Path | None) -> None:
  """Prints what `trace` returned, and writes it into a folder, if there is one.

  Args:
    parts: what `trace` returned.
    name: what was traced, for the title and the file's name.
    out: the folder.
  """
  total = sum(part.seconds for part in parts["kinds"])
  text = f"# Where the time goes: {name}\n"
  for title, timings in (("kind of work", parts["kinds"]),
                         ("kernel", parts["kernels"][:_KERNELS_LISTED])):
    rows = [(timing.name, 1e3 * timing.seconds, timing.seconds / total, timing.count)
            for timing in timings]
    text += "\n" + markdown.table((title, "ms per step", "fraction", "runs"), rows) + "\n"
  print(text)
  if out:
    name = name.replace(",", "").replace(" ", "-")
    (out / f"profile-{name}.md").write_text(text, encoding="utf-8")


def kernels(folder: pathlib.Path) -> list[Kernel]:
  """Returns everything that ran on the first device, from the newest trace in a folder.

  Raises:
    ValueError: if the folder holds no trace.
  """
  traces = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
  if not traces:
    raise ValueError(f"{folder} holds no trace, which would be a file named *.xplane.pb")
  planes = list(jax.profiler.ProfileData.from_file(str(traces[-1])).planes)
  gpus = sorted((plane for plane in planes if plane.name.startswith("/device:GPU")),
                key=lambda plane: plane.name)
  found = []
  for plane in gpus[:1] or planes:
    for line in plane.lines:
      if gpus and not line.name.startswith("Stream"):
        continue  # these lines repeat the kernels by module and by operation
      for event in line.events:
        instruction = dict(event.stats).get("hlo_op")
        if gpus or (instruction and not _CONTAINER.match(instruction)):
          found.append(Kernel(event.name, str(instruction or event.name), event.start_ns / 1e9,
                              event.duration_ns / 1e9))
  return found


def origins(compiled_text: str) -> dict[str, str]:
  """Returns the operation that each instruction of a compiled program (`as_text`) came from."""
  return dict(re.findall(r'%?([\w.-]+) = .*metadata=\{[^}]*?op_name="([^"]*)"', compiled_text))


def kind(kernel: Kernel, came_from: Mapping[str, str]) -> str:
  """Returns the kind of work of a kernel, by its names; "elementwise" if no pattern matches."""
  text = f"{_origin(kernel, came_from)}; {kernel.instruction}; {kernel.name}"
  return next((name for name, pattern in _KINDS if pattern.search(text)), "elementwise")


def by_kind(found: Iterable[Kernel], came_from: Mapping[str, str]) -> list[Timing]:
  """Seconds by kind of work, longest first, then "idle": the time between kernels."""
  found = list(found)
  return [*_totals((kind(kernel, came_from), kernel.seconds) for kernel in found),
          Timing("idle", _idle(found), 0)]


def by_kernel(found: Iterable[Kernel], came_from: Mapping[str, str]) -> list[Timing]:
  """Seconds by kernel and origin, longest first."""
  def label(kernel):
    name = kernel.instruction if kernel.name == kernel.instruction else (
        f"{kernel.instruction} ({kernel.name[:48]})")
    return f"{name} {'/'.join(_origin(kernel, came_from).split('/')[-4:])}".strip()

  return _totals((label(kernel), kernel.seconds) for kernel in found)


def _origin(kernel: Kernel, came_from: Mapping[str, str]) -> str:
  # The name of a kernel has an underscore where that of its instruction has a dot.
  dotted = re.sub(r"_(\d+)$", r".\1", kernel.instruction)
  return came_from.get(kernel.instruction) or came_from.get(dotted, "")


def _totals(pairs: Iterable[tuple[str, float]]) -> list[Timing]:
  seconds, counts = collections.Counter(), collections.Counter()
  for name, took in pairs:
    seconds[name] += took
    counts[name] += 1
  return [Timing(name, took, counts[name]) for name, took in seconds.most_common()]


def _idle(found: list[Kernel]) -> float:
  idle, busy_until = 0.0, None
  for kernel in sorted(found, key=lambda kernel: kernel.start):
    if busy_until is not None:
      idle += max(0.0, kernel.start - busy_until)
    busy_until = max(busy_until or 0.0, kernel.start + kernel.seconds)
  return idle

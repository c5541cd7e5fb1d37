"""Finds and checks the files of a Hugging Face folder, and reads their tensors a slice at a time.

Slices are read from the file, which is not mapped: mapped pages would count as this process's
memory, and a 5 GB shard would add 5 GB to its peak. (The numpy reader of safetensors does not
support FP8 either.) Headers are still checked by the safetensors package.
"""

import collections
import dataclasses
import json
import math
import os
import pathlib
import reprlib
import struct
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open

DTYPES = {
    "F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
# For values as unsigned integers: the bits that are all set if, and only if, a value is not finite.
_EXPONENT = {"F32": 0x7F800000, "BF16": 0x7F80, "F16": 0x7C00, "F8_E4M3": 0x7F}


@dataclasses.dataclass(frozen=True)
class Stored:
  """A tensor in a safetensors file.

  Attributes:
    file: the file.
    dtype: the format, as safetensors calls it; DTYPES has those that can be read.
    shape: the shape.
    offset: position in the file, in bytes, of the tensor's first byte.
  """

  file: pathlib.Path
  dtype: str
  shape: tuple[int, ...]
  offset: int

  def read(self, first: int, count: int) -> np.ndarray:
    """Returns `count` elements, flat, starting with element number `first`.

    Raises:
      OSError: if the file ends before them.
    """
    dtype = DTYPES[self.dtype]
    with open(self.file, "rb") as file:
      file.seek(self.offset + first * dtype.itemsize)
      data = np.fromfile(file, dtype, count)
    if data.size != count:
      raise OSError(f"{self.file} is shorter than its header says: it changed while it was read")
    return data


def largest(dtype: str) -> float:
  """Returns the largest finite value of a format, a key of DTYPES."""
  return float(ml_dtypes.finfo(DTYPES[dtype]).max)


def all_finite(values: np.ndarray, dtype: str) -> bool:
  """Whether there is no infinity or NaN. It tests bits: the isfinite of ml_dtypes is far slower."""
  bits = values.view(np.dtype(f"u{values.dtype.itemsize}"))
  mask = bits.dtype.type(_EXPONENT[dtype])
  return not ((bits & mask) == mask).any()


def _parse_json(text: str | bytes) -> Any:
  """Does what `json.loads` does, but raises ValueError if an object has the same key twice."""
  def once(pairs):
    counts = collections.Counter(key for key, _ in pairs)
    twice = [reprlib.repr(key) for key, count in counts.items() if count > 1]
    if twice:
      raise ValueError(f"{', '.join(twice)} appears more than once")
    return dict(pairs)

  return json.loads(text, object_pairs_hook=once)


def read_json(path: pathlib.Path, problems: list[str]) -> dict | None:
  """Returns the JSON object in a file, or None and a problem if there is none."""
  if not os.path.isfile(path):
    problems.append(f"{path.name} is missing, or not a file")
    return None
  try:
    value = _parse_json(path.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError) as error:
    problems.append(f"{path.name} cannot be read as JSON: {error}")
  else:
    if isinstance(value, dict):
      return value
    problems.append(f"{path.name} should contain a JSON object, not a {type(value).__name__}")
  return None


def find_tensors(folder: pathlib.Path, problems: list[str]) -> dict[str, Stored]:
  """Returns all tensors of a folder by name, from `model.safetensors` or the shards of an index.

  Whatever is wrong with the files is appended to `problems`.
  """
  single, index_path = folder / "model.safetensors", folder / "model.safetensors.index.json"
  if os.path.lexists(single):
    tensors = _read_header(single, problems)
  elif os.path.lexists(index_path):
    tensors = _read_shards(folder, index_path, problems)
  else:
    problems.append("there is neither model.safetensors nor model.safetensors.index.json")
    return {}
  if not tensors and not problems:
    problems.append("the folder contains no tensors")
  return tensors


def _read_shards(folder: pathlib.Path, index_path: pathlib.Path, problems: list[str]):
  index = read_json(index_path, problems)
  weight_map = index.get("weight_map") if index else None
  if index is not None and not _is_weight_map(weight_map):
    problems.append(f"{index_path.name}: weight_map should map tensor names to file names")
    return {}
  tensors: dict[str, Stored] = {}
  for file in sorted(set((weight_map or {}).values())):
    if pathlib.PurePath(file).name != file:
      problems.append(f"{index_path.name}: {file!r} is not a file name")
      continue
    if not os.path.lexists(folder / file):
      problems.append(f"shard {file} is missing")
      continue
    for name, stored in _read_header(folder / file, problems).items():
      if weight_map.get(name) != file:
        problems.append(f"{file}: contains {name}, but the index says {weight_map.get(name)}")
      tensors.setdefault(name, stored)
    absent = [name for name, where in weight_map.items() if where == file and name not in tensors]
    problems.extend(f"{file}: {name} is in the index but not in the file" for name in absent)
  return tensors


def _is_weight_map(value) -> bool:
  return isinstance(value, dict) and bool(value) and all(
      isinstance(file, str) for file in value.values())


def _read_header(path: pathlib.Path, problems: list[str]) -> dict[str, Stored]:
  if not os.path.isfile(path):
    problems.append(f"{path.name} is not a file")
    return {}
  try:
    # The constructor rejects headers that are not JSON, and overlaps, gaps and wrong lengths.
    with safe_open(path, "numpy"), open(path, "rb") as file:
      length = struct.unpack("<Q", file.read(8))[0]
      header = _parse_json(file.read(length))
  except Exception as error:  # the package raises several types, which all mean a damaged file
    problems.append(
        f"{path.name} ({os.path.getsize(path)} bytes) is damaged or truncated: {error}")
    return {}
  header.pop("__metadata__", None)
  return {name: Stored(path, entry["dtype"], tuple(entry["shape"]),
                       8 + length + entry["data_offsets"][0])
          for name, entry in header.items()}


def num_elements(stored: Stored) -> int:
  """Returns the number of a tensor's elements."""
  return math.prod(stored.shape)

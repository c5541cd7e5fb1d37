"""The files of a Hugging Face folder: found, checked, and read a slice at a time.

Reading is by `pread` into a buffer that is reused, not by mapping: mapped pages would count as this
process's memory, and a 5 GB shard would add 5 GB to its peak. (The numpy reader of safetensors has
no FP8 either.) The package checks the headers all the same.
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
# As unsigned integers: the bits that are all set where a number is not finite.
_EXPONENT = {"F32": 0x7F800000, "BF16": 0x7F80, "F16": 0x7C00, "F8_E4M3": 0x7F}


@dataclasses.dataclass(frozen=True)
class Stored:
  """A tensor in a file."""

  file: pathlib.Path
  dtype: str
  shape: tuple[int, ...]
  offset: int  # of its first byte in the file

  def read(self, first: int, count: int) -> np.ndarray:
    """`count` of its elements, flat, from the `first` on."""
    dtype = DTYPES[self.dtype]
    with open(self.file, "rb") as file:
      file.seek(self.offset + first * dtype.itemsize)
      data = np.fromfile(file, dtype, count)
    if data.size != count:
      raise OSError(f"{self.file} ended early: it changed while it was read")
    return data


def largest(dtype: str) -> float:
  """The largest number of a format."""
  return float(ml_dtypes.finfo(DTYPES[dtype]).max)


def all_finite(values: np.ndarray, dtype: str) -> bool:
  """Whether there is no infinity or NaN, by the bits: ml_dtypes' isfinite is far slower."""
  bits = values.view(np.dtype(f"u{values.dtype.itemsize}"))
  mask = bits.dtype.type(_EXPONENT[dtype])
  return not ((bits & mask) == mask).any()


def _parse_json(text: str | bytes) -> Any:
  """`json.loads`, except that a key given twice is an error and not the last of them."""
  def once(pairs):
    counts = collections.Counter(key for key, _ in pairs)
    twice = [reprlib.repr(key) for key, count in counts.items() if count > 1]
    if twice:
      raise ValueError(f"{', '.join(twice)} appears more than once")
    return dict(pairs)

  return json.loads(text, object_pairs_hook=once)


def read_json(path: pathlib.Path, problems: list[str]) -> dict | None:
  """A JSON object, or None and a problem."""
  if not os.path.isfile(path):
    problems.append(f"{path.name} is missing, or no file")
    return None
  try:
    value = _parse_json(path.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError) as error:
    problems.append(f"{path.name} cannot be read as JSON: {error}")
  else:
    if isinstance(value, dict):
      return value
    problems.append(f"{path.name} should hold a JSON object, not a {type(value).__name__}")
  return None


def find_tensors(folder: pathlib.Path, problems: list[str]) -> dict[str, Stored]:
  """Every tensor in the folder by name, from one file or an index of several."""
  single, index_path = folder / "model.safetensors", folder / "model.safetensors.index.json"
  if os.path.lexists(single):
    tensors = _read_header(single, problems)
  elif os.path.lexists(index_path):
    tensors = _read_shards(folder, index_path, problems)
  else:
    problems.append("there is neither model.safetensors nor model.safetensors.index.json")
    return {}
  if not tensors and not problems:
    problems.append("the folder holds no tensors")
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
        problems.append(f"{file}: holds {name}, which the index places in {weight_map.get(name)}")
      tensors.setdefault(name, stored)
    absent = [name for name, where in weight_map.items() if where == file and name not in tensors]
    problems.extend(f"{file}: {name} is in the index but not in the file" for name in absent)
  return tensors


def _is_weight_map(value) -> bool:
  return isinstance(value, dict) and bool(value) and all(
      isinstance(file, str) for file in value.values())


def _read_header(path: pathlib.Path, problems: list[str]) -> dict[str, Stored]:
  if not os.path.isfile(path):
    problems.append(f"{path.name} is no file")
    return {}
  try:
    # Its constructor rejects headers that are no JSON, overlaps, gaps and wrong lengths.
    with safe_open(path, "numpy"), open(path, "rb") as file:
      length = struct.unpack("<Q", file.read(8))[0]
      header = _parse_json(file.read(length))
  except Exception as error:  # the package raises several types, all meaning a damaged file
    problems.append(
        f"{path.name} ({os.path.getsize(path)} bytes) is damaged or truncated: {error}")
    return {}
  header.pop("__metadata__", None)
  return {name: Stored(path, entry["dtype"], tuple(entry["shape"]),
                       8 + length + entry["data_offsets"][0])
          for name, entry in header.items()}


def num_elements(stored: Stored) -> int:
  return math.prod(stored.shape)

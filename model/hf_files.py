"""The files of a Hugging Face folder: found, checked, and read a slice at a time.

Reading is by `pread` into a buffer that is reused, not by mapping: mapped pages would count as this
process's memory, and a 5 GB shard would add 5 GB to its peak. (The numpy reader of safetensors has
no FP8 either.) The package checks the headers all the same.
"""

import dataclasses
import json
import math
import os
import pathlib
import struct

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


def all_finite(values: np.ndarray, dtype: str) -> bool:
  """Whether there is no infinity or NaN, by the bits: ml_dtypes' isfinite is far slower."""
  bits = values.view(np.dtype(f"u{values.dtype.itemsize}"))
  mask = bits.dtype.type(_EXPONENT[dtype])
  return not ((bits & mask) == mask).any()


def read_json(path: pathlib.Path, problems: list[str]) -> dict | None:
  """A JSON object, or None and a problem."""
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    problems.append(f"{path.name} is missing")
  except (OSError, ValueError, RecursionError) as error:
    problems.append(f"{path.name} cannot be read as JSON: {error}")
  else:
    if isinstance(value, dict):
      return value
    problems.append(f"{path.name} should hold a JSON object, not a {type(value).__name__}")
  return None


def find_tensors(folder: pathlib.Path, problems: list[str]) -> dict[str, Stored]:
  """Every tensor in the folder by name, from one file or an index of several."""
  single = folder / "model.safetensors"
  if single.exists():
    return _read_header(single, problems)
  index_path = folder / "model.safetensors.index.json"
  if not index_path.exists():
    problems.append("there is neither model.safetensors nor model.safetensors.index.json")
    return {}
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
    if not (folder / file).is_file():
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
  try:
    # Its constructor rejects headers that are no JSON, overlaps, gaps and wrong lengths.
    with safe_open(path, "numpy"), open(path, "rb") as file:
      length = struct.unpack("<Q", file.read(8))[0]
      header = json.loads(file.read(length))
  except Exception as error:  # the package raises several types, all meaning a damaged file
    size = os.path.getsize(path) if path.is_file() else 0
    problems.append(f"{path.name} ({size} bytes) is damaged or truncated: {error}")
    return {}
  header.pop("__metadata__", None)
  return {name: Stored(path, entry["dtype"], tuple(entry["shape"]),
                       8 + length + entry["data_offsets"][0])
          for name, entry in header.items()}


def num_elements(stored: Stored) -> int:
  return math.prod(stored.shape)

"""Rotary position embeddings in the `config.json` of Hugging Face folders.

They are a JSON object, `rope_parameters` or, in older folders, `rope_scaling`. Where a folder has
both, transformers reads `rope_scaling` only.
"""

import reprlib

from model.config import LinearScaling, Llama3Scaling, RopeConfig, YarnScaling
from model.hf.reader import Reader

_THETA = 10000.0  # where a folder does not give one


def parse_rope(reader: Reader, model_type: str) -> RopeConfig | None:
  """Returns the rotary position embeddings that a `config.json` describes.

  Args:
    reader: the JSON object.
    model_type: the architecture.

  Returns:
    None if there are problems, which are appended to those of the reader.
  """
  key = "rope_parameters" if reader.values.get("rope_scaling") in (None, {}) else "rope_scaling"
  if not isinstance(reader.values.get(key, {}), dict | None):
    reader.part({key: reader.values[key]}).get(key, dict)
    return None
  given = reader.values.get(key) or {}
  rope = reader.part(given, f"config.json: {key}")
  top = rope.part(reader.values, "config.json")  # its placeholders are this part's too
  source = top if given.get("rope_theta") is None else rope
  theta = source.get("rope_theta", float, _THETA)
  nested = [name for name, value in given.items() if isinstance(value, dict)]
  if nested:
    rope.problems.append(f"{rope.where}: has an object {nested[0]!r}; positions that differ "
                         "between types of layers are not supported")
  rope.refuse("partial_rotary_factor", unless=1.0)
  reader.refuse("partial_rotary_factor", unless=1.0)
  interleaved = model_type == "deepseek_v2" or (
      model_type == "deepseek_v3" and reader.get("rope_interleave", bool, True))
  scaling = _parse_scaling(rope, top)
  return source.build(RopeConfig, theta, "interleaved" if interleaved else "half", scaling)


def _parse_scaling(rope: Reader, top: Reader) -> YarnScaling | Llama3Scaling | LinearScaling | None:
  types = {rope.values[key] if isinstance(rope.values[key], str) else reprlib.repr(rope.values[key])
           for key in ("rope_type", "type") if rope.values.get(key) is not None}
  if len(types) > 1:
    rope.problems.append(f"{rope.where}: rope_type and type disagree: {sorted(types)}")
    return None
  rope_type = types.pop() if types else "default"
  match rope_type:
    case "default":
      if rope.values.get("factor") is not None:
        rope.problems.append(f"{rope.where}: has a factor, but rope_type is missing or 'default'")
      return None
    case "linear":
      return rope.build(LinearScaling, rope.get("factor", float), _mscale_all_dim(rope))
    case "llama3":
      return rope.build(
          Llama3Scaling, rope.get("factor", float), rope.get("low_freq_factor", float),
          rope.get("high_freq_factor", float), _original_length(rope, top), _mscale_all_dim(rope))
    case "yarn":
      return rope.build(
          YarnScaling, rope.get("factor", float), _original_length(rope, top),
          rope.get("beta_fast", float, 32.0), rope.get("beta_slow", float, 1.0),
          rope.get("mscale", float, 0.0, least=0), _mscale_all_dim(rope),
          rope.get("attention_factor", float, None), rope.get("truncate", bool, True))
  rope.problems.append(
      f"{rope.where}: rope_type={rope_type!r} is not supported; it should be default, linear, "
      "llama3 or yarn")
  return None


def _mscale_all_dim(rope: Reader) -> float:
  return rope.get("mscale_all_dim", float, 0.0, least=0)


def _original_length(rope: Reader, top: Reader) -> int:
  """Returns the original context: by default, as in transformers, that of the whole model."""
  key = "original_max_position_embeddings"
  if rope.values.get(key) is None:
    return top.get("max_position_embeddings", int)
  return rope.get(key, int)


def render_scaling(scaling: YarnScaling | Llama3Scaling | LinearScaling | None) -> dict | None:
  """Returns the `rope_scaling` of a `config.json`."""
  match scaling:
    case YarnScaling():
      rendered = {
          "type": "yarn", "rope_type": "yarn", "factor": scaling.factor,
          "original_max_position_embeddings": scaling.original_seq_len,
          "beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
      if scaling.mscale:
        rendered["mscale"] = scaling.mscale
      if scaling.attention_factor is not None:
        rendered["attention_factor"] = scaling.attention_factor
      if not scaling.truncate:
        rendered["truncate"] = False
    case Llama3Scaling():
      rendered = {
          "rope_type": "llama3", "factor": scaling.factor,
          "low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor,
          "original_max_position_embeddings": scaling.original_seq_len}
    case LinearScaling():
      rendered = {"rope_type": "linear", "factor": scaling.factor}
    case None:
      return None
  return rendered | ({"mscale_all_dim": scaling.mscale_all_dim} if scaling.mscale_all_dim else {})

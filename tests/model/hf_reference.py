"""The committed results of transformers, and the distance of our model from them."""

import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

import model
from model.hf import layout as hf_layout
from model.hf import saving

HERE = pathlib.Path(__file__).parent
if str(HERE) not in sys.path:
  sys.path.insert(0, str(HERE))
import hf_cases  # noqa: E402

LOGITS, GRADIENTS = 1e-5, 1e-4  # max |difference| / max |reference|, in float32
FIXTURES = HERE / "fixtures" / "hf.npz"


@functools.cache
def reference(path: pathlib.Path = FIXTURES) -> dict[str, np.ndarray]:
  with np.load(path) as file:
    return dict(file)


def shapes(case: str) -> dict[str, tuple[int, ...]]:
  stored = json.loads(str(reference()[f"{case}/shapes"]))
  return {name: tuple(shape) for name, shape in stored.items()}


def gradients(case: str, path: pathlib.Path = FIXTURES) -> dict[str, np.ndarray]:
  """Returns the gradients of transformers by stored name."""
  flat, by_name, first = reference(path)[f"{case}/grads"], {}, 0
  for name, shape in shapes(case).items():
    if "correction_bias" in name:
      continue
    size = int(np.prod(shape))
    by_name[name] = flat[first:first + size].reshape(shape)
    first += size
  assert first == flat.size
  return by_name


def write_folder(case: str, folder: pathlib.Path) -> pathlib.Path:
  """Writes a case as a Hugging Face folder, and returns the folder."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps(hf_cases.CASES[case]))
  save_file(hf_cases.make_weights(shapes(case)), folder / "model.safetensors")
  return folder


def run(cfg: model.ModelConfig, variables: dict) -> tuple[jax.Array, tuple, dict]:
  """Returns our logits, MTP logits, and gradients of the fixture's loss."""
  tokens_BT = jnp.asarray(hf_cases.tokens({"vocab_size": cfg.vocab_size}), jnp.int32)
  transformer = model.Transformer(cfg)

  def loss(params):
    output = transformer.apply(variables | {"params": params}, tokens_BT)
    total = _cross_entropy(output.logits_BTV[:, :-1], tokens_BT[:, 1:])
    for logits in output.mtp_logits:
      total += hf_cases.MTP_WEIGHT * _cross_entropy(logits[:, :-2], tokens_BT[:, 2:])
    return total, (output.logits_BTV, output.mtp_logits)

  (_, (logits, mtp_logits)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(
      variables["params"])
  return logits, mtp_logits, grads


def _cross_entropy(logits, targets):
  return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1).mean()


def forward_distance(case: str, cfg: model.ModelConfig, variables: dict) -> float:
  """Returns the distance of our logits from those of transformers."""
  tokens_BT = jnp.asarray(hf_cases.tokens({"vocab_size": cfg.vocab_size}), jnp.int32)
  logits = jax.jit(lambda v: model.Transformer(cfg).apply(v, tokens_BT).logits_BTV)(variables)
  return relative(logits, reference()[f"{case}/logits"])


def distance(case: str, cfg: model.ModelConfig, variables: dict) -> tuple[float, dict[str, float]]:
  """Returns the distances from transformers of our logits and of every stored tensor's gradient."""
  want = reference()
  logits, mtp_logits, grads = run(cfg, variables)
  logits_distance = relative(logits, want[f"{case}/logits"])
  if mtp_logits:
    logits_distance = max(
        logits_distance, relative(mtp_logits[0][:, :-1], want[f"{case}/mtp_logits"]))
  layout = {tensor.name: tensor for tensor in hf_layout.layout(cfg).tensors}
  by_name = {name: relative(saving._gather(layout[name], {"params": grads}), theirs)
             for name, theirs in gradients(case).items()}
  return logits_distance, by_name


def relative(ours, reference_values) -> float:
  ours = np.asarray(ours, np.float64)
  largest = np.abs(reference_values).max()
  # The gradient of an expert that no token chose is exactly zero in both.
  return float(np.abs(ours - reference_values).max() / (largest or np.finfo(np.float32).tiny))

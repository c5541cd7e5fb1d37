"""Writes tests/model/fixtures/hf.npz: the results of transformers for tests/model/hf_cases.py.

Run by an interpreter that has torch and transformers (jax is not needed):

    python tests/model/make_hf_fixtures.py [--out FILE]

For every case it holds the names and shapes of the tensors that transformers writes, the loss, the
logits, and the gradients of the mean next-token loss (plus 0.3 times the MTP loss) by every stored
tensor except the router bias, in the order of the names, flattened and concatenated, in float32.
"""

import argparse
import json
import pathlib
import sys
import tempfile

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))
import hf_cases  # noqa: E402


def stored_shapes(model, config, folder) -> dict[str, tuple[int, ...]]:
  """Returns names and shapes as transformers writes them; those of MTP are as in V3's release."""
  model.save_pretrained(folder)
  with safe_open(f"{folder}/model.safetensors", "pt") as file:
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
  if config.get("num_nextn_predict_layers"):
    last, d = config["num_hidden_layers"], config["hidden_size"]
    block = {name.replace(f".{last - 1}.", f".{last}.", 1): shape
             for name, shape in shapes.items() if name.startswith(f"model.layers.{last - 1}.")}
    own = {"enorm.weight": (d,), "hnorm.weight": (d,), "shared_head.norm.weight": (d,),
           "eh_proj.weight": (d, 2 * d)}
    shapes |= block | {f"model.layers.{last}.{name}": shape for name, shape in own.items()}
  return shapes


def build(config, weights, folder):
  """Returns the model that from_pretrained loads with these weights, and its MTP module or None."""
  (folder / "config.json").write_text(json.dumps(config))
  tensors = {name: torch.from_numpy(value) for name, value in weights.items()}
  save_file(tensors, folder / "model.safetensors", {"format": "pt"})
  model = transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager")
  if not config.get("num_nextn_predict_layers"):
    return model, None
  mtp = transformers.modeling_layers.MtpModel(model, 1).to(torch.float32)
  prefix = f"model.layers.{config['num_hidden_layers']}."
  state = {}
  for name, value in tensors.items():
    if name.startswith(prefix):
      rest = name[len(prefix):].replace("shared_head.norm", "post_norm")
      own = rest.split(".")[0] in ("enorm", "hnorm", "eh_proj", "post_norm")
      state[f"layers.0.{'' if own else 'mtp_block.'}{rest}"] = value
  state = merge_experts(state)
  missing, unexpected = mtp.load_state_dict(state, strict=False)
  shared = ("embed_tokens.weight", "shared_head.weight")
  assert not unexpected and all(name in shared for name in missing), (missing, unexpected)
  return model, mtp


def merge_experts(state):
  """Stacks experts, which the folder stores one by one, into the two tensors of transformers."""
  stem = "layers.0.mtp_block.mlp.experts."
  count = 1 + max(int(name[len(stem):].split(".")[0]) for name in state if name.startswith(stem))
  take = lambda e, which: state.pop(f"{stem}{e}.{which}.weight")
  gate_up = [torch.cat([take(e, "gate_proj"), take(e, "up_proj")]) for e in range(count)]
  state[f"{stem}gate_up_proj"] = torch.stack(gate_up)
  state[f"{stem}down_proj"] = torch.stack([take(e, "down_proj") for e in range(count)])
  return state


def split_experts(named):
  """Inverts `merge_experts`, for gradients by name."""
  out = {}
  for name, value in named:
    if name.endswith(".experts.gate_up_proj"):
      for e, one in enumerate(value):
        gate, up = one.chunk(2)
        stem = name.removesuffix("gate_up_proj") + f"{e}."
        out[f"{stem}gate_proj.weight"], out[f"{stem}up_proj.weight"] = gate, up
    elif name.endswith(".experts.down_proj"):
      for e, one in enumerate(value):
        out[f"{name.removesuffix('down_proj')}{e}.down_proj.weight"] = one
    else:
      out[name] = value
  return out


def run(config, model, mtp):
  """Returns the loss, the logits, the MTP logits or None, and the gradients by stored name."""
  ids = torch.from_numpy(hf_cases.tokens(config))
  outputs = model(input_ids=ids, output_hidden_states=True)
  logits, mtp_logits = outputs.logits, None
  vocab = config["vocab_size"]
  loss = torch.nn.functional.cross_entropy(
      logits[:, :-1].reshape(-1, vocab), ids[:, 1:].reshape(-1))
  if mtp is not None:
    hidden = model.model(input_ids=ids).last_hidden_state
    positions = torch.arange(ids.shape[1] - 1)[None]
    mtp_hidden = mtp.forward_layer(0, hidden[:, :-1], positions, None, input_ids=ids[:, 1:])
    mtp_logits = model.lm_head(mtp_hidden)
    loss = loss + hf_cases.MTP_WEIGHT * torch.nn.functional.cross_entropy(
        mtp_logits[:, :-1].reshape(-1, vocab), ids[:, 2:].reshape(-1))
  loss.backward()
  named = [(name, p.grad) for name, p in model.named_parameters()]
  if mtp is not None:
    prefix = f"model.layers.{config['num_hidden_layers']}."
    for name, p in mtp.named_parameters():
      if name.startswith("layers.0."):
        rest = name.removeprefix("layers.0.").removeprefix("mtp_block.")
        named.append((prefix + rest.replace("post_norm", "shared_head.norm"), p.grad))
  return loss, logits, mtp_logits, split_experts(named)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--out", default=HERE / "fixtures" / "hf.npz")
  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  out, arrays = parser.parse_args().out, {}
  for name, config in hf_cases.CASES.items():
    with tempfile.TemporaryDirectory() as scratch:
      scratch = pathlib.Path(scratch)
      blank = transformers.AutoConfig.for_model(**config)
      shapes = stored_shapes(transformers.AutoModelForCausalLM.from_config(blank), config,
                             scratch / "blank")
      (scratch / "full").mkdir()
      model, mtp = build(config, hf_cases.make_weights(shapes), scratch / "full")
      loss, logits, mtp_logits, grads = run(config, model, mtp)
    assert logits.abs().max() > 3, (name, logits.abs().max())
    arrays[f"{name}/shapes"] = np.array(json.dumps(shapes))
    arrays[f"{name}/loss"] = loss.detach().numpy()
    arrays[f"{name}/logits"] = logits.detach().numpy()
    if mtp_logits is not None:
      arrays[f"{name}/mtp_logits"] = mtp_logits.detach().numpy()
    grads = {tensor: grads[tensor].numpy() for tensor in shapes if "correction_bias" not in tensor}
    arrays[f"{name}/grads"] = np.concatenate([grad.ravel() for grad in grads.values()])
    print(f"{name}: loss {loss.item():.4f}, |logits| up to {logits.abs().max().item():.1f}, "
          f"{len(grads)} gradients")
  arrays["versions"] = np.array(f"torch {torch.__version__}, "
                                f"transformers {transformers.__version__}")
  np.savez_compressed(out, **arrays)


if __name__ == "__main__":
  main()

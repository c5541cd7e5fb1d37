"""Writes what transformers computes for saved folders; the other half of test_hf_torch.py.

Run by an interpreter that has torch and transformers (jax is not needed):

    python tests/model/torch_logits.py FOLDER...

In every folder: tokens.npy is read, logits.npy is written. One process for all of them, because
importing takes longer than everything else.
"""

import pathlib
import sys

import numpy as np
import torch
import transformers


@torch.no_grad()
def main(folders: list[str]) -> None:
  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  for folder in map(pathlib.Path, folders):
    # Attention is whatever its default is, as for anyone who loads the folder. Experts' default
    # wants rows of a multiple of 16 bytes, which these cases' odd widths are not.
    network, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager", output_loading_info=True)
    # It has no place for MTP modules, which follow the last layer.
    after = f"model.layers.{network.config.num_hidden_layers}."
    info["unexpected_keys"] = {
        name for name in info["unexpected_keys"] if not name.startswith(after)}
    wrong = {kind: names for kind, names in info.items() if names}
    assert not wrong, (folder, wrong)
    tokens = torch.from_numpy(np.load(folder / "tokens.npy"))
    np.save(folder / "logits.npy", network(input_ids=tokens).logits.numpy())


if __name__ == "__main__":
  main(sys.argv[1:])

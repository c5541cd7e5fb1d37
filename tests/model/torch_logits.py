"""Writes the logits that transformers computes for saved folders; run by test_hf_torch.py.

Run by an interpreter that has torch and transformers (jax is not needed):

    python tests/model/torch_logits.py FOLDER...

Reads tokens.npy and writes logits.npy in every folder. One process handles all folders, because
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
    # Attention uses the default implementation, as it does for any user who loads the folder. The
    # default for experts needs rows of a multiple of 16 bytes, which these odd widths do not give.
    network, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager", output_loading_info=True)
    # transformers' model has no MTP modules; a folder stores theirs after those of the last layer.
    mtp_prefix = f"model.layers.{network.config.num_hidden_layers}."
    info["unexpected_keys"] = {
        name for name in info["unexpected_keys"] if not name.startswith(mtp_prefix)}
    wrong = {kind: names for kind, names in info.items() if names}
    assert not wrong, (folder, wrong)
    tokens = torch.from_numpy(np.load(folder / "tokens.npy"))
    np.save(folder / "logits.npy", network(input_ids=tokens).logits.numpy())


if __name__ == "__main__":
  main(sys.argv[1:])

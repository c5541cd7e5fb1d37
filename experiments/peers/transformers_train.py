"""Trains transformers' DeepSeek-V3 a few steps at a time, to be timed against this project's.

Stands alone: run it by an interpreter that has torch and transformers >= 5; jax is not needed.

    python transformers_train.py CONFIG [--experts=...] [--adamw=...] [--dtype=...] [--compile]

CONFIG is JSON: {"shape": {fields of transformers' DeepseekV3Config}, "batch": sequences a step,
"seq": tokens that each predicts, "steps": warm-up steps}. It is spoken to by lines, so that a
caller can alternate it with others; all answers are JSON:

    {"ready": true, "params": 10000000, "variant": {...}}    after the warm-up
    go 5  ->  {"seconds": 1.23, "loss": 8.31, "peak_rss_mb": 900.0}
    quit

Tokens are random and new for every step, so the loss stays near the logarithm of the vocabulary's
size. Its training is next-token cross entropy alone: transformers trains neither MTP modules nor
the routing bias. Fastest in float32, measured on two cores, is grouped_mm, fused and --compile.
"""

import argparse
import contextlib
import json
import pathlib
import sys
import time

KEYS = {"shape", "batch", "seq", "steps"}


def parse(argv: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("config", type=_config, help="JSON; see the head of this file")
  parser.add_argument("--experts", choices=("eager", "grouped_mm"),
                      default="grouped_mm", help="transformers' experts_implementation")
  parser.add_argument("--adamw", choices=("fused", "foreach", "plain"), default="fused")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                      help="bfloat16 is autocast: parameters and moments stay float32")
  parser.add_argument("--threads", type=int, help="of torch; its own choice without")
  parser.add_argument("--compile", action="store_true", help="torch.compile model and loss")
  return parser.parse_args(argv)


def _config(text: str) -> dict:
  try:
    config = json.loads(text)
  except json.JSONDecodeError as error:
    raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
  if not isinstance(config, dict) or set(config) != KEYS:
    raise argparse.ArgumentTypeError(f"must be a JSON object with the keys {sorted(KEYS)}")
  return config


class Trainer:
  """The model, its optimizer and a stream of random tokens."""

  def __init__(self, flags: argparse.Namespace):
    if flags.threads:
      torch.set_num_threads(flags.threads)
    torch.manual_seed(0)
    self.flags = flags
    self.model = _model(flags)
    self.optimizer = torch.optim.AdamW(
        self.model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1,
        fused=flags.adamw == "fused", foreach=flags.adamw == "foreach")
    self.loss = torch.compile(self._loss) if flags.compile else self._loss

  def _loss(self, tokens_BT):
    logits_BTV = self.model(input_ids=tokens_BT[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits_BTV.flatten(0, 1).float(), tokens_BT[:, 1:].flatten())

  def step(self):
    """One step on new tokens; its loss before the update, as a tensor."""
    config = self.flags.config
    tokens_BT = torch.randint(config["shape"]["vocab_size"], (config["batch"], config["seq"] + 1))
    with self._autocast():
      loss = self.loss(tokens_BT)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
    self.optimizer.step()
    self.optimizer.zero_grad(set_to_none=True)
    return loss.detach()

  def _autocast(self):
    if self.flags.dtype == "float32":
      return contextlib.nullcontext()
    return torch.autocast("cpu", dtype=torch.bfloat16)

  def params(self) -> int:
    return sum(parameter.numel() for parameter in self.model.parameters())


def _model(flags: argparse.Namespace):
  shape = flags.config["shape"]
  known = transformers.DeepseekV3Config()
  if unknown := [name for name in shape if not hasattr(known, name)]:
    raise ValueError(f"shape: transformers' DeepseekV3Config has no {', '.join(unknown)}")
  config = transformers.DeepseekV3Config(**shape, experts_implementation=flags.experts)
  return transformers.DeepseekV3ForCausalLM(config).train()


def _say(**answer) -> None:
  print(json.dumps(answer), flush=True)


def _go(trainer: Trainer, steps: int) -> None:
  started = time.perf_counter()
  for _ in range(steps):
    loss = trainer.step()
  seconds = time.perf_counter() - started
  _say(seconds=seconds, loss=float(loss),
       peak_rss_mb=_peak_rss_mb())


def _peak_rss_mb() -> float:
  """Of this program: getrusage would count the process that started it, too."""
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def main(flags: argparse.Namespace) -> None:
  trainer = Trainer(flags)
  for _ in range(flags.config["steps"]):
    trainer.step()
  variant = {name: value for name, value in vars(flags).items() if name != "config"}
  variant |= {"threads": torch.get_num_threads(), "torch": torch.__version__,
              "transformers": transformers.__version__}
  _say(ready=True, params=trainer.params(), variant=variant)
  for line in sys.stdin:
    match line.split():
      case ["go", steps] if steps.isdigit() and int(steps):
        _go(trainer, int(steps))
      case ["quit"]:
        return
      case _:
        sys.exit(f"error: expected 'go N' with N steps, or 'quit', not {line.strip()!r}")


if __name__ == "__main__":
  parsed = parse(sys.argv[1:])
  try:
    import torch
    import transformers
  except ImportError as missing:
    sys.exit(f"error: {sys.executable} lacks {missing.name}: run this by an interpreter that has "
             "torch and transformers")
  try:
    main(parsed)
  except ValueError as error:
    sys.exit(f"error: {error}")

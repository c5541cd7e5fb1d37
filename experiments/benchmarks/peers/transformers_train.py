"""Trains transformers' DeepSeek-V3 a few steps at a time, to be timed against this project.

This file imports nothing of the project: run it with an interpreter that has torch and
transformers >= 5; jax is not needed.

    python transformers_train.py CONFIG [--device=...] [--dtype=...] [--experts=...]
        [--attention=...] [--adamw=...] [--compile]

CONFIG is JSON: {"shape": {fields of transformers' DeepseekV3Config}, "batch": sequences per step,
"seq": tokens that each sequence predicts, "steps": warm-up steps}. Commands are lines on stdin, so
that the caller can alternate this program with others; answers are lines of JSON:

    {"ready": true, "params": 10000000, "variant": {...}}    after the warm-up
    train 5             ->  {"seconds": 1.23, "loss": 8.31, "peak_mb": 900.0}
    forward_backward 5  ->  the same, without the optimizer
    quit

On a GPU, the peak is that of the device's memory since the last change of command; on a CPU, that
of the process since its start. The first `train` allocates the optimizer's memory.

Tokens are random and new in every step, so the loss stays near the logarithm of the vocabulary's
size. The loss is next-token cross entropy alone: transformers trains neither MTP modules nor the
routing bias. The fastest options in float32, measured on two CPU cores, are grouped_mm, fused and
--compile. In bfloat16, the fastest are bfloat16 weights with float32 master weights: autocast would
leave grouped_mm in float32.
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
  parser.add_argument("config", type=_config, help="JSON; see the docstring of this file")
  parser.add_argument("--experts", choices=("eager", "grouped_mm"),
                      default="grouped_mm", help="transformers' experts_implementation")
  parser.add_argument("--attention", choices=("sdpa", "cudnn", "eager"), default="sdpa",
                      help="cudnn is sdpa with cuDNN preferred")
  parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
  parser.add_argument("--adamw", choices=("fused", "foreach", "plain"), default="fused")
  parser.add_argument("--dtype", choices=("float32", "autocast", "bfloat16"), default="float32",
                      help="format of weights and products; autocast multiplies float32 weights "
                      "in bfloat16; master weights and moments are always float32")
  parser.add_argument("--threads", type=int, help="torch's threads; torch chooses by default")
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
    self.weights = list(self.model.parameters())
    self.masters, self.optimizer = None, None
    self.loss = torch.compile(self._loss) if flags.compile else self._loss

  def _loss(self, tokens_BT):
    logits_BTV = self.model(input_ids=tokens_BT[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits_BTV.flatten(0, 1).float(), tokens_BT[:, 1:].flatten())

  def forward_backward(self):
    """Computes gradients on new tokens, in the weights' `grad`; returns the loss as a tensor."""
    for weight in self.weights:
      weight.grad = None
    config = self.flags.config
    tokens_BT = torch.randint(config["shape"]["vocab_size"], (config["batch"], config["seq"] + 1),
                              device=self.flags.device)
    with self._autocast(), self._attention():
      loss = self.loss(tokens_BT)
    loss.backward()
    return loss.detach()

  def train(self):
    """Takes a step on new tokens; returns the loss before the update, as a tensor."""
    if self.optimizer is None:
      self._make_optimizer()
    loss = self.forward_backward()
    if self.masters is not self.weights:
      for master, weight in zip(self.masters, self.weights, strict=True):
        master.grad, weight.grad = weight.grad.float(), None
    torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
    self.optimizer.step()
    self.optimizer.zero_grad(set_to_none=True)
    if self.masters is not self.weights:
      with torch.no_grad():
        torch._foreach_copy_(self.weights, self.masters)
    return loss

  def _make_optimizer(self):
    self.masters = self.weights
    if self.flags.dtype == "bfloat16":
      self.masters = [weight.detach().float() for weight in self.weights]
    self.optimizer = torch.optim.AdamW(
        self.masters, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1,
        fused=self.flags.adamw == "fused", foreach=self.flags.adamw == "foreach")

  def _autocast(self):
    if self.flags.dtype != "autocast":
      return contextlib.nullcontext()
    return torch.autocast(self.flags.device, dtype=torch.bfloat16)

  def _attention(self):
    if self.flags.attention != "cudnn":
      return contextlib.nullcontext()
    backends = torch.nn.attention.SDPBackend
    return torch.nn.attention.sdpa_kernel(
        [backends.CUDNN_ATTENTION, backends.EFFICIENT_ATTENTION, backends.MATH],
        set_priority=True)

  def params(self) -> int:
    return sum(weight.numel() for weight in self.weights)


def _model(flags: argparse.Namespace):
  shape = flags.config["shape"]
  known = transformers.DeepseekV3Config()
  if unknown := [name for name in shape if not hasattr(known, name)]:
    raise ValueError(f"shape: transformers' DeepseekV3Config has no {', '.join(unknown)}")
  attention = "sdpa" if flags.attention == "cudnn" else flags.attention
  config = transformers.DeepseekV3Config(
      **shape, experts_implementation=flags.experts, attn_implementation=attention)
  with torch.device(flags.device):
    network = transformers.DeepseekV3ForCausalLM(config).train()
  return network.to(torch.bfloat16) if flags.dtype == "bfloat16" else network


def _say(**answer) -> None:
  print(json.dumps(answer), flush=True)


def _go(trainer: Trainer, phase: str, steps: int) -> None:
  step = getattr(trainer, phase)
  _wait(trainer)
  started = time.perf_counter()
  for _ in range(steps):
    loss = step()
  _wait(trainer)
  seconds = time.perf_counter() - started
  _say(seconds=seconds, loss=float(loss), peak_mb=_peak_mb(trainer))


def _wait(trainer: Trainer) -> None:
  if trainer.flags.device == "cuda":
    torch.cuda.synchronize()


def _peak_mb(trainer: Trainer) -> float:
  if trainer.flags.device == "cuda":
    return torch.cuda.max_memory_allocated() / 2**20
  return _peak_rss_mb()


def _peak_rss_mb() -> float:
  """Peak of this process alone: getrusage would include the process that started it."""
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def main(flags: argparse.Namespace) -> None:
  trainer = Trainer(flags)
  for _ in range(flags.config["steps"]):
    trainer.forward_backward()
  variant = {name: value for name, value in vars(flags).items() if name != "config"}
  variant |= {"threads": torch.get_num_threads(), "torch": torch.__version__,
              "transformers": transformers.__version__}
  _say(ready=True, params=trainer.params(), variant=variant)
  phase = None
  for line in sys.stdin:
    match line.split():
      case ["train" | "forward_backward" as requested, steps] if steps.isdigit() and int(steps):
        if requested != phase and flags.device == "cuda":
          torch.cuda.reset_peak_memory_stats()
        phase = requested
        _go(trainer, phase, int(steps))
      case ["quit"]:
        return
      case _:
        sys.exit("error: expected 'train N' or 'forward_backward N' with N steps, or 'quit', not "
                 f"{line.strip()!r}")


if __name__ == "__main__":
  parsed = parse(sys.argv[1:])
  try:
    import torch
    import transformers
  except ImportError as missing:
    sys.exit(f"error: {sys.executable} lacks {missing.name}: run this with an interpreter that has "
             "torch and transformers")
  try:
    main(parsed)
  except ValueError as error:
    sys.exit(f"error: {error}")

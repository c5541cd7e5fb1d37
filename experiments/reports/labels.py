"""Labels of metrics in reports; result files use the shorter names."""

LABELS = {
    "validation_loss": "validation loss (nats per token)",
    "log_validation_loss": "log validation loss",
    "log_training_loss": "log training loss",
    "bits_per_byte": "validation (bits per byte)",
    "max_violation": "MaxVio (max ÷ mean − 1)",
    "specialisation": "specialisation (nats)",
    "lenient_pass@1": "pass@1, lenient match",
    "lenient_cons": "maj@k, lenient match",
    "cons@k": "maj@k",
    "format": "format accuracy",
    "length": "length (tokens)",
    "length_slope": "growth of length (tokens per step)",
    "length_pays": "length of correct − incorrect completions (tokens)",
    "clipped": "truncated",
    "clip_ratio": "fraction of ratios clipped",
    "max_clip_ratio": "fraction of ratios clipped, largest",
    "kl": "KL to the reference (nats per token)",
    "gap": "sampler − trainer log-probability (nats)",
    "routing_agreement": "fraction of experts unchanged",
    "reflection": "fraction of completions that take a step back",
    "entropy": "entropy (nats per token)",
    "seconds_per_step": "seconds per step",
}


def metric_label(name: str) -> str:
  """A metric's label, such as "gain in pass@1, harder problems" for "harder_pass@1_gain"."""
  if name in LABELS:
    return LABELS[name]
  if name.startswith("base_"):
    return f"{metric_label(name.removeprefix('base_'))}, base"
  if name.endswith("_gain"):
    return f"gain in {metric_label(name.removesuffix('_gain'))}"
  if name.startswith("harder_"):
    return f"{metric_label(name.removeprefix('harder_'))}, harder problems"
  return name

"""Train a model on text, or resume it; evaluate it and write a report.

Supervised fine-tuning is the same program with `init` and sources that have a `prompt_field`. The
comments in SCALES say how long each scale takes on two CPU cores or one H200.
"""

import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Collection

import numpy as np

import model
from experiments import settings
from experiments.options import Options
from experiments.programs import baselines
from experiments.programs.generate import write_continuation
from experiments.reports import provenance
from experiments.reports.results import SUMMARY
from experiments.reports.run_report import write_run_report
from experiments.reports.summary import bench_summary, claim
from rl.loading import load_model
from train import cost
from train.chat import require_chat
from train.config import DataConfig, OptimizerConfig, RunConfig, TrainConfig
from train.config_io import to_dict
from train.data import Data, load
from train.export import check_target, export, run_identity
from train.loading import (
  TOKENIZER,
  LoadedModel,
  hf_files,
  keep_hf_files,
  load_seeds,
  parse_config,
  prompt_format,
  stored_template,
)
from train.loop import Result, TrainingError
from train.loop import train as run_training
from train.optimizer import schedule_changes
from train.program import split_runs
from train.run_folder import (
  MetricsFile,
  RunFolder,
  json_data,
  read_run_json,
  write_json_atomic,
)
from train.stages import (
  check_fits,
  claim_folder,
  fit_vocabulary,
  start_from,
  upgrade_run,
  with_seeds,
)
from train.templates import CHAT
from train.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class PretrainConfig(RunConfig):
  """A training run, and what is done with the trained model.

  Attributes:
    export: folder to which the model is written in Hugging Face's format; None for no export. With
      several seeds, it gets a folder for each, such as `seed0`.
    overwrite_export: whether that folder may hold other files than an export of this run.
    extend: whether a run in the folder, finished or not, is extended to the given number of steps.
      Besides that number, only the schedule of the learning rate may differ from before.
    accept_changed_data: whether a run may resume although the contents of its sources have changed
      since it began.
    prompt: beginning of the sample of text that is printed after training.
    sample_tokens: number of tokens sampled after the prompt; 0 for no sample.
    baselines: whether bits per byte are compared with gzip -9 and an n-gram model on the same
      bytes.
  """

  export: str | None = None
  overwrite_export: bool = False
  extend: bool = False
  accept_changed_data: bool = False
  prompt: str = "In the beginning"
  sample_tokens: int = 80
  baselines: bool = True


def _smoke() -> PretrainConfig:
  """Returns the config of `smoke`: 40 steps of two layers and an MTP module, under a minute."""
  nano = model.get_config("nano")
  small = dataclasses.replace(
      nano, d_model=64, num_layers=2, ffn_dim=128, moe=dataclasses.replace(
          nano.moe, num_experts=8, experts_per_token=2, num_groups=2, groups_per_token=1))
  return PretrainConfig(
      model=small, data=DataConfig(tokenizer="bytes", seq_len=128, heldout_bytes=30_000),
      train=TrainConfig(steps=40, batch_size=8, checkpoint_every=20), baselines=False)


SCALES = {
    "smoke": _smoke(),
    # Trains `nano` in four minutes on two cores, of which evaluating twice on 1 MB takes one.
    "cpu": PretrainConfig(
        model=model.get_config("nano"), data=DataConfig(heldout_bytes=460_000),
        optimizer=OptimizerConfig(learning_rate=5e-3),
        train=TrainConfig(steps=370, batch_size=8, unroll=3)),
    # Trains `small` in bfloat16 in about ten minutes on one H200.
    "gpu": PretrainConfig(
        model=dataclasses.replace(model.get_config("small"), numerics=model.NUMERICS["bf16"]),
        data=DataConfig(bpe_vocab_size=16384, seq_len=1024),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        train=TrainConfig(steps=2000, batch_size=64, micro_batch_size=16, eval_every=500)),
}


def main(options: Options) -> None:
  options.require_supported("a", "b", "arms")
  scale = options.scale_of(SCALES)
  cfg = settings.apply(SCALES[scale], options.settings, named={"model": model.get_config})
  overridden = settings.assigned(options.settings)
  check_fits(cfg, options.num_seeds())
  if cfg.data.template == CHAT:
    require_chat(prompt_format(cfg.init) if cfg.init else None)
  start = load_model(cfg.init) if cfg.init else None
  if start:
    cfg = _with_start(cfg, start, overridden)
  with contextlib.closing(RunFolder(options.folder(f"pretrain-{scale}"))) as out:
    _run(cfg, start, out, options, keep_vocabulary="model.vocab_size" in overridden)


def _run(cfg: PretrainConfig, start: LoadedModel | None, out: RunFolder, options: Options, *,
         keep_vocabulary: bool) -> None:
  data = load(cfg.data, start and start.prompt_format())
  cfg = fit_vocabulary(cfg, data, keep=keep_vocabulary or start is not None)
  check_fits(cfg, options.num_seeds())
  if start:
    _check_tokenizer(cfg, start, data)
  cfg = _keep_bias_rate(cfg, out.path)
  run_cfg = cfg.without_extras()
  seeds = [cfg.train.seed + i for i in range(options.num_seeds())]
  shorter = _extend(run_cfg, seeds, out) if cfg.extend else run_cfg
  finished = _finished(out.path, cfg.train.steps)
  if finished:
    _warn_of_missing(out.path)
  claim_folder(out, {"config": to_dict(run_cfg), "seeds": seeds}, data,
               accept_changed_data=cfg.accept_changed_data)
  _check_export(cfg, seeds, shorter)
  data.tokenizer.save(out.path / TOKENIZER)
  keep_hf_files(start, out.path)
  if finished:
    report = out.path / "report.md"
    if not report.exists():
      report = write_run_report(out.path, finished, MetricsFile(out.path / "metrics.jsonl").read())
    print(f"{out.path} is finished, nothing is left to train; the report is {report}")
    if cfg.export:
      _export(cfg, out.path, dict(load_seeds(out.path)), data)
    return
  _announce(cfg, data, out.path)
  try:
    result = run_training(
        with_seeds(run_cfg, seeds), data, out, variables=start and start.variables,
        max_seconds=options.max_minutes and 60 * options.max_minutes, profile=options.profile,
        on_evaluation=_print_evaluation)
  except TrainingError:
    write_json_atomic(out.path / "results.json", _results(
        cfg, data, {"status": "failed", "cost": cost.total(out.path)}))
    raise
  if result.status == "stopped":
    print(f"stopped after step {result.steps}, which is saved; rerun the same command to resume")
    return
  _finish(cfg, options.scale_of(SCALES), data, out.path, result)


def _finished(path: pathlib.Path, steps: int) -> dict | None:
  """Returns the content of results.json if the run in a folder has finished with these steps."""
  if not (path / "results.json").exists():
    return None
  results = read_run_json(path / "results.json", status=str, config=dict)
  try:
    done = results["config"]["train"]["steps"]
  except (KeyError, TypeError) as error:
    raise ValueError(f"{path / 'results.json'} is damaged: it has no config.train.steps. Delete "
                     "it, and the same command finishes the run again") from error
  return results if results["status"] == "finished" and done == steps else None


def _warn_of_missing(path: pathlib.Path) -> None:
  """Says which parts of a finished run are gone, so that it cannot be used as before."""
  if not any(path.glob("checkpoints/step_*")):
    print(f"warning: {path} has no checkpoints any more: its model cannot be evaluated, exported "
          "or extended", file=sys.stderr)
  if not (path / "config.json").exists():
    print(f"warning: {path / 'config.json'} is missing: whether the run had the configuration of "
          "this command is not checked, and the file is written again from it", file=sys.stderr)


# Fields of the optimizer that may change when a run is extended.
_EXTENDED = ("schedule", "decay_steps", "final_ratio")


def _extend(cfg: RunConfig, seeds: list[int], out: RunFolder) -> RunConfig:
  """Changes the configuration of the run in a folder to a longer one, and says what that changes.

  Returns:
    The configuration before.

  Raises:
    ValueError: if there is no run, or if anything else differs.
  """
  path = out.path / "config.json"
  if not path.exists():
    raise ValueError(f"extend=true: {out.path} holds no run to extend")
  stored = upgrade_run(read_run_json(path, config=dict, seeds=list))
  before = parse_config(path, RunConfig, stored["config"])
  done = before.train.steps
  if cfg.train.steps < done:
    raise ValueError(f"extend=true: train.steps={cfg.train.steps} is below the {done} steps of the "
                     f"run in {out.path}")
  unchanged = {name: getattr(before.optimizer, name) for name in _EXTENDED}
  same = dataclasses.replace(
      cfg, train=dataclasses.replace(cfg.train, steps=done),
      optimizer=dataclasses.replace(cfg.optimizer, **unchanged))
  out.check_config({**stored, "config": to_dict(same), "seeds": seeds}, upgrade_run)
  for change in schedule_changes(before, cfg, done):
    print(f"extending changes the schedule: {change}", file=sys.stderr)
  write_json_atomic(path, {**stored, "config": to_dict(cfg)})
  return before


def _keep_bias_rate(cfg: PretrainConfig, folder: pathlib.Path) -> PretrainConfig:
  """Returns `cfg` with the bias rate of the run in a folder, if the user has not set one.

  Runs that were made before the rate was chosen by the number of steps can so be resumed.
  """
  path = folder / "config.json"
  if cfg.balance.bias_rate is not None or not path.exists():
    return cfg
  try:
    stored = upgrade_run(read_run_json(path, config=dict, seeds=list))["config"]
    rate = stored["balance"]["bias_rate"]
  except (ValueError, TypeError, KeyError):  # not such a run, which is said later
    return cfg
  return dataclasses.replace(cfg, balance=dataclasses.replace(cfg.balance, bias_rate=rate))


def _with_start(cfg: PretrainConfig, start: LoadedModel, overridden: set[str]) -> PretrainConfig:
  """Returns `cfg` with the architecture of the model that training starts from.

  Args:
    cfg: the run, whose `init` names the model.
    start: the model. Its tokenizer, if it has one, is used unless the user has set one.
    overridden: dotted names that the user has set.

  Raises:
    ValueError: if these include a part of the architecture.
  """
  changed = sorted(name for name in overridden if name.split(".")[0] == "model")
  if changed:
    raise ValueError(f"init={cfg.init} determines the model: do not set {', '.join(changed)}")
  return start_from(cfg, start, keep_tokenizer="data.tokenizer" in overridden)


def _check_tokenizer(cfg: PretrainConfig, start: LoadedModel, data: Data) -> None:
  """Raises ValueError if the data is tokenised otherwise than for the model that a run starts from.
  """
  if start.tokenizer_path is None:
    if cfg.data.tokenizer in ("bpe", "bytes"):
      raise ValueError(f"init={cfg.init} has no {TOKENIZER}, and data.tokenizer="
                       f"{cfg.data.tokenizer} is not the model's: copy the model's there, or set "
                       "data.tokenizer to its path")
  elif start.tokenizer().content_hash != data.tokenizer.content_hash:
    raise ValueError(f"data.tokenizer={cfg.data.tokenizer} is not the tokenizer of "
                     f"init={cfg.init}, so that its ids would stand for other tokens: leave "
                     "data.tokenizer out")


def _announce(cfg: PretrainConfig, data: Data, path: pathlib.Path) -> None:
  network = cfg.model
  tokens = cfg.train.steps * cfg.train.batch_size * cfg.data.seq_len
  print(f"{network.param_count(mtp=True):,} parameters, {network.active_param_count():,} active; "
        f"{cfg.train.steps:,} steps of {cfg.train.batch_size} x {cfg.data.seq_len} tokens "
        f"({tokens:,}); {path}")
  for name, count in data.epochs(cfg.train).items():
    if count > 1:
      print(f"  {name} is read {count:.1f} times")
  for domain, rows in data.heldout.items():
    print(f"  {domain}: {rows.num_bytes:,} bytes held out")


def _print_evaluation(step: int, evaluation) -> None:
  parts = [f"{domain} {np.mean(bits):.3f}" for domain, bits in evaluation.bits_per_byte.items()]
  text = f"step {step}: bits per byte {np.mean(evaluation.mean_bits_per_byte):.3f} ("
  text += ", ".join(parts) + ")"
  if evaluation.mtp_acceptance is not None:
    text += f", MTP acceptance {np.mean(evaluation.mtp_acceptance):.0%}"
  if evaluation.max_violation is not None:
    text += f", MaxVio {np.mean(evaluation.max_violation):.2f}"
  print(text, flush=True)


def _finish(cfg: PretrainConfig, scale: str, data: Data, path: pathlib.Path,
            result: Result) -> None:
  record = {"scale": scale, "status": result.status, "evaluations": result.evaluations,
            "cost": result.cost, "skipped_steps": int(np.max(result.state.skipped))}
  if cfg.baselines:
    record["baselines"] = _baselines(cfg, data)
    _compare(result.evaluations[-1]["bits_per_byte"], record["baselines"])
  runs = split_runs(result.state.variables, len(result.seeds))
  variables = runs[0]
  if cfg.sample_tokens:
    print(f"\n{cfg.prompt}", end="", flush=True)
    text = write_continuation(cfg.model, variables, data.tokenizer, cfg.prompt,
                              max_new_tokens=cfg.sample_tokens, temperature=0.8, seed=0)
    record["samples"] = [{"prompt": cfg.prompt, "text": text}]
    print("\n")
  if cfg.export:
    _export(cfg, path, dict(zip(result.seeds, runs, strict=True)), data)
  first, last = result.rows[0], result.rows[-1]
  if "max_violation" in last:
    print(f"MaxVio of a batch: {first['max_violation']:.2f} at the first step, "
          f"{last['max_violation']:.2f} at the last")
  run = json_data(_results(cfg, data, record))
  write_json_atomic(path / SUMMARY, summary(run))
  report = write_run_report(path, run, result.rows)
  write_json_atomic(path / "results.json", run)  # last, as it marks the run as finished
  print(f"report: {report}")


def _export_folder(cfg: PretrainConfig, seed: int, several: bool) -> pathlib.Path:
  return pathlib.Path(cfg.export) / (f"seed{seed}" if several else "")


def _identity(cfg: RunConfig, seeds: Collection[int], seed: int) -> str:
  return run_identity({"config": to_dict(cfg), "seeds": list(seeds)}, seed)


def _check_export(cfg: PretrainConfig, seeds: Collection[int], shorter: RunConfig) -> None:
  """Raises ValueError if the model could not be exported after training.

  Args:
    cfg: the run.
    seeds: its seeds.
    shorter: the run that it extends, whose export it may replace.
  """
  if cfg.export:
    model.hf.check_supported(cfg.model)
    for seed in seeds:
      check_target(_export_folder(cfg, seed, len(seeds) > 1),
                   _identity(cfg.without_extras(), seeds, seed), _identity(shorter, seeds, seed),
                   overwrite=cfg.overwrite_export)


def _export(cfg: PretrainConfig, path: pathlib.Path, runs: dict[int, dict], data: Data) -> None:
  """Exports the variables of every seed of the run in a folder."""
  for seed, variables in runs.items():
    folder = _export_folder(cfg, seed, len(runs) > 1)
    loaded = LoadedModel(cfg.model, variables, None, stored_template(path), hf_files(path))
    export(folder, loaded, data.tokenizer, _identity(cfg.without_extras(), runs, seed))
    print(f"exported to {folder}")


def _results(cfg: PretrainConfig, data: Data, more: dict) -> dict:
  """Returns the content of results.json."""
  return {"provenance": provenance.describe(), "config": to_dict(cfg),
          "data": data.summary() | {"epochs": data.epochs(cfg.train)}, **more}


def _baselines(cfg: PretrainConfig, data: Data) -> dict[str, dict[str, float]]:
  """Returns the bits per byte of gzip -9 and of an n-gram model on the held-out text, by domain.

  The n-gram model is trained on the same bytes as the model.
  """
  rows = data.train(cfg.train.seed)
  count = cfg.train.steps * cfg.train.batch_size
  ngram = baselines.NGram()
  ngram.fit(_text(data.tokenizer, [rows[i]["tokens"][1:] for i in range(count)]))
  heldout = {domain: _text(data.tokenizer, [held.tokens[:, 1:][held.loss_mask]])
             for domain, held in data.heldout.items()}
  return {
      "gzip -9": {domain: baselines.gzip_bits_per_byte(text) for domain, text in heldout.items()},
      f"{ngram.order}-gram": {
          domain: ngram.bits_per_byte(text) for domain, text in heldout.items()}}


def _text(tokenizer: Tokenizer, tokens: list[np.ndarray]) -> bytes:
  """Returns the bytes of tokens, without end-of-document and fill-in-the-middle tokens."""
  flat = np.concatenate([np.ravel(part) for part in tokens])
  special = (tokenizer.eos, tokenizer.fim_begin, tokenizer.fim_hole, tokenizer.fim_end)
  return tokenizer.decode_bytes(flat[~np.isin(flat, [i for i in special if i is not None])])


def _compare(ours: dict[str, float], others: dict[str, dict[str, float]]) -> None:
  table = {"this model": ours, **others}
  print(f"\n{'bits per byte':16}" + "".join(f"{domain:>12}" for domain in ours) + f"{'mean':>10}")
  for name, bits in table.items():
    print(f"{name:16}" + "".join(f"{bits[domain]:12.3f}" for domain in ours)
          + f"{np.mean([bits[domain] for domain in ours]):10.3f}")


def summary(run: dict) -> dict:
  """Returns the summary of a finished run, from the content of its results.json."""
  last, references = run["evaluations"][-1], run.get("baselines", {})
  claims = []
  for domain, bits in last["bits_per_byte"].items():
    others = ", ".join(f"{name} {found[domain]:.3f}" for name, found in references.items())
    claims.append(claim(f"held-out text, {domain}", "bits per byte", bits, reference=others,
                        n="one run"))
  if (acceptance := last.get("mtp_acceptance")) is not None:
    claims.append(claim("second token predicted by MTP", "acceptance rate", acceptance,
                        reference="85 to 90 % in V3 (section 5.4.3)", n="one run"))
  cost = run["cost"]
  return bench_summary(
      "pretrain", run["scale"],
      f"{run['config']['train']['steps']:,} steps of pre-training on "
      f"{cost['tokens']:,} tokens.", run["provenance"], claims=claims)

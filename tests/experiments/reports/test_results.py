"""Committed results: summaries follow from raw data, and generated files from summaries."""

import dataclasses
import json
import math
import re
import tarfile

import pytest

from experiments import catalogue
from experiments.benchmarks.rl import report as bench_rl_report
from experiments.options import Options
from experiments.programs import results as program
from experiments.reports import results, results_index, summary
from experiments.stats import Claim
from experiments.studies.judging.again import judge_again

SUMMARIES = results.summaries()
STUDIES = [folder for folder, of in SUMMARIES.items() if "definition" in of]
BENCHMARKS = [folder for folder, of in SUMMARIES.items() if "definition" not in of]


def test_there_are_results_of_studies_and_of_benchmarks():
  assert len(STUDIES) >= 10 and len(BENCHMARKS) >= 10


@pytest.mark.parametrize("folder", STUDIES)
def test_a_studys_verdicts_follow_from_its_parts(folder):
  committed = SUMMARIES[folder]
  with results.raw(results.ROOT / folder) as raw:
    judge_again(catalogue.find(committed["experiment"]).load().STUDY, raw,
                committed["provenance"])
    assert results.read_summary(raw) == committed


@pytest.mark.parametrize("folder", BENCHMARKS)
def test_a_benchmarks_summary_follows_from_its_results(folder):
  committed = SUMMARIES[folder]
  module = catalogue.find(committed["experiment"]).load()
  make = getattr(module, "summary", bench_rl_report.summary)
  with results.raw(results.ROOT / folder) as raw:
    assert json.loads(json.dumps(make(json.loads((raw / "results.json").read_text())))) == committed


@pytest.mark.parametrize("folder", SUMMARIES)
def test_a_result_is_in_its_experiments_folder_with_exactly_the_files_that_its_report_links(folder):
  assert folder.startswith(f"{catalogue.find(SUMMARIES[folder]['experiment']).results_folder}/")
  text = (results.ROOT / folder / "report.md").read_text()
  linked = re.findall(r"\]\(([\w.-]+)\)", text)
  assert {path.name for path in (results.ROOT / folder).iterdir()} == {
      "report.md", results.SUMMARY, results.RAW, *linked}
  assert not re.search(r"/(tmp|home|root|work|Users)/", text + json.dumps(SUMMARIES[folder]))


@pytest.mark.parametrize("folder", SUMMARIES)
def test_a_result_names_its_commits(folder):
  commits = SUMMARIES[folder]["provenance"].get("commit")
  for commit in commits["several"] if isinstance(commits, dict) else [commits]:
    assert re.fullmatch("[0-9a-f]{40}", commit)


def test_generated_files_are_current():
  """The index of results, the configuration reference, and the blocks of README and docs."""
  stale = [path.name for path, text in program.generated().items()
           if not path.exists() or path.read_text(encoding="utf-8") != text]
  assert not stale, "run `make results`"


# A synthetic result.

PROVENANCE = {"command": "python -m experiments.run --experiment=bench_moe --out=/tmp/x --scale=a",
              "commit": "0123456789abcdef", "dirty": True, "sources": "feedbeef",
              "versions": {"jax": "1.2.3"}, "device": "1 x cpu", "cpu": "CPU", "cores": 2}


def made(**fields) -> dict:
  return summary.bench_summary("bench_moe", "cpu", "How fast.", PROVENANCE, **fields)


def test_a_command_is_quoted_without_its_output_folder_and_time_limit():
  quoted = summary.plain_command("run --out=/tmp/x --max_minutes 3 --set 'a=b c' --out y --scale=z")
  assert quoted == "run --set 'a=b c' --scale=z"
  two = summary.plain_command("run --out=x --seeds=3 && run --out=x --arms=b")
  assert two == "run --seeds=3 && run --arms=b"


@pytest.mark.parametrize(("estimate", "bounds", "verdict"), [
    ((1.2, 1.1, 1.3), {"at_least": 1.1}, "met"), ((1.2, 1.0, 1.3), {"at_least": 1.1}, "unresolved"),
    ((1.0, 0.9, 1.05), {"at_least": 1.1}, "missed"), ((1.0,), {"at_least": 1.1}, "missed"),
    ((2.0, 1.9, 2.1), {"at_most": 2.0}, "unresolved"), ((1.9,), {"at_most": 2.0}, "met"),
    ((2.2, 2.1, 2.3), {"at_most": 2.0}, "missed"), ((1.0, 0.9, 1.0), {"at_most": 2.0}, "met"),
    ((9.0, None, None), {"at_least": 1.1}, "unresolved"),
    ((9.0, float("-inf"), float("inf")), {"at_most": 2.0}, "unresolved")])
def test_a_target_is_met_or_missed_only_by_the_whole_interval(estimate, bounds, verdict):
  found = summary.target("faster", "speed-up", estimate, **bounds)
  assert found["verdict"] == verdict
  assert found["claimed"] == ("at least 1.1" if "at_least" in bounds else "at most 2")


@pytest.mark.parametrize(("claim", "metric", "text"), [
    (Claim("sign", sign=-1), "validation_loss", "below 0"),
    (Claim("sign", sign=1, margin=0.02), "pass@1", "above 0.02"),
    (Claim("sign", sign=-1, margin=0.02), "pass@1", "below −0.02"),
    (Claim("threshold", sign=-1, threshold=0.3), "max_violation", "below 0.3"),
    (Claim("equivalent", margin=0.02), "validation_loss", "within ±0.02"),
    (Claim("equivalent", margin=math.log1p(0.0025)), "log_training_loss", "within ±0.25 %")])
def test_the_criterion_of_a_claim_is_shown_in_words(claim, metric, text):
  assert summary.criterion(dataclasses.asdict(claim), metric) == text


def test_differences_of_log_losses_are_shown_as_relative_differences():
  found = summary.claim("equal", "log_training_loss", math.log(1.0041), math.log(1.0008),
                        math.log(1.0073))
  assert summary.estimate(found) == "0.41 % (0.08 to 0.73 %)"
  assert summary.metric_of(found) == "relative difference in training loss"


def test_a_claim_about_two_arms_is_about_a_difference():
  claims = [summary.claim("it", "pass@1", 0.5) | {"baseline": baseline}
            for baseline in (None, "plain")]
  assert [summary.metric_of(c) for c in claims] == ["pass@1", "difference in pass@1"]


def test_columns_that_no_claim_uses_are_left_out_and_several_results_are_named():
  claims = [summary.claim("a", "speed-up", 1.5, claimed="at least 1", n="7 rounds"),
            summary.claim("b", "speed-up", 0.5)]
  assert summary.claims_table(claims).startswith(
      "| claim | metric | claimed | measured | basis | verdict |")
  found = {f"r1/r1_zero/{scale}": made(claims=[summary.claim("it", "pass@1", 0.5)])
           for scale in ("cpu", "gpu")}
  filled = results_index.fill(
      "<!-- results: claims r1/r1_zero/cpu r1/r1_zero/gpu -->\n<!-- end of results -->", found)
  assert "| result | claim | metric |" in filled
  assert "| cpu | it | pass@1 |" in filled and "| gpu | it | pass@1 |" in filled


def test_a_command_has_the_xla_flags_that_were_set_but_not_those_that_it_sets_itself():
  command = lambda flags: summary.short_provenance(PROVENANCE | {"xla_flags": flags})["command"]
  plain = "python -m experiments.run --experiment=bench_moe --scale=a"
  assert command(None) == command("--xla_cpu_prefer_vector_width=512") == plain
  assert command("--xla_a=true --xla_b=1") == f"XLA_FLAGS='--xla_a=true --xla_b=1' {plain}"


@pytest.mark.parametrize(("values", "text"), [
    ((2.6871, 2.6634, 2.7121), "2.687 (2.663 to 2.712)"),
    ((56.0, 54.0, 57.2), "56.0 (54.0 to 57.2)"),
    ((-1.09, -1.34, -0.84), "−1.09 (−1.34 to −0.84)"), ((0.0751,), "0.0751"),
    ((259452.3,), "259,452"), ((1.0, 1.0, 1.0), "1 (1 to 1)"), ((None,), "–"),
    ((3e-7, 2.9e-7, 3.1e-7), "3e-07 (2.9e-07 to 3.1e-07)")])
def test_an_estimate_has_the_digits_that_its_interval_warrants(values, text):
  assert summary.estimate(summary.claim("it", "metric", *values)) == text


def test_bounds_that_are_not_finite_are_left_out():
  found = summary.claim("it", "metric", 1.0, float("-inf"), float("inf"))
  assert (found["low"], found["high"]) == (None, None) and summary.estimate(found) == "1.00"


def test_code_is_identified_by_the_sources_hash_or_else_by_the_commit():
  assert results_index.code(PROVENANCE) == "sources feedbeef"
  del (older := dict(PROVENANCE))["sources"]
  assert results_index.code(older) == "commit 012345678 and uncommitted changes"
  several = {"commit": {"several": ["abc", None, "0123456789a"]}}
  assert results_index.code(several) == "commits abc, 012345678"
  partly = {"commit": "abc", "dirty": {"several": [False, True]}}
  assert results_index.code(partly) == "commit abc and uncommitted changes in some runs"
  assert results_index.hardware(PROVENANCE) == "2 cores of CPU; jax 1.2.3"
  devices = {"device": {"several": ["1 x A", "1 x B"]}}
  assert results_index.hardware(devices) == "1 x A, 1 x B"


@pytest.mark.parametrize(("change", "expected"), [
    ({}, "no"), ({"learning_rates": [1]}, "yes: changed learning rates"),
    ({"arms": {}, "claims": []}, "yes: changed arms, claims")])
def test_a_study_is_stale_if_what_decides_its_outcome_changed(change, expected):
  now = {"arms": {"a": []}, "learning_rates": [], "claims": ["x"]}
  assert results_index.difference(now | change, now) == expected
  assert results_index.difference(None, now) == "unknown"


def test_the_report_of_a_stale_study_says_so_below_its_title_and_only_as_long_as_it_is():
  report = "# Study a\n\n> A claim.\n\nText.\n"
  stale = results_index.marked(report, "yes: changed arms, claims")
  assert stale == (
      "# Study a\n\n> **This result is stale:** since it was made, the study's arms, claims have "
      "changed.\n\n> A claim.\n\nText.\n")
  assert results_index.marked(stale, "yes: changed arms, claims") == stale
  for answer in ("no", "–", "unknown"):
    assert results_index.marked(stale, answer) == results_index.marked(report, answer) == report


def test_blocks_are_filled_and_the_rest_of_the_text_is_unchanged():
  found = {"bench/bench_moe/cpu": made(
      claims=[summary.claim("slots are fast", "speed-up", 1.5),
              summary.claim("blocks are slow", "speed-up", 0.5)],
      tables=[{"name": "ms", "caption": "Times", "header": ["experts", "ms"],
               "rows": [["slots", 3.5]], "note": "Medians."}])}
  text = ("before\n<!-- results: claims bench/bench_moe/cpu -->\nold\n<!-- end of results -->\n"
          "<!-- results: rows\n  bench/bench_moe/cpu: slots are -->\n\n<!-- end of results -->\n"
          "<!-- results: table bench/bench_moe/cpu ms -->\n<!-- end of results -->\nafter\n")
  filled = results_index.fill(text, found, "../results")
  assert filled.startswith("before\n") and filled.endswith("after\n") and "old" not in filled
  claims, rows, table = results_index.blocks(filled)
  assert "| blocks are slow | speed-up | 0.500 | **measured** |" in claims
  assert "slots are fast" in rows and "blocks" not in rows
  assert "[bench/bench_moe/cpu](../results/bench/bench_moe/cpu/report.md)" in rows
  assert "| slots | 3.5 |\n\nMedians." in table and "--scale=a" in table and "/tmp" not in table
  assert results_index.fill(filled, found, "../results") == filled


@pytest.mark.parametrize(("block", "message"), [
    ("nonsense", "there is no block 'nonsense'"),
    ("claims bench/other", "there is no result bench/other; there are: bench/bench_moe/cpu"),
    ("table bench/bench_moe/cpu ms", "no table 'ms'"),
    ("rows bench/bench_moe/cpu: slots", "2 claims of bench/bench_moe/cpu begin with 'slots'"),
    ("rows bench/bench_moe/cpu: tiles",
     "0 of the 2 claims of bench/bench_moe/cpu begin with 'tiles'; the closest are: slots")])
def test_a_block_that_names_something_that_does_not_exist_is_refused(block, message):
  claims = [summary.claim(f"slots are {what}", "speed-up", 1.0) for what in ("fast", "small")]
  with pytest.raises(ValueError, match=re.escape(message)):
    results_index.fill(f"<!-- results: {block} -->\n<!-- end of results -->",
                       {"bench/bench_moe/cpu": made(claims=claims)})


def test_keep_copies_the_report_with_its_figures_and_packs_the_rest_reproducibly(tmp_path):
  run = tmp_path / "run"
  (run / "parts").mkdir(parents=True)
  (run / "checkpoints").mkdir()
  (run / "checkpoints" / "large").write_bytes(b"x")
  (run / "parts" / "1.json").write_text("{}")
  (run / "curve.png").write_bytes(b"png")
  results.record(run, {"value": 3}, lambda result: made(claims=[
      summary.claim("it", "metric", result["value"])]),
      lambda folder, result: [("Curve", "![Curve](curve.png)")])
  kept = results.keep(run, tmp_path / "kept")
  assert {path.name for path in kept.iterdir()} == {
      "report.md", "curve.png", results.SUMMARY, results.RAW}
  assert results.read_summary(kept)["claims"][0]["value"] == 3
  with results.raw(kept) as raw:
    assert {path.name for path in raw.rglob("*") if path.is_file()} == {"1.json", "results.json"}
    assert json.loads((raw / "results.json").read_text())["value"] == 3
  archive = (kept / results.RAW).read_bytes()
  assert (results.keep(run, kept) / results.RAW).read_bytes() == archive
  with tarfile.open(kept / results.RAW) as packed:
    assert all(member.uname == "" and member.mtime == 0 for member in packed)


def test_a_folder_without_a_summary_cannot_be_kept(tmp_path):
  (tmp_path / "run").mkdir()
  with pytest.raises(ValueError, match="give the folder of a finished study"):
    program.main(Options("results", settings=(f"keep={tmp_path / 'run'}",)))

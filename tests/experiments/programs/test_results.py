"""Keeping results: what is refused before anything is copied or replaced."""

import json

import pytest

from experiments.options import Options
from experiments.programs import results as program
from experiments.reports import results


@pytest.fixture
def root(tmp_path, monkeypatch):
  """Returns the folder of committed results, which holds one of `load_balancing`."""
  place = tmp_path / "results"
  (place / "v3" / "load_balancing" / "cpu").mkdir(parents=True)
  (place / "v3" / "load_balancing" / "cpu" / "report.md").write_text("committed")
  monkeypatch.setattr(results, "ROOT", place)
  monkeypatch.setattr(program, "generated", dict)
  return place


def files(root) -> dict:
  return {path.relative_to(root).as_posix(): path.read_text(errors="replace")
          for path in root.rglob("*") if path.is_file()}


def study_folder(path, experiment="load_balancing", scale="cpu", **result):
  path.mkdir()
  (path / "report.md").write_text("new")
  (path / "summary.json").write_text(json.dumps(
      {"experiment": experiment, "scale": scale, "definition": {}}))
  (path / "results.json").write_text(json.dumps(result))
  return path


def keep(folder, *more) -> None:
  program.main(Options("results", settings=(f"keep={folder}", *more)))


@pytest.mark.parametrize("name", ["..", ".", "../x", "a/b", "/tmp/x", "a b"])
def test_a_name_that_is_not_one_folder_is_refused_and_nothing_changes(root, tmp_path, name):
  before = files(root)
  folder = study_folder(tmp_path / "run", missing=[])
  with pytest.raises(ValueError, match="must be the name of one folder"):
    keep(folder, f"name={name}")
  assert files(root) == before and not (root.parent / "x").exists()


@pytest.mark.parametrize(("fields", "message"), [
    ({"experiment": "ab", "missing": []}, "only studies are kept"),
    ({"experiment": "nothing_like_this", "missing": []}, "there is no experiment"),
    ({"scale": "huge", "missing": []}, "there are smoke, cpu, gpu"),
    ({"missing": ["nothing-seed3", "nothing-seed4", "a", "b"]},
     "nothing-seed3, nothing-seed4, a and 1 more have not run"),
    ({}, "does not say whether runs are missing")])
def test_a_folder_that_is_no_finished_study_is_refused_and_nothing_changes(
    root, tmp_path, fields, message):
  before = files(root)
  folder = study_folder(tmp_path / "run", **fields)
  with pytest.raises(ValueError, match=message):
    keep(folder)
  assert files(root) == before


def test_a_finished_study_replaces_the_result_of_its_name_and_no_other(root, tmp_path):
  folder = study_folder(tmp_path / "run", missing=[])
  keep(folder, "name=cpu-again.1")
  assert files(root)["v3/load_balancing/cpu/report.md"] == "committed"
  keep(folder)
  kept = files(root)
  assert kept["v3/load_balancing/cpu/report.md"] == "new"
  assert kept["v3/load_balancing/cpu-again.1/report.md"] == "new"
  assert not [name for name in kept if "/." in name]


def test_a_result_survives_if_its_successor_cannot_be_copied(root, tmp_path):
  folder = study_folder(tmp_path / "run", missing=[])
  (folder / "report.md").write_text("![Loss](absent.png)")
  before = files(root)
  with pytest.raises(FileNotFoundError):
    keep(folder)
  assert files(root) == before


def test_a_committed_result_of_something_that_is_no_study_now_does_not_break_the_index(root):
  place = root / "programs" / "ab" / "cpu"
  place.mkdir(parents=True)
  for experiment, expected in (("ab", "–"), ("fp8", "yes: there is no scale huge")):
    (place / "summary.json").write_text(json.dumps(
        {"experiment": experiment, "scale": "huge", "definition": {}}))
    assert program.stale("programs/ab/cpu") == expected

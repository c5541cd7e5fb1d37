"""Provenance: a command that can be rerun, and the versions of libraries, torch's included."""

import shlex
import sys
import types

from experiments.reports import provenance


def test_the_recorded_command_has_the_arguments_as_they_were_given(monkeypatch):
  arguments = ["--experiment=bench_train", "--set", "bench.variants=--dtype=bfloat16 --compile"]
  monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
  assert shlex.split(provenance.describe()["command"])[3:] == arguments


def test_the_version_of_torch_is_recorded_only_if_it_was_imported(monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(__version__="2.11.0+cu130"))
  assert provenance.describe()["versions"]["torch"] == "2.11.0+cu130"
  monkeypatch.delitem(sys.modules, "torch")
  assert "torch" not in provenance.describe()["versions"]

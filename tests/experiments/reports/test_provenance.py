"""Where results come from: a command that can be given again, and the versions of both sides."""

import shlex
import sys
import types

from experiments.reports import provenance


def test_the_command_can_be_given_again_as_it_was(monkeypatch):
  asked = ["--experiment=bench_train", "--set", "bench.variants=--dtype=bfloat16 --compile"]
  monkeypatch.setattr(sys, "argv", ["run.py", *asked])
  assert shlex.split(provenance.describe()["command"])[3:] == asked


def test_a_peers_version_is_told_where_it_was_imported(monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(__version__="2.11.0+cu130"))
  assert provenance.describe()["versions"]["torch"] == "2.11.0+cu130"
  monkeypatch.delitem(sys.modules, "torch")
  assert "torch" not in provenance.describe()["versions"]

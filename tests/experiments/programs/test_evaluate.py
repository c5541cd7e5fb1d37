"""evaluate refuses what it could only fail at the end."""

import pytest

from experiments.options import Options
from experiments.programs import evaluate


def test_a_file_in_the_place_of_the_folder_is_noticed_before_anything_runs(tmp_path):
  (tmp_path / "out").write_text("")
  with pytest.raises(FileExistsError):
    evaluate.main(Options("evaluate", out=tmp_path / "out", settings=("checkpoint=missing",)))

"""An objective that another package brings, as the room's README has it: one file, one entry point."""

import json
import re
from pathlib import Path

import pytest

from cdistill.storage.run_folder import RunFolder
from tests.conftest import PACKAGE, fast_distill

README = PACKAGE / "objectives" / "README.md"


@pytest.fixture
def installed(tmp_path, monkeypatch) -> Path:
    """The package of the README, laid out as pip installs it."""
    site = tmp_path / "site"
    for code in re.findall(r"```(?:python|toml)\n# (my_package/.*?)```", README.read_text(), re.DOTALL):
        name, text = code.split("\n", 1)
        path = site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    entry = re.search(r'entry-points\."(.*?)"\]\n(.*?)\n', README.read_text())
    about = site / "my_package-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my_package\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{entry[1]}]\n{entry[2].replace(chr(34), '')}\n")
    monkeypatch.setenv("PYTHONPATH", str(site))
    return site


@pytest.mark.slow
def test_an_installed_objective_distils_and_its_student_is_evaluated(installed, run_cli, tmp_path):
    own = ["objective.name=progressive", "objective.points=11", "preconditioning.name=ctm"]  # as in the README
    done = run_cli(*fast_distill(tmp_path / "run", *own))
    assert done.returncode == 0, done.stderr
    folder = RunFolder(tmp_path / "run")
    losses = [record["consistency"] for record in folder.metrics() if record["event"] == "train"]
    assert losses[-1] < losses[0]
    assert {row["nfe"] for row in folder.results()["rows"]} >= {1, 2}
    assert '[objective]\nname = "progressive"' in (tmp_path / "run" / "recipe.resolved.toml").read_text()
    planned = run_cli("plan", "--recipe", str(tmp_path / "run" / "recipe.resolved.toml"), "--json")
    assert json.loads(planned.stdout)["parts"][0]["forwards"] == 4


@pytest.mark.parametrize(("setting", "reason"), [
    ("objective.points=[1]", "objective.points: got [1]"),
    ("objective.max_ode_steps=3", "objective.max_ode_steps: unknown key"),
])  # fmt: skip
def test_its_settings_are_checked_by_its_own_section(installed, run_cli, tmp_path, setting, reason):
    done = run_cli(*fast_distill(tmp_path / "run", "objective.name=progressive", setting), "--dry-run")
    assert done.returncode == 2
    assert reason in done.stderr

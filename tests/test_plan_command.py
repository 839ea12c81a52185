"""`tera plan` as a command."""

import json
from pathlib import Path

import pytest
import yaml
from tests.plans import VALUES, Object, model
from typer.testing import CliRunner, Result

from tera.cli import app
from tera.config.merge import deep_merge

CHART = Path(__file__).parents[1] / "helm/tera"


class TestCommand:
    @pytest.fixture(autouse=True)
    def home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TERA_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("COLUMNS", "200")

    def tera(self, *arguments: str, code: int = 0) -> Result:
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == code, (result.output, result.exception)
        return result

    def file(self, directory: Path, name: str, values: Object) -> str:
        path = directory / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return str(path)

    def test_table_and_json_say_the_same(self, tmp_path: Path) -> None:
        old = self.file(tmp_path, "old", VALUES)
        new = self.file(tmp_path, "new", deep_merge(VALUES, model(engine={"args": {"seed": 1}})))
        table = self.tera("plan", "-f", new, "--against", old).stdout
        assert "models.one.engine.args.seed" in table
        assert "Restarts: model-one; nothing else." in table
        assert json.loads(self.tera("plan", "-f", new, "--against", old, "--json").stdout) == {
            "target": "cluster",
            "changes": [
                {
                    "part": "models.one",
                    "paths": ["models.one.engine.args.seed"],
                    "effect": "reloads",
                    "restarts": ["model-one"],
                    "note": "",
                }
            ],
            "restarts": ["model-one"],
        }

    def test_no_edit_is_said(self, tmp_path: Path) -> None:
        file = self.file(tmp_path, "values", VALUES)
        assert "nothing changes" in self.tera("plan", "-f", file, "--against", file).stdout
        planned = json.loads(self.tera("plan", "-f", file, "--against", file, "--json").stdout)
        assert (planned["changes"], planned["restarts"]) == ([], [])

    def test_later_files_go_over_earlier_ones_on_both_sides(self, tmp_path: Path) -> None:
        base = self.file(tmp_path, "base", VALUES)
        two = self.file(tmp_path, "two", model(replicas={"max": 2}))
        three = self.file(tmp_path, "three", model(replicas={"max": 3}))
        arguments = ("plan", "-f", base, "-f", two, "-f", three, "--against", base)
        for more, effects in ((), ["in_place"]), (("--against", three), []):
            found = json.loads(self.tera(*arguments, *more, "--json").stdout)
            assert [change["effect"] for change in found["changes"]] == effects

    def test_what_helm_says_of_a_release_can_be_compared_with(self, tmp_path: Path) -> None:
        file = self.file(tmp_path, "values", VALUES)
        computed = deep_merge(yaml.safe_load((CHART / "values.yaml").read_text()), VALUES)
        live = tmp_path / "live.yaml"
        live.write_text("COMPUTED VALUES:\n" + yaml.safe_dump(computed))
        assert "nothing changes" in self.tera("plan", "-f", file, "--against", str(live)).stdout

    def test_values_for_one_machine_are_compared_as_it_has_them(self, tmp_path: Path) -> None:
        demo = {"models": {"a": {"id": "a", "source": "demo://a"}}}
        old = self.file(tmp_path, "old", demo)
        new = self.file(tmp_path, "new", {**demo, "image": {"tag": "1.2.3"}})
        planned = json.loads(self.tera("plan", "-f", new, "--against", old, "--json").stdout)
        assert (planned["target"], planned["restarts"]) == ("machine", [])

    @pytest.mark.parametrize(
        ("edit", "complaint"),
        [
            pytest.param(model(replica=1), "models.one.replica: unknown key", id="unknown key"),
            pytest.param(model(pool="x"), "models.one.pool: there is no pool", id="no such pool"),
            pytest.param(model(pool=""), "models.one.pool: is missing", id="no pool on a cluster"),
        ],
    )
    def test_bad_values_are_refused_with_their_path(
        self, tmp_path: Path, edit: Object, complaint: str
    ) -> None:
        old = self.file(tmp_path, "old", VALUES)
        new = self.file(tmp_path, "new", deep_merge(VALUES, edit))
        refused = self.tera("plan", "-f", new, "--against", old, code=2)
        assert complaint in refused.stderr
        assert refused.stdout == ""

    def test_bad_values_before_the_edit_are_told_apart(self, tmp_path: Path) -> None:
        old = self.file(tmp_path, "old", deep_merge(VALUES, model(replica=1)))
        new = self.file(tmp_path, "new", VALUES)
        refused = self.tera("plan", "-f", new, "--against", old, code=2)
        assert "--against: models.one.replica: unknown key" in refused.stderr

    @pytest.mark.parametrize("command", ["plan", "apply"])
    def test_without_a_platform_here_it_says_what_to_do(self, tmp_path: Path, command: str) -> None:
        file = self.file(tmp_path, "values", VALUES)
        refused = self.tera(command, "-f", file, code=2)
        assert "No platform runs" in refused.stderr
        assert "tera serve" in refused.stderr
        assert ("--against" in refused.stderr) is (command == "plan")

"""A model that can neither be loaded nor started, beside others that are served."""

from typing import Any

import psutil
import pytest
import yaml
from tests.serve.conftest import Platform, until

pytestmark = pytest.mark.slow


def simulated(name: str, **args: Any) -> dict[str, Any]:
    return {"id": f"sim/{name}", "engine": {"kind": "simulated", **args}}


def apply(platform: Platform, **models: Any) -> int:
    file = platform.home.parent / "edited.yaml"
    file.write_text(yaml.safe_dump({"models": models}))
    return platform.tera("apply", "-f", str(file)).returncode


def test_a_broken_model_takes_neither_gateways_nor_other_models_away(operated: Platform) -> None:
    platform, good = operated, {"one": simulated("one"), "two": simulated("two")}
    broken = simulated("three", args={"profile": {"speed": 2}})
    platform.become(yaml.safe_dump({"models": good}))
    with platform.http() as http:

        def statuses() -> dict[str, str]:
            answer = http.get("/v1/models")
            if answer.status_code != 200:
                return {}
            return {model["id"]: model["status"] for model in answer.json()["data"]}

        def answered(model: str) -> int:
            body = {"model": model, "prompt": "Once", "max_tokens": 4}
            return http.post("/v1/completions", json=body).status_code

        assert apply(platform, **good, three=broken) == 1
        as_it_is = {"sim/one": "ready", "sim/two": "ready", "sim/three": "failed"}
        until(lambda: statuses() == as_it_is)
        assert [answered(model) for model in as_it_is] == [200, 200, 500]
        (three,) = [each for each in platform.status()["models"] if each["name"] == "three"]
        assert three["status"] == "failed"
        assert "speed" in three["failure"]

        # The catalog that its successor begins with has the broken model in it.
        (gateway,) = platform.status()["gateway"]
        psutil.Process(gateway["pid"]).kill()
        until(
            lambda: {each["pid"] for each in platform.status()["gateway"]}.isdisjoint(
                {gateway["pid"], None}
            ),
            timeout_s=60,
            every_s=1,
        )
        until(lambda: http.get("/readyz").status_code == 200, timeout_s=60)
        until(lambda: statuses() == as_it_is, timeout_s=60)
        assert [answered(model) for model in as_it_is] == [200, 200, 500]

        assert apply(platform, **good, three=simulated("three")) == 0
        until(lambda: set(statuses().values()) == {"ready"})
        assert [answered(model) for model in as_it_is] == [200, 200, 200]

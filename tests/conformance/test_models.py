"""Rules M: the model list."""

import json
from typing import Any

import pytest
from tests.conformance.answers import accepted, assert_refused
from tests.conformance.gateways import Gateway, InProcessGateway

CAPABILITIES = {"completions", "chat", "speech"}
STATUSES = {"ready", "scaled_to_zero", "starting"}


def assert_card(card: dict[str, Any]) -> None:
    assert set(card) == {
        *("id", "object", "created", "owned_by", "context_length", "capabilities", "status")
    }
    assert card["object"] == "model"
    assert type(card["created"]) is int
    assert isinstance(card["owned_by"], str)
    assert card["capabilities"]
    assert set(card["capabilities"]) <= CAPABILITIES
    assert card["status"] in STATUSES


def test_m1_the_list_has_exactly_these_members(text_gateway: Gateway) -> None:
    found = accepted(text_gateway.request("GET", "/v1/models"))
    assert set(found) == {"object", "data"}
    assert found["object"] == "list"
    for card in found["data"]:
        assert_card(card)
    [main] = [card for card in found["data"] if card["id"] == text_gateway.model]
    assert main["context_length"] == text_gateway.context_tokens
    assert main["status"] == "ready"


def test_m1_the_list_has_the_catalogs_order(in_process: InProcessGateway) -> None:
    found = accepted(in_process.request("GET", "/v1/models"))["data"]
    assert [card["id"] for card in found] == [
        *("sim/small", "Sim/Chat-Only", "sim/dead", "sim/stalled", "sim/stuck", "sim/defective")
    ]
    assert found[0]["capabilities"] == ["completions", "chat"]
    assert found[1]["capabilities"] == ["chat"]


def test_m1_created_never_changes(gateway: Gateway) -> None:
    first, second = (accepted(gateway.request("GET", "/v1/models")) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("allowed", "seen"),
    [
        pytest.param(("sim/dead", "sim/small"), ["sim/small", "sim/dead"], id="two"),
        pytest.param(("sim",), ["sim/small"], id="by-an-alias"),
        pytest.param(("nobody/none",), [], id="none"),
    ],
)
def test_m1_a_key_sees_only_the_models_that_it_may_use(
    in_process: InProcessGateway, allowed: tuple[str, ...], seen: list[str]
) -> None:
    key = in_process.make_key(models=allowed)
    found = accepted(in_process.request("GET", "/v1/models", key=key))
    assert [card["id"] for card in found["data"]] == seen
    for card in accepted(in_process.request("GET", "/v1/models"))["data"]:
        answer = in_process.request("GET", f"/v1/models/{card['id']}", key=key)
        assert answer.status_code == (200 if card["id"] in seen else 404)


def test_m2_a_model_is_found_by_its_id_with_its_slash_or_encoded(text_gateway: Gateway) -> None:
    listed = accepted(text_gateway.request("GET", "/v1/models"))["data"]
    model = text_gateway.model
    for path in (model, model.replace("/", "%2F"), model.replace("/", "%2f")):
        card = accepted(text_gateway.request("GET", f"/v1/models/{path}"))
        assert card in listed
        assert card["id"] == model


@pytest.mark.parametrize(
    "name",
    [
        *("nobody/none", "sim", "small", "sim/small2", "sim/small/", "sim//small", "/sim/small"),
        *("sim%252Fsmall", "sim/small%20", "sim/small%00", "%F0%9F%9A%80", "sim/small/more"),
        "x" * 300,
    ],
)
def test_m2_an_unknown_model_is_not_found(in_process: InProcessGateway, name: str) -> None:
    key = in_process.make_key(models=("sim/small",)) if name != "sim" else in_process.key
    answer = in_process.request("GET", f"/v1/models/{name}", key=key)
    if name == "sim":
        accepted(answer)
    else:
        error = assert_refused(answer, "model_not_found", "model")
        assert error["message"].endswith("or you do not have access to it.")


def test_m2_no_id_is_an_unknown_url(gateway: Gateway) -> None:
    for key in (gateway.key, None):
        assert_refused(gateway.request("GET", "/v1/models/", key=key), "unknown_url")


@pytest.mark.parametrize("name", ["Sim/small", "SIM/SMALL", "sim/Small", "SIM", "sim/chat-only"])
def test_m3_ids_are_case_sensitive(in_process: InProcessGateway, name: str) -> None:
    answers = [
        in_process.request("GET", f"/v1/models/{name}"),
        in_process.complete(model=name),
        in_process.chat(model=name),
    ]
    for answer in answers:
        assert_refused(answer, "model_not_found", "model")


def test_m3_an_alias_answers_with_the_name_that_was_asked_for(gateway: Gateway) -> None:
    card = accepted(gateway.request("GET", "/v1/models/sim"))
    assert card["id"] == "sim"
    own = accepted(gateway.request("GET", f"/v1/models/{gateway.model}"))
    assert {**card, "id": own["id"]} == own
    aliased, named = gateway.complete(model="sim"), gateway.complete()
    assert accepted(aliased)["model"] == "sim"
    assert accepted(aliased)["choices"] == accepted(named)["choices"]
    assert accepted(gateway.chat(model="sim"))["model"] == "sim"
    streamed = gateway.complete(model="sim", stream=True).text
    assert json.loads(streamed.split("\n\n")[0].removeprefix("data: "))["model"] == "sim"


def test_m4_both_routes_need_a_key(gateway: Gateway) -> None:
    for path in ("/v1/models", "/v1/models/sim/small", "/v1/models/nobody/none"):
        assert_refused(gateway.request("GET", path, key=None), "missing_api_key")
        assert_refused(gateway.request("GET", path, key="sk-wrong"), "invalid_api_key")


def test_m4_a_model_list_says_nothing_of_limits(gateway: Gateway) -> None:
    answer = gateway.request("GET", "/v1/models")
    assert not [name for name in answer.headers if name.startswith("x-ratelimit-")]

"""Models whose text sides are loaded: slow ones, broken ones, and those beside them."""

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager

import pytest
import pytest_asyncio
from tests.tenancy.waiting import until

from tera.config.model import EngineConfig, ModelConfig
from tera.contract.common import ModelStatus
from tera.errors import ConfigError
from tera.gateway.render import TextModel
from tera.gateway.simulated_text import SimulatedTextModel
from tera.gateway.text_loader import TextLoader, TextLoaders

NEVER_S = 3600.0


class Hub:
    """Where models come from, unless they are broken or held back."""

    def __init__(self) -> None:
        self.broken: dict[str, str] = {}
        """Why, by source."""
        self.attempts: Counter[str] = Counter()
        self.changes = 0
        self._held: dict[str, threading.Event] = {}

    def load(self, config: ModelConfig) -> TextModel:
        self.attempts[config.source] += 1
        if config.source in self._held:
            self._held[config.source].wait(60)
        if reason := self.broken.get(config.source):
            raise ConfigError(reason)
        return SimulatedTextModel({})

    def changed(self) -> None:
        self.changes += 1

    @contextmanager
    def holding(self, source: str) -> Iterator[None]:
        """Answer nobody who asks for it while the block runs."""
        self._held[source] = threading.Event()
        try:
            yield
        finally:
            self._held.pop(source).set()


@pytest.fixture
def hub() -> Hub:
    return Hub()


@pytest_asyncio.fixture
async def loaders(hub: Hub) -> AsyncGenerator[TextLoaders]:
    """Loaders that do not try again by themselves before the test has ended."""
    loaders = TextLoaders(hub.load, changed=hub.changed, first_pause_s=NEVER_S)
    yield loaders
    await loaders.aclose()


def model(name: str, *, source: str = "", **args: str) -> ModelConfig:
    return ModelConfig(
        id=f"org/{name}", source=source or f"hf://org/{name}", engine=EngineConfig(args={**args})
    )


CATALOG = {name: model(name) for name in ("one", "two", "three")}
BROKEN = "hf://org/two"


def statuses(catalog: dict[str, TextLoader]) -> list[ModelStatus]:
    return [loader.status("ready") for loader in catalog.values()]


async def all_tried(catalog: dict[str, TextLoader]) -> None:
    async with asyncio.timeout(30):
        await asyncio.gather(*(loader.tried() for loader in catalog.values()))


async def test_one_broken_model_of_three_fails_alone(
    loaders: TextLoaders, hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    hub.broken[BROKEN] = "The repository is gated."
    catalog = await loaders.follow(CATALOG)
    await all_tried(catalog)
    assert statuses(catalog) == ["ready", "failed", "ready"]
    assert [loader.failure for loader in catalog.values()] == ["", "The repository is gated.", ""]
    assert catalog["two"].text is None
    assert "two cannot be loaded: The repository is gated." in caplog.text
    assert hub.changes == 3


async def test_a_broken_model_is_tried_again_until_it_is_loaded(
    hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    hub.broken[BROKEN] = "The hub is away."
    loaders = TextLoaders(hub.load, changed=hub.changed, first_pause_s=0.001)
    try:
        catalog = await loaders.follow(CATALOG)
        await until(lambda: hub.attempts[BROKEN] > 3)
        assert statuses(catalog) == ["ready", "failed", "ready"]
        with caplog.at_level(logging.INFO):
            del hub.broken[BROKEN]
            await until(lambda: statuses(catalog) == ["ready"] * 3)
        assert catalog["two"].failure == ""
        assert "two could be loaded at last" in caplog.text
        assert [hub.attempts[f"hf://org/{name}"] for name in ("one", "three")] == [1, 1]
    finally:
        await loaders.aclose()
    tracebacks = [record for record in caplog.records if record.exc_info]
    assert len(tracebacks) == 1, "the same one each time is noise"


async def test_an_edit_of_the_catalog_tries_a_broken_model_at_once(
    loaders: TextLoaders, hub: Hub
) -> None:
    hub.broken[BROKEN] = "The hub is away."
    before = await loaders.follow(CATALOG)
    await all_tried(before)
    del hub.broken[BROKEN]
    after = await loaders.follow({**CATALOG, "four": model("four")})
    await until(lambda: statuses(after) == ["ready"] * 4)
    assert [after[name] for name in CATALOG] == list(before.values()), "what is loaded is kept"
    assert (hub.attempts["hf://org/one"], hub.attempts[BROKEN]) == (1, 2)


async def test_correcting_a_broken_model_loads_it(loaders: TextLoaders, hub: Hub) -> None:
    hub.broken["hf://org/tow"] = "There is no such repository."
    wrong = await loaders.follow({**CATALOG, "two": model("two", source="hf://org/tow")})
    await all_tried(wrong)
    assert statuses(wrong) == ["ready", "failed", "ready"]
    catalog = await loaders.follow(CATALOG)
    await all_tried(catalog)
    assert statuses(catalog) == ["ready"] * 3


async def test_a_slow_model_delays_no_other_one(loaders: TextLoaders, hub: Hub) -> None:
    with hub.holding(BROKEN):
        catalog = await loaders.follow(CATALOG)
        await until(lambda: statuses(catalog) == ["ready", "starting", "ready"])
    await all_tried(catalog)
    assert statuses(catalog) == ["ready"] * 3


async def test_a_model_is_served_as_before_until_its_edit_is_loaded(
    loaders: TextLoaders, hub: Hub
) -> None:
    before = await loaders.follow(CATALOG)
    await all_tried(before)
    with hub.holding(BROKEN):
        after = await loaders.follow({**CATALOG, "two": model("two", chat_template="other")})
        assert after["two"].text is before["two"].text is not None
    await all_tried(after)
    assert after["two"].text is not before["two"].text


async def test_a_wrong_edit_leaves_a_model_with_what_it_has_and_says_so(
    loaders: TextLoaders, hub: Hub
) -> None:
    before = await loaders.follow(CATALOG)
    await all_tried(before)
    hub.broken[BROKEN] = "There is no such template."
    after = await loaders.follow({**CATALOG, "two": model("two", chat_template="other")})
    await all_tried(after)
    assert after["two"].text is before["two"].text
    assert (after["two"].status("ready"), after["two"].failure) == (
        "ready",
        "There is no such template.",
    )


async def test_other_weights_are_never_served_with_a_former_tokenizer(
    loaders: TextLoaders, hub: Hub
) -> None:
    await all_tried(await loaders.follow(CATALOG))
    with hub.holding("hf://org/new"):
        after = await loaders.follow({"two": model("two", source="hf://org/new")})
        assert after["two"].text is None
        assert after["two"].status("ready") == "starting"


async def test_who_waits_for_a_model_that_is_removed_waits_no_longer(
    loaders: TextLoaders, hub: Hub
) -> None:
    with hub.holding(BROKEN):
        catalog = await loaders.follow(CATALOG)
        assert await loaders.follow({}) == {}
        await all_tried(catalog)
        assert catalog["two"].text is None


async def test_replicas_that_do_not_start_are_a_failure_too(loaders: TextLoaders) -> None:
    catalog = await loaders.follow(CATALOG)
    await all_tried(catalog)
    assert catalog["one"].status("failed") == "failed"
    assert catalog["one"].status("scaled_to_zero") == "scaled_to_zero"


async def test_loaders_leave_no_task_behind(hub: Hub) -> None:
    hub.broken[BROKEN] = "The hub is away."
    before = asyncio.all_tasks()
    loaders = TextLoaders(hub.load, changed=hub.changed, first_pause_s=NEVER_S)
    await all_tried(await loaders.follow(CATALOG))
    await loaders.aclose()
    assert asyncio.all_tasks() == before

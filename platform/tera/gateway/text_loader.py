"""Loads a model's text side beside everything else, and again after it could not be loaded."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Final

from tera.background import Background
from tera.config.model import ModelConfig
from tera.contract.common import ModelStatus
from tera.gateway.failure import reason_of
from tera.gateway.render import TextModel

log = logging.getLogger(__name__)

FIRST_PAUSE_S: Final = 1.0
LONGEST_PAUSE_S: Final = 60.0
"""Bounds of the pause after a failure, which doubles each time."""
MOST_AT_ONCE: Final = 32
"""Models that are loaded at a time."""


class TextLoader(Background):
    """Has the text side of one model once it could be loaded, as long as its block runs.

    A model that cannot be loaded is a matter of this model alone: nothing is raised, the reason is
    kept, and loading is tried again after a pause or at `try_now`.
    """

    def __init__(
        self,
        model: str,
        load: Callable[[], TextModel],
        threads: Executor,
        *,
        changed: Callable[[], None],
        instead: TextModel | None = None,
        first_pause_s: float = FIRST_PAUSE_S,
    ) -> None:
        """Prepare to load it.

        Args:
            model: its name in the values.
            load: loads it, which may take long.
            threads: where it is called.
            changed: called after each attempt, in the event loop.
            instead: what the model has until it could be loaded.
            first_pause_s: the pause after the first failure.
        """
        self.text = instead
        """None until there is one."""
        self.failure = ""
        """Why the last attempt failed, for operators; empty if it did not."""
        self._model = model
        self._load = load
        self._threads = threads
        self._changed = changed
        self._first_pause_s = first_pause_s
        self._tried = asyncio.Event()
        self._again = asyncio.Event()

    def status(self, served: ModelStatus) -> ModelStatus:
        """Return the model's status, where `served` is that of its replicas."""
        if self.text is not None or served == "failed":
            return served
        return "failed" if self.failure else "starting"

    async def tried(self) -> None:
        """Return once it has been loaded, or could not be, or the block has ended."""
        await self._tried.wait()

    def try_now(self) -> None:
        """Try again without a pause if loading has failed; `tried` then waits for the outcome."""
        if self.failure:
            self._tried.clear()
        self._again.set()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop trying; a thread that is loading is left to end by itself."""
        await super().__aexit__(exc_type, exc, traceback)
        self._tried.set()

    async def _run(self) -> None:
        pause_s = self._first_pause_s
        while True:
            self._again.clear()  # before the attempt: who asks during it has edited something
            if await self._attempt():
                return
            try:
                async with asyncio.timeout(pause_s):
                    await self._again.wait()
            except TimeoutError:
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            else:
                pause_s = self._first_pause_s

    async def _attempt(self) -> bool:
        try:
            loop = asyncio.get_running_loop()
            self.text = await loop.run_in_executor(self._threads, self._load)
        except Exception as error:  # of vLLM, or of a model's own files: no other model's matter
            known, self.failure = self.failure, reason_of(error)
            # Its traceback once, and not again each minute.
            news = self.failure != known
            log.error(
                "The text side of %s cannot be loaded: %s",
                self._model,
                self.failure,
                exc_info=news,
            )
        else:
            if self.failure:
                log.info("The text side of %s could be loaded at last.", self._model)
            self.failure = ""
        self._tried.set()
        self._changed()
        return not self.failure


class TextLoaders:
    """The loaders of a catalog's models: a slow or broken model holds up no other one."""

    def __init__(
        self,
        load: Callable[[ModelConfig], TextModel],
        *,
        changed: Callable[[], None],
        first_pause_s: float = FIRST_PAUSE_S,
    ) -> None:
        """See `TextLoader`; `load` may be called in several threads at once."""
        self._load = load
        self._changed = changed
        self._first_pause_s = first_pause_s
        self._loaders: dict[str, tuple[ModelConfig, TextLoader]] = {}
        # Threads of their own: a hub that does not answer holds them for minutes.
        self._threads = ThreadPoolExecutor(MOST_AT_ONCE, "text-loader")

    async def follow(self, configs: Mapping[str, ModelConfig]) -> dict[str, TextLoader]:
        """Return the loader of each model of an edited catalog, and end the others.

        What is loaded is kept where the edit does not concern it, and what could not be loaded is
        tried again now.
        """
        before = self._loaders
        self._loaders = {
            name: (config, await self._loader(name, config, before.get(name)))
            for name, config in configs.items()
        }
        loaders = {name: loader for name, (_, loader) in self._loaders.items()}
        for _, old in before.values():
            if old not in loaders.values():
                await old.__aexit__(None, None, None)
        return loaders

    async def _loader(
        self, name: str, config: ModelConfig, before: tuple[ModelConfig, TextLoader] | None
    ) -> TextLoader:
        instead = None
        if before is not None:
            old, loader = before
            if (old.engine, old.source) == (config.engine, config.source):
                loader.try_now()
                return loader
            # The tokens of the same weights mean the same, whatever else is edited: if the edit is
            # wrong, the model goes on with what it has.
            if (old.engine.kind, old.source) == (config.engine.kind, config.source):
                instead = loader.text
        return await TextLoader(
            name,
            partial(self._load, config),
            self._threads,
            changed=self._changed,
            instead=instead,
            first_pause_s=self._first_pause_s,
        ).__aenter__()

    async def aclose(self) -> None:
        """End all of them."""
        await self.follow({})
        self._threads.shutdown(wait=False, cancel_futures=True)

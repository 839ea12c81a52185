"""A simulated model's `engine.args`: how fast it is, and what goes wrong."""

from typing import Any, Self

from pydantic import Field, ValidationError

from tera.config.faults import faults
from tera.config.section import Section
from tera.engine.simulated_prefix_cache import BLOCK_TOKENS
from tera.errors import ConfigError


class Profile(Section):
    """How fast the engine is and how large its KV cache is."""

    prefill_tokens_per_s: float = Field(default=20_000, ge=0)
    """0 makes prefill take no time."""
    decode_step_s: float = Field(default=0.01, ge=0)
    """Duration of a step, which gives every running generation a token; 0 is as fast as it can."""
    max_running: int = Field(default=64, ge=1)
    startup_s: float = Field(default=0, ge=0)
    context_tokens: int = Field(default=8192, ge=2)
    kv_tokens: int = Field(default=262_144, ge=BLOCK_TOKENS)
    """Size of the KV cache. Nothing is preempted when running generations outgrow it."""


class Faults(Section):
    """What goes wrong, for every prompt or for those that contain a marker."""

    only_prompts_with: str = ""
    """Only prompts that contain this text are affected; empty affects every prompt."""
    fail_start: bool = False
    """The engine never starts, whatever the prompts."""
    refuse: bool = False
    """The generation is refused as an invalid request."""
    fail_after_tokens: int | None = Field(default=None, ge=0)
    """The generation fails after this many tokens, and the engine continues."""
    stall_after_tokens: int | None = Field(default=None, ge=0)
    """The engine makes no further step after this many tokens."""
    die_after_tokens: int | None = Field(default=None, ge=0)
    """The process ends after this many tokens, as if killed."""
    slow_step_s: float = Field(default=0, ge=0)
    """Added to the duration of each step in which the generation runs."""


class SimulatedArgs(Section):
    """A simulated model's `engine.args`."""

    profile: Profile = Profile()
    faults: Faults = Faults()

    @classmethod
    def parse(cls, values: Any) -> Self:
        """Return the parsed arguments; null means that an argument is absent.

        A values file that replaces another engine with this one sets the other's arguments to null.

        Raises:
            ConfigError: one line per fault, each beginning with the path of the value.
        """
        try:
            given = {name: value for name, value in values.items() if value is not None}
            return cls.model_validate(given)
        except ValidationError as error:
            lines = faults(error, below=("engine", "args"))
            raise ConfigError("\n".join(lines)) from error

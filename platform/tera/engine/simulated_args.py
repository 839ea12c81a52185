"""What a simulated model's `engine.args` say: how fast it is, and what goes wrong."""

from typing import Any, Self

from pydantic import Field, ValidationError

from tera.config.faults import faults
from tera.config.section import Section
from tera.engine.simulated_prefix_cache import BLOCK_TOKENS
from tera.errors import ConfigError


class Profile(Section):
    """How fast the engine is and how much it holds."""

    prefill_tokens_per_s: float = Field(default=20_000, ge=0)
    """0 makes prefill take no time."""
    decode_step_s: float = Field(default=0.01, ge=0)
    """One token of every running generation; 0 goes as fast as it can."""
    max_running: int = Field(default=64, ge=1)
    startup_s: float = Field(default=0, ge=0)
    context_tokens: int = Field(default=8192, ge=2)
    kv_tokens: int = Field(default=262_144, ge=BLOCK_TOKENS)
    """Size of the KV cache. Nothing is preempted when running generations outgrow it."""


class Faults(Section):
    """What goes wrong, on every prompt or on those that hold a marker."""

    only_prompts_with: str = ""
    """Text that a prompt must hold to meet a fault; empty is every prompt."""
    fail_start: bool = False
    """The engine never starts, whatever the prompts."""
    refuse: bool = False
    """The generation is refused as an invalid request."""
    fail_after_tokens: int | None = Field(default=None, ge=0)
    """The generation fails, and the engine goes on."""
    stall_after_tokens: int | None = Field(default=None, ge=0)
    """The engine makes no further step."""
    die_after_tokens: int | None = Field(default=None, ge=0)
    """The process ends at once, as if killed."""
    slow_step_s: float = Field(default=0, ge=0)
    """Added to each step in which the generation runs."""


class SimulatedArgs(Section):
    """A simulated model's `engine.args`."""

    profile: Profile = Profile()
    faults: Faults = Faults()

    @classmethod
    def parse(cls, values: Any) -> Self:
        """Return the parsed arguments; one that is null is as if it was not there.

        A values file that puts this engine in the place of another sets the other's to null.

        Raises:
            ConfigError: one line for each fault, each beginning with the path of the value.
        """
        try:
            given = {name: value for name, value in values.items() if value is not None}
            return cls.model_validate(given)
        except ValidationError as error:
            lines = faults(error, below=("engine", "args"))
            raise ConfigError("\n".join(lines)) from error

"""The base of every part of the configuration."""

from collections.abc import Set
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.alias_generators import to_camel

from tera.config.faults import faults
from tera.errors import ConfigError


class Section(BaseModel):
    """Base of every part: immutable, and unknown keys are refused.

    In Python its fields have snake_case names. Files, Ray Serve and Redis hold its *file form*:
    plain values under camelCase keys.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        use_attribute_docstrings=True,
    )

    @classmethod
    def parse(cls, values: Any) -> Self:
        """Return the section that values in the file form describe.

        Raises:
            ConfigError: one line per fault, each beginning with the path of the value.
        """
        try:
            return cls.model_validate(values, by_alias=True, by_name=False)
        except ValidationError as error:
            raise ConfigError("\n".join(faults(error))) from error

    def file_form(
        self,
        *,
        exclude_none: bool = False,
        exclude_defaults: bool = False,
        exclude: Set[str] = frozenset(),
    ) -> dict[str, Any]:
        """Return the file form, which `parse` reads back: values that JSON and YAML can hold.

        Args:
            exclude_none: leave out values that are None.
            exclude_defaults: leave out values that equal the defaults.
            exclude: names of fields to leave out.
        """
        return self.model_dump(
            mode="json",
            by_alias=True,
            exclude_none=exclude_none,
            exclude_defaults=exclude_defaults,
            exclude=set(exclude),
        )

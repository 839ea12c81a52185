"""Where a model's weights are."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Self, get_args

Scheme = Literal["hf", "s3", "gs", "pvc", "file", "demo"]

_SCHEMES: Final[dict[str, Scheme]] = {scheme: scheme for scheme in get_args(Scheme)}


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model's `source`, such as hf://org/name@v1, in its parts."""

    scheme: Scheme
    location: str
    """What follows the scheme, without a revision: a hub's name, a bucket and path, a directory."""
    revision: str = ""
    """Of an hf:// source: a branch, tag or commit; empty is the hub's default."""

    @classmethod
    def parse(cls, source: str) -> Self:
        """Return the parts of a source.

        Raises:
            ValueError: it has no scheme that is known, or nothing behind it.
        """
        prefix, _, rest = source.partition("://")
        scheme = _SCHEMES.get(prefix)
        if scheme is None or not rest:
            wanted = ", ".join(f"{each}://" for each in _SCHEMES)
            raise ValueError(f"source {source!r} must begin with one of {wanted}")
        if scheme != "hf":
            return cls(scheme, rest)
        location, _, revision = rest.partition("@")
        return cls(scheme, location, revision)

    @property
    def needs_hub(self) -> bool:
        """Whether the weights may have to come from elsewhere than this machine."""
        return self.scheme not in ("demo", "file")

    def engine_path(self, home: Path, dtype: str) -> str:
        """Return what vLLM loads: a directory, or a name that it resolves itself.

        Args:
            home: this machine's state, in which demo models are made.
            dtype: the model's, in which a demo model is made.
        """
        if self.scheme == "demo":
            return str(home / "models" / f"{self.location}-{dtype}")
        if self.scheme in ("s3", "gs"):
            # vLLM streams from object stores by their whole address.
            return f"{self.scheme}://{self.location}"
        return self.location

    def revision_args(self) -> dict[str, str]:
        """Return vLLM's arguments for the revision; none for the default one."""
        if not self.revision:
            return {}
        return {"revision": self.revision, "tokenizer_revision": self.revision}

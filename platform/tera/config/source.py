"""Where a model's weights are."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Self, get_args

Scheme = Literal["hf", "s3", "gs", "file", "demo"]

_SCHEMES: Final[dict[str, Scheme]] = {scheme: scheme for scheme in get_args(Scheme)}

_INSTEAD: Final = {
    "pvc": "mount the claim with modelCache.existingClaim and write file:///models/PATH",
    "oci": "build the model into the image, or copy it to a volume, and write file:///PATH",
}
"""Schemes that are known elsewhere, and what serves the same purpose."""

_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")

OBJECT_STORES: Final = ("s3", "gs")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model's `source`, such as hf://org/name@v1, in its parts."""

    scheme: Scheme
    location: str
    """The part after the scheme, without a revision: a repository, a bucket and path, or a
    directory."""
    revision: str = ""
    """The branch, tag or commit of an hf:// source; empty means the hub's default."""

    @classmethod
    def parse(cls, source: str) -> Self:
        """Return the parts of a source.

        Raises:
            ValueError: the scheme is unknown, or what follows it does not name a model.
        """
        prefix, _, rest = source.partition("://")
        if instead := _INSTEAD.get(prefix):
            raise ValueError(f"source {source!r} is not supported; {instead}")
        scheme = _SCHEMES.get(prefix)
        if scheme is None or not rest:
            wanted = ", ".join(f"{each}://" for each in _SCHEMES)
            raise ValueError(f"source {source!r} must begin with one of {wanted}")
        if scheme == "file" and not rest.startswith("/"):
            # vLLM would take a relative path for the name of a repository.
            raise ValueError(
                f"source {source!r} is not an absolute path; write file:///models/PATH"
            )
        if scheme != "hf":
            return cls(scheme, rest)
        location, _, revision = rest.partition("@")
        if not _REPOSITORY.fullmatch(location):
            raise ValueError(f"source {source!r} does not name a repository; write hf://org/name")
        return cls(scheme, location, revision)

    @property
    def needs_hub(self) -> bool:
        """Whether the weights may have to be downloaded."""
        return self.scheme not in ("demo", "file")

    def engine_path(self, home: Path, dtype: str) -> str:
        """Return what to tell vLLM to load: a directory, or a name that it resolves itself.

        Args:
            home: the directory of this machine's state, where demo models are built.
            dtype: the model's dtype; a demo model is built with it.
        """
        if self.scheme == "demo":
            return str(home / "models" / f"{self.location}-{dtype}")
        if self.scheme in OBJECT_STORES:
            # vLLM streams from object stores and wants the whole address.
            return f"{self.scheme}://{self.location}"
        return self.location

    def revision_args(self) -> dict[str, str]:
        """Return vLLM's arguments for the revision; empty for the default revision."""
        if not self.revision:
            return {}
        return {"revision": self.revision, "tokenizer_revision": self.revision}

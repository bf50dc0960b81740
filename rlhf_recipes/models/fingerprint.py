"""Fingerprints of models: hashes that tell whether two models are the same, without reading every byte."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig
from torch import nn

ADAPTER_CONFIG = "adapter_config.json"
PIECES, PIECE_BYTES = 4, 4_096  # read from every tensor of a file
SAMPLED_VALUES = 256  # read from every tensor of a model in memory
BASE_FILES = "model*.safetensors"
# Entries of a configuration that describe its file, and not the function that the weights compute.
INCIDENTAL = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}


def is_adapter(path: str) -> bool:
    """Return whether a local directory holds a PEFT adapter."""
    return Path(path, ADAPTER_CONFIG).is_file()


def fingerprint(model: Any) -> str:
    """Return a text that identifies a model or a reward function.

    Args:
        model: Path: gives a hash of its files, and of its base's if it is an adapter. Module: gives a hash of sampled
            weights. Anything else: gives its name.
    """
    if isinstance(model, nn.Module):
        return fingerprint_of_weights(model)
    if not isinstance(model, str):
        return str(getattr(model, "__name__", type(model).__name__))
    if not is_adapter(model):
        return fingerprint_of_files(model)
    base = PeftConfig.from_pretrained(model).base_model_name_or_path
    return f"{weights_fingerprint(model)} on {fingerprint_of_files(base)}"


def fingerprint_of_files(path: str) -> str:
    """Return a hash of the files of a model; the path itself where there are no files."""
    try:
        return base_fingerprint(path, local_files_only=True) or path
    except (OSError, ValueError):  # an address, or a model that the Hub's cache does not hold
        return path


@torch.no_grad()
def fingerprint_of_weights(model: nn.Module) -> str:
    """Return a hash of some values of every tensor of a model."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        values = tensor.flatten()
        sample = values[:: max(1, len(values) // SAMPLED_VALUES)].cpu().contiguous()
        digest.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def base_fingerprint(path: str, revision: str | None = None, *, local_files_only: bool = False) -> str | None:
    """Return the fingerprint of a base model; `None` if it has no safetensors files.

    Args:
        path: Directory, or name on the Hub.
        revision: Revision on the Hub.
        local_files_only: Whether to read only the Hub's cache.

    Raises:
        OSError: If the model is neither here nor on the Hub.
        ValueError: If the path is neither a directory nor a possible name on the Hub.
    """
    if not Path(path).is_dir():
        patterns = ["config.json", f"{BASE_FILES}*"]
        path = snapshot_download(path, revision=revision, allow_patterns=patterns, local_files_only=local_files_only)
    return weights_fingerprint(path, BASE_FILES)


def weights_fingerprint(directory: str | Path, pattern: str = "*.safetensors") -> str | None:
    """Return a hash of the weights in a directory; `None` if it has none.

    The hash covers `config.json`, and the name, type and shape of every tensor. It covers all bytes of a short tensor,
    and four evenly spaced pieces of 4 KiB of a longer one. The division of the tensors into files does not matter.

    Another training changes nearly every value, so the hash tells its weights apart. It misses a change of a few rows,
    and it does not stop somebody who forges a match.

    Args:
        directory: Directory with safetensors files.
        pattern: Pattern of the files to read.
    """
    tensors = [tensor for file in sorted(Path(directory).glob(pattern)) for tensor in _tensors(file)]
    if not tensors:
        return None
    digest = hashlib.sha256(json.dumps(_config(Path(directory)), sort_keys=True).encode())
    for name, (description, content) in sorted(tensors):
        digest.update(json.dumps([name, description]).encode() + content)
    return digest.hexdigest()[:16]


def _config(directory: Path) -> dict[str, Any]:
    file = directory / "config.json"
    options = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {name: x for name, x in options.items() if name not in INCIDENTAL and not name.startswith("_")}


def _tensors(path: Path) -> list[tuple[str, tuple[list[Any], bytes]]]:
    with path.open("rb") as file:
        # A file begins with the length of its header in eight bytes. Offsets count from the end of the header.
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found = []
        for name, entry in header.items():
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            pieces = [(begin, end - begin)]
            if end - begin > PIECES * PIECE_BYTES:
                stride = (end - begin - PIECE_BYTES) // (PIECES - 1)
                pieces = [(begin + piece * stride, PIECE_BYTES) for piece in range(PIECES)]
            content = b""
            for start, size in pieces:
                file.seek(start)
                content += file.read(size)
            found.append((name, ([entry["dtype"], entry["shape"]], content)))
    return found

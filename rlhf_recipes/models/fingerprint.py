"""Whether two directories hold the same weights, told without reading all of them."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn

PIECES, PIECE_BYTES = 4, 4_096  # read of every tensor
BASE_FILES = "model*.safetensors"
# What a configuration says about the file that it stands in, and not about the function that the weights compute.
INCIDENTAL = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}


def weights_fingerprint(directory: str | Path, pattern: str = "*.safetensors") -> str | None:
    """Return a hash of the weights in a directory; `None` if it has none.

    It covers `config.json`, the name, type and shape of every tensor, and of its bytes four pieces of 4 KiB, evenly
    spread, or all of them if it is no longer. How the tensors are spread over files does not matter. Weights of
    another training differ nearly everywhere, so that this tells them apart; it does not see a change of a few rows,
    and it is no defence against somebody who wants it to match.

    Args:
        directory: Holds files of safetensors.
        pattern: Of the files that count.
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
    return {name: value for name, value in options.items() if name not in INCIDENTAL}


def _tensors(path: Path) -> list[tuple[str, tuple[list[Any], bytes]]]:
    with path.open("rb") as file:
        # A file begins with the length of its header in eight bytes, and offsets count from the header's end.
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


def base_fingerprint(path: str, revision: str | None = None, *, local_files_only: bool = False) -> str | None:
    """Return the fingerprint of a base model; `None` if it has no files of safetensors.

    Args:
        path: Directory or Hub name.
        revision: On the Hub.
        local_files_only: Whether only what the Hub's cache holds may be read.

    Raises:
        OSError: If it is neither here nor on the Hub.
        ValueError: If it is neither a directory nor a possible name on the Hub.
    """
    if not Path(path).is_dir():
        patterns = ["config.json", f"{BASE_FILES}*"]
        path = snapshot_download(path, revision=revision, allow_patterns=patterns, local_files_only=local_files_only)
    return weights_fingerprint(path, BASE_FILES)


SAMPLED_VALUES = 256  # of every tensor of a model that was given as an instance


def fingerprint_of_files(path: str) -> str:
    """Return a hash of the files of a model; the path itself where there are no files."""
    try:
        return base_fingerprint(path, local_files_only=True) or path
    except (OSError, ValueError):  # an address, or loaded from the Hub by something that left no file
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

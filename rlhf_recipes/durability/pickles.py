"""Find code in the pickles of a checkpoint before anything loads them.

transformers and accelerate load pickles by torch's safe unpickler. DeepSpeed and torch's sharded checkpoints do not.
So every pickle is taken apart here, without running it, and each name that it calls must be on a list.
"""

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.utils import _create_file_view  # with which torch reads the parts of a shard
from torch.serialization import get_unsafe_globals_in_checkpoint

ENDINGS = {".bin", ".ckpt", ".distcp", ".pkl", ".pickle", ".pt", ".pth"}
PICKLE_STARTS = (b"PK\x03\x04", b"\x80")  # an archive of torch, a pickle by itself
METADATA = ".metadata"  # the end of the name of a list of shards
SHARD = ".distcp"
UNREAD = "training_args.bin"  # transformers writes it, and nothing reads it
TAGS = ("latest", "latest_universal")  # files of DeepSpeed that hold the name of a folder
# Names that genuine checkpoints need, beside those of torch's own list. None of them calls its arguments.
ALLOWED = {
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.dtypes.UInt32DType",
    "numpy.ndarray",
}
SHARDED = "torch.distributed.checkpoint"
ALLOWED_IN_METADATA = {
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    (f"{SHARDED}.filesystem", "_StorageInfo"),
    *((f"{SHARDED}.metadata", f"{kind}StorageMetadata") for kind in ("Bytes", "Chunk", "Tensor")),
    *((f"{SHARDED}.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    (f"{SHARDED}.metadata", "_MEM_FORMAT_ENCODING"),
    *(("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
}
FILLED = ("Metadata", "_StorageInfo")

# Bytes that are no pickle fail by any of these.
_UNPICKLING = (
    *(pickle.UnpicklingError, EOFError, MemoryError),
    *(AttributeError, AssertionError, IndexError, KeyError, TypeError),
)


class _Refused(ValueError):
    """A file that must not be loaded, as the end of a sentence."""


def refuse_code(checkpoint: str | Path) -> None:
    """Check that a checkpoint can be loaded without running code that is hidden in it. Nothing is loaded.

    Raises:
        ValueError: If one of its files may run code, or cannot be checked.
    """
    folder = Path(checkpoint)
    for path in _files(folder):
        try:
            _check(folder, path)
        except (OSError, RuntimeError, ValueError, *_UNPICKLING) as error:
            reason = str(error) if isinstance(error, _Refused) else f"cannot be read ({str(error).partition('. ')[0]})"
            raise ValueError(
                f"{checkpoint} may run code when it is loaded: {path.relative_to(folder)} {reason}. Nothing of it was "
                "loaded. Resume from a checkpoint that you trust, as this library wrote it."
            ) from None


def _files(folder: Path) -> Iterator[Path]:
    """Return all files, through links too: a library would follow them."""
    for directory, _, names in os.walk(folder, followlinks=True):
        if Path(directory).is_symlink() and Path(directory) != folder:
            yield Path(directory)
            return
        yield from (Path(directory, name) for name in sorted(names) if Path(directory, name).exists())


def _check(folder: Path, path: Path) -> None:
    """Check one file. Any error means that it may run code."""
    if not path.is_file():
        raise _Refused("is a link to a folder, or no file")
    if path.parent == folder and path.name in TAGS:
        _check_tag(path.read_text(encoding="utf-8").strip())
    elif path.name == UNREAD or path.suffix == ".safetensors":
        return
    elif path.name.endswith(METADATA):
        _check_shards(path)
    elif path.suffix != SHARD and (path.suffix in ENDINGS or _start(path).startswith(PICKLE_STARTS)):
        with path.open("rb") as file:
            _check_archive(file)


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4)


def _check_tag(tag: str) -> None:
    if Path(tag).name != tag or tag in ("", "..", "."):
        raise _Refused("names a folder outside of the checkpoint")


def _check_archive(file: Any) -> None:
    """Check a file, or a part of one, as `torch.save` writes it. torch takes it apart, and refuses TorchScript."""
    unknown = sorted(set(get_unsafe_globals_in_checkpoint(file)) - ALLOWED)
    if unknown:
        raise _Refused(f"calls {', '.join(map(repr, unknown))}")


def _check_shards(metadata: Path) -> None:
    """Check a list of shards, and then each part of a shard that it names."""
    with metadata.open("rb") as file:
        found = _InertUnpickler(file).load()
    if type(found).__name__ != FILLED[0]:
        raise _Refused("is no list of shards")
    for part in found.attributes.get("storage_data", {}).values():
        if type(part).__name__ != FILLED[1]:
            raise _Refused("finds its parts in another way than torch")
        name = part.attributes["relative_path"]
        if Path(name).name != name or not name.endswith(SHARD) or part.attributes.get("transform_descriptors"):
            raise _Refused(f"reads {name!r}, which is no plain shard beside it")
        with (metadata.parent / name).open("rb") as file:
            _check_archive(_create_file_view(file, part.attributes["offset"], part.attributes["length"]))


class _Inert:
    """Stand in for an object of a pickle: it keeps its attributes, and does nothing."""

    attributes: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Inert":
        """Make a stand-in. Genuine objects with attributes that are read here get them afterwards."""
        if (args or kwargs) and cls.__name__ in FILLED:
            raise _Refused(f"makes a {cls.__name__} in another way than torch")
        made = super().__new__(cls)
        made.attributes = {}
        return made

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.attributes.update(state)
        elif type(self).__name__ in FILLED:
            raise _Refused(f"fills a {type(self).__name__} in another way than torch")


class _InertUnpickler(pickle.Unpickler):
    """Read a pickle with stand-ins for all that it names."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a stand-in for a name.

        Raises:
            ValueError: If the name is not on the list.
        """
        if (module, name) not in ALLOWED_IN_METADATA:
            raise _Refused(f"calls '{module}.{name}'")
        return type(name, (_Inert,), {})

    def persistent_load(self, pid: Any) -> Any:
        """Refuse an object that is stored elsewhere.

        Raises:
            ValueError: Always.
        """
        raise _Refused("refers to an object outside of it")

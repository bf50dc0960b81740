"""No code that is hidden in a checkpoint runs when a run resumes, whichever engine has written it."""

import collections
import io
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import pytest
import tiny
import torch
from processes import run_in_processes
from torch.distributed import checkpoint as sharded
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from rlhf_recipes.durability import pickles
from rlhf_recipes.durability.checkpoints import STAGING, publish
from rlhf_recipes.durability.pickles import refuse_code
from rlhf_recipes.trainers.sft import SFTTrainer

pytestmark = pytest.mark.tiny


class Call:
    """An object whose pickle calls a function."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def _touch(mark):
    return Call(os.system, f"touch {mark}")


def _archive(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def _tar(content):
    """Return torch's first format, which it still reads."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:") as tar:
        for name in ("storages", "tensors", "pickle"):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


class TwoLines(torch.nn.Module):
    """A model for TorchScript."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def _torchscript(mark):
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(TwoLines()), buffer)
    return buffer.getvalue()


def _named(module, name, mark):
    """Return a pickle of protocol 4 that names a function by text, as no `torch.save` writes it."""
    texts = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
    command = f"touch {mark}".encode()
    return b"\x80\x04" + texts + b"\x93X" + len(command).to_bytes(4, "little") + command + b"\x85R."


HOSTILE = {
    "a call": lambda mark: _archive({"state": _touch(mark)}),
    "a call of builtins": lambda mark: _archive(Call(eval, f"open({str(mark)!r}, 'w')")),
    "a call by getattr": lambda mark: _archive(Call(getattr, {}, "get")),
    "a call inside of an allowed one": lambda mark: _archive(Call(collections.OrderedDict, [("a", _touch(mark))])),
    "a rebuilt tensor": lambda mark: _archive(
        Call(torch._tensor._rebuild_from_type_v2, os.system, torch.Tensor, (f"touch {mark}",), {})
    ),
    "a pickle in a pickle": lambda mark: _archive(Call(pickle.loads, pickle.dumps(_touch(mark)))),
    "an archive in an archive": lambda mark: _archive(Call(torch.load, io.BytesIO(_archive(_touch(mark))))),
    "protocol 4 in an archive": lambda mark: _archive(_touch(mark), pickle_protocol=4),
    "the old format": lambda mark: _archive(_touch(mark), _use_new_zipfile_serialization=False),
    "a pickle": lambda mark: pickle.dumps(_touch(mark)),
    "a pickle of protocol 0": lambda mark: pickle.dumps(_touch(mark), protocol=0),
    "a name with dots": lambda mark: _named("torch", "serialization.os.system", mark),
    "the opcode INST": lambda mark: b"(S'touch " + str(mark).encode() + b"'\nios\nsystem\n.",
    "a tar": lambda mark: _tar(pickle.dumps(_touch(mark))),
    "TorchScript": _torchscript,
    "no pickle": lambda mark: b"cos\nsystem",
    "an archive without a pickle": lambda mark: b"PK\x05\x06" + bytes(18),
    "half an archive": lambda mark: _archive({"a": torch.ones(99)})[:300],
}  # fmt: skip
each_kind = pytest.mark.parametrize("kind", HOSTILE)


def _zero(stage):
    """Return the content of DeepSpeed's files by name, as it writes them on two ranks; see `test_launches.py`."""
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    parameter = torch.nn.Parameter(torch.ones(3))
    model = {"module": collections.OrderedDict(weight=torch.ones(3)), "ds_config": {"bf16": {"enabled": True}}}
    state = {
        "zero_stage": ZeroStageEnum(stage),
        "loss_scaler": [LossScaler(1.0), DynamicLossScaler(2.0**16, 2.0, 1000, 1.0, 1)],
        "param_slice_mappings": [collections.OrderedDict(weight=fragment_address(numel=3, start=0))],
        "base_optimizer_state": {"state": {0: {"exp_avg": parameter.data, "step": 4}}, "param_groups": [{"lr": 0.1}]},
        "shapes": [collections.OrderedDict(weight=torch.Size([3]))],
    }
    names = ["mp_rank_00"] if stage == 2 else [f"zero_pp_rank_{rank}_mp_rank_00" for rank in range(2)]
    files = {f"global_step4/{name}_model_states.pt": _archive(model) for name in names}
    files |= {f"global_step4/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt": _archive(state) for rank in range(2)}
    return files | {"latest": b"global_step4", "zero_to_fp32.py": b"import os\n"}


def _sharded(folder):
    """Write what FSDP2 writes with `SHARDED_STATE_DICT`: tensors, and other objects as pickles of their own."""
    states = {"pytorch_model_fsdp_0": {"model": {"weight": torch.ones(3)}}}
    states["optimizer_0"] = {
        "optimizer": {"state": {"exp_avg": torch.ones(3)}, "param_groups": {"betas": (0.9, 0.95)}}
    }
    for name, state in states.items():
        sharded.save(state, checkpoint_id=folder / name, no_dist=True)


ENGINES = ("plain", "ddp", "zero2", "zero3", "sharded")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Return a real checkpoint of PPO in one process."""
    directory = tmp_path_factory.mktemp("plain")
    tiny.ppo_trainer(directory, max_steps=2, save_strategy="steps", save_steps=2).train()
    return directory / "checkpoint-2"


@pytest.fixture
def checkpoint(request, plain, tmp_path):
    """Return a checkpoint of an engine, with its files as that engine writes them."""
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(plain, folder)
    if request.param == "ddp":
        for kind in ("rng_state.pth", "ppo_progress_0.pt"):
            shutil.copy(folder / kind, folder / kind.replace("state", "state_1").replace("0", "1"))
    elif request.param.startswith("zero"):
        (folder / "optimizer.pt").unlink()
        (folder / "global_step4").mkdir()
        for name, content in _zero(int(request.param[-1])).items():
            (folder / name).write_bytes(content)
    elif request.param == "sharded":
        _sharded(folder)
    return folder


def _save_on_a_rank(rank, world_size, folder):
    """Save a model and its optimizer as accelerate saves those of FSDP2."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    states = {"pytorch_model_fsdp_0": {"model": get_model_state_dict(model)}}
    states["optimizer_0"] = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    for name, state in states.items():
        writer, planner = sharded.FileSystemWriter(f"{folder}/{name}"), sharded.DefaultSavePlanner()
        sharded.save(state, storage_writer=writer, planner=planner)


@pytest.mark.slow(reason="two processes write the same kind of files that one writes below")
@pytest.mark.distributed
def test_what_two_ranks_of_fsdp2_write_is_not_refused(tmp_path):
    run_in_processes(_save_on_a_rank, 2, str(tmp_path))
    assert len(list(tmp_path.rglob("*.distcp"))) == 4
    refuse_code(tmp_path)
    for shard in tmp_path.rglob("*.distcp"):
        before = shard.read_bytes()
        shard.write_bytes(before.replace(b"OrderedDict", b"UserStrings"))
        with pytest.raises(ValueError, match=r"may run code .*/\.metadata calls 'collections\.UserStr"):
            refuse_code(tmp_path)
        shard.write_bytes(before)


each_engine = pytest.mark.parametrize("checkpoint", ENGINES, indirect=True)


@each_engine
def test_what_an_engine_writes_is_not_refused(checkpoint):
    refuse_code(checkpoint)


@each_engine
def test_a_call_in_any_file_is_refused_and_does_not_run(checkpoint, tmp_path):
    """Of the files that are no pickles, safetensors and JSON are read by parsers, and the options are never read."""
    mark, found = tmp_path / "mark", 0
    for path in [path for path in checkpoint.rglob("*") if path.is_file()]:
        before = path.read_bytes()
        path.write_bytes(_archive(_touch(mark)))
        if path.name in ("model.safetensors", "training_args.bin"):
            refuse_code(checkpoint)
        else:
            found += 1
            name = path.relative_to(checkpoint)
            name = name.with_name(".metadata") if path.suffix == ".distcp" else name  # which lists its parts
            with pytest.raises(ValueError, match=f"may run code when it is loaded: {name} "):
                refuse_code(checkpoint)
        path.write_bytes(before)
    assert found > 8
    refuse_code(checkpoint)
    assert not mark.exists()


@each_kind
@pytest.mark.parametrize("checkpoint", ["zero3"], indirect=True)
@pytest.mark.parametrize("name", ["scheduler.pt", "global_step4/zero_pp_rank_1_mp_rank_00_optim_states.pt"])
def test_each_kind_of_code_is_refused(checkpoint, tmp_path, name, kind):
    mark = tmp_path / "mark"
    (checkpoint / name).write_bytes(HOSTILE[kind](mark))
    with pytest.raises(ValueError, match=f"may run code when it is loaded: {name} "):
        refuse_code(checkpoint)
    assert not mark.exists()


def test_the_message_names_the_call(plain, tmp_path):
    folder = shutil.copytree(plain, tmp_path / "checkpoint-2")
    (folder / "scheduler.pt").write_bytes(_archive(_touch(tmp_path)))
    with pytest.raises(ValueError, match=r"scheduler.pt calls '(posix|nt).system'. Nothing of it was loaded"):
        refuse_code(folder)


def _metadata(folder):
    return folder / "optimizer_0" / ".metadata"


def _rewritten(folder, change):
    """Change the list of shards, as someone can who knows torch."""
    metadata = pickle.loads(_metadata(folder).read_bytes())
    change(metadata)
    _metadata(folder).write_bytes(pickle.dumps(metadata))


SHARD_KINDS = {
    "a call": lambda folder, mark: _metadata(folder).write_bytes(pickle.dumps(_touch(mark))),
    "a name with dots": lambda folder, mark: _metadata(folder).write_bytes(HOSTILE["a name with dots"](mark)),
    "a call beside the parts": lambda folder, mark: _rewritten(folder, lambda m: setattr(m, "modules", _touch(mark))),
    "a part of another class": lambda folder, mark: _rewritten(folder, _recast),
    "a list of another kind": lambda folder, mark: _metadata(folder).write_bytes(pickle.dumps(StorageMeta())),
    "another object": lambda folder, mark: _metadata(folder).write_bytes(pickle.dumps({"storage_data": {}})),
    "nothing": lambda folder, mark: _metadata(folder).write_bytes(b""),
    "a part elsewhere": lambda folder, mark: _rewritten(folder, lambda m: _point(m, relative_path="../scheduler.pt")),
    "a part in another file": lambda folder, mark: _rewritten(folder, lambda m: _point(m, relative_path=".metadata")),
    "a part behind the others": lambda folder, mark: _append(folder, mark),
    "a transformed part": lambda folder, mark: _rewritten(folder, lambda m: _point(m, transform_descriptors=["zstd"])),
    "a part of other kind": lambda folder, mark: _rewritten(folder, lambda m: m.storage_data.update(a=m)),
    "a part without a place": lambda folder, mark: _rewritten(folder, lambda m: _point(m, offset="0")),
    "no part": lambda folder, mark: _rewritten(folder, lambda m: setattr(m, "storage_data", 3)),
}  # fmt: skip


def _point(metadata, **changes):
    vars(next(iter(metadata.storage_data.values()))).update(changes)


def _recast(metadata):
    other, name = MetadataIndex("optimizer"), next(iter(metadata.storage_data))
    vars(other).update(vars(metadata.storage_data[name]))
    metadata.storage_data[name] = other


def _append(folder, mark):
    shard, content = folder / "optimizer_0" / "__0_0.distcp", _archive(_touch(mark))
    place = {"offset": shard.stat().st_size, "length": len(content)}
    shard.write_bytes(shard.read_bytes() + content)
    _rewritten(folder, lambda metadata: _point(metadata, **place))


@pytest.mark.parametrize("checkpoint", ["sharded"], indirect=True)
@pytest.mark.parametrize("kind", SHARD_KINDS)
def test_each_kind_of_code_in_shards_is_refused(checkpoint, tmp_path, kind):
    mark = tmp_path / "mark"
    SHARD_KINDS[kind](checkpoint, mark)
    with pytest.raises(ValueError, match="may run code when it is loaded: optimizer_0/"):
        refuse_code(checkpoint)
    assert not mark.exists()


def test_torch_would_run_the_code_of_a_part(tmp_path):
    """The attack of the test before works: without the check, loading creates the file."""
    mark = tmp_path / "mark"
    _sharded(tmp_path)
    _append(tmp_path, mark)
    metadata = pickle.loads(_metadata(tmp_path).read_bytes())
    hidden = next(iter(metadata.storage_data.values()))
    _rewritten(tmp_path, lambda metadata: metadata.storage_data.update(dict.fromkeys(metadata.storage_data, hidden)))
    state = {"optimizer": {"param_groups": {"betas": None}}}
    sharded.load(state, checkpoint_id=tmp_path / "optimizer_0", no_dist=True)
    assert mark.exists()


@pytest.mark.parametrize("tag", ["../elsewhere", "/tmp", "..", "", "global_step4/../../elsewhere"])
@pytest.mark.parametrize("checkpoint", ["zero2"], indirect=True)
def test_a_folder_outside_of_the_checkpoint_is_not_read(checkpoint, tag):
    (checkpoint / "latest").write_text(tag)
    with pytest.raises(ValueError, match="latest names a folder outside of the checkpoint"):
        refuse_code(checkpoint)


@pytest.mark.parametrize("checkpoint", ["zero2"], indirect=True)
def test_a_link_to_a_folder_is_not_followed(checkpoint, tmp_path):
    (checkpoint / "global_step4").rename(tmp_path / "elsewhere")
    (checkpoint / "global_step4").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="global_step4 is a link to a folder"):
        refuse_code(checkpoint)


@pytest.mark.parametrize("checkpoint", ["plain"], indirect=True)
def test_files_that_are_no_pickles_are_no_fault(checkpoint):
    for name, content in {"notes.txt": b"checked\nby me\n", "README.md": b"# good\n", "empty": b""}.items():
        (checkpoint / name).write_bytes(content)
    (checkpoint / "gone").symlink_to("nothing")
    refuse_code(checkpoint)


def test_the_names_on_the_list_are_those_of_the_libraries():
    """A name that a library moves is no longer needed. Nothing that pickle renames for Python 2 may be on the list."""
    for module, name in pickles.ALLOWED_IN_METADATA:
        assert hasattr(__import__(module, fromlist=[name]), name)
        assert (module, name) not in torch._utils.NAME_MAPPING
        assert module not in torch._utils.IMPORT_MAPPING


def _sft(directory, **options):
    from datasets import Dataset
    from trl import SFTConfig

    tok = tiny.tokenizer()
    args = SFTConfig(
        str(directory), **{**tiny.QUIET, "max_steps": 2, "save_strategy": "steps", "save_steps": 1, **options}
    )
    data = Dataset.from_dict({"text": tiny.TEXTS})
    return SFTTrainer(tiny.policy(tok), args, train_dataset=data, eval_dataset=data, processing_class=tok)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"])
def test_a_resume_is_refused_before_anything_is_loaded(tmp_path, name):
    """The list of files is of the attacker, too."""
    _sft(tmp_path).train()
    staged, mark = tmp_path / STAGING / "checkpoint-2", tmp_path / "mark"
    shutil.copytree(tmp_path / "checkpoint-2", staged)
    (staged / name).write_bytes(_archive(_touch(mark)))
    publish(staged, tmp_path / "checkpoint-2")
    for wish in (True, str(tmp_path / "checkpoint-2")):
        trainer = _sft(tmp_path, max_steps=4)
        before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
        with pytest.raises(ValueError, match=f"checkpoint-2 may run code when it is loaded: {name} calls"):
            trainer.train(resume_from_checkpoint=wish)
        assert all(torch.equal(weight, before[name]) for name, weight in trainer.model.named_parameters())
    assert not mark.exists()


def test_the_best_checkpoint_is_checked_too(tmp_path):
    """A resumed checkpoint names it as a text, so it can be any folder."""
    trainer = _sft(tmp_path / "run", load_best_model_at_end=True, eval_strategy="steps", eval_steps=1)
    elsewhere = tmp_path / "elsewhere"
    determine = trainer._determine_best_metric

    def elsewhere_is_best(metrics, trial):
        result = determine(metrics, trial)
        trainer.state.best_model_checkpoint = str(elsewhere)
        return result

    elsewhere.mkdir()
    (elsewhere / "mp_rank_00_model_states.pt").write_bytes(_archive(_touch(tmp_path / "mark")))
    trainer._determine_best_metric = elsewhere_is_best
    save = trainer._save_checkpoint
    trainer._save_checkpoint = lambda *args: (
        save(*args),
        setattr(trainer.state, "best_model_checkpoint", str(elsewhere)),
    )
    with pytest.raises(ValueError, match="elsewhere may run code when it is loaded: mp_rank_00_model_states.pt"):
        trainer.train()
    assert Path(trainer.state.best_model_checkpoint) == elsewhere

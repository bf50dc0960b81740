"""The recipes as `accelerate launch` starts them from the shipped files, on two ranks of this machine.

accelerate degrades silently on CPUs (one process, or DDP instead of FSDP), so a reward function looks around on each
rank and writes down what it finds.
"""

import json
import math
import shutil
import time
from pathlib import Path
from unittest.mock import ANY

import pytest
import tiny
import torch
import yaml
from processes import free_port, run_launch
from safetensors.torch import load_file
from tolerances import SPLIT, assert_close

from rlhf_recipes.models.loading import load_policy
from rlhf_recipes.models.reward_model import load_reward_model

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.distributed
PROBE = """
import gc, json
from accelerate import PartialState

WRAPPERS = ("DeepSpeedEngine", "DistributedDataParallel")


def reward(completions, **kwargs):
    state = PartialState()
    wrapped = [x for x in gc.get_objects() if type(x).__name__ in WRAPPERS]
    stages = [x.zero_optimization_stage() for x in wrapped if hasattr(x, "zero_optimization_stage")]
    names = sorted({type(x).__name__ for x in wrapped})
    whole = any(getattr(p, "ds_persist", True) for x in wrapped for p in x.module.parameters())
    found = {"world_size": state.num_processes, "wrappers": names, "stages": stages, "whole": whole}
    with open(f"rank{state.process_index}.json", "w") as file:
        json.dump(found, file)
    return [float(len(completion)) for completion in completions]


def broken_on_rank_1(completions, **kwargs):
    if PartialState().process_index == 1:
        raise ConnectionError("gone")
    return [1.0] * len(completions)
"""
TRAINING = {
    "per_device_train_batch_size": 4,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "max_steps": 4,
    "learning_rate": 1e-3,
    "report_to": [],
    "tracking": False,
}
PPO = {
    **TRAINING,
    "model_name_or_path": "base",
    "reward_model_path": "rm",
    "reward_functions": ["probe:reward"],
    "dataset_name": "prompts",
    "steps_per_generation": 2,
    "num_iterations": 2,
    "max_completion_length": 10,
    "generation_kwargs": {"do_sample": False},  # rows leave a batch only where weights are whole: other random numbers
    "vf_coef": 0.5,
    "save_steps": 4,
}
LORA = {"use_peft": True, "lora_target_modules": "all-linear", "lora_r": 4}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A base, a reward model, data, and a reward function that inspects its process."""
    directory = tmp_path_factory.mktemp("launches")
    tok = tiny.tokenizer()
    for name, model in (("base", tiny.policy(tok)), ("rm", tiny.reward_model(tok))):
        tiny.save(model, directory / name)
    for name, data in (("prompts", tiny.prompts(count=16)), ("preferences", tiny.preferences(count=16))):
        tiny.write_splits(data, directory / name)
    (directory / "texts").mkdir()
    texts = tiny.preferences(count=16).select_columns(["prompt", "chosen"]).rename_column("chosen", "completion")
    texts.to_json(directory / "texts" / "train.jsonl")
    (directory / "probe.py").write_text(PROBE)
    return directory


@pytest.fixture(autouse=True)
def _inside(directory, monkeypatch):
    """An adapter names its base as the run named it."""
    monkeypatch.chdir(directory)


def _run(directory, engine, stage, output_dir, options, mixed_precision="no", **launch):
    """Run a recipe on two ranks by a launch file, shipped or not."""
    config = directory / f"{output_dir}.yaml"
    config.write_text(yaml.safe_dump({**options, "output_dir": output_dir}))
    return run_launch(
        "--config_file", ROOT / "accelerate_configs" / f"{engine}.yaml" if isinstance(engine, str) else engine,
        "--num_processes", 2, "--mixed_precision", mixed_precision, "--main_process_port", free_port(),
        ROOT / "recipes" / f"{stage}.py", "--config", config, directory=directory, **launch,
    )  # fmt: skip


def _launch(directory, engine, stage, output_dir, options, **launch):
    """Run a recipe to its end; return the log of PPO and the findings of each rank."""
    result = _run(directory, engine, stage, output_dir, options, **launch)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    if stage != "ppo":
        return None
    ranks = [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(2)]
    return json.loads((directory / output_dir / "trainer_state.json").read_text())["log_history"], ranks


@pytest.fixture(scope="module")
def ddp(directory):
    """Full PPO under DDP."""
    return _launch(directory, "multi_gpu", "ppo", "ddp", PPO)


@pytest.fixture(scope="module")
def zero3(directory):
    """Full PPO under ZeRO-3."""
    return _launch(directory, "zero3", "ppo", "zero3", PPO)


def _check_artifacts(directory, output_dir, log):
    for entry in log:
        assert all(math.isfinite(value) for value in entry.values() if isinstance(value, int | float)), entry
    assert {"objective/kl", "loss/value", "reward_norm/std"} <= log[0].keys()
    out = directory / output_dir
    assert load_file(out / "value_head.safetensors")["hidden.weight"].shape == (32, 32)
    assert json.loads((out / "checkpoint-4" / "ppo_state.json").read_text())["reward_normalizer"]
    ids = torch.tensor([[60, 61, 62]])
    moved = load_policy(str(out))(input_ids=ids).logits - load_policy(str(directory / "base"))(input_ids=ids).logits
    assert moved.abs().max() > 1e-3, "the saved policy is the trained one"


def _check_weights(directory, run):
    """Weights and value head must be the same as with DDP."""
    for name in ("model.safetensors", "value_head.safetensors"):
        one, other = (load_file(directory / folder / name) for folder in ("ddp", run))
        for key in one.keys() & other.keys():
            assert_close(other[key].float(), one[key].float(), SPLIT)
        assert len(one.keys() & other.keys()) >= len(one) - 1, "tied weights may be written once"


def test_ddp(directory, ddp):
    log, ranks = ddp
    assert ranks == [{"world_size": 2, "wrappers": ["DistributedDataParallel"], "stages": [], "whole": True}] * 2
    _check_artifacts(directory, "ddp", log)


@pytest.mark.parametrize("failed", ["raise", "mask"])
def test_a_reward_that_fails_on_one_rank(directory, failed):
    """Every rank must end or continue; none may wait for the others in a collective."""
    rewards = {"reward_functions": ["probe:reward", "probe:broken_on_rank_1"], "failed_rewards": failed}
    options = {**PPO, **rewards, "reward_retries": 0, "save_strategy": "no"}
    start = time.monotonic()
    result = _run(directory, "multi_gpu", "ppo", f"ddp_{failed}", options)
    assert time.monotonic() - start < 300
    message = "`broken_on_rank_1` failed at the first attempt on process 1: ConnectionError: gone (probe.py, line"
    assert message in result.stderr
    assert (result.returncode == 0) is (failed == "mask"), result.stderr[-3000:]
    if failed == "raise":
        assert result.stderr.count(f"RewardCallError: {message}") >= 2, "each rank says so"
        return
    log = json.loads((directory / "ddp_mask" / "trainer_state.json").read_text())["log_history"]
    assert log[0]["rewards/broken_on_rank_1/failed_calls"] == 1.0
    assert log[0]["rewards/broken_on_rank_1/mean"] == 1.0, "the other rank's"


def test_zero2_with_lora(directory):
    log, ranks = _launch(directory, "zero2", "ppo", "zero2", {**PPO, **LORA})
    # The reward model is only evaluated, and whole on each rank.
    assert ranks == [{"world_size": 2, "wrappers": ["DeepSpeedEngine"], "stages": ANY, "whole": True}] * 2
    assert all(sorted(rank["stages"]) == [0, 2] for rank in ranks)
    _check_artifacts(directory, "zero2", log)


def test_zero3(directory, zero3):
    log, ranks = zero3
    # Policy, reference and reward model are sharded.
    assert ranks == [{"world_size": 2, "wrappers": ["DeepSpeedEngine"], "stages": [3, 3, 3], "whole": True}] * 2
    _check_artifacts(directory, "zero3", log)


@pytest.fixture(scope="module")
def zero3_in_shards(directory):
    """A launch file that shards every parameter: by itself DeepSpeed keeps small ones whole on each rank."""
    engine = yaml.safe_load((ROOT / "accelerate_configs" / "zero3.yaml").read_text())
    config = {
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        **{name: "auto" for name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")},
        **{name: "auto" for name in ("train_batch_size", "gradient_clipping")},
    }
    (directory / "deepspeed.json").write_text(json.dumps(config))
    engine["deepspeed_config"] = {"deepspeed_config_file": "deepspeed.json", "zero3_init_flag": True}
    del engine["mixed_precision"]
    (directory / "zero3_in_shards.yaml").write_text(yaml.safe_dump(engine))
    return directory / "zero3_in_shards.yaml"


def test_zero3_trains_the_weights_of_ddp_from_shards(directory, ddp, zero3_in_shards):
    log, ranks = _launch(directory, zero3_in_shards, "ppo", "shards", PPO)
    assert ranks == [{"world_size": 2, "wrappers": ["DeepSpeedEngine"], "stages": [3, 3, 3], "whole": False}] * 2
    _check_artifacts(directory, "shards", log)
    _check_weights(directory, "shards")


def test_zero3_trains_the_weights_of_ddp(directory, ddp, zero3):
    _check_weights(directory, "zero3")


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("c++") is None or shutil.which("ninja") is None,
    reason="DeepSpeed compiles an operator on CPUs: needs a C++ compiler and ninja",
)
def test_zero3_trains_the_weights_of_ddp_by_fresh_interpreters(directory, ddp):
    """With the operator that DeepSpeed compiles for its collectives on CPUs, which forks do without."""
    _launch(directory, "zero3", "ppo", "fresh", PPO, fresh=True)
    _check_weights(directory, "fresh")


def test_zero3_resumes(directory, zero3):
    resume = {"resume_from_checkpoint": "zero3/checkpoint-4", "allow_changes_on_resume": True}
    log, _ = _launch(directory, "zero3", "ppo", "zero3", {**PPO, "max_steps": 8, **resume})
    steps = [entry["step"] for entry in log if "loss" in entry]
    assert steps == list(range(1, 9))
    assert (directory / "zero3" / "checkpoint-8" / "ppo_state.json").is_file()


def test_zero3_trains_a_reward_model(directory):
    options = {**TRAINING, **LORA, "model_name_or_path": "base", "dataset_name": "preferences", "save_strategy": "no"}
    _launch(directory, "zero3", "reward_modeling", "rm_lora", options)
    head = load_reward_model(str(directory / "rm_lora")).score.weight
    assert head.shape == (1, 32)
    assert head.abs().sum() > 0
    assert json.loads((directory / "rm_lora" / "reward_model_card.json").read_text())["score_std"] > 0


FULL_IN_BF16 = "ZeRO-3 trains whole models in float32 above, and bfloat16 with LoRA shards whole models too"


@pytest.mark.parametrize(
    "peft",
    [pytest.param({}, id="full", marks=pytest.mark.slow(reason=FULL_IN_BF16)), pytest.param(LORA, id="lora")],
)
def test_zero3_in_bfloat16(directory, peft):
    """As on a GPU. With LoRA, the reward model is an adapter on the same shards."""
    options = {**PPO, **peft, "bf16": True, "dtype": "bfloat16"}
    if peft:
        rewards = {**TRAINING, **LORA, "model_name_or_path": "base", "dataset_name": "preferences"}
        _launch(directory, "multi_gpu", "reward_modeling", "rm_bf16", {**rewards, "save_strategy": "no"})
        options = {**options, "reward_adapter": "rm_bf16"}
        del options["reward_model_path"]
    name = "zero3_bf16_lora" if peft else "zero3_bf16"
    log, _ = _launch(directory, "zero3", "ppo", name, options, mixed_precision="bf16")
    _check_artifacts(directory, name, log)


def test_zero3_fine_tunes(directory):
    options = {**TRAINING, "model_name_or_path": "base", "dataset_name": "texts", "save_strategy": "no"}
    _launch(directory, "zero3", "sft", "sft", options)
    trained, base = (load_policy(str(directory / name)).lm_head.weight for name in ("sft", "base"))
    assert trained.shape == base.shape

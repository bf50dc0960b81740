"""Every logged figure of a resumed run is that of an uninterrupted one, whatever was between two logs at the kill."""

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from faults import SignalAt
from processes import run_in_processes

from rlhf_recipes.durability.preemption import PreemptionCallback
from rlhf_recipes.options.baselines import CONFIGS
from rlhf_recipes.options.sft import SFTConfig
from rlhf_recipes.trainers.baselines import TRAINERS
from rlhf_recipes.trainers.sft import SFTTrainer
from rlhf_recipes.trainers.stock import Scoring

TIMES = ("step_time", "runtime", "per_second")
STEPS = {"max_steps": 7, "save_strategy": "steps", "lr_scheduler_type": "linear", "report_to": []}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}
SAMPLING = {"steps_per_generation": 2, "num_generations": 2, "num_iterations": 2, "beta": 0.1}
LONG_LOGS = {"save_steps": 2, "logging_steps": 3}
LONG_SAVES = {"save_steps": 3, "logging_steps": 2}


def _sft(directory, base, **options):
    tok = tiny.tokenizer()
    texts = [f"{prompt} the fox is {'red ' * i}" for i, prompt in enumerate(tiny.PROMPTS * 3)]
    data = tiny.Dataset.from_dict({"text": texts})
    args = SFTConfig(str(directory), **{**tiny.QUIET, "per_device_train_batch_size": 2, **options})
    evaluation = data.select(range(5)) if args.eval_strategy != "no" else None
    given = {"train_dataset": data, "eval_dataset": evaluation, "processing_class": tok}
    return SFTTrainer(tiny.policy(tok), args, **given, peft_config=tiny.lora())  # with dropout


def _reward(directory, base, **options):
    return tiny.reward_trainer(directory, data=tiny.preferences(count=24), **options)


def _ppo(directory, base, **options):
    data = tiny.prompts(count=20)
    evaluation = tiny.prompts() if options.get("eval_strategy") else None
    return tiny.ppo_trainer(directory, data=data, eval_data=evaluation, **{"kl_controller": "adaptive", **options})


def _baseline(method, directory, base, **options):
    own = {} if method == "dpo" else SAMPLING
    args = CONFIGS[method](str(directory), **{**tiny.QUIET, "max_completion_length": 10, **own, **options})
    data = TRAINERS[method].rows(tiny.preferences(count=20))
    return TRAINERS[method](
        base,
        args,
        Scoring([tiny.length_reward], " "),
        train_dataset=data,
        eval_dataset=data.select(range(8)) if args.eval_strategy != "no" else None,
        processing_class=tiny.tokenizer(),
    )


def _make(kind, directory, base, **options):
    makers = {"sft": _sft, "reward": _reward, "ppo": _ppo}
    torch.manual_seed(0)
    if kind in makers:
        return makers[kind](directory, base, **options)
    return _baseline(kind, directory, base, **options)


def _figures(trainer):
    """Return the log without times, the final figures included."""
    return [{k: v for k, v in entry.items() if not k.endswith(TIMES)} for entry in trainer.state.log_history]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save(tiny.policy(tiny.tokenizer()), tmp_path_factory.mktemp("policy"))


def _check_resumes(kind, directory, base, **options):
    """Train a run without an interruption, then from each of its checkpoints, and compare all that they log."""
    whole = _make(kind, directory / "whole", base, **{**STEPS, **options})
    output = whole.train()
    expected = _figures(whole)
    assert expected[-1]["train_loss"] == output.training_loss
    checkpoints = sorted((directory / "whole").glob("checkpoint-*"))
    assert len(checkpoints) > 1
    for checkpoint in checkpoints:
        resumed = _make(kind, directory / "resumed", base, **{**STEPS, **options})
        again = resumed.train(resume_from_checkpoint=str(checkpoint))
        assert _figures(resumed) == expected, checkpoint.name
        assert again.training_loss == output.training_loss
        assert again.metrics["train_loss"] == output.metrics["train_loss"]
        assert resumed.state.total_flos == whole.state.total_flos


ALL = ("sft", "reward", "ppo", "rloo", "grpo", "dpo")
CASES = {
    **{f"{kind}, short saves": (kind, LONG_LOGS) for kind in ALL},
    **{f"{kind}, evaluated": (kind, LONG_SAVES | EVALUATED) for kind in ALL},
    "first step": ("sft", LONG_SAVES | {"logging_first_step": True}),
    "accumulation": ("sft", LONG_LOGS | {"gradient_accumulation_steps": 2, "average_tokens_across_devices": False}),
    "packing": ("sft", LONG_LOGS | {"packing": True, "max_length": 16, "packing_strategy": "wrapped"}),
    "input tokens": ("reward", LONG_LOGS | {"include_num_input_tokens_seen": "all"}),
    "accumulated pairs": ("reward", LONG_SAVES | {"gradient_accumulation_steps": 2, "logging_first_step": True}),
    "accumulated rollouts": ("ppo", LONG_LOGS | {"gradient_accumulation_steps": 2, "steps_per_generation": 4}),
}


@pytest.mark.tiny
@pytest.mark.parametrize(("kind", "options"), CASES.values(), ids=CASES)
def test_the_figures_of_a_resumed_run_are_those_of_an_uninterrupted_one(tmp_path, base, kind, options):
    _check_resumes(kind, tmp_path, base, **options)


EPOCHS = {"max_steps": -1, "num_train_epochs": 2, "logging_strategy": "epoch", "eval_strategy": "epoch"}


@pytest.mark.tiny
@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        ("sft", -1),
        ("sft", 4),
        ("reward", -1),
        pytest.param("ppo", -1, marks=pytest.mark.slow(reason="the code of the other trainers, on a longer run")),
    ],
)
def test_a_kill_between_the_last_step_of_an_epoch_and_its_log(tmp_path, base, kind, steps):
    """The checkpoint of the last step is written before the log and the evaluation of its epoch."""
    options = EPOCHS | {"max_steps": steps, "save_steps": 1, "per_device_train_batch_size": 8}
    _check_resumes(kind, tmp_path, base, **options)


@pytest.mark.tiny
@pytest.mark.parametrize(("strategy", "step"), [("steps", 2), ("steps", 3), ("epoch", 2), ("epoch", 6), ("epoch", 12)])
@pytest.mark.parametrize("kind", ["sft", pytest.param("reward", marks=pytest.mark.slow)])
def test_a_signal_adds_no_figure_and_takes_none(tmp_path, base, kind, strategy, step):
    """An epoch has six steps. The run that stops logs no end, and no early end of the epoch."""
    options = {**STEPS, **LONG_LOGS, **(EVALUATED if strategy == "steps" else {**EPOCHS, "save_strategy": "epoch"})}
    options["per_device_train_batch_size"] = 4
    whole = _make(kind, tmp_path / "whole", base, **options)
    whole.train()
    stopped = _make(kind, tmp_path / "stopped", base, **options)
    for callback in (PreemptionCallback(), SignalAt(step)):
        stopped.add_callback(callback)
    with pytest.raises(SystemExit):
        stopped.train()
    assert _figures(stopped) == _figures(whole)[: len(_figures(stopped))]
    resumed = _make(kind, tmp_path / "stopped", base, **options)
    resumed.add_callback(PreemptionCallback())
    resumed.train(resume_from_checkpoint=True)
    assert _figures(resumed) == _figures(whole)


@pytest.mark.tiny
def test_times_are_those_of_all_sessions(tmp_path, base):
    options = {**STEPS, **LONG_LOGS}
    whole = _make("sft", tmp_path, base, **options)
    progress = whole._progress
    whole._progress = lambda: progress() | {"seconds": 1000.0}
    whole.train()
    resumed = _make("sft", tmp_path, base, **options)
    metrics = resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4")).metrics
    assert 1000 < metrics["train_runtime"] < 1100
    assert 6.5 < metrics["train_steps_per_second"] * metrics["train_runtime"] < 7.5


@pytest.mark.tiny
@pytest.mark.parametrize("kind", ["sft", "ppo"])
def test_a_checkpoint_without_these_figures_resumes(tmp_path, base, kind):
    """An earlier version saved PPO's window only. The mean loss is then that of the steps that are known."""
    options = {**STEPS, **LONG_LOGS}
    whole = _make(kind, tmp_path, base, **options)
    progress = whole._progress
    kept = ("num_processes", "step", "rollout", "samples", "metrics", "loss", "last_logged")
    whole._progress = lambda: {name: value for name, value in progress().items() if name in kept}
    save = whole._save_progress
    if kind == "sft":
        whole._save_progress = lambda folder: save(folder) or (folder / "progress_0.pt").unlink()
    whole.train()
    resumed = _make(kind, tmp_path, base, **options)
    metrics = resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4")).metrics
    logged = [entry["loss"] for entry in resumed.state.log_history if "loss" in entry]
    assert 0.2 * min(logged) < metrics["train_loss"] < 5 * max(logged)


def _rank(rank, world_size, kind, directory, base):
    """Compare the log of each rank. The ranks share a directory."""
    _check_resumes(kind, directory, base, **LONG_LOGS, gradient_accumulation_steps=2)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "kind", ["reward", "ppo", pytest.param("sft", marks=pytest.mark.slow), pytest.param("dpo", marks=pytest.mark.slow)]
)
def test_the_figures_of_two_ranks(tmp_path, base, kind):
    run_in_processes(_rank, 2, kind, tmp_path, base)


TABLE = "completions_00006.parquet"


@pytest.mark.tiny
@pytest.mark.parametrize("kind", ["ppo", "grpo"])  # TRL's RLOO writes none
def test_the_tables_of_completions(tmp_path, base, kind):
    """A log inside a rollout shows the completions of before the interruption."""
    options = {**STEPS, "save_steps": 5, "logging_steps": 2, "max_steps": 6, "log_completions": True}
    if kind != "ppo":
        options["log_unique_prompts"] = False
    whole = _make(kind, tmp_path / "whole", base, **options)
    whole.train()
    resumed = _make(kind, tmp_path / "resumed", base, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    tables = [
        pd.read_parquet(tmp_path / run / "completions" / "completions_00006.parquet") for run in ("whole", "resumed")
    ]
    assert len(tables[0]) == 8
    pd.testing.assert_frame_equal(*tables)


def _train_rank(rank, world_size, directory, base):
    _make("sft", directory, base, **STEPS, **LONG_LOGS).train()


@pytest.mark.distributed
def test_figures_over_all_ranks_continue_on_one(tmp_path, base):
    """The checkpoint of step 4 is inside a log window. The loss of a window is the mean over the ranks."""
    run_in_processes(_train_rank, 2, tmp_path, base)
    checkpoint = tmp_path / "checkpoint-4"
    saved = [torch.load(checkpoint / f"progress_{rank}.pt") for rank in range(2)]
    assert saved[0]["loss"] != saved[1]["loss"]
    resumed = _make("sft", tmp_path / "resumed", base, **STEPS, **LONG_LOGS, allow_changes_on_resume=True)
    resumed._resumed_from = str(checkpoint)
    assert resumed._progress_to_resume()["loss"] == (saved[0]["loss"] + saved[1]["loss"]) / 2
    resumed.train(resume_from_checkpoint=str(checkpoint))
    tokens = tiny.logged(resumed, "num_tokens")
    assert tokens[3] < saved[0]["tokens"] < tokens[6]


@pytest.mark.tiny
def test_a_figure_of_numpy_does_not_spoil_a_checkpoint(tmp_path, base):
    """A reward function of a user may log one."""
    options = {**STEPS, **LONG_LOGS}
    whole = _make("sft", tmp_path, base, **options)
    compute = whole.compute_loss

    def logged(*args, **kwargs):
        whole._metrics["train"]["mine"] += [np.float64(1.5), np.float64(2.5), 2]
        return compute(*args, **kwargs)

    whole.compute_loss = logged
    whole.train()
    resumed = _make("sft", tmp_path, base, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert tiny.logged(resumed, "mine")[6] == 2.0

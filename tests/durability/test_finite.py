"""A training whose numbers are not finite ends, and writes nothing over the last good weights."""

import errno
import math
from pathlib import Path

import pytest
import tiny
import torch
from datasets import Dataset
from processes import run_script
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl import SFTConfig

from rlhf_recipes.durability import finite
from rlhf_recipes.durability.checkpoints import STAGING, checkpoints_by_age, find_defect
from rlhf_recipes.durability.finite import DivergedError, all_finite
from rlhf_recipes.durability.preemption import PreemptionCallback
from rlhf_recipes.trainers.sft import SFTTrainer

pytestmark = pytest.mark.tiny


def _sft(directory, **options):
    tok = tiny.tokenizer()
    data = Dataset.from_dict({"text": tiny.TEXTS})
    args = SFTConfig(str(directory), **{**tiny.QUIET, "max_steps": 4, **options})
    return SFTTrainer(tiny.policy(tok), args, train_dataset=data, eval_dataset=data, processing_class=tok)


def _rm(directory, **options):
    return tiny.reward_trainer(directory, **{"max_steps": 4, **options})


def _ppo(directory, **options):
    return tiny.ppo_trainer(directory, **options)


SAVING = {"save_strategy": "steps", "save_steps": 1}


class At(TrainerCallback):
    """Change something at the beginning of a step."""

    def __init__(self, step, change):
        self.step, self.change = step, change

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            self.change(model)


@torch.no_grad()
def _spoil(model):
    next(p for p in model.parameters() if p.requires_grad).view(-1)[0] = math.nan


@pytest.mark.parametrize("make", [_sft, _rm])
def test_a_loss_that_is_not_finite_ends_the_run_before_its_step(tmp_path, make):
    trainer = make(tmp_path, **SAVING)
    trainer.add_callback(At(3, _spoil))
    with pytest.raises(DivergedError, match=r"Step 3: .* The last good checkpoint is \S*checkpoint-2. Lower"):
        trainer.train()
    assert [path.name for path in checkpoints_by_age(tmp_path)] == ["checkpoint-1", "checkpoint-2"]
    for path in checkpoints_by_age(tmp_path):
        assert all_finite(load_file(path / "model.safetensors").values())
        assert find_defect(path) is None


@pytest.mark.parametrize(
    ("make", "options"),
    [(_rm, {"l2_coefficient": 1e39}), (_rm, {"learning_rate": 1e38}), (_sft, {"learning_rate": 1e38})],
)
def test_options_that_cannot_end_well(tmp_path, make, options):
    trainer = make(tmp_path, **options)
    with pytest.raises(DivergedError, match=f"There is no checkpoint from before. Lower .*`{next(iter(options))}`"):
        trainer.train()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_infinite_loss_with_finite_gradients_is_noticed(tmp_path):
    trainer = _rm(tmp_path)
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: compute_loss(*args, **kwargs) + torch.tensor(math.inf)
    with pytest.raises(DivergedError, match="Step 1: the loss"):
        trainer.train()


@pytest.mark.parametrize("make", [_sft, _rm, _ppo])
def test_weights_that_are_not_finite_are_refused_before_the_first_step(tmp_path, make):
    trainer = make(tmp_path)
    name = next(name for name, _ in trainer.model.named_parameters())
    _spoil(trainer.model)
    with pytest.raises(DivergedError, match=f"The weight '{name}' is not finite before the first step"):
        trainer.train()


@pytest.mark.parametrize("make", [_sft, _rm, _ppo])
def test_weights_that_are_not_finite_replace_no_saved_model(tmp_path, make):
    """The last step of a run has a finite loss and may still spoil the weights."""
    trainer = make(tmp_path)
    trainer.save_model()
    before = (tmp_path / "model.safetensors").read_bytes()
    _spoil(trainer.model)
    with pytest.raises(DivergedError, match="not finite after step 0, so they are not saved"):
        trainer.save_model()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    with pytest.raises(DivergedError, match="not saved"):
        trainer._save_checkpoint(trainer.model, None)
    assert not checkpoints_by_age(tmp_path)


def test_frozen_weights_are_not_looked_at_when_an_adapter_is_saved(tmp_path):
    trainer = tiny.reward_trainer(tmp_path, peft=tiny.lora())
    frozen = next(p for p in trainer.model.parameters() if not p.requires_grad)
    frozen.data.fill_(math.nan)
    trainer.save_model()
    _spoil(trainer.model)
    with pytest.raises(DivergedError, match="not saved"):
        trainer.save_model()


def test_a_frozen_base_in_float8_does_not_stop_an_adapter(tmp_path):
    trainer = tiny.reward_trainer(tmp_path, peft=tiny.lora())
    frozen = next(p for p in trainer.model.parameters() if not p.requires_grad)
    frozen.data = frozen.data.to(torch.float8_e4m3fn)
    trainer.check_start()


def test_under_fp16_only_overflows_in_a_row_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(finite, "MAX_OVERFLOWS", 3)
    trainer = _rm(tmp_path)
    trainer.args = type("Options", (), {"fp16": True})()
    inf, one = torch.tensor(math.inf), torch.tensor(1.0)
    for norm in (inf, inf, one, inf, inf):
        trainer.finish_step(trainer.model, norm)
    trainer.check_any_step()
    with pytest.raises(DivergedError, match="not finite, 3 steps in a row"):
        trainer.finish_step(trainer.model, inf)


def test_under_fp16_a_run_of_overflows_alone_has_trained_nothing(tmp_path):
    trainer = _rm(tmp_path)
    trainer.args = type("Options", (), {"fp16": True})()
    trainer.finish_step(trainer.model, math.nan)
    with pytest.raises(DivergedError, match="All 1 steps overflowed"):
        trainer.check_any_step()


def test_a_norm_that_deepspeed_does_not_know_yet_is_no_fault(tmp_path):
    _rm(tmp_path).finish_step(None, None)


@pytest.mark.parametrize(
    ("tensors", "is_finite"),
    [
        ([], True),
        ([torch.ones(2), torch.zeros(0), torch.tensor([1, 2])], True),
        ([torch.ones(2), torch.tensor([1.0, math.inf])], False),
        ([torch.full((2,), 60_000.0, dtype=torch.float16)], True),  # its sum would overflow
        ([torch.tensor(math.nan, dtype=torch.bfloat16)], False),
        ([torch.tensor([1.0, -math.inf], dtype=torch.float16)], False),
        ([torch.tensor([1e300], dtype=torch.float64)], True),
        ([torch.ones(2).to(torch.float8_e4m3fn), torch.ones(2).to(torch.float8_e5m2)], True),
        ([torch.ones(2).to(torch.float8_e4m3fn), torch.tensor(math.nan)], False),
    ],
)
def test_all_finite(tensors, is_finite):
    assert all_finite(tensors) is is_finite


@pytest.mark.parametrize("make", [_sft, _rm])
def test_a_stream_that_makes_no_step_is_no_success(tmp_path, make):
    """transformers would read it for ever."""
    trainer = make(tmp_path, gradient_accumulation_steps=3)
    trainer.train_dataset = trainer.train_dataset.select(range(4)).to_iterable_dataset()
    with pytest.raises(ValueError, match="made no optimiser step after step 0: it has fewer rows than one step needs"):
        trainer.train()


@pytest.mark.parametrize("make", [_sft, _rm, _ppo])
@pytest.mark.parametrize("only_model", [False, True])
def test_an_evaluation_that_fails_costs_no_trained_weights(tmp_path, make, only_model):
    options = {"eval_strategy": "steps", "eval_steps": 4, "save_only_model": only_model}
    if make is _ppo:
        options["eval_data"] = tiny.prompts(count=4)
    trainer = make(tmp_path, **options)
    trainer.add_callback(PreemptionCallback())
    loop = trainer.evaluation_loop

    def failing(*args, **kwargs):
        if trainer.state.global_step == 4:
            raise KeyError("a judge")
        return loop(*args, **kwargs)

    trainer.evaluation_loop = failing
    with pytest.raises(KeyError, match="a judge"):
        trainer.train()
    (checkpoint,) = checkpoints_by_age(tmp_path)
    assert checkpoint.name == "checkpoint-4"
    assert (tmp_path / "model.safetensors").is_file()
    trained = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}

    again = make(tmp_path, **options)
    again.add_callback(PreemptionCallback())
    again.train(resume_from_checkpoint=True)
    assert all(torch.equal(p, trained[name]) for name, p in again.model.named_parameters())
    assert [entry["step"] for entry in again.state.log_history if "eval_runtime" in entry][-1] == 4
    assert Path(checkpoint).exists()


@pytest.mark.parametrize("make", [_sft, _ppo])
@pytest.mark.parametrize("fault", ["moments", "model"])
def test_the_error_of_an_evaluation_is_shown_when_its_checkpoint_is_refused_too(tmp_path, make, fault, caplog):
    options = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 2}
    if make is _ppo:
        options["eval_data"] = tiny.prompts(count=4)
    trainer = make(tmp_path, **options)
    loop = trainer.evaluation_loop

    def failing(*args, **kwargs):
        if trainer.state.global_step == 0:
            return loop(*args, **kwargs)
        if fault == "moments":
            next(iter(trainer.optimizer.state.values()))["exp_avg"].fill_(math.inf)
        else:
            _spoil(trainer.model)
        raise KeyError("a judge")

    trainer.evaluation_loop = failing
    with pytest.raises(KeyError, match="a judge"):
        trainer.train()
    assert trainer.state.global_step == 4
    assert "The evaluation failed, and so did this: " in caplog.text


@pytest.mark.parametrize("place", ["save_model", "_complete"])
def test_a_hang_in_a_checkpoint_names_ddp_timeout_and_no_full_disk(tmp_path, place):
    trainer = _rm(tmp_path, **SAVING)
    original = getattr(trainer, place)

    def hanging(*args, **kwargs):
        if trainer.state.global_step == 2:
            raise RuntimeError("[gloo] Timed out waiting 8000ms for recv operation to complete")
        return original(*args, **kwargs)

    setattr(trainer, place, hanging)
    with pytest.raises(TimeoutError, match="has not answered for 8 s .`ddp_timeout`.") as error:
        trainer.train()
    assert "Make room" not in str(error.value)
    assert [path.name for path in checkpoints_by_age(tmp_path)] == ["checkpoint-1"]
    assert not list((tmp_path / STAGING).glob("*"))


def test_a_file_system_that_does_not_answer_stays_a_checkpoint_that_was_not_written(tmp_path, monkeypatch):
    trainer = _rm(tmp_path, **SAVING)
    error = OSError(errno.ETIMEDOUT, "Connection timed out")
    assert isinstance(error, TimeoutError)
    monkeypatch.setattr(trainer, "_complete", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(OSError, match="checkpoint-1 could not be written.*Make room"):
        trainer.train()


def test_an_export_of_weights_that_are_not_finite_is_refused(tmp_path):
    model = tiny.policy(tiny.tokenizer())
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.inf
    tiny.save(model, tmp_path / "model")
    recipe = Path(__file__).parents[2] / "recipes" / "export.py"
    code, output = run_script(recipe, "--model_name_or_path", "model", "--output_dir", "export", directory=tmp_path)
    assert code == 1
    assert "model holds weights that are not finite. Nothing is exported" in output
    assert not list((tmp_path / "export").glob("*.safetensors"))

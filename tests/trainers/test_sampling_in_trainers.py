"""What a trainer does with a batch of prompts: rows that leave, chunks, and the precision of sampling."""

import contextlib

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_recipes.models.sampling import thrifty_sampling
from rlhf_recipes.trainers import compared

pytestmark = pytest.mark.tiny

LONG = 70
GREEDY = {"generation_kwargs": {"do_sample": False}}


@contextlib.contextmanager
def sampled(trainer):
    """Note the shape of the tokens of each forward inside `generate`, and its logits."""
    policy, shapes, logits = trainer.model, [], []
    causal = policy.get_base_model() if hasattr(policy, "get_base_model") else policy

    def note(module, args, kwargs, output):
        if kwargs.get("past_key_values") is not None:
            shapes.append(tuple(kwargs["input_ids"].shape))
            logits.append(output.logits[:, -1].float())

    hook = causal.register_forward_hook(note, with_kwargs=True)
    try:
        yield shapes, logits
    finally:
        hook.remove()


def without_autocast(monkeypatch):
    """Let the trainers sample in the precision of the weights."""
    monkeypatch.setattr(compared, "thrifty_sampling", lambda model, **options: thrifty_sampling(model))


def test_the_option_cuts_a_rollout(tmp_path):
    rollouts = []
    for rows in (None, 3):
        trainer = tiny.ppo_trainer(tmp_path / str(rows), generation_batch_rows=rows, **GREEDY)
        with sampled(trainer) as (shapes, _):
            rollouts.append(tiny.rollout(trainer))
        prompts = [n for n, width in shapes if width > 1]
        assert (sum(prompts), max(prompts)) == (8, rows or 8)
    assert torch.equal(rollouts[0]["completion_ids"], rollouts[1]["completion_ids"])
    assert torch.equal(rollouts[0]["advantages"], rollouts[1]["advantages"])


def test_rows_leave_a_rollout_of_long_answers(tmp_path):
    trainer = tiny.ppo_trainer(tmp_path, max_completion_length=LONG, **GREEDY)
    with sampled(trainer) as (shapes, _):
        batch = tiny.rollout(trainer)
    counted = int(batch["completion_mask"].sum())
    assert counted <= sum(n for n, _ in shapes) < 1.5 * counted < batch["completion_mask"].numel()


@pytest.mark.parametrize("training", [True, False])
def test_rows_leave_in_rollouts_and_not_in_evaluations(tmp_path, training):
    """Answers of two policies are compared, so the ends of one must not change the random numbers of the other."""
    trainer = tiny.ppo_trainer(tmp_path, max_completion_length=LONG, eval_data=tiny.prompts(), **GREEDY)
    trainer.model.train(training)
    with sampled(trainer) as (shapes, _):
        trainer._generate([row["prompt"] for row in trainer.train_dataset])
    assert ({n for n, _ in shapes} == {8}) is not training


def lora_trainer(directory, **options):
    """Return a trainer of float32 LoRA weights on a bfloat16 base."""
    torch.manual_seed(0)
    model = tiny.sft_adapter(tiny.policy(tiny.tokenizer()).to(torch.bfloat16))
    return tiny.ppo_trainer(directory, model=model, bf16=True, **options)


def test_lora_samples_in_the_precision_of_the_update(tmp_path):
    trainer, kinds = lora_trainer(tmp_path), []
    layer = trainer.model.get_base_model().model.layers[0].self_attn.q_proj.lora_A["default"]
    assert layer.weight.dtype == torch.float32
    layer.register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    tiny.rollout(trainer)
    assert set(kinds) == {torch.bfloat16}


@pytest.mark.parametrize("float32_head", [False, True])
def test_lora_samples_from_the_policy_that_trains(tmp_path, monkeypatch, float32_head):
    """Autocast brings the log-probabilities of sampling nearer to those of the rollout's forward."""
    errors = []
    monkeypatch.setattr("rlhf_recipes.models.sampling._rows_may_leave", lambda *_: False)
    for autocast in (True, False):
        if not autocast:
            without_autocast(monkeypatch)
        trainer = lora_trainer(tmp_path / str(autocast), cast_lm_head_to_fp32=float32_head)
        with sampled(trainer) as (_, logits):
            batch = tiny.rollout(trainer)
        ids, mask = batch["completion_ids"], batch["completion_mask"].bool()
        logps = torch.stack(logits[: ids.size(1)], dim=1).log_softmax(-1).gather(2, ids[..., None]).squeeze(2)
        errors.append((logps - trainer.rollout.first_forward.per_token_logps)[mask].abs().mean().item())
    assert errors[0] < 0.01 * errors[1]


class Casts(TorchDispatchMode):
    """Count the casts of float32 tensors of one shape to bfloat16."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and args[0].shape == self.shape:
            self.count += (args[0].dtype, kwargs.get("dtype")) == (torch.float32, torch.bfloat16)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("autocast", [True, False])
def test_a_weight_is_cast_once_per_rollout_and_not_once_per_token(tmp_path, monkeypatch, autocast):
    trainer = tiny.ppo_trainer(tmp_path, bf16=True)
    trainer.train()  # accelerate wraps the forward here
    if not autocast:
        without_autocast(monkeypatch)
    weight = trainer.model.model.layers[0].mlp.up_proj.weight
    with Casts(weight.shape) as casts, sampled(trainer) as (shapes, _):
        trainer._generate([row["prompt"] for row in trainer.train_dataset])
    of_layers = 2 * trainer.model.config.num_hidden_layers  # gate and up
    assert len(shapes) > 5
    assert casts.count == of_layers * (1 if autocast else len(shapes))


def test_training_after_autocast_sees_float32_weights(tmp_path):
    """The copies in bfloat16 end with the sampling: gradients reach the weights themselves."""
    trainer = tiny.ppo_trainer(tmp_path, bf16=True, max_steps=8)
    weight = trainer.model.model.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    trainer.train()
    assert weight.dtype == trainer.optimizer.state[weight]["exp_avg"].dtype == torch.float32
    assert trainer.optimizer.state[weight]["exp_avg"].abs().sum() > 0
    assert not torch.equal(weight, before)
    assert not torch.equal(weight, weight.bfloat16().float())


def test_a_static_cache_lets_generate_compile(tmp_path):
    base = tiny.save(tiny.policy(tiny.tokenizer()), tmp_path / "base")
    options = {"model": base, "peft": tiny.lora(), "model_init_kwargs": {"dtype": "bfloat16"}, "bf16": True}
    trainer = tiny.ppo_trainer(tmp_path / "out", cache_implementation="static", **options)
    assert trainer.generation_config.disable_compile is False
    trainer.train()
    assert tiny.logged(trainer, "objective/kl")[1] == 0.0
    assert tiny.ppo_trainer(tmp_path / "out", **options).generation_config.disable_compile
    trainer = tiny.ppo_trainer(tmp_path / "out", generation_kwargs={"cache_implementation": "static"}, **options)
    assert trainer.generation_config.disable_compile is False


def test_a_static_cache_of_another_type_than_autocast_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`cache_implementation: static` needs a policy in bfloat16"):
        tiny.ppo_trainer(tmp_path, cache_implementation="static", bf16=True)
    tiny.ppo_trainer(tmp_path, cache_implementation="static").train()


@pytest.mark.parametrize("place", ["generation_kwargs", "generation config of the model"])
def test_a_static_cache_is_found_wherever_it_is_set(tmp_path, place):
    model, options = tiny.policy(tiny.tokenizer()), {"bf16": True}
    if place == "generation_kwargs":
        options["generation_kwargs"] = {"cache_implementation": "static"}
    else:
        model.generation_config.cache_implementation = "static"
    with pytest.raises(ValueError, match="This policy is in float32. Set `dtype: bfloat16`, or"):
        tiny.ppo_trainer(tmp_path, model=tiny.sft_adapter(model), **options)


def test_without_autocast_a_static_cache_is_not_refused(tmp_path):
    """DeepSpeed stores the weights in `bf16`, but only after they were loaded."""
    trainer = tiny.ppo_trainer(tmp_path, bf16=True)
    trainer.accelerator.native_amp = False
    trainer.generation_config.cache_implementation = "static"
    trainer._check_cache()
    assert trainer.generation_config.disable_compile is False


def test_a_policy_that_asks_for_several_answers_samples_greedily(tmp_path):
    """transformers validates the settings of model and run together, and greedy decoding has one answer."""
    policy = tiny.policy(tiny.tokenizer())
    policy.generation_config.num_return_sequences = 3
    trainer = tiny.ppo_trainer(tmp_path, model=policy, **GREEDY)
    trainer.train()
    assert policy.generation_config.num_return_sequences == 3

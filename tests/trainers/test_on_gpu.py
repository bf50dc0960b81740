"""What only a GPU shows: its numbers are the CPU's, its kernels agree, and its optimisers and compilers train."""

import math

import pytest
import tiny
import torch
from datasets import Dataset
from tolerances import GPU_BF16, GPU_FP32, assert_close
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import BitsAndBytesConfig

pytestmark = pytest.mark.gpu

BF16 = {"use_cpu": False, "bf16": True, "gradient_checkpointing": True}
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)


def _results(directory, kernel=SDPBackend.MATH, padded=True, **options):
    """Return log-probabilities, entropies and values of one batch, and the gradients of a loss of all of them."""
    trainer = tiny.ppo_trainer(directory, **options)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        head = trainer.model.value_head.output.weight
        head.copy_(torch.randn(head.shape, generator=generator))
    ids = torch.randint(60, 200, (4, 50), generator=generator)
    first, end = torch.tensor([[17], [19], [3], [17]]), torch.tensor([[22], [50], [31], [24]])
    mask = ((torch.arange(50) >= first) & (torch.arange(50) < end)).long() if padded else torch.ones_like(ids)
    weights = torch.rand((4, 30), generator=generator) * mask[:, -30:]
    ids, mask, weights = (x.to(trainer.args.device) for x in (ids * mask, mask, weights))
    forward = trainer._completion_forward(trainer.model, 30)
    with sdpa_kernel(kernel), trainer.compute_loss_context_manager():
        logps, entropies, _ = trainer._get_per_token_logps_and_entropies(forward, ids, mask, 30, compute_entropy=True)
        ((logps + entropies + forward.state_values[:, :-1]) * weights).sum().backward()
    keep = mask[:, -30:]
    results = {"logps": logps * keep, "entropies": entropies * keep, "values": forward.state_values[:, :-1] * keep}
    return results | {name: x.grad for name, x in trainer.model.named_parameters() if x.grad is not None}


def _assert_agree(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        x, y = x.detach().double().cpu(), actual[name].detach().double().cpu()
        assert_close((y - x).norm() / x.norm(), 0.0, tolerance)


@pytest.mark.parametrize(
    ("options", "kernel", "padded", "tolerance"),
    [
        ({}, SDPBackend.MATH, True, GPU_FP32),
        ({}, SDPBackend.EFFICIENT_ATTENTION, True, GPU_FP32),
        (BF16, SDPBackend.MATH, True, GPU_BF16),
        (BF16, SDPBackend.EFFICIENT_ATTENTION, True, GPU_BF16),
        (BF16, SDPBackend.FLASH_ATTENTION, False, GPU_BF16),  # it takes no padding
    ],
    ids=["float32 math", "float32 efficient", "bf16 math", "bf16 efficient", "bf16 flash"],
)
def test_log_probabilities_entropies_values_and_gradients_are_those_of_the_cpu(
    tmp_path, options, kernel, padded, tolerance
):
    expected = _results(tmp_path, padded=padded, use_cpu=True)
    _assert_agree(_results(tmp_path, kernel, padded, **{"use_cpu": False, **options}), expected, tolerance)


def _trained_kl(trainer):
    """Train, check that no step is missing and that each loss is a number, and return the logged KL."""
    trainer.train()
    assert trainer.state.global_step == trainer.args.max_steps
    assert all(math.isfinite(x) for x in tiny.logged(trainer, "loss").values())
    assert {x.device.type for x in trainer.model.parameters()} == {"cuda"}
    return [*tiny.logged(trainer, "objective/kl").values()]


def test_a_lora_on_a_bf16_base_starts_without_kl_and_keeps_its_precision(tmp_path):
    base = tiny.save(tiny.policy(tiny.tokenizer()), tmp_path / "base")
    options = {"model": base, "peft": tiny.lora(), "model_init_kwargs": {"dtype": "bfloat16"}, "check_numerics": True}
    trainer = tiny.ppo_trainer(tmp_path / "out", **options, **BF16)
    assert _trained_kl(trainer)[0] == 0.0
    # PEFT keeps an unused copy of the new value head.
    parameters = [(n, p) for n, p in trainer.model.named_parameters() if "original_module" not in n]
    dtypes = {p.requires_grad: p.dtype for _, p in parameters}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "paged_adamw_8bit"])
def test_policy_critic_reference_and_reward_share_one_4_bit_base(tmp_path, optimizer):
    """A run that was stopped is the whole run, bit for bit, also with the paged states of the optimiser."""
    bf16 = {**BF16, "model_init_kwargs": {"dtype": "bfloat16"}}
    base = tiny.save(tiny.policy(tiny.tokenizer()), tmp_path / "base")
    tiny.save_lora_reward_model(base, tmp_path / "rm", max_steps=2, quantization=NF4, **bf16)

    def make(directory, **kwargs):
        options = {"model": base, "rewards": None, "reward_adapter": str(tmp_path / "rm"), "quantization": NF4}
        options |= {"peft": tiny.lora(), "optim": optimizer, "max_steps": 6, "check_numerics": True}
        return tiny.ppo_trainer(directory, **{**options, **bf16, **kwargs})

    whole = make(tmp_path / "whole", save_strategy="steps", save_steps=3)
    assert _trained_kl(whole)[0] == 0.0
    resumed = make(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(resumed.model.get_parameter(name), parameter), name


def test_a_compiled_policy_trains(tmp_path, monkeypatch):
    for name in ("BACKEND", "MODE"):  # transformers passes its choice to accelerate in these
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "")
        monkeypatch.delenv(f"ACCELERATE_DYNAMO_{name}")
    trainer = tiny.ppo_trainer(tmp_path, torch_compile=True, pad_to_multiple_of=8, **BF16)
    assert _trained_kl(trainer)[0] == 0.0


@pytest.mark.parametrize(("padding", "graphs"), [(None, 2), (64, 1)])
def test_a_compiled_decoding_step_samples(tmp_path, padding, graphs):
    """A second width of the prompts compiles it again, for all widths. With padding there is one width."""
    base = tiny.save(tiny.policy(tiny.tokenizer()), tmp_path / "base")
    options = {"model": base, "peft": tiny.lora(), "model_init_kwargs": {"dtype": "bfloat16"}}
    data = Dataset.from_dict({"prompt": [" ".join(["red"] * words) for words in (1, 4, 8) for _ in range(8)]})
    options |= {"data": data, "shuffle_dataset": False, "max_steps": 12, "pad_to_multiple_of": padding}
    trainer = tiny.ppo_trainer(tmp_path / "out", cache_implementation="static", **options, **BF16)
    torch._dynamo.reset()
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert _trained_kl(trainer)[0] == 0.0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled + graphs


def test_an_evaluation_with_a_judge_runs_beside_the_training(tmp_path):
    options = {"eval_data": tiny.prompts(), "judges": {"length": tiny.length_reward}}
    trainer = tiny.ppo_trainer(tmp_path, eval_strategy="steps", eval_steps=2, **options, **BF16)
    _trained_kl(trainer)
    assert any("win_rate" in name for entry in trainer.state.log_history for name in entry)


def test_memory_does_not_grow(tmp_path):
    trainer, seen = tiny.ppo_trainer(tmp_path, max_steps=24, **BF16), []
    rollout = trainer._generate_and_score_completions

    def measured(inputs):
        seen.append(torch.cuda.memory_allocated())
        return rollout(inputs)

    trainer._generate_and_score_completions = measured
    _trained_kl(trainer)
    assert max(seen[3:]) <= max(seen[1:3]), "the first rollout comes before the optimiser's state"

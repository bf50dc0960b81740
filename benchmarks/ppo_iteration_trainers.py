"""The trainers and the scenarios of `ppo_iteration.py`."""

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, inject_adapter_in_model
from phases import Clock, watch, watch_trl_1_12
from random_models import (
    SHAPES,
    Shape,
    four_bit,
    random_model,
    word_tokenizer,
    write_base,
    write_reward_adapter,
)
from transformers import LogitsProcessor, LogitsProcessorList, PrinterCallback

OURS = {
    "ours": "rlhf_recipes PPO",
    "before": "rlhf_recipes PPO of another commit",
    "padded": "rlhf_recipes PPO, not trimmed",
    "compiled": "rlhf_recipes PPO, cache_implementation: static",
    "reward_critic": "rlhf_recipes PPO, critic: reward",
    "adapter_critic": "rlhf_recipes PPO, critic: adapter",
}
CRITICS: dict[str, Any] = {"reward_critic": "reward", "adapter_critic": "adapter"}
TRL_1_12 = {
    "trl_1_12": "TRL 1.12 PPO",
    "trl_1_12_tuned": "TRL 1.12 PPO, large batches without gradient",
    "trl_1_12_lora": "TRL 1.12 PPO, the same, critic with LoRA",
}
TRAINERS = {**OURS, "grpo": "TRL 1.16 GRPO", **TRL_1_12}
RANK = 16
FIRST_TOKEN = 10  # prompt i consists of the token 10 + i
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Scenario:
    """One iteration: a model, and the prompts and completions of a rollout.

    Args:
        shape: Name in `SHAPES`.
        prompt: Tokens of each prompt.
        completion: Tokens of the longest completion.
        tail: Whether the lengths of completions have a long tail.
        rows: Completions per rollout, one per prompt.
        one_backbone: Whether the reward model of our trainer is an adapter on the policy's base.
        quantize: Whether the policy's base is in 4 bit.
    """

    shape: str
    prompt: int
    completion: int
    tail: bool = False
    rows: int = 32
    micro_batch: int = 8
    epochs: int = 4
    one_backbone: bool = False
    quantize: bool = False

    @property
    def sizes(self) -> Shape:
        """Return the sizes of the model."""
        return SHAPES[self.shape]

    @property
    def lengths(self) -> list[int]:
        """Return the length of each completion: the limit, or log-normal around an eighth of it with one at it."""
        import numpy as np

        if not self.tail:
            return [self.completion] * self.rows
        draws = np.random.default_rng(0).lognormal(np.log(self.completion / 8), 0.8, self.rows)
        return [self.completion, *np.clip(draws[1:].round(), 2, self.completion).astype(int).tolist()]


SCENARIOS = {
    "tiny": Scenario("tiny", 8, 24, tail=True, rows=8, micro_batch=2, epochs=2),
    "even": Scenario("8x512", 32, 48),
    "long_tail": Scenario("8x512", 32, 192, tail=True),
    "large_vocabulary": Scenario("4x256", 32, 48),
    "qwen2.5_0.5b": Scenario("qwen2.5_0.5b", 128, 256, tail=True),
    "qwen2.5_0.5b_even": Scenario("qwen2.5_0.5b", 128, 64),
    "qwen2.5_0.5b_anchor": Scenario("qwen2.5_0.5b", 104, 276, rows=256, micro_batch=16, one_backbone=True),
    "qwen2.5_1.5b": Scenario("qwen2.5_1.5b", 128, 256, tail=True),
    "qwen2.5_1.5b_even": Scenario("qwen2.5_1.5b", 128, 64),
    "llama3.1_8b": Scenario(
        "llama3.1_8b", 256, 128, rows=16, micro_batch=2, epochs=1, one_backbone=True, quantize=True
    ),
}


class Lengths(LogitsProcessor):
    """End the completion of prompt i after `limits[i]` tokens, EOS included, and not before."""

    supports_continuous_batching = True  # it keeps nothing of a row

    def __init__(self, limits: torch.Tensor, prompt_length: int) -> None:
        self.limits, self.prompt_length = limits, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores that allow EOS only, or all but EOS. Nothing here waits for a GPU."""
        rows = input_ids[:, self.prompt_length - 1] - FIRST_TOKEN
        ends = input_ids.size(1) - self.prompt_length + 1 >= self.limits[rows]
        scores = scores.masked_fill(ends[:, None], -torch.inf)
        scores[:, 1] = torch.where(ends, 0.0, -torch.inf)
        return scores


def force_lengths(policy: Any, lengths: list[int]) -> None:
    """Let `policy.generate` give the completions these lengths."""
    limits, generate = torch.tensor(lengths), policy.generate

    def with_lengths(*args: Any, **kwargs: Any) -> Any:
        ids = kwargs.get("input_ids", args[0] if args else None)
        processor = Lengths(limits.to(ids.device), ids.size(1))
        return generate(*args, logits_processor=LogitsProcessorList([processor]), **kwargs)

    policy.generate = with_lengths


class Builder:
    """Build trainers of one scenario that train for ever, all with the same models, prompts and lengths."""

    def __init__(
        self, scenario: Scenario, device: str, folder: str, *, processes: int = 1, epochs: int | None = None
    ) -> None:
        self.scenario, self.device, self.folder = scenario, device, folder
        self.epochs = epochs or scenario.epochs
        self.micro_batches = scenario.rows // (scenario.micro_batch * processes)
        self.dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self.config = scenario.sizes.config(max_position_embeddings=1_024)
        self.tokenizer = word_tokenizer(self.config.vocab_size)
        prompts = [" ".join([f"w{FIRST_TOKEN + i}"] * scenario.prompt) for i in range(scenario.rows)]
        self.dataset = Dataset.from_dict({"prompt": prompts})
        self.lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        self.clock = Clock(device)

    def build(self, kind: str) -> Any:
        """Return a trainer of the kind, measured by `clock`."""
        if kind in TRL_1_12:
            return self._trl_1_12(kind)
        trainer = self._grpo() if kind == "grpo" else self._ppo(kind)
        trainer.remove_callback(PrinterCallback)
        force_lengths(trainer.model.get_base_model(), self.scenario.lengths)
        watch(trainer, self.clock)
        return trainer

    def classifier(self) -> Any:
        """Return a reward model."""
        return random_model(self.config, self.device, self.dtype, classifier=True)

    def policy(self, *, on_disk: bool) -> Any:
        """Return a policy, or the folder that holds it."""
        if not on_disk:
            return random_model(self.config, self.device, self.dtype)
        write_base(self.config, f"{self.folder}/base", self.device, self.dtype)
        return f"{self.folder}/base"

    @property
    def common(self) -> dict[str, Any]:
        """Return the options of all trainers."""
        scenario = self.scenario
        return {
            "output_dir": f"{self.folder}/out", "per_device_train_batch_size": scenario.micro_batch,
            "gradient_accumulation_steps": self.micro_batches, "learning_rate": 1e-6,
            "report_to": [], "use_cpu": self.device == "cpu", "bf16": self.device != "cpu",
            "gradient_checkpointing": False, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 10**6,
        }  # fmt: skip

    def trl_options(self, *, on_disk: bool) -> dict[str, Any]:
        """Return the options of trainers on TRL 1.16."""
        scenario = self.scenario
        return self.common | {
            "max_steps": 10**6, "steps_per_generation": self.micro_batches,
            "num_iterations": self.epochs, "max_completion_length": scenario.completion,
            "model_init_kwargs": {"dtype": str(self.dtype).removeprefix("torch.")} if on_disk else None,
        }  # fmt: skip

    def data(self) -> dict[str, Any]:
        """Return the arguments of trainers on TRL 1.16."""
        return {
            "train_dataset": self.dataset, "processing_class": self.tokenizer, "peft_config": self.lora,
            "quantization_config": four_bit(self.dtype) if self.scenario.quantize else None,
        }  # fmt: skip

    def _ppo(self, kind: str) -> Any:
        from rlhf_recipes import PPOConfig, PPOTrainer
        from rlhf_recipes.models.forward import CompletionForward

        if kind == "padded":

            def all_columns(self: Any, *, input_ids: torch.Tensor, columns: Any = None, **inputs: Any) -> Any:
                rest = (input_ids.size(1) - self.completion_length, self.completion_length)
                return trimmed(self, input_ids=input_ids, columns=rest, **inputs)

            trimmed, CompletionForward.__call__ = CompletionForward.__call__, all_columns
        scenario = self.scenario
        on_disk = scenario.one_backbone or scenario.quantize
        model, adapter, rewards = self.policy(on_disk=on_disk), None, {}
        if scenario.one_backbone:
            reward_model, adapter = None, f"{self.folder}/reward"
            self._write_adapter(adapter, model)
        else:
            reward_model, rewards = self.classifier(), {"reward_processing_classes": self.tokenizer}
        options = PPOConfig(
            **self.trl_options(on_disk=on_disk), critic=CRITICS.get(kind, "policy"),
            response_separator="", reward_adapter=adapter, check_numerics=False,
            cache_implementation="static" if kind == "compiled" else None,
        )  # fmt: skip
        trainer = PPOTrainer(model, reward_model, options, **rewards, **self.data())
        counted = [] if kind == "compiled" else [trainer.model]  # a compiler would compile each count anew
        self.clock.count(*counted, *([] if reward_model is None else [reward_model]))
        return trainer

    def _write_adapter(self, folder: str, base: str) -> None:
        write_reward_adapter(
            self.config, folder, base, RANK, self.device, self.dtype, quantized=self.scenario.quantize
        )

    def _grpo(self) -> Any:
        from trl import GRPOConfig, GRPOTrainer

        on_disk = self.scenario.quantize
        args = GRPOConfig(**self.trl_options(on_disk=on_disk), num_generations=2, beta=0.01, scale_rewards="none")
        args.num_generations = 1  # GRPOConfig refuses it: a group of one learns nothing, but costs the same
        reward_model = self.classifier()
        trainer = GRPOTrainer(
            self.policy(on_disk=on_disk), reward_model, args,
            reward_processing_classes=self.tokenizer, **self.data(),
        )  # fmt: skip
        self.clock.count(trainer.model, reward_model)
        return trainer

    def _trl_1_12(self, kind: str) -> Any:
        from trl.experimental.ppo import PPOConfig, PPOTrainer

        scenario, policy = self.scenario, self.policy(on_disk=False)
        force_lengths(policy, scenario.lengths)
        rows = scenario.micro_batch if kind == "trl_1_12" else scenario.rows
        args = PPOConfig(
            **self.common, num_ppo_epochs=self.epochs, num_mini_batches=1, total_episodes=10**6,
            response_length=scenario.completion, local_rollout_forward_batch_size=rows, stop_token="eos",
            temperature=1.0, num_sample_generations=0,
        )  # fmt: skip
        critic, reward_model = self.classifier(), self.classifier()
        if kind == "trl_1_12_lora":
            critic.requires_grad_(False)
            inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=LINEAR), critic)
            critic.score.requires_grad_(True)
        dataset = self.dataset.map(lambda row: {"input_ids": self.tokenizer(row["prompt"])["input_ids"]})
        trainer = PPOTrainer(
            args, self.tokenizer, policy, None, reward_model, dataset.select_columns(["input_ids"]), critic,
            peft_config=self.lora,
        )  # fmt: skip
        # One iteration uses the whole dataset. Without this, accelerate would step after each of its micro-batches.
        trainer.accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = False
        watch_trl_1_12(trainer, self.clock)
        self.clock.count(policy, critic, reward_model)
        return trainer

"""Train with TRL 1.12's PPO. `league.py` runs this in a process of its own, with TRL 1.12 first in `PYTHONPATH`.

The options are those of a run of the league. The value model starts as a copy of the reward model, as in TRL's own
example. What is not set here has TRL's default.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser

# A rollout has two mini-batches of 64 completions, and is used twice, as in the YAML files of the other methods.
MINI_BATCH, MINI_BATCHES, EPOCHS = 64, 2, 2


@dataclass(frozen=True)
class Run:
    """Options of a run. Those of the other methods' recipes have the same names."""

    model_name_or_path: str
    reward_model_path: str
    dataset_name: str
    output_dir: str
    run_name: str
    seed: int
    max_steps: int
    save_steps: int
    max_completion_length: int
    kl_coef: float
    learning_rate: float = 2e-4
    report_to: str = "mlflow"


def batch_options(max_steps: int) -> dict[str, int]:
    """Return TRL 1.12's options for so many optimiser steps.

    Its rollout has `per_device_train_batch_size * gradient_accumulation_steps` completions. With the other methods' 64
    and 1 it would have half of them, and the run twice the steps. With 64 and 2 the two mini-batches would share a
    step, except in the last rollout of each pass over the prompts. So a batch is the whole rollout here: TRL cuts it
    into the mini-batches, and steps after each.

    Raises:
        ValueError: If the last rollout would not be used to the end.
    """
    rollouts, rest = divmod(max_steps, MINI_BATCHES * EPOCHS)
    if rest:
        raise ValueError(f"{max_steps} optimiser steps are no multiple of the {MINI_BATCHES * EPOCHS} of a rollout.")
    return {
        "per_device_train_batch_size": MINI_BATCHES * MINI_BATCH,
        "gradient_accumulation_steps": 1,
        "num_mini_batches": MINI_BATCHES,
        "num_ppo_epochs": EPOCHS,
        "total_episodes": rollouts * MINI_BATCHES * MINI_BATCH,
    }


def build(run: Run) -> Any:
    """Return the trainer."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(run.model_name_or_path, padding_side="left")
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(run.model_name_or_path, dtype=torch.float32) for _ in range(2)
    )
    reward_model, value_model = (
        AutoModelForSequenceClassification.from_pretrained(run.reward_model_path, num_labels=1, dtype=torch.float32)
        for _ in range(2)
    )
    prompts = Dataset.from_json(str(Path(run.dataset_name, "train.jsonl")))["prompt"]
    dataset = Dataset.from_dict({"input_ids": tokenizer([f"{prompt}\n" for prompt in prompts])["input_ids"]})
    args = PPOConfig(
        output_dir=run.output_dir, run_name=run.run_name, seed=run.seed, report_to=run.report_to,
        **batch_options(run.max_steps), response_length=run.max_completion_length, temperature=1.0, stop_token="eos",
        missing_eos_penalty=1.0, kl_coef=run.kl_coef, learning_rate=run.learning_rate, lr_scheduler_type="constant",
        num_sample_generations=0, save_strategy="no", logging_steps=1, disable_tqdm=True,
        use_cpu=True, bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    return PPOTrainer(args, tokenizer, policy, reference, reward_model, dataset, value_model)


class Steps:
    """Count the optimiser's steps, and save the policy after every `save_steps`, also in the middle of a rollout.

    TRL counts rollouts, and accelerate skips steps where it accumulates. So the hook is on torch's own optimiser.
    """

    def __init__(self, trainer: Any, run: Run) -> None:
        self.done, self.trainer, self.run = 0, trainer, run
        trainer.optimizer.optimizer.register_step_post_hook(self)

    def __call__(self, *_: Any) -> None:
        """Count a step."""
        self.done += 1
        if self.done % self.run.save_steps == 0:
            self.trainer.policy_model.save_pretrained(Path(self.run.output_dir, f"checkpoint-{self.done}"))


def open_store() -> None:
    """Create the tables of the MLflow store and the experiment: two processes cannot do that at once."""
    import mlflow

    with FileLock(os.environ["MLFLOW_TRACKING_URI"].removeprefix("sqlite:///") + ".lock"):
        mlflow.set_experiment(os.environ["MLFLOW_EXPERIMENT_NAME"])


def main(run: Run) -> None:
    """Train.

    Raises:
        RuntimeError: If the run had another number of optimiser steps.
    """
    if run.report_to == "mlflow":
        open_store()
    trainer = build(run)
    steps = Steps(trainer, run)
    trainer.train()
    if steps.done != run.max_steps:
        raise RuntimeError(f"TRL took {steps.done} optimiser steps instead of {run.max_steps}.")


if __name__ == "__main__":
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    torch.set_num_threads(1)
    main(*HfArgumentParser(Run).parse_args_into_dataclasses())

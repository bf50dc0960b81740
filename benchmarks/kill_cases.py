"""Draw runs of SFT, reward modelling and PPO with random options, on models of a few thousand weights."""

import random
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset
from random_models import llama_config, word_tokenizer
from transformers import LlamaForCausalLM

WORDS = 60
ROWS = 24
QUIET = {
    "use_cpu": "true",
    "bf16": "false",
    "gradient_checkpointing": "false",
    "disable_tqdm": "true",
    "response_separator": " ",
    "save_strategy": "steps",
    "resume_from_checkpoint": "true",
    "learning_rate": "1e-3",
    "tracking_uri": "sqlite:///mlflow.db",
}
LORA = {"use_peft": "true", "lora_r": "4", "lora_target_modules": "all-linear"}
FOUR_BIT = {"load_in_4bit": "true", "use_bnb_nested_quant": "true"}
KINDS = (
    *("ppo", "ppo lora", "ppo adapter", "ppo one backbone", "ppo one backbone 4-bit", "ppo reward critic"),
    *("sft", "sft lora", "reward modelling", "reward modelling lora", "reward modelling 4-bit"),
)
SHARED_BACKBONE = {"ppo one backbone": "", "ppo one backbone 4-bit": "_4bit"}


class Case(NamedTuple):
    """A run.

    Attributes:
        kind: One of `KINDS`.
        recipe: File in `recipes/`.
        world_size: Number of processes.
        options: Options without `output_dir`.
    """

    kind: str
    recipe: str
    world_size: int
    options: dict[str, str]

    def arguments(self, output_dir: str) -> list[str]:
        """Return the command line after the name of the recipe."""
        options = self.options | {"output_dir": output_dir, "run_name": output_dir}
        if options.get("registered_model_name"):
            options["registered_model_name"] = output_dir
        return [part for name, value in options.items() for part in (f"--{name}", *value.split(" | "))]


def build_world(directory: Path) -> list[Case]:
    """Write data and an untrained policy, and return the runs that make what some cases start from."""
    torch.manual_seed(0)
    draw = random.Random(0)
    tokenizer = word_tokenizer(WORDS)
    config = llama_config(32, 2, 2, WORDS, initializer_range=0.2, max_position_embeddings=64)
    LlamaForCausalLM(config).save_pretrained(directory / "base")
    tokenizer.save_pretrained(directory / "base")

    def text(longest: int) -> str:
        return " ".join(f"w{draw.randrange(2, WORDS)}" for _ in range(draw.randint(2, longest)))

    def rows(*columns: str) -> list[dict[str, str]]:
        return [{column: text(8 if column == "prompt" else 14) for column in columns} for _ in range(ROWS)]

    kinds = {"demonstrations": ("prompt", "completion"), "preferences": ("prompt", "chosen", "rejected")}
    for name, columns in (kinds | {"prompts": ("prompt",)}).items():
        (directory / name).mkdir()
        for split in ("train", "test"):
            Dataset.from_list(rows(*columns)).to_json(directory / name / f"{split}.jsonl")

    short = QUIET | {"per_device_train_batch_size": "4", "max_steps": "3", "save_strategy": "no", "tracking": "false"}
    models = short | {"model_name_or_path": "base", "dataset_name": "preferences"}
    demonstrations = short | LORA | {"model_name_or_path": "base", "dataset_name": "demonstrations"}
    return [
        Case("reward_model", "reward_modeling.py", 1, models),
        Case("reward_adapter", "reward_modeling.py", 1, models | LORA),
        Case("reward_adapter_4bit", "reward_modeling.py", 1, models | LORA | FOUR_BIT),
        Case("sft_adapter", "sft.py", 1, demonstrations),
    ]


def draw_case(draw: random.Random, kind: str, world_size: int) -> Case:
    """Draw a run of a kind."""
    options = QUIET | _schedule(draw)
    if kind.startswith("ppo"):
        return Case(kind, "ppo.py", world_size, options | _evaluation(draw, options) | _ppo(draw, kind))
    is_sft = kind.startswith("sft")
    stage = {"dataset_name": "demonstrations" if is_sft else "preferences", "model_name_or_path": "base"}
    stage |= {"per_device_train_batch_size": draw.choice(["1", "2"])}
    stage |= {"gradient_accumulation_steps": draw.choice(["1", "2"])}
    stage |= LORA if "lora" in kind or "4-bit" in kind else {}
    stage |= FOUR_BIT if "4-bit" in kind else {}
    recipe = "sft.py" if is_sft else "reward_modeling.py"
    return Case(kind, recipe, world_size, options | _evaluation(draw, options, patience=False) | stage)


def _schedule(draw: random.Random) -> dict[str, str]:
    length = draw.choice([{"max_steps": "7"}, {"max_steps": "10"}, {"num_train_epochs": "1"}])
    limit = draw.choice([{}, *({"save_total_limit": str(number)} for number in (1, 2, 3))])
    return length | limit | {
        "save_steps": draw.choice(["1", "2", "3", "5"]),
        "logging_steps": draw.choice(["1", "2", "3", "4"]),
        "logging_first_step": draw.choice(["true", "false"]),
        "lr_scheduler_type": draw.choice(["constant", "linear", "cosine"]),
        "warmup_steps": draw.choice(["0", "3"]),
        "dataloader_num_workers": draw.choice(["0", "0", "0", "1"]),
        "seed": str(draw.randrange(1000)),
    } | draw.choice([{}, {"registered_model_name": "yes"}])  # fmt: skip


def _evaluation(draw: random.Random, options: dict[str, str], *, patience: bool = True) -> dict[str, str]:
    if draw.random() < 0.4:
        return {"eval_strategy": "no"}
    chosen = {"eval_strategy": "steps", "eval_steps": draw.choice(["2", "3"])}
    if draw.random() < 0.5:  # transformers wants a checkpoint at each evaluation
        chosen |= {"load_best_model_at_end": "true", "eval_steps": options["save_steps"]}
    if patience and draw.random() < 0.5:  # the score of these models hardly rises, so that many runs end early
        chosen |= {"early_stopping_patience": "1"}
    return chosen | {"eval_on_start": draw.choice(["true", "false"])}


def _ppo(draw: random.Random, kind: str) -> dict[str, str]:
    options = {
        "dataset_name": "prompts",
        "model_name_or_path": "sft_adapter" if kind == "ppo adapter" else "base",
        "reward_model_path": "reward_model",
        "per_device_train_batch_size": "4",
        "gradient_accumulation_steps": draw.choice(["1", "2"]),
        "steps_per_generation": "2",
        "num_iterations": draw.choice(["1", "2"]),
        "num_generations": draw.choice(["1", "2"]),
        "max_completion_length": "8",
        "kl_controller": draw.choice(["fixed", "adaptive"]),
        "missing_eos_penalty": "1.0",
    }
    if "lora" in kind or kind in SHARED_BACKBONE:
        options |= LORA
    if kind in SHARED_BACKBONE:
        options |= {"reward_adapter": f"reward_adapter{SHARED_BACKBONE[kind]}"}
        del options["reward_model_path"]
        options |= FOUR_BIT if "4-bit" in kind else {}
    if kind == "ppo reward critic":
        options |= {"critic": "reward", "critic_dataset_name": "preferences"}
    return options

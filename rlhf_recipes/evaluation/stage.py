"""Say what a stage does when it begins, and how it ended: the result, the verdict, and the next command."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from accelerate import PartialState

from rlhf_recipes.console import print_lines
from rlhf_recipes.evaluation.verdicts import Judgement
from rlhf_recipes.options.commands import following_command

PURPOSES = {
    "sft": "Supervised fine-tuning: learn to answer from demonstrations.",
    "reward_modeling": "Reward modelling: learn a score from preferences.",
    "process_reward_modeling": "Process reward modelling: learn to judge the steps of an answer.",
    "ppo": "PPO: train a policy to raise the score, close to where it started.",
    "rloo": "RLOO: train a policy to raise the score, without a critic.",
    "grpo": "GRPO: train a policy to raise the score, without a critic.",
    "dpo": "DPO: train a policy on preferences, without a reward model.",
    "sample_preferences": "New preferences: let a policy answer, and label pairs of its answers.",
    "evaluate_reward_model": "Evaluation of reward models: how well do they rank answers that people ranked?",
    "evaluate": "Evaluation: compare a policy with its baseline on held-out prompts.",
}


def begin_stage(stage: str, start: str | None, data: str | None, result: str) -> None:
    """Print what a stage does, from what, with which data, and where the result will be.

    Args:
        stage: Name in `PURPOSES`.
        start: Model that the stage starts from.
        data: Dataset.
        result: Output directory.
    """
    if PartialState().is_main_process:
        print_lines(PURPOSES[stage], f"  from {start}, with {data}, to {result}")


def end_stage(result: str, verdict: Iterable[Judgement], following: str, needed: Mapping[str, str | None]) -> None:
    """Print where the result is, the verdict, and the next command.

    Args:
        result: Output directory.
        verdict: At most three judgements.
        following: Recipe of the next stage.
        needed: Options that the next stage needs from this one. `None` is left out.
    """
    if not PartialState().is_main_process:
        return
    judged = [f"  {judgement.level:<10}{judgement.text}" for judgement in verdict]
    command = following_command(following, {name: value for name, value in needed.items() if value is not None})
    print_lines(f"Result: {Path(result).resolve()}", *judged, *([] if command is None else [f"Next: {command}"]))

"""The stages of `recipes/quickstart.py`, and its options."""

import argparse

from rlhf_recipes.quickstart.worlds import WORLDS

STAGES = {
    "world": "write texts, a tokenizer and an untrained model",
    "sft": "train the model on demonstrations",
    "preferences": "sample pairs of answers, and label them",
    "reward_modeling": "train a reward model on the pairs",
    "ppo": "train the policy against the reward model",
    "evaluate": "compare the policies after `sft` and `ppo` on held-out prompts",
}
FIRST, LAST = "world", "evaluate"


def titles(start: str, until: str) -> dict[str, str]:
    """Return the stages between two with their titles; none if the second comes before the first."""
    names = list(STAGES)
    return {
        name: f"Stage {number} of {len(names)}, {name}: {STAGES[name]}."
        for number, name in enumerate(names, start=1)
        if names.index(start) < number <= names.index(until) + 1
    }


def asked(description: str | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=WORLDS, default="quickstart", help="world to build, or to go on with")
    parser.add_argument("--start", choices=STAGES, default=FIRST, help="first stage to run")
    parser.add_argument("--until", choices=STAGES, default=LAST, help="last stage to run")
    parser.add_argument("--seed", type=int, default=0, help="seed of every stage; the world is always the same")
    parser.add_argument("--num_pairs", type=int, help="preference pairs for training (default: those of the world)")
    parser.add_argument("--directory", default=".", help="where `runs/` is written")
    options = parser.parse_args()
    if not titles(options.start, options.until):
        parser.error(f"--start {options.start} comes after --until {options.until}")
    return options

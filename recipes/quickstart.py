"""The quickstart: RLHF from nothing, without network or GPU, in a world whose true score is known.

    python recipes/quickstart.py
    python recipes/quickstart.py --world report
    python recipes/quickstart.py --until reward_modeling --seed 1 --directory runs/seed-1
    python recipes/quickstart.py --start ppo

The gold score labels pairs of answers of the SFT policy, with Bradley-Terry noise. The reward model sees only these
pairs, and PPO sees only the reward model. Every stage but the two that make data is the ordinary recipe.
"""

from rlhf_recipes.console import print_lines, print_table, quiet_start  # first: imports below print notes

# isort: split
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import set_seed

from rlhf_recipes.comparison.plots import plot_training
from rlhf_recipes.data.prompts import add_separator
from rlhf_recipes.durability.stages import continued, run_stages
from rlhf_recipes.evaluation.figures import ENDS, interval
from rlhf_recipes.evaluation.policies import generate_completions
from rlhf_recipes.models.loading import load_policy, load_tokenizer
from rlhf_recipes.options.paths import require_path
from rlhf_recipes.options.recipes import TrackingArguments
from rlhf_recipes.quickstart.build import sample_preferences, write_world
from rlhf_recipes.quickstart.stages import LAST, asked, titles
from rlhf_recipes.quickstart.worlds import WORLDS, World
from rlhf_recipes.tracking.pipeline import track_pipeline
from rlhf_recipes.tracking.store import ui_command
from rlhf_recipes.trainers.run_identity import IDENTITY_FILE

RECIPES = Path(__file__).resolve().parent
SEPARATOR = "\n"  # as in the configurations of both worlds


def make_preferences(world: World, run: Path, seed: int, num_pairs: int) -> None:
    """Sample pairs from the SFT policy on the training prompts, and label them with noise."""
    set_seed(seed)
    tokenizer = load_tokenizer(require_path("model", str(run / "sft")), padding_side="left")
    policy = load_policy(str(run / "sft")).eval()
    (run / "preferences").mkdir(exist_ok=True)
    write_pairs(world, run, "train", num_pairs, seed, policy, tokenizer)
    write_pairs(world, run, "test", num_pairs // 6, seed, policy, tokenizer)


def write_pairs(world: World, run: Path, split: str, count: int, seed: int, policy: Any, tokenizer: Any) -> None:
    """Write labelled pairs of two completions each."""
    prompts = Dataset.from_json(str(run / "prompts" / f"{split}.jsonl"))["prompt"]
    prompts = [prompts[i % len(prompts)] for i in range(count)]
    given = [*add_separator(Dataset.from_dict({"prompt": prompts}), SEPARATOR)["prompt"]] * 2
    length = world.max_completion_length
    ids = generate_completions(policy, tokenizer, given, max_completion_length=length, batch_size=128)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    pairs = sample_preferences(prompts, texts[:count], texts[count:], world.gold_score, world.label_noise, seed)
    pairs.to_json(str(run / "preferences" / f"{split}.jsonl"))


def run_stage(stage: str, name: str, seed: int, num_pairs: int, parent: list[str], start: str) -> None:
    """Run one stage as its own command would."""
    quiet_start()  # a spawned process starts without it
    world, run = WORLDS[name], Path("runs", name)
    try:
        if stage == "world":
            write_world(world.text, run, seed, SEPARATOR, world.num_demonstrations)
        elif stage == "preferences":
            make_preferences(world, run, seed, num_pairs)
        else:
            script, config = str(RECIPES / f"{stage}.py"), str(RECIPES / "configs" / name / f"{stage}.yaml")
            going_on = continued(run / stage, start, seed, IDENTITY_FILE)
            sys.argv = [script, "--config", config, "--seed", str(seed), *parent, *going_on]
            runpy.run_path(script, run_name="__main__")
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


def report(run: Path, gold: str) -> None:
    """Print the outcome and write the plot."""
    results = json.loads((run / "evaluate" / "results.json").read_text(encoding="utf-8"))
    rows = {judge: [results[f"{judge}/baseline"], results[f"{judge}/policy"]] for judge in (gold, "reward_model")}
    rows["length (tokens)"] = [results["baseline/length"], results["policy/length"]]
    rows["KL to SFT (nats)"] = [0.0, results["policy/kl"]]
    rows["win rate over SFT (gold)"] = ["", interval(*(results[f"{gold}/win_rate{end}"] for end in ENDS))]
    plot = plot_training(run / "ppo" / "trainer_state.json", run / "ppo" / "training.png")
    print_table(f"{run.name.capitalize()}, {results['prompts']:.0f} held-out prompts", rows, ("", "SFT", "PPO"))
    print_lines(f"Curves: {plot.resolve()}", f"Runs:   {ui_command(TrackingArguments())}")


def main() -> None:
    """Run the stages in order."""
    args = asked(__doc__)
    stages = titles(args.start, args.until)
    quiet_start()
    Path(args.directory).mkdir(parents=True, exist_ok=True)
    os.chdir(args.directory)
    tracking = TrackingArguments(tracking=not {"world", "preferences"}.issuperset(stages))
    run, world = Path("runs", args.world), WORLDS[args.world]
    with track_pipeline(tracking, str(run), args.seed, str(run)) as parent:
        run_stages(stages, run_stage, args.world, args.seed, args.num_pairs or world.num_pairs, parent, args.start)
    if args.until == LAST:
        report(run, world.gold_score.__name__)


if __name__ == "__main__":
    main()

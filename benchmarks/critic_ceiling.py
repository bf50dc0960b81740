"""Measure how much of a completion's score can be known before it ends: the ceiling of any critic.

    python benchmarks/critic_ceiling.py --directory runs/quickstart
    python benchmarks/critic_ceiling.py --directory runs/quickstart --policy runs/quickstart/ppo

Samples completions, cuts them at random tokens, and continues each prefix several times. What differs between the
continuations of one prefix cannot be known there. With scores s, prefixes p and one state per token:

    ceiling = 1 - E_p[Var(s | p)] / Var(s)

Prints it with a 95 % bootstrap interval over prefixes, by quarter of the completion, and beside it what the prompt
alone explains. `val/explained_variance_mc` of a run is the same figure for its critic.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from scipy import stats

from rlhf_recipes.console import quiet_start
from rlhf_recipes.data.prompts import add_separator
from rlhf_recipes.evaluation.policies import eos_token_ids, generate_completions
from rlhf_recipes.models.loading import load_policy, load_tokenizer
from rlhf_recipes.rewards.scorer import RewardModelScorer


class Branches:
    """Sample whole completions and continuations of their prefixes, and score them."""

    def __init__(self, directory: Path, policy: Path, length: int) -> None:
        self.tokenizer = load_tokenizer(str(policy), padding_side="left")
        self.policy, self.length = load_policy(str(policy)).eval(), length
        self.reward_model = RewardModelScorer.from_pretrained(str(directory / "reward_modeling"))
        self.reward_model.batch_size = 64
        self.ends = eos_token_ids(self.policy, self.tokenizer)
        self.reward_model.policy_eos_token_ids = self.ends

    def score(self, prompts: list[str], completions: list[list[int]]) -> np.ndarray:
        """Return the scores of completions."""
        texts = self.tokenizer.batch_decode(completions, skip_special_tokens=True)
        return np.asarray(self.reward_model(prompts, texts, completion_ids=completions))

    def continuations(self, prompt: str, prefix: list[int], count: int) -> list[list[int]]:
        """Return `count` completions that begin with a prefix."""
        start = self.tokenizer(prompt)["input_ids"] + prefix
        ids = torch.tensor([start] * count)
        config = {"do_sample": True, "top_k": 0, "temperature": 1.0, "max_new_tokens": self.length - len(prefix)}
        output = self.policy.generate(
            ids, attention_mask=torch.ones_like(ids), pad_token_id=self.tokenizer.pad_token_id, **config
        )
        rows = []
        for row in output[:, len(start) :].tolist():
            end = next((i for i, token in enumerate(row) if token in self.ends), len(row))
            rows.append(prefix + row[: end + 1])
        return rows


def measure(branches: Branches, prompts: list[str], *, states: int, count: int, seed: int) -> dict[str, Any]:
    """Return the ceiling, its interval, its quarters, and the share that the prompt explains."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    asked = [prompt for prompt in prompts for _ in range(count)]
    whole = generate_completions(
        branches.policy, branches.tokenizer, asked, max_completion_length=branches.length, batch_size=128
    )
    scores, lengths = branches.score(asked, whole), np.asarray([len(row) for row in whole])
    total = float(np.repeat(scores, lengths).var())
    by_prompt = scores.reshape(-1, count)
    weights = lengths.reshape(-1, count).mean(axis=1)
    of_prompt = 1 - float(np.average(by_prompt.var(axis=1, ddof=1), weights=weights)) / total
    tokens = [(row, t) for row, length in enumerate(lengths) for t in range(length)]
    within, places = [], []
    for index in rng.choice(len(tokens), states, replace=False):
        row, t = tokens[index]
        rows = branches.continuations(asked[row], whole[row][:t], count)
        within.append(branches.score([asked[row]] * count, rows).var(ddof=1))
        places.append(t / lengths[row])
    left, quarters = np.asarray(within), np.minimum((np.asarray(places) * 4).astype(int), 3)
    interval = stats.bootstrap((left,), np.mean, method="percentile", rng=rng).confidence_interval
    return {
        "ceiling": 1 - float(left.mean()) / total,
        "low": 1 - float(interval.high) / total,
        "high": 1 - float(interval.low) / total,
        "quarters": [1 - float(left[quarters == q].mean()) / total for q in range(4)],
        "prompt": of_prompt,
        "states": states,
        "continuations": count,
    }


def main() -> None:
    """Measure, print and write `critic_ceiling.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("runs", "quickstart"), help="with prompts and models")
    parser.add_argument("--policy", type=Path, help="policy that samples; default: the SFT policy")
    parser.add_argument("--states", type=int, default=160)
    parser.add_argument("--continuations", type=int, default=8)
    parser.add_argument("--max_completion_length", type=int, default=48)
    parser.add_argument("--separator", default="\n")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    prompts = Dataset.from_json(str(args.directory / "prompts" / "test.jsonl"))
    branches = Branches(args.directory, args.policy or args.directory / "sft", args.max_completion_length)
    texts = list(add_separator(prompts, args.separator)["prompt"])
    result = measure(branches, texts, states=args.states, count=args.continuations, seed=args.seed)
    (args.directory / "critic_ceiling.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    quarters = ", ".join(f"{x:.2f}" for x in result["quarters"])
    print(
        f"A critic can explain {result['ceiling']:.2f} [{result['low']:.2f}, {result['high']:.2f}] of the variance of "
        f"the score; by quarter of the completion {quarters}. The prompt alone explains {result['prompt']:.2f}."
    )


if __name__ == "__main__":
    quiet_start()
    main()

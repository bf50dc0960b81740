"""Compare ways to train a reward model on labels that depend on length, with `trl.RewardTrainer` as the measure.

    python benchmarks/reward_models.py --world quickstart --bases DIRECTORY --directory runs/reward_models
    python benchmarks/reward_models.py --world hh --data data/hh_rlhf_harmless --model runs/smollm2_135m/base

In the world of the quickstart the judge of the training pairs likes long answers: gold score + 0.25 per word. The
held-out labels are those of a judge without this bias. `DIRECTORY` has a folder `seed<N>` with `sft`, `prompts` and
`preferences` for each seed, as `recipes/quickstart.py --until preferences` writes them. The world `hh` has human
preferences. A reward model is a network of two layers on the states of the SFT policy, or of a chat model's first
layers, which are computed once (`frozen_states.py`). All methods have the same first weights, pairs and steps.

A run whose result exists is not repeated. Writes `<world>.md` and `<world>.png`.
"""

import argparse
import json
import random
import resource
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from frozen_states import frozen_reward_model, write_states
from reward_model_methods import METHODS, TRL
from reward_model_report import write_report
from transformers import set_seed
from trl import RewardConfig

from rlhf_recipes import RewardModelConfig, RewardModelTrainer
from rlhf_recipes.console import quiet_start
from rlhf_recipes.data.prompts import add_separator
from rlhf_recipes.evaluation.policies import sample_answers
from rlhf_recipes.models.loading import load_policy, load_tokenizer
from rlhf_recipes.quickstart.build import sample_preferences
from rlhf_recipes.quickstart.worlds import WORLDS

PER_WORD = 0.25  # bias of the judge; a standard deviation of the length gap is nine words
BEST_OF = 8
OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 50,
    "lr_scheduler_type": "cosine",
    "logging_steps": 20,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "weight_decay": 0.01,
}


@dataclass(frozen=True)
class Start:
    """Hold what all methods share on a seed: a base, its saved states, pairs, options, and answers to choose from."""

    base: Path
    tokenizer: Any
    states: Path
    train: Dataset
    test: Dataset
    options: dict[str, Any]
    asked: list[str]
    answers: list[str]

    def tokens(self, text: Any) -> list[int]:
        """Return the tokens of a text as TRL renders it."""
        if isinstance(text, str):
            return self.tokenizer(text + self.tokenizer.eos_token)["input_ids"]
        return self.tokenizer.apply_chat_template(text, return_dict=True)["input_ids"]

    def write_states(self, layers: int) -> None:
        """Compute the states of all texts, unless they are there."""
        if not self.states.exists():
            rows = [
                (row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]) for row in [*self.train, *self.test]
            ]
            texts = [prompt + answer for prompt, answer in zip(self.asked, self.answers, strict=True)]
            rows += zip(texts[::2], texts[1::2], strict=True)
            self.states.parent.mkdir(parents=True, exist_ok=True)
            write_states(self.states, self.base, layers, [(self.tokens(a), self.tokens(b)) for a, b in rows])


def start_of_quickstart(args: argparse.Namespace, seed: int) -> Start:
    """Label the training pairs of a seed by a judge that likes long answers. The test pairs keep their labels."""
    base = args.bases / f"seed{seed}"
    given, test = (Dataset.from_json(str(base / "preferences" / f"{split}.jsonl")) for split in ("train", "test"))
    given, swap = given.select(range(args.pairs)), random.Random(seed)
    pairs = [
        (a, b) if swap.random() < 0.5 else (b, a) for a, b in zip(given["chosen"], given["rejected"], strict=True)
    ]
    train = sample_preferences(given["prompt"], *zip(*pairs, strict=True), biased_score, 1.0, seed)
    train, test = (add_separator(dataset, "\n") for dataset in (train, test))
    states = args.directory / args.world / f"states-{seed}.pt"
    options, tokenizer = {"learning_rate": args.learning_rate}, load_tokenizer(str(base / "sft"))
    start = Start(base / "sft", tokenizer, states, train, test, options, *answers_of(base))
    start.write_states(layers=4)
    return start


def biased_score(prompts: Any, completions: Any) -> list[float]:
    """Return the gold score, raised by each word."""
    gold = WORLDS["quickstart"].gold_score(prompts=prompts, completions=completions)
    return [score + PER_WORD * len(text.split()) for score, text in zip(gold, completions, strict=True)]


def answers_of(base: Path) -> tuple[list[str], list[str]]:
    """Return the held-out prompts, each `BEST_OF` times, and an answer of the SFT policy to each."""
    prompts = Dataset.from_json(str(base / "prompts" / "test.jsonl"))
    asked = [prompt for prompt in add_separator(prompts, "\n")["prompt"] for _ in range(BEST_OF)]
    tokenizer, policy = load_tokenizer(str(base / "sft"), padding_side="left"), load_policy(str(base / "sft")).eval()
    torch.manual_seed(0)
    limit = WORLDS["quickstart"].max_completion_length
    return asked, sample_answers(policy, tokenizer, asked, batch_size=160, max_completion_length=limit)[2]


def start_of_hh(args: argparse.Namespace, seed: int) -> Start:
    """Read human preferences. The seed sets the first weights and the order of the pairs."""
    train, test = (Dataset.from_json(str(args.data / f"{split}.jsonl")) for split in ("train", "eval"))
    states = args.directory / f"states-{args.layers}.pt"
    start = Start(
        args.model, load_tokenizer(str(args.model)), states, train, test, {"learning_rate": args.learning_rate}, [], []
    )
    start.write_states(args.layers)
    return start


STARTS = {"quickstart": start_of_quickstart, "hh": start_of_hh}


def train(start: Start, name: str, seed: int, folder: Path, epochs: float) -> Any:
    """Train a reward model by a method, and return its trainer."""
    method = METHODS[name]
    options = OPTIONS | start.options | method.options | {"seed": seed, "output_dir": str(folder)}
    ours = issubclass(method.trainer, RewardModelTrainer)
    options |= {"num_train_epochs": epochs} | ({"response_separator": "\n"} if ours else {})
    set_seed(seed)
    trainer = method.trainer(
        frozen_reward_model(start.states, start.base, start.tokenizer.pad_token_id),
        (RewardModelConfig if ours else RewardConfig)(**options),
        train_dataset=start.train,
        eval_dataset=start.test,
        processing_class=start.tokenizer,
    )
    trainer.train()
    return trainer


@torch.no_grad()
def scores_of(trainer: Any) -> dict[str, list[float]]:
    """Return scores and lengths of the held-out pairs."""
    rows: list[torch.Tensor] = []
    trainer.model.eval()
    for batch in trainer.get_eval_dataloader():
        scores = trainer.model(**batch).logits.float().squeeze(-1).chunk(2)
        rows.append(torch.stack([*scores, *batch["attention_mask"].sum(dim=1).float().chunk(2)]))
    names = ("chosen", "rejected", "chosen_lengths", "rejected_lengths")
    return dict(zip(names, torch.cat(rows, dim=1).tolist(), strict=True))


@torch.no_grad()
def best_of(trainer: Any, start: Start) -> dict[str, float]:
    """Return gold score and words of the answer to each held-out prompt that the reward model likes best."""
    texts = [torch.tensor(start.tokens(a + b)) for a, b in zip(start.asked, start.answers, strict=True)]
    scores = [trainer.model(input_ids=text[None], attention_mask=torch.ones_like(text)[None]).logits for text in texts]
    gold = WORLDS["quickstart"].gold_score(prompts=start.asked, completions=start.answers)
    best = torch.cat(scores).view(-1, BEST_OF).argmax(dim=1) + BEST_OF * torch.arange(len(texts) // BEST_OF)
    words = [len(start.answers[index].split()) for index in best.tolist()]
    return {"best_gold": float(np.take(gold, best).mean()), "best_words": float(np.mean(words))}


def run(args: argparse.Namespace, start: Start, name: str, seed: int) -> None:
    """Train and measure one reward model, unless its result is there."""
    folder = args.directory / args.world / name.replace(" ", "-") / f"seed-{seed}"
    if (folder / "result.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    trainer = train(start, name, seed, folder, args.epochs)
    result = {"cpu_seconds": resource.getrusage(resource.RUSAGE_SELF).ru_utime - before, **scores_of(trainer)}
    if start.answers:
        result |= best_of(trainer, start)
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    gaps = np.subtract(result["chosen"], result["rejected"])
    length = np.subtract(result["chosen_lengths"], result["rejected_lengths"])
    shown = f"accuracy {np.mean(gaps > 0):.3f}, length {np.corrcoef(gaps, length)[0, 1]:+.2f}"
    print(f"{name}, seed {seed}: {shown}, {result['cpu_seconds']:.0f} CPU s", flush=True)


def results(args: argparse.Namespace, methods: Iterable[str]) -> dict[str, dict[int, dict[str, Any]]]:
    """Return the results by method and seed."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for name in methods:
        for seed in args.seeds:
            file = args.directory / args.world / name.replace(" ", "-") / f"seed-{seed}" / "result.json"
            if file.exists():
                found.setdefault(name, {})[seed] = json.loads(file.read_text(encoding="utf-8"))
    return found


def main() -> None:
    """Run what has no result, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=STARTS, default="quickstart")
    parser.add_argument("--directory", type=Path, default=Path("runs", "reward_models"))
    parser.add_argument("--bases", type=Path, default=Path("runs", "bases"))
    parser.add_argument("--data", type=Path, default=Path("data", "hh_rlhf_harmless"))
    parser.add_argument("--model", type=Path, default=Path("runs", "smollm2_135m", "base"))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--pairs", type=int, default=1200, help="training pairs of the world quickstart")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    args = parser.parse_args()
    quiet_start()
    torch.set_num_threads(1)
    for seed in args.seeds:
        start = STARTS[args.world](args, seed)
        for name in args.methods:
            run(args, start, name, seed)
    write_report(args.directory, args.world, results(args, METHODS), TRL)


if __name__ == "__main__":
    sys.exit(main())

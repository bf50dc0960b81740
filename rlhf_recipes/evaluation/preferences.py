"""Turn answers into preference pairs: by judges, or by people who fill a file; and say what the pairs are like."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from huggingface_hub import DatasetCard, DatasetCardData

from rlhf_recipes.console import print_lines
from rlhf_recipes.data.label_file import ALLOWED, Question, read_label_file, write_label_file
from rlhf_recipes.data.messages import as_text
from rlhf_recipes.data.pairs import Pair, Rows, best_and_worst, json_lines, longer_chosen, pairs_at_random
from rlhf_recipes.durability.earlier_run import keep_earlier_files
from rlhf_recipes.durability.origin import Origin, public_text
from rlhf_recipes.evaluation.labelling import Asked, decided, guarded_comparisons, scores_of, strengths
from rlhf_recipes.evaluation.sampled_answers import Answers
from rlhf_recipes.evaluation.verdicts import Judgement, Level
from rlhf_recipes.options.preferences import PreferenceArguments
from rlhf_recipes.rewards.calls import RewardCalls
from rlhf_recipes.rewards.protocol import scorer_of

IN_CARD = ("dataset_name", "earlier_pairs", "num_samples", "pair_answers", "only_agreed", "temperature", "seed")
EARLIER = "__earlier"  # files of an earlier run with other labels; `datasets` takes no data from such a folder
FILES = ("train.jsonl", "test.jsonl", "README.md", "results.json")
# Share of pairs whose longer answer is chosen, as a distance from a half; share of pairs that gave no label.
LITTLE_LENGTH, MUCH_LENGTH, MANY_WITHOUT = 0.1, 0.2, 0.25


class Labellers(NamedTuple):
    """Hold judges by name: those that score one answer, and those that compare two."""

    scoring: Mapping[str, Any]
    comparing: Mapping[str, Any]


class Labelled(NamedTuple):
    """Hold pairs of answers with their labels.

    Args:
        pairs: Pairs.
        labels: 1 if the first answer is chosen, -1 if the second is, 0 for no pair.
        counts: Comparisons by what became of them.
        by: Names of all who labelled, judges with a hash of their weights or settings.
        figures: Figures of the judges: failed calls, and shares of ties, refusals and unreadable answers.
    """

    pairs: list[Pair]
    labels: list[int]
    counts: Counter[str]
    by: list[str]
    figures: dict[str, float]


def labelled_pairs(
    script_args: PreferenceArguments, asked: Asked, answers: Answers, labellers: Labellers
) -> Labelled | None:
    """Return pairs, their labels, and counts; `None` while people have not labelled yet.

    Args:
        script_args: Options of the recipe.
        asked: Answers as judges see them.
        answers: The same answers.
        labellers: Judges; none if people label.

    Raises:
        ValueError: See `read_label_file`.
    """
    if script_args.label_file is not None:
        return _by_people(Path(script_args.label_file), script_args, asked, answers)
    return _by_judges(script_args, asked, answers, labellers)


def _by_judges(script_args: PreferenceArguments, asked: Asked, answers: Answers, labellers: Labellers) -> Labelled:
    calls = RewardCalls(script_args.reward_timeout, script_args.reward_retries, script_args.failed_rewards)
    own_limits = RewardCalls(timeout=None, retries=0, failed=script_args.failed_rewards)
    for judge in labellers.scoring.values():
        if hasattr(judge, "policy_eos_token_ids"):  # the ends of answers are known only now
            judge.policy_eos_token_ids = answers.end_ids
    scores, samples = scores_of(labellers.scoring, asked, calls), script_args.num_samples
    if script_args.pair_answers == "best_and_worst":
        pairs, counts = best_and_worst(scores.mean(axis=1).tolist(), samples, answers.texts)
    else:
        pairs, counts = _at_random(script_args, answers)
    preferred = strengths(pairs, scores, guarded_comparisons(labellers.comparing, calls, own_limits), asked)
    labels, found = decided(preferred, only_agreed=script_args.only_agreed)
    counts.update(found)
    figures = {f"pairs/{name}": value for each in (calls, own_limits) for name, value in each.settle().items()}
    by = [f"{name} ({scorer_of(judge).identity()})" for each in labellers for name, judge in each.items()]
    return Labelled(pairs, labels, counts, by, figures)


def _by_people(path: Path, script_args: PreferenceArguments, asked: Asked, answers: Answers) -> Labelled | None:
    """Write the file for people if it is not there, and else read it."""
    pairs, counts = _at_random(script_args, answers)
    questions = [Question(as_text(asked.prompts[a]), answers.texts[a], answers.texts[b]) for a, b in pairs]
    is_new = not path.exists()
    if is_new:
        write_label_file(path, questions)
    given = None if is_new else read_label_file(path, questions)
    if given is None:
        print_lines(
            f"{path} {'has' if is_new else 'still has'} {len(pairs):,} pairs without a label. Write {ALLOWED} into "
            "the column `better` of each, and run this command again."
        )
        return None
    labels = [round(2 * x - 1) for x in given]
    counts["ties"] = labels.count(0)
    return Labelled(pairs, labels, counts, ["people"], {})


def _at_random(script_args: PreferenceArguments, answers: Answers) -> tuple[list[Pair], Counter[str]]:
    samples, how = script_args.num_samples, script_args.pair_answers
    assert how != "best_and_worst"
    return pairs_at_random(len(answers.texts) // samples, samples, how, script_args.seed, answers.texts)


def rows_of_pairs(labelled: Labelled, prompts: list[Any], asked: Asked) -> Rows:
    """Return the pairs with a label in TRL's format.

    Args:
        labelled: Pairs and labels.
        prompts: Prompts, as the user wrote them.
        asked: Answers as judges saw them.
    """
    rows, samples = [], len(asked.answers) // len(prompts)
    for pair, label in zip(labelled.pairs, labelled.labels, strict=True):
        if label:
            chosen, rejected = pair if label > 0 else pair[::-1]
            answers = {"chosen": asked.answers[chosen], "rejected": asked.answers[rejected]}
            rows.append({"prompt": prompts[chosen // samples], **answers})
    return rows


def figures_of(new: Rows, splits: tuple[Rows, Rows], counts: Mapping[str, int], answers: Answers) -> dict[str, float]:
    """Return the figures of a set of pairs.

    Args:
        new: New pairs.
        splits: All pairs to train on, and all to evaluate on.
        counts: Comparisons and pairs by what became of them.
        answers: Answers.
    """
    train, test = splits
    figures = {"answers": len(answers.texts), "ended": answers.ended, "train": len(train), "test": len(test)}
    figures |= {"longer_chosen": longer_chosen(new)}
    for name in ("chosen", "rejected"):
        figures[f"{name}_length"] = sum(len(as_text(row[name])) for row in new) / max(len(new), 1)
    figures |= {name: counts[name] for name in sorted(counts)}
    return {f"pairs/{name}": float(value) for name, value in figures.items()}


def preferences_verdict(figures: Mapping[str, float], *, only_agreed: bool = False) -> list[Judgement]:
    """Judge pairs by the answers that gave none, and by the length of the chosen ones.

    Args:
        figures: Figures by `figures_of`.
        only_agreed: Whether the pairs about which judges disagree were left out.
    """
    left_out = ("duplicates", "empty", "ties", "unlabelled", *(["disagreed"] if only_agreed else []))
    lost = sum(figures.get(f"pairs/{name}", 0.0) for name in left_out)
    new = figures.get("pairs/new", 0.0) + figures.get("pairs/repeated", 0.0)
    without, longer = lost / max(lost + new, 1), figures["pairs/longer_chosen"]
    told = f"{new:,.0f} new pairs; {without:.0%} of the comparisons gave none (ties, duplicates, no agreed label)"
    distance = abs(longer - 0.5)
    level: Level = "good" if distance <= LITTLE_LENGTH else "doubtful" if distance <= MUCH_LENGTH else "bad"
    reason = "" if level == "good" else ": a reward model may learn the length from them"
    return [
        Judgement("good" if without <= MANY_WITHOUT else "doubtful", told),
        Judgement(level, f"the longer answer is chosen in {longer:.0%} of the pairs{reason}"),
    ]


def write_preferences(
    script_args: PreferenceArguments, splits: tuple[Rows, Rows], figures: Mapping[str, float], facts: Mapping[str, Any]
) -> list[Path]:
    """Write both splits, the figures and a data card. Return the paths. Earlier files of other content are moved.

    Args:
        script_args: Options of the recipe.
        splits: Pairs to train on, and pairs to evaluate on.
        figures: Figures.
        facts: Who answered and who labelled, by a title.
    """
    folder = Path(script_args.output_dir)
    options = {name: getattr(script_args, name) for name in IN_CARD}
    texts = [*map(json_lines, splits), _card(folder.name, figures, {**facts, **options})]
    paths = [folder / name for name in FILES]
    for path, text in zip(paths, [*texts, json.dumps(figures, indent=2) + "\n"], strict=True):
        if path.exists() and path.read_text(encoding="utf-8") != text:
            _keep(path)
        path.write_text(text, encoding="utf-8")
    return paths


def _keep(path: Path) -> None:
    """Move a file where nobody takes it for data: `train.replaced-1.jsonl` would be read as training data."""
    earlier = path.parent / EARLIER / path.name
    earlier.parent.mkdir(exist_ok=True)
    keep_earlier_files(earlier)
    path.rename(earlier)


def _card(name: str, figures: Mapping[str, float], facts: Mapping[str, Any]) -> str:
    """Return the data card.

    Its head names no files: of a directory whose card does, `datasets` keeps the first content in its cache for ever.
    """
    head = DatasetCardData(tags=["preference", "rlhf_recipes"])
    origin = Origin.of_process(PartialState().num_processes)
    packages = ", ".join(f"{package} {version}" for package, version in origin.packages.items())
    known = {**facts, "command": origin.command, "commit": origin.commit, "packages": packages}
    told = [f"| {title} | {_cell(value)} |" for title, value in known.items() if value not in (None, "", [])]
    counted = [f"| {title.removeprefix('pairs/')} | {value:,.6g} |" for title, value in figures.items()]
    lines = [f"# {name}", "", "Preference pairs (`prompt`, `chosen`, `rejected`), made with `rlhf_recipes`.", ""]
    lines += ["| | |", "|---|---|", *told, "", "| figure | value |", "|---|---|", *counted, ""]
    return str(DatasetCard(f"---\n{head.to_yaml()}\n---\n\n" + "\n".join(lines)))


def _cell(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return " ".join(public_text(text).split()).replace("|", r"\|")

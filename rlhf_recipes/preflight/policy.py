"""Find silent mistakes between a policy, its sampler and its reward model, before the first rollout.

The checks score at most `2 * PROBES` answers. They draw no random numbers and change nothing. They do not repeat the
checks of the trainer's constructor.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset

from rlhf_recipes.models.generation import SETTINGS
from rlhf_recipes.preflight.finding import Finding
from rlhf_recipes.rewards.protocol import Scorer
from rlhf_recipes.rewards.quality import CHANCE

PROBES = 8
# One deviation of a normalised score is 5 default clips. Four times more or fewer is far off.
SPREAD_PER_CLIP = (1.25, 20.0)
logger = logging.getLogger(__name__)


def sampling_options(args: Any, given: Iterable[str], model_config: Any) -> dict[str, tuple[Any, str]]:
    """Return the generation options that change the distribution of the samples, each with its value and source.

    TRL's log-probabilities take account of the temperature only. Its sampler sets the options of the run. All
    other options of the model's `generation_config.json` stay active, and nobody sees them.

    Args:
        args: Options of the run.
        given: Names of the generation options that the trainer sets itself, or their values by name.
        model_config: `GenerationConfig` of the policy; `None` if the sampler does not read it (vLLM).
    """
    effects = {name: setting for name, setting in SETTINGS.items() if setting.effect == "distribution"}
    asked = {name: getattr(args, name, None) for name in effects} | dict(args.generation_kwargs or {})
    found = {name: (value, "the options of this run") for name, value in asked.items()}
    if model_config is not None:
        # Where the trainer sets nothing, the model's value stays.
        unset = {name for name in given if isinstance(given, Mapping) and given[name] is None}
        for name in effects.keys() - (set(given) - unset):
            found[name] = (getattr(model_config, name, None), "the policy's `generation_config.json`")
    neutral = {name: setting.neutral for name, setting in effects.items()} | {"temperature": (None, args.temperature)}
    return {name: value for name, value in sorted(found.items()) if name in effects and value[0] not in neutral[name]}


def options_of_sampler(trainer: Any) -> dict[str, tuple[Any, str]]:
    """Return `sampling_options` of a trainer that samples rollouts."""
    model_config = None if trainer.args.use_vllm else trainer.model.generation_config
    return sampling_options(trainer.args, getattr(trainer, "generation_kwargs", {}), model_config)


def warn_of_sampling(trainer: Any) -> None:
    """Log the findings about the sampler of a trainer. The recipes print them in their preflight instead."""
    for finding in sampling_findings(options_of_sampler(trainer)):
        logger.warning(finding.message)


def sampling_findings(options: dict[str, tuple[Any, str]]) -> list[Finding]:
    """Return a warning for each option that `sampling_options` returns."""
    return [
        Finding(
            "warning",
            f"Answers are sampled with `{name}: {value}` ({source}). Their log-probabilities do not include it, so KL "
            "and ratio are wrong by an unknown amount. Remove it for training.",
        )
        for name, (value, source) in options.items()
    ]


def end_findings(
    eos_token_ids: list[int | None], vocab_size: int, options: dict[str, tuple[Any, str]], max_completion_length: int
) -> list[Finding]:
    """Return a finding if no completion can end before the length limit.

    Args:
        eos_token_ids: Ids that end a completion.
        vocab_size: Size of the policy's vocabulary.
        options: Options that `sampling_options` returned.
        max_completion_length: Length limit, in tokens.
    """
    ids = {token for token in eos_token_ids if token is not None}
    if not ids:
        message = "The tokenizer has no EOS token, so no answer can end. Set `eos_token` in its configuration."
        return [Finding("error", message)]
    if min(ids) >= vocab_size:
        message = (
            f"The tokens that end an answer ({_listed(ids)}) are outside the policy's vocabulary of {vocab_size}, so "
            "no answer can end. Use the policy's own tokenizer, or resize its embeddings before SFT."
        )
        return [Finding("error", message)]
    values = {name: value for name, (value, _) in options.items()}
    singles = {words[0] for words in values.get("bad_words_ids", ()) if len(words) == 1}
    forced = values.get("min_new_tokens", 0)
    if ids <= {*values.get("suppress_tokens", ()), *singles} or forced >= max_completion_length:
        cause = "suppressed" if forced < max_completion_length else f"kept away by `min_new_tokens` ({forced})"
        message = (
            f"The tokens that end an answer ({_listed(ids)}) are {cause}, so every answer is cut off at "
            f"`max_completion_length` ({max_completion_length})."
        )
        return [Finding("warning", message)]
    return []


def check_ends(ids: list[int], config: Any, args: Any) -> None:
    """Raise the error that `end_findings` finds in the tokens themselves, for a user of the library.

    Raises:
        ValueError: If no token can end an answer.
    """
    findings = end_findings([*ids], config.get_text_config().vocab_size, {}, args.max_completion_length)
    for finding in findings:
        if finding.level == "error":
            raise ValueError(finding.message)


def turn_findings(tokenizer: Any, eos_token_ids: list[int | None]) -> list[Finding]:
    """Return a warning if the chat template ends an answer with a token that does not end one in sampling.

    Args:
        tokenizer: Tokenizer of the policy, with a chat template.
        eos_token_ids: Ids that end a completion.
    """
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception:  # a template may raise anything; rows are rendered on trial elsewhere
        return []
    after = tokenizer(text[text.rindex("a") + 1 :], add_special_tokens=False)["input_ids"] if "a" in text else []
    known = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    if not after or after[0] not in known or after[0] in eos_token_ids:
        return []
    token, ends = tokenizer.convert_ids_to_tokens([after[0]])[0], {x for x in eos_token_ids if x is not None}
    message = (
        f"The chat template ends an answer with {token!r} (id {after[0]}), but only {_listed(ends)} end one in "
        "sampling, so the policy would go on after its answer. Add the id to `eos_token_id` in the policy's "
        "`generation_config.json`."
    )
    return [Finding("warning", message)]


def _listed(ids: set[int]) -> str:
    return ", ".join(map(str, sorted(ids)))


def card_findings(scorer: Scorer, args: Any, weight: float, *, alone: bool) -> list[Finding]:
    """Return the weaknesses of a reward model that its card shows.

    Args:
        scorer: Reward model.
        args: Options of the run.
        weight: Weight of its score in the reward.
        alone: Whether it is the only reward.
    """
    card, name, messages = scorer.card, scorer.__name__, []
    if card is None:
        return []
    if card.ranks_pairs and card.eval_accuracy is not None and card.eval_accuracy <= CHANCE:
        messages.append(
            f"The reward model {name} ranks {card.eval_accuracy:.0%} of its evaluation pairs as the annotators did, "
            "which is no better than chance. Train it further before PPO."
        )
    shaped = getattr(args, "reward_shaping", "none") != "none"
    if alone and not shaped and not getattr(args, "reward_norm", True) and card.score_std:  # only PPO has a critic
        spread = abs(weight) * card.score_std
        low, high = (bound * args.cliprange_value for bound in SPREAD_PER_CLIP)
        if not low <= spread <= high:
            messages.append(
                f"The scores of {name} have a deviation of {spread:.3g}, and `cliprange_value` is "
                f"{args.cliprange_value:g} in the same unit, so the critic would "
                f"{'lag' if spread > high else 'overshoot'}. Set `reward_norm: true`, or "
                f"`cliprange_value: {0.2 * spread:.2g}`."
            )
    return [Finding("warning", message) for message in messages]


def probe(prompts: list[Any], answers: list[Any] | None) -> tuple[list[Any], list[Any], bool]:
    """Return prompts and answers to score: each prompt with its own answer, then each with another prompt's answer.

    Without answers, the text of another prompt replaces the answer.

    Args:
        prompts: Text or messages.
        answers: Answers to the same prompts, if there are any.

    Returns:
        Prompts, answers, and whether the first half holds each prompt's own answer.
    """
    prompts = prompts[:PROBES]
    if answers is None or not all(_fits(*row) for row in zip(prompts, answers[:PROBES], strict=True)):
        texts = [p if isinstance(p, str) else [{"role": "assistant", "content": p[-1]["content"]}] for p in prompts]
        return prompts, [*texts[1:], texts[0]], False
    own = answers[:PROBES]
    return [*prompts, *prompts], [*own, *own[1:], own[0]], True


def _fits(prompt: Any, answer: Any) -> bool:
    if isinstance(prompt, str) or isinstance(answer, str):
        return isinstance(prompt, str) and isinstance(answer, str)
    return bool(answer) and answer[0].get("role") == "assistant"  # a whole conversation would repeat the prompt


def answers_of(dataset: Dataset) -> list[Any] | None:
    """Return the first answers of a dataset, the chosen ones of pairs; `None` if it has no answers."""
    column = next((name for name in ("completion", "chosen") if name in dataset.column_names), None)
    return None if column is None else list(dataset[:PROBES][column])


def score_findings(scorer: Scorer, scores: Sequence[float | None], own: bool, clip: float | None) -> list[Finding]:
    """Return suspicious facts about the scores of the answers that `probe` returned.

    Args:
        scorer: Reward model.
        scores: Scores in the order of `probe`.
        own: Whether the first half belongs to each prompt's own answer.
        clip: `reward_norm_clip` if the normaliser starts with the numbers of the card, else `None`.
    """
    name = scorer.__name__
    values = torch.tensor([math.nan if score is None else score for score in scores], dtype=torch.float64)
    lost = int((~values.isfinite()).sum())
    if lost:
        message = (
            f"The reward model {name} gives no finite score to {lost} of {len(scores)} answers. Load it in another "
            "`dtype` (`bfloat16` or `float32` instead of `float16`), or train it again."
        )
        return [Finding("error" if lost == len(scores) else "warning", message)]
    if len(scores) > 1 and values.max() == values.min():
        message = f"The reward model {name} gives {values[0]:.3g} to {len(scores)} different answers. Train it again."
        return [Finding("warning", message)]
    if not own:
        return []
    messages = []
    good, wrong = values.chunk(2)
    if (good > wrong).sum() * 2 < len(good):
        messages.append(
            f"The reward model {name} puts the dataset's answer above that to another prompt in only "
            f"{int((good > wrong).sum())} of {len(good)} cases (mean {good.mean():.2f} and {wrong.mean():.2f}). Check "
            "its training data and `response_separator`."
        )
    card = scorer.card
    if clip and card is not None and card.score_mean is not None and card.score_std:
        distance = (good.mean().item() - card.score_mean) / card.score_std
        if abs(distance) > clip:
            messages.append(
                f"The dataset's answers score {good.mean():.2f} by {name}, {abs(distance):.0f} deviations from the "
                f"mean of its card ({card.score_mean:.2f}). Beyond `reward_norm_clip` ({clip:g}) all first scores are "
                "clipped to one value. Train the reward model on similar data."
            )
    return [Finding("warning", message) for message in messages]

"""Sample from two policies on held-out prompts, score both, and measure the KL between them."""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_recipes.algorithm.best_of_n import best_of_n_kl_bound, best_of_n_weights
from rlhf_recipes.algorithm.kl import estimate_kl
from rlhf_recipes.data.messages import answer_to, as_text
from rlhf_recipes.data.rendering import prompt_ids
from rlhf_recipes.data.rows import check_reward_columns
from rlhf_recipes.evaluation.held_out import JUDGED
from rlhf_recipes.evaluation.statistics import compare_scores, preference_rate, swapped_preferences
from rlhf_recipes.models.critic import causal_lm
from rlhf_recipes.models.forward import sampling_inputs
from rlhf_recipes.rewards.judges import check_absolute

MAX_LOGITS = 2**27  # per forward that only measures: half a gigabyte in float32


@torch.no_grad()
def generate_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Any],
    *,
    max_completion_length: int,
    temperature: float = 1.0,
    batch_size: int = 32,
) -> list[list[int]]:
    """Sample one completion per prompt. Return token ids, with the EOS at the end unless the completion was cut off.

    As in training, only the temperature shapes the distribution. Top-k, top-p and penalties of the model's generation
    config are not used. A temperature of 0 is greedy.

    Args:
        model: Causal LM.
        tokenizer: Tokenizer of the model.
        prompts: Text that ends with the separator, or messages.
        max_completion_length: Tokens per completion.
        temperature: Temperature of the softmax.
        batch_size: Prompts per call of `generate`.
    """
    end_ids = eos_token_ids(model, tokenizer)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    config = GenerationConfig(
        max_new_tokens=max_completion_length,
        eos_token_id=end_ids,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        **sampling,
    )
    owner = causal_lm(model)  # PEFT reads the config of its model, and would overwrite it by one of its own
    original, owner.generation_config = owner.generation_config, config
    completions: list[list[int]] = []
    try:
        for start in tqdm(range(0, len(prompts), batch_size), desc="Sampling", disable=None):
            batch = _tokenize_prompts(tokenizer, prompts[start : start + batch_size]).to(model.device)
            output = model.generate(**batch, **sampling_inputs(model))[:, batch["input_ids"].size(1) :]
            completions += [_cut_after_eos(row, end_ids) for row in output.tolist()]
    finally:
        owner.generation_config = original
    return completions


def sample_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[Any], **generation: Any
) -> tuple[list[list[int]], list[str], list[Any]]:
    """Sample one completion per prompt. Return token ids, texts, and answers in the form that judges read.

    The arguments are those of `generate_completions`.
    """
    ids = generate_completions(model, tokenizer, prompts, **generation)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return ids, texts, [answer_to(*pair) for pair in zip(prompts, texts, strict=True)]


def compare_policies(
    policy: PreTrainedModel,
    baseline: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    judges: dict[str, Callable[..., list[float]]],
    *,
    pairwise_judges: dict[str, Callable[..., list[float]]] | None = None,
    num_samples: int = 1,
    seed: int = 0,
    **generation: Any,
) -> tuple[dict[str, float], dict[str, list[Any]]]:
    """Return metrics that compare two policies on the same prompts, and their judged completions as columns.

    Args:
        policy: Trained policy.
        baseline: Usually the SFT policy that training started from. The KL is measured against it.
        tokenizer: Tokenizer of both policies.
        dataset: Held-out prompts in the column `prompt`: text that ends with the separator, or messages. Judges see
            the other columns.
        judges: Functions with TRL's reward signature, by name.
        pairwise_judges: Functions that see both answers, by name; see `swapped_preferences`.
        num_samples: Completions per prompt and policy.
        seed: Seed of sampling, the same for both policies, and of the bootstrap.
        generation: Options of `generate_completions`.

    Raises:
        ValueError: If a judge of single answers compares the answers of one policy with each other.
    """
    check_absolute(judges)
    check_reward_columns(dataset, "dataset", pairs=bool(pairwise_judges))
    end_ids = eos_token_ids(baseline, tokenizer)
    known = _repeated(dataset, num_samples)
    prompts = known["prompts"]
    results, columns, answers = {"prompts": float(len(dataset))}, {"prompt": prompts}, []
    for name, model in (("policy", policy.eval()), ("baseline", baseline.eval())):
        torch.manual_seed(seed)
        ids, columns[f"{name}_completion"], judged = sample_answers(model, tokenizer, prompts, **generation)
        answers.append(judged)
        results[f"{name}/length"] = float(np.mean([len(row) for row in ids]))
        results[f"{name}/eos_rate"] = float(np.mean([row[-1] in end_ids for row in ids]))
        if name == "policy":
            temperature = generation.get("temperature", 1.0)
            batch_size = generation.get("batch_size", 32)
            results["policy/kl"] = sequence_kl(policy, baseline, tokenizer, prompts, ids, temperature, batch_size)
        for title, judge in judges.items():
            columns[f"{name}_{title}"] = list(judge(completions=answers[-1], completion_ids=ids, **known))
    for title in judges:
        ours, theirs = (np.reshape(columns[f"{name}_{title}"], (-1, num_samples)) for name in ("policy", "baseline"))
        results |= {f"{title}/{key}": value for key, value in compare_scores(ours, theirs, seed=seed).items()}
    for title, judge in (pairwise_judges or {}).items():
        columns[f"preference_{title}"] = swapped_preferences(judge, ours=answers[0], theirs=answers[1], **known)
        preferences = np.reshape(columns[f"preference_{title}"], (-1, num_samples))
        results |= {f"{title}/{key}": value for key, value in preference_rate(preferences, seed=seed).items()}
    return results, columns


def answers_table(columns: dict[str, list[Any]]) -> pd.DataFrame:
    """Return the completions of `compare_policies` with the columns of the tables of a training."""
    table = pd.DataFrame(columns | {"prompt": [as_text(prompt) for prompt in columns["prompt"]]})
    own = {"policy_completion": "completion", "baseline_completion": "baseline_completion"}
    judged = {"policy_": JUDGED, "baseline_": "baseline/", "preference_": JUDGED}
    for name in table.columns:
        prefix = next((prefix for prefix in judged if name.startswith(prefix)), None)
        if prefix is not None:
            own.setdefault(name, judged[prefix] + name.removeprefix(prefix))
    return table.rename(columns=own)


def best_of_n(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    judges: dict[str, Callable[..., list[float]]],
    sizes: list[int],
    *,
    chooser: str,
    seed: int = 0,
    **generation: Any,
) -> dict[str, float]:
    """Return the mean score and length of the best of n answers by one judge, for several n, under `best_of_<n>/`.

    The policy answers each prompt `max(sizes)` times, once. The figures of a smaller n are means over all subsets of
    these answers with that size (`best_of_n_weights`).

    Args:
        policy: Policy, usually the one after SFT.
        tokenizer: Tokenizer of the policy.
        dataset: Same as for `compare_policies`.
        judges: Functions with TRL's reward signature, by name.
        sizes: Values of n. Empty for no figures.
        chooser: Name of the judge that chooses.
        seed: Seed of sampling.
        generation: Options of `generate_completions`.
    """
    if not sizes:
        return {}
    known = _repeated(dataset, max(sizes))
    prompts = known["prompts"]
    torch.manual_seed(seed)
    ids, _, answers = sample_answers(policy.eval(), tokenizer, prompts, **generation)
    figures = {name: judge(completions=answers, completion_ids=ids, **known) for name, judge in judges.items()}
    figures["length"] = [float(len(row)) for row in ids]
    table = {name: torch.tensor(np.array(x, dtype=float)).view(-1, max(sizes)) for name, x in figures.items()}
    results = {}
    for n in sizes:
        weights = best_of_n_weights(table[chooser], n)
        for name, values in table.items():
            scored = weights * values.isfinite()
            results[f"best_of_{n}/{name}"] = float((scored * values.nan_to_num()).sum() / scored.sum())
        results[f"best_of_{n}/kl_bound"] = best_of_n_kl_bound(n)
    return results


def _repeated(dataset: Dataset, count: int) -> dict[str, list[Any]]:
    """Return the columns as judges see them, each row `count` times."""
    columns = {name: [value for value in dataset[name] for _ in range(count)] for name in dataset.column_names}
    return {"prompts": columns.pop("prompt"), **columns}


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return every token id that ends a completion, of the model and of the tokenizer."""
    ids = model.generation_config.eos_token_id
    ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    return ids if tokenizer.eos_token_id in (None, *ids) else [tokenizer.eos_token_id, *ids]


def _tokenize_prompts(tokenizer: PreTrainedTokenizerBase, prompts: list[Any]) -> Any:
    return tokenizer.pad({"input_ids": prompt_ids(tokenizer, prompts)}, padding_side="left", return_tensors="pt")


def _cut_after_eos(token_ids: list[int], end_ids: list[int]) -> list[int]:
    end = next((i for i, token in enumerate(token_ids) if token in end_ids), len(token_ids))
    return token_ids[: end + 1]


@torch.no_grad()
def sequence_kl(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Any],
    completions: list[list[int]],
    temperature: float = 1.0,
    batch_size: int = 32,
) -> float:
    """Return the mean over completions of the summed k1 estimate of KL(policy || reference), nats.

    Args:
        policy: Policy that sampled the completions.
        reference: Usually the SFT policy.
        tokenizer: Tokenizer of both.
        prompts: Argument of `generate_completions`.
        completions: Token ids that it returned.
        temperature: Temperature of the sampling. For greedy completions (0) the KL is measured at 1.
        batch_size: Completions per forward pass, at most.
    """
    ours, theirs = (
        completion_logps(model, tokenizer, prompts, completions, temperature, batch_size)
        for model in (policy, reference)
    )
    sums = [estimate_kl(logps, ref_logps, "k1").sum().item() for logps, ref_logps in zip(ours, theirs, strict=True)]
    return sum(sums) / len(sums) if sums else math.nan


@torch.no_grad()
def completion_logps(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Any],
    completions: list[list[int]],
    temperature: float = 1.0,
    batch_size: int = 32,
) -> list[torch.Tensor]:
    """Return the log-probabilities of the tokens of each completion, on the CPU. The arguments are `sequence_kl`'s.

    Rows of one length share a forward, because they need no padding.
    """
    rows: list[list[int]] = []
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        rows.append(_tokenize_prompts(tokenizer, [prompt])["input_ids"][0].tolist() + completion)
        by_length[len(rows[-1])].append(index)
    vocabulary = model.config.get_text_config().vocab_size
    chunks = []
    for length, found in by_length.items():
        size = max(1, min(batch_size, MAX_LOGITS // (length * vocabulary)))
        chunks += [found[i : i + size] for i in range(0, len(found), size)]
    logps = [torch.empty(0)] * len(rows)
    for chunk in tqdm(chunks, desc="Log-probabilities", disable=None):
        ids = torch.tensor([rows[index] for index in chunk], device=model.device)
        width = max(len(completions[index]) for index in chunk)
        for index, of_row in zip(chunk, _completion_logps(model, ids, width, temperature or 1.0).cpu(), strict=True):
            logps[index] = of_row[width - len(completions[index]) :]
    return logps


def _completion_logps(model: PreTrainedModel, ids: torch.Tensor, length: int, temperature: float) -> torch.Tensor:
    logits = model(input_ids=ids, logits_to_keep=length + 1).logits[:, :-1].float() / temperature
    return logits.log_softmax(-1).gather(-1, ids[:, -length:, None]).squeeze(-1)

"""Write the data of a world, its tokenizer and an untrained model."""

import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf_recipes.quickstart.world import TextWorld, Topic


def split_prompts(world: TextWorld, seed: int) -> tuple[list[str], list[str]]:
    """Split the prompts into 320 for training and 80 held out: one wording, drawn at random, of every topic.

    So every topic occurs in training, but no held-out prompt does.
    """
    rng = random.Random(seed)
    wordings: dict[Topic, list[str]] = {}
    for prompt, topic in world.topics.items():
        wordings.setdefault(topic, []).append(prompt)
    held_out = [rng.choice(prompts) for prompts in wordings.values()]
    train = [prompt for prompt in world.prompts() if prompt not in held_out]
    return train, held_out


def build_dataset(world: TextWorld, prompts: Sequence[str], n: int, seed: int) -> Dataset:
    """Return demonstrations in TRL's prompt-completion format.

    Every prompt occurs equally often, give or take one time.

    Args:
        world: Source of the responses.
        prompts: Prompts, which repeat with fresh responses until there are enough rows.
        n: Number of rows.
        seed: Seed of rows and order.

    Returns:
        Columns `prompt` and `completion`, without separator or EOS, in random order.
    """
    rng = random.Random(seed)
    rows = list(itertools.islice(itertools.cycle(prompts), n))
    rng.shuffle(rows)
    return Dataset.from_dict({"prompt": rows, "completion": [world.sample_response(row, rng) for row in rows]})


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer: any text survives encoding and decoding, and no token is unknown.

    The merges are learned from `texts`.
    """
    special_tokens = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,  # at most; 589 are enough for all of the world's words, 256 bytes and four special tokens
        special_tokens=list(special_tokens.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=256, **special_tokens)


def build_base_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Return an untrained Llama of 1.9 M parameters. The global random state does not change."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):  # `torch.manual_seed` would also seed every GPU
        torch.default_generator.manual_seed(seed)
        return LlamaForCausalLM(config)


def sample_preferences(
    prompts: Sequence[str],
    completions_a: Sequence[str],
    completions_b: Sequence[str],
    scorer: Callable[..., Sequence[float]],
    temperature: float,
    seed: int,
) -> Dataset:
    """Label pairs like a noisy judge, with the model of Bradley and Terry.

    P(a preferred) = sigmoid((s_a - s_b) / temperature)

    Pairs of identical texts and pairs with an empty text are dropped. This does not change the draws of other pairs.

    Args:
        prompts: Prompt of each pair.
        completions_a: First text of each pair.
        completions_b: Second text of each pair.
        scorer: Function that is called like a TRL reward function, `scorer(prompts=..., completions=...)`.
        temperature: Noise, in units of the score, > 0. If it is small, the better text nearly always wins.
        seed: Seed of the noise.

    Returns:
        Columns `prompt`, `chosen`, `rejected`, one row per pair that was kept.

    Source: Bradley and Terry 1952, Biometrika 39.
    """
    rng = random.Random(seed)
    scores_a = scorer(prompts=prompts, completions=completions_a)
    scores_b = scorer(prompts=prompts, completions=completions_b)
    rows = []
    for prompt, a, b, score_a, score_b in zip(prompts, completions_a, completions_b, scores_a, scores_b, strict=True):
        # sigmoid(x) = (1 + tanh(x / 2)) / 2, which cannot overflow.
        a_wins = rng.random() < 0.5 + 0.5 * math.tanh((score_a - score_b) / (2 * temperature))
        if a != b and a.strip() and b.strip():
            rows.append({"prompt": prompt, "chosen": a if a_wins else b, "rejected": b if a_wins else a})
    return Dataset.from_list(rows)


def write_world(world: TextWorld, folder: Path, seed: int, separator: str, num_demonstrations: int) -> None:
    """Write the inputs of a pipeline: demonstrations, prompts, a tokenizer and an untrained model.

    The split of the prompts is always the same. The seed changes demonstrations and weights.

    Args:
        world: Source of prompts and demonstrations.
        folder: Folder that gets `data/`, `prompts/` (each with `train.jsonl` and `test.jsonl`) and `base/`.
        seed: Seed of demonstrations and weights.
        separator: Text between prompt and answer, which the tokenizer learns too.
        num_demonstrations: Number of demonstrations for training.
    """
    train, held_out = split_prompts(world, seed=0)
    demonstrations = build_dataset(world, train, num_demonstrations, seed)
    splits = {
        "data/train": demonstrations,
        "data/test": build_dataset(world, held_out, 400, seed + 1),
        "prompts/train": Dataset.from_dict({"prompt": train}),
        "prompts/test": Dataset.from_dict({"prompt": held_out}),
    }
    for name, dataset in splits.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        dataset.to_json(str(path))
    tokenizer = train_tokenizer(row["prompt"] + separator + row["completion"] for row in demonstrations)
    tokenizer.save_pretrained(folder / "base")
    build_base_model(tokenizer, seed).save_pretrained(folder / "base")

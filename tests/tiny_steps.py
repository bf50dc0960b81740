"""Tiny process reward models, and rows with labelled steps for them."""

import tiny
import torch
from datasets import Dataset
from transformers import LlamaForTokenClassification

from rlhf_recipes import ProcessRewardModelConfig, ProcessRewardModelTrainer
from rlhf_recipes.rewards.card import tokenizer_fingerprint
from rlhf_recipes.rewards.steps import ProcessRewardModelCard

STEPS = [["the fox is red", "the bear eats"], ["berries"], ["is the hare", "in the cave", "at night"]]


def rows(*, chat=False, count=8):
    texts = [tiny.PROMPTS[i % len(tiny.PROMPTS)] for i in range(count)]
    steps = [STEPS[i % len(STEPS)] for i in range(count)]
    prompts = [[{"role": "user", "content": text}] for text in texts] if chat else texts
    labels = [[any(word in step for word in ("fox", "cave", "berries")) for step in said] for said in steps]
    return Dataset.from_dict({"prompt": prompts, "completions": steps, "labels": labels})


def step_model(tok, *, num_labels=1, seed=1):
    torch.manual_seed(seed)
    return LlamaForTokenClassification(tiny._config(tok, num_labels=num_labels))


def save_step_model(directory, *, labels=1, card=True, **rules):
    """Write a process reward model, whose card splits at every space by default, and return its directory."""
    tok = tiny.tokenizer()
    path = tiny.save(step_model(tok, num_labels=labels), directory)
    if card:
        known = {
            "base_model": "x",
            "tokenizer_fingerprint": tokenizer_fingerprint(tok),
            "chat_template_fingerprint": None,
        }
        of_text = {"conversational": False, "response_separator": "\n\n", "score_mean": 0.1, "score_std": 0.2}
        ProcessRewardModelCard(**known, **of_text, **{"step_separator": " "} | rules).save(path)
    return path


def trainer_of(directory, model=None, *, data=None, eval_data=None, peft=None, quantization=None, **options):
    tok = tiny.tokenizer()
    return ProcessRewardModelTrainer(
        step_model(tok) if model is None else model,
        ProcessRewardModelConfig(str(directory), **{**tiny.QUIET, "max_steps": 2, **options}),
        train_dataset=rows() if data is None else data,
        eval_dataset=rows(count=6) if eval_data is None else eval_data,
        processing_class=tok,
        peft_config=peft,
        quantization_config=quantization,
    )

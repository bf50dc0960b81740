"""Compare an exported policy with the trained one: the merged model with a 4-bit base and its adapter.

    python recipes/export.py --model_name_or_path runs/my_model/ppo --output_dir runs/my_model/export
    python benchmarks/export_agreement.py --policy runs/my_model/ppo --export runs/my_model/export --dataset DIRECTORY

Both answer the same held-out prompts greedily. The export runs in a plain `pipeline`, as a user would run it. The
script counts the answers that agree to the end, and the share of characters before the first difference. Writes
`export_agreement.md`.
"""

import argparse
import os
import platform
from datetime import date
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import pipeline

from rlhf_recipes.models.loading import load_policy, load_tokenizer
from rlhf_recipes.models.quantization import saved_quantization


def live_answers(directory: str, prompts: list, max_new_tokens: int, dtype: torch.dtype) -> list[str]:
    """Return the greedy answers of the policy in its training form: an adapter on its quantised base."""
    tokenizer, quantization = load_tokenizer(directory), saved_quantization(directory)
    options = {} if quantization is None else {"quantization_config": quantization}
    policy = load_policy(directory, dtype=dtype, **options).eval()
    answers = []
    for prompt in prompts:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        output = policy.generate(**ids, max_new_tokens=max_new_tokens, do_sample=False)
        answers.append(tokenizer.decode(output[0, ids["input_ids"].size(1) :], skip_special_tokens=True))
    return answers


def exported_answers(directory: str, prompts: list, max_new_tokens: int, dtype: torch.dtype) -> list[str]:
    """Return the greedy answers of the export in a `pipeline`."""
    generate = pipeline("text-generation", model=directory, dtype=dtype)
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "return_full_text": False}
    return [generate(prompt, **options)[0]["generated_text"] for prompt in prompts]


def main() -> None:
    """Compare the answers, print the result and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True)
    parser.add_argument("--export", required=True)
    parser.add_argument("--dataset", required=True, help="directory with eval.jsonl or test.jsonl, chat prompts")
    parser.add_argument("--num_prompts", type=int, default=50)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32", help="precision of the products, in both")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"))
    args = parser.parse_args()
    (file,) = [path for name in ("eval", "test") if (path := Path(args.dataset, f"{name}.jsonl")).is_file()]
    prompts = load_dataset("json", data_files=str(file), split="train")["prompt"][: args.num_prompts]
    options = (prompts, args.max_new_tokens, getattr(torch, args.dtype))
    live, exported = live_answers(args.policy, *options), exported_answers(args.export, *options)
    whole = sum(a == b for a, b in zip(live, exported, strict=True))
    shared = sum(len(os.path.commonprefix(pair)) for pair in zip(live, exported, strict=True))
    text = (
        f"{whole} of {len(prompts)} greedy answers agree to the end; {shared / sum(map(len, live)):.1%} of the "
        f"characters lie before the first difference. At most {args.max_new_tokens} tokens, {args.dtype}, "
        f"{platform.machine()}, torch {torch.__version__}, {date.today()}."
    )
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "export_agreement.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

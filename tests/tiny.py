"""Tiny models in memory: real classes of transformers, a real BPE tokenizer, a few thousand parameters."""

import os

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from rlhf_recipes import PPOConfig, PPOTrainer, RewardModelConfig, RewardModelTrainer

DEVICE = os.environ.get("TEST_DEVICE", "cpu")
"""Where trainers put their models: `--device` of pytest."""
TEXTS = ["hello world, the fox is red", "the bear eats berries at night", "is the hare in the cave?"] * 4
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PROMPTS = ["hello", "the fox", "is the hare", "at night the bear", "world", "red", "in the cave", "berries"]


def tokenizer(*, pad_is_eos=False, vocab_size=320):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet)
    )
    result = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<eos>" if pad_is_eos else "<pad>", eos_token="<eos>"
    )
    result.chat_template = CHAT_TEMPLATE
    return result


def _config(tok, **kwargs):
    return LlamaConfig(
        vocab_size=len(tok),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=kwargs.pop("max_position_embeddings", 128),
        initializer_range=0.2,  # large enough for the policy to prefer some tokens
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
        bos_token_id=None,
        **kwargs,
    )


END_IDS = [1, *range(20, 60)]
"""Many stop tokens, as some real models have them: an untrained policy then stops at every length."""


def policy(tok, seed=0, **kwargs):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(_config(tok, **kwargs))
    model.generation_config.eos_token_id = END_IDS
    return model


def reward_model(tok, seed=1, num_labels=1):
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(_config(tok, num_labels=num_labels))


def save(model, directory):
    """Write a model and the tokenizer beside it, and return the directory."""
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return str(directory)


def save_lora_reward_model(base, directory, **kwargs):
    """Train a LoRA reward model on a saved base, if `max_steps` is given, and write it with its card."""
    trainer = reward_trainer(directory, base, peft=lora(), **kwargs)
    if "max_steps" in kwargs:
        trainer.train()
    trainer.evaluate()
    trainer.save_model()


def prompts(*, chat=False, count=8):
    texts = [PROMPTS[i % len(PROMPTS)] for i in range(count)]
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": t}] for t in texts] if chat else texts})


def write_splits(data, directory):
    """Write a dataset as the training and the test split of a directory."""
    directory.mkdir()
    for split in ("train", "test"):
        data.to_json(directory / f"{split}.jsonl")


def preferences(*, chat=False, count=8, margin=False):
    rows = {
        "prompt": [PROMPTS[i % len(PROMPTS)] for i in range(count)],
        "chosen": [f"the fox is red {'and the hare ' * (i % 3)}" for i in range(count)],
        "rejected": [f"berries {i}" for i in range(count)],
    }
    if chat:
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        rows = {name: [[{"role": roles[name], "content": t}] for t in column] for name, column in rows.items()}
    if margin:
        rows["margin"] = [float(i % 2) for i in range(count)]
    return Dataset.from_dict(rows)


def lora(**kwargs):
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.1, **kwargs)


def sft_adapter(base):
    """Return a policy with an adapter that changes its answers, as after SFT."""
    model = get_peft_model(base, lora())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


QUIET = {
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": DEVICE == "cpu",
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}
"""Options of every tiny training run."""
RECIPE = {name: value for name, value in QUIET.items() if name != "report_to"}
"""The same for a recipe, which chooses the trackers itself."""


def ppo_config(output_dir, **kwargs):
    defaults = {
        **QUIET,
        "steps_per_generation": 2,
        "num_iterations": 2,
        "max_completion_length": 10,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "check_numerics": False,  # it costs as much as two steps; `test_numbers.py` is about it
    }
    return PPOConfig(str(output_dir), **{**defaults, **kwargs})


def reward_config(output_dir, **kwargs):
    return RewardModelConfig(str(output_dir), **{**QUIET, "max_steps": 2, **kwargs})


def length_reward(completions, **kwargs):
    """Score the length of a completion, with the signature of TRL's reward functions."""
    return [float(len(c if isinstance(c, str) else c[0]["content"])) for c in completions]


def ppo_trainer(
    output_dir,
    *,
    model=None,
    rewards=length_reward,
    chat=False,
    tok=None,
    peft=None,
    data=None,
    eval_data=None,
    judges=None,
    pairwise_judges=None,
    quantization=None,
    reward_tok=None,
    critic_dataset=None,
    trainer_class=PPOTrainer,
    **kwargs,
):
    tok = tok or tokenizer()
    return trainer_class(
        model or policy(tok),
        rewards,
        ppo_config(output_dir, **kwargs),
        train_dataset=prompts(chat=chat) if data is None else data,
        eval_dataset=eval_data,
        processing_class=tok,
        reward_processing_classes=reward_tok,
        peft_config=peft,
        quantization_config=quantization,
        critic_dataset=critic_dataset,
        judges=judges,
        pairwise_judges=pairwise_judges,
    )


def reward_trainer(
    output_dir, model=None, *, chat=False, tok=None, peft=None, data=None, eval_data=None, quantization=None, **kwargs
):
    tok = tok or tokenizer()
    return RewardModelTrainer(
        model or reward_model(tok),
        reward_config(output_dir, **kwargs),
        train_dataset=preferences(chat=chat) if data is None else data,
        eval_dataset=preferences(chat=chat, count=6) if eval_data is None else eval_data,
        processing_class=tok,
        peft_config=peft,
        quantization_config=quantization,
    )


def rollout(trainer, rows=None):
    """Return one rollout of the trainer: the batch with advantages, before it is shuffled and cut."""
    trainer.model.train()
    inputs = [trainer.train_dataset[i] for i in range(rows or trainer.args.generation_batch_size)]
    return trainer._generate_and_score_completions(inputs)


def logps(trainer, batch):
    """Return the log-probabilities of the completions of a rollout under the policy as it is now."""
    ids, mask = (torch.cat([batch[f"prompt_{kind}"], batch[f"completion_{kind}"]], 1) for kind in ("ids", "mask"))
    return trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, batch["completion_ids"].size(1))[0]


def log_probs(model, batch, temperature=1.0):
    """Return the log-probabilities of all tokens at the completions of a rollout, `(B, T, V)`, by plain logits."""
    ids, mask = (torch.cat([batch[f"prompt_{kind}"], batch[f"completion_{kind}"]], 1) for kind in ("ids", "mask"))
    with torch.no_grad():
        places = (mask.cumsum(dim=1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=places).logits
    return (logits[:, batch["prompt_ids"].size(1) - 1 : -1].double() / temperature).log_softmax(dim=-1)


def logged(trainer, name):
    """Return the logged values of a figure by step."""
    return {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}

"""Every trainer reads what the user wrote: the policy, the reward model, and the answers that are trained."""

import json

import pytest
import tiny
import torch
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from trl import SFTConfig

from rlhf_recipes.data.rendering import prompt_ids
from rlhf_recipes.evaluation.policies import compare_policies, completion_logps, generate_completions
from rlhf_recipes.options.baselines import CONFIGS
from rlhf_recipes.rewards.scorer import RewardModelScorer
from rlhf_recipes.trainers.baselines import TRAINERS
from rlhf_recipes.trainers.sft import SFTTrainer
from rlhf_recipes.trainers.stock import Scoring

pytestmark = pytest.mark.tiny

BEGUN = {"role": "assistant", "content": "Well, "}


def _appending_tokenizer(single="$A <eos>"):
    tok = tiny.tokenizer()
    tok.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=[("<eos>", 1)])
    return tok


def _with_prefill(data):
    return data.map(lambda row: {"prompt": [*row["prompt"], BEGUN]})


def _in_parts(data):
    """Write every content as parts, as Arrow gives them back."""
    parts = lambda text: [{"type": "text", "text": text, "image": None}]  # noqa: E731
    return data.map(
        lambda row: {name: [{**m, "content": parts(m["content"])} for m in row[name]] for name in data.column_names}
    )


def _baseline(method, directory, data, tok=None):
    own = {"max_completion_length": 6} if method == "dpo" else {"steps_per_generation": 2, "max_completion_length": 6}
    args = CONFIGS[method](str(directory / "out"), **{**tiny.QUIET, "max_steps": 1, **own})
    base = tiny.save(tiny.policy(tiny.tokenizer()), directory / "base")
    scoring = Scoring([tiny.length_reward], "\n\n")
    return TRAINERS[method](base, args, scoring, train_dataset=data, processing_class=tok or tiny.tokenizer())


def _sft(directory, data, tok=None, **options):
    tok = tok or tiny.tokenizer()
    args = SFTConfig(str(directory), **{**tiny.QUIET, **options})
    return SFTTrainer(tiny.policy(tok), args, train_dataset=data, processing_class=tok)


def _demonstrations(**options):
    return tiny.preferences(**options).rename_column("chosen", "completion").remove_columns("rejected")


def _sampled_prompts(trainer, rows=None):
    batch = tiny.rollout(trainer, rows)
    pairs = zip(batch["prompt_ids"], batch["prompt_mask"].bool(), strict=True)
    return [trainer.processing_class.decode(ids[mask]) for ids, mask in pairs]


@pytest.mark.parametrize("single", ["$A <eos>", "$A <eos> <eos>"])
def test_no_prompt_of_ppo_ends_with_an_appended_eos(tmp_path, single):
    trainer = tiny.ppo_trainer(tmp_path, tok=_appending_tokenizer(single))
    assert _sampled_prompts(trainer) == [f"{text}\n\n" for text in tiny.PROMPTS]


@pytest.mark.parametrize("method", ["rloo", "grpo"])
@pytest.mark.parametrize("prefill", [False, True])
def test_the_baselines_read_the_same_prompts(tmp_path, method, prefill):
    data = _with_prefill(tiny.prompts(chat=True)) if prefill else tiny.prompts()
    trainer = _baseline(method, tmp_path, data, _appending_tokenizer())
    rows = [trainer.train_dataset[i]["prompt"] for i in (0, 1)]
    ids, _, _ = trainer._tokenize_prompts(rows)
    ends = "<|assistant|>Well, " if prefill else "\n\n"
    assert [trainer.processing_class.decode(x)[-len(ends) :] for x in ids] == [ends, ends]
    assert ids == prompt_ids(trainer.processing_class, rows)


@pytest.mark.parametrize("strict", [False, True])
def test_ppo_continues_a_prefill(tmp_path, strict):
    """Some templates refuse to begin an answer after the assistant's message."""
    tok = tiny.tokenizer()
    if strict:
        tok.chat_template = (
            "{% if add_generation_prompt and messages[-1]['role'] == 'assistant' %}"
            "{{ raise_exception('the last message must be of the user') }}{% endif %}" + tok.chat_template
        )
    data = tiny.prompts(chat=True)
    mixed = Dataset.from_list([*_with_prefill(data.select(range(4))), *data.select(range(4, 8))])
    trainer = tiny.ppo_trainer(tmp_path, tok=tok, data=mixed)
    headers = [f"<|user|>{text}<|assistant|>" for text in tiny.PROMPTS]
    assert _sampled_prompts(trainer) == [text + "Well, " for text in headers[:4]] + headers[4:]


def test_the_reward_model_reads_one_answer_after_a_prefill(tmp_path):
    base = tiny.save(tiny.policy(tiny.tokenizer()), tmp_path / "base")
    data = _with_prefill(tiny.preferences(chat=True))
    trainer = tiny.reward_trainer(tmp_path / "rm", base, data=data, eval_data=data)
    scorer = RewardModelScorer(trainer.model, tiny.tokenizer(), trainer.card)
    for row, raw in zip(trainer.train_dataset, data, strict=True):
        assert scorer.token_ids([raw["prompt"]], [raw["chosen"]], [True]) == [row["chosen_ids"]]
    assert scorer.tokenizer.decode(row["chosen_ids"]).count("<|assistant|>") == 1
    assert "<|assistant|>Well, the fox is red" in scorer.tokenizer.decode(row["chosen_ids"])


@pytest.mark.parametrize("single", ["$A <eos>", "$A"])
def test_the_reward_model_is_trained_on_one_eos(tmp_path, single):
    trainer = tiny.reward_trainer(tmp_path, tok=_appending_tokenizer(single))
    ids = trainer.train_dataset[0]["chosen_ids"]
    assert ids.count(1) == 1
    assert ids[-1] == 1
    scorer = RewardModelScorer(trainer.model, trainer.processing_class, trainer.card)
    raw = tiny.preferences()[0]
    assert scorer.token_ids([raw["prompt"] + "\n\n"], [raw["chosen"]], [True]) == [ids]
    assert scorer.token_ids([raw["prompt"] + "\n\n"], [raw["chosen"]], [False]) == [ids[:-1]]


def test_dpo_trains_on_one_eos_and_joins_a_prefill(tmp_path):
    plain = _baseline("dpo", tmp_path / "plain", tiny.preferences(), _appending_tokenizer()).train_dataset[0]
    assert [plain[name].count(1) for name in ("prompt_ids", "chosen_ids", "rejected_ids")] == [0, 1, 1]
    chat = _baseline("dpo", tmp_path / "chat", _with_prefill(tiny.preferences(chat=True)))
    read = [chat.processing_class.decode(chat.train_dataset[0][name]) for name in ("prompt_ids", "chosen_ids")]
    assert read == ["<|user|>hello<|assistant|>", "Well, the fox is red <eos>"]


@pytest.mark.parametrize("packing", [False, True])
def test_sft_trains_on_one_eos(tmp_path, packing):
    trainer = _sft(tmp_path, _demonstrations(), _appending_tokenizer(), packing=packing, max_length=64)
    ids = [token for row in trainer.train_dataset for token in row["input_ids"]]
    assert ids.count(1) == 8
    plain = _sft(tmp_path, _demonstrations(), packing=packing, max_length=64)
    assert plain.train_dataset["input_ids"] == trainer.train_dataset["input_ids"]


def test_sft_refuses_a_prefill_with_its_row(tmp_path):
    data = _demonstrations(chat=True)
    mixed = Dataset.from_list([*data.select(range(3)), *_with_prefill(data)])
    with pytest.raises(ValueError, match="'prompt' in row 3 that ends with a message of the assistant"):
        _sft(tmp_path, mixed)


@pytest.mark.parametrize("form", ["parts", "json"])
def test_every_trainer_reads_messages_of_any_form(tmp_path, form):
    change = (
        _in_parts if form == "parts" else lambda data: data.map(lambda row: {k: json.dumps(v) for k, v in row.items()})
    )
    ppo = tiny.ppo_trainer(tmp_path / "ppo", data=change(tiny.prompts(chat=True)))
    assert _sampled_prompts(ppo)[0] == "<|user|>hello<|assistant|>"
    pairs = change(tiny.preferences(chat=True))
    rm = tiny.reward_trainer(tmp_path / "rm", data=pairs, eval_data=pairs)
    assert rm.train_dataset["chosen_ids"] == tiny.reward_trainer(tmp_path / "x", chat=True).train_dataset["chosen_ids"]
    assert rm.card.conversational
    assert rm.evaluate(pairs)["eval_score_mean"] == rm.evaluate()["eval_score_mean"]
    sft, plain = (
        _sft(tmp_path / "sft", data) for data in (change(_demonstrations(chat=True)), _demonstrations(chat=True))
    )
    assert sft.train_dataset["input_ids"] == plain.train_dataset["input_ids"]
    dpo = _baseline("dpo", tmp_path / "dpo", pairs)
    assert dpo.processing_class.decode(dpo.train_dataset[0]["prompt_ids"]) == "<|user|>hello<|assistant|>"


def test_sft_reads_conversations_of_sharegpt(tmp_path):
    chat = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "the fox"}]
    trainer = _sft(tmp_path, Dataset.from_dict({"conversations": [chat] * 4}))
    text = trainer.processing_class.decode(trainer.train_dataset[0]["input_ids"])
    assert text == "<|user|>hello<|assistant|>the fox<eos>"


IMAGE = [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}]


@pytest.mark.parametrize("trainer", ["ppo", "rm", "sft", "grpo", "dpo"])
def test_every_trainer_refuses_an_image_with_its_row(tmp_path, trainer):
    good = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    answer = [{"role": "assistant", "content": "b"}]
    columns = {
        "ppo": (),
        "grpo": (),
        "sft": ("completion",),
        "rm": ("chosen", "rejected"),
        "dpo": ("chosen", "rejected"),
    }
    rows = [{"prompt": prompt, **dict.fromkeys(columns[trainer], answer)} for prompt in (*[good] * 7, IMAGE)]
    data = Dataset.from_list(rows)
    build = {
        "ppo": lambda: tiny.ppo_trainer(tmp_path, data=data),
        "rm": lambda: tiny.reward_trainer(tmp_path, data=data),
        "sft": lambda: _sft(tmp_path, data),
        "grpo": lambda: _baseline("grpo", tmp_path, data),
        "dpo": lambda: _baseline("dpo", tmp_path, data),
    }
    with pytest.raises(
        ValueError, match="'prompt' that cannot be read in row 7: message 0 holds a part of type 'image'"
    ):
        build[trainer]()
    assert not (tmp_path / "out").exists()


def test_a_chat_without_a_template(tmp_path):
    tok = tiny.tokenizer()
    tok.chat_template = None
    for build in (tiny.ppo_trainer, tiny.reward_trainer):
        with pytest.raises(ValueError, match="holds messages, but the tokenizer has no chat template"):
            build(tmp_path, chat=True, tok=tok)
    with pytest.raises(ValueError, match="no chat template"):
        _sft(tmp_path, _demonstrations(chat=True), tok)


@pytest.mark.parametrize("side", ["train_dataset", "eval_dataset"])
def test_ppo_refuses_a_column_with_the_name_of_an_argument(tmp_path, side):
    named = tiny.prompts().add_column("completions", ["x"] * 8)
    data = {"data": named} if side == "train_dataset" else {"eval_data": named}
    with pytest.raises(ValueError, match=f"`{side}` has a column 'completions'"):
        tiny.ppo_trainer(tmp_path, **data)


def test_the_boundary_of_a_transcript_is_where_the_answer_begins(tmp_path):
    head = "\n\nHuman: How?\n\nAssistant:"
    row = {"prompt": head + " I", "chosen": " would start.", "rejected": " don't know."}
    trainer = tiny.reward_trainer(tmp_path, data=Dataset.from_list([row] * 4))
    assert tiny.tokenizer().decode(trainer.train_dataset[0]["chosen_ids"]) == head + "\n\n I would start.<eos>"
    with pytest.raises(ValueError, match="row 0 ends inside the assistant's answer .*split_transcript"):
        tiny.ppo_trainer(tmp_path, data=Dataset.from_dict({"prompt": [head + " I"] * 8}))


def test_an_evaluation_continues_a_prefill_as_training_does(tmp_path):
    tok = tiny.tokenizer()
    policy = tiny.policy(tok)
    prompts = _with_prefill(tiny.prompts(chat=True, count=2))["prompt"]
    asked = []
    policy.register_forward_pre_hook(lambda m, a, kwargs: asked.append(kwargs["input_ids"]), with_kwargs=True)
    generate_completions(policy, tok, list(prompts), max_completion_length=1)
    assert [tok.decode(ids)[-6:] for ids in asked[0]] == ["Well, "] * 2
    whole = completion_logps(policy, tok, [list(prompts[0])], [[7, 8, 1]])[0]
    ids = torch.tensor([[*prompt_ids(tok, [prompts[0]])[0], 7, 8, 1]])
    logps = policy(input_ids=ids).logits[0, -4:-1].log_softmax(-1)
    assert whole.tolist() == logps[[0, 1, 2], [7, 8, 1]].tolist()


def test_an_evaluation_refuses_a_column_with_the_name_of_an_argument():
    tok = tiny.tokenizer()
    policy = tiny.policy(tok)
    data = tiny.prompts(count=2).add_column("completions_b", ["x"] * 2)
    options = {"pairwise_judges": {"j": lambda **kwargs: []}, "max_completion_length": 2}
    with pytest.raises(ValueError, match="has a column 'completions_b'"):
        compare_policies(policy, policy, tok, data, {}, **options)

"""A score is read at one token, in every way that a reward model can be given."""

import json
import shutil

import pytest
import tiny
import torch
import transformers as hf
from datasets import Dataset
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import processors
from tolerances import FP32, MERGED, SCORES, assert_close
from transformers.modeling_outputs import SequenceClassifierOutput

from rlhf_recipes.models.loading import position_limit
from rlhf_recipes.models.reward_model import load_reward_model
from rlhf_recipes.rewards.adapter import RewardAdapterScorer
from rlhf_recipes.rewards.card import CARD_FILE, RewardModelCard, tokenizer_fingerprint
from rlhf_recipes.rewards.functions import as_scorer
from rlhf_recipes.rewards.reading import cut_front, read_position, unknown_tokens
from rlhf_recipes.rewards.scorer import RewardModelScorer
from rlhf_recipes.rewards.server import reward_app

pytestmark = pytest.mark.tiny

PROMPTS = ["the fox\n\n", "is the hare in the cave?\n\n", "a\n\n"]
ANSWERS = ["is red", "no, the bear eats berries at night", "b"]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 64}
NARROW = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}
OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
DECODERS = {
    "Llama": GROUPED,
    "Mistral": GROUPED | {"sliding_window": 16},
    "Qwen2": GROUPED,
    "Qwen3": GROUPED | {"head_dim": 8},
    "Gemma": GROUPED | {"head_dim": 8},
    "Gemma2": GROUPED | NARROW,
    "Gemma3Text": GROUPED | NARROW,
    "Phi3": GROUPED,
    "SmolLM3": GROUPED,
    "Olmo2": GROUPED,
    "StableLm": GROUPED,
    "GPTNeoX": SIZES | {"max_position_embeddings": 64},
    "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "Falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "Mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "GPTJ": OLD | {"rotary_dim": 4},
    "GPT2": OLD,
    "OPT": SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64, "init_std": 0.2},
    "BioGpt": SIZES | {"max_position_embeddings": 64},
    "GPTBigCode": OLD,
}
LIMITED = {"GPT2": 64, "OPT": 64, "BioGpt": 64, "GPTBigCode": 64, "GPTJ": 64, "Mpt": 64}
ENCODERS = {
    "Bert": SIZES | {"max_position_embeddings": 64},
    "DebertaV2": SIZES | {"max_position_embeddings": 64},
    "ModernBert": SIZES | {"max_position_embeddings": 64},
}


def _model(kind, tok, **options):
    """Return a reward model of an architecture, with scores of order 1."""
    torch.manual_seed(0)
    special = {"bos_token_id": None, "eos_token_id": tok.eos_token_id, "pad_token_id": tok.pad_token_id}
    architecture = {**DECODERS, **ENCODERS}[kind]
    given = {"vocab_size": len(tok), "initializer_range": 0.2, "num_labels": 1} | special | architecture | options
    config = getattr(hf, f"{kind}Config")(**given)
    return hf.AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()


def _tokenizer(pad, *, appends_eos=False):
    """Return a tokenizer that pads with a token of its own, with EOS, with a word, or not at all."""
    tok = tiny.tokenizer(pad_is_eos=pad == "eos")
    if appends_eos:
        eos = [("<eos>", tok.eos_token_id)]
        tok._tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=eos)
    if pad in ("none", "word"):
        tok.pad_token = None if pad == "none" else "b"
    return tok


def _save(model, tok, directory):
    model.save_pretrained(directory)
    tok.save_pretrained(directory)
    return str(directory)


@torch.no_grad()
def _by_transformers(model, rows):
    """Score rows by plain transformers, each alone."""
    return [model(input_ids=torch.tensor([row])).logits.item() for row in rows]


@torch.no_grad()
def _by_hand(model, row, position):
    """Multiply the backbone's state at a position with the head."""
    states = model.base_model(input_ids=torch.tensor([row])).last_hidden_state[0].double()
    return (states[position] @ model.score.weight[0].double()).item()


@pytest.mark.parametrize("pad_is_eos", [False, True], ids=["own pad", "pad is EOS"])
@pytest.mark.parametrize("kind", DECODERS)
def test_a_score_is_that_of_backbone_and_head_by_hand(kind, pad_is_eos):
    tok = tiny.tokenizer(pad_is_eos=pad_is_eos)
    model = _model(kind, tok)
    scorer = as_scorer(model, tok)
    rows = [tok(prompt + answer + "<eos>")["input_ids"] for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    expected = [_by_hand(model, row, len(row) - 1 - pad_is_eos) for row in rows]
    assert max(expected) - min(expected) > 0.1
    assert_close(scorer(PROMPTS, ANSWERS), expected, SCORES)
    alone = [scorer([prompt], [answer])[0] for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    assert_close(alone, expected, SCORES)
    assert scorer.position_limit == LIMITED.get(kind)


OWN, EOS = 0, 1  # ids of tiny.tokenizer


@pytest.mark.parametrize(
    ("tokenizer_pads_with", "model_says"),
    [
        *(("none", said) for said in (OWN, None, EOS, -1)),
        *(("eos", said) for said in (OWN, EOS, -1)),
        *(("own", said) for said in (OWN, None, EOS)),
        ("word", None),
    ],
)
def test_a_foreign_classifier_is_read_where_transformers_reads_it(tmp_path, tokenizer_pads_with, model_says):
    tok = _tokenizer(tokenizer_pads_with)
    path = _save(_model("Llama", tok, pad_token_id=model_says), tok, tmp_path)
    tok = hf.AutoTokenizer.from_pretrained(path)  # a word that pads has become a special token
    plain = hf.AutoModelForSequenceClassification.from_pretrained(path, dtype="float32").eval()
    rows = [tok(prompt + answer + "<eos>")["input_ids"] for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    expected = _by_transformers(plain, rows)
    by_path, by_instance = RewardModelScorer.from_pretrained(path), as_scorer(plain, tok)
    assert_close(by_path(PROMPTS, ANSWERS), expected, FP32)
    assert_close(by_instance(PROMPTS, ANSWERS), expected, FP32)
    assert plain.config.pad_token_id == model_says, "the model of the user is not changed"
    assert tok.pad_token == _tokenizer(tokenizer_pads_with).pad_token, "nor is the tokenizer"


def test_a_model_that_says_nothing_beside_a_tokenizer_that_pads_with_eos_is_refused(tmp_path):
    tok = _tokenizer("eos")
    model = _model("Llama", tok, pad_token_id=None)
    for given in (model, _save(model, tok, tmp_path)):
        with pytest.raises(ValueError, match=r"Nothing says at which token .* Write `pad_token_id` into its"):
            as_scorer(given, tok)


@pytest.mark.parametrize("answer", ["b", "bbb", "no b b", "x"])
def test_text_may_end_in_the_padding_token(answer):
    """The padding token is a word, and the answers were cut off, so some of them end in it."""
    tok = _tokenizer("word")
    model = _model("Llama", tok)
    scorer = RewardModelScorer(model, tok)
    scorer.policy_eos_token_ids = [EOS]
    scores = scorer(["the fox ", "is the hare in the cave? "], [answer, "no"], [[20], [20]])
    rows = [tok("the fox " + answer)["input_ids"], tok("is the hare in the cave? no")["input_ids"]]
    assert_close(scores, _by_transformers(model, rows), FP32)


def test_a_template_may_write_something_after_eos():
    tok = _tokenizer("eos")
    tok.chat_template = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<eos>\n{% endfor %}"
    model = _model("Qwen2", tok)
    chats = [[[{"role": role, "content": text}] for text in ("the fox", "a")] for role in ("user", "assistant")]
    rows = [tok(f"<|user|>{text}<eos>\n<|assistant|>{text}<eos>\n")["input_ids"] for text in ("the fox", "a")]
    expected = [_by_hand(model, row, len(row) - 1) for row in rows]
    assert_close(RewardModelScorer(model, tok)(*chats), expected, SCORES)
    assert_close(_by_transformers(model, rows), expected, SCORES)


@pytest.mark.parametrize(("row", "position"), [([5, 6, 0], 1), ([5, 0, 6], 2), ([0, 0], 0), ([0, 5, 0, 0], 1)])
def test_the_position_is_that_of_transformers(row, position):
    assert read_position(row, 0) == position
    assert read_position(row, None) == len(row) - 1
    model = _model("Llama", tiny.tokenizer())
    assert_close(_by_transformers(model, [row])[0], _by_hand(model, row, position), FP32)


@pytest.fixture(scope="module", params=["eos", "none", "own"])
def trained(request, tmp_path_factory):
    """Write a base whose tokenizer pads in different ways, and a LoRA reward model that was trained on it."""
    directory, tok = tmp_path_factory.mktemp(request.param), _tokenizer(request.param)
    base = _save(tiny.policy(tok), tok, directory / "base")
    options = {"max_steps": 8, "learning_rate": 1e-2, "tok": None}
    trainer = tiny.reward_trainer(
        directory / "rm", base, peft=tiny.lora(), **options | {"tok": _tokenizer(request.param)}
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    return directory, trainer


def _ppo(directory, output_dir, **kwargs):
    base, tok = str(directory / "base"), hf.AutoTokenizer.from_pretrained(directory / "base")
    return tiny.ppo_trainer(output_dir, model=base, tok=tok, rewards=None, peft=tiny.lora(), **kwargs)


def _trained_scores(trainer):
    """Score by the model as the trainer has it, in TRL's own batch."""
    tok, model = trainer.processing_class, trainer.model.eval()
    rows = [tok(prompt + answer + "<eos>")["input_ids"] for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    pairs = [{"chosen_ids": row, "rejected_ids": row} for row in rows]
    batch = trainer.data_collator(pairs)
    with torch.no_grad():
        return model(**batch).logits[: len(rows), 0]


@pytest.mark.parametrize("card", ["new", "old"])
def test_a_trained_adapter_is_read_where_its_head_was_trained(tmp_path, trained, card):
    directory, trainer = trained
    adapter = tmp_path / "rm"
    shutil.copytree(directory / "rm", adapter)
    content = json.loads((adapter / CARD_FILE).read_text())
    assert content["pad_token_id"] == trainer.processing_class.pad_token_id
    if card == "old":
        del content["pad_token_id"]
        (adapter / CARD_FILE).write_text(json.dumps(content))
    expected = _trained_scores(trainer)
    assert_close(RewardModelScorer.from_pretrained(str(adapter))(PROMPTS, ANSWERS), expected, MERGED)
    (shared,) = _ppo(directory, tmp_path / "ppo", reward_adapter=str(adapter)).reward_funcs
    assert_close(shared(PROMPTS, ANSWERS), expected, MERGED)
    assert RewardModelCard.load(adapter).score_mean == content["score_mean"]


def test_an_adapter_without_a_card_is_read_if_base_and_tokenizer_agree(tmp_path, trained):
    directory, trainer = trained
    adapter = tmp_path / "rm"
    shutil.copytree(directory / "rm", adapter)
    (adapter / CARD_FILE).unlink()
    scorers = [
        lambda: RewardModelScorer.from_pretrained(str(adapter)),
        lambda: _ppo(directory, tmp_path / "ppo", reward_adapter=str(adapter)).reward_funcs[0],
    ]
    for scorer in scorers:
        if directory.name.startswith("none"):  # the base has no `pad_token_id`, and TRL has padded with EOS
            with pytest.raises(ValueError, match=r"Nothing says at which token .*rm reads its score: it has no card"):
                scorer()
        else:
            assert_close(scorer()(PROMPTS, ANSWERS), _trained_scores(trainer), MERGED)


@pytest.mark.parametrize("pad", ["eos", "none", "own"])
def test_a_trained_whole_model_is_read_where_its_head_was_trained(tmp_path, pad):
    base = _save(tiny.policy(_tokenizer(pad)), _tokenizer(pad), tmp_path / "base")
    trainer = tiny.reward_trainer(tmp_path / "rm", base, tok=_tokenizer(pad))
    trainer.save_model()
    expected = _trained_scores(trainer)
    assert_close(RewardModelScorer.from_pretrained(str(tmp_path / "rm"))(PROMPTS, ANSWERS), expected, FP32)
    instance = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm", dtype="float32")
    ppo = tiny.ppo_trainer(tmp_path / "ppo", tok=tiny.tokenizer(), rewards=instance, reward_tok=_tokenizer(pad))
    assert_close(ppo.reward_funcs[0](PROMPTS, ANSWERS), expected, FP32)


def test_a_card_that_contradicts_the_configuration_is_refused(tmp_path):
    trainer = tiny.reward_trainer(tmp_path)
    trainer.save_model()
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token_id": EOS}))
    with pytest.raises(ValueError, match="was trained with `pad_token_id` 0, but its configuration says 1"):
        RewardModelScorer.from_pretrained(str(tmp_path))


def test_a_tokenizer_without_padding_has_the_fingerprint_of_its_training():
    assert tokenizer_fingerprint(_tokenizer("none")) == tokenizer_fingerprint(_tokenizer("eos"))
    assert tokenizer_fingerprint(_tokenizer("none")) != tokenizer_fingerprint(_tokenizer("own"))


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_is_refused_by_name_in_every_way(tmp_path, kind):
    tok = tiny.tokenizer()
    model = _model(kind, tok)
    path, name = _save(model, tok, tmp_path / "rm"), f"{kind}ForSequenceClassification has no `score` layer"
    lora = LoraConfig(r=2, task_type=TaskType.SEQ_CLS, target_modules="all-linear")
    get_peft_model(_model(kind, tok), lora).save_pretrained(tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text()) | {"base_model_name_or_path": path}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    for refused in (
        lambda: tiny.ppo_trainer(tmp_path / "ppo", rewards=model, reward_tok=tok),
        lambda: tiny.ppo_trainer(tmp_path / "ppo", rewards=path),
        lambda: tiny.ppo_trainer(tmp_path / "ppo", judges={"judge": RewardModelScorer(model, tok)}),
        lambda: as_scorer(get_peft_model(_model(kind, tok), lora), tok),
        lambda: reward_app(RewardModelScorer.from_pretrained(path)),
        lambda: tiny.reward_trainer(tmp_path / "again", model),
        lambda: tiny.reward_trainer(tmp_path / "again", path),
    ):
        with pytest.raises(ValueError, match=name):
            refused()
    for refused in (load_reward_model, RewardAdapterScorer):
        with pytest.raises(ValueError, match="lora has no score head, so it is not a reward model"):
            refused(str(tmp_path / "lora"))


def test_models_with_another_head_are_refused_by_name():
    tok = tiny.tokenizer()
    with pytest.raises(ValueError, match="CTRLForSequenceClassification has no `score` layer"):
        as_scorer(
            hf.CTRLForSequenceClassification(
                hf.CTRLConfig(vocab_size=len(tok), n_embd=32, n_layer=1, n_head=4, num_labels=1)
            ),
            tok,
        )
    language_model = tiny.policy(tok)
    language_model.config.num_labels = 1
    with pytest.raises(ValueError, match="LlamaForCausalLM has no `score` layer"):
        as_scorer(language_model, tok)
    of_each_token = hf.LlamaForTokenClassification(_model("Llama", tok).config)
    with pytest.raises(ValueError, match="LlamaForTokenClassification has no `score` layer that reads the last token"):
        RewardModelScorer(of_each_token, tok)


class OneScorePerToken(hf.LlamaForSequenceClassification):
    """Return a score for each token, which nobody can see before the first call."""

    def forward(self, **inputs):
        return SequenceClassifierOutput(logits=self.score(self.model(**inputs).last_hidden_state))


def test_a_model_with_one_score_per_token_is_refused_at_its_first_call():
    tok = tiny.tokenizer()
    scorer = as_scorer(OneScorePerToken(_model("Llama", tok).config), tok)
    with pytest.raises(ValueError, match=r"reward_model gives numbers of shape \(3, \d+, 1\) for 3 completions"):
        scorer(PROMPTS, ANSWERS)


def test_a_head_with_a_bias_is_taken_from_an_instance():
    tok = tiny.tokenizer()
    model = _model("Llama", tok)
    without = as_scorer(model, tok)(PROMPTS, ANSWERS)
    model.score = torch.nn.Linear(32, 1)
    model.score.weight.data, model.score.bias.data = (
        as_scorer(_model("Llama", tok), tok).model.score.weight,
        torch.ones(1),
    )
    assert_close(as_scorer(model, tok)(PROMPTS, ANSWERS), [score + 1 for score in without], FP32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score.weight": None}, "score.weight is missing"),
        ({"score.weight": None, "head.weight": torch.ones(1, 32)}, "score.weight is missing"),
        ({"score.bias": torch.ones(1)}, "score.bias of its head would not be used"),
        ({"model.norm.weight": None}, "model.norm.weight is missing"),
    ],
)
def test_a_reward_model_without_its_weights_is_refused(tmp_path, change, message):
    path = tiny.save(tiny.reward_model(tiny.tokenizer()), tmp_path)
    weights = load_file(tmp_path / "model.safetensors") | change
    kept = {name: tensor for name, tensor in weights.items() if tensor is not None}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        RewardModelScorer.from_pretrained(path)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"score.weight": torch.ones(2, 32)}, "has 2 outputs, not one"),
        ({"score.weight": torch.ones(1, 32), "score.bias": torch.ones(1)}, "has a bias, which would not be used"),
        ({"classifier.weight": torch.ones(1, 32)}, "has no score head, so it is not a reward model"),
        ({}, "has no score head, so it is not a reward model"),
    ],
)
@pytest.mark.parametrize("load", [RewardModelScorer.from_pretrained, RewardAdapterScorer])
def test_an_adapter_without_one_plain_head_is_refused(tmp_path, head, message, load):
    tok = tiny.tokenizer()
    base = _save(tiny.policy(tok), tok, tmp_path / "base")
    get_peft_model(hf.AutoModelForCausalLM.from_pretrained(base), tiny.lora()).save_pretrained(tmp_path / "rm")
    tok.save_pretrained(tmp_path / "rm")
    file = tmp_path / "rm" / "adapter_model.safetensors"
    save_file(load_file(file) | {f"base_model.model.{name}": tensor for name, tensor in head.items()}, file)
    with pytest.raises(ValueError, match=message):
        load(str(tmp_path / "rm"))


def test_one_output_is_taken_whatever_it_is_called(tmp_path):
    tok = tiny.tokenizer()
    expected = RewardModelScorer(_model("Llama", tok), tok)(PROMPTS, ANSWERS)
    named = _model("Llama", tok, num_labels=1, id2label={0: "quality"}, problem_type="regression")
    path = _save(named, tok, tmp_path)
    assert_close(RewardModelScorer.from_pretrained(path)(PROMPTS, ANSWERS), expected, FP32)


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_a_token_outside_the_vocabulary_is_refused_when_the_trainer_is_built(tmp_path, chat):
    tok = tiny.tokenizer()
    model = _model("Llama", tok)
    tok.add_tokens(["<tool>"])
    path = _save(model, tok, tmp_path / "rm")
    texts = ["the fox"] * 7 + ["<tool> is red"]
    prompts = [[{"role": "user", "content": text}] for text in texts] if chat else texts
    refusal = (
        r"`train_dataset` does not suit .* Row 7 has the token '<tool>', which has no embedding .* its id is 30\d"
    )
    data = {"data": Dataset.from_dict({"prompt": prompts}), "reward_tok": tok}
    for given in (model, path):
        with pytest.raises(ValueError, match=refusal):
            tiny.ppo_trainer(tmp_path / "ppo", rewards=given, **data)
    tiny.ppo_trainer(tmp_path / "ppo", rewards=model, reward_tok=tok, chat=chat).train()
    with pytest.raises(
        ValueError, match="Row 1 has the token '<tool>', which has no embedding in the reward model rm"
    ):
        RewardModelScorer.from_pretrained(path)(["a", "b"], ["the fox", "a <tool>"])
    model.resize_token_embeddings(len(tok))
    scores = as_scorer(model, tok)(["<tool> "] * 2, ["a", "<tool>"])
    rows = [tok(f"<tool> {answer}<eos>")["input_ids"] for answer in ("a", "<tool>")]
    assert_close(scores, _by_transformers(model, rows), FP32)


@pytest.mark.parametrize("pads", [False, True])
def test_an_eos_outside_the_vocabulary_is_refused_when_the_model_is_loaded(tmp_path, pads):
    tok = tiny.tokenizer()
    model = _model("Llama", tok)
    tok.add_special_tokens({"eos_token": "<end>"} | ({"pad_token": "<end>"} if pads else {}))
    for given in (model, _save(model, tok, tmp_path)):
        with pytest.raises(ValueError, match="The EOS token '<end>' has no embedding in the reward model"):
            as_scorer(given, tok)


def test_a_token_that_transformers_adds_by_itself_is_no_fault(tmp_path):
    """Qwen's class of tokenizers has a token that this tokenizer never had."""
    tok = tiny.tokenizer()
    path = _save(_model("Qwen2", tok), tok, tmp_path)
    scorer = RewardModelScorer.from_pretrained(path)
    assert set(scorer.unknown_tokens.values()) == {"<|endoftext|>"}
    rows = [
        scorer.tokenizer(prompt + answer + "<eos>")["input_ids"]
        for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)
    ]
    assert_close(scorer(PROMPTS, ANSWERS), _by_transformers(scorer.model, rows), FP32)


def test_a_padding_token_outside_the_vocabulary_is_never_read():
    tok = tiny.tokenizer()
    model = _model("Llama", tok)
    tok.add_special_tokens({"pad_token": "[PAD]"})
    model.config.pad_token_id = tok.pad_token_id
    assert unknown_tokens(tok, model.config.vocab_size, "rm") == {}
    rows = [tok(prompt + answer + "<eos>")["input_ids"] for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    assert_close(RewardModelScorer(model, tok)(PROMPTS, ANSWERS), _by_transformers(model, rows), FP32)


@pytest.mark.parametrize(
    ("row", "cut"), [([7, 1, 2, 3], [2, 3]), ([9, 1, 2, 3], [9, 3]), ([9, 1], [9, 1]), ([1, 9, 3], [9, 3])]
)
def test_a_row_is_cut_at_its_front_behind_bos(row, cut):
    assert cut_front(row, 2, bos_id=9) == cut
    assert cut_front(row, None, bos_id=9) == row


def test_rotary_positions_are_no_limit():
    tok = tiny.tokenizer()
    assert position_limit(_model("Llama", tok, max_position_embeddings=4)) is None
    assert len(RewardModelScorer(_model("Llama", tok, max_position_embeddings=4), tok)(PROMPTS, ANSWERS)) == 3


@pytest.mark.parametrize("chat", [False, True])
def test_a_tokenizer_that_cannot_render_the_prompts(tmp_path, chat):
    own = tiny.tokenizer()
    own.chat_template, own.eos_token = None, None
    model = tiny.reward_model(tiny.tokenizer())
    if not chat:
        model.config.eos_token_id = None
    with pytest.raises(
        ValueError, match=f"has no {'chat template' if chat else 'EOS token'}, which the prompt in row"
    ):
        tiny.ppo_trainer(tmp_path, rewards=model, reward_tok=own, chat=chat)


def test_a_tokenizer_without_eos_gets_that_of_the_model(tmp_path):
    own = tiny.tokenizer()
    own.eos_token = None
    trainer = tiny.ppo_trainer(tmp_path, rewards=tiny.reward_model(tiny.tokenizer()), reward_tok=own)
    assert trainer.scorers[0].tokenizer.eos_token == "<eos>"
    assert own.eos_token is None


def test_a_template_that_refuses_a_row(tmp_path):
    own = tiny.tokenizer()
    own.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + (
        own.chat_template
    )
    system = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    data = tiny.Dataset.from_list([*tiny.prompts(chat=True), {"prompt": system}])
    with pytest.raises(ValueError, match=r"The chat template of the reward model .* refuses row 8: no system"):
        tiny.ppo_trainer(tmp_path, rewards=tiny.reward_model(tiny.tokenizer()), reward_tok=own, data=data)

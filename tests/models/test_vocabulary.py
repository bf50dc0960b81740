"""A model, its adapter and its tokenizer fit each other, or are refused by name."""

import pytest
import tiny
import torch
from datasets import Dataset
from peft import get_peft_model
from tolerances import FP32, assert_close
from transformers import LlamaForCausalLM
from trl import SFTConfig

from rlhf_recipes.models.loading import load_policy, load_tokenizer, position_limit
from rlhf_recipes.models.reward_model import load_reward_model
from rlhf_recipes.models.vocabulary import with_end_token
from rlhf_recipes.trainers.sft import SFTTrainer

pytestmark = pytest.mark.tiny
IDS = torch.tensor([[5, 6, 307, 308, 7]])  # two of them are new


@pytest.fixture
def base(tmp_path):
    return tiny.save(tiny.policy(tiny.tokenizer()), tmp_path / "base")


@pytest.fixture
def template(tmp_path):
    """Write a tokenizer with two tokens more, and return its directory."""
    tok = tiny.tokenizer()
    tok.add_tokens(["<|think|>", "<|call|>"], special_tokens=True)
    tok.save_pretrained(tmp_path / "template")
    return str(tmp_path / "template")


def _demonstrations(column="completion"):
    prompt, answer = [{"role": "user", "content": "is it red?"}], [{"role": "assistant", "content": "yes"}]
    return Dataset.from_list([{"prompt": prompt, column: answer}] * 8)


def _sft(base, template, directory, data=None, tok=None, **options):
    options = {**tiny.QUIET, "max_steps": 2, "learning_rate": 1e-2, "chat_template_path": template, **options}
    data = _demonstrations() if data is None else data
    return SFTTrainer(
        base, SFTConfig(str(directory), **options), train_dataset=data, processing_class=tok or tiny.tokenizer(),
        peft_config=tiny.lora() if template else None,
    )  # fmt: skip


def _outputs(model):
    """Return the outputs between 0 and 1: a merged adapter rounds large logits differently."""
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.sigmoid()


def test_an_adapter_on_added_tokens_is_loaded_as_it_was_trained(tmp_path, base, template):
    trainer = _sft(base, template, tmp_path / "sft")
    trainer.train()
    trainer.save_model()
    assert_close(_outputs(load_policy(str(tmp_path / "sft"))), _outputs(trainer.model), FP32)
    assert LlamaForCausalLM.from_pretrained(base).config.vocab_size == 307


def test_ppo_goes_on_from_an_adapter_on_added_tokens(tmp_path, base, template):
    sft = _sft(base, template, tmp_path / "sft")
    sft.train()
    sft.save_model()
    path = str(tmp_path / "sft")
    trainer = tiny.ppo_trainer(tmp_path / "ppo", model=path, chat=True, tok=load_tokenizer(path, padding_side="left"))
    assert_close(_outputs(trainer.model), _outputs(sft.model), FP32)
    trainer.train()
    assert tiny.logged(trainer, "objective/kl")[1] == 0
    trainer.save_model()
    assert_close(_outputs(load_policy(str(tmp_path / "ppo"))), _outputs(trainer.model), FP32)


def test_a_reward_model_on_added_tokens_is_loaded_as_it_was_trained(tmp_path, base, template):
    trainer = tiny.reward_trainer(
        tmp_path / "rm", base, chat=True, peft=tiny.lora(), chat_template_path=template, learning_rate=1e-2
    )
    trainer.train()
    trainer.save_model()
    assert_close(_outputs(load_reward_model(str(tmp_path / "rm"))), _outputs(trainer.model), FP32)


def test_an_adapter_of_others_on_a_resized_base(tmp_path, base):
    """PEFT saves a resized embedding beside an adapter, without asking."""
    model = LlamaForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(320, mean_resizing=False)
    model = get_peft_model(model, tiny.lora(modules_to_save=["embed_tokens", "lm_head"]))
    model.save_pretrained(tmp_path / "adapter")
    assert_close(_outputs(load_policy(str(tmp_path / "adapter"))), _outputs(model), FP32)


def test_added_tokens_in_a_tied_embedding_are_refused_before_training(tmp_path, base, template):
    model = LlamaForCausalLM.from_pretrained(base, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="`chat_template_path` .* adds .* tokens, which an adapter cannot learn"):
        _sft(model, template, tmp_path / "sft")


def _without_end(tok, **changes):
    tok.eos_token = None
    for name, value in changes.items():
        setattr(tok, name, value)
    return tok


def test_the_end_of_the_model_is_the_end_of_a_tokenizer_without_one():
    tok = _without_end(tiny.tokenizer(), pad_token=None)
    model = tiny.policy(tiny.tokenizer())
    model.generation_config.eos_token_id = [1, 20]
    own = with_end_token(tok, model)
    assert (own.eos_token, own.pad_token) == ("<eos>", "<eos>")
    assert (tok.eos_token, tok.pad_token) == (None, None), "the user's stays as it is"
    assert with_end_token(own, model) is own
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    assert with_end_token(tok, model) is tok


def test_the_end_of_a_model_that_is_given_by_its_path(base):
    assert with_end_token(_without_end(tiny.tokenizer()), base).eos_token == "<eos>"
    assert with_end_token(_without_end(tiny.tokenizer()), "no/model").eos_token is None


def test_ppo_ends_answers_with_the_token_of_the_model(tmp_path):
    trainer = tiny.ppo_trainer(tmp_path, tok=_without_end(tiny.tokenizer()), model=tiny.policy(tiny.tokenizer()))
    assert trainer.eos_token_ids == tiny.END_IDS
    trainer.train()


def test_ppo_without_an_end_is_refused(tmp_path):
    tok = _without_end(tiny.tokenizer())
    with pytest.raises(ValueError, match="The tokenizer has no EOS token, so no answer can end"):
        tiny.ppo_trainer(tmp_path, tok=tok, model=_endless_model(tiny.policy(tok)))


def test_ppo_with_an_end_outside_the_vocabulary_does_not_start(tmp_path):
    tok = tiny.tokenizer()
    model = _endless_model(tiny.policy(tok))
    tok.add_special_tokens({"eos_token": "<nowhere>"})
    trainer = tiny.ppo_trainer(tmp_path, tok=tok, model=model)
    with pytest.raises(ValueError, match="are outside the policy's vocabulary of 307"):
        trainer.train()


@pytest.mark.parametrize(
    "build",
    [
        lambda path, tok: tiny.ppo_trainer(path, tok=tok, model=tiny.policy(tiny.tokenizer())),
        lambda path, tok: _sft(tiny.policy(tiny.tokenizer()), None, path, tok=tok),
        lambda path, tok: tiny.reward_trainer(path, tiny.reward_model(tiny.tokenizer()), tok=tok),
    ],
    ids=["ppo", "sft", "reward model"],
)
def test_a_padding_token_outside_the_vocabulary_is_refused(tmp_path, build):
    tok = tiny.tokenizer()
    tok.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(ValueError, match=r"padding token '\[PAD\]' \(id 307\) is outside the model's vocabulary"):
        build(tmp_path, tok)


def _endless_model(model):
    for config in (model.config, getattr(model, "generation_config", model.config)):
        config.eos_token_id = None
    return model


def test_sft_on_text_needs_an_end(tmp_path):
    data = Dataset.from_dict({"prompt": ["a"] * 4, "completion": ["b"] * 4})
    endless = _endless_model(tiny.policy(tiny.tokenizer()))
    with pytest.raises(ValueError, match="has no EOS token, so no text can end"):
        _sft(endless, None, tmp_path, data, _without_end(tiny.tokenizer()))
    with pytest.raises(ValueError, match="has no padding token"):
        _sft(endless, None, tmp_path, tok=_without_end(tiny.tokenizer(), pad_token=None))
    _sft(
        endless, None, tmp_path, tok=_without_end(tiny.tokenizer())
    ).train()  # a chat template may end texts otherwise
    trainer = _sft(tiny.policy(tiny.tokenizer()), None, tmp_path, data, _without_end(tiny.tokenizer()))
    assert trainer.train_dataset["input_ids"][0][-1] == tiny.END_IDS[0]


def test_a_reward_model_of_text_needs_an_end(tmp_path):
    model = tiny.reward_model(tiny.tokenizer())
    trainer = tiny.reward_trainer(tmp_path, model, tok=_without_end(tiny.tokenizer()))
    assert trainer.train_dataset["chosen_ids"][0][-1] == 1
    model = _endless_model(tiny.reward_model(tiny.tokenizer()))
    with pytest.raises(ValueError, match="has no EOS token, so no text can end"):
        tiny.reward_trainer(tmp_path, model, tok=_without_end(tiny.tokenizer()))


def test_tables_of_positions():
    assert position_limit(tiny.policy(tiny.tokenizer())) is None

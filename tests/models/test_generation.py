"""Every setting of a `GenerationConfig` that could change a rollout is left out, reported or refused."""

import json
import logging
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from processes import run_script
from transformers import AutoModelForCausalLM, GenerationConfig

from rlhf_recipes.evaluation.policies import generate_completions
from rlhf_recipes.models.generation import SETTINGS, check_generation_kwargs, mend_generation_config, plain_output
from rlhf_recipes.options.baselines import CONFIGS
from rlhf_recipes.preflight.policy import sampling_options
from rlhf_recipes.trainers.baselines import TRAINERS
from rlhf_recipes.trainers.stock import Scoring

pytestmark = pytest.mark.tiny

OF_VLLM = {"presence_penalty", "frequency_penalty", "min_tokens", "logit_bias", "allowed_token_ids", "bad_words", "n"}
# A value with an effect for each setting.
ACTIVE = {
    "repetition_penalty": 1.5, "encoder_repetition_penalty": 1.5, "top_p": 0.5, "typical_p": 0.5,
    "guidance_scale": 3.0, "top_k": 3, "min_p": 0.2, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1,
    "no_repeat_ngram_size": 2, "encoder_no_repeat_ngram_size": 2, "min_length": 40, "min_new_tokens": 4,
    "suppress_tokens": [9], "begin_suppress_tokens": [9], "bad_words_ids": [[9]],
    "sequence_bias": [[[9], 2.0]], "forced_bos_token_id": 9,
    "forced_eos_token_id": 1, "exponential_decay_length_penalty": (2, 1.5), "top_h": 0.4, "temperature": 0.5,
    "watermarking_config": {"bias": 2.0}, "do_sample": False, "num_beams": 4, "cache_implementation": "quantized",
    "presence_penalty": 1.0, "frequency_penalty": 1.0, "min_tokens": 3, "logit_bias": {"9": 2.0},
    "allowed_token_ids": [9], "bad_words": ["fox"],
    "num_return_sequences": 2, "num_beam_groups": 2, "return_dict_in_generate": True, "output_scores": True,
    "output_logits": True, "output_attentions": True, "output_hidden_states": True, "token_healing": True,
    "use_mtp": True, "stop_strings": ["fox"], "max_time": 1e-9, "penalty_alpha": 0.6, "dola_layers": "high",
    "constraints": ["fox"], "force_words_ids": [[9]], "prompt_lookup_num_tokens": 3, "assistant_early_exit": 1,
    "assistant_ensemble_weight": 0.5, "speculation_type": "dflash", "n": 2,
    "max_new_tokens": 3, "max_length": 9, "pad_token_id": 5, "bos_token_id": 5, "eos_token_id": 5,
}  # fmt: skip


def _named(effect):
    return [name for name, setting in SETTINGS.items() if setting.effect == effect]


def test_every_field_of_transformers_is_classified():
    assert SETTINGS.keys() - OF_VLLM == vars(GenerationConfig()).keys()
    assert {name for name in SETTINGS if SETTINGS[name].effect != "none"} == ACTIVE.keys()
    defaults = GenerationConfig._get_default_generation_params()
    for name in defaults.keys() - {"top_k", "temperature", "do_sample", *_named("none"), *_named("trainer")}:
        assert defaults[name] in SETTINGS[name].neutral, name


@pytest.mark.parametrize("name", [*_named("form"), *_named("trainer")])
def test_what_no_trainer_can_sample_with_is_refused(tmp_path, name):
    config = tiny.ppo_config(tmp_path, generation_kwargs={name: ACTIVE[name]})
    with pytest.raises(ValueError, match=rf"^`generation_kwargs` has `{name}: .*Leave it out"):
        check_generation_kwargs(config)
    check_generation_kwargs(tiny.ppo_config(tmp_path, generation_kwargs={name: SETTINGS[name].neutral[-1]}))


@pytest.mark.parametrize("name", _named("distribution"))
def test_what_changes_the_samples_is_listed(tmp_path, name):
    asked = sampling_options(tiny.ppo_config(tmp_path, generation_kwargs={name: ACTIVE[name]}), {name: 1}, None)
    assert asked == {name: (ACTIVE[name], "the options of this run")}
    check_generation_kwargs(tiny.ppo_config(tmp_path, generation_kwargs={name: ACTIVE[name]}))
    if name not in OF_VLLM:
        config = GenerationConfig()
        setattr(config, name, ACTIVE[name])
        given = {"temperature": 1.0, "do_sample": True, "top_p": None}
        brought = sampling_options(tiny.ppo_config(tmp_path), given, config)
        expected = [] if name in ("temperature", "do_sample") else [name]
        assert list(brought) == expected, "the trainer sets the other two"


def test_the_temperature_of_a_run_is_in_its_log_probabilities(tmp_path):
    options = {"temperature": 0.7, "generation_kwargs": {"temperature": 0.7}}
    assert sampling_options(tiny.ppo_config(tmp_path, **options), (), None) == {}
    options["generation_kwargs"] = {"temperature": 1.0}
    assert list(sampling_options(tiny.ppo_config(tmp_path, **options), (), None)) == ["temperature"]


@pytest.mark.parametrize("use_vllm", [False, True])
def test_a_setting_that_transformers_would_ignore(tmp_path, use_vllm):
    config = tiny.ppo_config(tmp_path, generation_kwargs={"no_repeat_ngram": 3}, use_vllm=use_vllm)
    if use_vllm:
        check_generation_kwargs(config)
        return
    with pytest.raises(ValueError, match="does not know. Did you mean `no_repeat_ngram_size`"):
        check_generation_kwargs(config)


def _baseline(directory, model, **options):
    return TRAINERS["grpo"](
        tiny.save(model, directory / "policy"),
        CONFIGS["grpo"](str(directory), **{**tiny.QUIET, "max_completion_length": 6, "num_generations": 2, **options}),
        Scoring([tiny.length_reward], " "),
        train_dataset=tiny.prompts(),
        processing_class=tiny.tokenizer(),
    )


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_the_trainers_refuse_when_they_are_built(tmp_path, kind):
    asked = {"generation_kwargs": {"num_return_sequences": 3}}
    build = {"ppo": tiny.ppo_trainer, "grpo": partial(_baseline, model=tiny.policy(tiny.tokenizer()))}[kind]
    with pytest.raises(ValueError, match="`num_return_sequences: 3`"):
        build(tmp_path, **asked)


@pytest.mark.parametrize("peft", [None, tiny.lora()], ids=["full", "lora"])
def test_the_form_that_a_model_brings_reaches_no_rollout(tmp_path, peft):
    """All such settings at once would break the sampler, each in its own way."""
    batches = []
    for active in (False, True):
        tok = tiny.tokenizer()
        model = tiny.policy(tok)
        for name in _named("form") if active else ():
            setattr(model.generation_config, name, ACTIVE[name])
        trainer = tiny.ppo_trainer(tmp_path, model=model, tok=tok, peft=peft)
        torch.manual_seed(1)
        batches.append(tiny.rollout(trainer)["completion_ids"])
    assert torch.equal(*batches)
    assert model.generation_config.num_return_sequences == 2, "the policy keeps its own settings"


def test_a_baseline_samples_whole_answers_too(tmp_path):
    model = tiny.policy(tiny.tokenizer())
    model.generation_config.update(num_return_sequences=2, do_sample=True, output_scores=True)
    model.generation_config.return_dict_in_generate = True
    trainer = _baseline(tmp_path, model, max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_library_user_is_warned_when_the_trainer_is_built(tmp_path, caplog):
    """`min_p` is one that TRL seems to set: it passes `None`, and `generate` then takes the model's."""
    tok = tiny.tokenizer()
    model = tiny.policy(tok)
    model.generation_config.update(num_beams=4, min_p=0.9)
    with caplog.at_level(logging.WARNING, "rlhf_recipes"):
        tiny.ppo_trainer(tmp_path, model=model, tok=tok, generation_kwargs={"guidance_scale": 2.0})
    said = [message for message in caplog.messages if "Answers are sampled with" in message]
    assert [message.split("`")[1] for message in said] == ["guidance_scale: 2.0", "min_p: 0.9", "num_beams: 4"]


@pytest.mark.parametrize("peft", [None, tiny.lora()], ids=["full", "lora"])
def test_an_evaluation_samples_the_policy_alone(peft):
    """An evaluation uses no setting of the model's file, and leaves the file's settings to whom they belong."""
    tok, samples = tiny.tokenizer(), []
    for active in (False, True):
        model = tiny.policy(tok)
        model = tiny.sft_adapter(model) if peft else model
        base = model.get_base_model() if peft else model
        own = base.generation_config
        if active:
            own.update(
                num_beams=3, guidance_scale=4.0, num_return_sequences=2, return_dict_in_generate=True, top_p=0.1
            )
        torch.manual_seed(0)
        samples.append(generate_completions(model.eval(), tok, ["hello"] * 4, max_completion_length=6))
        assert base.generation_config is own
        assert "generation_config" not in vars(model) or not peft
    assert samples[0] == samples[1] or peft, "an adapter of its own each time"


def test_the_settings_are_back_after_an_error():
    model = tiny.policy(tiny.tokenizer())
    own = model.generation_config
    own.stop_strings = ["fox"]
    seen = []
    with suppress(KeyboardInterrupt), plain_output(model):
        seen.append(model.generation_config.stop_strings)
        raise KeyboardInterrupt
    assert seen == [None]
    assert model.generation_config is own
    assert own.stop_strings == ["fox"]


@pytest.mark.parametrize(
    ("given", "expected", "said"),
    [
        (
            {"temperature": 0.9, "top_p": 0.6},
            {"temperature": 0.9, "top_p": 0.6, "do_sample": True},
            "`do_sample: true`",
        ),
        ({"top_k": 5}, {"top_k": 5, "do_sample": True}, "`do_sample: true`"),
        ({"do_sample": False, "temperature": 0.9}, {"do_sample": False}, "`temperature: null`"),
        ({"early_stopping": True}, {}, "`early_stopping: null`"),
        ({"output_scores": True, "min_p": 0.1}, {"min_p": 0.1, "do_sample": True}, "`output_scores: null`"),
        ({"do_sample": True, "temperature": 0.6}, {"do_sample": True, "temperature": 0.6}, None),
        ({}, {}, None),
    ],
)
def test_a_config_that_transformers_loads_is_saved(tmp_path, caplog, given, expected, said):
    directory = tiny.save(tiny.policy(tiny.tokenizer()), tmp_path / "model")
    file = tmp_path / "model" / "generation_config.json"
    file.write_text(json.dumps(given))
    model = AutoModelForCausalLM.from_pretrained(directory)
    model.generation_config.pad_token_id = 0  # as export and trainers do
    if said:
        with pytest.raises(ValueError, match="GenerationConfig is invalid"):
            model.save_pretrained(tmp_path / "refused")
    mend_generation_config(model)
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert {name: value for name, value in saved.items() if name in SETTINGS} == expected | {"pad_token_id": 0} | {
        name: saved[name] for name in ("transformers_version", "_from_model_config") if name in saved
    }
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("rlhf_recipes")]
    assert [said in message for message in messages] == ([True] if said else [])
    assert GenerationConfig.from_pretrained(tmp_path / "saved").pad_token_id == 0


def test_the_export_says_so(tmp_path):
    tiny.save(tiny.policy(tiny.tokenizer()), tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6}')
    recipe = Path(__file__).parents[2] / "recipes" / "export.py"
    options = ("--model_name_or_path", "model", "--output_dir", "export")
    code, output = run_script(recipe, *options, directory=tmp_path)
    assert code == 0, output[-2000:]
    assert "`do_sample: true`" in output
    saved = json.loads((tmp_path / "export" / "generation_config.json").read_text())
    assert (saved["do_sample"], saved["temperature"], saved["top_p"]) == (True, 0.9, 0.6)


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_a_final_save_says_so_too(tmp_path, caplog, kind):
    """A refusal of transformers would come after the training, when the weights are saved."""
    model = tiny.policy(tiny.tokenizer())
    model.generation_config.update(temperature=0.9, top_p=0.6)
    if kind == "ppo":
        trainer = tiny.ppo_trainer(tmp_path / "out", model=model)
    else:
        trainer = _baseline(tmp_path / "out", tiny.policy(tiny.tokenizer()))
        trainer.model.generation_config.update(temperature=0.9, top_p=0.6)
    trainer.save_model(str(tmp_path / "out"))
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (saved["do_sample"], saved["temperature"], saved["top_p"]) == (True, 0.9, 0.6)
    assert len([message for message in caplog.messages if "saved with `do_sample: true`" in message]) == 1

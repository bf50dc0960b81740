"""`docs/metrics.md` explains every logged figure, and no other."""

import re
from pathlib import Path

import pytest
import tiny
from datasets import Dataset
from tiny_steps import trainer_of
from trl import SFTConfig, SFTTrainer

from rlhf_recipes.evaluation.policies import best_of_n, compare_policies
from rlhf_recipes.options.baselines import CONFIGS
from rlhf_recipes.trainers.baselines import TRAINERS
from rlhf_recipes.trainers.stock import Scoring

pytestmark = pytest.mark.tiny

GLOSSARY = Path(__file__).parents[2] / "docs" / "metrics.md"
# Needs vLLM, a GPU, a critic of its own, or a language model as a judge.
OF_JUDGES = "flipped|tied|first_position_wins|refused|unreadable|requests|tokens"  # test_language_model_judge.py
ELSEWHERE = re.compile(rf"sampling/.*|system/\*|val/critic_tokens|.*<\w+>/({OF_JUDGES})")
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 2, "per_device_eval_batch_size": 4}


def _documented():
    """Return the names in the first columns of the tables and in the text, as patterns."""
    lines = GLOSSARY.read_text(encoding="utf-8").splitlines()
    cells = [line.split("|")[1] if line.startswith("|") else line for line in lines]
    names = {name for cell in cells for name in re.findall(r"`([\w/<>*.]+)`", cell)}
    options = {"eval_strategy", "eval_steps", "judge_models", "judge_functions", "pairwise_judges", "score", "alarms"}
    prose = {
        "best_of",
        "beta",
        "num_generations",
        "rlhf_recipes/evaluation/alarms.py",
        "recipes/evaluate.py",
        "eval_<figure>",
        "<name>",
    }
    return names - options - prose - {"recipes/baseline.py", "stop_on_decline"}


def _pattern(name):
    return re.compile(re.sub("<[a-z]+>", "[^/]+", re.escape(name)))


def _dense(completion_ids, **kwargs):
    return [[1.0] * len(ids) for ids in completion_ids]


def _ppo(directory):
    trainer = tiny.ppo_trainer(
        directory,
        kl_estimator="full",
        eval_data=tiny.prompts(),
        judges={"judge": tiny.length_reward},
        pairwise_judges={"pairs": lambda prompts, **kwargs: [0.5] * len(prompts)},
        num_generations=2,
        rewards=[_dense, str(directory.with_name("reward_modeling"))],
        **EVALUATED,
    )
    trainer.train()
    return trainer


def _reward_model(directory):
    """Train several heads on pairs that they do not rank alike, and leave the reward model to PPO."""
    model = tiny.reward_model(tiny.tokenizer(), num_labels=3)
    trainer = tiny.reward_trainer(directory, model, eval_data=tiny.preferences(count=40), score_heads=3, **EVALUATED)
    trainer.train()
    trainer.save_model()
    return trainer


def _process_reward_model(directory):
    trainer = trainer_of(directory, **EVALUATED)
    trainer.train()
    return trainer


def _sft(directory):
    texts = Dataset.from_dict({"text": tiny.TEXTS})
    trainer = SFTTrainer(
        tiny.policy(tiny.tokenizer()),
        SFTConfig(str(directory), **tiny.QUIET, **EVALUATED),
        train_dataset=texts,
        eval_dataset=texts,
        processing_class=tiny.tokenizer(),
    )
    trainer.train()
    return trainer


def _baseline(method, **options):
    def run(directory):
        policy = tiny.save(tiny.policy(tiny.tokenizer()), directory / "policy")
        data = TRAINERS[method].rows(tiny.preferences())
        trainer = TRAINERS[method](
            policy,
            CONFIGS[method](str(directory), **{**tiny.QUIET, **EVALUATED, "max_completion_length": 4, **options}),
            Scoring([tiny.length_reward], " ", judges={"judge": tiny.length_reward}),
            train_dataset=data,
            eval_dataset=data,
            processing_class=tiny.tokenizer(),
        )
        trainer.train()
        return trainer

    return run


STEPS = {"process_reward_modeling": _process_reward_model}
BASELINES = {"rloo": _baseline("rloo", num_generations=2), "dpo": _baseline("dpo")}


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs")
    stages = {"reward_modeling": _reward_model, "ppo": _ppo, "sft": _sft, **STEPS, **BASELINES}
    names = {
        stage: {name for entry in run(directory / stage).state.log_history for name in entry} - {"step"}
        for stage, run in stages.items()
    }
    tok = tiny.tokenizer()
    judges = {"judges": {"judge": tiny.length_reward}, "max_completion_length": 4}
    names["evaluate"] = set(compare_policies(tiny.policy(tok), tiny.policy(tok), tok, tiny.prompts(), **judges)[0])
    names["evaluate"] |= set(best_of_n(tiny.policy(tok), tok, tiny.prompts(), sizes=[2], chooser="judge", **judges))
    return names


@pytest.mark.parametrize("stage", ["ppo", "reward_modeling", "sft", *STEPS, *BASELINES, "evaluate"])
def test_every_logged_name_is_explained(logged, stage):
    patterns = [_pattern(name) for name in _documented()]
    unknown = {
        name
        for name in logged[stage]
        if not any(p.fullmatch(name) or p.fullmatch(name.removeprefix("eval_")) for p in patterns)
    }
    assert not unknown
    assert len(logged[stage]) > 5


def test_every_explained_name_is_logged(logged):
    every = set().union(*logged.values())
    stale = {n for n in _documented() if not ELSEWHERE.fullmatch(n) and not any(map(_pattern(n).fullmatch, every))}
    assert not stale

"""`recipes/evaluate_reward_model.py` measures reward models of every kind, and refuses what they cannot rank."""

import json
import threading
import weakref
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import uvicorn
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard
from processes import free_port, run_script
from tolerances import SCORES, assert_close
from transformers import GPT2Config, GPT2ForSequenceClassification

from rlhf_recipes.data.preferences import preference_set
from rlhf_recipes.evaluation import evaluated_models
from rlhf_recipes.evaluation.best_of_answers import load_candidates
from rlhf_recipes.evaluation.evaluated_models import SEPARATOR, evaluate_reward_models, run_separator
from rlhf_recipes.options.reward_model_evaluation import RewardModelEvaluationArguments
from rlhf_recipes.rewards.calls import RewardCalls
from rlhf_recipes.rewards.client import RemoteRewardModel
from rlhf_recipes.rewards.functions import as_scorer
from rlhf_recipes.rewards.scorer import RewardModelScorer
from rlhf_recipes.rewards.server import reward_app
from rlhf_recipes.trainers.evaluated_cards import EVALUATIONS_FILE

pytestmark = pytest.mark.recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "evaluate_reward_model.py"
JUDGE = "def gold(prompts, completions, **columns):\n    return [float('red' in text) for text in completions]\n"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Return a directory with reward models of three kinds, a policy, preferences and a judge."""
    folder = tmp_path_factory.mktemp("evaluation")
    tok = tiny.tokenizer()
    policy = tiny.save(tiny.policy(tok), folder / "policy")
    for name, options in (("plain", {"seed": 1}), ("chat", {"chat": True}), ("heads", {"score_heads": 3})):
        trainer = tiny.reward_trainer(folder / name, policy, tok=tiny.tokenizer(), **options)
        trainer.evaluate()
        trainer.save_model()
    tiny.save_lora_reward_model(policy, folder / "adapter")
    pairs = tiny.preferences().add_column("subset", ["Chat", "Code"] * 4)
    tiny.write_splits(pairs, folder / "pairs")
    (folder / "my_judge.py").write_text(JUDGE)
    return folder


def _evaluate(folder, rows, **options):
    """Evaluate in this process, and return the measurements."""
    models = [name if "://" in name else str(folder / name) for name in options.pop("models", ["plain"])]
    script_args = RewardModelEvaluationArguments(reward_models=models, **options)
    calls = RewardCalls()
    return evaluate_reward_models(script_args, models, preference_set(rows), None, calls)


def test_the_recipe(directory):
    options = {
        "reward_models": ["plain", "adapter"], "dataset_name": "pairs", "output_dir": "out", "tracking": False,
        "model_name_or_path": "policy", "judge_functions": ["my_judge:gold"], "num_samples": 4,
        "max_completion_length": 6, "num_prompts": 3,
    }  # fmt: skip
    (directory / "config.yaml").write_text(yaml.safe_dump(options))
    code, output = run_script(RECIPE, "--config", "config.yaml", directory=directory)
    assert code == 0, output[-3000:]
    results = json.loads((directory / "out" / "results.json").read_text())
    assert results["plain/rows"] == results["adapter/rows"] == 8.0
    assert {
        "plain/category/Chat/accuracy",
        "plain/over_adapter/accuracy_low",
        "oracle/best_of_4/gold",
    } <= results.keys()
    assert results["oracle/best_of_4/gold"] >= results["adapter/best_of_4/gold"]
    rows = [json.loads(line) for line in (directory / "out" / "scores.jsonl").read_text().splitlines()]
    right = [row["plain"][0] > row["plain"][1] for row in rows]
    assert results["plain/accuracy"] == sum(right) / 8
    noted = json.loads((directory / "plain" / EVALUATIONS_FILE).read_text())["pairs:test"]
    assert noted["accuracy"] == results["plain/accuracy"]
    assert "## Evaluation on pairs, split test" in ModelCard.load(directory / "adapter" / "README.md").text
    assert (directory / "out" / "report.html").is_file()
    assert "Result: " in output


def test_scores_are_those_of_training(directory):
    """The accuracy and the mean score of the card are those of the trainer's own evaluation set."""
    for name, chat in (("plain", False), ("chat", True), ("adapter", False)):
        card = json.loads((directory / name / "reward_model_card.json").read_text())
        evaluation = _evaluate(directory, tiny.preferences(chat=chat, count=6), models=[name])
        metrics = evaluation.models[name].metrics
        assert metrics["accuracy"] == card["eval_accuracy"]
        assert_close(metrics["score_mean"], card["score_mean"], SCORES)


def test_heads_are_measured_by_the_same_forwards(directory):
    metrics = _evaluate(directory, tiny.preferences(count=6), models=["heads"]).models["heads"].metrics
    card = json.loads((directory / "heads" / "reward_model_card.json").read_text())
    assert metrics["accuracy"] == card["eval_accuracy"]
    assert_close(metrics["heads/disagreement"], card["disagreement"], SCORES)
    assert 0 <= metrics["heads/unanimous"] <= 1


def _scorer(path):
    return RewardModelScorer.from_pretrained(str(path))


@contextmanager
def served(scorer):
    """Serve a reward model on this machine, and give the address."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(reward_app(scorer), host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def address(directory):
    """Return the address of the served model with several heads."""
    with served(_scorer(directory / "heads")) as url:
        yield url


def test_a_served_model_has_the_same_figures(directory, address):
    here, there = (_evaluate(directory, tiny.preferences(), models=[name]) for name in ("heads", address))
    ours, theirs = (next(iter(evaluation.models.values())).metrics for evaluation in (here, there))
    assert ours.keys() == theirs.keys()
    assert "heads/unanimous" in ours
    assert_close(list(ours.values()), list(theirs.values()), SCORES)


def test_a_served_model_keeps_the_size_of_its_requests(directory, address, monkeypatch):
    """A server of text-embeddings-inference refuses larger ones."""
    scorers = []

    def load(path, **options):
        scorers.append(RemoteRewardModel(path, batch_size=4) if path == address else as_scorer(path, **options))
        return scorers[-1]

    monkeypatch.setattr(evaluated_models, "as_scorer", load)
    _evaluate(directory, tiny.preferences(), models=[address, "heads"], batch_size=16)
    assert {scorer.model is None: scorer.batch_size for scorer in scorers} == {True: 4, False: 16}


def test_one_reward_model_is_in_memory_at_a_time(directory, monkeypatch):
    loaded = []

    def load(path, **options):
        assert not [model for model in loaded if model() is not None]
        scorer = as_scorer(path, device_map="cpu", **options)
        loaded.append(weakref.ref(scorer.model))
        return scorer

    monkeypatch.setattr(evaluated_models, "as_scorer", load)
    _evaluate(directory, tiny.preferences(), models=["plain", "adapter", "heads"])
    assert len(loaded) == 3


def test_policy_and_judges_get_the_separator_of_a_served_model(directory):
    scorer = _scorer(directory / "plain")
    assert scorer.card.response_separator == SEPARATOR
    scorer.card = replace(scorer.card, response_separator="\n")
    with served(scorer) as url:
        assert run_separator(None, [str(directory / "chat"), url, str(directory / "plain")]) == "\n"
    assert run_separator("\t", [url]) == "\t"  # the server is not needed


def test_text_becomes_a_chat_for_a_model_of_chats(directory):
    by_text, by_chat = (_evaluate(directory, tiny.preferences(chat=chat), models=["chat"]) for chat in (False, True))
    assert by_text.results == by_chat.results


def test_rows_beyond_the_positions_of_a_model_are_refused_or_cut(directory):
    tok = tiny.tokenizer()
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 24}
    config = GPT2Config(vocab_size=len(tok), num_labels=1, pad_token_id=tok.pad_token_id, **sizes)
    tiny.save(GPT2ForSequenceClassification(config), directory / "small")
    rows = tiny.preferences(count=2).map(lambda row, i: {"chosen": row["chosen"] * (1 + 20 * i)}, with_indices=True)
    with pytest.raises(ValueError, match=r"small, .* Row 1 of `dataset_name` has \d+ tokens, and the model reads 24"):
        _evaluate(directory, rows, models=["small"])
    assert _evaluate(directory, rows, models=["small"], reward_overflow="cut").results["small/rows"] == 2.0


def _arguments(**options):
    return RewardModelEvaluationArguments(**({"reward_models": ["rm"]} | options))


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (tiny.preferences(), {"models": ["policy"]}, r"policy is not a reward model \(LlamaForCausalLM\)"),
        (
            tiny.preferences(chat=True),
            {},
            "`reward_models`, plain, does not suit `dataset_name`. The reward model was",
        ),
        (tiny.preferences(), {"response_separator": "\n"}, "`reward_models`, plain, .* `response_separator` is"),
    ],
)
def test_what_a_reward_model_cannot_rank_is_refused(directory, rows, options, message):
    with pytest.raises(ValueError, match=message):
        _evaluate(directory, rows, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward_models": []}, "`reward_models` is not set"),
        ({"reward_models": ["a", "b", "a"]}, "`reward_models` names a twice"),
        ({"pairwise_judges": ["m:f"]}, "`pairwise_judges` compare two answers"),
        ({"best_of_dataset_name": "answers"}, "`best_of_dataset_name` needs a judge"),
        ({"num_samples": 0}, "`num_samples` must be positive"),
        ({"temperature": 0.0}, "`temperature` must be positive"),
    ],
)
def test_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        _arguments(**options)


def test_judges_and_answers_need_each_other():
    preferences = preference_set(Dataset.from_dict({"prompt": ["p"], "chosen": ["a"], "rejected": ["b"]}))
    with pytest.raises(ValueError, match="`model_name_or_path` names a policy for best of n, but nothing judges"):
        load_candidates(_arguments(), preferences, "policy", "\n")
    with pytest.raises(ValueError, match="Judges need answers to choose from: set `best_of_dataset_name`"):
        load_candidates(_arguments(judge_functions=["m:f"]), preferences, None, "\n")
    assert load_candidates(_arguments(), preferences, None, "\n") is None

"""Everything that scores a completion satisfies one contract, and a run needs no more than the contract."""

import functools

import pytest
import tiny
import torch
from datasets import Dataset

from rlhf_recipes.models.fingerprint import fingerprint_of_files, fingerprint_of_weights, weights_fingerprint
from rlhf_recipes.options.recipes import PreflightArguments, TrackingArguments
from rlhf_recipes.preflight.preflight import preflight
from rlhf_recipes.rewards.calls import RewardCalls
from rlhf_recipes.rewards.card import RewardModelCard, tokenizer_fingerprint
from rlhf_recipes.rewards.exchange import Exchange
from rlhf_recipes.rewards.functions import as_reward_functions, as_scorer, check_reward_functions, score_statistics
from rlhf_recipes.rewards.protocol import FunctionScorer, Scorer, ScoringRun, scorer_of
from rlhf_recipes.rewards.scorer import RewardModelScorer

pytestmark = pytest.mark.tiny

URL = "http://127.0.0.1:1"
MEMBERS = {*Scorer.__annotations__, "identity", "prepare"}
SERVED = {"name": "served", "card": None, "weights": "0123456789abcdef"}


@pytest.fixture(autouse=True)
def _server(monkeypatch):
    monkeypatch.setattr(Exchange, "__call__", lambda *args, **kwargs: SERVED)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Write a base, a whole reward model and a LoRA reward model on the base."""
    directory = tmp_path_factory.mktemp("scorers")
    base = tiny.save(tiny.policy(tiny.tokenizer()), directory / "base")
    tiny.save(tiny.reward_model(tiny.tokenizer()), directory / "rm")
    tiny.save_lora_reward_model(base, directory / "adapter")
    return directory


def _adapter_trainer(directory, output_dir):
    paths = {"model": str(directory / "base"), "reward_adapter": str(directory / "adapter")}
    return tiny.ppo_trainer(output_dir, rewards=None, peft=tiny.lora(), **paths)


@pytest.fixture(params=["function", "model", "adapter", "served"])
def scorer(request, tmp_path, directory):
    """Return each kind of scorer in turn."""
    if request.param == "adapter":
        return _adapter_trainer(directory, tmp_path).reward_funcs[0]
    given = {"function": tiny.length_reward, "model": str(directory / "rm"), "served": URL}[request.param]
    return scorer_of(*as_reward_functions(given))


RUN = ScoringRun(None, policy_eos_token_ids=[1, 7], batch_size=3, timeout=5.0, prepare_frozen=lambda model: model)


def test_each_kind_has_every_member_of_the_contract(scorer):
    assert not [name for name in MEMBERS if not hasattr(scorer, name)]
    assert scorer_of(scorer) is scorer
    assert scorer.identity()
    assert isinstance(scorer.identity(), str)


@pytest.mark.parametrize(("given", "taken"), [("rm", {"batch_size": 3}), (URL, {"timeout": 5.0})])
def test_a_reward_model_takes_the_limits_of_the_run(directory, given, taken):
    scorer = as_scorer(given if given == URL else str(directory / given))
    scorer.prepare(RUN)
    for name, value in ({"policy_eos_token_ids": [1, 7]} | taken).items():
        assert getattr(scorer, name) == value


def test_a_reward_adapter_takes_the_limits_and_the_policy_of_the_run(tmp_path, directory):
    trainer = _adapter_trainer(directory, tmp_path)
    (scorer,) = trainer.reward_funcs
    assert scorer.model is trainer.model
    assert (scorer.batch_size, scorer.policy_eos_token_ids) == (4, trainer.eos_token_ids)


class _Callable:
    def __call__(self, **kwargs):
        return []


def test_identities_are_those_of_checkpoints_written_before(directory):
    """Old checkpoints hold these values. With any other value an unchanged run could not be resumed."""
    model, path, adapter = tiny.reward_model(tiny.tokenizer()), str(directory / "rm"), str(directory / "adapter")
    base = fingerprint_of_files(str(directory / "base"))
    expected = [
        (path, fingerprint_of_files(path)),
        (adapter, f"{weights_fingerprint(adapter)} on {base}"),
        (model, fingerprint_of_weights(model)),
        (RewardModelScorer(model, tiny.tokenizer()), "reward_model"),
        (RewardModelScorer.from_pretrained(path), "rm"),
        (URL, SERVED["weights"]),
        (tiny.length_reward, "length_reward"),
        (functools.partial(tiny.length_reward), "partial"),
        (_Callable(), "_Callable"),
    ]
    given = [reward for reward, _ in expected]
    functions = as_reward_functions(given, tiny.tokenizer())
    assert [scorer_of(function).identity() for function in functions] == [identity for _, identity in expected]
    assert fingerprint_of_files(path) != path


def test_a_served_model_without_a_fingerprint_is_known_by_its_address(monkeypatch):
    monkeypatch.setitem(SERVED, "weights", None)
    assert as_scorer(URL).identity() == URL


class _Proxy:
    """Imitate the proxy of a remote service, which has every attribute."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: pytest.fail(f"{name} was called")

    def __call__(self, prompts, **kwargs):
        return [1.0] * len(prompts)


def test_an_object_that_answers_to_every_name_is_a_plain_function():
    proxy = _Proxy()
    assert isinstance(scorer_of(proxy), FunctionScorer)
    check_reward_functions([proxy], dataset=tiny.prompts(), response_separator="\n\n")
    assert score_statistics([proxy], torch.ones(1)) is None
    guarded = RewardCalls().guard(proxy, "proxy")
    assert guarded is not proxy
    assert guarded(prompts=["a", "b"]) == [1.0, 1.0]


def test_a_plain_function_keeps_its_name_and_its_arguments():
    scorer = scorer_of(tiny.length_reward)
    assert (scorer.__name__, scorer.model, scorer.card) == ("length_reward", None, None)
    assert scorer(prompts=["p"], completions=["abc"]) == [3.0]
    assert as_reward_functions([tiny.length_reward])[0] is tiny.length_reward, "TRL reads its name and its kind"


class LengthScorer:
    """Score by length. The library does not know this class, which has no base class."""

    def __init__(self, version=1, eval_accuracy=0.75):
        self.__name__, self.version, self.runs, self.calls = "by_length", version, [], []
        self.tokenizer, self.model = tiny.tokenizer(vocab_size=280), torch.nn.Linear(1_000_000, 1)
        fingerprint = tokenizer_fingerprint(self.tokenizer)
        self.card = RewardModelCard("base", False, "\n\n", fingerprint, None, 4.0, 2.0, eval_accuracy)

    def __call__(self, prompts, completions, completion_ids=None, **kwargs):
        self.calls.append(list(completions))
        return [float(len(completion)) for completion in completions]

    def identity(self):
        return f"by_length, version {self.version}"

    def prepare(self, run):
        self.runs.append(run)


def test_an_unknown_scorer_trains_a_policy(tmp_path):
    scorer, judge = LengthScorer(), LengthScorer()
    trainer = tiny.ppo_trainer(
        tmp_path,
        rewards=scorer,
        judges={"judge": judge},
        eval_data=tiny.prompts(),
        eval_strategy="steps",
        eval_steps=4,
    )
    assert trainer.reward_normalizer.mean == 4.0, "the mean on its card"
    assert trainer.reward_calls.guard(scorer) is scorer, "a model in this process is called directly"
    for prepared in (scorer, judge):
        (run,) = prepared.runs
        assert (run.policy, run.policy_eos_token_ids) == (trainer.model, trainer.eos_token_ids)
        assert (run.batch_size, run.timeout) == (4, 300.0)
        assert run.prepare_frozen(torch.nn.Linear(1, 1)).weight.device == trainer.accelerator.device
    trainer.train()
    assert trainer.rollout.scores.tolist() == [float(len(text)) for text in scorer.calls[-1]]
    assert any("eval_judge/win_rate" in entry for entry in trainer.state.log_history)


def test_the_card_of_an_unknown_scorer_is_checked(tmp_path):
    with pytest.raises(ValueError, match="`response_separator` is '->', but the reward model was trained with"):
        tiny.ppo_trainer(tmp_path, rewards=LengthScorer(), response_separator="->")


def test_the_preflight_reads_and_tries_an_unknown_scorer(tmp_path, capsys):
    data = Dataset.from_dict({"prompt": tiny.PROMPTS, "completion": [f"answer {i}" for i in range(8)]})
    scorer = LengthScorer(eval_accuracy=0.5)
    trainer = tiny.ppo_trainer(tmp_path, rewards=[scorer, tiny.length_reward])
    off = (PreflightArguments(), TrackingArguments(tracking=False))
    preflight(trainer, trainer.train_dataset, None, *off, with_answers=data)
    said = capsys.readouterr().out
    assert "  reward      by_length, accuracy 0.50, score 4.00 ± 2.00, tokenizer of its own; length_reward\n" in said
    assert "The reward model by_length ranks 50% of its evaluation pairs" in said
    assert "The reward model by_length gives 8 to 16 different answers" in said
    assert [len(answers) for answers in scorer.calls] == [16]
    assert "  memory      4 MB of weights loaded" in said


def test_a_resume_asks_an_unknown_scorer_who_it_is(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "constant"}
    tiny.ppo_trainer(tmp_path / "first", rewards=LengthScorer(), **options).train()
    checkpoint = str(tmp_path / "first" / "checkpoint-4")
    again = tiny.ppo_trainer(tmp_path / "again", rewards=LengthScorer(), max_steps=8, **options)
    again.train(checkpoint)
    assert again.state.global_step == 8
    changed = tiny.ppo_trainer(tmp_path / "changed", rewards=LengthScorer(version=2), max_steps=8, **options)
    with pytest.raises(ValueError, match="the rewards was .'by_length, version 1'., is .'by_length, version 2'."):
        changed.train(checkpoint)

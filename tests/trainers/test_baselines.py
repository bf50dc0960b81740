"""TRL's RLOO, GRPO and DPO run with our rewards, evaluation and checkpoints, and their losses stay TRL's."""

import functools
import json

import pytest
import tiny
import torch
import trl
from tiny_steps import step_model
from tolerances import FP32, assert_close
from transformers import TrainerCallback

from rlhf_recipes.durability.finite import DivergedError
from rlhf_recipes.models.dropout import dropouts
from rlhf_recipes.options.baselines import CONFIGS, BaselineArguments, DPOConfig, rollout_steps
from rlhf_recipes.options.recipes import EvaluationArguments, PreflightArguments, TrackingArguments
from rlhf_recipes.preflight.preflight import preflight
from rlhf_recipes.rewards.scorer import RewardModelScorer
from rlhf_recipes.trainers.baselines import TRAINERS, DPOTrainer
from rlhf_recipes.trainers.stock import Scoring

pytestmark = pytest.mark.tiny

SAMPLING = {
    "steps_per_generation": 2, "num_generations": 2, "num_iterations": 2, "beta": 0.1, "max_completion_length": 10,
    "num_generations_eval": 1,
}  # fmt: skip
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 8}
METHODS = pytest.mark.parametrize("method", ["rloo", "grpo", "dpo"])
TWO = pytest.mark.parametrize("method", ["rloo", "dpo"])  # one that samples, and one that does not
SAMPLERS = pytest.mark.parametrize("method", ["rloo", "grpo"])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Return the directory of a policy."""
    return tiny.save(tiny.policy(tiny.tokenizer()), tmp_path_factory.mktemp("policy"))


def _trainer(method, base, directory, *, rewards=(tiny.length_reward,), data=None, peft=None, scoring=None, **options):
    config = CONFIGS[method]
    own = {"max_completion_length": 10} if method == "dpo" else SAMPLING
    args = config(str(directory), **{**tiny.QUIET, "max_steps": 4, "learning_rate": 1e-2, **own, **options})
    data = TRAINERS[method].rows(tiny.preferences(count=20)) if data is None else data
    return TRAINERS[method](
        base,
        args,
        Scoring(list(rewards), " ", judges={"judge": tiny.length_reward}, **(scoring or {})),
        train_dataset=data,
        eval_dataset=data.select(range(8)) if args.eval_strategy != "no" else None,
        processing_class=tiny.tokenizer(),
        peft_config=peft,
    )


@pytest.mark.parametrize(("method", "chat"), [("rloo", False), ("grpo", False), ("dpo", True)])
def test_an_evaluation_has_the_figures_of_ppo(base, tmp_path, method, chat):
    data = TRAINERS[method].rows(tiny.preferences(chat=chat))
    trainer = _trainer(method, base, tmp_path, data=data, max_steps=2, **EVALUATED)
    trainer.train()
    kl, scores = (tiny.logged(trainer, f"eval_objective/{name}") for name in ("kl", "scores"))
    assert kl[0] == 0 < abs(kl[2])
    for step in (0, 2):
        assert_close(scores[step], tiny.logged(trainer, "eval_score/policy")[step], FP32)
        assert_close(scores[step], tiny.logged(trainer, "eval_judge/policy")[step], FP32)
        assert tiny.logged(trainer, "eval_prompts")[step] == 8
    assert tiny.logged(trainer, "eval_score/win_rate")[0] == 0.5
    assert tiny.logged(trainer, "eval_score/gain")[0] == 0 != tiny.logged(trainer, "eval_score/gain")[2]
    assert {"eval_win_rate_low", "eval_completions/mean_length", "eval_completions/clipped_ratio"} <= {
        name for entry in trainer.state.log_history for name in entry
    }
    rows = json.loads((tmp_path / "samples" / "evaluation-000002.json").read_text())
    columns = dict(zip(rows["columns"], zip(*rows["data"], strict=True), strict=True))
    assert_close(sum(columns["score"]) / 8, scores[2], FP32)


@METHODS
def test_the_loss_is_that_of_trl(base, tmp_path, monkeypatch, method):
    """The same batches, with TRL's class alone and with ours, give the same weights."""
    # Rows that leave a batch change the random numbers of the others.
    monkeypatch.setattr("rlhf_recipes.models.sampling._rows_may_leave", lambda *_: False)
    ours = _trainer(method, base, tmp_path / "ours")
    ours.train()
    stock = {"rloo": trl.RLOOTrainer, "grpo": trl.GRPOTrainer, "dpo": trl.DPOTrainer}[method]
    rewards = {} if method == "dpo" else {"reward_funcs": [tiny.length_reward]}
    policy = trl.trainer.utils.create_model_from_path(base)
    own = {} if method == "dpo" else SAMPLING
    args = getattr(trl, f"{method.upper()}Config")(
        str(tmp_path / "stock"), **{**tiny.QUIET, "max_steps": 4, "learning_rate": 1e-2, **own}
    )
    data = TRAINERS[method].rows(tiny.preferences(count=20)).map(lambda row: {"prompt": row["prompt"] + " "})
    theirs = stock(policy, args=args, train_dataset=data, processing_class=tiny.tokenizer(), **rewards)
    theirs.train()
    weights = ours.model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in theirs.model.state_dict().items())


@SAMPLERS
def test_the_kl_is_summed_over_a_completion(base, tmp_path, method):
    trainer = _trainer(method, base, tmp_path)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    batch = tiny.rollout(trainer)
    trainer.model.eval()
    ids, mask = (torch.cat([batch[f"prompt_{kind}"], batch[f"completion_{kind}"]], 1) for kind in ("ids", "mask"))
    forward = functools.partial(
        trainer._get_per_token_logps_and_entropies, input_ids=ids, attention_mask=mask,
        logits_to_keep=batch["completion_ids"].size(1),
    )  # fmt: skip
    with torch.no_grad():
        ratio = (forward(trainer.model)[0] - forward(trainer.ref_model)[0]) * batch["completion_mask"]
    (logged,) = trainer._metrics["train"]["objective/kl"]
    assert_close(logged, ratio.sum(dim=1).mean(), FP32)
    assert abs(logged) > 0.01
    assert trainer._metrics["train"]["objective/scores"] == trainer._metrics["train"]["reward"]


@SAMPLERS
def test_lists_of_rewards_count_as_their_sums(base, tmp_path, method):
    trainer = _trainer(method, base, tmp_path)
    trainer.reward_funcs = [lambda completion_ids, **kwargs: [[0.5] * len(ids) for ids in completion_ids]]
    batch = tiny.rollout(trainer)
    lengths = batch["completion_mask"].sum(dim=1).double()
    assert trainer._metrics["train"]["objective/scores"] == [pytest.approx(0.5 * lengths.mean().item())]


def test_dpo_scores_the_answers_of_an_evaluation_by_a_process_reward_model(base, tmp_path):
    path = tiny.save(step_model(tiny.tokenizer()), tmp_path / "prm")
    trainer = _trainer("dpo", base, tmp_path / "dpo", rewards=[path], **EVALUATED)
    trainer.evaluate()
    scores = trainer._functions[0].answer
    assert len(scores) == 8
    assert any(score.rewards for score in scores)
    assert_close(tiny.logged(trainer, "eval_objective/scores")[0], sum(scores) / 8, FP32)


def test_grpo_without_old_log_probabilities_knows_its_kl_in_evaluations_only(base, tmp_path):
    trainer = _trainer(
        "grpo", base, tmp_path, num_iterations=1, gradient_accumulation_steps=2, max_steps=2, **EVALUATED
    )
    trainer.train()
    assert not tiny.logged(trainer, "objective/kl")
    kl = tiny.logged(trainer, "eval_objective/kl")
    assert kl[0] == 0 < abs(kl[2])


@TWO
def test_a_reward_model_reads_the_text_of_ppo(base, tmp_path, method, monkeypatch):
    """Prompt, separator, completion and EOS; a completion that was cut off has no EOS."""
    tok, read = tiny.tokenizer(), []
    reward_model = tiny.save(tiny.reward_model(tok), tmp_path / "rm")
    original = RewardModelScorer.token_ids

    def token_ids(self, prompts, completions, finished):
        rows = original(self, prompts, completions, finished)
        read.append((prompts, completions, finished, tok.batch_decode(rows)))
        return rows

    monkeypatch.setattr(RewardModelScorer, "token_ids", token_ids)
    _trainer(method, base, tmp_path / "run", rewards=[reward_model], max_steps=2, **EVALUATED).train()
    assert read
    ends = set()
    for prompts, completions, finished, texts in read:
        ends |= set(finished)
        for prompt, completion, ended, text in zip(prompts, completions, finished, texts, strict=True):
            assert prompt.strip() in tiny.PROMPTS
            assert prompt.endswith(" ")
            assert text == prompt + completion + ("<eos>" if ended else "")
    assert ends == {True, False}


def _history(trainer):
    """Return the figures, without times."""
    entries = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
    return [{k: v for k, v in x.items() if not k.endswith(("step_time", "runtime", "per_second"))} for x in entries]


@TWO
def test_a_resumed_run_is_the_uninterrupted_one(base, tmp_path, method):
    """An epoch has five rollouts of four steps. The checkpoint is inside a rollout; for DPO, in the second epoch."""
    options = {"max_steps": 8, "logging_steps": 3, **EVALUATED, "eval_steps": 8}
    whole = _trainer(method, base, tmp_path, save_strategy="steps", save_steps=6, **options)
    whole.train()
    resumed = _trainer(method, base, tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    weights = whole.model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in resumed.model.state_dict().items())
    assert _history(resumed) == _history(whole)


@METHODS
@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_step_that_spoils_the_weights_ends_the_run(base, tmp_path, method, step):
    """After step 4 the methods that sample would sample again, from a policy that answers no number."""

    class Spoil(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step + 1 == step:
                next(p for p in model.parameters() if p.requires_grad).data.view(-1)[0] = torch.nan

    trainer = _trainer(method, base, tmp_path, max_steps=8, save_strategy="steps", save_steps=1)
    trainer.add_callback(Spoil())
    message = rf"Step {step} made weights that are not finite, .* checkpoint is \S*checkpoint-{step - 1}\."
    with pytest.raises(DivergedError, match=message):
        trainer.train()
    assert not (tmp_path / f"checkpoint-{step}").exists()


@METHODS
def test_a_run_that_an_evaluation_ended_is_over(base, tmp_path, method):
    class Stop(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    steps, weights = [], []
    for _ in range(2):
        trainer = _trainer(method, base, tmp_path, save_strategy="steps", save_steps=2, **EVALUATED)
        trainer.add_callback(Stop())
        trainer.train(resume_from_checkpoint=True)
        weights.append({name: x.clone() for name, x in trainer.model.state_dict().items()})
    assert steps == [1, 2]
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())


def test_a_checkpoint_of_a_run_without_evaluations_has_no_baseline(base, tmp_path):
    _trainer("rloo", base, tmp_path, max_steps=4, save_strategy="steps", save_steps=2).train()
    with pytest.raises(ValueError, match="`eval_strategy` was `no` when"):
        _trainer("rloo", base, tmp_path, **EVALUATED).train(resume_from_checkpoint=True)


@TWO
def test_an_adapter_is_compared_with_its_base_and_saved_alone(base, tmp_path, method):
    first = _trainer(method, base, tmp_path / "first", peft=tiny.lora(), max_steps=2, **EVALUATED)
    first.train()
    assert tiny.logged(first, "eval_objective/kl")[0] == 0
    first.save_model(str(tmp_path / "first"))
    second = _trainer(method, str(tmp_path / "first"), tmp_path / "second", max_steps=2, **EVALUATED)
    second.train()
    kl = tiny.logged(second, "eval_objective/kl")
    assert kl[0] == 0 < abs(kl[2]), "the reference is the adapter that training started from"
    second.save_model(str(tmp_path / "second"))
    assert [path.parent for path in (tmp_path / "second").rglob("adapter_model*")] == [tmp_path / "second"]


@TWO
def test_the_preflight_of_a_baseline(base, tmp_path, method, capsys):
    trainer = _trainer(method, base, tmp_path, data=TRAINERS[method].rows(tiny.preferences()), **EVALUATED)
    data = tiny.preferences()
    given = (PreflightArguments(), TrackingArguments(tracking=False))
    preflight(trainer, TRAINERS[method].rows(data), data, *given, with_answers=data)
    report = capsys.readouterr().out
    assert "4 optimiser steps" in report
    assert "evaluation  3 times on 8 rows" in report
    if method == "dpo":
        assert "4 rows per optimiser step" in report
    else:
        assert "8 completions (4 x 1 process x 2 steps), 2 per prompt" in report
        assert "2 epochs of 2 mini-batches of 4: 4 optimiser steps per rollout" in report
        assert "length_reward" in report


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("rloo", {"rewards": []}, "There is no reward: set `reward_model_path`"),
        ("dpo", {"rewards": [], **EVALUATED}, "There is no reward: set `reward_model_path`"),
        ("dpo", {"precompute_ref_log_probs": True, **EVALUATED}, "`precompute_ref_log_probs` removes the reference"),
        ("dpo", {"data": tiny.prompts()}, "`train_dataset` has no column 'chosen', 'rejected'"),
        ("grpo", {"data": tiny.prompts(count=3)}, "3 prompts, fewer than one rollout's 4"),
        ("rloo", {"max_completion_length": 127}, "exceeds the model's 128 positions"),
        ("dpo", {"max_completion_length": 127}, "exceeds the model's 128 positions"),
    ],
)
def test_what_does_not_fit_is_refused(base, tmp_path, method, options, message):
    with pytest.raises(ValueError, match=message):
        _trainer(method, base, tmp_path, **options)


def test_another_separator_than_the_reward_model_has_is_refused(base, tmp_path):
    trainer = tiny.reward_trainer(tmp_path / "rm", max_steps=1)
    trainer.evaluate()
    trainer.save_model()
    with pytest.raises(ValueError, match="`response_separator` is ' ', but the reward model was trained with"):
        _trainer("rloo", base, tmp_path / "run", rewards=[str(tmp_path / "rm")])


def test_dpo_needs_no_reward_without_an_evaluation(base, tmp_path):
    trainer = _trainer("dpo", base, tmp_path, rewards=[], max_steps=1)
    trainer.train()
    assert isinstance(trainer, DPOTrainer)


def test_options_of_the_recipe():
    with pytest.raises(ValueError, match="`method` must be one of rloo, grpo, dpo, got 'ppo'"):
        BaselineArguments(method="ppo")
    with pytest.raises(ValueError, match="`reward_retries` must not be negative"):
        BaselineArguments(reward_retries=-1)
    with pytest.raises(ValueError, match="`best_of` needs `reward_model_path`"):
        EvaluationArguments(best_of=[4], judge_functions=["a:b"])
    with pytest.raises(ValueError, match="`best_of` must be positive"):
        EvaluationArguments(best_of=[4, 0], reward_model_path="rm")
    with pytest.raises(ValueError, match=r"`best_of` must be a list, got 4: write `best_of: \[4\]`"):
        EvaluationArguments(best_of=4, reward_model_path="rm")


def test_the_length_of_an_answer_of_dpo_is_that_of_rloo():
    assert DPOConfig.max_completion_length == trl.RLOOConfig.max_completion_length


def test_a_rollout_has_at_least_one_step(tmp_path):
    quiet = {**tiny.QUIET, "num_generations": 2}
    assert rollout_steps(trl.RLOOConfig(str(tmp_path), **quiet, steps_per_generation=2, num_iterations=3)) == 6
    one = {"gradient_accumulation_steps": 4, "steps_per_generation": 2}
    assert rollout_steps(trl.RLOOConfig(str(tmp_path), **quiet, **one)) == 1


@pytest.mark.parametrize("method", ["rloo", "grpo", "dpo"])
def test_a_baseline_trains_without_any_dropout(tmp_path, method):
    model = tiny.policy(tiny.tokenizer())
    model.config.attention_dropout = 0.3
    directory = tiny.save(model, tmp_path / "base")
    assert not dropouts(_trainer(method, directory, tmp_path / "a").model)
    assert dropouts(_trainer(method, directory, tmp_path / "b", disable_dropout=False).model)

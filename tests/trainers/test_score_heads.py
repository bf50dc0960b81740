"""Reward models with several score heads: their training, files, scores and disagreement."""

import functools
import json
import threading
from collections import Counter

import pytest
import requests
import tiny
import torch
import uvicorn
from processes import free_port, run_in_processes
from tolerances import FP32, SPLIT, assert_close
from torch.nn.functional import logsigmoid

from rlhf_recipes.algorithm.heads import combine_heads, disagreement
from rlhf_recipes.evaluation.statistics import head_metrics
from rlhf_recipes.models.reward_model import load_reward_model, load_reward_model_base
from rlhf_recipes.options.baselines import CONFIGS
from rlhf_recipes.options.changes import with_changes
from rlhf_recipes.options.followed_rewards import FollowedRewardConfig
from rlhf_recipes.rewards.card import RewardModelCard
from rlhf_recipes.rewards.client import RemoteRewardModel
from rlhf_recipes.rewards.scorer import RewardModelScorer
from rlhf_recipes.rewards.server import reward_app
from rlhf_recipes.trainers.baselines import TRAINERS
from rlhf_recipes.trainers.score_heads import DealtPairs
from rlhf_recipes.trainers.stock import Scoring

pytestmark = pytest.mark.tiny
HEADS = 3
FIGURES = ("disagreement", "margin_disagreement", "accuracy", "score_mean")


@pytest.fixture
def base(tmp_path):
    """Write an SFT policy, and return its path."""
    return tiny.save(tiny.policy(tiny.tokenizer()), tmp_path / "base")


@pytest.fixture
def directory(tmp_path, base):
    """Train a reward model with three heads, and return its directory."""
    trainer = tiny.reward_trainer(tmp_path / "rm", base, score_heads=HEADS)
    trainer.train()
    trainer.save_model()
    trainer.evaluate()
    trainer.save_card()
    return str(tmp_path / "rm")


@pytest.mark.parametrize("margin", [False, True])
def test_the_loss_is_the_mean_over_the_pairs_and_their_heads(tmp_path, base, margin):
    data = tiny.preferences(margin=margin)
    trainer = tiny.reward_trainer(tmp_path / "rm", base, data=data, score_heads=HEADS, per_device_train_batch_size=4)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    loss, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    chosen, rejected = outputs.logits.double().chunk(2)
    terms = [
        -logsigmoid(chosen[i, k] - rejected[i, k] - (batch["margin"][i] if margin else 0)).item()
        for i, heads in enumerate(batch["heads"].tolist())
        for k in heads
    ]
    assert len(terms) == 4 * 2
    assert_close(loss, sum(terms) / len(terms), FP32)


def test_a_head_learns_only_from_its_pairs(tmp_path, base):
    trainer = tiny.reward_trainer(tmp_path / "rm", base, score_heads=HEADS, per_device_train_batch_size=1)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    trainer.compute_loss(trainer.model, dict(batch)).backward()
    learned = trainer.model.score.weight.grad.abs().sum(dim=1) > 0
    assert learned.nonzero().flatten().tolist() == batch["heads"][0].tolist()


def test_every_pair_is_dealt_to_half_of_the_heads_evenly_and_always_to_the_same():
    dealt = DealtPairs(lambda examples: {}, count=4, seed=0)
    examples = [{"chosen_ids": [i, 1], "rejected_ids": [i]} for i in range(400)]
    heads = dealt(examples)["heads"]
    assert heads.shape == (400, 2)
    assert all(len(set(row)) == 2 for row in heads.tolist())
    shares = Counter(heads.flatten().tolist())
    assert all(150 < shares[head] < 250 for head in range(4))  # 200 each, with a deviation of 10
    assert dealt(examples[::-1])["heads"].tolist() == heads.tolist()[::-1]
    assert DealtPairs(lambda examples: {}, count=4, seed=1)(examples)["heads"].tolist() != heads.tolist()


def test_an_evaluation_asks_all_heads(tmp_path, base):
    trainer = tiny.reward_trainer(tmp_path / "rm", base, score_heads=HEADS)
    metrics = trainer.evaluate()
    batch = trainer.data_collator([trainer.eval_dataset[i] for i in range(6)])
    trainer.model.eval()
    with torch.no_grad():
        scores = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    chosen, rejected = scores.chunk(2)
    assert_close(metrics["eval_loss"], -logsigmoid(chosen - rejected).mean(), FP32)
    assert_close(metrics["eval_accuracy"], (chosen.mean(1) > rejected.mean(1)).float().mean(), FP32)
    assert_close(metrics["eval_margin_disagreement"], (chosen - rejected).std(1).mean(), FP32)
    assert_close(metrics["eval_disagreement"], (scores - scores.mean(0)).std(1).mean(), FP32)
    assert trainer.card.disagreement == metrics["eval_disagreement"]
    assert_close(torch.tensor(trainer.card.head_means), scores.mean(0), FP32)


def test_a_saved_reward_model_gives_the_scores_of_its_training(directory):
    model, card = load_reward_model(directory, heads=HEADS), RewardModelCard.load(directory)
    assert (card.score_heads, len(card.head_means)) == (HEADS, HEADS)
    scorer = RewardModelScorer.from_pretrained(directory)
    prompts, answers = ["Tell a story\n\n"] * 2, ["the fox is red", "berries 3"]
    rows = scorer.token_ids(prompts, answers, [True, True])
    with torch.no_grad():
        plain = torch.cat([model(input_ids=torch.tensor([row])).logits for row in rows])
    assert_close(torch.tensor(scorer(prompts, answers)), plain.mean(dim=1), FP32)
    common = plain - torch.tensor(card.head_means) + sum(card.head_means) / HEADS
    scorer.combine = functools.partial(combine_heads, rule="pessimistic", coef=2.0)
    assert_close(torch.tensor(scorer(prompts, answers)), plain.mean(dim=1) - 2 * common.std(dim=1), FP32)
    ours, alone = scorer.scores_alone(prompts, answers)
    assert_close(torch.tensor(ours), torch.tensor(alone), FP32)


@pytest.mark.parametrize("adapter", [False, True])
def test_ppo_follows_the_pessimistic_score_and_logs_the_disagreement(tmp_path, base, adapter):
    options = {"peft": tiny.lora()} if adapter else {}
    trained = tiny.reward_trainer(tmp_path / "rm", base, score_heads=HEADS, **options)
    trained.train()
    trained.evaluate()
    trained.save_model()
    path = str(tmp_path / "rm")
    rewards = {"rewards": None, "reward_adapter": path} if adapter else {"rewards": path}
    rules = {"reward_heads": "pessimistic", "reward_heads_coef": 1.5}
    trainer = tiny.ppo_trainer(tmp_path / "ppo", model=base, **options, **rewards, **rules, reward_norm=False)
    scorer = trainer.scorers[0]
    by_head = scorer._score_rows(rows := scorer.token_ids(["A\n\n"], ["fox"], [True]), [])[0]
    assert by_head.shape == (1, HEADS)
    assert disagreement(by_head).item() > 0
    assert_close(scorer.score_token_ids(rows), [(by_head.mean() - 1.5 * by_head.std()).item()], FP32)
    assert scorer.card.score_std
    assert not trainer.reward_normalizer.is_known  # the card has the level of the mean
    returns = trainer._identity_of_returns({})
    trainer.train()
    disagreements, ratios = (tiny.logged(trainer, f"rewards/rm/disagreement{end}") for end in ("", "_ratio"))
    assert disagreements
    for step, value in disagreements.items():
        assert value > 0
        assert_close(ratios[step], value / trainer.scorers[0].card.disagreement, FP32)
    trainer.args = with_changes(trainer.args, reward_heads_coef=5.0)
    assert trainer._identity_of_returns({}) != returns  # a critic of the one would be wrong for the other


def test_a_baseline_follows_the_rule_and_resumes_with_no_other(tmp_path, base, directory):
    def trainer(rule):
        args = CONFIGS["rloo"](str(tmp_path / rule), **tiny.QUIET, num_generations=2, max_completion_length=4)
        scoring = Scoring([directory], "\n\n", limits=FollowedRewardConfig(reward_heads=rule, reward_heads_coef=2.0))
        given = {"train_dataset": tiny.prompts(), "processing_class": tiny.tokenizer()}
        return TRAINERS["rloo"](base, args, scoring, **given)

    mean, pessimistic = trainer("mean"), trainer("pessimistic")
    assert pessimistic.scorers[0].combine(torch.tensor([[1.0, 2.0, 3.0]])).item() == 0.0
    with pytest.raises(ValueError, match=r"`reward_heads` was None, is \['pessimistic', 2.0\]"):
        pessimistic._identity.load_state_dict(mean._identity.state_dict())


def test_a_judge_with_several_heads_gives_their_mean(tmp_path, directory):
    judge = RewardModelScorer.from_pretrained(directory)
    data = tiny.prompts(count=2)
    options = {"eval_data": data, "eval_strategy": "steps", "eval_steps": 1, "reward_heads": "pessimistic"}
    tiny.ppo_trainer(tmp_path / "ppo", judges={"gold": judge}, **options)
    scores = judge._score_rows(judge.token_ids(["A\n\n"], ["fox"], [True]), [])[0]
    assert_close(judge.combine(scores), scores.mean(dim=1), FP32)


def test_a_reward_model_with_another_number_of_heads_is_refused(tmp_path, directory):
    with pytest.raises(ValueError, match="3 labels; a reward model has one"):
        tiny.reward_trainer(tmp_path / "again", directory)
    with pytest.raises(ValueError, match="The model has `num_labels` 1, and `score_heads` is 3: set"):
        tiny.reward_trainer(tmp_path / "again", tiny.reward_model(tiny.tokenizer()), score_heads=HEADS)
    card = json.loads((tmp_path / "rm" / "reward_model_card.json").read_text())
    (tmp_path / "rm" / "reward_model_card.json").write_text(json.dumps(card | {"score_heads": 2}))
    with pytest.raises(ValueError, match="3 labels; a reward model has 2 here, one per score head"):
        RewardModelScorer.from_pretrained(directory)


def test_training_resumes_bit_for_bit(tmp_path, base):
    def trained(name, **resume):
        trainer = tiny.reward_trainer(
            tmp_path / name, base, score_heads=HEADS, max_steps=4, save_strategy="steps", save_steps=2
        )
        trainer.train(**resume)
        return trainer.model.score.weight.detach().clone()

    whole = trained("whole")
    again = trained("whole", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(whole, again)


def _trained_head(rank, world_size, base, directory):
    options = {"score_heads": HEADS, "per_device_train_batch_size": 4 // world_size, "max_steps": 4}
    trainer = tiny.reward_trainer(f"{directory}/{world_size}", base, learning_rate=1e-2, **options)
    trainer.train()
    metrics = trainer.evaluate()
    return trainer.model.score.weight.detach().clone(), {name: metrics[f"eval_{name}"] for name in FIGURES}


@pytest.mark.distributed
def test_two_ranks_train_the_heads_of_one(tmp_path, base):
    (one, figures), ranks = (
        _trained_head(0, 1, base, tmp_path),
        run_in_processes(_trained_head, 2, base, str(tmp_path)),
    )
    start = load_reward_model_base(base, heads=HEADS).score.weight
    assert (one - start).abs().max() > 1e-3
    for head, of_rank in ranks:
        assert_close(head, one, SPLIT)
        for name, value in figures.items():
            assert_close(of_rank[name], value, SPLIT)


def test_head_metrics_by_hand():
    chosen, rejected = [[2.0, 3.0], [1.0, -1.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 2.0], [1.0, 1.0]]
    # Margins: (2, 3) alike and right, (1, -3) divided and wrong, (-1, -1) alike and wrong.
    metrics = head_metrics(chosen, rejected)
    assert_close(metrics["unanimous"], 2 / 3, FP32)
    assert metrics["accuracy_unanimous"] == 0.5
    assert metrics["accuracy_divided"] == 0.0
    assert_close(metrics["margin_disagreement"], 5 * 2**-0.5 / 3, FP32)
    # The heads have the means 4/6 and 5/6. Without them, the scores of an answer differ by (1, -2, 0, 0, 2, 0) - 1/6.
    assert_close(metrics["disagreement"], (5 / 6 + 13 / 6 + 1 / 6 + 1 / 6 + 11 / 6 + 1 / 6) / 6 * 2**-0.5, FP32)


@pytest.mark.parametrize("critic", ["policy", "reward"])
def test_the_number_of_forwards_does_not_depend_on_the_number_of_heads(tmp_path, base, directory, critic):
    """The critic that reads the reward model's states reads those of the same forward."""
    one = tiny.reward_trainer(tmp_path / "one", base)
    one.save_model()
    counts = {}
    for path in (str(tmp_path / "one"), directory):
        trainer = tiny.ppo_trainer(tmp_path / "ppo", model=base, rewards=path, critic=critic, max_steps=4)
        calls = Counter()
        for name, model in (("policy", trainer.model), ("reward model", trainer.scorers[0].model)):
            model.register_forward_hook(lambda *call, name=name, calls=calls: calls.update([name]))
        trainer.train()
        counts[path] = calls
        if critic == "reward":
            assert trainer.rollout.state_values.shape[0] == len(trainer.rollout.mask)
    one, several = counts.values()
    assert one["reward model"] == several["reward model"] > 0
    assert one["policy"] == several["policy"]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Serve a reward model with several heads from a thread, and return its directory and its address."""
    folder = tmp_path_factory.mktemp("served")
    trainer = tiny.reward_trainer(
        folder / "rm", tiny.save(tiny.policy(tiny.tokenizer()), folder / "base"), score_heads=HEADS
    )
    trainer.evaluate()
    trainer.save_model()
    port, path = free_port(), str(folder / "rm")
    app = reward_app(RewardModelScorer.from_pretrained(path))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    yield path, f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


def test_a_served_reward_model_is_combined_by_the_rule_of_the_run(address):
    path, url = address
    prompts, answers = ["Tell a story\n\n", "a\n\n"] * 3, ["the fox is red", "berries 3"] * 3
    local, remote, logged = RewardModelScorer.from_pretrained(path), RemoteRewardModel(url, batch_size=4), {}
    assert remote.card == local.card
    for rule in ("mean", "pessimistic", "soft_min"):
        local.combine = remote.combine = functools.partial(combine_heads, rule=rule, coef=0.5)
        found = remote(prompts, answers, log_metric=logged.__setitem__)
        assert_close(torch.tensor(found), local(prompts, answers), FP32)
    assert logged.keys() == {"rewards/rm/disagreement", "rewards/rm/disagreement_ratio"}
    body = {"prompts": prompts, "completions": answers, "finished": [True] * 6}
    plain = requests.post(f"{url}/score", json=body, timeout=30).json()["scores"]
    local.combine = combine_heads
    assert_close(torch.tensor(plain), local(prompts, answers), FP32)


def test_a_rule_reaches_a_served_reward_model(tmp_path, address):
    options = {"reward_heads": "pessimistic", "reward_heads_coef": 3.0}
    trainer = tiny.ppo_trainer(tmp_path, rewards=address[1], **options)
    remote, scores = trainer.scorers[0], torch.tensor([[1.0, 2.0, 3.0]])
    assert_close(remote.combine(scores), [-1.0], FP32)

"""PPO on two ranks equals PPO on one rank with the same global batch: same weights, same state, same figures."""

import random

import pytest
import tiny
import torch
from processes import run_in_processes
from tolerances import FP32, SPLIT, assert_close

pytestmark = pytest.mark.distributed
METRICS = ("objective/kl", "objective/scores", "objective/rlhf_reward", "objective/excluded", "kl_coef", "loss/value")
METRICS += ("policy/approx_kl", "policy/clip_fraction", "val/clip_fraction")


VARIANTS = {
    "grpo": {"loss_type": "grpo"},
    "dapo": {"loss_type": "dapo", "kl_estimator": "full"},  # with dense rewards
    "groups": {
        "loss_type": "dr_grpo",
        "num_generations": 2,
        "importance_sampling_level": "sequence",
        "critic": "reward",
        "whiten_advantages": False,
    },
}


def _completion(prompt_ids, sample):
    """Return the completion that every rank samples from this prompt: of any length, ended or cut."""
    draw = random.Random(2 * sum(prompt_ids) + sample)
    tokens = [draw.randrange(60, 200) for _ in range(draw.randrange(1, 9))]
    return tokens + [1] * draw.randrange(2)


def _reward(completion_ids, **kwargs):
    """Return scores, and `None` for about every fifth completion."""
    return [None if sum(ids) % 5 == 0 else float(sum(ids) % 7) for ids in completion_ids]


def _dense_reward(completion_ids, **kwargs):
    """Return the same scores, and now and then in parts."""
    scores = _reward(completion_ids)
    parts = [[(s or 0.0) / len(ids)] * len(ids) for s, ids in zip(scores, completion_ids, strict=True)]
    return [score if score is None or score > 5 else part for score, part in zip(scores, parts, strict=True)]


def _held_out_judge(trainer):
    """Return a judge whose scores change in training, in the same way on all ranks."""
    return lambda completion_ids, **kwargs: [
        float(sum(ids) * (1 + trainer.state.global_step) % 11) for ids in completion_ids
    ]


def _record_rollouts(trainer):
    """Return a list that gets each rollout: a mapping of tokens to the tensors of the update."""
    rollouts, generate = [], trainer._generate_and_score_completions

    def recorded(inputs):
        batch = generate(inputs)
        if not trainer.model.training:
            return batch
        rollouts.append({})
        for row, mask in enumerate(batch["completion_mask"].bool()):
            tokens = [*batch["prompt_ids"][row].tolist(), *batch["completion_ids"][row].tolist()]
            key = tuple(token for token in tokens if token)  # padding depends on the batch
            rollouts[-1][key] = [batch[name][row][mask] for name in ("advantages", "returns", "old_values")]
        return batch

    trainer._generate_and_score_completions = recorded
    return rollouts


def _train(rank, world_size, directory):
    results = {}
    data = tiny.prompts(count=24).map(lambda row, i: {"prompt": f"{row['prompt']} {i}"}, with_indices=True)
    tok = tiny.tokenizer()
    for name, options in VARIANTS.items():
        reads = options.get("critic") == "reward"
        trainer = tiny.ppo_trainer(
            f"{directory}/{world_size}-{name}",
            tok=tok,
            rewards=[tiny.reward_model(tok), _reward] if reads else _dense_reward if name == "dapo" else _reward,
            reward_tok=[tok, None] if reads else None,
            data=data,
            eval_data=data.select(range(7)),
            eval_strategy="steps",
            eval_steps=3,
            per_device_eval_batch_size=4 // world_size,
            per_device_train_batch_size=8 // world_size,
            steps_per_generation=1,
            max_steps=6,
            kl_controller="adaptive",
            kl_horizon=16,
            missing_eos_penalty=0.5,
            check_numerics=True,
            **({} if reads else {"vf_coef": 0.5}),
            **options,
        )
        trainer._generate_single_turn = lambda prompt_ids, *args, **kwargs: (
            [_completion(p, i % 2) for i, p in enumerate(prompt_ids)],  # two of a group are neighbours
            None,
        )
        trainer.held_out.judges["judge"] = _held_out_judge(trainer)
        rollouts = _record_rollouts(trainer)
        trainer.train()
        results[name] = {
            "rollouts": rollouts,
            "weights": {name: p.detach().clone() for name, p in trainer.model.named_parameters()},
            "normalizer": trainer.reward_normalizer.state_dict(),
            "controller": trainer.kl_controller.state_dict(),
            "log": [{k: entry.get(k) for k in METRICS} for entry in trainer.state.log_history if METRICS[0] in entry],
            "evaluations": [
                {name: value for name, value in entry.items() if "judge/" in name or name == "eval_prompts"}
                for entry in trainer.state.log_history
                if "eval_prompts" in entry
            ],
        }
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return the results of one rank, and those of two."""
    directory = str(tmp_path_factory.mktemp("ranks"))
    torch.manual_seed(0)
    return _train(0, 1, directory), run_in_processes(_train, 2, directory)


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_train_the_weights_of_one(results, variant):
    one, two = results[0][variant], [rank[variant] for rank in results[1]]
    start = dict(tiny.policy(tiny.tokenizer()).named_parameters())
    moved = max((one["weights"][name] - parameter).abs().max().item() for name, parameter in start.items())
    assert moved > 100 * SPLIT["atol"]
    for rank in two:
        for name, weights in one["weights"].items():
            assert_close(rank["weights"][name], weights, SPLIT)


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_agree_on_the_state_of_one(results, variant):
    one, two = results[0][variant], [rank[variant] for rank in results[1]]
    assert two[0]["normalizer"] == two[1]["normalizer"]
    assert two[0]["controller"] == two[1]["controller"]
    for part in ("normalizer", "controller"):
        for name, value in one[part].items():
            assert_close(two[0][part][name], value, SPLIT)
    assert one["controller"]["kl_coef"] != 0.05


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_whiten_the_advantages_of_one(results, variant):
    one, two = results[0][variant]["rollouts"], [rank[variant]["rollouts"] for rank in results[1]]
    assert len(one) == 3
    for number, expected in enumerate(one):
        halves = [rank[number] for rank in two]
        assert [len(half) for half in halves] == [4, 4]
        assert expected.keys() == halves[0].keys() | halves[1].keys()
        for key, tensors in expected.items():
            for actual, tensor in zip((halves[0] | halves[1])[key], tensors, strict=True):
                assert_close(actual, tensor, FP32)


def test_two_ranks_log_the_figures_of_one(results):
    one, two = results[0]["grpo"]["log"], results[1][0]["grpo"]["log"]
    assert len(one) == len(two) == 3
    assert any(entry["objective/excluded"] > 0 for entry in one), "some completion must be unscorable"
    for expected, actual in zip(one, two, strict=True):
        for name in METRICS:
            assert_close(actual[name], expected[name], SPLIT)


def test_two_ranks_evaluate_like_one(results):
    """Seven prompts come in batches of four. The prompt that fills the last batch of two ranks does not count."""
    one, two = results[0]["grpo"]["evaluations"], [rank["grpo"]["evaluations"] for rank in results[1]]
    assert two[0] == two[1], "all ranks must choose the same checkpoint"
    assert [entry["eval_prompts"] for entry in one] == [7, 7, 7]
    assert 0 < one[-1]["eval_judge/win_rate"] != 0.5
    for expected, actual in zip(one, two[0], strict=True):
        assert actual.keys() == expected.keys()
        for name in {
            "eval_prompts",
            "eval_judge/win_rate",
            "eval_judge/policy",
            "eval_judge/baseline",
            "eval_judge/gain",
        }:
            assert actual[name] == pytest.approx(expected[name])

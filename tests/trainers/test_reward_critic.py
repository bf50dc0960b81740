"""The critic on the reward model's hidden states: what it reads, what it learns, and what it costs."""

import copy
import math
from collections import Counter

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from processes import run_in_processes
from tolerances import EXACT, FIRST_UPDATE, FP32, MERGED, SPLIT, assert_close

from rlhf_recipes.algorithm.advantages import explained_variance
from rlhf_recipes.models.critic import VALUE_HEAD_FILE, attach_value_head
from rlhf_recipes.options.changes import with_changes
from rlhf_recipes.quickstart.build import build_base_model
from rlhf_recipes.rewards.scorer import RewardModelScorer, state_positions
from rlhf_recipes.trainers.reward_critic import RewardCritic, share_of_own_states

pytestmark = [pytest.mark.tiny, pytest.mark.portable]


def _trainer(directory, **kwargs):
    tok = tiny.tokenizer()
    epochs = {} if kwargs.get("critic") == "policy" else {"critic_epochs": 2}
    options = {"critic": "reward", "value_head_learning_rate": 1e-2, **epochs, **kwargs}
    rewards = options.pop("rewards", None) or tiny.reward_model(tok)
    return tiny.ppo_trainer(directory, tok=tok, rewards=rewards, reward_tok=tok, **options)


@pytest.mark.parametrize(
    ("read", "sampled", "prompt", "positions"),
    [
        ([7, 8, 1, 2, 3], [1, 2, 3], [7, 8], [1, 2, 3, 4]),
        ([7, 8, 1, 2], [1, 2, 3], [7, 8], [1, 2, 3, 3]),  # cut off, or an end that the reward model does not read
        ([7, 8, 1, 5, 6], [1, 2, 3], [7, 8], [1, 2, 2, 2]),  # the same text in other tokens
        ([7, 8, 5, 6], [1, 2], [7, 8], [1, 1, 1]),
        ([7, 8, 4, 4, 1, 2], [1, 2], [7, 8], [3, 4, 5]),  # the template writes something before the answer
        ([7, 1, 2, 3], [1, 2, 3], [7, 9, 9], [0, 1, 2, 3]),  # the prompt opens a part that the answer closes
        ([7, 5, 2], [1, 2], [7, 8], [0, 0, 0]),  # the last token of the prompt and the first of the answer are one
        ([7, 8, 1, 2], [1, 2], [7, 8, 0], [1, 2, 3]),  # a tokenizer that ends each text
    ],
)
def test_states_are_those_before_each_sampled_token(read, sampled, prompt, positions):
    assert state_positions(read, sampled, prompt) == positions


def test_values_are_the_head_on_the_reward_model_by_itself(tmp_path):
    """Each completion alone, through plain transformers: its values depend neither on padding nor on later tokens."""
    trainer = _trainer(tmp_path, max_steps=8, data=tiny.prompts(count=32), per_device_train_batch_size=16)
    trainer.train()
    head = copy.deepcopy(trainer.critic.head)  # the rollout ends with a fit
    batch = tiny.rollout(trainer)
    values, model = trainer.rollout.state_values, trainer.scorers[0].model
    assert values.std() > 0
    compared = 0
    for row in range(len(values)):
        prompt, completion = (
            batch[f"{part}_ids"][row][batch[f"{part}_mask"][row].bool()] for part in ("prompt", "completion")
        )
        read = trainer.scorers[0].tokenizer(trainer.rollout.prompts[row] + trainer.rollout.completions[row])[
            "input_ids"
        ]
        if [*prompt.tolist(), *completion.tolist()][: len(read)] != read:
            continue  # the text has other tokens
        for t in range(len(completion)):
            with torch.no_grad():
                states = model.model(input_ids=torch.cat([prompt, completion[:t]])[None]).last_hidden_state
                expected = head(states[:, -1])
            assert_close(values[row, t], expected[0], FP32)
            compared += 1
    assert compared > {"cpu": 10, "cuda": 5}[tiny.DEVICE]  # a GPU samples other answers


def test_the_reward_model_reads_each_completion_once(tmp_path):
    counts = {}
    for critic in ("policy", "reward"):
        trainer = _trainer(tmp_path / critic, critic=critic)
        calls = counts[critic] = Counter()
        for name, model in (("policy", trainer.model), ("reward model", trainer.scorers[0].model)):
            model.base_model.register_forward_hook(lambda *_, name=name, calls=calls: calls.update([name]))
        tiny.rollout(trainer)
    assert counts["reward"] == counts["policy"]
    assert counts["reward"]["reward model"] > 0


def test_its_head_learns_what_the_states_hold():
    torch.manual_seed(0)
    critic = RewardCritic(
        tiny.ppo_config("unused", critic="reward", value_head_learning_rate=1e-2), 8, torch.device("cpu")
    )
    weight = torch.randn(8)
    mask = (torch.arange(6) < torch.tensor([[6], [4], [5], [1]] * 8)).long()
    explained = []
    for _ in range(12):
        states = [torch.randn(int(length) + 1, 8) for length in mask.sum(dim=1)]
        targets = torch.stack([torch.nn.functional.pad(x[:-1] @ weight, (0, 7 - len(x))) for x in states])
        values = critic.values(states, 6)
        assert values.shape == (32, 7)
        explained.append(explained_variance(values[:, :-1], targets, mask).item())
        critic.fit(states, targets, mask)
    assert explained[0] == 0.0  # the head starts at 0
    assert explained[-1] > 0.9


def test_the_policy_has_no_head_and_its_first_update_is_exact(tmp_path):
    trainer = _trainer(tmp_path)
    assert not any("value_head" in name for name, _ in trainer.model.named_parameters())
    batch = tiny.rollout(trainer)
    trainer.current_gradient_accumulation_steps = 1
    log_ratio = (tiny.logps(trainer, batch) - batch["old_per_token_logps"]) * batch["completion_mask"]
    assert_close(log_ratio, torch.zeros_like(log_ratio), FIRST_UPDATE)
    trainer._compute_loss(trainer.model, batch)
    assert "loss/value" not in trainer._metrics["train"]
    trainer.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final" / VALUE_HEAD_FILE).exists()


def test_it_is_fitted_before_the_first_rollout_if_it_gets_answers(tmp_path):
    trainer = _trainer(tmp_path, critic_dataset=tiny.preferences(count=12))
    trainer.restore_progress()  # as at the start of a run
    tiny.rollout(trainer)
    assert trainer.rollout.state_values.std() > 0
    scorer, pairs = trainer.scorers[0], trainer.critic_dataset
    scores, states = scorer.score_with_states(pairs["prompt"], pairs["chosen"])
    assert_close(scores, scorer(pairs["prompt"], pairs["chosen"]), EXACT)
    first = [
        read_length(scorer, prompt + chosen) for prompt, chosen in zip(pairs["prompt"], pairs["chosen"], strict=True)
    ]
    assert [len(of_row) for of_row in states] == first


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"seed": 2},
        {"reward_norm": False},
        {"reward_weights": [2.0]},
        {"gamma": 0.9},
        {"missing_eos_penalty": 1.0},
        {"group_baseline": False},
        {"reward_heads": "pessimistic"},
    ],
    ids=str,
)
def test_a_later_run_with_the_same_rewards_starts_with_it(tmp_path, caplog, changes):
    """It is not fitted to answers again: it knows more. The same scores on another scale are other rewards."""
    caplog.set_level("INFO")
    first = _trainer(tmp_path / "first", num_generations=2)
    tiny.rollout(first)
    first.save_model()
    expected = first.critic.head.state_dict()
    assert expected["output.weight"].abs().max() > 0
    policy, tok, options = tiny.policy(tiny.tokenizer()), tiny.tokenizer(), {"num_generations": 2, **changes}
    policy.config._name_or_path = str(tmp_path / "first")
    options |= {"model": policy, "rewards": tiny.reward_model(tok, seed=options.pop("seed", 1))}
    later = _trainer(tmp_path / "later", critic_dataset=tiny.preferences(count=4), **options)
    file = str(tmp_path / "first" / "critic" / "reward.safetensors")
    if changes:
        assert not later.critic.head.state_dict()["output.weight"].any()
        assert f"The critic of {file} is not used: its run had other rewards, or scaled them" in caplog.text
        return
    later.restore_progress()
    for name, weight in expected.items():
        assert_close(later.critic.head.state_dict()[name], weight, EXACT)
    assert f"The critic starts with the weights of {file}." in caplog.text
    assert "The critic is not fitted to `critic_dataset`: it starts with the weights of a saved one." in caplog.text


def test_a_saved_critic_takes_the_place_of_one_of_another_kind(tmp_path):
    (tmp_path / "critic").mkdir()
    (tmp_path / "critic" / "adapter.safetensors").touch()
    RewardCritic(tiny.ppo_config("unused", critic="reward"), 8, torch.device("cpu")).save(tmp_path)
    assert [path.name for path in (tmp_path / "critic").iterdir()] == ["reward.safetensors"]


def _load(rank, world_size, directory):
    """Return what a rank finds and has, where only the first rank's disk holds a critic, and only the second's."""
    found = []
    for holder in (0, 1):
        critic = RewardCritic(tiny.ppo_config("unused", critic="reward"), 8, torch.device("cpu"))
        own = f"{directory}/{holder}-{rank}"
        if rank == holder:
            saved = RewardCritic(tiny.ppo_config("unused", critic="reward"), 8, torch.device("cpu"))
            torch.nn.init.constant_(saved.head.output.weight, 3.0)
            saved.save(own)
        loaded = critic.load(own, reads=rank == 0)
        found.append((loaded, critic.head.output.weight.mean().item()))
    return found


@pytest.mark.distributed
def test_all_ranks_start_with_the_critic_of_the_first(tmp_path):
    for of_rank in run_in_processes(_load, 2, str(tmp_path)):
        assert of_rank == [(True, 3.0), (False, 0.0)]


def read_length(scorer, text):
    """Return the number of states around the tokens of an answer that ends with EOS."""
    prompt = text[: text.index("\n\n") + 2]
    return len(scorer.tokenizer(text)["input_ids"]) + 1 - len(scorer.tokenizer(prompt)["input_ids"]) + 1


def _fit(rank, world_size):
    torch.manual_seed(3)
    critic = RewardCritic(tiny.ppo_config("unused", critic="reward"), 8, torch.device("cpu"))
    lengths = torch.tensor([3, 5, 1, 4, 2, 5, 3, 3])
    states = [torch.randn(int(length) + 1, 8) for length in lengths]
    returns, mask = torch.randn(8, 5), (torch.arange(5) < lengths[:, None]).long()
    share = 8 // world_size
    own = slice(rank * share, (rank + 1) * share)
    for _ in range(3):
        critic.fit(states[own], returns[own], mask[own], first_row=rank * share)
    return {name: x.clone() for name, x in critic.head.state_dict().items()}


@pytest.mark.distributed
def test_two_ranks_fit_the_head_of_one():
    one, two = _fit(0, 1), run_in_processes(_fit, 2)
    assert one["output.weight"].abs().max() > 0
    for rank in two:
        for name, weights in one.items():
            assert_close(rank[name], weights, SPLIT)


def test_it_reads_an_adapter_on_the_backbone_of_the_policy(tmp_path):
    """The adapter's states are those of the reward model alone."""
    base = tiny.save(tiny.policy(tiny.tokenizer()), tmp_path / "base")
    tiny.save_lora_reward_model(base, tmp_path / "rm", max_steps=4, learning_rate=1e-2)
    trainer = tiny.ppo_trainer(
        tmp_path / "ppo",
        model=base,
        rewards=None,
        peft=tiny.lora(),
        critic="reward",
        reward_adapter=str(tmp_path / "rm"),
        max_steps=8,
    )
    trainer.train()
    assert trainer.rollout.state_values.std() > 0
    alone = RewardModelScorer.from_pretrained(str(tmp_path / "rm"))
    texts = (["the fox\n\n", "world\n\n"], ["is red and", "x"])
    ours, theirs = (scorer.score_with_states(*texts)[1] for scorer in (trainer.scorers[0], alone))
    for actual, expected in zip(ours, theirs, strict=True):
        assert_close(actual, expected, MERGED)


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        (tiny.length_reward, "`critic: reward` reads the hidden states of a reward model"),
        ("other tokenizer", "`critic: reward` needs one tokenizer"),
    ],
)
def test_a_critic_without_states_to_read_is_refused(tmp_path, rewards, message):
    options = {"rewards": rewards}
    if rewards == "other tokenizer":
        other = tiny.tokenizer(vocab_size=300)
        options = {"rewards": tiny.reward_model(other), "reward_tok": other}
    with pytest.raises(ValueError, match=message):
        tiny.ppo_trainer(tmp_path, critic="reward", **options)


def test_a_scorer_stays_free_for_others(tmp_path):
    """It also judges, and it serves a second trainer."""
    tok = tiny.tokenizer()
    scorer = RewardModelScorer(tiny.reward_model(tok), tok)
    trainer = _trainer(tmp_path / "one", rewards=scorer, judges={"judge": scorer})
    tiny.rollout(trainer)
    assert scorer.take_states is None
    assert not trainer.rollout.has("critic_states")
    tiny.rollout(_trainer(tmp_path / "two", rewards=scorer, critic="policy"))


def test_it_reads_a_reward_model_that_is_an_adapter(tmp_path):
    tok = tiny.tokenizer()
    model = get_peft_model(tiny.reward_model(tok), LoraConfig(task_type="SEQ_CLS"))
    trainer = _trainer(tmp_path, rewards=model, max_steps=8)
    trainer.train()
    assert trainer.rollout.state_values.std() > 0


def test_tokens_without_a_state_of_their_own_are_counted(tmp_path):
    trainer = _trainer(tmp_path)
    tiny.rollout(trainer)
    (logged,) = trainer._metrics["train"]["val/critic_tokens"]
    assert 0.0 < logged <= 1.0
    constant = [torch.ones(4, 8), torch.tensor([[1.0], [2.0], [2.0]])]
    assert share_of_own_states(constant) == 1 / 5


def test_a_row_that_it_cannot_read_does_not_spoil_the_critic():
    critic = RewardCritic(tiny.ppo_config("unused", critic="reward"), 8, torch.device("cpu"))
    states = [torch.randn(4, 8) for _ in range(8)]
    states[3][1] = math.nan
    returns, mask = torch.randn(8, 3), torch.ones(8, 3)
    critic.fit(states, returns, mask)
    values = critic.values(states, 3)
    assert values.isfinite().all()
    assert values[0].std() > 0


@pytest.mark.parametrize(("weight", "mean", "std"), [(2.0, 1.0, 4.0), (-1.0, None, None)])
def test_answers_have_the_scale_of_the_returns(tmp_path, weight, mean, std):
    """With the statistics of the card, and without a card."""
    trainer = _trainer(tmp_path, reward_weights=[weight])
    if mean is not None:
        trainer.reward_normalizer.warm_start(weight * mean, abs(weight) * std)
    scores = torch.tensor([-3.0, 1.0, 5.0, 9.0])
    expected = (scores - (scores.mean() if mean is None else mean)) / (
        scores.std(correction=0) if std is None else std
    )
    assert_close(trainer._scale_of_returns(scores), math.copysign(1, weight) * expected, FP32)
    trainer.args, trainer.num_generations = with_changes(trainer.args, reward_norm=False), 2
    assert_close(trainer._scale_of_returns(scores), weight * torch.tensor([-4.0, 4.0, -4.0, 4.0]), FP32)


@pytest.mark.parametrize(
    "build",
    [
        lambda policy: attach_value_head(policy, "", head_size=4, activation="silu", seed=3),
        lambda policy: build_base_model(tiny.tokenizer(), seed=3),
        lambda policy: RewardCritic(tiny.ppo_config("out", value_head_learning_rate=0.1), 8, torch.device("cpu")),
    ],
    ids=["value head", "base model", "reward critic"],
)
def test_new_weights_leave_the_random_numbers_of_the_gpus_alone(monkeypatch, build):
    policy, state, touched = tiny.policy(tiny.tokenizer()), torch.get_rng_state(), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", touched.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: touched.append("all devices") or 0)
    build(policy)
    assert torch.equal(torch.get_rng_state(), state)
    assert not touched

"""The critic with a LoRA of its own on the policy's backbone: what it reads and learns, and what it leaves alone."""

import random
from collections import Counter
from types import FunctionType

import pytest
import tiny
import torch
from accelerate.utils import DistributedType
from peft import IA3Config, LoraConfig, get_peft_model
from processes import run_in_processes
from safetensors.torch import load_file
from tolerances import EXACT, FIRST_UPDATE, FP32, SPLIT, assert_close
from torch.nn.functional import pad
from trl.trainer.utils import use_adapter

from rlhf_recipes.algorithm.advantages import explained_variance
from rlhf_recipes.models.adapters import adapter_weights
from rlhf_recipes.models.critic import VALUE_HEAD_FILE, causal_lm
from rlhf_recipes.models.fingerprint import weights_fingerprint
from rlhf_recipes.models.forward import add_completion_forward
from rlhf_recipes.rewards.adapter import REWARD_ADAPTER
from rlhf_recipes.rewards.scorer import RewardModelScorer
from rlhf_recipes.tracking.logged_model import model_files
from rlhf_recipes.trainers.adapter_critic import (
    CRITIC_ADAPTER,
    AdapterCritic,
    TokenRow,
    check_adapter_critic,
    check_weights_are_whole,
)

pytestmark = [pytest.mark.tiny, pytest.mark.portable]

FILE = "critic/adapter.safetensors"


def _trainer(directory, **kwargs):
    options = {"peft": tiny.lora(), "value_head_learning_rate": 1e-2, "critic_epochs": 1, **kwargs}
    return tiny.ppo_trainer(directory, critic="adapter", **options)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Return the arguments of a run whose reward model is an adapter on the policy's base."""
    directory = tmp_path_factory.mktemp("parts")
    base = tiny.save(tiny.policy(tiny.tokenizer()), directory / "base")
    tiny.save_lora_reward_model(base, directory / "rm", max_steps=4, learning_rate=1e-2)
    return {"model": base, "rewards": None, "reward_adapter": str(directory / "rm")}


def _critic(seed=0, **kwargs):
    """Return a critic on a policy without a trainer, and seven rows with targets that the tokens before tell."""
    policy = get_peft_model(tiny.policy(tiny.tokenizer()), LoraConfig(r=4, target_modules="all-linear"))
    add_completion_forward(causal_lm(policy), temperature=1.0)
    if kwargs.get("gradient_checkpointing"):
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    options = {"value_head_learning_rate": 1e-2, "critic_epochs": 2, "per_device_train_batch_size": 2, **kwargs}
    args = tiny.ppo_config("unused", critic="adapter", **options)
    return AdapterCritic(args, policy, tiny.tokenizer(), torch.device("cpu")), *_rows(seed, 7)


def _rows(seed, count):
    """Return rows, targets and mask. A target is 1 from the first token 9 of a completion on, and -1 before."""
    draw = random.Random(seed)
    rows, targets = [], []
    for _ in range(count):
        prompt = [draw.randrange(4, 40) for _ in range(draw.randrange(1, 5))]
        completion = [draw.choice((7, 8, 9)) for _ in range(draw.randrange(1, 7))]
        rows.append(TokenRow(prompt + completion, len(prompt)))
        targets.append(torch.tensor([1.0 if 9 in completion[:t] else -1.0 for t in range(len(completion))]))
    lengths = torch.tensor([len(target) for target in targets])
    return rows, torch.stack([pad(x, (0, 6 - len(x))) for x in targets]), torch.arange(6) < lengths[:, None]


def _state(critic):
    return {**critic.head.state_dict(), **{name: x.clone() for name, x in critic.adapter.items()}}


def test_values_are_those_of_the_adapter_by_itself():
    """Each prefix alone, through plain transformers: no value depends on padding or on later tokens."""
    critic, rows, returns, mask = _critic()
    for _ in range(2):
        critic.fit(rows, returns, mask)
    values, policy = critic.values(rows, 9), critic._policy
    assert values.shape == (7, 10)
    assert not values[0, len(rows[0]) :].any()
    with use_adapter(policy, CRITIC_ADAPTER), torch.no_grad():
        for row, of_row in zip(rows, values, strict=True):
            for t in range(len(row)):
                prefix = torch.tensor([row.ids[: row.start + t]])
                states = causal_lm(policy).model(input_ids=prefix).last_hidden_state
                assert_close(of_row[t], critic.head(states[0, -1:])[0], FP32)
    assert values.std() > 0


def test_it_learns_what_the_tokens_before_tell():
    critic, *_ = _critic()
    explained = []
    for seed in range(24):
        rows, returns, mask = _rows(seed, 32)
        explained.append(explained_variance(critic.values(rows, 6)[:, :-1], returns, mask).item())
        critic.fit(rows, returns, mask)
    assert explained[0] == 0.0  # the head starts at 0
    assert explained[-1] > 0.6


def test_its_gradient_reaches_its_own_weights_alone():
    critic, rows, returns, mask = _critic()
    policy, before = critic._policy, {name: x.clone() for name, x in critic._policy.named_parameters()}
    seen = Counter()
    for name, weight in policy.named_parameters():
        weight.requires_grad_(True) if ".default." in name else None
        weight.register_hook(lambda _, name=name: seen.update([name])) if weight.requires_grad else None
    critic.fit(rows, returns, mask)
    assert not seen
    own = {id(weight) for weight in critic.adapter.values()}
    for name, weight in policy.named_parameters():
        assert torch.equal(weight, before[name]) is (id(weight) not in own), name
        assert weight.grad is None, "it would count in the norm of the policy's gradient"
    assert {name for name, x in policy.named_parameters() if x.requires_grad} == {
        name for name in before if ".default." in name
    }


def test_checkpointed_activations_change_no_gradient():
    states = []
    for checkpointing in (False, True):
        critic, rows, returns, mask = _critic(gradient_checkpointing=checkpointing)
        forwards = Counter()
        critic._policy.get_base_model().model.layers[0].self_attn.register_forward_hook(
            lambda *_, forwards=forwards: forwards.update(["layer"])
        )
        for _ in range(2):
            critic.fit(rows, returns, mask)
        assert forwards["layer"] == 2 * 2 * 4 * (2 if checkpointing else 1)
        states.append(_state(critic))
    for name, weight in states[0].items():
        assert_close(states[1][name], weight, EXACT)


def test_a_row_without_a_finite_return_does_not_train():
    critic, rows, returns, mask = _critic()
    other = AdapterCritic.__new__(AdapterCritic)
    vars(other).update(vars(_critic()[0]))
    returns[3] = torch.nan
    critic.fit(rows, returns, mask)
    other.fit(rows, torch.zeros_like(returns).where(returns.isnan(), returns), mask & ~returns.isnan())
    for name, weight in _state(critic).items():
        assert_close(_state(other)[name], weight, EXACT)


def test_policy_reference_and_reward_model_are_those_without_it(tmp_path, shared):
    trainer = _trainer(tmp_path / "with", **shared)
    without = tiny.ppo_trainer(tmp_path / "without", peft=tiny.lora(), **shared)
    reward = {name: x.clone() for name, x in adapter_weights(trainer.model, REWARD_ADAPTER).items()}

    # It starts from the reward adapter, with weights of its own on the one base.
    assert all("lora_" in name for name in reward)
    for name, weight in trainer.critic.adapter.items():
        assert torch.equal(weight, reward[name])
    assert any(weight.abs().max() > 0 for name, weight in reward.items() if "lora_B" in name)
    weights = dict(trainer.model.named_parameters())
    assert len({weight.data_ptr() for weight in weights.values()}) == len(weights)
    base = sum(weight.numel() for name, weight in weights.items() if "lora_" not in name)
    assert base == sum(weight.numel() for weight in tiny.policy(tiny.tokenizer()).parameters())

    for _ in range(2):  # each fits the critic
        batch = tiny.rollout(trainer)
    assert any(not torch.equal(weight, reward[name]) for name, weight in trainer.critic.adapter.items())
    assert trainer.rollout.state_values.std() > 0
    prompts, answers = ["the fox\n\n", "world\n\n"], ["is red", "x"]
    for ours, theirs in (
        (tiny.logps(trainer, batch), tiny.logps(without, batch)),
        (trainer._reference_logps(batch), without._reference_logps(batch)),
        (*(torch.tensor(x.scorers[0](prompts, answers)) for x in (trainer, without)),),
    ):
        assert_close(ours, theirs, EXACT)
    for name, weight in adapter_weights(trainer.model, REWARD_ADAPTER).items():
        assert torch.equal(weight, reward[name])
        assert not weight.requires_grad


def test_its_weights_are_not_the_policys_and_start_a_later_run(tmp_path):
    base = tiny.save(tiny.policy(tiny.tokenizer()), tmp_path / "base")
    trainer = _trainer(tmp_path / "first", model=base, max_steps=4, save_strategy="steps", save_steps=4)
    assert all(not weight.any() for name, weight in trainer.critic.adapter.items() if "lora_B" in name)
    assert not any(weight.requires_grad for weight in trainer.critic.adapter.values())
    batch = tiny.rollout(trainer)
    trainer.current_gradient_accumulation_steps = 1
    log_ratio = (tiny.logps(trainer, batch) - batch["old_per_token_logps"]) * batch["completion_mask"]
    assert_close(log_ratio, torch.zeros_like(log_ratio), FIRST_UPDATE)
    (kl,) = trainer._metrics["train"]["objective/kl"]
    assert_close(kl, 0.0, EXACT)
    trainer._compute_loss(trainer.model, batch)
    assert "loss/value" not in trainer._metrics["train"]

    trainer.train()
    trained = {id(weight) for group in trainer.optimizer.param_groups for weight in group["params"]}
    assert trained
    assert not trained & {id(weight) for weight in trainer.critic.weights}
    trainer.save_model()
    saved = load_file(tmp_path / "first" / "adapter_model.safetensors")
    assert len(saved) == len(adapter_weights(trainer.model, "default"))
    assert not any("critic" in name or "value_head" in name for name in saved)
    assert not (tmp_path / "first" / VALUE_HEAD_FILE).exists()
    files = {str(path.relative_to(tmp_path / "first")) for path in (tmp_path / "first").rglob("*.safetensors")}
    assert files == {"adapter_model.safetensors", "checkpoint-4/adapter_model.safetensors", FILE}
    assert [path for path in (tmp_path / "first" / "checkpoint-4").iterdir() if path.is_dir()] == []
    assert tmp_path / "first" / FILE in model_files(tmp_path / "first")
    fingerprint = weights_fingerprint(tmp_path / "first")

    again = _trainer(tmp_path / "second", model=str(tmp_path / "first"), peft=None)
    for name, weight in _state(trainer.critic).items():
        assert_close(_state(again.critic)[name], weight, EXACT)
    with pytest.raises(ValueError, match=f"{FILE} has a critic of another shape. Set `value_head_size`"):
        _trainer(tmp_path / "third", model=str(tmp_path / "first"), peft=None, value_head_size=5)
    (tmp_path / "first" / FILE).unlink()
    assert weights_fingerprint(tmp_path / "first") == fingerprint


def test_a_critic_of_another_function_of_the_same_name_is_not_used(tmp_path, caplog):
    base = tiny.save(tiny.policy(tiny.tokenizer()), tmp_path / "base")
    _trainer(tmp_path / "first", model=base, rewards=_count).save_model()

    def later(reward):
        options = {"model": str(tmp_path / "first"), "peft": None, "critic_dataset": tiny.preferences(count=4)}
        return _trainer(tmp_path / "second", rewards=reward, **options)._starts_with_critic

    other = tiny.length_reward
    same_name = FunctionType(_count.__code__, globals(), "_count")
    same_name.__module__ = "elsewhere"
    assert later(_count)
    assert not later(other)
    assert not later(same_name)
    assert caplog.text.count(f"{FILE} is not used: its run had other rewards, or scaled them otherwise") == 2


def test_the_updates_of_the_policy_do_not_see_what_the_critic_learns(tmp_path):
    """Both critics have the same values: neither the optimiser nor the norm of the gradient may hold their weights."""
    weights, norms = [], []
    for learns in (True, False):
        trainer = _trainer(tmp_path / str(learns), max_steps=4, max_grad_norm=0.01, logging_steps=1)
        trainer.critic.values = lambda rows, length: torch.zeros(len(rows), length + 1)
        if not learns:
            trainer.critic.fit = lambda *args, **kwargs: None
        trainer.train()
        assert any(x.any() for x in trainer.critic.head.output.parameters()) is learns
        weights.append({name: x.clone() for name, x in adapter_weights(trainer.model, "default").items()})
        norms.append([log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log])
    assert len(norms[0]) == 4
    assert min(norms[0]) > 0.01
    assert norms[0] == norms[1]
    for name, weight in weights[0].items():
        assert_close(weights[1][name], weight, EXACT)


def test_a_checkpoint_of_another_shape_is_refused():
    state = _critic()[0].state_dict()
    with pytest.raises(ValueError, match="The checkpoint has a critic of another shape"):
        _critic(value_head_size=5)[0].restore(state)
    name = next(iter(state["adapter"]))
    with pytest.raises(ValueError, match="The checkpoint has a critic of another shape"):
        _critic()[0].restore(state | {"adapter": {name: state["adapter"][name]}})
    _critic()[0].restore(state)


def test_it_reads_each_completion_once_and_trains_on_it_once_per_epoch(tmp_path):
    rows = {}
    for critic in ("policy", "adapter"):
        options = {"critic_epochs": 3} if critic == "adapter" else {}
        trainer = tiny.ppo_trainer(tmp_path / critic, peft=tiny.lora(), critic=critic, **options)
        seen = rows[critic] = Counter()
        backbone = trainer.model.get_base_model().base_model

        def count(module, args, kwargs, output, seen=seen):
            seen.update({torch.is_grad_enabled(): len(kwargs["input_ids"])})

        trainer._generate = _sampled(trainer)
        backbone.register_forward_hook(count, with_kwargs=True)
        tiny.rollout(trainer)
    completions = trainer.args.generation_batch_size
    assert rows["policy"] == {False: 2 * completions}  # policy and reference
    assert rows["adapter"] == {False: 3 * completions, True: 3 * completions}


def _sampled(trainer):
    """Return a method that samples and is not counted."""
    generate, backbone = trainer._generate, trainer.model.get_base_model().base_model

    def uncounted(*args, **kwargs):
        hooks = dict(backbone._forward_hooks)
        backbone._forward_hooks.clear()
        try:
            return generate(*args, **kwargs)
        finally:
            backbone._forward_hooks.update(hooks)

    return uncounted


def test_it_is_fitted_before_the_first_rollout_if_it_gets_answers(tmp_path):
    """The reward model may have another tokenizer: the critic reads the tokens of the policy."""
    other = tiny.tokenizer(vocab_size=300)
    trainer = _trainer(
        tmp_path, rewards=tiny.reward_model(other), reward_tok=other, critic_dataset=tiny.preferences(count=12)
    )
    trainer.restore_progress()  # as at the start of a run
    pairs = trainer.critic_dataset
    scores, rows = trainer.critic.read_answers(trainer.scorers[0], pairs["prompt"], pairs["chosen"])
    assert_close(scores, trainer.scorers[0](pairs["prompt"], pairs["chosen"]), EXACT)
    tok = trainer.processing_class
    assert tok.decode(rows[0].ids) == pairs["prompt"][0] + pairs["chosen"][0] + tok.eos_token
    assert tok.decode(rows[0].ids[: rows[0].start]) == pairs["prompt"][0]
    tiny.rollout(trainer)
    assert trainer.rollout.state_values.std() > 0


@pytest.mark.parametrize(
    ("peft", "sees_images", "message"),
    [
        (None, False, "needs a policy that is a LoRA too: .* Set `use_peft: true`"),
        (LoraConfig(bias="all"), False, "a LoRA with `bias: none`"),
        (IA3Config(), False, "a LoRA with `bias: none`"),
        (LoraConfig(), True, "this policy sees images"),
    ],
)
def test_a_policy_whose_backbone_it_cannot_share_is_refused(peft, sees_images, message):
    with pytest.raises(ValueError, match=f"`critic: adapter` .*{message}"):
        check_adapter_critic(tiny.policy(tiny.tokenizer()), peft, sees_images=sees_images)
    check_adapter_critic(None, LoraConfig(), sees_images=False)


def test_a_policy_of_full_weights_is_refused_before_anything_else_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="`critic: adapter` needs a policy that is a LoRA"):
        _trainer(tmp_path, peft=None, rewards="no/such/reward/model")


@pytest.mark.parametrize("kind", DistributedType)
def test_weights_in_shards_or_in_16_bits_are_refused(kind):
    if kind in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        with pytest.raises(ValueError, match="`critic: adapter` needs whole weights in float32"):
            check_weights_are_whole(kind)
    else:
        check_weights_are_whole(kind)


# Two ranks.


def _pretrain(rank, world_size):
    """Return the weights after a fit to 5 pairs of answers, and the rows that the backbone has read with gradient."""
    critic, tok, read = _critic()[0], tiny.tokenizer(), Counter()
    critic._policy.get_base_model().model.register_forward_hook(
        lambda _, args, kwargs, output: read.update({torch.is_grad_enabled(): len(kwargs["input_ids"])}),
        with_kwargs=True,
    )
    scorer = RewardModelScorer(tiny.reward_model(tok), tok)
    critic.pretrain(scorer, tiny.preferences(count=5), lambda scores: scores, rank=rank, ranks=world_size)
    return _state(critic), read[True]


@pytest.mark.distributed
def test_two_ranks_share_the_answers_to_which_it_is_fitted_first():
    (one, rows), two = _pretrain(0, 1), run_in_processes(_pretrain, 2)
    assert rows == AdapterCritic.pretraining_epochs * 10
    assert [rows for _, rows in two] == [AdapterCritic.pretraining_epochs * 5] * 2
    assert one["output.weight"].abs().max() > 100 * SPLIT["atol"]
    for state, _ in two:
        for name, weight in one.items():
            assert_close(state[name], weight, SPLIT)


def _completion(prompt_ids):
    """Return the completion that every rank samples from this prompt: of any length, ended or cut."""
    draw = random.Random(sum(prompt_ids))
    return [draw.randrange(60, 200) for _ in range(draw.randrange(1, 9))] + [1] * draw.randrange(2)


def _count(completion_ids, **kwargs):
    return [float(sum(ids) % 7) for ids in completion_ids]


def _count_by_token(completion_ids, **kwargs):
    """Return the same scores, and now and then in parts."""
    scores = _count(completion_ids)
    parts = [[score / len(ids)] * len(ids) for score, ids in zip(scores, completion_ids, strict=True)]
    return [score if score > 5 else part for score, part in zip(scores, parts, strict=True)]


def _run(directory, world_size, shared, resume=None, **kwargs):
    data = tiny.prompts(count=24).map(lambda row, i: {"prompt": f"{row['prompt']} {i}"}, with_indices=True)
    options = {"per_device_train_batch_size": 6 // world_size, "steps_per_generation": 1, "max_steps": 4, **kwargs}
    trainer = _trainer(directory, **{**shared, "rewards": _count_by_token}, data=data, kl_estimator="full", **options)
    trainer._generate_single_turn = lambda prompt_ids, *args, **kwargs: ([_completion(p) for p in prompt_ids], None)
    trainer.train(resume_from_checkpoint=resume)
    own = {name: x.detach().clone() for name, x in adapter_weights(trainer.model, "default").items()}
    return {"policy": own, "critic": _state(trainer.critic)}


def _train(rank, world_size, directory, shared):
    """Train, and resume at the second rollout. Three rows of a rank are dealt to four mini-batches."""
    directory = f"{directory}/{world_size}"
    whole = _run(directory, world_size, shared, save_strategy="steps", save_steps=2)
    return whole, _run(f"{directory}-resumed", world_size, shared, resume=f"{directory}/checkpoint-2")


@pytest.mark.distributed
def test_two_ranks_train_policy_and_critic_of_one(tmp_path, shared):
    """With a reward adapter, rewards of tokens and the full KL: all roles share one backbone.

    A resume is bit-exact on both ranks, although one of them has written the critic.
    """
    one, two = _train(0, 1, str(tmp_path), shared), run_in_processes(_train, 2, str(tmp_path), shared)
    assert max(x.abs().max() for name, x in one[0]["critic"].items() if "lora_B" in name) > 100 * SPLIT["atol"]
    for whole, resumed in (one, *two):
        for part, weights in whole.items():
            for name, weight in weights.items():
                assert_close(resumed[part][name], weight, EXACT)
                assert_close(weight, one[0][part][name], SPLIT)
        if whole is not one[0]:
            for name, weight in two[0][0]["critic"].items():
                assert_close(whole["critic"][name], weight, EXACT)

"""PPO with rewards of steps and tokens: where they go, and that their sum is the score."""

import contextlib
from types import SimpleNamespace

import oracles
import pytest
import tiny
import torch
from tolerances import EXACT, FP32, FP64, SCORES, assert_close

from rlhf_recipes.algorithm.kl import full_kl
from rlhf_recipes.models.critic import causal_lm
from rlhf_recipes.rewards.attempts import RewardCallError
from rlhf_recipes.rewards.protocol import FunctionScorer
from rlhf_recipes.trainers.rollout import Rollout

pytestmark = pytest.mark.tiny


def _by_token(completion_ids, **kwargs):
    """Return a reward for each token."""
    return [[float(token % 5) - 1 for token in ids] for ids in completion_ids]


def _by_character(completions, **kwargs):
    """Return a step for every second character, and one for the rest."""
    ends = [[*range(2, len(text), 2), len(text)] for text in completions]
    return [[(end, float(end % 3)) for end in row] for row in ends]


def _sums(function):
    def total(**kwargs):
        return [sum(x[1] if isinstance(x, tuple) else x for x in row) for row in function(**kwargs)]

    return total


def _drifted(tmp_path, rewards, **options):
    trainer = tiny.ppo_trainer(tmp_path, rewards=rewards, **options)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "value_head.output" in name or "lm_head" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    torch.manual_seed(5)
    return trainer, tiny.rollout(trainer)


@pytest.mark.parametrize("function", [_by_token, _by_character])
def test_dense_rewards_enter_gae_and_their_sum_is_the_score(tmp_path, function):
    options = {"whiten_advantages": False, "lam": 0.7, "gamma": 0.9, "reward_weights": [2.0]}
    trainer, batch = _drifted(tmp_path, function, **options)
    rollout, normalizer = trainer.rollout, trainer.reward_normalizer
    texts = {"completions": rollout.completions, "completion_ids": rollout.completion_id_lists}
    assert_close(rollout.scores, [2 * x for x in _sums(function)(**texts)], FP32)
    assert_close(rollout.parts.sum(dim=1), rollout.scores, FP32)
    assert_close((rollout.rewards + 0.05 * rollout.k1).sum(dim=1), rollout.normalized_scores, FP32)
    mask = batch["completion_mask"].tolist()
    kl = rollout.k1.double().tolist()
    parts = (rollout.parts.double() / normalizer.std).clamp(-5, 5).tolist()
    parts = oracles.centered(parts, mask)
    rewards = oracles.dense_rewards(rollout.normalized_scores.double().tolist(), parts, kl, mask, 0.05)
    assert_close(rollout.rewards, rewards, FP32)
    values = batch["old_values"].double().tolist()
    assert_close(batch["advantages"], oracles.gae(rewards, values, mask, gamma=0.9, lam=0.7), FP32)
    nothing = [[0.0] * len(row) for row in mask]
    assert_close(rollout.mc_returns, oracles.gae(rewards, nothing, mask, gamma=0.9, lam=1.0), FP32)


@pytest.mark.parametrize("options", [{}, {"num_generations": 2}, {"missing_eos_penalty": 1.0}, {"reward_norm": False}])
def test_all_reward_on_the_last_step_is_the_score_bit_for_bit(tmp_path, options):
    def last_step(completions, **kwargs):
        return [[(len(text), float(len(text)))] for text in completions]

    def last_token(completions, completion_ids, **kwargs):
        pairs = zip(completions, completion_ids, strict=True)
        return [[0.0] * (len(ids) - 1) + [float(len(text))] for text, ids in pairs]

    trainer, expected = _drifted(tmp_path, tiny.length_reward, **options)
    assert not trainer.rollout.parts.any()
    for function in (last_step, last_token):
        trainer, batch = _drifted(tmp_path, function, **options)
        assert trainer.rollout.parts.any()
        for name in ("advantages", "returns", "old_values"):
            assert_close(batch[name], expected[name], EXACT)


def test_functions_may_mix_and_a_group_is_compared_by_the_sums(tmp_path):
    def sometimes(completion_ids, **kwargs):
        return [None if i == 1 else [1.0] * len(ids) if i % 2 else float(i) for i, ids in enumerate(completion_ids)]

    options = {"num_generations": 2, "reward_weights": [0.5, 2.0], "reward_norm": False, "whiten_advantages": False}
    trainer, _ = _drifted(tmp_path, [_by_token, sometimes], missing_eos_penalty=0.25, **options)
    rollout = trainer.rollout
    lengths = [len(ids) for ids in rollout.completion_id_lists]
    by_token = [sum(row) for row in _by_token(rollout.completion_id_lists)]
    others = [0.0 if i == 1 else lengths[i] if i % 2 else float(i) for i in range(len(lengths))]
    scores = [0.5 * first + 2 * second for first, second in zip(by_token, others, strict=True)]
    assert_close(rollout.scores, scores, FP32)
    dense = [0.5 * first + 2 * x * (i % 2) for i, (first, x) in enumerate(zip(by_token, others, strict=True))]
    assert_close(rollout.parts.sum(dim=1), dense, FP32)
    totals = rollout.scores - 0.25 * rollout.truncated
    assert_close((rollout.rewards + 0.05 * rollout.k1).sum(dim=1), totals, FP32)
    # The returns that the critic learns hold the baseline, which is on the last token.
    whole = rollout.mc_returns[:, 0] + 0.05 * rollout.k1.sum(dim=1)
    assert_close(whole, totals - totals.view(-1, 2).flip(1).flatten(), FP32)


def test_rewards_of_tool_tokens_go_to_the_token_that_called_the_tool(tmp_path, monkeypatch):
    trainer = tiny.ppo_trainer(tmp_path, rewards=_by_token)
    generate = tiny.PPOTrainer.__mro__[1]._generate

    def with_tool_mask(self, prompts):
        generated = list(generate(self, prompts))
        generated[2] = [[1, 0] * (len(ids) // 2) + [1] * (len(ids) % 2) for ids in generated[1]]
        return tuple(generated)

    monkeypatch.setattr(tiny.PPOTrainer, "_generate", with_tool_mask)
    tiny.rollout(trainer)
    rollout = trainer.rollout
    assert (rollout.parts[rollout.mask == 0] == 0).all()
    assert_close(rollout.parts.sum(dim=1), rollout.scores, FP32)
    assert_close((rollout.rewards + 0.05 * rollout.k1).sum(dim=1), rollout.normalized_scores, FP32)


def test_rewards_are_logged_by_quarter_and_in_the_table(tmp_path):
    trainer, _ = _drifted(tmp_path, _by_token)
    figures = [trainer._metrics["train"][f"objective/dense_rewards_q{i}"][0] for i in range(1, 5)]
    assert_close(sum(figures), trainer._metrics["train"]["objective/scores"][0], FP32)
    assert len(set(figures)) > 1
    row, ids = max(zip(trainer._samples, trainer.rollout.completion_id_lists, strict=True), key=lambda x: len(x[1]))
    shown = dict(entry.split(": ") for entry in row["dense_rewards"].split(", "))
    assert shown == {str(t): f"{token % 5 - 1}" for t, token in enumerate(ids) if token % 5 != 1}
    sparse, _ = _drifted(tmp_path, tiny.length_reward)
    assert not [name for name in sparse._metrics["train"] if "dense" in name]
    assert "dense_rewards" not in sparse._samples[0]


def test_chats_and_scorers_with_a_model_may_give_steps(tmp_path):
    class Steps(torch.nn.Module):
        pass

    class Scorer:
        __name__ = "steps"
        model, tokenizer, card, gives_states, origin = Steps(), None, None, False, ""
        position_limit, unknown_tokens = None, {}

        def __call__(self, prompts, completions, **kwargs):
            return _by_character([messages[0]["content"] for messages in completions])

        def identity(self):
            return "steps"

        def prepare(self, run):
            pass

        def scores_alone(self, *args):
            return None

    trainer, _ = _drifted(tmp_path, Scorer(), chat=True)
    assert trainer.reward_funcs[0].model is Scorer.model
    rollout = trainer.rollout
    assert (rollout.parts != 0).sum(dim=1).max() > 1
    assert_close(rollout.parts.sum(dim=1), rollout.scores, FP32)


@pytest.mark.parametrize("fault", ["end", "text"])
def test_a_scorer_with_a_model_may_fail_like_other_calls(tmp_path, fault):
    """A step beyond the text, and a text that the tokens do not spell."""

    class Faulty(FunctionScorer):
        def prepare(self, run):
            self.model = torch.nn.Linear(1, 1)

        def __call__(self, completions, **kwargs):
            if fault == "end":
                return [[(len(text) + 1, 1.0)] for text in completions]
            return [[(len(text), 1.0)] for text in completions]

    def trainer(**options):
        made = tiny.ppo_trainer(tmp_path, rewards=[Faulty(_by_token), tiny.length_reward], **options)
        if fault == "text":
            made.decoder = lambda: lambda ids: "other"
        return made

    masked = trainer(failed_rewards="mask")
    tiny.rollout(masked)
    rollout = masked.rollout
    assert_close(rollout.scores, tiny.length_reward(rollout.completions), EXACT)
    assert not rollout.parts.any()
    assert rollout.mask.any(dim=1).all()
    assert masked._metrics["train"]["rewards/_by_token/failed_calls"] == [1.0]
    reason = "its tokens do not spell its text" if fault == "text" else "characters"
    with pytest.raises(RewardCallError, match=f"`_by_token` failed at the first attempt: .*{reason}"):
        tiny.rollout(trainer())


@pytest.mark.parametrize("peft", [None, tiny.lora()], ids=["frozen copy", "lora"])
def test_the_full_kl_is_that_of_plain_logits_and_runs_no_forward(tmp_path, peft, monkeypatch):
    monkeypatch.setattr("rlhf_recipes.models.full_kl.CHUNK_LOGITS", 320 * 7)  # chunks of 7 tokens
    forwards = []
    for estimator in ("k1", "full"):
        trainer = tiny.ppo_trainer(tmp_path, peft=peft, kl_estimator=estimator, temperature=0.7)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name or (peft is None and "q_proj" in name):
                torch.manual_seed(3)
                parameter.data.add_(torch.randn_like(parameter) * 0.2)
        calls = []
        causal_lm(trainer.model).model.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        torch.manual_seed(5)
        batch = tiny.rollout(trainer)
        forwards.append(len(calls))
    assert forwards[0] == forwards[1]
    rollout = trainer.rollout
    assert rollout.full_kl.sum() > 0.1
    without_adapter = trainer.model.disable_adapter() if peft else contextlib.nullcontext()
    both = [tiny.log_probs(trainer.model, batch, 0.7).tolist()]
    with without_adapter:
        both.append(tiny.log_probs(trainer.model if peft else trainer.ref_model, batch, 0.7).tolist())
    for row, width in enumerate(batch["completion_mask"].sum(1).tolist()):
        expected = [oracles.exact_kl(both[0][row][t], both[1][row][t]) for t in range(width)]
        assert_close(rollout.full_kl[row, :width], expected, SCORES)
    assert not hasattr(rollout, "reference_forward")
    metrics = trainer._metrics["train"]
    assert_close(metrics["objective/kl_full"][0], rollout.full_kl.sum(dim=1).mean(), FP32)
    assert metrics["objective/non_score_reward"][0] == pytest.approx(-0.05 * metrics["objective/kl_full"][0])


@pytest.mark.parametrize("peft", [None, tiny.lora()], ids=["frozen copy", "lora"])
def test_the_first_full_kl_is_exactly_zero(tmp_path, peft):
    trainer = tiny.ppo_trainer(tmp_path, peft=peft, kl_estimator="full")
    tiny.rollout(trainer)
    assert not trainer.rollout.full_kl.any()
    assert trainer._metrics["train"]["objective/kl_full"] == [0.0]


def test_a_head_that_scales_its_logits_is_refused(tmp_path):
    trainer = tiny.ppo_trainer(tmp_path, kl_estimator="full", cast_lm_head_to_fp32=False)
    scale = {2: 0.5, 3: 1.0}  # of the states of tokens, and of whole rows
    trainer.model.lm_head.register_forward_hook(lambda module, given, output: output * scale[given[0].dim()])
    with pytest.raises(ValueError, match=r"`kl_estimator: full` does not fit this model: .* Set `kl_estimator: k1`"):
        tiny.rollout(trainer)


def test_the_rounding_of_logits_in_bfloat16_is_no_scale(tmp_path):
    """The states are in float32, and another kernel may round the logits of a product otherwise."""
    trainer = tiny.ppo_trainer(tmp_path, kl_estimator="full", bf16=True)
    dtypes = set()

    def one_bit_more(module, given, output):
        if given[0].dim() > 2:  # states of whole rows: an answer is sampled
            return output
        dtypes.add((given[0].dtype, output.dtype))
        return output * (1 + 2**-7)

    trainer.model.lm_head.register_forward_hook(one_bit_more)
    tiny.rollout(trainer)
    assert dtypes == {(torch.float32, torch.bfloat16)}


@pytest.mark.parametrize("options", [{"beta": 0.1}, {"cast_lm_head_to_fp32": True}])
def test_options_that_the_full_kl_cannot_have_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match="`kl_estimator: full` needs `beta: 0` and `cast_lm_head_to_fp32: false`"):
        tiny.ppo_config(tmp_path, kl_estimator="full", **options)


def test_the_gradient_with_the_full_kl_is_that_of_the_kl_of_sequences():
    """All sequences of two tokens, each with its probability. A reward of the full KL alone lacks the first term."""
    torch.manual_seed(0)
    first, second = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3,), (3, 3)))
    ref_first, ref_second = (torch.randn(*shape, dtype=torch.float64).log_softmax(-1) for shape in ((3,), (3, 3)))
    logp_first, logp_second = first.log_softmax(-1), second.log_softmax(-1)
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    logps = torch.stack([logp_first[pairs[:, 0]], logp_second[pairs[:, 0], pairs[:, 1]]], dim=1)
    ref_logps = torch.stack([ref_first[pairs[:, 0]], ref_second[pairs[:, 0], pairs[:, 1]]], dim=1)
    probabilities = logps.sum(dim=1).exp()

    rollout = Rollout([])
    rollout.completion_mask = rollout.mask = torch.ones(9, 2, dtype=torch.long)
    rollout.truncated = torch.zeros(9, dtype=torch.bool)
    rollout.old_per_token_logps, rollout.ref_per_token_logps = logps.detach(), ref_logps
    rollout.k1 = logps.detach() - ref_logps
    rollout.full_kl = torch.stack(
        [full_kl(logp_first, ref_first).expand(9), full_kl(logp_second, ref_second)[pairs[:, 0]]], dim=1
    ).detach()
    rollout.state_values = torch.zeros(9, 3, dtype=torch.float64)
    rollout.normalized_scores, rollout.normalized_parts = torch.zeros(9, dtype=torch.float64), torch.zeros(9, 2)
    args = SimpleNamespace(
        kl_estimator="full", missing_eos_penalty=None, group_baseline=False, truncated_completions="terminal",
        gamma=1.0, lam=1.0, value_lam=None, whiten_advantages=False,
    )  # fmt: skip
    rollout.estimate_advantages(args, kl_coef=1.0, group_size=1)

    gain = (probabilities.detach() * (logps * rollout.advantages).sum(dim=1)).sum()
    kl = (probabilities * (logps - ref_logps).sum(dim=1)).sum()
    assert kl.item() == pytest.approx(
        oracles.exact_sequence_kl(logp_first.tolist(), ref_first.tolist(), logp_second.tolist(), ref_second.tolist())
    )
    expected = torch.autograd.grad(-kl, (first, second), retain_graph=True)
    for actual, gradient in zip(torch.autograd.grad(gain, (first, second)), expected, strict=True):
        assert_close(actual, gradient, FP64)

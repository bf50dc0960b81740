"""A forward gets no needless padding, and its results are those of the whole padded batch."""

import oracles
import pytest
import tiny
import torch
from tolerances import FIRST_UPDATE, FP32, SPLIT, assert_close
from transformers import GPT2Config, GPT2LMHeadModel
from trl import GRPOTrainer
from trl.trainer.utils import _ChunkedLogProbFunction

from rlhf_recipes.algorithm.micro_batches import computed_tokens
from rlhf_recipes.models.forward import CompletionForward, keeps_logits, needed_columns, rows_without_gradient
from rlhf_recipes.trainers.update import group_by_length

pytestmark = [pytest.mark.tiny, pytest.mark.portable]

PROMPTS, COMPLETIONS = (3, 1, 2, 3), (2, 4, 1, 4)


def _batch(prompts, completions, *, prompt_width, completion_width):
    """Return rows of these lengths. Prompts are padded on the left, completions on the right."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(60, 200, (len(prompts), prompt_width + completion_width), generator=generator)
    columns = torch.arange(prompt_width + completion_width)
    first = prompt_width - torch.tensor(prompts)[:, None]
    end = prompt_width + torch.tensor(completions)[:, None]
    mask = ((columns >= first) & (columns < end)).long()
    return (ids * mask).to(tiny.DEVICE), mask.to(tiny.DEVICE)


def _widths(model):
    """Return a list that gets the shape of each input of the backbone."""
    seen = []
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    return seen


def test_columns_without_a_token_do_not_reach_the_model(tmp_path):
    trainer = tiny.ppo_trainer(tmp_path)
    seen = _widths(trainer.model)
    ids, mask = _batch(PROMPTS, COMPLETIONS, prompt_width=20, completion_width=30)
    trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 30)
    assert seen == [(4, max(PROMPTS) + max(COMPLETIONS))]


def test_the_rollout_runs_rows_of_one_length_together(tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf_recipes.models.forward.ROWS_WITHOUT_GRADIENT", 1)
    trainer = tiny.ppo_trainer(tmp_path)
    torch.nn.init.normal_(trainer.model.value_head.output.weight)
    seen = _widths(trainer.model)
    ids, mask = _batch((1, 9, 9, 1), (2, 20, 20, 2), prompt_width=20, completion_width=30)
    grouped, together = (trainer._completion_forward(trainer.model, 30) for _ in range(2))
    trainer._get_per_token_logps_and_entropies(grouped, ids, mask, 30, batch_size=2)
    assert seen == [(2, 3), (2, 29)]
    trainer._get_per_token_logps_and_entropies(together, ids, mask, 30)
    assert_close(grouped.per_token_logps, together.per_token_logps, FIRST_UPDATE)
    keep = torch.cat([mask[:, -31:-30], mask[:, -30:]], dim=1)
    assert_close(grouped.state_values * keep, together.state_values * keep, {"cpu": FP32, "cuda": SPLIT}[tiny.DEVICE])


@pytest.mark.parametrize("multiple", [None, 8])
def test_padding_to_a_multiple_is_kept(multiple):
    forward = CompletionForward(None, 30, pad_to_multiple_of=multiple, takes_positions=False)

    def needed(prompts, completions):
        _, mask = _batch(prompts, completions, prompt_width=20, completion_width=30)
        return forward.columns_of(mask).amax(dim=0).tolist()

    assert needed((3, 2), (9, 4)) == ([3, 9] if multiple is None else [8, 16])
    assert needed((19, 2), (30, 4)) == ([19, 30] if multiple is None else [20, 30]), "no more than there are"
    assert needed((3, 2), (0, 0)) == ([3, 1] if multiple is None else [8, 8])


def test_a_mask_without_a_column_needs_none():
    assert needed_columns(torch.ones(2, 3), torch.ones(2, 0), 8).tolist() == [[3, 0], [3, 0]]


def test_a_gpu_gets_more_rows_where_nothing_is_kept_for_a_gradient():
    assert [rows_without_gradient(3, torch.device(name)) for name in ("cpu", "cuda")] == [3, 12]


@pytest.mark.parametrize("kept", [0, 2**26], ids=["TRL's head", "own head"])
def test_a_batch_in_parts_has_entropies_if_they_are_asked_for(tmp_path, monkeypatch, kept):
    monkeypatch.setattr("rlhf_recipes.models.forward.KEPT_LOGITS", kept)
    trainer = tiny.ppo_trainer(tmp_path)
    ids, mask = _batch(PROMPTS, COMPLETIONS, prompt_width=20, completion_width=30)
    keep, found = mask[:, -30:], []
    for batch_size in (2, None):
        call = (trainer.model, ids, mask, 30, batch_size)
        found.append(trainer._get_per_token_logps_and_entropies(*call, compute_entropy=True)[:2])
    for in_parts, together in zip(*found, strict=True):
        assert_close(in_parts * keep, together * keep, FIRST_UPDATE)


def _untrimmed(trainer, ids, mask, length):
    """Return TRL's own log-probabilities and entropies, and the values of its last hidden states."""
    states = []
    hook = trainer.model.model.register_forward_hook(lambda module, inputs, output: states.append(output[0]))
    logps, entropies, _ = GRPOTrainer._get_per_token_logps_and_entropies(
        trainer, trainer.model, ids, mask, length, compute_entropy=True
    )
    hook.remove()
    return logps, entropies, trainer.model.value_head(states[0][:, -length - 1 :].detach())


def test_log_probabilities_entropies_values_and_gradients_are_those_of_the_padded_batch(tmp_path):
    trainer = tiny.ppo_trainer(tmp_path)
    torch.nn.init.normal_(trainer.model.value_head.output.weight)
    ids, mask = _batch(PROMPTS, COMPLETIONS, prompt_width=20, completion_width=30)
    keep = mask[:, -30:]
    weights = torch.rand_like(keep, dtype=torch.float32) * keep

    def gradients(logps, entropies, values):
        trainer.model.zero_grad()
        ((logps + entropies + values[:, :-1]) * weights).sum().backward()
        return {name: p.grad.clone() for name, p in trainer.model.named_parameters()}

    padded = _untrimmed(trainer, ids, mask, 30)
    forward = trainer._completion_forward(trainer.model, 30)
    logps, entropies, _ = trainer._get_per_token_logps_and_entropies(forward, ids, mask, 30, compute_entropy=True)
    trimmed = (logps, entropies, forward.state_values)
    for ours, theirs in zip(trimmed, padded, strict=True):
        assert ours.shape == theirs.shape
        assert_close(ours[:, :30] * keep, theirs[:, :30] * keep, FP32)
    expected = gradients(*padded)
    for name, gradient in gradients(*trimmed).items():
        assert_close(gradient, expected[name], SPLIT)


@pytest.mark.parametrize("kept", [0, 2**26], ids=["TRL's head", "own head"])
def test_only_the_completion_is_projected_to_the_vocabulary(tmp_path, monkeypatch, kept):
    trainer = tiny.ppo_trainer(tmp_path)
    positions = []

    class Counted(_ChunkedLogProbFunction):
        @staticmethod
        def forward(ctx, hidden_states, *args):
            positions.append(len(hidden_states))
            return _ChunkedLogProbFunction.forward(ctx, hidden_states, *args)

    monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction", Counted)
    monkeypatch.setattr("rlhf_recipes.models.forward.KEPT_LOGITS", kept)
    ids, mask = _batch(PROMPTS, COMPLETIONS, prompt_width=20, completion_width=30)
    for model in (trainer.model, trainer.ref_model):
        if kept:
            model.lm_head.register_forward_hook(lambda head, inputs, out: positions.append(inputs[0][..., 0].numel()))
        trainer._get_per_token_logps_and_entropies(model, ids, mask, 30)
    without_triton = len(PROMPTS) * max(COMPLETIONS)  # with it, TRL leaves the padding out
    assert positions == [{"cpu": without_triton, "cuda": sum(COMPLETIONS)}[tiny.DEVICE]] * 2


def _entropies_asked_for(trainer):
    """Return a list that gets for each forward of the policy whether it has a gradient, and whether entropies."""
    asked, forward = [], trainer.model.forward

    def recorded(*args, **kwargs):
        output = forward(*args, **kwargs)
        if kwargs.get("completion_length"):
            asked.append((torch.is_grad_enabled(), output.entropy is not None))
        return output

    trainer.model.forward = recorded
    return asked


def test_a_rollout_computes_no_entropies(tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf_recipes.models.forward.ROWS_WITHOUT_GRADIENT", 1)
    monkeypatch.setattr("rlhf_recipes.models.forward.is_triton_available", lambda: False)  # TRL's head always does
    trainer = tiny.ppo_trainer(tmp_path, num_iterations=1, max_steps=1, gradient_accumulation_steps=2)
    asked = _entropies_asked_for(trainer)
    trainer.train()
    assert asked == [(False, False)] * 2 + [(True, True)] * 2
    assert tiny.logged(trainer, "entropy")[1] > 1


def test_large_logits_are_not_kept(tmp_path, monkeypatch):
    trainer = tiny.ppo_trainer(tmp_path)
    labels = torch.zeros(2, 3, dtype=torch.long)
    monkeypatch.setattr("rlhf_recipes.models.forward.KEPT_LOGITS", 6 * len(trainer.processing_class))
    assert keeps_logits(trainer.model, labels)
    assert not keeps_logits(trainer.model, labels.repeat(2, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not keeps_logits(trainer.model, labels)
    monkeypatch.setattr("rlhf_recipes.models.forward.is_triton_available", lambda: True)
    assert keeps_logits(trainer.model, labels), "TRL uses Triton on a GPU only"
    assert not keeps_logits(trainer.model.bfloat16(), labels)


def test_a_model_of_absolute_positions_does_not_depend_on_the_batch(tmp_path):
    tok = tiny.tokenizer()
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tok), n_positions=128, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
    )
    trainer = tiny.ppo_trainer(tmp_path, model=model, tok=tok)
    ids, mask = _batch(PROMPTS, COMPLETIONS, prompt_width=20, completion_width=30)
    logps, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 30)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        tokens = ids[row : row + 1, 20 - prompt : 20 + completion]
        expected = trainer.model(input_ids=tokens).logits[:, :-1].log_softmax(-1)
        expected = expected.gather(-1, tokens[:, 1:, None])[0, -completion:, 0]
        assert_close(logps[row, :completion], expected, FP32)


def test_a_batch_in_which_nothing_counts_still_has_a_gradient(tmp_path):
    trainer = tiny.ppo_trainer(tmp_path)
    ids, mask = _batch((3, 2), (0, 0), prompt_width=5, completion_width=4)
    logps, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 4)
    assert logps.shape == (2, 4)
    logps.sum().backward()
    assert trainer.model.lm_head.weight.grad.abs().sum() == 0


def _grouped_trainer(tmp_path, **kwargs):
    """Return a trainer with four micro-batches of two rows per rollout, and two of them per optimiser step."""
    return tiny.ppo_trainer(
        tmp_path,
        per_device_train_batch_size=2,
        steps_per_generation=4,
        gradient_accumulation_steps=2,
        vf_coef=0.5,
        **kwargs,
    )


def test_rows_of_one_step_are_grouped_by_length(tmp_path, monkeypatch):
    cut = []

    def recorded(micro_batches, *args):
        cut.append((micro_batches, group_by_length(micro_batches, *args)))
        return cut[-1][1]

    monkeypatch.setattr("rlhf_recipes.trainers.ppo.group_by_length", recorded)
    trainer = _grouped_trainer(tmp_path)
    trainer.train()
    assert len(cut) == 1, "once per rollout, for two steps in each of two epochs"
    before, after = cut[0]
    for step in (slice(0, 2), slice(2, 4)):
        rows = [
            sorted(
                tuple(batch[name][row].tolist() for name in ("completion_ids", "advantages", "returns"))
                for batch in batches[step]
                for row in range(len(batch["advantages"]))
            )
            for batches in (before, after)
        ]
        assert rows[0] == rows[1], "a step keeps its rows, and a row its tensors"
        lengths = [torch.stack([b[f"{p}_mask"].sum(1) for p in ("prompt", "completion")], 1) for b in after[step]]
        assert [b["columns"] for b in after[step]] == [tuple(x.amax(dim=0).tolist()) for x in lengths]
        assert [b["row_share"] for b in after[step]] == [len(x) / 2 for x in lengths]
        assert sum(map(computed_tokens, lengths)) == oracles.least_tokens(torch.cat(lengths).tolist(), 2)
    assert [b["completion_ids"].tolist() for b in before] != [b["completion_ids"].tolist() for b in after]


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_the_grouping_changes_no_weight(tmp_path, monkeypatch, loss_type):
    grouped = _grouped_trainer(tmp_path / "grouped", loss_type=loss_type)
    grouped.train()
    monkeypatch.setattr("rlhf_recipes.trainers.ppo.group_by_length", lambda micro_batches, *args: micro_batches)
    plain = _grouped_trainer(tmp_path / "plain", loss_type=loss_type)
    plain.train()
    start = tiny.policy(tiny.tokenizer()).lm_head.weight.to(tiny.DEVICE)
    assert (plain.model.lm_head.weight - start).abs().max() > 1e-3
    for name, parameter in plain.model.named_parameters():
        assert_close(grouped.model.get_parameter(name), parameter, SPLIT)


@pytest.mark.parametrize(
    "options", [{"entropy_coef": 0.1}, {"top_entropy_quantile": 0.5}], ids=lambda o: next(iter(o))
)
def test_terms_that_depend_on_the_cut_keep_it(tmp_path, monkeypatch, options):
    monkeypatch.setattr("rlhf_recipes.trainers.ppo.group_by_length", lambda *args: pytest.fail("regrouped"))
    _grouped_trainer(tmp_path, **options).train()


def test_a_compiled_policy_gets_one_number_of_rows(tmp_path):
    assert tiny.ppo_trainer(tmp_path / "eager")._may_regroup
    assert not tiny.ppo_trainer(tmp_path / "compiled", torch_compile=True)._may_regroup


def test_figures_are_means_over_the_tokens_of_a_rollout(tmp_path):
    """The cut of the rows does not count. With one step per epoch, both runs log the same rollout twice."""
    logs = []
    for batch_size in (2, 8):
        trainer = tiny.ppo_trainer(
            tmp_path / str(batch_size),
            per_device_train_batch_size=batch_size,
            steps_per_generation=8 // batch_size,
            gradient_accumulation_steps=8 // batch_size,
            num_iterations=2,
            max_steps=2,
        )
        trainer._generate_single_turn = lambda prompt_ids, *args, **kwargs: (
            [[70 + row] * (1 + 2 * (sum(ids) % 4)) for row, ids in enumerate(prompt_ids)],
            None,
        )
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "policy/approx_kl" in entry])
    for small, large in zip(*logs, strict=True):
        for name in ("policy/approx_kl", "loss/value", "val/clip_fraction", "entropy", "clip_ratio/region_mean"):
            assert_close(small[name], large[name], SPLIT)
    assert logs[0][1]["policy/approx_kl"] > 1e-4

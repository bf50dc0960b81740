"""Micro-batches of different size train the weights of equal ones, and compute fewer tokens."""

import sys
from collections import Counter

import pytest
import tiny
import torch
from processes import run_in_processes
from tolerances import SPLIT, assert_close

from rlhf_recipes.trainers.update import row_weight

pytestmark = pytest.mark.tiny

LENGTHS = (2, 1, 2, 40, 3, 2, 5, 1)
"""Tokens of the completions of eight rows: mostly short, with a long tail."""
SHORT = {"num_iterations": 2, "max_completion_length": 40, "max_steps": 4, "epsilon": 0.05, "vf_coef": 0.5}


def equal_cut(micro_batches, window, *args):
    """Return micro-batches of equal size that are sorted by length: the cut that the uneven one must equal."""
    cut = []
    for start in range(0, len(micro_batches), window):
        step = micro_batches[start : start + window]
        names = [name for name, x in step[0].items() if isinstance(x, torch.Tensor) and x.ndim > 0]
        rows = {name: torch.cat([batch[name] for batch in step]) for name in names}
        order = (rows["prompt_mask"].sum(1) + rows["completion_mask"].sum(1)).argsort()
        parts = order.chunk(len(step))
        cut += [{**batch, **{n: x[part] for n, x in rows.items()}} for batch, part in zip(step, parts, strict=True)]
    return cut


def long_tail(prompt_ids, *args, **kwargs):
    """Sample like TRL: completions of `LENGTHS`. Those of odd prompts end before the limit."""
    rows = [[70 + i] * LENGTHS[(i + sum(ids)) % 8] for i, ids in enumerate(prompt_ids)]
    return [row[:-1] + [1] if sum(ids) % 2 else row for row, ids in zip(rows, prompt_ids, strict=True)], None


def reward(completion_ids, **kwargs):
    """Return scores, and `None` for about every seventh completion: it does not train."""
    return [None if sum(ids) % 7 == 0 else float(sum(ids) % 11) for ids in completion_ids]


def trainer_of(directory, *, split=4, rows=8, reads=False, **options):
    """Return a trainer of two optimiser steps per epoch, each of `rows` rows in `split` micro-batches."""
    tok = tiny.tokenizer()
    data = tiny.prompts(count=32).map(lambda row, i: {"prompt": row["prompt"] + " red" * (i % 5)}, with_indices=True)
    trainer = tiny.ppo_trainer(
        directory,
        tok=tok,
        rewards=[tiny.reward_model(tok), reward] if reads else reward,
        reward_tok=[tok, None] if reads else None,
        critic="reward" if reads else "policy",
        data=data,
        per_device_train_batch_size=rows // split,
        gradient_accumulation_steps=split,
        steps_per_generation=2 * split,
        **{k: v for k, v in (SHORT | options).items() if not (reads and k == "vf_coef")},
    )
    trainer._generate_single_turn = long_tail
    return trainer


def trained(directory, monkeypatch, cut=None, **options):
    """Return the trained parameters after four optimiser steps, their start, and the trainer."""
    with monkeypatch.context() as patch:
        if cut is not None:
            patch.setattr("rlhf_recipes.trainers.ppo.group_by_length", cut)
        trainer = trainer_of(directory, **options)
        start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        trainer.train()
    assert trainer.state.global_step == 4
    weights = {name: trainer.model.get_parameter(name).detach().clone() for name in start}
    return weights, start, trainer


CASES = [
    pytest.param(kind, loss_type, split, id=f"{kind}-{loss_type}-{split}", marks=marks)
    for kind in ("full", "lora", "reads")
    for loss_type in ("grpo", "dapo", "dr_grpo")
    for split in (1, 2, 4, 8)
    for marks in ([] if (split == 4 and (kind == "full" or loss_type == "grpo")) else [pytest.mark.slow],)
]
KINDS = {"full": {"beta": 0.1}, "lora": {"peft": tiny.lora()}, "reads": {"reads": True}}


@pytest.mark.parametrize(("kind", "loss_type", "split"), CASES)
def test_four_steps_train_the_weights_of_equal_micro_batches(tmp_path, monkeypatch, kind, loss_type, split):
    options = {"loss_type": loss_type, "split": split, **KINDS[kind]}
    expected, start, equal = trained(tmp_path / "equal", monkeypatch, equal_cut, **options)
    actual, _, uneven = trained(tmp_path / "uneven", monkeypatch, **options)
    sizes = {len(batch["advantages"]) for batch in uneven._buffered_inputs}
    assert (len(sizes) > 1) == (split in (2, 4)), "the cut must be uneven"
    assert tiny.logged(uneven, "objective/kl")[1] == 0, "policy and reference must run in the same way"
    assert max((expected[name] - start[name]).abs().max() for name in start) > 1e-3
    for name, weights in expected.items():
        assert_close(actual[name], weights, SPLIT)
    for name in ("loss", "grad_norm", "policy/approx_kl", "objective/kl", "entropy"):
        for step, value in tiny.logged(equal, name).items():
            assert_close(tiny.logged(uneven, name)[step], value, SPLIT)


@pytest.mark.parametrize(
    "options",
    [{"truncated_completions": "mask"}, {"importance_sampling_level": "sequence"}, {"critic_warmup_steps": 2}],
    ids=lambda options: next(iter(options)),
)
def test_options_that_mask_tokens_train_the_same_weights(tmp_path, monkeypatch, options):
    """With `mask`, some rows have no token that trains."""
    expected, _, _ = trained(tmp_path / "equal", monkeypatch, equal_cut, **options)
    actual, _, _ = trained(tmp_path / "uneven", monkeypatch, **options)
    for name, weights in expected.items():
        assert_close(actual[name], weights, SPLIT)


def _train_both(rank, world_size, directory):
    """Train on two processes with both cuts, for each average, and return the weights."""
    results = {}
    for loss_type in ("grpo", "dapo", "dr_grpo"):
        for name, cut in (("equal", equal_cut), ("uneven", None)):
            with pytest.MonkeyPatch.context() as patch:
                path = f"{directory}/{loss_type}-{name}"
                weights, _, trainer = trained(path, patch, cut, split=2, loss_type=loss_type)
                results[loss_type, name] = weights, [len(batch["advantages"]) for batch in trainer._buffered_inputs]
    return results


@pytest.mark.distributed
def test_two_processes_train_the_same_weights(tmp_path):
    """TRL gathers figures by row: a micro-batch with another number of rows on the other process would end the run."""
    for results in run_in_processes(_train_both, 2, str(tmp_path)):
        for loss_type in ("grpo", "dapo", "dr_grpo"):
            (expected, equal_sizes), (actual, sizes) = (results[loss_type, cut] for cut in ("equal", "uneven"))
            assert len(set(equal_sizes)) < len(set(sizes))
            for name, weights in expected.items():
                assert_close(actual[name], weights, SPLIT)


def test_a_long_tail_is_computed_in_few_tokens(tmp_path, monkeypatch):
    """One rollout of 16 completions and one epoch of it, in exact numbers."""
    computed, forwards = {}, {}
    for cut in (equal_cut, None):
        with monkeypatch.context() as patch:
            if cut is not None:
                patch.setattr("rlhf_recipes.trainers.ppo.group_by_length", cut)
            trainer = trainer_of(tmp_path / str(cut), split=2, num_iterations=1, max_steps=2)
            tokens, calls = Counter(), Counter()
            for name, model in (("policy", trainer.model), ("reference", trainer.ref_model)):
                _count(model, name, tokens, calls)
            trainer.train()
        computed[cut], forwards[cut] = dict(tokens), dict(calls)
    needed = sum(int(b["prompt_mask"].sum() + b["completion_mask"].sum()) for b in trainer._buffered_inputs)
    assert needed == 169
    assert computed[None] == {("policy", False): 195, ("reference", False): 195, ("policy", True): 209}
    assert computed[equal_cut]["policy", True] == 300
    assert forwards[None] == forwards[equal_cut] == {key: 4 for key in computed[None]}


def _count(model, name, tokens, forwards):
    """Count the tokens and the forwards of a backbone, with gradient and without; sampling does not run it here."""

    def counted(module, inputs, output):
        tokens[name, torch.is_grad_enabled()] += inputs[0].numel()
        forwards[name, torch.is_grad_enabled()] += 1

    model.model.embed_tokens.register_forward_hook(counted)


READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__")


def test_an_optimiser_step_waits_once_for_the_device(tmp_path, monkeypatch):
    """Each of these calls waits on a GPU until all that was asked of it is done. TRL's own calls do not count."""
    trainer, waits, inside = trainer_of(tmp_path), [], []

    def counting(name):
        read = getattr(torch.Tensor, name)

        def counted(tensor, *args, **kwargs):
            if inside and "/rlhf_recipes/" in sys._getframe(1).f_code.co_filename:
                waits.append((trainer.state.global_step, name))
            return read(tensor, *args, **kwargs)

        return counted

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, counting(name))
    compute = trainer._compute_loss

    def in_update(*args):
        inside.append(True)
        loss = compute(*args)
        inside.clear()
        return loss

    trainer._compute_loss = in_update
    trainer.train()
    assert waits == [(step, "tolist") for step in range(4)]


@pytest.mark.parametrize(("loss_type", "window", "weight"), [("grpo", 2, 0.75), ("dapo", 2, 1.0), ("grpo", 1, 1.0)])
def test_a_micro_batch_weighs_its_rows_in_its_own_window_only(loss_type, window, weight):
    """After a resume with another number of micro-batches per step, each step has other rows than its cut had."""
    assert row_weight({"row_share": 0.75, "window": 2}, loss_type, window) == weight
    assert row_weight({}, loss_type, window) == 1.0

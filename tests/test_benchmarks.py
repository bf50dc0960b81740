"""What `benchmarks/ppo_iteration.py` counts: needed work by hand, computed tokens of a real iteration, a profile."""

import json
import multiprocessing
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from floors import Machine, needed_work  # noqa: E402
from growth import in_children  # noqa: E402
from memory import compute  # noqa: E402
from phases import Clock  # noqa: E402
from ppo_iteration import main, measure  # noqa: E402
from ppo_iteration_trainers import RANK, Builder, Scenario  # noqa: E402
from profile_iteration import summary  # noqa: E402
from random_models import SHAPES, random_model  # noqa: E402

SCENARIO = Scenario("tiny", 8, 12, tail=True, rows=4, micro_batch=2, epochs=2)


@pytest.mark.parametrize("name", ["tiny", "4x128"])
def test_weights_of_a_shape_are_those_of_the_model(name):
    shape = SHAPES[name]
    model = random_model(shape.config(), "cpu", torch.float32)
    blocks = sum(m.weight.numel() for m in model.model.layers.modules() if isinstance(m, nn.Linear))
    assert shape.block_weights == blocks
    assert shape.embedding == model.lm_head.weight.numel()
    assert shape.kv_width == model.model.layers[0].self_attn.k_proj.out_features


def test_update_costs_four_flop_per_frozen_weight_and_six_per_trained_one():
    shape, lengths = SCENARIO.sizes, SCENARIO.lengths
    tokens = sum(lengths) + 4 * 8
    attention = sum(2 * (8 + n) ** 2 * shape.hidden * shape.layers for n in lengths)
    epoch = (4 * shape.block_weights + 6 * shape.adapter_weights(RANK)) * tokens
    epoch += 3 * attention + 4 * shape.embedding * sum(lengths)
    work = needed_work(SCENARIO, "ours", 4)["update"]
    assert (work.tokens, work.flop) == (2 * tokens, 2 * epoch)
    full, lora = (needed_work(SCENARIO, kind, 4)["update"] for kind in ("trl_1_12", "trl_1_12_lora"))
    assert full.tokens == lora.tokens == 4 * tokens
    assert full.flop - work.flop == 2 * (6 * shape.block_weights * tokens + 3 * attention)
    critic = 4 * shape.block_weights + 6 * shape.adapter_weights(RANK)
    assert lora.flop - work.flop == 2 * (critic * tokens + 3 * attention)


def test_decoding_reads_all_weights_at_each_step_and_the_cache_of_each_live_row():
    shape, lengths = SCENARIO.sizes, SCENARIO.lengths
    size = 0
    for step in range(1, max(lengths)):  # the prompts' own forward gives the first token
        size += 4 * (shape.block_weights + shape.embedding)
        live = [n for n in lengths if n > step]
        size += sum(4 * 2 * shape.kv_width * shape.layers * (8 + step) for _ in live)
    work = needed_work(SCENARIO, "ours", 4)["generate"]
    assert work.decode_bytes == size
    assert work.tokens == 4 * 8 + sum(lengths) - 4
    slow = Machine("", "cpu", square=1e9, own=1e9, bandwidth=1e6)
    assert work.floor(slow) == work.flop / 1e9 + size / 1e6


class OneIteration(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == SCENARIO.epochs


def test_an_iteration_computes_the_tokens_that_its_forced_lengths_need(tmp_path):
    builder = Builder(SCENARIO, "cpu", str(tmp_path))
    trainer = builder.build("ours")
    trainer.add_callback(OneIteration())
    builder.clock.reset()
    trainer.train()
    builder.clock.lap()
    phases, longest = builder.clock.figures, max(SCENARIO.lengths)
    tokens = sum(SCENARIO.lengths) + 4 * 8
    assert phases["generate"]["forwards"] == longest
    assert phases["update"]["forwards"] == 2 * SCENARIO.epochs
    for name in ("policy forward", "reference forward"):
        assert tokens <= phases[name]["tokens"] < 4 * (8 + longest)
        assert phases[name]["forwards"] == 2
    assert 2 * tokens <= phases["update"]["tokens"] < 2 * 4 * (8 + longest)
    assert all(phases[name]["cpu"] > 0 for name in ("generate", "score", "update"))


def test_a_nested_phase_counts_for_itself():
    clock = Clock()
    counted = nn.Module()
    counted.embed_tokens, counted.layers = nn.Embedding(3, 2), nn.ModuleList()
    counted.forward = lambda input_ids: input_ids
    clock.count(counted, nn.ModuleList([counted]))
    ids = torch.zeros(2, 5, dtype=torch.long)
    with clock.phase("generate"):
        counted(ids)
        with clock.phase("score"):
            counted(input_ids=ids[:1])
    counted(ids[:, :1])
    assert {name: figures["tokens"] for name, figures in clock.figures.items()} == {
        "generate": 10, "score": 5, "update": 2,
    }  # fmt: skip


def event(name, start, length, device="CPU"):
    methods = {"name": name, "start_ns": start, "duration_ns": length, "device_type": f"DeviceType.{device}"}
    return SimpleNamespace(**{key: lambda value=value: value for key, value in methods.items()})


def test_a_profile_gives_kernels_and_waits_to_their_phase_and_overlap_counts_once():
    events = [
        event("phase: generate", 100, 100),
        event("phase: generate", 100, 100, "CUDA"),  # the profiler repeats a mark on the device
        event("kernel a", 110, 40, "CUDA"),
        event("kernel b", 130, 40, "CUDA"),  # on another stream
        event("cudaStreamSynchronize", 150, 5),
        event("aten::item", 250, 5),
        event("kernel a", 260, 10, "CUDA"),
        event("cudaLaunchKernel", 255, 1),
    ]
    found = summary(events, is_cuda=True)
    assert found["phases"]["generate"] == {"kernels": 2, "busy": pytest.approx(6e-8), "cudaStreamSynchronize": 1}
    assert found["phases"]["update"] == {"kernels": 1, "busy": pytest.approx(1e-8), "aten::item": 1, "launches": 1}
    assert found["top"][0] == {"name": "kernel a", "seconds": pytest.approx(5e-8), "count": 2}


def _fail_first(path):
    if os.environ["RANK"] == "0":
        raise ValueError("on purpose")
    time.sleep(20)
    path.touch()


def test_the_end_of_the_first_process_is_seen_while_others_wait(tmp_path):
    with pytest.raises(EOFError):
        in_children(_fail_first, tmp_path / "waited", processes=2)
    for child in multiprocessing.active_children():
        child.kill()
    assert not (tmp_path / "waited").exists()


@pytest.mark.parametrize(("setup", "models", "adapters"), [("full", 3, 0), ("lora", 2, 1), ("one_backbone", 1, 2)])
def test_memory_counts_the_adapters_that_there_are(setup, models, adapters):
    shape = SHAPES["tiny"]
    embedding = shape.embedding * (1 if shape.tied else 2)
    base, adapter, head = shape.block_weights + embedding, shape.adapter_weights(RANK), shape.hidden**2
    learns = (base if setup == "full" else adapter) + head
    assert compute(setup, "tiny", 2) == pytest.approx((2 * models * base + 4 * adapters * adapter + 12 * learns) / 1e9)


class _Worker:
    """Answers at once, with the figures of no phase."""

    def __init__(self, kind, name, args):
        self.kind = kind

    def read(self):
        return "ready"

    def ask(self, word):
        return {"phases": {}}

    def stop(self):
        pass


def test_rounds_are_numbered_without_warm_up(monkeypatch):
    monkeypatch.setattr("ppo_iteration.Worker", _Worker)

    def numbers(done, rounds, warm_up):
        args = SimpleNamespace(warm_up=warm_up, rounds=rounds, profile=False)
        return [row["round"] for rows in measure("tiny", ["ours", "grpo"], done, args) for row in rows]

    assert numbers(0, 2, 1) + numbers(2, 3, 0) + numbers(3, 4, 2) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_another_command_does_not_continue(tmp_path, monkeypatch):
    """Its figures would be mixed with those of another device, other threads or another commit."""
    command = ["ppo_iteration.py", "--output", str(tmp_path), "--scenarios", "even", "--rounds", "1", "--warm_up", "0"]
    machine = Machine("", "cpu", square=1e9, own=1e9, bandwidth=1e9)
    monkeypatch.setattr("ppo_iteration.Worker", _Worker)
    monkeypatch.setattr("ppo_iteration.measure_machine", lambda *args: machine)
    monkeypatch.setattr("ppo_iteration.report", lambda result: "")
    for more in ([], ["--rounds", "2"]):
        monkeypatch.setattr(sys, "argv", [*command, "--trainers", "ours", *more])
        main()
    result = json.loads((tmp_path / "even.json").read_text())
    assert [row["round"] for row in result["rows"]] == [0, 1]
    assert result["machine"] == asdict(machine)
    for more in (["--device", "cuda"], ["--threads", "2"], ["--epochs_run", "2"], ["--trainers", "ours", "grpo"]):
        monkeypatch.setattr(sys, "argv", [*command, "--trainers", "ours", *more])
        with pytest.raises(SystemExit, match="Choose another --output"):
            main()
    monkeypatch.setattr(sys, "argv", [*command, "--trainers", "ours"])
    monkeypatch.setattr("ppo_iteration.git_tags", lambda: {"git.commit": "another"})
    with pytest.raises(SystemExit, match="Choose another --output"):
        main()

"""Faults that a test builds into a trainer, and records of the steps that follow."""

import os
import signal

import torch
from transformers import TrainerCallback


def poison(trainer, steps, value=float("nan")):
    """Make the loss, and with it the gradient, of some optimiser steps NaN or infinite: {step: times}."""
    left, compute_loss = dict(steps), trainer._compute_loss

    def poisoned(model, inputs):
        loss = compute_loss(model, inputs)
        step = trainer.state.global_step + 1
        if trainer.model.training and left.get(step, 0):
            left[step] -= 1
            return loss * value
        return loss

    trainer._compute_loss = poisoned


def explode(trainer, step, distance=10):
    """Make the KL to the reference large in one rollout of one step."""
    left, reference_logps = {step}, trainer._reference_logps

    def exploded(batch):
        if not trainer.model.training or trainer.state.global_step not in left:
            return reference_logps(batch)
        left.remove(step)
        return reference_logps(batch) - distance

    trainer._reference_logps = exploded


def snapshots_of(trainer):
    """Return a mapping of each step to the weights and Adam's state after its latest attempt. 0 is the start."""
    snapshots = {}

    def take(step):
        parameters = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
        state = trainer.optimizer.state if trainer.optimizer is not None else {}
        snapshots[step] = {name: p.detach().clone() for name, p in parameters.items()} | {
            f"{name}/{key}": value.clone() for name, p in parameters.items() for key, value in state.get(p, {}).items()
        }

    class Recorder(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            take(state.global_step)

        def on_step_end(self, args, state, control, **kwargs):
            take(state.global_step)

    trainer.add_callback(Recorder())
    return snapshots


def still_steps(snapshots):
    """Return the optimiser steps that changed no bit. The first one adds Adam's state."""
    return [
        step
        for step in range(1, max(snapshots) + 1)
        if snapshots[step].keys() == snapshots[step - 1].keys()
        and all(torch.equal(value, snapshots[step - 1][name]) for name, value in snapshots[step].items())
    ]


def rates_of(trainer):
    """Return a list that gets every attempted step with its learning rates: the policy's and the head's."""
    rates = []

    class Recorder(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            groups = optimizer.param_groups
            rates.append((state.global_step + 1, groups[0]["lr"], groups[-1]["lr"]))

    trainer.add_callback(Recorder())
    return rates


def samplings_of(trainer):
    """Return a list that gets the step, the prompts and the completions of every rollout."""
    samplings, generate = [], trainer._generate

    def recorded(prompts):
        result = generate(prompts)
        samplings.append((trainer.state.global_step, prompts, result[1]))
        return result

    trainer._generate = recorded
    return samplings


class SignalAt(TrainerCallback):
    """Send SIGUSR1 to this process during an optimiser step."""

    def __init__(self, step):
        self._step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self._step:
            os.kill(os.getpid(), signal.SIGUSR1)

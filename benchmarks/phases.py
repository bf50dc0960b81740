"""The phases of a PPO iteration: seconds, CPU seconds, computed tokens and peak memory of each."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.profiler import record_function

PHASES = ("generate", "score", "policy forward", "reference forward", "update")
MARK = "phase: "  # in a profile, before the name of a phase


class Clock:
    """Add up figures in named phases. Nested calls count in the innermost phase, and all else in the update.

    The figures of a phase: `wall` and `cpu` (of all threads) in seconds; `tokens`, rows times width of the inputs of
    all backbones; `forwards` of backbones; `peak`, the allocator's peak in bytes on a GPU.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.is_cuda = device != "cpu"
        self.stack: list[str] = []
        self.reset()

    def reset(self) -> None:
        """Forget all figures and start now."""
        self.figures: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._start()

    def lap(self) -> None:
        """Add the figures since the last lap to the current phase."""
        if self.is_cuda:
            torch.cuda.synchronize()
        figures = self.figures[self.current]
        figures["wall"] += time.perf_counter() - self._wall
        figures["cpu"] += time.process_time() - self._cpu
        if self.is_cuda:
            figures["peak"] = max(figures["peak"], torch.cuda.max_memory_allocated())
        self._start()

    def _start(self) -> None:
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    @property
    def current(self) -> str:
        """Return the name of the current phase."""
        return self.stack[-1] if self.stack else "update"

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the block inside."""
        self.lap()
        self.stack.append(name)
        try:
            with record_function(MARK + name):
                yield
                self.lap()
        finally:
            self.stack.pop()

    def wrap(self, target: Any, method: str, name: str | Callable[..., str | None]) -> None:
        """Measure a method; `name` may depend on its arguments, and None leaves a call in its phase."""
        original = getattr(target, method)

        def measured(*args: Any, **kwargs: Any) -> Any:
            label = name(*args) if callable(name) else name
            if label is None:
                return original(*args, **kwargs)
            with self.phase(label):
                return original(*args, **kwargs)

        setattr(target, method, measured)

    def count(self, *roots: nn.Module) -> None:
        """Count the forwards and the tokens of every backbone inside the roots, once."""
        found = {m for root in roots for m in root.modules() if hasattr(m, "embed_tokens") and hasattr(m, "layers")}
        for backbone in found:
            backbone.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args)
        rows, width = next(x for x in given if x is not None).shape[:2]
        figures = self.figures[self.current]
        figures["tokens"] += rows * width
        figures["forwards"] += 1


def watch(trainer: Any, clock: Clock) -> None:
    """Measure the phases of a trainer on TRL's GRPO."""
    adapted = next((m for m in trainer.model.modules() if isinstance(m, BaseTunerLayer)), None)

    def forward_phase(model: Any, *_: Any) -> str | None:
        if torch.is_grad_enabled():
            return None
        if trainer.ref_model is not None:
            return _policy_or_reference(trainer.ref_model in (model, getattr(model, "model", None)))
        return _policy_or_reference(adapted is not None and adapted.disable_adapters)

    clock.wrap(trainer, "_generate", "generate")
    clock.wrap(trainer, "_calculate_rewards", "score")
    clock.wrap(trainer, "_get_per_token_logps_and_entropies", forward_phase)


def _policy_or_reference(is_reference: bool) -> str:
    return "reference forward" if is_reference else "policy forward"


def watch_trl_1_12(trainer: Any, clock: Clock) -> None:
    """Measure the phases of TRL 1.12's PPO, whose `train` is one function.

    Its log-probabilities come from sampling, so it has no policy forward. The forward of its critic counts as one.
    """
    from trl.experimental.ppo import ppo_trainer

    def forward_phase(*_: Any) -> str | None:
        return None if torch.is_grad_enabled() else "reference forward"

    def reward_phase(model: Any, *_: Any) -> str:
        return "score" if model is trainer.reward_model else "policy forward"

    clock.wrap(ppo_trainer, "batch_generation", "generate")
    clock.wrap(ppo_trainer, "forward", forward_phase)
    clock.wrap(ppo_trainer, "get_reward", reward_phase)

"""Run a recipe in this process, and end it by SIGKILL at an exact event.

An event is a call or the end of a watched method, a forward pass of a module, a statement to the MLflow store, or a
file that is opened for writing, renamed or removed. Each belongs to a phase, and the events of a phase are counted.
"""

import functools
import json
import os
import random
import runpy
import signal
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
PHASES = (
    *("start", "resume", "sampling", "update", "step", "checkpoint", "evaluation", "tracking", "upload", "final save"),
)
# Methods of the trainers by the phase that they are. What is inside of two phases belongs to the inner one.
WATCHED = {
    "_load_from_checkpoint": "resume",
    "_load_optimizer_and_scheduler": "resume",
    "_load_rng_state": "resume",
    "_generate_and_score_completions": "sampling",
    "training_step": "update",
    "_save_checkpoint": "checkpoint",
    "evaluate": "evaluation",
    "save_model": "final save",
    "save_state": "final save",
}
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "shutil.rmtree"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
REACHED = 0.9  # share of the events of a phase; a kill behind the last event would come too late
LONGEST_DELAY = 0.005  # seconds after an event; enough to cut a write or a commit into two


class Kill(NamedTuple):
    """The moment at which a process dies.

    Attributes:
        phase: One of `PHASES`.
        number: Which event of the phase, from 1.
        rank: Which process.
        delay: Seconds after the event.
    """

    phase: str
    number: int
    rank: int
    delay: float


class Watch:
    """Count the events of each phase, and kill this process at one of them."""

    def __init__(self, kill: Kill | None) -> None:
        self.counts: Counter[str] = Counter()
        self._kill, self._process = kill, os.getpid()
        self._phases = ["start"]  # of the main thread

    def event(self, phase: str | None = None) -> None:
        """Count an event of a phase; without one, of the phase of the main thread."""
        phase = phase or self._phases[-1]
        self.counts[phase] += 1
        is_own = os.getpid() == self._process  # a worker that loads data is a fork of this process
        if is_own and self._kill is not None and (phase, self.counts[phase]) == self._kill[:2]:
            if self._kill.delay:
                threading.Timer(self._kill.delay, _die).start()
            else:
                _die()

    def watched(self, method: Callable[..., Any], phase: str) -> Callable[..., Any]:
        """Return a method that is a phase."""

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            inner = self._phases[-1] if (phase, self._phases[-1]) == ("final save", "checkpoint") else phase
            self._phases.append(inner)
            self.event()
            try:
                return method(*args, **kwargs)
            finally:
                self.event()
                self._phases.pop()

        return call

    def install(self) -> None:
        """Watch the trainers, the optimisers, the modules, the store and the files of this process."""
        import mlflow.store.artifact.local_artifact_repo as artifacts

        from rlhf_recipes.trainers.ppo import PPOTrainer
        from rlhf_recipes.trainers.reward_modeling import RewardModelTrainer
        from rlhf_recipes.trainers.sft import SFTTrainer

        for trainer in (PPOTrainer, RewardModelTrainer, SFTTrainer):
            for name, phase in WATCHED.items():
                if hasattr(trainer, name):
                    setattr(trainer, name, self.watched(getattr(trainer, name), phase))
        repository = artifacts.LocalArtifactRepository
        for name in ("log_artifact", "log_artifacts"):
            setattr(repository, name, self.watched(getattr(repository, name), "upload"))
        register_optimizer_step_pre_hook(lambda *_: self.event("step"))
        register_optimizer_step_post_hook(lambda *_: self.event("step"))
        nn.modules.module.register_module_forward_pre_hook(lambda *_: self.event())
        sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", lambda *_: self.event("tracking"))
        sqlalchemy.event.listen(sqlalchemy.Engine, "commit", lambda *_: self.event("tracking"))
        sys.addaudithook(self._audit)

    def _audit(self, name: str, details: tuple[Any, ...]) -> None:
        if name in FILE_EVENTS and (name != "open" or _is_writing(details)):
            self.event()


def _is_writing(details: tuple[Any, ...]) -> bool:
    file, mode, flags = details
    return (
        isinstance(file, str) and not file.startswith("/dev") and bool((flags or 0) & WRITING or "w" in (mode or ""))
    )


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def draw_kill(draw: random.Random, counts: dict[str, int], world_size: int, phases: tuple[str, ...]) -> Kill:
    """Draw a moment: a phase, one of the events that it had in a run that was left alone, a rank and a delay."""
    phase = draw.choice([phase for phase in phases if counts.get(phase)])
    delay = draw.choice([0.0, draw.uniform(0, LONGEST_DELAY)])
    number = draw.randint(1, max(1, int(REACHED * counts[phase])))
    return Kill(phase, number, draw.randrange(world_size), delay)


def run_recipe(job: dict[str, Any], rank: int, world_size: int, port: int, kill: Kill | None) -> None:
    """Run a recipe as its command does, in the directory of the job, and write the counts of its events at its end.

    Args:
        job: `directory`, `recipe`, `arguments`, and `name`, under which output and counts are written.
        rank: Of this process.
        world_size: Number of processes.
        port: For their meeting.
        kill: When to die, if this is the rank.
    """
    os.setsid()
    os.chdir(job["directory"])
    output = os.open(f"{job['name']}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if world_size > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    watch = Watch(kill if kill is not None and kill.rank == rank else None)
    watch.install()
    recipe = RECIPES / job["recipe"]
    sys.argv = [str(recipe), *job["arguments"]]
    try:
        runpy.run_path(str(recipe), run_name="__main__")
    finally:
        if rank == 0:
            counts = dict(watch.counts)
            Path(f"{job['name']}.counts.json").write_text(json.dumps(counts), encoding="utf-8")

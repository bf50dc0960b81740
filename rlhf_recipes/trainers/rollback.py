"""Go back to an earlier checkpoint of the same run, with a lower learning rate, when the run cannot continue."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, set_seed
from transformers import TrainerCallback

from rlhf_recipes.durability.checkpoints import abandon, checkpoints_by_age, find_defect, has_files, is_abandoned
from rlhf_recipes.durability.finite import DivergedError
from rlhf_recipes.options.baselines import rollout_steps
from rlhf_recipes.options.ppo import PPOConfig

SEED_STRIDE = 10_007  # between the random numbers of two attempts; more than there are ranks
logger = logging.getLogger(__name__)


class RollbackError(Exception):
    """Leave the training loop, to resume from an earlier checkpoint.

    Args:
        reason: Sentence that says what happened.
        advice: Sentence that says what to change if going back does not help.
        latest: Last optimiser step whose checkpoint is good.
    """

    def __init__(self, reason: str, advice: str, latest: int) -> None:
        super().__init__(reason)
        self.reason, self.advice, self.latest = reason, advice, latest


class Rollback(TrainerCallback):
    """Find the checkpoint to go back to, and let the next attempt differ from the one that failed.

    Its state, plain numbers, is part of the guard's in every checkpoint.

    Args:
        args: Options.
        is_main: Whether this process searches, and logs.
        is_possible: Whether this run can load a checkpoint a second time.
    """

    def __init__(self, args: PPOConfig, *, is_main: bool, is_possible: bool) -> None:
        self.args, self._is_main, self._is_possible = args, is_main, is_possible
        self.count = 0
        self.learning_rate_factor = 1.0
        self.is_pending = False  # from the decision to go back until the first micro-batch after it
        self._loaded_factor = 1.0
        self._saved_steps = set[int]()
        self._earlier: list[tuple[int, Path]] = []  # checkpoints of the run that this one resumes
        self._tried: dict[int, int] = {}  # steps of checkpoints that the run went back to: the last good step then

    def to_checkpoint(self, error: RollbackError) -> str:
        """Return the checkpoint to go back to, and lower the learning rate. Every rank must make the call.

        Raises:
            DivergedError: If there is none, or the run has gone back too often.
        """
        args = self.args
        can_go_back = self._is_possible and self.count < args.max_rollbacks
        # One process searches for all. Hashes of large checkpoints take long, and a message alone does not need them.
        is_whole = _is_unchanged if can_go_back else has_files
        found = self._last_good_checkpoint(error.latest, is_whole) if self._is_main else None
        (found,) = broadcast_object_list([found])
        known = "" if found is None else f" The last good checkpoint is {found[1]}."
        if not self._is_possible:
            raise DivergedError(
                f"{error.reason} Under DeepSpeed and FSDP, and with `save_only_model`, a run does not go back by "
                f"itself: resume it from a checkpoint before that, or start again.{known} {error.advice}"
            )
        if self.count >= args.max_rollbacks:
            raise DivergedError(
                f"{error.reason} The run has gone back to a checkpoint {self.count} times, the most that "
                f"`max_rollbacks` allows, at last with {self.learning_rate_factor:g} of the learning "
                f"rate.{known} {error.advice}"
            )
        if found is None:
            raise DivergedError(
                f"{error.reason} This run has no checkpoint from before that to go back to: lower `save_steps` (a "
                f"rollout is {rollout_steps(args)} steps), or raise `save_total_limit`. {error.advice}"
            )
        saved_at, checkpoint = found
        self._tried[saved_at] = error.latest
        self.count += 1
        self.learning_rate_factor *= args.rollback_learning_rate_factor
        if self._is_main:
            self._abandon_after(saved_at, error.reason)
            logger.warning(
                f"{error.reason} Going back to {checkpoint} with {self.learning_rate_factor:g} of the learning rate "
                f"(rollback {self.count} of {args.max_rollbacks})."
            )
        self._saved_steps = {step for step in self._saved_steps if step <= saved_at}
        self.is_pending = True
        return checkpoint

    def _abandon_after(self, saved_at: int, reason: str) -> None:
        """Mark the later checkpoints of this run: if it were killed before its next one, it would resume from them."""
        here, own = _checkpoints_in(self.args.output_dir), self._saved_steps | {step for step, _ in self._earlier}
        later = [checkpoint for step, checkpoint in here if step > saved_at and step in own]
        for checkpoint in later:
            abandon(checkpoint, reason)
        if later:
            logger.warning(
                f"{', '.join(map(str, later))} stays for a look, until it is replaced or cleared by "
                "`save_total_limit`, and `resume_from_checkpoint: true` passes it over."
            )

    def _last_good_checkpoint(self, latest: int, is_whole: Callable[[Path], bool]) -> tuple[int, str] | None:
        """Return step and path of the latest whole checkpoint of this run, up to a step.

        Pass over one that the run has gone back to before, if it then failed no later than the first time, and if
        there is an earlier one: the cause may be in the checkpoint.
        """
        # The directory may hold those of an earlier run.
        saved = [entry for entry in _checkpoints_in(self.args.output_dir) if entry[0] in self._saved_steps]
        again: tuple[int, str] | None = None
        for step, checkpoint in reversed(self._earlier + saved):
            if step > latest or is_abandoned(checkpoint) or not is_whole(checkpoint):
                continue
            if latest > self._tried.get(step, -1):
                return step, str(checkpoint)
            again = again or (step, str(checkpoint))
        return again

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remember which checkpoints are this run's."""
        self._saved_steps.add(state.global_step)

    def begin_attempt(self) -> None:
        """Draw other random numbers after going back: the same ones would sample the failed attempt again."""
        if self.is_pending:
            set_seed(self.args.seed + SEED_STRIDE * self.count, device_specific=True)
            self.is_pending = False

    def after_loading(self, optimizer: Any, scheduler: Any, checkpoint: Path, step: int) -> None:
        """Lower the learning rate of a checkpoint to that of this attempt.

        Args:
            optimizer: As it was saved; its groups keep their proportions.
            scheduler: As it was saved.
            checkpoint: Where both come from.
            step: Of the checkpoint.
        """
        if not self.is_pending:
            siblings = _checkpoints_in(checkpoint.parent)
            is_numbered = (step, checkpoint) in siblings  # else it was copied from elsewhere
            self._earlier = [entry for entry in siblings if entry[0] <= step] if is_numbered else [(step, checkpoint)]
            return
        factor = self.learning_rate_factor / self._loaded_factor
        for group in optimizer.param_groups:
            group["lr"] *= factor
            if "initial_lr" in group:
                group["initial_lr"] *= factor
        for name in ("base_lrs", "_last_lr"):
            if hasattr(scheduler, name):
                setattr(scheduler, name, [rate * factor for rate in getattr(scheduler, name)])

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        return {"rollbacks": self.count, "learning_rate_factor": self.learning_rate_factor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state; a run that goes back keeps its own count and learning rate."""
        self._loaded_factor = state["learning_rate_factor"]
        if not self.is_pending:
            self.count, self.learning_rate_factor = state["rollbacks"], state["learning_rate_factor"]


def _checkpoints_in(directory: str | Path) -> list[tuple[int, Path]]:
    return [(int(path.name.rpartition("-")[2]), path) for path in checkpoints_by_age(directory)]


def _is_unchanged(checkpoint: Path) -> bool:
    return find_defect(checkpoint) is None

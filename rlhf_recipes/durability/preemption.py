"""Preemption: on SIGTERM, SIGUSR1, SIGHUP or Ctrl-C a run writes a checkpoint and ends. The same command resumes it.

Slurm sends the signal of its option `--signal` before it requeues a job. Kubernetes sends SIGTERM before it removes a
pod. The system sends SIGHUP when a terminal is closed, and SIGINT for Ctrl-C.
"""

import logging
import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from rlhf_recipes.algorithm.distributed import global_max
from rlhf_recipes.durability.going_on import remedy
from rlhf_recipes.durability.termination import (
    ECHO_SECONDS,
    EXIT_CODE,
    STOPS,
    TerminatedError,
    is_first_process,
    leave_closed_terminal,
    terminate,
)

INTERRUPTED = (
    b"\nStopping after this step, with a checkpoint. Ctrl-C again after two seconds ends at once, without one.\n"
)
logger = logging.getLogger(__name__)


class PreemptionCallback(TrainerCallback, ExportableState):
    """After a signal to any rank, save a checkpoint of all ranks at the end of the optimiser step, and exit with 75.

    The resumed run does an evaluation that is due at that step. A second signal ends the process at once.

    Attributes:
        preempted: Whether a signal ends the training; `DurableTrainer` then writes a whole checkpoint, also with
            `save_only_model`.
        evaluation_due: Whether the signal has left out an evaluation; see `evaluation_is_due`.
        agreed: Signal that any rank has received by this step, or 0; `None` if the trainer does not ask for it.
    """

    def __init__(self) -> None:
        self.preempted = False
        self.evaluation_due = False
        self.agreed: int | None = None
        self._received: tuple[int, float] | None = None  # which signal, and when
        self._handlers: dict[int, Any] = {}
        self._remedy = ""

    @property
    def received(self) -> int:
        """Signal that this process has received, or 0."""
        return 0 if self._received is None else self._received[0]

    def state(self) -> dict[str, Any]:
        """Return the state that transformers keeps in a checkpoint."""
        return {"args": {}, "attributes": {"evaluation_due": self.evaluation_due}}

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse a second handler of the same signal.

        Raises:
            ValueError: If transformers has one too.
        """
        if args.enable_jit_checkpoint:
            raise ValueError(
                "`enable_jit_checkpoint` is not needed: after a signal the run saves a checkpoint. Leave it out."
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listen to signals."""
        self._remedy = remedy("--resume_from_checkpoint", "true")
        if threading.current_thread() is threading.main_thread():  # Python delivers signals to no other thread
            self._handlers = {number: self._listen(number) for number in STOPS}
        self.evaluation_due = False  # of the run before: the trainer does it next

    def _listen(self, number: int) -> Any:
        """Listen to a signal, and return the handler to put back at the end."""
        before = signal.signal(number, self._note)
        listener = getattr(before, "__self__", None)
        if not isinstance(listener, PreemptionCallback):
            return before
        # A rollback leaves the training without an end, and transformers goes on with another instance.
        self._received = self._received or listener._received
        return listener._handlers[number]

    def _note(self, number: int, frame: FrameType | None) -> None:
        leave_closed_terminal(number)
        if self._received is None:
            self._received = number, time.monotonic()
            if number == signal.SIGINT and is_first_process():
                with suppress(OSError):  # not `sys.stderr`, which this signal may have interrupted
                    os.write(2, INTERRUPTED)
        elif time.monotonic() - self._received[1] > ECHO_SECONDS:
            self._received = number, time.monotonic()  # the end must not be interrupted by its own echo
            terminate(number, frame)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint and the end of the training, if a signal has reached any rank."""
        if self.agreed is None:
            self.agreed = int(global_max(torch.tensor(self.received, device=args.device)).item())
        number, self.agreed = self.agreed, None
        if number:
            self.preempted = control.should_save = control.should_training_stop = True
            self.evaluation_due, control.should_evaluate = control.should_evaluate, False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave what is due at the end of an epoch to the resumed run: transformers also calls this after a stop."""
        if self.preempted:
            control.should_log = control.should_evaluate = control.should_save = False

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop listening, and leave.

        Raises:
            TerminatedError: If a signal has ended the training.
        """
        for number, handler in self._handlers.items():
            # A launcher signals the others when one process has ended. This one must still come to its own end.
            signal.signal(number, signal.SIG_IGN if self.preempted else handler)
        if not self.preempted:
            return
        if state.is_world_process_zero:
            stopped = f"Stopped by a signal at step {state.global_step}, with a checkpoint in {args.output_dir}."
            logger.warning(f"{stopped}{self._remedy}")
        raise TerminatedError(EXIT_CODE)


def evaluation_is_due(state: TrainerState) -> bool:
    """Return whether a signal has left out an evaluation at the step of a checkpoint with this state."""
    saved = state.stateful_callbacks.get(PreemptionCallback.__name__, [])
    return any(entry["attributes"]["evaluation_due"] for entry in (saved if isinstance(saved, list) else [saved]))

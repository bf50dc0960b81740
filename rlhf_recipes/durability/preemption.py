"""Giving way: on SIGTERM or SIGUSR1 a run writes a checkpoint and ends, to be taken up by the same command.

Slurm sends what `--signal` names before it requeues a job, Kubernetes SIGTERM before it removes a pod.
"""

import logging
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from rlhf_recipes.algorithm.distributed import global_max
from rlhf_recipes.durability.termination import EXIT_CODE, SIGNALS, TerminatedError, terminate

ECHO_SECONDS = 2.0  # a launcher passes on the signal that its processes have got from the scheduler themselves
logger = logging.getLogger(__name__)


class PreemptionCallback(TrainerCallback, ExportableState):
    """Answer a signal to any rank with a checkpoint of all at the end of the optimiser step, and exit with 75.

    An evaluation that is due at that step is left to the run that resumes; the checkpoint is whole also with
    `save_only_model`. A second signal ends the process at once.
    """

    def __init__(self) -> None:
        self.evaluation_due = False
        self._received: tuple[int, float] | None = None  # which signal, and when
        self._preempted = False
        self._handlers: dict[int, Any] = {}

    def state(self) -> dict[str, Any]:
        """Return what transformers keeps in a checkpoint."""
        return {"args": {}, "attributes": {"evaluation_due": self.evaluation_due}}

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse a second answer to the same signal.

        Raises:
            ValueError: If transformers is asked to give one.
        """
        if args.enable_jit_checkpoint:
            raise ValueError(
                "`enable_jit_checkpoint` is not needed: a signal is answered by a checkpoint. Leave it out."
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listen to signals, and have done what the run before had no time for."""
        if threading.current_thread() is threading.main_thread():  # Python delivers signals to no other
            self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}
        if self.evaluation_due:
            args.eval_on_start, self.evaluation_due = True, False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received is None:
            self._received = number, time.monotonic()
        elif time.monotonic() - self._received[1] > ECHO_SECONDS:
            terminate(number, frame)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for the checkpoint and the end, if a signal has reached any rank."""
        number = 0 if self._received is None else self._received[0]
        if global_max(torch.tensor(number, device=args.device)).item():
            self._preempted = control.should_save = control.should_training_stop = True
            self.evaluation_due, control.should_evaluate = control.should_evaluate, False
            args.save_only_model = False  # nothing could go on from the weights alone

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop listening, and leave.

        Raises:
            TerminatedError: If a signal has ended the training.
        """
        for number, handler in self._handlers.items():
            # A launcher signals the others when one process has ended: that must not cut short the end of this one.
            signal.signal(number, signal.SIG_IGN if self._preempted else handler)
        if not self._preempted:
            return
        if state.is_world_process_zero:
            logger.warning(
                f"Stopped by a signal at step {state.global_step}, with a checkpoint in {args.output_dir}. The same "
                "command with `--resume_from_checkpoint true` goes on from there."
            )
        raise TerminatedError(EXIT_CODE)

"""Limits of an update and of a run, beyond which `PPOTrainer` skips steps or goes back to a checkpoint."""

from dataclasses import dataclass, field


@dataclass
class GuardConfig:
    """Limits that the guard of a PPO run keeps."""

    max_update_kl: float | None = field(
        default=None,
        metadata={
            "help": "Largest KL to the policy that sampled a rollout, in nats per token. Beyond it, the other "
            "optimiser steps on this rollout are skipped. 0.05 is a usual limit. Default: none."
        },
    )
    max_kl: float | None = field(
        default=None,
        metadata={
            "help": "Largest KL to the reference, in nats per sequence. Beyond it, the run goes back to a checkpoint "
            "from before, with a lower learning rate. Default: none."
        },
    )
    max_skipped_steps: int = field(
        default=3,
        metadata={
            "help": "Optimiser steps in a row with a loss or gradient that is not finite. Each is skipped. After that "
            "many, the run goes back to its latest checkpoint, with a lower learning rate."
        },
    )
    max_rollbacks: int = field(
        default=3, metadata={"help": "Number of times that a run may go back to a checkpoint. 0: it ends instead."}
    )
    rollback_learning_rate_factor: float = field(
        default=0.5, metadata={"help": "Factor of the learning rates each time that a run goes back."}
    )

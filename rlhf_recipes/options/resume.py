"""Options of a resume, which all trainings share."""

from dataclasses import dataclass, field


@dataclass
class ResumeConfig:
    """Whether a run may resume from the checkpoint of another one."""

    allow_changes_on_resume: bool = field(
        default=False,
        metadata={
            "help": "Resume although models, data or options differ from the checkpoint's. A warning names them."
        },
    )

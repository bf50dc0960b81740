"""Real checkpoints of ZeRO-2 and ZeRO-3 with code hidden in them: two ranks resume, and none runs the code."""

import importlib.util
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from rlhf_recipes.durability.checkpoints import STAGING, publish
from rlhf_recipes.durability.pickles import refuse_code

spec = importlib.util.spec_from_file_location("launches", Path(__file__).with_name("test_launches.py"))
launches = importlib.util.module_from_spec(spec)
spec.loader.exec_module(launches)

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
directory = launches.directory
_inside = launches._inside


class Touch:
    """An object whose pickle creates a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_no_rank_runs_code_of_a_checkpoint(directory, engine):
    launches._launch(directory, engine, "ppo", engine, launches.PPO)
    checkpoint = directory / engine / "checkpoint-4"
    refuse_code(checkpoint)
    mark, resume = directory / f"{engine}-ran", {"resume_from_checkpoint": f"{engine}/checkpoint-4", "max_steps": 8}
    for name in ("model_states", "optim_states"):
        hidden = next(iter(checkpoint.glob(f"*/*{name}.pt")))
        before = hidden.read_bytes()
        torch.save(Touch(mark), hidden)
        _publish_again(directory / engine)
        result = launches._run(directory, engine, "ppo", engine, {**launches.PPO, **resume})
        assert result.returncode == 1
        assert f"may run code when it is loaded: global_step4/{hidden.name} calls" in result.stdout + result.stderr
        assert not mark.exists()
        hidden.write_bytes(before)
    pickle.loads(pickle.dumps(Touch(mark)))
    assert mark.exists(), "the pickle does what it should not"


def _publish_again(output_dir):
    """Write the list of files anew, as an attacker would."""
    staged = output_dir / STAGING / "checkpoint-4"
    shutil.copytree(output_dir / "checkpoint-4", staged)
    publish(staged, output_dir / "checkpoint-4")

"""SIGHUP, the signal of a closed terminal, stops a run as SIGTERM does; a run under `nohup` ignores it."""

import os
import pty
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from threading import Thread

import pytest
from processes import wait_for

LAUNCH = (sys.executable, "-m", "rlhf_recipes.command", "launch")
HELD = """
import os, signal
from rlhf_recipes.durability.termination import signals_held
with signals_held() as received:
    os.kill(os.getpid(), signal.SIGHUP)
print([int(number) for number in received], signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)
"""
RANK = """
import os, signal, sys, time
from pathlib import Path
if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: sys.exit(75))
Path("started").touch()
for _ in range(100):
    time.sleep(0.1)
    if Path("done").exists():
        break
"""


def _ignore():
    """Start a process as `nohup` does."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


@pytest.mark.parametrize(("before", "expected"), [(None, "[1] False"), (_ignore, "[] True")], ids=["alone", "nohup"])
def test_a_process_listens_unless_it_was_started_by_nohup(before, expected):
    result = subprocess.run(
        [sys.executable, "-c", HELD], preexec_fn=before, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == expected


@pytest.mark.recipe
@pytest.mark.parametrize(("before", "code"), [(None, 75), (_ignore, 0)], ids=["alone", "nohup"])
def test_the_launcher_passes_it_on_unless_it_was_started_by_nohup(tmp_path, before, code):
    (tmp_path / "rank.py").write_text(RANK)
    process = subprocess.Popen([*LAUNCH, "--cpu", "rank.py"], cwd=tmp_path, preexec_fn=before, env={**os.environ})
    wait_for(tmp_path / "started")
    process.send_signal(signal.SIGHUP)
    if before is not None:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        (tmp_path / "done").touch()
    assert process.wait(60) == code


TRAIN = """
import sys, time
sys.path.insert(0, TESTS)
import tiny
from pathlib import Path
from transformers import TrainerCallback
from rlhf_recipes.durability.preemption import PreemptionCallback

class Slow(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        Path("started").touch()
        time.sleep(0.2)

trainer = tiny.reward_trainer("out", max_steps=100, disable_tqdm=False)
for callback in (PreemptionCallback(), Slow()):
    trainer.add_callback(callback)
trainer.train()
"""


@pytest.mark.recipe
def test_a_closed_terminal_stops_a_run_as_any_signal_does(tmp_path):
    """Each write to that terminal fails from then on, also the write of a progress bar."""
    (tmp_path / "train.py").write_text(TRAIN.replace("TESTS", repr(str(Path(__file__).parents[1]))))
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(tmp_path)
        os.execv(sys.executable, [sys.executable, "train.py"])
    Thread(target=_drain, args=(terminal,), daemon=True).start()
    wait_for(tmp_path / "started")
    os.close(terminal)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 75
    assert [path.name for path in (tmp_path / "out").glob("*checkpoint*")] != []


def _drain(terminal):
    with suppress(OSError):
        while os.read(terminal, 4096):
            pass

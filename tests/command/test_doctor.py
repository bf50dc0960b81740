"""`rlhf doctor` names what is missing, and ends with 0 only if training can run."""

import socket
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

from rlhf_recipes.command import doctor


def _report(capsys):
    with pytest.raises(SystemExit) as end:
        doctor.main([])
    return int(end.value.code), capsys.readouterr().out


def _line(report, subject):
    (line,) = [line for line in report.splitlines() if line[6:].startswith(subject)]
    return line


@pytest.fixture
def healthy(monkeypatch, tmp_path):
    """A machine with enough of everything."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    memory = SimpleNamespace(available=8e9, total=16e9)
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=5e9))
    return memory


def test_a_machine_where_training_can_run(healthy, capsys, tmp_path):
    code, report = _report(capsys)
    assert code == 0
    assert report.endswith("Training can run here.\n")
    assert "FAILS" not in report
    assert "torch 2." in _line(report, "Packages")
    assert "8.0 GB of 16.0 GB free" in _line(report, "Memory")
    assert f"5.0 GB free in {tmp_path}" in _line(report, "Disk")
    assert _line(report, "Tracking store").endswith("sqlite:///mlflow.db")


def test_too_little_memory(healthy, capsys):
    healthy.available = 1e9
    code, report = _report(capsys)
    assert code == 1
    assert _line(report, "Memory").startswith("FAILS")
    assert report.endswith("Training cannot run here: 1 FAILS.\n")


def test_too_little_disk(healthy, capsys, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=1e9))
    code, report = _report(capsys)
    assert (code, _line(report, "Disk")[:5]) == (1, "FAILS")


def test_missing_and_old_packages(healthy, capsys, monkeypatch):
    needed = {"": ["torch>=99", "nosuch>=1", "numpy>=2"], "vllm": ["alsonone"]}
    monkeypatch.setattr(doctor, "requirements", lambda extra="": [*map(Requirement, needed.get(extra, []))])
    code, report = _report(capsys)
    assert code == 1
    assert "torch>=99 is needed, 2." in _line(report, "Packages")
    assert "nosuch is missing: run `pip install rlhf-recipes`" in _line(report, "Packages")
    assert "`use_vllm`): alsonone is missing; `pip install 'rlhf-recipes[vllm]'`" in _line(report, "[vllm]")


def test_the_extras_are_those_of_the_package():
    assert {needed.name for needed in doctor.requirements("vllm")} == {"vllm"}
    assert {"torch", "trl"} <= {needed.name for needed in doctor.requirements()}
    assert not {"vllm", "pytest"} & {needed.name for needed in doctor.requirements()}
    assert all(doctor.requirements(extra) for extra in doctor.EXTRAS)


def test_a_store_that_answers_and_one_that_does_not(healthy, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://me:secret@127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        report = _report(capsys)[1]
        assert _line(report, "Tracking store") == f"ok    Tracking store  http://{address[17:]} answers"
    code, report = _report(capsys)
    assert code == 0  # a run keeps its records until the server is back
    assert _line(report, "Tracking store").startswith(f"note  Tracking store  http://{address[17:]} does not answer")
    assert "secret" not in report


@pytest.mark.parametrize(("available", "expected"), [(False, "note  CUDA"), (True, "ok    CUDA")])
def test_torch_is_asked_about_a_gpu_that_the_driver_knows(healthy, capsys, monkeypatch, available, expected):
    cuda = SimpleNamespace(is_available=lambda: available, is_bf16_supported=lambda: True, device_count=lambda: 1)
    torch = SimpleNamespace(cuda=cuda, version=SimpleNamespace(cuda="13.0"), __version__="2.13.0")
    monkeypatch.setattr(doctor, "import_module", lambda name: torch)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    answer = "NVIDIA H100, 81559 MiB, 580.65.06\n"
    monkeypatch.setattr(doctor.subprocess, "run", lambda *args, **kwargs: SimpleNamespace(stdout=answer))
    code, report = _report(capsys)
    assert (code, _line(report, "GPU")) == (0, "ok    GPU             NVIDIA H100, 81559 MiB, 580.65.06")
    assert _line(report, "CUDA").startswith(expected)

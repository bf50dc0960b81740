"""A training that chooses neither device nor precision gets those of the machine."""

import pytest

from rlhf_recipes.options import machine
from rlhf_recipes.options.machine import fit_to_machine, said
from rlhf_recipes.options.packages import check_packages

KINDS = {"none": (False, False), "old": (True, False), "new": (True, True)}  # whether there is a GPU, with bfloat16


@pytest.fixture
def on(monkeypatch):
    """Return a function that chooses the GPU of this machine."""

    def choose(kind):
        has_gpu, has_bf16 = KINDS[kind]
        monkeypatch.setattr(machine, "_has_gpu", lambda: has_gpu)
        monkeypatch.setattr(machine, "is_torch_bf16_gpu_available", lambda: has_bf16)
        monkeypatch.setattr(machine, "is_torch_xla_available", lambda: False)

    return choose


def _options(use_cpu=None, bf16=None, fp16=False):
    return {"use_cpu": use_cpu, "bf16": bf16, "fp16": fp16}


@pytest.mark.parametrize(
    ("gpu", "asked", "chosen", "line"),
    [
        ("none", {}, {"use_cpu": True, "bf16": False}, "There is no GPU here"),
        ("none", {"use_cpu": True}, {"use_cpu": True, "bf16": False}, "`use_cpu` is set"),
        ("none", {"bf16": False}, {"use_cpu": False}, None),
        ("none", {"use_cpu": True, "bf16": True}, {"use_cpu": True}, None),
        ("none", {"fp16": True}, {"use_cpu": False}, None),
        ("old", {}, {"use_cpu": False, "bf16": False}, "This GPU has no bfloat16"),
        ("old", {"fp16": True}, {"use_cpu": False}, None),
        ("new", {}, {"use_cpu": False}, None),
        ("new", {"use_cpu": True}, {"use_cpu": True, "bf16": False}, "`use_cpu` is set"),
        ("new", {"bf16": True}, {"use_cpu": False}, None),
    ],
)
def test_what_is_chosen_is_said(on, gpu, asked, chosen, line):
    on(gpu)
    options = _options(**asked)
    assert fit_to_machine(options) == chosen
    assert (said(options, chosen) or "").startswith(line or "") is True
    assert (said(options, chosen) is None) is (line is None)


@pytest.mark.parametrize(
    ("gpu", "asked", "message"),
    [
        ("none", {"use_cpu": False}, "`use_cpu: false` asks for a GPU"),
        ("none", {"bf16": True}, "because it has no GPU. Leave it out .* or add `use_cpu: true`"),
        ("old", {"bf16": True}, "this GPU does not have. Leave it out .* or set `fp16: true`"),
    ],
)
def test_what_the_machine_lacks_is_refused(on, gpu, asked, message):
    on(gpu)
    with pytest.raises(ValueError, match=message):
        fit_to_machine(_options(**asked))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"report_to": ["paper"]}, "`report_to` names paper, which is no tracker. The trackers are .*mlflow"),
        ({"report_to": ["neptune"]}, "`report_to` names neptune, which is not installed"),
        ({"load_in_4bit": True}, r"`load_in_4bit` needs .* `pip install 'rlhf-recipes\[quantization\]'`"),
    ],
)
def test_a_package_that_is_missing(monkeypatch, options, message):
    monkeypatch.setattr("rlhf_recipes.options.packages.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message):
        check_packages(options)
    check_packages({"report_to": [], "load_in_4bit": False})

"""Every name becomes one that MLflow takes, and different names stay different."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_metric_name, _validate_param_name, _validate_tag

from rlhf_recipes.tracking.names import Names, by_clean_name, clean_name, model_name

names = st.text(max_size=12) | st.text(alphabet="ab./(=%é ", max_size=8) | st.text(min_size=245, max_size=300)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rm (lr=1e-5)/win_rate", "rm _lr_1e-5_/win_rate"),
        ("100%/gain", "100_/gain"),
        ("../up", "_/up"),
        ("/absolute", "_/absolute"),
        ("a//b/", "a/_/b/_"),
        ("a/./b", "a/_/b"),
        ("..hidden", "__hidden"),
        ("", "_"),
        ("Güte\n", "G_te_"),
        ("objective/kl", "objective/kl"),
        ("a b-c.d:e_f/0", "a b-c.d:e_f/0"),
    ],
)
def test_what_becomes_of_a_name(name, expected):
    assert clean_name(name) == expected


@given(names)
def test_mlflow_takes_the_name(name):
    clean = clean_name(name)
    for validate in (_validate_metric_name, _validate_param_name):
        validate(clean)
    assert _validate_tag(clean, "x").key == clean
    assert 0 < len(clean) <= 250
    assert clean_name(clean) == clean


@given(st.lists(names, unique=True, max_size=6), st.integers(1, 3))
def test_different_names_stay_different(many, size):
    """They may come one after another, as in the logs of a run."""
    run = Names()
    clean = {}
    for start in range(0, len(many), size):
        clean |= run(many[start : start + size])
    assert len(set(clean.values())) == len(many)
    assert run(many) == clean, "a name has the same clean name at every step"


def test_a_name_that_mlflow_takes_keeps_it():
    clean = Names()(["a(b", "a_b", "a[b"])
    assert clean["a_b"] == "a_b"
    assert all(re.fullmatch(r"a_b_[0-9a-f]{8}", clean[name]) for name in ("a(b", "a[b"))
    assert by_clean_name({"a(b": 1, "c": 2}) == {"a_b": 1, "c": 2}


def test_long_names_that_begin_alike():
    clean = Names()(["x" * 300, "x" * 301])
    assert len(set(clean.values())) == 2


def test_a_directory_as_a_model():
    assert model_name("ppo-1.5 (b)") == "ppo-1_5__b_"

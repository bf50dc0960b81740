"""The page about reward models holds what was measured, needs no network, and shows every name as text."""

import re

import numpy as np
import pytest
from datasets import Dataset

from rlhf_recipes.comparison.reward_model_report import plain, write_reward_model_report
from rlhf_recipes.data.preferences import PreferenceSet
from rlhf_recipes.evaluation.best_of_answers import curve_of
from rlhf_recipes.evaluation.evaluated_models import Evaluated, Evaluation, reward_models_verdict
from rlhf_recipes.evaluation.reward_models import compare, rank

HOSTILE = "<script>alert(1)</script>|`a` *b* [c](d) {{ 7 * 6 }}"


@pytest.fixture
def evaluation():
    rng = np.random.default_rng(0)
    rows = Dataset.from_dict({"prompt": ["p"] * 40})
    preferences = PreferenceSet(rows, [["a"]] * 40, [["bb"]] * 40, [HOSTILE, "plain"] * 20)
    judged = {"gold": rng.normal(size=(10, 4))}
    models = {}
    for name, shift in (("one", 2.0), ("other", 0.0)):
        scores = [np.array([shift, 0.0]) + rng.normal(size=2) for _ in range(40)]
        models[name] = Evaluated(f"runs/{name}", rank(preferences, scores), curve_of(rng.normal(size=(10, 4)), judged))
    compared = compare({name: model.ranking for name, model in models.items()})
    return Evaluation(models, compared, {"gold": curve_of(judged["gold"], judged)["gold"]})


def test_the_page(evaluation, tmp_path):
    files = write_reward_model_report(evaluation, HOSTILE, reward_models_verdict(evaluation), tmp_path)
    names = [file.name for file in files]
    assert names == ["report.md", "report.html", "calibration.png", "categories.png", "best_of_n_1.png"]
    assert all(file.stat().st_size > 1_000 for file in files)
    text, page = (file.read_text() for file in files[:2])
    assert re.search(r"^\| accuracy \| 0\.\d+ \(0\.\d+ to [01]\.\d+\) \| 0\.\d+ ", text, re.MULTILINE)
    assert re.search(r"^\| one over other \| 0\.\d+ \(0\.\d+ to 0\.\d+\) \| one \|", text, re.MULTILINE)
    assert "| 42 |" not in text
    assert page.count("data:image/png;base64,") == 3
    assert page.count("<table>") == 5
    assert "<script" not in page
    assert "alert(1)" in page
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_plain_text_has_no_marks():
    assert plain("a|b *c*\n`d`") == r"a\|b \*c\* \`d\`"

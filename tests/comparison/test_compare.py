"""`recipes/compare.py` writes a page with figures and an answer, and refuses wrong input."""

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib import image
from processes import free_port, mlflow_server, run_command
from tracked_experiments import (
    evaluation_metrics,
    evaluation_rows,
    learning_curves,
    log_evaluation,
    log_ppo_run,
)

from rlhf_recipes.comparison.plots import COLOURS, GRID, INK
from rlhf_recipes.comparison.ranking import group_runs, rank_groups
from rlhf_recipes.comparison.report import write_report
from rlhf_recipes.comparison.runs import read_experiment

pytestmark = pytest.mark.recipe

ROOT = Path(__file__).parents[2]
HOSTILE = "</p><script>alert(1)</script>&amp; {{ 7 * 6 }} `code`"


def _compare(directory, *arguments, fails=False):
    result = run_command(ROOT / "recipes" / "compare.py", *arguments, directory=directory)
    assert (result.returncode != 0) is fails, result.stdout[-3000:] + result.stderr[-6000:]
    return result


class _Page(HTMLParser):
    """Read a page like a browser: tags in order, their attributes, the text without markup and style."""

    VOID = {"meta", "img", "br", "link", "input", "hr"}

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(html)
        assert self.open == [], "every tag is closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


def _report(experiment, uri, directory, num_shown=4):
    groups, differing = group_runs(read_experiment(experiment, [], uri))
    path = write_report(experiment, groups, differing, rank_groups(groups), directory, num_shown)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def store(tmp_path_factory, empty_store):
    """Return a directory with the default store of the recipe: experiment `sweep`, three times two runs."""
    directory = tmp_path_factory.mktemp("compare")
    shutil.copy(empty_store, directory)
    uri = f"sqlite:///{directory}/mlflow.db"
    for number, kl_coef in enumerate((0.02, 0.05, 0.2)):
        for seed in (0, 1):
            curves = learning_curves(10 * number + seed, gain=2.4 - 0.6 * number)
            run = log_ppo_run(uri, "sweep", curves, {"kl_coef": kl_coef}, seed=seed)
            rows = evaluation_rows(10 * number + seed, 1.0 - 0.5 * number, answer=HOSTILE)
            log_evaluation(uri, "sweep", run, rows, evaluation_metrics(0.7 - 0.1 * number))
    return directory, uri


@pytest.fixture(scope="module")
def page(store):
    return _report("sweep", store[1], store[0] / "report")


def test_the_recipe_writes_the_report_and_says_what_it_found(store):
    result = _compare(store[0], "--experiment", "sweep")
    output = store[0] / "runs" / "compare"
    assert {path.name for path in output.iterdir()} == {"report.html", "frontier.png", "curves.png"}
    answer = "Best at equal KL: A (kl_coef 0.02)"
    assert answer in result.stdout
    assert answer in (output / "report.html").read_text(encoding="utf-8")
    assert str(output / "report.html") in result.stdout
    assert "Traceback" not in result.stderr
    assert "Downloading" not in result.stderr


def test_the_page_needs_no_network_and_runs_nothing(page):
    parsed = _Page(page)
    names = {tag for tag, _ in parsed.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "img"}
    # The names of SVG's own vocabularies are addresses that nothing loads.
    namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\s\"'<)]+", page)) <= namespaces
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_what_a_model_says_is_no_markup(page):
    parsed = _Page(page)
    assert HOSTILE in parsed.text
    assert "<script>" not in page


def test_hostile_names_and_options_stay_text(store, tmp_path):
    rows = [row | {"prompt": [{"role": "user", "content": HOSTILE}]} for row in evaluation_rows(0, 1.0, prompts=3)]
    for lam in (0.9, 1.0):
        run = log_ppo_run(
            store[1],
            "<b>hostile</b>",
            learning_curves(0),
            {"lam": lam, "separator": rf"$\frac$ {lam} {HOSTILE}"},
            name=HOSTILE,
        )
        log_evaluation(store[1], "<b>hostile</b>", run, rows, {})
    page = _report("<b>hostile</b>", store[1], tmp_path)
    assert "<script>" not in page
    assert "<b>" not in page
    text = _Page(page).text
    assert "<b>hostile</b>" in text
    assert f"user: {HOSTILE}" in text


def test_the_page_is_accessible(page):
    parsed = _Page(page)
    assert parsed.all("html") == [{"lang": "en"}]
    figures = [attributes for attributes in parsed.all("div") if attributes.get("role") == "img"]
    assert len(figures) == 6, "the frontier and five curves"
    assert all(len(attributes["aria-label"]) > 20 for attributes in figures)
    assert parsed.all("th")
    assert all(attributes.get("scope") in ("row", "col") for attributes in parsed.all("th"))
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids)), "the figures do not share ids"
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', page))
    assert used
    assert used <= set(ids)


def test_figures_follow_the_colours_of_the_page(page):
    figures = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert "currentColor" in figures
    assert "var(--group2)" in figures
    assert not [colour for colour in (*COLOURS, INK, GRID) if colour in figures]
    assert set(re.findall(r"var\((--[\w-]+)\)", page)) <= set(re.findall(r"(--[\w-]+):", page))
    assert "prefers-color-scheme: dark" in page


def test_figures_are_files_too(page, store):
    for name in ("frontier.png", "curves.png"):
        pixels = image.imread(store[0] / "report" / name)
        assert pixels.shape[1] > 500
        assert pixels[0, 0].tolist() == [1.0, 1.0, 1.0, 1.0], "white, not transparent"
        assert pixels.min() < 0.5


def test_the_page_shows_every_part(page):
    text = " ".join(_Page(page).text.split())
    for part in (
        "6 runs in 3 configurations",
        "Best at equal KL: A (kl_coef 0.02)",
        "gold_score 0.70 [0.64, 0.76]",  # of the runs
        "1,000 tokens/s",
        "machine 3.4 GB",
        "Judge: gold_score",
        "Share of up to 24 common prompts",
        "What differs",
        "Question 18: what is a river?",
    ):
        assert part in text, part
    assert "Alarms" not in text


def test_a_report_is_the_same_twice(page, store, tmp_path):
    assert _report("sweep", store[1], tmp_path) == page


def test_runs_without_evaluation_or_numbers(store, tmp_path):
    log_ppo_run(store[1], "bare", {}, {}, status="FAILED")
    page = _report("bare", store[1], tmp_path)
    text = _Page(page).text
    assert "nothing to rank" in text
    assert "not evaluated" in text
    assert "No evaluation of these runs has recorded completions" in text
    assert not list(tmp_path.glob("*.png")), "nothing to draw"


def test_runs_of_different_length_that_count_no_samples(store, tmp_path):
    for seed, points in ((0, 40), (1, 25)):
        curves = learning_curves(seed, points=points)
        del curves["episode"], curves["val/explained_variance"]
        log_ppo_run(store[1], "old", curves, {}, seed=seed, status="FAILED" if points == 25 else "FINISHED")
    text = _Page(_report("old", store[1], tmp_path)).text
    assert "The axis counts optimiser steps" in text
    assert "explained variance" not in text, "a metric that no run has logged has no panel"
    assert "Not ranked: A1 (failed)" in text


def test_alarms_are_on_the_page(store, tmp_path):
    log_ppo_run(store[1], "hacked", learning_curves(0, rising_length=1.0), {})
    text = " ".join(_Page(_report("hacked", store[1], tmp_path)).text.split())
    assert "Alarms A: The score rises (" in text


def test_a_refusal_is_one_line(store):
    result = _compare(store[0], "--experiment", "no-such", fails=True)
    last = result.stderr.strip().splitlines()[-1]
    assert re.fullmatch(r"Error: `experiment` 'no-such' is not in sqlite:.*, which has: .*sweep.*", last)
    assert "Traceback" not in result.stderr


@pytest.fixture
def server(tmp_path, empty_store):
    """The address of a tracking server."""
    shutil.copy(empty_store, tmp_path)
    port = free_port()
    with mlflow_server(tmp_path, port):
        yield f"http://127.0.0.1:{port}"


def test_a_tracking_server(server, tmp_path):
    run = log_ppo_run(server, "remote", learning_curves(0), {})
    log_evaluation(server, "remote", run, evaluation_rows(0, 1.0), evaluation_metrics())
    page = _report("remote", server.replace("http://", "http://ann:secret@"), tmp_path)
    links = [attributes["href"] for attributes in _Page(page).all("a")]
    assert len(links) == 1
    assert re.fullmatch(rf"{server}/#/experiments/\d+/runs/{run}", links[0])
    assert "secret" not in page
    assert "Judge: gold_score" in page
    assert not (tmp_path / "mlruns").exists(), "artifacts came through the server"

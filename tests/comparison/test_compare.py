"""`recipes/compare.py` writes a page with charts and an answer, and refuses wrong input."""

import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs
from processes import free_port, mlflow_server, run_command
from tracked_experiments import (
    evaluation_metrics,
    evaluation_rows,
    learning_curves,
    log_evaluation,
    log_ppo_run,
)

from rlhf_recipes.comparison.groups import group_runs
from rlhf_recipes.comparison.report import write_report
from rlhf_recipes.comparison.runs import read_experiment
from rlhf_recipes.comparison.verdict import decide

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
        self.open, self.tags, self.text, self.scripts = [], [], "", []
        self.feed(html)
        assert self.open == [], "every tag is closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.scripts += [""] if tag == "script" else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" in self.open:
            self.scripts[-1] += data
        elif "style" not in self.open:
            self.text += data

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


def _report(experiment, uri, directory, num_shown=4):
    groups, differing = group_runs(read_experiment(experiment, [], uri))
    path = write_report(experiment, groups, differing, decide(groups), directory, num_shown)
    return path.read_text(encoding="utf-8")


def _own(page):
    """Return the page without the embedded library."""
    library = get_plotlyjs()
    assert page.count(library) <= 1
    return page.replace(library, "")


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
    assert {path.name for path in output.iterdir()} == {"report.html"}
    for answer in ("A (kl_coef 0.02) is ahead on held-out prompts", "1 more seed of each of A, B, C"):
        assert answer in result.stdout
        assert answer in (output / "report.html").read_text(encoding="utf-8")
    assert str(output / "report.html") in result.stdout
    assert "Traceback" not in result.stderr
    assert "Downloading" not in result.stderr


def test_the_page_needs_no_network_and_runs_only_its_own_scripts(page):
    """The policy of the page allows the hash of each script, and no address. A script in some text cannot run."""
    parsed = _Page(page)
    names = {tag for tag, _ in parsed.tags}
    assert not names & {"link", "iframe", "object", "embed", "img"}
    # The names of SVG's own vocabularies are addresses that nothing loads.
    namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\s\"'<)]+", _own(page))) <= namespaces
    assert "@import" not in _own(page)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", _own(page)))
    (policy,) = [meta["content"] for meta in parsed.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; base-uri 'none'; form-action 'none'; ")
    data, *scripts = parsed.scripts
    assert parsed.all("script") == [{"type": "application/json", "id": "figures"}, {}, {}]
    allowed = re.search(r"script-src (.*)$", policy)[1].split()
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert allowed == [f"'sha256-{digest}'" for digest in hashes]
    assert scripts[0] == get_plotlyjs()
    assert json.loads(data)


def test_the_charts_send_nothing_away(page):
    """plotly.js has a button that uploads a figure. The page switches it off, and names no server."""
    script = _Page(page).scripts[-1]
    assert "showSendToCloud: false" in script
    assert 'plotlyServerURL: ""' in script


def test_what_a_model_says_is_no_markup(page):
    parsed = _Page(page)
    assert HOSTILE in parsed.text
    assert "alert(1)" not in "".join(parsed.scripts)


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
    parsed = _Page(page)
    assert len(parsed.all("script")) == 3
    assert not parsed.all("b")
    assert "<" not in parsed.scripts[0], "no text of the data can end it"
    labels = {trace["meta"].get("label", "") for figure in json.loads(parsed.scripts[0]) for trace in figure["data"]}
    assert any("&lt;script&gt;" in label for label in labels), "at the pointer, plotly.js reads tags"
    assert not any("<" in label for label in labels)
    text = parsed.text
    assert "<b>hostile</b>" in text
    assert f"user: {HOSTILE}" in text


def test_the_page_is_accessible(page):
    parsed = _Page(page)
    assert parsed.all("html") == [{"lang": "en"}]
    figures = [attributes for attributes in parsed.all("div") if attributes.get("role") == "img"]
    assert len(figures) == 7, "the frontier, the win rates and five curves"
    assert all(len(attributes["aria-label"]) > 20 for attributes in figures)
    assert parsed.all("th")
    assert all(attributes.get("scope") in ("row", "col") for attributes in parsed.all("th"))
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids)), "the figures do not share ids"
    switches = [attributes for attributes in parsed.all("button") if "data-group" in attributes]
    assert [(switch["data-group"], switch["aria-pressed"]) for switch in switches] == [
        (str(n), "true") for n in range(3)
    ]
    assert len([attributes for attributes in parsed.all("div") if attributes.get("role") == "region"]) >= 6


def test_the_charts_are_figures_that_plotly_knows(page):
    """`plotly.graph_objects` refuses a property or a value that plotly.js does not have."""
    figures = json.loads(_Page(page).scripts[0])
    assert [figure["title"] for figure in figures[:3]] == [
        "Score of the training against KL", "Win rate by gold_score against KL", "score (raw)",
    ]  # fmt: skip
    in_colour = json.loads(re.sub(r'"var\(--\w+\)"', '"#123456"', json.dumps(figures)))
    for figure in in_colour:
        go.Figure(data=figure["data"], layout=figure["layout"])
        assert {trace["meta"]["group"] for trace in figure["data"]} >= {0, 1, 2}


def test_the_win_rates_of_the_chart_have_the_intervals_of_the_table(page):
    figure = json.loads(_Page(page).scripts[0])[1]
    text = " ".join(_Page(page).text.split())
    for trace in figure["data"]:
        (share,), (above,), (below,) = trace["y"], trace["error_y"]["array"], trace["error_y"]["arrayminus"]
        assert f"{share:.2f} [{share - below:.2f}, {share + above:.2f}]" in text


def test_figures_follow_the_colours_of_the_page(page):
    figures = _Page(page).scripts[0]
    assert '"var(--group2)"' in figures
    assert not re.findall(r'"#[0-9a-f]{3,8}"', figures)
    assert set(re.findall(r"var\((--[\w-]+)\)", _own(page))) - {"--"} <= set(re.findall(r"(--[\w-]+):", _own(page)))
    assert "prefers-color-scheme: dark" in _own(page)


def test_runs_of_a_group_fold(page):
    parsed = _Page(page)
    groups = [attributes for attributes in parsed.all("details") if attributes.get("class") == "card"]
    assert groups == [{"class": "card"}] * 3, "closed at first"
    assert parsed.text.count("Other runs of the groups (3)") == 4, "of each prompt"


def test_the_page_shows_every_part(page):
    text = " ".join(_Page(page).text.split())
    for part in (
        "6 runs in 3 configurations",
        "No winner: A (kl_coef 0.02) is ahead on held-out prompts",
        "What a winner still needs: 1 more seed of each of A, B, C",
        "Not told apart from it",
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
    assert not _Page(page).all("script"), "nothing to draw"


def test_runs_of_different_length_that_count_no_samples(store, tmp_path):
    for seed, points in ((0, 40), (1, 25)):
        curves = learning_curves(seed, points=points)
        del curves["episode"], curves["val/explained_variance"]
        log_ppo_run(store[1], "old", curves, {}, seed=seed, status="FAILED" if points == 25 else "FINISHED")
    page = _Page(_report("old", store[1], tmp_path))
    text = page.text
    assert json.loads(page.scripts[0])[-1]["layout"]["xaxis"]["title"]["text"] == "optimiser step"
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

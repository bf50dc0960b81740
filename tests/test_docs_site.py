"""The documentation as a site: it builds without a warning, and a browser needs no network for it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from documents import ROOT


@pytest.mark.slow  # `make docs` builds the same site in CI
def test_the_site_is_whole_and_needs_no_network(tmp_path):
    command = [Path(sys.executable).with_name("mkdocs"), "build", "--strict", "--site-dir", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    pages = {path.name: path.read_text() for path in tmp_path.rglob("*.html")}
    assert {f"{page.stem}.html" for page in (ROOT / "docs").glob("*.md")} - {"README.html"} <= pages.keys()
    for name, text in pages.items():
        assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"?(?:https?:)?//[^>]+", text), name
    formulas = (ROOT / "docs/how-ppo-works.md").read_text().count("```math")
    assert (
        pages["how-ppo-works.html"].count('<math xmlns="http://www.w3.org/1998/Math/MathML" display="block"')
        == formulas
    )
    assert "Completions per prompt. PPO needs no group" in pages["reference.html"]
    found = json.loads((tmp_path / "search" / "search_index.json").read_text())["docs"]
    assert any(entry["title"] == "The KL explodes" for entry in found)

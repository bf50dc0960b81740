"""Links out of `docs/` on the site: a hook of MkDocs.

The pages link to files of the repository by relative paths, so that the links work in plain files. The site gets a
page for each such file under `repository/`: Markdown and notebooks as text, anything else as code.
"""

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

# The target of a link, without its anchor. Addresses and anchors of the same page do not match.
LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)\s#]+)")
HOME = "repository"


def on_files(files: Files, config: Any) -> Files:
    """Add the files outside of `docs/` that a page links to, and those that these link to."""
    waiting = [*files.documentation_pages()]
    while waiting:
        page = waiting.pop()
        for path in (_target(page.src_uri, link) for link in LINK.findall(page.content_string)):
            if files.get_file_from_path(_uri(path)) is None and Path(path).is_file():
                files.append(File.generated(config, _uri(path), content=_content(Path(path))))
                waiting.append(files.get_file_from_path(_uri(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point the links of a page to the places that the files have on the site."""
    uri = page.file.src_uri
    return LINK.sub(lambda link: posixpath.relpath(_uri(_target(uri, link[1])), posixpath.dirname(uri)), markdown)


def _target(uri: str, link: str) -> str:
    """Return the path in the repository that a link on a page leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(_path(uri)), link))


def _content(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
        return "\n\n".join(source if kind == "markdown" else _code(source) for kind, source in cells)
    return text if path.suffix == ".md" else f"# {path.name}\n\n`{path}`\n\n{_code(text)}"


def _code(text: str) -> str:
    return f"~~~~~python\n{text}\n~~~~~"


def _path(uri: str) -> str:
    """Return the path in the repository of a page of the site."""
    outside = uri.removeprefix(f"{HOME}/")
    return f"docs/{uri}" if outside == uri else re.sub(r"(\.\w+)\.md$", r"\1", outside)


def _uri(path: str) -> str:
    """Return the place on the site of a file of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{HOME}/{path}" if path.endswith(".md") else f"{HOME}/{path}.md"

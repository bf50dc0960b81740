"""Formulas of the site as MathML, which browsers show without a script: a hook of MkDocs."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r"\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
HOLDER = re.compile(r'(<(span|div) class="arithmatex">)(.*?)(</\2>)', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Replace the LaTeX of each formula."""
    return HOLDER.sub(lambda holder: holder[1] + FORMULA.sub(_mathml, holder[3]) + holder[4], content)


def _mathml(formula: re.Match[str]) -> str:
    inline, block = formula.groups()
    return convert(html.unescape(inline or block), display="inline" if inline else "block")

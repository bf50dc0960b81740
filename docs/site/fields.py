"""Options in the reference: an extension of Griffe.

An option is a field of a dataclass. Its default and its help are in a call of `field`, which reads badly on a page.
"""

import ast
from typing import Any

from griffe import Attribute, Docstring, Extension


class Fields(Extension):
    """Show the default of a field as its value, and its help as its docstring."""

    def on_attribute_instance(self, *, node: Any, attr: Attribute, **_: Any) -> None:
        """Read the call of `field` from the source, without importing it."""
        call = getattr(node, "value", None)
        if not isinstance(call, ast.Call) or getattr(call.func, "id", "") != "field":
            return
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        if "default" in given:
            attr.value = ast.unparse(given["default"])
        else:
            attr.value = "[]" if ast.unparse(given.get("default_factory", call)) == "list" else None
        attr.docstring = Docstring(_help(given.get("metadata")), parent=attr)


def _help(metadata: Any) -> str:
    """Return the help in the dictionary of a field's `metadata`, as the user sees it."""
    return "" if metadata is None else ast.literal_eval(metadata)["help"].replace("%%", "%")

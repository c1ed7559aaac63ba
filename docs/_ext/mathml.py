"""Formulas as MathML, which browsers draw without a script from elsewhere."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator


def visit(writer: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    """Writes a formula."""
    block = isinstance(node, nodes.math_block)
    tag = "div" if block else "span"
    writer.body.append(writer.starttag(node, tag, "", CLASS="math"))
    writer.body.append(f"{tex2mathml(node.astext(), as_block=block)}</{tag}>")
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Adds the renderer."""
    app.add_html_math_renderer("mathml", (visit, None), (visit, None))
    return {"parallel_read_safe": True}

"""Links that leave docs/ lead to the repository; what they name has to be in the tree.

On GitHub ``[reference](../python/flatstep/reference.py)`` is right as it stands. On the site it
names the repository, or the page that includes the file, such as the changelog.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urldefrag

from markdown_it.tree import SyntaxTreeNode
from myst_parser.config.main import MdParserConfig
from myst_parser.mdit_to_docutils.base import compute_unique_slug
from myst_parser.mdit_to_docutils.sphinx_ import SphinxRenderer
from myst_parser.parsers import sphinx_
from myst_parser.parsers.mdit import create_md_parser
from myst_parser.warnings_ import MystWarnings
from sphinx.application import Sphinx

DOCS = Path(__file__).parents[1]
ROOT = DOCS.parent
PAGES = {ROOT / name.upper(): DOCS / name for name in ("CHANGELOG.md", "CONTRIBUTING.md")}


@cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    parser = create_md_parser(MdParserConfig(), SphinxRenderer)
    found: set[str] = set()
    for node in SyntaxTreeNode(parser.parse(page.read_text(encoding="utf-8"))).children:
        if node.type == "heading":
            found.add(compute_unique_slug(node, found))
    return found


class Renderer(SphinxRenderer):
    """MyST's, but for links to files of the repository."""

    def render_link_unknown(self, token: SyntaxTreeNode) -> None:
        """Renders a link without a scheme."""
        path, anchor = urldefrag(self.md.normalizeLinkText(str(token.attrGet("href"))))
        if path:
            target = (Path(self.document["source"]).parent / path).resolve()
            page = PAGES.get(target, target)
            if page.is_relative_to(DOCS) and page.suffix == ".md":
                here = Path(self.sphinx_env.doc2path(self.sphinx_env.docname)).parent
                token.attrs["href"] = os.path.relpath(page, here) + f"#{anchor}" * bool(anchor)
            else:
                self._check(token, target, anchor)
                within = target.relative_to(ROOT).as_posix()
                kind = "tree" if target.is_dir() else "blob"
                base = f"{self.sphinx_env.config.repository}/{kind}/main/{within}"
                token.attrs["href"] = base + f"#{anchor}" * bool(anchor)
                return self.render_link_url(token)
        return super().render_link_unknown(token)

    def _check(self, token: SyntaxTreeNode, target: Path, anchor: str) -> None:
        if not target.exists():
            wrong = f"no such file: {target}"
        elif anchor and (target.suffix != ".md" or anchor not in anchors(target)):
            wrong = f"{target} has no heading #{anchor}"
        else:
            return
        self.create_warning(wrong, MystWarnings.XREF_MISSING, line=token.map and token.map[0] + 1)


def setup(app: Sphinx) -> dict[str, Any]:
    """Puts the renderer in place of MyST's."""
    app.add_config_value("repository", "", "env", str)
    sphinx_.SphinxRenderer = Renderer
    return {"parallel_read_safe": True}

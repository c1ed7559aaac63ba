"""The directive ``command``: what a command of ``flatstep`` says of itself, and its options."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from typer import Context
from typer.main import get_command

from flatstep.cli import application


class Command(SphinxDirective):
    """A command's help, and each of its parameters with an anchor of its own."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Renders the help as Markdown."""
        name = self.arguments[0]
        command = get_command(application()).commands[name]
        context = Context(command)
        usage = " ".join(["flatstep", name, *command.collect_usage_pieces(context)])
        lines = ["```text", usage, "```", "", *_marked(command.help).splitlines(), ""]
        lines += [f":::{{program}} flatstep {name}", ":::"]
        for parameter in command.get_params(context):
            names, text = parameter.get_help_record(context) or ("", "")
            lines += [f":::{{option}} {names.replace(' / ', ', ')}", _marked(text), ":::"]
        found = nodes.container()
        self.state.nested_parse(StringList(lines, source=command.name), 0, found)
        return found.children


def _marked(text: str) -> str:
    """The text with the options that it names as code."""
    return re.sub(r"(?<![\w`-])--[a-z][a-z-]*", r"`\g<0>`", text)


def setup(app: Sphinx) -> dict[str, Any]:
    """Adds the directive."""
    app.add_directive("command", Command)
    return {"parallel_read_safe": True}

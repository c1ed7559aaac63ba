"""How Sphinx makes the site of these pages: see tools/docs.sh."""

import sys
from pathlib import Path

import flatstep

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "flatstep"
author = copyright = "The flatstep contributors"
version = release = flatstep.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "command_line",
    "mathml",
    "repository_links",
]
exclude_patterns = ["_*"]
nitpicky = True
# Other projects' names. Their inventories are on the network, which a build does without.
nitpick_ignore_regex = [
    (
        "py:.*",
        r"(collections|lightning|np|numpy|os|torch|transformers|typing|typing_extensions)\..*",
    ),
    ("py:class", "Array|PathLike|Scalar|SummaryWriter"),  # names of types, which are no classes
]

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
repository = "https://github.com/flatstep/flatstep"

autodoc_default_options = {"members": True, "member-order": "bysource", "no-value": True}
autodoc_mock_imports = ["lightning", "transformers"]
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
maximum_signature_line_length = 80
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "flatstep"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "source_repository": repository,
    "source_branch": "main",
    "source_directory": "docs/",
    "light_css_variables": {"color-removed": "#b3142b", "color-added": "#116329"},
    "dark_css_variables": {"color-removed": "#ff8e87", "color-added": "#56d364"},
}
html_copy_source = False

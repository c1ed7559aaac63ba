"""The page of a profile: one HTML file that needs nothing else, ``flatstep profile --html``."""

from flatstep.profiling.page.render import render

__all__ = ["render"]

"""The HTML pages of the explorer, rendered by the server with the templates and the style of reports.

A page is complete without scripts. The script adds keys, decisions without a new page, and progress that updates.
Every view has an address that shows it again.
"""

from __future__ import annotations

from tracin_ann.serve.pages.routes import add_pages

__all__ = ["add_pages"]

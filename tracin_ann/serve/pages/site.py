"""The site: its templates, static files and images, and what every page shows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata, resources
from typing import Any

from tracin_ann.report import load_templates, read_style
from tracin_ann.serve.pages.images import LinkedImages

PAGES = (
    ("/", "Overview"),
    ("/query", "Query"),
    ("/suspects", "Suspects"),
    ("/compare", "Compare"),
    ("/hubs", "Hubs"),
    ("/duplicates", "Duplicates"),
)
HTML = "text/html; charset=utf-8"
_TYPES = {
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "LICENSE": "text/plain; charset=utf-8",
}
_FOREVER = "private, max-age=31536000, immutable"
"""For addresses whose content never changes."""


@dataclass(frozen=True)
class Reply:
    """An answer to a request: content, media type, status and headers."""

    body: str | bytes
    media_type: str = HTML
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SiteFacts:
    """What every page shows of the site: name and generation of the index, version, and addresses of its pages.

    `stamp` changes with the static files, which browsers keep.
    """

    index_name: str
    generation: int
    version: str
    stamp: str
    pages: tuple[tuple[str, str], ...] = PAGES


class Site:
    """Renders pages; a template, a static file or an image is read once."""

    def __init__(self, index_name: str) -> None:
        self.images = LinkedImages()
        self._index_name, self._version = index_name, metadata.version("tracin-ann")
        self._templates = load_templates(_read_template)

    def render(self, name: str, generation: int, **values: Any) -> str:
        """Return a template with its values; those of every page have defaults."""
        facts = SiteFacts(self._index_name, generation, self._version, self._stamp)
        defaults = {"lead": "", "notes": (), "layout": "rows", "progress": None, "permalink": "", "here": ""}
        page: str = self._templates.get_template(name).render(site=facts, **{**defaults, **values})
        return page

    def static_file(self, name: str) -> Reply | None:
        """Return a static file, or None if there is none of this name."""
        content = self._static_files.get(name)
        if content is None:
            return None
        return Reply(content, _TYPES[name.rpartition(".")[2]], headers={"Cache-Control": _FOREVER})

    def image(self, name: str) -> Reply | None:
        """Return the image of a digest, or None if it is no longer in the cache."""
        png = self.images.find(name)
        return None if png is None else Reply(png, "image/png", headers={"Cache-Control": _FOREVER})

    @cached_property
    def _static_files(self) -> dict[str, bytes]:
        folder = resources.files("tracin_ann.serve.pages").joinpath("static")
        files = {file.name: file.read_bytes() for file in folder.iterdir()}
        own = files.pop("explorer.css").decode()
        return {**files, "style.css": f"{read_style()}\n{own}".encode()}

    @cached_property
    def _stamp(self) -> str:
        files = b"".join(content for _, content in sorted(self._static_files.items()))
        return hashlib.blake2b(files, digest_size=6).hexdigest()


def _read_template(name: str) -> str | None:
    """Return the text of a template of the explorer, or None if reports have it."""
    file = resources.files("tracin_ann.serve.pages").joinpath("templates", name)
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None

"""The page: tables, pictures and text into one HTML file that needs nothing beside it. The words are page.html's."""

from typing import Any, NamedTuple

import jinja2
from matplotlib.figure import Figure

from raypfk.report import figures
from raypfk.report.examples import data_uri

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("raypfk.report", ""),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


class Picture(NamedTuple):
    """A figure as PNG: embedded in the page, and beside it as `name`. alt: what it shows, for who cannot see it."""

    name: str
    png: bytes
    alt: str

    @property
    def uri(self) -> str:
        return data_uri(self.png, "image/png")


def picture(name: str, figure: Figure, alt: str) -> Picture:
    return Picture(f"{name}.png", figures.png(figure), alt)


def render(**parts: Any) -> str:
    """page.html with these parts; what is put in is escaped."""
    return _ENVIRONMENT.get_template("page.html").render(**parts)

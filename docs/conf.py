"""Sphinx settings. `make docs` builds docs/_build/html; a warning is an error. No network is used."""

import sys
from pathlib import Path

from sphinx.application import Sphinx

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

import generate_reference  # noqa: E402

import newsbert_ray  # noqa: E402

project = "newsbert_ray"
author = "the newsbert_ray authors"
project_copyright = author
version = release = newsbert_ray.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
python_display_short_literal_types = True

html_theme = "pydata_sphinx_theme"
html_title = "newsbert_ray"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_show_sourcelink = False
html_show_copyright = False
html_sidebars = {"**": []}  # the pages are in the header; the page's own headings are on the right
html_theme_options = {
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "header_links_before_dropdown": 7,
    "navbar_persistent": ["search-button"],
    "footer_start": [],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc"],
}


def setup(app: Sphinx) -> None:
    """Write the generated reference pages before Sphinx looks for pages."""
    app.connect("builder-inited", lambda app: generate_reference.write_pages(DOCS / "reference"))

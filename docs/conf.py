"""How Sphinx builds these pages: `python3 tools/dev.py docs`."""

project = "offload"
copyright = "the offload authors, Apache-2.0"  # noqa: A001  Sphinx's name
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
myst_heading_anchors = 4  # links between pages name headings
html_theme = "furo"
html_title = "offload"
html_show_sphinx = False
# Blocks without a language are messages, drawings and command lines.
highlight_language = "text"

"""A hook of mkdocs (`mkdocs.yml`): README, CONTRIBUTING and CHANGELOG are pages of the site, from where they are.

A page that would load anything from another host ends the build.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages; their links to other pages and to pictures become links within the site."""
    for source, name in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        text = re.sub(r"\]\((?:https://[^)\s]*/main/)?docs/", "](", text)
        for other, page in PAGES.items():
            text = text.replace(f"]({other})", f"]({page})")
        files.append(File.generated(config, name, content=text))
    return files


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Links may lead elsewhere; scripts, styles, fonts and pictures may not.

    Raises:
        PluginError: an address of another host is loaded.
    """
    if found := re.search(r'(<(?!a )[^>]*\s(?:src|href)="(?:https?:)?//[^"]*")', output):
        raise PluginError(f"{page.file.src_uri} loads from another host: {found[1]}")
    return output

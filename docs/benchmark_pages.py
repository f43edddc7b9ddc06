"""The benchmarks' own pages as pages of the site, as they stand when it is built."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_PAGES = {"README.md": "benchmarks.md", "RESULTS.md": "results.md", "ABLATIONS.md": "ablations.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages, with links that hold in the site.

    Args:
        files: Of the site.
        config: Of the site.

    Returns:
        With the pages.
    """
    folder = Path(config.config_file_path).parent / "benchmarks"
    for source, page in _PAGES.items():
        text = (folder / source).read_text(encoding="utf-8").replace("](../docs/", "](")
        for name, target in _PAGES.items():
            text = text.replace(f"]({name})", f"]({target})")
        files.append(File.generated(config, page, content=text))
    return files

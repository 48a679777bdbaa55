"""What mkdocs calls: pages and pictures from outside of docs/, and names without a docstring.

README.md is the site's first page. On GitHub links run from file to file; on the site the folder
``docs/`` is the root, and files from elsewhere keep their path.
"""

import logging
import re
from pathlib import Path

from mkdocs.structure.files import File
from undocumented import undocumented

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
WIDTH = 84  # columns of code that a page shows beside its contents
log = logging.getLogger("mkdocs.hooks.site")


def on_pre_build(config):
    """Warn of what has no docstring; a warning ends a strict build."""
    for name in undocumented(ROOT / "antidote_fast"):
        log.warning("%s has no docstring", name)


def on_files(files, config):
    """Add the pages of the project's root, and the measured pictures."""
    for name in PAGES:
        source = "index.md" if name == "README.md" else name
        files.append(File.generated(config, source, content=_page(name)))
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.png")):
        place = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """``../`` leaves docs/ on GitHub; the site has those files below its root.

    A command is one line there, which scrolls; here it is broken before a flag.
    """
    markdown = re.sub(r"^ {4}.*antidote.fast .{70,}$", _in_lines, markdown, flags=re.MULTILINE)
    return _relinked(markdown, r"\.\./")


def _in_lines(match):
    lines = [""]
    for part in re.split(r" (?=--)", match[0]):
        if lines[-1] and len(lines[-1]) + len(part) > WIDTH:
            lines[-1] += " \\"
            lines.append("       ")
        lines[-1] += f" {part}" if lines[-1] else part
    return "\n".join(lines)


def _page(name):
    return _relinked((ROOT / name).read_text(encoding="utf-8"), "docs/")


def _relinked(markdown, prefix):
    """Links without ``prefix``, and to the first page by the name that it has on the site."""
    return re.sub(
        rf"\]\(({prefix})?(README\.md)?",
        lambda match: "](index.md" if match[2] else "](",
        markdown,
    )

"""The documents of the API: every public name has a docstring, and a place on its page."""

import importlib.util
import re
from pathlib import Path

import antidote_fast

ROOT = Path(__file__).parents[2]


def undocumented(package):
    spec = importlib.util.spec_from_file_location("undocumented", ROOT / "docs" / "undocumented.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.undocumented(package)


def test_every_public_name_has_a_docstring():
    assert undocumented(ROOT / "antidote_fast") == []


def test_a_missing_docstring_is_named(tmp_path):
    (tmp_path / "a.py").write_text(
        '"""A module."""\n\n\nclass Base:\n    """A base."""\n\n'
        '    def told(self):\n        """Is."""\n'
        "\n    def untold(self):\n        pass\n\n    def _private(self):\n        pass\n\n\n"
        'class Kind(Base):\n    """A kind."""\n\n    def told(self):\n        pass\n'
        "\n    def other(self):\n        pass\n\n\ndef plain():\n    pass\n"
    )
    (tmp_path / "b.py").write_text("x = 1\n")
    named = [line.rpartition("/")[2] for line in undocumented(tmp_path)]
    assert named == ["a.py:27 plain", "b.py:1 b", "a.py:10 Base.untold", "a.py:23 Kind.other"]


def test_every_public_name_is_on_the_page_of_the_api():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    words = set(re.findall(r"\w+", page))
    assert not {*antidote_fast.__all__} - words

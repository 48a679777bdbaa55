"""How docstrings become the API page: Sphinx's roles are shown as code."""

import re

import griffe

_ROLE = re.compile(r":[a-z]+:`~?([^`]+)`")


class Docstrings(griffe.Extension):
    """Put ``name`` in place of a role around it, such as ``func``, in every docstring."""

    def on_object(self, *, obj, loader, **kwargs):
        """Called by griffe for each module, class and function that it has read."""
        if obj.docstring:
            obj.docstring.value = _ROLE.sub(r"`\1`", obj.docstring.value)

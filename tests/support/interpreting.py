"""Triton's interpreter in a third of its time."""

import importlib.util
import inspect
import os

_LANGUAGE = ("triton.language", "triton.language.core")


def interpret_faster():
    """Patch Triton's language once a launch; Triton does so anew for each inner call."""
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        from triton.runtime import interpreter

        patch, launch, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

        def patch_once(fn):
            modules = [value for value in fn.__globals__.values() if inspect.ismodule(value)]
            which = frozenset(m.__name__ for m in modules if m.__name__ in _LANGUAGE)
            if which in patched:
                return None  # an inner call's is never undone
            patched.add(which)
            return patch(fn)

        def launch_afresh(*args, **kwargs):
            patched.clear()
            return launch(*args, **kwargs)

        interpreter._patch_lang = patch_once
        interpreter.GridExecutor.__call__ = launch_afresh

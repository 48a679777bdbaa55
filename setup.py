"""Builds the native extensions; everything else about the package is in pyproject.toml.

``antidote_fast._cpu`` is built from ``csrc/cpu`` wherever there is a C++ compiler, and
``antidote_fast._cuda`` from ``csrc/cuda`` where there is nvcc of CUDA 12.1 or later as well.
Without them the package installs all the same. With them, a compile error fails the install: a
broken build must not pass for a slow one.

Environment: ``ANTIDOTE_SKIP_EXT=1`` builds none. ``ANTIDOTE_CUDA_ARCHS=80,90`` (the default) says
for which GPUs; empty: no ``_cuda``. ``ANTIDOTE_SANITIZE=1`` builds with sanitizers, and ``_cuda``
for emulated threads. ``CUDACXX``, ``CUDA_HOME``, ``CXX``, ``CXXFLAGS``, ``LDFLAGS`` as everywhere.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, "csrc/cuda")

SANITIZE = os.environ.get("ANTIDOTE_SANITIZE") == "1"
# Scores are rounded once and compared as integers: a fused multiply-add, or any other licence
# taken with floating point, would break bit-for-bit equality with the reference.
STRICT = ["-fno-fast-math", "-ffp-contract=off"]
FLAGS = ["-std=c++17", "-fvisibility=hidden", *STRICT, "-Wall"]
if SANITIZE:
    FLAGS += ["-g", "-O1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined"]
    FLAGS += ["-fsanitize=address,undefined"]
else:
    FLAGS += ["-O3", "-g0"]


def find_compiler():
    """The C++ compiler's command as a list, or None where this machine has none."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        if shutil.which(named[0]) is None:
            raise SystemExit(f"CXX={os.environ['CXX']!r}: no such compiler")
        return named
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    return None


def links_with(compiler, flag):
    """Whether a program that includes <omp.h> compiles and links with this flag."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
        command = [*compiler, flag, str(source), "-o", str(Path(folder) / "probe")]
        return subprocess.run(command, capture_output=True).returncode == 0


def extension(name, *folders):
    import pybind11

    return Extension(
        f"antidote_fast.{name}",
        sources=sorted(
            p for f in folders for p in glob(f"csrc/{f}/*.c*") if p.endswith(("u", "p"))
        ),
        depends=sorted(p for f in (".", *folders) for p in glob(f"csrc/{f}/*.[hip]*")),
        include_dirs=["csrc", pybind11.get_include()],
        language="c++",
    )


class BuildExtensions(build_ext):
    """Adds the flags that depend on the compiler."""

    def build_extensions(self):
        compiler = find_compiler()
        flags = list(FLAGS)
        if links_with(compiler, "-fopenmp"):
            flags.append("-fopenmp")
        # Python remembers the compiler that built it, which need not be on this machine.
        if shutil.which(self.compiler.compiler_so_cxx[0]) is None:
            self.compiler.compiler_so_cxx[:1] = compiler
        self.compiler.linker_so_cxx[:1] = compiler
        links = [f for f in flags if f.startswith(("-fsanitize", "-fopenmp"))]
        for extension in self.extensions:
            extension.extra_compile_args += flags
            extension.extra_link_args += links
        super().build_extensions()

    def build_extension(self, ext):
        if ext.name != "antidote_fast._cuda":
            return super().build_extension(ext)
        import cuda_build

        strict = None if SANITIZE else STRICT
        places = Path(self.build_temp) / "cuda", Path(self.get_ext_fullpath(ext.name))
        includes = [*ext.include_dirs, *self.include_dirs]
        cuda_build.build(self.spawn, find_compiler(), FLAGS, strict, ext.sources, includes, *places)


def extensions():
    if os.environ.get("ANTIDOTE_SKIP_EXT") == "1" or not glob("csrc/cpu/*.cpp"):
        return []
    if os.name != "posix" or find_compiler() is None:
        print("antidote-fast: no C++ compiler was found; the reference backend is used here")
        return []
    found = [extension("_cpu", "cpu")]
    if glob("csrc/cuda/*.cu"):
        import cuda_build

        if SANITIZE or cuda_build.find_nvcc():
            found.append(extension("_cuda", "cuda", *(["simt"] if SANITIZE else [])))
    return found


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtensions})

"""The package as it is installed: imports, names, and what setup.py builds where."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import antidote_fast

ROOT = Path(__file__).parents[2]


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )


def test_import_loads_nothing_heavy():
    done = python(
        "import sys, antidote_fast\n"
        "print([m for m in ('torch', 'transformers', 'peft', 'triton', 'jsonargparse')"
        " if m in sys.modules])"
    )
    assert done.stdout == "[]\n", done.stderr


def test_tensor_ops_need_no_extra_and_start_no_cuda():
    done = python(
        "import sys, torch\n"
        "from antidote_fast import Selection, prune_\n"
        "prune_(torch.randn(4, 8), torch.rand(8), Selection(0.5))\n"
        "print([m for m in ('transformers', 'peft', 'triton', 'jsonargparse', 'datasets')"
        " if m in sys.modules], torch.cuda.is_initialized())"
    )
    assert done.stdout == "[] False\n", done.stderr


@pytest.mark.parametrize("words", [["--help"], ["prune", "--help"], ["prune", "--nonsense", "1"]])
def test_help_and_mistakes_load_no_torch(words):
    done = python(
        f"import sys\nfrom antidote_fast.cli.entry import main\ncode = main({words!r})\n"
        "print(code, [m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    )
    code = 2 if "--nonsense" in words else 0
    assert done.stdout.endswith(f"{code} []\n"), done.stderr


def test_every_public_name_is_there():
    assert "prune_" in antidote_fast.__all__
    for name in antidote_fast.__all__:
        assert getattr(antidote_fast, name).__name__ == name
        assert name in dir(antidote_fast)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'prune_everything'"):
        _ = antidote_fast.prune_everything


def test_version_has_one_source():
    try:
        installed = importlib.metadata.version("antidote-fast")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("runs from a checkout that is not installed")
    assert installed == antidote_fast.__version__


# --- setup.py, in a small project of its own ------------------------------------------------------

# Without pybind11, which takes seconds to compile.
WORKS = """#include <Python.h>
static PyObject* answer(PyObject*, PyObject*) { return PyLong_FromLong(42); }
static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, ""}, {}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", "", -1, methods};
PyMODINIT_FUNC PyInit__cpu() { return PyModule_Create(&module); }
"""
WITH_PYBIND = """#include <pybind11/pybind11.h>
PYBIND11_MODULE(_cpu, m) { m.def("answer", [] { return 42; }); }
"""


@pytest.fixture
def project(tmp_path):
    pytest.importorskip("setuptools")
    pytest.importorskip("pybind11")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "antidote_fast").mkdir()
    shutil.copy(ROOT / "antidote_fast" / "__init__.py", tmp_path / "antidote_fast")
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "csrc" / "cpu" / "bind.cpp").write_text(WORKS)
    return tmp_path


def build(project, **environment):
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("ANTIDOTE_")}
    done = subprocess.run(
        [sys.executable, "setup.py", "build", "--build-lib", "out"],
        cwd=project,
        capture_output=True,
        text=True,
        env={**inherited, **environment},
        timeout=240,
    )
    return done, sorted(path.name for path in (project / "out").rglob("_cpu*"))


def has_compiler():
    return any(map(shutil.which, ("c++", "g++", "clang++")))


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler here")
def test_the_extension_is_built_and_runs(project):
    (project / "csrc" / "cpu" / "bind.cpp").write_text(WITH_PYBIND)
    done, built = build(project)
    assert done.returncode == 0, done.stderr
    assert len(built) == 1
    ran = subprocess.run(
        [sys.executable, "-c", "from antidote_fast import _cpu; print(_cpu.answer())"],
        cwd=project / "out",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.stdout == "42\n", ran.stderr


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler here")
def test_a_compile_error_fails_the_build(project):
    source = project / "csrc" / "cpu" / "bind.cpp"
    source.write_text(WORKS + 'int planted = "error";\n')
    done, built = build(project)
    assert done.returncode != 0
    assert built == []
    assert "planted" in done.stdout + done.stderr


def test_without_a_compiler_the_build_succeeds(project):
    (project / "empty").mkdir()
    done, built = build(project, PATH=str(project / "empty"), CXX="")
    assert done.returncode == 0, done.stderr
    assert built == []
    assert "no C++ compiler was found" in done.stdout


def test_skip_ext_is_honoured(project):
    done, built = build(project, ANTIDOTE_SKIP_EXT="1")
    assert done.returncode == 0, done.stderr
    assert built == []


def test_a_compiler_that_was_named_must_be_there(project):
    done, built = build(project, CXX="no-such-compiler++")
    assert done.returncode != 0
    assert built == []
    assert "CXX='no-such-compiler++': no such compiler" in done.stderr


def test_setup_builds_nothing_without_sources(project):
    (project / "csrc" / "cpu" / "bind.cpp").unlink()
    done, built = build(project)
    assert done.returncode == 0, done.stderr
    assert built == []


# --- the same with nvcc ---------------------------------------------------------------------------

ADDS = """__global__ void add(int* p) { ++*p; }
int code() { return cudaLaunchKernel((const void*)add, 1, 1, nullptr, 0, nullptr); }
"""


@pytest.fixture
def with_cuda(project):
    """The project with a kernel, and what builds it."""
    folder = project / "csrc" / "cuda"
    folder.mkdir()
    shutil.copy(ROOT / "csrc" / "cuda" / "cuda_build.py", folder)
    (folder / "add.cu").write_text(ADDS)
    (folder / "bind.cpp").write_text(
        WORKS.replace("_cpu", "_cuda")
        .replace("static PyObject*", "int code();\nstatic PyObject*")
        .replace('"answer"', '"code"')
        .replace("42", "code()")
    )
    return project


def cuda_files(project):
    return sorted(path.name for path in (project / "out").rglob("_cuda*"))


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc here")
def test_kernels_are_built_for_the_gpus_named(with_cuda):
    done, _ = build(with_cuda, ANTIDOTE_CUDA_ARCHS="86")
    assert done.returncode == 0, done.stderr
    assert len(cuda_files(with_cuda)) == 1
    assert "arch=compute_86,code=sm_86" in done.stdout
    assert "sm_90" not in done.stdout
    code = "from antidote_fast import _cuda; print(_cuda.code() >= 0)"  # it loads without a GPU
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=with_cuda / "out",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.stdout == "True\n", ran.stderr
    (with_cuda / "csrc" / "cuda" / "add.cu").write_text(ADDS + 'int planted = "error";\n')
    done, _ = build(with_cuda, ANTIDOTE_CUDA_ARCHS="86")
    assert done.returncode != 0
    assert "planted" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"ANTIDOTE_CUDA_ARCHS": ""}, "ANTIDOTE_CUDA_ARCHS is empty"),
        ({"CUDACXX": "./old-nvcc"}, "./old-nvcc is older than CUDA 12.1"),
    ],
)
def test_kernels_are_left_out(with_cuda, environment, words):
    old = with_cuda / "old-nvcc"
    old.write_text("#!/bin/sh\necho Cuda compilation tools, release 11.8, V11.8.89\n")
    old.chmod(0o755)
    done, built = build(with_cuda, **environment)
    assert done.returncode == 0, done.stderr
    assert (len(built), cuda_files(with_cuda)) == (has_compiler(), [])
    assert words in done.stdout


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"ANTIDOTE_CUDA_ARCHS": "sm_90"}, "ANTIDOTE_CUDA_ARCHS='sm_90': must be numbers such as"),
        ({"CUDACXX": "no-such-nvcc"}, "CUDACXX='no-such-nvcc': no such compiler"),
    ],
)
def test_a_wrong_request_for_kernels_is_refused(with_cuda, environment, words):
    done, _ = build(with_cuda, **environment)
    assert done.returncode != 0
    assert words in done.stderr


def test_without_nvcc_there_are_no_kernels(with_cuda, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location(
        "cuda_build", with_cuda / "csrc" / "cuda" / "cuda_build.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "ANTIDOTE_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    assert module.find_nvcc() is None
    assert "no nvcc was found" in capsys.readouterr().out


def test_setup_is_short():
    assert len((ROOT / "setup.py").read_text().splitlines()) < 120
    assert len((ROOT / "AGENTS.md").read_text().splitlines()) < 120

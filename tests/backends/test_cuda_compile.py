"""What nvcc made of csrc/cuda: no kernel spills or has a stack, and scores are never fused."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_SPEC = importlib.util.spec_from_file_location("cuda_build", ROOT / "csrc/cuda/cuda_build.py")
cuda_build = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(cuda_build)
REPORT = ROOT / "build" / "cuda-kernels.txt"
FUSED = {"norm_kernel", "combine_kernel", "linear_kernel"}  # sums of squares may fuse
LAX = r"\bFFMA|\bF(MUL|ADD|SETP|MNMX)\S*\.FTZ"  # (F2I.FTZ is of a division of integers)
NVCC = cuda_build.find_nvcc()


def cuobjdump():
    """The tool of the CUDA toolkit, or the one that comes with Triton."""
    found = shutil.which("cuobjdump")
    if not found and (spec := importlib.util.find_spec("triton")):
        (found,) = Path(spec.origin).parent.glob("backends/nvidia/bin/cuobjdump")
    return found


pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="nvcc is not here: nothing to look into"),
    pytest.mark.skipif(cuobjdump() is None, reason="cuobjdump is not here (CUDA or Triton has it)"),
]


def dump(path, *options):
    words = [cuobjdump(), *options, path]
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=250).stdout


def kernels(path):
    """[(arch, kernel, {"REG": 64, "STACK": 0, ...})] of a compiled file."""
    rows, arch = [], None
    lines = iter(dump(path, "-res-usage").splitlines())
    for line in lines:
        if found := re.match(r"arch = sm_(\w+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function (\w+):", line):
            used = dict(re.findall(r"(\w+):(\d+)", next(lines)))
            rows.append((arch, plain(found[1]), {name: int(n) for name, n in used.items()}))
    return rows


def plain(mangled):
    """``rows_by_block<0>`` of a mangled name: the last name in it, and numbers of its template."""
    rest, name = re.sub(r"^_ZN?", "", mangled), mangled
    while found := re.match(r"(\d+)", rest):
        length, rest = int(found[1]), rest[len(found[1]) :]
        name, rest = rest[:length], rest[length:]
    template = rest.partition("Ev")[0] if rest.startswith("I") else ""
    numbers = re.findall(r"L[a-z](\d+)E", template)
    return name + (f"<{', '.join(numbers)}>" if numbers else "")


def problems(rows):
    """A line for each kernel that keeps anything in local memory."""
    return [
        f"sm_{arch} {name}: {used['STACK']} bytes of stack, {used['LOCAL']} local"
        for arch, name, used in rows
        if used["STACK"] or used["LOCAL"]
    ]


@pytest.fixture(scope="module")
def extension():
    spec = importlib.util.find_spec("antidote_fast._cuda")
    assert spec is not None, "there is nvcc, but antidote_fast._cuda is not built: pip install -e ."
    from antidote_fast import _cuda

    if _cuda.emulated:
        pytest.skip("this is the build for emulated threads")
    return spec.origin


def test_no_kernel_spills(extension):
    rows = kernels(extension)
    REPORT.parent.mkdir(exist_ok=True)
    lines = [
        f"sm_{arch}  {name:32}  {used['REG']:4} registers  {used['SHARED']:6} bytes shared"
        for arch, name, used in sorted(rows, key=lambda row: row[:2])
    ]
    REPORT.write_text("\n".join(lines) + "\n")  # `make tests` prints it
    assert problems(rows) == []
    by_arch = {arch: sorted(n for a, n, _ in rows if a == arch) for arch, _, _ in rows}
    assert set(by_arch) == set(cuda_build.archs())
    assert len({tuple(names) for names in by_arch.values()}) == 1
    names = {name.partition("<")[0] for name in by_arch[cuda_build.archs()[-1]]}
    assert {"rows_by_block", "rows_by_warp", "rows_of_list", "linear_kernel"} <= names
    assert f"sm_{cuda_build.archs()[-1]}.ptx" in dump(extension, "--list-ptx")


def test_scores_are_rounded_as_they_are_written(extension):
    """No fused multiply-add, nothing flushed to zero; a row's weights load 16 bytes at a time."""
    found, wide, name = set(), set(), ""
    for line in dump(extension, "-sass").splitlines():
        if function := re.search(r"Function : (\w+)", line):
            name = plain(function[1])
        elif name.partition("<")[0] not in FUSED and re.search(LAX, line):
            found.add(f"{name}: {line.split(';')[0].strip()}")
        elif re.search(r"LDGSTS\S*\.128", line):
            wide.add(name)
    assert found == set()
    assert {"rows_by_block<0>", "rows_by_warp<1>", "linear_kernel<2>"} <= wide


def test_a_kernel_with_a_stack_is_named(tmp_path):
    source = tmp_path / "toy.cu"
    source.write_text(
        "__global__ void fine(int* p) { p[threadIdx.x] = 1; }\n"
        "__global__ void stacked(int* p, int n) {\n"
        "  int many[64];\n"
        "  for (int i = 0; i < 64; ++i) many[i] = p[i * n];\n"
        "  for (int i = 0; i < n; ++i) p[i] = many[p[i] & 63];\n"
        "}\n"
    )
    cubin = tmp_path / "toy.cubin"
    command = [NVCC, "-arch=sm_90", "-cubin", source, "-o", cubin]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    rows = kernels(cubin)
    assert sorted(name for _, name, _ in rows) == ["fine", "stacked"]
    (line,) = problems(rows)
    assert line.endswith("stacked: 256 bytes of stack, 0 local")

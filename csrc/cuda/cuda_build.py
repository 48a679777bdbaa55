"""How ``antidote_fast._cuda`` is compiled: by nvcc, or for emulated threads; setup.py calls it.

No torch is needed: kernels take addresses, and the CUDA runtime is linked statically and hidden,
as torch brings one of its own. One build serves any torch.
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ARCHS = "80,90"
OLDEST = [12, 1]  # 32 KB of kernel parameters
SIMT = ["-DANTIDOTE_SIMT", "-fPIC", "-fno-strict-aliasing", "-Wno-unknown-pragmas", "-xc++"]
HIDDEN = "-Xlinker=--exclude-libs,ALL"


def find_nvcc():
    """nvcc's path, or None where it is missing, old or not wanted; then it is said why."""
    named = os.environ.get("CUDACXX")
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = ["nvcc", *(f"{home}/bin/nvcc" for home in [*homes, "/usr/local/cuda"])]
    nvcc = next(filter(shutil.which, [named] if named else places), None)
    if named and nvcc is None:
        raise SystemExit(f"CUDACXX={named!r}: no such compiler")
    reason = None
    if not archs():
        reason = "ANTIDOTE_CUDA_ARCHS is empty"
    elif nvcc is None:
        reason = "no nvcc was found"
    elif release(nvcc) < OLDEST:
        reason = f"{nvcc} is older than CUDA 12.1"
    if reason:
        print(f"antidote-fast: {reason}; NVIDIA GPUs are left to Triton")
        return None
    return nvcc


def archs():
    """The GPUs that ``ANTIDOTE_CUDA_ARCHS`` asks for, as numbers in words."""
    value = os.environ.get("ANTIDOTE_CUDA_ARCHS", ARCHS)
    words = re.split(r"[\s,;]+", value.strip()) if value.strip() else []
    if not all(re.fullmatch(r"\d+[af]?", word) for word in words):
        raise SystemExit(f"ANTIDOTE_CUDA_ARCHS={value!r}: must be numbers such as {ARCHS}")
    return words


def release(nvcc):
    """[major, minor] of a CUDA compiler."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", said)
    return [int(n) for n in found.groups()] if found else [0, 0]


def device_command(compiler, strict):
    """nvcc with flags; the last architecture's PTX is for GPUs that come later."""
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs()]
    codes += [f"-gencode=arch=compute_{archs()[-1]},code=compute_{archs()[-1]}"]
    host = "-Xcompiler=" + ",".join(["-fPIC", "-fvisibility=hidden", *strict])
    flags = ["-std=c++17", "-O3", "-fmad=false", "-cudart=static", host]
    return [find_nvcc(), "-ccbin", compiler[0], *flags, *codes]


def build(spawn, compiler, flags, strict, sources, includes, temp, target):
    """Compile the sources beside each other, as many as there are cores, and link them.

    Args:
        spawn: runs a command, and raises where it fails.
        compiler: the host's, with ``flags``; for emulated threads these are all.
        strict: those of the flags that nvcc hands to it; None for emulated threads.
    """
    command = [*compiler, *flags, *SIMT] if strict is None else device_command(compiler, strict)
    temp.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    objects = [str(temp / f"{Path(source).name}.o") for source in sources]
    includes = [f"-I{path}" for path in includes]

    def compile_one(pair):
        spawn([*command, *includes, "-c", pair[0], "-o", pair[1]])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, zip(sources, objects, strict=True)))
    linker = [word for word in command if word != "-xc++"]
    hidden = [] if strict is None else [HIDDEN]
    spawn([*linker, "-shared", *objects, *hidden, "-o", str(target)])

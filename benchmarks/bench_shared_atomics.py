"""Clock cycles of an atomic addition to shared memory on an NVIDIA GPU, by pattern of addresses.

``shared_atomics.cu`` is compiled by nvcc into a temporary folder and run: it counts in 512 bins as
the row kernels of ``csrc/cuda`` do. A row holds the cycles a warp instruction takes on one
multiprocessor with so many warps on it, and, of an instruction on average: how many lanes take part
(``lanes``), the most of them on one address, the most addresses in one bank. Exits with 2 where
there is no nvcc or no GPU.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import common
import torch

SOURCE = Path(__file__).with_name("shared_atomics.cu")


def find_nvcc():
    """nvcc's path, or None."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [f"{home}/bin/nvcc" for home in [*homes, "/usr/local/cuda"]]
    wanted = [os.environ.get("CUDACXX"), "nvcc", *places]
    return next((shutil.which(name) for name in wanted if name and shutil.which(name)), None)


def compiled(nvcc, arch, folder):
    """The program, built for a GPU such as "90".

    Raises:
        RuntimeError: what nvcc said.
    """
    program = Path(folder) / "shared_atomics"
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    command = [nvcc, "-std=c++17", "-O3", target, "-o", program, SOURCE]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"nvcc: {done.stderr.strip()}")
    return program


def measured(program, device_index):
    """The program's rows, as they come."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    chosen = visible[device_index] if device_index < len(visible) else ""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": chosen or str(device_index)}
    process = subprocess.Popen([program], env=environment, stdout=subprocess.PIPE, text=True)
    with process:
        for line in process.stdout:
            yield json.loads(line)
    if process.returncode != 0:
        raise SystemExit(process.returncode)


def main(argv=None):
    options = common.parser(__doc__)
    args = common.parsed(options, argv)
    nvcc = find_nvcc()
    reason = None
    if nvcc is None:
        reason = "no nvcc was found"
    elif args.device.type != "cuda" or torch.version.cuda is None:
        reason = "there is no NVIDIA GPU here"
    if reason:
        print(f"bench_shared_atomics: {reason}")
        return 2
    report = common.Report("shared_atomics", args)
    major, minor = torch.cuda.get_device_capability(args.device)
    with tempfile.TemporaryDirectory() as folder:
        for row in measured(compiled(nvcc, f"{major}{minor}", folder), args.device.index):
            report.add(row)
    report.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())

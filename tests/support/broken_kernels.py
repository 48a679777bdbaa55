"""Kernels that break one rule each, and one that breaks none: what ``aot`` must tell apart."""

import torch
import triton
import triton.language as tl

from antidote_fast.backends.triton_kernels import launch


@triton.jit
def fine_kernel(X_ptr, n_cols, BLOCK_SIZE: tl.constexpr, VEC: tl.constexpr):
    column = tl.arange(0, BLOCK_SIZE)
    n_cols = tl.multiple_of(n_cols, 8)
    x = tl.load(X_ptr + column, mask=column < n_cols, other=0)
    tl.store(X_ptr + column, x + 1, mask=column < n_cols)


@triton.jit
def narrow_kernel(X_ptr, first, BLOCK_SIZE: tl.constexpr, VEC: tl.constexpr):
    column = first + tl.arange(0, BLOCK_SIZE)
    tl.store(X_ptr + column, tl.load(X_ptr + column) + 1)


@triton.jit
def spilling_kernel(X_ptr, Y_ptr, BLOCK_SIZE: tl.constexpr):
    column = tl.arange(0, BLOCK_SIZE)
    x = tl.load(X_ptr + column)
    for turn in range(100):  # all of x stays live: 512 registers a thread
        x = x ^ (x >> 3) ^ tl.load(Y_ptr + turn)
    tl.store(X_ptr + column, x)


@triton.jit
def fused_kernel(X_ptr, BLOCK_SIZE: tl.constexpr):
    column = tl.arange(0, BLOCK_SIZE)
    x = tl.load(X_ptr + column)
    tl.store(X_ptr + column, tl.fma(x, x, x))


def _run(kernel, *args, **constants):
    launch.run(kernel, (1,), *args, device=torch.device("cpu"), num_warps=1, **constants)


def _integers():
    return torch.empty(1 << 16, dtype=torch.int16)


def calls():
    """Two calls that make one kernel, three that break one rule each, one that launches nothing."""
    words = torch.empty(1 << 16, dtype=torch.int32)
    yield "one", lambda: _run(fine_kernel, _integers(), 4096, BLOCK_SIZE=1024, VEC=True)
    yield "again", lambda: _run(fine_kernel, _integers(), 4000, BLOCK_SIZE=1024, VEC=True)
    yield "narrow", lambda: _run(narrow_kernel, _integers(), 3, BLOCK_SIZE=1024, VEC=True)
    yield "spills", lambda: _run(spilling_kernel, words, words, BLOCK_SIZE=16384)
    yield "fused", lambda: _run(fused_kernel, words.float(), BLOCK_SIZE=1024)
    yield "silent", lambda: None

"""The CUDA C++ kernels without a GPU: compiled for all architectures, and emulated what the facts do not single out."""

import importlib
import io
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from calls import assert_same_bits, assert_within_bounds, reference, run
from frameworks import NumPy
from strategies import EMULATED, Case

import llsa_np as llsa

pytest.importorskip("cuda.core", reason="cuda-core is not installed")

from llsa_np.gpu.cupy_raw import attend, attend_backward, pool, program, select, transpose
from llsa_np.gpu.cupy_raw.specialisations import PORTABLE_SHARED, Tile, all_tiles
from llsa_np.hierarchy import Hierarchy
from llsa_np.options import check_attend_options

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100", "sm_120")
COVER = [
    *((Tile("bfloat16", 64), True, arch) for arch in ARCHITECTURES),
    (Tile("float16", 32), False, "sm_90a"),
    (Tile("float16", 96), True, "sm_120"),
    (Tile("bfloat16", 128), True, "sm_80"),
    (Tile("bfloat16", 256), False, "sm_100"),
    (Tile("float32", 64), True, "sm_80"),
    (Tile("float32", 128), False, "sm_90a"),
    (Tile("float32", 256), True, "sm_120"),
]
HOT = {"attend", "query_gradient", "key_gradient", "key_gradient_joint", "key_gradient_dense"}
HOT_SPILL = {"sm_80": 16, "sm_90a": 16, "sm_100": 32, "sm_120": 32}
"""Bytes that a hot kernel of the usual tile may spill, none of them in a loop."""

on_compiler = pytest.mark.skipif(EMULATED, reason="the emulator has a compiler of its own")
emulated = pytest.mark.skipif(not EMULATED, reason="runs on the CPU (LLSA_CUDA_EMULATOR=1)")


def kernels_of(tile, whole):
    """All kernels of a tile."""
    forward = [
        *pool.pool_kernels(tile.dtype, whole),
        select.select_kernel(tile, whole),
        attend.attend_kernel(tile, whole),
    ]
    return list(dict.fromkeys([*forward, *attend_backward.backward_kernels(tile, whole)]))


def compilations(kernels):
    """One kernel for each compilation: several come from one."""
    return list({(kernel.source, kernel.defines): kernel for kernel in kernels}.values())


def measured(kernel, arch):
    """Of every kernel of a compilation (registers, bytes spilled, static shared memory), as the assembler says."""
    log = io.StringIO()
    program.compile_cubin(kernel, arch, log=log)
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers([^\n]*)",
        log.getvalue(),
        re.DOTALL,
    )
    static = {name: re.search(r"(\d+) bytes smem", rest) for name, _, _, rest in found}
    return {
        name: (int(registers), int(spilled), int(static[name].group(1)) if static[name] else 0)
        for name, spilled, registers, _ in found
    }


@on_compiler
@pytest.mark.parametrize(("tile", "whole", "arch"), COVER, ids=str)
def test_a_cover_of_the_specialisations_compiles(tile, whole, arch):
    """And fits every card of the architecture. The rest is left to `make kernels`."""
    kernels = kernels_of(tile, whole)
    dynamic = {(kernel.source, kernel.defines, kernel.name): kernel.shared_bytes for kernel in kernels}
    for kernel in compilations(kernels):
        found = measured(kernel, arch)
        assert kernel.name in found
        for name, (registers, spilled, static) in found.items():
            assert registers <= 255
            shared = dynamic.get((kernel.source, kernel.defines, name), 0)
            assert static + shared <= PORTABLE_SHARED, f"{name} takes {static} + {shared} bytes of shared memory"
            if name in HOT and tile == Tile("bfloat16", 64):
                assert spilled <= HOT_SPILL[arch], f"{name} for {arch} spills {spilled} bytes"


@on_compiler
@pytest.mark.skipif(os.environ.get("LLSA_ALL_KERNELS", "0") == "0", reason="`make kernels` compiles all")
@pytest.mark.parametrize("tile", all_tiles(), ids=lambda tile: f"{tile.dtype}-{tile.WIDTH}")
def test_all_specialisations_compile(tile):
    kernels = [kernel for whole in (True, False) for kernel in compilations(kernels_of(tile, whole))]
    jobs = [(kernel, arch) for kernel in kernels for arch in ARCHITECTURES]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for (kernel, arch), found in zip(jobs, threads.map(lambda job: measured(*job), jobs)):
            print(f"{arch} {kernel.source} {tile.dtype} {tile.WIDTH}: {found}")


@on_compiler
def test_what_compiled_once_is_kept(tmp_path, monkeypatch):
    """In LLSA_CACHE_DIR. An entry that was cut short is compiled again."""
    kernel = pool.pool_kernels("float32", True)[0]
    monkeypatch.setenv("LLSA_CACHE_DIR", str(tmp_path))
    program.programs.cache_clear()
    first = program.compile_cubin(kernel, "sm_90a")
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size == len(first)]
    assert files, "nothing was kept"
    for length in (0, 100, len(first) - 1):
        files[0].write_bytes(first[:length])
        assert program.compile_cubin(kernel, "sm_90a") == first
    monkeypatch.setattr("cuda.core.Program", None)  # another compilation would fail
    assert program.compile_cubin(kernel, "sm_90a") == first
    assert program.compile_cubin(kernel, "sm_90") == first, "a device is asked for by its number alone"
    program.programs.cache_clear()


@on_compiler
def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("LLSA_CACHE_DIR", str(blocked))
    program.programs.cache_clear()
    assert program.compile_cubin(pool.pool_kernels("float32", True)[0], "sm_90a")[:4] == b"\x7fELF"
    program.programs.cache_clear()


@on_compiler
@pytest.mark.parametrize("named", ["auto", "cupy_raw"])
def test_precompile_for_a_gpu_that_is_not_here(named, tmp_path, monkeypatch):
    """After it nothing that a call needs is compiled again."""
    monkeypatch.setenv("LLSA_CACHE_DIR", str(tmp_path))
    program.programs.cache_clear()
    llsa.precompile("bfloat16", 32, topk=4, backward=named == "auto", arch="sm_90a", backend=named)
    monkeypatch.setattr("cuda.core.Program", None)  # a compilation would fail
    tile = Tile("bfloat16", 32)
    for whole in (True, False):
        for kernel in (*pool.pool_kernels("bfloat16", whole), select.select_kernel(tile, whole)):
            assert program.compile_cubin(kernel, "sm_90a")[:4] == b"\x7fELF"
    program.programs.cache_clear()
    with pytest.raises(NotImplementedError, match="serves sm_80 and up"):
        llsa.precompile("bfloat16", 32, arch="sm_75", backend=named)
    with pytest.raises(ValueError, match="arch"):
        llsa.precompile("bfloat16", 32, arch="sm_", backend=named)
    with pytest.raises(NotImplementedError, match="cupy_raw serves D"):
        llsa.precompile("bfloat16", 12, arch="sm_90a", backend=named)
    with pytest.raises(TypeError, match="not callable"):
        llsa.precompile("float32", 64, arch="sm_90a", backend=named)  # what is not kept would be compiled


@on_compiler
def test_an_error_of_the_compiler_is_told():
    kernel = program.Kernel("pool.cu", "pool", (("ELEMENT_FLOAT32", "1"), ("WHOLE", "oops(")), 128)
    with pytest.raises(RuntimeError, match=r"cupy_raw: pool\.cu"):
        program.compile_cubin(kernel, "sm_90a")


@on_compiler
def test_workspace_is_bounded_by_shapes():
    """At 65,536 tokens, batch 2 and 4 heads, forward and backward take less than 100 MiB beyond inputs and results."""
    for tokens, block_size, levels, kept in (
        (2**16, 16, 2, 8),
        (2**16, 16, 3, 8),
        (2**16, 64, 1, 64),
        (2**18, 16, 3, 8),
    ):
        hierarchy = Hierarchy(tokens, block_size, levels)
        options = check_attend_options("test", None, True, None, "full", levels=levels, dim=64)
        spaces = attend_backward.backward_spaces(
            *(2, 8 // 2, 8 // 2, 64, 64, hierarchy, hierarchy, (kept,) * levels, options, frozenset("qkv"))
        )
        size = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in spaces)
        pooled = 2 * 8 * sum(hierarchy.lengths[1:]) * 64 * 2
        selected = 8 * sum(hierarchy.lengths[1:]) * kept * 4
        assert size + pooled + selected <= 100 * 2**20 * tokens // 2**16


def test_refusals_name_what_is_served():
    backend = importlib.import_module("llsa_np.gpu.cupy_raw.backend").backend
    case = importlib.import_module("llsa_np.backends").Case("attention", "float64", 12, 264, 12, (65,))
    assert backend.refusals(case) == [
        "serves float16, bfloat16, float32, not float64",
        "serves D of 16..256 in steps of 8, not 12",
        "serves Dv of 16..256 in steps of 8, not 264",
        "serves block_size 8, 16, 32, 64, not 12",
        "serves topk of 1..64, not 65",
    ]
    assert backend.refusals(case._replace(dtype="bfloat16", dim=72, value_dim=16, block_size=8, topk=(1, 64))) == []


@emulated
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("block_size", [8, 32])
def test_lists_that_are_cut_into_pieces(block_size, group, monkeypatch):
    """A key block that all queries select makes many pieces of work, and their sum has the same bits again."""
    monkeypatch.setattr(transpose, "LEAST_SPLIT", 2)
    case = Case(dtype="float32", query_tokens=300, key_tokens=2 * block_size + 3, levels=2, topk=1, group=group)
    case = case.but(block_size=block_size, dim=16, value_dim=24, data="one_popular_key")
    of = transpose.lists_of(0, Hierarchy(case.key_tokens, block_size, 2), Hierarchy(300, block_size, 2), 1, group)
    assert 300 * group // 16 > 2 * of.split, "one list is longer than two pieces"
    first = run(case, "cupy_raw", NumPy)
    assert_within_bounds(case, first, reference(case, first.selection))
    again = run(case, "cupy_raw", NumPy, selection=first.selection)
    for name in first.arrays:
        assert_same_bits(first[name], again[name])


@emulated
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("dim", "value_dim"), [(72, 40), (136, 128), (192, 16), (256, 200)])
def test_every_width(dtype, dim, value_dim):
    case = Case(dtype=dtype, query_tokens=40, key_tokens=75, dim=dim, value_dim=value_dim, block_size=16, topk=2)
    results = run(case, "cupy_raw", NumPy)
    assert_within_bounds(case, results, reference(case, results.selection))


@emulated
@pytest.mark.parametrize("what", ["barrier", "unwaited", "unaligned"])
def test_the_emulator_catches(what, tmp_path):
    """A barrier that some threads do not reach, a read before a copy was waited for, a misaligned copy."""
    body = {
        "barrier": "if (threadIdx.x) __syncthreads();",
        "unwaited": "copy_async(tile, a.x, true); copies_commit(); a.x[4] = tile[0] == a.x[0]; copies_wait<0>();",
        "unaligned": "copy_async(tile, a.x + 1, true);",
    }[what]
    emulator = Path(__file__).parent / "emulator"
    code = f"""
#include "cuda.h"
#include <instructions.cuh>
struct Arguments {{ float* x; }};
void kernel(Arguments a) {{ alignas(16) static float tile[4]; {body} }}
int main() {{
    alignas(16) float x[8] = {{1, 2, 3, 4}};
    emulator::launch(1, 32, 0, [&] {{ kernel(Arguments{{x}}); }});
    return x[4] == 1;
}}
"""
    command = ["g++", "-std=c++20", "-w", f"-I{emulator}", f"-I{program.FOLDER}", "-x", "c++", "-", "-o"]
    where = tmp_path / "kernel"
    subprocess.run([*command, str(where)], input=code, text=True, check=True)
    done = subprocess.run([str(where)], capture_output=True, text=True, check=False)
    if what == "unwaited":
        assert done.returncode == 0, "the tile held the numbers before they were waited for"
    else:
        assert done.returncode != 0
        assert "emulator:" in done.stderr

"""The Numba kernels: compiled for a GPU on any machine, and in the simulator what the facts do not single out."""

import importlib
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
from calls import assert_same_bits, assert_within_bounds, reference, run
from strategies import DTYPES, SIMULATED, Case

import llsa_np as llsa
from llsa_np import plans

pytest.importorskip("numba.cuda", reason="numba-cuda is not installed")

from frameworks import Numba, NumPy
from numba import cuda as numba_cuda

from llsa_np.gpu.numba_cuda import (
    attend,
    attend_backward,
    attend_two_passes,
    backend,
    cuda,
    pool,
    select,
    tiles,
    transpose,
)
from llsa_np.hierarchy import Hierarchy
from llsa_np.options import check_attend_options

in_simulator = pytest.mark.skipif(not SIMULATED, reason="runs in Numba's simulator (NUMBA_ENABLE_CUDASIM=1)")
on_compiler = pytest.mark.skipif(SIMULATED, reason="the simulator compiles nothing")
on_either = pytest.mark.skipif(
    not SIMULATED and bool(llsa.backends()["numba_cuda"]), reason="needs a GPU, or Numba's simulator"
)
SHARED_MEMORY = 48 * 2**10
"""What a kernel may declare without asking the driver for more."""


def compiled_kernels(monkeypatch, dtype, block_size):
    """PTX of every kernel, by name, for compute capability 9.0, with no GPU."""
    dispatcher = importlib.import_module("numba.cuda.dispatcher")
    device = SimpleNamespace(compute_capability=(9, 0))
    monkeypatch.setattr(dispatcher, "get_current_device", lambda: device)
    compiled = []

    def compile_kernel(signature, function):
        ptx, _ = cuda.cuda.compile(function, signature, cc=(9, 0), device=False, abi="numba")
        compiled.append((function.__name__, ptx))

    monkeypatch.setattr(cuda, "compile_kernel", compile_kernel)
    forget_kernels()
    for module in (pool, select, attend, attend_two_passes):
        getattr(module, f"{module.__name__.rpartition('.')[2]}_kernels")(dtype, block_size)
    attend_backward.backward_kernels(dtype, block_size)
    forget_kernels()  # what stood in for kernels here cannot be launched
    assert len(compiled) >= 17
    return compiled


def forget_kernels():
    for module in (pool, select, attend, attend_two_passes, attend_backward, transpose):
        for name in dir(module):
            if name.endswith("_kernel"):
                getattr(module, name).cache_clear()


@on_compiler
@pytest.mark.parametrize(("dtype", "block_size"), [("float16", 4), ("bfloat16", 16), ("float32", 4), ("float64", 16)])
def test_every_kernel_compiles_for_a_gpu(monkeypatch, dtype, block_size):
    """No call is left, nothing lies in local memory, kernels for shorter types do no arithmetic in float64, and shared
    memory is what any GPU has; in the tile shape that most use, assembling spills no register."""
    for name, ptx in compiled_kernels(monkeypatch, dtype, block_size):
        assert ".target sm_90" in ptx
        assert not re.search(r"\bcall\b", ptx), f"{name} calls a function"
        assert ".local" not in ptx, f"{name} has arrays in local memory"
        assert dtype == "float64" or ".f64" not in ptx, f"{name} computes in float64"
        shared = sum(map(int, re.findall(r"\.shared .*?\.b8 \S+?\[(\d+)\]", ptx)))
        assert (shared > 0) == ("barrier" in ptx or "bar.sync" in ptx or "bar.red" in ptx)
        assert shared <= SHARED_MEMORY, f"{name} declares {shared} bytes"
        if block_size == 16 and dtype in ("bfloat16", "float64"):
            registers, stack = assembled(ptx)
            print(f"{dtype} {name}: {registers} registers, {shared} bytes of shared memory")
            assert stack == 0, f"{name} spills {stack} bytes"


def assembled(ptx):
    """(registers, bytes of stack) of a thread in machine code for sm_90."""
    from cuda.core import Linker, LinkerOptions, ObjectCode

    options = LinkerOptions(arch="sm_90", ptxas_options=["-v"], verbose=True)
    linker = Linker(ObjectCode.from_ptx(ptx.encode()), options=options)
    linker.link("cubin")
    registers, stack = re.search(r"used (\d+) registers.* (\d+) stack", linker.get_info_log()).groups()
    return int(registers), int(stack)


@on_compiler
def test_the_simulator_is_a_backend():
    """NUMBA_ENABLE_CUDASIM=1 makes numba_cuda able to run; NumPy arrays are copied there and back."""
    code = """
import numpy as np, llsa_np as llsa
x = np.random.default_rng(0).standard_normal((1, 1, 5, 2))
assert llsa.backends()["numba_cuda"] == ()
out, lse = llsa.attention(x, x, x, block_size=2, topk=1, backend="numba_cuda", return_lse=True)
expected, _ = llsa.attention(x, x, x, block_size=2, topk=1, return_lse=True)
assert type(out) is np.ndarray and type(lse) is np.ndarray
print(np.abs(out - expected).max() < 1e-12)
"""
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True", done.stderr


@on_either
@pytest.mark.parametrize("named", ["numba_cuda", "cupy_raw"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
def test_numpy_arrays_are_copied_and_come_back(named, dtype, layout):
    if llsa.backends()[named]:
        pytest.skip(f"{named} cannot run here")
    case = Case(dtype=dtype, layout=layout, group=2, memory="reversed", query_tokens=9, levels=2, topk=(3, 1))
    case = case.served(named)
    results = run(case, named, NumPy)
    assert all(type(level) is np.ndarray for level in results.selection)
    assert_within_bounds(case, results, reference(case, results.selection))
    k = case.arrays()[1]
    for x in llsa.pool(k, block_size=case.block_size, levels=2, layout=layout, backend=named):
        assert type(x) is np.ndarray
        assert x.dtype == k.dtype
    with pytest.raises(TypeError, match="NumPy"):
        llsa.select(k, Numba.array(k), backend=named)


@on_either
def test_options_may_be_arrays_of_numpy():
    """Only what lies on a device is copied there, and a Selection's arrays are judged however they are given."""
    x = np.random.default_rng(0).standard_normal((1, 1, 12, 4))
    options = {"block_size": np.int64(2), "levels": 2, "topk": np.array([2, 3]), "enrich": np.array([1, 2])}
    out = llsa.attention(x, x, x, backend="numba_cuda", **options)
    assert np.abs(out - llsa.attention(x, x, x, **options)).max() < 1e-12
    on_device = llsa.select(*(Numba.array(x),) * 2, block_size=2, backend="numba_cuda")
    for call in (
        lambda: llsa.attend(x, x, x, selection=on_device, backend="numba_cuda"),
        lambda: llsa.attend(x, x, x, on_device, backend="numba_cuda"),
    ):
        with pytest.raises(TypeError, match="NumPy and level 1 of selection one of Numba"):
            call()


@on_either
def test_other_byte_orders_are_copied_in_this_machines():
    x = np.random.default_rng(0).standard_normal((1, 1, 12, 4)).astype("f4")
    plain = llsa.attention(x, x, x, block_size=2, backend="numba_cuda")
    assert_same_bits(llsa.attention(*(x.astype(">f4"),) * 3, block_size=2, backend="numba_cuda"), plain)
    if SIMULATED:
        swapped = Numba.array(x.astype(">f4"))
        with pytest.raises(TypeError, match="q is a"):
            llsa.attention(swapped, swapped, swapped, block_size=2, backend="numba_cuda")


@on_either
def test_an_index_that_is_out_of_range_counts_as_none():
    """Wherever it stands, also where a row has more entries than there are parents."""
    x = np.random.default_rng(0).standard_normal((1, 1, 12, 4))
    q, k = x[:, :, :4], x[:, :, :8]
    rows = np.array([[[[-7, 0, 1]]]], np.int32)
    selection = llsa.Selection([rows], block_size=4, query_tokens=4, key_tokens=8, validate=False)
    expected = llsa.attend(q, k, k, selection)
    got = llsa.attend(q, k, k, selection, backend="numba_cuda")
    gradients = [
        llsa.attend_backward(q, q, k, k, *expected, selection, backend=name) for name in ("numpy", "numba_cuda")
    ]
    for a, b in zip((*expected, *gradients[0]), (*got, *gradients[1])):
        assert np.abs(a - b).max() < 1e-12


def test_results_lie_beside_the_arrays(monkeypatch):
    """On a machine with several GPUs, whichever is the current one."""
    from llsa_np.adapters import View, numba_arrays
    from llsa_np.adapters.numba_arrays import adapter

    entered = []
    monkeypatch.setattr(numba_arrays, "on_device", lambda name: entered.append(name) or nullcontext())
    monkeypatch.setattr(numba_arrays, "empty", np.empty)
    monkeypatch.setattr(numba_arrays, "device_index", lambda _: 1)
    adapter.empty((2, 3), "int32", View((2, 3), "int32", "cuda:1", np.empty((2, 3), "int32")))
    assert entered == ["cuda:1"]


@in_simulator
def test_auto_goes_by_where_the_arrays_are():
    x = np.ones((1, 1, 5, 2), np.float32)
    assert type(llsa.attention(x, x, x, block_size=2)) is np.ndarray
    on_device = Numba.array(x)
    assert type(llsa.attention(on_device, on_device, on_device, block_size=2)) is type(on_device)
    with pytest.raises(ValueError, match="cuda:0"):
        llsa.attention(on_device, on_device, on_device, backend="numpy")


@in_simulator
def test_the_simulators_arrays_are_served_beside_a_backend_that_plans(monkeypatch):
    """As on a machine with a GPU, whose cupy_raw asks every array where it begins."""
    monkeypatch.setattr(plans, "recorded_devices", lambda: {"cuda"})
    x = Numba.array(np.ones((1, 1, 5, 2), np.float32))
    assert type(llsa.attention(x, x, x, block_size=2, backend="numba_cuda")) is type(x)


@in_simulator
@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("parents", [1, 5, 11])
def test_transpose_is_stable(columns, parents):
    """Every parent's list is the ascending list of the rows that name it, and the pieces of work add up."""
    rng = np.random.default_rng(parents + columns)
    batch, kv_heads, group, length, run_length = 2, 2, 2, 13, 3
    selected = rng.integers(-2, parents + 2, (batch, kv_heads * group, length, columns)).astype(np.int32)
    of = transpose.lists(group * length, columns, parents, 3, run_length, least_split=8)
    number = batch * kv_heads
    starts, rows, items = (Numba.array(np.full(number * size, 2**30)) for size in (of.COUNTS, of.PAIRS, of.PARENTS + 1))
    transpose.transpose(Numba.array(selected), of, kv_heads, (starts, rows, items), 0)
    ends = starts.copy_to_host().reshape(number, of.COUNTS)[:, of.RANGES - 1 :: of.RANGES][:, :parents]
    rows, items = rows.copy_to_host().reshape(number, -1), items.copy_to_host().reshape(number, -1)
    for i_list, of_list in enumerate(selected.reshape(number, group * length, columns)):
        start, pieces = 0, 0
        for parent in range(parents):
            expected = np.nonzero(of_list == parent)[0]
            end = ends[i_list, parent]
            assert rows[i_list, start:end].tolist() == expected.tolist()
            assert items[i_list, parent] == pieces
            pieces += max(1, -(-len(expected) * run_length // of.SPLIT))
            start = end
        assert items[i_list, parents] == pieces <= of.ITEMS


@in_simulator
def test_a_key_block_that_every_query_selects_is_split():
    """Its list makes many pieces of work; their sum is right, and has the same bits on every run and in any batch."""
    case = Case(dtype="float32", query_tokens=40, key_tokens=12, levels=1, topk=1, group=2, enrich=(), dim=2)
    rows = np.zeros((1, 2, 10, 1), np.int32)
    selection = llsa.Selection([rows], block_size=4, query_tokens=40, key_tokens=12)
    of = attend_backward.lists_of(0, Hierarchy(12, 4, 1), Hierarchy(40, 4, 1), (1,), 2)
    assert of.ITEMS >= of.PARENTS + 80 // attend_backward.LEAST_SPLIT
    first = run(case, "numba_cuda", Numba, selection=selection)
    assert_within_bounds(case, first, reference(case, selection))
    again = run(case, "numba_cuda", Numba, selection=selection)
    for name in first.arrays:
        assert_same_bits(first[name], again[name])
    assert (first["dk"][:, :, 4:] == 0).all()


@on_either
@pytest.mark.parametrize("data", ["tied", "normal", "nan"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_all_forms_of_top_k_keep_the_same(dtype, data, monkeypatch):
    """Of fewer candidates than K, of one tile of them and of several."""
    most = 4 if SIMULATED else 32
    for key_tokens, topk in ((5, (most, 2)), (20, (3, most)), (20 if SIMULATED else 900, (1, most))):
        case = Case(dtype=dtype, key_tokens=key_tokens, query_tokens=7, block_size=3, levels=2, topk=topk)
        q, k, v, dout, dlse = case.but(data="normal" if data == "nan" else data).arrays()
        if data == "nan":
            k[:, :, key_tokens // 2] = np.nan
            q[:, :, 4] = -np.inf
        kept = {}
        for form in ("serial", "bitonic", "bits"):
            monkeypatch.setattr(select, "form_of", lambda *_, form=form: form)
            kept[form] = run(case, "numba_cuda", Numba, (q, k, v, dout, dlse)).selection
        for form in ("bitonic", "bits"):
            for a, b in zip(kept["serial"], kept[form]):
                assert np.array_equal(a, b), form


@on_either
@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_in_two_passes(dtype, monkeypatch):
    """The plain form is within the bounds too, with values of more dims than a tile has."""

    def spaces(_, work):
        if work.operation != "attend":
            return plain_spaces(backend.backend, work)
        queries, block_size = work.query_hierarchy.tokens, work.key_hierarchy.block_size
        shapes = (work.dtype, work.batch, work.heads, queries, work.value_dim, block_size, work.options)
        return attend_two_passes.attend_two_passes_spaces(*shapes)

    plain_spaces = type(backend.backend).spaces
    dims = {"dim": 5, "value_dim": 7} if SIMULATED else {"dim": 70, "value_dim": 130}
    case = Case(dtype=dtype, key_tokens=23, query_tokens=13, block_size=3, levels=2, topk=2, **dims)
    selection = run(case, "numba_cuda", Numba).selection
    monkeypatch.setattr(type(backend.backend), "spaces", spaces)
    monkeypatch.setattr(backend, "attend", attend_two_passes.attend_two_passes)
    results = run(case, "numba_cuda", Numba, selection=selection)
    assert_within_bounds(case, results, reference(case, results.selection))


@in_simulator
@pytest.mark.parametrize("shape", [tiles.Shape(1, 2, 1, 3, 1), tiles.Shape(2, 4, 4, 2, 2), tiles.Shape(4, 16, 4, 4, 4)])
def test_other_shapes_of_tiles(monkeypatch, shape):
    """Those of a GPU among them."""
    for module in (select, attend, attend_backward):
        monkeypatch.setattr(module, "shape_for", lambda *_: shape)
    case = Case(dtype="float32", key_tokens=19, query_tokens=7, levels=1, topk=2, dim=5, value_dim=3)
    results = run(case, "numba_cuda", Numba)
    assert_within_bounds(case, results, reference(case, results.selection))


def test_bfloat16_is_rounded_to_nearest_even():
    """In the simulator by the kernels' own arithmetic on bits, on every kind of number."""
    if not SIMULATED:
        pytest.skip("calls a device function")
    store, load = cuda.storer("bfloat16"), cuda.loader("bfloat16")
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 2000, dtype=np.uint64).astype(np.uint32)
    edges = np.array([0, 1, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x3F808000, 0x3F818000, 0x80000000], np.uint32)
    for value in np.concatenate([bits, edges]).view(np.float32):
        stored = np.uint16(store(value))
        expected = DTYPES["bfloat16"](value)
        if np.isnan(value):
            assert np.isnan(load(stored))
        else:
            assert stored == expected.view(np.uint16)
            assert load(stored) == np.float32(expected)


@on_compiler
def test_workspace_is_bounded_by_shapes():
    """Neither a dense mask nor anything of queries times keys, forward or backward, also where everything is kept."""
    for tokens, block_size, levels, kept in (
        (2**14, 16, 2, 8),
        (2**18, 16, 3, 8),
        (2**16, 1024, 1, 8),
        (2**16, 16, 1, 4096),
    ):
        hierarchy = Hierarchy(tokens, block_size, levels)
        topk = (kept,) * levels
        options = check_attend_options("test", None, True, None, "full", levels=hierarchy.levels, dim=64)
        spaces = attend_backward.backward_spaces(
            *("bfloat16", 1, 1, 1, 64, 64, hierarchy, hierarchy, topk, options, frozenset("qkv"))
        )
        spaces += attend.attend_spaces("bfloat16", 1, 1, tokens, 64, block_size, options)
        spaces += select.select_spaces("bfloat16", 1, 1, hierarchy, hierarchy, topk)
        spaces += pool.pool_spaces("bfloat16", 1, 1, 64, hierarchy)
        pairs = sum(length * kept for length in hierarchy.lengths[1:])
        assert (
            sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in spaces) <= 2000 * tokens + 16 * pairs
        )


def leaves_early(x):
    if numba_cuda.threadIdx.x == 0:
        return
    numba_cuda.syncthreads()


def waits_elsewhere(x):
    if numba_cuda.threadIdx.x == 0:
        numba_cuda.syncthreads()
    else:
        numba_cuda.syncthreads()


def looks_back(x):
    x[numba_cuda.threadIdx.x - 1] = 1


def looks_back_in_shared_memory(x):
    shared = numba_cuda.shared.array(4, np.float32)
    shared[numba_cuda.threadIdx.x - 1] = 1


@in_simulator
@pytest.mark.parametrize("wrong", [leaves_early, waits_elsewhere, looks_back, looks_back_in_shared_memory])
def test_the_guards_of_the_simulator_catch(wrong):
    import simulator

    error = IndexError if "back" in wrong.__name__ else simulator.DivergentBarrierError
    with pytest.raises(error):
        numba_cuda.jit(wrong)[1, 2](Numba.array(np.zeros(4)))

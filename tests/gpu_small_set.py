"""A few calls that touch every kernel, small enough for compute-sanitizer: ragged, grouped, tied, in several dtypes."""

import re
import sys

import frameworks
from calls import assert_within_bounds, reference, run
from strategies import Case

from llsa_np import plans
from llsa_np.accuracy import compare

CASES = [
    Case(dtype="float32", key_tokens=70, query_tokens=45, dim=9, value_dim=7, block_size=4, topk=3, group=2, levels=2),
    Case(dtype="bfloat16", key_tokens=130, query_tokens=130, dim=64, value_dim=64, block_size=16, topk=3, kv_heads=2),
    Case(dtype="float16", key_tokens=50, query_tokens=33, block_size=3, topk=9, data="one_popular_key", layout="bnhd"),
    Case(dtype="float64", key_tokens=40, query_tokens=40, block_size=2, levels=4, memory="sliced", data="tied"),
    # More dims than a tile has, both of q and of v; K by sorting on one level and by counting bits on the other
    Case(
        dtype="bfloat16", key_tokens=300, query_tokens=90, dim=72, value_dim=130, block_size=4, levels=2, topk=(40, 70)
    ),
    # Many queries on few keys: lists that are split into pieces, the coarsest level's among them
    Case(
        dtype="float32",
        key_tokens=64,
        query_tokens=900,
        dim=8,
        value_dim=8,
        group=2,
        levels=1,
        topk=1,
        data="one_popular_key",
    ),
    # So many keys and rows that lists are counted in chunks
    Case(dtype="float16", key_tokens=1100, query_tokens=700, dim=16, value_dim=16, block_size=8, levels=1, topk=8),
    # Keys that no query head reads
    Case(dtype="float32", batch=2, kv_heads=2, group=0),
    # Rows of the selection that are each of thousands of queries, on two levels
    Case(dtype="bfloat16", key_tokens=300, query_tokens=4200, dim=32, value_dim=48, levels=4, topk=(3, 2, 1, 1)).but(
        block_size=16
    ),
]


def numba_kernels():
    """Names of the Numba kernels that calls may launch."""
    from llsa_np.gpu.numba_cuda import attend, attend_backward, pool, select

    lists = (pool.pool_kernels, select.select_kernels, attend.attend_kernels, attend_backward.backward_kernels)
    return {kernel.py_func.__name__ for kernels in lists for kernel in kernels("float32", 16)}


def cuda_kernels():
    """Names of the CUDA C++ kernels."""
    from llsa_np.gpu.cupy_raw.program import FOLDER

    declared = r"__global__[^{;]*?(\w+)\(const __grid_constant__"
    return {name for path in FOLDER.glob("*.cu") for name in re.findall(declared, path.read_text())}


def count_launches():
    """The names of all Numba kernels that are launched from here on, as a set that grows."""
    from llsa_np.gpu.numba_cuda import attend, attend_backward, cuda, pool, select, transpose

    launched = set()

    def launch(kernel, blocks, *arguments):
        if blocks:
            launched.add(kernel.py_func.__name__)
        cuda.launch(kernel, blocks, *arguments)

    for module in (pool, select, attend, attend_backward, transpose):
        module.launch = launch
    return launched


def check(backends):
    """The largest error over its bound by dtype. Raises if one is over, or if a backend's kernel is never launched."""
    plans.ONE_ROOM = False  # a write past the end of one array is then one past the end of an allocation
    worst = {}
    launched = count_launches() if "numba_cuda" in backends else set()
    for backend in backends:
        for framework in frameworks.OF_BACKEND[backend]:
            for drawn in CASES:
                case = drawn.served(backend)
                results = run(case, backend, framework)
                expected = reference(case, results.selection)
                assert_within_bounds(case, results, expected)
                for name, ratio in compare(results.arrays, expected, case.dtype).items():
                    of_dtype = worst.setdefault(case.dtype, {})
                    of_dtype[name] = max(of_dtype.get(name, 0), round(float(ratio), 4))
    missed = numba_kernels() - launched if "numba_cuda" in backends else set()
    if "cupy_raw" in backends:
        planned = [plan.recording.launches for plan in plans.plans.values() if plan]
        missed |= cuda_kernels() - {launch.kernel.name for launches in planned for launch in launches}
    if missed:
        raise ValueError(f"gpu_small_set: no case launches {sorted(missed)}")
    print(f"{len(CASES)} cases on {', '.join(backends)}")
    return worst


if __name__ == "__main__":
    check(sys.argv[1:])

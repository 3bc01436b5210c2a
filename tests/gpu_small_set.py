"""A few calls that touch every kernel, small enough for compute-sanitizer: ragged, grouped, tied, in several dtypes."""

import frameworks
from calls import assert_within_bounds, reference, run
from strategies import Case

import llsa_np as llsa

CASES = [
    Case(dtype="float32", key_tokens=70, query_tokens=45, dim=9, value_dim=7, block_size=4, topk=3, group=2, levels=2),
    Case(dtype="bfloat16", key_tokens=130, query_tokens=130, dim=64, value_dim=64, block_size=16, topk=3, kv_heads=2),
    Case(dtype="float16", key_tokens=50, query_tokens=33, block_size=3, topk=9, data="one_popular_key", layout="bnhd"),
    Case(dtype="float64", key_tokens=40, query_tokens=40, block_size=2, levels=4, memory="sliced", data="tied"),
]


def main():
    backends = [name for name, reasons in llsa.backends().items() if not reasons and name != "numpy"]
    for backend in backends:
        for framework in frameworks.OF_BACKEND[backend]:
            for case in CASES:
                results = run(case, backend, framework)
                assert_within_bounds(case, results, reference(case, results.selection))
    print(f"{len(CASES)} cases on {', '.join(backends)}")


if __name__ == "__main__":
    main()

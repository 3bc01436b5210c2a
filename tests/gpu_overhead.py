"""What a call costs the host: microseconds until it is enqueued, without waiting for the device."""

import statistics
import time

import cupy as cp
import torch

import llsa_np as llsa
from llsa_np.plans import plans

SHAPE = {"dtype": "bfloat16", "batch": 1, "heads": 1, "dim": 64, "block_size": 16, "levels": 2, "topk": 8}
LENGTHS = (1024, 16384)
"""So short that the device is done before the host."""


def rows(backend):
    """Of a call: its recorded launches alone, with results and workspace allocated; of CuPy's arrays; of tensors."""
    for tokens in LENGTHS:
        size = (SHAPE["batch"], SHAPE["heads"], tokens, SHAPE["dim"])
        q, k, v, dout = (torch.randn(size, dtype=torch.bfloat16, device="cuda") for _ in range(4))
        needing = [x.clone().requires_grad_() for x in (q, k, v)]
        of_cupy = [cp.from_dlpack(x) for x in (q, k, v)]
        options = {"levels": SHAPE["levels"], "topk": SHAPE["topk"], "backend": backend}

        def forward(arrays, options=options):
            return llsa.attention(*arrays, **options)

        plans.clear()
        forward((q, k, v))
        (plan,) = plans.values()
        out = forward(needing)

        def backward(out=out, needing=needing, dout=dout):
            return torch.autograd.grad(out, needing, dout, retain_graph=True)

        calls = {
            "launches": lambda plan=plan, arrays=[q, k, v]: plan.run(arrays, "attention"),
            "cupy": lambda of_cupy=of_cupy: forward(of_cupy),
            "torch": lambda arrays=(q, k, v): forward(arrays),
            "torch_recording": lambda needing=needing: forward(needing),
            "torch_backward": backward,
        }
        for _ in range(50):
            forward(needing), backward()
        torch.cuda.synchronize()
        free = torch.cuda.mem_get_info()[0]
        forward(needing), backward()
        torch.cuda.synchronize()
        if torch.cuda.mem_get_info()[0] != free:
            raise ValueError("a call like one before took memory from the device, past PyTorch's allocator")
        yield {"backend": backend} | SHAPE | {"tokens": tokens} | {name: host_us(call) for name, call in calls.items()}


def host_us(call, rounds=20, calls=20):
    """Median microseconds of the host for a call, of rounds of so many before each of which the device is idle."""
    for _ in range(50):
        call()
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        for _ in range(calls):
            start = time.perf_counter()
            call()
            times.append(1e6 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    return round(statistics.median(times), 1)

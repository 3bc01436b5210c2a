"""Times of whole calls on a GPU, beside dense attention through PyTorch in the same process.

Medians by device events, of calls that follow one another without waiting for the device: so the host's share is seen
only where it is the longer one; it is told by itself as well. Before each, a quarter of a second of the same calls: the
card's clocks are then those of this work, not of the dense attention before it. Peak memory of a forward and a backward
call is what lies beyond q, k, v, dO, out and the three gradients.
"""

import statistics
import time
from functools import cache
from itertools import pairwise

import cupy as cp
import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

import llsa_np as llsa

MAIN = {
    "dtype": "bfloat16",
    "batch": 2,
    "heads": 4,
    "kv_heads": 4,
    "tokens": 65536,
    "dim": 64,
    "block_size": 16,
    "topk": 8,
    "levels": 2,
    "data": "random",
}
LENGTHS = {
    "numba_cuda": (4096, 16384, 65536, 262144, 1048576),
    "cupy_raw": (1024, 2048, 4096, 8192, 16384, 65536, 262144, 1048576),
}
OTHERS = {
    "numba_cuda": (),
    "cupy_raw": (
        {"data": "smooth"},
        {"data": "photograph", "batch": 1},
        {"data": "constant"},
        {"data": "one_popular_key"},
        {"levels": 1},
        {"topk": 16},
        {"topk": 32},
        {"block_size": 32},
        {"block_size": 64},
        {"dim": 128},
        {"dtype": "float16"},
        {"dtype": "float32"},
        {"batch": 1, "heads": 8, "kv_heads": 1},
        {"batch": 1, "heads": 1, "kv_heads": 1, "tokens": 1048576, "levels": 4},
    ),
}
MOST_DENSE = 300_000
"""Tokens up to which dense attention is timed: beyond, it takes minutes."""


def shapes_of(backend, lengths=None):
    """What is timed: every length with two levels and with the default, then the others."""
    for tokens in lengths or LENGTHS[backend]:
        default = llsa.default_levels(tokens)
        for levels in sorted({default, min(2, default)}):
            yield MAIN | {"tokens": tokens, "levels": levels}
    for changes in OTHERS[backend]:
        yield MAIN | changes


def rows(backend, lengths=None):
    """The report's `speed`, row after row."""
    for shape in shapes_of(backend, lengths):
        peers = dense_peers(*(shape[name] for name in ("dtype", "batch", "heads", "kv_heads", "tokens", "dim")))
        yield {"backend": backend} | shape | measure(backend, shape) | {"peers": peers}


def measure(backend, shape):
    """Milliseconds, the host's milliseconds and the peak of one shape."""
    q, k, v, dout = (cp.from_dlpack(x) for x in tensors(shape))
    select = {"levels": shape["levels"], "topk": shape["topk"], "block_size": shape["block_size"], "backend": backend}

    def backward(out, lse, selection):
        return llsa.attend_backward(dout, q, k, v, out, lse, selection, backend=backend)

    torch.cuda.empty_cache()  # of the shape before
    pool = cp.get_default_memory_pool()
    pool.free_all_blocks()
    before = pool.total_bytes()
    selection = llsa.select(q, k, **select)
    out, lse = llsa.attend(q, k, v, selection, backend=backend)
    gradients = backward(out, lse, selection)
    peak = pool.total_bytes() - before - out.nbytes - sum(x.nbytes for x in gradients)
    del gradients
    forward_ms, forward_host = median_ms(lambda: llsa.attention(q, k, v, **select))
    backward_ms, backward_host = median_ms(lambda: backward(out, lse, selection))
    return {
        "forward_ms": forward_ms,
        "backward_ms": backward_ms,
        "forward_host_ms": forward_host,
        "backward_host_ms": backward_host,
        "peak_extra_mib": round(peak / 2**20, 1),
    }


def tensors(shape):
    """q, k, v, dout of torch; CuPy takes them as they lie."""
    random = torch.Generator("cuda").manual_seed(0)
    dtype = getattr(torch, shape["dtype"])

    def draw(heads, dtype=dtype):
        size = (shape["batch"], heads, shape["tokens"], shape["dim"])
        return torch.randn(size, generator=random, device="cuda", dtype=dtype)

    heads, kv_heads = shape["heads"], shape["kv_heads"]
    q, k, v, dout = draw(heads), draw(kv_heads), draw(kv_heads), draw(heads)
    if shape["data"] == "smooth":
        root = torch.arange(1, shape["tokens"] + 1, device="cuda").sqrt()[:, None]
        q, k, v = ((draw(n, torch.float32).cumsum(2) / root).to(dtype) for n in (heads, kv_heads, kv_heads))
    elif shape["data"] == "constant":
        q, k = (x[:, :, :1].expand(x.shape).contiguous() for x in (q, k))
    elif shape["data"] == "one_popular_key":  # every query's best match lies in one block
        q = q.abs()
        k[:, :, shape["tokens"] // 2] = 4
    elif shape["data"] == "photograph":
        from llsa_np.cli.tokens import photograph_tokens

        side = round(shape["tokens"] ** 0.5)
        photo = photograph_tokens(None, side, heads, shape["dim"], seed=0)
        q, k, v = (torch.from_numpy(np.ascontiguousarray(x)).cuda().to(dtype) for x in (photo.q, photo.k, photo.v))
    return q, k, v, dout


@cache
def dense_peers(dtype, batch, heads, kv_heads, tokens, dim):
    """FlashAttention-2 and cuDNN attention through PyTorch, both ways; in float32, which they lack, PyTorch's
    memory-efficient kernel."""
    if tokens > MOST_DENSE:
        return {}
    kernels = {"flash_attention_2": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    if dtype == "float32":
        kernels = {"memory_efficient": SDPBackend.EFFICIENT_ATTENTION}
    peers = {}
    for name, kernel in kernels.items():
        try:
            peers[name] = dense_peer(kernel, dtype, batch, heads, kv_heads, tokens, dim)
        except RuntimeError as refusal:  # PyTorch's word for shapes that a kernel does not serve
            print(f"{name}: {refusal}", flush=True)
    return peers


def dense_peer(kernel, dtype, batch, heads, kv_heads, tokens, dim):
    """Forward and backward of one of PyTorch's kernels."""
    sizes = [(batch, n, tokens, dim) for n in (heads, kv_heads, kv_heads, heads)]
    q, k, v, dout = (torch.randn(size, device="cuda", dtype=getattr(torch, dtype)) for size in sizes)
    needing = [x.detach().requires_grad_() for x in (q, k, v)]
    with sdpa_kernel(kernel):

        def forward(q, k, v):
            return sdpa(q, k, v, enable_gqa=heads != kv_heads)

        def backward(out):
            return torch.autograd.grad(out, needing, dout, retain_graph=True)

        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = forward(*needing)
        gradients = backward(out)
        peak = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in (out, *gradients))
        del gradients
        forward_ms, _ = median_ms(lambda: forward(q, k, v))
        backward_ms, _ = median_ms(lambda: backward(out))
    return {"forward_ms": forward_ms, "backward_ms": backward_ms, "peak_extra_mib": round(peak / 2**20, 1)}


def median_ms(call, budget_ms=300.0, warm_ms=250.0):
    """(median milliseconds on the device, median milliseconds of the host) of a call, after warm calls."""
    call()
    torch.cuda.synchronize()
    first = time.perf_counter()
    while True:
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        once = 1000 * (time.perf_counter() - start)
        if 1000 * (time.perf_counter() - first) > warm_ms:
            break
    marks = [torch.cuda.Event(enable_timing=True)]
    marks[0].record()
    host = []
    for _ in range(max(3, min(30, int(budget_ms / once)))):
        start = time.perf_counter()
        call()
        host.append(1000 * (time.perf_counter() - start))
        marks.append(torch.cuda.Event(enable_timing=True))
        marks[-1].record()
    torch.cuda.synchronize()
    device = statistics.median(a.elapsed_time(b) for a, b in pairwise(marks))
    return round(device, 4), round(statistics.median(host), 4)


def repeats(backend, runs=1000, tokens=16384):
    """How many of so many runs of a forward and a backward call gave other bits than the first."""
    shape = MAIN | {"tokens": tokens}
    q, k, v, dout = (cp.from_dlpack(x) for x in tensors(shape))

    def once():
        selection = llsa.select(q, k, levels=shape["levels"], backend=backend)
        out, lse = llsa.attend(q, k, v, selection, backend=backend)
        return *selection, out, lse, *llsa.attend_backward(dout, q, k, v, out, lse, selection, backend=backend)

    def bits(x):
        return x.view(cp.uint16) if x.dtype.itemsize == 2 else x.view(cp.uint32)

    first = [bits(x) for x in once()]
    different = cp.zeros(runs, cp.int32)
    for i in range(runs):
        for a, b in zip(first, once()):
            different[i] += (a != bits(b)).any()
    return {"runs": runs, "different": int((different > 0).sum()), "tokens": tokens}

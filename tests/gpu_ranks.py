"""One sequence over the GPUs of a machine: times, memory and the share of communication, beside one GPU alone.

Run by torch.distributed.run, one process for each GPU; rank 0 writes the rows into the file that is named.
"""

import json
import statistics
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from llsa_np.adapters import pytorch, pytorch_distributed
from llsa_np.hierarchy import default_levels

SHAPE = {"dtype": "bfloat16", "batch": 1, "heads": 8, "kv_heads": 8, "dim": 64, "block_size": 16, "topk": 8}
LENGTHS = (65536, 1048576)


class NoAttention(torch.autograd.Function):
    """Takes and gives what attention does, and computes nothing: what is left of a step is communication."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(k, v)
        return q.clone()

    @staticmethod
    def backward(ctx, dout):
        k, v = ctx.saved_tensors
        return dout.clone(), torch.empty_like(k), torch.empty_like(v)


def main():
    dist.init_process_group("nccl")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.cuda.set_device(rank)
    mesh = init_device_mesh("cuda", (ranks,))
    rows = []
    for tokens in LENGTHS:
        generator = torch.Generator("cuda").manual_seed(0)
        size = (SHAPE["batch"], SHAPE["heads"], tokens, SHAPE["dim"])
        whole = [torch.randn(size, generator=generator, dtype=torch.bfloat16, device="cuda") for _ in range(4)]
        alone = measure(lambda q, k, v: pytorch.attention(q, k, v, backend="cupy_raw"), *whole)
        expected = [x.chunk(ranks, 2)[rank].clone() for x in alone.pop("results")]
        own = [x.chunk(ranks, 2)[rank].clone() for x in whole]
        del whole
        for trade in ("heads", "keys"):
            step = lambda q, k, v, trade=trade: pytorch_distributed.sequence_parallel_attention(  # noqa: E731
                q, k, v, mesh, trade=trade, backend="cupy_raw"
            )
            told = measure(step, *own)
            found = zip(("out", "dq", "dk", "dv"), told.pop("results"), expected)
            same = [name for name, x, y in found if torch.equal(x, y)]
            if "out" not in same or "dq" not in same:
                raise ValueError(f"{trade}, {tokens} tokens, rank {rank}: out and dq are not those of one GPU")
            pytorch_distributed.attention = lambda q, k, v, **_: NoAttention.apply(q, k, v)
            moved = measure(step, *own)["ms"]
            pytorch_distributed.attention = pytorch.attention
            told |= {"communication": round(moved / told["ms"], 3), "same_bits": same}
            every = [None] * ranks
            dist.all_gather_object(every, told)
            told = {name: max(x[name] for x in every) for name in ("ms", "mib", "communication")}
            told["same_bits"] = [name for name in same if all(name in x["same_bits"] for x in every)]
            shape = {"gpus": ranks, "tokens": tokens, "levels": default_levels(tokens), "trade": trade}
            one = {"one_gpu_ms": alone["ms"], "one_gpu_mib": alone["mib"]}
            rows.append({"backend": "cupy_raw"} | SHAPE | shape | told | one)
    if rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(rows))
    dist.destroy_process_group()


def measure(attention, q, k, v, dout):
    """Median milliseconds of a forward and a backward step, and the memory that it takes beyond q, k, v and dout."""
    arrays = [x.requires_grad_() for x in (q, k, v)]

    def step():
        out = attention(*arrays)
        return out, *torch.autograd.grad(out, arrays, dout)

    results = [x.detach() for x in step()]
    del results[:]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = [x.detach() for x in step()]
    torch.cuda.synchronize()
    mib = (torch.cuda.max_memory_allocated() - before) / 2**20
    times = []
    for _ in range(10):
        dist.barrier()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return {"ms": round(statistics.median(times), 3), "mib": round(mib, 1), "results": results}


if __name__ == "__main__":
    main()

"""PyTorch over several ranks: attention of one sequence whose tokens lie on different devices.

Batch entries and heads need nothing from here: shard them as they are, by DistributedDataParallel, FSDP2 or a tensor
parallel plan. All that moves is DTensor's collectives, which also bring the gradients back.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from llsa_np.adapters.pytorch import attention
from llsa_np.checks import ORDER
from llsa_np.hierarchy import default_levels
from llsa_np.options import check_block_size, check_layout


def sequence_parallel_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mesh: DeviceMesh,
    *,
    trade: Literal["heads", "keys"] | None = None,
    query_tokens: int | None = None,
    key_tokens: int | None = None,
    **options: Any,
) -> Any:
    """`llsa_np.attention` of a sequence whose tokens lie over the ranks of a mesh: the same as in one process.

    q, k, v: this rank's tokens, in the layout of `options`: rank r has the r-th of torch.chunk's parts, so all ranks
    have ceil(tokens / ranks) but for the last ones. mesh: of one dimension. query_tokens, key_tokens: of all ranks
    together; None where every rank has equally many. options: of `llsa_np.attention`.
    trade: "heads": tokens are traded for heads around the attention, so that a rank has all tokens of some heads:
    ranks divide heads and kv heads. "keys": every rank gets all keys and values, and keeps its queries, which begin at
    a multiple of block_size ** levels. None: "heads" where they divide, else "keys".
    Returns this rank's part of out, or (out, lse) with return_lse. Differentiable.
    Moved per rank, for R ranks: "heads" (R - 1) / R of its part of q, k, v and out; "keys" all other ranks' k and v.
    Raises ValueError for a mesh of several dimensions, for sizes that do not fit, and as `llsa_np.attention`.
    """
    who = "sequence_parallel_attention"
    layout = check_layout(who, options.get("layout", "bhnd"))
    if mesh.ndim != 1:
        raise ValueError(f"{who}: mesh has {mesh.ndim} dimensions; allowed is one, such as mesh['sequence']")
    ranks, rank = mesh.size(), mesh.get_local_rank()
    tokens, heads = ORDER[layout].index("tokens"), ORDER[layout].index("heads")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{who}: {name} has shape {tuple(x.shape)}; it has four axes ({', '.join(ORDER[layout])})")
    whole = {
        "q": all_tokens(who, "q", q.shape[tokens], query_tokens, ranks, rank),
        "k": all_tokens(who, "k", k.shape[tokens], key_tokens, ranks, rank),
    }
    divides = q.shape[heads] % ranks == 0 and k.shape[heads] % ranks == 0
    if trade not in (None, "heads", "keys"):
        raise ValueError(f"{who}: trade is {trade!r}; allowed is 'heads', 'keys' or None")
    if trade == "heads" and not divides:
        raise ValueError(
            f"{who}: q has {q.shape[heads]} heads and k {k.shape[heads]}, which {ranks} ranks do not divide; use "
            "trade='keys'"
        )

    def of_tokens(x: torch.Tensor, total: int) -> DTensor:
        """This rank's part as a part of the whole."""
        shape = torch.Size([total if axis == tokens else n for axis, n in enumerate(x.shape)])
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(x.contiguous(), mesh, [Shard(tokens)], run_check=False, shape=shape, stride=stride)

    parts = [(q, whole["q"]), (k, whole["k"]), (v, whole["k"])]
    if trade == "keys" or not divides:
        block_size = check_block_size(who, options.get("block_size", 16))
        levels = options.get("levels")
        levels = default_levels(whole["k"], block_size) if levels is None else levels
        first = rank * -(-whole["q"] // ranks)
        if first % block_size**levels and first < whole["q"]:
            raise ValueError(
                f"{who}: rank {rank} begins at query {first}, which is no multiple of block_size ** levels, "
                f"{block_size} ** {levels}; queries are kept in whole blocks of the coarsest level. Use fewer levels, "
                "other parts, or ranks that divide the heads"
            )
        k, v = (
            of_tokens(x, total).redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
            for x, total in parts[1:]
        )
        return attention(q, k, v, **options)

    q, k, v = (of_tokens(x, total).redistribute(placements=[Shard(heads)]).to_local() for x, total in parts)
    results = attention(q, k, v, **options)

    def back(x: torch.Tensor, head_axis: int, token_axis: int) -> torch.Tensor:
        of_heads = DTensor.from_local(x, mesh, [Shard(head_axis)], run_check=False)
        return of_heads.redistribute(placements=[Shard(token_axis)]).to_local()

    if isinstance(results, tuple):
        out, lse = results
        return back(out, heads, tokens), back(lse, 1, 2)  # lse is (batch, heads, tokens) in both layouts
    return back(results, heads, tokens)


def all_tokens(who: str, name: str, here: int, total: int | None, ranks: int, rank: int) -> int:
    """The tokens of all ranks together, of which this rank's are torch.chunk's part."""
    if total is None:
        return here * ranks
    most = -(-total // ranks)
    expected = max(0, min(most, total - rank * most))
    if here != expected or here == 0:
        raise ValueError(
            f"{who}: {name} has {here} tokens on rank {rank}; of {total} tokens over {ranks} ranks it has {expected}, "
            "as torch.chunk gives them, and at least 1"
        )
    return total

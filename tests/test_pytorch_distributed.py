"""PyTorch over several ranks, by gloo on the CPU: every rank's share is the same as in one process."""

import pytest
from strategies import EMULATED, SIMULATED

import llsa_np as llsa

if SIMULATED or EMULATED:
    pytest.skip("PyTorch is tested without a simulator", allow_module_level=True)

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from llsa_np.adapters.pytorch import LLSASelfAttention
from llsa_np.adapters.pytorch_distributed import sequence_parallel_attention

OPTIONS = {"block_size": 4, "topk": 2, "levels": 2}


def on_ranks(ranks, function, tmp_path):
    """Runs function(mesh) on so many processes; what one of them raises is raised here."""
    mp.spawn(_rank, (ranks, str(tmp_path / "store"), function), ranks)


def _rank(rank, ranks, store, function):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, init_method=f"file://{store}")
    try:
        torch.manual_seed(0)
        function(init_device_mesh("cpu", (ranks,)))
    finally:
        dist.destroy_process_group()


def check_sequence(mesh, heads, kv_heads, queries, keys, layout, trade, uneven=False):
    """Outputs and gradients of this rank's tokens are those of one process."""
    ranks, rank = mesh.size(), mesh.get_local_rank()
    axis = 2 if layout == "bhnd" else 1

    def draw(h, n, d=8):
        return torch.randn((2, h, n, d) if layout == "bhnd" else (2, n, h, d), dtype=torch.float64)

    arrays = draw(heads, queries), draw(kv_heads, keys), draw(kv_heads, keys, 6)
    whole = [x.clone().requires_grad_() for x in arrays]
    expected, expected_lse = llsa.attention(*whole, return_lse=True, layout=layout, **OPTIONS)
    dout, dlse = torch.randn_like(expected), torch.randn_like(expected_lse)
    torch.autograd.backward((expected, expected_lse), (dout, dlse))

    def part(x, dim=axis):
        return x.detach().chunk(ranks, dim)[rank].clone()

    own = [part(x).requires_grad_() for x in arrays]
    sizes = {"query_tokens": queries, "key_tokens": keys} if uneven else {}
    out, lse = sequence_parallel_attention(*own, mesh, trade=trade, return_lse=True, layout=layout, **sizes, **OPTIONS)
    torch.autograd.backward((out, lse), (part(dout), part(dlse, 2)))
    near = {"rtol": 1e-12, "atol": 1e-12}
    of_outputs = {"rtol": 0, "atol": 0} if trade == "heads" else near  # a part of the queries is tiled by itself
    torch.testing.assert_close(out, part(expected), **of_outputs)
    torch.testing.assert_close(lse, part(expected_lse, 2), **of_outputs)
    for x, y in zip(own, whole):
        torch.testing.assert_close(x.grad, part(y.grad), **near)
    alone = sequence_parallel_attention(
        *(x.detach() for x in own), mesh, trade=trade, layout=layout, **sizes, **OPTIONS
    )
    torch.testing.assert_close(alone, part(expected), **of_outputs)


def on_two_ranks(mesh):
    check_sequence(mesh, 4, 2, 64, 64, "bhnd", None)
    check_sequence(mesh, 4, 2, 46, 90, "bnhd", "heads")
    check_sequence(mesh, 4, 2, 61, 37, "bhnd", "heads", uneven=True)
    check_sequence(mesh, 3, 1, 64, 50, "bnhd", None)
    check_sequence(mesh, 4, 2, 96, 64, "bhnd", "keys")
    q = torch.randn(1, 3, 20, 8)
    for options, words in (
        ({"trade": "heads"}, "do not divide"),
        ({"trade": "tokens"}, "allowed is 'heads'"),
        ({"query_tokens": 50}, "of 50 tokens over 2 ranks it has 25"),
    ):
        with pytest.raises(ValueError, match=words):
            sequence_parallel_attention(q, q, q, mesh, **options, **OPTIONS)
    if mesh.get_local_rank():
        with pytest.raises(ValueError, match="no multiple of block_size"):
            sequence_parallel_attention(q, q, q, mesh, trade="keys", **OPTIONS)


def on_three_ranks(mesh):
    check_sequence(mesh, 3, 3, 50, 70, "bhnd", None, uneven=True)
    check_sequence(mesh, 2, 1, 96, 48, "bhnd", None)


def test_a_sequence_over_two_ranks(tmp_path):
    on_ranks(2, on_two_ranks, tmp_path)


def test_a_sequence_over_three_ranks(tmp_path):
    on_ranks(3, on_three_ranks, tmp_path)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = LLSASelfAttention(16, 2, **OPTIONS)
        self.head = torch.nn.Linear(16, 4)

    def forward(self, x):
        return self.head(x + self.attention(x))


def losses_of(model, batches):
    """Three steps, each on this process's batch entries."""
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for x, y in batches:
        optimiser.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def data_parallel(mesh):
    """DistributedDataParallel and FSDP2 give the losses of one process with the whole batch."""
    ranks, rank = mesh.size(), mesh.get_local_rank()
    state = Block().double().state_dict()
    batches = [
        (torch.randn(4, 40, 16, dtype=torch.float64), torch.randn(4, 40, 4, dtype=torch.float64)) for _ in range(3)
    ]

    def model():
        fresh = Block().double()
        fresh.load_state_dict(state)
        return fresh

    expected = losses_of(model(), batches)
    own = [tuple(t.chunk(ranks)[rank] for t in pair) for pair in batches]
    for parallel in (DistributedDataParallel(model()), fully_shard(model(), mesh=mesh)):
        losses = losses_of(parallel, own)
        dist.all_reduce(losses)
        torch.testing.assert_close(losses / ranks, expected)


def test_data_parallel_training(tmp_path):
    on_ranks(2, data_parallel, tmp_path)

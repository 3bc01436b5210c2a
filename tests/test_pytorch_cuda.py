"""PyTorch on a GPU: memory, streams, graphs, compile and devices, as a model meets them."""

import warnings

import pytest
from strategies import EMULATED, SIMULATED

import llsa_np as llsa

if SIMULATED or EMULATED:
    pytest.skip("PyTorch is tested without a simulator", allow_module_level=True)

import torch

if not torch.cuda.is_available():
    pytest.skip("there is no CUDA device", allow_module_level=True)

import cupy as cp

from llsa_np.adapters import pytorch

OPTIONS = {"topk": 8, "levels": 2}


@pytest.fixture(autouse=True)
def _on_a_gpu(backend):
    if backend == "numpy":
        pytest.skip("serves tensors on the CPU, tested in test_pytorch.py")


def tensors(n=3000, dtype=torch.bfloat16, dim=64, heads=4, kv_heads=2, grad=True, device="cuda"):
    """q, k, v."""
    shapes = [(2, h, n, dim) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, dtype=dtype, device=device, requires_grad=grad) for shape in shapes]


def step(backend, q, k, v, dout):
    """out and its gradients."""
    out = llsa.attention(q, k, v, backend=backend, **OPTIONS)
    return out, *torch.autograd.grad(out, (q, k, v), dout)


def assert_equal(xs, ys):
    for x, y in zip(xs, ys, strict=True):
        assert torch.equal(x, y)


def test_the_bits_of_a_call_on_cupys_arrays(backend):
    q, k, v = tensors()
    dout = torch.randn_like(q)
    of_cupy = [cp.from_dlpack(x.detach()) for x in (q, k, v)]
    out, lse = llsa.attention(*of_cupy, return_lse=True, backend=backend, **OPTIONS)
    selection = llsa.select(*of_cupy[:2], backend=backend, **OPTIONS)
    gradients = llsa.attend_backward(cp.from_dlpack(dout), *of_cupy, out, lse, selection, backend=backend)
    expected = [torch.from_dlpack(x) for x in (out, *gradients)]
    assert_equal(step(backend, q, k, v, dout), expected)


def test_memory_is_read_where_it_lies(backend):
    """q, k and v of one packed array, with storage offsets; an expanded dO. Kernels get the tensors' own addresses."""
    packed = torch.randn(2, 1500, 3, 4, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    parts = packed.unbind(2)
    for x in parts:
        seen = pytorch.adapter.view(x).array.__cuda_array_interface__
        assert seen["data"][0] == x.data_ptr() == pytorch.adapter.pointer(x)
        assert seen["strides"] == tuple(stride * x.element_size() for stride in x.stride())
    one = torch.ones((), dtype=packed.dtype, device="cuda").expand(2, 1500, 4, 64)
    out = llsa.attention(*parts, layout="bnhd", backend=backend, **OPTIONS)
    (gradient,) = torch.autograd.grad(out, packed, one)
    whole = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in parts]
    expected, *gradients = step(backend, *whole, one.transpose(1, 2).contiguous())
    assert torch.equal(out, expected.transpose(1, 2))
    assert torch.equal(gradient, torch.stack([x.transpose(1, 2) for x in gradients], 2))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_no_synchronisation_and_no_memory_but_torchs(backend):
    q, k, v = tensors()
    dout = torch.randn_like(q)
    step(backend, q, k, v, dout)
    torch.cuda.synchronize()
    of_cupy = cp.get_default_memory_pool().total_bytes()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(backend, q, k, v, dout)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert cp.get_default_memory_pool().total_bytes() == of_cupy


@pytest.mark.parametrize("first", [False, True], ids=["after a call", "first call"])
def test_a_graph_of_forward_and_backward(first, backend):
    """Captured off the default stream, replayed after the contents changed."""
    q, k, v = tensors(5000 + first)  # lengths of no other test
    dout = torch.randn_like(q)
    if not first:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step(backend, q, k, v, dout)
        torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(backend, q, k, v, dout)
    for _ in range(2):
        with torch.no_grad():
            for x in (q, k, v, dout):
                x.copy_(torch.randn_like(x))
            for x in captured:
                x.fill_(float("nan"))
        graph.replay()
        assert_equal(captured, step(backend, *(x.detach().clone().requires_grad_() for x in (q, k, v)), dout))


def test_streams_at_once(backend):
    sets = [tensors(20000, grad=False) for _ in range(2)]
    expected = [llsa.attention(*x, backend=backend, **OPTIONS) for x in sets]
    streams = [torch.cuda.Stream() for _ in sets]
    torch.cuda.synchronize()
    for _ in range(5):
        results = []
        for x, stream in zip(sets, streams):
            with torch.cuda.stream(stream):
                results.append(llsa.attention(*x, backend=backend, **OPTIONS))
        torch.cuda.synchronize()
        assert_equal(results, expected)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own use of it
def test_compiled(backend):
    """By inductor, with lengths that change."""
    compiled = torch.compile(lambda q, k, v: llsa.attention(q, k, v, backend=backend, **OPTIONS), fullgraph=True)
    for n in (3000, 3100, 3300):
        q, k, v = tensors(n)
        dout = torch.randn_like(q)
        out = compiled(q, k, v)
        expected, *gradients = step(backend, q, k, v, dout)
        assert torch.equal(out, expected)
        assert_equal(torch.autograd.grad(out, (q, k, v), dout), gradients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype, backend):
    arrays = tensors(300, dtype=torch.float32)
    with torch.autocast("cuda", dtype=dtype):
        out = llsa.attention(*arrays, backend=backend, **OPTIONS)
    assert out.dtype == dtype
    assert torch.equal(out, llsa.attention(*(x.to(dtype) for x in arrays), backend=backend, **OPTIONS))
    out.sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in arrays)


def test_calls_alike_share_a_plan(backend, monkeypatch):
    """Whatever is in the tensors, and wherever they begin, so long as 16 bytes go at a time."""
    if backend == "numba_cuda":
        pytest.skip("its launches are not recorded")
    from llsa_np import plans

    monkeypatch.setattr(plans, "plans", {})
    x = torch.randn(2, 4, 777 + 64, 64, dtype=torch.bfloat16, device="cuda")
    for first in (0, 1, 64):
        q = x[:, :, first : first + 777]
        out = llsa.attention(q, q, q, backend=backend, **OPTIONS)
        whole = q.contiguous()
        assert torch.equal(out, llsa.attention(whole, whole, whole, backend=backend, **OPTIONS))
    assert len(plans.plans) == 2, "one for the slices, one for arrays without gaps"
    unaligned = torch.randn(2 * 4 * 777 * 64 + 1, dtype=torch.bfloat16, device="cuda")[1:].view(2, 4, 777, 64)
    out = llsa.attention(unaligned, unaligned, unaligned, backend=backend, **OPTIONS)
    aligned = unaligned.clone()
    assert torch.equal(out, llsa.attention(aligned, aligned, aligned, backend=backend, **OPTIONS))
    assert len(plans.plans) == 3


def test_another_device(backend):
    """The second GPU of two, while the first is the current one; tensors on different devices are refused by name."""
    q, k, v = tensors(300)
    with pytest.raises(ValueError, match="q is on cuda:0 and k on cpu"):
        llsa.attention(q, k.cpu(), v, backend=backend, **OPTIONS)
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    dout = torch.randn_like(q)
    there = [x.detach().to("cuda:1").requires_grad_() for x in (q, k, v)]
    expected = step(backend, q, k, v, dout)
    results = step(backend, *there, dout.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    assert all(x.device.index == 1 for x in results)
    assert_equal([x.to("cuda:0") for x in results], expected)
    with pytest.raises(ValueError, match="q is on cuda:0 and k on cuda:1"):
        llsa.attention(q, there[1], v, backend=backend, **OPTIONS)


def test_a_training_step_of_the_example_waits_for_nothing(backend, tmp_path):
    """So that the host enqueues the next while the GPU works; PyTorch raises where it would wait."""
    if backend != "cupy_raw":
        pytest.skip("the example's attention takes cupy_raw")
    for name in ("safetensors", "tensorboard", "tqdm"):
        pytest.importorskip(name)
    import train
    import training
    from PIL import Image

    for i in range(2):
        Image.new("RGB", (16, 16), (100 * i, 50, 50)).save(tmp_path / f"{i}.png")
    options = ["--side", "16", "--batch", "4", "--images", str(tmp_path), "--workers", "0", "--out", str(tmp_path)]
    run = training.Training(train.parsed(options), training.Ranks(0, 0, 1, None, torch.device("cuda")))
    for _ in range(3):
        run.train_step()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the mode, which is new to PyTorch
            torch.cuda.set_sync_debug_mode("error")
        for _ in range(3):
            run.train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    losses = dict(run.losses())
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    assert all(0 < loss < 10 for loss in losses.values())

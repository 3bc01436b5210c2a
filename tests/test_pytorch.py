"""PyTorch: what makes a call one of its own operations. The numbers themselves the rest of the suite checks."""

import gc
import inspect
import io
import shutil
import types
import weakref

import numpy as np
import pytest
from calls import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import EMULATED, SIMULATED

import llsa_np as llsa

if SIMULATED or EMULATED:
    pytest.skip("PyTorch is tested without a simulator", allow_module_level=True)

import torch
import torch.autograd.forward_ad as forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from llsa_np import functions, wrapping
from llsa_np.adapters import pytorch

OPTIONS = {"block_size": 4, "topk": 2}
COMPILERS = ["eager", "aot_eager", *(["inductor"] if shutil.which("g++") else [])]
"""Inductor on a CPU needs g++."""


def tensors(n=37, dtype=torch.float64, batch=2, heads=2, kv_heads=2, dim=8, value_dim=6, grad=True, seed=0):
    """q, k and v."""
    of = torch.Generator().manual_seed(seed)
    shapes = ((heads, dim), (kv_heads, dim), (kv_heads, value_dim))
    made = [torch.randn(batch, h, n, d, dtype=dtype, generator=of) for h, d in shapes]
    return [x.requires_grad_(grad) for x in made]


def attention(q, k, v):
    return llsa.attention(q, k, v, **OPTIONS)


def gradients(function, *arrays):
    """Of the sum of squares of what the function returns."""
    return torch.autograd.grad(function(*arrays).square().sum(), arrays)


def assert_equal(xs, ys):
    for x, y in zip(xs, ys, strict=True):
        assert torch.equal(x, y)


# --- the same numbers as NumPy's, gradients included


@settings(max_examples=25)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([(2, 1), (2, 2), (3, 1)]),
    st.sampled_from(["bhnd", "bnhd"]),
    st.sets(st.sampled_from("qkv"), min_size=1),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_gradients_are_those_of_attend_backward(queries, keys, heads, layout, asked, with_lse, dtype):
    (q, _, _), (_, k, v) = (
        tensors(n, dtype, heads=heads[0], kv_heads=heads[1], grad=False, seed=n) for n in (queries, keys)
    )
    if layout == "bnhd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    for name, x in zip("qkv", (q, k, v)):
        x.requires_grad_(name in asked)
    options = {**OPTIONS, "layout": layout}
    out, lse = llsa.attention(q, k, v, return_lse=True, **options)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    given_back = (dout, dlse) if with_lse else (dout,)
    results = (out, lse) if with_lse else (out,)
    wanted = [x for name, x in zip("qkv", (q, k, v)) if name in asked]
    got = dict(zip(sorted(asked, key="qkv".index), torch.autograd.grad(results, wanted, given_back)))

    host = [pytorch.adapter.to_numpy(x) for x in (q, k, v, dout, out, lse, dlse)]
    selection = llsa.select(host[0], host[1], **options)
    arrays = (host[3], *host[:3], *host[4:6], selection)
    expected = llsa.attend_backward(*arrays, dlse=host[6] if with_lse else None, layout=layout, needs=tuple(asked))
    for name, x in zip("qkv", expected):
        if name in asked:
            assert_same_bits(pytorch.adapter.to_numpy(got[name]), x)


def test_gradcheck():
    arrays = tensors(n=11, dim=3, value_dim=2, heads=2, kv_heads=1)
    selection = llsa.select(*arrays[:2], **OPTIONS)
    assert torch.autograd.gradcheck(lambda q, k, v: llsa.attend(q, k, v, selection), arrays)
    assert torch.autograd.gradcheck(lambda q, k, v: llsa.attend(q, k, v, selection, enrich=(), scale=0.3), arrays)
    assert torch.autograd.gradcheck(lambda x: llsa.pool(x, block_size=3, levels=3), arrays[:1])
    assert torch.autograd.gradcheck(lambda x: llsa.pool(x, levels=2, block_size=2, layout="bnhd"), arrays[:1])


def test_gradcheck_of_attention():
    """Small steps do not change a selection whose scores lie apart."""
    assert torch.autograd.gradcheck(
        lambda *x: llsa.attention(*x, return_lse=True, **OPTIONS), tensors(n=9, dim=3, value_dim=2), eps=1e-7, atol=1e-4
    )


class Needs(TorchDispatchMode):
    """Which gradients were computed, call by call."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.llsa.attend_backward.default:
            self.seen.append(args[8])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, True), (True, True, True)])
def test_only_what_is_asked_for_is_computed(needs):
    arrays = [x.detach().requires_grad_(is_needed) for x, is_needed in zip(tensors(), needs)]
    with Needs() as mode:
        out, lse = llsa.attention(*arrays, return_lse=True, **OPTIONS)
        (out.sum() + lse.sum()).backward()
    assert mode.seen == [list(needs)]
    assert [x.grad is not None for x in arrays] == list(needs)


def test_no_gradient_where_none_is_asked_for():
    q, k, v = tensors()
    with torch.no_grad():
        assert not attention(q, k, v).requires_grad
    assert not attention(q.detach(), k.detach(), v.detach()).requires_grad
    assert not any(level.requires_grad for level in llsa.select(q, k, **OPTIONS))


def test_lse_alone_gives_v_no_gradient():
    q, k, v = tensors()
    _, lse = llsa.attention(q, k, v, return_lse=True, **OPTIONS)
    dq, dk, dv = torch.autograd.grad(lse.sum(), (q, k, v))
    assert dq.abs().max() > 0
    assert dk.abs().max() > 0
    assert dv.abs().max() == 0


# --- zero-copy


def test_views_are_the_tensors_memory():
    packed = torch.randn(2, 37, 3, 2, 8)
    q, k, v = packed.unbind(2)  # bnhd, with the strides of the packed array and offsets into it
    for x in (q, k, v, k.transpose(1, 2), v[:, 3:], q[:1].expand(5, -1, -1, -1), q.bfloat16()):
        seen = pytorch.adapter.view(x).array
        assert seen.__array_interface__["data"][0] == x.data_ptr()
        assert seen.shape == tuple(x.shape)
        assert seen.strides == tuple(stride * x.element_size() for stride in x.stride())
    whole = [x.contiguous() for x in (q, k, v)]
    assert_equal(
        [llsa.attention(q, k, v, layout="bnhd", **OPTIONS)], [llsa.attention(*whole, layout="bnhd", **OPTIONS)]
    )


def test_results_are_laid_out_plainly():
    q, k, v = (x.transpose(1, 2) for x in tensors())
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded):
            out, lse = llsa.attention(q, k, v, layout="bnhd", return_lse=True, **OPTIONS)
        assert out.is_contiguous()
        assert lse.is_contiguous()
        assert type(out) is torch.Tensor


def test_an_expanded_gradient():
    q, k, v = tensors()
    whole = torch.autograd.grad(attention(q, k, v), (q, k, v), torch.ones(2, 2, 37, 6, dtype=q.dtype))
    one = torch.ones((), dtype=q.dtype).expand(2, 2, 37, 6)
    assert_equal(torch.autograd.grad(attention(q, k, v), (q, k, v), one), whole)


# --- operators


def operators():
    """A call of every operator, with transposed and expanded inputs, several batch entries and a ragged tail."""
    plain = tensors(n=21, heads=4, grad=False)
    transposed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in plain]
    expanded = [x[:1].expand(2, -1, -1, -1) for x in plain]
    attending = ([1], True, 0.5, "bhnd", "auto", "full")
    for arrays in (plain, transposed, expanded):
        q, k, v = (x.detach().requires_grad_() for x in arrays)
        yield "attention", (q, k, v, 4, 2, [2], False, *attending)
        yield "attention", (q, k, v, 4, None, [2], False, None, False, None, "bhnd", "auto", "full")
        yield "attention", (q, k, v, 4, None, [2], False, [], True, None, "bhnd", "auto", "full")
        yield "select", (q.detach(), k.detach(), 4, 2, [3, 2], True, "bhnd", "auto")
        selected = torch.ops.llsa.select(q.detach(), k.detach(), 4, 2, [2], False, "bhnd", "auto")
        made_for = q.shape[2], k.shape[2], 4
        yield "attend", (q, k, v, selected, *made_for, *attending)
        yield "attend", (q, k, v, selected, *made_for, [], *attending[1:])
        q, k, v = (x.detach() for x in (q, k, v))
        out, lse = torch.ops.llsa.attend(q, k, v, selected, *made_for, *attending)
        for needs in ([True, True, True], [False, True, False]):
            yield "attend_backward", (out, q, k, v, out, lse, selected, lse, needs, *made_for, *attending)
        yield "pool", (q.clone().requires_grad_(), 4, 2, "bnhd", "auto")


@pytest.mark.parametrize(("name", "arguments"), list(operators()), ids=lambda x: x if isinstance(x, str) else "")
def test_opcheck(name, arguments):
    torch.library.opcheck(getattr(torch.ops.llsa, name).default, arguments)


# --- compile


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own use of it
@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.usefixtures("fresh_compiler")
def test_compile_with_any_number_of_tokens(compiler):
    """No graph break, forward or backward, and no recompilation past the second length while L stays the same."""
    compiled = torch.compile(attention, fullgraph=True, backend=compiler)
    for n in (70, 75, 91, 111, 200):  # L = 2
        arrays = tensors(n)
        assert_equal(gradients(compiled, *arrays), gradients(attention, *arrays))
        with torch.no_grad():
            assert torch.equal(compiled(*arrays), attention(*arrays))
    # one for each of: gradients recorded or not, the first length and any other
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4


@pytest.mark.usefixtures("fresh_compiler")
def test_a_selection_through_compile():
    """Made inside, handed out, and handed in."""

    def both(q, k, v):
        selection = llsa.select(q, k, backend="numpy", **OPTIONS)
        return llsa.attend(q, k, v, selection, backend="numpy")[0], selection

    q, k, v = tensors()
    out, selection = torch.compile(both, fullgraph=True, backend="aot_eager")(q, k, v)
    expected, plain = both(q, k, v)
    assert torch.equal(out, expected)
    assert_equal(selection, plain)
    assert selection.made_for == plain.made_for

    def given(q, k, v, selection):
        return llsa.attend(q, k, v, selection)[0]

    compiled = torch.compile(given, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, plain), expected)
    assert_equal(gradients(lambda *x: compiled(*x, plain), q, k, v), gradients(lambda *x: given(*x, plain), q, k, v))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "options",
    [
        {"enrich": ()},
        {"enrich": (2,)},
        {"topk": (3, 1)},
        {"reweight": False},
        {"scale": 0.5},
        {"levels": 1},
        {"layout": "bnhd"},
    ],
    ids=str,
)
def test_compile_with_options(options):
    """Those that are lists too, of none or several, forward and backward."""
    changed = {"block_size": 4, "topk": 2, "levels": 2} | options
    layout = {"layout": changed.get("layout", "bhnd")}
    selecting = layout | {name: changed[name] for name in ("block_size", "topk", "levels")}
    attending = layout | {name: x for name, x in changed.items() if name in ("enrich", "reweight", "scale")}

    def whole(q, k, v):
        return llsa.attention(q, k, v, backend="numpy", **changed)

    def in_two(q, k, v):
        selection = llsa.select(q, k, backend="numpy", **selecting)
        return llsa.attend(q, k, v, selection, backend="numpy", **attending)[0]

    arrays = tensors()
    if layout["layout"] == "bnhd":
        arrays = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in arrays]
    expected = gradients(whole, *arrays)
    for call in (whole, in_two):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        assert_equal(gradients(compiled, *arrays), expected)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(("option", "values"), [("topk", (3, 2, 1)), ("scale", (0.5, 0.25, 1.5))])
def test_compile_with_an_option_that_changes(option, values, dynamic):
    """Which the compiler leaves open: K that is lowered in training, layers of several scales."""

    def call(q, k, v, value):
        return llsa.attention(q, k, v, **OPTIONS | {"backend": "numpy", option: value})

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    arrays = tensors()
    for value in values:
        assert torch.equal(compiled(*arrays, value), call(*arrays, value))


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_of_a_selection_for_other_tokens():
    """Refused as it is without a compiler; its tensors alone, rows of indices, would fit."""

    def given(q, k, v, selection):
        return llsa.attend(q, k, v, selection, backend="numpy")[0]

    def given_backwards(dout, q, k, v, out, lse, selection):
        return llsa.attend_backward(dout, q, k, v, out, lse, selection, backend="numpy")

    q, k, v = tensors(grad=False)
    selection = llsa.select(q, k, **OPTIONS)
    out, lse = llsa.attend(q, k, v, selection)
    for keys in (k.shape[2] - 1, k.shape[2] // 2):
        of_fewer = k[:, :, :keys].clone(), v[:, :, :keys].clone()
        for call, arrays in ((given, (q, *of_fewer)), (given_backwards, (out, q, *of_fewer, out, lse))):
            torch._dynamo.reset()
            with pytest.raises(ValueError, match=f"was made for .* = .*{k.shape[2]}.*, and q and k have .*{keys}"):
                torch.compile(call, fullgraph=True, backend="aot_eager")(*arrays, selection)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.usefixtures("fresh_compiler")
def test_exported_programs_that_return_and_take_a_selection():
    """Through a file."""

    class Selects(torch.nn.Module):
        def forward(self, q, k):
            return llsa.select(q, k, backend="numpy", **OPTIONS)

    class Attends(torch.nn.Module):
        def forward(self, q, k, v, selection):
            return llsa.attend(q, k, v, selection, backend="numpy")

    def through_a_file(module, *arguments):
        file = io.BytesIO()
        torch.export.save(torch.export.export(module, arguments), file)
        file.seek(0)
        return torch.export.load(file).module()(*arguments)

    q, k, v = tensors(grad=False)
    selection = Selects()(q, k)
    found = through_a_file(Selects(), q, k)
    assert_equal(found, selection)
    assert found.made_for == selection.made_for
    assert_equal(through_a_file(Attends(), q, k, v, selection), Attends()(q, k, v, selection))


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning")
def test_a_traced_program_takes_other_lengths():
    def both(q, k, v):
        selection = llsa.select(q, k, levels=2, backend="numpy", **OPTIONS)
        return llsa.attend(q, k, v, selection, backend="numpy")[0]

    traced = torch.jit.trace(both, tensors(40, grad=False), check_trace=False)
    arrays = tensors(71, grad=False)
    assert torch.equal(traced(*arrays), both(*arrays))


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_of_the_others():
    def others(x, k):
        return llsa.pool(x, block_size=4, levels=2, backend="numpy"), llsa.select(x, k, **OPTIONS)[1]

    q, k, _ = tensors()
    (levels, rows), (expected, expected_rows) = (
        f(q, k) for f in (torch.compile(others, fullgraph=True, backend="aot_eager"), others)
    )
    assert_equal((*levels, rows), (*expected, expected_rows))


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_reads_no_table_of_modules(monkeypatch):
    """Threads import modules while one compiles: a table that changes under the compiler stops it."""

    class Changing(dict):
        def get(self, *_):
            raise RuntimeError("dictionary changed size during iteration")

        __getitem__ = __contains__ = __iter__ = items = keys = values = get

    arrays = tensors()
    expected = attention(*arrays)
    monkeypatch.setattr(wrapping, "sys", types.SimpleNamespace(modules=Changing()))
    for call in (torch.compile(attention, fullgraph=True, backend="aot_eager"), attention):
        assert torch.equal(call(*arrays), expected)


# --- autocast, checkpoint, torch.func


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    arrays = tensors(dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        out = attention(*arrays)
        assert attention(*tensors()).dtype == torch.float64, "as torch's own operators have it"
    expected = attention(*(x.to(dtype) for x in arrays))
    assert out.dtype == dtype
    assert torch.equal(out, expected)
    out.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in arrays)
    q, k, v = (x.detach() for x in arrays)
    with torch.autocast("cpu", dtype=dtype):
        selection = llsa.select(q, k, **OPTIONS)
        out, lse = llsa.attend(q, k, v, selection)
        dq, *_ = llsa.attend_backward(torch.ones_like(v), q, k, v, out, lse, selection)
    assert dq.dtype == dtype
    assert torch.equal(dq.float(), arrays[0].grad)


def test_checkpoint():
    arrays = tensors()
    selection = llsa.select(*arrays[:2], **OPTIONS)

    def given(q, k, v):
        return llsa.attend(q, k, v, selection)[0]

    for function in (attention, given):
        kept = gradients(lambda *x, f=function: checkpoint(f, *x, use_reentrant=False), *arrays)
        assert_equal(kept, gradients(function, *arrays))


def many(n=3, **options):
    """q, k and v with one more axis in front."""
    return [torch.stack(x) for x in zip(*(tensors(grad=False, seed=seed, **options) for seed in range(n)))]


def test_vmap_over_an_added_axis():
    q, k, v = many()
    one_by_one = torch.stack([attention(*x) for x in zip(q, k, v)])
    assert torch.equal(torch.func.vmap(attention)(q, k, v), one_by_one)
    assert torch.func.vmap(attention)(*(x[:0] for x in (q, k, v))).shape == (0, *one_by_one.shape[1:])
    twice = torch.func.vmap(torch.func.vmap(attention, in_dims=(0, None, None)), in_dims=(None, 0, 0))(q, k, v)
    assert torch.equal(twice, torch.stack([torch.stack([attention(x, *y) for x in q]) for y in zip(k, v)]))
    shared = torch.func.vmap(attention, in_dims=(1, None, None), out_dims=1)(q.movedim(0, 1), k[0], v[0])
    assert torch.equal(shared, torch.stack([attention(x, k[0], v[0]) for x in q], dim=1))
    levels = torch.func.vmap(lambda x: llsa.pool(x, block_size=4, levels=2))(q)
    assert_equal(levels, [torch.stack(x) for x in zip(*(llsa.pool(x, block_size=4, levels=2) for x in q))])

    def selected(q, k, v):
        selection = llsa.select(q, k, **OPTIONS)
        return llsa.attend(q, k, v, selection)[0]

    assert torch.equal(torch.func.vmap(selected)(q, k, v), one_by_one)


def test_grad_and_vmap_of_grad():
    def loss(*arrays):
        return attention(*arrays).square().sum()

    of_all = torch.func.grad(loss, argnums=(0, 1, 2))
    arrays = tensors()
    assert_equal(of_all(*(x.detach() for x in arrays)), gradients(attention, *arrays))
    stacked = many()
    assert_equal(torch.func.vmap(of_all)(*stacked), [torch.stack(x) for x in zip(*(of_all(*x) for x in zip(*stacked)))])


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own use of it
def test_forward_mode_is_an_error():
    """Not zeros."""
    arrays = [x.detach() for x in tensors()]
    selection = llsa.select(*arrays[:2], **OPTIONS)
    calls = (attention, lambda *x: llsa.attend(*x, selection)[0], lambda q, k, v: llsa.pool(q, block_size=4)[0])
    for call in calls:
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jvp(call, tuple(arrays), tuple(arrays))
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
            call(forward_ad.make_dual(arrays[0], arrays[0]), *arrays[1:])


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own use of it
@pytest.mark.usefixtures("fresh_compiler")
def test_forward_mode_is_an_error_where_it_hides():
    """Inside a compiled function, and through `attend_backward`."""
    q, k, v = (x.detach() for x in tensors())
    tangent = torch.func.jvp

    def compiled(q):
        return tangent(lambda q: attention(q, k, v), (q,), (q,))[1]

    with pytest.raises((NotImplementedError, torch._dynamo.exc.TorchDynamoException)):
        torch.compile(compiled, fullgraph=True, backend="aot_eager")(q)
    out, lse = llsa.attention(q, k, v, return_lse=True, **OPTIONS)
    selection = llsa.select(q, k, **OPTIONS)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        tangent(lambda q: llsa.attend_backward(out, q, k, v, out, lse, selection)[0], (q,), (q,))


def test_tracers_record_the_call():
    q, k, v = tensors(grad=False)
    other = torch.randn_like(q)
    traced = make_fx(attention)(q, k, v)
    assert torch.equal(traced(other, k, v), attention(other, k, v))


def test_a_selection_whose_arrays_were_exchanged():
    q, k, v = tensors(grad=False)
    selection = llsa.select(q, k, **OPTIONS)
    for exchange, kind in (
        (lambda x: x.long(), TypeError),
        (lambda x: x.double(), TypeError),
        (lambda x: x[:1], ValueError),
        (lambda x: torch.cat([x, x]), ValueError),
    ):
        other = pytree.tree_map(exchange, selection)
        for recorded in (True, False):
            with pytest.raises(kind, match="selection"):
                llsa.attend(q.detach().requires_grad_(recorded), k, v, other)


def test_a_second_gradient_is_an_error():
    q, k, v = tensors()
    (dq,) = torch.autograd.grad(attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="gradients of gradients"):
        dq.sum().backward()
    out, lse = llsa.attention(q, k, v, return_lse=True, **OPTIONS)
    dq, _, _ = llsa.attend_backward(out, q, k, v, out, lse, llsa.select(q, k, **OPTIONS))
    with pytest.raises(NotImplementedError, match="gradients of gradients"):
        dq.sum().backward()


# --- merge and coverage


def test_merge_of_halves_and_its_gradient():
    q, k, v = tensors(n=24)
    whole = llsa.attention(q, k, v, block_size=2, levels=1, topk=12, enrich=(), return_lse=True)

    def halves(q, k, v):
        parts = [slice(0, 10), slice(10, 24)]
        return llsa.merge(
            *(
                llsa.attention(q, k[:, :, p], v[:, :, p], block_size=2, levels=1, topk=12, enrich=(), return_lse=True)
                for p in parts
            )
        )

    out, lse = halves(q, k, v)
    torch.testing.assert_close(out, whole[0])
    torch.testing.assert_close(lse, whole[1])
    expected = torch.autograd.grad(whole[0].square().sum() + whole[1].sum(), (q, k, v))
    got = torch.autograd.grad(out.square().sum() + lse.sum(), (q, k, v))
    torch.testing.assert_close(got, expected)


def test_merge_under_vmap_and_grad():
    def merged(q, k, v):
        return llsa.merge(*(llsa.attention(q, x, v, return_lse=True, **OPTIONS) for x in (k, k + 1)))[0]

    q, k, v = many()
    assert torch.equal(torch.func.vmap(merged)(q, k, v), torch.stack([merged(*x) for x in zip(q, k, v)]))
    one = tensors()
    got = torch.func.grad(lambda *x: merged(*x).square().sum())(*(x.detach() for x in one))
    assert torch.equal(got, gradients(merged, *one)[0])


def test_merge_with_empty_rows_has_finite_gradients():
    out = torch.full((1, 1, 2, 3), torch.nan, dtype=torch.float64, requires_grad=True)
    lse = torch.full((1, 1, 2), -torch.inf, dtype=torch.float64, requires_grad=True)
    full = [torch.randn(1, 1, 2, 3, dtype=torch.float64, requires_grad=True), torch.zeros(1, 1, 2, dtype=torch.float64)]
    merged, _ = llsa.merge((out, lse), tuple(full))
    assert torch.equal(merged, full[0])
    for gradient in torch.autograd.grad(merged.sum(), (out, lse, full[0])):
        assert torch.isfinite(gradient).all()


def test_coverage_takes_tensors():
    q, k, v = tensors()
    mass, error = llsa.coverage(q, k, llsa.select(q, k, **OPTIONS), v)
    q, k, v = (pytorch.adapter.to_numpy(x) for x in (q, k, v))
    expected_mass, expected_error = llsa.coverage(q, k, llsa.select(q, k, **OPTIONS), v)
    assert_same_bits(mass, expected_mass)
    assert_same_bits(error, expected_error)


# --- bad input


def test_bad_input_says_the_same_with_gradients_and_without():
    q, k, v = tensors()
    calls = [
        lambda *x: llsa.attention(*x, block_size=1),
        lambda *x: llsa.attention(*x, topk=(2, 2, 2), levels=2),
        lambda *x: llsa.attention(*x, enrich=(7,), levels=2, block_size=4),
        lambda *x: llsa.attention(*x, scale=-1),
        lambda *x: llsa.attention(*x, layout="nbhd"),
        lambda *x: llsa.attention(*x, backend="cuda"),
        lambda *x: llsa.attention(*x, precision="fp8"),
        lambda *x: llsa.attention(*x, return_lse=None),
        lambda *x: llsa.attention(x[0], x[1][:1], x[2]),
        lambda *x: llsa.attention(x[0], x[1].float(), x[2]),
        lambda *x: llsa.attention(x[0][0], x[1], x[2]),
        lambda *x: llsa.attend(*x, llsa.select(x[0], x[1][:, :, :30], **OPTIONS)),
        lambda *x: llsa.attention(x[0], x[1].detach().numpy(), x[2]),
        lambda *x: llsa.attention(*x, blocksize=4),
        lambda *x: llsa.attention(*x[:2]),
        lambda *x: llsa.pool(x[0], levels=0),
        lambda *x: llsa.attention(*x, q=x[0]),
        lambda *x: llsa.attention(*x, block_size=2**70),
        lambda *x: llsa.attention(*x, enrich=(17,)),
        lambda *x: llsa.attention(x[0][..., :0], x[1][..., :0], x[2]),
        lambda *x: llsa.attention(x[0].sum(), *x[1:]),
    ]
    for call in calls:
        told = []
        for arrays in ((q, k, v), tuple(x.detach() for x in (q, k, v))):
            with pytest.raises((ValueError, TypeError)) as caught:
                call(*arrays)
            told.append((caught.type, str(caught.value)))
        assert told[0] == told[1]


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (torch.zeros(1, 1, 4, 4).to_sparse(), "torch.Tensor"),
        (torch._neg_view(torch.zeros(1, 1, 4, 4)), r"torch.Tensor; .*resolve_neg\(\)"),
        (torch.zeros(1, 1, 4, 4, dtype=torch.int64), "dtype int64"),
        (torch.zeros(1, 1, 4, 4, dtype=torch.complex64), "dtype complex64"),
    ],
    ids=["sparse", "negated", "int64", "complex64"],
)
def test_tensors_that_are_not_served(array, words):
    with pytest.raises(TypeError, match=words):
        llsa.attention(array, array, array)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors(layout):
    nested = torch.nested.nested_tensor([torch.zeros(n, 4, 4) for n in (1, 2)], layout=layout)
    with pytest.raises(TypeError, match="nested ones one by one"):
        llsa.attention(nested, nested, nested)


@pytest.mark.parametrize("grad", [False, True])
def test_a_device_that_no_backend_serves(grad):
    q, k, v = (x.detach().to("meta").requires_grad_(grad) for x in tensors())
    with pytest.raises(ValueError, match="the arrays are on meta, and of the backends"):
        llsa.attention(q, k, v)
    with pytest.raises(ValueError, match="q is on cpu and k on meta"):
        llsa.attention(torch.zeros(q.shape, dtype=q.dtype), k, v)


def test_a_host_tensor_and_a_gpu_backend():
    able = [name for name, reasons in llsa.backends().items() if name != "numpy" and not reasons]
    for name in able:
        with pytest.raises(ValueError, match="cpu"):
            llsa.attention(*tensors(grad=False), backend=name)
    for name in set(llsa.backends()) - {"numpy", *able}:
        with pytest.raises(RuntimeError, match="cannot run here"):
            llsa.attention(*tensors(), backend=name)


def test_a_subclass_and_a_parameter():
    class Own(torch.Tensor):
        pass

    q, k, v = tensors(grad=False)
    expected = attention(q, k, v)
    assert torch.equal(attention(q.as_subclass(Own), k, v).as_subclass(torch.Tensor), expected)
    assert torch.equal(attention(torch.nn.Parameter(q), k, v), expected)
    assert np.array_equal(attention(q.numpy(), k.numpy(), v.numpy()), expected.numpy())


# --- for models


@pytest.mark.parametrize(("kv_heads", "qk_norm"), [(None, True), (2, False), (1, True)])
def test_self_attention(kv_heads, qk_norm):
    module = pytorch.LLSASelfAttention(32, 4, kv_heads, qk_norm=qk_norm, **OPTIONS).double()
    x = torch.randn(2, 37, 32, dtype=torch.float64, requires_grad=True)
    out = module(x)
    assert out.shape == x.shape
    out.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in (x, *module.parameters()))
    assert "block_size=4" in repr(module)

    heads = (4, kv_heads or 4, kv_heads or 4)
    q, k, v = module.qkv(x).unflatten(-1, (-1, 8)).split(heads, dim=-2)
    if qk_norm:
        q, k = (y * (y.square().mean(-1, keepdim=True) + torch.finfo(y.dtype).eps).rsqrt() for y in (q, k))
    plain = module.out(llsa.attention(q, k, v, layout="bnhd", **OPTIONS).flatten(2))
    torch.testing.assert_close(out, plain)
    used_up = OPTIONS | {"enrich": iter((1,))}
    again = pytorch.LLSASelfAttention(32, 4, kv_heads, qk_norm=qk_norm, **used_up).double()
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(x), out)


@pytest.mark.usefixtures("fresh_compiler")
def test_self_attention_compiled_and_cast():
    module = pytorch.LLSASelfAttention(32, 4, **OPTIONS)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for n in (40, 50, 61):
        x = torch.randn(2, n, 32)
        torch.testing.assert_close(compiled(x), module(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x).dtype == torch.bfloat16


def test_self_attention_refuses():
    for arguments, words in (((30, 4), "does not divide"), ((32, 4, 3), "does not divide"), ((32, 0), "heads is 0")):
        with pytest.raises(ValueError, match=words):
            pytorch.LLSASelfAttention(*arguments)
    with pytest.raises(ValueError, match="block_size is 1"):
        pytorch.LLSASelfAttention(32, 4, block_size=1)
    with pytest.raises(ValueError, match="enrich is 2"):
        pytorch.LLSASelfAttention(32, 4, enrich=2)
    for option in ("layout", "blocksize"):
        with pytest.raises(TypeError, match=option):
            pytorch.LLSASelfAttention(32, 4, **{option: "bnhd"})


def test_sdpa_keeping_everything_is_torchs():
    q, k, v = tensors(n=24, heads=4)
    everything = {"block_size": 2, "levels": 1, "topk": 12, "enrich": ()}
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=0.3)
    torch.testing.assert_close(pytorch.sdpa(q, k, v, enable_gqa=True, scale=0.3, **everything), expected)
    assert torch.equal(pytorch.sdpa(q, k, v, enable_gqa=True, **OPTIONS), attention(q, k, v))


def test_sdpa_refuses_what_it_cannot_honour():
    q, k, v = tensors(n=8)
    for name, value in (("attn_mask", torch.ones(8, 8, dtype=torch.bool)), ("dropout_p", 0.1), ("is_causal", True)):
        with pytest.raises(NotImplementedError, match=f"sdpa: cannot honour {name}"):
            pytorch.sdpa(q, k, v, **{name: value})
    with pytest.raises(ValueError, match="enable_gqa"):
        pytorch.sdpa(q, k[:, :1], v[:, :1])
    with pytest.raises(ValueError, match="sdpa: layout is 'bnhd'"):
        pytorch.sdpa(q, k, v, layout="bnhd")


# --- the eager path, which goes past the dispatcher


def test_gradients_with_the_negative_bit():
    """A view that torch negates when it is read, as complex losses hand back."""
    arrays = tensors()
    expected = torch.autograd.grad(attention(*arrays), arrays, torch.full((2, 2, 37, 6), -2.0, dtype=torch.float64))
    two = torch.full((2, 2, 37, 6), 2.0, dtype=torch.float64)
    dout = torch.complex(two, two).conj().imag
    assert dout.is_neg()
    assert_equal(torch.autograd.grad(attention(*arrays), arrays, dout), expected)


@pytest.mark.parametrize("grad", [True, False])
def test_what_watches_calls_sees_the_operator(grad):
    arrays = tensors(grad=grad)
    for pre_dispatch in (True, False):
        graph = make_fx(attention, pre_dispatch=pre_dispatch)(*arrays).graph
        assert torch.ops.llsa.attention.default in [node.target for node in graph.nodes]

    class Watch(torch.overrides.TorchFunctionMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.seen.append(function)
            return function(*args, **kwargs or {})

    with Watch() as watch:
        attention(*arrays)
    assert torch.ops.llsa.attention in watch.seen


def test_a_maker_keeps_no_tensor():
    x = torch.ones(3)
    make = pytorch.adapter.maker((2,), np.dtype(np.float32), pytorch.adapter.view(x))
    watched = weakref.ref(x)
    del x
    gc.collect()
    assert watched() is None
    assert make().shape == (2,)


def test_a_call_for_which_there_is_no_memory(monkeypatch):
    """With or without autograd, told by the call's name."""

    def fail(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    for grad in (True, False):
        arrays = tensors(grad=grad)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty_strided", fail)
            with pytest.raises(torch.OutOfMemoryError, match=r"^attention: .* fewer batch entries"):
                attention(*arrays)


def test_defaults_are_the_same_with_a_gradient():
    """A call that records one goes by `attend_selected`, whose options have defaults of their own."""
    public, selected = (inspect.signature(f).parameters for f in (llsa.attention, functions.attend_selected))
    defaults = {name: of.default for name, of in public.items() if name != "return_lse"}
    assert defaults == {name: of.default for name, of in selected.items()}

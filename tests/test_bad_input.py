"""Every row of spec.md's "Bad input" table: the type of the error, and words that name who, what, what is allowed."""

import re

import ml_dtypes
import numpy as np
import pytest
from strategies import SIMULATED

import llsa_np as llsa
from llsa_np import adapters
from llsa_np.adapters import View

F32 = np.float32


def ones(*shape, dtype=F32):
    return np.ones(shape, dtype)


Q, K, V = ones(2, 4, 20, 8), ones(2, 2, 30, 8), ones(2, 2, 30, 5)
OPTIONS = {"block_size": 4, "levels": 2, "topk": 2}
SELECTION = llsa.select(Q, K, **OPTIONS)
OUT, LSE = llsa.attend(Q, K, V, SELECTION)
PAIR = (OUT, LSE)


def calls_with(**changed):
    """The four calls that take q, k (and v), with some arguments changed."""
    q, k, v = (changed.pop(name, x) for name, x in (("q", Q), ("k", K), ("v", V)))
    return {
        "attention": lambda: llsa.attention(q, k, v, **(OPTIONS | changed)),
        "select": lambda: llsa.select(q, k, **(OPTIONS | changed)),
        "attend": lambda: llsa.attend(q, k, v, SELECTION, **changed),
        "attend_backward": lambda: llsa.attend_backward(OUT, q, k, v, OUT, LSE, SELECTION, **changed),
    }


def refused(call, kind, *words):
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    message = str(caught.value)
    for word in words:
        assert str(word) in message, f"{word!r} is not in {message!r}"
    assert len(message) < 600
    return message


SHAPES = [
    ({"q": ones(4, 20, 8)}, ["q has shape (4, 20, 8)", "four axes", "batch, heads, tokens, dim"]),
    ({"q": ones(1, 4, 20, 8)}, ["(1, 4, 20, 8)", "(2, 2, 30, 8)", "batch sizes are 1 and 2"]),
    ({"q": ones(2, 4, 20, 7)}, ["(2, 4, 20, 7)", "(2, 2, 30, 8)", "head dims are 7 and 8"]),
    ({"q": ones(2, 3, 20, 8)}, ["(2, 3, 20, 8)", "(2, 2, 30, 8)", "multiple"]),
    ({"k": ones(2, 0, 30, 8), "v": ones(2, 0, 30, 5)}, ["multiple of k's 0"]),
    ({"q": ones(2, 4, 0, 8)}, ["(2, 4, 0, 8)", "1 or more"]),
    ({"q": ones(2, 4, 20, 0), "k": ones(2, 2, 30, 0)}, ["1 or more"]),
    ({"k": ones(2, 2, 0, 8), "v": ones(2, 2, 0, 5)}, ["1 or more"]),
]
VALUE_SHAPES = [
    ({"v": ones(2, 2, 30)}, ["v has shape (2, 2, 30)", "four axes"]),
    ({"v": ones(1, 2, 30, 5)}, ["(2, 2, 30, 8)", "(1, 2, 30, 5)", "batch sizes"]),
    ({"v": ones(2, 1, 30, 5)}, ["(2, 2, 30, 8)", "(2, 1, 30, 5)", "heads are 2 and 1"]),
    ({"v": ones(2, 2, 31, 5)}, ["(2, 2, 30, 8)", "(2, 2, 31, 5)", "tokens are 30 and 31"]),
    ({"v": ones(2, 2, 30, 0)}, ["v has shape (2, 2, 30, 0)", "1 or more"]),
]


@pytest.mark.parametrize(("changed", "words"), SHAPES)
@pytest.mark.parametrize("name", ["attention", "select", "attend", "attend_backward"])
def test_shapes_that_do_not_fit(name, changed, words):
    refused(calls_with(**changed)[name], ValueError, f"{name}: ", *words)


@pytest.mark.parametrize(("changed", "words"), VALUE_SHAPES)
@pytest.mark.parametrize("name", ["attention", "attend", "attend_backward"])
def test_value_shapes_that_do_not_fit(name, changed, words):
    refused(calls_with(**changed)[name], ValueError, f"{name}: ", *words)


@pytest.mark.parametrize("dtype", [np.int32, np.bool_, np.complex64, np.longdouble, ml_dtypes.float8_e4m3fn, object])
@pytest.mark.parametrize("name", ["attention", "select", "attend", "attend_backward"])
def test_dtypes_that_are_not_floats(name, dtype):
    shown = np.dtype(dtype).name
    calls = calls_with(q=Q.astype(dtype), k=K.astype(dtype), v=V.astype(dtype))
    refused(calls[name], TypeError, f"{name}: ", shown, "float16, bfloat16, float32, float64")
    refused(lambda: llsa.pool(Q.astype(dtype)), TypeError, "pool: x has dtype", shown)


@pytest.mark.parametrize("name", ["attention", "select", "attend", "attend_backward"])
def test_dtypes_that_differ(name):
    refused(calls_with(k=K.astype(np.float64))[name], TypeError, "q has dtype float32", "k float64")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block_size": 1}, ["block_size is 1", "2 or more"]),
        ({"block_size": 0}, ["block_size is 0"]),
        ({"block_size": -4}, ["block_size is -4"]),
        ({"block_size": 4.0}, ["block_size is 4.0", "integer"]),
        ({"block_size": "4"}, ["block_size is '4'"]),
        ({"block_size": True}, ["block_size is True"]),
        ({"levels": 0}, ["levels is 0", "1..16"]),
        ({"levels": 17}, ["levels is 17", "1..16"]),
        ({"levels": 2.0}, ["levels is 2.0"]),
        ({"block_size": 16, "levels": 16, "topk": 1}, ["16 ** 16", "2**62"]),
        ({"block_size": 2**31, "levels": 2}, ["2147483648 ** 2", "2**62"]),
        ({"topk": 0}, ["topk is 0", "1.."]),
        ({"topk": -1}, ["topk is -1"]),
        ({"topk": 2.5}, ["topk is 2.5"]),
        ({"topk": None}, ["topk is None"]),
        ({"topk": (2, 0)}, ["topk is 0"]),
        ({"topk": (2,)}, ["1 entries", "2 levels"]),
        ({"topk": [1, 2, 3]}, ["3 entries", "2 levels"]),
        ({"topk": 2**31}, ["topk is 2147483648"]),
        ({"topk": np.array(2.0)}, ["topk is array(2.)"]),
        ({"topk": "8"}, ["topk is '8'"]),
        ({"layout": "bhdn"}, ["layout is 'bhdn'", "bhnd", "bnhd"]),
        ({"layout": None}, ["layout is None"]),
        ({"backend": "cuda"}, ["backend is 'cuda'", "auto", "numpy", "numba_cuda", "cupy_raw"]),
        ({"backend": None}, ["backend is None"]),
    ],
)
@pytest.mark.parametrize("name", ["attention", "select"])
def test_options_out_of_range(name, options, words):
    refused(calls_with(**options)[name], ValueError, f"{name}: ", *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"enrich": (3,)}, ["level in enrich is 3", "1..2"]),
        ({"enrich": (0,)}, ["level in enrich is 0"]),
        ({"enrich": (1, 1)}, ["names a level twice"]),
        ({"enrich": 1}, ["enrich is 1", "tuple"]),
        ({"enrich": (1.0,)}, ["level in enrich is 1.0"]),
        ({"enrich": "1"}, ["enrich is '1'"]),
        ({"reweight": "no"}, ["reweight is 'no'"]),
        ({"scale": 0}, ["scale is 0", "finite number above 0"]),
        ({"scale": -1.0}, ["scale is -1.0"]),
        ({"scale": np.inf}, ["scale is inf"]),
        ({"scale": np.nan}, ["scale is nan"]),
        ({"scale": "1"}, ["scale is '1'"]),
        ({"scale": [1, 2]}, ["scale is [1, 2]"]),
        ({"scale": True}, ["scale is True"]),
        ({"scale": b"1"}, ["scale is b'1'"]),
        ({"scale": np.complex64(1)}, ["finite number above 0"]),
        ({"scale": 10**400}, ["finite number above 0"]),
        ({"enrich": np.array(1)}, ["enrich is array(1)", "tuple"]),
        ({"layout": "bhn"}, ["layout is 'bhn'"]),
        ({"precision": "half"}, ["precision is 'half'", "full", "tf32"]),
        ({"backend": "torch"}, ["backend is 'torch'"]),
    ],
)
@pytest.mark.parametrize("name", ["attention", "attend", "attend_backward"])
def test_attention_options_out_of_range(name, options, words):
    refused(calls_with(**options)[name], ValueError, f"{name}: ", *words)


@pytest.mark.parametrize("needs", [("w",), ("q", "dk"), "q", 1, None, np.array("q")])
def test_needs(needs):
    refused(calls_with(needs=needs)["attend_backward"], ValueError, "needs is", "'q', 'k' and 'v'")


@pytest.mark.parametrize("value", [[[1.0]], 3.0, "q", None, np.float32(1), np.ma.masked_array(Q), memoryview(b"1234")])
@pytest.mark.parametrize("argument", ["q", "k"])
@pytest.mark.parametrize("name", ["attention", "select", "attend", "attend_backward"])
def test_arrays_that_are_none(name, argument, value):
    kind = type(value).__name__
    refused(calls_with(**{argument: value})[name], TypeError, f"{name}: {argument} is a", kind, "NumPy", "asarray")


class Elsewhere(np.ndarray):
    """Stands for an array on another device: same type, another place."""


@pytest.fixture
def devices(monkeypatch):
    """Views of Elsewhere arrays say that they lie on a device."""
    from llsa_np.adapters.numpy_arrays import NumpyAdapter

    plain = NumpyAdapter.view

    def view(self, array, layout="bhnd"):
        seen = plain(self, array, layout)
        return seen._replace(device="cuda:1") if isinstance(array, Elsewhere) else seen

    monkeypatch.setattr(NumpyAdapter, "view", view)
    monkeypatch.setattr(NumpyAdapter, "key", lambda self, array: None)  # as calls alike are not looked at again


@pytest.mark.parametrize("name", ["attention", "select", "attend", "attend_backward"])
def test_arrays_on_different_devices(name, devices):
    refused(calls_with(k=K.view(Elsewhere))[name], ValueError, "q is on cpu and k on cuda:1", "one device")


def test_a_device_that_no_backend_serves(devices):
    message = refused(
        lambda: llsa.select(Q.view(Elsewhere), K.view(Elsewhere)), ValueError, "cuda:1", "numpy serves cpu"
    )
    assert "select" in message
    refused(lambda: llsa.pool(Q.view(Elsewhere), backend="numpy"), ValueError, "cuda:1", "numpy serves cpu")


class Foreign:
    """An array of another framework."""

    shape, dtype = (2, 2, 30, 8), "float32"


class ForeignAdapter:
    name = "Foreign"

    def owns(self, array):
        return isinstance(array, Foreign)

    def view(self, array, layout="bhnd"):
        return View(array.shape, array.dtype, "cpu", array)


@pytest.fixture
def foreign(monkeypatch):
    """A second framework."""
    import sys
    import types

    module = types.ModuleType("foreign_adapter")
    module.adapter = ForeignAdapter()
    monkeypatch.setitem(sys.modules, "foreign_adapter", module)
    monkeypatch.setitem(adapters.ADAPTERS, Foreign.__module__.partition(".")[0], "foreign_adapter")
    return Foreign()


def test_arrays_of_different_frameworks(foreign):
    for name, call in calls_with(k=foreign).items():
        refused(call, TypeError, f"{name}: q is an array of NumPy and k one of Foreign", "same framework")
    refused(lambda: llsa.merge(PAIR, (foreign, LSE)), TypeError, "NumPy", "Foreign")
    refused(lambda: llsa.coverage(Q, foreign, SELECTION), TypeError, "NumPy", "Foreign")
    refused(
        lambda: llsa.Selection([SELECTION[1], foreign], block_size=4, query_tokens=20, key_tokens=30),
        TypeError,
        "NumPy",
        "Foreign",
    )


@pytest.mark.parametrize("named", ["numba_cuda", "cupy_raw"])
def test_a_named_backend_that_cannot_run_here(named):
    reasons = llsa.backends()[named]
    if not reasons:
        pytest.skip(f"{named} can run here")
    for name, call in calls_with(backend=named).items():
        message = refused(call, RuntimeError, f"{name}: backend {named!r} cannot run here", *reasons, "'numpy'")
        if any("not installed" in reason for reason in reasons):
            assert "pip install 'llsa-np[cuda13]'" in message
    refused(lambda: llsa.precompile("float32", 64, backend=named), RuntimeError, *reasons)
    refused(lambda: llsa.pool(Q, backend=named), RuntimeError, *reasons)


def test_the_backend_is_asked_first_then_the_arrays():
    if llsa.backends()["cupy_raw"]:
        refused(lambda: llsa.attention([1], K, V, backend="cupy_raw"), RuntimeError)
    refused(lambda: llsa.attention([1], K, V, block_size=0), TypeError)


class Picky:
    """A backend that serves little."""

    name = "numpy"

    def refusals(self, case):
        return [] if case.dim % 16 == 0 else [f"serves head dims in steps of 16, and q has {case.dim}"]


def test_a_case_that_a_backend_does_not_serve(monkeypatch):
    from llsa_np import numpy_backend

    monkeypatch.setattr(numpy_backend, "backend", Picky())
    for backend in ("numpy", "auto"):
        message = refused(
            lambda b=backend: llsa.attention(Q, K, V, backend=b), NotImplementedError, "steps of 16", "has 8"
        )
        assert message.startswith("attention: numpy ")


SELECTIONS = [
    ({"arrays": []}, ValueError, ["got 0 arrays", "1..16"]),
    ({"arrays": [SELECTION[1]] * 17}, ValueError, ["got 17 arrays"]),
    ({"arrays": 3}, TypeError, ["arrays is a int"]),
    ({"arrays": [SELECTION[1].astype(np.int64), SELECTION[2]]}, TypeError, ["level 1", "int64", "int32"]),
    ({"arrays": [[[[[0]]]], SELECTION[2]]}, TypeError, ["arrays[0] (level 1) is a list"]),
    ({"arrays": [SELECTION[1][0], SELECTION[2]]}, ValueError, ["level 1 has shape (4, 5, 2)", "(batch, heads, 5, K)"]),
    ({"arrays": [SELECTION[1][:, :, :4], SELECTION[2]]}, ValueError, ["level 1", "(2, 4, 4, 2)", "5"]),
    ({"arrays": [SELECTION[1], SELECTION[2][:1]]}, ValueError, ["level 2", "(1, 4, 2, 2)", "(2, 4, 5, 2)"]),
    ({"arrays": [SELECTION[1][..., :0], SELECTION[2]]}, ValueError, ["level 1"]),
    ({"block_size": 1}, ValueError, ["block_size is 1"]),
    ({"query_tokens": 21}, ValueError, ["level 1", "21 queries"]),
    ({"key_tokens": 0}, ValueError, ["key_tokens is 0"]),
    ({"key_tokens": 4}, ValueError, ["level 1", "0..0"]),
    ({"arrays": np.array(3)}, TypeError, ["arrays is a numpy.ndarray"]),
    ({"validate": "no"}, ValueError, ["validate is 'no'"]),
]


@pytest.mark.parametrize(("changed", "kind", "words"), SELECTIONS)
def test_selections_that_do_not_fit_together(changed, kind, words):
    arguments = {"arrays": list(SELECTION), "block_size": 4, "query_tokens": 20, "key_tokens": 30} | changed
    refused(lambda: llsa.Selection(arguments.pop("arrays"), **arguments), kind, "Selection: ", *words)


@pytest.mark.parametrize("row", [[1, 0], [3, 3], [-1, 2], [0, 8], [-2, -1], [2**31 - 1, -1]])
def test_selection_rows_that_break_the_rules(row):
    rows = SELECTION[1].copy()
    rows[1, 2, 3] = row
    arrays, sizes = [rows, SELECTION[2]], {"block_size": 4, "query_tokens": 20, "key_tokens": 30}
    for validate in (None, True):
        message = refused(
            lambda v=validate: llsa.Selection(arrays, **sizes, validate=v),
            ValueError,
            "level 1",
            "batch 1, head 2, query 3",
        )
        assert re.search(re.escape(str(row)), message)
    assert llsa.Selection(arrays, **sizes, validate=False).topk == (2, 2)


@pytest.mark.parametrize("name", ["attend", "attend_backward"])
def test_a_selection_that_is_none_or_for_other_shapes(name):
    others = [
        llsa.select(Q[:1], K[:1], **OPTIONS),
        llsa.select(Q[:, :2], K, **OPTIONS),
        llsa.select(Q[:, :, :19], K, **OPTIONS),
        llsa.select(Q, K[:, :, :29], **OPTIONS),
    ]
    for other in others:
        made_for = (other.batch, other.heads, other.query_tokens, other.key_tokens)
        arguments = (Q, K, V) if name == "attend" else (OUT, Q, K, V, OUT, LSE)
        refused(lambda a=arguments, s=other: getattr(llsa, name)(*a, s), ValueError, made_for, (2, 4, 20, 30))
        refused(lambda s=other: llsa.coverage(Q, K, s), ValueError, made_for)
    refused(lambda: getattr(llsa, name)(*arguments, list(SELECTION)), TypeError, "selection is a list", "Selection")
    refused(lambda: llsa.coverage(Q, K, None), TypeError, "selection is a NoneType")


@pytest.mark.parametrize(
    ("changed", "kind", "words"),
    [
        ({"dout": OUT[..., :4]}, ValueError, ["dout", "(2, 4, 20, 4)", "(2, 4, 20, 5)"]),
        ({"dout": OUT.astype(np.float64)}, TypeError, ["dout float64"]),
        ({"dout": 1.0}, TypeError, ["dout is a float"]),
        ({"out": OUT[:, :, :3]}, ValueError, ["out", "(2, 4, 3, 5)"]),
        ({"out": OUT.astype(np.float16)}, TypeError, ["out float16"]),
        ({"lse": LSE[..., None]}, ValueError, ["lse", "(2, 4, 20, 1)", "(2, 4, 20)"]),
        ({"lse": LSE.astype(np.float64)}, TypeError, ["lse has dtype float64", "float32"]),
        ({"dlse": LSE[:1]}, ValueError, ["dlse", "(1, 4, 20)"]),
        ({"dlse": LSE.astype(np.float16)}, TypeError, ["dlse has dtype float16"]),
        ({"dlse": 0.0}, TypeError, ["dlse is a float"]),
    ],
)
def test_what_comes_back_into_the_backward_pass(changed, kind, words):
    arguments = {"dout": OUT, "out": OUT, "lse": LSE, "dlse": LSE} | changed

    def call():
        llsa.attend_backward(
            arguments["dout"], Q, K, V, arguments["out"], arguments["lse"], SELECTION, dlse=arguments["dlse"]
        )

    refused(call, kind, "attend_backward: ", *words)


@pytest.mark.parametrize(
    ("pairs", "options", "kind", "words"),
    [
        ((), {}, ValueError, ["got no pairs"]),
        ((PAIR, (OUT[:, :, :3], LSE)), {}, ValueError, ["out of pair 1", "(2, 4, 3, 5)", "(2, 4, 20, 5)"]),
        ((PAIR, (OUT, LSE[:, :, :3])), {}, ValueError, ["lse of pair 1", "(2, 4, 3)", "(2, 4, 20)"]),
        ((PAIR, (OUT.astype(np.float64), LSE)), {}, TypeError, ["float32", "float64"]),
        ((PAIR, (OUT, LSE.astype(np.float64))), {}, TypeError, ["lse of pair 1 has dtype float64", "float32"]),
        (((OUT.astype(np.int32), LSE),), {}, TypeError, ["int32"]),
        ((OUT, LSE), {}, TypeError, ["pair 0 is a numpy.ndarray"]),
        (((OUT, LSE, LSE),), {}, TypeError, ["pair 0 is a tuple of 3"]),
        (([PAIR, PAIR],), {}, TypeError, ["pair 0 holds tuples", "merge(*pairs)"]),
        (([PAIR],), {}, TypeError, ["pair 0 holds tuples"]),
        (((OUT.tolist(), LSE.tolist()),), {}, TypeError, ["out of pair 0 is a list"]),
        (((OUT, [1]),), {}, TypeError, ["lse of pair 0 is a list"]),
        ((PAIR,), {"layout": "nbhd"}, ValueError, ["layout is 'nbhd'"]),
        ((PAIR,), {"layout": "bnhd"}, ValueError, ["lse of pair 0", "(2, 20, 4)"]),
    ],
)
def test_merge(pairs, options, kind, words):
    refused(lambda: llsa.merge(*pairs, **options), kind, "merge: ", *words)


@pytest.mark.parametrize("shape", [(), (0,), (3, -1), (2.0,), ("2",), (None,), (True,), ((3, 4),)])
def test_zorder(shape):
    refused(lambda: llsa.zorder(*shape), ValueError, "zorder: ")


@pytest.mark.parametrize("options", [{"queries": 0}, {"queries": 1.5}, {"seed": -1}, {"scale": 0}, {"enrich": (9,)}])
def test_coverage(options):
    refused(lambda: llsa.coverage(Q, K, SELECTION, **options), ValueError, "coverage: ")


@pytest.mark.parametrize(
    ("arguments", "options", "kind"),
    [
        (("int8", 64), {}, TypeError),
        ((dict, 64), {}, TypeError),
        (("float32", 0), {}, ValueError),
        (("float32", 64, 0), {}, ValueError),
        (("float32", 64), {"block_size": 1}, ValueError),
        (("float32", 64), {"levels": 2, "topk": (1,)}, ValueError),
        (("float32", 64), {"levels": 2, "enrich": (3,)}, ValueError),
        (("float32", 64), {"precision": "tf16"}, ValueError),
        (("float32", 64), {"backward": 1}, ValueError),
        (("float32", 64), {"topk": ()}, ValueError),
        (("float32", 64), {"topk": (1,) * 17}, ValueError),
        ((None, 64), {}, TypeError),
        (("float32", 64), {"arch": 90}, ValueError),
        (("float32", 64), {"backend": "nvcc"}, ValueError),
    ],
)
def test_precompile(arguments, options, kind):
    refused(lambda: llsa.precompile(*arguments, **options), kind, "precompile: ")


def test_precompile_does_nothing_for_numpy():
    for backend in ("auto", "numpy"):
        assert llsa.precompile(ml_dtypes.bfloat16, 64, 40, topk=(8, 4), enrich=(1,), backend=backend) is None
        assert llsa.precompile("bfloat16", 64, levels=2, topk=[8, 4], backend=backend) is None


@pytest.mark.parametrize("arguments", [(0,), (-3,), (1.5,), (10, 1), (10, 2.0)])
def test_default_levels(arguments):
    refused(lambda: llsa.default_levels(*arguments), ValueError, "default_levels: ")


@pytest.mark.parametrize("arguments", [(0, 4, 1), (10, 1, 1), (10, 4, 0), (10, 4, 17), (10, 16, 16), (1.0, 4, 1)])
def test_hierarchy(arguments):
    refused(lambda: llsa.Hierarchy(*arguments), ValueError, "Hierarchy: ")


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("counts", (3,)),
        ("counts", (1.0,)),
        ("children", (0, 0)),
        ("children", (1, 5)),
        ("children", (1, "a")),
        ("span", (1, -1)),
        ("ancestor", (1, 20)),
        ("ancestor", (1, 2.5)),
        ("stride", (-1,)),
    ],
)
def test_hierarchy_methods(method, arguments):
    refused(lambda: getattr(llsa.Hierarchy(20, 4, 2), method)(*arguments), ValueError, "Hierarchy")


@pytest.mark.parametrize("name", ["attention", "select", "attend", "attend_backward", "pool"])
def test_results_for_which_there_is_no_memory(name, backend, framework):
    """More than any machine can address."""
    if framework.name == "numba" and not SIMULATED:
        pytest.skip("Numba's arrays are copies, which have no room either")
    if framework.name == "jax":
        pytest.skip("JAX's arrays are dense, and have no room either")

    def one_number(dtype, *shape):
        return framework.array(np.broadcast_to(dtype(0), (2**30, 2, *shape)))

    x, lse = one_number(F32, 2**16, 16), one_number(F32, 2**16)
    rows = [one_number(np.int32, 2**12, 1)]
    selection = llsa.Selection(rows, block_size=16, query_tokens=2**16, key_tokens=2**16, validate=False)
    arrays = {"pool": (x,), "select": (x, x), "attend": (x, x, x, selection)}
    arrays["attend_backward"] = (x, x, x, x, x, lse, selection)
    kind = MemoryError
    if framework.name == "torch":  # as those who know torch catch it
        from llsa_np.adapters import pytorch

        kind = pytorch.OutOfMemoryError
    message = refused(
        lambda: getattr(llsa, name)(*arrays.get(name, (x, x, x)), backend=backend), kind, "fewer batch entries"
    )
    assert message.startswith(f"{name}: ")
    assert re.search(r"\d\.? (bytes|[KMGTPE]iB)", message), "how much was asked for"


def test_switches_are_true_or_false():
    refused(lambda: llsa.attention(Q, K, V, return_lse="no", **OPTIONS), ValueError, "return_lse is 'no'")


def test_integers_may_come_from_numpy():
    plain = llsa.attention(Q, K, V, **OPTIONS)
    same = llsa.attention(
        Q, K, V, block_size=np.int8(4), levels=np.array(2), topk=np.array([2, 2]), enrich=np.arange(1, 3)
    )
    assert (plain == same).all()

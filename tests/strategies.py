"""What the property suite draws: a whole call, with shapes, options, dtype, layout, memory order and data.

Nothing is multiplied out: hypothesis draws every coordinate, so one property sees ragged, tiny, tied, strided and huge
cases alike. A Case prints as the Python that makes it again.
"""

import os
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

import llsa_np as llsa

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}
MEMORY = ("contiguous", "transposed", "sliced", "reversed", "packed", "expanded")
DATA = ("normal", "tied", "constant", "one_popular_key", "smooth")


@dataclass(frozen=True)
class Limits:
    """How large a case may get."""

    tokens: int = 300
    dim: int = 40
    heads: int = 4
    block_size: int = 20
    topk: int = 9
    levels: int = 5
    examples: int = 10**6


SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")
"""Whether this process runs the Numba kernels in Numba's simulator, a thousand times slower than anything else."""

EMULATED = os.environ.get("LLSA_CUDA_EMULATOR", "0") not in ("", "0")
"""Whether this process runs the CUDA C++ kernels on the CPU, by tests/cuda_emulator.py, ten thousand times slower."""

if SIMULATED:
    LIMITS = Limits(tokens=32, dim=8, heads=2, block_size=5, topk=6, levels=3, examples=5)
elif EMULATED:
    LIMITS = Limits(tokens=100, dim=32, heads=2, block_size=20, topk=6, levels=3, examples=4)
else:
    LIMITS = Limits()

running: dict[str, str | None] = {"backend": None}
"""The backend that the test now running is for: a drawn Case is one that it serves."""


def examples(number, simulated=LIMITS.examples, emulated=LIMITS.examples):
    """How many cases a property draws. simulated, emulated: where kernels run on the CPU, for those that run long."""
    return min(number, simulated if SIMULATED else emulated if EMULATED else LIMITS.examples)


@dataclass(frozen=True)
class Case:
    dtype: str = "float64"
    batch: int = 1
    kv_heads: int = 1
    group: int = 1
    query_tokens: int = 20
    key_tokens: int = 20
    dim: int = 4
    value_dim: int = 4
    block_size: int = 4
    levels: int | None = None
    topk: int | tuple[int, ...] = 2
    enrich: tuple[int, ...] | None = None
    reweight: bool = True
    scale: float | None = None
    layout: str = "bhnd"
    memory: str = "contiguous"
    data: str = "normal"
    exponents: tuple[int, int, int, int] = (0, 0, 0, 0)  # q, k, v, dO are multiplied by 2 ** these
    seed: int = 0

    @property
    def heads(self):
        return self.kv_heads * self.group

    @property
    def depth(self):
        return llsa.default_levels(self.key_tokens, self.block_size) if self.levels is None else self.levels

    @property
    def topks(self):
        return (self.topk,) * self.depth if isinstance(self.topk, int) else self.topk

    @property
    def select_options(self):
        return {"block_size": self.block_size, "levels": self.levels, "topk": self.topk, "layout": self.layout}

    @property
    def attend_options(self):
        return {"enrich": self.enrich, "reweight": self.reweight, "scale": self.scale, "layout": self.layout}

    def but(self, **changes):
        return replace(self, **changes)

    def served(self, backend=None):
        """The nearest case that a backend serves: that of the running test, unless one is named."""
        if (running["backend"] if backend is None else backend) != "cupy_raw":
            return self
        dims = {name: max(16, -(-getattr(self, name) // 8) * 8) for name in ("dim", "value_dim")}
        block_size = next(size for size in (8, 16, 32, 64) if size >= min(self.block_size, 64))
        case = self.but(block_size=block_size, dtype="float32" if self.dtype == "float64" else self.dtype, **dims)
        topk, enrich = self.topk, self.enrich
        if isinstance(topk, tuple):
            topk = tuple(min(64, k) for k in (topk * case.depth)[: case.depth])
        if enrich is not None:
            enrich = tuple(level for level in enrich if level <= case.depth)
        return case.but(topk=topk, enrich=enrich)

    def arrays(self):
        """q, k, v, dout, dlse as NumPy arrays in the case's dtype, layout and memory order; dlse never in a layout."""
        rng = np.random.default_rng(self.seed)
        m, n = self.query_tokens, self.key_tokens
        q = self._draw(rng, self.heads, m, self.dim)
        k = self._draw(rng, self.kv_heads, n, self.dim)
        v = self._draw(rng, self.kv_heads, n, self.value_dim, constant=False)
        if self.data == "one_popular_key":  # every query's best match lies in one block
            q = np.abs(q)
            k[:, :, n // 2] = 4
        dout = rng.standard_normal((self.batch, self.heads, m, self.value_dim))
        dlse = rng.standard_normal((self.batch, self.heads, m))
        dlse = dlse.astype("float64" if self.dtype == "float64" else "float32")
        arrays = [np.ldexp(x, e).astype(DTYPES[self.dtype]) for x, e in zip((q, k, v, dout), self.exponents)]
        return (*(self._lay_out(x) for x in arrays), dlse)

    def _draw(self, rng, heads, tokens, dim, constant=True):
        shape = (self.batch, heads, tokens, dim)
        if self.data == "tied":
            return rng.integers(-1, 2, shape).astype(np.float64)
        # Values stay random: where all weights and values are alike, every addition is rounded in the same direction.
        if self.data == "constant" and constant:
            return np.broadcast_to(rng.standard_normal((*shape[:2], 1, dim)), shape).copy()
        if self.data == "smooth":
            return np.cumsum(rng.standard_normal(shape), axis=2) / np.sqrt(1 + np.arange(tokens))[:, None]
        return rng.standard_normal(shape)

    def _lay_out(self, x):
        """The same numbers in another memory order, and with the axes of the case's layout."""
        if self.layout == "bnhd":
            x = x.swapaxes(1, 2)
        if self.memory == "transposed":
            return x.transpose(3, 1, 0, 2).copy().transpose(2, 1, 3, 0)
        if self.memory == "sliced":
            wide = np.full((*x.shape[:3], 2 * x.shape[3] + 1), np.nan, x.dtype)
            wide[..., 1::2] = x
            return wide[..., 1::2]
        if self.memory == "reversed":
            return x[:, ::-1, ::-1, ::-1].copy()[:, ::-1, ::-1, ::-1]
        if self.memory == "packed":  # one of three in a fused projection
            fused = np.full((*x.shape[:3], 3, x.shape[3]), np.nan, x.dtype)
            fused[..., 1, :] = x
            return fused[..., 1, :]
        if self.memory == "expanded" and x.shape[0] > 0:  # every batch entry is the first, stride 0
            return np.broadcast_to(x[:1], x.shape)
        return np.ascontiguousarray(x)

    def to_bhnd(self, x):
        """An array of the case's layout as (batch, heads, tokens, dim)."""
        return x.swapaxes(1, 2) if self.layout == "bnhd" and x.ndim == 4 else x


@st.composite
def cases(draw, limits=LIMITS, dtypes=tuple(DTYPES), **fixed):
    """A Case. fixed: coordinates that a property does not let vary."""
    some_sizes = [size for size in (2, 3, 4, 16) if size <= limits.block_size]
    block_size = draw(st.one_of(st.sampled_from(some_sizes), st.integers(2, limits.block_size)))
    key_tokens = draw(token_counts(block_size, limits))
    query_tokens = draw(st.one_of(st.just(key_tokens), token_counts(block_size, limits)))
    levels = draw(st.one_of(st.none(), st.integers(1, limits.levels)))
    depth = llsa.default_levels(key_tokens, block_size) if levels is None else levels
    topk = draw(st.one_of(st.integers(1, limits.topk), st.tuples(*[st.integers(1, 6)] * depth)))
    coarse = list(range(1, depth + 1))
    enrich = draw(st.one_of(st.none(), st.just(()), st.lists(st.sampled_from(coarse), unique=True).map(tuple)))
    kv_heads = draw(st.integers(1, 2))
    exponent = st.one_of(st.just(0), st.integers(-8, 4))
    drawn = Case(
        dtype=draw(st.sampled_from(dtypes)),
        batch=draw(st.integers(1, 2)),
        kv_heads=kv_heads,
        group=draw(st.integers(1, max(1, limits.heads // kv_heads))),
        query_tokens=query_tokens,
        key_tokens=key_tokens,
        dim=draw(st.integers(1, limits.dim)),
        value_dim=draw(st.integers(1, limits.dim)),
        block_size=block_size,
        levels=levels,
        topk=topk,
        enrich=enrich,
        reweight=draw(st.booleans()),
        scale=draw(st.one_of(st.none(), st.sampled_from([0.01, 0.3, 1.0]))),
        layout=draw(st.sampled_from(["bhnd", "bnhd"])),
        memory=draw(st.sampled_from(MEMORY)),
        data=draw(st.sampled_from(DATA)),
        exponents=draw(st.tuples(exponent, exponent, exponent, exponent)),
        seed=draw(st.integers(0, 2**16)),
    )
    return drawn.but(**fixed).served()


def token_counts(block_size, limits):
    """Lengths that matter: tiny ones, powers of the block size and their neighbours, and any."""
    powers = [block_size**i + d for i in range(1, 9) for d in (-1, 0, 1) if block_size**i + d <= limits.tokens]
    any_length = st.integers(1, limits.tokens)
    return st.one_of(st.integers(1, min(3, limits.tokens)), st.sampled_from(powers or [1]), any_length)

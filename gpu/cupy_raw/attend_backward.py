"""The host's side of attend_backward.cu and unpool.cu: the order of the launches, and the workspace between them."""

from __future__ import annotations

import math
from functools import cache
from struct import Struct
from typing import Any, NamedTuple

from llsa_np.gpu.cupy_raw.attend import attend_kernel, queries_of_block
from llsa_np.gpu.cupy_raw.levels import LEVEL, MOST_LEVELS, level_values, log_counts
from llsa_np.gpu.cupy_raw.program import ARRAY, NO_ARRAY, Kernel, array, is_whole, launch
from llsa_np.gpu.cupy_raw.specialisations import PORTABLE_SHARED, Tile, tile_for
from llsa_np.gpu.cupy_raw.transpose import Lists, lists_of, transpose, transpose_kernels, transpose_spaces
from llsa_np.hierarchy import Hierarchy
from llsa_np.options import AttendOptions

Spaces = list[tuple[tuple[int, ...], str]]

ARGUMENTS = Struct(f"{ARRAY * 10}Q3Q2Q2Q2Q9i11i3i4f0q{LEVEL * MOST_LEVELS}")
UNPOOL = Struct("3Q7i2f0q")
FINISH = Struct(f"4Q{ARRAY}8i0q")
GATHER = Struct(f"{ARRAY}3Q10i2f0q")
CLEAR = Struct("Qq")
UNPOOL_THREADS = 256
NO_LISTS = (0,) * len(Lists._fields)
DENSE_PIECES = 96
"""Pieces of 65,536 queries on the coarsest level, over groups of DENSE_KEYS keys: few keys get many pieces."""
DENSE_KEYS = 64
MOST_DENSE_PIECES = 256
"""Their sums take memory, and are added up one after another."""
LEAST_ROW_PIECE = 2**11
"""Queries of a piece of a row of the selection, at least. Measured as in attend.py, ms of a whole backward with 2,048
of them, with 4,096, and by lists: 65,536 tokens, L = 3, with 8 heads 1.44, 1.42, 1.55; with one 0.42, 0.47, 0.43.
1,048,576 tokens, L = 4, 8 heads: 25.7, 27.1, 30.7."""
QUERIES_PER_KEY = 8
"""Of such a piece, at least: the keys' sums take memory. With b = 64 and L = 2, 65,536 tokens take 2.74 ms with 8 of
them and 3.18 with 16, which are too many for that level."""
MOST_ROWS = 2**12
"""Of a head."""
MOST_ROW_REGISTERS = 64
"""The widest tile of which a warp keeps its own rows, of two arrays, in registers."""
MOST_BOTH = 128
"""The widest tile with which one kernel holds the sums of dk and of dv; with wider ones each has its own."""


class KeySplit(NamedTuple):
    """How the keys' side cuts its work."""

    KEY_WARPS: int
    KEY_STAGES: int
    KEY_BLOCKS: int
    """Blocks of a multiprocessor for which registers are kept."""
    DENSE_STAGES: int
    """Tiles of queries that are there or on their way, where all warps share them: coarsest level, and row by row."""
    DENSE_BLOCKS: int
    """As KEY_BLOCKS, for these."""


def key_split_for(tile: Tile) -> KeySplit:
    """So that two blocks or more fit into a multiprocessor's shared memory, and one on every card."""
    # Measured as in attend.py; ms of key_gradient, _joint and _dense: as it stands 0.319, 0.255, 0.258. KEY_WARPS 2 and
    # KEY_BLOCKS 6: _joint 0.291; KEY_WARPS 8 and KEY_BLOCKS 1: 0.298. Rows of keys in shared memory (32 as
    # MOST_ROW_REGISTERS) and KEY_BLOCKS 4: 0.322, 0.262, 0.290. With four warps to a block of key_gradient, each with a
    # piece of its own: 0.339, for a block lasts as long as its longest list.
    # D = 128: 0.595, 0.555, 0.546; KEY_WARPS 4 with one stage: 0.672, 0.529, 0.578. float32 as it stands 1.847, 1.596,
    # 2.943; as D = 128: 1.805, 1.812, 2.870.
    if tile.row_bytes <= 128:
        return KeySplit(KEY_WARPS=4, KEY_STAGES=2, KEY_BLOCKS=3, DENSE_STAGES=4, DENSE_BLOCKS=3)
    if tile.row_bytes <= 256 and tile.dtype != "float32":
        return KeySplit(KEY_WARPS=2, KEY_STAGES=2, KEY_BLOCKS=4, DENSE_STAGES=2, DENSE_BLOCKS=4)
    if tile.row_bytes <= 256:
        return KeySplit(KEY_WARPS=4, KEY_STAGES=1, KEY_BLOCKS=2, DENSE_STAGES=2, DENSE_BLOCKS=2)
    return KeySplit(
        KEY_WARPS=2 if tile.row_bytes <= 768 else 1, KEY_STAGES=1, KEY_BLOCKS=1, DENSE_STAGES=1, DENSE_BLOCKS=1
    )


class Kernels(NamedTuple):
    """The kernels of a tile that differ by what is asked for."""

    prepare: Kernel
    query_gradient: Kernel
    key_gradient: Kernel
    key_gradient_joint: Kernel
    key_gradient_dense: Kernel
    key_gradient_rows: Kernel


@cache
def gradient_kernels(tile: Tile, whole: bool, needs_k: bool, needs_v: bool) -> Kernels:
    """Of one compilation of attend_backward.cu."""
    forward = attend_kernel(tile, whole)
    keys = key_split_for(tile)
    in_registers = tile.dtype != "float32" and tile.WIDTH <= MOST_ROW_REGISTERS
    needs = (("NEEDS_K", str(int(needs_k))), ("NEEDS_V", str(int(needs_v))))
    most = (("MOST_ROW_REGISTERS", str(MOST_ROW_REGISTERS)),)
    values = dict(forward.defines)
    warps = int(values["WARPS"])
    fine_rows, shared_rows = int(values["FINE_KEYS"]), int(values["COARSE_STAGES"]) * int(values["KEYS"])

    def query_rows(warps: int) -> int:
        return 2 * (shared_rows + fine_rows * warps) + (0 if in_registers else 2 * warps * 16)

    # Two tiles of rows stay, where the forward has one.
    while warps > 1 and query_rows(warps) * tile.pitch_bytes > PORTABLE_SHARED:
        warps //= 2
    values |= {"WARPS": str(warps)} | {name: str(value) for name, value in keys._asdict().items()}
    defines = (*(values | dict(needs) | dict(most)).items(),)
    key_rows = 32 * (keys.KEY_STAGES + (not in_registers))  # of a warp
    dense_rows = 32 * (keys.DENSE_STAGES + keys.KEY_WARPS)
    threads = keys.KEY_WARPS * 32

    def kernel(name: str, threads: int, rows: int) -> Kernel:
        return Kernel("attend_backward.cu", name, defines, threads, rows * tile.pitch_bytes)

    return Kernels(
        kernel("prepare", 128, 0),
        kernel("query_gradient", warps * 32, query_rows(warps)),
        kernel("key_gradient", 32, key_rows),
        kernel("key_gradient_joint", threads, keys.KEY_WARPS * key_rows),
        kernel("key_gradient_dense", threads, dense_rows),
        kernel("key_gradient_rows", threads, dense_rows),
    )


def needs_of_launches(tile: Tile, needs_k: bool, needs_v: bool) -> list[tuple[bool, bool]]:
    """Which of dk and dv each launch of the keys' side makes."""
    if not (needs_k or needs_v):
        return []
    if tile.WIDTH <= MOST_BOTH or not (needs_k and needs_v):
        return [(needs_k, needs_v)]
    return [(True, False), (False, True)]


@cache
def unpool_kernel(name: str, dtype: str) -> Kernel:
    """unpool, finish, gather or clear."""
    return Kernel("unpool.cu", name, ((f"ELEMENT_{dtype.upper()}", "1"), ("WHOLE", "0")), UNPOOL_THREADS)


@cache
def kernels_of_launches(tile: Tile, whole: bool, needs_k: bool, needs_v: bool) -> tuple[Kernels, ...]:
    """The compilations that a call needs; the first has the queries' side too. For dq alone, one of those for all."""
    needs = needs_of_launches(tile, needs_k, needs_v) or needs_of_launches(tile, True, True)[:1]
    return tuple(gradient_kernels(tile, whole, *of) for of in needs)


def backward_kernels(tile: Tile, whole: bool) -> list[Kernel]:
    """All that gradients of any of the inputs need."""
    asked = [(True, True), (True, False), (False, True), (False, False)]
    kernels = [k for needs in asked for kernels in kernels_of_launches(tile, whole, *needs) for k in kernels]
    small = [unpool_kernel(name, tile.dtype) for name in ("unpool", "finish", "gather", "clear")]
    return list(dict.fromkeys([*kernels, *small, *transpose_kernels()]))


# --- sizes


def dense_pieces(queries: int, group: int, length: int) -> tuple[int, int]:
    """(pieces, tiles of a piece) of the coarsest level, of so many keys: all tiles of 16 queries of a group's heads. By
    the sizes of one list alone, so that a batch entry has the same bits whatever lies beside it."""
    # Blocks enough for every card. ms of key_gradient_dense and of adding up, on an H100 at 65,536 tokens, with L = 2
    # and L = 3: as it stands, 24 and 48 pieces, 0.277 and 0.078; with 16 pieces 0.314 and 0.124.
    tiles = group * -(-queries // 16)
    pieces = DENSE_PIECES * max(1, tiles // 8192) // max(2, -(-length // DENSE_KEYS))
    of_piece = max(16, -(-tiles // max(4, min(MOST_DENSE_PIECES, pieces))))
    return -(-tiles // of_piece), of_piece


class RowPieces(NamedTuple):
    """How the queries of a row of S_{l+1} are cut, for `key_gradient_rows`."""

    pieces: int
    tiles: int
    """Of 16 queries, of a piece."""


def row_pieces(level: int, hierarchy: Hierarchy, query_hierarchy: Hierarchy, topk: int) -> RowPieces | None:
    """None where lists do better: on level 0, whose sums are results; where 16 keys are of two parents; where some
    columns are empty in every row; where rows are many, as `gather` goes through all of them for each parent; and where
    a row has too few queries for the sums of its keys."""
    block_size, queries = hierarchy.block_size, query_hierarchy.tokens
    if level == 0 or block_size < 16 or topk > hierarchy.lengths[level + 1]:
        return None
    run = min(block_size ** (level + 1), queries)
    pieces = run // max(LEAST_ROW_PIECE, QUERIES_PER_KEY * topk * block_size)
    if pieces == 0 or query_hierarchy.lengths[level + 1] > MOST_ROWS:
        return None
    tiles = -(-run // 16)
    return RowPieces(pieces, -(-tiles // pieces))


def backward_spaces(
    batch: int,
    heads: int,
    kv_heads: int,
    dim: int,
    value_dim: int,
    query_hierarchy: Hierarchy,
    hierarchy: Hierarchy,
    topk: tuple[int, ...],
    options: AttendOptions,
    needs: frozenset[str],
) -> Spaces:
    """rows_of; starts, rows, items; parts of dk and dv; the coarse levels' sums of dk, then of dv."""
    queries = query_hierarchy.tokens
    lists, group = batch * kv_heads, heads // max(1, kv_heads)
    integers, places = [0, 0, 0], 0
    if needs & {"k", "v"} and group:
        for level in options.levels:
            if level == hierarchy.levels:
                places = max(
                    places, dense_pieces(queries, group, hierarchy.lengths[level])[0] * hierarchy.lengths[level]
                )
            elif (cut := row_pieces(level, hierarchy, query_hierarchy, topk[level])) is not None:
                rows = group * query_hierarchy.lengths[level + 1]
                places = max(places, rows * cut.pieces * topk[level] * hierarchy.block_size)
            else:
                of = lists_of(level, hierarchy, query_hierarchy, topk[level], group)
                integers = [max(pair) for pair in zip(integers, transpose_spaces(lists, of))]
                places = max(places, 2 * of.spare * hierarchy.block_size)
    dims = {"k": dim, "v": value_dim}
    spaces: Spaces = [((batch, heads, padded(queries), 2), "float32")]
    spaces += [((size,), "int32") for size in integers]
    spaces += [((lists * places * dims[name] if name in needs else 0,), "float32") for name in ("k", "v")]
    for name in ("k", "v"):
        used = max(options.levels) if name in needs else 0
        spaces += [((lists, hierarchy.lengths[level], dims[name]), "float32") for level in range(1, used + 1)]
    return spaces


def padded(queries: int) -> int:
    """Rows of a head in `rows_of`: whole tiles of 16."""
    return -(-queries // 16) * 16


# --- the operation


def attend_backward(
    dout: Any,
    q: Any,
    k_levels: list[Any],
    v_levels: list[Any],
    out: Any,
    lse: Any,
    dlse: Any | None,
    selected: list[Any],
    query_hierarchy: Hierarchy,
    hierarchy: Hierarchy,
    options: AttendOptions,
    dq: Any | None,
    dk: Any | None,
    dv: Any | None,
    spaces: list[Any],
    dtype: str,
    recording: Any,
) -> None:
    """dq, dk and dv, each unless None."""
    batch, heads, queries, dim = q.shape
    value_dim, kv_heads = dout.shape[3], k_levels[0].shape[1]
    lists, group = batch * kv_heads, heads // max(1, kv_heads)
    for gradient in (dk, dv):
        if gradient is not None and group == 0:  # keys that no query head reads
            size = gradient.size * gradient.dtype.itemsize
            clear = unpool_kernel("clear", dtype)
            launch(clear, -(-size // UNPOOL_THREADS), CLEAR, (gradient.ptr, size), recording)
    if group == 0 or batch == 0:
        return

    rows_of, starts, rows, items, k_parts, v_parts, *sums = spaces
    used = max(options.levels)
    k_sums = [None, *sums[: used if dk is not None else 0]]
    v_sums = [None, *sums[used if dk is not None else 0 :]]
    tile = tile_for(dtype, max(dim, value_dim))
    of_dout, of_q, of_out = array(dout), array(q), array(out)
    of_k, of_v = [array(x) for x in k_levels], [array(x) for x in v_levels]
    gradients = [NO_ARRAY if x is None else array(x) for x in (dq, dk, dv)]
    whole = is_whole(dtype, of_q, of_dout, of_out, *of_k, *of_v, *(x for x in gradients if x is not NO_ARRAY))
    levels = level_values(of_k, of_v, selected, hierarchy, options)
    ends = (
        *of_out,
        *(NO_ARRAY if dlse is None else (*array(dlse), 0)),
        *(*array(lse), 0),
        *(value for x in gradients for value in x),
        *(rows_of.ptr, starts.ptr, rows.ptr, items.ptr),
    )
    block_bits = hierarchy.block_size.bit_length() - 1

    def arguments(
        level: int,
        of: Lists | None = None,
        need_k: bool = False,
        need_v: bool = False,
        pieces: tuple[int, int] | None = None,
    ) -> tuple[Any, ...]:
        """The struct of attend_backward.cu, for one level on the keys' side."""
        is_coarse = level > 0 and of is not None
        has_above = level == 0 and used > 0
        return (
            *(*of_dout, *of_q, *of_k[level], *of_v[level], *ends),
            *(k_sums[level].ptr if is_coarse and need_k else 0,),
            *(v_sums[level].ptr if is_coarse and need_v else 0,),
            *(k_parts.ptr, v_parts.ptr),
            *(k_sums[1].ptr if has_above and need_k else 0,),
            *(v_sums[1].ptr if has_above and need_v else 0,),
            *(batch, heads, kv_heads, queries, padded(queries), dim, value_dim, block_bits, len(options.levels)),
            *(hierarchy.lengths[level], *(NO_LISTS if of is None else of)),
            *(dense_pieces(queries, group, hierarchy.lengths[level]) if pieces is None else pieces),
            options.levels.index(level),
            *(options.scale * math.log2(math.e), options.scale, *log_counts(level, hierarchy, options.reweight)),
            *levels,
        )

    any_kernels = kernels_of_launches(tile, whole, dk is not None, dv is not None)[0]
    launch(any_kernels.prepare, -(-batch * heads * padded(queries) // 16), ARGUMENTS, arguments(0), recording)
    if dq is not None:
        blocks = batch * heads * -(-queries // queries_of_block(any_kernels.query_gradient, hierarchy.block_size))
        launch(any_kernels.query_gradient, blocks, ARGUMENTS, arguments(0), recording)
    launches = needs_of_launches(tile, dk is not None, dv is not None)
    if not launches:
        return

    wanted = [
        (gradient, parts, of_levels)
        for gradient, parts, of_levels in ((dk, k_parts, k_sums), (dv, v_parts, v_sums))
        if gradient is not None
    ]

    def by_rows(level: int, cut: RowPieces, has_above: bool) -> None:
        """A coarse level whose queries are read row by row, down to its totals."""
        chosen, length = selected[level], hierarchy.lengths[level]
        row_length, columns, parents = chosen.shape[2], chosen.shape[3], hierarchy.lengths[level + 1]
        of = lists_of(level, hierarchy, query_hierarchy, columns, group)
        for need_k, need_v in launches:
            kernel = gradient_kernels(tile, whole, need_k, need_v).key_gradient_rows
            groups = -(-columns * hierarchy.block_size // (kernel.threads // 2))
            values = arguments(level, of, need_k, need_v, cut)
            launch(kernel, lists * of.row_count * cut.pieces * groups, ARGUMENTS, values, recording)
        for _, parts, of_levels in wanted:
            dims = of_levels[level].shape[2]
            gather = (
                *(*array(chosen), parts.ptr, of_levels[level + 1].ptr if has_above else 0, of_levels[level].ptr),
                *(heads, group, row_length, of.row_count, columns, parents, cut.pieces, length, dims, block_bits),
                *(min(hierarchy.stride(level), hierarchy.tokens), hierarchy.last_count(level)),
            )
            chunks = -(-(dims // 4 * hierarchy.block_size) // UNPOOL_THREADS)
            launch(unpool_kernel("gather", dtype), lists * parents * chunks, GATHER, gather, recording)

    cuts = [row_pieces(x, hierarchy, query_hierarchy, chosen.shape[3]) for x, chosen in enumerate(selected)]
    has_above = False
    for level in range(used, -1, -1):
        takes_part, is_dense = level in options.levels, level == hierarchy.levels
        pieces = 1
        if takes_part and is_dense:
            pieces, _ = dense_pieces(queries, group, hierarchy.lengths[level])
            for need_k, need_v in launches:
                kernel = gradient_kernels(tile, whole, need_k, need_v).key_gradient_dense
                key_groups = -(-hierarchy.lengths[level] // (kernel.threads // 2))
                values = arguments(level, None, need_k, need_v)
                launch(kernel, lists * pieces * key_groups, ARGUMENTS, values, recording)
        elif takes_part and (cut := cuts[level]) is not None:
            by_rows(level, cut, has_above)
            has_above = True
            continue
        elif takes_part:
            of = lists_of(level, hierarchy, query_hierarchy, selected[level].shape[3], group)
            transpose(selected[level], of, kv_heads, starts, rows, items, recording)
            units = (of.parents + of.spare) * max(1, hierarchy.block_size // 16)
            for need_k, need_v in launches:
                kernels = gradient_kernels(tile, whole, need_k, need_v)
                # On coarse levels lists are long: whole groups of queries
                kernel = kernels.key_gradient if level == 0 else kernels.key_gradient_joint
                launch(kernel, lists * units, ARGUMENTS, arguments(level, of, need_k, need_v), recording)
            if of.spare:
                # Few lists of level 0 are cut, but most of the coarse levels, where there may be as few as 16 parents:
                # with 32 of them to a block, it took 0.28 ms of an H100 at 65,536 tokens and L = 3; now 0.013.
                of_block = 32 if level == 0 else 1
                for gradient, parts, of_levels in wanted:
                    finish = (
                        *(items.ptr, parts.ptr, of_levels[1].ptr if has_above and level == 0 else 0),
                        *(of_levels[level].ptr if level > 0 else 0, *array(gradient)),
                        *(kv_heads, lists, of.parents, of.spare, hierarchy.lengths[level], gradient.shape[3]),
                        *(block_bits, of_block),
                    )
                    # An odd number, so that where parents are a power of two, the same ones of other lists are another
                    # block's
                    blocks = -(-lists * of.parents // of_block) | 1
                    launch(unpool_kernel("finish", dtype), blocks, FINISH, finish, recording)
        if level == 0:
            return
        for _, parts, of_levels in wanted:
            sums_here, dims = of_levels[level], of_levels[level].shape[2]
            own = 0 if not takes_part else parts.ptr if is_dense else sums_here.ptr
            length, of_block = hierarchy.lengths[level], UNPOOL_THREADS // (dims // 4)
            unpool = (
                *(own, of_levels[level + 1].ptr if has_above else 0, sums_here.ptr, lists * length),
                *(pieces, length, hierarchy.lengths[level + 1] if has_above else 0, dims, block_bits, of_block),
                *(min(hierarchy.stride(level), hierarchy.tokens), hierarchy.last_count(level)),
            )
            launch(unpool_kernel("unpool", dtype), -(-lists * length // of_block), UNPOOL, unpool, recording)
        has_above = True

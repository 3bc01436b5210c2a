"""Gradients of attention, down through the levels to the tokens (spec.md, Gradients)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from llsa_np.attend import Split, candidates, columns, scaled_columns, score
from llsa_np.hierarchy import Hierarchy
from llsa_np.options import AttendOptions
from llsa_np.pool import accumulator
from llsa_np.selection import Selection
from llsa_np.threads import run
from llsa_np.tiles import Floats, Piece, Tile, gather, most_queries, tiles


def attend_backward(
    dout: Floats,
    q: Floats,
    k_levels: list[Floats],
    v_levels: list[Floats],
    out: Floats,
    lse: Floats,
    dlse: Floats | None,
    selection: Selection,
    options: AttendOptions,
    dq: Floats | None,
    dk: Floats | None,
    dv: Floats | None,
) -> None:
    """dS = P (dO v^T - delta + dlse), dq = scale sum dS k_l[j], dk_l[j] = scale sum_t dS q_t, dv_l[j] = sum_t P dO_t.

    dout, out: (batch, heads, M, Dv). q: (batch, heads, M, D). k_levels, v_levels: levels 0..L. lse, dlse:
    (batch, heads, M). dq, dk, dv: filled here, shaped as q, k, v; None where not needed. Any strides. Each kv head's
    sums run over its queries in ascending order on one thread, so the same inputs give the same bits.
    """
    batch, kv_heads = k_levels[0].shape[:2]
    per_kv_head = q.shape[1] // max(1, kv_heads)
    hierarchy = selection.key_hierarchy
    acc = accumulator(q.dtype)
    most = most_queries(q.shape[3] + out.shape[3], acc)

    def work(head: tuple[int, ...]) -> None:
        n, kv = head
        keys, values = [level[n, kv] for level in k_levels], [level[n, kv] for level in v_levels]
        dk_levels = None if dk is None else zero_sums(hierarchy, options, dk.shape[-1], acc)
        dv_levels = None if dv is None else zero_sums(hierarchy, options, dv.shape[-1], acc)
        for h in range(kv * per_kv_head, (kv + 1) * per_kv_head):
            selected = [level[n, h] for level in selection]
            for tile in tiles(q.shape[2], hierarchy.block_size, most):
                rows = slice(tile.first, tile.first + tile.size)
                tile_dq = backward_tile(
                    dout[n, h, rows],
                    q[n, h, rows],
                    keys,
                    values,
                    out[n, h, rows],
                    lse[n, h, rows],
                    None if dlse is None else dlse[n, h, rows],
                    selected,
                    tile,
                    hierarchy,
                    options,
                    dq is not None,
                    dk_levels,
                    dv_levels,
                )
                if dq is not None:
                    dq[n, h, rows] = tile_dq
        if dk is not None and dk_levels is not None:
            dk[n, kv] = unpool(dk_levels, hierarchy)
        if dv is not None and dv_levels is not None:
            dv[n, kv] = unpool(dv_levels, hierarchy)

    run(work, list(np.ndindex(batch, kv_heads)), q.size)


def backward_tile(
    dout: Floats,
    q: Floats,
    keys: list[Floats],
    values: list[Floats],
    out: Floats,
    lse: Floats,
    dlse: Floats | None,
    selected: list[NDArray[np.int32]],
    tile: Tile,
    hierarchy: Hierarchy,
    options: AttendOptions,
    needs_dq: bool,
    dk_levels: dict[int, Floats] | None,
    dv_levels: dict[int, Floats] | None,
) -> Floats | None:
    """Adds one tile's part to dk_levels and dv_levels; returns its dq (T, D)."""
    acc = accumulator(q.dtype)
    dout = dout.astype(acc, order="C", copy=False)
    queries, dout_columns = scaled_columns(q, options.scale), scaled_columns(dout, 1.0)  # (D, T), (Dv, T)
    delta = np.multiply(dout, out, order="C").sum(axis=-1)  # (T,)
    if dlse is not None:
        delta -= dlse
    empty = lse == -np.inf  # rows without candidates: P = 0 and no gradient, whatever dO holds
    any_empty = bool(empty.any())
    finite_lse = np.where(empty, np.inf, lse)
    dq = np.zeros(q.shape, acc)

    dims = q.shape[1] + out.shape[1]
    for level, piece, split in candidates(selected, tile, hierarchy, options, acc, 2 * dims, dims):
        level_keys = gather(keys[level], piece, acc)  # (G, C, D)
        logits = score(queries, level_keys, split, level, piece, hierarchy, options)
        logits -= finite_lse
        p = np.exp(logits, out=logits)  # (C, T)
        if dv_levels is not None:
            add_to_tokens(dv_levels[level], sum_queries(p, dout, split), piece)
        if dk_levels is None and not needs_dq:
            continue
        ds = np.empty_like(p)
        np.matmul(gather(values[level], piece, acc)[:, None], columns(dout_columns, split), out=columns(ds, split))
        ds -= delta
        ds *= p
        if any_empty:
            ds[:, empty] = 0
        if needs_dq:
            part = columns(ds, split).swapaxes(-1, -2) @ level_keys[:, None]  # (G, S, W, D)
            dq += part.reshape(dq.shape)
        if dk_levels is not None:
            add_to_tokens(dk_levels[level], sum_queries(ds, queries.T, split), piece)
    return dq * acc(options.scale) if needs_dq else None


def sum_queries(weights: Floats, x: Floats, split: Split) -> Floats:
    """(C, T), (T, D) -> (G, C, D): for every candidate of a group, the weighted sum of x over the group's queries."""
    parts: Floats = columns(weights, split) @ x.reshape(*split, x.shape[1])  # (G, S, C, D)
    return parts[:, 0] if split[1] == 1 else parts.sum(axis=1)


def zero_sums(hierarchy: Hierarchy, options: AttendOptions, dim: int, acc: Any) -> dict[int, Floats]:
    """A sum per token of every level that takes part."""
    return {level: np.zeros((hierarchy.lengths[level], dim), acc) for level in options.levels}


def add_to_tokens(sums: Floats, part: Floats, piece: Piece) -> None:
    """sums[tokens[g, c]] += part[g, c], group by group: within one, no token repeats."""
    for g, tokens in enumerate(piece.tokens):
        if piece.absent is None:
            sums[tokens] += part[g]
        else:
            there = ~piece.absent[g]
            sums[tokens[there]] += part[g, there]


def unpool(levels: dict[int, Floats], hierarchy: Hierarchy) -> Floats:
    """Each level-0 token's own sum plus dk_l[anc_l] / c_l[anc_l] from every coarse level, carried from the top down.

    levels: the sums of the levels that take part, level 0 always among them. Adds in place and returns level 0.
    """
    carried: Floats | None = None
    for level in range(hierarchy.levels, -1, -1):
        own = levels.get(level)
        if own is None:
            own = np.zeros((hierarchy.lengths[level], levels[0].shape[1]), levels[0].dtype)
        if level > 0:
            own /= hierarchy.counts(level).astype(own.dtype)[:, None]
        if carried is not None:
            whole = len(own) // hierarchy.block_size
            tail = own[whole * hierarchy.block_size :]
            if whole:
                full = own[: len(own) - len(tail)].reshape(whole, hierarchy.block_size, own.shape[1])
                full += carried[:whole, None]
            tail += carried[whole:]  # at most one parent
        carried = own
    return levels[0]

"""LLSA by dense masks and whole matrices, in float64: for lengths that loops are too slow for.

Shares nothing with the package but the formulas: no tiles, no pieces, no running softmax. It makes an array of queries
by tokens for each level, so lengths stay at a few thousand.
"""

import numpy as np


def means(x, block_size, levels):
    """Levels 0..L of (tokens, dim) and their counts, by summing at run boundaries."""
    result, counts = [x], [np.ones(len(x))]
    for level in range(1, levels + 1):
        starts = np.arange(0, len(x), block_size**level) if block_size**level < len(x) else np.zeros(1, int)
        count = np.diff(np.append(starts, len(x)))
        result.append(np.add.reduceat(x, starts, axis=0) / count[:, None])
        counts.append(count.astype(float))
    return result, counts


def masks(rows, queries, tokens, block_size, levels):
    """For every level the (queries, n_l) mask of who attends to what. rows[l]: (m_l, K_l) selected tokens or -1."""
    t = np.arange(queries)
    result = {}
    for level in range(levels + 1):
        length = -(-tokens // block_size**level)
        if level == levels:
            result[level] = np.ones((queries, length), bool)
            continue
        chosen = rows[level + 1][t // block_size ** (level + 1)]  # (queries, K)
        parents = np.zeros((queries, -(-length // block_size)), bool)
        for column in chosen.T:
            parents[t[column >= 0], column[column >= 0]] = True
        result[level] = parents[:, np.arange(length) // block_size]
    return result


def attention(q, k, v, rows, block_size, levels, enrich, reweight, scale, dout, dlse, round_to):
    """out, lse, dq, dk, dv of one head; q (M, D), k (N, D), v (N, Dv). round_to: the dtype that levels are stored in.

    enrich: the coarse levels that take part. rows: as for masks.
    """
    q, dout, dlse = (x.astype(np.float64) for x in (q, dout, dlse))
    (k_levels, counts), (v_levels, _) = (means(x.astype(np.float64), block_size, levels) for x in (k, v))
    k_levels, v_levels = ([x.astype(round_to).astype(np.float64) for x in xs] for xs in (k_levels, v_levels))
    attended = masks(rows, len(q), len(k), block_size, levels)
    parts = {}
    for level in (*enrich, 0):
        logits = scale * q @ k_levels[level].T + (np.log(counts[level]) if reweight else 0)
        parts[level] = np.where(attended[level], logits, -np.inf)
    top = np.max([x.max(axis=1) for x in parts.values()], axis=0)
    lse = top + np.log(sum(np.exp(x - top[:, None]).sum(axis=1) for x in parts.values()))
    p = {level: np.exp(x - lse[:, None]) for level, x in parts.items()}
    out = sum(p[level] @ v_levels[level] for level in p)
    delta = (dout * out).sum(axis=1)
    dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    for level in p:
        ds = p[level] * (dout @ v_levels[level].T - (delta - dlse)[:, None])
        dq += scale * ds @ k_levels[level]
        ancestors = np.arange(len(k)) // block_size**level
        dk += (scale * ds.T @ q / counts[level][:, None])[ancestors]
        dv += (p[level].T @ dout / counts[level][:, None])[ancestors]
    return out, lse, dq, dk, dv


def select(q, k, block_size, levels, topk, round_to):
    """{level: (m_l, K_l)} rows by masks and a stable sort, for data without near ties."""
    (q_levels, _), (k_levels, _) = (means(x.astype(np.float64), block_size, levels) for x in (q, k))
    q_levels, k_levels = ([x.astype(round_to).astype(np.float64) for x in xs] for xs in (q_levels, k_levels))
    rows = {}
    for level in range(levels, 0, -1):
        scores = q_levels[level] @ k_levels[level].T
        if level < levels:
            above = rows[level + 1][np.arange(len(scores)) // block_size]
            mine = (above[:, :, None] == np.arange(scores.shape[1])[None, None] // block_size).any(axis=1)
            scores = np.where(mine, scores, -np.inf)
        order = np.argsort(-scores, axis=1, kind="stable")[:, : topk[level - 1]]
        absent = np.take_along_axis(scores, order, axis=1) == -np.inf
        ascending = np.sort(np.where(absent, scores.shape[1], order), axis=1)
        row = np.full((len(scores), topk[level - 1]), -1)
        row[:, : ascending.shape[1]] = np.where(ascending == scores.shape[1], -1, ascending)
        rows[level] = row
    return rows

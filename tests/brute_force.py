"""LLSA from spec.md's formulas in plain loops, one query and one key at a time: the reference of the reference."""

import math

import numpy as np


def levels_of(x, block_size, levels):
    """Levels 0..L of (tokens, dim), means of level-0 tokens, float64."""
    result = [x.astype(np.float64)]
    for level in range(1, levels + 1):
        span = block_size**level
        length = -(-len(x) // span)
        result.append(np.array([result[0][j * span : (j + 1) * span].mean(axis=0) for j in range(length)]))
    return result


def counts_of(tokens, block_size, level):
    span = block_size**level
    return [min((j + 1) * span, tokens) - j * span for j in range(-(-tokens // span))]


def rank(score):
    """Sorts best first: +inf > finite > -inf > NaN."""
    return (1, 0.0) if math.isnan(score) else (0, -score)


def children(parents, block_size, length):
    return [
        j for p in parents if p >= 0 for j in range(p * block_size, min((p + 1) * block_size, length)) if j < length
    ]


def select(q, k, block_size, levels, topk):
    """S_l(i) as lists, {level: [row of query i]}, for one head."""
    q_levels, k_levels = levels_of(q, block_size, levels), levels_of(k, block_size, levels)
    selected = {}
    for level in range(levels, 0, -1):
        rows = []
        for i in range(len(q_levels[level])):
            candidates = range(len(k_levels[level]))
            if level < levels:
                candidates = children(selected[level + 1][i // block_size], block_size, len(k_levels[level]))
            scores = {j: float(q_levels[level][i] @ k_levels[level][j]) for j in candidates}
            best = sorted(candidates, key=lambda j: (rank(scores[j]), j))[: topk[level - 1]]
            rows.append(sorted(best))
        selected[level] = rows
    return selected


def candidate_list(t, rows_of, tokens, block_size, levels, enrich):
    """[(level, token), ...] that query t attends to."""
    result = []
    for level in (*sorted(enrich, reverse=True), 0):
        length = -(-tokens // block_size**level)
        if level == levels:
            result += [(level, j) for j in range(length)]
        else:
            parents = rows_of(level + 1, t // block_size ** (level + 1))
            result += [(level, j) for j in children(parents, block_size, length)]
    return result


def attention(q, k, v, rows_of, block_size, levels, enrich, reweight, scale, dout=None, dlse=None):
    """out, lse, and with dout dq, dk, dv, of one head in float64. rows_of(level, query): the tokens selected there."""
    tokens = len(k)
    k_levels, v_levels = levels_of(k, block_size, levels), levels_of(v, block_size, levels)
    counts = [counts_of(tokens, block_size, level) for level in range(levels + 1)]
    out, lse = np.zeros((len(q), v.shape[1])), np.full(len(q), -np.inf)
    dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    for t, query in enumerate(q.astype(np.float64)):
        pairs = candidate_list(t, rows_of, tokens, block_size, levels, enrich)
        if not pairs:
            continue
        logits = np.array([scale * (query @ k_levels[level][j]) for level, j in pairs])
        weights = np.array([counts[level][j] if reweight else 1 for level, j in pairs], np.float64)
        z = (weights * np.exp(logits - logits.max())).sum()
        lse[t] = logits.max() + math.log(z)
        p = weights * np.exp(logits - logits.max()) / z
        out[t] = sum(w * v_levels[level][j] for w, (level, j) in zip(p, pairs))
        if dout is None:
            continue
        delta = dout[t] @ out[t]
        for w, (level, j) in zip(p, pairs):
            ds = w * (dout[t] @ v_levels[level][j] - delta + dlse[t])
            dq[t] += scale * ds * k_levels[level][j]
            span = slice(j * block_size**level, (j + 1) * block_size**level)
            dk[span] += scale * ds * query / counts[level][j]
            dv[span] += w * dout[t] / counts[level][j]
    return out, lse, dq, dk, dv

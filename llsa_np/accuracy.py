"""How far a result lies from float64, and how far it may (spec.md, Rounding): for `llsa check` and for the tests.

The reference is the NumPy code in float64 under the same selection and the same pooled levels. An error is
||x - ref|| / max(||ref||, ||T|| / 2), T being the same sum with nothing cancelling, so that cases in which everything
cancels are judged by the size of what went in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llsa_np.attend import attend
from llsa_np.attend_backward import attend_backward
from llsa_np.checks import lse_dtype
from llsa_np.hierarchy import Hierarchy
from llsa_np.options import AttendOptions
from llsa_np.pool import pool
from llsa_np.selection import Selection

Array = NDArray[Any]

OUT_BOUND = {"float64": 1e-12, "float32": 2e-6, "tf32": 2e-3, "bfloat16": 8e-3, "float16": 1e-3}
GRADIENT_BOUND = {"float64": 1e-11, "float32": 1e-5, "tf32": 4e-3, "bfloat16": 1.2e-2, "float16": 2e-3}
LSE_BOUND = {"float64": 1e-12, "float32": 2e-6, "tf32": 2e-3, "bfloat16": 2e-6, "float16": 2e-6}
SMALLEST_FLOAT16 = 2.0**-24
UNIT_ROUNDOFF = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24, "float64": 2.0**-53}


@dataclass(frozen=True)
class Exact:
    """The float64 results, the sizes T of their sums with nothing cancelling, and the largest sum of |q_d k_d|."""

    results: dict[str, Array]
    """out, lse and, with a dout, dq, dk, dv."""
    sizes: dict[str, Array]
    """T_out, T_dq, T_dk, T_dv under the names of the results."""
    largest: float
    """Lambda: the largest scale * sum_d |q_t[d] k_l[j][d]| over attended pairs."""


def exact(
    q: Array,
    k: Array,
    v: Array,
    selection: Selection,
    options: AttendOptions,
    dout: Array | None = None,
    dlse: Array | None = None,
) -> Exact:
    """The float64 reference of `attend` and, with dout, `attend_backward`.

    q, k, v, dout: (batch, heads, tokens, dim), host arrays as the backend was given them. dlse: (batch, heads, M).
    """
    hierarchy = selection.key_hierarchy
    k_levels, v_levels = rounded_levels(k, hierarchy), rounded_levels(v, hierarchy)
    q = q.astype(np.float64)
    out, lse = attend_float64(q, k_levels, v_levels, selection, options)
    size_out, _ = attend_float64(q, k_levels, [np.abs(level) for level in v_levels], selection, options)
    results, sizes = {"out": out, "lse": lse}, {"out": size_out}
    if dout is not None:
        dout = dout.astype(np.float64)
        dlse = np.zeros_like(lse) if dlse is None else dlse.astype(np.float64)
        results |= backward_float64(dout, q, k_levels, v_levels, out, lse, dlse, selection, options)
        sizes |= gradient_sizes(dout, q, k_levels, v_levels, out, lse, dlse, selection, options)
    return Exact(results, sizes, largest_product(q, k_levels, selection, options))


def rounded_levels(x: Array, hierarchy: Hierarchy) -> list[Array]:
    """Levels 0..L in float64: true means, rounded once to the input's dtype."""
    x64 = x.astype(np.float64)
    levels = [np.empty((*x.shape[:2], length, x.shape[3])) for length in hierarchy.lengths[1:]]
    pool(x64, hierarchy, levels)
    return [x64, *(level.astype(x.dtype).astype(np.float64) for level in levels)]


def attend_float64(
    q: Array, k_levels: list[Array], v_levels: list[Array], selection: Selection, options: AttendOptions
) -> tuple[Array, Array]:
    """Attention of float64 levels."""
    out, lse = np.empty((*q.shape[:3], v_levels[0].shape[3])), np.empty(q.shape[:3])
    attend(q, k_levels, v_levels, selection, options, out, lse)
    return out, lse


def backward_float64(
    dout: Array,
    q: Array,
    k_levels: list[Array],
    v_levels: list[Array],
    out: Array,
    lse: Array,
    dlse: Array,
    selection: Selection,
    options: AttendOptions,
) -> dict[str, Array]:
    """Gradients of float64 levels, down to level 0."""
    dq, dk, dv = np.empty_like(q), np.empty_like(k_levels[0]), np.empty_like(v_levels[0])
    attend_backward(dout, q, k_levels, v_levels, out, lse, dlse, selection, options, dq, dk, dv)
    return {"dq": dq, "dk": dk, "dv": dv}


def gradient_sizes(
    dout: Array,
    q: Array,
    k_levels: list[Array],
    v_levels: list[Array],
    out: Array,
    lse: Array,
    dlse: Array,
    selection: Selection,
    options: AttendOptions,
) -> dict[str, Array]:
    """T_dq = scale sum P a_tj |k_l[j]|, T_dk = scale sum P a_tj |q_t|, T_dv = sum P |dO_t|,
    with a_tj = ||dO_t|| (||v_l[j]|| + ||out_t||) / sqrt(Dv) + |dlse_t|.

    One ordinary backward pass gives all three. Its values (||v_l[j]||, 1, 0) and output gradients (alpha_t, beta_t,
    |dO_t|) make dS = P (alpha_t ||v_l[j]|| + beta_t) = P a_tj; extra dims that meet zeros on the other side, and so
    change no score, carry |q| into dk and |k| into dq.
    """
    alpha = np.linalg.norm(dout, axis=-1, keepdims=True) / math.sqrt(dout.shape[-1])
    beta = alpha * np.linalg.norm(out, axis=-1, keepdims=True) + np.abs(dlse)[..., None]
    dim, zeros = q.shape[-1], np.zeros_like
    wide_q = np.concatenate([q, np.abs(q), zeros(q)], axis=-1)
    wide_k = [np.concatenate([level, zeros(level), np.abs(level)], axis=-1) for level in k_levels]
    norms = [np.linalg.norm(level, axis=-1, keepdims=True) for level in v_levels]
    wide_v = [np.concatenate([n, np.ones_like(n), zeros(level)], axis=-1) for n, level in zip(norms, v_levels)]
    wide_dout = np.concatenate([alpha, beta, np.abs(dout)], axis=-1)
    no_delta = zeros(wide_dout)
    wide = backward_float64(wide_dout, wide_q, wide_k, wide_v, no_delta, lse, zeros(lse), selection, options)
    return {"dq": wide["dq"][..., 2 * dim :], "dk": wide["dk"][..., dim : 2 * dim], "dv": wide["dv"][..., 2:]}


def largest_product(q: Array, k_levels: list[Array], selection: Selection, options: AttendOptions) -> float:
    """Lambda, as the limit of log sum exp(x s) / x for a large x."""
    sharpness = 2.0**30
    sharp = replace(options, scale=options.scale * sharpness, reweight=False)
    absolute = [np.abs(level) for level in k_levels]
    _, lse = attend_float64(np.abs(q), absolute, [level[..., :1] for level in k_levels], selection, sharp)
    return float(lse.max(initial=0.0)) / sharpness


def error(x: Array, reference: Array, size: Array, forgiven: float = 0.0) -> float:
    """||x - ref|| / max(||ref||, ||T|| / 2) in Frobenius norms; infinite where x is not finite or has another shape.

    forgiven: what each element may differ by for nothing (float16 gradients: their smallest number).
    """
    if x.shape != reference.shape or not np.isfinite(x.astype(np.float64)).all():
        return math.inf
    difference = np.maximum(np.abs(x.astype(np.float64) - reference) - forgiven, 0.0)
    distance = float(np.linalg.norm(difference))
    if distance == 0.0:
        return 0.0
    scale = max(float(np.linalg.norm(reference)), float(np.linalg.norm(size)) / 2)
    return distance / scale if scale > 0 else math.inf


def lse_error(lse: Array, reference: Array) -> float:
    """max |lse - ref| / max(1, max |ref|); infinite where one is -inf and the other is not, or a NaN."""
    empty = reference == -np.inf
    if lse.shape != reference.shape or not np.array_equal(lse == -np.inf, empty):
        return math.inf
    difference = np.abs(lse[~empty].astype(np.float64) - reference[~empty])
    if not np.isfinite(difference).all():
        return math.inf
    return float(difference.max(initial=0.0)) / max(1.0, float(np.abs(reference[~empty]).max(initial=0.0)))


def compare(results: dict[str, Array], reference: Exact, dtype: str, precision: str = "full") -> dict[str, float]:
    """Error over bound of every result: 1 is what is allowed. results: host arrays under the reference's names."""
    kind = "tf32" if precision == "tf32" and dtype == "float32" else dtype
    stretch = max(1.0, reference.largest / 16) if dtype == "float32" else 1.0
    ratios = {}
    for name, x in results.items():
        expected = reference.results[name]
        if x.dtype.name != (lse_dtype(dtype) if name == "lse" else dtype):
            ratios[name] = math.inf
        elif name == "lse":
            ratios[name] = lse_error(x, expected) / (LSE_BOUND[kind] * stretch)
        else:
            forgiven = SMALLEST_FLOAT16 if dtype == "float16" and name != "out" else 0.0
            bound = OUT_BOUND[kind] if name == "out" else GRADIENT_BOUND[kind]
            ratios[name] = error(x, expected, reference.sizes[name], forgiven) / (bound * stretch)
    return ratios


def selection_is_right(q: Array, k: Array, selection: Selection) -> bool:
    """Whether these are rows that `select` may return for q and k, (batch, heads, tokens, dim), finite.

    Every row holds the right number of distinct candidates, children of its parent's row, ascending, padded with -1;
    and no rejected candidate scores higher than a selected one by more than 2u (A + A') and the accumulation's
    rounding, A = <|Q|, |K|>, as backends may round pooled levels and sums differently (spec.md, fact 7).
    """
    hierarchy = selection.key_hierarchy
    q_levels, k_levels = rounded_levels(q, selection.query_hierarchy), rounded_levels(k, hierarchy)
    per_kv_head = max(1, q.shape[1] // max(1, k.shape[1]))
    roundoff = 2 * UNIT_ROUNDOFF[q.dtype.name] + UNIT_ROUNDOFF[lse_dtype(q.dtype.name)] * (q.shape[3] + 8)
    for n, h in np.ndindex(q.shape[:2]):
        for level in range(hierarchy.levels, 0, -1):
            rows, length = selection[level][n, h], hierarchy.lengths[level]
            above = selection[level + 1][n, h] if level < hierarchy.levels else None
            candidates = candidate_mask(above, len(rows), length, hierarchy.block_size)
            columns = np.arange(rows.shape[1])
            filled = columns < candidates.sum(axis=1, keepdims=True)
            if ((rows >= 0) != filled).any() or (rows < -1).any() or (rows >= length).any():
                return False
            if (np.diff(np.where(filled, rows, length + columns), axis=1) <= 0).any():
                return False
            chosen = np.zeros_like(candidates)
            np.put_along_axis(chosen, np.where(filled, rows, rows[:, :1]).astype(np.int64), True, axis=1)
            if (chosen & ~candidates).any():
                return False
            queries, keys = q_levels[level][n, h], k_levels[level][n, h // per_kv_head]
            score, slack = queries @ keys.T, roundoff * (np.abs(queries) @ np.abs(keys).T)
            kept = np.where(chosen, score + slack, np.inf).min(axis=1)
            left = np.where(candidates & ~chosen, score - slack, -np.inf).max(axis=1)
            if (left > kept).any():
                return False
    return True


def candidate_mask(above: Array | None, rows: int, length: int, block_size: int) -> Array:
    """(rows, length): whether token j is a candidate of query i, from the rows selected one level up."""
    if above is None:
        return np.ones((rows, length), np.bool_)
    parents = np.zeros((len(above), -(-length // block_size) + 1), np.bool_)
    np.put_along_axis(parents, above.astype(np.int64), True, axis=1)  # -1 falls into the last column
    parents[:, -1] = False
    children = np.repeat(parents[:, :-1], min(block_size, length), axis=1)[:, :length]
    mask: Array = np.repeat(children, min(block_size, rows), axis=0)[:rows]
    return mask

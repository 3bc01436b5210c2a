"""Which tokens a query keeps on every level: the result of `select` and the input of `attend`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llsa_np.adapters import common_adapter, type_name
from llsa_np.hierarchy import Hierarchy, hierarchy_of
from llsa_np.options import MAX_LEVELS, as_tuple, check_block_size, check_flag, check_integer, check_levels


class Selection:
    """S_l for every level: `selection[l]` are the tokens of level l that each level-l query keeps, l = 1..levels.

    arrays: for l = 1..levels one int32 array (batch, heads, ceil(query_tokens / block_size ** l), K_l) of any supported
    framework; rows ascending, unique, within 0..n_l - 1, padded with -1 at the end. Rows need not lie inside their
    parents' children. block_size: b; query_tokens: M; key_tokens: N.
    validate: shapes are always checked. Values are checked by default for arrays in host memory, and for device arrays
    only with validate=True, which synchronises. Where they are not, an index outside 0..n_l - 1 counts as -1, forward
    and backward, while order and uniqueness are the caller's: what comes of a repeated index is not defined.
    Attributes: .block_size .levels .topk (K_1..K_L) .query_tokens .key_tokens .batch .heads, and .query_hierarchy
    and .key_hierarchy. Immutable; the arrays are kept, not copied.

    Raises TypeError for arrays that are not int32 or of different frameworks; ValueError for shapes that do not fit
    together, options out of range, or values that break the rules above. Source: spec.md, Selection.
    """

    __slots__ = ("_arrays", "batch", "heads", "key_hierarchy", "query_hierarchy", "topk")

    batch: int
    heads: int
    topk: tuple[int, ...]
    query_hierarchy: Hierarchy
    key_hierarchy: Hierarchy
    _arrays: tuple[Any, ...]

    def __init__(
        self,
        arrays: Iterable[Any],
        *,
        block_size: int,
        query_tokens: int,
        key_tokens: int,
        validate: bool | None = None,
    ) -> None:
        who = "Selection"
        given = as_tuple(arrays)
        if given is None:
            raise TypeError(
                f"{who}: arrays is a {type_name(arrays)}; allowed is a sequence of one array per level 1..L"
            )
        if not 1 <= len(given) <= MAX_LEVELS:
            raise ValueError(f"{who}: got {len(given)} arrays; allowed is one for each of 1..{MAX_LEVELS} levels")
        block_size = check_block_size(who, block_size)
        levels = check_levels(who, len(given), block_size)
        query_hierarchy = hierarchy_of(check_integer(who, "query_tokens", query_tokens, 1, None), block_size, levels)
        key_hierarchy = hierarchy_of(check_integer(who, "key_tokens", key_tokens, 1, None), block_size, levels)

        adapter = common_adapter(who, {f"arrays[{i}] (level {i + 1})": array for i, array in enumerate(given)})
        views = [adapter.view(array) for array in given]
        for level, view in enumerate(views, 1):
            if view.dtype != "int32":
                raise TypeError(f"{who}: the array of level {level} has dtype {view.dtype}; allowed is int32")
            length = query_hierarchy.lengths[level]
            if len(view.shape) != 4 or view.shape[2] != length or view.shape[3] < 1:
                raise ValueError(
                    f"{who}: the array of level {level} has shape {view.shape}; "
                    f"for {query_tokens} queries and block_size {block_size} it is (batch, heads, {length}, K), K >= 1"
                )
            elsewhere = view.device and views[0].device and view.device != views[0].device
            if view.shape[:2] != views[0].shape[:2] or elsewhere:
                raise ValueError(
                    f"{who}: the array of level {level} has shape {view.shape} on {view.device}, that of level 1 "
                    f"{views[0].shape} on {views[0].device}; batch, heads and device are the same on every level"
                )
        if views[0].device == "cpu" if validate is None else check_flag(who, "validate", validate):
            for level, array in enumerate(given, 1):
                _check_rows(who, level, adapter.to_numpy(array), key_hierarchy.lengths[level])

        topk = tuple(view.shape[3] for view in views)
        batch, heads, _, _ = views[0].shape
        self._fill(given, batch, heads, key_hierarchy, query_hierarchy, topk)

    @classmethod
    def _made(
        cls,
        arrays: tuple[Any, ...],
        batch: int,
        heads: int,
        topk: tuple[int, ...],
        query_hierarchy: Hierarchy,
        key_hierarchy: Hierarchy,
    ) -> Selection:
        """One that `select` made: nothing in it is to be checked."""
        selection = object.__new__(cls)
        selection._fill(arrays, batch, heads, key_hierarchy, query_hierarchy, topk)
        return selection

    def _with_arrays(self, arrays: Iterable[Any]) -> Selection:
        """The same selection in other arrays, whose values were checked, or left to their owner, before."""
        return self._made(tuple(arrays), *self.made_for)

    def _fill(self, *values: Any) -> None:
        """values: in the order of __slots__."""
        for name, value in zip(self.__slots__, values, strict=True):
            object.__setattr__(self, name, value)

    @property
    def made_for(self) -> tuple[int, int, tuple[int, ...], Hierarchy, Hierarchy]:
        """All but the arrays: batch, heads, topk, and the hierarchies of queries and keys."""
        return self.batch, self.heads, self.topk, self.query_hierarchy, self.key_hierarchy

    @property
    def block_size(self) -> int:
        return self.key_hierarchy.block_size

    @property
    def levels(self) -> int:
        return self.key_hierarchy.levels

    @property
    def query_tokens(self) -> int:
        return self.query_hierarchy.tokens

    @property
    def key_tokens(self) -> int:
        return self.key_hierarchy.tokens

    def __getitem__(self, level: int) -> Any:
        if not isinstance(level, (int, np.integer)) or not 1 <= level <= self.levels:
            raise IndexError(f"Selection: level is {level!r}; this selection has levels 1..{self.levels}")
        return self._arrays[level - 1]

    def __iter__(self) -> Iterator[Any]:
        """The arrays of levels 1, 2, ..., L."""
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"Selection: cannot set {name!r}; a Selection is immutable, make a new one")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"Selection: cannot delete {name!r}; a Selection is immutable, make a new one")

    def __reduce__(self) -> Any:
        return _rebuild, (self._arrays, self.block_size, self.query_tokens, self.key_tokens)

    def __repr__(self) -> str:
        return (
            f"Selection(batch={self.batch}, heads={self.heads}, query_tokens={self.query_tokens}, "
            f"key_tokens={self.key_tokens}, block_size={self.block_size}, levels={self.levels}, topk={self.topk})"
        )


def _rebuild(arrays: tuple[Any, ...], block_size: int, query_tokens: int, key_tokens: int) -> Selection:
    """A pickled or copied Selection: its values were checked, or left to their owner, when it was first made."""
    return Selection(arrays, block_size=block_size, query_tokens=query_tokens, key_tokens=key_tokens, validate=False)


def _check_rows(who: str, level: int, rows: NDArray[np.int32], length: int) -> None:
    """Rows ascending and unique within 0..length - 1, with -1 only at the end."""
    wrong = (rows < -1) | (rows >= length)
    here, after = rows[..., :-1], rows[..., 1:]
    wrong[..., 1:] |= (after != -1) & (after <= here)  # not ascending, or a repeat
    wrong[..., 1:] |= (after != -1) & (here == -1)
    if wrong.any():
        batch, head, query, _ = (int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"{who}: level {level} has the row {rows[batch, head, query].tolist()} "
            f"at batch {batch}, head {head}, query {query}; a row is ascending and unique within 0..{length - 1}, "
            "with -1 only at its end. Sort each row and pad it with -1"
        )

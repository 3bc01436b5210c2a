"""The selection as the keys see it: for every token of level l + 1 the queries that selected it (spec.md, Gradients).

S_{l+1} lists the parents of each query; dk and dv need the queries of each parent: the same pairs the other way round,
which is the transpose of a sparse matrix, by counting, adding up and placing. Placing is stable: each parent's list
holds its queries in ascending order, query head after query head, so every sum over it has one order.

To place in parallel, the rows are cut into RANGES. Pairs are counted by (parent, range); the running sum of these
counts is where each range's part of each parent's list begins, and every range is placed on its own. There are about as
many ranges as a parent has queries on average, so that the counts take no more memory than the pairs.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from llsa_np.gpu.numba_cuda.cuda import ELEMENT, SIMULATED, array, cuda, kernel, launch

THREADS = 4 if SIMULATED else 128
SCAN_THREADS = 4 if SIMULATED else 512
MOST_RANGES = 64
MOST_SPARE = 2**13
"""Where there are few parents, so many sums of single keys may be split off: 4 MiB at D = Dv = 64."""


class Lists(NamedTuple):
    """Sizes of the lists of one level: every (batch entry, kv head) has its own."""

    ROWS: int
    """Rows of S_{l+1} that read one kv head: m_{l+1} for each of its query heads."""
    COLUMNS: int
    """Parents of a row."""
    PARENTS: int
    RANGES: int
    ROWS_PER_RANGE: int
    CHILDREN: int
    RUN: int
    """Queries of a row, at most."""
    SPLIT: int
    """Queries of one piece of work."""
    ITEMS: int
    """Pieces of work, at most: one for each parent, and one for every SPLIT queries beyond."""

    @property
    def COUNTS(self) -> int:
        return self.PARENTS * self.RANGES + 1

    @property
    def PAIRS(self) -> int:
        return self.ROWS * self.COLUMNS


def lists(rows: int, columns: int, parents: int, children: int, run: int, least_split: int) -> Lists:
    """The sizes, from shapes alone. The pieces' sums take memory: so a piece has `least_split` queries or more, and a
    level no more pieces beyond one for each parent than there are parents, or than make MOST_SPARE sums of keys."""
    ranges = max(1, min(MOST_RANGES, rows, rows * columns // parents))
    rows_per_range = -(-rows // ranges)
    spare = max(parents, MOST_SPARE // children)
    split = max(least_split, -(-rows * columns * run // spare))
    items = parents + rows * columns * run // split
    return Lists(rows, columns, parents, ranges, rows_per_range, children, run, split, items)


@cache
def count_kernel() -> Any:
    """How many pairs each (parent, range) has. A thread takes one pair and adds 1 to its counter: the only atomics of
    this backend, and they count integers, so their order is of no consequence."""

    index = ELEMENT["int64"]

    @kernel(array("int32"), array("int64", 1), *("int64",) * 7)
    def count_pairs(selected, counts, GROUP, ROWS, COLUMNS, PARENTS, RANGES, ROWS_PER_RANGE, PAIRS):
        i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        if i < PAIRS:
            HEADS, LENGTH = selected.shape[1], selected.shape[2]
            i_column = i % COLUMNS
            i_row = i // COLUMNS % ROWS
            i_list = i // COLUMNS // ROWS
            i_head = i_list * GROUP + i_row // LENGTH  # of all batch entries
            parent = index(selected[i_head // HEADS, i_head % HEADS, i_row % LENGTH, i_column])
            if parent >= 0 and parent < PARENTS:
                place = i_list * (PARENTS * RANGES + 1) + parent * RANGES + i_row // ROWS_PER_RANGE
                cuda.atomic.add(counts, place, 1)

    return count_pairs


@cache
def scan_kernel() -> Any:
    """Every number becomes the sum of those before it (an exclusive prefix sum), one array of LENGTH for each block.

    A thread first adds up a run of its own; the sums of the runs are added up in shared memory by doubling steps
    (Hillis and Steele: after step k a thread has the sum of the last 2**k runs); then each thread goes through its run
    again with the sum of all runs before it.
    """
    index = ELEMENT["int64"]

    @kernel(array("int64", 1), "int64")
    def scan(numbers, LENGTH):
        sums = cuda.shared.array(SCAN_THREADS, index)

        i_thread = cuda.threadIdx.x
        o_array = cuda.blockIdx.x * LENGTH
        EACH = (LENGTH + SCAN_THREADS - 1) // SCAN_THREADS
        first, last = i_thread * EACH, min(LENGTH, (i_thread + 1) * EACH)
        total = index(0)
        for i in range(first, last):
            total += numbers[o_array + i]
        sums[i_thread] = total
        cuda.syncthreads()
        step = 1
        while step < SCAN_THREADS:
            before = index(0)
            if i_thread >= step:
                before = sums[i_thread - step]
            cuda.syncthreads()
            sums[i_thread] += before
            cuda.syncthreads()
            step *= 2
        running = sums[i_thread] - total
        for i in range(first, last):
            number = numbers[o_array + i]
            numbers[o_array + i] = running
            running += number

    return scan


@cache
def item_kernel() -> Any:
    """How many pieces of work each parent's list makes: one for every SPLIT queries, and at least one, which writes the
    zeros of a parent that no query selected. A thread takes one parent."""
    index = ELEMENT["int64"]

    @kernel(array("int64", 1), array("int64", 1), *("int64",) * 5)
    def count_items(starts, items, PARENTS, RANGES, RUN, SPLIT, ALL_PARENTS):
        i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        if i < ALL_PARENTS:
            i_list, parent = i // PARENTS, i % PARENTS
            o_start = i_list * (PARENTS * RANGES + 1) + parent * RANGES
            queries = (starts[o_start + RANGES] - starts[o_start]) * RUN
            items[i_list * (PARENTS + 1) + parent] = max(index(1), (queries + SPLIT - 1) // SPLIT)

    return count_items


@cache
def place_kernel() -> Any:
    """Puts the rows of one range into the lists of their parents, in ascending order.

    A block takes one range and goes through its pairs, one for each thread at a time. A thread's pair goes behind as
    many others as threads before it hold the same parent; the last of these moves the parent's start forward. So
    `starts` ends up one place further: what was the start of (parent, range) is then its end.
    """
    index = ELEMENT["int64"]

    @kernel(array("int32"), array("int64", 1), array("int64", 1), *("int64",) * 6)
    def place_pairs(selected, starts, rows, GROUP, ROWS, COLUMNS, PARENTS, RANGES, ROWS_PER_RANGE):
        parents = cuda.shared.array(THREADS, index)

        i_thread = cuda.threadIdx.x
        HEADS, LENGTH = selected.shape[1], selected.shape[2]
        i_range, i_list = cuda.blockIdx.x % RANGES, cuda.blockIdx.x // RANGES
        o_starts = i_list * (PARENTS * RANGES + 1) + i_range
        o_rows = i_list * ROWS * COLUMNS
        end = min(ROWS, (i_range + 1) * ROWS_PER_RANGE) * COLUMNS
        for o_pair in range(i_range * ROWS_PER_RANGE * COLUMNS, end, THREADS):
            i_row = (o_pair + i_thread) // COLUMNS
            parent = index(-1)
            if o_pair + i_thread < end:
                i_head = i_list * GROUP + i_row // LENGTH
                i_column = (o_pair + i_thread) % COLUMNS
                parent = index(selected[i_head // HEADS, i_head % HEADS, i_row % LENGTH, i_column])
                if parent >= PARENTS:
                    parent = index(-1)
            parents[i_thread] = parent
            cuda.syncthreads()
            before, alike, start = 0, 0, index(0)
            for i in range(THREADS):
                if parents[i] == parent:
                    alike += 1
                    if i < i_thread:
                        before += 1
            if parent >= 0:
                start = starts[o_starts + parent * RANGES]
                rows[o_rows + start + before] = i_row
            cuda.syncthreads()
            if parent >= 0 and before == alike - 1:
                starts[o_starts + parent * RANGES] = start + alike
            cuda.syncthreads()

    return place_pairs


@cache
def clear_kernel() -> Any:
    """Zeros. A thread writes one."""

    @kernel(array("int64", 1), "int64")
    def clear(numbers, LENGTH):
        i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        if i < LENGTH:
            numbers[i] = 0

    return clear


def transpose_kernels() -> list[Any]:
    """All that transposing needs."""
    return [clear_kernel(), count_kernel(), scan_kernel(), item_kernel(), place_kernel()]


def transpose(selected: Any, of: Lists, kv_heads: int, room: Any, stream: Any) -> None:
    """Fills room = (starts, rows, items), int64 (n,) for all lists: `starts` with the end of every (parent, range),
    `rows` with the row numbers of S_{l+1}, counted over a kv head's query heads, and `items` with the number of the
    first piece of work of every parent."""
    starts, rows, items = room
    batch, heads = selected.shape[:2]
    number = batch * kv_heads
    group = heads // max(1, kv_heads)

    def launch_for(kernel: Any, threads: int, *arguments: Any) -> None:
        launch(kernel, -(-threads // THREADS), THREADS, stream, *arguments)

    sizes = (group, of.ROWS, of.COLUMNS, of.PARENTS, of.RANGES, of.ROWS_PER_RANGE)
    launch_for(clear_kernel(), number * of.COUNTS, starts, number * of.COUNTS)
    launch_for(count_kernel(), number * of.PAIRS, selected, starts, *sizes, number * of.PAIRS)
    launch(scan_kernel(), number, SCAN_THREADS, stream, starts, of.COUNTS)
    launch_for(clear_kernel(), number * (of.PARENTS + 1), items, number * (of.PARENTS + 1))
    launch_for(
        item_kernel(), number * of.PARENTS, starts, items, of.PARENTS, of.RANGES, of.RUN, of.SPLIT, number * of.PARENTS
    )
    launch(scan_kernel(), number, SCAN_THREADS, stream, items, of.PARENTS + 1)
    launch(place_kernel(), number * of.RANGES, THREADS, stream, selected, starts, rows, *sizes)

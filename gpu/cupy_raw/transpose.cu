// The selection as the keys see it: for every token of level l + 1 the queries that selected it (spec.md, Gradients).
//
// S_{l+1} lists the parents of each row of queries; dk and dv need the rows of each parent: the transpose of a sparse
// matrix, by counting, adding up and placing. Placing is stable: each parent's list holds its rows in ascending order, query
// head after query head, so every sum over it has one order. To place in parallel the rows are cut into `ranges`: pairs are
// counted by (parent, range), and each range is placed on its own.
//
// Every (batch entry, kv head) has a list of its own: starts[parents * ranges + 1], rows[row_count * columns],
// items[parents + 1], where items[p] is the number of pieces of work before parent p; `starts` and `items` in rows of
// whole fours.
#include <numbers.cuh>

constexpr int THREADS = 256;
constexpr int SUM_THREADS = 1024;
constexpr int WARP = 32;
constexpr int CHUNK = 4 * SUM_THREADS;

struct Arguments {
    Array selected;   // S_{l+1}, int (batch, heads, length, columns)
    int *starts, *rows, *items;
    int lists, heads, group, length, row_count, columns, parents, ranges, rows_per_range;
    int chunks;       // of CHUNK counters of a list
    int run, split;   // places of a row in a parent's list; tiles of 16 places of a piece of work
};

__device__ __forceinline__ int parent_at(const Arguments& a, int i_list, int row, int column) {
    const int head = i_list * a.group + row / a.length;   // of all batch entries
    const int parent = head_of<const int>(a.selected, head / a.heads, head % a.heads)[row % a.length * a.selected.token +
                                                                                      column * a.selected.dim];
    return u32(parent) < u32(a.parents) ? parent : -1;
}

extern "C" __global__ void __launch_bounds__(THREADS) clear_starts(const __grid_constant__ Arguments a) {
    const i64 i = i64(blockIdx.x) * THREADS + threadIdx.x;
    if (i < i64(a.lists) * whole_fours(a.parents * a.ranges + 1)) a.starts[i] = 0;
}

// A thread takes one pair and adds 1 to its counter: atomics on integers, whose order is of no consequence.
extern "C" __global__ void __launch_bounds__(THREADS) count_pairs(const __grid_constant__ Arguments a) {
    const i64 i = i64(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= i64(a.lists) * a.row_count * a.columns) return;
    const int column = i % a.columns, row = i / a.columns % a.row_count, i_list = i / a.columns / a.row_count;
    const int parent = parent_at(a, i_list, row, column);
    if (parent >= 0)
        atomicAdd(a.starts + i64(i_list) * whole_fours(a.parents * a.ranges + 1) + i64(parent) * a.ranges +
                      row / a.rows_per_range,
                  1);
}

// Sums within a block of SUM_THREADS: of the numbers of the threads up to this one, its own too, and of all threads.
__device__ __forceinline__ int sum_within_warp(int number, int lane) {
    for (int step = 1; step < WARP; step *= 2) {
        const int other = __shfl_up_sync(~0u, number, step);
        if (lane >= step) number += other;
    }
    return number;
}

__device__ __forceinline__ int sum_within_block(int number, int& all) {
    __shared__ int of_warps[WARP];
    static_assert(SUM_THREADS == WARP * WARP);
    const int lane = threadIdx.x % WARP, i_warp = threadIdx.x / WARP, sum = sum_within_warp(number, lane);
    __syncthreads();   // all have read what lay there
    if (lane == WARP - 1) of_warps[i_warp] = sum;
    __syncthreads();
    const int warps = sum_within_warp(of_warps[lane], lane), warps_before = __shfl_sync(~0u, warps, i_warp ? i_warp - 1 : 0);
    all = __shfl_sync(~0u, warps, WARP - 1);
    return (i_warp ? warps_before : 0) + sum;
}

// Counters become the sums of those before them, CHUNK counters to a block, four to a thread: first every chunk is added up
// by itself, into `items`, which nobody needs yet and which has room, as ranges are at most 128; then a block adds up the chunks before its own, and goes through it.
struct Chunk {
    int* items;   // of the list
    int4* four;   // the thread's; null past the end
    int i_chunk;
};

__device__ __forceinline__ Chunk chunk_of(const Arguments& a) {
    const int i_list = blockIdx.x / a.chunks, i_chunk = blockIdx.x % a.chunks, n = whole_fours(a.parents * a.ranges + 1);
    const int place = i_chunk * CHUNK + threadIdx.x * 4;
    int* starts = a.starts + i64(i_list) * n;
    int* items = a.items + i64(i_list) * whole_fours(a.parents + 1);
    return {items, place < n ? reinterpret_cast<int4*>(starts + place) : nullptr, i_chunk};
}

extern "C" __global__ void __launch_bounds__(SUM_THREADS) sum_chunks(const __grid_constant__ Arguments a) {
    const Chunk chunk = chunk_of(a);
    int all;
    const int4 x = chunk.four ? *chunk.four : make_int4(0, 0, 0, 0);
    sum_within_block(x.x + x.y + x.z + x.w, all);
    if (threadIdx.x == 0) chunk.items[chunk.i_chunk] = all;
}

extern "C" __global__ void __launch_bounds__(SUM_THREADS) sum_counts(const __grid_constant__ Arguments a) {
    const Chunk chunk = chunk_of(a);
    int before = 0, all;
    for (int i = threadIdx.x; i < chunk.i_chunk; i += SUM_THREADS) before += chunk.items[i];
    sum_within_block(before, before);
    const int4 x = chunk.four ? *chunk.four : make_int4(0, 0, 0, 0);
    const int own = x.x + x.y + x.z + x.w, start = before + sum_within_block(own, all) - own;
    if (chunk.four) *chunk.four = make_int4(start, start + x.x, start + x.x + x.y, start + x.x + x.y + x.z);
}

// A block takes one list: how many pieces of work lie before each parent. There is one for every `split` tiles of a parent's
// list, and at least one, which writes the zeros of a parent that nobody selected.
extern "C" __global__ void __launch_bounds__(SUM_THREADS) count_items(const __grid_constant__ Arguments a) {
    const int* starts = a.starts + i64(blockIdx.x) * whole_fours(a.parents * a.ranges + 1);
    int* items = a.items + i64(blockIdx.x) * whole_fours(a.parents + 1);
    int before = 0;
    for (int o = 0; o <= a.parents; o += SUM_THREADS) {
        const int p = o + threadIdx.x;
        int pieces = 0, all;
        if (p < a.parents) {
            const int tiles = (i64(starts[(p + 1) * a.ranges] - starts[p * a.ranges]) * a.run + 15) / 16;
            pieces = max(1, (tiles + a.split - 1) / a.split);
        }
        const int sum = sum_within_block(pieces, all);
        if (p <= a.parents) items[p] = before + sum - pieces;
        before += all;
    }
}

// A warp takes one range and goes through its pairs, one for each lane at a time: a lane's pair goes behind those of lower
// lanes with the same parent, and the last of them moves the parent's start forward. So `starts` ends up one place further:
// what was the start of (parent, range) is then its end.
extern "C" __global__ void __launch_bounds__(THREADS) place_pairs(const __grid_constant__ Arguments a) {
    const int lane = threadIdx.x % WARP;
    const int i = blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP, i_range = i % a.ranges, i_list = i / a.ranges;
    if (i_list >= a.lists) return;   // for the whole warp
    int* starts = a.starts + i64(i_list) * whole_fours(a.parents * a.ranges + 1) + i_range;
    int* rows = a.rows + i64(i_list) * a.row_count * a.columns;
    const int end = min(a.row_count, (i_range + 1) * a.rows_per_range) * a.columns;
    for (int o = i_range * a.rows_per_range * a.columns; o < end; o += WARP) {
        const int pair = o + lane;
        const int parent = pair < end ? parent_at(a, i_list, pair / a.columns, pair % a.columns) : -1;
        const u32 same = __match_any_sync(~0u, parent);   // the lanes that hold the same parent
        const int alike = __popc(same), before = __popc(same & ((1u << lane) - 1));
        int start = 0;
        if (parent >= 0) {
            start = starts[i64(parent) * a.ranges];
            rows[start + before] = pair / a.columns;
        }
        __syncwarp();
        if (parent >= 0 && before == alike - 1) starts[i64(parent) * a.ranges] = start + alike;
        __syncwarp();
    }
}

// The one list of blocks that a query attends to (spec.md, Candidate sets), level by level.
#pragma once
#include <numbers.cuh>

constexpr int MOST_LEVELS = 17;

struct Level {
    Array k, v;       // this level's keys and values, (batch, kv_heads, length, dims)
    Array selected;   // S_{l+1}, int (batch, heads, m_{l+1}, columns); no data on the coarsest level
    int span_bits;    // 2**span_bits queries share a row of S_{l+1}
    int length, columns, parents;
    float log_count, log_last;   // log2 of the count of a token, and of the level's last token
};

// How many places a query's list has on a level.
__device__ __forceinline__ int places(const Level& level, int block_bits) {
    return level.selected.data ? level.columns << block_bits : level.length;
}

// The row of S_{l+1} of the queries around i_query; null on the coarsest level.
__device__ __forceinline__ const int* parents_of(const Level& level, i64 i_batch, i64 i_head, i64 i_query) {
    if (!level.selected.data) return nullptr;
    return head_of<const int>(level.selected, i_batch, i_head) + (i_query >> level.span_bits) * level.selected.token;
}

// Blocks are at least RUN tokens, so RUN places from a multiple of RUN on are RUN tokens in a row.
constexpr int RUN = 8;

// The token at a place, a multiple of RUN, of the list that is not the coarsest level's; -1 if there is none.
__device__ __forceinline__ int run_at(const Level& level, const int* parents, int place, int block_bits) {
    if (place >= level.columns << block_bits) return -1;
    const int parent = __ldg(parents + (place >> block_bits) * level.selected.dim);
    if (u32(parent) >= u32(level.parents)) return -1;
    return (parent << block_bits) + (place & ((1 << block_bits) - 1));
}

// The token at a place of the list, -1 if there is none.
__device__ __forceinline__ int candidate(const Level& level, const int* parents, int place, int block_bits) {
    const int run = parents ? run_at(level, parents, place & ~(RUN - 1), block_bits) : place & ~(RUN - 1);
    const int token = run + place % RUN;
    return run >= 0 && token < level.length ? token : -1;
}

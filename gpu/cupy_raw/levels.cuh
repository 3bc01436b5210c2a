// The one list of blocks that a query attends to (spec.md, Candidate sets), level by level.
#pragma once
#include <numbers.cuh>

constexpr int MOST_LEVELS = 17;

struct Level {
    Array k, v;       // this level's keys and values, (batch, kv_heads, length, dims)
    Array selected;   // S_{l+1}, int (batch, heads, m_{l+1}, columns); no data on the coarsest level
    int span_bits;    // 2**span_bits queries share a row of S_{l+1}
    int length, columns, parents;
    int regular;      // tokens, from the first on, that have the level's count: all, or all but the last
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

// The row's entry for a place of the list, not of the coarsest level; negative if there is none.
__device__ __forceinline__ int parent_at(const Level& level, const int* parents, int place, int block_bits) {
    return place < level.columns << block_bits ? __ldg(parents + (place >> block_bits) * level.selected.dim) : -1;
}

// The token at a place whose entry is known; negative if there is none.
__device__ __forceinline__ int token_of(const Level& level, int parent, int place, int block_bits) {
    return u32(parent) < u32(level.parents) ? (parent << block_bits) + (place & ((1 << block_bits) - 1)) : -1;
}

// The token at a place of any level's list; negative, or past the level's end, if there is none.
__device__ __forceinline__ int token_at(const Level& level, const int* parents, int place, int block_bits) {
    return parents ? token_of(level, parent_at(level, parents, place, block_bits), place, block_bits) : place;
}

// Hierarchical Top-K: the candidates of one level that its queries keep (spec.md, Selection).
//
// A block of WARPS warps has up to 16 queries of one head that are children of one token, and so have one list of
// candidates. It walks the list in tiles of TILE:
//
//     all warps      bring the keys of the tile; each multiplies its share of them with the 16 queries: scores
//     each warp      takes every WARPS-th query: of the K best so far and the tile's TILE it finds the K-th largest score bit
//                    by bit, and keeps what is above it and the first that equal it
//
// What is kept stays in ascending order, because candidates come in that order; so nothing is ever sorted.
#include <levels.cuh>
#include <tiles.cuh>

constexpr int THREADS = WARPS * WARP;
constexpr int QUERIES = 16;
constexpr int MOST_KEPT = 64;
constexpr int N_KEYS = TILE / WARPS / 8;                    // result tiles of a warp along the candidates
constexpr int BEST = MOST_KEPT / WARP;                      // what a lane holds of the best so far,
constexpr int ENTRIES = BEST + TILE / WARP;                 // and of those and a tile

struct Arguments {
    Array q;
    Level level;      // its k; `selected` is S_{l+1}; v is not used
    int* kept;        // S_l, (batch, heads, queries, topk)
    int heads, kv_heads, queries, topk, dims, block_bits;
};

// An integer that compares as the score does: +inf > finite > -inf > NaN > absent, -0 equal to +0.
__device__ __forceinline__ u32 order(float score) {
    const u32 bits = __float_as_uint(score + 0.f);
    if (score != score) return 1;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// How many of a warp's orders are at least so large. is_first: there is no best so far, as in most lists.
__device__ __forceinline__ int count_at_least(const u32 (&orders)[ENTRIES], u32 least, bool is_first) {
    int count = 0;
#pragma unroll
    for (int i = BEST; i < ENTRIES; i++) count += orders[i] >= least;
    if (!is_first) {
#pragma unroll
        for (int i = 0; i < BEST; i++) count += orders[i] >= least;
    }
    return __reduce_add_sync(~0u, unsigned(count));
}

extern "C" __global__ void __launch_bounds__(THREADS) select(const __grid_constant__ Arguments a) {
    Element* queries = reinterpret_cast<Element*>(shared_memory());   // [QUERIES, PITCH]
    Element* keys = queries + QUERIES * PITCH;                        // [TILE, PITCH]
    __shared__ u32 orders[QUERIES][TILE + 4];
    __shared__ u32 best_order[QUERIES][MOST_KEPT];                    // ascending by token
    __shared__ int best_token[QUERIES][MOST_KEPT];
    __shared__ int tokens[TILE];

    const int i_thread = threadIdx.x, lane = i_thread % WARP, i_warp = i_thread / WARP;
    const int block_size = 1 << a.block_bits;
    const int parts = block_size > QUERIES ? block_size / QUERIES : 1;
    const u32 tiles = u32((a.queries + block_size - 1) >> a.block_bits) * parts;
    const u32 i_tile = blockIdx.x % tiles, i_list = blockIdx.x / tiles, i_head = i_list % a.heads, i_batch = i_list / a.heads;
    const u32 i_kv = i_head / u32(a.heads / a.kv_heads);
    const int first = parts == 1 ? i_tile << a.block_bits : i_tile * QUERIES;
    const int here = min(min(QUERIES, block_size), a.queries - first);   // queries of this tile; none in a ragged tail
    if (here <= 0) return;                                               // for all threads alike

    const Level& level = a.level;
    stage<QUERIES, THREADS>(queries, head_of<const Element>(a.q, i_batch, i_head), a.q, a.dims, i_thread,
                            [&](int row) { return row < here ? first + row : -1; });
    const int* parents = parents_of(level, i_batch, i_head, first);
    const int candidates = places(level, a.block_bits);
    int length[QUERIES / WARPS] = {};                                    // how many each of the warp's queries keeps so far

    for (int o_place = 0; o_place < candidates; o_place += TILE) {
        const bool is_first = o_place == 0;
        for (int i = i_thread; i < TILE; i += THREADS) {
            const int token = o_place + i < candidates ? token_at(level, parents, o_place + i, a.block_bits) : -1;
            tokens[i] = token < level.length ? token : -1;
        }
        __syncthreads();
        stage<TILE, THREADS>(keys, head_of<const Element>(level.k, i_batch, i_kv), level.k, a.dims, i_thread,
                             [&](int row) { return tokens[row]; });
        copies_commit();
        copies_wait<0>();
        __syncthreads();

        Rows rows;
        hold(rows, queries, lane);
        float s[N_KEYS][4] = {};
        add_scores<N_KEYS>(s, rows, keys + i_warp * (TILE / WARPS) * PITCH, lane);
#pragma unroll
        for (int n = 0; n < N_KEYS; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int key = i_warp * (TILE / WARPS) + n * 8 + lane % 4 * 2 + i % 2;
                orders[lane / 4 + i / 2 * 8][key] = tokens[key] < 0 ? 0 : order(s[n][i]);
            }
        }
        __syncthreads();

#pragma unroll
        for (int i_own = 0; i_own < QUERIES / WARPS; i_own++) {
            const int r = i_own * WARPS + i_warp;
            if (r >= here) continue;                                     // for the whole warp
            u32 seen[ENTRIES];
            int seen_token[ENTRIES];
            int valid = 0;
#pragma unroll
            for (int i = 0; i < ENTRIES; i++) {
                const int at = i * WARP + lane;
                seen[i] = 0;
                seen_token[i] = -1;
                if (at >= MOST_KEPT) {
                    seen[i] = orders[r][at - MOST_KEPT];
                    seen_token[i] = tokens[at - MOST_KEPT];
                } else if (at < length[i_own]) {
                    seen[i] = best_order[r][at];
                    seen_token[i] = best_token[r][at];
                }
                valid += seen[i] > 0;
            }
            const int keep = min(a.topk, int(__reduce_add_sync(~0u, unsigned(valid))));
            u32 threshold = 0;                                           // the keep-th largest, found from its highest bit on
            if (keep) {
                for (int bit = 31; bit >= 0; bit--) {
                    const int count = count_at_least(seen, threshold | 1u << bit, is_first);
                    if (count >= keep) threshold |= 1u << bit;
                    if (count == keep) break;                            // what is left of the bits changes nothing
                }
            }
            const int above = threshold == ~0u ? 0 : count_at_least(seen, threshold + 1, is_first);
            int equals = keep - above, place = 0;                        // of those that equal it, the first
            __syncwarp();
#pragma unroll
            for (int i = 0; i < ENTRIES; i++) {
                if (is_first && i < BEST) continue;
                const u32 before = (1u << lane) - 1;
                const u32 equal = __ballot_sync(~0u, keep && seen[i] == threshold);
                const bool is_kept = keep && (seen[i] > threshold || (seen[i] == threshold && __popc(equal & before) < equals));
                const u32 all_kept = __ballot_sync(~0u, is_kept);
                if (is_kept) {
                    best_order[r][place + __popc(all_kept & before)] = seen[i];
                    best_token[r][place + __popc(all_kept & before)] = seen_token[i];
                }
                equals = max(0, equals - __popc(equal));
                place += __popc(all_kept);
            }
            length[i_own] = keep;
            __syncwarp();
        }
        __syncthreads();   // the tile is used again
    }

#pragma unroll
    for (int i_own = 0; i_own < QUERIES / WARPS; i_own++) {
        const int r = i_own * WARPS + i_warp;
        if (r >= here) continue;
        int* row = a.kept + (i64(i_list) * a.queries + first + r) * a.topk;
        for (int i = lane; i < a.topk; i += WARP) row[i] = i < length[i_own] ? best_token[r][i] : -1;
    }
}

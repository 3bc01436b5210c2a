// Walks a block's queries along their lists of candidates, coarsest level first, and hands on tile after tile of keys and
// values in shared memory. What is done with a tile is the caller's: attention, or the gradient of the queries.
//
// A block of WARPS warps has consecutive queries of one head, a warp 16 of them, or 8 where blocks are of 8: all queries of
// a warp have one list on every level, so that nobody's value reaches a query that did not choose it, not even times 0.
//
//     levels whose rows of S_{l+1} cover all the block's queries    the finer ones (level 0; for small b level 1 too)
//     one list for the block: tiles of KEYS keys and values,        a list for each warp: a tile of FINE_KEYS keys
//     brought in by all warps and used by all, the next ones on     and values at a time, whose first comes in before all
//     their way while one is used                                   else is done; other warps work while one is awaited
//
// Log-weights are looked at one by one only in odd tiles: those of which a key is not there or has another weight than the
// level's.
//
// What it gained, in milliseconds of `attend` on an H100 (bfloat16, batch 2, 4 heads, 65,536 tokens, D = 64, b = 16, K = 8,
// L = 2): 0.51 with an address worked out for every copy, a log-weight written down for every key, and two barriers for a
// shared tile; 0.42 with runs of 8, odd tiles and one barrier; 0.41 with a third shared tile on its way; 0.38 with
// 32 keys at once instead of 16, which makes four products in a row independent of each other.
#pragma once
#include <levels.cuh>
#include <tiles.cuh>

constexpr int THREADS = WARPS * WARP;
constexpr int FINE_RUNS = FINE_KEYS / RUN;
constexpr int WARPS_BITS = WARPS == 1 ? 0 : WARPS == 2 ? 1 : WARPS == 4 ? 2 : 3;

// The queries of a block, 2**block_query_bits from `first` on; a warp's begin at `own_first`, and `own` of them are there.
struct Queries {
    int first, own_first, own, block_query_bits, queries, dims, value_dims, block_bits, levels;
    i64 i_batch, i_head, i_kv;
};

// A tile of keys and values, from a place of a level's list on.
struct Tile {
    const Element *k, *v;       // as many rows as `walk` hands on
    const Level* level;
    int place;
    bool odd;
};

// Turns scores into logits where the tile is odd, so that they need neither scale nor log-weight any more.
template <int N>
__device__ __forceinline__ void weigh_odd(float (&s)[N][4], const Tile& tile, const Queries& q, float& scale,
                                          float& log_count, int lane) {
    if (!tile.odd) return;
    const Level& level = *tile.level;
    const int* parents = parents_of(level, q.i_batch, q.i_head, min(q.own_first, q.queries - 1));
#pragma unroll
    for (int n = 0; n < N; n++) {
        const int run = token_at(level, parents, tile.place + n * RUN, q.block_bits);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int token = run + lane % 4 * 2 + i % 2;
            const float log_weight = token == level.length - 1 ? level.log_last : level.log_count;
            s[n][i] = run < 0 || token >= level.length ? -INFINITE : s[n][i] * scale + log_weight;
        }
    }
    scale = 1;
    log_count = 0;
}

// What is brought in next of a list: a tile of places of one level, whose keys and values begin at k and v.
struct Next {
    int i_level, place, places;
    const Element *k, *v;
    const int* parents;         // the row of S_{l+1}; null on the coarsest level
    int entry[FINE_RUNS];       // its entries for the tile's runs
};

// Whether one of the RUN tokens from `run` on is not there or has another weight than the level's.
__device__ __forceinline__ bool is_odd(const Level& level, int run) { return run < 0 || run > level.regular - RUN; }

// Calls use(tile) for every STEP places of the lists, whose tile is [STEP, PITCH]. coarse: [COARSE_STAGES][keys, values]
// [KEYS, PITCH] of the block; fine: [keys, values][FINE_KEYS, PITCH] of the warp.
template <int STEP, class Use>
__device__ __forceinline__ void walk(const Queries& q, const Level* level_of, Element* coarse, Element* fine, Use use) {
    constexpr int SHARED_TILE = 2 * KEYS * PITCH;
    static_assert(KEYS % STEP == 0 && FINE_KEYS % STEP == 0);
    const int i_thread = threadIdx.x, lane = i_thread % WARP;

    int shared_levels = 0;
    while (shared_levels < q.levels && level_of[shared_levels].span_bits >= q.block_query_bits) shared_levels++;

    auto enter = [&](Next& at, int i_level, int end, int query) {   // the list of the queries around `query` on a level
        at.i_level = i_level;
        at.place = 0;
        if (i_level == end) return;
        const Level& level = level_of[i_level];
        at.places = places(level, q.block_bits);
        at.k = head_of<const Element>(level.k, q.i_batch, q.i_kv);
        at.v = head_of<const Element>(level.v, q.i_batch, q.i_kv);
        at.parents = parents_of(level, q.i_batch, q.i_head, min(query, q.queries - 1));
    };

    // --- the finer levels: what the warp brings in for itself. The coarsest level is never one of them.
    bool is_fine_odd = false;
    auto look_up = [&](Next& at) {   // the entries of the next tile: they arrive while this one is used
        if (at.i_level == q.levels) return;
        const Level& level = level_of[at.i_level];
#pragma unroll
        for (int i = 0; i < FINE_RUNS; i++)
            at.entry[i] = i % 2 == 0 || q.block_bits == 3 ? parent_at(level, at.parents, at.place + i * RUN, q.block_bits)
                                                          : at.entry[i - 1];
    };
    auto fetch = [&](Next& at) {
        if (at.i_level < q.levels) {
            const Level& level = level_of[at.i_level];
            int runs[FINE_RUNS];
            is_fine_odd = false;
#pragma unroll
            for (int i = 0; i < FINE_RUNS; i++) {
                runs[i] = token_of(level, at.entry[i], at.place + i * RUN, q.block_bits);
                is_fine_odd |= is_odd(level, runs[i]);
            }
            stage_runs<FINE_KEYS, WARP>(fine, level.k, level.v, q.dims, q.value_dims, level.length, lane,
                                        [&](int i) {
                                            int run = runs[0];   // runs[i], but never from memory
#pragma unroll
                                            for (int j = 1; j < FINE_RUNS; j++) run = i == j ? runs[j] : run;
                                            return Run{at.k, at.v, run};
                                        });
            at.place += FINE_KEYS;
            if (at.place >= at.places) enter(at, at.i_level + 1, q.levels, q.own_first);
            look_up(at);
        }
        copies_commit();
    };
    Next own;
    enter(own, shared_levels, q.levels, q.own_first);
    look_up(own);
    fetch(own);

    // --- the coarser levels, by all warps
    Next next;
    enter(next, 0, shared_levels, q.first);
    auto bring_next = [&](int i_stage) {
        bool odd = false;
        if (next.i_level < shared_levels) {
            const Level& level = level_of[next.i_level];
            stage_runs<KEYS, THREADS>(coarse + i_stage * SHARED_TILE, level.k, level.v, q.dims, q.value_dims, level.length,
                                      i_thread, [&](int i) {
                                          const int run =
                                              token_at(level, next.parents, next.place + i * RUN, q.block_bits);
                                          odd |= is_odd(level, run);
                                          return Run{next.k, next.v, run};
                                      });
            next.place += KEYS;
            if (next.place >= next.places) enter(next, next.i_level + 1, shared_levels, q.first);
        }
        copies_commit();
        return odd;
    };
    // The tile that is used, and up to COARSE_STAGES - 1 that are on their way
    u32 odd_tiles = 0;   // bit i: what this thread brought into stage i is odd
    int i_stage = 0;
    for (int i = 0; i < COARSE_STAGES - 1; i++) odd_tiles |= u32(bring_next(i)) << i;
    for (int i_level = 0; i_level < shared_levels; i_level++) {
        const Level& level = level_of[i_level];
        const int level_places = places(level, q.block_bits);
        for (int o_place = 0; o_place < level_places; o_place += KEYS) {
            if (COARSE_STAGES == 1) odd_tiles = bring_next(0);
            copies_wait<(COARSE_STAGES > 2 ? COARSE_STAGES - 2 : 0)>();
            const bool is_tile_odd = __syncthreads_or(odd_tiles >> i_stage & 1);
            if (COARSE_STAGES > 1) {   // the stage before this one: all are done with it
                const int i_before = (i_stage ? i_stage : COARSE_STAGES) - 1;
                odd_tiles = (odd_tiles & ~(1u << i_before)) | u32(bring_next(i_before)) << i_before;
            }
            const Element *k = coarse + i_stage * SHARED_TILE, *v = k + KEYS * PITCH;
#pragma unroll
            for (int o = 0; o < KEYS; o += STEP)
                use(Tile{k + o * PITCH, v + o * PITCH, &level, o_place + o, is_tile_odd});
            if (COARSE_STAGES == 1) __syncthreads();
            else i_stage = i_stage == COARSE_STAGES - 1 ? 0 : i_stage + 1;
        }
    }

    // --- the finer ones, by each warp for itself
    for (int i_level = shared_levels; i_level < q.levels; i_level++) {
        const Level& level = level_of[i_level];
        const int level_places = places(level, q.block_bits);
        for (int o_place = 0; o_place < level_places; o_place += FINE_KEYS) {
            copies_wait<0>();
            __syncwarp();   // all lanes' copies are there
            const Element *k = fine, *v = k + FINE_KEYS * PITCH;
#pragma unroll
            for (int o = 0; o < FINE_KEYS; o += STEP)
                use(Tile{k + o * PITCH, v + o * PITCH, &level, o_place + o, is_fine_odd});
            __syncwarp();
            fetch(own);
        }
    }
    copies_wait<0>();
    __syncwarp();
}

// Shared memory of a block of queries: coarse tiles, the warps' own, and the tiles of rows that stay; as attend.py and
// attend_backward.py reserve it.
__device__ __forceinline__ Element* coarse_tiles() { return reinterpret_cast<Element*>(shared_memory()); }
__device__ __forceinline__ Element* fine_tile(int i_warp) {
    return coarse_tiles() + COARSE_STAGES * 2 * KEYS * PITCH + i_warp * 2 * FINE_KEYS * PITCH;
}
__device__ __forceinline__ Element* kept_rows(int i_warp, int tiles) {
    return fine_tile(WARPS) + i_warp * tiles * 16 * PITCH;
}

// Which queries this block has. List: (batch entry, head).
__device__ __forceinline__ Queries queries_of_block(int queries, int heads, int kv_heads, int dims, int value_dims,
                                                    int block_bits, int levels, u32& i_list) {
    const int of_warp = block_bits == 3 ? 8 : 16, of_block = WARPS * of_warp;
    const u32 tiles = (queries + of_block - 1) / u32(of_block), i_tile = blockIdx.x % tiles;
    i_list = blockIdx.x / tiles;
    const u32 i_head = i_list % heads;
    Queries q;
    q.first = i_tile * of_block;
    q.own_first = q.first + threadIdx.x / WARP * of_warp;
    q.own = max(0, min(of_warp, queries - q.own_first));
    q.block_query_bits = WARPS_BITS + (block_bits == 3 ? 3 : 4);
    q.queries = queries;
    q.dims = dims;
    q.value_dims = value_dims;
    q.block_bits = block_bits;
    q.levels = levels;
    q.i_batch = i_list / heads;
    q.i_head = i_head;
    q.i_kv = i_head / u32(heads / kv_heads);
    return q;
}

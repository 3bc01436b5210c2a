// Attention of every query to its candidates on every level, in one softmax (spec.md, Attention).
//
// A block of WARPS warps has ROWS consecutive queries of one head, a warp 16 of them. Their lists of candidates, coarsest
// level first:
//
//     levels whose rows of S_{l+1} cover at least ROWS queries      the finer ones (level 0; for b = 8 level 1 too)
//     one list for the block: tiles of KEYS keys and values,        one list for 16 queries (for b = 8 one for each 8):
//     brought in by all warps and used by all, the next one on      tiles of 16 keys and values in a ring of the warp's
//     its way while this one is used                                own, whose first come in before all else is done
//
// Both go through one routine: scores of the tile, the softmax so far, and the sum of values, in registers. Whoever brings
// a key in also writes down its log-weight, and whether a tile is odd: whether one of its keys is not there, or has another
// weight than the level's.
#include <levels.cuh>
#include <tiles.cuh>

constexpr int THREADS = WARPS * WARP;
constexpr int ROWS = WARPS * 16;
constexpr int ROWS_BITS = WARPS == 1 ? 4 : WARPS == 2 ? 5 : WARPS == 4 ? 6 : 7;
constexpr float LOG_2 = 0.6931471805599453f;
constexpr float LEAST = -3.4028234e38f;
constexpr float SLACK = 8;   // how far a logit may pass the maximum that sums are kept by, in powers of two

struct Arguments {
    Array q, out;
    float* lse;
    int heads, kv_heads, queries, dims, value_dims, block_bits, levels;
    float scale;                                                          // times log2(e)
    Level level[MOST_LEVELS];
};

struct Softmax {
    float o[N_DIMS][4];    // sums of values
    float top[2], sum[2];  // what exponents are relative to, and this thread's share of their sum: of row g, of row g + 8
};

// Takes one tile of logits (times `scale`, plus `bias`) into the softmax; they become weights. Exponents are relative to a
// maximum that is only raised once a logit passes it by SLACK: seldom after the first tiles.
template <int N> __device__ __forceinline__ void softmax(Softmax& so_far, float (&s)[N][4], float scale, float bias) {
    float(&top)[2] = so_far.top;
    float upper = s[0][0], lower = s[0][2];
#pragma unroll
    for (int n = 0; n < N; n++) {
        upper = fmaxf(upper, fmaxf(s[n][0], s[n][1]));
        lower = fmaxf(lower, fmaxf(s[n][2], s[n][3]));
    }
    upper = upper * scale + bias;
    lower = lower * scale + bias;
    if (__any_sync(~0u, upper > top[0] + SLACK || lower > top[1] + SLACK)) {
        upper = fmaxf(upper, __shfl_xor_sync(~0u, upper, 1));
        lower = fmaxf(lower, __shfl_xor_sync(~0u, lower, 1));
        upper = fmaxf(top[0], fmaxf(upper, __shfl_xor_sync(~0u, upper, 2)));
        lower = fmaxf(top[1], fmaxf(lower, __shfl_xor_sync(~0u, lower, 2)));
        const float fade_upper = exp2_fast(top[0] - upper), fade_lower = exp2_fast(top[1] - lower);
        top[0] = upper;
        top[1] = lower;
        so_far.sum[0] *= fade_upper;
        so_far.sum[1] *= fade_lower;
#pragma unroll
        for (int d = 0; d < N_DIMS; d++) {
            so_far.o[d][0] *= fade_upper;
            so_far.o[d][1] *= fade_upper;
            so_far.o[d][2] *= fade_lower;
            so_far.o[d][3] *= fade_lower;
        }
    }
    const float shift_upper = bias - top[0], shift_lower = bias - top[1];
#pragma unroll
    for (int n = 0; n < N; n++) {
        s[n][0] = exp2_fast(s[n][0] * scale + shift_upper);
        s[n][1] = exp2_fast(s[n][1] * scale + shift_upper);
        s[n][2] = exp2_fast(s[n][2] * scale + shift_lower);
        s[n][3] = exp2_fast(s[n][3] * scale + shift_lower);
        so_far.sum[0] += s[n][0] + s[n][1];
        so_far.sum[1] += s[n][2] + s[n][3];
    }
}

// One tile of 8 N keys and values. log_weights: of its keys, read only where the tile is odd. halves: the first 8 keys are
// for rows 0 .. 7, the others for rows 8 .. 15.
template <int N>
__device__ __forceinline__ void attend_tile(Softmax& so_far, const Rows& rows, const Element* k, const Element* v,
                                            float scale, float log_count, const float* log_weights, bool odd, bool halves,
                                            int lane) {
    float s[N][4] = {};
    add_scores<N>(s, rows, k, lane);
    if (odd) {
#pragma unroll
        for (int n = 0; n < N; n++) {
            const float2 log_weight = *reinterpret_cast<const float2*>(log_weights + n * 8 + lane % 4 * 2);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float w = i % 2 ? log_weight.y : log_weight.x;
                s[n][i] = w == -INFINITE || (halves && n != i / 2) ? -INFINITE : s[n][i] * scale + w;
            }
        }
        scale = 1;
        log_count = 0;
    }
    softmax<N>(so_far, s, scale, log_count);
    add_rows<N>(so_far.o, s, v, lane);
}

// Brings ROWS_HERE tokens of a level into a tile of keys and one of values, with their log-weights; returns whether one of
// those that this thread brought is odd. run_of(i): the first of the tokens for rows 8 i .. 8 i + 7, or -1.
template <int ROWS_HERE, int THREADS_HERE, class RunOf>
__device__ __forceinline__ bool bring(Element* tile, float* log_weights, const Level& level, const Element* k,
                                      const Element* v, int dims, int value_dims, int i_thread, RunOf run_of) {
    bool odd = false;
    for_pieces<ROWS_HERE, THREADS_HERE>(i_thread, [&](int row, int o_dim) {
        const int run = run_of(row / RUN), token = run + row % RUN;
        const bool is_there = run >= 0 && token < level.length;
        Element* to = tile + row * PITCH + o_dim;
        stage_piece(to, k + o_dim * level.k.dim, level.k, token, is_there && o_dim < dims);
        stage_piece(to + ROWS_HERE * PITCH, v + o_dim * level.v.dim, level.v, token, is_there && o_dim < value_dims);
        if (o_dim == 0) {
            const float log_weight = token == level.length - 1 ? level.log_last : level.log_count;
            log_weights[row] = is_there ? log_weight : -INFINITE;
            odd |= !is_there || log_weight != level.log_count;
        }
    });
    return odd;
}

// What is brought in next of a list: a tile of places of one level, whose keys and values begin at k and v.
struct Next {
    int i_level, place, places;
    const Element *k, *v;
    const int *upper, *lower;   // rows of S_{l+1}; two only for b = 8 on level 0: one for each half of 16 queries
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attend(const __grid_constant__ Arguments a) {
    constexpr int TILE = 2 * 16 * PITCH, SHARED_TILE = 2 * KEYS * PITCH;             // keys, values
    __shared__ float coarse_weights[STAGES][KEYS];
    __shared__ float fine_weights[WARPS][STAGES][16];
    Element* coarse = reinterpret_cast<Element*>(shared_memory());                   // [STAGES][SHARED_TILE]
    const int i_thread = threadIdx.x, lane = i_thread % WARP, i_warp = i_thread / WARP;
    Element* ring = coarse + STAGES * SHARED_TILE + i_warp * STAGES * TILE;          // [STAGES][TILE]
    Element* own_rows = ROWS_IN_REGISTERS                                            // [16, PITCH], queries, then results
        ? ring : coarse + STAGES * SHARED_TILE + WARPS * STAGES * TILE + i_warp * 16 * PITCH;

    const u32 tiles = (a.queries + ROWS - 1) / u32(ROWS);
    const u32 i_tile = blockIdx.x % tiles, i_list = blockIdx.x / tiles, i_head = i_list % a.heads, i_batch = i_list / a.heads;
    const u32 i_kv = i_head / u32(a.heads / a.kv_heads);
    const int first = i_tile * ROWS, own_first = first + i_warp * 16;

    stage<16, WARP>(own_rows, head_of<const Element>(a.q, i_batch, i_head), a.q, a.dims, lane,
                    [&](int row) { return own_first + row < a.queries ? own_first + row : -1; });
    copies_commit();
    copies_wait<0>();
    __syncwarp();
    Rows rows;
    hold(rows, own_rows, lane);
    __syncwarp();

    Softmax so_far;
#pragma unroll
    for (int d = 0; d < N_DIMS; d++) so_far.o[d][0] = so_far.o[d][1] = so_far.o[d][2] = so_far.o[d][3] = 0;
    so_far.top[0] = so_far.top[1] = LEAST;
    so_far.sum[0] = so_far.sum[1] = 0;

    int shared_levels = 0;
    while (shared_levels < a.levels && a.level[shared_levels].span_bits >= ROWS_BITS) shared_levels++;

    auto enter = [&](Next& at, int i_level, int end, int query) {   // the list of the queries around `query` on a level
        at.i_level = i_level;
        at.place = 0;
        if (i_level == end) return;
        const Level& level = a.level[i_level];
        at.places = places(level, a.block_bits);
        at.k = head_of<const Element>(level.k, i_batch, i_kv);
        at.v = head_of<const Element>(level.v, i_batch, i_kv);
        at.upper = query < a.queries ? parents_of(level, i_batch, i_head, query) : nullptr;
        at.lower = query + 8 < a.queries ? parents_of(level, i_batch, i_head, query + 8) : nullptr;
    };

    // --- the finer levels: what the warp brings in for itself. There is always a list: the coarsest level is not fine.
    u32 odd_stages = 0;   // bit i: what this lane brought into stage i of the ring is odd
    auto fetch = [&](Next& at, int i_stage) {
        if (at.i_level < a.levels) {
            const Level& level = a.level[at.i_level];
            const bool halves = level.span_bits < 4;
            const int upper = at.upper ? run_at(level, at.upper, at.place, a.block_bits) : -1;
            int lower = upper < 0 ? -1 : upper + RUN;
            if (halves) lower = at.lower ? run_at(level, at.lower, at.place, a.block_bits) : -1;
            else if (a.block_bits == 3) lower = at.upper ? run_at(level, at.upper, at.place + RUN, a.block_bits) : -1;
            const bool odd = bring<16, WARP>(ring + i_stage * TILE, fine_weights[i_warp][i_stage], level, at.k, at.v, a.dims,
                                             a.value_dims, lane, [&](int i) { return i ? lower : upper; });
            odd_stages = (odd_stages & ~(1u << i_stage)) | u32(odd) << i_stage;
            at.place += halves ? RUN : 16;
            if (at.place >= at.places) enter(at, at.i_level + 1, a.levels, own_first);
        }
        copies_commit();
    };
    Next own;
    enter(own, shared_levels, a.levels, own_first);
    for (int i = 0; i < STAGES; i++) fetch(own, i);

    // --- the coarser levels, by all warps
    Next next;
    enter(next, 0, shared_levels, first);
    auto bring_next = [&](int i_stage) {
        bool odd = false;
        if (next.i_level < shared_levels) {
            const Level& level = a.level[next.i_level];
            odd = bring<KEYS, THREADS>(coarse + i_stage * SHARED_TILE, coarse_weights[i_stage], level, next.k, next.v, a.dims,
                                       a.value_dims, i_thread, [&](int i) {
                                           const int place = next.place + i * RUN;
                                           return next.upper ? run_at(level, next.upper, place, a.block_bits) : place;
                                       });
            next.place += KEYS;
            if (next.place >= next.places) enter(next, next.i_level + 1, shared_levels, first);
        }
        copies_commit();
        return odd;
    };
    int i_stage = 0;
    bool odd = STAGES == 2 && bring_next(0);
    for (int i_level = 0; i_level < shared_levels; i_level++) {
        const Level& level = a.level[i_level];
        const float log_count = level.log_count;
        const int level_places = places(level, a.block_bits);
        for (int o_place = 0; o_place < level_places; o_place += KEYS) {
            const bool odd_here = odd;
            odd = bring_next(STAGES == 2 ? i_stage ^ 1 : 0);
            copies_wait<STAGES - 1>();
            const bool is_tile_odd = __syncthreads_or(STAGES == 2 ? odd_here : odd);
            const Element *k = coarse + i_stage * SHARED_TILE, *v = k + KEYS * PITCH;
#pragma unroll
            for (int o = 0; o < KEYS; o += STEP)
                attend_tile<STEP / 8>(so_far, rows, k + o * PITCH, v + o * PITCH, a.scale, log_count,
                                      coarse_weights[i_stage] + o, is_tile_odd, false, lane);
            __syncthreads();
            if (STAGES == 2) i_stage ^= 1;
        }
    }

    // --- the finer ones, by each warp for itself
    i_stage = 0;
    for (int i_level = shared_levels; i_level < a.levels; i_level++) {
        const Level& level = a.level[i_level];
        const float log_count = level.log_count;
        const bool halves = level.span_bits < 4;
        const int level_places = places(level, a.block_bits);
        for (int o_place = 0; o_place < level_places; o_place += halves ? RUN : 16) {
            copies_wait<STAGES - 1>();
            const bool is_tile_odd = __any_sync(~0u, odd_stages >> i_stage & 1) || halves;   // and all lanes' copies are there
            const Element *k = ring + i_stage * TILE, *v = k + 16 * PITCH;
            attend_tile<2>(so_far, rows, k, v, a.scale, log_count, fine_weights[i_warp][i_stage], is_tile_odd, halves, lane);
            __syncwarp();
            fetch(own, i_stage);
            if (STAGES == 2) i_stage ^= 1;
        }
    }
    copies_wait<0>();
    __syncwarp();

    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float sum = so_far.sum[half];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        factor[half] = sum == 0 ? 0 : 1 / sum;   // no candidates: out 0, lse -inf
        const int query = own_first + half * 8 + lane / 4;
        if (lane % 4 == 0 && query < a.queries)
            a.lse[i64(i_list) * a.queries + query] = sum == 0 ? -INFINITE : (so_far.top[half] + log2f(sum)) * LOG_2;
    }
    write_rows(so_far.o, factor[0], factor[1], own_rows, head_of<Element>(a.out, i_batch, i_head) + own_first * a.out.token,
               a.out, a.queries - own_first, a.value_dims, lane);
}

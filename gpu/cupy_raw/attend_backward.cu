// Gradients of attention (spec.md, Gradients).
//
// dq walks the queries' lists as attention does. dk and dv swap the roles: a warp has 16 keys and walks the queries that
// attend to them, which transpose.cu has listed where they are few at a time. Nothing is scattered, so no two threads ever
// add to one number, and every sum has one order.
//
//     prepare              of each query: lse in powers of two, and <dO, out> - dlse
//     query_gradient       dq_t = scale sum_j dS_tj k_l[j]
//     key_gradient         of one level below the coarsest: dk_l[j] = scale sum_t dS_tj q_t, dv_l[j] = sum_t P_tj dO_t
//     key_gradient_dense   the same of the coarsest level, to which all queries attend
//     key_gradient_rows    the same of a level that many queries at a time select from: they are read row by row
//     unpool               from level to level down: own sum / count + what the parent hands down
//     finish               keys whose list was cut into pieces: their sums, in order
//     gather               keys of key_gradient_rows: what each has of all rows that selected it, in order, divided by its
//                          count, plus what the parent hands down, as `unpool` does
#include <walk.cuh>

constexpr float LOG2_E = 1.4426950408889634f;

// What a logit and dS need of a query.
struct alignas(8) Row {
    float lse, delta;   // lse in powers of two, +inf for a query that has no candidates or is not there
};

struct Arguments {
    Array dout, q, k, v, out, dlse;   // k and v of the level; out and dlse for `prepare`
    Array lse, dq, dk, dv;            // lse and dlse (batch, heads, queries)
    Row* rows_of;                     // (batch * heads, padded queries)
    const int *starts, *rows, *items; // as transpose.cu left them
    float *k_sums, *v_sums;           // of the level, (batch * kv_heads, length, dims): what coarse levels leave
    float *k_parts, *v_parts;         // of pieces: (pieces, lists, length, dims), (spare, b, dims) for lists of rows, and
                                      // (lists, rows, pieces, columns, b, dims) for `key_gradient_rows`
    const float *k_above, *v_above;   // what level 1 hands down, for level 0
    int batch, heads, kv_heads, queries, padded, dims, value_dims, block_bits, levels;
    int length, row_length, row_count, columns, parents, ranges, run, run_log, run_bits, split, spare;
    int pieces, tiles_of_piece;       // of all queries, or of those of a row
    int i_level;                      // of `level` below, for `key_gradient_rows`
    float scale, slope_scale;         // times log2(e); as it is
    float log_count, log_last;
    Level level[MOST_LEVELS];
};

// --- what both sides need of the queries

extern "C" __global__ void __launch_bounds__(128) prepare(const __grid_constant__ Arguments a) {
    const i64 i = (i64(blockIdx.x) * 128 + threadIdx.x) / 8;   // 8 threads for a query
    const int part = threadIdx.x % 8, query = i % a.padded;
    const i64 i_list = i / a.padded, i_batch = i_list / a.heads, i_head = i_list % a.heads;
    const bool is_there = i_list < i64(a.batch) * a.heads && query < a.queries;
    float delta = 0;
    if (is_there) {
        const Element* dout = head_of<const Element>(a.dout, i_batch, i_head) + query * a.dout.token;
        const Element* out = head_of<const Element>(a.out, i_batch, i_head) + query * a.out.token;
        for (int o = part * PIECE; o < a.value_dims; o += 8 * PIECE) {
#if WHOLE
            const Piece x = *reinterpret_cast<const Piece*>(dout + o), y = *reinterpret_cast<const Piece*>(out + o);
#pragma unroll
            for (int d = 0; d < PIECE; d++) delta += to_float(x.x[d]) * to_float(y.x[d]);
#else
            for (int d = o; d < o + PIECE; d++) delta += to_float(dout[d * a.dout.dim]) * to_float(out[d * a.out.dim]);
#endif
        }
    }
    for (int step = 4; step; step /= 2) delta += __shfl_xor_sync(~0u, delta, step);
    if (part || i_list >= i64(a.batch) * a.heads) return;
    Row row{INFINITE, 0};
    if (is_there) {
        const float lse = head_of<const float>(a.lse, i_batch, i_head)[query * a.lse.token];
        if (a.dlse.data) delta -= head_of<const float>(a.dlse, i_batch, i_head)[query * a.dlse.token];
        if (lse != -INFINITE) row = Row{lse * LOG2_E, delta};
    }
    a.rows_of[i] = row;
}

// --- the queries' side

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) query_gradient(const __grid_constant__ Arguments a) {
    const int lane = threadIdx.x % WARP, i_warp = threadIdx.x / WARP;
    u32 i_list;
    const Queries q =
        queries_of_block(a.queries, a.heads, a.kv_heads, a.dims, a.value_dims, a.block_bits, a.levels, i_list);
    Element* fine = fine_tile(i_warp);
    Element* own_rows = ROWS_IN_REGISTERS ? fine : kept_rows(i_warp, 2);   // [2][16, PITCH]: queries, dO

    auto own = [&](int row) { return row < q.own ? q.own_first + row : -1; };
    stage<16, WARP>(own_rows, head_of<const Element>(a.q, q.i_batch, q.i_head), a.q, a.dims, lane, own);
    stage<16, WARP>(own_rows + 16 * PITCH, head_of<const Element>(a.dout, q.i_batch, q.i_head), a.dout, a.value_dims, lane,
                    own);
    copies_commit();
    copies_wait<0>();
    __syncwarp();
    Rows query_rows, dout_rows;
    hold(query_rows, own_rows, lane);
    hold(dout_rows, own_rows + 16 * PITCH, lane);
    __syncwarp();
    Row row[2];   // of row g and of row g + 8
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int own_row = half * 8 + lane / 4;
        row[half] = own_row < q.own ? a.rows_of[i64(i_list) * a.padded + q.own_first + own_row] : Row{INFINITE, 0};
    }

    float o[N_DIMS][4];
#pragma unroll
    for (int d = 0; d < N_DIMS; d++) o[d][0] = o[d][1] = o[d][2] = o[d][3] = 0;
    walk<16>(q, a.level, coarse_tiles(), fine, [&](const Tile& tile) {
        float s[2][4] = {}, dp[2][4] = {}, scale = a.scale, log_count = tile.level->log_count;
        add_scores<2>(s, query_rows, tile.k, lane);
        add_scores<2>(dp, dout_rows, tile.v, lane);
        weigh_odd(s, tile, q, scale, log_count, lane);
#pragma unroll
        for (int n = 0; n < 2; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float p = exp2_fast(s[n][i] * scale + (log_count - row[i / 2].lse));
                s[n][i] = p * (dp[n][i] - row[i / 2].delta);
            }
        }
        add_rows<2>(o, s, tile.k, lane);
    });
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (row[half].lse != INFINITE) continue;   // no candidates, no gradient
#pragma unroll
        for (int d = 0; d < N_DIMS; d++) o[d][half * 2] = o[d][half * 2 + 1] = 0;
    }
    write_rows(o, a.slope_scale, a.slope_scale, own_rows,
               head_of<Element>(a.dq, q.i_batch, q.i_head) + q.own_first * a.dq.token, a.dq, q.own, a.dims, lane);
}

// --- the keys' side

struct Keys {
    Rows k, v;
    float log_weight[2];             // of the key of row g and of row g + 8; -inf where there is none
    float o_k[NEEDS_K ? N_DIMS : 1][4], o_v[NEEDS_V ? N_DIMS : 1][4];
};

// Brings the 16 keys from `first` on of a level into a tile, with their values; keys past `end` are none. tile: [2][16, PITCH].
__device__ __forceinline__ void stage_keys(const Arguments& a, Element* tile, i64 i_batch, i64 i_kv, int first, int end,
                                           int lane) {
    const Element *k = head_of<const Element>(a.k, i_batch, i_kv), *v = head_of<const Element>(a.v, i_batch, i_kv);
    stage_runs<16, WARP>(tile, a.k, a.v, a.dims, a.value_dims, end, lane, [&](int i) { return Run{k, v, first + i * RUN}; });
    copies_commit();
}

// Takes those keys into a warp.
__device__ __forceinline__ void hold_keys(Keys& keys, const Arguments& a, const Element* tile, int first, int end, int lane) {
    __syncwarp();
    hold(keys.k, tile, lane);
    hold(keys.v, tile + 16 * PITCH, lane);
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int key = first + half * 8 + lane / 4;
        keys.log_weight[half] = key >= end ? -INFINITE : key == a.length - 1 ? a.log_last : a.log_count;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int d = 0; d < N_DIMS; d++) {
            if (NEEDS_K) keys.o_k[NEEDS_K ? d : 0][i] = 0;
            if (NEEDS_V) keys.o_v[NEEDS_V ? d : 0][i] = 0;
        }
    }
}

// Adds what 16 queries give to the gradients of a warp's keys. rows: of the queries, [16].
__device__ __forceinline__ void add_queries(Keys& keys, const Arguments& a, const Element* q, const Element* dout,
                                            const Row* rows, int lane) {
    float s[2][4] = {}, dp[2][4] = {};
    add_scores<2>(s, keys.k, q, lane);
    if (NEEDS_K) add_scores<2>(dp, keys.v, dout, lane);
#pragma unroll
    for (int n = 0; n < 2; n++) {
        const float4 two = *reinterpret_cast<const float4*>(rows + n * 8 + lane % 4 * 2);   // lse, delta, lse, delta
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float lse = i % 2 ? two.z : two.x, delta = i % 2 ? two.w : two.y;
            const bool is_there = lse != INFINITE;   // else the score may be 0 times an infinite key
            // Chosen before the power, not after it: else the compiler makes a branch for each of the 8
            const float logit = s[n][i] * a.scale + (keys.log_weight[i / 2] - lse);
            s[n][i] = exp2_fast(is_there ? logit : -INFINITE);
            dp[n][i] = is_there ? s[n][i] * (dp[n][i] - delta) : 0;
        }
    }
#if NEEDS_V
    add_rows<2>(keys.o_v, s, dout, lane);
#endif
#if NEEDS_K
    add_rows<2>(keys.o_k, dp, q, lane);
#endif
}

// Writes 16 rows of sums in float32 to rows of `dims` numbers, those below `rows`.
__device__ __forceinline__ void write_sums(const float (&o)[N_DIMS][4], float scale, float* to, int rows, int dims, int lane) {
#pragma unroll
    for (int d = 0; d < N_DIMS; d++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = half * 8 + lane / 4, dim = d * 8 + lane % 4 * 2;
            if (row < rows && dim < dims)
                *reinterpret_cast<float2*>(to + i64(row) * dims + dim) =
                    make_float2(o[d][half * 2] * scale, o[d][half * 2 + 1] * scale);
        }
    }
}

// Adds to 16 rows of keys of level 0 what their parent hands down: one row of `dims` numbers.
__device__ __forceinline__ void add_above(float (&o)[N_DIMS][4], float scale, const float* above, int dims, int lane) {
#pragma unroll
    for (int d = 0; d < N_DIMS; d++) {
        const int dim = d * 8 + lane % 4 * 2;
        float2 more = make_float2(0, 0);
        if (above && dim < dims) more = *reinterpret_cast<const float2*>(above + dim);
        o[d][0] = o[d][0] * scale + more.x;
        o[d][1] = o[d][1] * scale + more.y;
        o[d][2] = o[d][2] * scale + more.x;
        o[d][3] = o[d][3] * scale + more.y;
    }
}

// Adds up the sums of a block's warps, in their order, into the first; all have the same keys. memory: of the whole block.
__device__ __forceinline__ void add_warps(float (&o)[N_DIMS][4], float* memory, int i_warp, int lane) {
    __syncthreads();
    if (i_warp) {
#pragma unroll
        for (int d = 0; d < N_DIMS; d++)
            for (int i = 0; i < 4; i++) memory[((i_warp - 1) * N_DIMS * 4 + d * 4 + i) * WARP + lane] = o[d][i];
    }
    __syncthreads();
    if (i_warp) return;
    for (int w = 1; w < KEY_WARPS; w++) {
#pragma unroll
        for (int d = 0; d < N_DIMS; d++)
            for (int i = 0; i < 4; i++) o[d][i] += memory[((w - 1) * N_DIMS * 4 + d * 4 + i) * WARP + lane];
    }
}

// One level below the coarsest. A piece of work is 16 keys, all children of one parent, and up to `split` tiles of 16
// queries of the parent's list. A block of BY warps has one piece: they take turns in its tiles, and their sums are added in
// order. A piece that is the only one of its parent writes the result, others their part.
template <int BY> __device__ __forceinline__ void gradient_of_keys(const Arguments& a) {
    constexpr int RING = 2 * 16 * PITCH;
    __shared__ __align__(16) Row row_tiles[BY][KEY_STAGES][16];
    const int lane = threadIdx.x % WARP, i_warp = threadIdx.x / WARP;
    Element* ring = reinterpret_cast<Element*>(shared_memory()) + i_warp * (KEY_STAGES + !ROWS_IN_REGISTERS) * RING;
    // Keys that go on into registers lie where the second tile of queries will
    static_assert(!ROWS_IN_REGISTERS || KEY_STAGES == 2);
    Element* key_tile = ring + (ROWS_IN_REGISTERS ? 1 : KEY_STAGES) * RING;

    const u32 parts = a.block_bits > 4 ? 1 << (a.block_bits - 4) : 1;
    const u32 units = u32(a.parents + a.spare) * parts;            // of a list: first pieces, then the others
    const int i_list = blockIdx.x / units, unit = blockIdx.x % units, i_part = unit % parts, which = unit / parts;
    const int i_batch = i_list / a.kv_heads, i_kv = i_list % a.kv_heads;
    const int* items = a.items + i64(i_list) * whole_fours(a.parents + 1);

    int parent = which, piece = 0;
    if (which >= a.parents) {                                      // the parent whose extra piece this is
        const int extra = which - a.parents;
        if (extra >= items[a.parents] - a.parents) return;
        int low = 0, high = a.parents - 1;                         // the last one with no more extra pieces before it
        while (low < high) {
            const int middle = (low + high + 1) / 2;
            if (items[middle] - middle <= extra) low = middle;
            else high = middle - 1;
        }
        parent = low;
        piece = 1 + extra - (items[parent] - parent);
    }
    const int extras = items[parent] - parent, pieces = items[parent + 1] - items[parent];
    const int* starts = a.starts + i64(i_list) * whole_fours(a.parents * a.ranges + 1) + i64(parent) * a.ranges;
    const int start = parent ? starts[-1] : 0, entries = starts[a.ranges - 1] - start;
    const int* rows = a.rows + i64(i_list) * a.row_count * a.columns + start;
    const int group = a.heads / a.kv_heads;
    const int all_tiles = int((i64(entries) * a.run + 15) / 16);
    const int end = min(all_tiles, (piece + 1) * a.split), first_tile = piece * a.split + i_warp;

    const int first_key = (parent << a.block_bits) + i_part * 16, end_key = min((parent + 1) << a.block_bits, a.length);
    stage_keys(a, key_tile, i_batch, i_kv, first_key, end_key, lane);

    int row_ahead[2];   // entries of the list for the two runs of the next tile: they arrive while others are used
    auto entry_at = [&](u32 place) { return a.run_log >= 0 ? place >> a.run_log : place / u32(a.run); };
    auto look_up = [&](int tile) {
        const u32 entry = entry_at(tile * 16), next = a.run == RUN ? entry + 1 : entry;   // else a row has whole tiles
        row_ahead[0] = entry < u32(entries) ? __ldg(rows + entry) : -1;
        row_ahead[1] = next == entry ? row_ahead[0] : next < u32(entries) ? __ldg(rows + next) : -1;
    };
    auto fetch = [&](int tile, int i_stage) {
        if (tile < end) {
            int head[2], query[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const u32 place = tile * 16 + i * RUN;
                const int row = row_ahead[i], of_head = group == 1 ? 0 : row / a.row_length;
                head[i] = i_kv * group + max(0, of_head);
                query[i] = ((row - of_head * a.row_length) << a.run_bits) + int(place - entry_at(place) * a.run);
                if (row < 0 || query[i] >= a.queries) query[i] = -1;
            }
            look_up(tile + BY);
            const Element *upper_q = head_of<const Element>(a.q, i_batch, head[0]), *lower_q = upper_q;
            const Element *upper_dout = head_of<const Element>(a.dout, i_batch, head[0]), *lower_dout = upper_dout;
            if (head[1] != head[0]) {
                lower_q = head_of<const Element>(a.q, i_batch, head[1]);
                lower_dout = head_of<const Element>(a.dout, i_batch, head[1]);
            }
            stage_runs<16, WARP>(ring + i_stage * RING, a.q, a.dout, a.dims, a.value_dims, a.queries, lane, [&](int i) {
                return i ? Run{lower_q, lower_dout, query[1]} : Run{upper_q, upper_dout, query[0]};
            });
            if (lane < 8) {   // 16 bytes: two queries' Row
                const int o = lane % 4 * 2, run = lane < 4 ? query[0] : query[1], of_run = lane < 4 ? head[0] : head[1];
                Row* of = row_tiles[i_warp][i_stage] + lane * 2;
                if (run >= 0)
                    copy_async(of, a.rows_of + (i64(i_batch) * a.heads + of_run) * a.padded + run + o, true);
                else
                    of[0] = of[1] = Row{INFINITE, 0};
            }
        }
        copies_commit();
    };
    look_up(first_tile);
    fetch(first_tile, 0);
    copies_wait<1>();
    Keys keys;
    hold_keys(keys, a, key_tile, first_key, end_key, lane);
    if (KEY_STAGES == 2) fetch(first_tile + BY, 1);
    int i_stage = 0;
    for (int tile = first_tile; tile < end; tile += BY) {
        copies_wait<KEY_STAGES - 1>();
        __syncwarp();
        const Element* q = ring + i_stage * RING;
        add_queries(keys, a, q, q + 16 * PITCH, row_tiles[i_warp][i_stage], lane);
        __syncwarp();
        fetch(tile + KEY_STAGES * BY, i_stage);
        if (KEY_STAGES == 2) i_stage ^= 1;
    }
    copies_wait<0>();
    __syncwarp();

    float* memory = reinterpret_cast<float*>(shared_memory());
    const int n_keys = end_key - first_key;
    auto write = [&](auto& o, float scale, float* sums, float* parts_of, const float* above, const Array& result, int dims) {
        if (BY > 1) {
            add_warps(o, memory, i_warp, lane);
            if (i_warp) return;
        }
        if (pieces > 1) {   // first pieces lie behind all the others
            const int slot = piece ? extras + piece - 1 : a.spare + extras;
            const i64 row = ((i64(i_list) * 2 * a.spare + slot) << a.block_bits) + i_part * 16;
            write_sums(o, scale, parts_of + row * dims, n_keys, dims, lane);
        } else if (sums) {
            write_sums(o, scale, sums + (i64(i_list) * a.length + first_key) * dims, n_keys, dims, lane);
        } else {
            add_above(o, scale, above ? above + (i64(i_list) * a.parents + parent) * dims : nullptr, dims, lane);
            write_rows(o, 1, 1, ring, head_of<Element>(result, i_batch, i_kv) + first_key * result.token, result, n_keys,
                       dims, lane);
        }
    };
#if NEEDS_K
    write(keys.o_k, a.slope_scale, a.k_sums, a.k_parts, a.k_above, a.dk, a.dims);
#endif
#if NEEDS_V
    write(keys.o_v, 1, a.v_sums, a.v_parts, a.v_above, a.dv, a.value_dims);
#endif
}

extern "C" __global__ void __launch_bounds__(WARP, KEY_BLOCKS * KEY_WARPS)
key_gradient(const __grid_constant__ Arguments a) {
    gradient_of_keys<1>(a);
}
extern "C" __global__ void __launch_bounds__(KEY_WARPS * WARP, KEY_BLOCKS)
key_gradient_joint(const __grid_constant__ Arguments a) {
    gradient_of_keys<KEY_WARPS>(a);
}

// What the queries of the tiles from `first_tile` to `end` give to the keys of a block: each warp has 16 of its own, from
// first_key on, and all share each tile of 16 queries. queries_at(tile): their head, and the first of them.
struct Spot { i64 i_head; int query; };
template <class QueriesAt>
__device__ __forceinline__ void share_queries(Keys& keys, const Arguments& a, i64 i_batch, i64 i_kv, int first_key, int end_key,
                                              int first_tile, int end, QueriesAt queries_at) {
    constexpr int RING = 2 * 16 * PITCH, ALL = KEY_WARPS * WARP;
    __shared__ __align__(16) Row row_tiles[DENSE_STAGES][16];
    const int i_thread = threadIdx.x, lane = i_thread % WARP, i_warp = i_thread / WARP;
    Element* ring = reinterpret_cast<Element*>(shared_memory());                 // [DENSE_STAGES][queries, dO][16, PITCH]
    Element* key_tile = ring + (DENSE_STAGES + i_warp) * RING;

    stage_keys(a, key_tile, i_batch, i_kv, first_key, end_key, lane);
    auto fetch = [&](int tile, int i_stage) {
        if (tile < end) {
            const Spot spot = queries_at(tile);
            const Element *q = head_of<const Element>(a.q, i_batch, spot.i_head);
            const Element *dout = head_of<const Element>(a.dout, i_batch, spot.i_head);
            stage_runs<16, ALL>(ring + i_stage * RING, a.q, a.dout, a.dims, a.value_dims, a.queries, i_thread,
                                [&](int i) { return Run{q, dout, spot.query + i * RUN}; });
            if (i_thread < 8)
                copy_async(row_tiles[i_stage] + i_thread * 2,
                           a.rows_of + (i_batch * a.heads + spot.i_head) * a.padded + spot.query + i_thread * 2, true);
        }
        copies_commit();
    };
#pragma unroll
    for (int i = 0; i < DENSE_STAGES - 1; i++) fetch(first_tile + i, i);
    copies_wait<DENSE_STAGES - 1>();
    hold_keys(keys, a, key_tile, first_key, end_key, lane);
    int i_stage = 0;
    for (int tile = first_tile; tile < end; tile++) {
        if (DENSE_STAGES == 1) fetch(tile, 0);
        copies_wait<(DENSE_STAGES > 2 ? DENSE_STAGES - 2 : 0)>();
        __syncthreads();   // all are also done with the stage before this one
        if (DENSE_STAGES > 1) fetch(tile + DENSE_STAGES - 1, (i_stage ? i_stage : DENSE_STAGES) - 1);
        const Element* q = ring + i_stage * RING;
        if (first_key < end_key) add_queries(keys, a, q, q + 16 * PITCH, row_tiles[i_stage], lane);   // for the whole warp
        if (DENSE_STAGES == 1) __syncthreads();
        else i_stage = i_stage == DENSE_STAGES - 1 ? 0 : i_stage + 1;
    }
    copies_wait<0>();
}

// Leaves a warp's sums in the parts, from a row on, those of up to `rows` keys.
__device__ __forceinline__ void write_parts(const Keys& keys, const Arguments& a, i64 row, int rows, int lane) {
#if NEEDS_K
    write_sums(keys.o_k, a.slope_scale, a.k_parts + row * a.dims, rows, a.dims, lane);
#endif
#if NEEDS_V
    write_sums(keys.o_v, 1, a.v_parts + row * a.value_dims, rows, a.value_dims, lane);
#endif
}

// The coarsest level. A block has KEY_WARPS times 16 keys and one piece of all queries of all heads of a group. Pieces' sums
// lie one behind the other, and `unpool` adds them in order.
extern "C" __global__ void __launch_bounds__(KEY_WARPS * WARP, DENSE_BLOCKS)
key_gradient_dense(const __grid_constant__ Arguments a) {
    const int lane = threadIdx.x % WARP, i_warp = threadIdx.x / WARP;
    const u32 key_groups = (a.length + KEY_WARPS * 16 - 1) / u32(KEY_WARPS * 16);
    const int i_group = blockIdx.x % key_groups, i_piece = blockIdx.x / key_groups % u32(a.pieces);
    const int i_list = blockIdx.x / key_groups / u32(a.pieces);
    const i64 i_batch = i_list / a.kv_heads, i_kv = i_list % a.kv_heads;
    const int first_key = (i_group * KEY_WARPS + i_warp) * 16, group = a.heads / a.kv_heads;
    const int head_tiles = (a.queries + 15) / 16;
    const int first_tile = i_piece * a.tiles_of_piece, end = min(group * head_tiles, first_tile + a.tiles_of_piece);
    Keys keys;
    share_queries(keys, a, i_batch, i_kv, first_key, a.length, first_tile, end, [&](int tile) {
        return Spot{i_kv * group + (group == 1 ? 0 : tile / head_tiles), (group == 1 ? tile : tile % head_tiles) * 16};
    });
    const i64 row = (i64(i_piece) * a.batch * a.kv_heads + i_list) * a.length + first_key;
    write_parts(keys, a, row, a.length - first_key, lane);
}

// A level whose rows of the selection are each of many queries. A block has one piece of the queries of a row and KEY_WARPS
// times 16 keys of those that the row selected, so a tile of queries is read once for as many keys as on the coarsest
// level, and blocks with the same queries follow each other. `gather` adds up what each key has of all rows. On an H100
// (bfloat16, K = 8, b = 16, D = 64, 8 heads), 1,048,576 tokens: 1.8 ms a level and 0.2 of `gather`; lists: 3.8 and 5.5.
extern "C" __global__ void __launch_bounds__(KEY_WARPS * WARP, DENSE_BLOCKS)
key_gradient_rows(const __grid_constant__ Arguments a) {
    const int lane = threadIdx.x % WARP, i_warp = threadIdx.x / WARP;
    const Level& level = a.level[a.i_level];
    const u32 places_of_row = level.columns << a.block_bits, groups = (places_of_row + KEY_WARPS * 16 - 1) / u32(KEY_WARPS * 16);
    const int i_group = blockIdx.x % groups, i_piece = blockIdx.x / groups % u32(a.pieces);
    const u32 i_row = blockIdx.x / groups / u32(a.pieces), row = i_row % u32(a.row_count);
    const int i_list = i_row / u32(a.row_count);
    const i64 i_batch = i_list / a.kv_heads, i_kv = i_list % a.kv_heads;
    const i64 i_head = i_kv * (a.heads / a.kv_heads) + row / u32(a.row_length);
    const i64 first_query = i64(row % u32(a.row_length)) << level.span_bits;
    const int place = (i_group * KEY_WARPS + i_warp) * 16;
    const int* parents = parents_of(level, i_batch, i_head, first_query);
    const int parent = parent_at(level, parents, place, a.block_bits), key = token_of(level, parent, place, a.block_bits);
    const int first_key = max(0, key), end_key = key < 0 ? 0 : min(a.length, first_key + 16);
    if (!__syncthreads_or(key >= 0)) return;   // nobody's parts: the row kept fewer tokens than there are columns
    const int row_tiles = (min(i64(1) << level.span_bits, a.queries - first_query) + 15) / 16;
    const int first_tile = i_piece * a.tiles_of_piece, end = min(row_tiles, first_tile + a.tiles_of_piece);
    Keys keys;
    share_queries(keys, a, i_batch, i_kv, first_key, end_key, first_tile, end,
                  [&](int tile) { return Spot{i_head, int(first_query) + tile * 16}; });
    if (key < 0) return;
    write_parts(keys, a, (i64(i_row) * a.pieces + i_piece) * places_of_row + place, end_key - first_key, lane);
}

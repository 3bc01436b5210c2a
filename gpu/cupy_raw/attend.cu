// Attention of every query to its candidates on every level, in one softmax (spec.md, Attention).
//
// walk.cuh brings the candidates to the queries, tile after tile. A warp holds of its 16 queries the scores of one tile, the
// softmax so far and the sum of values, all in registers.
#include <walk.cuh>

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

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attend(const __grid_constant__ Arguments a) {
    const int lane = threadIdx.x % WARP, i_warp = threadIdx.x / WARP;
    u32 i_list;
    const Queries q =
        queries_of_block(a.queries, a.heads, a.kv_heads, a.dims, a.value_dims, a.block_bits, a.levels, i_list);
    Element* fine = fine_tile(i_warp);
    Element* own_rows = ROWS_IN_REGISTERS ? fine : kept_rows(i_warp, 1);   // [16, PITCH], of queries, then of results

    stage<16, WARP>(own_rows, head_of<const Element>(a.q, q.i_batch, q.i_head), a.q, a.dims, lane,
                    [&](int row) { return row < q.own ? q.own_first + row : -1; });
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

    constexpr int N = FINE_KEYS / 8;
    walk<FINE_KEYS>(q, a.level, coarse_tiles(), fine, [&](const Tile& tile) {
        float s[N][4] = {}, scale = a.scale, log_count = tile.level->log_count;
        add_scores<N>(s, rows, tile.k, lane);
        weigh_odd(s, tile, q, scale, log_count, lane);
        softmax(so_far, s, scale, log_count);
        add_rows<N>(so_far.o, s, tile.v, lane);
    });

    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float sum = so_far.sum[half];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        factor[half] = sum == 0 ? 0 : 1 / sum;   // no candidates: out 0, lse -inf
        const int row = half * 8 + lane / 4;
        if (lane % 4 == 0 && row < q.own)
            a.lse[i64(i_list) * a.queries + q.own_first + row] = sum == 0 ? -INFINITE : (so_far.top[half] + log2f(sum)) * LOG_2;
    }
    write_rows(so_far.o, factor[0], factor[1], own_rows,
               head_of<Element>(a.out, q.i_batch, q.i_head) + q.own_first * a.out.token, a.out, q.own, a.value_dims, lane);
}

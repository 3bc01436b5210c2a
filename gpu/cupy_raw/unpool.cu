// From coarse levels down to the tokens (spec.md, Gradients), and sums of pieces. A thread takes one dim of one token.
#include <numbers.cuh>

constexpr int THREADS = 256;

struct Arguments {
    const float* own;     // the level's own sums, of which there are `pieces`, one behind the other; or null
    const float* above;   // what level l + 1 hands down, (lists, upper_length, dims); or null
    float* total;         // (lists, length, dims)
    i64 lists;
    int pieces, length, upper_length, dims, block_bits;
    float count, last_count;
};

// total_l[j] = own_l[j] / c_l[j] + total_{l+1}[j / b]
extern "C" __global__ void __launch_bounds__(THREADS) unpool(const __grid_constant__ Arguments a) {
    const i64 i = i64(blockIdx.x) * THREADS + threadIdx.x, all = a.lists * a.length * a.dims;
    if (i >= all) return;
    const int dim = i % a.dims, token = i / a.dims % a.length;
    const i64 i_list = i / a.dims / a.length;
    float total = 0;
    if (a.own) {
        for (int piece = 0; piece < a.pieces; piece++) total += a.own[piece * all + i];
        total /= token == a.length - 1 ? a.last_count : a.count;
    }
    if (a.above) total += a.above[(i_list * a.upper_length + (token >> a.block_bits)) * a.dims + dim];
    a.total[i] = total;
}

struct Finish {
    const int* items;     // (lists, parents + 1 in whole fours), the pieces of work before each parent
    const float* parts;   // (lists, 2 spare, b, dims): further pieces, then first ones
    const float* above;   // for level 0, or null
    float* sums;          // of a coarse level, or null: then the result
    Array result;         // (batch, kv_heads, length, dims)
    int kv_heads, lists, parents, spare, length, dims, block_bits;
};

__device__ __forceinline__ void finish_parent(const Finish& a, int i_list, int parent) {
    const int* items = a.items + i64(i_list) * row_of(a.parents + 1);
    const int extras = items[parent] - parent, pieces = items[parent + 1] - items[parent];
    const int first = parent << a.block_bits, keys = min(1 << a.block_bits, a.length - first);
    const i64 size = i64(a.dims) << a.block_bits;
    const float* parts = a.parts + i64(i_list) * 2 * a.spare * size;
    for (int i = threadIdx.x; i < keys * a.dims; i += THREADS) {
        float total = parts[(a.spare + extras) * size + i];
        for (int piece = 1; piece < pieces; piece++) total += parts[(extras + piece - 1) * size + i];
        const int key = first + i / a.dims, dim = i % a.dims;
        if (a.sums) {
            a.sums[(i64(i_list) * a.length + key) * a.dims + dim] = total;
        } else {
            if (a.above) total += a.above[(i64(i_list) * a.parents + parent) * a.dims + dim];
            head_of<Element>(a.result, i_list / a.kv_heads, i_list % a.kv_heads)[key * a.result.token + dim * a.result.dim] =
                to_element(total);
        }
    }
}

constexpr int PARENTS = 32;

// A block takes PARENTS parents. A thread looks at one: are there several pieces? Then all threads add them up, each some dims.
extern "C" __global__ void __launch_bounds__(THREADS) finish(const __grid_constant__ Finish a) {
    __shared__ bool is_cut[PARENTS];
    const u32 first = blockIdx.x * PARENTS, i = first + threadIdx.x, parents = a.parents;
    bool any = false;
    if (threadIdx.x < PARENTS && i < u32(a.lists) * parents) {
        const int* items = a.items + i64(i / parents) * row_of(parents + 1) + i % parents;
        any = items[1] - items[0] > 1;
    }
    if (threadIdx.x < PARENTS) is_cut[threadIdx.x] = any;
    if (!__syncthreads_or(any)) return;
    for (int j = 0; j < PARENTS; j++)
        if (is_cut[j]) finish_parent(a, (first + j) / parents, (first + j) % parents);
}

struct Clear {
    void* data;
    i64 bytes;
};

extern "C" __global__ void __launch_bounds__(THREADS) clear(const __grid_constant__ Clear a) {
    const i64 i = i64(blockIdx.x) * THREADS + threadIdx.x;
    if (i < a.bytes) static_cast<char*>(a.data)[i] = 0;
}

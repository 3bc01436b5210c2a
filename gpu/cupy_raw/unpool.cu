// From coarse levels down to the tokens (spec.md, Gradients), and sums of pieces. A thread takes a few dims of one token.
#include <numbers.cuh>

constexpr int THREADS = 256;

struct Arguments {
    const float* own;     // the level's own sums, of which there are `pieces`, one behind the other; or null
    const float* above;   // what level l + 1 hands down, (lists, upper_length, dims); or null
    float* total;         // (lists, length, dims)
    int rows, pieces, length, upper_length, dims, block_bits;   // rows: lists * length
    int of_block;         // rows of a block, each by dims / 4 threads
    float count, last_count;
};

// total_l[j] = own_l[j] / c_l[j] + total_{l+1}[j / b]
extern "C" __global__ void __launch_bounds__(THREADS) unpool(const __grid_constant__ Arguments a) {
    const u32 of_row = a.dims / 4, row = blockIdx.x * a.of_block + threadIdx.x / of_row, dim = threadIdx.x % of_row * 4;
    if (threadIdx.x >= a.of_block * of_row || row >= u32(a.rows)) return;
    const u32 i_list = row / u32(a.length), token = row % u32(a.length);
    const i64 at = i64(row) * a.dims + dim;
    float4 total = make_float4(0, 0, 0, 0);
    auto add = [&](const float* from) {
        const float4 x = *reinterpret_cast<const float4*>(from);
        total = make_float4(total.x + x.x, total.y + x.y, total.z + x.z, total.w + x.w);
    };
    if (a.own) {
#pragma unroll 8
        for (int piece = 0; piece < a.pieces; piece++) add(a.own + piece * (i64(a.rows) * a.dims) + at);
        const float count = token == a.length - 1 ? a.last_count : a.count;
        total = make_float4(total.x / count, total.y / count, total.z / count, total.w / count);
    }
    if (a.above) add(a.above + (i64(i_list) * a.upper_length + (token >> a.block_bits)) * a.dims + dim);
    *reinterpret_cast<float4*>(a.total + at) = total;
}

struct Finish {
    const int* items;     // (lists, parents + 1 in whole fours), the pieces of work before each parent
    const float* parts;   // (lists, 2 spare, b, dims): further pieces, then first ones
    const float* above;   // for level 0, or null
    float* sums;          // of a coarse level, or null: then the result
    Array result;         // (batch, kv_heads, length, dims)
    int kv_heads, lists, parents, spare, length, dims, block_bits;
    int of_block;         // parents of a block, up to THREADS
};

__device__ __forceinline__ void finish_parent(const Finish& a, int i_list, int parent) {
    const int* items = a.items + i64(i_list) * whole_fours(a.parents + 1);
    const int extras = items[parent] - parent, pieces = items[parent + 1] - items[parent];
    const int first = parent << a.block_bits, keys = min(1 << a.block_bits, a.length - first);
    const i64 size = i64(a.dims) << a.block_bits;
    const float* parts = a.parts + i64(i_list) * 2 * a.spare * size;
    for (int i = threadIdx.x; i < keys * a.dims; i += THREADS) {
        float total = parts[(a.spare + extras) * size + i];
#pragma unroll 4
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

// A block takes `of_block` parents, far from one another, for neighbours are often popular together. A thread looks at one:
// are there several pieces? Then all threads add them up, each some dims.
extern "C" __global__ void __launch_bounds__(THREADS) finish(const __grid_constant__ Finish a) {
    __shared__ bool is_cut[THREADS];
    const u32 parents = a.parents, i = blockIdx.x + threadIdx.x * gridDim.x;
    bool any = false;
    if (threadIdx.x < a.of_block && i < u32(a.lists) * parents) {
        const int* items = a.items + i64(i / parents) * whole_fours(parents + 1) + i % parents;
        any = items[1] - items[0] > 1;
    }
    is_cut[threadIdx.x] = any;
    if (!__syncthreads_or(any)) return;
    for (int j = 0; j < a.of_block; j++)
        if (is_cut[j]) finish_parent(a, (blockIdx.x + j * gridDim.x) / parents, (blockIdx.x + j * gridDim.x) % parents);
}

struct Gather {
    Array selected;       // S_{l+1}, int (batch, heads, row_length, columns)
    const float* parts;   // (lists, rows, pieces, columns, b, dims)
    const float* above;   // what level l + 1 hands down, (lists, parents, dims); or null
    float* total;         // (lists, length, dims)
    int heads, group, row_length, rows, columns, parents, pieces, length, dims, block_bits;   // rows: group * row_length
    float count, last_count;
};

// total_l[j] = own_l[j] / c_l[j] + total_{l+1}[j / b], own_l[j] the sum of the parts of all rows that selected j's parent. A
// block has one parent and THREADS times 4 numbers of its keys. It looks through the rows' entries, THREADS at a time, keeps
// those that name this parent, in order, and each thread adds up its 4 numbers of their parts.
extern "C" __global__ void __launch_bounds__(THREADS) gather(const __grid_constant__ Gather a) {
    constexpr int WARP = 32;
    __shared__ int found[THREADS], counts[THREADS / WARP];
    const int lane = threadIdx.x % WARP, i_warp = threadIdx.x / WARP;
    const u32 of_key = a.dims / 4, of_parent = of_key << a.block_bits, chunks = (of_parent + THREADS - 1) / THREADS;
    const u32 i_chunk = blockIdx.x % chunks, parent = blockIdx.x / chunks % u32(a.parents);
    const int i_list = blockIdx.x / chunks / u32(a.parents);
    const u32 number = i_chunk * THREADS + threadIdx.x, key = number / of_key, dim = number % of_key * 4;
    const int token = (parent << a.block_bits) + key, pairs = a.rows * a.columns;
    const bool is_there = number < of_parent && token < a.length;
    const i64 of_pair = i64(a.dims) << a.block_bits;
    float4 total = make_float4(0, 0, 0, 0);
    auto add = [&](const float* from) {
        const float4 x = *reinterpret_cast<const float4*>(from);
        total = make_float4(total.x + x.x, total.y + x.y, total.z + x.z, total.w + x.w);
    };
    for (int o = 0; o < pairs; o += THREADS) {
        const int pair = o + threadIdx.x, row = pair / a.columns, head = i_list * a.group + row / a.row_length;
        bool is_ours = false;
        if (pair < pairs) {
            const int* entries = head_of<const int>(a.selected, head / a.heads, head % a.heads);
            entries += i64(row % a.row_length) * a.selected.token;
            is_ours = entries[pair % a.columns * a.selected.dim] == int(parent);
        }
        const u32 ours = __ballot_sync(~0u, is_ours);
        __syncthreads();   // all are done with those of before
        if (lane == 0) counts[i_warp] = __popc(ours);
        __syncthreads();
        int start = 0, n = 0;
        for (int w = 0; w < THREADS / WARP; w++) {
            if (w < i_warp) start += counts[w];
            n += counts[w];
        }
        if (is_ours) found[start + __popc(ours & ((1u << lane) - 1))] = pair;
        __syncthreads();
        if (!is_there) continue;
        for (int i = 0; i < n; i++) {
            const int row = found[i] / a.columns, column = found[i] % a.columns;
            const float* part = a.parts + ((i64(i_list) * a.rows + row) * a.pieces * a.columns + column) * of_pair +
                                i64(key) * a.dims + dim;
#pragma unroll 8
            for (int piece = 0; piece < a.pieces; piece++) add(part + piece * a.columns * of_pair);
        }
    }
    if (!is_there) return;
    const float count = token == a.length - 1 ? a.last_count : a.count;
    total = make_float4(total.x / count, total.y / count, total.z / count, total.w / count);
    if (a.above) add(a.above + (i64(i_list) * a.parents + parent) * a.dims + dim);
    *reinterpret_cast<float4*>(a.total + (i64(i_list) * a.length + token) * a.dims + dim) = total;
}

struct Clear {
    void* data;
    i64 bytes;
};

extern "C" __global__ void __launch_bounds__(THREADS) clear(const __grid_constant__ Clear a) {
    const i64 i = i64(blockIdx.x) * THREADS + threadIdx.x;
    if (i < a.bytes) static_cast<char*>(a.data)[i] = 0;
}

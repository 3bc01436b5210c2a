// Means of two levels at a time (spec.md, Pooling).
//
// A block makes all children of one token of the upper level, and then that token: the b tokens of level l + 1 under it,
// each the mean of its b children, for CHUNK dims.
//
//     threads        one piece of dims of one token of level l + 1: adds up its children in ascending order, 16 of them on
//                    their way at once
//     then           one dim of the token of level l + 2: adds up the b sums, which lie in shared memory
//
// So level l is read once for two levels, and what goes on to higher levels are unrounded sums. On an H100, 67 MB of
// bfloat16: 0.037 ms with b known at run time and means written one by one, 0.029 as it stands, 70 % of the memory's rate.
// A call's arrays, up to three, share a launch, the blocks of one behind those of another: 0.079 instead of 0.089 for q, k
// and v, and two launches less on the host, 4 to 5 us each.
#include <numbers.cuh>

constexpr int THREADS = 128;
constexpr int CHUNK = 64;
constexpr int MOST_PARTS = 3;

struct Part {
    Array x;                  // level l: elements, or on higher levels float32 sums
    Array means, upper_means; // levels l + 1 and l + 2; no data where l + 2 is not asked for
    float* upper_sums;        // (batch * heads, upper_length, dims), what the next two levels begin with; or null
    i64 heads;
    int length, means_length, upper_length, dims;
    float count, last_count, upper_count, upper_last_count;
    i64 end;                  // the block after its last one
};

struct Arguments { Part parts[MOST_PARTS]; };

template <class Child> struct alignas(16) Numbers { Child x[PIECE]; };

__device__ __forceinline__ float as_float(Element x) { return to_float(x); }
#if ELEMENT_BYTES == 2
__device__ __forceinline__ float as_float(float x) { return x; }
#endif

template <class Child> __device__ __forceinline__ void pool_two(const Arguments& arguments) {
    __shared__ float sums[BLOCK_SIZE][CHUNK];

    int i_part = 0;
    while (blockIdx.x >= arguments.parts[i_part].end) i_part++;
    const Part& a = arguments.parts[i_part];
    const u32 block = blockIdx.x - (i_part ? arguments.parts[i_part - 1].end : 0);

    const int chunks = (a.dims + CHUNK - 1) / CHUNK;
    const int uppers = (a.means_length + BLOCK_SIZE - 1) / BLOCK_SIZE;
    const int i_chunk = block % chunks, i_upper = block / chunks % uppers;
    const i64 i_list = block / chunks / uppers, i_batch = i_list / a.heads, i_head = i_list % a.heads;
    const int o_dim = i_chunk * CHUNK, dims = min(CHUNK, a.dims - o_dim);
    const int pieces = (dims + PIECE - 1) / PIECE;
    const int tokens = min(BLOCK_SIZE, a.means_length - i_upper * BLOCK_SIZE);
    const Child* x = head_of<const Child>(a.x, i_batch, i_head);

    for (int i = threadIdx.x; i < tokens * pieces; i += THREADS) {
        const int i_token = i / pieces, o = i % pieces * PIECE, token = i_upper * BLOCK_SIZE + i_token;
        const int first = token * BLOCK_SIZE, children = min(BLOCK_SIZE, a.length - first);
        float sum[PIECE] = {};
#pragma unroll 16
        for (int child = 0; child < children; child++) {
            const Child* from = x + i64(first + child) * a.x.token + (o_dim + o) * a.x.dim;
            if (WHOLE) {
                const Numbers<Child> numbers = *reinterpret_cast<const Numbers<Child>*>(from);
#pragma unroll
                for (int d = 0; d < PIECE; d++) sum[d] += as_float(numbers.x[d]);
            } else {
#pragma unroll
                for (int d = 0; d < PIECE; d++)
                    if (o + d < dims) sum[d] += as_float(from[d * a.x.dim]);
            }
        }
        const float count = token == a.means_length - 1 ? a.last_count : a.count;
        Element* to = head_of<Element>(a.means, i_batch, i_head) + i64(token) * a.means.token + (o_dim + o) * a.means.dim;
        if (WHOLE) {
            Piece piece;
#pragma unroll
            for (int d = 0; d < PIECE; d++) piece.x[d] = to_element(sum[d] / count);
            *reinterpret_cast<Piece*>(to) = piece;
        }
#pragma unroll
        for (int d = 0; d < PIECE; d++) {
            if (o + d < dims) {
                if (!WHOLE) to[d * a.means.dim] = to_element(sum[d] / count);
                sums[i_token][o + d] = sum[d];
            }
        }
    }
    if (!a.upper_means.data) return;   // for all threads alike
    __syncthreads();
    for (int d = threadIdx.x; d < dims; d += THREADS) {
        float sum = 0;
        for (int i_token = 0; i_token < tokens; i_token++) sum += sums[i_token][d];
        const float count = i_upper == a.upper_length - 1 ? a.upper_last_count : a.upper_count;
        head_of<Element>(a.upper_means, i_batch, i_head)[i64(i_upper) * a.upper_means.token + (o_dim + d) * a.upper_means.dim] =
            to_element(sum / count);
        if (a.upper_sums) a.upper_sums[(i_list * a.upper_length + i_upper) * a.dims + o_dim + d] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) pool(const __grid_constant__ Arguments a) { pool_two<Element>(a); }
extern "C" __global__ void __launch_bounds__(THREADS) pool_sums(const __grid_constant__ Arguments a) { pool_two<float>(a); }

// The type of the elements, by -DELEMENT_FLOAT16, -DELEMENT_BFLOAT16 or -DELEMENT_FLOAT32. All sums are float32.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef long long i64;
typedef unsigned u32;

#if defined(ELEMENT_BFLOAT16)
typedef __nv_bfloat16 Element;
#define ELEMENT_BYTES 2
__device__ __forceinline__ float to_float(Element x) { return __bfloat162float(x); }
__device__ __forceinline__ Element to_element(float x) { return __float2bfloat16_rn(x); }
#elif defined(ELEMENT_FLOAT16)
typedef __half Element;
#define ELEMENT_BYTES 2
__device__ __forceinline__ float to_float(Element x) { return __half2float(x); }
__device__ __forceinline__ Element to_element(float x) { return __float2half_rn(x); }
#else
typedef float Element;
#define ELEMENT_BYTES 4
__device__ __forceinline__ float to_float(Element x) { return x; }
__device__ __forceinline__ Element to_element(float x) { return x; }
#endif

#define INFINITE __uint_as_float(0x7f800000u)

// 16 bytes, the most that one instruction moves: a PIECE of 8 elements, or of 4 in float32.
constexpr int PIECE = 16 / ELEMENT_BYTES;

struct alignas(16) Piece { Element x[PIECE]; };

#if ELEMENT_BYTES == 2
struct alignas(4) Pair { Element x[2]; };

// Two numbers, each rounded once, as the register that a matrix product takes; the first in the lower half.
__device__ __forceinline__ u32 pack(float a, float b) {
    union { Pair pair; u32 bits; } u;
    u.pair.x[0] = to_element(a);
    u.pair.x[1] = to_element(b);
    return u.bits;
}
#endif

// An argument array (batch, heads, tokens, dims) with its strides in elements. Any strides: a view is read where it lies.
struct Array {
    void* data;
    i64 batch, head, token, dim;
};

// Integers from one row of n to the next, so that every row can be read four at a time.
__device__ __forceinline__ int whole_fours(int n) { return (n + 3) & ~3; }

template <class T> __device__ __forceinline__ T* head_of(const Array& x, i64 i_batch, i64 i_head) {
    return static_cast<T*>(x.data) + i_batch * x.batch + i_head * x.head;
}

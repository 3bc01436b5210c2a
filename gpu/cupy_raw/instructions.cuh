// The few instructions that CUDA C++ has no function for, by name. All of them exist from sm_80 on.
#pragma once
#include <numbers.cuh>

// The block's dynamic shared memory, aligned to 16 bytes.
__device__ __forceinline__ char* shared_memory() {
    extern __shared__ __align__(16) char memory[];
    return memory;
}

__device__ __forceinline__ u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

#if ELEMENT_BYTES == 2
#if defined(ELEMENT_BFLOAT16)
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#else
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#endif

// c[16, 8] += a[16, 16] b[16, 8], by a warp. Thread 4 g + c holds of c[.]: row g, columns 2c and 2c + 1, then row g + 8;
// of a: rows g, g + 8 at 2c, 2c + 1, then both at 2c + 8, 2c + 9; of b: column g at 2c, 2c + 1, then at 2c + 8, 2c + 9.
__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(MMA " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 16-bit elements: lanes 8 i .. 8 i + 7 name the rows of matrix i, each 16 bytes. Of every matrix
// thread 4 g + c receives row g at 2c, 2c + 1; transposed, it receives column g at rows 2c, 2c + 1.
__device__ __forceinline__ void ldmatrix(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_transposed(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
#endif

// 16 bytes from global to shared memory while the thread goes on; zeros where nothing is there.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool is_there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n"
                 :: "r"(shared_address(to)), "l"(from), "r"(is_there ? 16 : 0) : "memory");
}
// Copies since the last commit become a group; wait for all of this thread's groups but the last LEFT.
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;\n" :: "n"(LEFT) : "memory");
}

// Where a row begins, `bytes` apart from one to the next: one instruction, of which the compiler would make four.
__device__ __forceinline__ const Element* row_at(const Element* first, int row, int bytes) {
    const Element* at;
    asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(at) : "r"(row), "r"(bytes), "l"(first));
    return at;
}

// 2**x to 2 units in the last place; 0 for -inf, results below the normal range are 0.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

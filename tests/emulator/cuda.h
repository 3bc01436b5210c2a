// Runs CUDA C++ on the CPU, for tests on machines without a GPU: a block's threads are fibers of one thread, which change
// at barriers and warp-wide calls, in a shuffled order, while some warps sleep for a time, so that warps that no barrier
// holds together fall apart. Blocks run one after another. Included before a kernel's source.
//
// What it finds: wrong results, a barrier that not all threads reach, reads of shared memory before a copy was waited for
// (it holds NaN until then), and races between warps where the order that was drawn shows them. What it does not: anything
// about time, races inside a warp (a vote or a shuffle holds its lanes together like a barrier), addresses out of arrays.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <ucontext.h>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x, y, z; dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {} };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulator __attribute__((visibility("default"))) {  // its state is one for all libraries

constexpr int WARP = 32;
constexpr size_t STACK = 256 * 1024;

struct Copy { void* to; const void* from; int bytes; };

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    bool finished = false;
    const void* waits_for = nullptr;            // the barrier at which it waits
    std::vector<std::vector<Copy>> groups{1};   // asynchronous copies, the last group still open
};

struct Barrier { int arrived = 0, expected = 0; long generation = 0; };

struct Warp { Barrier barrier; uint64_t slot[WARP][8]; };

inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Barrier block_barrier;
inline int block_or = 0;
inline int current = 0;
inline ucontext_t scheduler;
inline std::vector<char> dynamic_shared;
inline std::function<void()> body;

inline void give_way() { swapcontext(&fibers[current].context, &scheduler); }

inline void arrive(Barrier& barrier) {
    const long generation = barrier.generation;
    if (++barrier.arrived == barrier.expected) {
        barrier.arrived = 0;
        barrier.generation++;
    }
    fibers[current].waits_for = &barrier;
    while (barrier.generation == generation) give_way();
    fibers[current].waits_for = nullptr;
}

inline Warp& warp() { return warps[current / WARP]; }
inline int lane() { return current % WARP; }

// Every lane puts down up to 8 words and sees those of the others until all have gone on.
template <class Use> auto together(std::initializer_list<uint64_t> words, Use use) {
    Warp& w = warp();
    std::copy(words.begin(), words.end(), w.slot[lane()]);
    arrive(w.barrier);
    auto result = use(w.slot);
    arrive(w.barrier);
    return result;
}

inline void run_copies(std::vector<Copy>& group) {
    for (const Copy& c : group) {
        memset(c.to, 0, 16);
        if (c.bytes) memcpy(c.to, c.from, c.bytes);
    }
    group.clear();
}

inline void enter() {
    body();
    fibers[current].finished = true;
    give_way();
}

inline void fail(const char* what) {
    fprintf(stderr, "emulator: %s\n", what);
    abort();
}

}  // namespace emulator

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

inline void __syncthreads() { emulator::arrive(emulator::block_barrier); }
inline int __syncthreads_or(int x) {
    emulator::block_or |= x != 0;
    __syncthreads();
    const int result = emulator::block_or;
    __syncthreads();
    emulator::block_or = 0;
    __syncthreads();
    return result;
}
inline void __syncwarp(unsigned = ~0u) { emulator::arrive(emulator::warp().barrier); }

template <class T> T __shfl_sync(unsigned, T x, int from) {
    uint64_t word = 0;
    memcpy(&word, &x, sizeof x);
    return emulator::together({word}, [&](auto& slot) { T y; memcpy(&y, slot[from & 31], sizeof y); return y; });
}
template <class T> T __shfl_xor_sync(unsigned mask, T x, int by) { return __shfl_sync(mask, x, emulator::lane() ^ by); }
template <class T> T __shfl_up_sync(unsigned mask, T x, int by) {
    return __shfl_sync(mask, x, emulator::lane() < by ? emulator::lane() : emulator::lane() - by);
}
inline unsigned __ballot_sync(unsigned, int x) {
    return emulator::together({uint64_t(x != 0)}, [](auto& slot) {
        unsigned bits = 0;
        for (int i = 0; i < 32; i++) bits |= unsigned(slot[i][0]) << i;
        return bits;
    });
}
template <class T> unsigned __match_any_sync(unsigned, T x) {
    return emulator::together({uint64_t(int64_t(x))}, [&](auto& slot) {
        unsigned bits = 0;
        for (int i = 0; i < 32; i++) bits |= unsigned(slot[i][0] == uint64_t(int64_t(x))) << i;
        return bits;
    });
}
inline int __any_sync(unsigned mask, int x) { return __ballot_sync(mask, x) != 0; }
inline int __all_sync(unsigned mask, int x) { return __ballot_sync(mask, x) == ~0u; }
inline unsigned __reduce_add_sync(unsigned, unsigned x) {
    return emulator::together({x}, [](auto& slot) { unsigned s = 0; for (int i = 0; i < 32; i++) s += unsigned(slot[i][0]); return s; });
}
inline unsigned __reduce_max_sync(unsigned, unsigned x) {
    return emulator::together({x}, [](auto& slot) { unsigned s = 0; for (int i = 0; i < 32; i++) s = std::max(s, unsigned(slot[i][0])); return s; });
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
template <class T> T __ldg(const T* p) { return *p; }
inline unsigned __float_as_uint(float x) { unsigned y; memcpy(&y, &x, 4); return y; }
inline float __uint_as_float(unsigned x) { float y; memcpy(&y, &x, 4); return y; }
inline int atomicAdd(int* p, int x) { const int old = *p; *p += x; return old; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
using std::max;
using std::min;

namespace emulator {

// Runs `kernel` for all blocks; a block's dynamic shared memory holds 0xff bytes (NaN) at first.
inline void launch(int blocks, int threads, int shared_bytes, std::function<void()> kernel) {
    static std::mt19937 random(0);
    body = kernel;
    if (threads % WARP) fail("a block is not whole warps");
    blockDim = dim3(threads);
    gridDim = dim3(blocks);
    fibers.resize(threads);
    warps.assign(threads / WARP, Warp());
    std::vector<int> order(threads);
    for (int b = 0; b < blocks; b++) {
        blockIdx.x = b;
        dynamic_shared.assign(shared_bytes + 64, char(0xff));
        block_barrier = Barrier();
        block_barrier.expected = threads;
        for (auto& w : warps) { w.barrier = Barrier(); w.barrier.expected = WARP; }
        for (int t = 0; t < threads; t++) {
            Fiber& f = fibers[t];
            f.finished = false;
            f.waits_for = nullptr;
            f.groups.assign(1, {});
            if (f.stack.empty()) f.stack.resize(STACK);
            getcontext(&f.context);
            f.context.uc_stack.ss_sp = f.stack.data();
            f.context.uc_stack.ss_size = STACK;
            f.context.uc_link = nullptr;
            makecontext(&f.context, enter, 0);
            order[t] = t;
        }
        int left = threads;
        long idle = 0, sweep = 0;
        uint64_t asleep = 0;
        while (left) {
            if (sweep++ % 12 == 0) asleep = (uint64_t(random()) << 32 | random()) & ((uint64_t(random()) << 32) | random());
            std::shuffle(order.begin(), order.end(), random);
            const int before = left;
            long moved = 0;
            for (int t : order) {
                Fiber& f = fibers[t];
                if (f.finished || (asleep >> (t / WARP) & 1)) continue;
                const void* waited = f.waits_for;
                const long generation = waited ? static_cast<const Barrier*>(waited)->generation : 0;
                current = t;
                threadIdx.x = t;
                swapcontext(&scheduler, &f.context);
                if (f.finished) {
                    left--;
                    if (f.groups.size() > 1 || !f.groups[0].empty())
                        for (auto& g : f.groups) run_copies(g);
                }
                moved += f.finished || f.waits_for != waited || !waited ||
                         static_cast<const Barrier*>(waited)->generation != generation;
            }
            idle = (moved || left != before) ? 0 : idle + 1;
            if (idle > 600) fail("some threads wait at a barrier that others do not reach");
        }
    }
}

}  // namespace emulator

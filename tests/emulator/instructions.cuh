// The same functions as gpu/cupy_raw/instructions.cuh, as a warp of the emulator does them.
#pragma once
#include <numbers.cuh>

inline char* shared_memory() { return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(emulator::dynamic_shared.data()) + 15) & ~uintptr_t(15)); }

template <class T> uint64_t as_word(T x) { uint64_t w = 0; memcpy(&w, &x, sizeof x); return w; }

#if ELEMENT_BYTES == 2
inline float half_of(uint64_t word, int i) {
    const uint16_t bits = uint16_t(word >> (16 * i));
    Element e;
    memcpy(&e, &bits, 2);
    return to_float(e);
}

inline void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    struct Four { float x[4]; };
    const int g = emulator::lane() / 4, q = emulator::lane() % 4;
    const Four sum = emulator::together({a[0], a[1], a[2], a[3], b0, b1}, [&](auto& slot) {
        Four s{};
        for (int k = 0; k < 16; k++)
            for (int i = 0; i < 4; i++) {
                const int row = i / 2, column = 2 * q + i % 2;
                const float x = half_of(slot[g * 4 + k % 8 / 2][(k / 8) * 2 + row], k % 2);
                const float y = half_of(slot[column * 4 + k % 8 / 2][4 + k / 8], k % 2);
                s.x[i] += x * y;
            }
        return s;
    });
    for (int i = 0; i < 4; i++) c[i] += sum.x[i];
}

inline void load_matrices(u32 (&r)[4], const void* row, bool transposed) {
    struct Four { u32 x[4]; };
    const int l = emulator::lane();
    if (reinterpret_cast<uintptr_t>(row) % 16) emulator::fail("ldmatrix from an address that is not a multiple of 16");
    const Four got = emulator::together({as_word(row)}, [&](auto& slot) {
        Four f{};
        for (int m = 0; m < 4; m++) {
            uint16_t pair[2];
            for (int i = 0; i < 2; i++) {
                const int r8 = transposed ? 2 * (l % 4) + i : l / 4, c8 = transposed ? l / 4 : 2 * (l % 4) + i;
                const uint16_t* p;
                memcpy(&p, &slot[m * 8 + r8][0], sizeof p);
                pair[i] = p[c8];
            }
            memcpy(&f.x[m], pair, 4);
        }
        return f;
    });
    for (int m = 0; m < 4; m++) r[m] = got.x[m];
}
inline void ldmatrix(u32 (&r)[4], const void* row) { load_matrices(r, row, false); }
inline void ldmatrix_transposed(u32 (&r)[4], const void* row) { load_matrices(r, row, true); }
#endif

inline void copy_async(void* to, const void* from, bool is_there) {
    if (reinterpret_cast<uintptr_t>(to) % 16 || (is_there && reinterpret_cast<uintptr_t>(from) % 16))
        emulator::fail("cp.async with an address that is not a multiple of 16");
    memset(to, 0xff, 16);
    emulator::fibers[emulator::current].groups.back().push_back({to, from, is_there ? 16 : 0});
}
inline void copies_commit() { emulator::fibers[emulator::current].groups.emplace_back(); }
template <int LEFT> void copies_wait() {
    auto& groups = emulator::fibers[emulator::current].groups;
    while (groups.size() > LEFT + 1) {
        emulator::run_copies(groups.front());
        groups.erase(groups.begin());
    }
}
inline const Element* row_at(const Element* first, int row, int bytes) {
    return reinterpret_cast<const Element*>(reinterpret_cast<intptr_t>(first) + i64(row) * bytes);
}
inline float exp2_fast(float x) { return std::exp2(x); }

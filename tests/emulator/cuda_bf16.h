// The bfloat16 of the emulator.
#pragma once
#include <cstdint>
#include <cstring>
struct __nv_bfloat16 { uint16_t bits; };
inline float __bfloat162float(__nv_bfloat16 x) { const uint32_t b = uint32_t(x.bits) << 16; float y; memcpy(&y, &b, 4); return y; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    uint32_t b;
    memcpy(&b, &x, 4);
    if (x != x) return {0x7fc0};
    return {uint16_t((b + 0x7fff + ((b >> 16) & 1)) >> 16)};
}

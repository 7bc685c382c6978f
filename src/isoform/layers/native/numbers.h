// Numbers of 32 and 16 bits, and the exponential, in forms that compilers turn into vector instructions.

#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace {

struct bf16 {
    uint16_t bits;
};

inline float wide(float value) { return value; }
inline float wide(bf16 value) { return std::bit_cast<float>(uint32_t(value.bits) << 16); }

// Round to nearest, ties to even, as torch does; a NaN stays one.
inline uint32_t narrow_bits(float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    return value != value ? 0x7FC0u : (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
}
inline void store(float* place, float value) { *place = value; }
inline void store(bf16* place, float value) { place->bits = uint16_t(narrow_bits(value)); }

// e^x to a relative error of 2e-7; 0 below -87, infinite above 88.7. Branch-free, so that loops become vectors.
inline float exponential(float x) {
    const float bounded = x > 89.0f ? 89.0f : (x < -87.0f ? -87.0f : x);
    const float power = std::floor(bounded * 1.44269504f + 0.5f);
    const float rest = bounded - power * 0.693359375f + power * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * rest + 1.3981999507e-3f;
    p = p * rest + 8.3334519073e-3f;
    p = p * rest + 4.1665795894e-2f;
    p = p * rest + 1.6666665459e-1f;
    p = p * rest + 5.0000001201e-1f;
    p = p * rest * rest + rest + 1.0f;
    // In two factors, as 2^128 is no float.
    const int whole = int(power), half = whole >> 1;
    const float first = std::bit_cast<float>(uint32_t(half + 127) << 23);
    const float second = std::bit_cast<float>(uint32_t(whole - half + 127) << 23);
    return x < -87.0f ? 0.0f : p * first * second;
}

// The largest of `count` numbers, in lanes: compilers do not reorder a maximum by themselves, as NaN forbids it.
template <class T>
inline float largest(const T* numbers, int64_t count) {
    constexpr int64_t LANES = 32;
    float lanes[LANES];
    for (int64_t lane = 0; lane < LANES; lane++) lanes[lane] = -INFINITY;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int64_t lane = 0; lane < LANES; lane++) {
            const float number = wide(numbers[i + lane]);
            lanes[lane] = number > lanes[lane] ? number : lanes[lane];
        }
    for (; i < count; i++) lanes[0] = wide(numbers[i]) > lanes[0] ? wide(numbers[i]) : lanes[0];
    float most = lanes[0];
    for (float lane : lanes) most = lane > most ? lane : most;
    return most;
}

}  // namespace

// Activations of feed-forward layers, in forms that compilers turn into vector instructions.

#pragma once

#include "numbers.h"

namespace {

enum Activation : int32_t { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3, RELU_SQUARED = 4 };

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// Abramowitz & Stegun 7.1.26: an absolute error of 1.5e-7.
inline float normal_share(float x) {
    const float size = std::fabs(x) * 0.70710678f;
    const float t = 1.0f / (1.0f + 0.3275911f * size);
    float p = ((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t;
    p = ((p - 0.284496736f) * t + 0.254829592f) * t;
    const float tail = 0.5f * p * exponential(-size * size);
    return x < 0.0f ? tail : 1.0f - tail;
}

inline float activate(Activation kind, float x) {
    switch (kind) {
        case SILU: return x * sigmoid(x);
        case GELU: return x * normal_share(x);
        // x/2 (1 + tanh(y)) = x sigmoid(2 y)
        case GELU_TANH: return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x));
        case RELU: return x > 0.0f ? x : 0.0f;
        default: return x > 0.0f ? x * x : 0.0f;
    }
}

}  // namespace

// Fused passes over memory for small transformers on a CPU; `kernels.py` compiles and calls them, `fused.py` puts them
// into autograd, and the tests hold each against plain torch.
//
// Every sum over rows is taken in chunks of fixed size, so that the number of threads cannot change a bit.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "activations.h"
#include "numbers.h"

namespace {

constexpr int64_t CHUNK_ROWS = 128;

inline float polynomial(float, float only) { return only; }
template <class... More>
inline float polynomial(float x, float first, More... more) {
    return first + x * polynomial(x, more...);
}

// 1/2 + x p(u) with u = 2 x^2 / bound^2 - 1, which goes from -1 to 1 within the bound; 0 or 1 beyond it.
template <class... Coefficients>
inline float rising(float x, float bound, Coefficients... p) {
    const float inside = 0.5f + x * polynomial(x * x * (2.0f / (bound * bound)) - 1.0f, p...);
    return x > bound ? 1.0f : (x < -bound ? 0.0f : inside);
}

struct Pair {
    float value, slope;
};

// The polynomials below are least-maximum fits; their errors are a thousandth of what rounding to bfloat16 does.
struct Silu {
    static Pair at(float x) {
        const float s = sigmoid(x);
        return {x * s, s * (1.0f + x * (1.0f - s))};
    }
};
struct Gelu {
    static Pair at(float x) {
        // Phi(x), to 4e-6
        const float share = rising(x, 4.5f, 0.156905088f, -0.0771922822f, 0.0546917526f, -0.0401344744f, 0.0283720721f,
                                   -0.018914829f, 0.011157047f, -0.00541325111f, 0.00307920804f, -0.0022591609f,
                                   0.000819344272f);
        // Phi(x) + x phi(x), to 3e-5
        const float slope = rising(x, 4.75f, 0.150162957f, -0.0816625454f, 0.0759113452f, -0.0828626547f, 0.0884096077f,
                                   -0.0891649399f, 0.084419478f, -0.0593140314f, 0.0262469517f, -0.0224417907f,
                                   0.0264097391f, -0.010847342f);
        return {x * share, slope};
    }
};
struct GeluTanh {
    static Pair at(float x) {
        const float share = rising(x, 4.25f, 0.165981995f, -0.0808933718f, 0.0556909454f, -0.0387524885f, 0.0253729409f,
                                   -0.0153434102f, 0.00836416587f, -0.00418159037f, 0.00243165271f, -0.00147699911f,
                                   0.000452152177f);
        const float slope = rising(x, 4.75f, 0.150030952f, -0.081501645f, 0.0765526022f, -0.084692264f, 0.0901866869f,
                                   -0.0903205761f, 0.0839329732f, -0.0522217848f, 0.0161744796f, -0.022839897f,
                                   0.0346793753f, -0.0147177153f);
        return {x * share, slope};
    }
};
// The same to the precision of float32.
struct WideGeluTanh {
    static Pair at(float x) {
        // x/2 (1 + tanh(y)) = x sigmoid(2 y)
        const float s = sigmoid(1.5957691216f * (x + 0.044715f * x * x * x));
        return {x * s, s + x * s * (1.0f - s) * 1.5957691216f * (1.0f + 0.134145f * x * x)};
    }
};

template <class Work>
void over_chunks(int64_t rows, int threads, Work work) {
    const int64_t chunks = (rows + CHUNK_ROWS - 1) / CHUNK_ROWS;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t chunk = 0; chunk < chunks; chunk++)
        work(chunk, chunk * CHUNK_ROWS, std::min(rows, (chunk + 1) * CHUNK_ROWS));
}

// ------------------------------------------------------------------------------------------------------ normalisation

template <class X, class Y>
void norm_forward(const X* x, const float* weight, const float* bias, Y* y, float* mean, float* inverse, int64_t n,
                  int64_t d, float eps, bool centred, int threads) {
    over_chunks(n, threads, [=](int64_t, int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
            const X* in = x + row * d;
            Y* out = y + row * d;
            float middle = 0.0f, squares = 0.0f;
            if (centred) {
                for (int64_t i = 0; i < d; i++) middle += wide(in[i]);
                middle /= float(d);
                mean[row] = middle;
            }
            for (int64_t i = 0; i < d; i++) squares += (wide(in[i]) - middle) * (wide(in[i]) - middle);
            const float scale = 1.0f / std::sqrt(squares / float(d) + eps);
            inverse[row] = scale;
            if (bias)
                for (int64_t i = 0; i < d; i++) store(out + i, (wide(in[i]) - middle) * scale * weight[i] + bias[i]);
            else
                for (int64_t i = 0; i < d; i++) store(out + i, (wide(in[i]) - middle) * scale * weight[i]);
        }
    });
}

// With u = dy w and z = (x - mean) inverse: dx = inverse (u - mean(u) - z mean(u z)), dw = sum dy z, db = sum dy; where
// the mean is not taken out, mean(u) is left out too.
template <class X, class Y>
void norm_backward(const Y* dy, const X* x, const float* weight, const float* mean, const float* inverse, X* dx,
                   float* dweight, float* dbias, int64_t n, int64_t d, bool centred, int threads) {
    const int64_t chunks = (n + CHUNK_ROWS - 1) / CHUNK_ROWS;
    std::vector<float> sums(size_t(chunks * 2 * d), 0.0f);
    float* partial = sums.data();
    over_chunks(n, threads, [=](int64_t chunk, int64_t begin, int64_t end) {
        float* dw = partial + chunk * 2 * d;
        float* db = dw + d;
        for (int64_t row = begin; row < end; row++) {
            const Y* grad = dy + row * d;
            const X* in = x + row * d;
            const float scale = inverse[row], middle = centred ? mean[row] : 0.0f;
            float total = 0.0f, along = 0.0f;
            for (int64_t i = 0; i < d; i++) {
                const float g = wide(grad[i]), z = (wide(in[i]) - middle) * scale;
                total += g * weight[i];
                along += g * weight[i] * z;
                dw[i] += g * z;
                db[i] += g;
            }
            total = centred ? total / float(d) : 0.0f;
            along /= float(d);
            X* out = dx + row * d;
            for (int64_t i = 0; i < d; i++) {
                const float z = (wide(in[i]) - middle) * scale;
                store(out + i, scale * (wide(grad[i]) * weight[i] - total - z * along));
            }
        }
    });
    std::fill(dweight, dweight + d, 0.0f);
    if (dbias) std::fill(dbias, dbias + d, 0.0f);
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const float* dw = partial + chunk * 2 * d;
        for (int64_t i = 0; i < d; i++) dweight[i] += dw[i];
        if (dbias)
            for (int64_t i = 0; i < d; i++) dbias[i] += dw[d + i];
    }
}

// -------------------------------------------------------------------------------------------------------- activations

// act(gate) up, or act(gate) where `up` is absent.
template <class Act, class T>
void gated_forward(const T* gate, const T* up, T* y, int64_t rows, int64_t d, int threads) {
    over_chunks(rows, threads, [=](int64_t, int64_t begin, int64_t end) {
        if (up)
            for (int64_t i = begin * d; i < end * d; i++) store(y + i, Act::at(wide(gate[i])).value * wide(up[i]));
        else
            for (int64_t i = begin * d; i < end * d; i++) store(y + i, Act::at(wide(gate[i])).value);
    });
}

template <class Act, class T>
void gated_backward(const T* dy, const T* gate, const T* up, T* dgate, T* dup, int64_t rows, int64_t d, int threads) {
    over_chunks(rows, threads, [=](int64_t, int64_t begin, int64_t end) {
        if (up)
            for (int64_t i = begin * d; i < end * d; i++) {
                const Pair at = Act::at(wide(gate[i]));
                store(dgate + i, wide(dy[i]) * wide(up[i]) * at.slope);
                store(dup + i, wide(dy[i]) * at.value);
            }
        else
            for (int64_t i = begin * d; i < end * d; i++) store(dgate + i, wide(dy[i]) * Act::at(wide(gate[i])).slope);
    });
}

// ------------------------------------------------------------------------------------------------------------ dropout

// splitmix64's finaliser: `mix64` of `dropout.py`.
inline uint64_t mix64(uint64_t key) {
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9u;
    key = (key ^ (key >> 27)) * 0x94D049BB133111EBu;
    return key ^ (key >> 31);
}

// y = residual + x keep factor, keep being `keep_mask` of `dropout.py`; residual may be absent, and keys: all stays.
template <class X, class Y>
void drop(const X* x, const Y* residual, Y* y, const int64_t* keys, int64_t site, const int32_t* columns, int64_t n,
          int64_t d, int32_t threshold, float factor, int threads) {
    constexpr int64_t PAIRS = 256;
    over_chunks(n, threads, [=](int64_t, int64_t begin, int64_t end) {
        const float stays = factor;  // of this function: loops that read it from the closure do not become vectors
        uint32_t bits[PAIRS];
        int16_t lanes[2 * PAIRS];
        if (!keys) {
            if (residual)
                for (int64_t i = begin * d; i < end * d; i++) store(y + i, wide(residual[i]) + wide(x[i]));
            else
                for (int64_t i = begin * d; i < end * d; i++) store(y + i, wide(x[i]));
            return;
        }
        for (int64_t row = begin; row < end; row++) {
            const uint64_t key = mix64(uint64_t(keys[row]) ^ uint64_t(site));
            const uint32_t low = uint32_t(key), high = uint32_t(key >> 32) | 1u;
            for (int64_t from = 0; from < d; from += 2 * PAIRS) {
                const int64_t width = std::min(2 * PAIRS, d - from);
                const int32_t* column = columns + from / 2;
                for (int64_t pair = 0; pair < (width + 1) / 2; pair++) {
                    uint32_t mixed = (low ^ uint32_t(column[pair])) * high;
                    mixed = (mixed ^ (mixed >> 15)) * 0x7FEB352Du;
                    bits[pair] = mixed ^ (mixed >> 16);
                }
                std::memcpy(lanes, bits, sizeof bits);
                const X* in = x + row * d + from;
                const Y* other = residual ? residual + row * d + from : nullptr;
                Y* out = y + row * d + from;
                // A product and no choice: what is not finite falls out as NaN, as it does in torch.
                if (other)
                    for (int64_t i = 0; i < width; i++)
                        store(out + i, wide(other[i]) + wide(in[i]) * (lanes[i] >= threshold ? stays : 0.0f));
                else
                    for (int64_t i = 0; i < width; i++)
                        store(out + i, wide(in[i]) * (lanes[i] >= threshold ? stays : 0.0f));
            }
        }
    });
}

// -------------------------------------------------------------------------------------------------------- sums of rows

template <class T>
void column_sums(const T* x, float* sums, int64_t n, int64_t d, int threads) {
    const int64_t chunks = (n + CHUNK_ROWS - 1) / CHUNK_ROWS;
    std::vector<float> partial(size_t(chunks * d), 0.0f);
    float* parts = partial.data();
    over_chunks(n, threads, [=](int64_t chunk, int64_t begin, int64_t end) {
        float* sum = parts + chunk * d;
        int64_t row = begin;
        for (; row + 4 <= end; row += 4) {
            const T *a = x + row * d, *b = a + d, *c = b + d, *e = c + d;
            for (int64_t i = 0; i < d; i++) sum[i] += (wide(a[i]) + wide(b[i])) + (wide(c[i]) + wide(e[i]));
        }
        for (; row < end; row++)
            for (int64_t i = 0; i < d; i++) sum[i] += wide(x[row * d + i]);
    });
    std::fill(sums, sums + d, 0.0f);
    for (int64_t chunk = 0; chunk < chunks; chunk++)
        for (int64_t i = 0; i < d; i++) sums[i] += parts[chunk * d + i];
}

// ---------------------------------------------------------------------------------------------------- rotary positions

// In place: the first `heads` of each token's `stride / width` heads, channels i and i + half turned by the angle.
template <class T>
void rotate(T* states, const float* cos, const float* sin, int64_t n, int64_t heads, int64_t stride, int64_t width,
            int64_t half, float sign, int threads) {
    over_chunks(n, threads, [=](int64_t, int64_t begin, int64_t end) {
        for (int64_t token = begin; token < end; token++) {
            const float *c = cos + token * half, *s = sin + token * half;
            for (int64_t head = 0; head < heads; head++) {
                T* first = states + token * stride + head * width;
                T* second = first + half;
#pragma omp simd
                for (int64_t i = 0; i < half; i++) {
                    const float a = wide(first[i]), b = wide(second[i]), turn = sign * s[i];
                    store(first + i, a * c[i] - b * turn);
                    store(second + i, b * c[i] + a * turn);
                }
            }
        }
    });
}

// ------------------------------------------------------------------------------------------------------ cross-entropy

template <class T>
void nats_forward(const T* logits, const int64_t* targets, float* losses, float* log_sums, int64_t m, int64_t v,
                  int64_t ignore, int threads) {
    over_chunks(m, threads, [=](int64_t, int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
            const T* in = logits + row * v;
            const float most = largest(in, v);
            float sum = 0.0f;
            for (int64_t i = 0; i < v; i++) sum += exponential(wide(in[i]) - most);
            log_sums[row] = most + std::log(sum);
            losses[row] = targets[row] == ignore ? 0.0f : log_sums[row] - wide(in[targets[row]]);
        }
    });
}

// dlogits = grad (softmax - one-hot of the target), zero where nothing is asked.
template <class T>
void nats_backward(const float* grad, const T* logits, const int64_t* targets, const float* log_sums, T* dlogits,
                   int64_t m, int64_t v, int64_t ignore, int threads) {
    over_chunks(m, threads, [=](int64_t, int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
            const T* in = logits + row * v;
            T* out = dlogits + row * v;
            const bool asked = targets[row] != ignore;
            const float scale = asked ? grad[row] : 0.0f, log_sum = log_sums[row];
            const float gold = asked ? exponential(wide(in[targets[row]]) - log_sum) - 1.0f : 0.0f;
            for (int64_t i = 0; i < v; i++) store(out + i, scale * exponential(wide(in[i]) - log_sum));
            if (asked) store(out + targets[row], scale * gold);
        }
    });
}

}  // namespace

// ------------------------------------------------------------------------------------------- what `kernels.py` can call

#define NORM_FORWARD(NAME, X, Y)                                                                                    \
    extern "C" void NAME(const X* x, const float* weight, const float* bias, Y* y, float* mean, float* inverse,      \
                         int64_t n, int64_t d, float eps, int centred, int threads) {                                \
        norm_forward(x, weight, bias, y, mean, inverse, n, d, eps, centred != 0, threads);                           \
    }
NORM_FORWARD(norm_forward_f32_f32, float, float)
NORM_FORWARD(norm_forward_f32_bf16, float, bf16)
NORM_FORWARD(norm_forward_bf16_bf16, bf16, bf16)
NORM_FORWARD(norm_forward_bf16_f32, bf16, float)

#define NORM_BACKWARD(NAME, X, Y)                                                                                   \
    extern "C" void NAME(const Y* dy, const X* x, const float* weight, const float* mean, const float* inverse,      \
                         X* dx, float* dweight, float* dbias, int64_t n, int64_t d, int centred, int threads) {      \
        norm_backward(dy, x, weight, mean, inverse, dx, dweight, dbias, n, d, centred != 0, threads);                \
    }
NORM_BACKWARD(norm_backward_f32_f32, float, float)
NORM_BACKWARD(norm_backward_f32_bf16, float, bf16)
NORM_BACKWARD(norm_backward_bf16_bf16, bf16, bf16)
NORM_BACKWARD(norm_backward_bf16_f32, bf16, float)

#define GATED(NAME, SUFFIX, ACT, T)                                                                                 \
    extern "C" void NAME##_##SUFFIX(const T* gate, const T* up, T* y, int64_t rows, int64_t d, int threads) {        \
        gated_forward<ACT>(gate, up, y, rows, d, threads);                                                           \
    }                                                                                                                \
    extern "C" void NAME##_backward_##SUFFIX(const T* dy, const T* gate, const T* up, T* dgate, T* dup,              \
                                             int64_t rows, int64_t d, int threads) {                                 \
        gated_backward<ACT>(dy, gate, up, dgate, dup, rows, d, threads);                                             \
    }
GATED(silu, bf16, Silu, bf16)
GATED(gelu, bf16, Gelu, bf16)
GATED(gelu_tanh, bf16, GeluTanh, bf16)
GATED(gelu_tanh, f32, WideGeluTanh, float)

#define DROP(NAME, X, Y)                                                                                            \
    extern "C" void NAME(const X* x, const Y* residual, Y* y, const int64_t* keys, int64_t site,                     \
                         const int32_t* columns, int64_t n, int64_t d, int32_t threshold, float factor,              \
                         int threads) {                                                                              \
        drop(x, residual, y, keys, site, columns, n, d, threshold, factor, threads);                                 \
    }
DROP(drop_f32_f32, float, float)
DROP(drop_f32_bf16, float, bf16)
DROP(drop_bf16_f32, bf16, float)
DROP(drop_bf16_bf16, bf16, bf16)

#define BY_TYPE(T, SUFFIX)                                                                                          \
    extern "C" void rotate_##SUFFIX(T* states, const float* cos, const float* sin, int64_t n, int64_t heads,         \
                                    int64_t stride, int64_t width, int64_t half, float sign, int threads) {          \
        rotate(states, cos, sin, n, heads, stride, width, half, sign, threads);                                      \
    }                                                                                                                \
    extern "C" void column_sums_##SUFFIX(const T* x, float* sums, int64_t n, int64_t d, int threads) {               \
        column_sums(x, sums, n, d, threads);                                                                         \
    }                                                                                                                \
    extern "C" void nats_forward_##SUFFIX(const T* logits, const int64_t* targets, float* losses, float* log_sums,   \
                                          int64_t m, int64_t v, int64_t ignore, int threads) {                       \
        nats_forward(logits, targets, losses, log_sums, m, v, ignore, threads);                                      \
    }                                                                                                                \
    extern "C" void nats_backward_##SUFFIX(const float* grad, const T* logits, const int64_t* targets,               \
                                           const float* log_sums, T* dlogits, int64_t m, int64_t v, int64_t ignore,  \
                                           int threads) {                                                            \
        nats_backward(grad, logits, targets, log_sums, dlogits, m, v, ignore, threads);                              \
    }
BY_TYPE(float, f32)
BY_TYPE(bf16, bf16)

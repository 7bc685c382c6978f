// Attention of ragged batches with Intel's matrix tiles (AMX): forward and backward in bfloat16 with float32 sums.
//
// One (sequence, key/value head) at a time, 32 queries at a time: their scores with all keys that they may see stay in
// the cache, and nothing of size (t, s) is ever written to memory. The backward pass makes the weights again from the
// logarithm of each row's sum (Dao et al. 2022).
//
// A product takes its left matrix row by row and its right one in pairs of rows, interleaved ("paired" below).

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define HAS_TILES 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#define HAS_TILES 0
#endif

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "numbers.h"

namespace {

constexpr int64_t BLOCK = 32;  // queries at a time, and what lengths are rounded up to

inline int64_t rounded(int64_t length) { return (length + BLOCK - 1) / BLOCK * BLOCK; }

// Who sees whom in one sequence: query i, which stands at key i + offset, sees keys [from(i), to(i)).
struct Sight {
    int64_t t, s, window, prefix;
    bool causal;
    int64_t offset() const { return s - t; }
    int64_t from(int64_t i) const {
        if (window < 0) return 0;
        return std::clamp<int64_t>(i + offset() - (causal ? window - 1 : window / 2), 0, s);
    }
    int64_t to(int64_t i) const {
        int64_t end = s;
        if (causal) end = std::max(i + offset() + 1, i + offset() < prefix ? prefix : 0);
        else if (window >= 0) end = i + offset() + window / 2 + 1;
        return std::clamp<int64_t>(end, 0, s);
    }
    // The queries of a block from i on: the last one, and the keys [begin, begin + seen) among which all that they see
    // are, in multiples of the block's size.
    struct Extent {
        int64_t last, begin, seen;
    };
    Extent block(int64_t i) const {
        const int64_t last = std::min(i + BLOCK, t) - 1, begin = std::min(from(i) / BLOCK * BLOCK, rounded(s) - BLOCK);
        return {last, begin, std::max(rounded(to(last)) - begin, BLOCK)};
    }
};

// Which weights fall out; see `layers/dropout.py`, `keep_mask`.
struct Drop {
    const int64_t* keys;       // (n, h), or null: none falls out
    const int32_t* columns;    // the hash of each pair of columns
    int32_t threshold;         // an int16 lane below it falls out
    float factor;
};

struct Call {
    const bf16 *query, *key, *value;
    int64_t query_stride, key_stride, value_stride;  // elements from a token to the next
    const int64_t *query_starts, *key_starts;        // (b + 1)
    const int64_t* prefixes;                         // (b) or null
    const float* slopes;                             // (h) or null
    int64_t num_sequences, heads, groups, width, window;
    bool causal;
    float scale;
    Drop drop;
    int threads;

    Sight sight(int64_t row) const {
        return {query_starts[row + 1] - query_starts[row], key_starts[row + 1] - key_starts[row], window,
                prefixes ? prefixes[row] : 0, causal};
    }
};

// ------------------------------------------------------------------------------------------------ layouts of matrices

// One head of a sequence's rows, which begin at `first`, with zeros below and to the right up to whole blocks.
void read_head(const bf16* states, int64_t stride, int64_t first, int64_t head, int64_t rows, int64_t width, bf16* out) {
    const bf16* in = states + first * stride + head * width;
    const int64_t columns = rounded(width);
    const size_t bytes = size_t(width) * sizeof(bf16);
    for (int64_t r = 0; r < rows; r++) {
        std::memcpy(out + r * columns, in + r * stride, bytes);
        std::memset(out + r * columns + width, 0, size_t(columns) * sizeof(bf16) - bytes);
    }
    std::memset(out + rows * columns, 0, size_t((rounded(rows) - rows) * columns) * sizeof(bf16));
}

// (rows, columns) -> (columns, rows)
void transpose(const bf16* in, int64_t rows, int64_t columns, bf16* out) {
    for (int64_t r = 0; r < rows; r += 16)
        for (int64_t c = 0; c < columns; c++)
            for (int64_t i = 0; i < 16; i++) out[c * rows + r + i] = in[(r + i) * columns + c];
}

// (rows, columns) -> paired (rows / 2, columns, 2)
void pair_rows(const bf16* in, int64_t rows, int64_t columns, uint32_t* out) {
    for (int64_t r = 0; r < rows; r += 2) {
        const bf16 *even = in + r * columns, *odd = even + columns;
        uint32_t* place = out + r / 2 * columns;
        for (int64_t c = 0; c < columns; c++) place[c] = uint32_t(even[c].bits) | uint32_t(odd[c].bits) << 16;
    }
}

// (rows, columns) -> the transposed matrix, paired: (columns / 2, rows, 2). Two columns of a row are one word already.
void pair_columns(const bf16* in, int64_t rows, int64_t columns, uint32_t* out) {
    for (int64_t r = 0; r < rows; r += 16)
        for (int64_t c = 0; c < columns / 2; c++)
            for (int64_t i = 0; i < 16; i++) std::memcpy(out + c * rows + r + i, in + (r + i) * columns + 2 * c, 4);
}

#if HAS_TILES

// ---------------------------------------------------------------------------------------------------------- the tiles

// The tiles of this thread, set up for 16 x 16 products; the setting that was there before comes back at the end.
class Tiles {
public:
    Tiles() {
        _tile_storeconfig(&before_);
        alignas(64) unsigned char config[64] = {};
        config[0] = 1;
        for (int tile = 0; tile < 8; tile++) {
            config[16 + 2 * tile] = 64;  // bytes of a row
            config[48 + tile] = 16;      // rows
        }
        _tile_loadconfig(config);
    }
    ~Tiles() {
        if (before_[0])
            _tile_loadconfig(&before_);
        else
            _tile_release();
    }

private:
    alignas(64) unsigned char before_[64] = {};
};

// c (m, n) = or += a (m, k) times b, b paired (k / 2, n): m, n and k multiples of 32; strides in elements.
void product(const bf16* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, float* c, int64_t c_stride,
             int64_t m, int64_t n, int64_t k, bool add) {
    for (int64_t i = 0; i < m; i += 32)
        for (int64_t j = 0; j < n; j += 32) {
            float* out = c + i * c_stride + j;
            if (add) {
                _tile_loadd(0, out, c_stride * 4);
                _tile_loadd(1, out + 16, c_stride * 4);
                _tile_loadd(2, out + 16 * c_stride, c_stride * 4);
                _tile_loadd(3, out + 16 * c_stride + 16, c_stride * 4);
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
            for (int64_t p = 0; p < k; p += 32) {
                _tile_loadd(4, a + i * a_stride + p, a_stride * 2);
                _tile_loadd(5, a + (i + 16) * a_stride + p, a_stride * 2);
                _tile_loadd(6, b + p / 2 * b_stride + j, b_stride * 4);
                _tile_loadd(7, b + p / 2 * b_stride + j + 16, b_stride * 4);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, out, c_stride * 4);
            _tile_stored(1, out + 16, c_stride * 4);
            _tile_stored(2, out + 16 * c_stride, c_stride * 4);
            _tile_stored(3, out + 16 * c_stride + 16, c_stride * 4);
        }
}

// ------------------------------------------------------------------------------------------------------ scores of a row

// What a query sees: scores become scale score - slope distance, and what it does not see is left as it is. Returns the
// scale that is left to do: without a slope, all of it.
inline float lean(float* row, int64_t from, int64_t to, float scale, float slope, int64_t here) {
    if (slope == 0.0f) return scale;
    for (int64_t j = from; j < to; j++) row[j] = row[j] * scale - slope * std::fabs(float(here - j));
    return 1.0f;
}

// Scores become exp(scale score - shift) where the query sees, 0 elsewhere; returns their sum.
inline float weigh(float* row, int64_t from, int64_t to, int64_t end, float scale, float shift) {
    float sum = 0.0f;
    std::fill(row, row + from, 0.0f);
    for (int64_t j = from; j < to; j++) {
        row[j] = exponential(row[j] * scale - shift);
        sum += row[j];
    }
    std::fill(row + to, row + end, 0.0f);
    return sum;
}

// What each weight of a row is multiplied with: 0 or the factor. `places`: s rounded up to an even number.
inline void kept(const Drop& drop, int64_t key, float* out, int64_t columns) {
    const uint32_t low = uint32_t(key), high = uint32_t(uint64_t(key) >> 32) | 1u;
    for (int64_t pair = 0; pair < columns / 2; pair++) {
        uint32_t bits = (low ^ uint32_t(drop.columns[pair])) * high;
        bits ^= bits >> 15 & 0x1FFFFu;
        bits *= 0x7FEB352Du;
        bits ^= bits >> 16 & 0xFFFFu;
        out[2 * pair] = int32_t(int16_t(bits & 0xFFFFu)) >= drop.threshold ? drop.factor : 0.0f;
        out[2 * pair + 1] = int32_t(int16_t(bits >> 16)) >= drop.threshold ? drop.factor : 0.0f;
    }
}

// ------------------------------------------------------------------------------------------------------------- forward

void forward(const Call& call, bf16* output, float* log_sums) {
    const int64_t width = call.width, k = rounded(width), per_group = call.heads / call.groups;
#pragma omp parallel num_threads(call.threads) if (call.threads > 1)
    {
        Tiles tiles;
        std::vector<bf16> queries, keys, values, weights;
        std::vector<uint32_t> keys_paired, values_paired;
        std::vector<float> scores, mixed, keeps;
        float shares[BLOCK];
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < call.num_sequences * call.groups; task++) {
            const int64_t row = task / call.groups, group = task % call.groups;
            const Sight sight = call.sight(row);
            const int64_t T = rounded(sight.t), S = rounded(sight.s);
            queries.resize(size_t(T * k));
            keys.resize(size_t(S * k));
            values.resize(size_t(S * k));
            keys_paired.resize(size_t(S * k / 2));
            values_paired.resize(size_t(S * k / 2));
            scores.resize(size_t(BLOCK * S));
            weights.resize(size_t(BLOCK * S));
            mixed.resize(size_t(BLOCK * k));
            keeps.resize(size_t(S));
            const int64_t first_key = call.key_starts[row], first_query = call.query_starts[row];
            read_head(call.key, call.key_stride, first_key, group, sight.s, width, keys.data());
            read_head(call.value, call.value_stride, first_key, group, sight.s, width, values.data());
            pair_columns(keys.data(), S, k, keys_paired.data());
            pair_rows(values.data(), S, k, values_paired.data());
            for (int64_t head = group * per_group; head < (group + 1) * per_group; head++) {
                const float slope = call.slopes ? call.slopes[head] : 0.0f;
                read_head(call.query, call.query_stride, first_query, head, sight.t, width, queries.data());
                for (int64_t i = 0; i < T; i += BLOCK) {
                    const auto [last, begin, seen] = sight.block(i);
                    product(queries.data() + i * k, k, keys_paired.data() + begin, S, scores.data(), seen, BLOCK, seen,
                            k, false);
                    for (int64_t r = 0; r < BLOCK; r++) {
                        float* line = scores.data() + r * seen;
                        bf16* out = weights.data() + r * seen;
                        if (i + r > last) {
                            std::memset(out, 0, size_t(seen) * sizeof(bf16));
                            continue;
                        }
                        const int64_t token = first_query + i + r, here = i + r + sight.offset() - begin;
                        const int64_t from = sight.from(i + r) - begin, to = sight.to(i + r) - begin;
                        const float scale = lean(line, from, to, call.scale, slope, here);
                        const float most = from < to ? largest(line + from, to - from) * scale : 0.0f;
                        const float sum = weigh(line, from, to, seen, scale, most);
                        log_sums[token * call.heads + head] = most + std::log(sum);
                        shares[r] = sum > 0.0f ? 1.0f / sum : 0.0f;
                        if (call.drop.keys) {
                            kept(call.drop, call.drop.keys[token * call.heads + head], keeps.data(), S);
                            const float* keep = keeps.data() + begin;
#pragma omp simd
                            for (int64_t j = 0; j < seen; j++) store(out + j, line[j] * keep[j]);
                        } else {
                            for (int64_t j = 0; j < seen; j++) store(out + j, line[j]);
                        }
                    }
                    product(weights.data(), seen, values_paired.data() + begin / 2 * k, k, mixed.data(), k, BLOCK, k,
                            seen, false);
                    for (int64_t r = 0; r <= last - i; r++) {
                        bf16* out = output + ((first_query + i + r) * call.heads + head) * width;
                        for (int64_t c = 0; c < width; c++) store(out + c, mixed[size_t(r * k + c)] * shares[r]);
                    }
                }
            }
        }
    }
}

// ------------------------------------------------------------------------------------------------------------ backward

// With P the weights, kept or not: dV = P^T dO, dS = P (dO V^T - sum(dO O)), dQ = scale dS K, dK = scale dS^T Q.
void backward(const Call& call, const bf16* output, const float* log_sums, const bf16* grad, bf16* dquery, bf16* dkey,
              bf16* dvalue, int64_t dquery_stride, int64_t dkey_stride, int64_t dvalue_stride) {
    const int64_t width = call.width, k = rounded(width), per_group = call.heads / call.groups;
#pragma omp parallel num_threads(call.threads) if (call.threads > 1)
    {
        Tiles tiles;
        std::vector<bf16> queries, queries_turned, grads, grads_turned, keys, values, dscores;
        std::vector<uint32_t> keys_paired, keys_turned, values_turned, weights_paired, dscores_paired;
        std::vector<float> scores, dweights, mixed, dkeys, dvalues, keeps;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < call.num_sequences * call.groups; task++) {
            const int64_t row = task / call.groups, group = task % call.groups;
            const Sight sight = call.sight(row);
            const int64_t T = rounded(sight.t), S = rounded(sight.s);
            for (auto* one : {&queries, &queries_turned, &grads, &grads_turned}) one->resize(size_t(T * k));
            for (auto* one : {&keys, &values}) one->resize(size_t(S * k));
            for (auto* one : {&keys_paired, &keys_turned, &values_turned}) one->resize(size_t(S * k / 2));
            for (auto* one : {&weights_paired, &dscores_paired}) one->resize(size_t(BLOCK * S / 2));
            for (auto* one : {&scores, &dweights}) one->resize(size_t(BLOCK * S));
            dscores.resize(size_t(BLOCK * S));
            mixed.resize(size_t(BLOCK * k));
            keeps.resize(size_t(2 * S));
            dkeys.assign(size_t(k * S), 0.0f);  // transposed: (k, S)
            dvalues.assign(size_t(k * S), 0.0f);
            const int64_t first_key = call.key_starts[row], first_query = call.query_starts[row];
            read_head(call.key, call.key_stride, first_key, group, sight.s, width, keys.data());
            read_head(call.value, call.value_stride, first_key, group, sight.s, width, values.data());
            pair_rows(keys.data(), S, k, keys_paired.data());
            pair_columns(keys.data(), S, k, keys_turned.data());
            pair_columns(values.data(), S, k, values_turned.data());
            for (int64_t head = group * per_group; head < (group + 1) * per_group; head++) {
                const float slope = call.slopes ? call.slopes[head] : 0.0f;
                read_head(call.query, call.query_stride, first_query, head, sight.t, width, queries.data());
                read_head(grad, call.heads * width, first_query, head, sight.t, width, grads.data());
                transpose(queries.data(), T, k, queries_turned.data());
                transpose(grads.data(), T, k, grads_turned.data());
                for (int64_t i = 0; i < T; i += BLOCK) {
                    const auto [last, begin, seen] = sight.block(i);
                    product(queries.data() + i * k, k, keys_turned.data() + begin, S, scores.data(), seen, BLOCK, seen,
                            k, false);
                    product(grads.data() + i * k, k, values_turned.data() + begin, S, dweights.data(), seen, BLOCK,
                            seen, k, false);
                    for (int64_t r = 0; r < BLOCK; r++) {
                        float* line = scores.data() + r * seen;
                        const float* dline = dweights.data() + r * seen;
                        if (i + r > last) {
                            std::fill(line, line + seen, 0.0f);
                            std::memset(dscores.data() + r * seen, 0, size_t(seen) * sizeof(bf16));
                            continue;
                        }
                        const int64_t token = first_query + i + r, here = i + r + sight.offset() - begin;
                        const bf16 *o = output + (token * call.heads + head) * width, *g = grads.data() + (i + r) * k;
                        float delta = 0.0f;
                        for (int64_t c = 0; c < width; c++) delta += wide(o[c]) * wide(g[c]);
                        const int64_t from = sight.from(i + r) - begin, to = sight.to(i + r) - begin;
                        const float scale = lean(line, from, to, call.scale, slope, here);
                        weigh(line, from, to, seen, scale, log_sums[token * call.heads + head]);
                        bf16* out = dscores.data() + r * seen;
                        if (call.drop.keys) {
                            kept(call.drop, call.drop.keys[token * call.heads + head], keeps.data(), S);
                            const float* keep = keeps.data() + begin;
#pragma omp simd
                            for (int64_t j = 0; j < seen; j++) {
                                store(out + j, line[j] * (dline[j] * keep[j] - delta) * call.scale);
                                line[j] *= keep[j];
                            }
                        } else {
#pragma omp simd
                            for (int64_t j = 0; j < seen; j++) store(out + j, line[j] * (dline[j] - delta) * call.scale);
                        }
                    }
                    for (int64_t r = 0; r < BLOCK; r += 2) {
                        const float *even = scores.data() + r * seen, *odd = even + seen;
                        uint32_t* out = weights_paired.data() + r / 2 * seen;
                        for (int64_t j = 0; j < seen; j++) out[j] = narrow_bits(even[j]) | narrow_bits(odd[j]) << 16;
                    }
                    pair_rows(dscores.data(), BLOCK, seen, dscores_paired.data());
                    product(dscores.data(), seen, keys_paired.data() + begin / 2 * k, k, mixed.data(), k, BLOCK, k, seen,
                            false);
                    product(grads_turned.data() + i, T, weights_paired.data(), seen, dvalues.data() + begin, S, k, seen,
                            BLOCK, true);
                    product(queries_turned.data() + i, T, dscores_paired.data(), seen, dkeys.data() + begin, S, k, seen,
                            BLOCK, true);
                    for (int64_t r = 0; r <= last - i; r++) {
                        bf16* out = dquery + (first_query + i + r) * dquery_stride + head * width;
                        for (int64_t c = 0; c < width; c++) store(out + c, mixed[size_t(r * k + c)]);
                    }
                }
            }
            for (int64_t j = 0; j < sight.s; j++) {
                bf16* dk = dkey + (first_key + j) * dkey_stride + group * width;
                bf16* dv = dvalue + (first_key + j) * dvalue_stride + group * width;
                for (int64_t c = 0; c < width; c++) {
                    store(dk + c, dkeys[size_t(c * S + j)]);
                    store(dv + c, dvalues[size_t(c * S + j)]);
                }
            }
        }
    }
}

#endif

}  // namespace

// Asks the system for the tiles; whether they are there.
extern "C" int has_tiles() {
#if HAS_TILES
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return 0;
#endif
}

#if HAS_TILES

extern "C" void attention_forward(const Call* call, bf16* output, float* log_sums) { forward(*call, output, log_sums); }

extern "C" void attention_backward(const Call* call, const bf16* output, const float* log_sums, const bf16* grad,
                                   bf16* dquery, bf16* dkey, bf16* dvalue, int64_t dquery_stride, int64_t dkey_stride,
                                   int64_t dvalue_stride) {
    backward(*call, output, log_sums, grad, dquery, dkey, dvalue, dquery_stride, dkey_stride, dvalue_stride);
}

#endif

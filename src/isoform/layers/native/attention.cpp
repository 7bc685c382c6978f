// Attention of ragged batches on matrix tiles: forward and backward in bfloat16 with float32 sums.
//
// One (sequence, key/value head) at a time, 32 queries at a time: their scores with all keys that they may see stay in
// the cache, and nothing of size (t, s) is ever written to memory. The backward pass makes the weights again from the
// logarithm of each row's sum (Dao et al. 2022).

#include "tiles.h"

#if HAS_TILES

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace {

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

    // Of 32 columns, from an even one on, those that stay.
    __mmask32 kept(int64_t key, int64_t column) const {
        const __m512i low = _mm512_set1_epi32(int32_t(key)), high = _mm512_set1_epi32(int32_t(key >> 32) | 1);
        __m512i bits = _mm512_xor_si512(low, _mm512_loadu_si512(columns + column / 2));
        bits = _mm512_mullo_epi32(bits, high);
        bits = _mm512_xor_si512(bits, _mm512_srli_epi32(bits, 15));
        bits = _mm512_mullo_epi32(bits, _mm512_set1_epi32(0x7FEB352D));
        bits = _mm512_xor_si512(bits, _mm512_srli_epi32(bits, 16));
        return _mm512_cmpge_epi16_mask(bits, _mm512_set1_epi16(int16_t(threshold)));
    }
};

struct Call {
    const bf16 *query, *key, *value;
    int64_t query_stride, key_stride, value_stride;  // elements from a token to the next
    const int64_t *query_starts, *key_starts;        // (b + 1)
    const int64_t* prefixes;                         // (b) or null
    const float* lean;                               // (h, 2 reach + 1) or null: what is added to a score; see Row
    int64_t reach;
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

// One query's scores with the keys [begin, begin + seen), of which it sees [from, to), counted from `begin`. Column
// reach + j - i of `lean` belongs to key j and query i.
struct Row {
    int64_t token, from, to;
    int64_t lean;  // place in a head's line of leans that belongs to column 0
    int64_t key;   // of its dropout

    Row(const Call& call, const Sight& sight, int64_t head, int64_t first_query, int64_t i, int64_t begin)
        : token(first_query + i),
          from(sight.from(i) - begin),
          to(sight.to(i) - begin),
          lean(head * (2 * call.reach + 1) + call.reach + begin - i - sight.offset()),
          key(call.drop.keys ? call.drop.keys[token * call.heads + head] : 0) {}

    __mmask16 sees(int64_t j) const { return first_16(to - j) & __mmask16(~first_16(from - j)); }

    // Scaled scores of columns j to j + 16.
    __m512 scores(const Call& call, const float* products, int64_t j, __mmask16 seen) const {
        const __m512 scale = _mm512_set1_ps(call.scale), raw = _mm512_loadu_ps(products + j);
        if (!call.lean) return _mm512_mul_ps(raw, scale);
        return _mm512_fmadd_ps(raw, scale, _mm512_maskz_loadu_ps(seen, call.lean + lean + j));
    }
};

// ------------------------------------------------------------------------------------------------------------- forward

// The weights of a row, without their common share, which is returned; `log_sum` is that of the row.
float weigh(const Call& call, const Row& row, const float* products, int64_t begin, int64_t seen, bf16* weights,
            float* log_sum) {
    const int64_t from = row.from / 16 * 16;
    const __m512 nothing = _mm512_set1_ps(-INFINITY);
    __m512 most_of = nothing;
    for (int64_t j = from; j < row.to; j += 16) {
        const __mmask16 sees = row.sees(j);
        most_of = _mm512_mask_max_ps(most_of, sees, most_of, row.scores(call, products, j, sees));
    }
    const float most = row.from < row.to ? _mm512_reduce_max_ps(most_of) : 0.0f;
    const __m512 shift = _mm512_set1_ps(most), factor = _mm512_set1_ps(call.drop.factor);
    __m512 sums = _mm512_setzero_ps();
    std::memset(weights, 0, size_t(from) * sizeof(bf16));
    int64_t j = from;
    __mmask32 kept = 0xFFFFFFFFu;
    if (call.drop.keys && j % 32) kept = call.drop.kept(row.key, begin + j - 16) >> 16;
    for (; j < row.to; j += 16) {
        const __mmask16 sees = row.sees(j);
        __m512 weight = exponential(_mm512_sub_ps(row.scores(call, products, j, sees), shift));
        weight = _mm512_maskz_mov_ps(sees, weight);
        sums = _mm512_add_ps(sums, weight);
        if (call.drop.keys) {
            if (j % 32 == 0) kept = call.drop.kept(row.key, begin + j);
            weight = _mm512_maskz_mul_ps(__mmask16(kept), weight, factor);
            kept >>= 16;
        }
        _mm256_storeu_si256((__m256i*)(weights + j), (__m256i)_mm512_cvtneps_pbh(weight));
    }
    std::memset(weights + j, 0, size_t(seen - j) * sizeof(bf16));
    const float sum = _mm512_reduce_add_ps(sums);
    *log_sum = most + std::log(sum);
    return sum > 0.0f ? 1.0f / sum : 0.0f;
}

void forward(const Call& call, bf16* output, float* log_sums) {
    const int64_t width = call.width, k = rounded(width), per_group = call.heads / call.groups;
#pragma omp parallel num_threads(call.threads) if (call.threads > 1)
    {
        Tiles tiles;
        std::vector<bf16> queries, keys, values, weights;
        std::vector<uint32_t> keys_paired, values_paired;
        std::vector<float> scores, mixed;
        float shares[BLOCK];
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < call.num_sequences * call.groups; task++) {
            const int64_t sequence = task / call.groups, group = task % call.groups;
            const Sight sight = call.sight(sequence);
            const int64_t T = rounded(sight.t), S = rounded(sight.s);
            queries.resize(size_t(T * k));
            for (auto* one : {&keys, &values}) one->resize(size_t(S * k));
            for (auto* one : {&keys_paired, &values_paired}) one->resize(size_t(S * k / 2));
            scores.resize(size_t(BLOCK * S));
            weights.resize(size_t(BLOCK * S));
            mixed.resize(size_t(BLOCK * k));
            const int64_t first_key = call.key_starts[sequence], first_query = call.query_starts[sequence];
            read_head(call.key + first_key * call.key_stride + group * width, call.key_stride, sight.s, width,
                      keys.data());
            read_head(call.value + first_key * call.value_stride + group * width, call.value_stride, sight.s, width,
                      values.data());
            pair_columns(keys.data(), S, k, keys_paired.data());
            pair_rows(values.data(), S, k, values_paired.data());
            for (int64_t head = group * per_group; head < (group + 1) * per_group; head++) {
                read_head(call.query + first_query * call.query_stride + head * width, call.query_stride, sight.t,
                          width, queries.data());
                for (int64_t i = 0; i < T; i += BLOCK) {
                    const auto [last, begin, seen] = sight.block(i);
                    product(queries.data() + i * k, k, keys_paired.data() + begin, S, scores.data(), seen, BLOCK, seen,
                            k, false);
                    for (int64_t r = 0; r <= last - i; r++) {
                        const Row row(call, sight, head, first_query, i + r, begin);
                        shares[r] = weigh(call, row, scores.data() + r * seen, begin, seen, weights.data() + r * seen,
                                          log_sums + row.token * call.heads + head);
                    }
                    const int64_t rows = last - i + 1;
                    std::memset(weights.data() + rows * seen, 0, size_t((BLOCK - rows) * seen) * sizeof(bf16));
                    product(weights.data(), seen, values_paired.data() + begin / 2 * k, k, mixed.data(), k, BLOCK, k,
                            seen, false);
                    for (int64_t r = 0; r < rows; r++)
                        write_row(mixed.data() + r * k, width, shares[r],
                                  output + ((first_query + i + r) * call.heads + head) * width);
                }
            }
        }
    }
}

// ------------------------------------------------------------------------------------------------------------ backward

struct Gradients {
    bf16 *query, *key, *value;
    int64_t query_stride, key_stride, value_stride;
    float* lean;  // (b, h, 2 reach + 1), zero where it begins, or null
};

// 16 weights of a row, kept or not, and the gradients of their scores, before the scale.
struct Weighed {
    __m512 weight, dscore;
};
inline Weighed weigh_again(const Call& call, const Row& row, const float* products, const float* dweights, int64_t j,
                           __mmask16 kept, float log_sum, float delta) {
    const __mmask16 sees = row.sees(j);
    __m512 weight = exponential(_mm512_sub_ps(row.scores(call, products, j, sees), _mm512_set1_ps(log_sum)));
    weight = _mm512_maskz_mov_ps(sees, weight);
    __m512 dweight = _mm512_loadu_ps(dweights + j), shown = weight;
    if (call.drop.keys) {
        const __m512 factor = _mm512_set1_ps(call.drop.factor);
        dweight = _mm512_maskz_mul_ps(kept, dweight, factor);
        shown = _mm512_maskz_mul_ps(kept, weight, factor);
    }
    return {shown, _mm512_mul_ps(weight, _mm512_sub_ps(dweight, _mm512_set1_ps(delta)))};
}

// sum over the channels of a * b
inline float dot(const bf16* a, const bf16* b, int64_t width) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t c = 0; c < width; c += 32) {
        const __mmask32 real = first_32(width - c);
        sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_maskz_loadu_epi16(real, a + c),
                               (__m512bh)_mm512_maskz_loadu_epi16(real, b + c));
    }
    return _mm512_reduce_add_ps(sum);
}

// Words of the rounded halves of two rows.
inline __m512i paired(__m512 even, __m512 odd) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
    return _mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd)), 16));
}

// Two rows at a time: the weights in pairs, and the gradients of the scores times the scale, in rows and in pairs. A row
// beyond the last has log sums of +infinity, so that its weights are zero.
void weigh_pair(const Call& call, const Row* rows, const float* products, const float* dweights, int64_t begin,
                int64_t seen, const float* log_sums, const float* deltas, float* dlean, uint32_t* weights_paired,
                bf16* dscores, uint32_t* dscores_paired) {
    const __m512 scale = _mm512_set1_ps(call.scale);
    __mmask32 kept[2] = {0xFFFFFFFFu, 0xFFFFFFFFu};
    for (int64_t j = 0; j < seen; j += 16) {
        Weighed found[2];
        for (int half = 0; half < 2; half++) {
            const Row& row = rows[half];
            if (call.drop.keys && j % 32 == 0) kept[half] = call.drop.kept(row.key, begin + j);
            found[half] = weigh_again(call, row, products + half * seen, dweights + half * seen, j,
                                      __mmask16(kept[half]), log_sums[half], deltas[half]);
            kept[half] >>= 16;
            if (dlean) {
                const __mmask16 sees = row.sees(j);
                float* place = dlean + row.lean + j;
                _mm512_mask_storeu_ps(place, sees, _mm512_add_ps(_mm512_maskz_loadu_ps(sees, place), found[half].dscore));
            }
            found[half].dscore = _mm512_mul_ps(found[half].dscore, scale);
            _mm256_storeu_si256((__m256i*)(dscores + half * seen + j), (__m256i)_mm512_cvtneps_pbh(found[half].dscore));
        }
        _mm512_storeu_si512(weights_paired + j, paired(found[0].weight, found[1].weight));
        _mm512_storeu_si512(dscores_paired + j, paired(found[0].dscore, found[1].dscore));
    }
}

// With P the weights, kept or not: dV = P^T dO, dS = P (dO V^T - sum(dO O)), dQ = scale dS K, dK = scale dS^T Q.
void backward(const Call& call, const bf16* output, const float* log_sums, const bf16* grad, const Gradients& into) {
    const int64_t width = call.width, k = rounded(width), per_group = call.heads / call.groups;
#pragma omp parallel num_threads(call.threads) if (call.threads > 1)
    {
        Tiles tiles;
        std::vector<bf16> queries, queries_turned, grads, grads_turned, keys, values, dscores;
        std::vector<uint32_t> keys_paired, keys_turned, values_turned, weights_paired, dscores_paired;
        std::vector<float> scores, dweights, mixed, dkeys, dvalues;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < call.num_sequences * call.groups; task++) {
            const int64_t sequence = task / call.groups, group = task % call.groups;
            const Sight sight = call.sight(sequence);
            const int64_t T = rounded(sight.t), S = rounded(sight.s);
            for (auto* one : {&queries, &queries_turned, &grads, &grads_turned}) one->resize(size_t(T * k));
            for (auto* one : {&keys, &values}) one->resize(size_t(S * k));
            for (auto* one : {&keys_paired, &keys_turned, &values_turned}) one->resize(size_t(S * k / 2));
            for (auto* one : {&weights_paired, &dscores_paired}) one->resize(size_t(BLOCK * S / 2));
            for (auto* one : {&scores, &dweights}) one->resize(size_t(BLOCK * S));
            dscores.resize(size_t(BLOCK * S));
            mixed.resize(size_t(BLOCK * k));
            dkeys.assign(size_t(k * S), 0.0f);  // transposed: (k, S)
            dvalues.assign(size_t(k * S), 0.0f);
            const int64_t first_key = call.key_starts[sequence], first_query = call.query_starts[sequence];
            read_head(call.key + first_key * call.key_stride + group * width, call.key_stride, sight.s, width,
                      keys.data());
            read_head(call.value + first_key * call.value_stride + group * width, call.value_stride, sight.s, width,
                      values.data());
            pair_rows(keys.data(), S, k, keys_paired.data());
            pair_columns(keys.data(), S, k, keys_turned.data());
            pair_columns(values.data(), S, k, values_turned.data());
            for (int64_t head = group * per_group; head < (group + 1) * per_group; head++) {
                float* dlean = into.lean ? into.lean + sequence * call.heads * (2 * call.reach + 1) : nullptr;
                read_head(call.query + first_query * call.query_stride + head * width, call.query_stride, sight.t,
                          width, queries.data());
                read_head(grad + (first_query * call.heads + head) * width, call.heads * width, sight.t, width,
                          grads.data());
                transpose(queries.data(), T, k, queries_turned.data());
                transpose(grads.data(), T, k, grads_turned.data());
                for (int64_t i = 0; i < T; i += BLOCK) {
                    const auto [last, begin, seen] = sight.block(i);
                    product(queries.data() + i * k, k, keys_turned.data() + begin, S, scores.data(), seen, BLOCK, seen,
                            k, false);
                    product(grads.data() + i * k, k, values_turned.data() + begin, S, dweights.data(), seen, BLOCK,
                            seen, k, false);
                    for (int64_t r = 0; r < BLOCK; r += 2) {
                        float sums[2], deltas[2];
                        Row rows[2] = {Row(call, sight, head, first_query, std::min(i + r, last), begin),
                                       Row(call, sight, head, first_query, std::min(i + r + 1, last), begin)};
                        for (int half = 0; half < 2; half++) {
                            Row& row = rows[half];
                            if (i + r + half > last) row.to = row.from;  // no such query: it sees nothing
                            const int64_t place = row.token * call.heads + head;
                            sums[half] = log_sums[place];
                            deltas[half] = dot(output + place * width, grad + place * width, width);
                        }
                        weigh_pair(call, rows, scores.data() + r * seen, dweights.data() + r * seen, begin, seen, sums,
                                   deltas, dlean, weights_paired.data() + r / 2 * seen, dscores.data() + r * seen,
                                   dscores_paired.data() + r / 2 * seen);
                    }
                    product(dscores.data(), seen, keys_paired.data() + begin / 2 * k, k, mixed.data(), k, BLOCK, k, seen,
                            false);
                    product(grads_turned.data() + i, T, weights_paired.data(), seen, dvalues.data() + begin, S, k, seen,
                            BLOCK, true);
                    product(queries_turned.data() + i, T, dscores_paired.data(), seen, dkeys.data() + begin, S, k, seen,
                            BLOCK, true);
                    for (int64_t r = 0; r <= last - i; r++)
                        write_row(mixed.data() + r * k, width, 1.0f,
                                  into.query + (first_query + i + r) * into.query_stride + head * width);
                }
            }
            write_transposed(dkeys.data(), S, sight.s, width, into.key + first_key * into.key_stride + group * width,
                             into.key_stride);
            write_transposed(dvalues.data(), S, sight.s, width,
                             into.value + first_key * into.value_stride + group * width, into.value_stride);
        }
    }
}

}  // namespace

extern "C" void attention_forward(const Call* call, bf16* output, float* log_sums) { forward(*call, output, log_sums); }

extern "C" void attention_backward(const Call* call, const bf16* output, const float* log_sums, const bf16* grad,
                                   const Gradients* into) {
    backward(*call, output, log_sums, grad, *into);
}

#endif

// Asks the system for the tiles; whether they are there.
extern "C" int has_tiles() {
#if HAS_TILES
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return 0;
#endif
}

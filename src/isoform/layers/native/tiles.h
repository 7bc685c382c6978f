// Products on Intel's matrix tiles (AMX) and the layouts that they read, with AVX-512.
//
// A product takes its left matrix row by row and its right one in pairs of rows, interleaved ("paired" below). Rows and
// columns of what is read are rounded up to whole blocks, with zeros.

#pragma once

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__linux__)
#define HAS_TILES 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <initializer_list>

#include "numbers.h"

namespace {

constexpr int64_t BLOCK = 32;  // rows at a time, and what lengths are rounded up to

inline int64_t rounded(int64_t length) { return (length + BLOCK - 1) / BLOCK * BLOCK; }

// The first `count` of 16 or 32 lanes.
inline __mmask16 first_16(int64_t count) { return count >= 16 ? 0xFFFF : __mmask16((1u << (count < 0 ? 0 : count)) - 1); }
inline __mmask32 first_32(int64_t count) {
    return count >= 32 ? 0xFFFFFFFFu : __mmask32((uint64_t(1) << (count < 0 ? 0 : count)) - 1);
}

// ------------------------------------------------------------------------------------------------------------ layouts

// 16 rows of 16 words become columns.
inline void turn(__m512i* rows) {
    __m512i other[16];
    for (int i = 0; i < 16; i += 2) {
        other[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        other[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        rows[i] = _mm512_unpacklo_epi64(other[i], other[i + 2]);
        rows[i + 1] = _mm512_unpackhi_epi64(other[i], other[i + 2]);
        rows[i + 2] = _mm512_unpacklo_epi64(other[i + 1], other[i + 3]);
        rows[i + 3] = _mm512_unpackhi_epi64(other[i + 1], other[i + 3]);
    }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; j++) {
            other[i + j] = _mm512_shuffle_i32x4(rows[i + j], rows[i + j + 4], 0x88);
            other[i + j + 4] = _mm512_shuffle_i32x4(rows[i + j], rows[i + j + 4], 0xDD);
        }
    for (int j = 0; j < 8; j++) {
        rows[j] = _mm512_shuffle_i32x4(other[j], other[j + 8], 0x88);
        rows[j + 8] = _mm512_shuffle_i32x4(other[j], other[j + 8], 0xDD);
    }
}

// 32 rows of 32 columns, given two and two, become columns: column 2 i is `even[i]`, column 2 i + 1 is `odd[i]`.
template <class TwoRows>
inline void turn_halves(TwoRows two_rows, __m512i* even, __m512i* odd) {
    const __m512i low = _mm512_set1_epi32(0xFFFF);
    for (int64_t i = 0; i < 16; i++) {
        const auto [first, second] = two_rows(i);
        even[i] = _mm512_or_si512(_mm512_and_si512(first, low), _mm512_slli_epi32(second, 16));
        odd[i] = _mm512_or_si512(_mm512_srli_epi32(first, 16), _mm512_andnot_si512(low, second));
    }
    turn(even);
    turn(odd);
}
struct Two {
    __m512i first, second;
};

// One head of a sequence's rows, which begin at `states`, with zeros below and to the right up to whole blocks.
inline void read_head(const bf16* states, int64_t stride, int64_t rows, int64_t width, bf16* out) {
    const int64_t columns = rounded(width);
    for (int64_t c = 0; c < columns; c += 32) {
        const __mmask32 real = first_32(width - c);
        for (int64_t r = 0; r < rows; r++)
            _mm512_storeu_si512(out + r * columns + c, _mm512_maskz_loadu_epi16(real, states + r * stride + c));
        for (int64_t r = rows; r < rounded(rows); r++) _mm512_storeu_si512(out + r * columns + c, _mm512_setzero_si512());
    }
}

// (rows, columns) -> paired (rows / 2, columns, 2)
inline void pair_rows(const bf16* in, int64_t rows, int64_t columns, uint32_t* out) {
    for (int64_t r = 0; r < rows; r += 2)
        for (int64_t c = 0; c < columns; c += 16) {
            const bf16* place = in + r * columns + c;
            const __m512i even = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)place));
            const __m512i odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(place + columns)));
            _mm512_storeu_si512(out + r / 2 * columns + c, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
        }
}

// (rows, columns) -> the transposed matrix, paired: (columns / 2, rows, 2). Two columns of a row are one word already.
inline void pair_columns(const bf16* in, int64_t rows, int64_t columns, uint32_t* out) {
    __m512i words[16];
    for (int64_t r = 0; r < rows; r += 16)
        for (int64_t c = 0; c < columns; c += 32) {
            for (int64_t i = 0; i < 16; i++) words[i] = _mm512_loadu_si512(in + (r + i) * columns + c);
            turn(words);
            for (int64_t i = 0; i < 16; i++) _mm512_storeu_si512(out + (c / 2 + i) * rows + r, words[i]);
        }
}

// (rows, columns) -> (columns, rows)
inline void transpose(const bf16* in, int64_t rows, int64_t columns, bf16* out) {
    __m512i even[16], odd[16];
    for (int64_t r = 0; r < rows; r += 32)
        for (int64_t c = 0; c < columns; c += 32) {
            const auto two_rows = [=](int64_t i) {
                const bf16* place = in + (r + 2 * i) * columns + c;
                return Two{_mm512_loadu_si512(place), _mm512_loadu_si512(place + columns)};
            };
            turn_halves(two_rows, even, odd);
            for (int64_t i = 0; i < 16; i++) {
                _mm512_storeu_si512(out + (c + 2 * i) * rows + r, even[i]);
                _mm512_storeu_si512(out + (c + 2 * i + 1) * rows + r, odd[i]);
            }
        }
}

// float (columns, stride) -> rounded (rows, out_stride), of which `width` columns are written.
inline void write_transposed(const float* in, int64_t stride, int64_t rows, int64_t width, bf16* out,
                             int64_t out_stride) {
    __m512i words[16];
    for (int64_t r = 0; r < rows; r += 16)
        for (int64_t c = 0; c < width; c += 16) {
            for (int64_t i = 0; i < 16; i++) words[i] = _mm512_loadu_si512(in + (c + i) * stride + r);
            turn(words);
            for (int64_t i = 0; i < 16 && r + i < rows; i++)
                _mm256_mask_storeu_epi16(out + (r + i) * out_stride + c, first_16(width - c),
                                         (__m256i)_mm512_cvtneps_pbh(_mm512_castsi512_ps(words[i])));
        }
}

// width floats times a factor, rounded.
inline void write_row(const float* in, int64_t width, float factor, bf16* out) {
    for (int64_t c = 0; c < width; c += 16)
        _mm256_mask_storeu_epi16(
            out + c, first_16(width - c),
            (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_loadu_ps(in + c), _mm512_set1_ps(factor))));
}

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

// Sums of 32 rows and columns, in the first four tiles: begun at zero or at what is there, and written.
inline void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}
inline void begin_sums(const float* c, int64_t stride, bool add) {
    if (!add) return zero_sums();
    _tile_loadd(0, c, stride * 4);
    _tile_loadd(1, c + 16, stride * 4);
    _tile_loadd(2, c + 16 * stride, stride * 4);
    _tile_loadd(3, c + 16 * stride + 16, stride * 4);
}
inline void write_sums(float* c, int64_t stride) {
    _tile_stored(0, c, stride * 4);
    _tile_stored(1, c + 16, stride * 4);
    _tile_stored(2, c + 16 * stride, stride * 4);
    _tile_stored(3, c + 16 * stride + 16, stride * 4);
}

// c (m, n) = or += a (m, k) times b, b paired (k / 2, n): m, n and k multiples of 32; strides in elements.
inline void product(const bf16* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, float* c, int64_t c_stride,
                    int64_t m, int64_t n, int64_t k, bool add) {
    for (int64_t i = 0; i < m; i += 32)
        for (int64_t j = 0; j < n; j += 32) {
            float* out = c + i * c_stride + j;
            begin_sums(out, c_stride, add);
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
            write_sums(out, c_stride);
        }
}

// e^x in 16 lanes, to a relative error of 2e-7; a NaN stays one.
inline __m512 exponential(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-104.0f), x);
    const __m512 power = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 rest = _mm512_fnmadd_ps(power, _mm512_set1_ps(0.693359375f), x);
    rest = _mm512_fnmadd_ps(power, _mm512_set1_ps(-2.12194440e-4f), rest);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    for (float term : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f, 1.0f,
                       1.0f})
        p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(term));
    return _mm512_scalef_ps(p, power);
}

}  // namespace

#else
#define HAS_TILES 0
#endif

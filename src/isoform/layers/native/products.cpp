// The gradient of a linear layer's weight on matrix tiles: float32 sums over rows of what is bfloat16.
//
// Rows are the inner dimension here, along which neither matrix lies in memory. Blocks of rows are packed into tiles in
// one sweep; a part of the result that fits into a second-level cache is summed over all of them.

#include "tiles.h"

#if HAS_TILES

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>

namespace {

constexpr int64_t ROWS = 256;              // packed at a time
constexpr int64_t TILE = 512;              // numbers of 16 bits in a tile
constexpr int64_t PANEL = BLOCK * ROWS;    // of 32 columns of the rows packed
constexpr int64_t PART_BYTES = 1536 << 10; // of the result that is summed at a time

template <class T>
struct Free {
    void operator()(T* place) const { std::free(place); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free<T>>;
template <class T>
Buffer<T> buffer(int64_t count) {
    return Buffer<T>(static_cast<T*>(std::aligned_alloc(64, (size_t(count) * sizeof(T) + 63) / 64 * 64)));
}

// Of 32 rows, or fewer: rows 2 i and 2 i + 1 of 32 columns, with zeros where there are none.
inline Two two_rows(const bf16* in, int64_t stride, int64_t rows, int64_t i, __mmask32 columns) {
    return {_mm512_maskz_loadu_epi16(2 * i < rows ? columns : 0, in + 2 * i * stride),
            _mm512_maskz_loadu_epi16(2 * i + 1 < rows ? columns : 0, in + (2 * i + 1) * stride)};
}

// Each panel's next two tiles: 16 of its columns each, 32 rows side by side.
void pack_turned(const bf16* in, int64_t stride, int64_t rows, int64_t columns, bf16* out) {
    __m512i even[16], odd[16];
    for (int64_t c = 0; c < columns; c += BLOCK, out += PANEL) {
        const __mmask32 real = first_32(columns - c);
        turn_halves([=](int64_t i) { return two_rows(in + c, stride, rows, i, real); }, even, odd);
        for (int64_t i = 0; i < 16; i++) {
            _mm512_store_si512(out + 2 * i * BLOCK, even[i]);
            _mm512_store_si512(out + (2 * i + 1) * BLOCK, odd[i]);
        }
    }
}

// Each panel's next two tiles: 16 of its columns each, rows in pairs.
void pack_paired(const bf16* in, int64_t stride, int64_t rows, int64_t columns, bf16* out) {
    alignas(64) uint16_t mixed[32];  // lanes of the first 16 columns: even row, odd row, even row, ...
    for (int lane = 0; lane < 32; lane++) mixed[lane] = uint16_t(lane / 2 + lane % 2 * 32);
    const __m512i first = _mm512_load_si512(mixed), last = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    for (int64_t i = 0; i < 16; i++)
        for (int64_t c = 0; c < columns; c += BLOCK) {
            const Two two = two_rows(in + c, stride, rows, i, first_32(columns - c));
            bf16* place = out + c / BLOCK * PANEL + i * BLOCK;
            _mm512_store_si512(place, _mm512_permutex2var_epi16(two.first, first, two.second));
            _mm512_store_si512(place + TILE, _mm512_permutex2var_epi16(two.first, last, two.second));
        }
}

// c (32, 32) = or += the product of two panels of `steps` times 32 rows.
void panel_product(const bf16* a, const bf16* b, float* c, int64_t stride, int64_t steps, bool add) {
    begin_sums(c, stride, add);
    for (int64_t step = 0; step < steps; step++, a += 2 * TILE, b += 2 * TILE) {
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + TILE, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + TILE, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    write_sums(c, stride);
}

}  // namespace

// out (o, d) = grad^T hidden, grad (n, o), hidden (n, d). The order of each sum does not depend on parts or threads.
extern "C" void weight_gradient(const bf16* grad, const bf16* hidden, float* out, int64_t n, int64_t o, int64_t d,
                                int threads) {
    int64_t o_part = rounded(o), d_part = rounded(d), parts = 1;
    while (o_part * d_part * 4 > PART_BYTES || parts < threads) {
        int64_t& longer = o_part >= d_part ? o_part : d_part;
        if (longer == BLOCK) break;
        longer = rounded((longer + 1) / 2);
        parts = ((o + o_part - 1) / o_part) * ((d + d_part - 1) / d_part);
    }
    const int64_t d_parts = (d + d_part - 1) / d_part;
    parts = (o + o_part - 1) / o_part * d_parts;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Tiles tiles;
        const auto left = buffer<bf16>(o_part * ROWS), right = buffer<bf16>(d_part * ROWS);
        const auto sums = buffer<float>(o_part * d_part);
#pragma omp for schedule(dynamic)
        for (int64_t part = 0; part < parts; part++) {
            const int64_t o_first = part / d_parts * o_part, d_first = part % d_parts * d_part;
            const int64_t o_real = std::min(o_part, o - o_first), d_real = std::min(d_part, d - d_first);
            for (int64_t row = 0; row < n; row += ROWS) {
                const int64_t steps = rounded(std::min(ROWS, n - row)) / BLOCK;
                for (int64_t step = 0; step < steps; step++) {
                    const int64_t first = row + step * BLOCK, real = std::min(BLOCK, n - first);
                    pack_turned(grad + first * o + o_first, o, real, o_real, left.get() + step * 2 * TILE);
                    pack_paired(hidden + first * d + d_first, d, real, d_real, right.get() + step * 2 * TILE);
                }
                for (int64_t i = 0; i < o_real; i += BLOCK)
                    for (int64_t j = 0; j < d_real; j += BLOCK)
                        panel_product(left.get() + i * ROWS, right.get() + j * ROWS, sums.get() + i * d_part + j, d_part,
                                      steps, row > 0);
            }
            for (int64_t i = 0; i < o_real; i++)
                std::memcpy(out + (o_first + i) * d + d_first, sums.get() + i * d_part, size_t(d_real) * sizeof(float));
        }
    }
}

#endif

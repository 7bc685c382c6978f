// Products of a few rows with a whole matrix, bound by reading the matrix once: y = W x, W in float32, bfloat16, int8.
//
// A processor fetches ahead in many places at once, and one place alone is read at half the speed. So W is packed in 16
// streams: word i of every 16 words of a row stands in stream i. A word holds two columns, or four of int8; a block is
// 16 words, a panel 16 rows, a slab four panels; zeros fill them up.
//
//     (word of a block, slab, panels that are multiplied together, block, panel, row of the panel, columns of the word)
//
// What is multiplied with them keeps its precision: a row x is a sum of two rows with 8 bits of fraction (bfloat16), or
// of two of 8 bits with one scale (int8). No row's result depends on the other rows.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "tiles.h"
#include "numbers.h"

namespace {

constexpr int64_t PANEL = 16, SLAB = 64, STREAMS = 16, STRIP = 4;
enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };

struct Matrix {
    const void* weight;
    const float *scales, *bias;  // (rows), of int8; (rows) or null
    int64_t rows, columns;
    Kind kind;

    int64_t block() const { return kind == INT8 ? 64 : 32; }  // columns of a tile
    int64_t padded() const { return (columns + block() - 1) / block() * block(); }
    int64_t slabs() const { return (rows + SLAB - 1) / SLAB; }
    // Bytes of a stream; one line more, so that streams do not fall into the same sets of a cache.
    int64_t stream() const { return slabs() * padded() / block() * 256 + 64; }
    // Panels whose sums fit into the tiles at once; those of int8 are of two layers.
    int64_t together() const { return kind == INT8 ? 2 : 4; }
    // Where in the packed matrix a word of 16 rows stands.
    int64_t place(int64_t slab, int64_t panel, int64_t block_number, int64_t word) const {
        const int64_t blocks = padded() / block(), pass = panel / together(), passes = 4 / together();
        const int64_t line = ((slab * passes + pass) * blocks + block_number) * together() + panel % together();
        return word * stream() + line * 64;
    }
};

typedef float floats __attribute__((vector_size(64), aligned(4)));
typedef int32_t words __attribute__((vector_size(64), aligned(4)));

inline floats as_floats(words bits) { return std::bit_cast<floats>(bits); }
// Not copied to every place that calls it: a compiler would take seconds more.
[[gnu::noinline]] inline float sum(const floats& lanes) {
    float total = 0.0f;
    for (int i = 0; i < 16; i++) total += lanes[i];
    return total;
}

// The largest |x|; NaN where there is one.
inline float widest(const float* x, int64_t count) {
    floats most = {};
    words lost = {};
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        const floats here = *reinterpret_cast<const floats*>(x + i), size = here < 0.0f ? -here : here;
        most = size > most ? size : most;
        lost |= here != here;
    }
    float largest = 0.0f;
    bool none = false;
    for (int lane = 0; lane < 16; lane++) {
        largest = most[lane] > largest ? most[lane] : largest;
        none = none || lost[lane] != 0;
    }
    for (; i < count; i++) {
        largest = std::fabs(x[i]) > largest ? std::fabs(x[i]) : largest;
        none = none || x[i] != x[i];
    }
    return none ? NAN : largest;
}

// n rows as the products read them: floats, or on tiles two layers whose sum they are; zeros below and to the right.
class Rows {
public:
    // The row numbered `row` is what `fill(row, place)` writes, `columns` floats.
    template <class Fill>
    void read(int64_t n, const Matrix& matrix, bool tiles, Fill fill) {
        count = n;
        stride = matrix.padded();
        on_tiles = tiles && matrix.kind != FLOAT32;
        floats_.resize(size_t((on_tiles ? 1 : n) * stride));
        if (on_tiles) {
            const size_t lines = size_t((n + 15) / 16 * 16 * stride * (matrix.kind == INT8 ? 1 : 2) / 64);
            high_.assign(lines, {});
            low_.assign(lines, {});
            scales_.resize(size_t(n));
        }
        for (int64_t row = 0; row < n; row++) {
            float* place = floats_.data() + (on_tiles ? 0 : row * stride);
            fill(row, place);
            std::fill(place + matrix.columns, place + stride, 0.0f);
            if (on_tiles && matrix.kind == BFLOAT16) split_bf16(place, row);
            if (on_tiles && matrix.kind == INT8) split_int8(place, row);
        }
    }
    const float* row(int64_t i) const { return floats_.data() + i * stride; }
    template <class T>
    const T* high(int64_t row) const { return reinterpret_cast<const T*>(high_.data()) + row * stride; }
    template <class T>
    const T* low(int64_t row) const { return reinterpret_cast<const T*>(low_.data()) + row * stride; }
    float scale(int64_t row) const { return scales_[size_t(row)]; }

    int64_t count = 0, stride = 0;
    bool on_tiles = false;

private:
    void split_bf16(const float* x, int64_t row) {
        bf16 *high = const_cast<bf16*>(this->high<bf16>(row)), *low = const_cast<bf16*>(this->low<bf16>(row));
        for (int64_t i = 0; i < stride; i++) {
            store(high + i, x[i]);
            store(low + i, x[i] - wide(high[i]));
        }
    }
    // x = scale (256 high + low), both from -128 to 127
    void split_int8(const float* x, int64_t row) {
        constexpr float MOST = 127 * 256 + 127;
        const float most = widest(x, stride);
        scales_[size_t(row)] = most / MOST;
        const float inverse = most > 0.0f ? MOST / most : 0.0f;
        int8_t *high = const_cast<int8_t*>(this->high<int8_t>(row)), *low = const_cast<int8_t*>(this->low<int8_t>(row));
        const int64_t count = stride;  // bytes written may be anything, also this object's
        for (int64_t i = 0; i < count; i++) {
            const int32_t whole = int32_t(std::nearbyint(x[i] * inverse)), upper = (whole + 128) >> 8;
            high[i] = int8_t(upper);
            low[i] = int8_t(whole - 256 * upper);
        }
    }
    std::vector<float> floats_, scales_;
    struct alignas(64) Line {
        uint8_t bytes[64];
    };
    std::vector<Line> high_, low_;
};

// ------------------------------------------------------------------------------------------------------------- packing

// A row's words, padded, to where they stand.
inline void spread(const Matrix& to, const uint32_t* row_words, int64_t row, uint8_t* out) {
    const int64_t panel = row % SLAB / PANEL, step = to.together() * 64, stream = to.stream();
    const int64_t blocks = to.padded() / to.block();
    uint8_t* begin = out + to.place(row / SLAB, panel, 0, 0) + row % PANEL * 4;
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t i = 0; i < STREAMS; i++)
            std::memcpy(begin + i * stream + block * step, row_words + block * STREAMS + i, 4);
}

inline void pack_bf16(const Matrix& to, const float* weight, int64_t row, uint8_t* out) {
    std::vector<bf16> values(size_t(to.padded()), bf16{0});
    const int64_t columns = row < to.rows ? to.columns : 0;
    const float* in = weight + row * columns;
    for (int64_t c = 0; c < columns; c++) store(values.data() + c, in[c]);
    spread(to, reinterpret_cast<const uint32_t*>(values.data()), row, out);
}

// Symmetric, one scale for each row: w = scale q, q from -127 to 127.
inline void pack_int8(const Matrix& to, const float* weight, int64_t row, uint8_t* out, float* scales) {
    std::vector<int8_t> values(size_t(to.padded()), 0);
    const int64_t columns = row < to.rows ? to.columns : 0;
    const float* in = weight + row * columns;
    const float most = widest(in, columns), inverse = most > 0.0f ? 127.0f / most : 0.0f;
    if (row < to.rows) scales[row] = most / 127.0f;
    int8_t* place = values.data();
    for (int64_t c = 0; c < columns; c++) place[c] = int8_t(int32_t(std::nearbyint(in[c] * inverse)));
    spread(to, reinterpret_cast<const uint32_t*>(values.data()), row, out);
}

// ------------------------------------------------------------------------------------------------------------ products

// Where outputs go, and what becomes of what is there.
enum Way { WRITE, ADD, MULTIPLY };
struct Target {
    float* place;
    int64_t stride;
    Way way;

    // 16 outputs of a row, as far as the matrix has so many; its scales and bias come to them here.
    void keep(const Matrix& w, int64_t row, int64_t first, floats values) const {
        float* out = place + row * stride + first;
        const int64_t count = std::min(PANEL, w.rows - first);
        if (count == PANEL)
            keep_all(w, out, first, values);
        else
            for (int64_t i = 0; i < count; i++) {  // none where padding begins
                const float scaled = w.scales ? values[i] * w.scales[first + i] : values[i];
                const float value = w.bias ? scaled + w.bias[first + i] : scaled;
                out[i] = way == WRITE ? value : way == ADD ? out[i] + value : out[i] * value;
            }
    }
    void keep_all(const Matrix& w, float* out, int64_t first, floats values) const {
        if (w.scales) values *= *reinterpret_cast<const floats*>(w.scales + first);
        if (w.bias) values += *reinterpret_cast<const floats*>(w.bias + first);
        floats& there = *reinterpret_cast<floats*>(out);
        there = way == WRITE ? values : way == ADD ? there + values : there * values;
    }
};

// Each function brings the products of all rows with one slab, or with one panel of it, to the target.

#if HAS_TILES
// Sums and rows of x in as many rows of a tile as there are; within a `Tiles`.
inline void set_rows(int64_t rows) {
    alignas(64) unsigned char config[64] = {};
    config[0] = 1;
    for (int tile = 0; tile < 8; tile++) {
        config[16 + 2 * tile] = 64;
        config[48 + tile] = tile < 6 ? static_cast<unsigned char>(std::min<int64_t>(rows, 16)) : 16;
    }
    _tile_loadconfig(config);
}

// Asks for what is read soon: the processor by itself is late at tiles.
inline void fetch(const uint8_t* place, int64_t stream, int64_t bytes) {
    for (int64_t i = 0; i < STREAMS; i++)
        for (int64_t j = 0; j < bytes; j += 64) _mm_prefetch(place + i * stream + j, _MM_HINT_T1);
}

inline void tiles_bf16(const Matrix& w, const Rows& x, int64_t slab, const Target& target) {
    alignas(64) float out[4][16][16];
    const int64_t blocks = x.stride / 32, stream = w.stream();
    for (int64_t r = 0; r < x.count; r += 16) {
        const bf16 *high = x.high<bf16>(r), *low = x.low<bf16>(r);
        const uint8_t* place = static_cast<const uint8_t*>(w.weight) + w.place(slab, 0, 0, 0);
        zero_sums();
        for (int64_t block = 0; block < blocks; block++, place += 256) {
            fetch(place + 4 * 256, stream, 256);
            _tile_loadd(4, high + block * 32, x.stride * 2);
            _tile_loadd(5, low + block * 32, x.stride * 2);
            _tile_loadd(6, place, stream);
            _tile_loadd(7, place + 64, stream);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(0, 5, 6);
            _tile_dpbf16ps(1, 5, 7);
            _tile_loadd(6, place + 128, stream);
            _tile_loadd(7, place + 192, stream);
            _tile_dpbf16ps(2, 4, 6);
            _tile_dpbf16ps(3, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, out[0], 64);
        _tile_stored(1, out[1], 64);
        _tile_stored(2, out[2], 64);
        _tile_stored(3, out[3], 64);
        for (int64_t i = 0; i < std::min<int64_t>(16, x.count - r); i++)
            for (int64_t panel = 0; panel < 4; panel++)
                target.keep(w, r + i, slab * SLAB + panel * PANEL, *reinterpret_cast<const floats*>(out[panel][i]));
    }
}

// Two layers of a panel's sums, 256 high + low, with the scale of the row that they are of.
inline floats whole(const int32_t* high, const int32_t* low, float scale) {
    const floats upper = __builtin_convertvector(*reinterpret_cast<const words*>(high), floats);
    const floats lower = __builtin_convertvector(*reinterpret_cast<const words*>(low), floats);
    return (256.0f * upper + lower) * scale;
}

inline void tiles_int8(const Matrix& w, const Rows& x, int64_t slab, const Target& target) {
    alignas(64) int32_t out[4][16][16];
    const int64_t blocks = x.stride / 64, stream = w.stream();
    for (int64_t half = 0; half < 4; half += 2)
        for (int64_t r = 0; r < x.count; r += 16) {
            const int8_t *high = x.high<int8_t>(r), *low = x.low<int8_t>(r);
            const uint8_t* place = static_cast<const uint8_t*>(w.weight) + w.place(slab, half, 0, 0);
            zero_sums();
            for (int64_t block = 0; block < blocks; block++, place += 128) {
                fetch(place + 4 * 128, stream, 128);
                _tile_loadd(4, high + block * 64, x.stride);
                _tile_loadd(5, low + block * 64, x.stride);
                _tile_loadd(6, place, stream);
                _tile_loadd(7, place + 64, stream);
                _tile_dpbssd(0, 4, 6);
                _tile_dpbssd(1, 5, 6);
                _tile_dpbssd(2, 4, 7);
                _tile_dpbssd(3, 5, 7);
            }
            _tile_stored(0, out[0], 64);
            _tile_stored(1, out[1], 64);
            _tile_stored(2, out[2], 64);
            _tile_stored(3, out[3], 64);
            for (int64_t i = 0; i < std::min<int64_t>(16, x.count - r); i++)
                for (int64_t panel = 0; panel < 2; panel++)
                    target.keep(w, r + i, slab * SLAB + (half + panel) * PANEL,
                                whole(out[2 * panel][i], out[2 * panel + 1][i], x.scale(r + i)));
        }
}
#endif

// Up to STRIP rows times one panel, in vectors of whatever the processor has.
template <int N>
void panel_bf16(const Matrix& w, const uint8_t* panel, const Rows& x, int64_t first, int64_t output,
                const Target& target) {
    floats even[N] = {}, odd[N] = {};
    for (int64_t c = 0; c < x.stride; c += 2) {
        const words pair = *reinterpret_cast<const words*>(panel + c / 2 % STREAMS * w.stream() + c / 32 * 256);
        const floats left = as_floats(pair << 16), right = as_floats(pair & int32_t(0xFFFF0000));
        for (int i = 0; i < N; i++) {
            even[i] += x.row(first + i)[c] * left;
            odd[i] += x.row(first + i)[c + 1] * right;
        }
    }
    for (int i = 0; i < N; i++) target.keep(w, first + i, output, even[i] + odd[i]);
}

template <int N>
void panel_int8(const Matrix& w, const uint8_t* panel, const Rows& x, int64_t first, int64_t output,
                const Target& target) {
    floats total[N] = {};
    for (int64_t c = 0; c < x.stride; c += 4) {
        const words four = *reinterpret_cast<const words*>(panel + c / 4 % STREAMS * w.stream() + c / 64 * 128);
        for (int byte = 0; byte < 4; byte++) {
            const floats weight = __builtin_convertvector((four << (24 - 8 * byte)) >> 24, floats);
            for (int i = 0; i < N; i++) total[i] += x.row(first + i)[c + byte] * weight;
        }
    }
    for (int i = 0; i < N; i++) target.keep(w, first + i, output, total[i]);
}

// Rows of float32 stand as the model has them, and are streams themselves: some of a slab at a time, far apart.
template <int N>
void slab_f32(const Matrix& w, const Rows& x, int64_t first, int64_t slab, const Target& target) {
    constexpr int STEPS = 16 / N, APART = SLAB / STEPS;  // as many sums as there are registers for
    alignas(64) float values[N][SLAB];
    const int64_t vectors = w.columns / 16 * 16;
    for (int64_t o = 0; o < APART; o++) {
        const float* rows[STEPS];
        for (int64_t j = 0; j < STEPS; j++) {
            const int64_t row = std::min(slab * SLAB + o + j * APART, w.rows - 1);
            rows[j] = static_cast<const float*>(w.weight) + row * w.columns;
        }
        floats total[N][STEPS] = {};
        for (int64_t c = 0; c < vectors; c += 16)
            for (int j = 0; j < STEPS; j++) {
                const floats weight = *reinterpret_cast<const floats*>(rows[j] + c);
                for (int i = 0; i < N; i++)
                    total[i][j] += *reinterpret_cast<const floats*>(x.row(first + i) + c) * weight;
            }
        for (int i = 0; i < N; i++)
            for (int j = 0; j < STEPS; j++) {
                float rest = 0.0f;
                for (int64_t c = vectors; c < w.columns; c++) rest += x.row(first + i)[c] * rows[j][c];
                values[i][o + j * APART] = sum(total[i][j]) + rest;
            }
    }
    for (int i = 0; i < N; i++)
        for (int64_t panel = 0; panel < 4; panel++)
            target.keep(w, first + i, slab * SLAB + panel * PANEL,
                        *reinterpret_cast<const floats*>(values[i] + panel * PANEL));
}

template <int N>
void strip(const Matrix& w, const Rows& x, int64_t first, int64_t slab, const Target& target) {
    if (w.kind == FLOAT32) return slab_f32<N>(w, x, first, slab, target);
    for (int64_t panel = 0; panel < 4; panel++) {
        const uint8_t* place = static_cast<const uint8_t*>(w.weight) + w.place(slab, panel, 0, 0);
        const int64_t output = slab * SLAB + panel * PANEL;
        if (w.kind == BFLOAT16) panel_bf16<N>(w, place, x, first, output, target);
        if (w.kind == INT8) panel_int8<N>(w, place, x, first, output, target);
    }
}

inline void vectors(const Matrix& w, const Rows& x, int64_t slab, const Target& target) {
    int64_t first = 0;
    for (; first + STRIP <= x.count; first += STRIP) strip<STRIP>(w, x, first, slab, target);
    for (; first < x.count; first++) strip<1>(w, x, first, slab, target);
}

// The outputs of the slabs [begin, end).
[[gnu::noinline]] inline void products(const Matrix& w, const Rows& x, int64_t begin, int64_t end,
                                       const Target& target) {
#if HAS_TILES
    if (x.on_tiles) set_rows(x.count);
#endif
    for (int64_t slab = begin; slab < end; slab++) {
#if HAS_TILES
        if (x.on_tiles && w.kind == BFLOAT16) {
            tiles_bf16(w, x, slab, target);
            continue;
        }
        if (x.on_tiles && w.kind == INT8) {
            tiles_int8(w, x, slab, target);
            continue;
        }
#endif
        vectors(w, x, slab, target);
    }
}

}  // namespace

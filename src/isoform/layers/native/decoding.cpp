// A decoder's pass over a few new tokens, with the keys and values of those before them, all layers in one call.
//
//     hidden += attention(norm(hidden));  hidden += feedforward(norm(hidden))          norm first, or after each sum
//
// `decoding.py` fills the structures. Threads share the outputs of each product, and the sequences and key/value heads
// of attention; what all of them read is made by each for itself, which is cheaper than to wait for one another.

#include <atomic>
#include <thread>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "activations.h"
#include "matrices.h"

namespace {

struct Norm {
    const float *weight, *bias;  // bias: or null
    float eps;
    int32_t centred;
};

struct Layer {
    Norm attention_norm, feedforward_norm;
    Matrix qkv, output, gate, up, down;  // gate without a weight: plain
    void *keys, *values;                 // (sequences, capacity, groups, head width)
};

struct Pass {
    const Layer* layers;
    Norm final_norm;        // without a weight: none
    float* hidden;          // (n, width), embeddings before and what the head reads after
    const float *cos, *sin; // (n, half) or null
    const int64_t *starts;  // (sequences + 1) into the n tokens
    const int64_t *stored;  // (sequences) tokens that the cache has of each
    const float* slopes;    // (heads) or null
    const float* relative;  // (heads, reach + 1) or null: added to the scores by distance
    int64_t num_layers, num_sequences, n, width, heads, groups, head_width, inner, half, capacity, window, reach;
    float scale;
    Activation activation;
    int32_t norm_first, narrow_cache, tiles, threads;

    int64_t states() const { return (heads + 2 * groups) * head_width; }
};

// Threads meet, as many as there are, which may be fewer than were asked for. Short waits are spent spinning, long ones
// given back to the system.
class Meeting {
public:
    void wait(int threads) {
        if (threads == 1) return;
        const int turn = turn_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            arrived_.store(0, std::memory_order_relaxed);
            turn_.store(turn + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; spins++)
            if (spins > 20000) std::this_thread::yield();
    }

private:
    std::atomic<int> arrived_{0}, turn_{0};
};

// The share of `count` things that falls to a thread.
struct Share {
    int64_t begin, end;
    Share(int64_t count, int thread, int threads)
        : begin(count * thread / threads), end(count * (thread + 1) / threads) {}
};

template <class Work>
void in_threads(int threads, Work work) {
#if defined(_OPENMP)
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        work(omp_get_thread_num(), omp_get_num_threads());
        return;
    }
#endif
    work(0, 1);
}

[[gnu::noinline]] inline void normalise(const Norm& norm, const float* in, int64_t width, float* out) {
    float middle = 0.0f, squares = 0.0f;
    if (norm.centred) {
        for (int64_t i = 0; i < width; i++) middle += in[i];
        middle /= float(width);
    }
    for (int64_t i = 0; i < width; i++) squares += (in[i] - middle) * (in[i] - middle);
    const float scale = 1.0f / std::sqrt(squares / float(width) + norm.eps);
    if (norm.bias)
        for (int64_t i = 0; i < width; i++) out[i] = (in[i] - middle) * scale * norm.weight[i] + norm.bias[i];
    else
        for (int64_t i = 0; i < width; i++) out[i] = (in[i] - middle) * scale * norm.weight[i];
}

// ----------------------------------------------------------------------------------------------------------- attention

inline void turn_head(float* head, const float* cos, const float* sin, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        const float first = head[i], second = head[i + half];
        head[i] = first * cos[i] - second * sin[i];
        head[i + half] = second * cos[i] + first * sin[i];
    }
}

template <class T>
void keep(const float* states, int64_t width, T* place) {
    for (int64_t i = 0; i < width; i++) store(place + i, states[i]);
}

// One head of a token that stands at `place` of its sequence, over the keys that it may see.
template <class T>
void mix(const Pass& pass, const float* query, const T* keys, const T* values, int64_t head, int64_t place,
         float* scores, float* out) {
    const int64_t k = pass.head_width, stride = pass.groups * k;
    const int64_t from = pass.window < 0 ? 0 : std::max<int64_t>(0, place - pass.window + 1), count = place + 1 - from;
    keys += from * stride;
    values += from * stride;
    for (int64_t j = 0; j < count; j++) {
        float score = 0.0f;
        for (int64_t i = 0; i < k; i++) score += query[i] * wide(keys[j * stride + i]);
        scores[j] = score * pass.scale;
    }
    if (pass.slopes)
        for (int64_t j = 0; j < count; j++) scores[j] -= pass.slopes[head] * float(count - 1 - j);
    if (pass.relative)
        for (int64_t j = 0; j < count; j++)
            scores[j] += pass.relative[head * (pass.reach + 1) + std::min(count - 1 - j, pass.reach)];
    const float most = largest(scores, count);
    float total = 0.0f;
    for (int64_t j = 0; j < count; j++) {
        scores[j] = exponential(scores[j] - most);
        total += scores[j];
    }
    for (int64_t i = 0; i < k; i++) out[i] = 0.0f;
    for (int64_t j = 0; j < count; j++) {
        const float weight = scores[j] / total;
        for (int64_t i = 0; i < k; i++) out[i] += weight * wide(values[j * stride + i]);
    }
}

// The new tokens of one sequence in one group of heads: turned, kept, and mixed.
template <class T>
[[gnu::noinline]] void attend(const Pass& pass, const Layer& layer, int64_t sequence, int64_t group, float* states,
                              float* scores, float* mixed) {
    const int64_t k = pass.head_width, shared = pass.heads / pass.groups, stride = pass.groups * k;
    T* keys = static_cast<T*>(layer.keys) + sequence * pass.capacity * stride + group * k;
    T* values = static_cast<T*>(layer.values) + sequence * pass.capacity * stride + group * k;
    const int64_t begin = pass.starts[sequence], end = pass.starts[sequence + 1], stored = pass.stored[sequence];
    for (int64_t token = begin; token < end; token++) {
        float* row = states + token * pass.states();
        float *key = row + (pass.heads + group) * k, *value = key + stride;
        const int64_t place = stored + token - begin;
        if (pass.cos) {
            const float *cos = pass.cos + token * pass.half, *sin = pass.sin + token * pass.half;
            turn_head(key, cos, sin, pass.half);
            for (int64_t i = 0; i < shared; i++) turn_head(row + (group * shared + i) * k, cos, sin, pass.half);
        }
        keep(key, k, keys + place * stride);
        keep(value, k, values + place * stride);
        for (int64_t head = group * shared; head < (group + 1) * shared; head++)
            mix(pass, row + head * k, keys, values, head, place, scores, mixed + (token * pass.heads + head) * k);
    }
}

// ------------------------------------------------------------------------------------------------------------ the pass

// What one thread does of a layer. states, mixed and inner are shared, `rows` and `scores` its own.
class Worker {
public:
    Worker(const Pass& pass, float* states, float* mixed, float* inner, Meeting& meeting, int thread, int threads)
        : pass_(pass), states_(states), mixed_(mixed), inner_(inner), meeting_(meeting), thread_(thread),
          threads_(threads) {
        int64_t longest = 0;
        for (int64_t i = 0; i < pass.num_sequences; i++)
            longest = std::max(longest, pass.stored[i] + pass.starts[i + 1] - pass.starts[i]);
        scores_.resize(size_t(longest));
    }

    void run(const Layer& layer) {
        read_hidden(layer.qkv, layer.attention_norm);
        multiply(layer.qkv, {states_, pass_.states(), WRITE});
        attention(layer);
        read(layer.output, mixed_, pass_.heads * pass_.head_width);
        add(layer.output, layer.attention_norm);

        read_hidden(layer.up, layer.feedforward_norm);
        feed(layer);
        read(layer.down, inner_, pass_.inner);
        add(layer.down, layer.feedforward_norm);
    }

    void finish() {
        if (pass_.final_norm.weight) normalise_share(pass_.final_norm);
    }

private:
    void read_hidden(const Matrix& matrix, const Norm& norm) {
        const int64_t d = pass_.width;
        rows_.read(pass_.n, matrix, pass_.tiles, [&](int64_t row, float* place) {
            const float* hidden = pass_.hidden + row * d;
            if (pass_.norm_first)
                normalise(norm, hidden, d, place);
            else
                std::copy(hidden, hidden + d, place);
        });
    }

    void read(const Matrix& matrix, const float* from, int64_t width) {
        rows_.read(pass_.n, matrix, pass_.tiles, [&](int64_t row, float* place) {
            std::copy(from + row * width, from + (row + 1) * width, place);
        });
    }

    void share(const Matrix& matrix, const Target& target) {
        const Share slabs(matrix.slabs(), thread_, threads_);
        products(matrix, rows_, slabs.begin, slabs.end, target);
    }

    void multiply(const Matrix& matrix, const Target& target) {
        share(matrix, target);
        meeting_.wait(threads_);
    }

    void attention(const Layer& layer) {
        const Share units(pass_.num_sequences * pass_.groups, thread_, threads_);
        for (int64_t unit = units.begin; unit < units.end; unit++) {
            const int64_t sequence = unit / pass_.groups, group = unit % pass_.groups;
            if (pass_.narrow_cache)
                attend<bf16>(pass_, layer, sequence, group, states_, scores_.data(), mixed_);
            else
                attend<float>(pass_, layer, sequence, group, states_, scores_.data(), mixed_);
        }
        meeting_.wait(threads_);
    }

    // A thread has the same outputs of both matrices, so that nobody waits in between.
    void feed(const Layer& layer) {
        const Matrix& first = layer.gate.weight ? layer.gate : layer.up;
        share(first, {inner_, pass_.inner, WRITE});
        activate_share(first);
        if (layer.gate.weight) share(layer.up, {inner_, pass_.inner, MULTIPLY});
        meeting_.wait(threads_);
    }

    void activate_share(const Matrix& matrix) {
        const Share slabs(matrix.slabs(), thread_, threads_);
        const int64_t begin = slabs.begin * SLAB, end = std::min(pass_.inner, slabs.end * SLAB);
        for (int64_t row = 0; row < pass_.n; row++)
            activate_all(pass_.activation, inner_ + row * pass_.inner + begin, end - begin);
    }

    [[gnu::noinline]] static void activate_all(Activation kind, float* values, int64_t count) {
        switch (kind) {
            case SILU: for (int64_t i = 0; i < count; i++) values[i] = activate(SILU, values[i]); break;
            case GELU: for (int64_t i = 0; i < count; i++) values[i] = activate(GELU, values[i]); break;
            case GELU_TANH: for (int64_t i = 0; i < count; i++) values[i] = activate(GELU_TANH, values[i]); break;
            case RELU: for (int64_t i = 0; i < count; i++) values[i] = activate(RELU, values[i]); break;
            default: for (int64_t i = 0; i < count; i++) values[i] = activate(RELU_SQUARED, values[i]);
        }
    }

    // The arm's result to the hidden states; norms that stand last follow.
    void add(const Matrix& matrix, const Norm& norm) {
        multiply(matrix, {pass_.hidden, pass_.width, ADD});
        if (!pass_.norm_first) {
            normalise_share(norm);
            meeting_.wait(threads_);
        }
    }

    void normalise_share(const Norm& norm) {
        const int64_t d = pass_.width;
        const Share rows(pass_.n, thread_, threads_);
        for (int64_t row = rows.begin; row < rows.end; row++)
            normalise(norm, pass_.hidden + row * d, d, pass_.hidden + row * d);
    }

    const Pass& pass_;
    float *states_, *mixed_, *inner_;
    Meeting& meeting_;
    const int thread_, threads_;
    Rows rows_;
    std::vector<float> scores_;
};

// Tiles where they are asked for; a thread has its own.
template <class Work>
void on_tiles([[maybe_unused]] bool tiles, Work work) {
#if HAS_TILES
    if (tiles) {
        Tiles configured;
        work();
        return;
    }
#endif
    work();
}

}  // namespace

extern "C" void decode(const Pass* pass) {
    const size_t n = size_t(pass->n);
    if (n == 0) return;  // tiles of no rows are refused
    std::vector<float> states(n * size_t(pass->states())), mixed(n * size_t(pass->heads * pass->head_width));
    std::vector<float> inner(n * size_t(pass->inner));
    Meeting meeting;
    in_threads(pass->threads, [&](int thread, int threads) {
        on_tiles(pass->tiles, [&] {
            Worker worker(*pass, states.data(), mixed.data(), inner.data(), meeting, thread, threads);
            for (int64_t i = 0; i < pass->num_layers; i++) worker.run(pass->layers[i]);
            worker.finish();
        });
    });
}

// x (n, columns) -> y (n, rows)
extern "C" void multiply(const Matrix* matrix, const float* x, int64_t n, float* y, int tiles, int threads) {
    if (n == 0) return;
    in_threads(threads, [&](int thread, int all) {
        on_tiles(tiles, [&] {
            Rows rows;
            rows.read(n, *matrix, tiles, [&](int64_t row, float* place) {
                std::copy(x + row * matrix->columns, x + (row + 1) * matrix->columns, place);
            });
            const Share slabs(matrix->slabs(), thread, all);
            products(*matrix, rows, slabs.begin, slabs.end, {y, matrix->rows, WRITE});
        });
    });
}

// weight (rows, columns) of float32 becomes what `to` names, scales of int8 with it.
extern "C" void pack(const Matrix* to, const float* weight, uint8_t* out, float* scales, int threads) {
    const int64_t rows = to->slabs() * SLAB;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        if (to->kind == INT8)
            pack_int8(*to, weight, row, out, scales);
        else
            pack_bf16(*to, weight, row, out);
    }
}

// Bytes of a packed matrix.
extern "C" int64_t packed_bytes(const Matrix* to) { return STREAMS * to->stream(); }

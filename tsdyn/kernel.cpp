// Training steps of one member at a time, whole epochs without leaving the cache; see kernel.py.
//
// Every product of a step is the same small one, C <- beta C + alpha A B, with the columns of B and C contiguous:
//
//   forward    Z (node, sample)        = W      F        columns: samples
//   backward   G (input_node, sample)  = W^T    G        columns: samples
//   update     W (node, input_node)   += G      F^T      columns: input nodes
//
// A bias is the column of W that belongs to a constant node 1.  Rows are padded to whole vectors with zeros, and zeros
// they stay: padded samples have no gradient, padded input nodes no activation.
// Vectors are the compiler's own (GCC and Clang); sums run in one order whatever the number of members or threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kAccumulators = 24;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kAccumulators = 12;
#else
constexpr int kVectorBytes = 16, kAccumulators = 24;
#endif
constexpr int kMostVectors = 4, kMostRows = 12;

namespace {

template <class Real>
struct Lanes {
    typedef Real Vector __attribute__((vector_size(kVectorBytes)));
    static constexpr long count = kVectorBytes / sizeof(Real);
    static long padded(long n) { return (n + count - 1) / count * count; }
};

template <class Real>
using Vector = typename Lanes<Real>::Vector;

template <class Real>
inline Vector<Real>& at(Real* p) {
    return *reinterpret_cast<Vector<Real>*>(p);
}
template <class Real>
inline const Vector<Real>& at(const Real* p) {
    return *reinterpret_cast<const Vector<Real>*>(p);
}

template <class Real>
struct Product {
    long k;
    const Real* a;
    long a_row, a_k;
    const Real* b;
    long b_k;
    Real* c;
    long c_row;
    Real beta, alpha;
};

constexpr int most_rows(int vectors) { return std::min(kMostRows, kAccumulators / vectors); }

// R rows of V vectors, kept in registers over the whole sum.
template <class Real, int R, int V>
void tile(const Product<Real>& p, long row, long column) {
    constexpr long lanes = Lanes<Real>::count;
    const Real* a = p.a + row * p.a_row;
    const Real* b = p.b + column;
    const long a_row = p.a_row, a_k = p.a_k, b_k = p.b_k;
    Vector<Real> sum[R][V] = {};
    for (long k = p.k; k > 0; --k, a += a_k, b += b_k) {
        Vector<Real> line[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) line[v] = at(b + v * lanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const Real factor = a[r * a_row];
#pragma GCC unroll 16
            for (int v = 0; v < V; ++v) sum[r][v] += factor * line[v];
        }
    }
    Real* c = p.c + row * p.c_row + column;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) {
            Vector<Real>& out = at(c + r * p.c_row + v * lanes);
            out = p.beta == 0 ? p.alpha * sum[r][v] : p.beta * out + p.alpha * sum[r][v];
        }
    }
}

template <class Real, int V, int R = most_rows(V)>
void tile_of(const Product<Real>& p, int rows, long row, long column) {
    if (rows == R) return tile<Real, R, V>(p, row, column);
    if constexpr (R > 1) tile_of<Real, V, R - 1>(p, rows, row, column);
}

template <class Real, int V = kMostVectors>
void strip(const Product<Real>& p, int vectors, long rows, long column) {
    if constexpr (V > 1) {
        if (vectors < V) return strip<Real, V - 1>(p, vectors, rows, column);
    }
    // pieces of nearly equal height: a short last one would wait for its own sums
    const long pieces = (rows + most_rows(V) - 1) / most_rows(V);
    for (long i = 0; i < pieces; ++i) {
        const long from = rows * i / pieces, to = rows * (i + 1) / pieces;
        tile_of<Real, V>(p, static_cast<int>(to - from), from, column);
    }
}

template <class Real>
void multiply(const Product<Real>& p, long rows, long columns) {
    const long vectors = columns / Lanes<Real>::count, pieces = (vectors + kMostVectors - 1) / kMostVectors;
    for (long i = 0; i < pieces; ++i) {
        const long from = vectors * i / pieces, to = vectors * (i + 1) / pieces;
        strip<Real>(p, static_cast<int>(to - from), rows, from * Lanes<Real>::count);
    }
}

// to (column, row) = from (row, column)
template <class Real>
void transpose(const Real* const* from, long rows, long columns, Real* to, long to_row) {
    constexpr long lanes = Lanes<Real>::count;
    long r = 0;
    for (; r + lanes <= rows; r += lanes)
        for (long c = 0; c < columns; ++c) {
            Vector<Real> v;
            for (int i = 0; i < lanes; ++i) v[i] = from[r + i][c];
            at(to + c * to_row + r) = v;
        }
    for (; r < rows; ++r)
        for (long c = 0; c < columns; ++c) to[c * to_row + r] = from[r][c];
}

}  // namespace

extern "C" {

// Mirrored by kernel.Job.
struct Job {
    int64_t depth;
    const int64_t* widths;  // input, hidden ..., output
    int64_t batch, steps, samples;
    double leak;
    // per layer: (member, node, input_node) and (member, node) or null; moments as the parameters, null if not needed
    void *const *weights, *const *biases;
    void *const *first_weights, *const *first_biases, *const *second_weights, *const *second_biases;
    const void *inputs, *targets;  // (member, sample, ...)
    const int64_t* rows;           // (member, step, batch)
    const double* rates;           // (member,)
    double momentum, weight_decay, beta_1, beta_2, epsilon;
    int64_t adam, normalize;
    const uint8_t* frozen;  // per layer
    int64_t taken;          // steps before these
};
}

namespace {

template <class Real>
class Member {
  public:
    explicit Member(const Job& job) : job(job), depth(job.depth), batch(job.batch), samples(Lanes<Real>::padded(batch)) {
        const long moments = job.adam ? 2 : job.momentum != 0 ? 1 : 0;
        long size = 0, widest = 0;
        const auto reserve = [&size](long numbers) {
            size += numbers;
            return size - numbers;
        };
        std::vector<long> places;
        for (long l = 0; l < depth; ++l) {
            below.push_back(job.widths[l]);
            nodes.push_back(job.widths[l + 1]);
            stride.push_back(Lanes<Real>::padded(below[l] + 1));
            widest = std::max({widest, below[l], nodes[l]});
            places.push_back(reserve(nodes[l] * stride[l]));
            for (long m = 0; m < moments; ++m) places.push_back(reserve(nodes[l] * stride[l]));
            places.push_back(reserve(batch * stride[l]));
            places.push_back(reserve((below[l] + 1) * samples));
        }
        long largest = 0;
        for (long l = 0; l < depth; ++l) largest = std::max(largest, nodes[l] * stride[l]);
        const long down = reserve(moments ? largest : 0), g0 = reserve(widest * samples), g1 = reserve(widest * samples);
        memory = static_cast<Real*>(std::aligned_alloc(64, (size * sizeof(Real) + 63) / 64 * 64));
        if (!memory) throw std::bad_alloc();
        std::memset(memory, 0, size * sizeof(Real));
        auto place = places.begin();
        for (long l = 0; l < depth; ++l) {
            weight.push_back(memory + *place++);
            first.push_back(moments > 0 ? memory + *place++ : nullptr);
            second.push_back(moments > 1 ? memory + *place++ : nullptr);
            by_sample.push_back(memory + *place++);
            by_node.push_back(memory + *place++);
            // the constant node
            for (long b = 0; b < batch; ++b) {
                const Real one = job.biases[l] ? 1 : 0;
                by_sample[l][b * stride[l] + below[l]] = one;
                by_node[l][below[l] * samples + b] = one;
            }
        }
        gradient = memory + down;
        g = memory + g0;
        passed = memory + g1;
        x_rows.resize(batch);
        y_rows.resize(batch);
    }
    Member(const Member&) = delete;
    ~Member() { std::free(memory); }

    void train(long member) {
        exchange(member, &Member::pack);
        const long inputs = below[0], outputs = nodes[depth - 1];
        const Real* x = static_cast<const Real*>(job.inputs) + member * job.samples * inputs;
        const Real* y = static_cast<const Real*>(job.targets) + member * job.samples * outputs;
        const int64_t* rows = job.rows + member * job.steps * batch;
        rate = job.rates[member];
        for (long s = 0; s < job.steps; ++s, rows += batch) {
            for (long b = 0; b < batch; ++b) {
                x_rows[b] = x + rows[b] * inputs;
                y_rows[b] = y + rows[b] * outputs;
            }
            if (s + 1 < job.steps)  // rows are anywhere in the data: ask for the next ones now
                for (long b = 0; b < batch; ++b) {
                    fetch(x + rows[batch + b] * inputs, inputs);
                    fetch(y + rows[batch + b] * outputs, outputs);
                }
            forward();
            backward(job.taken + s + 1);
        }
        exchange(member, &Member::unpack);
    }

  private:
    static void fetch(const Real* p, long numbers) {
        for (long i = 0; i < numbers; i += 64 / static_cast<long>(sizeof(Real))) __builtin_prefetch(p + i, 0, 2);
    }

    void forward() {
        for (long b = 0; b < batch; ++b) std::memcpy(by_sample[0] + b * stride[0], x_rows[b], below[0] * sizeof(Real));
        transpose(x_rows.data(), batch, below[0], by_node[0], samples);
        transpose(y_rows.data(), batch, nodes[depth - 1], g, samples);
        for (long l = 0; l < depth; ++l) {
            const bool top = l == depth - 1;
            const long k = below[l] + (job.biases[l] ? 1 : 0);
            Real* out = top ? g : by_node[l + 1];
            // at the top y - z, the gradient
            multiply<Real>({k, weight[l], stride[l], 1, by_node[l], samples, out, samples, Real(top), Real(top ? -1 : 1)},
                           nodes[l], samples);
            if (!top) activate(l + 1);
        }
    }

    void activate(long l) {
        const Real leak = static_cast<Real>(job.leak);
        constexpr long lanes = Lanes<Real>::count;
        Real* f = by_node[l];
        for (long i = 0; i < below[l] * samples; i += lanes) {
            const Vector<Real> z = at(f + i);
            at(f + i) = z <= 0 ? (leak == 0 ? Vector<Real>{} : leak * z) : z;  // NaN stays NaN
        }
        columns.clear();
        for (long n = 0; n < below[l]; ++n) columns.push_back(f + n * samples);
        transpose(columns.data(), below[l], batch, by_sample[l], stride[l]);
    }

    // Down from g = y - z: dJ/dW = -(1/batch) g f^T, g below = (W^T g) gate.
    void backward(long step) {
        long lowest = 0;
        while (lowest < depth && job.frozen[lowest]) ++lowest;
        for (long l = depth - 1; l >= lowest; --l) {
            if (l > lowest) {
                multiply<Real>({nodes[l], weight[l], 1, stride[l], g, samples, passed, samples, 0, 1}, below[l], samples);
                gate(l);
            }
            if (!job.frozen[l]) update(l, step);
            std::swap(g, passed);
        }
    }

    void gate(long l) {
        const Real leak = static_cast<Real>(job.leak);
        for (long i = 0; i < below[l] * samples; i += Lanes<Real>::count) {
            const Vector<Real> slope = leak * at(passed + i);
            at(passed + i) = at(by_node[l] + i) > 0 ? at(passed + i) : slope;
        }
    }

    void update(long l, long step) {
        const Product<Real> down{batch, g, samples, 1, by_sample[l], stride[l], gradient, stride[l], 0, Real(-1.0 / batch)};
        if (first[l]) {
            multiply<Real>(down, nodes[l], stride[l]);
            job.adam ? adam(l, step) : momentum(l);
        } else {
            Product<Real> direct = down;
            direct.c = weight[l];
            direct.beta = static_cast<Real>(1 - rate * job.weight_decay);
            direct.alpha = static_cast<Real>(rate / batch);
            multiply<Real>(direct, nodes[l], stride[l]);
        }
        if (job.normalize && l < depth - 1)
            for (long n = 0; n < nodes[l]; ++n) {
                Real* w = weight[l] + n * stride[l];
                Real sum = 0;
                for (long i = 0; i < below[l]; ++i) sum += w[i] * w[i];
                const Real norm = std::sqrt(sum);
                for (long i = 0; i < below[l]; ++i) w[i] /= norm;
            }
    }

    void momentum(long l) {
        const Real mu = job.momentum, decay = job.weight_decay, eta = rate;
        Real *w = weight[l], *m = first[l];
        for (long i = 0; i < nodes[l] * stride[l]; ++i) {
            m[i] = mu * m[i] + (gradient[i] + decay * w[i]);
            w[i] -= eta * m[i];
        }
    }

    void adam(long l, long step) {
        const Real decay = job.weight_decay, beta_1 = job.beta_1, beta_2 = job.beta_2, epsilon = job.epsilon;
        const Real rest_1 = 1 - job.beta_1, rest_2 = 1 - job.beta_2, unbias = 1 - std::pow(job.beta_2, double(step));
        const Real eta = rate / (1 - std::pow(job.beta_1, double(step)));
        Real *w = weight[l], *m = first[l], *v = second[l];
        for (long i = 0; i < nodes[l] * stride[l]; ++i) {
            const Real slope = gradient[i] + decay * w[i];
            m[i] = beta_1 * m[i] + rest_1 * slope;
            v[i] = beta_2 * v[i] + rest_2 * slope * slope;
            w[i] -= eta * m[i] / (std::sqrt(v[i] / unbias) + epsilon);
        }
    }

    // Between the caller's tensors and padded rows.
    void exchange(long member, void (Member::*copy)(long, long, void*, void*, Real*)) {
        for (long l = 0; l < depth; ++l) {
            (this->*copy)(l, member, job.weights[l], job.biases[l], weight[l]);
            if (first[l]) (this->*copy)(l, member, job.first_weights[l], job.first_biases[l], first[l]);
            if (second[l]) (this->*copy)(l, member, job.second_weights[l], job.second_biases[l], second[l]);
        }
    }

    void pack(long l, long member, void* weights, void* biases, Real* to) {
        const Real* w = static_cast<const Real*>(weights) + member * nodes[l] * below[l];
        const Real* b = static_cast<const Real*>(biases) + member * nodes[l];
        for (long n = 0; n < nodes[l]; ++n) {
            std::memcpy(to + n * stride[l], w + n * below[l], below[l] * sizeof(Real));
            if (biases) to[n * stride[l] + below[l]] = b[n];
        }
    }

    void unpack(long l, long member, void* weights, void* biases, Real* from) {
        Real* w = static_cast<Real*>(weights) + member * nodes[l] * below[l];
        Real* b = static_cast<Real*>(biases) + member * nodes[l];
        for (long n = 0; n < nodes[l]; ++n) {
            std::memcpy(w + n * below[l], from + n * stride[l], below[l] * sizeof(Real));
            if (biases) b[n] = from[n * stride[l] + below[l]];
        }
    }

    const Job& job;
    const long depth, batch, samples;
    std::vector<long> below, nodes, stride;
    std::vector<Real*> weight, first, second;
    std::vector<Real*> by_sample, by_node;  // activations below each layer: (sample, node + 1), (node + 1, sample)
    std::vector<const Real*> x_rows, y_rows, columns;
    Real *memory, *gradient, *g, *passed;
    double rate = 0;
};

template <class Real>
int run(const Job& job, int64_t member) {
    try {
        Member<Real>(job).train(member);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

}  // namespace

extern "C" {
int train_float64(const Job* job, int64_t member) { return run<double>(*job, member); }
int train_float32(const Job* job, int64_t member) { return run<float>(*job, member); }
}

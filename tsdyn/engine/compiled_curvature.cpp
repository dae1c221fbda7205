// A network's forward pass that is kept, and what a direction of its parameters moves; see compiled_curvature.py.
//
// Samples are taken kColumns at a time, a piece, (node, sample) as in compiled_adjoint.cpp, whose formulas these are with
// two differences: the activation may be smooth, and the slope at the outputs is the caller's.  With R the derivative
// along the direction C (Pearlmutter 1994) and a = W^T gamma of the layer above,
//
//   R z = C f + W R f,   R f = sigma' R z,   gamma = sigma' a,
//   R gamma = sigma' (C^T gamma + W^T R gamma) + sigma'' a R z,   found = R gamma f^T + gamma (R f)^T
//
// What is found is summed block by block, and the caller adds the blocks in order: sums do not depend on how many threads
// share them.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "arena.hpp"
#include "job.hpp"
#include "product.hpp"
#include "smooth.hpp"

extern "C" {

// Mirrored by compiled_curvature.Job.  What is kept is (piece, node, sample of the piece).
struct Job {
    int64_t depth;
    const int64_t* widths;  // input, hidden ..., output
    int64_t samples, block;  // block: pieces
    int64_t activation;      // smooth.hpp's Kind
    double leak;
    void *const *weights, *const *biases;    // per layer: (node, input_node), (node) or null
    void *const *along, *const *bias_along;  // the direction, alike; null of what it leaves
    const void* inputs;                      // (sample, input)
    // kept, per hidden layer: f with the constant node and padding, sigma', z (both null if piecewise linear), R z
    void *const *f, *const *gates, *const *bends, *const *moved;
    void* const* gamma;  // kept, per layer
    // (sample, output): forward sets outputs, moved_up moved_outputs; descend reads slope, moved_down moved_slope
    void *outputs, *moved_outputs;
    const void *slope, *moved_slope;
    void* found;  // (block, numbers): per layer (node, stride), the bias after the input nodes
    int64_t numbers;
    // of squares: the loss is factor/2 times the sum of (outputs - targets)^2, and nothing is kept
    const void* targets;
    double factor;
};
}

TSDYN_EXPORT_JOB(
    TSDYN_FIELD(depth), TSDYN_FIELD(widths), TSDYN_FIELD(samples), TSDYN_FIELD(block), TSDYN_FIELD(activation),
    TSDYN_FIELD(leak), TSDYN_FIELD(weights), TSDYN_FIELD(biases), TSDYN_FIELD(along), TSDYN_FIELD(bias_along),
    TSDYN_FIELD(inputs), TSDYN_FIELD(f), TSDYN_FIELD(gates), TSDYN_FIELD(bends), TSDYN_FIELD(moved), TSDYN_FIELD(gamma),
    TSDYN_FIELD(outputs), TSDYN_FIELD(moved_outputs), TSDYN_FIELD(slope), TSDYN_FIELD(moved_slope), TSDYN_FIELD(found),
    TSDYN_FIELD(numbers), TSDYN_FIELD(targets), TSDYN_FIELD(factor))

namespace {

// Mirrored by compiled_curvature.PIECE.
constexpr long kColumns = 64;

template <class Real>
class Pass {
    static constexpr long lanes = Lanes<Real>::count;

  public:
    // With `whole`, a piece goes all the way at once, and what is kept of it is this object's own.
    explicit Pass(const Job& job, bool whole = false)
        : job(job), depth(job.depth), whole(whole), weight(depth), along(depth), f(depth), moved(depth), gammas(depth) {
        long widest = 0;
        for (long l = 0; l <= depth; ++l) {
            nodes.push_back(job.widths[l]);
            stride.push_back(Lanes<Real>::padded(nodes[l] + 1));
            widest = std::max(widest, stride[l]);
        }
        for (long l = 0; l < depth; ++l) {
            arena.reserve(&weight[l], nodes[l + 1] * stride[l]);
            if (directed(l)) arena.reserve(&along[l], nodes[l + 1] * stride[l]);
        }
        for (Real** place : {&by_sample, &by_node, &above, &moved_above, &gated, &below}) arena.reserve(place, widest * kColumns);
        for (long l = 0; l < depth; ++l) {
            if (!whole) {
                gammas[l] = static_cast<Real*>(job.gamma[l]);
                if (l + 1 == depth) continue;
                f[l] = static_cast<Real*>(job.f[l]), moved[l] = static_cast<Real*>(job.moved[l]);
                continue;
            }
            arena.reserve(&gammas[l], nodes[l + 1] * kColumns);
            if (l + 1 == depth) continue;
            arena.reserve(&f[l], stride[l + 1] * kColumns);
            arena.reserve(&moved[l], nodes[l + 1] * kColumns);
        }
        arena.allocate(false);
        for (long l = 0; l < depth; ++l) {
            copy(l, job.weights[l], job.biases[l], weight[l]);
            if (directed(l)) copy(l, job.along[l], job.bias_along[l], along[l]);
        }
    }
    Pass(const Pass&) = delete;

    void forward(long piece) {
        gather(piece);
        up(piece);
        put(piece, above, job.outputs);
    }

    void descend(long piece) {
        get(piece, job.slope, gamma(depth - 1, piece));
        down(piece);
    }

    void moved_up(long piece) {
        gather(piece);
        up_along(piece);
        put(piece, above, job.moved_outputs);
    }

    void moved_down(long piece, bool begins, Real* found) {
        get(piece, job.moved_slope, moved_above);
        down_along(piece, begins, found);
    }

    // All of it, of a loss that is a sum of squares; sigma is piecewise linear.
    void of_squares(long piece, bool begins, Real* found) {
        const Real factor = static_cast<Real>(job.factor);
        const long numbers = nodes[depth] * kColumns;
        gather(piece);
        up(piece);
        Real* top = gamma(depth - 1, piece);
        get(piece, job.targets, top);
        for (long i = 0; i < numbers; i += lanes) at(top + i) = factor * (at(above + i) - at(top + i));
        down(piece);
        up_along(piece);
        for (long i = 0; i < numbers; i += lanes) at(moved_above + i) = factor * at(above + i);
        down_along(piece, begins, found);
    }

  private:
    // f, sigma' and z of the hidden layers, from the inputs by node; the outputs are `above`.
    void up(long piece) {
        const Real* f = by_node;
        for (long l = 0; l < depth; ++l) {
            const bool top = l == depth - 1;
            Real* z = top ? above : kept(this->f, l, piece, stride[l + 1]);
            multiply<Real>({constant(l), weight[l], stride[l], 1, f, kColumns, z, kColumns, 0}, nodes[l + 1], kColumns);
            if (top) return;
            const long numbers = nodes[l + 1] * kColumns;
            Real *gate = nullptr, *bend = nullptr;
            if (job.activation != kLeaky) {
                gate = kept(job.gates, l, piece, nodes[l + 1]);
                bend = kept(job.bends, l, piece, nodes[l + 1]);
                std::memcpy(bend, z, numbers * sizeof(Real));
            }
            activate<Real>(job.activation, static_cast<Real>(job.leak), z, gate, numbers);
            std::fill_n(z + numbers, kColumns, Real(1));
            std::fill_n(z + numbers + kColumns, (stride[l + 1] - nodes[l + 1] - 1) * kColumns, Real(0));
            f = z;
        }
    }

    // gamma of all layers from that of the top one; bends, sigma'' until now, become sigma'' a.
    void down(long piece) {
        for (long l = depth - 1; l > 0; --l) {
            Real* out = gamma(l - 1, piece);
            multiply<Real>({nodes[l + 1], weight[l], 1, stride[l], gamma(l, piece), kColumns, out, kColumns, 0}, nodes[l],
                           kColumns);
            if (job.activation != kLeaky) {
                Real* bend = kept(job.bends, l - 1, piece, nodes[l]);
                for (long i = 0; i < nodes[l] * kColumns; i += lanes) at(bend + i) *= at(out + i);
            }
            through_gate(l - 1, piece, out, out);
        }
    }

    // R z of all layers, from the inputs by node; that of the outputs is `above`.
    void up_along(long piece) {
        for (long l = 0; l < depth; ++l) {
            const bool top = l == depth - 1;
            Real* z = top ? above : kept(moved, l, piece, nodes[l + 1]);
            const Real* f = l ? kept(this->f, l - 1, piece, stride[l]) : by_node;
            if (directed(l))
                multiply<Real>({nodes[l] + 1, along[l], stride[l], 1, f, kColumns, z, kColumns, 0}, nodes[l + 1], kColumns);
            else if (!l)
                std::fill_n(z, nodes[1] * kColumns, Real(0));
            if (l)
                multiply<Real>({nodes[l], weight[l], stride[l], 1, gated, kColumns, z, kColumns, Real(directed(l))},
                               nodes[l + 1], kColumns);
            if (top) return;
            through_gate(l, piece, z, gated);
        }
    }

    // Adds to what is found from R gamma of the outputs, `moved_above`.
    void down_along(long piece, bool begins, Real* found) {
        const long count = counted(piece);
        for (long l = depth - 1; l >= 0; --l) found += nodes[l + 1] * stride[l];
        for (long l = depth - 1; l >= 0; --l) {
            found -= nodes[l + 1] * stride[l];
            if (l)
                transpose(kept(f, l - 1, piece, stride[l]), kColumns, stride[l], kColumns, by_sample, stride[l]);
            else
                gather_by_sample(piece);
            multiply<Real>({count, moved_above, kColumns, 1, by_sample, stride[l], found, stride[l], Real(!begins)},
                           nodes[l + 1], stride[l]);
            if (!l) return;
            const Real* own = kept(moved, l - 1, piece, nodes[l]);
            through_gate(l - 1, piece, own, gated);
            std::fill_n(gated + nodes[l] * kColumns, (stride[l] - nodes[l]) * kColumns, Real(0));
            transpose(gated, kColumns, stride[l], kColumns, by_sample, stride[l]);
            multiply<Real>({count, gamma(l, piece), kColumns, 1, by_sample, stride[l], found, stride[l], 1}, nodes[l + 1],
                           stride[l]);
            multiply<Real>({nodes[l + 1], weight[l], 1, stride[l], moved_above, kColumns, below, kColumns, 0}, nodes[l],
                           kColumns);
            if (directed(l))
                multiply<Real>({nodes[l + 1], along[l], 1, stride[l], gamma(l, piece), kColumns, below, kColumns, 1},
                               nodes[l], kColumns);
            through_gate(l - 1, piece, below, moved_above);
            if (job.activation == kLeaky) continue;
            const Real* bend = kept(job.bends, l - 1, piece, nodes[l]);
            for (long i = 0; i < nodes[l] * kColumns; i += lanes) at(moved_above + i) += at(bend + i) * at(own + i);
        }
    }

    bool directed(long l) const { return job.along[l] || job.bias_along[l]; }
    // Number of input nodes, with the constant one if there are biases.
    long constant(long l) const { return nodes[l] + (job.biases[l] ? 1 : 0); }
    long counted(long piece) const { return std::min<long>(kColumns, job.samples - piece * kColumns); }
    Real* gamma(long l, long piece) const { return kept(gammas, l, piece, nodes[l + 1]); }
    Real* kept(const std::vector<Real*>& layers, long l, long piece, long rows) const {
        return layers[l] + (whole ? 0 : piece * rows * kColumns);
    }

    static Real* kept(void* const* layers, long l, long piece, long rows) {
        return static_cast<Real*>(layers[l]) + piece * rows * kColumns;
    }

    void copy(long l, const void* weights, const void* biases, Real* to) const {
        const Real *w = static_cast<const Real*>(weights), *b = static_cast<const Real*>(biases);
        for (long n = 0; n < nodes[l + 1]; ++n) {
            Real* row = to + n * stride[l];
            if (w) std::memcpy(row, w + n * nodes[l], nodes[l] * sizeof(Real));
            if (!w) std::fill_n(row, nodes[l], Real(0));
            row[nodes[l]] = b ? b[n] : 0;
        }
    }

    // A piece of the inputs with the constant node and padding, by sample and by node.
    void gather(long piece) {
        gather_by_sample(piece);
        transpose(by_sample, stride[0], kColumns, stride[0], by_node, kColumns);
    }

    void gather_by_sample(long piece) {
        const long inputs = nodes[0], count = counted(piece);
        const Real* x = static_cast<const Real*>(job.inputs) + piece * kColumns * inputs;
        for (long s = 0; s < kColumns; ++s) {
            Real* to = by_sample + s * stride[0];
            if (s < count) std::memcpy(to, x + s * inputs, inputs * sizeof(Real));
            if (s >= count) std::fill_n(to, inputs, Real(0));
            std::fill_n(to + inputs, stride[0] - inputs, Real(0));
            to[inputs] = 1;
        }
    }

    // A piece of (sample, output) from (node, sample), whose rows there are memory for up to a whole line.
    void put(long piece, const Real* from, void* to) {
        const long outputs = nodes[depth], padded = Lanes<Real>::padded(outputs);
        transpose(from, kColumns, padded, kColumns, gated, padded);
        Real* rows = static_cast<Real*>(to) + piece * kColumns * outputs;
        for (long s = 0; s < counted(piece); ++s) std::memcpy(rows + s * outputs, gated + s * padded, outputs * sizeof(Real));
    }

    // The other way; 0 of padded samples.
    void get(long piece, const void* from, Real* to) {
        const long outputs = nodes[depth], padded = Lanes<Real>::padded(outputs), count = counted(piece);
        const Real* rows = static_cast<const Real*>(from) + piece * kColumns * outputs;
        for (long s = 0; s < count; ++s) {
            std::memcpy(by_sample + s * padded, rows + s * outputs, outputs * sizeof(Real));
            std::fill_n(by_sample + s * padded + outputs, padded - outputs, Real(0));
        }
        std::fill_n(by_sample + count * padded, (kColumns - count) * padded, Real(0));
        transpose(by_sample, padded, kColumns, padded, below, kColumns);
        std::memcpy(to, below, outputs * kColumns * sizeof(Real));
    }

    // sigma' of hidden layer l times (node, sample).
    void through_gate(long l, long piece, const Real* from, Real* to) const {
        const long numbers = nodes[l + 1] * kColumns;
        if (job.activation != kLeaky) {
            const Real* gate = kept(job.gates, l, piece, nodes[l + 1]);
            for (long i = 0; i < numbers; i += lanes) at(to + i) = at(gate + i) * at(from + i);
            return;
        }
        const Real leak = static_cast<Real>(job.leak), *f = kept(this->f, l, piece, stride[l + 1]);
        for (long i = 0; i < numbers; i += lanes) {
            const Vector<Real> value = at(from + i), low = leak * value;
            at(to + i) = at(f + i) > 0 ? value : low;
        }
    }

    const Job& job;
    const long depth;
    const bool whole;
    Arena<Real> arena;
    std::vector<long> nodes, stride;  // of inputs, hidden layers, outputs
    std::vector<Real*> weight, along;
    std::vector<Real*> f, moved, gammas;  // kept, per hidden layer and per layer
    Real *by_sample = nullptr, *by_node = nullptr;                     // of a layer's inputs
    Real *above = nullptr, *moved_above = nullptr, *below = nullptr;  // (node, sample)
    Real* gated = nullptr;
};

template <class Real>
int each(const Job& job, int64_t from, int64_t to, void (Pass<Real>::*call)(long)) {
    try {
        Pass<Real> pass(job);
        for (int64_t piece = from; piece < to; ++piece) (pass.*call)(piece);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

template <class Real>
int sums(const Job& job, int64_t from, int64_t to, bool whole, void (Pass<Real>::*call)(long, bool, Real*)) {
    try {
        Pass<Real> pass(job, whole);
        const int64_t pieces = (job.samples + kColumns - 1) / kColumns;
        for (int64_t block = from; block < to; ++block) {
            Real* found = static_cast<Real*>(job.found) + block * job.numbers;
            const int64_t first = block * job.block, last = std::min(first + job.block, pieces);
            for (int64_t piece = first; piece < last; ++piece) (pass.*call)(piece, piece == first, found);
        }
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

}  // namespace

#define TSDYN_PASSES(Real, type)                                                                                         \
    int forward_##type(const Job* job, int64_t from, int64_t to) { return each<Real>(*job, from, to, &Pass<Real>::forward); } \
    int descend_##type(const Job* job, int64_t from, int64_t to) { return each<Real>(*job, from, to, &Pass<Real>::descend); } \
    int moved_up_##type(const Job* job, int64_t from, int64_t to) { return each<Real>(*job, from, to, &Pass<Real>::moved_up); } \
    int moved_down_##type(const Job* job, int64_t from, int64_t to) { return sums<Real>(*job, from, to, false, &Pass<Real>::moved_down); } \
    int of_squares_##type(const Job* job, int64_t from, int64_t to) { return sums<Real>(*job, from, to, true, &Pass<Real>::of_squares); }

extern "C" {
// Pieces from..to-1; of moved_down and of_squares blocks.
TSDYN_PASSES(double, float64)
TSDYN_PASSES(float, float32)
}

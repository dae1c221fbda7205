// Squared error and sums for correlations of a network on a data set, in one pass in cache; see compiled_sums.py.
//
// Samples are propagated kColumns at a time, (node, sample) as in compiled_step.cpp.  Written for each block of samples,
// one after another: sum of squared errors; then for each hidden layer for which a teacher's activations are given
// mean, sum of squares about it, least and greatest of every node (node); and sum over samples of
// (f - shift) t (node, teacher_node, rows padded), with the shift (node): the mean of the block's first piece, so that
// no digit is lost in nodes of small variance.  Blocks are of a fixed size and are added in order (`finish`): sums do not
// depend on how many threads share them.
//
// Data that are passed often may be given turned, too (`turn`), piece after piece as they are read: inputs and the
// constant node (node, sample), targets (node, sample), each teacher's activations (sample, node), all rows padded.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <utility>
#include <vector>

#include "job.hpp"
#include "product.hpp"
#include "smooth.hpp"

extern "C" {

// Mirrored by compiled_sums.Job.
struct Job {
    int64_t depth;
    const int64_t* widths;  // input, hidden ..., output
    int64_t samples, block;
    int64_t activation;  // smooth.hpp's Kind
    double leak;
    void *const *weights, *const *biases;  // per layer: (node, input_node), (node) or null
    const void *inputs, *targets;          // (sample, ...)
    const void* turned;                    // inputs, targets and teachers as they are read, or null
    const int64_t* teacher_widths;         // per hidden layer
    void* const* teachers;                 // per hidden layer: (sample, teacher_node) or null
    void* const* taught;                   // per hidden layer: their sums over each block, (block, teacher_node)
    void* found;                           // (block, numbers)
    int64_t numbers;
    void* const* correlations;  // per hidden layer: (teacher_node, node)
    void* squared_error;
};
}

TSDYN_EXPORT_JOB(
    TSDYN_FIELD(depth), TSDYN_FIELD(widths), TSDYN_FIELD(samples), TSDYN_FIELD(block), TSDYN_FIELD(activation),
    TSDYN_FIELD(leak), TSDYN_FIELD(weights), TSDYN_FIELD(biases), TSDYN_FIELD(inputs), TSDYN_FIELD(targets), TSDYN_FIELD(turned),
    TSDYN_FIELD(teacher_widths), TSDYN_FIELD(teachers), TSDYN_FIELD(taught),
    TSDYN_FIELD(found), TSDYN_FIELD(numbers), TSDYN_FIELD(correlations), TSDYN_FIELD(squared_error))

namespace {

constexpr long kColumns = 32;

// Rows of a piece of turned data, of kColumns numbers each.
template <class Real>
long rows_of_teachers(const Job& job) {
    long rows = 0;
    for (long l = 0; l + 1 < job.depth; ++l)
        if (job.teachers[l]) rows += Lanes<Real>::padded(job.teacher_widths[l]);
    return rows;
}
template <class Real>
long turned_rows(const Job& job) {
    return Lanes<Real>::padded(job.widths[0] + 1) + Lanes<Real>::padded(job.widths[job.depth]) + rows_of_teachers<Real>(job);
}

template <class Real>
class Pass {
    static constexpr long lanes = Lanes<Real>::count;

  public:
    explicit Pass(const Job& job) : job(job), depth(job.depth) {
        long size = 0;
        std::vector<long> places;
        const auto reserve = [&](long numbers) {
            places.push_back(size);
            size += Lanes<Real>::padded(numbers);
        };
        long widest = 0;
        for (long l = 0; l < depth; ++l) {
            below.push_back(job.widths[l]);
            nodes.push_back(job.widths[l + 1]);
            stride.push_back(Lanes<Real>::padded(below[l] + 1));
            widest = std::max(widest, nodes[l]);
            reserve(nodes[l] * stride[l]);  // weight
            reserve(stride[l] * kColumns);  // activation below, (node + 1, sample)
            const bool asked = l + 1 < depth && job.teachers[l];
            known.push_back(asked ? Lanes<Real>::padded(job.teacher_widths[l]) : 0);
            reserve(asked ? nodes[l] * (4 * lanes + 1 + known[l]) + kLineBytes : 0);  // sums, shift, overlap
            reserve(asked ? kColumns * known[l] : 0);                                   // teacher's, (sample, node)
        }
        const long inputs = stride[0], outputs = Lanes<Real>::padded(nodes[depth - 1]);
        reserve(kColumns * std::max(inputs, outputs));
        reserve(outputs * kColumns);
        reserve(widest * kColumns);
        memory = static_cast<Real*>(std::aligned_alloc(64, size * sizeof(Real)));
        if (!memory) throw std::bad_alloc();
        std::memset(memory, 0, size * sizeof(Real));
        auto place = places.begin();
        for (long l = 0; l < depth; ++l) {
            weight.push_back(memory + *place++);
            activation.push_back(memory + *place++);
            sums.push_back(memory + *place++);
            teacher.push_back(memory + *place++);
            const Real* w = static_cast<const Real*>(job.weights[l]);
            const Real* b = static_cast<const Real*>(job.biases[l]);
            for (long n = 0; n < nodes[l]; ++n) {
                std::memcpy(weight[l] + n * stride[l], w + n * below[l], below[l] * sizeof(Real));
                if (b) weight[l][n * stride[l] + below[l]] = b[n];
            }
            add_constant(activation[l], l);
        }
        rows_of_piece = memory + *place++;
        error = memory + *place++;
        centred = memory + *place++;
        for (long l = 0; l < depth; ++l) rounds += rounds_of<Real>(nodes[l], kColumns, below[l]);
    }
    Pass(const Pass&) = delete;
    ~Pass() { std::free(memory); }

    // Writes what `Job.turned` explains.
    void turn(Real* to) {
        for (long s = 0; s < job.samples; s += kColumns) {
            const long count = std::min(kColumns, job.samples - s), outputs = nodes[depth - 1];
            turn_inputs(s, count, to);
            to += stride[0] * kColumns;
            turn(job.targets, s, count, outputs, to);
            to += Lanes<Real>::padded(outputs) * kColumns;
            for (long l = 0; l + 1 < depth; ++l) {
                if (!known[l]) continue;
                std::fill_n(to, known[l] * kColumns, Real(0));
                gather(job.teachers[l], s, count, job.teacher_widths[l], to, known[l]);
                to += known[l] * kColumns;
            }
        }
    }

    void block(long index) {
        const long from = index * job.block, to = std::min<long>(from + job.block, job.samples);
        square = Vector<Real>{};
        rest = 0;
        for (long s = from; s < to; s += kColumns) piece(s, std::min(kColumns, to - s), s == from);
        write(static_cast<Real*>(job.found) + index * job.numbers, to - from);
    }

  private:
    void piece(long first, long count, bool begins) {
        const long outputs = nodes[depth - 1];
        const Real *inputs = activation[0], *targets = error, *taught = nullptr;
        if (job.turned) {
            inputs = turned(first);
            targets = inputs + stride[0] * kColumns;
            taught = targets + Lanes<Real>::padded(outputs) * kColumns;
        } else {
            turn_inputs(first, count, activation[0]);
            turn(job.targets, first, count, outputs, error);
        }
        ask_for(first + count);
        for (long l = 0; l < depth; ++l) {
            const bool top = l == depth - 1;
            const long k = below[l] + (job.biases[l] ? 1 : 0);
            Real* out = top ? error : activation[l + 1];
            multiply<Real>({k, weight[l], stride[l], 1, l ? activation[l] : inputs, kColumns, out, kColumns,
                            Real(top ? -1 : 0), top ? targets : nullptr},
                           nodes[l], kColumns, later);
            if (top) break;
            activate<Real>(job.activation, static_cast<Real>(job.leak), out, nullptr, nodes[l] * kColumns);
            if (!known[l]) continue;
            if (!taught) gather(job.teachers[l], first, count, job.teacher_widths[l], teacher[l], known[l]);
            compare(l, taught ? taught : teacher[l], count, begins);
            if (taught) taught += known[l] * kColumns;
        }
        const long whole = count / lanes * lanes;
        for (long n = 0; n < outputs; ++n) {
            const Real* e = error + n * kColumns;
            for (long i = 0; i < whole; i += lanes) square += at(e + i) * at(e + i);
            for (long i = whole; i < count; ++i) rest += e[i] * e[i];
        }
    }

    void add_constant(Real* f, long l) const { std::fill_n(f + below[l] * kColumns, kColumns, Real(1)); }

    void turn_inputs(long first, long count, Real* to) {
        turn(job.inputs, first, count, below[0], to);
        add_constant(to, 0);
    }

    // The piece from sample `first` on.
    const Real* turned(long first) const { return static_cast<const Real*>(job.turned) + first * turned_rows<Real>(job); }

    // to (node, sample) = rows of a piece (sample, node).  Whole vectors are read, past the end of a row from the next:
    // what that leaves in nodes that there are not is not used.
    void turn(const void* from, long first, long count, long width, Real* to) {
        const long padded = Lanes<Real>::padded(width);
        const Real* rows = static_cast<const Real*>(from) + first * width;
        if (count == kColumns && vectors_fit(first + count, width)) {
            transpose(rows, width, kColumns, padded, to, kColumns);
        } else {
            gather(from, first, count, width, rows_of_piece, padded);
            transpose(rows_of_piece, padded, kColumns, padded, to, kColumns);
        }
    }

    // Ask for the piece from sample `first` on while this one is multiplied: otherwise a quarter of all time is waiting.
    void ask_for(long first) {
        const long count = std::min(kColumns, job.samples - first);
        later.clear();
        if (count <= 0) return;
        if (job.turned) {
            const Real *inputs = turned(first), *targets = inputs + stride[0] * kColumns;
            const long padded = Lanes<Real>::padded(nodes[depth - 1]);
            later.add(targets + padded * kColumns, rows_of_teachers<Real>(job) * kColumns);
            later.add(targets, nodes[depth - 1] * kColumns);
            later.add(inputs, (below[0] + 1) * kColumns);
            return later.within(rounds);
        }
        const auto add = [&](const void* of, long width) {
            later.add(static_cast<const Real*>(of) + first * width, count * width);
        };
        add(job.inputs, below[0]);
        add(job.targets, nodes[depth - 1]);
        for (long l = 0; l + 1 < depth; ++l)
            if (known[l]) add(job.teachers[l], job.teacher_widths[l]);
        later.within(rounds);
    }

    // Whether whole vectors can be read of all rows before this one.
    bool vectors_fit(long row, long width) const {
        return (job.samples - row) * width >= Lanes<Real>::padded(width) - width;
    }

    // Copies some rows, each to the start of a cache line.
    void gather(const void* from, long first, long count, long width, Real* to, long stride) const {
        const Real* p = static_cast<const Real*>(from) + first * width;
        if (!vectors_fit(first + count, width)) {
            for (long s = 0; s < count; ++s) std::memcpy(to + s * stride, p + s * width, width * sizeof(Real));
            return;
        }
        for (long s = 0; s < count; ++s)
            for (long i = 0; i < stride; i += lanes) at(to + s * stride + i) = anywhere(p + s * width + i);
    }

    // Adds a hidden layer's sums over the samples of this piece.
    void compare(long l, const Real* taught, long count, bool begins) {
        const long n = nodes[l], whole = count / lanes * lanes;
        Real* const f = activation[l + 1];
        Real* shift = sums[l] + n * 4 * lanes;
        Real* overlap = shift + Lanes<Real>::padded(n);
        constexpr Real most = std::numeric_limits<Real>::infinity();
        for (long k = 0; k < n; ++k) {
            Real* const own = sums[l] + k * 4 * lanes;
            Real* const row = f + k * kColumns;
            if (begins) {
                Real total = 0;
                for (long i = 0; i < count; ++i) total += row[i];
                shift[k] = total / static_cast<Real>(count);
                at(own) = at(own + lanes) = Vector<Real>{};
                at(own + 2 * lanes) = Vector<Real>{} + most;
                at(own + 3 * lanes) = Vector<Real>{} - most;
            }
            const Real about = shift[k];
            Vector<Real> sum = at(own), squares = at(own + lanes), low = at(own + 2 * lanes), high = at(own + 3 * lanes);
            Real* const c = centred + k * kColumns;
            for (long i = 0; i < whole; i += lanes) {
                const Vector<Real> value = at(row + i), d = value - about;
                at(c + i) = d;
                sum += d;
                squares += d * d;
                low = value < low ? value : low;
                high = value > high ? value : high;
            }
            for (long i = whole; i < count; ++i) {
                const Real d = row[i] - about;
                c[i] = d;
                sum[i - whole] += d;
                squares[i - whole] += d * d;
                low[i - whole] = std::min<Real>(low[i - whole], row[i]);
                high[i - whole] = std::max<Real>(high[i - whole], row[i]);
            }
            at(own) = sum, at(own + lanes) = squares, at(own + 2 * lanes) = low, at(own + 3 * lanes) = high;
        }
        multiply<Real>({count, centred, kColumns, 1, taught, known[l], overlap, known[l], Real(begins ? 0 : 1)}, n,
                       known[l]);
    }

    void write(Real* to, long count) const {
        Real total = rest;
        for (long i = 0; i < lanes; ++i) total += square[i];
        *to++ = total;
        for (long l = 0; l + 1 < depth; ++l) {
            if (!known[l]) continue;
            const long n = nodes[l];
            const Real* shift = sums[l] + n * 4 * lanes;
            const Real* overlap = shift + Lanes<Real>::padded(n);
            for (long k = 0; k < n; ++k) {
                const Real* own = sums[l] + k * 4 * lanes;
                Real sum = 0, squares = 0, low = own[2 * lanes], high = own[3 * lanes];
                for (long i = 0; i < lanes; ++i) {
                    sum += own[i];
                    squares += own[lanes + i];
                    low = std::min(low, own[2 * lanes + i]);
                    high = std::max(high, own[3 * lanes + i]);
                }
                const Real off = sum / static_cast<Real>(count);
                to[k] = shift[k] + off;
                to[n + k] = squares - off * sum;
                to[2 * n + k] = low;
                to[3 * n + k] = high;
                to[4 * n + k] = shift[k];
            }
            to += 5 * n;
            std::memcpy(to, overlap, n * known[l] * sizeof(Real));
            to += n * known[l];
        }
    }

    const Job& job;
    const long depth;
    std::vector<long> below, nodes, stride, known;  // known: padded teacher nodes, 0 where not asked
    std::vector<Real*> weight, activation, sums, teacher;
    Real *memory, *rows_of_piece, *error, *centred;
    Ahead later;
    long rounds = 0;  // of all tiles of a piece
    Vector<Real> square{};
    Real rest = 0;
};

long columns_of(const Job& job) { return (job.samples + kColumns - 1) / kColumns * kColumns; }
long blocks_of(const Job& job) { return (job.samples + job.block - 1) / job.block; }

template <class Real>
int run(const Job* const* jobs, int64_t count, int64_t from, int64_t to) {
    try {
        for (long j = 0, start = 0; j < count && start < to; ++j) {
            const long blocks = blocks_of(*jobs[j]), first = std::max<long>(from - start, 0);
            const long last = std::min<long>(to - start, blocks);
            start += blocks;
            if (first >= last) continue;
            Pass<Real> pass(*jobs[j]);
            for (long i = first; i < last; ++i) pass.block(i);
        }
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

template <class Real>
int turn(const Job& job, void* to) {
    try {
        Pass<Real>(job).turn(static_cast<Real*>(to));
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

// The whole data's numbers of those of its blocks, with mean m, means m_b and shifts c_b of blocks of n_b samples:
// sum_x t (f - m) = sum_b [sum_(x in b) t (f - c_b) + (c_b - m) sum_(x in b) t], and
// sum_x (f - m)^2 = sum_b [sum_(x in b) (f - m_b)^2 + n_b (m_b - m)^2].  Nodes that are constant are NaN.
template <class Real>
void finish(const Job& job) {
    const long blocks = blocks_of(job), numbers = job.numbers;
    const Real* found = static_cast<const Real*>(job.found);
    const auto size = [&](long b) { return static_cast<Real>(std::min<long>(job.block, job.samples - b * job.block)); };
    Real total = 0;
    for (long b = 0; b < blocks; ++b) total += found[b * numbers];
    *static_cast<Real*>(job.squared_error) = total;
    ++found;
    for (long l = 0; l + 1 < job.depth; ++l) {
        if (!job.teachers[l]) continue;
        const long n = job.widths[l + 1], known = job.teacher_widths[l], padded = Lanes<Real>::padded(known);
        const Real* taught = static_cast<const Real*>(job.taught[l]);
        for (long k = 0; k < n; ++k) {
            constexpr Real most = std::numeric_limits<Real>::infinity();
            Real mean = 0, square = 0, low = most, high = -most;
            for (long b = 0; b < blocks; ++b) mean += size(b) * found[b * numbers + k];
            mean /= static_cast<Real>(job.samples);
            for (long b = 0; b < blocks; ++b) {
                const Real *of = found + b * numbers + k, off = of[0] - mean;
                square += of[n] + size(b) * off * off;
                low = std::min(low, of[2 * n]);
                high = std::max(high, of[3 * n]);
            }
            const Real norm = low == high ? std::numeric_limits<Real>::quiet_NaN() : std::sqrt(square);
            for (long t = 0; t < known; ++t) {
                Real sum = 0;
                for (long b = 0; b < blocks; ++b) {
                    const Real* of = found + b * numbers;
                    sum += of[5 * n + k * padded + t] + taught[b * known + t] * (of[4 * n + k] - mean);
                }
                static_cast<Real*>(job.correlations[l])[t * n + k] = sum / norm;
            }
        }
        found += n * (5 + padded);
    }
}

}  // namespace

extern "C" {
// Blocks from..to-1 of all jobs', counted from the first job's on.
int forward_float64(const Job* const* jobs, int64_t count, int64_t from, int64_t to) {
    return run<double>(jobs, count, from, to);
}
int forward_float32(const Job* const* jobs, int64_t count, int64_t from, int64_t to) {
    return run<float>(jobs, count, from, to);
}
// Numbers that `turned` points to.
int64_t turned_numbers_float64(const Job* job) { return turned_rows<double>(*job) * columns_of(*job); }
int64_t turned_numbers_float32(const Job* job) { return turned_rows<float>(*job) * columns_of(*job); }
// Writes them; 1 if there is no memory for a second copy of the parameters.
int turn_float64(const Job* job, void* to) { return turn<double>(*job, to); }
int turn_float32(const Job* job, void* to) { return turn<float>(*job, to); }
// After all blocks.
void finish_float64(const Job* const* jobs, int64_t count) {
    for (int64_t j = 0; j < count; ++j) finish<double>(*jobs[j]);
}
void finish_float32(const Job* const* jobs, int64_t count) {
    for (int64_t j = 0; j < count; ++j) finish<float>(*jobs[j]);
}
}

// Sums over samples of G^T G and G^T G*, G = V D, with the inactive nodes left out of every product; see
// compiled_moments.py.
//
// For one sample G (output, node) is zero in the columns of inactive nodes, so that only its active columns are kept:
//
//   down   G_l (output, active)  = G_{l+1} W_{l+1} [active above, active]     columns: active nodes
//   sums   P (active, active)    = G^T G                                      added to the nodes they belong to
//
// G^T G is symmetric: its upper triangle is summed, and the caller copies it to the lower.  Blocks of samples are of a
// fixed size and added by the caller in order, so that sums do not depend on how many threads share them.

#include <algorithm>
#include <cstdint>
#include <new>
#include <utility>
#include <vector>

#include "arena.hpp"
#include "job.hpp"
#include "product.hpp"

extern "C" {

// Mirrored by compiled_moments.Job.
struct Job {
    int64_t depth, samples, block, lowest;  // lowest: hidden layer 1, 2, ... down to which sums are asked for
    const int64_t *widths, *teacher_widths;  // input, hidden ..., output
    void *const *weights, *const *teacher_weights;  // per layer: (node, input_node)
    void *const *gates, *const *teacher_gates;      // per hidden layer: (sample, node)
    void* found;  // (block, numbers): for layers lowest, ..., depth - 2: (node, node), then (node, teacher_node)
    int64_t numbers;
};
}

TSDYN_EXPORT_JOB(
    TSDYN_FIELD(depth), TSDYN_FIELD(samples), TSDYN_FIELD(block), TSDYN_FIELD(lowest), TSDYN_FIELD(widths),
    TSDYN_FIELD(teacher_widths), TSDYN_FIELD(weights), TSDYN_FIELD(teacher_weights), TSDYN_FIELD(gates),
    TSDYN_FIELD(teacher_gates), TSDYN_FIELD(found), TSDYN_FIELD(numbers))

namespace {

// G of one network at one sample, from the top hidden layer downwards.
template <class Real>
class Side {
  public:
    Side(Arena<Real>& arena, long depth, const int64_t* widths, void* const* weights, void* const* gates)
        : depth(depth), outputs(widths[depth]), widths(widths), weights(weights), gates(gates) {
        const long widest = *std::max_element(widths + 1, widths + depth);
        const long padded = Lanes<Real>::padded(widest);
        arena.reserve(&columns, outputs * padded);
        arena.reserve(&next, outputs * padded);
        arena.reserve(&kept, widest * padded);
        active.reserve(widest);
        above.reserve(widest);
    }

    void start(long sample) {
        const long layer = depth - 1, nodes = widths[layer];
        list(layer, sample);
        const Real* w = static_cast<const Real*>(weights[layer]);
        gather(w, nodes, outputs, nullptr, layer, sample, columns);
    }

    // From hidden layer `layer` + 1 to `layer`.
    void down(long layer, long sample) {
        const long nodes = widths[layer], rows = count(), old = stride;
        std::swap(active, above);
        list(layer, sample);
        gather(static_cast<const Real*>(weights[layer]), nodes, rows, above.data(), layer, sample, kept);
        multiply<Real>({rows, columns, old, 1, kept, stride, next, stride, 0}, outputs, stride);
        std::swap(columns, next);
    }

    long count() const { return static_cast<long>(active.size()); }

    const long depth, outputs;
    long stride = 0;           // of `columns`
    Real* columns = nullptr;   // (output, active node), the rest of a row zero
    std::vector<int> active;

  private:
    void list(long layer, long sample) {
        const long nodes = widths[layer];
        const Real* gate = static_cast<const Real*>(gates[layer - 1]) + sample * nodes;
        active.clear();
        for (long n = 0; n < nodes; ++n)
            if (!(gate[n] == 0)) active.push_back(static_cast<int>(n));  // NaN included
        stride = Lanes<Real>::padded(std::max<long>(count(), 1));
    }

    // to (row, active node) = from (row or the listed row, node) gate
    void gather(const Real* from, long nodes, long rows, const int* listed, long layer, long sample, Real* to) const {
        const Real* gate = static_cast<const Real*>(gates[layer - 1]) + sample * nodes;
        const long held = count();
        for (long r = 0; r < rows; ++r, to += stride) {
            const Real* row = from + (listed ? listed[r] : r) * nodes;
            for (long i = 0; i < held; ++i) to[i] = row[active[i]] * gate[active[i]];
            std::fill(to + held, to + stride, Real(0));
        }
    }

    const int64_t* widths;
    void *const *weights, *const *gates;
    std::vector<int> above;
    Real *next = nullptr, *kept = nullptr;
};

template <class Real>
class Sums {
  public:
    explicit Sums(const Job& job)
        : job(job),
          own(arena, job.depth, job.widths, job.weights, job.gates),
          taught(arena, job.depth, job.teacher_widths, job.teacher_weights, job.teacher_gates) {
        const long mine = *std::max_element(job.widths + 1, job.widths + job.depth);
        const long theirs = *std::max_element(job.teacher_widths + 1, job.teacher_widths + job.depth);
        arena.reserve(&product, mine * Lanes<Real>::padded(std::max(mine, theirs)));
        arena.allocate();
    }

    void block(long index) {
        Real* const found = static_cast<Real*>(job.found) + index * job.numbers;
        std::fill_n(found, job.numbers, Real(0));
        const long hidden = job.depth - 1, first = index * job.block;
        for (long s = first; s < std::min<long>(first + job.block, job.samples); ++s) {
            own.start(s);
            taught.start(s);
            Real* to = found + job.numbers;
            for (long layer = hidden - 1; layer >= job.lowest; --layer) {
                own.down(layer, s);
                taught.down(layer, s);
                const long nodes = job.widths[layer], theirs = job.teacher_widths[layer];
                to -= nodes * (nodes + theirs);
                symmetric(to, nodes);
                mixed(to + nodes * nodes, theirs);
            }
        }
    }

  private:
    void symmetric(Real* to, long nodes) {
        constexpr long panel = 2 * kRows;
        const long count = own.count();
        for (long from = 0; from < count; from += panel) {
            const long rows = std::min(panel, count - from);
            const long left = from / Lanes<Real>::count * Lanes<Real>::count;
            multiply<Real>({own.outputs, own.columns + from, 1, own.stride, own.columns + left, own.stride,
                            product + left, own.stride, 0},
                           rows, own.stride - left);
            for (long i = from; i < from + rows; ++i)
                add(product + (i - from) * own.stride, own.active, i, to + own.active[i] * nodes);
        }
    }

    void mixed(Real* to, long theirs) {
        const long count = own.count();
        multiply<Real>({own.outputs, own.columns, 1, own.stride, taught.columns, taught.stride, product, taught.stride, 0},
                       count, taught.stride);
        for (long i = 0; i < count; ++i) add(product + i * taught.stride, taught.active, 0, to + own.active[i] * theirs);
    }

    static void add(const Real* row, const std::vector<int>& active, long from, Real* to) {
        const int* at = active.data();
        const long count = static_cast<long>(active.size());
        for (long j = from; j < count; ++j) to[at[j]] += row[j];
    }

    const Job& job;
    Arena<Real> arena;
    Side<Real> own, taught;
    Real* product = nullptr;
};

template <class Real>
int run(const Job& job, int64_t from, int64_t to) {
    try {
        Sums<Real> sums(job);
        for (int64_t i = from; i < to; ++i) sums.block(i);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

}  // namespace

extern "C" {
// Blocks from..to-1.
int moments_float64(const Job* job, int64_t from, int64_t to) { return run<double>(*job, from, to); }
int moments_float32(const Job* job, int64_t from, int64_t to) { return run<float>(*job, from, to); }
}

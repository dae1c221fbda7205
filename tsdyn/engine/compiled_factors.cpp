// Products of two factors, one per sample, and their squared norms; see compiled_factors.py.

#include <algorithm>
#include <cstdint>
#include <new>

#include "arena.hpp"
#include "job.hpp"
#include "product.hpp"

extern "C" {

// Mirrored by compiled_factors.Job.
struct Job {
    int64_t samples, positions, inputs, outputs;  // rows of inputs are whole cache lines
    const void *f, *g;                            // (sample, position, input), (sample, position, output)
    void* found;                                  // (sample, output, input), or (sample) squared norms
};
}

TSDYN_EXPORT_JOB(
    TSDYN_FIELD(samples), TSDYN_FIELD(positions), TSDYN_FIELD(inputs), TSDYN_FIELD(outputs), TSDYN_FIELD(f), TSDYN_FIELD(g),
    TSDYN_FIELD(found))

namespace {

// Results of more bytes are written past the caches.
constexpr int64_t kCached = 1 << 20;

// A sample's product.  The next one's factors are asked for meanwhile: they are read in columns, a line here and a line
// there, for which nobody else asks ahead.
template <class Real>
void product(const Job& job, int64_t s, Real* to, bool past, Ahead& later) {
    const int64_t of_f = job.positions * job.inputs, of_g = job.positions * job.outputs;
    const Real *f = static_cast<const Real*>(job.f) + s * of_f, *g = static_cast<const Real*>(job.g) + s * of_g;
    later.clear();
    if (s + 1 < job.samples) {
        later.add(g + of_g, of_g);
        later.add(f + of_f, of_f);
        later.within(rounds_of<Real>(job.outputs, job.inputs, job.positions));
    }
    multiply<Real>({job.positions, g, 1, job.outputs, f, job.inputs, to, job.inputs, 0, nullptr, past}, job.outputs,
                   job.inputs, later);
}

template <class Real>
int products(const Job& job, int64_t from, int64_t to) {
    const int64_t each = job.outputs * job.inputs;
    const bool past = job.samples * each * static_cast<int64_t>(sizeof(Real)) > kCached;
    try {
        Ahead later;
        for (int64_t s = from; s < to; ++s) product<Real>(job, s, static_cast<Real*>(job.found) + s * each, past, later);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    if (past) settle();
    return 0;
}

template <class Real>
int squares(const Job& job, int64_t from, int64_t to) {
    constexpr long lanes = Lanes<Real>::count;
    try {
        Arena<Real> arena;
        Real* one = nullptr;
        arena.reserve(&one, job.outputs * job.inputs);
        arena.allocate(false);
        Ahead later;
        for (int64_t s = from; s < to; ++s) {
            product<Real>(job, s, one, false, later);
            double total = 0;  // of many sums, each of a row and a lane
            for (long row = 0; row < job.outputs; ++row) {
                Vector<Real> sum = {};
                for (long i = 0; i < job.inputs; i += lanes) sum += at(one + row * job.inputs + i) * at(one + row * job.inputs + i);
                for (long lane = 0; lane < lanes; ++lane) total += sum[lane];
            }
            static_cast<Real*>(job.found)[s] = static_cast<Real>(total);
        }
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

}  // namespace

extern "C" {
// Samples from..to-1.
int products_float64(const Job* job, int64_t from, int64_t to) { return products<double>(*job, from, to); }
int products_float32(const Job* job, int64_t from, int64_t to) { return products<float>(*job, from, to); }
int squares_float64(const Job* job, int64_t from, int64_t to) { return squares<double>(*job, from, to); }
int squares_float32(const Job* job, int64_t from, int64_t to) { return squares<float>(*job, from, to); }
}

// Convolutions of many members with samples innermost, (member, channel, row, column, sample); see convolution.py.

#include "convolution.hpp"

#include "arena.hpp"
#include "job.hpp"

extern "C" {

// Mirrored by convolution.Job.
struct Job {
    int64_t members, channels, below, rows, columns, kernel_rows, kernel_columns, batch;  // rows, columns of the output
    const void *input, *weight, *bias, *output;  // bias: null for none
};
}

TSDYN_EXPORT_JOB(
    TSDYN_FIELD(members), TSDYN_FIELD(channels), TSDYN_FIELD(below), TSDYN_FIELD(rows), TSDYN_FIELD(columns),
    TSDYN_FIELD(kernel_rows), TSDYN_FIELD(kernel_columns), TSDYN_FIELD(batch), TSDYN_FIELD(input),
    TSDYN_FIELD(weight), TSDYN_FIELD(bias), TSDYN_FIELD(output))

namespace {

Convolution shape(const Job& job) {
    Convolution s{job.channels,    job.below,          job.rows,  job.columns,
                  job.kernel_rows, job.kernel_columns, job.batch, {}, {}};
    s.x.line = (job.columns + job.kernel_columns - 1) * job.batch;
    s.x.image = (job.rows + job.kernel_rows - 1) * s.x.line;
    s.z = {s.run(), job.rows * s.run()};
    return s;
}

// call(input, weight, bias, output) of each member, with the scratch it may use; false if there is no memory for that.
template <class Real, class Call>
int64_t each(const Job& job, const Convolution& s, long numbers, Call call) {
    Arena<Real> arena;
    Real* scratch = nullptr;
    arena.reserve(&scratch, numbers);
    try {
        arena.allocate(false);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    for (long m = 0; m < job.members; ++m)
        call(static_cast<const Real*>(job.input) + m * s.below * s.x.image,
             static_cast<Real*>(const_cast<void*>(job.weight)) + m * s.channels * s.taps(),
             job.bias ? static_cast<const Real*>(job.bias) + m * s.channels : nullptr,
             static_cast<Real*>(const_cast<void*>(job.output)) + m * s.channels * s.z.image, scratch);
    return 0;
}

template <class Real>
int64_t convolve(const Job& job) {
    const Convolution s = shape(job);
    return each<Real>(job, s, s.channels * s.taps(), [&](auto* x, Real* w, const Real* bias, Real* z, Real* packed) {
        pack(s, w, packed);
        convolve(s, x, packed, bias, z, [](Vector<Real> sum, long, long, long, long) { return sum; });
    });
}

// The output is the gradient above, the weight is written.
template <class Real>
int64_t weight_gradient(const Job& job) {
    const Convolution s = shape(job);
    return each<Real>(job, s, gradient_scratch<Real>(s), [&](auto* x, Real* w, auto*, Real* g, Real* scratch) {
        weight_gradient(s, x, g, w, scratch);
    });
}

}  // namespace

extern "C" {
int64_t convolve_float32(const Job* job) { return convolve<float>(*job); }
int64_t convolve_float64(const Job* job) { return convolve<double>(*job); }
int64_t weight_gradient_float32(const Job* job) { return weight_gradient<float>(*job); }
int64_t weight_gradient_float64(const Job* job) { return weight_gradient<double>(*job); }
}

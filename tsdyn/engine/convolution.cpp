// Convolutions of many members with samples innermost, (member, channel, row, column, sample); see convolution.py.

#include "convolution.hpp"

#include "arena.hpp"
#include "job.hpp"

extern "C" {

// Mirrored by convolution.Job.
struct Job {
    int64_t members, channels, below, rows, columns, kernel_rows, kernel_columns, batch;  // rows, columns of the output
    int64_t row_padding, column_padding;         // of `samples` alone
    const void *input, *weight, *bias, *output;  // bias: null for none
};
}

TSDYN_EXPORT_JOB(
    TSDYN_FIELD(members), TSDYN_FIELD(channels), TSDYN_FIELD(below), TSDYN_FIELD(rows), TSDYN_FIELD(columns),
    TSDYN_FIELD(kernel_rows), TSDYN_FIELD(kernel_columns), TSDYN_FIELD(batch), TSDYN_FIELD(row_padding),
    TSDYN_FIELD(column_padding), TSDYN_FIELD(input), TSDYN_FIELD(weight), TSDYN_FIELD(bias), TSDYN_FIELD(output))

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

// Vectors of samples that are convolved together: their run along a row is as long, and what they need stays near.
constexpr long kVectorsOfSamples = 2;

// One convolution of many samples, (sample, channel, row, column), padded with zeros.
template <class Real>
int64_t samples(const Job& job) {
    constexpr long lanes = Lanes<Real>::count, batch = kVectorsOfSamples * lanes;
    Convolution s = shape(job);
    s.batch = batch;
    s.x.line = (job.columns + job.kernel_columns - 1) * batch;
    s.x.image = (job.rows + job.kernel_rows - 1) * s.x.line;
    s.z = {s.run(), job.rows * s.run()};
    const long rows = job.rows + job.kernel_rows - 1 - 2 * job.row_padding;
    const long columns = job.columns + job.kernel_columns - 1 - 2 * job.column_padding;
    const long image = rows * columns, size = job.rows * job.columns;
    Arena<Real> arena;
    Real *packed = nullptr, *x = nullptr, *z = nullptr;
    arena.reserve(&packed, s.channels * s.taps());
    arena.reserve(&x, s.below * s.x.image);
    arena.reserve(&z, s.channels * s.z.image);
    try {
        arena.allocate();  // the frame of zeros is written by nobody
    } catch (const std::bad_alloc&) {
        return 1;
    }
    pack(s, static_cast<const Real*>(job.weight), packed);
    for (long first = 0; first < job.members; first += batch) {
        for (long v = 0; v < batch && first + v < job.members; v += lanes) {
            const Samples some{first + v, std::min(lanes, job.members - first - v)};
            for (long c = 0; c < s.below; ++c) {
                Real* line = x + c * s.x.image + job.row_padding * s.x.line + job.column_padding * batch + v;
                long column = 0;
                turn(some, static_cast<const Real*>(job.input) + c * image, s.below * image, image,
                     [&](long, const Vector<Real>& numbers) {
                         at(line + column * batch) = numbers;
                         if (++column == columns) column = 0, line += s.x.line;
                     });
            }
        }
        convolve(s, x, packed, static_cast<const Real*>(job.bias), z,
                 [](Vector<Real> sum, long, long, long, long) { return sum; });
        for (long v = 0; v < batch && first + v < job.members; v += lanes) {
            const Samples some{first + v, std::min(lanes, job.members - first - v)};
            for (long c = 0; c < s.channels; ++c)
                turn_back(some, static_cast<Real*>(const_cast<void*>(job.output)) + c * size, s.channels * size, size,
                          [from = z + c * s.z.image + v](long n) { return at(from + n * batch); });
        }
    }
    return 0;
}

}  // namespace

extern "C" {
int64_t samples_float32(const Job* job) { return samples<float>(*job); }
int64_t samples_float64(const Job* job) { return samples<double>(*job); }
int64_t convolve_float32(const Job* job) { return convolve<float>(*job); }
int64_t convolve_float64(const Job* job) { return convolve<double>(*job); }
int64_t weight_gradient_float32(const Job* job) { return weight_gradient<float>(*job); }
int64_t weight_gradient_float64(const Job* job) { return weight_gradient<double>(*job); }
}

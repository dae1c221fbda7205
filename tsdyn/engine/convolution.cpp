// Convolutions of many members with samples innermost, (member, channel, row, column, sample); see convolution.py.
//
// A row of an image is one run of columns x samples: the kernel's column j shifts it by j batches, so vectors go along
// the run whatever the batch, and every tap is a scalar of the weight times a run of the input.
// Strides 1; a run's last vector overlaps the one before it.  Vectors are the compiler's own (GCC and Clang).

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "job.hpp"

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kTileRows = 6, kGradientRows = 6;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kTileRows = 3, kGradientRows = 4;
#else
constexpr int kVectorBytes = 16, kTileRows = 3, kGradientRows = 4;
#endif
constexpr int kTileVectors = 4, kGradientColumns = 3;

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

template <class Real>
struct Lanes {
    typedef Real Vector __attribute__((vector_size(kVectorBytes)));
    typedef Real Unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(Real)), may_alias));
    static constexpr long count = kVectorBytes / sizeof(Real);
    static Vector load(const Real* p) { return *reinterpret_cast<const Unaligned*>(p); }
    static void store(Real* p, Vector v) { *reinterpret_cast<Unaligned*>(p) = v; }
};

template <class Real>
struct Shape {
    explicit Shape(const Job& job)
        : channels(job.channels), below(job.below), rows(job.rows), kernel_rows(job.kernel_rows),
          kernel_columns(job.kernel_columns), batch(job.batch), run(job.columns * job.batch),
          line((job.columns + job.kernel_columns - 1) * job.batch), image((job.rows + job.kernel_rows - 1) * line),
          taps(job.below * job.kernel_rows * job.kernel_columns) {}
    long channels, below, rows, kernel_rows, kernel_columns, batch;
    long run, line, image;  // numbers of an output row, an input row, an input channel
    long taps;              // of one output channel
};

// R channels x V vectors of one output row, kept in registers over all taps.
template <class Real, int R, int V>
void tile(const Shape<Real>& s, const Real* x, const Real* w, const Real* bias, Real* z) {
    using L = Lanes<Real>;
    typename L::Vector sum[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) sum[r][v] = typename L::Vector{} + (bias ? bias[r] : Real(0));
    for (long c = 0; c < s.below; ++c)
        for (long i = 0; i < s.kernel_rows; ++i) {
            const Real* from = x + c * s.image + i * s.line;
            for (long j = 0; j < s.kernel_columns; ++j, ++w, from += s.batch) {
                typename L::Vector part[V];
#pragma GCC unroll 8
                for (int v = 0; v < V; ++v) part[v] = L::load(from + v * L::count);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    const Real factor = w[r * s.taps];
#pragma GCC unroll 8
                    for (int v = 0; v < V; ++v) sum[r][v] += factor * part[v];
                }
            }
        }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) L::store(z + r * s.rows * s.run + v * L::count, sum[r][v]);
}

template <class Real, int V, int R = kTileRows>
void tile_of(const Shape<Real>& s, long rows, const Real* x, const Real* w, const Real* bias, Real* z) {
    if (rows == R) return tile<Real, R, V>(s, x, w, bias, z);
    if constexpr (R > 1) tile_of<Real, V, R - 1>(s, rows, x, w, bias, z);
}

template <class Real>
void scalar(const Shape<Real>& s, const Real* x, const Real* w, const Real* bias, Real* z) {
    Real sum = bias ? *bias : Real(0);
    for (long c = 0; c < s.below; ++c)
        for (long i = 0; i < s.kernel_rows; ++i)
            for (long j = 0; j < s.kernel_columns; ++j, ++w) sum += *w * x[c * s.image + i * s.line + j * s.batch];
    *z = sum;
}

template <class Real, int V>
void channels_of(const Shape<Real>& s, const Real* x, const Real* w, const Real* bias, Real* z) {
    const long pieces = (s.channels + kTileRows - 1) / kTileRows;
    for (long p = 0; p < pieces; ++p) {
        const long from = s.channels * p / pieces, to = s.channels * (p + 1) / pieces;
        tile_of<Real, V>(s, to - from, x, w + from * s.taps, bias ? bias + from : nullptr, z + from * s.rows * s.run);
    }
}

template <class Real>
void convolve(const Job& job) {
    constexpr long lanes = Lanes<Real>::count;
    const Shape<Real> s(job);
    for (long m = 0; m < job.members; ++m) {
        const Real* input = static_cast<const Real*>(job.input) + m * s.below * s.image;
        const Real* w = static_cast<const Real*>(job.weight) + m * s.channels * s.taps;
        const Real* bias = job.bias ? static_cast<const Real*>(job.bias) + m * s.channels : nullptr;
        Real* output = static_cast<Real*>(const_cast<void*>(job.output)) + m * s.channels * s.rows * s.run;
        for (long r = 0; r < s.rows; ++r) {
            const Real* x = input + r * s.line;
            Real* z = output + r * s.run;
            long q = 0;
            for (; q + kTileVectors * lanes <= s.run; q += kTileVectors * lanes)
                channels_of<Real, kTileVectors>(s, x + q, w, bias, z + q);
            for (; q + lanes <= s.run; q += lanes) channels_of<Real, 1>(s, x + q, w, bias, z + q);
            if (q < s.run && s.run >= lanes) {
                channels_of<Real, 1>(s, x + s.run - lanes, w, bias, z + s.run - lanes);
            } else {
                for (; q < s.run; ++q)
                    for (long k = 0; k < s.channels; ++k)
                        scalar(s, x + q, w + k * s.taps, bias ? bias + k : nullptr, z + k * s.rows * s.run + q);
            }
        }
    }
}

// R output channels x J columns of the kernel: sums over rows, columns and samples of gradient times shifted input.
template <class Real, int R, int J>
void products(const Shape<Real>& s, const Real* g, const Real* x, Real* w) {
    using L = Lanes<Real>;
    typename L::Vector sum[R][J] = {};
    Real rest[R][J] = {};
    for (long row = 0; row < s.rows; ++row) {
        const Real* gradient = g + row * s.run;
        const Real* input = x + row * s.line;
        long q = 0;
        for (; q + L::count <= s.run; q += L::count) {
            typename L::Vector shifted[J];
#pragma GCC unroll 8
            for (int j = 0; j < J; ++j) shifted[j] = L::load(input + q + j * s.batch);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const typename L::Vector own = L::load(gradient + r * s.rows * s.run + q);
#pragma GCC unroll 8
                for (int j = 0; j < J; ++j) sum[r][j] += own * shifted[j];
            }
        }
        for (; q < s.run; ++q)
            for (int r = 0; r < R; ++r)
                for (int j = 0; j < J; ++j) rest[r][j] += gradient[r * s.rows * s.run + q] * input[q + j * s.batch];
    }
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < J; ++j) {
            Real total = rest[r][j];
            for (long lane = 0; lane < L::count; ++lane) total += sum[r][j][lane];
            w[r * s.taps + j] = total;
        }
}

template <class Real, int J, int R = kGradientRows>
void products_of(const Shape<Real>& s, long rows, const Real* g, const Real* x, Real* w) {
    if (rows == R) return products<Real, R, J>(s, g, x, w);
    if constexpr (R > 1) products_of<Real, J, R - 1>(s, rows, g, x, w);
}

template <class Real, int J = kGradientColumns>
void columns_of(const Shape<Real>& s, long columns, long rows, const Real* g, const Real* x, Real* w) {
    if (columns == J) return products_of<Real, J>(s, rows, g, x, w);
    if constexpr (J > 1) columns_of<Real, J - 1>(s, columns, rows, g, x, w);
}

// The output is the gradient above, the weight is written.
template <class Real>
void weight_gradient(const Job& job) {
    const Shape<Real> s(job);
    const long pieces = (s.channels + kGradientRows - 1) / kGradientRows;
    for (long m = 0; m < job.members; ++m) {
        const Real* input = static_cast<const Real*>(job.input) + m * s.below * s.image;
        const Real* g = static_cast<const Real*>(job.output) + m * s.channels * s.rows * s.run;
        Real* w = static_cast<Real*>(const_cast<void*>(job.weight)) + m * s.channels * s.taps;
        for (long p = 0; p < pieces; ++p) {
            const long from = s.channels * p / pieces, to = s.channels * (p + 1) / pieces;
            for (long c = 0; c < s.below; ++c)
                for (long i = 0; i < s.kernel_rows; ++i)
                    for (long j = 0; j < s.kernel_columns; j += kGradientColumns)
                        columns_of<Real>(
                            s, std::min<long>(kGradientColumns, s.kernel_columns - j), to - from,
                            g + from * s.rows * s.run, input + c * s.image + i * s.line + j * s.batch,
                            w + from * s.taps + (c * s.kernel_rows + i) * s.kernel_columns + j);
        }
    }
}

}  // namespace

extern "C" {
void convolve_float32(const Job* job) { convolve<float>(*job); }
void convolve_float64(const Job* job) { convolve<double>(*job); }
void weight_gradient_float32(const Job* job) { weight_gradient<float>(*job); }
void weight_gradient_float64(const Job* job) { weight_gradient<double>(*job); }
}

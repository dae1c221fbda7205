// Each sample's gradient of a convolution's weight, and its squared norm; see compiled_patches.py.
//
// A vector holds one number of as many samples as it has lanes, so that nothing is summed across lanes, and strides and
// dilations are steps of whole vectors.  Images are turned to (channel, row, column, lane) first, framed with zeros.

#include <algorithm>
#include <cstdint>
#include <new>
#include <vector>

#include "arena.hpp"
#include "job.hpp"
#include "turned.hpp"

extern "C" {

// Mirrored by compiled_patches.Job.  Channels are those of one group; rows and columns of the input have no frame.
struct Job {
    int64_t samples, groups, channels, below, rows, columns, rows_out, columns_out, kernel_rows, kernel_columns;
    int64_t row_stride, column_stride, row_padding, column_padding, row_dilation, column_dilation;
    const void *input, *gradient;
    void* found;  // (sample, group, channel, below, kernel row, kernel column), or (sample) squared norms
};
}

TSDYN_EXPORT_JOB(
    TSDYN_FIELD(samples), TSDYN_FIELD(groups), TSDYN_FIELD(channels), TSDYN_FIELD(below), TSDYN_FIELD(rows),
    TSDYN_FIELD(columns), TSDYN_FIELD(rows_out), TSDYN_FIELD(columns_out), TSDYN_FIELD(kernel_rows),
    TSDYN_FIELD(kernel_columns), TSDYN_FIELD(row_stride), TSDYN_FIELD(column_stride), TSDYN_FIELD(row_padding),
    TSDYN_FIELD(column_padding), TSDYN_FIELD(row_dilation), TSDYN_FIELD(column_dilation), TSDYN_FIELD(input),
    TSDYN_FIELD(gradient), TSDYN_FIELD(found))

namespace {

// A tile of sums, output channels x taps, that is kept in registers.
#if defined(__AVX512F__)
constexpr int kChannels = 8, kTaps = 3;
#else
constexpr int kChannels = 4, kTaps = 3;
#endif
// Bytes of the gradient that a pass over all taps keeps in the nearest cache, and of a band of turned rows.
constexpr long kNear = 16 << 10, kBand = 2 << 20;

// R channels x T taps: sums over some rows of the output of gradient times input.
template <class Real, int R, int T>
__attribute__((noinline)) void tile(long rows, long columns, const Real* g, Strides of_g, const Real* x,
                                    const long* taps, long row_step, long column_step, Vector<Real>* held,
                                    bool more) {
    constexpr long lanes = Lanes<Real>::count;
    Vector<Real> sum[R][T] = {};
    if (more)
        for (int r = 0; r < R; ++r)
            for (int t = 0; t < T; ++t) sum[r][t] = held[t * R + r];
    for (long row = 0; row < rows; ++row, g += of_g.line, x += row_step) {
        const Real *own = g, *from[T];
        for (int t = 0; t < T; ++t) from[t] = x + taps[t];
        for (long column = 0; column < columns; ++column, own += lanes) {
            Vector<Real> read[T];
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t, from[t - 1] += column_step) read[t] = at(from[t]);
            const Real* each = own;
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r, each += of_g.image) {
                Vector<Real> value = at(each);
                TSDYN_IN_REGISTER(value);
#pragma GCC unroll 8
                for (int t = 0; t < T; ++t) sum[r][t] += value * read[t];
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) held[t * R + r] = sum[r][t];
}

template <class Real, int T = kTaps, int R = kChannels, class... Rest>
void tile_of(long channels, long taps, Rest... rest) {
    if constexpr (R > 1) {
        if (channels < R) return tile_of<Real, T, R - 1>(channels, taps, rest...);
    }
    if constexpr (T > 1) {
        if (taps < T) return tile_of<Real, T - 1, R>(channels, taps, rest...);
    }
    tile<Real, R, T>(rest...);
}

// Gradients of one group of channels of some samples.
template <class Real>
class Group {
  public:
    explicit Group(const Job& job) : job(job), kernel(job.kernel_rows * job.kernel_columns), taps(job.below * kernel) {
        constexpr long lanes = Lanes<Real>::count;
        const long columns = job.columns + 2 * job.column_padding;
        const long per_row = (job.below * columns * job.row_stride + job.channels * job.columns_out) * lanes;
        band = std::clamp<long>(kBand / (per_row * long(sizeof(Real))), 1, job.rows_out);
        const long input_rows = (band - 1) * job.row_stride + (job.kernel_rows - 1) * job.row_dilation + 1;
        of_x = {columns * lanes, input_rows * columns * lanes};
        of_g = {job.columns_out * lanes, band * job.columns_out * lanes};
        for (long c = 0; c < job.below; ++c)
            for (long i = 0; i < job.kernel_rows; ++i)
                for (long j = 0; j < job.kernel_columns; ++j)
                    places.push_back(c * of_x.image + i * job.row_dilation * of_x.line +
                                     j * job.column_dilation * lanes);
        arena.reserve(&x, job.below * of_x.image);
        arena.reserve(&g, job.channels * of_g.image);
        arena.reserve(&sums, kChannels * taps * lanes);
        arena.allocate(false);
    }

    // each(first channel, channels, sums (tap, channel, lane)) of every few channels.
    template <class Each>
    void go(const Samples& samples, long group, Each each) {
        const long pieces = (job.channels + kChannels - 1) / kChannels;
        for (long p = 0; p < pieces; ++p) {
            const long from = job.channels * p / pieces, channels = job.channels * (p + 1) / pieces - from;
            for (long row = 0; row < job.rows_out; row += band) {
                const long rows = std::min(band, job.rows_out - row);
                if (p == 0 || band < job.rows_out) turn_band(samples, group, row, rows);
                add(from, channels, rows, row > 0);
            }
            each(from, channels, sums);
        }
    }

  private:
    const Job& job;
    const long kernel, taps;
    long band;  // rows of the output that are turned at once
    Strides of_x, of_g;
    std::vector<long> places;  // of each tap, from that of the output
    Arena<Real> arena;
    Real *x, *g, *sums;

    void turn_band(const Samples& samples, long group, long row, long rows) {
        constexpr long lanes = Lanes<Real>::count;
        const long image = job.rows * job.columns, framed = of_x.image / of_x.line;
        const long first = row * job.row_stride - job.row_padding;
        const long from = std::clamp<long>(first, 0, job.rows), to = std::clamp<long>(first + framed, 0, job.rows);
        const Real* input = static_cast<const Real*>(job.input) + group * job.below * image;
        std::fill_n(x, job.below * of_x.image, Real(0));
        for (long c = 0; c < job.below; ++c) {
            Real* line = x + c * of_x.image + (from - first) * of_x.line + job.column_padding * lanes;
            long column = 0;
            turn(samples, input + c * image + from * job.columns, job.groups * job.below * image,
                 (to - from) * job.columns, [&](long, const Vector<Real>& v) {
                     at(line + column * lanes) = v;
                     if (++column == job.columns) column = 0, line += of_x.line;
                 });
        }
        const long size = job.rows_out * job.columns_out;
        const Real* gradient = static_cast<const Real*>(job.gradient) + group * job.channels * size;
        for (long c = 0; c < job.channels; ++c)
            turn(samples, gradient + c * size + row * job.columns_out, job.groups * job.channels * size,
                 rows * job.columns_out,
                 [to = g + c * of_g.image](long n, const Vector<Real>& v) { at(to + n * lanes) = v; });
    }

    void add(long from, long channels, long rows, bool more) {
        const long row_step = job.row_stride * of_x.line, column_step = job.column_stride * Lanes<Real>::count;
        const long near = std::max<long>(1, kNear / (channels * of_g.line * long(sizeof(Real))));
        Vector<Real>* held = reinterpret_cast<Vector<Real>*>(sums);
        for (long row = 0; row < rows; row += near, more = true)
            for (long t = 0; t < taps; t += kTaps)
                tile_of<Real>(channels, taps - t, std::min(near, rows - row), job.columns_out,
                              static_cast<const Real*>(g) + from * of_g.image + row * of_g.line, of_g,
                              static_cast<const Real*>(x) + row * row_step, places.data() + t, row_step, column_step,
                              held + t * channels, more);
    }
};

// call(samples, group, first channel, channels, sums) for samples from..to-1; 1 if there is no memory for a band.
template <class Real, class Call>
int each(const Job& job, int64_t from, int64_t to, Call call) {
    try {
        Group<Real> one(job);
        for (long s = from; s < to; s += Lanes<Real>::count) {
            const Samples samples{s, std::min<long>(Lanes<Real>::count, to - s)};
            for (long group = 0; group < job.groups; ++group)
                one.go(samples, group, [&](long first, long channels, const Real* sums) {
                    call(samples, group, first, channels, sums);
                });
        }
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

template <class Real>
int gradients(const Job& job, int64_t from, int64_t to) {
    constexpr long lanes = Lanes<Real>::count;
    const long taps = job.below * job.kernel_rows * job.kernel_columns, own = job.groups * job.channels * taps;
    const auto keep = [&](const Samples& samples, long group, long first, long channels, const Real* sums) {
        Real* found = static_cast<Real*>(job.found) + (group * job.channels + first) * taps;
        for (long r = 0; r < channels; ++r)
            turn_back(samples, found + r * taps, own, taps,
                      [&](long t) { return at(sums + (t * channels + r) * lanes); });
    };
    return each<Real>(job, from, to, keep);
}

template <class Real>
int squares(const Job& job, int64_t from, int64_t to) {
    constexpr long lanes = Lanes<Real>::count;
    const long taps = job.below * job.kernel_rows * job.kernel_columns;
    std::vector<double> totals(to - from, 0.0);
    const auto add = [&](const Samples& samples, long, long, long channels, const Real* sums) {
        for (long c = 0; c < channels; ++c) {  // of many sums, each of a channel
            Vector<Real> sum = {};
            for (long t = 0; t < taps; ++t) {
                const Vector<Real>& own = at(sums + (t * channels + c) * lanes);
                sum += own * own;
            }
            for (long lane = 0; lane < samples.count; ++lane) totals[samples.first + lane - from] += sum[lane];
        }
    };
    const int failed = each<Real>(job, from, to, add);
    std::copy(totals.begin(), totals.end(), static_cast<Real*>(job.found) + from);
    return failed;
}

}  // namespace

extern "C" {
// Samples from..to-1.
int gradients_float64(const Job* job, int64_t from, int64_t to) { return gradients<double>(*job, from, to); }
int gradients_float32(const Job* job, int64_t from, int64_t to) { return gradients<float>(*job, from, to); }
int squares_float64(const Job* job, int64_t from, int64_t to) { return squares<double>(*job, from, to); }
int squares_float32(const Job* job, int64_t from, int64_t to) { return squares<float>(*job, from, to); }
}

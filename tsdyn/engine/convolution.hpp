// Convolutions of one member with samples innermost, (channel, row, column, sample), and their gradients.
//
// A row of an image is one run of columns x samples: the kernel's column j shifts it by j batches, so vectors go along
// the run whatever the batch, and every tap is a scalar of the weight times a run of the input.  Strides are 1.
// Weights are packed first: those of the channels that a tile sums lie side by side for each tap.

#pragma once

#include <algorithm>
#include <cstdint>

#include "product.hpp"
#include "turned.hpp"

// Tiles of sums that are kept in registers, 32 of AVX-512 and 16 otherwise: beside a tile's sums there must be room for
// its vectors of the input and for a weight.
#if defined(__AVX512F__)
#include <immintrin.h>
constexpr int kTileRows = 6, kTileVectors = 4, kGradientRows = 8;
#else
constexpr int kTileRows = 6, kTileVectors = 2, kGradientRows = 4;
#endif
constexpr int kGradientColumns = 3;
// Bytes of a gradient that a pass for the weight keeps in the nearest cache.
constexpr long kNear = 48 << 10;

namespace {

struct Convolution {
    long channels, below, rows, columns;  // rows, columns: of the output
    long kernel_rows, kernel_columns, batch;
    Strides x, z;
    // Where the input holds more than zeros: taps elsewhere are left out.
    long row_from = 0, row_to = INT64_MAX, column_from = 0, column_to = INT64_MAX;
    long run() const { return columns * batch; }
    long kernel() const { return kernel_rows * kernel_columns; }
    long taps() const { return below * kernel(); }
};

template <class Real>
inline void put(Real* p, Vector<Real> v) {
    __builtin_memcpy(p, &v, sizeof v);
}

// The first `count` numbers of a vector, zeros after them.
template <class Real>
inline Vector<Real> some(const Real* p, long count) {
#if defined(__AVX512F__)
    if constexpr (sizeof(Real) == 8)
        return (Vector<Real>)_mm512_maskz_loadu_pd(__mmask8((1u << count) - 1), p);
    else
        return (Vector<Real>)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
#else
    Vector<Real> found{};
    for (long i = 0; i < count; ++i) found[i] = p[i];
    return found;
#endif
}

// Equal shares of `count` channels, each of at most `most`: call(first, last + 1).
template <class Call>
void shared_out(long count, long most, Call call) {
    const long pieces = (count + most - 1) / most;
    for (long p = 0; p < pieces; ++p) call(count * p / pieces, count * (p + 1) / pieces);
}

// --- the output ----------------------------------------------------------------------------------------------

// Weights as tiles read them: (piece, tap, channel of the piece).
template <class Real>
void pack(const Convolution& s, const Real* w, Real* packed) {
    const long taps = s.taps();
    shared_out(s.channels, kTileRows, [&](long from, long to) {
        for (long t = 0; t < taps; ++t)
            for (long r = from; r < to; ++r) *packed++ = w[r * taps + t];
    });
}

// Weights of the convolution whose input's gradient is `s`, (channel below, channel, row, column), turned around.
template <class Real>
void pack_turned(const Convolution& s, const Real* w, Real* packed) {
    const long kernel = s.kernel();
    shared_out(s.channels, kTileRows, [&](long from, long to) {
        for (long o = 0; o < s.below; ++o)
            for (long k = kernel; k-- > 0;)
                for (long r = from; r < to; ++r) *packed++ = w[(o * s.channels + r) * kernel + k];
    });
}

struct Taps {
    long row_from, row_to, column_from, column_to;
};

// R channels x V vectors of one output row, kept in registers over all taps; of the last vector `count` numbers.
template <class Real, int R, int V, bool whole, class Finish>
void tile_of_row(const Convolution& s, const Taps& taps, const Real* x, const Real* w, const Real* bias, Real* z,
                 long count, Finish finish) {
    constexpr long lanes = Lanes<Real>::count;
    Vector<Real> sum[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) sum[r][v] = Vector<Real>{} + (bias ? bias[r] : Real(0));
    for (long c = 0; c < s.below; ++c)
        for (long i = taps.row_from; i < taps.row_to; ++i) {
            const Real* from = x + (c * s.x.image + i * s.x.line + taps.column_from * s.batch);
            const Real* own = w + ((c * s.kernel_rows + i) * s.kernel_columns + taps.column_from) * R;
            for (long j = taps.column_from; j < taps.column_to; ++j, own += R, from += s.batch) {
                Vector<Real> part[V];
#pragma GCC unroll 8
                for (int v = 0; v < V; ++v) part[v] = whole ? anywhere(from + v * lanes) : some(from, count);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    const Real factor = own[r];
#pragma GCC unroll 8
                    for (int v = 0; v < V; ++v) sum[r][v] += factor * part[v];
                }
            }
        }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) {
            const Vector<Real> found = finish(sum[r][v], r, v * lanes, whole ? lanes : count);
            if constexpr (whole)
                put(z + r * s.z.image + v * lanes, found);
            else
                for (long q = 0; q < count; ++q) z[r * s.z.image + q] = found[q];
        }
}

template <class Real, int V, bool whole, int R = kTileRows, class Finish>
void tile_of(const Convolution& s, long rows, const Taps& taps, const Real* x, const Real* w, const Real* bias, Real* z,
             long count, Finish finish) {
    if (rows == R) return tile_of_row<Real, R, V, whole>(s, taps, x, w, bias, z, count, finish);
    if constexpr (R > 1) tile_of<Real, V, whole, R - 1>(s, rows, taps, x, w, bias, z, count, finish);
}

// The convolution; `finish` maps what is summed to what is written: (vector, channel, row, place in the row, how many).
template <class Real, class Finish>
void convolve(const Convolution& s, const Real* x, const Real* packed, const Real* bias, Real* z, Finish finish) {
    constexpr long lanes = Lanes<Real>::count;
    const long run = s.run(), taps = s.taps();
    for (long row = 0; row < s.rows; ++row) {
        const Real* from = x + row * s.x.line;
        Real* to = z + row * s.z.line;
        const long i = std::max<long>(0, s.row_from - row), i_to = std::min(s.kernel_rows, s.row_to - row);
        const auto channels = [&](auto vectors, auto whole, long q, long count) {
            constexpr int V = decltype(vectors)::value;
            const long first = q / s.batch, last = (q + (V - 1) * lanes + count - 1) / s.batch;
            const Taps own{i, i_to, std::max<long>(0, s.column_from - last),
                           std::min(s.kernel_columns, s.column_to - first)};
            shared_out(s.channels, kTileRows, [&](long c, long c_to) {
                tile_of<Real, V, decltype(whole)::value>(
                    s, c_to - c, own, from + q, packed + c * taps, bias ? bias + c : nullptr, to + c * s.z.image + q,
                    count, [&](Vector<Real> sum, long r, long v, long n) { return finish(sum, c + r, row, q + v, n); });
            });
        };
        constexpr std::integral_constant<bool, true> all{};
        long q = 0;
        for (; q + kTileVectors * lanes <= run; q += kTileVectors * lanes)
            channels(std::integral_constant<int, kTileVectors>{}, all, q, lanes);
        for (; q + 2 * lanes <= run; q += 2 * lanes) channels(std::integral_constant<int, 2>{}, all, q, lanes);
        for (; q + lanes <= run; q += lanes) channels(std::integral_constant<int, 1>{}, all, q, lanes);
        if (q < run && run >= lanes)  // a run's last vector overlaps the one before it
            channels(std::integral_constant<int, 1>{}, all, run - lanes, lanes);
        else if (q < run)
            channels(std::integral_constant<int, 1>{}, std::integral_constant<bool, false>{}, q, run - q);
    }
}

// --- the weight's gradient -----------------------------------------------------------------------------------

// R output channels x J columns of the kernel: sums over rows, columns and samples of gradient times shifted input,
// lane by lane.  `z` has the strides of the gradient.
template <class Real, int R, int J>
void products(const Convolution& s, long rows, const Real* g, const Real* x, Vector<Real>* held, bool more) {
    constexpr long lanes = Lanes<Real>::count;
    const long run = s.run();
    Vector<Real> sum[R][J] = {};
    if (more)
        for (int r = 0; r < R; ++r)
            for (int j = 0; j < J; ++j) sum[r][j] = held[j * R + r];
    for (long row = 0; row < rows; ++row, g += s.z.line, x += s.x.line) {
        long q = 0;
        for (; q + lanes <= run; q += lanes) {
            Vector<Real> shifted[J];
#pragma GCC unroll 8
            for (int j = 0; j < J; ++j) shifted[j] = anywhere(x + q + j * s.batch);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                Vector<Real> own = anywhere(g + r * s.z.image + q);
                TSDYN_IN_REGISTER(own);
#pragma GCC unroll 8
                for (int j = 0; j < J; ++j) sum[r][j] += own * shifted[j];
            }
        }
        if (q < run) {
            Vector<Real> shifted[J];
            for (int j = 0; j < J; ++j) shifted[j] = some(x + q + j * s.batch, run - q);
            for (int r = 0; r < R; ++r) {
                const Vector<Real> own = some(g + r * s.z.image + q, run - q);
                for (int j = 0; j < J; ++j) sum[r][j] += own * shifted[j];
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < J; ++j) held[j * R + r] = sum[r][j];
}

template <class Real, int J, int R = kGradientRows>
void products_of(const Convolution& s, long channels, long rows, const Real* g, const Real* x, Vector<Real>* held,
                 bool more) {
    if (channels == R) return products<Real, R, J>(s, rows, g, x, held, more);
    if constexpr (R > 1) products_of<Real, J, R - 1>(s, channels, rows, g, x, held, more);
}

template <class Real, int J = kGradientColumns>
void columns_of(const Convolution& s, long columns, long channels, long rows, const Real* g, const Real* x,
                Vector<Real>* held, bool more) {
    if (columns == J) return products_of<Real, J>(s, channels, rows, g, x, held, more);
    if constexpr (J > 1) columns_of<Real, J - 1>(s, columns, channels, rows, g, x, held, more);
}

// Numbers that `weight_gradient` needs as scratch, which begins at a cache line.
template <class Real>
long gradient_scratch(const Convolution& s) {
    constexpr long lanes = Lanes<Real>::count;
    const long sums = kGradientRows * s.taps();
    return (sums + lanes) * lanes + Lanes<Real>::padded(sums + lanes);
}

// The gradient of `convolve` in the weight, (channel, tap); `g` is that at its output.
template <class Real>
void weight_gradient(const Convolution& s, const Real* x, const Real* g, Real* w, Real* scratch) {
    constexpr long lanes = Lanes<Real>::count;
    const long taps = s.taps();
    shared_out(s.channels, kGradientRows, [&](long from, long to) {
        const long channels = to - from, count = channels * taps;
        const long rows = std::max<long>(1, kNear / (channels * s.run() * long(sizeof(Real))));
        Vector<Real>* held = reinterpret_cast<Vector<Real>*>(scratch);
        for (long row = 0; row < s.rows; row += rows)
            for (long c = 0; c < s.below; ++c)
                for (long i = 0; i < s.kernel_rows; ++i)
                    for (long j = 0; j < s.kernel_columns; j += kGradientColumns)
                        columns_of<Real>(
                            s, std::min<long>(kGradientColumns, s.kernel_columns - j), channels,
                            std::min(rows, s.rows - row), g + from * s.z.image + row * s.z.line,
                            x + c * s.x.image + (row + i) * s.x.line + j * s.batch,
                            held + ((c * s.kernel_rows + i) * s.kernel_columns + j) * channels, row > 0);
        // the lanes of each sum, as many sums at once as there are lanes
        Real* totals = scratch + (kGradientRows * taps + lanes) * lanes;
        for (long first = 0; first < count; first += lanes) {
            alignas(kLineBytes) Real turned[lanes * lanes];
            transpose(scratch + first * lanes, lanes, lanes, lanes, turned, lanes);
            Vector<Real> total = at(turned);
            for (long lane = 1; lane < lanes; ++lane) total += at(turned + lane * lanes);
            put(totals + first, total);
        }
        for (long t = 0; t < taps; ++t)
            for (long r = 0; r < channels; ++r) w[(from + r) * taps + t] = totals[t * channels + r];
    });
}

}  // namespace

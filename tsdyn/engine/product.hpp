// The one product of compiled_step.cpp and compiled_sums.cpp, C <- beta C + A B with the columns of B and C contiguous.
//
// Rows are padded to whole cache lines, and begin at one.  Vectors are the compiler's own (GCC and Clang).

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#if defined(__AVX__)
#include <immintrin.h>
#endif

// A tile of C, kRows x kVectors, is summed in registers: enough sums to wait for none (two multiply-adds a cycle, four
// cycles each, need eight), and room for a line of B and a number of A beside them.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRows = 12, kVectors = 2;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kRows = 6, kVectors = 2;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kRows = 6, kVectors = 4;
#else
constexpr int kVectorBytes = 16, kRows = 6, kVectors = 2;
#endif
constexpr int kLineBytes = 64;

// Without it GCC loads each vector of B again for every row: loads, two a cycle, then hold up the multiply-adds.
#if defined(__x86_64__)
#define TSDYN_IN_REGISTER(vector) asm("" : "+v"(vector))
#else
#define TSDYN_IN_REGISTER(vector)
#endif

// An address that is formed here, not for all rows of a tile ahead of its sums, which took as long as ten products.
#define TSDYN_HERE(address) asm("" : "+r"(address))

namespace {

template <class Real>
struct Lanes {
    typedef Real Vector __attribute__((vector_size(kVectorBytes)));
    static constexpr long count = kVectorBytes / sizeof(Real);
    static long padded(long n) {
        constexpr long line = kLineBytes / sizeof(Real);
        return (n + line - 1) / line * line;
    }
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
// The vector that begins at any number.
template <class Real>
inline Vector<Real> anywhere(const Real* p) {
    Vector<Real> found;
    __builtin_memcpy(&found, p, sizeof found);
    return found;
}

// Written past the caches, a whole line at a time: what is not read soon need not be fetched to be written.  `settle` is
// called once by whoever wrote so, before others read.
#if defined(__AVX512F__)
template <class V>
inline void stream(void* p, V v) {
    _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)v);
}
inline void settle() { _mm_sfence(); }
#elif defined(__AVX__)
template <class V>
inline void stream(void* p, V v) {
    _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
}
inline void settle() { _mm_sfence(); }
#else
template <class V>
inline void stream(void* p, V v) {
    *static_cast<V*>(p) = v;
}
inline void settle() {}
#endif

template <class Real>
struct Product {
    long k;
    const Real* a;
    long a_row, a_k;
    const Real* b;
    long b_k;
    Real* c;
    long c_row;
    Real beta;
    const Real* from = nullptr;  // C before, if it is elsewhere
    bool past = false;           // whether C is written past the caches
};

// Not inlined: among a caller's own numbers its sums and addresses would not all find a register, at half the speed.
template <class Real, int R, int V>
__attribute__((noinline)) void tile(const Product<Real>& p, long row, long column) {
    constexpr long lanes = Lanes<Real>::count;
    const Real* a = p.a + row * p.a_row;
    const Real* b = p.b + column;
    const long a_row = p.a_row, a_k = p.a_k, b_k = p.b_k, c_row = p.c_row;
    Vector<Real> sum[R][V] = {};
    if (p.beta != 0) {  // C need not hold numbers otherwise
        const Real* before = (p.from ? p.from : p.c) + row * c_row + column;
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r, before += c_row) {
            TSDYN_HERE(before);
#pragma GCC unroll 16
            for (int v = 0; v < V; ++v) sum[r][v] = p.beta * at(before + v * lanes);
        }
    }
    for (long k = p.k; k > 0; --k, a += a_k, b += b_k) {
        Vector<Real> line[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) {
            line[v] = at(b + v * lanes);
            TSDYN_IN_REGISTER(line[v]);
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const Real factor = a[r * a_row];
#pragma GCC unroll 16
            for (int v = 0; v < V; ++v) sum[r][v] += factor * line[v];
        }
    }
    Real* c = p.c + row * c_row + column;
    if (p.past) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r, c += c_row) {
            TSDYN_HERE(c);
#pragma GCC unroll 16
            for (int v = 0; v < V; ++v) stream(c + v * lanes, sum[r][v]);
        }
        return;
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r, c += c_row) {
        TSDYN_HERE(c);
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) at(c + v * lanes) = sum[r][v];
    }
}

template <class Real, int R = kRows, class Each>
void panel(const Product<Real>& p, long rows, long row, long columns, Each& each) {
    if constexpr (R > 1) {
        if (rows < R) return panel<Real, R - 1>(p, rows, row, columns, each);
    }
    constexpr long lanes = Lanes<Real>::count;
    long column = 0;
    for (; column + kVectors * lanes <= columns; column += kVectors * lanes) {
        each();
        tile<Real, R, kVectors>(p, row, column);
    }
    for (; column < columns; column += lanes) tile<Real, R, 1>(p, row, column);
}

// Rows of A, the larger factor, once from far away; B again for each panel, from a near cache.  `each` is called before
// each whole tile.
template <class Real, class Each>
void multiply(const Product<Real>& p, long rows, long columns, Each&& each) {
    // panels of nearly equal height: a low last one would wait for its own sums
    const long panels = (rows + kRows - 1) / kRows;
    for (long i = 0; i < panels; ++i) {
        const long from = rows * i / panels, to = rows * (i + 1) / panels;
        panel<Real>(p, to - from, from, columns, each);
    }
}
template <class Real>
void multiply(const Product<Real>& p, long rows, long columns) {
    multiply<Real>(p, rows, columns, [] {});
}

// Lanes of two vectors in turn: those of their lower halves, or of their upper.
template <class Real, bool upper, int... I>
Vector<Real> interleave(Vector<Real> a, Vector<Real> b, std::integer_sequence<int, I...>) {
    constexpr int lanes = Lanes<Real>::count, from = upper ? lanes / 2 : 0;
#ifdef __clang__
    return __builtin_shufflevector(a, b, (from + I / 2 + I % 2 * lanes)...);
#else
    typedef typename std::conditional<sizeof(Real) == 8, int64_t, int32_t>::type Index;
    typedef Index Order __attribute__((vector_size(kVectorBytes)));
    return __builtin_shuffle(a, b, Order{(from + I / 2 + I % 2 * lanes)...});
#endif
}

// to (column, row) = from (row, column), both in whole vectors each way: log2(lanes) perfect shuffles of a square.  Rows
// of `from` may begin at any number.
template <class Real>
void transpose(const Real* from, long from_row, long rows, long columns, Real* to, long to_row) {
    constexpr int lanes = Lanes<Real>::count;
    constexpr std::make_integer_sequence<int, lanes> each{};
    for (long r = 0; r < rows; r += lanes)
        for (long c = 0; c < columns; c += lanes) {
            Vector<Real> v[lanes], w[lanes];
            for (int i = 0; i < lanes; ++i) v[i] = anywhere(from + (r + i) * from_row + c);
#pragma GCC unroll 4
            for (int stage = 1; stage < lanes; stage *= 2) {
#pragma GCC unroll 16
                for (int i = 0; i < lanes / 2; ++i) {
                    w[2 * i] = interleave<Real, false>(v[i], v[i + lanes / 2], each);
                    w[2 * i + 1] = interleave<Real, true>(v[i], v[i + lanes / 2], each);
                }
#pragma GCC unroll 16
                for (int i = 0; i < lanes; ++i) v[i] = w[i];
            }
            for (int i = 0; i < lanes; ++i) at(to + (c + i) * to_row + r) = v[i];
        }
}

}  // namespace

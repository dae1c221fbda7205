// The one product of compiled_step.cpp and compiled_sums.cpp, C <- beta C + A B with the columns of B and C contiguous.
//
// Rows are padded to whole cache lines, and begin at one.  Vectors are the compiler's own (GCC and Clang).

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

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

// Memory that is read after some products, and asked for while these are summed: in each round of a tile, which is one
// multiply-add for each of its numbers, some bytes further.  What is asked for in one burst waits for the lines before it,
// and the products wait with it.
class Ahead {
  public:
    // Where a tile asks first, and how many bytes further in each round; nowhere if `from` is null.
    struct Asked {
        const char* from;
        long pace;
    };

    void clear() { stretches.clear(), all = 0; }
    template <class Real>
    void add(const Real* from, long numbers) {
        const char* begin = reinterpret_cast<const char*>(from);
        const long bytes = numbers * static_cast<long>(sizeof(Real));
        stretches.push_back({begin, begin + bytes}), all += bytes;
    }
    // Have all of it asked for within so many rounds, at even distances.
    void within(long rounds) {
        const long each = all / std::max(rounds, 1L) * 9 / 8 + 1;
        pace = std::min<long>(each, kLineBytes), burst = each - pace;
    }
    // For a tile of so many rounds.
    Asked next(long rounds) {
        if (stretches.empty() || rounds == 0) return {nullptr, 0};
        auto& [begin, end] = stretches.back();
        for (const char* stop = std::min(begin + rounds * burst, end); begin < stop; begin += kLineBytes)
            __builtin_prefetch(begin, 0, 2);
        // a short rest is not left for another tile
        const long rest = (end - begin) / rounds + 1, own = rest <= 2 * pace ? std::min<long>(rest, kLineBytes) : pace;
        const Asked found{begin, own};
        begin += rounds * own;
        if (begin >= end) stretches.pop_back();
        return found;
    }

  private:
    std::vector<std::pair<const char*, const char*>> stretches;
    long all = 0, pace = 0, burst = 0;
};

// Where nothing is asked for.
struct Nothing {};

// Not inlined: among a caller's own numbers its sums and addresses would not all find a register, at half the speed.
template <class Real, int R, int V, bool asks = false>
__attribute__((noinline)) void tile(const Product<Real>& p, long row, long column, Ahead::Asked ahead = {}) {
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
        if constexpr (asks) {
            __builtin_prefetch(ahead.from, 0, 2);
            ahead.from += ahead.pace;
        }
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

template <class Real, int R = kRows, class Later>
void panel(const Product<Real>& p, long rows, long row, long columns, Later& later) {
    if constexpr (R > 1) {
        if (rows < R) return panel<Real, R - 1>(p, rows, row, columns, later);
    }
    constexpr long lanes = Lanes<Real>::count;
    long column = 0;
    for (; column + kVectors * lanes <= columns; column += kVectors * lanes) {
        if constexpr (!std::is_same_v<Later, const Nothing>) {
            if (const Ahead::Asked ahead = later.next(p.k); ahead.from) {
                tile<Real, R, kVectors, true>(p, row, column, ahead);
                continue;
            }
        }
        tile<Real, R, kVectors>(p, row, column);
    }
    for (; column < columns; column += lanes) tile<Real, R, 1>(p, row, column);
}

// Rows of A, the larger factor, once from far away; B again for each panel, from a near cache.  What is read `later` is
// asked for meanwhile.
template <class Real, class Later = const Nothing>
void multiply(const Product<Real>& p, long rows, long columns, Later&& later = {}) {
    // panels of nearly equal height: a low last one would wait for its own sums
    const long panels = (rows + kRows - 1) / kRows;
    for (long i = 0; i < panels; ++i) {
        const long from = rows * i / panels, to = rows * (i + 1) / panels;
        panel<Real>(p, to - from, from, columns, later);
    }
}

// Rounds of all whole tiles of a product of `k` multiply-adds per number.
template <class Real>
long rounds_of(long rows, long columns, long k) {
    return (rows + kRows - 1) / kRows * (columns / (kVectors * Lanes<Real>::count)) * k;
}

// Two half vectors, from any numbers on, as one.
template <class Real>
inline Vector<Real> halves(const Real* low, const Real* high) {
#if defined(__AVX512F__)
    const auto half = [](const Real* p) { return _mm256_loadu_pd(reinterpret_cast<const double*>(p)); };
    return (Vector<Real>)_mm512_insertf64x4(_mm512_castpd256_pd512(half(low)), half(high), 1);
#elif defined(__AVX__)
    const auto half = [](const Real* p) { return _mm_loadu_pd(reinterpret_cast<const double*>(p)); };
    return (Vector<Real>)_mm256_insertf128_pd(_mm256_castpd128_pd256(half(low)), half(high), 1);
#else
    Vector<Real> found;
    __builtin_memcpy(&found, low, sizeof found / 2);
    __builtin_memcpy(reinterpret_cast<char*>(&found) + sizeof found / 2, high, sizeof found / 2);
    return found;
#endif
}

// Lanes of two vectors in turn, in each half of them: those of its lower quarter, or of its upper.
template <class Real, bool upper, int... I>
Vector<Real> interleave(Vector<Real> a, Vector<Real> b, std::integer_sequence<int, I...>) {
    constexpr int lanes = Lanes<Real>::count, half = lanes / 2, from = upper ? half / 2 : 0;
#ifdef __clang__
    return __builtin_shufflevector(a, b, (from + I / half * half + I % half / 2 + I % 2 * lanes)...);
#else
    typedef typename std::conditional<sizeof(Real) == 8, int64_t, int32_t>::type Index;
    typedef Index Order __attribute__((vector_size(kVectorBytes)));
    return __builtin_shuffle(a, b, Order{(from + I / half * half + I % half / 2 + I % 2 * lanes)...});
#endif
}

// to (column, row) = from (row, column), both in whole vectors each way.  Rows of `from` may begin at any number.  Half
// vectors are put beside each other as they are loaded, which is no shuffle; log2(lanes/2) perfect shuffles turn the rest.
template <class Real>
void transpose(const Real* from, long from_row, long rows, long columns, Real* to, long to_row) {
    constexpr int lanes = Lanes<Real>::count, half = lanes / 2;
    constexpr std::make_integer_sequence<int, lanes> each{};
    for (long r = 0; r < rows; r += lanes)
        for (long c = 0; c < columns; c += half) {
            Vector<Real> v[half], w[half];
            const Real* own = from + r * from_row + c;
            for (int i = 0; i < half; ++i) v[i] = halves(own + i * from_row, own + (i + half) * from_row);
#pragma GCC unroll 4
            for (int stage = 1; stage < half; stage *= 2) {
#pragma GCC unroll 16
                for (int i = 0; i < half / 2; ++i) {
                    w[2 * i] = interleave<Real, false>(v[i], v[i + half / 2], each);
                    w[2 * i + 1] = interleave<Real, true>(v[i], v[i + half / 2], each);
                }
#pragma GCC unroll 16
                for (int i = 0; i < half; ++i) v[i] = w[i];
            }
            for (int i = 0; i < half; ++i) at(to + (c + i) * to_row + r) = v[i];
        }
}

}  // namespace

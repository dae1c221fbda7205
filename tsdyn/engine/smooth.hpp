// Smooth activations and their slopes, elementwise on vectors; see compiled_activations.py.
//
// Accurate to 2 ulp over the whole range, also where a result is subnormal or far smaller than 1: what decides the
// result is carried as a sum hi + lo, and quotients are corrected by their remainders.  Remainders are exact where the
// processor has a fused multiply-add; without one the last bit or two may be wrong.  NaN stays NaN.
//
// The exponential is kept apart as (1 + r + ...) 2^k, so that nothing is lost in subnormal intermediate results:
// x = k log 2 + r with |r| <= log(2)/2.

#pragma once

#include <cstdint>
#include <type_traits>

#include "product.hpp"

// Hides from the compiler that a value equals another, which would otherwise be computed once instead of fused.
#if defined(__x86_64__) && defined(__AVX__)
#define TSDYN_OPAQUE(vector) asm("" : "+v"(vector))
#elif defined(__x86_64__)
#define TSDYN_OPAQUE(vector) asm("" : "+x"(vector))
#elif defined(__aarch64__)
#define TSDYN_OPAQUE(vector) asm("" : "+w"(vector))
#else
#define TSDYN_OPAQUE(vector)
#endif

namespace {

// Near-minimax polynomials, by interpolation at Chebyshev nodes in 60 digits (mpmath.chebyfit):
//   kExp    (e^r - 1 - r)/r^2                   |r| <= log(2)/2; float 10 % beyond
//   kAtanh  (atanh s - s)/s^3 in s^2            0 <= s <= 1/3
//   kErf    (erf(z/sqrt 2)/z - sqrt(2/pi))/z^2 in z^2   |z| <= 1
//   kMills  (1 + u) e^(u^2/2) erfc(u/sqrt 2) in (u - 4)/(u + 4)   0 <= u <= kFar
// A constant is the sum of itself and of its Rest, which it is too short for.
template <class Real>
struct Constants;

template <>
struct Constants<double> {
    typedef double Real;
    static constexpr Real kLog2 = 0.6931471805598903, kLog2Rest = 5.497923018708371e-14;
    static constexpr Real kDensity = 0.7978845608028654, kDensityRest = -4.98465440455546e-17;  // sqrt(2/pi)
    static constexpr Real kMillsRest = 2.2918358894447283e-17;
    static constexpr Real kExp[11] = {
        0.5, 0.1666666666666667, 0.04166666666666667, 0.008333333333326084, 0.0013888888888883711,
        0.0001984126987500228, 2.480158732567746e-05, 2.755725517000089e-06, 2.755727347871858e-07,
        2.5105312729622103e-08, 2.09147553258932e-09};
    static constexpr Real kAtanh[11] = {
        0.3333333333333333, 0.19999999999999762, 0.1428571428580005, 0.11111111099118386, 0.09090909948981357,
        0.07692271982430275, 0.06667589315724629, 0.05867139530651599, 0.05422589197440007, 0.03746071897775383,
        0.07815288900461426};
    static constexpr Real kErf[10] = {
        -0.13298076013381088, 0.0199471140200715, -0.0023746564309564877, 0.00023086937517561722,
        -1.8889312149414594e-05, 1.3319373173185872e-06, -8.245017723605618e-08, 4.542551885583872e-09,
        -2.2212163679231647e-10, 8.319887740200958e-12};
    static constexpr Real kMills[24] = {
        0.9441064130196893, -0.19340695465305163, 0.02799926944885077, 0.057200728107102965, -0.06439567485616825,
        0.03587219495930725, -0.010004757182169413, -0.0005712461953837546, 0.0013897942101295268,
        -0.00018886051222589094, -0.00017570637464071667, 4.250011973502409e-05, 2.7253773558415143e-05,
        -6.864458532785459e-06, -5.225926494473821e-06, 8.090699214808073e-07, 1.1042390664485287e-06,
        2.84970004679186e-09, -2.2232006273403775e-07, -3.9815595818949944e-08, 3.552366376770074e-08,
        1.2536271450718974e-08, -3.152452980983324e-09, -1.604278620052539e-09};
};
template <>
struct Constants<float> {
    typedef float Real;
    static constexpr Real kLog2 = 0.69314575, kLog2Rest = 1.4286068e-06;
    static constexpr Real kDensity = 0.7978846, kDensityRest = -2.267034e-08;  // sqrt(2/pi)
    static constexpr Real kMillsRest = 1.3602038e-08;
    static constexpr Real kExp[5] = {
        0.5, 0.16666536, 0.041666504, 0.008369452, 0.0013934019};
    static constexpr Real kAtanh[5] = {
        0.33333334, 0.19999853, 0.14296179, 0.108532876, 0.11612165};
    static constexpr Real kErf[5] = {
        -0.13298076, 0.019947002, -0.0023737564, 0.00022831223, -1.5870992e-05};
    static constexpr Real kMills[12] = {
        0.9441064, -0.19340695, 0.027999194, 0.057200726, -0.06439416, 0.035873085, -0.010015594, -0.0005824281,
        0.0014201337, -0.00014256795, -0.00019574343, -2.1614334e-05};
};

template <class Real>
struct Smooth : Constants<Real> {
    using C = Constants<Real>;
    using V = Vector<Real>;
    typedef typename std::conditional<sizeof(Real) == 8, int64_t, int32_t>::type Index;
    typedef Index Bits __attribute__((vector_size(kVectorBytes)));
    static constexpr int kMantissa = sizeof(Real) == 8 ? 52 : 23, kBias = sizeof(Real) == 8 ? 1023 : 127;
    // added to a number far smaller than it, it leaves the nearest integer in the lowest bits
    static constexpr Real kInteger = sizeof(Real) == 8 ? 6755399441055744.0 : 12582912.0f;
    // e^-x, e^(-u^2/2) and x e^-x are 0 there, and 2^(k/2) is normal still
    static constexpr Real kDeep = sizeof(Real) == 8 ? 760 : 110, kFar = sizeof(Real) == 8 ? 40 : 15;

    template <int N>
    static V polynomial(const Real (&c)[N], V x) {
        V sum = V{} + c[N - 1];
        for (int i = N - 2; i >= 0; --i) sum = sum * x + c[i];
        return sum;
    }
    static V absolute(V z) { return (V)((Bits)z & ~(Bits{} + (Index(1) << (8 * sizeof(Real) - 1)))); }
    static V signed_as(V y, V z) { return (V)((Bits)y | ((Bits)z & (Bits{} + (Index(1) << (8 * sizeof(Real) - 1))))); }
    static V at_most(V z, Real most) { return z > most ? V{} + most : z; }
    // a b - p, exact if p is a b rounded
    static V rest(V a, V b, V p) {
        TSDYN_OPAQUE(b);
        return a * b - p;
    }

    // A number hi + lo.
    struct Sum {
        V hi, lo;
    };
    static Sum sum_of(V large, V small) {  // |large| >= |small|
        const V hi = large + small;
        return {hi, (large - hi) + small};
    }
    // a/d, given q, 1/d rounded
    static Sum quotient(Sum a, Sum d, V q) {
        const V hi = a.hi * q;
        return {hi, (((a.hi - hi * d.hi) - hi * d.lo) + a.lo) * q};
    }
    static Sum reciprocal(Sum d, V q) { return {q, (((V{} + 1) - q * d.hi) - q * d.lo) * q}; }

    // e^x = (1 + grown) first second, grown = e^r - 1, both factors powers of 2
    struct Power {
        Sum grown;
        V first, second;
        Sum mantissa() const {
            const Sum one = sum_of(V{} + 1, grown.hi);
            return sum_of(one.hi, one.lo + grown.lo);
        }
        V scaled(V y) const { return y * first * second; }
    };
    static V power_of_2(V k) {
        return (V)((Bits)(k + (kInteger + kBias)) << kMantissa);
    }
    // of x + rest
    static Power exponential(V x, V rest) {
        const V magic = V{} + kInteger;
        V k = (x + rest) * Real(1.4426950408889634074) + magic;
        k -= magic;
        const V top = x - k * C::kLog2;
        const V low = rest - k * C::kLog2Rest;
        const Sum r = sum_of(top, low);
        const V more = r.hi * r.hi * polynomial(C::kExp, r.hi) + (r.lo + r.lo * r.hi);
        V half = k * Real(0.5) + magic;
        half -= magic;
        return {sum_of(r.hi, more), power_of_2(half), power_of_2(k - half)};
    }
    static Power exponential(V x) { return exponential(x, V{}); }
    // e^(-u^2/2); u^2 is the square of a number of half as many bits, which is exact, and a rest
    static Power gaussian(V u) {
        constexpr Index mask = -(Index(1) << (kMantissa / 2 + 1));
        const V head = (V)((Bits)u & (Bits{} + mask)), tail = u - head;
        return exponential(Real(-0.5) * (head * head), Real(-0.5) * (tail * (u + head)));
    }
    // e^(u^2/2) erfc(u/sqrt 2)
    static Sum mills(V u) {
        const V t = (u - 4) / (u + 4), one = V{} + 1;
        V higher = V{} + C::kMills[std::extent<decltype(C::kMills)>::value - 1];
        for (int i = std::extent<decltype(C::kMills)>::value - 2; i > 0; --i) higher = higher * t + C::kMills[i];
        const V top = V{} + C::kMills[0];
        const V p = top + t * higher;
        const V lost = ((top - p) + t * higher) + C::kMillsRest;
        const V d = one + u, back = d - one;
        return quotient({p, lost}, {d, (one - (d - back)) + (u - back)}, one / d);
    }
};

// Each has `slope`, which also gives the value, for z of any size.

template <class Real>
struct Erf {  // erf(z/sqrt 2)
    using S = Smooth<Real>;
    using V = typename S::V;
    static V slope(V z, V& value) {
        const V u = S::at_most(S::absolute(z), S::kFar), w = z * z;
        const auto e = S::gaussian(u);
        const auto m = e.mantissa();
        const V density = e.scaled(m.hi);
        const V far = S::signed_as(1 - density * S::mills(u).hi, z);
        const V near = z * S::kDensity + z * (S::polynomial(S::kErf, w) * w + S::kDensityRest);
        value = u < 1 ? near : far;
        return density * S::kDensity;
    }
};

template <class Real>
struct Tanh {
    using S = Smooth<Real>;
    using V = typename S::V;
    static V slope(V z, V& value) {
        const auto e = S::exponential(Real(-2) * S::at_most(S::absolute(z), S::kDeep / 2));
        // m = e^-2|z| - 1, and |tanh| = -m/(2 + m)
        const V power = e.scaled(V{} + 1);
        const auto m = S::sum_of(power - 1, power * e.grown.hi);
        const typename S::Sum minus{-m.hi, -(m.lo + power * e.grown.lo)};
        const V two = V{} + 2, d = two - minus.hi, q = 1 / d;
        const auto y = S::quotient(minus, {d, ((two - d) - minus.hi) - minus.lo}, q);
        value = S::signed_as(y.hi + y.lo, z);
        // 1 - tanh^2 where it is near 1, else from e^-2|z|, which keeps small ones exact
        const V near = (1 - y.hi * y.hi) - 2 * y.hi * y.lo, far = e.scaled(e.mantissa().hi * (4 * q * q));
        return S::absolute(z) < Real(1.5) ? near : far;
    }
};

// 1/(1 + e) and e/(1 + e) of e = e^-|z|; the second without e's scale.
template <class Real>
struct Halves {
    using S = Smooth<Real>;
    using V = typename S::V;
    explicit Halves(V z) : power(S::exponential(-S::at_most(S::absolute(z), S::kDeep))), mantissa(power.mantissa()) {
        scaled = {power.scaled(mantissa.hi), power.scaled(mantissa.lo)};
        d = S::sum_of(V{} + 1, scaled.hi);
        d.lo += scaled.lo;
        q = 1 / d.hi;
        larger = S::reciprocal(d, q);
        smaller = S::quotient(mantissa, d, q);
    }
    V sigmoid(V z) const { return z < 0 ? power.scaled(smaller.hi + smaller.lo) : larger.hi + larger.lo; }
    typename S::Power power;
    typename S::Sum mantissa, scaled, d, larger, smaller;
    V q;
};

template <class Real>
struct Sigmoid {
    using S = Smooth<Real>;
    using V = typename S::V;
    static V slope(V z, V& value) {
        const Halves<Real> h(z);
        value = h.sigmoid(z);
        return h.power.scaled(h.smaller.hi * h.q);
    }
};

template <class Real>
struct Softplus {
    using S = Smooth<Real>;
    using V = typename S::V;
    static V slope(V z, V& value) {
        const Halves<Real> h(z);
        // log(1 + e) = 2 atanh(e/(2 + e)); with e's scale left out of s, s^2 has it
        const V two = V{} + 2, d = two + h.scaled.hi;
        const auto s = S::quotient(h.mantissa, {d, ((two - d) + h.scaled.hi) + h.scaled.lo}, 1 / d);
        const V whole = h.power.scaled(s.hi), w = whole * whole;
        const V log = h.power.scaled(2 * s.hi + 2 * (s.lo + s.hi * w * S::polynomial(S::kAtanh, w)));
        value = z > 0 ? z + log : (z != z ? z : log);
        return h.sigmoid(z);
    }
};

template <class Real>
struct Silu {
    using S = Smooth<Real>;
    using V = typename S::V;
    static V slope(V z, V& value) {
        const Halves<Real> h(z);
        const V a = S::at_most(S::absolute(z), S::kDeep);
        const V below = h.power.scaled(-a * h.smaller.hi - a * h.smaller.lo);
        value = z < 0 ? below : z * h.larger.hi + a * h.larger.lo;
        const V change = h.power.scaled(a * (h.smaller.hi * h.q));  // |z| s(z) s(-z)
        return z < 0 ? h.sigmoid(z) - change : h.larger.hi + (h.larger.lo + change);
    }
};

template <class Real>
struct Gelu {
    using S = Smooth<Real>;
    using V = typename S::V;
    static V slope(V z, V& value) {
        const V u = S::at_most(S::absolute(z), S::kFar);
        const auto e = S::gaussian(u);
        const auto m = e.mantissa(), r = S::mills(u);
        // the normal distribution's tail, hi + lo without its scale
        const V hi = m.hi * r.hi, lo = S::rest(m.hi, r.hi, hi) + (m.hi * r.lo + m.lo * r.hi), half = u * Real(0.5);
        const V outside = e.scaled(half * hi + half * lo);
        value = z < 0 ? -outside : z - outside;
        const V change = e.scaled(Real(0.5) * hi - half * (m.hi * S::kDensity));
        return z < 0 ? change : 1 - change;
    }
};

template <class Real, template <class> class Sigma>
void each(Real* f, Real* slope, long numbers) {
    for (long i = 0; i < numbers; i += Lanes<Real>::count) {
        Vector<Real> value;
        const Vector<Real> s = Sigma<Real>::slope(at(f + i), value);
        at(f + i) = value;
        if (slope) at(slope + i) = s;
    }
}

// Mirrored by compiled_activations.KINDS.
enum Kind : int64_t { kLeaky, kErf, kTanh, kSigmoid, kSoftplus, kGelu, kSilu };

// f <- sigma(f), and the slope at f before where asked for; whole vectors.
template <class Real>
void activate(int64_t kind, Real leak, Real* f, Real* slope, long numbers) {
    switch (kind) {
        case kErf: return each<Real, Erf>(f, slope, numbers);
        case kTanh: return each<Real, Tanh>(f, slope, numbers);
        case kSigmoid: return each<Real, Sigmoid>(f, slope, numbers);
        case kSoftplus: return each<Real, Softplus>(f, slope, numbers);
        case kGelu: return each<Real, Gelu>(f, slope, numbers);
        case kSilu: return each<Real, Silu>(f, slope, numbers);
    }
    for (long i = 0; i < numbers; i += Lanes<Real>::count) {
        const Vector<Real> z = at(f + i);
        if (slope) at(slope + i) = z > 0 ? Vector<Real>{} + 1 : Vector<Real>{} + leak;
        at(f + i) = z <= 0 ? (leak == 0 ? Vector<Real>{} : leak * z) : z;  // NaN stays NaN
    }
}

}  // namespace

// Sixteen lanes of float or int32, and 64 bytes, on whatever this object is compiled for.
//
// Every kernel is written once in these terms. Results do not depend on the instruction set: integer
// sums are exact, float operations are single roundings in a fixed order (no contraction, every
// fused multiply-add spelled out), and reductions follow one tree.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512BW__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON) && !defined(SANDERLING_PLAIN)
#define SANDERLING_NEON
#include <arm_neon.h>
#endif

namespace {

constexpr int LANES = 16;

// Four bytes as one word, straight from where they lie: by way of a register they would cost an extra step.
typedef int32_t __attribute__((may_alias)) Word;
inline int32_t word(const int8_t* p) { return *reinterpret_cast<const Word*>(p); }

inline float half_to_float(uint16_t half) {
    uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = (half >> 10) & 31, mantissa = half & 1023;
    uint32_t bits;
    if (exponent == 31) {
        bits = sign | 0x7f800000 | (mantissa << 13);
    } else if (exponent != 0) {
        bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
    } else {
        float value = std::ldexp(float(mantissa), -24);
        std::memcpy(&bits, &value, 4);
        bits |= sign;
    }
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

#if defined(__AVX512BW__)

struct F { __m512 v; };
struct I { __m512i v; };
struct Bytes { __m512i v; };

inline F zero() { return {_mm512_setzero_ps()}; }
inline F set(float x) { return {_mm512_set1_ps(x)}; }
inline F load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
inline F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F abs(F a) { return {_mm512_abs_ps(a.v)}; }
inline F load_half(const uint8_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline float sum(F a) {
    __m256 high = _mm512_extractf32x8_ps(a.v, 1);
    __m256 e = _mm256_add_ps(_mm512_castps512_ps256(a.v), high);
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(e), _mm256_extractf128_ps(e, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
inline float largest(F a) { return _mm512_reduce_max_ps(a.v); }
inline I izero() { return {_mm512_setzero_si512()}; }
inline I operator+(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I load_int(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
template <int N> inline I left(I a) { return {_mm512_slli_epi32(a.v, N)}; }
template <int N> inline I right(I a) { return {_mm512_srai_epi32(a.v, N)}; }
inline I both(I a, int bits) { return {_mm512_and_si512(a.v, _mm512_set1_epi32(bits))}; }
inline F to_float(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline I rounded(F a) { return {_mm512_cvtps_epi32(a.v)}; }
inline I load_unsigned_bytes(const uint8_t* p) {
    return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline I load_signed_bytes(const uint8_t* p) {
    return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline int32_t sum(I a) { return _mm512_reduce_add_epi32(a.v); }
inline void store_bytes(int8_t* p, I a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
inline F power_of_two(I n) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n.v, _mm512_set1_epi32(127)), 23))};
}
inline Bytes load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline Bytes low_nibbles(Bytes a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
inline Bytes high_nibbles(Bytes a) {
    return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(15))};
}
#if defined(__AVX512VNNI__)
inline I dot_unsigned(I acc, Bytes u, int32_t s) {
    return {_mm512_dpbusd_epi32(acc.v, u.v, _mm512_set1_epi32(s))};
}
inline I dot_positive(I acc, Bytes s, int32_t u) {
    return {_mm512_dpbusd_epi32(acc.v, _mm512_set1_epi32(u), s.v)};
}
// s as s + 128, which `corrected` takes out again.
inline I dot_signed(I acc, Bytes w, int32_t s) {
    return {_mm512_dpbusd_epi32(acc.v, _mm512_xor_si512(_mm512_set1_epi32(s), _mm512_set1_epi8(-128)), w.v)};
}
inline I add_correction(I acc, Bytes w) { return {_mm512_dpbusd_epi32(acc.v, _mm512_set1_epi8(-128), w.v)}; }
inline I corrected(I acc, I correction) { return {_mm512_sub_epi32(acc.v, correction.v)}; }
#else
inline I pairs(I acc, __m512i products) {
    return {_mm512_add_epi32(acc.v, _mm512_madd_epi16(products, _mm512_set1_epi16(1)))};
}
inline I dot_unsigned(I acc, Bytes u, int32_t s) {
    return pairs(acc, _mm512_maddubs_epi16(u.v, _mm512_set1_epi32(s)));
}
inline I dot_positive(I acc, Bytes s, int32_t u) {
    return pairs(acc, _mm512_maddubs_epi16(_mm512_set1_epi32(u), s.v));
}
inline I dot_signed(I acc, Bytes w, int32_t s) {
    __m512i a = _mm512_set1_epi32(s);
    a = _mm512_mask_sub_epi8(a, _mm512_movepi8_mask(w.v), _mm512_setzero_si512(), a);
    return pairs(acc, _mm512_maddubs_epi16(_mm512_abs_epi8(w.v), a));
}
inline I add_correction(I acc, Bytes) { return acc; }
inline I corrected(I acc, I) { return acc; }
#endif

#elif defined(__AVX2__)

struct F { __m256 a, b; };
struct I { __m256i a, b; };
struct Bytes { __m256i a, b; };

inline F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
inline F operator+(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F operator-(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F operator*(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F operator/(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F abs(F x) {
    __m256 m = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    return {_mm256_and_ps(x.a, m), _mm256_and_ps(x.b, m)};
}
inline __m256 half8(const uint8_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline F load_half(const uint8_t* p) { return {half8(p), half8(p + 16)}; }
inline float sum(F x) {
    __m256 e = _mm256_add_ps(x.a, x.b);
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(e), _mm256_extractf128_ps(e, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
inline float largest(F x) {
    __m256 e = _mm256_max_ps(x.a, x.b);
    __m128 q = _mm_max_ps(_mm256_castps256_ps128(e), _mm256_extractf128_ps(e, 1));
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_shuffle_ps(q, q, 1)));
}
inline I izero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline I operator+(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline __m256i raw(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline I load_int(const uint8_t* p) { return {raw(p), raw(p + 32)}; }
template <int N> inline I left(I x) { return {_mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)}; }
template <int N> inline I right(I x) { return {_mm256_srai_epi32(x.a, N), _mm256_srai_epi32(x.b, N)}; }
inline I both(I x, int bits) {
    __m256i m = _mm256_set1_epi32(bits);
    return {_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m)};
}
inline F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline I rounded(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline __m128i eight(const uint8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }
inline I load_unsigned_bytes(const uint8_t* p) {
    return {_mm256_cvtepu8_epi32(eight(p)), _mm256_cvtepu8_epi32(eight(p + 8))};
}
inline I load_signed_bytes(const uint8_t* p) {
    return {_mm256_cvtepi8_epi32(eight(p)), _mm256_cvtepi8_epi32(eight(p + 8))};
}
inline void unpack(I x, int32_t* out) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), x.a);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 8), x.b);
}
inline int32_t sum(I x) {
    int32_t each[LANES], total = 0;
    unpack(x, each);
    for (int32_t value : each) total += value;
    return total;
}
inline void store_bytes(int8_t* p, I x) {
    int32_t each[LANES];
    unpack(x, each);
    for (int i = 0; i < LANES; i++) p[i] = int8_t(each[i]);
}
inline F power_of_two(I n) {
    __m256i bias = _mm256_set1_epi32(127);
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n.a, bias), 23)),
            _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n.b, bias), 23))};
}
inline Bytes load_bytes(const uint8_t* p) { return {raw(p), raw(p + 32)}; }
inline Bytes low_nibbles(Bytes x) {
    __m256i m = _mm256_set1_epi8(15);
    return {_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m)};
}
inline Bytes high_nibbles(Bytes x) {
    return low_nibbles({_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)});
}
inline __m256i pairs(__m256i acc, __m256i products) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(products, _mm256_set1_epi16(1)));
}
inline I dot_unsigned(I acc, Bytes u, int32_t s) {
    __m256i v = _mm256_set1_epi32(s);
    return {pairs(acc.a, _mm256_maddubs_epi16(u.a, v)), pairs(acc.b, _mm256_maddubs_epi16(u.b, v))};
}
inline I dot_positive(I acc, Bytes s, int32_t u) {
    __m256i v = _mm256_set1_epi32(u);
    return {pairs(acc.a, _mm256_maddubs_epi16(v, s.a)), pairs(acc.b, _mm256_maddubs_epi16(v, s.b))};
}
inline I dot_signed(I acc, Bytes w, int32_t s) {
    __m256i v = _mm256_set1_epi32(s);
    return {pairs(acc.a, _mm256_maddubs_epi16(_mm256_abs_epi8(w.a), _mm256_sign_epi8(v, w.a))),
            pairs(acc.b, _mm256_maddubs_epi16(_mm256_abs_epi8(w.b), _mm256_sign_epi8(v, w.b)))};
}
inline I add_correction(I acc, Bytes) { return acc; }
inline I corrected(I acc, I) { return acc; }

#elif defined(SANDERLING_NEON)

#include "lanes_neon.inc"

#else  // any other machine: plain C++

struct F { float v[LANES]; };
struct I { int32_t v[LANES]; };
struct Bytes { uint8_t v[4 * LANES]; };

#define EACH for (int i = 0; i < LANES; i++)
inline F set(float x) { F r; EACH r.v[i] = x; return r; }
inline F zero() { return set(0.f); }
inline F load(const float* p) { F r; EACH r.v[i] = p[i]; return r; }
inline void store(float* p, F a) { EACH p[i] = a.v[i]; }
inline F operator+(F a, F b) { EACH a.v[i] += b.v[i]; return a; }
inline F operator-(F a, F b) { EACH a.v[i] -= b.v[i]; return a; }
inline F operator*(F a, F b) { EACH a.v[i] *= b.v[i]; return a; }
inline F operator/(F a, F b) { EACH a.v[i] /= b.v[i]; return a; }
inline F fma(F a, F b, F c) { EACH c.v[i] = std::fma(a.v[i], b.v[i], c.v[i]); return c; }
inline F max(F a, F b) { EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
inline F abs(F a) { EACH a.v[i] = std::fabs(a.v[i]); return a; }
inline F load_half(const uint8_t* p) {
    F r;
    EACH { uint16_t half; std::memcpy(&half, p + 2 * i, 2); r.v[i] = half_to_float(half); }
    return r;
}
inline float sum(F a) {
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) a.v[i] += a.v[i + width];
    return a.v[0];
}
inline float largest(F a) { float m = a.v[0]; EACH m = a.v[i] > m ? a.v[i] : m; return m; }
inline I izero() { I r; EACH r.v[i] = 0; return r; }
inline I operator+(I a, I b) { EACH a.v[i] += b.v[i]; return a; }
inline I load_int(const uint8_t* p) { I r; std::memcpy(r.v, p, sizeof r.v); return r; }
template <int N> inline I left(I a) { EACH a.v[i] = int32_t(uint32_t(a.v[i]) << N); return a; }
template <int N> inline I right(I a) { EACH a.v[i] >>= N; return a; }
inline I both(I a, int bits) { EACH a.v[i] &= bits; return a; }
inline F to_float(I a) { F r; EACH r.v[i] = float(a.v[i]); return r; }
inline I rounded(F a) { I r; EACH r.v[i] = int32_t(std::nearbyint(a.v[i])); return r; }
inline I load_unsigned_bytes(const uint8_t* p) { I r; EACH r.v[i] = p[i]; return r; }
inline I load_signed_bytes(const uint8_t* p) { I r; EACH r.v[i] = int8_t(p[i]); return r; }
inline int32_t sum(I a) { int32_t t = 0; EACH t += a.v[i]; return t; }
inline void store_bytes(int8_t* p, I a) { EACH p[i] = int8_t(a.v[i]); }
inline F power_of_two(I n) { F r; EACH r.v[i] = std::ldexp(1.f, n.v[i]); return r; }
inline Bytes load_bytes(const uint8_t* p) { Bytes r; std::memcpy(r.v, p, sizeof r.v); return r; }
inline Bytes low_nibbles(Bytes a) { for (auto& b : a.v) b &= 15; return a; }
inline Bytes high_nibbles(Bytes a) { for (auto& b : a.v) b >>= 4; return a; }
template <class W, class A> inline I dots(I acc, Bytes w, int32_t a) {
    A each[4];
    std::memcpy(each, &a, 4);
    EACH for (int j = 0; j < 4; j++) acc.v[i] += int32_t(W(w.v[4 * i + j])) * int32_t(each[j]);
    return acc;
}
inline I dot_unsigned(I acc, Bytes u, int32_t s) { return dots<uint8_t, int8_t>(acc, u, s); }
inline I dot_positive(I acc, Bytes s, int32_t u) { return dots<int8_t, int8_t>(acc, s, u); }
inline I dot_signed(I acc, Bytes w, int32_t s) { return dots<int8_t, int8_t>(acc, w, s); }
inline I add_correction(I acc, Bytes) { return acc; }
inline I corrected(I acc, I) { return acc; }
#undef EACH

#endif

inline F operator-(F a) { return zero() - a; }

// e^x to about 2 ulp for x <= 88 (beyond, it may be anything); below -87 it is that of -87, which no sum feels. Cephes' polynomial.
inline F exp(F x) {
    x = max(x, set(-87.f));
    I whole = rounded(x * set(1.44269504f));
    F n = to_float(whole);
    F f = fma(n, set(-0.693359375f), x);
    f = fma(n, set(2.12194440e-4f), f);
    F p = set(1.9875691500e-4f);
    p = fma(p, f, set(1.3981999507e-3f));
    p = fma(p, f, set(8.3334519073e-3f));
    p = fma(p, f, set(4.1665795894e-2f));
    p = fma(p, f, set(1.6666665459e-1f));
    p = fma(p, f, set(5.0000001201e-1f));
    p = fma(p, f * f, f + set(1.f));
    return p * power_of_two(whole);
}

}  // namespace

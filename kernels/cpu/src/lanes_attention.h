// What attention wants of the lanes besides lanes.h: masks, transposition, and tile sizes.
//
// Nothing here rounds, but for the conversions that say so; so it is the same on every instruction set.
#pragma once

#include "lanes.h"

namespace {

#if defined(__F16C__)
inline float half_at(const uint8_t* p) {
    uint16_t half;
    std::memcpy(&half, p, 2);
    return _cvtsh_ss(half);
}
inline uint16_t float_to_half(float x) { return uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT)); }
#else
inline float half_at(const uint8_t* p) {
    uint16_t half;
    std::memcpy(&half, p, 2);
    return half_to_float(half);
}
// The nearest half of |x| <= 65504, the even one of two: a float's bits where halves are normal, and
// multiples of 2^-24 below.
inline uint16_t float_to_half(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude < 0x38800000) return uint16_t(sign | uint32_t(std::nearbyint(std::fabs(x) * 16777216.f)));
    return uint16_t(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}
#endif

// How many queries a tile holds against how many vectors of keys: what the registers have room for. It
// changes no result, since every sum runs over one dimension or over tokens, in their order.
#if defined(__AVX512BW__)
constexpr int TILE_QUERIES = 6, TILE_VECTORS = 4;
#else
constexpr int TILE_QUERIES = 3, TILE_VECTORS = 2;
#endif

#if defined(__AVX512BW__)

// The first `count` lanes of x, `other` in the rest.
inline F keep_first(F x, int64_t count, float other) {
    return {_mm512_mask_mov_ps(_mm512_set1_ps(other), __mmask16((1u << count) - 1), x.v)};
}

inline __m512 four_rows(const float* const* rows, int first, int64_t at) {
    __m512 a = _mm512_castps128_ps512(_mm_loadu_ps(rows[first] + at));
    a = _mm512_insertf32x4(a, _mm_loadu_ps(rows[first + 4] + at), 1);
    a = _mm512_insertf32x4(a, _mm_loadu_ps(rows[first + 8] + at), 2);
    return _mm512_insertf32x4(a, _mm_loadu_ps(rows[first + 12] + at), 3);
}

inline void store_half(uint8_t* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}

// out[d * stride + row] = rows[row][at + d]: sixteen rows, four values of each. Moves bits.
inline void transpose4(const float* const* rows, int64_t at, float* out, int64_t stride) {
    __m512 a = four_rows(rows, 0, at), b = four_rows(rows, 1, at);
    __m512 c = four_rows(rows, 2, at), d = four_rows(rows, 3, at);
    __m512d ab = _mm512_castps_pd(_mm512_unpacklo_ps(a, b)), ab2 = _mm512_castps_pd(_mm512_unpackhi_ps(a, b));
    __m512d cd = _mm512_castps_pd(_mm512_unpacklo_ps(c, d)), cd2 = _mm512_castps_pd(_mm512_unpackhi_ps(c, d));
    _mm512_storeu_ps(out, _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)));
    _mm512_storeu_ps(out + stride, _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
    _mm512_storeu_ps(out + 2 * stride, _mm512_castpd_ps(_mm512_unpacklo_pd(ab2, cd2)));
    _mm512_storeu_ps(out + 3 * stride, _mm512_castpd_ps(_mm512_unpackhi_pd(ab2, cd2)));
}

#elif defined(__AVX2__)

inline F keep_first(F x, int64_t count, float other) {
    __m256i most = _mm256_set1_epi32(int(count)), iota = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    __m256i later = _mm256_add_epi32(iota, _mm256_set1_epi32(8));
    __m256 o = _mm256_set1_ps(other);
    return {_mm256_blendv_ps(o, x.a, _mm256_castsi256_ps(_mm256_cmpgt_epi32(most, iota))),
            _mm256_blendv_ps(o, x.b, _mm256_castsi256_ps(_mm256_cmpgt_epi32(most, later)))};
}

inline void store_half(uint8_t* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 16), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}

inline __m256 two_rows(const float* const* rows, int first, int64_t at) {
    __m256 a = _mm256_castps128_ps256(_mm_loadu_ps(rows[first] + at));
    return _mm256_insertf128_ps(a, _mm_loadu_ps(rows[first + 4] + at), 1);
}

inline void transpose4(const float* const* rows, int64_t at, float* out, int64_t stride) {
    for (int half = 0; half < 16; half += 8, out += 8) {
        __m256 a = two_rows(rows, half, at), b = two_rows(rows, half + 1, at);
        __m256 c = two_rows(rows, half + 2, at), d = two_rows(rows, half + 3, at);
        __m256d ab = _mm256_castps_pd(_mm256_unpacklo_ps(a, b)), ab2 = _mm256_castps_pd(_mm256_unpackhi_ps(a, b));
        __m256d cd = _mm256_castps_pd(_mm256_unpacklo_ps(c, d)), cd2 = _mm256_castps_pd(_mm256_unpackhi_ps(c, d));
        _mm256_storeu_ps(out, _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)));
        _mm256_storeu_ps(out + stride, _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)));
        _mm256_storeu_ps(out + 2 * stride, _mm256_castpd_ps(_mm256_unpacklo_pd(ab2, cd2)));
        _mm256_storeu_ps(out + 3 * stride, _mm256_castpd_ps(_mm256_unpackhi_pd(ab2, cd2)));
    }
}

#elif !defined(SANDERLING_NEON)

inline F keep_first(F x, int64_t count, float other) {
    for (int64_t i = count < 0 ? 0 : count; i < LANES; i++) x.v[i] = other;
    return x;
}

inline void store_half(uint8_t* p, F x) {
    for (int i = 0; i < LANES; i++) {
        uint16_t half = float_to_half(x.v[i]);
        std::memcpy(p + 2 * i, &half, 2);
    }
}

inline void transpose4(const float* const* rows, int64_t at, float* out, int64_t stride) {
    for (int row = 0; row < LANES; row++)
        for (int d = 0; d < 4; d++) std::memcpy(out + d * stride + row, rows[row] + at + d, sizeof(float));
}

#endif

inline F clamp(F x, float least, float most) { return -max(-max(x, set(least)), set(-most)); }

inline float first_lane(F x) {
    float lanes[LANES];
    store(lanes, x);
    return lanes[0];
}

}  // namespace

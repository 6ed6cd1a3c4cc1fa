// One copy of a function per vector width; the loader picks. Only GCC with glibc on x86-64 has this reliably.
#pragma once

#include <cstdlib>  // defines __GLIBC__

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
#if __GNUC__ >= 12
// The fourth level has AVX-512 for 16-bit numbers too, without which loops that read them stay narrow.
#define REALIGN_VECTOR_WIDTHS __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define REALIGN_VECTOR_WIDTHS __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define REALIGN_VECTOR_WIDTHS
#endif

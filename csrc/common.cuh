// What every kernel of csrc/ shares: 16-bit types, warp-level PTX instructions, error checks.
//
// The functions under PRFL_FAST_EMULATE are the only ones that name the hardware. A host build that defines the
// macro supplies them (tests/kernels/cuda_emulation.hpp), so the very source of a kernel runs without a GPU.
#pragma once

#include <cstdint>

#ifdef PRFL_FAST_EMULATE
#include "cuda_emulation.hpp"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace prfl_fast {

using bf16 = __nv_bfloat16;
using fp16 = __half;

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
  }
}

extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];

__device__ __forceinline__ unsigned char* shared_memory() { return dynamic_shared_memory; }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ fp16 from_float<fp16>(float value) {
  return __float2half_rn(value);
}
__device__ __forceinline__ float to_float(bf16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(fp16 value) { return __half2float(value); }

// Sixteen bytes read once: past L1, so that what is read again stays there.
__device__ __forceinline__ uint4 load_streaming(const void* address) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}

// c[16, 8] += a[16, 16] · b[16, 8], fragments as in the PTX manual's m16n8k16 for 16-bit types.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                             uint32_t b0, uint32_t b1);
#define PRFL_FAST_MMA(TYPE, NAME)                                                                              \
  template <>                                                                                                  \
  __device__ __forceinline__ void mma_m16n8k16<TYPE>(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,     \
                                                     uint32_t a3, uint32_t b0, uint32_t b1) {                  \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                                                 \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                 \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                       \
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                                               \
  }
PRFL_FAST_MMA(bf16, "bf16")
PRFL_FAST_MMA(fp16, "f16")
#undef PRFL_FAST_MMA

// Transposes an 8x8 matrix of 16-bit values held by a warp: lane 4i+j holds row i, columns 2j and 2j+1.
__device__ __forceinline__ uint32_t movmatrix(uint32_t value) {
  uint32_t out;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(value));
  return out;
}

__device__ __forceinline__ float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// Clusters: compute capability 9.0 on. A launch without a cluster is a cluster of one.
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// The place in the shared memory of block `rank` of the cluster that `address` has in this block's.
template <typename T>
__device__ __forceinline__ T* cluster_address(T* address, uint32_t rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t out;
  asm("mapa.u64 %0, %1, %2;" : "=l"(out) : "l"(reinterpret_cast<uint64_t>(address)), "r"(rank));
  return reinterpret_cast<T*>(out);
#else
  return address;
#endif
}

}  // namespace prfl_fast
#endif

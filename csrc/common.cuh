// Shared by all kernels of csrc/: 16-bit types, warp-level PTX instructions, error checks.
//
// The functions under PRFL_FAST_EMULATE are the only ones that name the hardware. A host build that defines the
// macro supplies them (tests/helpers/cuda_emulation.hpp), so the source of a kernel runs without a GPU.
#pragma once

#include <cstdint>

// bench/machine_code compiles a launch with these as numbers, so that its replay meets no branches.
#ifndef PRFL_FAST_WARPS
#define PRFL_FAST_WARPS (blockDim.x / 32)
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define PRFL_FAST_CLUSTER 1  // no clusters before sm_90: a constant saves registers
#else
#define PRFL_FAST_CLUSTER cluster_size
#endif
#endif

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

// Launches `kernel` in clusters of `cluster` blocks along x; `what` names the operation in an error.
template <typename... Parameters, typename... Arguments>
void launch_clusters(const char* what, void (*kernel)(Parameters...), dim3 grid, int threads, int cluster,
                     int64_t shared_bytes, cudaStream_t stream, Arguments... arguments) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)), what);
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), what);
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

// Two 16-bit values of a register, the first in its lower half, to floats and back.
template <typename T>
__device__ __forceinline__ void unpack(uint32_t word, float& first, float& second);
template <>
__device__ __forceinline__ void unpack<bf16>(uint32_t word, float& first, float& second) {
  first = __uint_as_float(word << 16);
  second = __uint_as_float(word & 0xffff0000u);
}
template <>
__device__ __forceinline__ void unpack<fp16>(uint32_t word, float& first, float& second) {
  const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&word));
  first = both.x;
  second = both.y;
}
template <typename T>
__device__ __forceinline__ uint32_t pack(float first, float second);
template <>
__device__ __forceinline__ uint32_t pack<bf16>(float first, float second) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&both);
}
template <>
__device__ __forceinline__ uint32_t pack<fp16>(float first, float second) {
  const __half2 both = __floats2half2_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&both);
}

// Start to copy sixteen bytes to shared memory, past L1; zeros if not `inside`. A thread waits for its own copies.
__device__ __forceinline__ void copy_async(void* shared, const void* address, bool inside) {
  const uint32_t to = uint32_t(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(address), "r"(inside ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ void store_vector(void* address, uint4 v) { *static_cast<uint4*>(address) = v; }

// The nearest number of 11 significand bits, and the one next to zero: both are tf32, which has no other.
__device__ __forceinline__ float round_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return __uint_as_float(bits);
}
__device__ __forceinline__ float truncate_tf32(float value) {
  return __uint_as_float(__float_as_uint(value) & 0xffffe000u);
}

// c[16, 8] += a[16, 8] · b[8, 8], fragments as in the PTX manual's m16n8k8 for tf32: bits below tf32's are ignored.
__device__ __forceinline__ void mma_tf32(float (&c)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)),
        "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
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

// Map `address` in this block's shared memory to the same place in that of block `rank` of the cluster.
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

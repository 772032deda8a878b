// Arguments that bindings.cpp passes to qk_norm_rope.cu.
#pragma once

#include <cstdint>

namespace prfl_fast {

// One of q and k. Strides are in elements; vectors of 16 bytes are aligned.
struct Side {
  const void* x;       // [B, L, D] T, strides x_batch, x_token, 1; a backward without a norm has none
  const void* grad;    // [B, L, D] T, strides grad_batch, grad_token, 1; backward only
  const void* weight;  // [D], or [head_dim] of a norm per head; float if wide, else T; null without a norm
  void* out;           // [B, L, D] T contiguous: the result, or the gradient of x; null if not needed
  float* partials;     // [blocks, D] sums of the weight's gradient; null if not needed
  int64_t x_batch, x_token, grad_batch, grad_token;
  int rows, length, blocks;  // B·L, L, blocks that walk the rows
  bool wide;
};

struct Sides {
  Side side[2];
};

// Pairs of a head turn with frame, height and width, in that order; a grid of `height` by `width` tokens a frame.
struct Rotation {
  const float* cos;  // [positions, head_dim / 2]; null without a rotation
  const float* sin;  // [positions, head_dim / 2]
  int height, width, frame_offset, height_offset, width_offset;
};

}  // namespace prfl_fast

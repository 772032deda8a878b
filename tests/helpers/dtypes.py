"""Short names of the dtypes that the tests run through."""

import torch

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
FP8 = torch.float8_e4m3fn
FLOATS = [FP32, BF16, FP16]

"""Copy tensors of the host to a device without waiting for the device."""

import torch


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Return ``tensor`` on ``device``; a copy from the host to CUDA does not wait."""
    device = torch.device(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        # A plain .to() waits until the stream has run everything before the copy. Pinned memory is
        # not reused before the copy ends: PyTorch's allocator records an event of it.
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)

"""The native library, ready for use: checked (loader.py), able to read tensors, typed (_native.pyi). Import it here."""

import torch

from vllm_adrenaline.native import loader

loader.load()

import vllm_adrenaline.native._native as library  # noqa: E402 - not before it is known to be there, and of these sources

library.use_tensors(torch.Tensor.__dlpack_c_exchange_api__)

__all__ = ["library"]

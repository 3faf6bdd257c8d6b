"""Page-locked host memory, from which a GPU copies at the full speed of its bus, and while it computes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def lock_pages(tensors: Iterable[Tensor]) -> list[int]:
    """Lock the pages of tensors where they are, and return the addresses of those that were; nothing is copied.

    A host may allow too little locked memory: copies of the others take longer, and nothing else changes. Locked pages
    are to be unlocked before the tensors go; see `unlock_pages`.
    """
    cudart: Any = torch.cuda.cudart()
    locked = []
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and not tensor.is_pinned():
            if int(cudart.cudaHostRegister(storage.data_ptr(), storage.nbytes(), 0)) != 0:
                break
            locked.append(storage.data_ptr())
    return locked


def unlock_pages(addresses: Iterable[int], tensors: Iterable[Tensor]) -> None:
    """Unlock what was locked; `tensors` only have to live until then."""
    cudart: Any = torch.cuda.cudart()
    torch.cuda.synchronize()
    for address in addresses:
        cudart.cudaHostUnregister(address)
    del tensors

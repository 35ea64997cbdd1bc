"""What an index of tokens is, and its inverse.

A token index `index_BM` names, for every clip b, M distinct tokens of its N:

    inverse[b, n] = m  where index[b, m] == n,  -1 where no m has it

The gradient of a gather is the gather by the inverse: every row of the (B, N, D) gradient is then written
exactly once, as a gradient row or as zeros. Against `torch.zeros` plus a scatter (N + 2M rows moved) that
moves N + M rows and a map of 4 bytes a token, and needs no atomics. Distinctness is kept by the caller
(training/masks.py draws without replacement); were it broken, one of the duplicates would win and the
gradient of the others would be lost.
"""

from __future__ import annotations

import torch

from miles_fast.kernels.dispatch import INTERPRETED, jit, tl, triton

_INDEX_DTYPES = (torch.int64, torch.int32)
_INVERT_BLOCK = 256


def check_token_index(
    index_BM: torch.Tensor, tokens_BND: torch.Tensor, name: str, *, distinct: bool = True
) -> None:
    """Raise ValueError unless `index_BM` is an int64 or int32 (B, M) index into `tokens_BND` on its device.

    Values are looked at only on the CPU: on a GPU that would make the host wait (there a kernel answers an
    index out of range with NaN rows). IndexError if one is out of range, ValueError if `distinct` and a clip
    repeats one.
    """
    if index_BM.dtype not in _INDEX_DTYPES:
        raise ValueError(f"{name} must be int64 or int32, got {index_BM.dtype}")
    if index_BM.dim() != 2 or index_BM.shape[0] != tokens_BND.shape[0]:
        raise ValueError(
            f"{name} must be (B, M) with B = {tokens_BND.shape[0]} clips, got shape {tuple(index_BM.shape)}"
        )
    if index_BM.device != tokens_BND.device:
        raise ValueError(f"{name} is on {index_BM.device}, the tokens are on {tokens_BND.device}")
    if index_BM.device.type != "cpu" or index_BM.numel() == 0 or torch.compiler.is_compiling():
        return
    lowest, highest = (int(bound) for bound in index_BM.aminmax())
    if lowest < 0 or highest >= tokens_BND.shape[1]:
        raise IndexError(
            f"{name} holds values {lowest}..{highest}, but a clip has tokens 0..{tokens_BND.shape[1] - 1}"
        )
    if distinct and bool((index_BM.sort(dim=1).values.diff(dim=1) == 0).any()):
        raise ValueError(f"{name} names a token twice in one clip: draw without replacement")


def invert_token_index_reference(index_BM: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """inverse (B, N) int32: the place of each token in `index_BM`, -1 where it has none."""
    B, M = index_BM.shape
    places_BM = torch.arange(M, dtype=torch.int32, device=index_BM.device).expand(B, M)
    inverse_BN = torch.full((B, num_tokens), -1, dtype=torch.int32, device=index_BM.device)
    return inverse_BN.scatter_(1, index_BM.long(), places_BM)


@jit
def _invert_kernel(index_ptr, inverse_ptr, M, N, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    blocks_per_clip = tl.cdiv(M, BLOCK)
    clip = (pid // blocks_per_clip).to(tl.int64)
    place = (pid % blocks_per_clip) * BLOCK + tl.arange(0, BLOCK)
    valid = place < M
    token = tl.load(index_ptr + clip * M + place, mask=valid, other=-1).to(tl.int64)
    valid = valid & (token >= 0) & (token < N)
    tl.store(inverse_ptr + clip * N + token, place, mask=valid)


def invert_token_index(index_BM: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """inverse (B, N) int32, by Triton on CUDA tensors or under TRITON_INTERPRET=1, else by the reference.

    Called inside the ops' own backward; carries no gradient. The fill is a launch of its own because blocks
    of one grid cannot wait for one another.
    """
    if triton is None or not (INTERPRETED or index_BM.is_cuda):
        return invert_token_index_reference(index_BM, num_tokens)
    B, M = index_BM.shape
    inverse_BN = torch.full((B, num_tokens), -1, dtype=torch.int32, device=index_BM.device)
    if index_BM.numel() > 0:
        with torch.cuda.device_of(index_BM):
            _invert_kernel[(B * triton.cdiv(M, _INVERT_BLOCK),)](
                index_BM.contiguous(), inverse_BN, M, num_tokens, BLOCK=_INVERT_BLOCK, num_warps=4
            )
    return inverse_BN

"""Codes of any width as one stream of bits, in words of 32: code ``i`` of a row has the bits from ``i * bits`` on, lowest first.

Codes may cross from one word to the next, so that 32 codes take exactly ``bits`` words. Packed GPTQ and compressed-tensors
weights are such streams; codes of 2, 4 and 8 bits cross nothing.
"""

import torch

WORD = 32


def to_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack rows of unsigned codes, ``(rows, count)``, into int32 words, ``(rows, ceil(count * bits / 32))``."""
    single = (codes.long().unsqueeze(-1) >> torch.arange(bits, device=codes.device)) & 1
    stream = single.flatten(1)
    words = torch.nn.functional.pad(stream, (0, -stream.shape[1] % WORD)).unflatten(1, (-1, WORD))
    values = (words << torch.arange(WORD, device=codes.device)).sum(dim=-1)
    return torch.where(values >= 2 ** (WORD - 1), values - 2**WORD, values).to(torch.int32)


def from_words(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Unpack the first ``count`` codes of each row of int32 words: int64, ``(rows, count)``."""
    stream = ((words.long().unsqueeze(-1) >> torch.arange(WORD, device=words.device)) & 1).flatten(1)
    single = stream[:, : count * bits].unflatten(1, (count, bits))
    codes: torch.Tensor = (single << torch.arange(bits, device=words.device)).sum(dim=-1)
    return codes

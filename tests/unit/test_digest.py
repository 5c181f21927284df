"""Digests tell bits from numbers."""

import torch

from kbitcheck.observe.probes import digest

NUMBERS = torch.linspace(-3, 3, 1000)


def test_an_exact_cast_changes_bits_and_no_value():
    half = NUMBERS.bfloat16()
    assert digest.value(half) == digest.value(half.float()) == digest.value(half.double())
    assert len({digest.bits(t) for t in (half, half.float(), half.double())}) == 3


def test_the_last_bit_of_any_dtype_counts():
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        numbers = NUMBERS.to(dtype)
        nudged = numbers.clone()
        nudged[7] = torch.nextafter(nudged[7].double() if dtype is torch.float64 else nudged[7], nudged.new_tensor(9))
        assert not torch.equal(nudged, numbers)
        assert digest.value(nudged) != digest.value(numbers)
        assert digest.bits(nudged) != digest.bits(numbers)


def test_every_chunk_counts_in_logical_order(monkeypatch):
    monkeypatch.setattr(digest, "CHUNK", 10)
    turned = NUMBERS.view(20, 50).T
    assert digest.bits(turned) == digest.bits(turned.contiguous()) != digest.bits(NUMBERS)
    later = NUMBERS.clone()
    later[-1] += 1
    assert digest.value(later) != digest.value(NUMBERS)


def test_nothing_and_the_meta_device_have_digests():
    assert digest.bits(torch.empty(0)) != digest.bits(NUMBERS)
    assert digest.value(torch.empty(3, dtype=torch.float64, device="meta")) == "meta"

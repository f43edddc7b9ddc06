"""The picture of frozen bits."""

import torch

from benchmarks.frozen_bits import draw, leading_bits, learn
from lightning_blip.frozen.diagonal import encode


def test_bits_drawn_as_frozen_never_change(tmp_path):
    gained, bits, codes = learn(tasks=3, epochs=2)
    assert ((gained - bits).abs() < 0.5 + 1e-3).all()
    assert bits.amax() > 1
    assert (bits[1:] >= bits[:-1]).all()
    shown = leading_bits(codes)
    frozen = torch.arange(shown.shape[-1]) < bits[:-1, :, None]
    assert torch.equal(shown[1:][frozen], shown[:-1][frozen])
    assert not torch.equal(shown[1:], shown[:-1])
    draw(gained, bits, codes, tmp_path / "bits.png")
    assert (tmp_path / "bits.png").stat().st_size > 10_000


def test_leading_bits_are_a_binary_fraction():
    # 1/2 of the bound is 5/6 of the way from −B/3 to 2B/3: 0.1101010101…
    assert leading_bits(encode(torch.tensor([0.5]), 1.0, 20)).tolist() == [[1, 1, 0, 1, 0, 1, 0, 1, 0, 1]]

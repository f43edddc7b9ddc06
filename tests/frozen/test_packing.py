"""How values become integers: bounds, codes, cells of codes, information in 16 bits, checksums."""

import pytest
import torch

from lightning_blip.frozen.packing import (
    bound,
    cell_codes,
    checksum,
    code_of_zero,
    decode,
    dropped_bits,
    encode,
    encode_leading,
    free_bits,
    middle_of,
    store_information,
    stored_information,
)


@pytest.mark.parametrize(
    ("values", "fan", "is_bias", "expected"),
    [
        ([0.5], 9, False, 2.0), ([0.5], 9, True, 1.0), ([1.99], 9, False, 2.0), ([2.0], 9, False, 4.0),
        ([1.0], 9, True, 2.0), ([-1.5], 9, True, 4.0), ([0.4], None, False, 1.0), ([0.5], None, False, 1.0),
        ([0.51], None, False, 2.0), ([-4.0], None, False, 8.0), ([], None, False, 1.0), ([], 4, False, 3.0),
    ],
)  # fmt: skip
def test_the_bound_holds_twice_the_largest_value_unless_the_layers_own_bound_holds_it(
    values, fan, is_bias, expected
):
    assert bound(torch.tensor(values), fan, is_bias=is_bias) == expected


def test_a_value_on_the_grid_is_its_own_code_and_the_rest_goes_to_the_nearest():
    codes = torch.arange(-7, 8)
    theta = decode(codes, 0.5, 3, torch.float64)
    torch.testing.assert_close(theta, codes.double() / 16)
    assert torch.equal(encode(theta, 0.5, 3), codes.int())
    assert encode(torch.tensor([0.09, 0.10, -9.0, 9.0]), 0.5, 3).tolist() == [1, 2, -7, 7]


def test_the_papers_rounding_keeps_the_leading_bits_and_makes_values_without_bits_zero():
    theta = torch.tensor([0.7, 0.7, 0.7, -0.6, 0.99])
    codes = encode_leading(theta, torch.tensor([0, 1, 3, 2, 1]), bound=1.0, max_bits=3)
    assert codes.tolist() == [0, 4, 6, -4, 7]


@pytest.mark.parametrize("max_bits", [1, 2, 4, 7])
def test_strict_cells_of_every_number_of_bits_divide_all_codes_and_lie_within_each_other(max_bits):
    most = 2**max_bits
    code = torch.arange(1 - most, most, dtype=torch.int32)
    wider = (torch.full_like(code, 1 - most), torch.full_like(code, most - 1))
    for bits in range(max_bits + 1):
        low, high = cell_codes(code, torch.full_like(code, bits), max_bits, "strict")
        assert ((low <= code) & (code <= high)).all()
        assert ((wider[0] <= low) & (high <= wider[1])).all()
        # The cell of ⌊(θ/B + ⅓)·2^bits⌋: another cell wherever that number is another.
        third = 2**max_bits // 3 if bits else 0
        number = (code + third + most) >> (max_bits - bits + (bits == 0))
        assert torch.equal(low[1:] != low[:-1], number[1:] != number[:-1])
        # Cells touch, and together they are the whole interval.
        assert (low[0], high[-1]) == (1 - most, most - 1)
        starts = low[1:] != low[:-1]
        assert torch.equal(high[:-1][starts] + 1, low[1:][starts])
        wider = low, high
    assert torch.equal(low, code)
    assert torch.equal(high, code)


def test_the_papers_cell_is_the_anchor_plus_and_minus_one_code_of_its_bits():
    """Half of 2^(N − bits + 1) on each side, no width at all with N bits, and never outside of (−B, B)."""
    code = torch.tensor([0, 0, 0, 0, 0, 14, -14], dtype=torch.int32)
    low, high = cell_codes(code, torch.tensor([0, 1, 2, 3, 4, 2, 2]), 4, "paper")
    assert high.tolist() == [15, 8, 4, 2, 0, 15, -10]
    assert low.tolist() == [-15, -8, -4, -2, 0, 10, -15]


def test_the_sign_is_free_only_where_no_bit_is_frozen():
    assert free_bits(torch.tensor([0, 1, 2, 20]), 20).tolist() == [21, 19, 18, 0]


def test_cells_are_counted_from_the_lower_end_shifted_by_a_third_of_the_bound():
    assert code_of_zero(torch.tensor([0, 1, 6]), 6).tolist() == [64, 85, 85]


def test_an_anchor_keeps_eight_bits_behind_the_frozen_ones():
    assert dropped_bits(torch.tensor([0, 8, 9, 21])).tolist() == [0, 0, 1, 13]


def test_dropped_bits_are_replaced_by_the_middle_of_their_range():
    code = torch.tensor([23, 16, -1, 23], dtype=torch.int32)
    assert middle_of(code, torch.tensor([3, 3, 3, 0])).tolist() == [20, 20, -4, 23]


def test_small_and_large_information_have_units_of_their_own():
    values = torch.tensor([0.0, 2.0**-6, 1.0, 1022.0, 1024.0, 2.0**24, 2.0**38])
    stored = store_information(values)
    assert stored.dtype == torch.float16
    assert (stored[:4] >= 0).all()
    assert (stored[4:] < 0).all()
    torch.testing.assert_close(stored_information(stored), values, rtol=2.0**-11, atol=0)
    assert stored_information(stored, torch.float64).dtype == torch.float64
    assert stored_information(store_information(torch.tensor([2.0**60]))) == 2.0**24 * 65504


def test_values_just_below_the_switch_of_units_stay_below_it():
    """Else a stored value would be read as infinite: 1023·2^6 is below the largest float16, 65504."""
    edge = torch.tensor([1022.9, 1023.0, 1023.4])
    assert torch.equal(store_information(edge) < 0, torch.tensor([False, True, True]))
    torch.testing.assert_close(stored_information(store_information(edge)), edge, rtol=2.0**-11, atol=0)


def test_a_checksum_tells_any_change_of_a_value_or_of_its_place():
    codes = torch.arange(100, dtype=torch.int32).view(10, 10)
    seen = {checksum(codes)}
    for place in range(100):
        changed = codes.clone()
        changed.view(-1)[place] += 1
        seen.add(checksum(changed))
    swapped = codes.clone()
    swapped[0, :2] = swapped[0, :2].flip(0)
    seen.add(checksum(swapped))
    assert checksum(codes.view(-1)) == checksum(codes)
    assert len(seen) == 102
    assert checksum(torch.tensor([3, 4])) == 3 * 1 + 4 * 2  # saved in checkpoints, so it may not change


def test_a_checksum_tells_parts_of_large_parameters_apart():
    codes = torch.zeros(2**16 + 5, dtype=torch.int32)
    codes[0] = 1
    other = torch.zeros_like(codes)
    other[2**16] = 1
    assert (checksum(codes), checksum(other)) == (1, 2)
    full = torch.full((2**22,), 2**20, dtype=torch.int32)  # 64 parts of 2^16 values
    assert checksum(full) == 2**20 * (2**16 * (2**16 + 1) // 2) * (64 * 65 // 2) % 2**61

"""Codes, cells and the packed state of the diagonal basis."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_blip.frozen.diagonal import DiagonalState
from lightning_blip.frozen.packing import (
    bound,
    cell_codes,
    decode,
    encode,
    encode_leading,
    store_information,
    stored_information,
)

BOUNDS = st.floats(min_value=2.0**-10, max_value=64.0, width=32)
UNIT = st.floats(min_value=-1.0, max_value=1.0, width=32)
CELLS = st.sampled_from(["strict", "paper"])
MAX_BITS = st.integers(1, 20)


@st.composite
def values_and_bits(draw: st.DrawFn) -> tuple[Tensor, Tensor, float, int]:
    """Draw values, the frozen bits of each, their bound B and the largest number of bits N."""
    max_bits = draw(MAX_BITS)
    pairs = draw(st.lists(st.tuples(UNIT, st.integers(0, max_bits)), min_size=1, max_size=20))
    largest = draw(BOUNDS)
    theta = torch.tensor([value for value, _ in pairs]) * largest
    return theta, torch.tensor([bits for _, bits in pairs]), largest, max_bits


def test_the_bound_depends_on_a_layers_inputs_and_grows_for_weights_outside_it():
    layer = nn.Linear(9, 4)
    assert bound(layer.weight, 9) == pytest.approx(6 / 3)
    assert bound(layer.bias, 9, is_bias=True) == 1.0
    assert bound(torch.tensor([2.5]), 9) == 8.0
    assert bound(torch.zeros(3)) == 1.0
    assert bound(torch.ones(3)) == 2.0
    assert bound(torch.zeros(0)) == 1.0


@given(values_and_bits())
def test_rounding_to_the_grid_a_second_time_changes_nothing(case):
    theta, bits, largest, max_bits = case
    once = decode(encode(theta, largest, max_bits), largest, max_bits)
    assert torch.equal(encode(once, largest, max_bits), encode(theta, largest, max_bits))
    assert torch.equal(decode(encode(once, largest, max_bits), largest, max_bits), once)
    rounded = decode(encode_leading(theta, bits, largest, max_bits), largest, max_bits)
    again = encode_leading(rounded, bits, largest, max_bits)
    assert torch.equal(decode(again, largest, max_bits), rounded)


@given(st.integers(-(2**20) + 1, 2**20 - 1), BOUNDS)
def test_every_code_is_the_same_after_decoding_to_float32_and_encoding(code, largest):
    assert encode(decode(torch.tensor([code]), largest, 20), largest, 20).item() == code


@given(st.sampled_from([1.0, -1.0, 1.5, -1e9, float("inf")]), BOUNDS, MAX_BITS)
def test_a_value_at_or_beyond_the_bound_is_encoded_inside_it(unit, largest, max_bits):
    value = decode(encode(torch.tensor([unit * largest]), largest, max_bits), largest, max_bits)
    assert value.abs().item() <= largest * (1 - 2.0**-max_bits) * (1 + 2**-23)
    assert value.abs().item() < largest


@given(values_and_bits())
def test_freezing_moves_values_by_half_a_step_at_most_or_rounds_them_as_in_the_paper(case):
    theta, bits, largest, max_bits = case
    theta = theta * (1 - 2.0**-max_bits)
    step = largest / 2**max_bits
    kept, rounded = theta.clone(), theta.clone()
    DiagonalState.of(theta, largest, 1.0, max_bits).freeze(kept, bits, keep_free_bits=True)
    # Half a step, and half a unit in the last place where float32 cannot hold the value exactly.
    assert ((kept - theta).abs() <= step / 2 + largest * 2.0**-23).all()
    DiagonalState.of(theta, largest, 1.0, max_bits, "paper").freeze(rounded, bits, keep_free_bits=False)
    assert (rounded[bits == 0] == 0).all()
    expected = (largest * (theta / largest * 2.0**bits).round() / 2.0**bits).clamp(
        -largest + step, largest - step
    )
    torch.testing.assert_close(rounded[bits > 0], expected[bits > 0], rtol=1e-6, atol=1e-9)


@given(values_and_bits(), CELLS)
def test_an_anchor_lies_in_its_cell_and_the_cell_inside_the_bound(case, cell):
    theta, bits, largest, max_bits = case
    code = encode(theta, largest, max_bits)
    low, high = cell_codes(code, bits, max_bits, cell)
    assert ((low <= code) & (code <= high)).all()
    assert (low > -(2**max_bits)).all()
    assert (high < 2**max_bits).all()
    assert (high[bits == 0] == 2**max_bits - 1).all()
    assert (low[bits == 0] == -(2**max_bits) + 1).all()
    everything = bits == max_bits
    assert torch.equal(low[everything], code[everything])
    assert torch.equal(high[everything], code[everything])


@given(values_and_bits())
def test_a_strict_cell_with_one_more_bit_lies_inside_the_cell_before(case):
    theta, bits, largest, max_bits = case
    code = encode(theta, largest, max_bits)
    low, high = cell_codes(code, bits, max_bits, "strict")
    for inside in (low, high, (low + high) // 2):
        more = (bits + 1).clamp(max=max_bits)
        inner_low, inner_high = cell_codes(inside, more, max_bits, "strict")
        assert ((low <= inner_low) & (inner_high <= high)).all()


def test_a_strict_cell_is_one_code_of_the_frozen_bits_wide():
    low, high = cell_codes(torch.tensor([100, -100]), torch.tensor([3, 3]), max_bits=8, cell="strict")
    assert low.tolist() == [75, -117]
    assert high.tolist() == [106, -86]


@pytest.mark.parametrize("bits", range(1, 15))
def test_zero_lies_a_third_of_a_strict_cell_from_its_nearer_wall(bits):
    low, high = cell_codes(torch.tensor([0]), torch.tensor([bits]), max_bits=20, cell="strict")
    edges = sorted([-low.item() / 2 ** (20 - bits), (high.item() + 1) / 2 ** (20 - bits)])
    assert edges == pytest.approx([1 / 3, 2 / 3], abs=2.0 ** (bits - 20))


@given(values_and_bits(), CELLS)
def test_a_saved_state_is_restored_exactly(case, cell):
    theta, bits, largest, max_bits = case
    frozen = DiagonalState.of(theta, largest, 1e-11, max_bits, cell)
    frozen.information = frozen.information + torch.rand(theta.shape)
    kept = theta.clone()
    frozen.freeze(kept, bits, keep_free_bits=True)
    restored = DiagonalState.from_state_dict(frozen.state_dict())
    restored.locate([kept])
    assert torch.equal(restored.packed, frozen.packed)
    assert torch.equal(restored.precision, frozen.precision)
    assert torch.equal(restored.bits, bits.to(torch.uint8))
    code = encode(theta, largest, max_bits).clamp(-(2**max_bits) + 1)
    assert torch.equal(encode(kept, largest, max_bits), code)
    if cell == "paper":
        assert torch.equal(restored.code, code)
    assert (restored.bound, restored.prior, restored.freezing) == (largest, 1e-11, frozen.freezing)
    assert (restored.freezing.cell, restored.tasks) == (cell, 1)


@given(values_and_bits(), st.integers(0, 2**31))
def test_any_values_in_their_strict_cells_restore_the_state(case, seed):
    theta, bits, largest, max_bits = case
    frozen = DiagonalState.of(theta, largest, 1.0, max_bits)
    frozen.freeze(theta, bits, keep_free_bits=True)
    low, high = frozen.limits(torch.float32)
    torch.manual_seed(seed)
    elsewhere = torch.lerp(low, high, torch.rand(theta.shape)).clamp(low, high)
    for inside in (low, high, elsewhere):
        restored = DiagonalState.from_state_dict(frozen.state_dict())
        assert torch.equal(restored.bits, frozen.bits)
        assert torch.equal(restored.precision, frozen.precision)
        again = DiagonalState.from_state_dict(restored.state_dict())  # saved before locate was called
        again.locate([inside])
        assert torch.equal(again.packed, frozen.packed)
        assert again.state_dict().keys() == frozen.state_dict().keys()


@given(values_and_bits())
def test_a_strict_anchor_is_exact_to_a_256th_of_its_cell(case):
    theta, bits, largest, max_bits = case
    frozen = DiagonalState.of(theta, largest, 1.0, max_bits)
    frozen.freeze(theta, bits, keep_free_bits=True)
    code = encode(theta, largest, max_bits)
    low, high = cell_codes(code, bits, max_bits, "strict")
    width = 2.0 ** (max_bits - bits + (bits == 0))  # of the cell, before the bound cuts it
    assert ((frozen.code - code).abs() <= width / 512 + 0.5).all()
    for limit, expected in zip(cell_codes(frozen.code, bits, max_bits, "strict"), (low, high), strict=True):
        assert torch.equal(limit, expected)


def test_weights_other_than_the_saved_ones_are_refused():
    theta = torch.rand(300) - 0.5
    frozen = DiagonalState.of(theta, 1.0, 1.0)
    frozen.freeze(theta, torch.full((300,), 6), keep_free_bits=True)
    for other in (-theta, theta.flip(0), theta + 2**-6 * (torch.arange(300) == 7)):
        restored = DiagonalState.from_state_dict(frozen.state_dict())
        with pytest.raises(ValueError, match="load the module's weights from the same checkpoint first"):
            restored.locate([other])
    with pytest.raises(ValueError, match=r"call locate\(\[theta\]\) first"):
        restored.limits(torch.float32)
    restored.locate([theta])
    assert torch.equal(restored.packed, frozen.packed)


def test_information_is_stored_with_eleven_bits_over_sixty_powers_of_two():
    information = torch.exp2(torch.linspace(-20, 40, 100_000)) * (1 - 2**-12)
    stored = stored_information(store_information(information))
    assert ((stored - information).abs() <= information * 2**-11).all()
    assert (stored.diff() >= 0).all()
    assert torch.equal(store_information(stored), store_information(information))
    assert stored_information(store_information(torch.tensor([math.inf]))).item() == 2**40 * (1 - 2**-11)


def test_storing_information_a_second_time_changes_nothing():
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    used = ((patterns >= 0) & (patterns < 1023 * 64)) | (patterns <= -1023 / 2**24)
    information = stored_information(patterns[used & patterns.isfinite()]).unique()
    assert torch.equal(stored_information(store_information(information)), information)


def test_a_state_and_its_checkpoint_take_the_same_memory_for_any_number_of_tasks():
    theta = torch.randn(100).clamp(-0.9, 0.9)
    strict, paper = (DiagonalState.of(theta, 1.0, 1.0, cell=cell) for cell in ("strict", "paper"))
    for task in range(5):
        for frozen, saved in ((strict, 300), (paper, 600)):
            frozen.information = torch.full((100,), 4.0**task - 1)
            frozen.freeze(theta, torch.full((100,), task), keep_free_bits=True)
            assert sum(x.nbytes for x in vars(frozen).values() if isinstance(x, Tensor)) == 600
            assert sum(x.nbytes for x in frozen.state_dict().values() if isinstance(x, Tensor)) == saved

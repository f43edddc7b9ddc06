"""The arguments of ``diagonal_fisher``, and the error that each mistake raises."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import distributions as D
from torch import nn

from lightning_blip.fisher import diagonal_fisher
from tests.fisher.networks import Apply, FlatInside, TwoInputs
from tests.fisher.reference import assert_same, in_batches, slow_fisher


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def data(samples=10):
    return torch.randn(samples, 5), torch.randint(3, (samples,))


@pytest.mark.parametrize("samples", [1, 4, 6, 8, 10, 99])
def test_samples_limits_the_estimate_to_the_first_samples(samples):
    layer, (inputs, targets), seen = nn.Linear(5, 3).double(), data(), []
    inputs = inputs.double()
    found = diagonal_fisher(
        layer, in_batches(inputs, targets, 4), labels="empirical", samples=samples, progress=seen.append
    )
    used = min(samples, 10)
    assert_same(found, slow_fisher(layer, (inputs[:used],), targets[:used]))
    assert sum(seen) == used
    assert len(seen) == -(-used // 4)


def test_no_batch_is_loaded_after_the_last_sample():
    def endless():
        yield data(4)
        yield data(4)
        raise AssertionError("loaded one batch too many")

    diagonal_fisher(nn.Linear(5, 3), endless(), samples=8)


def test_inputs_may_be_positional_or_keyword_arguments():
    module, left, right = TwoInputs().double(), torch.randn(6, 5).double(), torch.randn(6, 4).double()
    targets = torch.randint(3, (6,))
    expected = slow_fisher(module, (left, right), targets)
    for inputs in (
        (left, right),
        [left, right],
        {"left": left, "right": right},
        {"right": right, "left": left},
    ):
        assert_same(diagonal_fisher(module, [(inputs, targets)], labels="empirical"), expected)


@pytest.mark.parametrize("per_sample", [False, True])
def test_a_tensor_without_batch_dimension_is_shared_by_all_samples(per_sample):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 3)
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x, mask, flag):
            assert flag == "text"
            return (self.inner(x) * mask).sum(1) * self.scale

    module, x = Masked().double(), torch.randn(6, 7, 4).double()
    mask = torch.rand(6, 7, 1).double() if per_sample else torch.rand(7, 1).double()
    targets = torch.randint(3, (6,))
    masks = mask if per_sample else mask.expand(6, 7, 1)

    class Filled(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, x, mask):
            return self.module(x, mask, "text")

    expected = slow_fisher(Filled(), (x, masks), targets)
    found = diagonal_fisher(module, [((x, mask, "text"), targets)], labels="empirical")
    assert_same({f"module.{name}": value for name, value in found.items()}, expected)


def test_a_batch_without_samples_is_skipped():
    layer, (inputs, targets) = nn.Linear(5, 3), data()
    expected = diagonal_fisher(layer, [(inputs, targets)])
    found = diagonal_fisher(layer, [(inputs[:0], targets[:0]), (inputs, targets)])
    assert torch.equal(found["weight"], expected["weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"likelihood": "poisson"}, r"likelihood='poisson' .*'categorical', 'gaussian', 'bernoulli'"),
        ({"likelihood": 3}, "likelihood=3 .*callable"),
        ({"likelihood": ["categorical"]}, r"likelihood=\['categorical'\] .*callable"),
        ({"labels": "true"}, 'labels=\'true\' is not known: give "sampled" or "empirical"'),
        ({"smoothing": -0.1}, r"smoothing=-0\.1 must be 0 to 1"),
        ({"smoothing": 1.5}, r"smoothing=1\.5 must be 0 to 1"),
        ({"smoothing": float("nan")}, "smoothing=nan must be 0 to 1"),
        ({"samples": 0}, "samples=0 .*at least 1"),
        ({"samples": -3}, "samples=-3"),
        ({"parameters": ["weight", "wieght"]}, "no parameter 'wieght'.*weight, bias"),
        ({"parameters": []}, "none to estimate"),
        ({"batches": []}, "held no sample"),
        ({"batches": [(torch.zeros(0, 5), None)]}, "held no sample"),
        ({"batches": [torch.zeros(2, 5, 5)]}, r"pairs \(inputs, targets\), not Tensor"),
        ({"batches": [(torch.zeros(2, 5),)]}, r"pairs \(inputs, targets\)"),
        ({"batches": [("text", None)]}, "at least one tensor"),
        ({"labels": "empirical", "batches": [(torch.zeros(2, 5), None)]}, "needs a tensor of targets"),
        ({"labels": "empirical", "batches": [(torch.zeros(2, 5), torch.zeros(2))]}, "class indices"),
        (
            {"labels": "empirical", "batches": [(torch.zeros(2, 5), torch.zeros(2, 4).long())]},
            r"shape \(2,\)",
        ),
        ({"labels": "empirical", "likelihood": "gaussian"}, r"targets of shape \(2,\) do not fit"),
        ({"labels": "empirical", "likelihood": lambda out: D.Normal(out[:, :1], 1.0)}, "do not fit"),
    ],
)
def test_a_wrong_argument_is_refused(options, message):
    arguments = {"batches": [(torch.randn(2, 5), torch.randint(3, (2,)))], **options}
    with pytest.raises(ValueError, match=message):
        diagonal_fisher(nn.Linear(5, 3), **arguments)


def test_wrong_arguments_are_refused_before_the_first_batch_is_loaded():
    def never():
        raise AssertionError("loaded a batch")
        yield

    for wrong in ({"likelihood": "categoricl"}, {"labels": "true"}, {"smoothing": 2.0}, {"samples": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            diagonal_fisher(nn.Linear(5, 3), never(), **wrong)


def test_targets_may_lack_a_dimension_of_length_one():
    layer, inputs, targets = nn.Linear(5, 1).double(), torch.randn(8, 5).double(), torch.rand(8).round()
    short = diagonal_fisher(layer, [(inputs, targets)], "bernoulli", "empirical")
    assert_same(short, diagonal_fisher(layer, [(inputs, targets[:, None])], "bernoulli", "empirical"))
    assert_same(short, diagonal_fisher(layer, in_batches(inputs, targets, 1), "bernoulli", "empirical"))


def test_a_module_without_trainable_parameters_is_refused():
    with pytest.raises(ValueError, match="none to estimate"):
        diagonal_fisher(nn.Linear(5, 3).requires_grad_(False), [data()])


def test_a_named_parameter_must_require_gradients():
    layer = nn.Linear(5, 3)
    layer.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="'bias' does not require gradients"):
        diagonal_fisher(layer, [data()], parameters=["bias"])


def test_complex_and_integer_parameters_are_refused():
    layer = nn.Linear(5, 3)
    layer.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    layer.count = nn.Parameter(torch.zeros(2, dtype=torch.long), requires_grad=False)
    with pytest.raises(ValueError, match=r"'phase' is torch\.complex64"):
        diagonal_fisher(layer, [data()])
    with pytest.raises(ValueError, match=r"'count' is torch\.int64"):
        diagonal_fisher(layer, [data()], parameters=["count"])


@pytest.mark.parametrize("likelihood", ["categorical", lambda out: D.Categorical(logits=out)])
@pytest.mark.parametrize("bad", [0, 2])
def test_a_log_probability_that_is_not_finite_is_refused(bad, likelihood):
    batches = [data(4) for _ in range(3)]
    batches[bad][0][3, 0] = torch.inf if bad else torch.nan
    with pytest.raises(FloatingPointError, match=f"batch {bad} is not finite"):
        diagonal_fisher(nn.Linear(5, 3), batches, likelihood)


def test_inputs_may_require_gradients():
    layer, (inputs, targets) = nn.Linear(5, 3), data()
    found = diagonal_fisher(layer, [(inputs.clone().requires_grad_(), targets)])
    assert torch.equal(found["weight"], diagonal_fisher(layer, [(inputs, targets)])["weight"])


@pytest.mark.parametrize("first", [4, 1])
def test_samples_that_influence_each_other_are_refused(first):
    norm = nn.BatchNorm1d(5, track_running_stats=False) if first > 1 else Apply(lambda x: x - x.mean(0))
    module = nn.Sequential(nn.Linear(5, 5), norm, nn.Linear(5, 3))
    match = r"influence each other \(see 1.weight, 1.bias" if first > 1 else "influence each other"
    with pytest.raises(ValueError, match=match):
        diagonal_fisher(module, [data(first), data(4)])


def test_an_output_with_another_batch_size_is_refused():
    module = nn.Sequential(nn.Linear(5, 3), Apply(lambda x: x.repeat(2, 1)))
    with pytest.raises(ValueError, match="first dimension of inputs and output must be the batch"):
        diagonal_fisher(module, [data()])


def test_an_output_that_is_not_a_tensor_needs_a_callable_likelihood():
    with pytest.raises(TypeError, match=r"returned tuple, not a tensor .* callable"):
        diagonal_fisher(nn.Sequential(nn.Linear(5, 3), Apply(lambda x: (x, x))), [data()])


def test_categorical_needs_a_dimension_of_classes():
    with pytest.raises(ValueError, match="bernoulli"):
        diagonal_fisher(nn.Sequential(nn.Linear(5, 1), nn.Flatten(0)), [data()])


class Changing(nn.Module):
    """Uses other operations for three samples or more, and mixes the samples if ``together``."""

    def __init__(self, together):
        super().__init__()
        self.inner, self.together = nn.Linear(5, 3), together

    def forward(self, x):
        if len(x) < 3:
            return self.inner(x)
        if self.together:
            return x[:, :3] + self.inner(x.sum(0))
        return F.linear(x, self.inner.weight) + self.inner.bias


def test_a_later_batch_that_mixes_its_samples_is_refused():
    batches = [(torch.randn(size, 5), None) for size in (2, 4)]
    with pytest.raises(RuntimeError, match=r"for the 4 samples of batch 1 together .* inner.weight"):
        diagonal_fisher(Changing(together=True), batches)


def test_a_later_batch_with_other_operations_is_refused():
    network = Changing(together=False).double()
    inputs, targets = torch.randn(6, 5, dtype=torch.float64), torch.randint(3, (6,))
    with pytest.raises(RuntimeError, match="uses its parameters in other ways"):
        diagonal_fisher(network, [(inputs[:2], targets[:2]), (inputs[2:], targets[2:])], labels="empirical")


@pytest.mark.parametrize("parts", [1, 2, 3, 20])
def test_the_division_into_parts_changes_no_value(parts):
    layer, (inputs, targets), seen = nn.Linear(5, 3).double(), data(), []
    batches = in_batches(inputs.double(), targets, 8)
    assert_same(
        diagonal_fisher(layer, batches, parts=parts, progress=seen.append), diagonal_fisher(layer, batches)
    )
    assert max(seen) == -(-8 // parts)
    assert sum(seen) == 10


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian", "bernoulli"])
@pytest.mark.parametrize("processes", [2, 3])
def test_the_estimates_of_all_shards_have_the_mean_of_one_process(likelihood, processes):
    layer, inputs = nn.Linear(5, 3).double(), torch.randn(12, 5, dtype=torch.float64)
    whole = diagonal_fisher(layer, in_batches(inputs, inputs, 6), likelihood)
    shards = []
    for rank in range(processes):
        own = inputs[rank::processes]
        batches = in_batches(own, own, 6 // processes)
        shards.append(diagonal_fisher(layer, batches, likelihood, shard=(rank, processes)))
    assert_same({name: sum(shard[name] for shard in shards) / processes for name in whole}, whole)


def test_batches_may_have_sequences_of_different_lengths():
    network = FlatInside().double()
    parts = [(torch.randn(4, length, 4, dtype=torch.float64), torch.randint(3, (4,))) for length in (1, 3, 2)]
    expected = [slow_fisher(network, inputs, targets) for inputs, targets in parts]
    mean = {name: sum(part[name] for part in expected) / 3 for name in expected[0]}
    assert_same(diagonal_fisher(network, parts, labels="empirical"), mean)


class ByLength(nn.Module):
    """Uses one layer for short sequences and another for long ones."""

    def __init__(self):
        super().__init__()
        self.short, self.long = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return (self.short if x.shape[1] < 3 else self.long)(x).tanh().sum(1)


def test_a_layer_that_only_a_later_batch_uses_is_exact():
    network = ByLength().double()
    parts = [(torch.randn(4, length, 4, dtype=torch.float64), torch.randint(3, (4,))) for length in (2, 3, 2)]
    first, second, third = (slow_fisher(network, inputs, targets) for inputs, targets in parts)
    mean = {name: (first[name] + second[name] + third[name]) / 3 for name in first}
    assert_same(diagonal_fisher(network, parts, labels="empirical"), mean)


def test_a_module_without_a_backward_pass_is_refused():
    class Never(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

    module = nn.Sequential(nn.Linear(5, 3), Apply(Never.apply))
    with pytest.raises(RuntimeError, match=r"gradients of 0\.weight, 0\.bias cannot be computed"):
        diagonal_fisher(module, [data()])


def test_a_parameter_without_per_sample_gradients_is_refused():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            if len(grad) == 1:
                raise ArithmeticError("not for one sample")
            return grad

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.last = nn.Parameter(torch.ones(5)), nn.Linear(5, 3)

        def forward(self, x):
            return self.last(Once.apply(x.abs() ** self.scale))

    with pytest.raises(RuntimeError, match=r"gradients of scale cannot be computed: .*parameters="):
        diagonal_fisher(Module(), [data()])

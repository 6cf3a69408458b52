"""AdaLoRA's rank allocator: PEFT's masks over a whole schedule, the paper's formulas, resuming."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from decomp_kernels import adapt, methods
from decomp_kernels.methods.adalora import AdaLoRA, RankAllocator
from decomp_kernels.methods.base import Adapter

STEPS = 26
SCHEDULE = {"target_r": 2, "tinit": 4, "tfinal": 6, "deltaT": 3, "beta1": 0.8, "beta2": 0.7}
TRIPLET = ("down", "core", "up")


def model_with(method, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 12), nn.Linear(12, 5))
    return adapt(model, method, target_modules=["0", "1", "2"])


def adapters(model):
    return [layer.adapters["default"] for layer in model]


def take_step(model, step):
    """An optimizer step with gradients that depend on the step alone."""
    noise = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for adapter in adapters(model):
            for name in TRIPLET:
                p = getattr(adapter, name)
                p.grad = torch.randn(p.shape, generator=noise)
                p -= 0.1 * p.grad


def cores(model):
    return [adapter.core.detach().clone() for adapter in adapters(model)]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_masks_and_values_are_pefts_over_a_whole_schedule():
    import peft

    options = {"init_r": 6, "lora_alpha": 6, **SCHEDULE}
    ours = model_with(AdaLoRA(**options))
    plain = nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 12), nn.Linear(12, 5))
    config = peft.AdaLoraConfig(target_modules=["0", "1", "2"], total_step=STEPS, **options)
    theirs = peft.get_peft_model(plain, config)
    pairs = []
    for layer, adapter in zip(theirs.base_model.model, adapters(ours), strict=True):
        for name, mine in (("lora_A", "down"), ("lora_E", "core"), ("lora_B", "up")):
            pairs.append((getattr(layer, name)["default"], getattr(adapter, mine)))
    with torch.no_grad():
        for p, mine in pairs:
            p.copy_(mine.view_as(p))
    allocator = RankAllocator(AdaLoRA(**options), STEPS)

    masked_at = []
    for step in range(1, STEPS + 5):  # beyond the schedule's end the final mask holds
        take_step(ours, step)
        with torch.no_grad():
            for p, mine in pairs:
                p.grad = mine.grad.view_as(p)
                p -= 0.1 * p.grad
        theirs.base_model.update_and_allocate(step)
        allocator.step(ours, step)
        for p, mine in pairs:
            assert torch.equal(p.view_as(mine), mine), step
        pattern = theirs.base_model.peft_config["default"].rank_pattern
        if pattern is not None:
            assert list(pattern.values()) == [mask.tolist() for mask in allocator.masks.values()]
        if any((core == 0).any() for core in cores(ours)):
            masked_at.append(step)
    assert masked_at == [6, 9, 12, 15, 18, *range(20, STEPS + 5)]
    assert sum(allocator.ranks().values()) == 3 * 2
    assert len(set(allocator.ranks().values())) > 1  # the budget did move between layers


def test_scores_are_the_papers():
    """One layer, two steps, by the formulas written out."""
    model = nn.Sequential(nn.Linear(4, 3))
    method = AdaLoRA(r=5, target_r=2, beta1=0.8, beta2=0.6)
    adapter = adapt(model, method, target_modules=["0"])[0].adapters["default"]
    allocator = RankAllocator(method, 3)
    mean = {name: torch.zeros_like(getattr(adapter, name)) for name in TRIPLET}
    spread = {name: torch.zeros_like(getattr(adapter, name)) for name in TRIPLET}
    for step in (1, 2):
        for name in TRIPLET:
            p = getattr(adapter, name)
            with torch.no_grad():
                p.copy_(torch.randn(p.shape))
            p.grad = torch.randn(p.shape)
            importance = (p.detach() * p.grad).abs()
            mean[name] = 0.8 * mean[name] + 0.2 * importance
            spread[name] = 0.6 * spread[name] + 0.4 * (importance - mean[name]).abs()
        before = adapter.core.detach().clone()
        budget = allocator.step(model, step)
    assert budget == int((5 - 2) * (1 - 2 / 3) ** 3 + 2) == 2
    q = {name: mean[name] * spread[name] for name in TRIPLET}
    score = q["core"] + q["down"].mean(1) + q["up"].mean(0)
    kept = score >= score.sort(descending=True).values[budget - 1]
    assert torch.equal(adapter.core, before * kept)
    assert (before != 0).all()


def test_the_budget_is_the_cubic_schedule():
    allocator = RankAllocator(AdaLoRA(r=12, target_r=8, tinit=10, tfinal=20), 100)
    budgets = [allocator.budget(step, start=120, target=80) for step in range(1, 101)]
    assert budgets[:10] == [120] * 10
    assert budgets[10:80] == [int(40 * (1 - (t - 10) / 70) ** 3 + 80) for t in range(11, 81)]
    assert budgets[79:] == [80] * 21
    assert all(a >= b for a, b in pairwise(budgets))


@pytest.mark.parametrize("stop", [2, 8, 17, 23])
def test_a_resumed_run_continues(stop, tmp_path):
    """Before the ranks shrink, between two masks, and in the final phase; through a file."""
    method = AdaLoRA(init_r=6, **SCHEDULE)
    straight, allocator = model_with(method), RankAllocator(method, STEPS)
    for step in range(1, STEPS + 1):
        take_step(straight, step)
        allocator.step(straight, step)
        if step == stop:
            torch.save((straight.state_dict(), allocator.state_dict()), tmp_path / "state")
    resumed, again = model_with(method, seed=1), RankAllocator(method, STEPS)
    weights, state = torch.load(tmp_path / "state")
    resumed.load_state_dict(weights)
    again.load_state_dict(state)
    for step in range(stop + 1, STEPS + 1):
        take_step(resumed, step)
        again.step(resumed, step)
    assert same(cores(resumed), cores(straight))
    assert again.ranks() == allocator.ranks()
    if stop in (8, 17):  # the control: without the averages other ranks are kept
        forgetful, fresh = model_with(method, seed=1), RankAllocator(method, STEPS)
        forgetful.load_state_dict(weights)
        for step in range(stop + 1, STEPS + 1):
            take_step(forgetful, step)
            fresh.step(forgetful, step)
        assert not same(cores(forgetful), cores(straight))


def test_a_state_is_a_copy():
    method = AdaLoRA(init_r=6, **SCHEDULE)
    model, allocator = model_with(method), RankAllocator(method, STEPS)
    take_step(model, 1)
    allocator.step(model, 1)
    again = RankAllocator(method, STEPS)
    again.load_state_dict(allocator.state_dict())
    before = copy.deepcopy(again.state_dict())
    take_step(model, 2)
    allocator.step(model, 2)
    assert all(torch.equal(before[key], value) for key, value in again.state_dict().items())


def test_masked_ranks_are_trained_on_and_may_come_back_until_the_final_phase():
    method = AdaLoRA(init_r=6, **SCHEDULE)
    model, allocator = model_with(method), RankAllocator(method, STEPS)
    seen = []
    for step in range(1, STEPS + 1):
        take_step(model, step)
        allocator.step(model, step)
        if allocator.masks:
            seen.append(torch.cat(list(allocator.masks.values())))
    assert any((later & ~earlier).any() for earlier, later in pairwise(seen))
    assert all(torch.equal(mask, seen[-1]) for mask in seen[-7:])  # steps 20 to 26
    assert seen[-1].sum() == 6


def test_a_model_that_ends_its_schedule_without_a_final_phase_is_masked_at_the_last_step():
    method = AdaLoRA(init_r=6, target_r=2)
    model, allocator = model_with(method), RankAllocator(method, 10)
    for step in range(1, 11):
        take_step(model, step)
        allocator.step(model, step)
    assert sum(int((core != 0).sum()) for core in cores(model)) == 6


def test_only_adapters_in_training_count_wherever_they_are():
    method = AdaLoRA(init_r=6, **SCHEDULE)
    model = model_with(method)
    adapt(model, method, target_modules=["0", "1", "2"], adapter_name="second")
    for layer in model:
        layer.set_adapter("default")
    take_step(model, 1)
    allocator = RankAllocator(method, STEPS)
    assert allocator.step(model, 1) == 18
    by_layer = RankAllocator(method, STEPS)
    assert by_layer.step(list(model), 1) == 18
    assert {key.partition("/")[0] for key in allocator.state_dict()} == {"final", "mean", "spread"}
    assert len(allocator.mean) == len(by_layer.mean) == 9
    assert all(".second." not in f".{key}." for key in allocator.mean)


def test_ranks_may_differ_between_layers():
    method = AdaLoRA(init_r=6, **SCHEDULE)
    model = nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 12), nn.Linear(12, 5))
    adapt(model, method, target_modules=["0", "1", "2"], rank_pattern={"1": 9})
    allocator = RankAllocator(method, STEPS)
    take_step(model, 1)
    assert allocator.step(model, 1) == 6 + 9 + 6
    for step in range(2, STEPS + 1):
        take_step(model, step)
        allocator.step(model, step)
    assert sum(allocator.ranks().values()) == 6


def test_half_precision_adapters_keep_float32_statistics():
    method = AdaLoRA(init_r=6, **SCHEDULE)
    model, allocator = model_with(method).to(torch.bfloat16), RankAllocator(method, STEPS)
    for adapter in adapters(model):
        for name in TRIPLET:
            p = getattr(adapter, name)
            p.data.normal_()
            p.grad = torch.randn_like(p)
    allocator.step(model, 1)
    p = adapters(model)[0].down
    assert allocator.mean["0.adapters.default.down"].dtype == torch.float32
    expected = (1 - 0.8) * (p.detach().double() * p.grad.double()).abs()
    torch.testing.assert_close(allocator.mean["0.adapters.default.down"].double(), expected)


def test_says_what_is_wrong():
    method = AdaLoRA(init_r=6, **SCHEDULE)
    with pytest.raises(ValueError, match=r"total_step must be above tinit \+ tfinal = 10"):
        RankAllocator(method, 10)
    with pytest.raises(ValueError, match="target_r must be below r = 8, .* got 8"):
        RankAllocator(AdaLoRA(r=8), 10)
    with pytest.raises(TypeError, match="method must be an AdaLoRA instance"):
        RankAllocator(methods()["lora"](), 10)
    model, allocator = model_with(method), RankAllocator(method, STEPS)
    with pytest.raises(ValueError, match=r"before optimizer\.zero_grad"):
        allocator.step(model, 1)
    with pytest.raises(ValueError, match="no AdaLoRA adapter in training"):
        allocator.step(nn.Linear(2, 2), 1)
    with pytest.raises(ValueError, match="has seen no importance of"):
        allocator.step(model, STEPS)
    take_step(model, 1)
    allocator.step(model, 1)
    other = adapt(nn.Sequential(nn.Linear(10, 8)), AdaLoRA(r=9), target_modules=["0"])
    take_step(other, 2)
    with pytest.raises(ValueError, match=r"the\s+model has \(9, 10\): resume with the model"):
        allocator.step(other, 2)
    no = torch.tensor(False)
    for state in ({"final": no, "x": torch.ones(1)}, {"mean/0.core": torch.ones(6)}):
        before = allocator.state_dict()
        with pytest.raises(ValueError, match="state of a RankAllocator|a RankAllocator's state"):
            allocator.load_state_dict(state)
        assert allocator.state_dict().keys() == before.keys()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"target_r": 0}, "target_r must be at least 1"),
        ({"tinit": -1}, "tinit must be at least 0"),
        ({"deltaT": 0}, "deltaT must be at least 1"),
        ({"beta1": 1.0}, "beta1 must be between 0 and 1"),
        ({"beta2": 0.0}, "beta2 must be between 0 and 1"),
        ({"orth_reg_weight": -0.1}, "orth_reg_weight must be at least 0"),
        ({"use_rslora": True}, "use_rslora must be False"),
    ],
)
def test_options_that_cannot_be_right(options, says):
    with pytest.raises(ValueError, match=says):
        AdaLoRA(**options)


def test_pefts_spellings():
    method = AdaLoRA(init_r=6, lora_alpha=3, target_r=4)
    assert (method.r, method.alpha) == (6, 3)
    assert AdaLoRA().r == 12
    with pytest.raises(TypeError, match="init_r is r: give one of them, not both"):
        AdaLoRA(init_r=6, r=6)
    with pytest.raises(TypeError, match="has no option 'init_r'"):
        methods()["lora"](init_r=6)
    assert isinstance(adapters(model_with(method))[0], Adapter)

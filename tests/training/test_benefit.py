from __future__ import annotations

import torch
from training_parts import model_of

from routed_peft import RoutedConfig, ablated
from routed_peft.losses import token_losses
from routed_peft.training.benefit import benefit_threshold, find_region, region_benefit, row_means, subset_benefits


def test_row_means_are_over_the_tokens_that_have_a_loss():
    logits = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[1, 2, 3, 4], [5, 6, -100, -100]])
    means = row_means(token_losses(logits, targets), targets)
    log = logits.log_softmax(-1)
    assert torch.allclose(means[1], -log[1, 0, 6])
    assert torch.allclose(means[0], -(log[0, 0, 2] + log[0, 1, 3] + log[0, 2, 4]) / 3)


def test_the_balanced_threshold_lies_as_many_deviations_from_either_side():
    generator = torch.Generator().manual_seed(0)
    forget = 1 + 0.5 * torch.randn(10_000, generator=generator)
    retain = -0.5 + 0.1 * torch.randn(10_000, generator=generator)
    t = benefit_threshold(forget, retain)
    missed, wrong = (forget <= t).double().mean(), (retain > t).double().mean()
    assert (
        abs(missed - wrong) < 2e-3
        and missed < 0.01 < (forget <= benefit_threshold(forget, retain, "midpoint")).double().mean()
    )
    same = torch.ones(3)
    assert benefit_threshold(same, -same) == 0.0, "the midpoint where nothing varies"
    assert benefit_threshold(same[:1], -same[:1]) == 0.0
    for kind in ("balanced", "median"):
        assert benefit_threshold(torch.tensor([2.0, 4.0, 6.0]), -same, kind) == 1.5, "nor where one side does not"


def test_wrong_labels_hardly_move_the_threshold_of_medians():
    generator = torch.Generator().manual_seed(0)
    forget, retain = (torch.randn(10_000, generator=generator) * wide + at for wide, at in ((0.5, 1.0), (0.1, -0.5)))
    clean = [benefit_threshold(forget, retain, kind) for kind in ("balanced", "median")]
    assert abs(clean[0] - clean[1]) < 0.02, "the same where both sides are normal"
    swapped = torch.cat([forget[2000:], retain[:2000]]), torch.cat([retain[2000:], forget[:2000]])
    balanced, median = (benefit_threshold(*swapped, kind) for kind in ("balanced", "median"))
    errors = [(forget <= t).double().mean() + (retain > t).double().mean() for t in (balanced, median)]
    assert errors[1] < 0.02 < 4 * errors[1] < errors[0]


def batch_of(*rows: list[int]) -> dict[str, torch.Tensor]:
    ids = torch.tensor(rows)
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def test_rows_are_scored_without_dropout_and_modes_come_back():
    model = model_of(attention_dropout=0.5).train()
    model.base_model.model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    batch = batch_of([3, 9, 27, 81, 243], [5, 10, 20, 40, 80])
    state = torch.get_rng_state()
    found = region_benefit(model, batch, ["forget"])
    assert torch.equal(torch.get_rng_state(), state), "nothing was drawn"
    assert [module.training for module in model.modules()] == modes and any(modes) and not all(modes)
    model.eval()
    with torch.no_grad():
        on = token_losses(model(batch["input_ids"]).logits, batch["labels"])
        with ablated(model, "forget"):
            off = token_losses(model(batch["input_ids"]).logits, batch["labels"])
    torch.testing.assert_close(found, off - on)
    assert found.abs().max() > 1e-3, "the region does something"


def test_each_regions_benefit_is_its_own_one_row_at_a_time():
    names = ["bio", "cyber", "chem"]
    config = {"size": 3, "r": 2, "init": "model", "task_type": "CAUSAL_LM"}
    model = model_of(adapters={name: RoutedConfig(**config) for name in names}).eval()
    for name, parameter in model.named_parameters():
        if ".routed_" in name or ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.base_model.set_adapter(names)
    batch = batch_of([3, 9, 27, 81, 243], [5, 10, 20, 40, 80])
    found = subset_benefits(model, batch, subsets=[["bio"], ["cyber"], ["bio", "chem"]], regions=names)
    for i in range(2):
        for k, on in enumerate((["bio"], ["cyber"], ["bio", "chem"])):
            one = batch["input_ids"][i : i + 1]
            with torch.no_grad():
                model.base_model.set_adapter(on)
                with_it = model(one).logits.log_softmax(-1)[0]
                model.base_model.disable_adapter_layers()
                without = model(one).logits.log_softmax(-1)[0]
                model.base_model.enable_adapter_layers()
            expected = torch.stack([(with_it - without)[t, one[0, t + 1]] for t in range(4)])
            torch.testing.assert_close(found[i, :, k], expected, rtol=1e-4, atol=1e-5)
    assert (found[..., 0] - found[..., 1]).abs().max() > 1e-3


def test_a_row_is_of_the_region_whose_benefit_is_the_farthest_above_its_threshold():
    benefits = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    thresholds = [-0.5, 0.25, 1.0]
    expected = []
    for row in benefits.tolist():
        able = [(benefit - thresholds[i], i) for i, benefit in enumerate(row) if benefit > thresholds[i]]
        expected.append(max(able)[1] if able else 3)
    assert find_region(benefits, thresholds).tolist() == expected and set(expected) == {0, 1, 2, 3}
    lost = torch.tensor([[float("nan"), 2.0, 0.0], [float("nan")] * 3])
    assert find_region(lost, thresholds).tolist() == [1, 3], "a loss that is not finite shows nothing"

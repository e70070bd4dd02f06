from __future__ import annotations

import pytest
import torch
from families import small_model
from hypothesis import given, settings
from hypothesis import strategies as st

from memoir.memory import (
    ResidualMemory,
    pool_prompt,
    random_mask,
    recursive_least_squares,
    tophash,
)
from memoir.sites import Span


def test_tophash_is_the_permuted_set_of_the_largest_entries():
    generator = torch.Generator().manual_seed(1)
    feature = torch.randn(5, 40, generator=generator)
    permutation = torch.randperm(40, generator=generator)
    mask = tophash(feature, 7, permutation)
    for row, found in zip(feature, mask, strict=True):
        largest = sorted(range(40), key=lambda j: -abs(float(row[j])))[:7]
        assert set(found.nonzero()[:, 0].tolist()) == {int(permutation[j]) for j in largest}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(0, 2**31 - 1), st.sampled_from([1e-40, 1e-3, 1.0, 1e30]), st.data())
def test_of_equal_entries_the_first_are_taken(width, seed, scale, data):
    """Few values, many of them equal: whatever the k-th largest is, k columns are chosen, and by the same rule."""
    k = data.draw(st.integers(1, width), label="k")
    generator = torch.Generator().manual_seed(seed)
    feature = torch.randint(-4, 5, (2, width), generator=generator) * scale
    for row, found in zip(feature, tophash(feature, k), strict=True):
        ordered = sorted(range(width), key=lambda j: (-abs(float(row[j])), j))
        assert found.nonzero()[:, 0].tolist() == sorted(ordered[:k])


@pytest.mark.parametrize("k", [0, 41])
def test_tophash_refuses_impossible_widths(k):
    with pytest.raises(ValueError, match=f"k = {k} columns, expected 1 to 40"):
        tophash(torch.randn(1, 40), k)


def test_pooling_sees_the_prompt_only():
    a = torch.randn(2, 6, 8)
    prompt = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]], dtype=torch.bool)
    background = torch.randn(8)
    expected = torch.stack([a[0, 2:5].mean(0), a[1, 1:3].mean(0)])
    torch.testing.assert_close(pool_prompt(a, prompt, "mean"), expected)
    torch.testing.assert_close(pool_prompt(a, prompt, "mean_centred", background), expected - background)
    torch.testing.assert_close(pool_prompt(a, prompt, "last"), torch.stack([a[0, 4], a[1, 2]]))
    noisy = torch.where(prompt[..., None], a, torch.full_like(a, 1e6))
    for feature in ("mean", "last"):
        torch.testing.assert_close(pool_prompt(noisy, prompt, feature), pool_prompt(a, prompt, feature))
    with pytest.raises(ValueError, match="needs the mean feature of background prompts"):
        pool_prompt(a, prompt, "mean_centred")
    with pytest.raises(ValueError, match="'median' is unknown; expected one of mean, mean_centred, last"):
        pool_prompt(a, prompt, "median")


def test_random_masks_have_k_columns_and_know_their_prompt():
    feature = torch.randn(3, 50)
    mask = random_mask(feature, 9)
    assert mask.sum(1).tolist() == [9, 9, 9]
    assert torch.equal(mask, random_mask(feature + 1e-6, 9)) and not torch.equal(mask[0], mask[1])


def test_residual_memory_against_its_equation():
    site = small_model("llama").site(1)
    memory = ResidualMemory(site, k=16, tau=0.75, feature="last", permutation=torch.randperm(64), device="cpu")
    memory.weight.normal_()
    a, y = torch.randn(3, 5, 64), torch.randn(3, 5, 32)
    prompt = torch.ones(3, 5, dtype=torch.bool)
    assert memory(a, y, Span(prompt)) is y  # no edits: the identity
    masks = memory.fingerprint(a, prompt)
    near = masks[1].clone()
    near[masks[1].nonzero()[:4, 0]] = False
    near[(~masks[1]).nonzero()[:4, 0]] = True  # shares 12 of 16 columns: R = 0.75, just enough
    memory.bank.add(["exact", "near"], torch.stack([masks[0], near]))
    out = memory(a, y, Span(prompt))
    torch.testing.assert_close(out[0], y[0] + (a[0] * masks[0]) @ memory.weight.T)
    torch.testing.assert_close(out[1], y[1] + (a[1] * near) @ memory.weight.T)
    overlap = max(int((masks[2] & m).sum()) for m in (masks[0], near)) / 16
    assert overlap < 0.75 and torch.equal(out[2], y[2])
    memory.tau = 0.76
    assert torch.equal(memory(a, y, Span(prompt))[1], y[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fingerprint_is_the_hash_of_the_pooled_prompt(dtype):
    memory = ResidualMemory(small_model("llama").site(1), k=9, tau=0.5, feature="last", permutation=None, device="cpu")
    a = torch.randn(4, 6, 64, dtype=dtype).transpose(0, 1).contiguous().transpose(0, 1)  # not in one piece
    ends = torch.tensor([5, 0, 3, 4])
    prompt = torch.arange(6) <= ends[:, None]
    for memory.permutation in (None, torch.randperm(64), torch.randperm(64)):
        expected = tophash(torch.stack([a[i, end] for i, end in enumerate(ends)]), 9, memory.permutation)
        assert torch.equal(memory.fingerprint(a, prompt), expected)


@pytest.mark.parametrize("pages", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_question_reads_the_edit_that_shares_most_of_its_mask(dtype, pages):
    site, permutation = small_model("llama").site(1), torch.randperm(64)
    memory = ResidualMemory(site, k=9, tau=0.5, feature="last", permutation=permutation, device="cpu")
    memory.pages += [torch.zeros(64, 32).T for _ in range(pages - 1)]
    for page in memory.pages:
        page.normal_()
    stored = tophash(torch.randn(40, 64), 9)
    memory.bank.add([str(i) for i in range(40)], stored)
    memory.page_of = {str(i): i % pages for i in range(40)}
    a, prompt = torch.randn(30, 6, 64, dtype=dtype), torch.arange(6) <= torch.randint(6, (30, 1))
    y = torch.randn(30, 6, 32, dtype=dtype)
    masks = memory.fingerprint(a, prompt)
    memory.bank.add(["40"], masks[3:4])
    stored = torch.cat([stored, masks[3:4]])
    shared = (masks[:, None] & stored).sum(-1)
    nearest = 40 - shared.flip(1).argmax(1)  # of equals the newest
    span, y_before = Span(prompt), y.clone()
    found, route = memory(a, y, span), span.memo[memory]
    assert route.rows.tolist() == nearest.tolist()
    assert route.overlaps.tolist() == pytest.approx((shared.amax(1) / 9).tolist())
    fired = shared.amax(1) / 9 >= 0.5
    assert 0 < fired.sum() < 30 and route.fired.tolist() == fired.tolist()
    for page in range(pages):
        assert ((route.pages == page) == (fired & (nearest % pages == page)).numpy()).all()
    read = torch.einsum(
        "btD,bdD->btd", a.float() * stored[nearest][:, None], torch.stack(memory.pages)[nearest % pages]
    )
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert torch.equal(y, y_before) and torch.equal(found[~fired], y[~fired])
    torch.testing.assert_close(found.float(), y.float() + read * fired[:, None, None], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("k", [0, 65])
def test_a_memory_has_no_more_columns_to_choose_than_its_projection(k):
    site = small_model("llama").site(1)
    with pytest.raises(ValueError, match=f"k = {k}, expected 1 to the 64 columns of .*down_proj"):
        ResidualMemory(site, k=k, tau=0.5, feature="last", permutation=None, device="cpu")


@pytest.mark.parametrize("k", [1, 3, 4, 18, 60])
@pytest.mark.parametrize("tokens", [1, 5, 6])
def test_columns_are_read_as_the_masked_product_and_with_its_gradient(k, tokens):
    site = small_model("llama").site(1)
    memory = ResidualMemory(site, k=k, tau=0.5, feature="last", permutation=None, device="cpu")
    memory.weight.normal_()
    a, y, prompt = torch.randn(3, tokens, 64), torch.randn(3, tokens, 32), torch.ones(3, tokens, dtype=torch.bool)
    masks = memory.fingerprint(a, prompt)
    memory.bank.add(["0", "1", "2"], masks)
    asked = a.clone().requires_grad_()
    expected = y + (a * masks[:, None]) @ memory.weight.T
    torch.testing.assert_close(memory(a, y, Span(prompt)), expected, rtol=1e-5, atol=1e-5)
    found = memory(asked, y, Span(prompt))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    slope = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(found, asked, slope)
    torch.testing.assert_close(gradient, (slope @ memory.weight) * masks[:, None], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("readers", ["one of two", "all"])
def test_what_is_read_is_added_in_float32_and_rounded_once(readers):
    """y + W_m (M ⊙ a) keeps y's type and is as near to the exact sum as one rounding allows; y itself is unchanged."""
    dtype, site = torch.bfloat16, small_model("llama").site(1)
    memory = ResidualMemory(site, k=18, tau=1.0, feature="last", permutation=None, device="cpu")
    memory.weight.normal_()
    a, y = torch.randn(2, 5, 64).to(dtype), torch.randn(2, 5, 32).to(dtype)
    prompt, before = torch.ones(2, 5, dtype=torch.bool), y.clone()
    masks = memory.fingerprint(a, prompt)
    memory.bank.add(["0", "1"][: 1 + (readers == "all")], masks[: 1 + (readers == "all")])
    found = memory(a, y, Span(prompt))
    exact = y.double() + (a.double() * masks[:, None]) @ memory.weight.T.double()
    assert found.dtype == dtype and torch.equal(y, before)
    reading = slice(None) if readers == "all" else slice(1)
    assert readers == "all" or torch.equal(found[1], y[1])
    half_a_step = torch.finfo(dtype).eps * exact[reading].abs() / 2
    assert ((found[reading].double() - exact[reading]).abs() <= half_a_step + 1e-5).all()


def ridge(keys, values, penalty):
    """The dense solution V Kᵀ (K Kᵀ + λI)⁻¹ in float64, K (D × n), V (d × n)."""
    return values @ keys.T @ torch.linalg.inv(keys @ keys.T + penalty * torch.eye(len(keys), dtype=torch.float64))


@pytest.mark.parametrize("penalty", [1.0, 0.01])
def test_recursive_least_squares_is_the_ridge_solution_over_all_keys(penalty):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    weight, basis = torch.zeros(5, 30, dtype=torch.float64), None
    chunks = []
    for size in (1, 4, 3, 20, 12, 9, 1):  # in the end many more keys than columns
        keys, values = draw(30, size), draw(5, size)
        G, basis = recursive_least_squares(keys.T, penalty, basis)
        weight += (values - weight @ keys) @ G
        chunks.append((keys, values))
        K, V = (torch.cat(parts, dim=1) for parts in zip(*chunks, strict=True))
        torch.testing.assert_close(weight, ridge(K, V, penalty), rtol=1e-8, atol=1e-8)
    assert len(basis) < K.shape[1]

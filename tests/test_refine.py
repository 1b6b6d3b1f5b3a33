"Refinement against exact non-negative least squares, and every test-time rule against its obvious dense form."
import math
from dataclasses import replace
from itertools import combinations

import pytest
import torch

from sae_nb.core import UserError, generator
from sae_nb.refine import Progressive, Swap, Threshold, TopK, affine, fit_threshold, fit_values, kkt, progressive, refine, shrinkage
from sae_nb.sae import SAE, Channels, Code, Dictionary, SAEConfig, init_, nmse


def draw(*shape, key="rows"): return torch.randn(*shape, dtype=torch.float64, generator=generator("test refine", key))


def random_sae(n=64, d=12, k=6, seed=0, **kw):
    "An SAE in float64 with random weights of every kind."
    sae = SAE(SAEConfig(d=d, n=n, k=k, **{"normalise": "none", **kw})).double().requires_grad_(False)
    for name, p in sae.named_parameters(): p.copy_(draw(*p.shape, key=f"{name}{seed}"))
    return sae


class Dialect:
    "An SAE as other libraries would show it, which tells no pre-activations."
    def __init__(self, sae, encode, decode): self.sae, self.encode, self.decode, self.num_latents = sae, encode, decode, sae.cfg.n


class Pair:
    def __init__(self, code): self.top_acts, self.top_indices = code.values, code.indices


def dialects(sae):
    "The same SAE with a dense code, a dense code with an extra, and values with their places."
    back = lambda z: z @ sae.W_dec + sae.b_dec
    return {"dense": Dialect(sae, lambda x: sae.encode(x).dense(), back),
            "extra": Dialect(sae, lambda x: (sae.encode(x).dense(), {"rows": len(x)}), lambda z, info: back(z)),
            "pairs": Dialect(sae, lambda x: Pair(sae.encode(x)), sae.decode_normed)}


class Fixed:
    "A dictionary of rows that are their own dense code, with a chosen decoder."
    def __init__(self, decode): self.decode = decode
    def encode(self, rows): return rows


class Silent(Fixed):
    "A dictionary whose latents are never active."
    def __init__(self, n=8): self.n = n
    def encode(self, rows): return rows.new_zeros(len(rows), self.n)
    def decode(self, z): return z @ z.new_ones(self.n, 12)


def nnls(D, target, signed=()):
    "Least squares with values ≥ 0, by solving every active subset; values in `signed` may be negative."
    best, least = torch.zeros(len(D), dtype=D.dtype), target.square().sum()
    for size in range(1, len(D) + 1):
        for on in map(list, combinations(range(len(D)), size)):
            z = torch.linalg.lstsq(D[on].T, target[:, None]).solution[:, 0]
            left = (target - z @ D[on]).square().sum()
            if left < least and all(v >= 0 or j in signed for j, v in zip(on, z)): best, least = torch.zeros_like(best).index_put((torch.tensor(on),), z), left
    return best


# --- refinement ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("k,d", [(1, 3), (4, 6), (6, 9)])
def test_fit_equals_every_subset_tried(k, d):
    "Coordinate descent ends where non-negative least squares by brute force ends, bounds binding or not."
    D, x = draw(30, k, d, key="D") * draw(30, k, 1, key="length").exp(), draw(30, d)
    got, want = fit_values(D, x, torch.ones(30, k), steps=2000, tol=1e-13), torch.stack([nnls(*r) for r in zip(D, x)])
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-8)
    assert (want == 0).any() and kkt(D, x, got, torch.ones(30, k)) < 1e-10


def test_zeros_stay_zero_and_negative_values_are_free():
    "A value that starts at zero never moves, and one that starts negative may end on either side."
    D, x, start = draw(40, 5, 8, key="D"), draw(40, 8), torch.tensor([1., 0., -1., 1., -1.]).expand(40, 5)
    got = fit_values(D, x, start, steps=2000, tol=1e-13)
    on = [0, 2, 3, 4]
    want = torch.stack([nnls(d[on], r, signed=(1, 3)) for d, r in zip(D, x)])
    assert (got[:, 1] == 0).all() and (got[:, [0, 3]] >= 0).all() and (got[:, 2] < 0).any() and (got[:, 2] > 0).any()
    torch.testing.assert_close(got[:, on], want, rtol=1e-7, atol=1e-8)


def test_dependent_directions_stay_near_the_start():
    "Of many equally good answers the one found keeps values that fit already, and nothing becomes NaN."
    D = draw(7, 1, 5, key="D").expand(7, 3, 5)
    torch.testing.assert_close(fit_values(D, 3 * D[:, 0], torch.ones(7, 3)), torch.ones(7, 3, dtype=torch.float64))
    assert fit_values(torch.zeros(2, 3, 5, dtype=torch.float64), draw(2, 5), torch.ones(2, 3)).isfinite().all()
    assert fit_values(draw(2, 3, 5, key="D"), torch.zeros(2, 5, dtype=torch.float64), torch.ones(2, 3)).abs().max() < 1e-3


@pytest.mark.parametrize("normalise", ["none", "unit_norm", "layer_norm"])
def test_affine_finds_the_decoder(normalise):
    "Directions and base are those of the weights, in the row's own units."
    sae, x = random_sae(normalise=normalise), 5 + 3 * draw(20, 12)
    code = sae.encode(x)
    scale = 1. if code.normed.scale is None else code.normed.scale
    base, D = affine(Dictionary(sae, x), code).tensor_split([1], 1)
    torch.testing.assert_close(D, sae.W_dec[code.indices] * (scale if normalise == "none" else scale[:, None]))
    torch.testing.assert_close(base[:, 0], code.normed.restore(sae.b_dec.expand(20, 12)))


@pytest.mark.parametrize("normalise", ["none", "layer_norm"])
def test_refined_rows_are_never_worse_and_at_the_minimum(normalise):
    "Each row's error falls or stays, equals the decoded one, and is that of brute force."
    sae, x = random_sae(normalise=normalise), draw(50, 12)
    r = refine(sae, x, steps=2000)
    torch.testing.assert_close(r.after, (x - sae.decode(r.code)).square().sum(-1))
    torch.testing.assert_close(r.before, (x - sae(x)).square().sum(-1))
    assert (r.after <= r.before).all() and (r.code.values >= 0).all() and r.kkt < 1e-6 and torch.equal(r.code.indices, sae.encode(x).indices)
    base, D = affine(Dictionary(sae, x), sae.encode(x)).tensor_split([1], 1)
    want = torch.stack([nnls(*p) for p in zip(D, x - base[:, 0])])[:, :, None]
    torch.testing.assert_close(r.after, (x - base[:, 0] - (want * D).sum(1)).square().sum(-1), rtol=1e-4, atol=1e-9)
    own = (want[:, :, 0] * r.original).sum() / r.original.square().sum() - 1
    assert abs(r.shrinkage - own) < 1e-3 and abs(r.table().rows[0]["nmse after"] - nmse(x, sae.decode(r.code))) < 1e-9


@pytest.mark.parametrize("factor", [0.5, 0.8, 1., 2.])
def test_a_known_factor_is_found(factor):
    "Values scaled by a factor must change by its inverse, whatever the dialect."
    W = draw(6, 12, key="W")
    code = draw(300, 6, key="code").abs() * (draw(300, 6, key="on") > 0)
    rows = code @ W

    class Known:
        def encode(self, x): return factor * code[torch.cdist(x, rows).argmin(1)]
        def decode(self, z): return z @ W

    assert abs(shrinkage(Known(), rows).value - (1 / factor - 1)) < 1e-4
    torch.testing.assert_close(refine(Known(), rows).code.dense(), code, rtol=0, atol=1e-5)


def test_portions_and_order_do_not_matter():
    "Refining rows together, one by one, or backwards gives the same values."
    sae, x = random_sae(n=2**13, k=8), draw(600, 12)   # 2²² / n = 512 rows a portion
    whole = refine(sae, x)
    for part in (slice(0, 1), slice(500, 530)): torch.testing.assert_close(refine(sae, x[part]).code.dense(), whole.code.dense()[part], rtol=0, atol=1e-6)
    torch.testing.assert_close(refine(sae, x.flip(0)).code.dense().flip(0), whole.code.dense(), rtol=0, atol=1e-6)
    assert abs(shrinkage(sae, x).value - whole.shrinkage) < 1e-6


@pytest.mark.parametrize("name", ["dense", "extra", "pairs"])
def test_every_dialect_gives_the_same(name):
    "An SAE told in another library's words is refined, cut and thresholded as itself."
    sae, x = random_sae(), draw(200, 12)
    told = dialects(sae)[name]
    torch.testing.assert_close(refine(told, x).code.dense(), refine(sae, x).code.dense(), rtol=0, atol=1e-6)
    assert abs(shrinkage(told, x).value - shrinkage(sae, x).value) < 1e-6
    torch.testing.assert_close(progressive(told, x, [1, 3, 6]).error, progressive(sae, x, [1, 3, 6]).error)
    torch.testing.assert_close(TopK(told, 3).encode(x).dense(), TopK(sae, 3).encode(x).dense())
    torch.testing.assert_close(TopK(told, 20).encode(x).dense(), sae.encode(x).dense())
    theta = sae.encode(x).values.median().item()
    torch.testing.assert_close(Threshold(told, theta).encode(x).dense(), sae.encode(x).dense() * (sae.encode(x).dense() > theta))
    assert torch.equal(TopK(Dictionary(told, x), 20).encode(x).dense(), TopK(told, 20).encode(x).dense())


def test_half_precision_and_gradients_are_no_obstacle():
    "A dictionary in bfloat16 and one whose weights want gradients are refined as well."
    sae, x = random_sae().float().bfloat16(), draw(60, 12).float()
    r = refine(sae, x)
    assert r.code.values.dtype == torch.bfloat16 and (r.after <= r.before).all() and r.after.sum() < .95 * r.before.sum()
    sae = random_sae().requires_grad_()
    assert not refine(sae, draw(60, 12)).after.requires_grad and not TopK(sae, 3).encode(draw(60, 12)).values.requires_grad


def test_a_decoder_that_is_not_affine_is_refused():
    "Values that do not add up cannot be refined one by one, and that is said."
    with pytest.raises(UserError, match="sum of values"): refine(Fixed(lambda z: z.abs().sqrt()), draw(20, 12))
    assert refine(Fixed(lambda z: 2 * z + 1), -draw(20, 12).abs()).after.max() < 1e-9


# --- swaps --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("normalise", ["none", "layer_norm"])
def test_topk_equals_an_sae_with_that_k(relu, normalise):
    "The swap with any k is the SAE with that k in its configuration; with its own it is the SAE to the bit."
    sae, x = random_sae(relu=relu, normalise=normalise), draw(300, 12)
    for k in (1, 3, 6, 20, 64):
        other, swap = SAE(replace(sae.cfg, k=k)).double().requires_grad_(False), TopK(sae, k)
        other.load_state_dict(sae.state_dict())
        assert torch.equal(swap.encode(x).dense(), other.encode(x).dense()) and torch.equal(swap.decode(swap.encode(x)), other(x))
    assert torch.equal(TopK(sae, 6).encode(x).indices, sae.encode(x).indices)


@pytest.mark.parametrize("n", [60, 2**13])
def test_threshold_equals_the_dense_form(n):
    "Pre-activations above θ stay, all others are zero; no place is named twice, however rows are portioned."
    sae, x = random_sae(n=n), draw(700, 12)
    x[:512] *= .3   # the first portion has fewer active latents than the second
    pre = sae.pre(x)
    for theta in (0., 2., pre.max().item() + 1):
        swap = Threshold(sae, theta)
        code = swap.encode(x)
        torch.testing.assert_close(code.dense(), pre * (pre > theta), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(swap.decode(code), (pre * (pre > theta)) @ sae.W_dec + sae.b_dec)
        assert (code.indices.sort(1).values.diff(dim=1) > 0).all()


@pytest.mark.parametrize("l0", [0.5, 3, 6.25, 20])
def test_fitted_threshold_has_the_wanted_l0(l0):
    "On the rows it was fitted on, the mean L0 is the target, and it is the smallest such threshold."
    sae, x = random_sae(n=2**13 if l0 == 3 else 64), draw(1_000, 12)
    theta = fit_threshold(sae, x, l0)
    sizes = sae.pre(x).flatten().sort(descending=True).values
    assert abs((Threshold(sae, theta).encode(x).values > 0).sum().item() / 1_000 - l0) < .01 * l0
    assert abs(theta - sizes[round(l0 * 1_000)].item()) < 1e-12


def test_signed_codes_go_by_magnitude():
    "Where no pre-activations are told, the largest magnitudes are kept, with their signs."
    x = draw(30, 12)
    want = torch.where(x.abs() >= x.abs().topk(4).values[:, -1:], x, 0.)
    torch.testing.assert_close(TopK(Channels(), 4).encode(x).dense(), want)
    torch.testing.assert_close(Threshold(Channels(), .7).encode(x).dense(), x * (x.abs() > .7))
    assert abs(shrinkage(Channels(), x).value) < 1e-6


def test_swaps_can_be_stacked():
    "A swapped dictionary is a dictionary: swaps of swaps, and their measures, work."
    sae, x = random_sae(), draw(100, 12)
    twice = TopK(TopK(sae, 20), 4)
    torch.testing.assert_close(twice.encode(x).dense(), TopK(sae, 4).encode(x).dense())
    assert (refine(twice, x).code.values != 0).sum(1).max() <= 4 and isinstance(Dictionary(twice, x).encode(x), Code)
    assert not Swap(Dictionary(Channels(), x)).tells and Swap(Dictionary(sae, x)).tells


# --- progressive --------------------------------------------------------------------------------------

def test_the_curve_is_that_of_the_swaps():
    "Each point is the error of `TopK` with that k′, below the SAE's k and above it."
    sae, x, ks = random_sae(), draw(300, 12), [1, 2, 5, 6, 9, 64]
    p = progressive(sae, x, reversed(ks), unit=50)
    assert p.ks == ks and p.l0 == (sae.encode(x).values > 0).sum().item() / 300 and len(p.own) == 6
    for k, e in zip(ks, p.nmse):
        swap = TopK(sae, k)
        assert abs(e.value - nmse(x, swap.decode(swap.encode(x)))) < 1e-9 and e.low <= e.value <= e.high
    assert abs(p.own.sum() - (x - sae(x)).square().sum()) < 1e-6


def test_the_curve_does_not_depend_on_batches():
    "More rows than are taken at once give the sums of both halves, in either order."
    sae, x = random_sae(), draw(4096, 12)
    whole, halves = progressive(sae, x, [1, 4], unit=256), [progressive(sae, h, [1, 4], unit=256) for h in x.split(2048)]
    torch.testing.assert_close(whole.error, torch.cat([h.error for h in halves]))
    torch.testing.assert_close(progressive(sae, x.flip(0), [1, 4], unit=256).error.flip(0), whole.error)


def test_one_number_in_closed_form():
    "The mean explained variance on a logarithmic scale, from a curve written by hand."
    error = torch.tensor([[.9, .6, .1]], dtype=torch.float64).repeat(4, 1)
    p = Progressive([1, 2, 16], error, torch.full((4,), .2, dtype=torch.float64), torch.ones(4).double(), l0=8.)
    want = ((.1 + .4) / 2 * 1 + (.4 + .8) / 2 * 2) / 3   # octaves 1–2 and 2–8; 16 is beyond the code's own
    assert abs(p.estimate().value - want) < 1e-12 and p.estimate(other=p).nulls == {"other": p.estimate().value}
    assert [round(e.value, 9) for e in p.nmse] == [.9, .6, .1]


def test_any_order_is_worse_and_ends_at_the_same_code():
    "Shuffled, the first latents carry less; with all of them the code is the same."
    sae = init_(SAE(SAEConfig(d=12, n=64, k=6, normalise="none")).double(), draw(500, 12)).requires_grad_(False)
    x, ks = draw(500, 12, key="held out"), [1, 2, 6]
    best, any_order = progressive(sae, x, ks), progressive(sae, x, ks, shuffled=True)
    assert all(a.value < b.value for a, b in zip(best.nmse[:2], any_order.nmse)) and abs(best.nmse[2].value - any_order.nmse[2].value) < 1e-9
    torch.testing.assert_close(any_order.error, progressive(sae, x, ks, shuffled=True).error)
    assert best.estimate().value > any_order.estimate().value


# --- bad input ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("wrong,says", [
    (lambda sae, x: TopK(sae, 0), "at least 1"), (lambda sae, x: TopK(sae, 65).encode(x), "64 latents"),
    (lambda sae, x: Threshold(sae, math.nan), "nan"), (lambda sae, x: Threshold(sae, -1.), "at least 0"),
    (lambda sae, x: fit_threshold(sae, x, 0), "above 0"), (lambda sae, x: fit_threshold(sae, x, math.nan), "above 0"),
    (lambda sae, x: fit_threshold(sae, x, 65), "smaller"), (lambda sae, x: fit_threshold(Silent(), x, 2), "smaller"),
    (lambda sae, x: refine(sae, x[:0]), "at least one"), (lambda sae, x: refine(sae, x[0]), "at least one"),
    (lambda sae, x: shrinkage(sae, x * math.nan), "NaN"), (lambda sae, x: shrinkage(sae, x, unit=0), "unit"),
    (lambda sae, x: progressive(sae, x, []), "1 to 64"), (lambda sae, x: progressive(sae, x, [0, 1]), "1 to 64"),
    (lambda sae, x: progressive(sae, x, [65]), "1 to 64"), (lambda sae, x: progressive(sae, x[:0], [1]), "at least one"),
    (lambda sae, x: refine(object(), x), "encode"), (lambda sae, x: TopK(sae, 3).encode(x[:, :5]), "wide")])
def test_mistakes_are_told_in_a_sentence(wrong, says):
    with pytest.raises(UserError, match=says): wrong(random_sae(), draw(20, 12))


def test_what_has_no_figure_says_why():
    "A dictionary that never fires has no shrinkage and no share of latents to keep."
    x = draw(20, 12)
    none = shrinkage(Silent(), x)
    assert none.value is None and "active" in none.settings["missing"] and refine(Silent(), x).shrinkage is None
    assert "0 active" in progressive(Silent(), x, [1, 2]).estimate().settings["missing"]
    assert "nan" not in repr(refine(Silent(), x)) and shrinkage(random_sae(), x, nulls={"silent": Silent()}).nulls == {"silent": None}
    assert shrinkage(random_sae(), x[:1]).low is None


@pytest.mark.parametrize("normalise", ["none", "layer_norm"])
def test_refined_values_are_kept_only_where_they_are_better(normalise, monkeypatch):
    "Each row by itself: here the fit spoils every second row, as rounding may."
    from sae_nb import refine as module
    fit = module.fit_values
    def spoiled(D, target, values, steps):
        out = fit(D, target, values, steps)
        out[::2] = 5 * values[::2] + 1
        return out
    monkeypatch.setattr(module, "fit_values", spoiled)
    sae, x = random_sae(normalise=normalise), draw(60, 12)
    r = refine(sae, x)
    own = sae.encode(x)
    kept = (sae.decode(r.code) - x).square().sum(1)
    torch.testing.assert_close(kept, r.after)
    assert torch.equal(r.code.values[::2], own.values[::2]) and torch.equal(r.after[::2], r.before[::2])
    assert (kept[1::2] < r.before[1::2]).all() and not torch.equal(r.code.values[1::2], own.values[1::2])


def test_the_pull_that_is_left_is_the_largest_over_rows_and_values():
    "Row by row and value by value, with every case of a value that may move up, down, both ways or not at all."
    D, target = draw(6, 4, 12), draw(6, 12, key="target")
    start = torch.tensor([1., 1., -1., 0.]).expand(6, 4)
    values = torch.tensor([.5, 0., -.3, 0.]).expand(6, 4).to(D)
    worst = 0.
    for row in range(6):
        left = target[row] - values[row] @ D[row]
        for j in range(4):
            pull = (D[row, j] @ left / D[row, j].norm() / target[row].norm()).item()
            if start[row, j] == 0: continue                                         # not active
            worst = max(worst, pull if start[row, j] > 0 and values[row, j] == 0 else abs(pull))
    assert worst > .1 and kkt(D, target, values, start) == pytest.approx(worst)

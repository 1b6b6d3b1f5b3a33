"Reconstruction, downstream loss, their intervals and the compute equivalent, against slow and obvious versions."
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sae_nb.compute import compute_at, compute_equivalent, frontier
from sae_nb.core import Estimate, UserError
from sae_nb.lm import load_lm
from sae_nb.metrics import Reconstruction, mean_row, splice
from sae_nb.sae import SAE, Channels, Code, Dictionary, SAEConfig, init_
from sae_nb.text import Document, Text, windows

SITE, CONTEXT = "resid_post.1", 64


@pytest.fixture(scope="module")
def lm(): return load_lm("pylib-64", "cpu", "float32")


@pytest.fixture(scope="module")
def text():
    docs = [Document(f"d{i}", f"def f{i}(x):\n    return x + {i}\n" * 40) for i in range(20)]
    return Text("made up", lambda: iter(docs), lambda i, d: i % 2 == 1)


@pytest.fixture(scope="module")
def sae(lm, text):
    w = next(windows(text.documents(), lm.tokenizer, CONTEXT, 16))
    return init_(SAE(SAEConfig(d=64, n=128, k=8, site=SITE)), lm.read(w.ids, SITE)[w.keep]).requires_grad_(False)


# --- estimates --------------------------------------------------------------------------------------

def test_an_estimate_is_the_ratio_of_sums_and_its_interval_holds_it():
    parts = np.random.default_rng(0).gamma(2, size=(200, 2))
    e = Estimate.of(parts, seed=3, rows=7)
    assert e.value == pytest.approx(parts[:, 0].sum() / parts[:, 1].sum(), rel=1e-12) and e.low < e.value < e.high
    assert Estimate.of(parts, seed=3, rows=7) == e != Estimate.of(parts, seed=4, rows=7)
    assert e.settings == dict(rows=7, units=200, seed=3) and json.dumps(e.to_dict())


def test_the_bootstrap_agrees_with_the_standard_error_of_a_mean():
    x = np.random.default_rng(1).normal(5, 2, 2_000)
    e = Estimate.of(np.stack([x, np.ones_like(x)], 1), times=4_000)
    half = 1.96 * x.std(ddof=1) / len(x) ** .5
    assert e.low == pytest.approx(x.mean() - half, abs=.1 * half) and e.high == pytest.approx(x.mean() + half, abs=.1 * half)


@pytest.mark.parametrize("parts, value", [([], None), ([[1., 0.]], None), ([[1., 2.]], .5)])
def test_what_cannot_be_estimated_is_missing(parts, value):
    with np.errstate(all="ignore"): e = Estimate.of(parts)
    assert e.value == value and e.low is None and e.high is None


# --- reconstruction and splicing --------------------------------------------------------------------

def test_reconstruction_is_the_definition_however_it_is_fed():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3_000, 6, generator=g) * torch.rand(6, generator=g) + 5
    y = x + .3 * torch.randn(3_000, 6, generator=g)
    code = Code(torch.rand(3_000, 2, generator=g), torch.randint(0, 9, (3_000, 2), generator=g), 9)
    want = ((x - y).double().square().sum() / (x.double() - x.double().mean(0)).square().sum()).item()
    for sizes in ([3_000], [1] * 3_000, [7] * 428 + [4]):
        r = Reconstruction(6, 9, most=64)
        r.add(x, y, code, sizes)
        assert r.nmse == pytest.approx(want, rel=1e-9) and r.rows == 3_000 and len(r.units) <= 65
        assert r.estimate().value == pytest.approx(want, rel=1e-9)


def test_splicing_equals_a_loop_over_windows(lm, text, sae):
    seen = splice(sae, lm, text, SITE, CONTEXT, tokens=700, downstream=500)
    whole = torch.cat([w.ids for w in windows(text.documents(True), lm.tokenizer, CONTEXT)])
    assert len(seen.counts) in (8, 9) and 700 <= seen.sums["sae"].rows < 700 + 63
    mean = mean_row(lm, text, SITE, CONTEXT)
    for i, ids in enumerate(whole[:len(seen.counts)]):
        keep = ids != lm.tokenizer.bos_token_id
        def loss(new):
            def place(x): x = x.clone(); x[0, keep] = new(x[0, keep]); return x
            logits = lm.logits(ids[None], SITE, place)[0]
            return F.cross_entropy(logits[:-1], ids[1:], reduction="none")[keep[1:]].sum().item()
        for name, new in dict(clean=lambda x: x, zero=lambda x: 0 * x, mean=lambda x: mean.expand_as(x), sae=sae).items():
            assert seen.losses[name][i].item() == pytest.approx(loss(new), rel=1e-4)


@pytest.mark.parametrize("batch", [1, 3])
def test_splicing_does_not_depend_on_the_batch(lm, text, sae, batch):
    a, b = (splice(sae, lm, text, SITE, CONTEXT, tokens=900, downstream=400, batch=n) for n in (0, batch))
    assert a.sums["sae"].nmse == pytest.approx(b.sums["sae"].nmse, abs=1e-6)
    for name in ("clean", "sae", "zero", "mean"): assert a.loss(name) == pytest.approx(b.loss(name), abs=1e-6)
    assert a.recovered().value == pytest.approx(b.recovered().value, abs=1e-6)
    assert a.divergence() .value == pytest.approx(b.divergence().value, abs=1e-6)
    assert a.sums["sae"].estimate().low == pytest.approx(b.sums["sae"].estimate().low, abs=1e-6)


def test_channels_lose_nothing(lm, text):
    seen = splice(Channels(), lm, text, SITE, CONTEXT, tokens=300)
    assert seen.sums["sae"].nmse == 0 and seen.against("sae").value == pytest.approx(0, abs=1e-6)


def test_a_dictionary_that_never_fires_has_figures(lm, text):
    class Silent:
        def encode(self, rows): return torch.zeros(len(rows), 5)
        def decode(self, code): return torch.zeros(len(code), 64)
    seen = splice(Silent(), lm, text, SITE, CONTEXT, tokens=300)
    assert seen.sums["sae"].dead == 1 and seen.sums["sae"].l0 == 0 and seen.recovered().value == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("thing, word", [(object(), "encode"), (SAE(SAEConfig(d=8, n=16, k=2)), "site"),
                                         (type("Half", (), dict(encode=lambda s, x: x, decode=lambda s, z: z[:, :3]))(), "decodes to")])
def test_what_is_no_dictionary_is_said_in_a_sentence(thing, word):
    with pytest.raises(UserError, match=word): Dictionary(thing, torch.randn(4, 64))


# --- compute equivalent -----------------------------------------------------------------------------

def test_the_frontier_lies_below_every_point_and_is_convex():
    g = np.random.default_rng(0)
    curves = [[(math.exp(c), l) for c, l in g.random((50, 2)) * [4, 1]] for _ in range(3)]
    hull = frontier(curves)
    slopes = np.diff([l for _, l in hull]) / np.diff([math.log(c) for c, _ in hull])
    assert (np.diff(slopes) > 0).all() and (slopes < 0).all()
    for c, l in (p for curve in curves for p in curve):
        if hull[0][0] <= c <= hull[-1][0]: assert np.interp(math.log(c), [math.log(c) for c, _ in hull], [l for _, l in hull]) <= l + 1e-12


@pytest.mark.parametrize("a, b", [(3., .1), (10., .3)])
def test_a_power_law_has_the_equivalent_that_it_says(a, b):
    curve = [(c, a * c**-b) for c in np.geomspace(1, 1e6, 400)]
    end = curve[-1][1]
    for more in (.001, .01, .1):
        want = ((end + more) / a) ** (-1 / b) / 1e6
        assert compute_equivalent(Estimate(more), curve).value == pytest.approx(want, rel=1e-3)


def test_intervals_and_nulls_turn_round():
    e = compute_equivalent(Estimate(.2, .1, .3), [(10**i, 5 - i) for i in range(5)], nulls={"zero": 2., "hopeless": 9.})
    assert e.low < e.value < e.high and e.nulls == {"zero": pytest.approx(.01), "hopeless": None}


@pytest.mark.parametrize("curve", [[], [(1, 2)], [(0, 2), (1, 1)], [(1, float("nan")), (2, 1)]])
def test_a_bad_curve_is_a_sentence(curve):
    with pytest.raises(UserError, match="training curve"): compute_equivalent(Estimate(.1), curve)


def test_a_loss_outside_of_the_curve_is_missing():
    e = compute_equivalent(Estimate(9.), [(1., 2.), (10., 1.)])
    assert e.value is None and "outside" in e.settings["missing"] and compute_at([(1., 2.), (10., 1.)], 3.) is None

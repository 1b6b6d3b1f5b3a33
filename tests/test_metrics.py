"Reconstruction, downstream loss, their intervals and the compute equivalent, against slow and obvious versions."
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sae_nb.metrics
import sae_nb.sampling
from sae_nb.compute import compute_at, compute_equivalent, frontier
from sae_nb.core import Estimate, UserError
from sae_nb.lm import load_lm
from sae_nb.metrics import GROUPS, Reconstruction, divergence, mean_row, measure, next_token_loss, silence, splice, unseen, untrained
from sae_nb.sampling import Units, by_document, drawn, exact
from sae_nb.sae import SAE, Channels, Code, Dictionary, SAEConfig, init_
from sae_nb.text import Document, Text, Windows, windows

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
        assert r.nmse == pytest.approx(want, rel=1e-9) and r.rows == 3_000 and len(r.raw.units.sums) <= 64
        assert r.estimate().value == pytest.approx(want, rel=1e-9)


def test_splicing_equals_a_loop_over_windows(lm, text, sae):
    seen = splice(sae, lm, text, SITE, CONTEXT, tokens=700, downstream=500)
    whole = drawn(text, lm, CONTEXT, 700).windows.ids
    assert len(seen.counts) in (8, 9) and 700 <= seen.sums["sae"].rows < 700 + 63
    mean = mean_row(lm, text, SITE, CONTEXT, tokens=700)
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


def test_divergence_is_from_the_clean_predictions_to_the_others():
    "KL(p ‖ q) = Σ p log(p / q) by its definition, on predictions where the other direction is another number."
    clean, other = torch.tensor([[[3., 0, 0], [0, 0, 0]]]), torch.tensor([[[0., 0, 2], [0, 0, 0]]])
    batch = Windows(torch.tensor([[1, 2]]), torch.ones(1, 2, dtype=torch.bool), ["d"])
    p, q = clean[0, 0].double().softmax(0), other[0, 0].double().softmax(0)
    want, back = ((a * (a / b).log()).sum().item() for a, b in ((p, q), (q, p)))
    assert abs(want - back) > .1
    assert divergence(clean, other, batch).item() == pytest.approx(want, rel=1e-6)


def test_special_tokens_are_predicted_by_nobody():
    "Each kept token is predicted from the one before; special ones have neither a loss nor a divergence."
    logits, other = torch.randn(2, 2, 5, 7, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0, 3, 0, 6, 2], [0, 1, 5, 4, 3]])
    batch = Windows(ids, ids != 0, ["a", "b"])
    loss, kl = next_token_loss(logits, batch), divergence(logits, other, batch)
    assert loss.shape == kl.shape == (2, 4) and loss[0, 1] == kl[0, 1] == 0 and (loss != 0).sum() == (kl != 0).sum() == 7
    for b, s in ((0, 1), (0, 3), (1, 4)): assert loss[b, s - 1].item() == pytest.approx(-logits[b, s - 1].log_softmax(-1)[ids[b, s]].item(), rel=1e-5)


def test_recovered_counts_from_the_clean_loss(lm, text, sae):
    "By its definition from the three losses; without the clean one it would be another number."
    seen = splice(sae, lm, text, SITE, CONTEXT, tokens=700, downstream=500)
    clean, zero, mean, mine = (seen.loss(n) for n in ("clean", "zero", "mean", "sae"))
    assert seen.recovered().value == pytest.approx((zero - mine) / (zero - clean), rel=1e-9)
    assert seen.recovered("sae", "mean").value == pytest.approx((mean - mine) / (mean - clean), rel=1e-9)
    assert abs((zero - mine) / zero - seen.recovered().value) > .02


def test_each_figure_of_a_measure_stands_under_its_name(lm, text, sae):
    "Against the pass itself: the SAE's and the null's figures, and both ways to ablate, are different numbers."
    null = init_(SAE(sae.cfg), torch.randn(200, 64, generator=torch.Generator().manual_seed(5)), seed=3)
    how = dict(tokens=700, downstream=500, null=null)
    seen, m = splice(sae, lm, text, SITE, CONTEXT, **how), measure(sae, lm, text, SITE, CONTEXT, **how)
    own, other = seen.sums["sae"], seen.sums["null"]
    want = dict(nmse=own.nmse, explained_variance=1 - own.nmse, l0=own.l0, dead_fraction=own.dead, nmse_normalised=own.nmse_normalised,
                null_nmse=other.nmse, null_explained_variance=1 - other.nmse, null_nmse_normalised=other.nmse_normalised, null_dead_fraction=other.dead,
                ce_clean=seen.loss("clean"), ce_spliced=seen.loss("sae"), ce_zero=seen.loss("zero"), ce_mean=seen.loss("mean"),
                ce_recovered=seen.recovered().value, ce_recovered_mean=seen.recovered("sae", "mean").value, kl=seen.divergence().value,
                null_ce_recovered=seen.recovered("null").value, null_ce_recovered_mean=seen.recovered("null", "mean").value,
                ce_increase_se=seen.error(), eval_tokens=own.rows, downstream_tokens=int(seen.counts.sum()), eval_documents=len(own.docs))
    got = m.to_dict()
    for name, value in want.items(): assert got[name] == pytest.approx(value, rel=1e-6), name
    assert len({round(want[n], 6) for n in want if n not in ("l0", "dead_fraction", "null_dead_fraction")}) >= len(want) - 4


# --- which windows, and which units -------------------------------------------------------------------

def halves(documents=60):
    "A text whose first documents are code and whose last ones are noise: its head is not the whole."
    def body(i): return f"def f{i}(x):\n    return x + {i}\n" * 60 if i < documents // 2 else f"{i} zq kw jx vb qy {i * 7} ~^ " * 90
    docs = [Document(f"{'head' if i < documents // 2 else 'tail'}{i}", body(i)) for i in range(documents)]
    return Text("halves", lambda: iter(docs), lambda i, d: i % 2 == 1)


def test_windows_are_drawn_over_all_held_out_documents(lm):
    "Few or many, they come from head and tail, from the held-out side only; the seed and nothing else changes them."
    text = halves()
    held = {d.name for d in text.documents(True)}
    for tokens in (1_500, 8_000):
        few = drawn(text, lm, CONTEXT, tokens)
        share = sum(d.startswith("tail") for d in few.windows.docs) / len(few)
        assert .2 < share < .8 and set(few.windows.docs) <= held and tokens <= few.rows < tokens + CONTEXT
        assert torch.equal(few.windows.ids, drawn(text, lm, CONTEXT, tokens).windows.ids)
        assert not torch.equal(few.windows.ids, drawn(text, lm, CONTEXT, tokens, seed=1).windows.ids)
        front = few.windows.docs[:len(few) // 3]
        assert {d[:4] for d in front} == {"head", "tail"}
    assert {d[:4] for d in drawn(text, lm, CONTEXT, 8_000, held_out=False).windows.docs} == {"head", "tail"}
    assert not set(drawn(text, lm, CONTEXT, 8_000, held_out=False).windows.docs) & held


def test_a_text_larger_than_what_is_read_is_drawn_from_head_and_tail(lm):
    "Documents that are long and many: a few windows come from many of them, late ones too, and none from the other side."
    docs = [Document(f"{i}", f"value_{i} = [{i}, {i + 1}]\n" * 1_500) for i in range(100)]
    text = Text("large", lambda: iter(docs), lambda i, d: i % 2 == 1)
    numbers = [int(d) for d in drawn(text, lm, CONTEXT, 1_500).windows.docs]
    assert max(numbers) > 70 and min(numbers) < 30 and len(set(numbers)) >= 10 and all(i % 2 for i in numbers)
    others = [int(d) for d in drawn(text, lm, CONTEXT, 1_500, seed=1).windows.docs]
    assert numbers != others and len({*numbers, *others}) > 19   # the text of 18 documents is read for each seed


def test_windows_come_in_mixed_order_however_they_are_found(lm, monkeypatch):
    "The front of a drawing is spread over its documents, so that a part of it may be measured alone."
    in_order = lambda text, tokenizer, context, tokens, seed=0, held_out=True, batch=16: windows(text.documents(held_out), tokenizer, context, batch)
    monkeypatch.setattr(sae_nb.sampling, "spread", in_order)
    found = drawn(halves(), lm, CONTEXT, 8_000)
    assert {d[:4] for d in found.windows.docs[:12]} == {"head", "tail"}
    front = found.take(0, found.first(1_000))
    assert 1_000 <= front.rows < 1_000 + CONTEXT and len(found.split(7)[-1]) <= 7 and sum(map(len, found.split(7))) == len(found)


def test_quick_and_full_agree_within_their_intervals(lm, sae):
    "On a text whose head is another language than its tail, where reading the head alone would be far off."
    text = halves()
    quick, full = (splice(sae, lm, text, SITE, CONTEXT, tokens=n, downstream=n // 3) for n in (4_000, 12_000))
    pairs = [(f(quick), f(full)) for f in (lambda s: s.sums["sae"].estimate(), lambda s: s.against("sae"), lambda s: s.divergence())]
    for few, many in pairs: assert few.low <= many.value <= few.high and many.low <= many.value <= many.high
    assert quick.settings["documents"] >= 15
    first = Text("head", text.read, lambda i, d: i % 2 == 1 and d.name.startswith("head"))
    head = splice(sae, lm, first, SITE, CONTEXT, tokens=4_000, downstream=1_300)
    assert not quick.against("sae").low < head.against("sae").value < quick.against("sae").high


def test_the_bootstrap_over_documents_covers_and_one_over_windows_does_not():
    "Planted: windows of a document share a level. 95 % intervals hold the truth about that often by documents only."
    g = torch.Generator().manual_seed(0)
    hits = {20: 0, 1: 0}
    for seed in range(200):
        x = 1 + .3 * torch.randn(40, 1, generator=g) + .3 * torch.randn(40, 20, generator=g)
        for unit in hits:
            parts = by_document(torch.stack([x.flatten(), torch.ones(800)], 1), [f"d{i // unit}" for i in range(800)])
            e = Estimate.of(parts.numpy(), seed=seed, times=300)
            hits[unit] += e.low <= 1 <= e.high
    assert hits[20] / 200 > .88 and hits[1] / 200 < .65


def test_the_standard_error_is_that_of_a_ratio_over_documents(lm, text, sae):
    "By the formula for clusters of different sizes, and near the bootstrap's; by windows it would be another."
    seen = splice(sae, lm, text, SITE, CONTEXT, tokens=3_000, downstream=3_000)
    docs = sorted(set(seen.docs))
    more = {d: [0., 0.] for d in docs}
    for d, a, b, c in zip(seen.docs, seen.losses["sae"].tolist(), seen.losses["clean"].tolist(), seen.counts.tolist()):
        more[d][0] += a - b
        more[d][1] += c
    total, count = (sum(v[i] for v in more.values()) for i in (0, 1))
    want = math.sqrt(sum((v[0] - total / count * v[1]) ** 2 for v in more.values()) * len(docs) / (len(docs) - 1)) / count
    assert seen.error() == pytest.approx(want, rel=1e-9) and len(seen.docs) > len(docs) > 5
    e = seen.against("sae", times=4_000)
    assert (e.high - e.low) / 3.92 == pytest.approx(want, rel=.25) and e.settings["units"] == len(docs)
    assert measure(sae, lm, text, SITE, CONTEXT, 3_000, downstream=3_000).ce_increase_se == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("most", [3, 4, 7, 1_000])
def test_beyond_the_cap_whole_documents_are_merged(most):
    "Whatever the order of windows, a sum holds all of a document or nothing of it."
    g = torch.Generator().manual_seed(2)
    docs = [f"d{int(i)}" for i in torch.randint(0, 50, (400,), generator=g)]
    marks = torch.zeros(400, 50, dtype=torch.float64)
    marks[range(400), [int(d[1:]) for d in docs]] = 1
    units = Units(50, most)
    for some in torch.arange(400).split(37): units.add(marks[some], [docs[i] for i in some])
    assert len(units.sums) <= most and torch.equal(units.sums.sum(0), marks.sum(0))
    assert ((units.sums == 0) | (units.sums == marks.sum(0))).all()
    assert most < 50 or len(units.sums) == len(set(docs))


def test_every_interval_says_its_unit(lm, text, sae):
    seen = splice(sae, lm, text, SITE, CONTEXT, tokens=700, downstream=500)
    for e in (seen.sums["sae"].estimate(), seen.against("sae"), seen.recovered(), seen.divergence()):
        assert e.settings["unit"] == "documents" and "training" in e.settings["not_in_it"]


# --- rows that stand far out --------------------------------------------------------------------------

def test_rows_far_out_are_counted_and_left_alone(lm, text, sae):
    "A limit that leaves some rows out: they are in no sum, the model reads them as they are, and the settings say how many."
    whole = drawn(text, lm, CONTEXT, 700).windows
    x = lm.read(whole.ids, SITE)
    norms = x.norm(dim=-1)[whole.keep]
    limit = norms.quantile(.9).item()
    shown = []
    seen = splice(sae, lm, text, SITE, CONTEXT, tokens=700, downstream=500, limit=limit, see=lambda w, code: shown.append((w, code)))
    out = int((norms > limit).sum())
    assert out and seen.settings["left_out"] == out and seen.sums["sae"].rows == len(norms) - out == seen.settings["tokens"]
    rows = x[whole.keep][norms <= limit]
    want = (rows - sae(rows)).double().square().sum() / (rows.double() - rows.double().mean(0)).square().sum()
    assert seen.sums["sae"].nmse == pytest.approx(want.item(), rel=1e-5)
    for w, code in shown: assert int(w.keep.sum()) == len(code.values)
    keep = whole.keep[:1] & (x[:1].norm(dim=-1) <= limit)
    def place(row): row = row.clone(); row[keep] = sae(row[keep]); return row
    logits = lm.logits(whole.ids[:1], SITE, place)[0]
    loss = F.cross_entropy(logits[:-1], whole.ids[0, 1:], reduction="none")[whole.keep[0, 1:]].sum().item()
    assert seen.losses["sae"][0].item() == pytest.approx(loss, rel=1e-4)
    assert measure(sae, lm, text, SITE, CONTEXT, 700, downstream=500, limit=limit).left_out == out
    assert splice(sae, lm, text, SITE, CONTEXT, tokens=700, downstream=500, limit=math.inf).settings["left_out"] == 0


def test_what_is_usual_is_asked_for_and_the_mean_row_is_of_that(lm, text, sae, monkeypatch):
    "Without a limit given the site's own is taken; the mean row is that of the rows within it."
    whole = drawn(text, lm, CONTEXT, 700).windows
    rows = lm.read(whole.ids, SITE)[whole.keep]
    limit = rows.norm(dim=-1).quantile(.8).item()
    mean = rows[rows.norm(dim=-1) <= limit].mean(0)
    assert (mean - rows.mean(0)).norm() > .01 * mean.norm()
    torch.testing.assert_close(mean_row(lm, text, SITE, CONTEXT, tokens=700, limit=limit), mean, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(sae_nb.metrics, "norm_limit", lambda *given: limit)
    asked, given = (splice(sae, lm, text, SITE, CONTEXT, tokens=700, downstream=200, **how) for how in ({}, dict(limit=limit)))
    assert asked.settings["left_out"] == given.settings["left_out"] > 50 and asked.settings["limit"] == limit
    assert asked.loss("mean") == given.loss("mean")


# --- rare and dead latents ----------------------------------------------------------------------------

def test_silence_is_what_fewer_documents_would_have_said():
    "By going through all choices of groups, on few of them."
    from itertools import combinations
    seen = torch.rand(6, 50, generator=torch.Generator().manual_seed(0)) < .2
    told = silence(seen.sum(0), 6, 600)
    for g in (1, 3, 6):
        want = np.mean([(~seen[list(some)].any(0)).double().mean().item() for some in combinations(range(6), g)])
        assert told[100 * g] == pytest.approx(want, abs=1e-9)


def test_the_limit_of_silence_lies_between_the_dead_and_the_silent():
    "Planted: a fifth of the latents is dead, the others are rare; Chao's bound is an upper bound of the dead, below the silent."
    g = torch.Generator().manual_seed(0)
    rate = 10 ** -(2 + 3 * torch.rand(5_000, generator=g))
    rate[:1_000] = 0
    seen = torch.poisson((rate * 10_000 / GROUPS).repeat(GROUPS, 1), generator=g) > 0
    dead = (~seen.any(0)).double().mean().item()
    assert .2 <= unseen(seen.sum(0), GROUPS) + .01 < dead - .02
    assert unseen(torch.zeros(4, dtype=torch.long), 1) is None and unseen(torch.zeros(4, dtype=torch.long), 9) == 1


def test_a_latent_is_active_above_zero_only():
    "Dense codes and codes by place alike: neither zero nor a negative value is an activation."
    dense = torch.tensor([[1., 0., -2., 0.], [3., -1., 0., 0.], [0., 0., 5., 0.]])
    placed = Code(torch.tensor([[1., 0.], [3., 0.], [5., 0.]]), torch.tensor([[0, 1], [0, 3], [2, 1]]), 4)
    for code in (dense, placed):
        r = Reconstruction(2, 4)
        r.add(torch.randn(3, 2), torch.zeros(3, 2), code)
        assert r.fired.tolist() == [2, 0, 1, 0] and r.l0 == 1 and r.dead == .5 and r.density.tolist() == pytest.approx([2 / 3, 0, 1 / 3, 0])


def test_the_untrained_null_is_another_start(sae):
    rows = torch.randn(100, 64, generator=torch.Generator().manual_seed(2))
    mine, null, other = init_(SAE(sae.cfg), rows, 0), untrained(sae, rows), untrained(sae, rows, seed=2)
    assert null.cfg == sae.cfg and len({tuple(s.W_enc.flatten()[:9].tolist()) for s in (mine, null, other)}) == 3


def test_the_dead_share_of_a_pass_comes_with_its_rows(lm, text, sae):
    r = splice(sae, lm, text, SITE, CONTEXT, tokens=3_000, downstream=300).sums["sae"]
    told = r.silent()
    assert max(told) == r.rows and told[r.rows] == pytest.approx(r.dead) and list(told.values()) == sorted(told.values(), reverse=True)
    assert r.dead_limit <= r.dead


def test_groups_hold_whole_documents_and_there_are_many():
    "Latents by the documents that they are active in, against counting by hand."
    g = torch.Generator().manual_seed(1)
    r, active = Reconstruction(3, 40), torch.rand(50, 40, generator=g) < .03
    for i in [*range(50), *range(50)]:
        dense = active[i].float().expand(4, -1)
        r.add(torch.randn(4, 3, generator=g), torch.randn(4, 3, generator=g), dense, [4], [f"d{i}"])
    q = active.sum(0)
    assert r.dead == (q == 0).double().mean() and r.dead_limit == unseen(q, 50) < r.dead
    assert r.silent() == silence(q, 50, 400) and len(r.silent()) == 5 and r.fired.sum() == 8 * active.sum()


# --- units of the error -------------------------------------------------------------------------------

@pytest.mark.parametrize("how", ["none", "unit_norm", "layer_norm"])
def test_the_error_is_told_in_raw_and_in_normalised_units(how):
    "In normalised units, each row weighs the same; without normalisation there is no such figure."
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(2_000, 8, generator=g) * torch.linspace(.1, 20, 2_000)[:, None] + 3
    sae = init_(SAE(SAEConfig(d=8, n=32, k=3, normalise=how)), rows).requires_grad_(False)
    code, r = sae.encode(rows), Reconstruction(8, 32)
    r.add(rows, sae.decode(code), code, [100] * 20)
    recon = sae.decode(code)
    share = lambda x, y: ((x.double() - y.double()).square().sum() / (x.double() - x.double().mean(0)).square().sum()).item()
    assert r.nmse == pytest.approx(share(rows, recon), rel=1e-9)
    if how == "none": assert r.nmse_normalised is None
    else:
        x = code.normed.rows
        assert r.nmse_normalised == pytest.approx(share(x, sae.decode_normed(code.values, code.indices)), rel=1e-4)
        assert abs(r.nmse_normalised / r.nmse - 1) > .05


# --- too little to tell -------------------------------------------------------------------------------

@pytest.mark.parametrize("rows", [torch.ones(1, 4), torch.full((300, 4), .1), torch.zeros(5, 4)])
def test_rows_that_do_not_differ_have_no_nmse(rows):
    r = Reconstruction(4, 2)
    r.add(rows, rows + 1, torch.zeros(len(rows), 2))
    assert r.nmse is None and r.estimate().value is None and "differ" in r.estimate().settings["missing"]


def test_one_window_is_measured_with_nulls_and_no_nan(lm, sae):
    "Every figure is a number or None, in strict JSON, and a warning says how little there was."
    short = Text("short", lambda: iter([Document("a", "x = 1\n" * 60), Document("b", "def f(x):\n    return x\n" * 9)]), lambda i, d: i == 1)
    with pytest.warns(UserWarning, match="where 200,000 were asked for"): m = measure(sae, lm, short, SITE, CONTEXT, null=sae)
    assert m.ce_increase_se is None and m.dead_limit is None and m.eval_documents == 1 and m.nmse > 0
    assert json.loads(json.dumps(m.to_dict(), allow_nan=False)) == m.to_dict()


@pytest.mark.parametrize("wrong, word", [(dict(tokens=0), "tokens"), (dict(downstream=0), "downstream"), (dict(batch=-1), "batch"), (dict(context=1), "context"),
                                         (dict(tokens=-5), "tokens"), (dict(context=10_000), "less than one window")])
def test_what_cannot_be_measured_is_a_sentence(lm, text, sae, wrong, word):
    with pytest.raises(UserError, match=word): measure(sae, lm, text, SITE, **dict(context=CONTEXT) | wrong)


@pytest.mark.parametrize("rows, recon, sizes", [((4, 3), (4, 2), None), ((2, 2, 3), (2, 2, 3), None), ((4, 3), (4, 3), [3]), ((3,), (3,), None)])
def test_rows_that_do_not_fit_are_a_sentence(rows, recon, sizes):
    with pytest.raises(UserError, match="rows"): Reconstruction(3, 2).add(torch.ones(rows), torch.ones(recon), torch.zeros(4, 2), sizes)


def test_no_rows_are_no_error_and_graphs_are_not_kept():
    "Nothing was there to measure; rows with a graph give plain sums."
    r = Reconstruction(3, 2)
    r.add(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, 2))
    assert r.nmse is None and r.l0 == 0 and r.rows == 0 and r.dead == 1
    x = torch.randn(9, 3, requires_grad=True)
    r.add(x, 2 * x, x[:, :2])
    assert r.nmse > 0 and not r.raw.total.requires_grad and r.estimate().value == pytest.approx(r.nmse)


def test_a_dictionary_that_gives_nan_is_a_sentence(lm, text, sae):
    class Broken:
        def encode(self, rows): return sae.encode(rows)
        def decode(self, code): back = sae.decode(code); return back.where(back < back.max(), back / 0)
    with pytest.raises(UserError, match="NaN or infinity"): measure(Broken(), lm, text, SITE, CONTEXT, 300)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("how", [dict(limit=math.inf), dict(limit=100.), dict(downstream=1)])
def test_activations_that_are_not_finite_are_not_left_out_in_silence(lm, text, sae, bad, how):
    "One bad row among many, early or late in the pass, is a sentence about the model."
    read, logits, calls = lm.read, lm.logits, []
    def spoiled(x): return x.index_put((torch.tensor([len(x) - 1]), torch.tensor([9])), torch.tensor(bad))
    class Odd:
        model, tokenizer, name, device, context = lm.model, lm.tokenizer, lm.name, lm.device, lm.context
        def read(self, ids, site): calls.append(1); return spoiled(read(ids, site)) if len(calls) > 1 else read(ids, site)
        def logits(self, ids, *more): return logits(ids, more[0], lambda x: more[1](spoiled(x))) if more else logits(ids)
    with pytest.raises(UserError, match="activations.*NaN or infinity"): splice(sae, Odd(), text, SITE, CONTEXT, 2_500, **how)


def test_double_precision_is_made_where_the_device_has_it():
    "A tensor that says it lies on a device without float64 is moved before it is widened."
    class Elsewhere:
        device, moved = torch.device("mps"), False
        def cpu(self): self.moved = True; return torch.ones(2)
        def double(self): raise TypeError("this device has no float64")
    x = Elsewhere()
    assert exact(x).dtype == torch.float64 and x.moved and exact(torch.ones(1)).dtype == torch.float64


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


def test_between_two_points_compute_is_interpolated_in_its_logarithm():
    curve = [(1e6, 5.), (1e10, 3.)]
    assert compute_at(curve, 4.) == pytest.approx(1e8) and compute_at(curve, 3.5) == pytest.approx(1e9)
    assert compute_at(curve, 5.) == pytest.approx(1e6) and compute_at(curve, 3.) == pytest.approx(1e10) and compute_at(curve, 2.9) is None


def test_a_family_that_is_better_counts_from_where_it_has_the_models_loss():
    "Nothing lost is all of the compute; the order of the points does not matter."
    own, better = [(1e9, 5.), (1e11, 3.)], [(1e8, 5.), (1e10, 2.)]
    assert compute_equivalent(Estimate(0.), own, [better]).value == pytest.approx(1.)
    e = compute_equivalent(Estimate(1.), own, [better])
    assert e.value == pytest.approx(compute_at(better, 4.) / compute_at(better, 3.)) and e.settings["own_curve"] == pytest.approx(.1)
    turned = compute_equivalent(Estimate(1.), own[::-1], [better[::-1]])
    assert turned.value == pytest.approx(e.value) and turned.settings["own_curve"] == pytest.approx(.1)


def test_intervals_and_nulls_turn_round():
    e = compute_equivalent(Estimate(.2, .1, .3), [(10**i, 5 - i) for i in range(5)], nulls={"zero": 2., "hopeless": 9.})
    assert e.low < e.value < e.high and e.nulls == {"zero": pytest.approx(.01), "hopeless": None}


@pytest.mark.parametrize("curve", [[], [(1, 2)], [(0, 2), (1, 1)], [(1, float("nan")), (2, 1)]])
def test_a_bad_curve_is_a_sentence(curve):
    with pytest.raises(UserError, match="training curve"): compute_equivalent(Estimate(.1), curve)


def test_curves_saved_by_a_spreadsheet_are_read(tmp_path):
    "A mark at the head of the file belongs to no column."
    from sae_nb.compute import read_curves
    (tmp_path / "c.csv").write_bytes("\ufeffmodel,flops,loss\na,1e9,4\na,2e9,3\n".encode("utf-8"))
    assert read_curves(tmp_path / "c.csv", "a") == {"a": [(1e9, 4.), (2e9, 3.)]}


def test_the_models_own_curve_and_the_family_give_two_figures():
    "By the family's hull and along the own curve, each with its interval, and each says what it goes by."
    own, finished = [(1e10, 5.), (5e10, 4.2), (1e11, 3.)], [(1e9, 6.), (2e10, 3.5)]
    increase = Estimate(.5, .4, .6, settings=dict(unit="documents"))
    family, mine = (compute_equivalent(increase, own, [finished], by=by) for by in ("family", "own"))
    assert mine.value == pytest.approx(compute_at(own, 3.5) / 1e11) and mine.low < mine.value < mine.high
    assert family.value == pytest.approx(.2) and family.settings["own_curve"] == pytest.approx(mine.value)
    for e in (family, mine): assert "choice of curve" in e.settings["not_in_it"]
    with pytest.raises(UserError, match="family or own"): compute_equivalent(increase, own, by="mine")


def test_a_loss_outside_of_the_curve_is_missing():
    e = compute_equivalent(Estimate(9.), [(1., 2.), (10., 1.)])
    assert e.value is None and "outside" in e.settings["missing"] and compute_at([(1., 2.), (10., 1.)], 3.) is None

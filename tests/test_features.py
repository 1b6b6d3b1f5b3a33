"What a payload says about a latent, against slow recomputations from the activations; and payloads that are missing, damaged or foreign."
import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from payloads import TEXTS, about, feature as made_feature, made

from sae_nb.collect import Best, Collected, Collector, Histograms, collect, contexts, feature, ranked, together
from sae_nb.core import UserError, write_json
from sae_nb.dossier import Live, described, direct_map, directions, exact, explanations, favoured, nearest, striking, with_effects, write_features
from sae_nb.features import COLUMNS, EFFECTS, Context, Feature, Payload, _sealed, decode_column, encode_column, moments, pack, read_openai, unpack, write_payload
from sae_nb.lm import LM, load_lm
from sae_nb.sae import SAE, Channels, Code, SAEConfig, init_
from sae_nb.text import Document, Span, Text, Windows, Words, load_text, load_tokenizer, windows

SITE, CONTEXT = "resid_post.2", 32
ZOO = ["naïve 日本語の文章 🙂🙂 done", "x = 1\n", "<b>שלום</b> «é»\n" * 3, "👩‍👩‍👧 " * 4, "plain words only", "\ufffd is the mark\n", "ends with ｆｕｌｌ width 漢"]


@pytest.fixture(scope="module")
def lm(): return load_lm("pylib-64", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def text():
    "Short documents of every kind, several in a window, among long ones."
    library = [Document(d.name, d.text[:700]) for d, _ in zip(load_text("pylib").documents(), range(16))]
    docs = [d for i, l in enumerate(library) for d in (l, *(Document(f"zoo/{i}.{j}", t) for j, t in enumerate(ZOO)))]
    held = [Document("held/" + d.name, d.text) for d in library[:4]]
    return Text("zoo", lambda: iter(docs + held), lambda i, d: d.name.startswith("held/"))


@pytest.fixture(scope="module")
def sae(lm, text):
    "An SAE before training, with one latent that never fires."
    rows = lm.read(next(windows(text.documents(), lm.tokenizer, CONTEXT, 64)).ids, SITE).flatten(0, 1)
    sae = init_(SAE(SAEConfig(d=64, n=96, k=6)), rows)
    with torch.no_grad(): sae.W_enc[5], sae.b_enc[5] = 0, -1e4
    return sae.requires_grad_(False)


@pytest.fixture(scope="module")
def found(sae, lm, text): return collect(sae, lm, text, SITE, tokens=10**9, context=CONTEXT, top=6, sample=24)


@pytest.fixture(scope="module")
def truth(sae, lm, text):
    "Every activation of every token, window by window, and for each place its document and number there."
    all_windows = [w.take([i]) for w in windows(text.documents(), lm.tokenizer, CONTEXT, 16) for i in range(len(w))]
    ids = torch.cat([w.ids for w in all_windows])
    acts, keep = torch.zeros(*ids.shape, 96), torch.cat([w.keep for w in all_windows])
    for at in range(0, len(ids), 16):   # the same batches as the pass, since a model rounds by their size
        some = slice(at, at + 16)
        acts[some][keep[some]] = sae.encode(lm.read(ids[some], SITE)[keep[some]]).dense()
    stream = []
    for d in text.documents():
        own = lm.tokenizer(d.text, add_special_tokens=False)["input_ids"]
        stream += [(d.name, i, t) for i, t in enumerate(own)] + [None]
    owner = [p for i in range(len(ids)) for p in [None, *stream[i * (CONTEXT - 1):(i + 1) * (CONTEXT - 1)]]]
    return SimpleNamespace(ids=ids, keep=keep, acts=acts.flatten(0, 1), real=int(keep.sum()), owner=owner)


# --- one pass against a table --------------------------------------------------------------------------

def test_figures(found, truth):
    "Density, moments, maximum and histogram of every latent follow from the table."
    a, have = truth.acts.double(), found.figures
    assert found.rows == truth.real and (found.counts == (a > 0).sum(0)).all()
    m = [(a ** i).sum(0) / truth.real for i in (1, 2, 3, 4)]
    want = dict(density=(a > 0).sum(0) / truth.real, mean=m[0], second=m[1], skew=m[2] / m[1] ** 1.5, kurtosis=m[3] / m[1] ** 2, max=a.amax(0))
    for name, w in want.items(): np.testing.assert_allclose(have[name], w, rtol=1e-6, err_msg=name)
    bin = torch.where(a > 0, (a / found.hist.width).ceil() - 1, -1).long()
    slow = torch.stack([torch.bincount(b[b >= 0], minlength=256) for b in bin.T])
    assert (found.hist.counts == slow).all() and found.hist.width * 256 >= a.max() > found.hist.width * 128


def test_top_and_random_places(found, truth):
    "Top places are the largest of their windows, in order; random ones are firings, without repetition, all of them if there are few."
    peaks = truth.acts.view(len(truth.ids), CONTEXT, -1).amax(1)
    for l in range(96):
        want = peaks[:, l][peaks[:, l] > 0].sort(descending=True).values[:6]
        assert torch.equal(found.top.notes["value"][l, :len(want)], want) and (found.top.score[l] >= 0).sum() == len(want)
        place = found.top.notes["place"][l, :len(want)]
        assert torch.equal(truth.acts[place, l], want) and len({*(place // CONTEXT).tolist()}) == len(want)
        have = found.sample.score[l] >= 0
        drawn, fired = found.sample.notes["place"][l, have].tolist(), truth.acts[:, l].nonzero()[:, 0].tolist()
        assert len(drawn) == len({*drawn}) == min(24, len(fired)) and {*drawn} <= {*fired}
        assert torch.equal(truth.acts[drawn, l], found.sample.notes["value"][l, have])


def cut_at(texts, read):
    "The texts of a document's tokens where only `read` were read: what may be half a character at their end is not shown."
    if read > len(texts): return texts
    whole = read
    while whole and texts[whole - 1] in ("", "\ufffd"): whole -= 1
    return texts[:whole] + [""] * (read - whole)


def test_contexts_are_pieces_of_their_documents(found, truth, text, lm):
    "Text, activations, document and number of each context, across cut characters and several documents in a window."
    words = Words(lm.tokenizer)
    texts = {d.name: words(lm.tokenizer(d.text, add_special_tokens=False)["input_ids"]) for d in text.documents()}
    assert all("".join(texts[d.name]) == d.text for d in text.documents())
    cut = 0
    for l in range(96):
        for best in (found.top, found.sample):
            for j, c in enumerate(contexts(found, best, l)):
                name, token, _ = truth.owner[c.place]
                assert (c.doc, c.token, c.at) == (name, token, c.at) and c.place == best.notes["place"][l, j]
                known = texts[name]
                if c.place // CONTEXT == len(truth.ids) - 1: known = cut_at(known, token + CONTEXT - c.place % CONTEXT)
                assert c.tokens == known[token - c.at:token - c.at + len(c.tokens)]
                assert c.values == truth.acts[c.place - c.at:c.place - c.at + len(c.tokens), l].tolist() and c.act == c.values[c.at] > 0
                assert c.at == min(20, token, c.place % CONTEXT - 1) or "" in texts[name][max(0, token - 24):token]
                cut += "" in c.tokens
    assert cut > 100
    assert any(len(s) > 3 for s in found.spans) and any(s.token for ss in found.spans for s in ss)


def test_a_feature_tells_what_was_collected(found, truth):
    "Bands are quantiles of the random sample; a latent that never fires says so; co-firing shares are those of the sample."
    for l in (0, 17, 60):
        f = feature(found, l, random=5, count=3, per=2)
        value = found.sample.notes["value"][l, found.sample.score[l] >= 0].sort(descending=True).values
        assert [b.low for b in f.bands] == [p[-1].item() for p in value.tensor_split(3)] and [b.high for b in f.bands] == [p[0].item() for p in value.tensor_split(3)]
        assert abs(sum(b.share for b in f.bands) - 1) < 1e-9 and all(b.low <= c.act <= b.high for b in f.bands for c in b.contexts) and all(len(b.contexts) == 2 for b in f.bands)
        assert len(f.random) == 5 and f.max == f.top[0].act and sum(f.hist) == found.counts[l] and f.hist[-1] > 0
        drawn = found.sample.notes["place"][l, found.sample.score[l] >= 0]
        shares = {o: s for o, s in together(found, l, 96)}
        slow = (truth.acts[drawn] > 0).float().mean(0)
        assert l not in shares and all(abs(slow[o] - s) < 1e-6 for o, s in shares.items())
        assert {o for o in range(96) if o != l and slow[o] > found.counts[o] / found.rows + 1e-6} == {*shares}
    silent = feature(found, 5)
    assert (silent.density, silent.max, silent.hist, silent.top, silent.random, silent.bands, silent.skew, silent.kurtosis, silent.word) == (0, 0, [], [], [], [], None, None, "")
    with pytest.raises(UserError, match="never fires"): silent.picture()


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_batches_do_not_matter(sae, lm, text, found, batch):
    "Another batch size ends with the same places and the same figures."
    other = collect(sae, lm, text, SITE, tokens=10**9, context=CONTEXT, top=6, sample=24, batch=batch)
    assert torch.equal(other.counts, found.counts) and other.hist.width == found.hist.width
    torch.testing.assert_close(other.sums, found.sums, rtol=1e-5, atol=1e-5)
    assert (other.sample.notes["place"] == found.sample.notes["place"]).float().mean() > .999
    torch.testing.assert_close(other.top.notes["value"], found.top.notes["value"], rtol=1e-4, atol=1e-5)


# --- the collector alone, on codes made by hand --------------------------------------------------------

def codes(seed, total=40, s=12, n=9, k=3, levels=4):
    "Windows and codes with few distinct values, so that there are many ties."
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 50, (total, s), generator=g)
    keep = torch.rand(total, s, generator=g) < .8
    value = torch.randint(0, levels, (total, s, k), generator=g) / 2
    index = torch.rand(total, s, n, generator=g).argsort(-1)[..., :k]
    spans = [[Span(0, s, f"d{i}")] for i in range(total)]
    return SimpleNamespace(ids=ids, keep=keep, value=value, index=index, spans=spans, n=n,
                           table=torch.zeros(total, s, n).scatter(-1, index, value).masked_fill(~keep[..., None], 0).flatten(0, 1))


def run(data, batch, **how):
    "What a collector finds when it is given `data` in batches of windows."
    c = Collector(data.n, **dict(top=3, sample=5, before=2, after=2) | how)
    for i in range(0, len(data.ids), batch):
        part = slice(i, i + batch)
        keep = data.keep[part]
        c(Windows(data.ids[part], keep, [s[0].doc for s in data.spans[part]], data.spans[part]), Code(data.value[part][keep], data.index[part][keep], data.n))
    return c


@pytest.mark.parametrize("seed", range(3))
def test_ties_and_batches_bit_for_bit(seed):
    "With many equal activations and any batches, every kept entry is the same; the earlier place wins."
    data = codes(seed)
    one = run(data, 40)
    for batch in (1, 3, 16):
        other = run(data, batch)
        for a, b in ((one.top.sorted(), other.top.sorted()), (one.sample.sorted(), other.sample.sorted())):
            assert torch.equal(a.score, b.score) and a.notes.keys() == b.notes.keys()
            for k in a.notes: assert torch.equal(a.notes[k].sort(-1).values if k == "beside" else a.notes[k], b.notes[k].sort(-1).values if k == "beside" else b.notes[k]), k
        assert torch.equal(one.hist.counts, other.hist.counts) and torch.equal(one.counts, other.counts)
        torch.testing.assert_close(one.sums, other.sums, rtol=1e-12, atol=0)
    by_window = data.table.view(40, 12, data.n)
    for l in range(data.n):
        best = sorted(((-by_window[w, :, l].max().item(), w * 12 + int(by_window[w, :, l].argmax())) for w in range(40) if by_window[w, :, l].max() > 0))[:3]
        assert one.top.notes["place"][l, :len(best)].tolist() == [p for _, p in best]


def test_activations_around_and_beside():
    "The noted activations are those of the table within the window, and the noted latents those of the token."
    data = codes(5)
    c = run(data, 7, sample=30)
    for best in (c.top, c.sample):
        for l, j in (best.score >= 0).nonzero().tolist():
            place = int(best.notes["place"][l, j])
            near = [place + o if 0 <= place % 12 + o < 12 else None for o in range(-2, 3)]
            assert best.notes["around"][l, j].tolist() == [0 if p is None else data.table[p, l].item() for p in near]
    for l, j in (c.sample.score >= 0).nonzero().tolist():
        on = c.sample.notes["beside"][l, j]
        assert sorted(on[on >= 0].tolist()) == data.table[c.sample.notes["place"][l, j]].nonzero()[:, 0].tolist()


def test_the_sample_is_uniform():
    "Over many seeds every firing of a latent is drawn equally often, whatever its strength; pairs of draws are independent."
    data = codes(1, total=12)
    fired = data.table[:, 0].nonzero()[:, 0]
    drawn, both, times, m = torch.zeros(len(data.table)), 0, 400, 5
    for seed in range(times):
        place = run(data, 6, seed=seed).sample.notes["place"][0]
        drawn[place] += 1
        both += int(torch.isin(fired[:2], place).all())
    expected = times * m / len(fired)
    chi = ((drawn[fired] - expected) ** 2).sum().item() / expected / (1 - m / len(fired))
    assert drawn.sum() == times * m == drawn[fired].sum() and abs(chi - len(fired)) < 5 * (2 * len(fired)) ** .5
    pair = times * m * (m - 1) / len(fired) / (len(fired) - 1)
    assert abs(both - pair) < 5 * pair ** .5 + 3


def test_memory_does_not_grow():
    "Besides four bytes for each token read, and the names of documents, a collector holds the same after a tenth and after all of a text."
    held = []
    for total in (40, 400):
        c = run(codes(2, total=total), 10)
        tensors = [c.counts, c.sums, c.largest, c.hist.counts, *(t for b in (c.top, c.sample) for t in (b.score, *b.notes.values()))]
        held.append(sum(t.numel() * t.element_size() for t in tensors))
        assert sum(i.numel() * i.element_size() for i in c.ids) == total * 12 * 4
    assert held[0] == held[1]


@pytest.mark.parametrize("scale", [1e-6, 1., 3e4])
def test_histograms_double(scale):
    "Whatever the order and scale of the values, the outcome is the histogram with the last width; borders belong to the bin below."
    g = torch.Generator().manual_seed(0)
    values = torch.cat([torch.rand(500, generator=g) ** 3 * scale, torch.tensor([.5, 1, 2]) * scale])
    latent = torch.randint(3, (len(values),), generator=g)
    for order in (values.argsort(), values.argsort(descending=True)):
        h = Histograms(3, 16)
        for part in order.split(50): h.add(latent[part], values[part])
        for l in range(3): assert h.counts[l].tolist() == torch.bincount((values[latent == l].double() / h.width).ceil().long() - 1, minlength=16).tolist()
        assert 8 * h.width < values.max() <= 16 * h.width
    h = Histograms(1, 4)
    h.add(torch.zeros(4, dtype=torch.long), torch.tensor([1., 2., 3., 4.]))
    assert h.width == 1 and h.counts[0].tolist() == [1, 1, 1, 1]


def test_best_keeps_the_best():
    "In any portions, and with more offers at once than there is room for."
    g = torch.Generator().manual_seed(0)
    value, latent = torch.randint(1, 30, (900,), generator=g) / 7, torch.randint(0, 4, (900,), generator=g).sort().values
    for m in (1, 5, 400):
        best, place = Best(6, m, place=torch.tensor(-1)), torch.arange(900)
        for part in torch.randperm(900, generator=g).split(170):
            part = part.sort().values
            which, *where = best.offer(latent[part], ranked(value[part], part))
            best.note(*where, place=part[which])
        best.sorted()
        for l in range(6):
            mine = sorted(place[latent == l].tolist(), key=lambda i: (-value[i].item(), i))[:m]
            assert best.notes["place"][l].tolist() == mine + [-1] * (m - len(mine))


def test_dictionaries_of_other_libraries(lm, text):
    "A dense code, a channel dictionary with negative values, and few rows."
    class Dense:
        def __init__(self): self.W = torch.randn(64, 40, generator=torch.Generator().manual_seed(0)) / 8
        def encode(self, rows): return (rows @ self.W).relu()
        def decode(self, acts): return acts @ self.W.T
    for sae, n in ((Dense(), 40), (Channels(), 64)):
        c = collect(sae, lm, text, SITE, tokens=600, context=CONTEXT)
        rows = torch.cat([lm.read(w[None].long(), SITE)[0, 1:] for w in c.ids])
        keep = (c.ids[:, 1:] != 0).flatten()
        dense = sae.encode(rows[keep]).clamp_min(0)
        assert c.rows == len(dense) and (c.counts - (dense > 0).sum(0)).abs().sum() <= 2
        np.testing.assert_allclose(c.figures["kurtosis"], ((dense.double() ** 4).mean(0) / (dense.double() ** 2).mean(0) ** 2), rtol=1e-3)
        assert feature(c, 3).top and c.sample.notes["beside"].shape[2] <= 64
        U = directions(sae, rows[:4])
        want = torch.eye(64) if n == 64 else sae.W.T / sae.W.T.norm(dim=1, keepdim=True)
        torch.testing.assert_close(U, want, rtol=1e-3, atol=1e-4)


def test_windows_without_an_opening_token():
    "Characters that lie across windows belong to the window in which they end, also where no token opens a window."
    tok = load_tokenizer()
    docs = [Document(f"{i}", t * 3) for i, t in enumerate(ZOO)]
    for opening in (True, False):
        if not opening: tok.bos_token = None
        c, k = Collector(4, top=1, sample=400, before=5, after=4), 0
        for w in windows(docs, tok, 7, 3):
            rows = int(w.keep.sum())
            c(w, Code(torch.ones(rows, 1), (torch.arange(k, k + rows) % 4)[:, None], 4))
            k += rows
        found, words = Collected.of(c, tok), Words(tok)
        texts = {d.name: words(tok(d.text, add_special_tokens=False)["input_ids"]) for d in docs}
        cs = [x for l in range(4) for x in contexts(found, found.sample, l)]
        assert len(cs) == k and int(found.ids[0, 0]) * opening == 0
        for x in (x for x in cs if x.place // 7 < len(found.ids) - 1): assert x.tokens == texts[x.doc][x.token - x.at:][:len(x.tokens)] and "".join(texts[x.doc]).count(x.text)
    with pytest.raises(UserError, match="text.windows"): c(Windows(w.ids, w.keep, w.docs), Code(torch.ones(rows, 1), torch.zeros(rows, 1, dtype=torch.long), 4))


# --- texts ---------------------------------------------------------------------------------------------

def test_words_are_exact():
    "Joined, the texts are the text, for any string and any cut of its tokens into calls that ends between characters."
    tok = load_tokenizer()
    words, g = Words(tok), np.random.default_rng(0)
    alphabet = [*"abc é日本🙂\n\t«שλ\u200b\ufffd👩\u200d<>&\"'", " the", "    ", "return", "\r\n"]
    for _ in range(200):
        text = "".join(g.choice(alphabet, g.integers(1, 30)))
        ids = tok(text, add_special_tokens=False)["input_ids"]
        closed = words.closed(ids)
        assert "".join(t for t, _ in closed) == text and closed[-1][1]
        for i, (_, shut) in enumerate(closed):
            if shut and "\ufffd" not in text: assert "".join(words(ids[:i + 1])) + "".join(words(ids[i + 1:])) == text
    assert words([]) == [] and "".join(words(tok("<|endoftext|>")["input_ids"])) == "<|endoftext|>"


def test_spans_name_every_token():
    "Whatever the lengths of documents and windows, every kept token has its document and number, and nothing else has one."
    tok = load_tokenizer()
    docs = [Document(f"{i}", "x = 1\n" * (i % 5)) for i in range(40)]
    own = {d.name: tok(d.text, add_special_tokens=False)["input_ids"] for d in docs}
    for context, batch in ((4, 3), (9, 1), (64, 16)):
        for w in windows(docs, tok, context, batch):
            for row, keep, spans, doc in zip(w.ids.tolist(), w.keep.tolist(), w.spans, w.docs):
                told = {p: own[s.doc][s.token + p - s.start] for s in spans for p in range(s.start, s.stop)}
                assert told == {p: t for p, (t, k) in enumerate(zip(row, keep)) if k} and doc in own
        taken = w.take(range(len(w))[:1])
        assert taken.spans == w.spans[:1] and taken.docs == w.docs[:1]


# --- what a latent does ----------------------------------------------------------------------------------

def test_effects_equal_an_intervention(sae, lm, found, truth):
    "Loss, KL and votes of a feature's contexts are those of a forward pass in which the latent is zeroed by hand."
    latent = striking(found, 3, most=.2)[0]
    f = with_effects(sae, lm, SITE, found.ids, feature(found, latent), top=2, random=1, T=5, words=3)
    assert f.top[2].effect is None and f.effect == pytest.approx(np.mean([sum(c.effect["kl"]) for c in f.top[:2]]))
    decode = lambda ids: [lm.tokenizer.decode([i]) for i in ids]
    for c in (*f.top[:2], f.random[0]):
        (w, p), T = divmod(c.place, CONTEXT), min(5, len(c.tokens) - c.at)
        ids = found.ids[w:w + 1].long()
        x = lm.read(ids, SITE)
        z = sae.encode(x[:, p]).dense()
        without = z.clone()
        without[0, latent] = 0
        scale = sae.encode(x[:, p]).normed.scale
        changed = x.clone()
        changed[:, p] += (without - z) @ sae.W_dec * scale
        with torch.no_grad(): a, b = (lm.logits(ids, SITE, lambda _: rows)[0, p:p + T] for rows in (x, changed))
        la, lb = a.log_softmax(-1), b.log_softmax(-1)
        np.testing.assert_allclose(c.effect["kl"], (la.exp() * (la - lb)).sum(-1).clamp_min(0), rtol=1e-3, atol=1e-6)
        for j, loss in enumerate(c.effect["loss"]):
            nxt = p + j + 1
            if nxt >= CONTEXT or not truth.keep[w, nxt]: assert loss is None
            else: assert loss == pytest.approx((la - lb)[j, ids[0, nxt]].item(), rel=1e-3, abs=1e-5)
        gain = (a - b) - (a - b).median(-1, keepdim=True).values
        for j in range(T):
            best = gain[j].topk(3)
            assert [v for _, v in c.effect["up_logits"][j]] == pytest.approx([v for v in best.values.tolist() if v > 0], rel=1e-3, abs=1e-4)
            likelier = (la.exp() - lb.exp())[j].topk(1)
            if likelier.values > 1e-4: assert c.effect["up_probs"][j][0][0] == decode(likelier.indices.tolist())[0]
        assert {*c.effect} == {*EFFECTS} and all(len(v) == T for v in c.effect.values())


def test_direct_effects(sae, lm, found):
    "A direction's logits are those of the unembedding, behind the linearised norm, and of a small push by hand."
    ids = found.ids[:8].long()
    J, U = direct_map(lm, ids), directions(sae, lm.read(ids, SITE).flatten(0, 1))
    torch.testing.assert_close(U, sae.W_dec, rtol=1e-3, atol=1e-5)
    mean = lm.read(ids, "resid_post.3")[:, 1:].flatten(0, 1).mean(0)
    f = lambda row: lm.model.lm_head(lm.model.transformer.ln_f(row.double()))
    lm.model.double()
    try: slope = torch.func.jacfwd(f)(mean.double()).float()
    finally: lm.model.float()
    want = (slope - slope.mean(0)) @ U[7]
    torch.testing.assert_close(U[7] @ J.T, want, rtol=.02, atol=.02 * want.abs().max().item())
    words = Words(lm.tokenizer)
    best = favoured(U[7] @ J.T, words, 4)
    assert [v for _, v in best["up"]] == (U[7] @ J.T).topk(4).values.tolist() and best["down"][0][1] == (U[7] @ J.T).min()
    assert best["up"][0][0] == words.decode([int((U[7] @ J.T).argmax())])


def test_neighbours_by_brute_force():
    "In any portions; a direction of zeros has none."
    U = torch.nn.functional.normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    U[3] = 0
    for room in (1, 200, 2**24):
        near = nearest(U, 5, room)
        for i in range(50):
            if i == 3: assert near[i] == []; continue
            slow = sorted(((U[i] @ U[j]).item(), j) for j in range(50) if j != i)[::-1][:5]
            assert [c for _, c in near[i]] == pytest.approx([c for c, _ in slow], abs=1e-6) and near[i][0][0] == slow[0][1]
    assert nearest(U[:1]) == [[]]


def test_one_call(sae, lm, text, tmp_path):
    "A payload on disk says what was collected and measured; it can be asked again, and knows when the SAE is another."
    seen = []
    def progress(items):
        for x in items: seen.append(1); yield x
    payload = write_features(sae, lm, text, SITE, tmp_path, tokens=3_000, context=CONTEXT, effects=4, explain=2, top=4, sample=16, progress=progress)
    c = collect(sae, lm, text, SITE, tokens=3_000, context=CONTEXT, top=4, sample=16)
    assert len(seen) >= 96 and (payload.n, payload.index["rows"], payload.index["k"], payload.index["d"], payload.index["bin"]) == (96, c.rows, 6, 64, c.hist.width)
    for name in ("density", "mean", "second", "skew", "kurtosis", "max"): np.testing.assert_allclose(payload.columns[name], c.figures[name], rtol=1e-6)
    for l in (0, 40, 95):
        f, g = payload.feature(l), feature(c, l)
        assert [x.text for x in f.contexts()] == [x.text for x in g.contexts()] and f.hist == g.hist and [o for o, _ in f.together] == [o for o, _ in g.together]
        np.testing.assert_allclose([x.act for x in f.contexts()], [x.act for x in g.contexts()], rtol=1e-4)
        np.testing.assert_allclose(np.concatenate([x.values for x in f.contexts()]), np.concatenate([x.values for x in g.contexts()]), rtol=1e-4)
        assert f.logits["up"][0][1] > 0 > f.logits["down"][0][1] and len(f.neighbours) == 8
    measured = np.flatnonzero(~np.isnan(payload.columns["effect"])).tolist()
    assert sorted(striking(c, 4)) == measured and all(payload.feature(l).top[0].effect for l in measured)
    live = Live(sae, lm, payload)
    f = live.effect_of(measured[0], top=3)
    assert f.effect == pytest.approx(payload.feature(measured[0]).effect, rel=1e-3)
    silent = live.effect_of(5)
    assert silent.effect is None and silent.top == []
    said = live.read("naïve 日本\n" * 20)
    ids = lm.tokenizer("naïve 日本\n" * 20, add_special_tokens=False)["input_ids"]
    assert "".join(said["tokens"]) == "naïve 日本\n" * 20 and len(said["latents"]) == len(said["values"]) == len(ids) > CONTEXT
    code = sae.encode(lm.read(torch.tensor([[0, *ids[:CONTEXT - 1]]]), SITE)[0, 1:])
    assert said["values"][3] == pytest.approx(code.values[3].sort(descending=True).values.tolist()) and live.read("") == dict(tokens=[], latents=[], values=[])
    assert np.load(tmp_path / "windows.npy").tolist() == c.ids.tolist()
    (tmp_path / "windows.npy").unlink()
    with pytest.raises(UserError, match="windows.npy of"): Live(sae, lm, payload).effect_of(3)
    with pytest.raises(UserError, match="64 latents but the payload 96"): Live(Channels(), lm, payload)
    with pytest.raises(UserError, match="where they stand"): with_effects(sae, lm, SITE, c.ids, made_feature(0))


def test_explanations(sae, lm, text, found):
    "Patterns are built from the collected firings and judged; none asked, none given."
    why = explanations(sae, lm, text, SITE, found, [0, 1], CONTEXT, tokens=1_000)
    assert {*why} <= {0, 1} and why and all(w["text"] and (w["recall"] is None or 0 <= w["recall"] <= 1) for w in why.values())
    assert explanations(sae, lm, text, SITE, found, []) == {} and explanations(sae, lm, text, SITE, found, [5], CONTEXT, tokens=500) == {}


def test_a_latent_without_patterns_is_described_by_what_it_fires_on(found, lm):
    "The tokens of the drawn firings, counted by hand; all firings of latent 5, which has none, are described by nothing."
    rare = min((i for i in range(96) if i != 5), key=lambda i: found.counts[i] if found.counts[i] else 10**9)
    for i in (0, 40, rare):
        drawn = [p for p, score in zip(found.sample.notes["place"][i].tolist(), found.sample.score[i].tolist()) if score >= 0]
        tokens = [found.ids[p // CONTEXT, p % CONTEXT].item() for p in drawn]
        said, first = described(found, i), max(tokens, key=tokens.count)
        start, _, rest = said["text"].partition(": ")
        assert start == f"of {len(drawn)} firings" and said["precision"] is said["recall"] is None
        if tokens.count(first) > 1:
            count, _, word = rest.split(", ")[0].partition(" at ")
            assert int(count) == tokens.count(first) and rest.count(" at ") <= 3
            assert ast.literal_eval(word) in {lm.tokenizer.decode([t]) for t in tokens if tokens.count(t) == tokens.count(first)}
        else: assert rest == "no token twice"
    assert described(found, 5) is None


def test_short_numbers_are_made_exact(lm):
    "A model in bfloat16 is copied for interventions, one in float32 is not."
    short = LM(load_lm("pylib-64", device="cpu", dtype="bfloat16").model, lm.tokenizer, "short")
    assert exact(lm) is lm and exact(short).dtype == torch.float32 and short.dtype == torch.bfloat16


def test_a_text_without_a_window(sae, lm):
    "Too short a text is told in a sentence."
    with pytest.raises(UserError, match="less than one window"): collect(sae, lm, Text("short", lambda: iter([Document("a", "x")]), lambda i, d: False), SITE)
    with pytest.raises(UserError, match="at least one place"): Collector(4, top=0)
    for bad in (float("nan"), float("inf")):
        data = codes(0)
        data.value[3, data.keep[3]] = bad
        with pytest.raises(UserError, match="NaN or infinity"): run(data, 8)
    with pytest.raises(UserError, match="nothing was collected"): Collected.of(Collector(4), lm.tokenizer)


# --- files -----------------------------------------------------------------------------------------------

def test_made_payloads(tmp_path):
    "Synthetic payloads round trip, with every awkward text in them, also above a thousand latents."
    payload = made(tmp_path / "a", 70, shard=16)
    for i in (0, 3, 15, 16, 69):
        f, g = payload.feature(i), made_feature(i, n=70, many=True)
        assert f.hist == g.hist and f.bin == .25 and [c.tokens for c in f.contexts()] == [c.tokens for c in g.contexts()] and f.word == payload.tokens[i] == g.word
        assert [c.effect is None for c in f.top] == [c.effect is None for c in g.top] and (f.explanation or {}).get("text", "") == payload.explanations[i]
        np.testing.assert_allclose([x for c in f.contexts() for x in c.values], [x for c in g.contexts() for x in c.values], rtol=1e-4)
    assert {t for f in map(payload.feature, range(70)) for c in f.contexts() for t in c.tokens} == {t for ts in TEXTS for t in ts}
    many = made(tmp_path / "b", 2_500, shard=16)
    assert many.n == len(many.columns["max"]) == len(many.tokens) == 2_500 and many.feature(2_499).id == 2_499 and many.feature(1_030).hist == many.feature(6).hist


def test_nothing_but_the_index_is_read(tmp_path, monkeypatch):
    "Opening reads one file; a latent reads its own shard, once."
    made(tmp_path, 100, shard=10)
    read = []
    import sae_nb.features
    plain = sae_nb.features.read_json
    monkeypatch.setattr(sae_nb.features, "read_json", lambda p: (read.append(p.name), plain(p))[1])
    payload = Payload.open(tmp_path)
    assert read == ["index.json"] and len(payload) == 100
    payload.feature(57), payload.feature(58), payload.feature(99)
    assert read == ["index.json", "00005.json", "00009.json"]


def test_an_empty_payload(tmp_path):
    "No latents: it opens, and says so when asked for one."
    payload = write_payload(tmp_path, about(), [])
    assert payload.n == 0 and len(payload.columns["density"]) == 0
    with pytest.raises(UserError, match="empty"): payload.feature(0)


def test_a_killed_writer_leaves_the_old_payload(tmp_path):
    "An error half-way changes nothing; notes stay when it is written again."
    made(tmp_path, 20)
    (tmp_path / "notes.json").write_text('{"3": "mine"}')
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    def dies():
        yield from map(made_feature, range(100))
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): write_payload(tmp_path, about(), dies())
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert write_payload(tmp_path, about(8), map(made_feature, range(10))).n == 10
    assert (tmp_path / "notes.json").exists() and sorted(os.listdir(tmp_path / "shards")) == ["00000.json", "00001.json"]
    with pytest.raises(UserError, match="in order"): write_payload(tmp_path / "x", about(), [Feature(1), Feature(0)])


@pytest.mark.parametrize("damage, says", [
    (lambda f: (f / "index.json").unlink(), "no index.json"),
    (lambda f: (f / "index.json").write_text('{"format": '), "not readable as JSON"),
    (lambda f: (f / "index.json").write_text('{"format": "other"}'), "no features of ours"),
    (lambda f: edit(f / "index.json", version=3), "version 3"),
    (lambda f: edit(f / "index.json", n=31), "do not belong together"),
    (lambda f: edit(f / "index.json", tokens=[]), "do not belong together"),
    (lambda f: edit(f / "index.json", columns={}), "do not belong together"),
    (lambda f: edit(f / "index.json", columns=dict.fromkeys(COLUMNS, "%%%")), "do not belong together"),
    (lambda f: (f / "shards/00001.json").unlink(), "00001.json does not exist"),
    (lambda f: (f / "shards/00001.json").write_bytes((f / "shards/00001.json").read_bytes()[:99]), "not readable as JSON"),
    (lambda f: (f / "shards/00001.json").write_bytes((f / "shards/00000.json").read_bytes()), "belongs to another index"),
    (lambda f: edit(f / "shards/00001.json", words=[]), "shard 1 .* damaged"),
    (lambda f: edit(f / "index.json", rows=5), "does not fit its digest"),
    (lambda f: edit(f / "index.json", shard="10"), "do not belong together"),
    (lambda f: edit(f / "index.json", lm=None), "do not belong together"),
    (lambda f: drop(f / "index.json", "digest"), "does not fit its digest"),
    (lambda f: drop(f / "index.json", "sources"), "does not fit its digest"),
    (lambda f: drop(f / "index.json", "bin"), "do not belong together"),
    (lambda f: (f / "index.json").write_text("[" * 100_000), "nested too deeply|not readable"),
    (lambda f: (f / "shards/00001.json").write_text('{"a":' * 100_000), "nested too deeply|not readable"),
    (lambda f: flip(f / "shards/00001.json"), "damaged"),
    (lambda f: edit(f / "shards/00001.json", latents=3), "damaged"),
])
def test_damage_is_told_in_a_sentence(tmp_path, damage, says):
    "Files that are missing, cut off, of another version, or from elsewhere."
    made(tmp_path, 30, shard=10)
    damage(tmp_path)
    with pytest.raises(UserError, match=says) as e: Payload.open(tmp_path).feature(12)
    assert "\n" not in str(e.value)


def drop(path, name):
    "Take one name out of a JSON file."
    content = json.loads(path.read_text(encoding="utf-8"))
    del content[name]
    path.write_text(json.dumps(content), encoding="utf-8")


def flip(path):
    "Change one digit of an activation."
    text = path.read_text(encoding="utf-8")
    at = text.index('"act":') + 6
    path.write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1:], encoding="utf-8")


def test_every_byte_counts(tmp_path):
    "Damage at any place of any file of a payload is told, and never as a traceback."
    payload = made(tmp_path, 20, shard=8)
    want = [payload.feature(i) for i in range(20)]
    rng = np.random.default_rng(0)
    for path in [tmp_path / "index.json", *sorted((tmp_path / "shards").iterdir())]:
        whole = path.read_bytes()
        for at in rng.integers(len(whole), size=20):
            kind = rng.integers(3)
            path.write_bytes(whole[:at] if kind == 0 else whole[:at] + bytes([whole[at] ^ 1 << int(rng.integers(8))]) + whole[at + 1:] if kind == 1 else whole[:at] + whole[at + 9:])
            try: [Payload.open(tmp_path).feature(i) for i in range(20)]
            except UserError as e: assert "\n" not in str(e)
            else: pytest.fail(f"byte {at} of {path.name} was changed and nobody noticed")
        path.write_bytes(whole)
    assert [f.word for f in want] == [Payload.open(tmp_path).feature(i).word for i in range(20)]


@pytest.mark.parametrize("foreign", ["paper.tex", "windows.npy", "shards/mine.json", "shards/00000.json", "shards/00000.js", ".shards.1.tmp", "index.json"])
def test_foreign_folders_are_left_alone(tmp_path, foreign):
    "A folder that holds anything else is refused before a byte in it has changed."
    path = tmp_path / foreign
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"mine": 1}')
    with pytest.raises(UserError, match="name a|move it away"): write_payload(tmp_path, about(), map(made_feature, range(3)))
    assert path.read_text() == '{"mine": 1}' and len([p for p in tmp_path.rglob("*") if p.is_file()]) == 1


def test_foreign_files_beside_ours_are_left_alone(tmp_path):
    "In a folder of ours as well; a link is not followed."
    made(tmp_path / "a", 3)
    (tmp_path / "a" / "shards" / "mine.json").write_text("1")
    with pytest.raises(UserError, match="mine.json, which is not ours"): made(tmp_path / "a", 3)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "00000.json").write_text("mine")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "shards").symlink_to(elsewhere)
    with pytest.raises(UserError, match="is a link"): made(tmp_path / "b", 3)
    (tmp_path / "c").write_text("")
    with pytest.raises(UserError, match="is a file"): made(tmp_path / "c", 3)
    assert (elsewhere / "00000.json").read_text() == "mine" and (tmp_path / "a" / "shards" / "mine.json").exists()


KILLED = """
import os, signal, sys
from sae_nb import core, features
from payloads import about, feature
names, at = "unlink rename replace mkdir rmdir".split(), int(sys.argv[2])
count = 0
def step(real):
    def stepped(*a, **k):
        global count
        count += 1
        if count == at: os.kill(os.getpid(), signal.SIGKILL)
        return real(*a, **k)
    return stepped
for name in names: setattr(os, name, step(getattr(os, name)))
features.write_payload(sys.argv[1], about(4), map(feature, range(int(sys.argv[3]))))
print("done")
"""


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
def test_killed_at_any_step_it_can_be_written_again(tmp_path, at):
    "A killed writer leaves the old payload, or a folder that is written again; nothing stays behind."
    folder = tmp_path / "features"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), str(Path(__file__).parent)])}
    made(folder, 12, shard=4)
    (folder / "notes.json").write_text("{}")
    done = subprocess.run([sys.executable, "-c", KILLED, folder, str(at), "8"], env=env, capture_output=True, text=True)
    assert done.returncode == -9 or done.stdout == "done\n", done.stderr
    if (folder / "index.json").exists():
        payload = Payload.open(folder)
        assert [payload.feature(i).id for i in range(payload.n)] == [*range(payload.n)] and payload.n in (12, 8)   # whole
    assert made(folder, 5, shard=4).feature(4).id == 4
    assert {p.name for p in folder.iterdir()} == {"index.json", "shards", "notes.json", ".lock"} and len(list((folder / "shards").iterdir())) == 2


def test_two_writers_at_once(tmp_path):
    "The second is told, and the first ends as if alone."
    def twice():
        yield made_feature(0)
        with pytest.raises(UserError, match="another process"): write_payload(tmp_path, about(), map(made_feature, range(2)))
        yield made_feature(1)
    assert write_payload(tmp_path, about(), twice()).n == 2


def test_a_payload_knows_what_it_was_made_from(tmp_path):
    "Another's weights or model are refused by name; what is not known is not compared."
    payload = write_payload(tmp_path, about() | {"made_from": {"weights": "a", "model": "b"}}, map(made_feature, range(2)), {"more.bin": b"123"})
    payload.made_by(weights="a", model="b")
    payload.made_by(weights=None, text="c")
    with pytest.raises(UserError, match="differs in model"): payload.made_by(weights="a", model="c")
    assert payload.file("more.bin") == b"123"
    (tmp_path / "more.bin").write_bytes(b"124")
    with pytest.raises(UserError, match="more.bin .* is damaged"): payload.file("more.bin")
    with pytest.raises(UserError, match="keeps no other.bin"): payload.file("other.bin")


@pytest.mark.parametrize("latent", [np.int64(1), np.int32(1), torch.tensor(1), np.array(1)])
def test_numbers_of_numpy_and_torch_name_a_latent(tmp_path, latent):
    assert made(tmp_path / "~", 3).feature(latent).id == 1


@pytest.mark.parametrize("latent", [1.5, "1", None, True, float("nan"), 10**30, -1])
def test_what_is_no_number_of_a_latent(tmp_path, latent):
    with pytest.raises(UserError, match="whole number|choose from"): made(tmp_path, 3).feature(latent)


def test_a_home_is_understood(tmp_path, monkeypatch):
    "`~` and paths are taken."
    monkeypatch.setenv("HOME", str(tmp_path))
    made("~/features", 3)
    assert (tmp_path / "features" / "index.json").exists() and Payload.open("~/features").n == 3


def test_characters_that_are_none(tmp_path):
    "Half a surrogate, as a file name may hold, does not lose what was collected."
    odd = Feature(0, top=[Context(["a\udc80"], [1.], 0, 1., doc="\udcff.txt")])
    assert write_payload(tmp_path, about(), [odd]).feature(0).top[0].doc == "\udcff.txt"


def edit(path, **changes): path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def test_columns_and_numbers():
    "Columns survive as float32 with NaN; unknown latents and moments of silence are no numbers."
    x = np.array([1.5, np.nan, 1e-30], dtype=np.float32)
    np.testing.assert_array_equal(decode_column(encode_column(x)), x)
    assert np.isnan(moments(10, [[0.]] * 4)["kurtosis"][0]) and moments(4, [[4.], [4.], [4.], [4.]])["skew"][0] == 1
    payload = Payload.in_memory(about(), [made_feature(i) for i in range(5)])
    for wrong in (-1, 5): pytest.raises(UserError, payload.feature, wrong)
    f = Feature(0, top=[Context(["a"], [1.], 0, 1., effect=dict(loss=[float("nan")]))], skew=float("inf"))
    d = pack(f, words := {})
    assert d["skew"] is None and d["top"][0]["effect"]["loss"] == [None] and unpack(json.loads(json.dumps(d)), [*words], 1.).top[0].tokens == ["a"]


# --- OpenAI's files, made by hand after the viewer's source ---------------------------------------------

def openai(effects=True, T=6, at=2):
    "A feature as OpenAI's viewer reads it."
    s = dict(doc_id=7, idx=at, act=3.5, acts=[0, -.2, 3.5, 0, 1.25, 0], tokens=["<b>", "a", "é", "\n", " x", "y"], token_ints=[*range(T)], density=.1)
    if effects:
        s |= dict(ablate_loss_diff=[float(i) for i in range(T - 1)], kl=[i / 10 for i in range(T - 1)])
        for way, sign in (("up", 1), ("down", -1)):
            for by in ("logits", "probs"): s |= {f"top_{way}vote_tokens_{by}": [[f"{way}{i}"] for i in range(T - 1)], f"top_{way}votes_{by}": [[sign * float(i)] for i in range(T - 1)]}
    return dict(density=.1, mean_act=.2, mean_act_squared=.9, skew=4., kurtosis=30., hist={"0": 90, "3": 5, "18": 2}, random=[s], top=[s | dict(act=1.), s])


def test_openai_features(tmp_path):
    "Every field arrives; effects start at the ablated token; the number is the file's; the histogram's bins are ours."
    (tmp_path / "123-ablated.json").write_text(json.dumps(openai()))
    f = read_openai(tmp_path / "123-ablated.json")
    assert (f.id, f.density, f.mean, f.second, f.skew, f.kurtosis, f.max, f.bin) == (123, .1, .2, .9, 4., 30., 3.5, .2)
    assert f.hist == [0, 0, 5] + [0] * 14 + [2] and f.hist[int(np.ceil(3.5 / .2)) - 1] == 2
    c = f.top[0]
    assert (c.act, c.at, c.doc, c.token, c.values, c.text) == (3.5, 2, "7", 2, [0, 0, 3.5, 0, 1.25, 0], "<b>aé\n xy")
    assert c.effect["loss"] == [2., 3., 4.] and c.effect["kl"] == [.2, .3, .4] and c.effect["up_logits"][0] == [["up2", 2.]] and c.effect["down_probs"][2] == [["down4", 4.]]
    assert f.effect == pytest.approx(.9) and len(f.random) == 1
    plain = read_openai(openai(effects=False), id=4)
    assert plain.id == 4 and plain.effect is None and plain.top[0].effect is None
    payload = write_payload(tmp_path / "p", dict(bin=.2), [read_openai(openai(), id=0)])
    assert payload.feature(0).top[0].effect["kl"] == [.2, .3, .4] and payload.feature(0).top[0].text == c.text


@pytest.mark.parametrize("wrong", [{}, {"density": 1}, dict(openai(), hist=[1, 2]), dict(openai(), top=[{"tokens": []}])])
def test_openai_features_that_are_none(wrong):
    "Something else is told in a sentence."
    with pytest.raises(UserError, match="no feature file of OpenAI's viewer"): read_openai(wrong)


def test_a_text_without_held_out_windows_leaves_the_rest_standing(sae, lm, text, tmp_path):
    "Explanations need held-out text; without any the features are written all the same, and say why."
    bare = Text("nothing held out", lambda: text.documents(), lambda i, d: False)
    payload = write_features(sae, lm, bare, SITE, tmp_path / "f", tokens=2_000, context=CONTEXT, effects=0, explain=4)
    about = payload.index["sources"]
    assert payload.n == 96 and about["explained"] == 0 and len(about["not_explained"]) > 20


def test_all_documents_are_read_from(sae, lm):
    "A few windows come from all over the text, not from its head; the seed, and only the seed, changes which."
    docs = [Document(f"{i:03}", f"def function_{i}(x):\n    return x + {i}\n" * 8) for i in range(120)]
    many = Text("many", lambda: iter(docs), lambda i, d: i % 2 == 0)
    read = lambda **how: collect(sae, lm, many, SITE, **dict(tokens=600, context=CONTEXT) | how)
    one, again, other, held = read(), read(batch=3), read(seed=1), read(held_out=True)
    numbers = lambda c: [int(span.doc) for spans in c.spans for span in spans]
    assert one.documents > 12 and max(numbers(one)) > 90 and min(numbers(one)) < 30 and numbers(one) == sorted(numbers(one)) and 600 <= one.rows < 700
    assert torch.equal(one.ids, again.ids) and numbers(one) == numbers(again) and numbers(one) != numbers(other)
    assert {i % 2 for i in numbers(one)} == {1} and {i % 2 for i in numbers(held)} == {0}


def test_no_half_of_a_character_is_shown(sae, lm):
    "Windows whose neighbours were not read show whole characters, and nothing for the halves at their edges."
    docs = [Document(str(i), "吾輩は猫である。名前はまだ無い。" * 9) for i in range(60)]
    c = collect(sae, lm, Text("cats", lambda: iter(docs), lambda i, d: False), SITE, tokens=300, context=16)
    shown = [x for l in range(96) for best in (c.top, c.sample) for x in contexts(c, best, l)]
    assert len(shown) > 100 and not any("\ufffd" in x.text for x in shown) and all(x.text in docs[0].text for x in shown)


def test_rows_far_outside_are_left_out_and_counted(sae, lm, text, tmp_path, monkeypatch):
    "They stand in no figure and no context, and the payload says how many there were."
    import sae_nb.collect as module
    w = next(windows(text.documents(), lm.tokenizer, CONTEXT, 999))
    norms = lm.read(w.ids, SITE).norm(dim=-1)
    limit = norms[w.keep].quantile(.7).item()
    monkeypatch.setattr(module, "norm_limit", lambda *a: limit)
    c = collect(sae, lm, text, SITE, tokens=10**9, context=CONTEXT, batch=999)
    assert c.left_out == int((norms[w.keep] > limit).sum()) > 100 and c.rows + c.left_out == int(w.keep.sum())
    places = torch.cat([b.notes["place"][b.score >= 0] for b in (c.top, c.sample)])
    assert (norms.flatten()[places] <= limit * 1.001).all() and c.counts.sum() == 6 * c.rows - (sae.encode(lm.read(w.ids, SITE)[w.keep & (norms <= limit)]).values == 0).sum()
    sources = write_features(sae, lm, text, SITE, tmp_path / "f", tokens=1_000, context=CONTEXT, effects=0, explain=0).index["sources"]
    assert sources["left_out"] > 0 and sources["documents"] > 10


def test_contexts_of_a_band_are_drawn_from_it(found):
    "They are the band's first in random order, not its strongest: their ranks within the band are those of chance."
    ranks = []
    for l in range(96):
        value = found.sample.notes["value"][l, found.sample.score[l] >= 0]
        if len(value) < 24: continue
        order = value.argsort(descending=True, stable=True)
        for j, band in enumerate(feature(found, l).bands):
            mine = order[6 * j:6 * j + 6]
            want = sorted(value[mine.sort().values[:2]].tolist(), reverse=True)
            assert [c.act for c in band.contexts] == want
            ranks += [(value[mine] > c.act).float().sum().item() for c in band.contexts]
    assert len(ranks) > 200 and abs(np.mean(ranks) - 2.5) < 5 * (35 / 12 / len(ranks)) ** .5


def test_firing_together_is_ordered_by_what_exceeds_chance():
    "A latent that fires everywhere comes behind a rare one that fires here; one that fires less than by chance is not named."
    beside = torch.tensor([[[0, 1, 2], [0, 1, -1], [0, 1, -1], [0, -1, 3]]])   # with latent 0: 1 on three of four, 2 and 3 on one
    counts = torch.tensor([4, 700, 10, 400])
    c = SimpleNamespace(rows=1_000, counts=counts, sample=SimpleNamespace(score=torch.ones(1, 4, dtype=torch.long), notes={"beside": beside}))
    assert together(c, 0) == [[2, .25], [1, .75]] and together(c, 0, 1) == [[2, .25]]


def test_precision_is_precision_and_recall_recall(sae, lm, text, found, monkeypatch):
    "As the score on held-out text names them."
    import sae_nb.dossier as dossier
    latents = striking(found, 6)
    real = dossier.score
    seen = {}
    def kept(*a, **k):
        out = real(*a, **k)
        seen.update({r["latent"]: r for r in out.each.rows})
        return out
    monkeypatch.setattr(dossier, "score", kept)
    why = explanations(sae, lm, text, SITE, found, latents, CONTEXT, tokens=4_000)
    assert why and all((w["precision"], w["recall"]) == (seen[l]["precision"], seen[l]["recall"]) for l, w in why.items())
    assert any(w["precision"] != w["recall"] for w in why.values())
    rows = [dict(latent=l, precision=.9, recall=.1) for l in latents]
    monkeypatch.setattr(dossier, "score", lambda *a, **k: SimpleNamespace(each=SimpleNamespace(rows=rows)))
    assert all((w["precision"], w["recall"]) == (.9, .1) for w in explanations(sae, lm, text, SITE, found, latents, CONTEXT).values())


def test_effects_of_a_model_in_bfloat16_are_those_in_float32(sae, lm, text, tmp_path):
    "Written ones and ones asked for later: the votes and losses of an exact copy."
    short, full = (LM(load_lm("pylib-64", device="cpu", dtype="bfloat16").model, lm.tokenizer, "short") for _ in range(2))
    full = LM(full.model.float(), lm.tokenizer, "short")
    payload = write_features(sae, short, text, SITE, tmp_path, tokens=1_500, context=CONTEXT, effects=2, explain=0)
    ids = torch.from_numpy(np.load(tmp_path / "windows.npy").astype(np.int64))
    measured = np.flatnonzero(~np.isnan(payload.columns["effect"])).tolist()
    for f in (payload.feature(measured[0]), Live(sae, short, payload).effect_of(measured[1])):
        want = with_effects(sae, full, SITE, ids, f)
        np.testing.assert_allclose(f.top[0].effect["kl"], want.top[0].effect["kl"], rtol=1e-3, atol=1e-7)
        assert f.effect == pytest.approx(want.effect, rel=1e-3) and short.dtype == torch.bfloat16


@pytest.mark.parametrize("how, says", [(dict(tokens=0), "tokens is 0"), (dict(before=-1), "before is -1"), (dict(top=10**9), "GB of memory"), (dict(beside=0), "beside is 0")])
def test_sizes_that_cannot_be(sae, lm, text, how, says):
    with pytest.raises(UserError, match=says): collect(sae, lm, text, SITE, **dict(tokens=100, context=CONTEXT) | how)


def test_a_foreign_folder_is_told_before_anything_is_read(sae, lm, text, tmp_path, monkeypatch):
    import sae_nb.dossier as dossier
    (tmp_path / "thesis.tex").write_text("mine")
    monkeypatch.setattr(dossier, "collect", lambda *a, **k: pytest.fail("collected first"))
    with pytest.raises(UserError, match="thesis.tex"): write_features(sae, lm, text, SITE, tmp_path)
    with pytest.raises(UserError, match="T is 0"): write_features(sae, lm, text, SITE, tmp_path / "new", T=0)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_numbers_of_numpy_and_torch_are_taken(sae, lm, text, tmp_path):
    "In every place of `write_features`, and the index is strict JSON."
    n = np.int64
    payload = write_features(sae, lm, text, SITE, tmp_path / "f", tokens=n(500), context=n(CONTEXT), effects=torch.tensor(2), explain=n(0), seed=n(3), T=n(2), shard=n(50), top=n(3), sample=n(8))
    index = json.loads((tmp_path / "f" / "index.json").read_text(encoding="utf-8"), parse_constant=lambda x: pytest.fail(x))
    assert index["sources"]["seed"] == 3 and index["shard"] == 50 and index["context"] == CONTEXT and payload.feature(n(7)).id == 7
    for path in (tmp_path / "f" / "shards").iterdir(): json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda x: pytest.fail(x))
    live = Live(sae, lm, payload)
    assert live.effect_of(n(int(np.nanargmax(payload.columns["max"])))).effect is not None
    with pytest.raises(UserError, match="give one string"): live.read(3)
    with pytest.raises(UserError, match="at least 0"): striking(collect(sae, lm, text, SITE, tokens=100, context=CONTEXT), -1)


def test_the_seed_changes_the_random_places_alone(sae, lm, text):
    "All of a text read with two seeds: the same figures and strongest places, other random ones; with one seed, the same."
    one, again, other = (collect(sae, lm, text, SITE, tokens=10**9, context=CONTEXT, sample=8, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one.ids, other.ids) and torch.equal(one.counts, other.counts) and torch.equal(one.top.notes["place"], other.top.notes["place"])
    assert torch.equal(one.sample.notes["place"], again.sample.notes["place"])
    many = one.counts > 80
    assert many.sum() > 20 and (one.sample.notes["place"][many] == other.sample.notes["place"][many]).float().mean() < .2


def test_the_effect_sums_up_the_strongest_contexts(sae, lm, found):
    "Mean over the measured top contexts of their summed KL; the random ones beside them do not enter."
    f = with_effects(sae, lm, SITE, found.ids, feature(found, striking(found, 1)[0]), top=2, random=2, T=3)
    kls = [sum(c.effect["kl"]) for c in f.top[:2]]
    assert f.effect == pytest.approx(sum(kls) / 2) and f.effect != pytest.approx(sum(sum(c.effect["kl"]) for c in f.random[:2]) / 2)
    assert [c.effect is not None for c in f.top] == [True, True] + [False] * (len(f.top) - 2) and [c.effect is not None for c in f.random[:3]] == [True, True, False]


def test_notes_of_two_explorers_are_all_kept(tmp_path):
    "Each writes what it changed while the other does the same."
    import threading
    from payloads import made
    from sae_nb.widgets.explorer import Explorer, read_notes
    folder = made(tmp_path, n=100).folder
    def write(start):
        e = Explorer(folder)
        for i in range(start, start + 20): e.notes = {**e.notes, i: f"note {i}"}
    threads = [threading.Thread(target=write, args=(start,)) for start in (0, 50)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert set(read_notes(folder)) == {*range(20), *range(50, 70)}


def test_the_index_quotes_the_strongest_firings(tmp_path):
    "Six tokens on each side of the three strongest, each stretch once; an index of an earlier version has none."
    words = [f"w{i} " for i in range(40)]
    at = lambda i, doc="a": Context(words, [0.] * 40, i, 1., doc, i)
    loud = Feature(0, top=[at(20), at(20, "b"), at(2), at(30)])
    payload = write_payload(tmp_path, {}, [loud, Feature(1)])
    assert payload.quotes == ["".join(words[14:27]) + " … " + "".join(words[:9]), ""]
    old = {name: part for name, part in payload.index.items() if name != "quotes"}
    write_json(tmp_path / "index.json", _sealed(old))
    assert Payload.open(tmp_path).quotes == ["", ""]
    write_json(tmp_path / "index.json", _sealed(old | {"quotes": ["one"]}))
    with pytest.raises(UserError, match="do not belong together"): Payload.open(tmp_path)

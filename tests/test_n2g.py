"Explanations by n-grams: the matcher against brute force, known latents, samples that nothing accidental touches, and bad input."
import inspect
import json
import math
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch

from sae_nb.core import UserError, generator
from sae_nb.lm import load_lm
from sae_nb.n2g import START, Examples, Explanation, Pattern, cells, chosen, coded, collect, end_activation, explain, neutral_token, shorten, wrapped
from sae_nb.sae import SAE, Channels, Code, SAEConfig, init_
from sae_nb.simulate import Followers, Grammar, Peaks, explanation_loss, followers, rescaled, score, shuffled, simulate
from sae_nb.sampling import spread
from sae_nb.text import Document, Text, load_text, windows

SITE = "resid_post.2"


@pytest.fixture(scope="module")
def lm(): return load_lm("pylib-64", "cpu", "float32")


@pytest.fixture(scope="module")
def text(): return load_text("pylib")


@pytest.fixture(scope="module")
def sae(lm, text):
    "An untrained SAE: its latents are active, and that is all that most tests want."
    w = next(windows(text.documents(), lm.tokenizer, 64, 32))
    rows = lm.read(w.ids, SITE)[w.keep].float()
    return init_(SAE(SAEConfig(d=64, n=256, k=6)), rows).requires_grad_(False)


@pytest.fixture(scope="module")
def tables(lm, text): return followers(text, lm.tokenizer, context=64, tokens=20_000)


@dataclass
class Words:
    "A model whose activation is the token and the two before it."
    tokenizer: object
    device: str = "cpu"
    context: int = None

    def read(self, ids, site): return torch.stack([cells(ids, j)[:, :ids.shape[1]] for j in range(3)], -1).float()


@dataclass
class Rules:
    "Latents by rule: each is 1 where its rule holds."
    rules: list

    def encode(self, rows): return torch.stack([rule(*rows.T) for rule in self.rules], 1).float()
    def decode(self, code): return torch.zeros(len(code), 3)


def grammar_of(seed, count=25, vocabulary=4, longest=5, opening=None):
    "Random patterns: wildcards anywhere, some tied to the start, some nothing but wildcards."
    rng = generator(seed, "grammar")
    draws = []
    for i in range(count):
        tokens = torch.randint(0, vocabulary + 1, (1 + int(torch.randint(0, longest, (), generator=rng)),), generator=rng).tolist()
        draws.append((tuple(None if t == vocabulary or i % 11 == 10 else t for t in tokens), i % 4 == 3))
    return Explanation(tuple(Pattern(t, i + 1., s) for i, (t, s) in enumerate(dict.fromkeys(draws))), opening=opening)


def brute(explanation, row):
    "Every pattern at every place of a list of tokens, told in the simplest way; the preferred one speaks."
    outside = 1 if explanation.opening is not None and row[0] == explanation.opening else 0
    out = [0.] * len(row)
    for i in range(outside, len(row)):
        before, best = row[outside:i + 1], None
        for p in explanation.patterns:
            n = len(p.tokens)
            if n > len(before) or p.start and n != len(before): continue
            if any(t is not None and t != have for t, have in zip(p.tokens, before[-n:])): continue
            rank = [t is None for t in p.tokens[::-1]] + [False] * p.start
            if best is None or rank < best: best, out[i] = rank, p.value
    return out


def greedy(explanation, row):
    "The released matcher: a walk down the tree that never goes back."
    trie = {}
    for p in explanation.patterns:
        node = trie
        for t in p.back: node = node.setdefault(t, {})
        node["value"] = p.value
    def walk(before):
        node = trie
        for t in before[::-1]:
            node = node.get(t, node.get(None))
            if node is None: return 0.
            if "value" in node: return node["value"]
        return node.get(START, {}).get("value", 0.)
    return [walk(row[:i + 1]) for i in range(len(row))]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("opening", [None, 3])
def test_both_readers_are_brute_force(seed, opening):
    "`predict` and `Grammar` equal the obvious matcher at every place; the portions compared at once do not matter."
    ids = torch.randint(0, 4, (9, 23), generator=generator(seed, "ids"))
    many = {l: grammar_of(f"{seed}/{l}", opening=opening) for l in (5, 0, 7)}
    for room in (2**20, 3):
        on = Grammar(many).read(ids, room)
        dense = torch.zeros(ids.numel(), 8).index_put((on.at, on.latent), on.value)
        for l, e in many.items():
            want = torch.tensor([brute(e, row) for row in ids.tolist()])
            assert torch.equal(dense[:, l].view(ids.shape), want)
            assert torch.equal(e.predict(ids), want)
    assert (on.at * 8 + on.latent).diff().gt(0).all(), "in order, and each place and latent once"


@pytest.mark.parametrize("seed", range(6))
def test_the_released_matcher_only_misses(seed):
    e, ids = grammar_of(seed, longest=4), torch.randint(0, 4, (20, 20), generator=generator(seed, "ids"))
    exact, released = e.predict(ids), torch.tensor([greedy(e, row) for row in ids.tolist()])
    assert torch.equal(exact[released > 0], released[released > 0])


def test_the_released_matcher_misses_this():
    "`a * c` and `b b c` on 'a b c': the branch of `b` leads nowhere."
    e = Explanation((Pattern((1, None, 3), 1.), Pattern((2, 2, 3), 2.)))
    assert greedy(e, [1, 2, 3]) == [0, 0, 0] and e.predict(torch.tensor([[1, 2, 3]]))[0].tolist() == [0, 0, 1]


def test_a_simulation_is_a_code():
    "Dense or by pairs it says the same, and no unused place touches a latent that is foretold."
    ids = torch.randint(0, 4, (6, 15), generator=generator(0, "ids"))
    many = {l: grammar_of(l, count=4) for l in range(6)}
    told, e = simulate(many, ids), many[3]
    dense = Code(told.values, told.indices, 6).dense()
    assert torch.equal(dense, torch.stack([many[l].predict(ids) for l in range(6)], -1))
    used = [row[v > 0].tolist() for row, v in zip(told.indices.flatten(0, 1), told.values.flatten(0, 1))]
    unused = [row[v == 0].tolist() for row, v in zip(told.indices.flatten(0, 1), told.values.flatten(0, 1))]
    assert all(len(set(u)) == len(u) and not set(u) & set(z) and max(u + z) < 6 for u, z in zip(used, unused))
    assert not simulate({}, ids).values.any() and not simulate({2: Explanation()}, ids).values.any()
    assert torch.equal(simulate({3: e}, ids).values[..., 0], e.predict(ids))


def test_an_explanation_travels_as_json():
    e = replace(grammar_of(0, opening=2), counts=dict(built=3), words={1: "a|`b`", 0: "\n"})
    assert Explanation.from_dict(json.loads(json.dumps(e.to_dict()))) == e
    assert "any token" not in repr(e) and len(repr(e).splitlines()) == len(e.patterns) + 1 and "⊢" in repr(e)
    assert "none" in repr(Explanation()) and "none" in Explanation()._repr_markdown_()


def test_latents_that_are_n_grams_are_found_and_others_are_not(lm, text):
    "Precision and recall one where the grammar can say the rule; one of them less where it cannot."
    dot, bracket, this, opening = (lm.tokenizer(t)["input_ids"][0] for t in (".", "(", " self", "<|endoftext|>"))
    rules = [lambda t, u, v: (t == dot) & (u == this),                      # a pair
             lambda t, u, v: (t == bracket) & (v == dot),                   # a wildcard between
             lambda t, u, v: (u == opening) & (v == START),                 # the start
             lambda t, u, v: (t == dot) & (u != this),                      # not
             lambda t, u, v: t == u,                                        # the same again
             lambda t, u, v: t == -5]                                       # never
    words, known = Words(lm.tokenizer), Rules(rules)
    examples = collect(known, words, text, "any", context=32, tokens=20_000)
    found = explain(known, words, "any", examples)
    assert [(p.tokens, p.start) for p in found[0].patterns] == [((this, dot), False)]
    assert [(p.tokens, p.start) for p in found[1].patterns] == [((dot, None, bracket), False)]
    assert [(p.tokens, p.start) for p in found[2].patterns] == [((None,), True)]
    assert found[0].counts == dict(built=16, dropped=0, reserved=16, foretold=16)
    assert found[5].patterns == () and found[5].counts["built"] == 0
    s = score(known, words, text, "any", found, context=32, tokens=10_000)
    precision, recall, f1 = (s.each.column(c) for c in ("precision", "recall", "f1"))
    assert precision[:3] == recall[:3] == f1[:3] == [1, 1, 1]
    assert precision[3] < 1 == recall[3] and recall[4] < 1 == precision[4]
    assert precision[5] is recall[5] is f1[5] is None
    assert s.recall.settings["without"] == s.precision.settings["without"] == 1 and s.recall.settings["units"] == 5


def test_scores_are_counted_as_defined(lm, text, sae):
    "Against a count over dense codes and `predict`, latent by latent; special tokens never count."
    examples = collect(sae, lm, text, SITE, context=64, tokens=3_000, latents=range(20))
    found = explain(sae, lm, SITE, examples, range(20), build=4)
    s = score(sae, lm, text, SITE, found, context=64, tokens=2_000, batch=5)
    active, told = [], []
    for b in coded(sae, lm, text, SITE, 64, 2_000, True):
        keep = b.windows.keep
        active.append(sae.encode(lm.read(b.windows.ids, SITE)[keep]).dense()[:, :20] > 0)
        told.append(torch.stack([found[l].predict(b.windows.ids)[keep] > 0 for l in range(20)], 1))
    active, told = torch.cat(active), torch.cat(told)
    assert s.each.column("active") == active.sum(0).tolist() and s.each.column("foretold") == told.sum(0).tolist()
    assert s.each.column("both") == (active & told).sum(0).tolist()
    there = told.sum(0) > 0
    assert abs(s.precision.value - ((active & told).sum(0) / told.sum(0))[there].mean().item()) < 1e-6
    assert set(s.f1.nulls) == {"shuffled"} and s.f1.value > s.f1.nulls["shuffled"]
    again = score(sae, lm, text, SITE, found, context=64, tokens=2_000, nulls={"other": s})
    assert again.f1.value == s.f1.value and again.f1.nulls == {"shuffled": s.f1.nulls["shuffled"], "other": s.f1.value}
    json.dumps([s.f1.to_dict(), s.each.rows])
    both, pool = (active & told).sum().item(), {n: e.value for n, e in s.pooled.items()}
    assert pool["precision"] == pytest.approx(both / told.sum().item()) and pool["recall"] == pytest.approx(both / active.sum().item())
    assert pool["f1"] == pytest.approx(2 * both / (active.sum() + told.sum()).item()) and pool["precision"] != pytest.approx(pool["recall"], rel=.05)
    assert s.pooled["f1"].settings["unit"] == "documents" and s.f1.settings["unit"] == "latents"
    assert again.pooled["f1"].nulls == {"shuffled": s.pooled["f1"].nulls["shuffled"], "other": s.pooled["f1"].value}
    assert s.pooled["f1"].low <= s.pooled["f1"].value <= s.pooled["f1"].high
    other = score(sae, lm, text, SITE, found, context=64, tokens=2_000, seed=1)
    assert other.each.column("active") != s.each.column("active"), "another seed draws other text"


def test_a_cry_of_wolf_is_seen_in_the_pool(lm, text):
    "Of ten latents told exactly one is told everywhere: the mean hardly sees it, the pool does; a silent latent counts zero."
    often = Counter(torch.cat([w.ids.flatten() for w in spread(text, lm.tokenizer, 32, 2_000)]).tolist())
    tokens = [t for t, _ in often.most_common(30)][20:]
    known = Rules([lambda t, u, v, own=own: t == own for own in tokens])
    exact = {l: Explanation((Pattern((t,), 1.),)) for l, t in enumerate(tokens)}
    judged = lambda e: score(known, Words(lm.tokenizer), text, "any", e, context=32, tokens=2_000)
    loud = judged(exact | {0: Explanation((Pattern((None,), 1.),))})
    assert judged(exact).pooled["precision"].value == judged(exact).precision.value == 1
    assert loud.precision.value > .85 and loud.pooled["precision"].value < .3 and loud.pooled["recall"].value == 1
    mute = judged(exact | {0: Explanation()})
    assert mute.precision.settings["without"] == 1 and mute.precision.value == 1 and mute.recall.value == pytest.approx(.9)
    assert mute.f1.value == pytest.approx(.9) and mute.pooled["recall"].value < 1 and "left out" in repr(mute)


def sides(held, seen):
    "A text whose held-out side is other text than its training side."
    docs = [Document(f"d{i}", (held if i % 2 else seen) * 100) for i in range(8)]
    return Text("sides", lambda: iter(docs), lambda i, d: i % 2 == 1)


def test_explanations_are_built_on_one_side_and_scored_on_the_other(lm):
    "A latent that fires at words which one side alone has, and one on both sides."
    tokens = [lm.tokenizer(w)["input_ids"] for w in (" dict", " list", " self")]
    assert all(len(t) == 1 for t in tokens)
    dict_, list_, self_ = (t[0] for t in tokens)
    both = sides(" dict self", " list self")
    known, words = Rules([lambda t, u, v: (t == dict_) | (t == list_), lambda t, u, v: t == self_]), Words(lm.tokenizer)
    found = explain(known, words, "any", collect(known, words, both, "any", context=32, tokens=300))
    assert [p.tokens for p in found[0].patterns] == [(list_,)] and [p.tokens for p in found[1].patterns] == [(self_,)]
    s = score(known, words, both, "any", found, context=32, tokens=300)
    assert s.each.column("recall") == [0, 1] and s.each.column("foretold")[0] == 0 and s.each.column("active")[0] > 0


def test_the_first_examples_build_and_the_rest_are_foretold(lm):
    "Two words, the first of which the building examples show: none of the reserved ones is foretold."
    known, ids = Rules([lambda t, u, v: (t == 5) | (t == 6)]), [[7, 8, 9, 5]] * 3 + [[7, 8, 9, 6]] * 2
    e = explain(known, Words(lm.tokenizer), "any", handmade(lm, ids, [1.] * 5), build=3, longest=3)[0]
    assert [p.tokens for p in e.patterns] == [(5,)] and e.counts == dict(built=3, dropped=0, reserved=2, foretold=0)
    e = explain(known, Words(lm.tokenizer), "any", handmade(lm, ids, [1.] * 5), build=4, longest=3)[0]
    assert {p.tokens for p in e.patterns} == {(5,), (6,)} and e.counts == dict(built=4, dropped=0, reserved=1, foretold=1)


def test_equal_patterns_share_one_value(lm):
    "A pattern foretells the mean of the activations that its suffixes gave."
    class Half:
        "1 behind token 3, 3 behind any other, at token 5; what stood before is no part of the pattern."
        def encode(self, rows): return ((rows[:, 0] == 5) * torch.where(rows[:, 1] == 3, 1., 3.))[:, None]
        def decode(self, code): return torch.zeros(len(code), 3)
    e = explain(Half(), Words(lm.tokenizer), "any", handmade(lm, [[7, 8, 9, 5], [7, 8, 9, 5]], [3., 3.]), longest=3)[0]
    assert e.patterns == (Pattern((5,), 3.),)


def test_the_seed_of_a_score_moves_the_shuffle():
    given = {l: grammar_of(l) for l in range(8)}
    assert shuffled(given, 0) == shuffled(given, 0) != shuffled(given, 1)


def test_shuffling_moves_every_explanation():
    given = {l: grammar_of(l) for l in (9, 2, 5, 7)}
    moved = shuffled(given)
    assert set(moved) == set(given) and all(moved[l] != given[l] for l in given) and {id(e) for e in moved.values()} == {id(e) for e in given.values()}
    assert shuffled(dict(reversed(given.items()))) == moved, "whatever their order"


def test_nothing_accidental_enters(lm, text, sae):
    "Batch sizes, the choice and order of latents, and running again leave examples and explanations as they are."
    a = collect(sae, lm, text, SITE, context=64, tokens=5_000)
    b = collect(sae, lm, text, SITE, context=64, tokens=5_000, latents=[200, 3, 50], batch=3)
    for l in (3, 50, 200):
        x, y = a.take(a.latent == l), b.take(b.latent == l)
        assert torch.equal(x.ids, y.ids) and torch.equal(x.lot, y.lot)
        torch.testing.assert_close(x.value, y.value, atol=1e-5, rtol=1e-5)
    x, y = explain(sae, lm, SITE, a, [3, 50, 200]), explain(sae, lm, SITE, b, [200, 50, 3])
    assert list(x) == list(y) == [3, 50, 200]
    for l in x:
        assert [(p.tokens, p.start) for p in x[l].patterns] == [(p.tokens, p.start) for p in y[l].patterns] and x[l].counts == y[l].counts
        assert all(abs(p.value - q.value) < 1e-5 for p, q in zip(x[l].patterns, y[l].patterns))
    assert explain(sae, lm, SITE, a, [3, 50, 200]) == x
    assert not torch.equal(a.lot, collect(sae, lm, text, SITE, context=64, tokens=5_000, seed=1).lot)


def test_a_sample_is_fair(lm, text):
    "A latent that is always active: the places kept are spread evenly over the text."
    always = Rules([lambda t, u, v: t > START])
    e = collect(always, Words(lm.tokenizer), text, "any", context=32, tokens=20_000, per=2_000)
    every = collect(always, Words(lm.tokenizer), text, "any", context=32, tokens=20_000, per=10**6)
    assert len(e.latent) == 2_000 and len(every.latent) >= 20_000 and len(every.lot.unique()) == len(every.lot)
    half = every.lot < every.lot.median()
    assert abs(half.float().mean() - .5) < .01
    first = [(x.ids[:, -2] == START).float().mean().item() for x in (e, every)]     # the first token of a window
    assert abs(first[0] - first[1]) < .015


def test_end_activation_is_one_sequence_at_a_time(lm, sae):
    ids, latents = torch.randint(1, 50, (30, 3), generator=generator(0, "ids")), torch.arange(30) * 8
    ids[10:20] = ids[:10]
    slow = torch.stack([sae.encode(lm.read(row[None], SITE)[0, -1:]).dense()[0, l] for row, l in zip(ids, latents)])
    for forward in (8_192, 5):
        torch.testing.assert_close(end_activation(wrapped(sae, lm, SITE), lm, SITE, ids, latents, forward), slow, atol=1e-5, rtol=1e-4)
    assert end_activation(sae, lm, SITE, ids[:0], latents[:0]).shape == (0,)


def test_suffixes_are_shortest_and_saliency_as_defined(lm, text, sae):
    "Against the definition, one sequence at a time; and a suffix tied to the start stands there."
    e = collect(sae, lm, text, SITE, context=64, tokens=3_000, per=1, latents=range(12))
    found, pad = shorten(sae, lm, SITE, e, longest=6), neutral_token(lm.tokenizer)
    released = shorten(sae, lm, SITE, e, longest=6, released=True)
    def alone(ids, l): return sae.encode(lm.read(torch.tensor([[e.opening, *ids]]), SITE)[0, -1:]).dense()[0, l].item()
    for i, l in enumerate(e.latent.tolist()):
        tail, r, a = e.ids[i].tolist(), found.length[i].item(), e.value[i].item()
        shares = [alone(tail[-n:], l) / a for n in range(1, 7) if tail[-n] != START]
        assert r == next((n for n, s in enumerate(shares, 1) if s >= .5), 0)
        if not r: continue
        own = [1 - alone([*tail[-r:][:j], pad, *tail[-r:][j + 1:]], l) / alone(tail[-r:], l) for j in range(r)]
        torch.testing.assert_close(found.saliency[i, -r:], torch.tensor(own), atol=1e-4, rtol=1e-4)
        lost = alone([pad, *tail[-r:]], l) < .5 * a
        assert released.start[i] == lost and found.start[i] == (lost and tail[-r - 1] == START)
    assert torch.equal(found.length, released.length) and (found.length > 0).any()


def test_a_table_of_followers_is_a_distribution(tables):
    "The shares of all tokens behind a past add up to one, seen or not."
    for past in ((12, 7), (4000, 3999), (7, 12)):
        rows = torch.cat([torch.tensor([past]).expand(4096, 2), torch.arange(4096)[:, None]], 1)
        for t in tables.values(): assert abs(t.loss(rows)[:, 1].neg().exp().sum() - 1) < 1e-4


def test_a_table_of_followers_counts(lm, text):
    "Against counts one by one: Witten-Bell over one and over two tokens before; no token across windows or documents."
    seen = [w for w in spread(text, lm.tokenizer, 16, 2_000, 5, False, 1024)]
    rows = [(row, keep) for w in seen for row, keep in zip(w.ids.tolist(), w.keep.tolist())]
    grams = [Counter(tuple(row[i - m:i + 1]) for row, keep in rows for i in range(max(m, 1), 16) if keep[i]) for m in range(3)]
    single = lambda t: (1 + grams[0][t,]) / (4096 + grams[0].total())
    def share(past, t):
        if not past: return single(t)
        behind = {g[-1]: c for g, c in grams[len(past)].items() if g[:-1] == past}
        kinds = len(behind)
        return (behind.get(t, 0) + kinds * share(past[1:], t)) / (sum(behind.values()) + kinds) if behind else share(past[1:], t)
    one, two = (Followers.fit(text, lm.tokenizer, 16, 2_000, before, 5) for before in (1, 2))
    assert one.tokens == two.tokens == grams[0].total()
    other = next(windows(text.documents(True), lm.tokenizer, 16, 4)).ids
    for ids in (seen[0].ids[:4], other):
        own, further = one.loss(ids), two.loss(ids)
        for b, row in enumerate(ids.tolist()):
            for i in range(1, 16):
                assert own[b, i - 1].item() == pytest.approx(-math.log(share((row[i - 1],), row[i])), rel=1e-4)
                assert further[b, i - 1].item() == pytest.approx(-math.log(share(tuple(row[max(0, i - 2):i]), row[i])), rel=1e-4)
    assert two.loss(seen[0].ids[:4])[:, 1:].mean() < one.loss(seen[0].ids[:4])[:, 1:].mean() < one.loss(other)[:, 1:].mean()


def test_tables_count_the_training_side_and_as_much_as_is_asked(lm):
    "A follower that only the held-out side knows stays rare; the tables compared with have the size of the explanations' text."
    held, seen = " cat dog", " cat mat"
    docs = [Document(f"d{i}", (held if i % 2 else seen) * 400) for i in range(8)]
    both = Text("sides", lambda: iter(docs), lambda i, d: i % 2 == 1)
    t = followers(both, lm.tokenizer, 32, 600)
    ids = torch.tensor([lm.tokenizer(seen * 3)["input_ids"], ]), torch.tensor([lm.tokenizer(held * 3)["input_ids"]])
    for table in t.values(): assert table.loss(ids[0])[0, 1:].mean() + 1 < table.loss(ids[1])[0, 1:].mean() and 590 <= table.tokens <= 700
    used = {k: p.default for k, p in inspect.signature(explanation_loss).parameters.items()}["fit"]
    built = inspect.signature(collect).parameters["tokens"].default
    assert inspect.signature(followers).parameters["tokens"].default == used + built


def test_rescaling_is_least_squares(lm, text, sae):
    "The factor of each latent is E[s·a]/E[s²] over the training side."
    examples = collect(sae, lm, text, SITE, context=64, tokens=3_000, latents=range(12))
    found = explain(sae, lm, SITE, examples, range(12), build=4)
    scaled = rescaled([Grammar(found)], sae, lm, text, SITE, 64, 2_000)[0]
    s, a = [], []
    for b in coded(sae, lm, text, SITE, 64, 2_000, False):
        a.append(b.code.dense()[:, :12])
        s.append(torch.stack([found[l].predict(b.windows.ids)[b.windows.keep] for l in range(12)], 1))
    s, a = torch.cat(s).double(), torch.cat(a).double()
    plain, ss = Grammar(found), s.square().sum(0)
    want = torch.where(ss > 0, (s * a).sum(0) / ss, (s * a).sum() / ss.sum())
    torch.testing.assert_close(scaled.value, plain.value * want[plain.latent].float())


def test_explanations_that_are_the_code_lose_nothing_more(lm, text, tables):
    "A latent that one pattern tells exactly: spliced explanations give the SAE's own loss; none give the bias's."
    class Last:
        "One latent that is 2 at a comma, in a dictionary that adds it to a row of its own."
        def encode(self, rows):
            on = (rows - comma).norm(dim=1, keepdim=True) < 1e-4
            return Code(2. * on, torch.zeros(len(rows), 1, dtype=torch.long), 3)
        def decode(self, code): return mean + torch.nn.functional.one_hot(torch.tensor(5), 64) * code.dense()[:, :1]
    token = lm.tokenizer(",")["input_ids"][0]
    w = next(windows(text.documents(True), lm.tokenizer, 64, 8))
    mlp = "transformer.wte"                                              # there a row tells its token exactly
    comma, mean = lm.read(torch.tensor([[token]]), mlp)[0, 0], lm.read(w.ids, mlp).mean((0, 1))
    exact = {0: Explanation((Pattern((token,), 1.),), opening=0), 1: Explanation(opening=0)}
    loss = explanation_loss(Last(), lm, text, mlp, exact, context=64, tokens=1_000, fit=1_000, tables=tables)
    assert abs(loss.value - loss.nulls["sae"]) < 1e-6 and loss.nulls["clean"] < loss.value
    assert abs(loss.nulls["shuffled"] - loss.nulls["bias only"]) < 1e-6 and abs(loss.value - loss.nulls["bias only"]) > 1e-4
    assert loss.low < loss.value < loss.high and loss.settings["tokens"] >= 900
    docs = [d for b in coded(Last(), lm, text, mlp, 64, 1_000, True) for d in b.windows.docs]
    assert loss.settings["units"] == len(set(docs)) < len(docs) and loss.settings["unit"] == "documents"
    assert loss.settings["counted"] == {name: t.tokens for name, t in tables.items()}


def test_other_dictionaries_are_explained_too(lm, text, sae, tables):
    "Dense codes, channels with two signs, peaks; the loss does not depend on the batch."
    rows = lm.read(next(windows(text.documents(), lm.tokenizer, 64, 8)).ids, SITE).flatten(0, 1)
    peaks = Peaks.of(rows, .05)
    assert abs((peaks.encode(rows) > 0).float().mean() - .05) < .005
    for thing in (peaks, Channels()):
        e = explain(thing, lm, SITE, collect(thing, lm, text, SITE, context=64, tokens=1_000, latents=[1, 5]), [1, 5], build=2)
        one, two = (explanation_loss(thing, lm, text, SITE, e, context=64, tokens=500, fit=500, batch=b, tables=tables) for b in (4, 7))
        assert abs(one.value - two.value) < 1e-5 and one.nulls.keys() == {"sae", "shuffled", "bias only", "clean", "bigram", "trigram"}


def handmade(lm, ids, values, latents=None):
    "Examples as if they had been drawn: one a row."
    ids = torch.tensor(ids)
    return Examples(torch.zeros(len(ids), dtype=torch.long) if latents is None else latents, ids, torch.tensor(values), torch.arange(len(ids)), 0)


def test_suffixes_end_at_half_and_tokens_matter_from_half(lm):
    "A latent with graded values: exactly half suffices, exactly half matters, and less does not."
    table = {(5,): .5, (6,): .49, (9, 6): 1.}          # what a suffix, last token last, is worth
    class Graded:
        def encode(self, rows):
            own = [table.get((int(u), int(t)), table.get((int(t),), 0.)) for t, u, _ in rows]
            return torch.tensor(own)[:, None]
        def decode(self, code): return torch.zeros(len(code), 3)
    found = shorten(Graded(), Words(lm.tokenizer), "any", handmade(lm, [[7, 8, 9, 5], [7, 8, 9, 6]], [1., 1.]), longest=3, pad=4)
    assert found.length.tolist() == [1, 2] and found.value.tolist() == [.5, 1.]
    torch.testing.assert_close(found.saliency[1, -2:], torch.tensor([1 - .49, 1.]))
    assert found.pattern(1).tokens == (9, 6), "a token that takes away 51 % matters"
    half = replace(found, saliency=torch.tensor([[0., 0., 0.], [0., .5, .3]]))
    assert half.pattern(1).tokens == (9, None), "one half matters, less than that is a wildcard"


def test_patterns_of_wildcards_only_are_dropped_and_counted(lm, text):
    "Where no token matters by itself nothing is foretold, instead of everything everywhere."
    class Loud:
        "Always active: 1 at any token."
        def encode(self, rows): return torch.ones(len(rows), 1)
        def decode(self, code): return torch.zeros(len(code), 3)
    examples = collect(Loud(), Words(lm.tokenizer), text, "any", context=32, tokens=500)
    e = explain(Loud(), Words(lm.tokenizer), "any", examples)[0]
    assert e.patterns == () and e.counts == dict(built=16, dropped=16, reserved=16, foretold=0)
    assert Pattern((None, None), 1.).wild and not Pattern((None,), 1., True).wild and not Pattern((None, 3), 1.).wild


def test_text_is_read_all_over_and_the_seed_draws_it(lm, text, sae):
    "Windows come from many documents of the asked side; another seed draws others, the same seed the same."
    def read(held_out, seed): return [b.windows for b in coded(sae, lm, text, SITE, 64, 2_000, held_out, seed=seed)]
    sides = {held_out: {d.name for d in text.documents(held_out)} for held_out in (False, True)}
    for held_out in sides:
        one, again, other = read(held_out, 0), read(held_out, 0), read(held_out, 1)
        docs = {d for w in one for d in w.docs}
        assert len(docs) >= 8 and docs <= sides[held_out] and not docs & sides[not held_out]
        ids = lambda ws: torch.cat([w.ids for w in ws])
        assert torch.equal(ids(one), ids(again)) and not torch.equal(ids(one), ids(other)[:len(ids(one))])
        assert 2_000 <= sum(int(w.keep.sum()) for w in one) < 2_100


def test_parts_of_characters_are_shown_without_a_mark_of_loss(lm, text):
    "A token that is a part of a character is written as the tokenizer writes it."
    parts = [i for i in range(len(lm.tokenizer)) if "\ufffd" in lm.tokenizer.decode([i])][:2]
    class Part:
        def encode(self, rows): return (rows[:, :1] == parts[0]).float()
        def decode(self, code): return torch.zeros(len(code), 3)
    e = explain(Part(), Words(lm.tokenizer), "any", handmade(lm, [[7, 8, 9, parts[0]]], [1.]), longest=3)[0]
    assert e.patterns[0].tokens == (parts[0],) and "\ufffd" not in repr(e) and "\\ufffd" not in repr(e)


def test_a_neutral_token_exists_or_is_asked_for(lm):
    assert lm.tokenizer.decode([neutral_token(lm.tokenizer)]) == " _"
    class None_of_them:
        all_special_ids = [0]
        def __call__(self, mark, add_special_tokens): return dict(input_ids=[7, 8])
    class Dash(None_of_them):
        def __call__(self, mark, add_special_tokens): return dict(input_ids=[9] if mark == "-" else [7, 8])
    assert neutral_token(Dash()) == 9
    with pytest.raises(UserError, match="pad"): neutral_token(None_of_them())


def test_what_is_wrong_is_said_in_a_sentence(lm, text, sae):
    empty = Text("nothing", lambda: iter([Document("a", "x = 1")]), lambda i, d: False)
    examples = collect(sae, lm, text, SITE, context=64, tokens=500, latents=[3])
    with pytest.raises(UserError, match="training side"): collect(sae, lm, empty, SITE, context=64)
    with pytest.raises(UserError, match="held-out side"): score(sae, lm, empty, SITE, {3: Explanation()}, context=64)
    with pytest.raises(UserError, match="training side"): Followers.fit(empty, lm.tokenizer, context=64)
    with pytest.raises(UserError, match="latent 256 is named but there are 256"): score(sae, lm, text, SITE, {256: Explanation()}, context=64)
    with pytest.raises(UserError, match="latent -1"): explain(sae, lm, SITE, examples, [-1, 2])
    with pytest.raises(UserError, match="latent 900"): explanation_loss(sae, lm, text, SITE, {900: Explanation()}, context=64, tables={})
    with pytest.raises(UserError, match="no latent"): collect(sae, lm, text, SITE, context=64, latents=[])
    with pytest.raises(UserError, match="longest is 40"): explain(sae, lm, SITE, examples, [3], longest=40)
    with pytest.raises(UserError, match="longest is 0"): shorten(sae, lm, SITE, examples, longest=0)
    with pytest.raises(UserError, match="build is 0"): explain(sae, lm, SITE, examples, [3], build=0)
    with pytest.raises(UserError, match="per is 0"): collect(sae, lm, text, SITE, context=64, per=0)
    with pytest.raises(UserError, match="tokens is 0"): collect(sae, lm, text, SITE, context=64, tokens=0)
    with pytest.raises(UserError, match="batch is 0"): score(sae, lm, text, SITE, {3: Explanation()}, context=64, batch=0)
    with pytest.raises(UserError, match="between 0 and 1"): Peaks.of(torch.zeros(4, 2), 1.)
    assert chosen(None, 3).tolist() == [0, 1, 2]


def test_latents_without_anything_are_marked_and_not_guessed(lm, text, sae):
    "A latent that is never active, and an explanation without patterns."
    s = score(Rules([lambda t, u, v: t == -9]), Words(lm.tokenizer), text, "any", {0: Explanation()}, context=64, tokens=500)
    assert s.precision.value is s.recall.value is s.f1.value is None and "nothing" in repr(s.recall) and s.f1.nulls == {}
    s = score(sae, lm, text, SITE, {l: Explanation() for l in range(5)}, context=64, tokens=1_000)
    assert s.precision.value is None and s.recall.value == 0 and s.f1.nulls["shuffled"] == 0

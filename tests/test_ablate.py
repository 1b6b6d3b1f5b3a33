"Ablations against slow hook-based interventions, models whose effects are known in closed form, and dictionaries of other libraries."
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sae_nb.ablate import (Spot, ablate, ablated_logits, ablation_sparsity, active, attribute, baseline, centred, draw_spots, effects, shape, shapes,
                           sparsity, spot, without)
from sae_nb.core import UserError
from sae_nb.lm import LM, load_lm
from sae_nb.sae import SAE, Channels, Dictionary, SAEConfig, init_
from sae_nb.text import Document, Text, load_text

SITE = "resid_post.1"


@pytest.fixture(scope="module")
def lm(): return load_lm("pylib-64", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def precise():
    "The same model in double precision, where a slow computation leaves no doubt."
    lm = load_lm("pylib-64", device="cpu", dtype="float32")
    lm.model.double()
    return lm


@pytest.fixture(scope="module")
def ids(lm): return torch.tensor([lm.tokenizer.bos_token_id, *lm.tokenizer("def area(self, width, height):\n    return width * height\n")["input_ids"]])


@pytest.fixture(scope="module")
def sae(lm, ids): return init_(SAE(SAEConfig(d=64, n=256, k=8)), lm.read(ids[None], SITE)[0]).requires_grad_(False)


@pytest.fixture(scope="module")
def text(): return load_text("pylib")


# --- the definition ---------------------------------------------------------------------------------

def slow(v):
    "The definition over one list of numbers."
    return sum(abs(x) for x in v) ** 2 / sum(x * x for x in v) / len(v)


def test_sparsity_is_the_definition():
    v = torch.randn(3, 4, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 3
    want = torch.tensor([[slow(r.tolist()) for r in m] for m in v], dtype=torch.float64)
    torch.testing.assert_close(sparsity(v), want)
    torch.testing.assert_close(sparsity(-1e3 * v), want)


def test_sparsity_of_vectors_known_by_heart():
    eye = sparsity(torch.eye(40, dtype=torch.float64))
    torch.testing.assert_close(eye, torch.full((40,), 1 / 40, dtype=torch.float64))
    assert sparsity(torch.tensor([2., -2., 2., -2.])) == 1
    assert abs(sparsity(torch.randn(400_000, generator=torch.Generator().manual_seed(0))) - 2 / torch.pi) < .005
    assert sparsity(torch.zeros(7)).isnan()


def test_centred_takes_out_what_softmax_does_not_see():
    v = torch.randn(5, 31, generator=torch.Generator().manual_seed(0))
    want = torch.stack([r - sorted(r.tolist())[15] for r in v])
    torch.testing.assert_close(centred(v), want)
    torch.testing.assert_close(centred(v + 3), centred(v), atol=1e-5, rtol=0)


# --- a model without blocks: every effect is known ------------------------------------------------------

class Lookup(nn.Module):
    "A row for each word, read out by a matrix."
    device, dtype, base_model = torch.device("cpu"), torch.float64, property(lambda self: self)

    def __init__(self, rows, readout):
        super().__init__()
        self.embed, self.site, self.head = nn.Embedding.from_pretrained(rows), nn.Identity(), nn.Linear(*readout.T.shape, bias=False, dtype=rows.dtype)
        self.head.weight = nn.Parameter(readout)

    def forward(self, ids, use_cache=False): return SimpleNamespace(logits=self.head(self.site(self.embed(ids))))

    def get_output_embeddings(self): return self.head


@pytest.mark.parametrize("T", [1, 3, 8])
def test_an_effect_on_one_logit_of_one_token_scores_one_over_all(T):
    rows = torch.rand(20, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + .1
    lm = LM(Lookup(rows, torch.eye(12, dtype=torch.float64)), None)
    at, channels = spot(lm, torch.arange(15), 4, T), Dictionary(Channels(), rows)
    x = lm.read(at.ids, "site")[0]
    got = shapes(lm, "site", at, x, without(channels, x[4], active(channels, x[4])))[:, 0]
    torch.testing.assert_close(got, torch.full((12,), 1 / (12 * T), dtype=torch.float64))


# --- interventions --------------------------------------------------------------------------------------

def by_hand(lm, ids, position, latent, sae, error):
    "Logits with one latent zeroed at one token, by a plain torch hook on the block and a dense decoder."
    def hook(module, args, out):
        x = out[0] if isinstance(out, tuple) else out
        x = x.clone()
        special = torch.isin(ids, torch.tensor(lm.tokenizer.all_special_ids))
        for p in range(len(ids)):
            if special[p]: continue
            row = x[0, p].clone()
            mean, scale = row.mean(), (row - row.mean()).norm() / (len(row) - 1) ** .5 + 1e-5
            n = (row - mean) / scale
            pre = sae.W_enc.double() @ (n - sae.b_dec.double()) + sae.b_enc.double()
            z = torch.zeros_like(pre)
            top = pre.topk(sae.cfg.k).indices
            z[top] = pre[top].relu()
            decode = lambda z: (z @ sae.W_dec.double() + sae.b_dec.double()) * scale + mean
            full = decode(z)
            if p == position and latent is not None: z[latent] = 0
            x[0, p] = row + decode(z) - full if error else decode(z)
        return (x, *out[1:]) if isinstance(out, tuple) else x
    handle = lm.model.transformer.h[1].register_forward_hook(hook)
    try:
        with torch.no_grad(): return lm.model(ids[None]).logits[0]
    finally: handle.remove()


@pytest.mark.parametrize("error", [True, False])
def test_effects_are_those_of_an_intervention_by_hand(precise, ids, sae, error):
    double = SAE(sae.cfg).double(); double.load_state_dict({k: v.double() for k, v in sae.state_dict().items()})
    position, T = 6, 5
    clean = by_hand(precise, ids, position, None, sae, error)
    for e in effects(double, precise, ids, SITE, position, T=T, error=error)[:3]:
        ablated = by_hand(precise, ids, position, e.latent, sae, error)
        p, q = (l.log_softmax(-1)[position:position + T] for l in (clean, ablated))
        after = ids[position + 1:position + T + 1, None]
        close = dict(atol=1e-9, rtol=1e-6)
        torch.testing.assert_close(torch.tensor(e.loss, dtype=torch.float64), (p - q).gather(-1, after)[:, 0], **close)
        torch.testing.assert_close(torch.tensor(e.kl, dtype=torch.float64), (p.exp() * (p - q)).sum(-1), **close)
        change = (clean - ablated)[position:position + T]
        change = change - change.median(-1, keepdim=True).values
        assert abs(e.sparsity - slow(change.flatten().tolist())) < 1e-9
        for i in range(T):
            for name, c in (("up_logits", change[i]), ("down_logits", -change[i]), ("up_probs", p[i].exp() - q[i].exp()), ("down_probs", q[i].exp() - p[i].exp())):
                best = c.topk(5)
                assert [w for w, _ in e.votes[name][i]] == [precise.tokenizer.decode([j]) for j in best.indices.tolist()]
                torch.testing.assert_close(torch.tensor([v for _, v in e.votes[name][i]], dtype=torch.float64), best.values, **close)


def test_without_an_ablation_logits_are_the_clean_ones(lm, ids, sae):
    at = spot(lm, ids, 6, 5)
    x, d = lm.read(at.ids, SITE)[0], Dictionary(sae, lm.read(ids[None], SITE)[0])
    nothing = without(d, x[6], torch.tensor([i for i in range(256) if i not in active(d, x[6])][:2]))
    assert not nothing.any()
    clean, same = ablated_logits(lm, SITE, at, baseline(d, x, at.keep), nothing[:1])
    assert torch.equal(clean, same)
    want = lm.logits(at.ids)[:, -5:].detach()
    torch.testing.assert_close(clean, want, atol=1e-4, rtol=1e-5)
    assert torch.equal(ablated_plain(lm, at, x), lm.logits(at.ids))


def ablated_plain(lm, at, x): return lm.logits(at.ids, SITE, lambda _: x[None])


def test_the_bare_reconstruction_leaves_special_tokens_alone(lm, ids, sae):
    x = lm.read(ids[None], SITE)[0]
    d, keep = Dictionary(sae, x), torch.arange(len(ids)) > 0
    base = baseline(d, x, keep, error=False)
    assert torch.equal(base[0], x[0])
    torch.testing.assert_close(base[1:], sae(x[1:]))


def test_portions_do_not_matter(lm, ids, sae):
    at = spot(lm, ids, 5, 8)
    x, d = lm.read(at.ids, SITE)[0], Dictionary(sae, lm.read(ids[None], SITE)[0])
    changes = without(d, x[5], active(d, x[5]))
    whole = shapes(lm, SITE, at, x, changes)
    for portion in (1, 3):
        part = shapes(lm, SITE, at, x, changes, portion)
        torch.testing.assert_close(part.mean(), whole.mean(), atol=1e-6, rtol=0)
        torch.testing.assert_close(part, whole, atol=1e-6, rtol=1e-4)


def test_a_sleeping_latent_has_no_effect_and_says_so(lm, ids, sae):
    on = [e.latent for e in effects(sae, lm, ids, SITE, 6, T=3)]
    asleep = next(i for i in range(256) if i not in on)
    first, second = effects(sae, lm, ids, SITE, 6, latents=[asleep, on[0]], T=3)
    assert (first.latent, first.activation, first.sparsity) == (asleep, 0, None) and first.loss == first.kl == [0, 0, 0]
    assert not any(words for lists in first.votes.values() for words in lists)
    assert second.latent == on[0] and second.activation > 0 and second.kl[0] > 0


def test_no_loss_where_no_real_token_follows(lm, ids, sae):
    end = torch.cat([ids[:8], ids[:1], ids[1:3]])
    loss = effects(sae, lm, end, SITE, 6, T=5)[0].loss
    assert [l is None for l in loss] == [False, True, False, False, True]


# --- what a dictionary may be -----------------------------------------------------------------------------

class Dense:
    "An SAE of another library: dense codes, and something that only it understands."
    def __init__(self, sae): self.sae = sae
    def encode(self, rows):
        code = self.sae.encode(rows)
        return code.dense(), code.normed
    def decode(self, dense, normed): return normed.restore(dense @ self.sae.W_dec + self.sae.b_dec)


def test_dictionaries_of_other_libraries(lm, ids, sae, text):
    ours, theirs = (effects(s, lm, ids, SITE, 6, T=4) for s in (sae, Dense(sae)))
    assert [e.latent for e in ours] == [e.latent for e in theirs]
    torch.testing.assert_close(*(torch.tensor([e.kl for e in es]) for es in (ours, theirs)), atol=1e-5, rtol=1e-4)
    a, b = (attribute(s, lm, ids, SITE, " width", 7).table(3).rows for s in (sae, Dense(sae)))
    assert [r["latent"] for r in a] == [r["latent"] for r in b]
    how = dict(context=32, positions=3, T=4)
    assert set(ablate(Dense(sae), lm, text, SITE, **how).values) == {"latents", "channels", "random directions"}
    given = ablate(Dense(sae), lm, text, SITE, null=Channels(), **how)
    for a, b in zip(given.values["untrained"], given.values["channels"]): assert len(a) == len(b)


# --- attribution ------------------------------------------------------------------------------------------

def test_blocks_before_the_site_may_run_once(ids):
    "In every family, one window that becomes many at the site gives the logits of many windows."
    from test_models import model
    for family in ("gpt2", "gpt_neox", "llama", "gemma2", "qwen3", "phi"):
        lm = LM(model(family), None, family)
        tokens, steps = torch.arange(3, 23), torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
        for kind in ("resid_pre", "resid_post", "attn_out", "mlp_out"):
            at = spot(lm, tokens, 8, 6)
            x = lm.read(at.ids, f"{kind}.1")[0]
            def new(rows, many=steps):
                rows = rows.clone()
                rows[:, 8] += many
                return rows
            want = lm.logits(at.ids.repeat(4, 1), f"{kind}.1", new)[:, -6:]
            torch.testing.assert_close(torch.cat(list(ablated_logits(lm, f"{kind}.1", at, x, steps)))[1:], want.detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("error", [True, False])
def test_attribution_is_the_slope_times_the_activation(precise, ids, sae, error):
    double = SAE(sae.cfg).double(); double.load_state_dict({k: v.double() for k, v in sae.state_dict().items()})
    up, down = 11, 12
    found = attribute(double, precise, ids, SITE, up, down, error=error)
    x, s = precise.read(ids[None], SITE)[0], len(ids)
    d, p = Dictionary(double, x), 5
    base, at = baseline(d, x, torch.arange(s) > 0, error), spot(precise, ids, p, s - p)
    i = found.positions.tolist().index(p)
    steps = 1e-5 * without(d, x[p], found.latents[i])
    logits = torch.cat(list(ablated_logits(precise, SITE, at, base, torch.cat([steps, -steps]))))[1:, -1]
    gap = logits[:, up] - logits[:, down]
    k = len(steps)
    torch.testing.assert_close(found.scores[i], (gap[k:] - gap[:k]) / 2e-5, atol=1e-6, rtol=1e-4)
    assert found.tokens[i] == precise.tokenizer.decode([int(ids[p])]) and found.positions.tolist() == list(range(1, s))


def test_attribution_leaves_no_gradients_behind(lm, ids):
    sae = init_(SAE(SAEConfig(d=64, n=128, k=4)), lm.read(ids[None], SITE)[0])
    with torch.no_grad(): attribute(sae, lm, ids, SITE, " width", 7)
    assert all(p.grad is None for p in sae.parameters())


# --- many positions ---------------------------------------------------------------------------------------

def test_same_seed_same_numbers(lm, text, sae):
    how = dict(context=32, positions=6, T=4)
    a, b, c = (ablate(sae, lm, text, SITE, seed=s, portion=p, **how) for s, p in ((3, None), (3, 2), (4, None)))
    for name in a.values:
        one, other = torch.cat(a.values[name]), torch.cat(b.values[name])
        torch.testing.assert_close(one.mean(), other.mean(), atol=1e-6, rtol=0)
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
    assert a.estimate().value != c.estimate().value
    assert set(a.estimate().nulls) == {"channels", "untrained", "random directions", "Gaussian"}
    assert {len(v) for vs in a.values.values() for v in vs} <= set(range(9))
    assert ablation_sparsity(sae, lm, text, SITE, seed=3, nulls=False, **how).value == pytest.approx(a.estimate().value, abs=1e-6)


def test_estimates_are_means_and_ratios_of_means(lm, text, sae):
    got = ablate(sae, lm, text, SITE, context=32, positions=5, T=2)
    mean = {n: torch.cat(v)[:, 0].double().mean().item() for n, v in got.values.items()}
    assert got.estimate().value == pytest.approx(mean["latents"], abs=1e-6)
    assert got.estimate(over="channels").value == pytest.approx(mean["latents"] / mean["channels"], abs=1e-5)
    assert got.estimate(over="latents").low == got.estimate(over="latents").high == 1


def test_positions_are_real_tokens_with_room(lm, text):
    spots = draw_spots(lm, text, context=24, positions=40, T=20)
    assert all(isinstance(at, Spot) and at.T == 20 and 0 < at.position <= 4 and at.keep[at.position] and at.ids.shape[1] == at.position + 20 for at in spots)
    assert len({tuple(at.ids[0, :5].tolist()) for at in spots}) > 30


def test_nothing_active_gives_no_figure(lm, text, sae):
    silent = SAE(SAEConfig(d=64, n=32, k=4)).requires_grad_(False)
    silent.b_enc.fill_(-1)
    got = ablation_sparsity(silent, lm, text, SITE, context=32, positions=3, T=2)
    assert got.value is None and "no ablation had an effect" in repr(got)


# --- mistakes -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("wrong, said", [
    (lambda lm, ids, sae, text: spot(lm, ids, 3, T=1_000), "T is 1000 but the window ends"),
    (lambda lm, ids, sae, text: spot(lm, ids, 3, T=0), "choose T from 1"),
    (lambda lm, ids, sae, text: spot(lm, ids, 500), "position is 500 but the window has"),
    (lambda lm, ids, sae, text: spot(lm, ids, -1), "position is -1"),
    (lambda lm, ids, sae, text: spot(lm, ids, 0, 2), "special token"),
    (lambda lm, ids, sae, text: spot(lm, ids.repeat(2, 1), 3), "one window"),
    (lambda lm, ids, sae, text: ablate(sae, lm, text, SITE, context=16, T=16), "T is 16 but a window has 16 tokens"),
    (lambda lm, ids, sae, text: ablate(sae, lm, text, SITE, positions=0), "positions is 0"),
    (lambda lm, ids, sae, text: ablate(sae, lm, Text("note", lambda: iter([Document("a", "x = 1")]), lambda i, d: True), SITE), "'note' holds out 0 windows"),
    (lambda lm, ids, sae, text: effects(sae, lm, ids, SITE, 3, latents=[256], T=2), "the dictionary has 256"),
    (lambda lm, ids, sae, text: attribute(sae, lm, ids, SITE, "two words here", 3), "tokens: give words of one"),
    (lambda lm, ids, sae, text: ablate(sae, load_lm("pylib-64", device="cpu", dtype="bfloat16"), text, SITE), "computes in torch.bfloat16"),
    (lambda lm, ids, sae, text: effects(object(), lm, ids, SITE, 3, T=2), "no encode or no decode"),
])
def test_mistakes_are_told_in_one_sentence(lm, ids, sae, text, wrong, said):
    with pytest.raises(UserError, match=said) as told: wrong(lm, ids, sae, text)
    assert "\n" not in str(told.value)


def test_a_decode_without_gradients_is_refused(lm, ids, sae):
    class Numb(Dense):
        @torch.no_grad()
        def decode(self, dense, normed): return super().decode(dense, normed)
    with pytest.raises(UserError, match="cannot be followed by autograd"): attribute(Numb(sae), lm, ids, SITE, " width", 7)


# --- words and time --------------------------------------------------------------------------------------

def test_the_shape_of_an_effect_is_told_in_words_and_in_time():
    change = torch.zeros(4, 8, 50, dtype=torch.float64)
    change[0, 0, 7] = 2                  # one word at one token
    change[1, :, 7] = -1                 # one word at every token
    change[2, 3] = 5                     # every word at one token
    change[3, 2, :10], change[3, 5, :40] = 3., .001   # the words of the token that counts
    want = torch.tensor([[1 / 400, 1 / 50, 1 / 8], [1 / 50, 1 / 50, 1], [1 / 8, 1, 1 / 8]], dtype=torch.float64)
    torch.testing.assert_close(shape(change)[:3], want)
    assert shape(change)[3, 1].item() == pytest.approx(.2, rel=1e-4) and shape(change)[3, 2].item() == pytest.approx(1 / 8, rel=.01)


def test_a_latent_zeroed_at_all_tokens_is_an_intervention_by_hand(precise, ids, sae):
    double = SAE(sae.cfg).double()
    double.load_state_dict({k: v.double() for k, v in sae.state_dict().items()})
    at = spot(precise, ids, 6, 5)
    x, d = precise.read(at.ids, SITE)[0], Dictionary(double, precise.read(ids[None], SITE)[0])
    some = active(d, x[6])[:3]
    changes = without(d, x[6:], some)
    _, *found = torch.cat(list(ablated_logits(precise, SITE, at, x, changes)))
    for i, latent in enumerate(some.tolist()):
        code = double.encode(x[6:])
        values = torch.where(code.indices == latent, 0., code.values)
        rows = x.clone()
        rows[6:] += (double.decode(replace(code, values=values)) - double.decode(code)).detach()
        torch.testing.assert_close(found[i], precise.logits(at.ids, SITE, lambda _: rows[None])[0, -5:].detach(), atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(changes[:, 0], without(d, x[6], some))


def test_every_setting_of_an_ablation_changes_it(lm, sae, text):
    plain = dict(context=32, positions=6, T=4, latents=2)
    base = ablate(sae, lm, text, SITE, **plain)
    flat = lambda found: torch.cat([v for n in found.values for v in found.values[n]])
    for name, other in dict(T=3, seed=1, everywhere=True, error=False, context=24, positions=7, latents=3, nulls=False).items():
        found = ablate(sae, lm, text, SITE, **(plain | {name: other}))
        assert found.settings[name] == other if name != "nulls" else "channels" not in found.values
        assert flat(found).shape != flat(base).shape or not torch.equal(flat(found), flat(base)), name
    assert torch.equal(flat(ablate(sae, lm, text, SITE, **plain, portion=1)).isfinite(), flat(base).isfinite())
    again = ablate(sae, lm, text, SITE, **plain)
    assert torch.equal(flat(again).nan_to_num(), flat(base).nan_to_num())


def test_random_directions_are_as_long_as_the_latents(lm, sae, text, monkeypatch):
    import sae_nb.ablate as module
    seen = []
    monkeypatch.setattr(module, "shapes", lambda lm, site, at, base, changes, portion: seen.append(changes) or torch.zeros(len(changes), 3))
    for everywhere in (False, True):
        seen.clear()
        ablate(sae, lm, text, SITE, context=32, positions=3, T=4, everywhere=everywhere)
        for own, drawn in zip(seen[::4], seen[1::4]):
            at_spot = (own[:, 0] if everywhere else own).norm(dim=-1).mean()
            lengths = drawn.norm(dim=-1)
            torch.testing.assert_close(lengths, at_spot.expand_as(lengths), atol=1e-4, rtol=1e-3)
            assert own.shape == drawn.shape and own.ndim == 2 + everywhere


def test_spots_are_drawn_over_all_documents_and_the_interval_over_documents(lm, sae, text):
    found = ablate(sae, lm, text, SITE, context=32, positions=24, T=4, latents=2)
    assert len(set(found.docs)) > 1 and found.estimate().settings["unit"] == "documents"
    assert found.estimate().settings["units"] == len(set(found.docs))


def test_ablations_in_one_thread_leave_other_threads_alone(lm, ids, sae):
    from threading import Event, Thread
    at = spot(lm, ids, 6, 3)
    x, d = lm.read(at.ids, SITE)[0], Dictionary(sae, lm.read(ids[None], SITE)[0])
    changes, clean, stop, wrong = without(d, x[6], active(d, x[6])), lm.logits(ids[None]), Event(), []
    def work():
        while not stop.is_set():
            now = lm.logits(ids[None])
            if now.shape != clean.shape or not torch.allclose(now, clean, atol=1e-4): wrong.append(tuple(now.shape))
    other = Thread(target=work)
    other.start()
    for _ in range(20): list(ablated_logits(lm, SITE, at, x, changes, portion=1))
    stop.set()
    other.join()
    assert not wrong

"Steering: each definition against a slow, obvious one."
import pytest
import torch
from sae_nb.core import UserError, generator
from sae_nb.lm import load_lm
from sae_nb.metrics import next_token_loss
from sae_nb.sae import SAE, Code, Dictionary, SAEConfig, init_
from sae_nb.steer import clamping, continuation, doses, placed, random_like, real_tokens, steered, votes
from sae_nb.text import Document, windows

SITE = "resid_post.1"


@pytest.fixture(scope="module")
def lm(): return load_lm("pylib-64", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def batch(lm):
    docs = [Document(str(i), f"def f{i}(self, x):\n    return x * {i} + self.value[{i}]  # a comment, and another\n" * 6) for i in range(12)]
    return next(windows(docs, lm.tokenizer, 32, 9))


@pytest.fixture(scope="module")
def rows(lm, batch): return lm.read(batch.ids, SITE)[batch.keep].float()


@pytest.fixture(scope="module")
def sae(rows): return init_(SAE(SAEConfig(d=64, n=48, k=6)), rows).requires_grad_(False)


class Dense:
    "A dictionary of another library: dense codes."
    def __init__(self, sae): self.W, self.b = sae.W_dec, sae.b_dec
    def encode(self, rows): return ((rows - self.b) @ self.W.T).relu()
    def decode(self, code): return code @ self.W + self.b


def test_placed_equals_writing_into_the_dense_code(sae, rows):
    for values in (2.5, torch.rand(len(rows), 1, generator=generator("placed"))):
        for latent in (0, 1, 17, 47):
            code = sae.encode(rows)
            found, dense = placed(code, latent, values), code.dense()
            dense[:, latent] = values if isinstance(values, float) else values[:, 0]
            torch.testing.assert_close(found.dense(), dense)
            total = torch.zeros_like(dense).scatter_add(-1, found.indices, found.values)   # for decoders that add what stands twice
            torch.testing.assert_close(total, dense)


def test_no_latent_stands_twice():
    g = generator("twice")
    for n, k in ((5, 4), (5, 5), (9, 1)):
        indices = torch.stack([torch.randperm(n, generator=g)[:k] for _ in range(64)])
        code = Code(torch.rand(64, k, generator=g), indices, n)
        found = placed(code, 2, 7.)
        assert all(len({*row}) == len(row) for row in found.indices.tolist())
        assert (found.dense()[:, 2] == 7).all() and torch.equal(found.dense()[:, [i for i in range(n) if i != 2]], code.dense()[:, [i for i in range(n) if i != 2]])


def test_the_change_is_along_the_decoder_and_the_error_stays(sae, rows):
    code = sae.encode(rows)
    old = (code.values * (code.indices == 5)).sum(-1, keepdim=True)
    scale = code.normed.restore(torch.ones_like(rows)) - code.normed.restore(torch.zeros_like(rows))
    torch.testing.assert_close(clamping(sae, 5, 4.)(rows), (4. - old) * sae.W_dec[5] * scale, atol=1e-4, rtol=1e-3)
    error = rows - sae(rows)
    torch.testing.assert_close(rows + clamping(sae, 5, 4.)(rows) - error, sae.decode(placed(code, 5, 4.)), atol=1e-4, rtol=1e-3)


def test_its_own_value_changes_nothing(sae, rows):
    code = sae.encode(rows)
    for i in range(4):
        for latent, value in zip(code.indices[i].tolist(), code.values[i].tolist()):
            assert clamping(sae, latent, value)(rows[i:i + 1]).abs().max() < 1e-4


def test_any_dictionary_can_be_steered(sae, rows):
    other = Dense(sae)
    z = other.encode(rows)
    want = (3. - z[:, [7]]) * other.W[7]
    torch.testing.assert_close(clamping(other, 7, 3.)(rows), want, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(clamping(Dictionary(other, rows), 7, 3.)(rows), want, atol=1e-4, rtol=1e-3)


def test_one_row_alone_is_steered_as_among_others(sae, rows):
    together = clamping(sae, 3, 2.)(rows)
    torch.testing.assert_close(clamping(sae, 3, 2.)(rows[4:5]), together[4:5], atol=1e-5, rtol=1e-4)


def test_steered_logits_equal_a_splice_by_hand(lm, sae, batch):
    assert torch.equal(real_tokens(lm, batch.ids), batch.keep)
    x = lm.read(batch.ids, SITE)
    change = clamping(sae, 5, 4.)
    for b in range(2):
        for t in range(x.shape[1]):
            if batch.keep[b, t]: x[b, t] = x[b, t] + change(lm.read(batch.ids, SITE)[b, t][None])[0]
    want = lm.logits(batch.ids[:2], SITE, lambda _: x[:2])
    torch.testing.assert_close(steered(lm, batch.ids[:2], SITE, change), want, atol=1e-3, rtol=1e-3)
    assert torch.equal(steered(lm, batch.ids), lm.logits(batch.ids))


def test_continuation_is_greedy_and_never_special(lm, sae, batch):
    ids, change, special = batch.ids[0], clamping(sae, 5, 4.), lm.tokenizer.all_special_ids
    want = ids.tolist()
    for _ in range(5):
        logits = steered(lm, torch.tensor([want]), SITE, change)[0, -1]
        logits[special] = -torch.inf
        want.append(int(logits.argmax()))
    assert continuation(lm, ids, SITE, change, 5) == want[len(ids):]
    long = batch.ids.flatten().repeat(2)[:lm.context + 20]
    assert len(continuation(lm, long, count=3)) == 3   # longer than the model's context


def test_a_random_direction_is_as_long_and_the_same_everywhere(sae, rows):
    change = clamping(sae, 5, 4.)
    other = random_like(change, 1)(rows)
    torch.testing.assert_close(other.norm(dim=-1), change(rows).norm(dim=-1))
    unit = other / other.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(unit, unit[:1].expand_as(unit), atol=1e-4, rtol=1e-3)
    assert not torch.allclose(unit, random_like(change, 2)(rows)[:1] / other[:1].norm())


def test_votes_are_the_mean_gain_in_logits(lm, sae, batch):
    change = clamping(sae, 5, 4.)
    gain = (steered(lm, batch.ids, SITE, change) - lm.logits(batch.ids))[batch.keep]
    mean = (gain - gain.median(-1, keepdim=True).values).mean(0)
    assert votes(lm, batch, SITE, change, 5) == mean.topk(5).indices.tolist()


def test_doses_equal_a_slow_count(lm, sae, batch):
    chosen, seen = batch.take([0, 1, 2]), batch.take([3, 4, 5, 6, 7, 8])
    found = doses(sae, lm, chosen, seen, SITE, 5, [0., 2., 6.], top=4, directions=2)
    words, clean, real = votes(lm, chosen, SITE, clamping(sae, 5, 6.), 4), lm.logits(seen.ids), seen.keep
    assert found.words == [lm.tokenizer.decode([i]) for i in words]
    for i, value in enumerate(found.values):
        change = clamping(sae, 5, value)
        new, got = steered(lm, seen.ids, SITE, change), {name: es[i] for name, es in found.effects.items()}
        kl = lambda logits: (clean.softmax(-1) * (clean.log_softmax(-1) - logits.log_softmax(-1))).sum(-1)[real].mean().item()
        others = [kl(steered(lm, seen.ids, SITE, random_like(change, j))) for j in range(2)]
        assert got["probability"].value == pytest.approx(new.softmax(-1)[..., words].sum(-1)[real].mean().item(), rel=1e-4)
        assert got["loss"].value == pytest.approx((next_token_loss(new, seen).sum() / real[:, 1:].sum()).item(), rel=1e-4)
        assert got["kl"].value == pytest.approx(kl(new), rel=1e-3, abs=1e-6) and got["kl"].nulls["random"] == pytest.approx(sum(others) / 2, rel=1e-3, abs=1e-6)
    assert doses(sae, lm, chosen, seen, SITE, 5, [1.], words=words[:2], directions=1).words == found.words[:2]
    assert found.effects["kl"][0].low is not None and "held at" in repr(found) and found.picture("kl").fig.data


def test_one_sentence_for_what_cannot_be(lm, sae, batch, rows):
    with pytest.raises(UserError, match="choose from 0 to 47"): clamping(sae, 48, 1.)(rows)
    with pytest.raises(UserError, match="give at least one"): continuation(lm, [], count=3)
    with pytest.raises(UserError, match="at least one number"): doses(sae, lm, batch, batch, SITE, 5, [])
    found = doses(sae, lm, batch.take([0]), batch.take([1, 2]), SITE, 5, [1.], directions=1)
    with pytest.raises(UserError, match="choose one of"): found.picture("loss of weight")


def test_a_continuation_writes_text_alone(lm, sae, batch, monkeypatch):
    "Not the likeliest of all, where that is a special token or a number that is no token."
    from types import SimpleNamespace
    import sae_nb.steer as steer
    t = lm.tokenizer
    wide = len(t) + 8
    likeliest = torch.arange(wide).float().flip(0)   # token 0 is special and the likeliest, numbers beyond the tokenizer come next
    likeliest[len(t):] += 2 * wide
    likeliest[t.all_special_ids] = 4. * wide
    monkeypatch.setattr(steer, "steered", lambda lm, ids, site=None, change=None: likeliest.expand(1, ids.shape[1], wide).clone())
    first = next(i for i in range(wide) if i not in t.all_special_ids)
    assert continuation(lm, batch.ids[0], count=3) == [first] * 3
    class Tokenizer:
        all_special_ids, added_tokens_decoder = [0], {5: SimpleNamespace(special=True), 6: SimpleNamespace(special=False)}
        def __len__(self): return 9
    assert steer.unwritten(SimpleNamespace(tokenizer=Tokenizer()), 12) == [0, 5, 9, 10, 11]


def test_a_prompt_is_read_as_windows_are(lm, sae, monkeypatch):
    "Behind the opening token, however long it is."
    import sae_nb.steer as steer
    text, real, seen = "def read(self):\n    ", steer.steered, []
    assert continuation(lm, text, count=4) == continuation(lm, lm.tokens(text)[0], count=4)
    monkeypatch.setattr(steer, "steered", lambda lm, ids, *a: (seen.append(ids), real(lm, ids, *a))[1])
    long = torch.cat([lm.tokens(text)[0, :1], torch.arange(3, 3 + lm.context + 10)])
    written = continuation(lm, long, count=2)
    for j, ids in enumerate(seen):
        want = torch.cat([long[:1], torch.cat([long[1:], torch.tensor(written[:j], dtype=torch.long)])[2 - lm.context:]])
        assert ids.shape[1] == lm.context - 1 and torch.equal(ids[0], want)


def test_effects_are_those_of_a_model_in_float32(lm, sae, batch):
    "A model in bfloat16 is measured through an exact copy, small effects included."
    from sae_nb.lm import LM
    short = LM(load_lm("pylib-64", device="cpu", dtype="bfloat16").model, lm.tokenizer, "short")
    full = LM(load_lm("pylib-64", device="cpu", dtype="bfloat16").model.float(), lm.tokenizer, "full")
    chosen, seen = batch.take([0, 1, 2]), batch.take([3, 4, 5])
    mine, want = (doses(sae, m, chosen, seen, SITE, 5, [.05, 2.], directions=1) for m in (short, full))
    assert short.dtype == torch.bfloat16 and mine.words == want.words
    for name in mine.effects:
        for a, b in zip(mine.effects[name], want.effects[name]): assert a.value == pytest.approx(b.value, rel=1e-4) and a.nulls["random"] == pytest.approx(b.nulls["random"], rel=1e-4)


def test_intervals_draw_whole_documents(lm, sae):
    "A document told twice adds nothing to what is known: the interval of eight windows of four texts is that of four windows."
    docs = [Document(str(i), f"def f{i}(self, x):\n    return x * {i} + self.value[{i}]  # a comment, and another\n" * 6) for i in range(4)]
    some = next(windows(docs, lm.tokenizer, 32, 40))
    first = some.take([i for i, d in enumerate(some.docs) if i == some.docs.index(d)])
    twice = first.take([0, 0, 1, 1, 2, 2, 3, 3][:2 * len(first)])
    one, two = (doses(sae, lm, first, w, SITE, 5, [3.], directions=1, words=[9, 10]).effects["loss"][0] for w in (first, twice))
    assert two.value == pytest.approx(one.value) and (two.low, two.high) == pytest.approx((one.low, one.high)) and two.settings["units"] == len(first) == 4


def test_numbers_of_numpy_and_torch(lm, sae, batch, rows):
    import numpy as np
    torch.testing.assert_close(clamping(sae, np.int64(5), np.float32(4.))(rows), clamping(sae, 5, 4.)(rows))
    torch.testing.assert_close(clamping(sae, torch.tensor(5), torch.tensor(4.))(rows), clamping(sae, 5, 4.)(rows))
    found = doses(sae, lm, batch.take([0]), batch.take([1, 2]), SITE, np.int64(5), np.array([1., 2.]), words=torch.tensor([9, 10]), directions=np.int64(1), seed=np.int64(0))
    assert found.values == [1., 2.] and found.latent == 5 and len(found.words) == 2
    for wrong in (float("nan"), float("inf"), "3", None, 1e38): pytest.raises(UserError, clamping, sae, 5, wrong)
    for wrong in (1.5, "3", None, True, -1, 48, 10**30): pytest.raises(UserError, lambda: clamping(sae, wrong, 1.)(rows))


def test_two_threads_do_not_disturb_each_other(lm, sae, batch):
    "Doses in one thread and plain reading in another, on one model, are what they are alone."
    from concurrent.futures import ThreadPoolExecutor
    chosen, seen = batch.take([0, 1, 2]), batch.take([3, 4, 5])
    dose = lambda: doses(sae, lm, chosen, seen, SITE, 5, [2.], words=[9, 10], directions=1).effects["kl"][0].value
    plainly = lambda: lm.logits(batch.ids)
    want, clean = dose(), plainly()
    with ThreadPoolExecutor(2) as pool:
        jobs = [(pool.submit(dose), pool.submit(plainly)) for _ in range(6)]
        for a, b in jobs:
            assert a.result() == pytest.approx(want, rel=1e-4)
            torch.testing.assert_close(b.result(), clean, rtol=1e-3, atol=1e-3)

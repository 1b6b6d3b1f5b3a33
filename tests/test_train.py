"Training: odd rows are told, no device needs float64, and every setting does what it says and nothing else."
import math
from contextlib import nullcontext
from dataclasses import fields

import pytest
import torch
from no_float64 import NoFloat64
from said import sentence

from sae_nb.acts import normalise
from sae_nb.core import UserError, generator
from sae_nb.dead import AuxK, MultiTopK, paper_terms, power_of_two
from sae_nb.refine import fit_threshold, progressive, refine, shrinkage
from sae_nb.sae import SAE, SAEConfig, finite_rows, geometric_median, init_, nmse
from sae_nb.train import State, TrainConfig, held_out_nmse, learning_rate, row_scale, train


def draw(*shape, key="x"): return torch.randn(*shape, generator=generator(0, key))


def fresh(n=32, d=8, k=4, normalise="none", **kw):
    "An untrained SAE on 100 rows."
    return init_(SAE(SAEConfig(d=d, n=n, k=k, normalise=normalise)), draw(100, d), **kw)


def steps(rows, sae=None, held_out=None, **cfg):
    "A few steps on batches of rows."
    cfg = TrainConfig(**{"tokens": 10**6, "batch": 50, **cfg})
    return list(train(sae or fresh(), rows, cfg, held_out=held_out))


# --- rows that cannot be learned from ------------------------------------------------------------------

def spoiled(value, *at):
    rows = draw(50, 8)
    rows[list(at), 2] = value
    return rows


USES = {
    "init_": lambda rows: init_(SAE(SAEConfig(d=8, n=32, k=4)), rows),
    "train": lambda rows: steps([rows]),
    "row_scale": lambda rows: row_scale(fresh(), rows),
    "held out": lambda rows: steps([draw(50, 8)], held_out=rows),
    "a later batch": lambda rows: steps([draw(50, 8), rows]),
    "refine": lambda rows: refine(fresh(), rows),
    "shrinkage": lambda rows: shrinkage(fresh(), rows),
    "progressive": lambda rows: progressive(fresh(), rows, [1, 2]),
    "fit_threshold": lambda rows: fit_threshold(fresh(), rows, 2)}
every_use = pytest.mark.parametrize("use", USES)


@every_use
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_are_named(use, value):
    said = sentence(lambda: USES[use](spoiled(value, 3, 41)), "2 of 50", "3, 41", "NaN or infinity")
    assert "lr" not in said


@every_use
@pytest.mark.parametrize("shape", [(0, 8), (50, 7), (5, 10, 8), (8,), ()])
def test_rows_of_a_wrong_shape_are_sentence(use, shape): sentence(lambda: USES[use](torch.ones(shape)))


@every_use
def test_rows_with_a_graph_are_taken_as_they_are(use):
    "What made the rows is not trained, and nothing is remembered of it."
    rows = draw(50, 8).requires_grad_()
    USES[use](rows * 1.)
    assert rows.grad is None and not finite_rows(rows).requires_grad


@pytest.mark.parametrize("use", ["init_", "train", "a later batch", "held out"])
def test_rows_too_large_for_float32_are_told(use):
    "Their squares are no float32 where rows are taken as they are; where they are normalised, they are."
    if use != "init_": assert "lr" not in sentence(lambda: USES[use](spoiled(1e25, 7)), "1e+25", "scale")
    sentence(lambda: init_(SAE(SAEConfig(d=8, n=32, k=4, normalise="none")), spoiled(1e25, 7)), "1e+25")


@pytest.mark.parametrize("how", ["unit_norm", "layer_norm"])
@pytest.mark.parametrize("size", [1e19, 1e30, 1e-19, 1e-30])
def test_normalised_rows_of_any_size_are_reconstructed(how, size):
    "In float32 as in float64; the squares of these entries are beyond float32."
    sae, rows = fresh(normalise=how), draw(20, 8)
    code, wide = normalise(rows * size, how), normalise(rows.double() * size, how)
    torch.testing.assert_close(code.rows, wide.rows.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(code.scale, wide.scale.float(), rtol=1e-4, atol=0)
    if how == "unit_norm" or size > 1: assert nmse(rows.double() * size, sae(rows * size).double()) < 2
    if size > 1: assert steps([rows * size] * 3, fresh(normalise=how))[-1].loss < 10


def test_rows_too_small_for_float32_are_told():
    "Not as rows that are all the same, which they are not."
    tiny = draw(50, 8) * 1e-25
    sentence(lambda: row_scale(fresh(), tiny), "scale them up")
    sentence(lambda: steps([tiny]), "scale them up")


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1., 1e19, 1e30])
def test_nmse_has_no_unit(size):
    rows, recon = draw(50, 8), draw(50, 8, key="other")
    want = ((rows - recon).square().sum() / (rows - rows.mean(0)).square().sum()).item()
    assert nmse(rows * size, recon * size) == pytest.approx(want, rel=1e-4)
    sae = fresh(normalise="unit_norm")
    assert held_out_nmse(sae, rows * size) == pytest.approx(held_out_nmse(sae, rows), rel=1e-3)


def test_rows_of_numpy_and_lists_are_taken():
    rows, sae = draw(50, 8), fresh(normalise="layer_norm")
    for given in (rows.numpy(), rows.tolist(), rows.double().numpy()):
        assert torch.equal(sae(given), sae(rows)) and torch.equal(sae.pre(given), sae.pre(rows))
        torch.testing.assert_close(init_(fresh(), given).state_dict(), init_(fresh(), rows).state_dict())
        assert steps([given])[0].loss == pytest.approx(steps([rows])[0].loss)
        assert refine(sae, torch.as_tensor(given).float()).shrinkage == refine(sae, rows).shrinkage


@pytest.mark.parametrize("how", ["unit_norm", "layer_norm"])
def test_normalisation_of_ordinary_rows_is_what_it_was(how):
    rows = draw(2_000, 8) * torch.logspace(-4, 4, 2_000)[:, None]
    rows[0] = 1.
    centred = rows - rows.mean(-1, keepdim=True)
    length = centred.norm(dim=-1, keepdim=True)
    scale = length if how == "unit_norm" else length / 7**.5 + 1e-5
    assert torch.equal(normalise(rows, how).scale, torch.where(scale > 0, scale, 1.))


@pytest.mark.parametrize("rows", [torch.ones(1, 8), torch.ones(50, 8), torch.zeros(50, 8)])
def test_rows_that_are_all_the_same_have_no_variance(rows):
    sentence(lambda: steps([rows]), "same")
    sentence(lambda: row_scale(fresh(), rows), "same")
    sentence(lambda: nmse(rows, rows), "same")
    sentence(lambda: steps([draw(50, 8)], held_out=rows, eval_every=1), "same")


def test_a_rate_that_is_too_large_is_told_as_before(): sentence(lambda: steps([draw(50, 8)] * 9, lr=1e25), "smaller lr")


def test_training_in_half_precision_is_refused():
    sentence(lambda: steps([draw(50, 8)], fresh().half()), "float16", "float()")


OUT_OF_RANGE = [
    dict(beta1=1.), dict(beta2=-.1), dict(eps=0.), dict(lr=math.inf), dict(lr=0.), dict(ema=1.), dict(decay=1.5),
    dict(dead_tokens=-1), dict(micro=-1), dict(warmup=-1), dict(clip=-1.), dict(batch=0), dict(tokens=0),
    dict(eval_every=0), dict(encoder="x")]

@pytest.mark.parametrize("wrong", OUT_OF_RANGE)
def test_settings_out_of_range_are_sentence(wrong):
    sentence(lambda: TrainConfig(**{"tokens": 9, **wrong}), next(iter(wrong)))


def trained_weights(around, rows):
    "The weights after a few steps with AuxK, in float32."
    cfg, sae = TrainConfig(tokens=150, batch=50, dead_tokens=60), fresh(64)
    with around: list(train(sae, rows.split(50), cfg, paper_terms(64, 8, cfg), held_out=rows))
    return torch.cat([w.detach().flatten() for w in sae.parameters()])


@pytest.mark.parametrize("around", [torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16)])
def test_training_is_the_same_whatever_it_is_called_in(around):
    rows = draw(150, 8, key="rows")
    assert torch.equal(trained_weights(around, rows), trained_weights(nullcontext(), rows))


def test_rows_read_in_inference_mode_can_be_trained_on():
    with torch.inference_mode(): rows = draw(150, 8, key="rows") * 1.
    assert torch.equal(trained_weights(nullcontext(), rows), trained_weights(nullcontext(), rows.clone()))


def test_after_a_spoiled_batch_training_can_go_on():
    "The error leaves no gradient behind: caught, the run goes on as if the batch had not been."
    cfg, good = TrainConfig(tokens=100, batch=50), draw(100, 8).split(50)
    def run(batches):
        sae = fresh()
        state = State(sae, cfg, scale=1.)
        for rows in batches:
            try: next(train(sae, [rows], cfg, state=state))
            except UserError: pass
        return torch.cat([w.detach().flatten() for w in sae.parameters()])
    assert torch.equal(run([good[0], spoiled(math.nan, 1), good[1]]), run(good))


# --- a device without float64 --------------------------------------------------------------------------

def test_the_fake_device_notices():
    x = draw(4, 3)
    with NoFloat64():
        assert x.device.type == "mps" and x.cpu().device.type == "cpu" and torch.zeros(3).device.type == "cpu"
        assert (x + 1).device.type == "mps" and torch.zeros(3, device=x.device).device.type == "mps"
        x.cpu().double().sum()
        made = lambda: torch.zeros(2, device=x.device, dtype=torch.float64)
        for wrong in (x.double, x.numpy, made, lambda: x + torch.zeros(4, 3)):
            with pytest.raises((TypeError, RuntimeError)): wrong()


def test_training_needs_no_float64():
    "Initialisation, steps with all terms, averages, evaluation, what is kept; the same numbers as on the CPU."
    how = dict(clip=.5, warmup=200, decay=.5, multi_topk=True, micro=60, eval_every=2)
    x, cfg = draw(300, 8), TrainConfig(tokens=600, batch=100, dead_tokens=150, **how)
    def run():
        sae = init_(SAE(SAEConfig(d=8, n=64, k=4)), x)
        state = State(sae, cfg, paper_terms(64, 8, cfg))
        told = list(train(sae, (x[:100], x[100:200], x[200:]) * 2, cfg, state=state, held_out=x))
        return told, [t.cpu() for t in state.tensors().values()], state
    told, kept, _ = run()
    with NoFloat64():
        there, also, state = run()
        state.load(state.tensors())
    assert [s.step for s in there] == [s.step for s in told] and there[-1].dead > 0
    seen = lambda steps: [s.held_out for s in steps[1::2]]
    torch.testing.assert_close(seen(there), seen(told), rtol=1e-4, atol=1e-5)
    for a, b in zip(kept, also): torch.testing.assert_close(a.float(), b.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("normalise", ["none", "layer_norm"])
def test_refinement_and_measures_need_no_float64(normalise):
    from sae_nb.metrics import Reconstruction
    sae, x = fresh(normalise=normalise).requires_grad_(False), draw(200, 8)
    def run():
        r = refine(sae, x)
        seen = Reconstruction(8, 32)
        seen.add(x, sae(x), sae.encode(x))
        cut = [e.value for e in progressive(sae, x, [1, 2, 4]).nmse]
        values = [r.after.sum().item(), r.shrinkage, r.kkt, shrinkage(sae, x).value]
        return values + cut + [fit_threshold(sae, x, 3), seen.nmse, seen.l0]
    want = run()
    with NoFloat64(): got = run()
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


# --- every setting does what it says, and nothing else -------------------------------------------------

BASE = dict(tokens=330, batch=50, lr=.02, dead_tokens=120, ema=.9, k_aux=3)
SPREAD = torch.tensor([.2, .5, 1., 1., 2., 3.])    # no two channels are alike
MEAN = torch.tensor([4., -1., 0., 2., 0., -3.])
ROWS = (draw(400, 6, key="rows") * SPREAD + MEAN).double()
HELD_OUT = ROWS[:30] + draw(30, 6, key="held out").double()


def start(how="none"):
    "The same untrained SAE each time, in float64, its mean row far from zero."
    sae = init_(SAE(SAEConfig(d=6, n=48, k=3, normalise=how)).double(), ROWS[:200])
    sae.b_enc.data[30:] -= 1.   # some never fire
    return sae


def library(how="none", **cfg):
    "Steps and state of a run."
    cfg, sae = TrainConfig(**{**BASE, **cfg}), start(how)
    state = State(sae, cfg, paper_terms(48, 6, cfg))
    return list(train(sae, ROWS.repeat(9, 1).split(cfg.batch), cfg, state=state, held_out=HELD_OUT)), state


def chosen(pre, k):
    "The code with the k largest of each row, its negative values clipped, through every latent."
    return torch.zeros_like(pre).scatter(1, pre.topk(k).indices, pre.topk(k).values).relu()


def standardised(rows):
    centred = rows - rows.mean(1, keepdim=True)
    return centred / (centred.square().sum(1, keepdim=True) / (rows.shape[1] - 1)).sqrt().add(1e-5)


class Slow:
    "Training as one would write it down: dense, one batch at a time, Adam and averages by their formulas."
    def __init__(self, cfg, how):
        self.cfg, self.how, sae = cfg, how, start(how)
        self.w = {k: v.clone() for k, v in sae.state_dict().items()}
        self.m, self.v, self.average = ({k: torch.zeros_like(v) for k, v in self.w.items()} for _ in range(3))
        self.since, self.scale, self.told = torch.zeros(48), None, []

    def losses(self, x, w):
        cfg, pre = self.cfg, (x - w["b_dec"]) @ w["W_enc"].T + w["b_enc"]
        code = chosen(pre, 3)
        error = x - code @ w["W_dec"] - w["b_dec"]
        self.since += len(x)
        self.since[(code.detach() > 1e-3).any(0)] = 0
        dead, e = self.since > cfg.dead_tokens, error.detach()
        found = {"nmse": error.square().mean() * self.scale, "auxk": torch.zeros(())}
        if dead.any() and cfg.aux:
            few = chosen(pre[:, dead], min(cfg.k_aux or 4, int(dead.sum())))
            found["auxk"] = cfg.aux * (few @ w["W_dec"][dead] - e).square().mean() / (e - e.mean(0)).square().mean()
        if cfg.multi_topk:
            wide = chosen(pre, 12) @ w["W_dec"] + w["b_dec"]
            found["multi_topk"] = (wide - x).square().mean() * self.scale / 8
        return found

    def gradient(self, rows):
        "Of the mean over all rows, whatever the parts."
        x = standardised(rows) if self.how == "layer_norm" else rows
        if self.scale is None: self.scale = 1 / (x - x.mean(0)).square().mean()
        leaves, parts = {k: v.clone().requires_grad_() for k, v in self.w.items()}, {}
        for part in x.split(self.cfg.micro or len(x)):
            for name, loss in self.losses(part, leaves).items():
                parts[name] = parts.get(name, 0.) + loss * len(part) / len(x)
        sum(parts.values()).backward()
        g = {k: v.grad for k, v in leaves.items()}
        g["W_dec"] -= (g["W_dec"] * self.w["W_dec"]).sum(1, keepdim=True) * self.w["W_dec"]
        return g, {k: v.item() for k, v in parts.items()}

    def step(self, rows, t):
        cfg = self.cfg
        g, parts = self.gradient(rows)
        length = sum(x.square().sum() for x in g.values()).sqrt().item()
        lr = cfg.lr * (min(1, t * cfg.batch / cfg.warmup) if cfg.warmup else 1)
        if cfg.decay: lr *= min(1, (cfg.steps - t + 1) / (cfg.decay * cfg.steps))
        for k, x in g.items():
            if cfg.clip: x = x * min(1, cfg.clip / length)
            self.m[k] = cfg.beta1 * self.m[k] + (1 - cfg.beta1) * x
            self.v[k] = cfg.beta2 * self.v[k] + (1 - cfg.beta2) * x * x
            mean, square = self.m[k] / (1 - cfg.beta1**t), self.v[k] / (1 - cfg.beta2**t)
            self.w[k] = self.w[k] - lr * mean / (square.sqrt() + cfg.eps)
        self.w["W_dec"] /= self.w["W_dec"].norm(dim=1, keepdim=True)
        for k in self.w: self.average[k] = cfg.ema * self.average[k] + (1 - cfg.ema) * self.w[k]
        dead = (self.since > cfg.dead_tokens).float().mean().item()
        told = dict(step=t, tokens=min(t * cfg.batch, cfg.tokens), loss=sum(parts.values()), nmse=parts["nmse"])
        self.told.append(told | dict(parts=parts, dead=dead, lr=lr, grad_norm=length, held_out=self.held_out(t)))

    def held_out(self, t):
        if t % self.cfg.eval_every and t < self.cfg.steps: return None
        w = {k: v / (1 - self.cfg.ema**t) for k, v in self.average.items()} if self.cfg.ema else self.w
        W_dec = w["W_dec"] / w["W_dec"].norm(dim=1, keepdim=True)
        x = standardised(HELD_OUT) if self.how == "layer_norm" else HELD_OUT
        error = x - chosen((x - w["b_dec"]) @ w["W_enc"].T + w["b_enc"], 3) @ W_dec - w["b_dec"]
        if self.how == "layer_norm": error = error * (HELD_OUT.std(1, keepdim=True) + 1e-5)
        return (error.square().sum() / (HELD_OUT - HELD_OUT.mean(0)).square().sum()).item()


def same_as_slow(how="none", **cfg):
    "A run of the library, each number of each step and all weights as the slow one has them."
    told, state = library(how, **cfg)
    slow = Slow(state.cfg, how)
    for t, rows in zip(range(1, state.cfg.steps + 1), ROWS.repeat(9, 1).split(state.cfg.batch)): slow.step(rows, t)
    assert len(told) == len(slow.told) == math.ceil(state.cfg.tokens / state.cfg.batch) == state.step
    for ours, theirs in zip(told, slow.told):
        for name, value in theirs.items():
            if value is None: assert getattr(ours, name) is None
            else: assert getattr(ours, name) == pytest.approx(value, rel=1e-6, abs=1e-12), (ours.step, name)
    for k, w in state.sae.state_dict().items(): torch.testing.assert_close(w, slow.w[k], rtol=1e-6, atol=1e-9)
    sums = state.average.sums if state.average else {}
    for k, w in sums.items(): torch.testing.assert_close(w, slow.average[k], rtol=1e-6, atol=1e-9)
    return told, state


CHANGES = {
    "tokens": 201, "batch": 30, "lr": .05, "eps": 1e-3, "beta1": .5, "beta2": .9, "warmup": 170, "decay": .6, "ema": 0.,
    "clip": .3, "micro": 20, "k_aux": 0, "aux": .5, "dead_tokens": 60, "encoder": "bfloat16", "multi_topk": True,
    "eval_every": 3, "seed": 1}
SILENT = {"ema", "eval_every", "seed", "encoder"}   # same weights; rows are float64 here, test_kernels has the encoder


def test_every_setting_has_its_test(): assert set(CHANGES) == {f.name for f in fields(TrainConfig)}


@pytest.fixture(scope="module")
def base(): return same_as_slow()


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_changes_what_it_says_and_nothing_else(name, base):
    "Each run equals the slow one with that setting; weights differ from the base's where they should, and only there."
    told, state = same_as_slow(**{name: CHANGES[name]})
    weights = zip(state.sae.state_dict().values(), base[1].sae.state_dict().values())
    assert all(torch.equal(a, b) for a, b in weights) == (name in SILENT)
    assert base[0][-1].dead > 0 and any(s.parts["auxk"] > 0 for s in base[0])


MANY = dict(micro=20, multi_topk=True, clip=.2, warmup=130, decay=.5, beta1=.7, eval_every=2)

@pytest.mark.parametrize("cfg", [dict(aux=0.), MANY, dict(micro=13, batch=45, decay=1.)])
@pytest.mark.parametrize("how", ["none", "layer_norm"])
def test_settings_together(how, cfg): same_as_slow(how, **cfg)


def test_the_rate_rises_from_zero_and_falls_to_zero():
    "By rows and by share of the run, and is flat between."
    cfg = TrainConfig(tokens=1000, batch=10, lr=2., warmup=100, decay=.25)
    rate = [learning_rate(cfg, i) for i in range(100)]
    torch.testing.assert_close(rate[:10], [.2 * i for i in range(1, 11)])
    assert set(rate[9:76]) == {2.}
    torch.testing.assert_close(rate[75:], [2 * i / 25 for i in range(25, 0, -1)])


def test_the_scale_of_the_loss_is_the_variance_about_the_mean_row():
    "Not about one number, and not about zero: these channels have means of their own."
    for how, x in (("none", ROWS), ("layer_norm", standardised(ROWS))):
        assert row_scale(start(how), ROWS) == pytest.approx(1 / (x - x.mean(0)).square().mean().item(), rel=1e-9)


def test_the_seed_fixes_the_start_and_training_draws_nothing():
    rows, make = ROWS.float(), lambda seed: init_(SAE(SAEConfig(d=6, n=48, k=3)), ROWS.float(), seed).state_dict()
    one, again, other = make(1), make(1), make(2)
    assert all(torch.equal(one[k], again[k]) for k in one) and not torch.equal(one["W_dec"], other["W_dec"])
    assert torch.equal(one["b_dec"], other["b_dec"])
    torch.manual_seed(0)
    before = torch.get_rng_state()
    steps([rows[:50]] * 3, init_(SAE(SAEConfig(d=6, n=48, k=3)), rows))
    assert torch.equal(before, torch.get_rng_state())


# --- what is kept at the end ---------------------------------------------------------------------------

@pytest.mark.parametrize("better", ["trained", "averaged"])
def test_the_better_of_trained_and_averaged_weights_is_kept(better, tmp_path):
    from sae_nb.runs import finish
    _, state = library()
    worse = state.sae.W_dec.data if better == "averaged" else state.average.sums["W_dec"]
    worse.copy_(worse.roll(7, 0))
    wanted = {"trained": state.sae, "averaged": state.best()}
    errors = {name: held_out_nmse(sae, HELD_OUT) for name, sae in wanted.items()}
    assert min(errors, key=errors.get) == better and max(errors.values()) > 2 * min(errors.values())
    (tmp_path / "config.json").write_text("{}")
    finish(tmp_path, state, HELD_OUT)
    assert SAE.load(tmp_path).digest == wanted[better].digest


def test_without_an_average_the_trained_weights_are_kept(tmp_path):
    from sae_nb.runs import finish
    _, state = library(ema=0.)
    (tmp_path / "config.json").write_text("{}")
    finish(tmp_path, state, HELD_OUT)
    assert state.average is None and SAE.load(tmp_path).digest == state.sae.digest == state.best().digest


# --- pieces of the start and of the terms --------------------------------------------------------------

@pytest.mark.parametrize("how", ["none", "layer_norm"])
@pytest.mark.parametrize("tied", [True, False])
def test_reconstructions_start_as_long_as_what_is_read(how, tied):
    "Measured from the median of the rows, which may be far from zero; other directions than those of the probe."
    rows = draw(500, 16).exp() + 30.
    rows[:20, :3] += 100.   # far out on one side
    sae = init_(SAE(SAEConfig(d=16, n=256, k=8, normalise=how)), rows, tied=tied).requires_grad_(False)
    unit = torch.nn.functional.normalize(draw(2_000, 16, key="directions"), dim=1)
    out = sae.decode_normed(*sae.encode_normed(unit + sae.b_dec)) - sae.b_dec
    assert out.norm(dim=1).mean().item() == pytest.approx(1, abs=.05)
    x = normalise(rows, how).rows
    torch.testing.assert_close(sae.b_dec.data, geometric_median(x))
    pull = torch.nn.functional.normalize(x - sae.b_dec, dim=1).sum(0)   # zero where the summed distance is smallest
    assert pull.norm() < 1e-3 * len(x) and not sae.b_enc.any()
    parallel = torch.nn.functional.cosine_similarity(sae.W_enc, sae.W_dec)
    assert (parallel > .999).all() if tied else parallel.abs().mean() < .5


NEAREST = {0: 1, .3: 1, 1: 1, 1.4: 1, 1.5: 2, 2.8: 2, 2.9: 4, 3: 4, 5.6: 4, 5.7: 8, 32: 32, 48: 64, 384: 512}

@pytest.mark.parametrize("x", NEAREST)
def test_a_power_of_two_is_the_nearest_in_ratio(x): assert power_of_two(x) == NEAREST[x]


def test_auxk_takes_a_power_of_two_near_half_the_width():
    for d, k in ((6, 4), (64, 32), (96, 64), (768, 512)): assert AuxK(9, d, TrainConfig(tokens=1)).k == k
    assert AuxK(9, 64, TrainConfig(tokens=1, k_aux=5)).k == 5


def test_terms_are_those_that_are_asked_for():
    kinds = lambda **cfg: [type(t) for t in paper_terms(48, 6, TrainConfig(tokens=1, **cfg))]
    assert kinds() == [AuxK] and kinds(multi_topk=True) == [AuxK, MultiTopK]


def test_two_trainings_at_once_end_with_the_bits_of_each_alone():
    "In two threads of one process, in one order of steps or another."
    from concurrent.futures import ThreadPoolExecutor
    def bits(seed):
        cfg = TrainConfig(tokens=1_000, batch=50, dead_tokens=200, multi_topk=True)
        rows = draw(1_000, 16, key=f"rows {seed}")
        sae = init_(SAE(SAEConfig(d=16, n=600, k=4)), rows[:100], seed)
        list(train(sae, rows.split(50), cfg, paper_terms(600, 16, cfg), held_out=rows[:200]))
        return sae.digest
    alone = [bits(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool: together = list(pool.map(bits, range(4)))
    assert together == alone and len(set(alone)) == 4

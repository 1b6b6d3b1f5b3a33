"Gradients against dense float64 autograd, and a visible test for every trap that other implementations fell into."
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from sae_nb.acts import normalise
from sae_nb.core import UserError
from sae_nb.dead import AuxK, MultiTopK, Tracker, aux_loss, paper_terms
from sae_nb.metrics import Reconstruction
from sae_nb.kernels import Tape
from sae_nb.sae import SAE, Code, SAEConfig, init_, nmse
from sae_nb.train import State, TrainConfig, forward_backward, gradients, train, update

few = settings(max_examples=25, deadline=None, derandomize=True)
NAMES = ("W_enc", "W_dec", "b_enc", "b_dec")


def random_sae(n, d, k, seed=0, **kw):
    "An SAE in float64 with random weights of every kind."
    torch.manual_seed(seed)
    sae = SAE(SAEConfig(d=d, n=n, k=k, **{"normalise": "none", **kw})).double()
    for p in sae.parameters(): p.data.normal_()
    return sae


def sparse(pre, k, relu, indices=None):
    "The dense code with only the k largest entries, or those at `indices`, as one would write it down."
    indices = pre.topk(k).indices if indices is None else indices
    z = torch.where(torch.zeros_like(pre, dtype=torch.bool).scatter(-1, indices, True), pre, torch.zeros_like(pre))
    return z.relu() if relu else z


def dense_loss(sae, rows, scale, chosen, dead=None, k_aux=1, alpha=0., wide=None):
    "Reconstruction, AuxK and Multi-TopK losses through all latents (paper, eq. 2, §2.4, appendix B)."
    x, relu = normalise(rows, sae.cfg.normalise).rows, sae.cfg.relu
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    recon = sparse(pre, None, relu, chosen) @ sae.W_dec + sae.b_dec
    loss = (recon - x).square().mean() * scale
    if wide is not None: loss = loss + (sparse(pre, None, relu, wide) @ sae.W_dec + sae.b_dec - x).square().mean() * scale / 8
    if dead is not None and dead.any():
        error = (x - recon).detach()
        z = sparse(pre.masked_fill(~dead, -torch.inf), min(k_aux, int(dead.sum())), True)
        loss = loss + alpha * (z @ sae.W_dec - error).square().mean() / (error - error.mean(0)).square().mean()
    return loss


def dense_gradients(sae, f):
    "What `f` leaves in the gradients, by autograd alone."
    sae.zero_grad(); f()
    return {name: getattr(sae, name).grad.clone() for name in NAMES}


def tape_gradients(state, f):
    "What `f` leaves on the tape of `state`, written out."
    state.sae.zero_grad(); state.tape.clear(); f()
    return {name: g.rows().view_as(getattr(state.sae, name)).clone() for name, g in gradients(state).items()}


def step_gradients(state, rows): return tape_gradients(state, lambda: forward_backward(state, rows))


def assert_equal_gradients(ours, dense):
    "Equal to 1e-6, relative to the largest entry of each."
    for name in NAMES:
        scale = dense[name].abs().max().item()
        torch.testing.assert_close(ours[name], dense[name], rtol=1e-6, atol=1e-6 * scale * 1e-3 + 1e-15, msg=lambda m, name=name: f"{name}: {m}")


def chosen_by(sae, rows, k):
    "The indices that the library chooses; checked to be k largest ones."
    x = normalise(rows, sae.cfg.normalise).rows
    values, indices = Tape(sae).encode(x, k)
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    mask = torch.zeros_like(pre, dtype=torch.bool).scatter(-1, indices, True)
    assert (mask.sum(-1) == k).all()
    torch.testing.assert_close(pre.gather(-1, indices).sort(-1).values, pre.topk(k).values.sort(-1).values)
    return indices


@st.composite
def cases(draw):
    "Sizes, a k, how rows are normalised, and whether chosen latents are clipped."
    n = draw(st.integers(2, 24))
    return dict(n=n, d=draw(st.integers(2, 10)), b=draw(st.integers(2, 12)), k=draw(st.integers(1, n)), seed=draw(st.integers(0, 10_000)),
                how=draw(st.sampled_from(["none", "unit_norm", "layer_norm"])), relu=draw(st.booleans()), shift=draw(st.sampled_from([0., -2., 2.])))


def setup(case, seed=1):
    "The SAE, rows and state of a case."
    sae = random_sae(case["n"], case["d"], case["k"], case["seed"], normalise=case["how"], relu=case["relu"])
    sae.b_enc.data += case["shift"]
    rows = torch.randn(case["b"], case["d"], dtype=torch.float64) + torch.randn(case["d"], dtype=torch.float64)
    return sae, rows, TrainConfig(tokens=10, dead_tokens=100)


@few
@given(cases())
def test_one_step_equals_dense_autograd(case):
    sae, rows, cfg = setup(case)
    ours = step_gradients(State(sae, cfg, scale=.7), rows)
    chosen = chosen_by(sae, rows, case["k"])
    assert_equal_gradients(ours, dense_gradients(sae, lambda: dense_loss(sae, rows, .7, chosen).backward()))


@few
@given(cases(), st.sampled_from([1, 2, 5, 64]), st.sampled_from(["none", "some", "all"]), st.sampled_from([1 / 32, 1., 8.]))
def test_one_step_with_auxk_and_dead_latents_equals_dense_autograd(case, k_aux, who, alpha):
    sae, rows, cfg = setup(case)
    aux = AuxK(case["n"], case["d"], replace(cfg, k_aux=k_aux, aux=alpha))
    silent = {"none": torch.zeros(case["n"], dtype=torch.bool), "all": torch.ones(case["n"], dtype=torch.bool), "some": torch.arange(case["n"]) % 2 == 0}[who]
    aux.tracker.since[silent] = 10_000
    if who == "all": aux.tracker.threshold = float("inf")   # nobody fires, whatever the rows are
    ours = step_gradients(State(sae, cfg, [aux], scale=.7), rows)
    chosen, dead = chosen_by(sae, rows, case["k"]), aux.tracker.dead()
    if who != "some": assert dead.all() == (who == "all") and dead.any() == (who == "all")
    assert_equal_gradients(ours, dense_gradients(sae, lambda: dense_loss(sae, rows, .7, chosen, dead, k_aux, alpha).backward()))


@few
@given(cases())
def test_one_step_with_multi_topk_equals_dense_autograd(case):
    sae, rows, cfg = setup(case)
    ours = step_gradients(State(sae, cfg, [MultiTopK()], scale=.7), rows)
    chosen, wide = chosen_by(sae, rows, case["k"]), chosen_by(sae, rows, min(4 * case["k"], case["n"]))
    assert_equal_gradients(ours, dense_gradients(sae, lambda: dense_loss(sae, rows, .7, chosen, wide=wide).backward()))


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("how", ["none", "unit_norm", "layer_norm"])
def test_everything_at_once_equals_dense_autograd(how, relu):
    sae, cfg = random_sae(48, 12, 5, normalise=how, relu=relu), TrainConfig(tokens=10, dead_tokens=100, k_aux=4, multi_topk=True)
    sae.b_enc.data[20:] -= 100   # these never win
    terms, rows = paper_terms(48, 12, cfg), torch.randn(64, 12, dtype=torch.float64)
    terms[0].tracker.since[20:] = 10_000
    sae.b_enc.data[20:] += 99
    ours = step_gradients(State(sae, cfg, terms, scale=.7), rows)
    dead = terms[0].tracker.dead()
    dense = dense_gradients(sae, lambda: dense_loss(sae, rows, .7, chosen_by(sae, rows, 5), dead, 4, 1 / 32, chosen_by(sae, rows, 20)).backward())
    assert dead.any() and not dead.all()
    assert_equal_gradients(ours, dense)


@few
@given(cases(), st.booleans())
def test_duplicate_rows_and_tied_latents(case, equal_latents):
    sae, rows, cfg = setup(case)
    rows = rows[:1].repeat(case["b"], 1)
    if equal_latents: sae.W_enc.data[:] = sae.W_enc.data[0]; sae.b_enc.data[:] = 1.
    ours = step_gradients(State(sae, cfg, scale=.7), rows)
    chosen = chosen_by(sae, rows, case["k"])
    assert_equal_gradients(ours, dense_gradients(sae, lambda: dense_loss(sae, rows, .7, chosen).backward()))


@pytest.mark.parametrize("k", [1, 40])
def test_the_chunks_of_the_encoder_are_invisible(k, monkeypatch):
    "More rows than one chunk holds give what one chunk gives."
    sae, rows, cfg = random_sae(40, 6, k), torch.randn(700, 6, dtype=torch.float64), TrainConfig(tokens=10)
    whole = step_gradients(State(sae, cfg, scale=1.), rows)
    monkeypatch.setattr("sae_nb.kernels.CHUNK", 1)
    assert_equal_gradients(step_gradients(State(sae, cfg, scale=1.), rows), whole)


def test_the_gradient_for_the_rows_is_right_too():
    sae = random_sae(12, 5, 3)
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    tape = Tape(sae)
    for encode, decode in ((sae.encode_normed, sae.decode_normed), (tape.encode, tape.decode)):
        assert torch.autograd.gradcheck(lambda x: decode(*encode(x)), x)


def test_zero_rows_give_finite_gradients():
    "A row of equal numbers has no length to divide by."
    for how in ("none", "unit_norm", "layer_norm"):
        sae, rows = random_sae(12, 5, 3, normalise=how), torch.cat([torch.zeros(2, 5), torch.ones(2, 5)]).double()
        grads = step_gradients(State(sae, TrainConfig(tokens=10), scale=1.), rows)
        assert all(g.isfinite().all() for g in grads.values()) and sae(rows).isfinite().all()


# --- the traps of architecture.md, one by one (11_dead and 10_train show most of them as cells) --------

@pytest.fixture
def auxed():
    "An SAE whose latents 20.. are dead, 64 rows, their reconstruction."
    sae, rows = random_sae(32, 8, 4), torch.randn(64, 8, dtype=torch.float64)
    return sae, rows, sae(rows), torch.arange(20, 32)


def test_trap_mean_against_sum_scale_in_auxk():
    "Guessing nothing costs one, whatever the batch, the width and the size of the error (11_dead, cell cc246d23)."
    for b, d, size in ((8, 4, 1.), (256, 4, 1.), (64, 32, 1e-4), (64, 32, 1e4)):
        sae = random_sae(16, d, 2)
        sae.b_enc.data[:] = -1e9
        rows = size * torch.randn(b, d, dtype=torch.float64)
        rows -= rows.mean(0)
        assert aux_loss(Tape(sae), rows, torch.zeros_like(rows), torch.arange(8), 3).item() == pytest.approx(1)


def test_trap_alpha_applied_twice(auxed):
    "Twice the weight adds twice the gradient, and the reported part is α times the loss."
    sae, rows, recon, dead = auxed
    def added(alpha):
        aux = AuxK(32, 8, TrainConfig(tokens=1, dead_tokens=100, k_aux=3, aux=alpha))
        aux.tracker.since[20:], aux.tracker.threshold = 10_000, float("inf")
        parts = {}
        state = State(sae, TrainConfig(tokens=1), [aux], scale=1.)
        grads = tape_gradients(state, lambda: parts.update(forward_backward(state, rows)))
        return grads, parts
    (none, _), (one, parts), (two, _) = added(0.), added(1 / 32), added(1 / 16)
    for name in NAMES: torch.testing.assert_close(two[name] - none[name], 2 * (one[name] - none[name]), rtol=1e-9, atol=1e-12)
    assert parts["auxk"] == pytest.approx(aux_loss(Tape(sae), rows, recon, dead, 3).item() / 32, rel=1e-9)


def test_trap_error_not_detached(auxed):
    "AuxK moves no living latent (11_dead, cell dc040693)."
    sae, rows, recon, dead = auxed
    state = State(sae, TrainConfig(tokens=1))
    grads = tape_gradients(state, lambda: aux_loss(state.tape, rows, recon, dead, 3).backward())
    assert all((grads[name][:20] == 0).all() for name in ("W_enc", "W_dec")) and (grads["b_enc"].flatten()[:20] == 0).all()


def test_trap_bias_in_the_reconstructed_error(auxed):
    "The guess at the error has no bias: the same error, wherever the rows lie, costs the same."
    sae, rows, recon, dead = auxed
    before = aux_loss(Tape(sae), rows, recon, dead, 3)
    sae.b_dec.data += 5
    torch.testing.assert_close(aux_loss(Tape(sae), rows + 5, recon + 5, dead, 3), before)
    sae.W_dec.data.zero_()   # now the guess is zero and not b_dec
    error = (rows - recon).detach()
    assert aux_loss(Tape(sae), rows + 5, recon + 5, dead, 3).item() == pytest.approx((error.square().mean() / (error - error.mean(0)).square().mean()).item())


def test_trap_dead_counters_of_a_part_of_the_batch():
    "Tokens are counted, all of them: four parts of a batch, or one, and any batch size, give the same counters."
    rows, cfg = torch.randn(64, 8, dtype=torch.float64), TrainConfig(tokens=1, dead_tokens=100)
    def since(parts, batch):
        sae, aux = random_sae(64, 8, 1), AuxK(64, 8, cfg)
        for part in rows.split(batch): forward_backward(State(sae, replace(cfg, micro=parts), [aux], scale=1.), part)
        return aux.tracker.since
    whole = since(0, 64)
    assert 64 in whole and 0 < (whole == 0).sum() < 64
    assert torch.equal(since(16, 64) >= 64, whole >= 64) and torch.equal(since(0, 16) >= 64, whole >= 64)


def test_trap_counters_after_the_mask():
    "A latent that fires in this batch is alive in this batch."
    aux, sae, rows = AuxK(4, 3, TrainConfig(tokens=1, dead_tokens=5)), random_sae(4, 3, 4), torch.randn(3, 3, dtype=torch.float64)
    aux.tracker.since[:] = 10_000
    values, indices = torch.ones(3, 1), torch.tensor([[1], [1], [2]])
    aux.loss(State(sae, TrainConfig(tokens=1), scale=1.), rows, values, indices, sae(rows))
    assert aux.tracker.dead().tolist() == [True, False, False, True]


def test_trap_a_value_of_nothing_is_no_firing():
    tracker = Tracker(3, dead_tokens=1)
    tracker.update(torch.tensor([[1., 0., 1e-4]]), torch.tensor([[0, 1, 2]]))
    assert tracker.since.tolist() == [0, 1, 1]


def test_trap_gradients_never_zeroed():
    "After an update the next batch's gradient is its own."
    cfg = TrainConfig(tokens=10, ema=0.)
    sae, (a, b) = random_sae(16, 6, 3), torch.randn(2, 20, 6, dtype=torch.float64)
    state = State(sae, cfg, scale=1.)
    forward_backward(state, a); update(state)
    forward_backward(state, b)
    after = {name: g.rows().view_as(getattr(sae, name)).clone() for name, g in gradients(state).items()}
    assert_equal_gradients(after, step_gradients(state, b))


def test_trap_epsilon_of_adam_left_at_1e_8():
    "The released code's ε, and it reaches the optimiser (10_train, cell 8bbd18ca)."
    cfg = TrainConfig(tokens=10)
    assert cfg.eps == 6.25e-10
    sae = random_sae(8, 4, 2)
    before, state = sae.b_enc.data.clone(), State(sae, cfg)
    for p in sae.parameters(): p.grad = torch.full_like(p, 1e-9)
    update(state)
    assert (before - sae.b_enc.data).min() > 0.5 * cfg.lr


@pytest.mark.parametrize("term", ["auxk", "multi_topk"])
def test_trap_no_gradient_for_the_encoder(auxed, term):
    "AuxK alone, and Multi-TopK alone, move the encoder of latents that were not chosen."
    sae, rows, recon, dead = auxed
    state = State(sae, TrainConfig(tokens=1), scale=1.)
    def loss(): return aux_loss(state.tape, rows, recon, dead, 3) if term == "auxk" else MultiTopK().loss(state, rows, *sae.encode_normed(rows), recon)
    grads = tape_gradients(state, lambda: loss().backward())
    never = torch.ones(32, dtype=torch.bool)
    never[sae.encode(rows).indices.unique()] = False
    assert (grads["W_enc"][dead] != 0).any(1).sum() > 3 and (grads["b_enc"].flatten()[dead] != 0).any()
    if never.any() and term == "multi_topk": assert (grads["W_enc"][never] != 0).any()


@pytest.mark.parametrize("relu", [True, False])
def test_trap_relu_before_or_after_topk_at_load(tmp_path, relu):
    "Where chosen latents are negative, ReLU matters; the file remembers which it was."
    sae = random_sae(12, 5, 6, relu=relu, normalise="layer_norm").float()
    sae.b_enc.data -= 2
    sae.save(tmp_path)
    rows, again = torch.randn(20, 5), SAE.load(tmp_path)
    code = again.encode(rows)
    assert torch.equal(code.values, sae.encode(rows).values) and torch.equal(again(rows), sae(rows))
    assert (code.values.min() < 0) == (not relu) and code.values.shape == (20, 6)


def test_trap_decoder_orientation_at_load(tmp_path):
    "Both matrices are [n, d]; a file with one the other way round is refused in one sentence."
    from safetensors.torch import load_file, save_file
    sae = random_sae(12, 5, 3).float()
    sae.save(tmp_path)
    weights = load_file(tmp_path / "sae.safetensors")
    assert weights["W_dec"].shape == weights["W_enc"].shape == (12, 5)
    code = Code(torch.ones(1, 1), torch.tensor([[7]]), 12)
    torch.testing.assert_close(SAE.load(tmp_path).decode(code)[0], weights["W_dec"][7] + weights["b_dec"])
    save_file(weights | {"W_dec": weights["W_dec"].T.contiguous()}, tmp_path / "sae.safetensors")
    with pytest.raises(UserError, match="W_dec"): SAE.load(tmp_path)


# --- what the architecture decides about AuxK -------------------------------------------------------

def test_auxk_with_nobody_dead_is_zero_and_with_a_perfect_reconstruction_too(auxed):
    sae, rows, recon, dead = auxed
    aux = AuxK(32, 8, TrainConfig(tokens=1, dead_tokens=10_000))
    assert aux.loss(State(sae, TrainConfig(tokens=1), scale=1.), rows, *sae.encode_normed(rows), recon).item() == 0
    assert aux_loss(Tape(sae), rows, rows, dead, 3).item() == 0
    assert aux_loss(Tape(sae), rows[:1], recon[:1], dead, 3).isfinite()


@pytest.mark.parametrize("kind", ["no error", "one row", "equal errors"])
def test_auxk_gradient_is_finite_where_the_error_has_no_variance(auxed, kind):
    "Zero in the forward pass is not enough: 0 · ∞ in the backward pass would poison every weight."
    sae, rows, recon, dead = auxed
    x, y = {"no error": (rows, rows), "one row": (rows[:1], recon[:1]), "equal errors": (rows, rows - 1)}[kind]
    sae.zero_grad()
    state = State(sae, TrainConfig(tokens=1))
    grads = tape_gradients(state, lambda: aux_loss(state.tape, x, y.detach(), dead, 3).backward())
    assert all(g.isfinite().all() for g in grads.values())


def test_a_batch_of_one_row_with_dead_latents_trains_on():
    "The last part of a micro-batched step may hold a single row."
    sae, rows = random_sae(32, 8, 4), torch.randn(5, 8, dtype=torch.float64)
    cfg = TrainConfig(tokens=10, batch=5, micro=2, dead_tokens=1)
    state = State(sae, cfg, paper_terms(32, 8, cfg), scale=1.)
    for _ in range(3): forward_backward(state, rows); update(state)
    assert all(p.isfinite().all() for p in sae.parameters())


def test_auxk_weight_zero_counts_but_adds_nothing():
    sae, rows = random_sae(32, 8, 1), torch.randn(16, 8, dtype=torch.float64)
    aux = AuxK(32, 8, TrainConfig(tokens=1, dead_tokens=10, aux=0.))
    parts = forward_backward(State(sae, TrainConfig(tokens=1), [aux], scale=1.), rows)
    assert parts["auxk"] == 0 and 0 < aux.report()["dead"] < 1


def test_decoder_stays_on_the_sphere_and_so_does_the_average():
    cfg = TrainConfig(tokens=20 * 32, batch=32, ema=.9, lr=.05)
    rows = torch.randn(20, 32, 8)
    sae = init_(SAE(SAEConfig(d=8, n=24, k=3)), rows[0])
    state = State(sae, cfg)
    for _ in train(sae, rows, cfg, state=state): pass
    for W in (sae.W_dec, state.best().W_dec): torch.testing.assert_close(W.norm(dim=-1), torch.ones(24))
    assert state.step == 20 and not torch.equal(sae.W_dec, state.best().W_dec)


@few
@given(st.sampled_from(["none", "unit_norm", "layer_norm"]), st.integers(0, 99), st.sampled_from([1e-3, 1., 1e3]))
def test_normalisation_can_be_undone(how, seed, size):
    torch.manual_seed(seed)
    rows = size * torch.randn(9, 7, dtype=torch.float64) + torch.randn(7, dtype=torch.float64)
    normed = normalise(rows, how)
    torch.testing.assert_close(normed.restore(normed.rows), rows, rtol=1e-9, atol=1e-12)

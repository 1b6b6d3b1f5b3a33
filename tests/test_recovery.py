"Planted directions are found again by the library's own training; chance and an untrained SAE find none."
import pytest
import torch

from sae_nb.dead import paper_terms
from sae_nb.sae import SAE, SAEConfig, init_
from sae_nb.toy import planted, recovery
from sae_nb.train import State, TrainConfig, train

STEPS, BATCH = 500, 768


def toy_and_sae(d=64, k=4, n=128, latents=256, normalise="none", noise=0., offset=0., seed=0):
    "A planted dictionary, 40,000 rows of it, and an SAE at its start."
    toy = planted(n=n, d=d, k=k, noise=noise, offset=offset, seed=seed)
    data = toy.sample(40_000, seed="train")
    return toy, data, init_(SAE(SAEConfig(d=d, n=latents, k=k + (normalise != "none"), normalise=normalise)), data.rows[:8_192], seed)


def trained(data, sae, steps=STEPS, seed=0):
    "The averaged SAE after the paper's training with AuxK."
    cfg = TrainConfig(tokens=steps * BATCH, batch=BATCH, lr=4e-3, ema=.98, decay=.3, dead_tokens=20_000, seed=seed)
    state = State(sae, cfg, paper_terms(sae.cfg.n, sae.cfg.d, cfg))
    endless = (rows for _ in range(steps) for rows in data.rows.split(BATCH)[:-1])
    for step in train(sae, endless, cfg, state=state): pass
    assert step.step == steps
    return state.best()


@pytest.mark.parametrize("kind", [dict(d=32, k=4, seed=1), dict(d=64, k=4, noise=.03, offset=3., seed=2),
                                  dict(d=64, k=4, normalise="layer_norm", seed=3)], ids=["32 wide", "noise and offset", "layer_norm"])
def test_planted_directions_are_recovered(kind):
    "At least 95 % of the directions that occur, at cosine > 0.9; none by chance, and few by an untrained SAE."
    toy, data, sae = toy_and_sae(**kind)
    before = recovery(sae.W_dec.detach().clone(), toy, counts=data.counts)
    after = recovery(trained(data, sae).W_dec.detach(), toy, counts=data.counts)
    assert len(after.cosine) > 100
    assert after.share >= .95, f"{after.share:.1%} recovered"
    assert before.share < .02 and after.null_share < .02


def test_without_training_enough_it_is_not_recovered():
    "The measure can fail: five steps are not enough."
    toy, data, sae = toy_and_sae()
    assert recovery(trained(data, sae, steps=5).W_dec.detach(), toy, counts=data.counts).share < .5


def test_directions_that_never_occur_do_not_count():
    toy = planted(n=64, d=32, k=2, slope=3.)
    data = toy.sample(200, seed=0)
    score = recovery(toy.W[data.counts > 0], toy, counts=data.counts)
    assert 0 < len(score.cosine) == int((data.counts > 0).sum()) < 64 and score.share == 1


def test_no_latent_counts_twice_for_nothing():
    "Half of the directions found is half, however often each was found."
    toy = planted(n=64, d=32)
    score = recovery(toy.W[:32].repeat(4, 1) * torch.rand(128, 1).add(.1), toy)
    assert score.share == pytest.approx(.5, abs=.05)

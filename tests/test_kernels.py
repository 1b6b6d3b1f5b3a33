"The kernels against dense float64, on whatever shapes and numbers come along."
import os, subprocess, sys

import pytest
import torch
from hypothesis import given, settings, strategies as st

from sae_nb import kernels
from sae_nb.kernels import Gradient, Pairs, Tape, adam_rows_, encode, encode_certified, encode_float32, held, pair_dots, pair_sum, upper_bounds
from sae_nb.sae import SAE, SAEConfig, init_, top_k, weighted_rows
from sae_nb.train import State, TrainConfig, forward_backward, gradients, train, update

few = settings(max_examples=40, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def certified_everywhere(monkeypatch):
    "The certified way is taken on every machine, whatever its hardware does quickly."
    monkeypatch.setattr(kernels, "fast_dtype", lambda device: torch.bfloat16)


@st.composite
def problems(draw):
    "Rows, weights, a bias and a k, of many sizes and shapes."
    n, d, b = draw(st.integers(1, 600)), draw(st.integers(1, 40)), draw(st.integers(1, 30))
    g = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    x, W, bias = torch.randn(b, d, generator=g), torch.randn(n, d, generator=g), torch.randn(n, generator=g) * draw(st.sampled_from([0., 1., 30.]))
    kind = draw(st.sampled_from(["plain", "uneven", "offset", "twins", "repeated", "tiny", "strided", "outlier"]))
    if kind == "uneven": x, W = x * 10 ** torch.randn(b, 1, generator=g), W * 10 ** torch.randn(n, 1, generator=g)
    if kind == "offset": x, W = x + 20, W + 5
    if kind == "twins": W[:] = W[0] + 1e-4 * W
    if kind == "repeated": W[n // 2:], bias[n // 2:], x[b // 2:] = W[0], bias[0], x[0]
    if kind == "tiny": x, bias = x * 1e-25, bias * 0
    if kind == "strided": x, W = torch.randn(d, b, generator=g).T, torch.randn(n, 3 * d, generator=g)[:, ::3]
    if kind == "outlier": x[:, 0] *= 1000
    return x, W, bias, draw(st.integers(1, min(n, 20)))


def assert_top(x, W, bias, k, values, indices, rows=slice(None)):
    "`indices` are k different latents whose true values are the largest, and `values` are these, as exactly as float32 can say."
    x, W, bias = (t.double() for t in (x[rows], W, bias))
    pre, chosen = x @ W.T + bias, torch.zeros(len(x), len(W), dtype=torch.bool).scatter(1, indices[rows], True)
    room = 1e-5 * (x.norm(dim=1)[:, None] * W.norm(dim=1) + bias.abs()).amax(1)
    assert (chosen.sum(1) == k).all()
    assert (pre.masked_fill(~chosen, torch.inf).amin(1) >= pre.masked_fill(chosen, -torch.inf).amax(1) - room).all()
    assert ((values[rows].double() - pre.gather(1, indices[rows])).abs().amax(1) <= room).all()


@few
@given(problems(), st.sampled_from([0, 1.5, 4, 8]))
def test_encode_gives_the_true_top_k(problem, look):
    x, W, bias, k = problem
    values, indices, rest = encode(x, W, bias, k, "exact", look)
    assert_top(x, W, bias, k, values, indices)
    assert 0 <= rest <= len(x)
    assert_top(x, W, bias, k, *encode_float32(x, W, bias, k))


@few
@given(problems(), st.sampled_from([1, 2, 4]))
def test_no_row_is_certified_wrongly(problem, look):
    x, W, bias, k = problem
    many = min(look * k + 2, len(W))
    values, indices, sure = encode_certified(x, W, bias, k, many)
    assert_top(x, W, bias, k, values, indices, sure)


@few
@given(problems())
def test_upper_bounds_are_above(problem):
    x, W, bias, _ = problem
    left, right = upper_bounds(x, W, bias)
    bound, true = left.double() @ right.double().T, x.double() @ W.double().T + bias.double()
    assert (bound >= true - 1e-15).all()


def test_most_ordinary_rows_are_certified_and_hopeless_ones_are_not():
    torch.manual_seed(0)
    x, W = torch.randn(200, 64), torch.randn(2048, 64)
    assert encode_certified(x, W, torch.zeros(2048), 16, 32)[2].float().mean() > .95
    W[:1500] = W[0] + 1e-4 * W[:1500]
    assert not encode_certified(W[0] + .01 * x, W, torch.zeros(2048), 16, 32)[2].any()


def test_the_way_taken_leaves_no_trace():
    "Certified at once, after a longer look, or not at all: the same bits, so a resumed run may take another way."
    torch.manual_seed(0)
    x, W, bias = torch.randn(300, 48), torch.randn(4096, 48), .1 * torch.randn(4096)
    ways = [encode(x, W, bias, 24, "exact", look) for look in (0, 1.5, 4, 8)]
    order = [w[1].sort(1) for w in ways]
    for way, o in zip(ways, order):
        assert torch.equal(o.values, order[0].values)
        assert torch.equal(way[0].gather(1, o.indices), ways[0][0].gather(1, order[0].indices))


def test_a_tape_looks_further_where_it_must():
    sae = SAE(SAEConfig(d=32, n=4096, k=8, normalise="none"))
    torch.manual_seed(0)
    sae.W_enc.data = torch.randn(1, 32) + 1e-4 * torch.randn(4096, 32)
    tape, rows = Tape(sae), torch.randn(64, 32)
    for look in (2.25, 3.375, 5.0625, 7.59375, 0, 0):
        values, indices = tape.encode(rows)
        assert tape.look == look
        assert_top(rows, sae.W_enc.detach(), torch.zeros(4096), 8, (rows @ sae.W_enc.T).gather(1, indices).detach(), indices)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_hidden(bad):
    "A loss made of it stops the training with a sentence."
    torch.manual_seed(0)
    x, W = torch.randn(8, 16), torch.randn(512, 16)
    x[3, 2] = bad
    values = encode(x, W, torch.zeros(512), 4)[0]
    assert not values[3].isfinite().all() and values[[0, 1, 2, 4, 5, 6, 7]].isfinite().all()


@few
@given(st.integers(1, 5000), st.integers(1, 40), st.integers(0, 99), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.booleans())
def test_top_k_is_the_top_k(n, k, seed, dtype, coarse):
    torch.manual_seed(seed)
    pre = torch.randn(5, n)
    pre = (pre * 3).round() if coarse else pre
    pre[0, 0], pre[1] = torch.inf, -torch.inf
    pre, k = pre.to(dtype), min(k, n)
    values, indices = top_k(pre, k)
    assert torch.equal(values.sort(1, descending=True).values, pre.topk(k).values) and torch.equal(pre.gather(1, indices), values)
    assert all(len(row.unique()) == k for row in indices)


@few
@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 9), st.integers(1, 60), st.integers(0, 99))
def test_sums_and_products_over_pairs(n, d, b, k, seed):
    torch.manual_seed(seed)
    k = min(k, n)
    indices = torch.stack([torch.randperm(n)[:k] for _ in range(b)])
    values, rows, W = (torch.randn(*shape, dtype=torch.float64) for shape in ((b, k), (b, d), (n, d)))
    z, pairs = torch.zeros(b, n, dtype=torch.float64).scatter(1, indices, values), Pairs.of(indices, n)
    lo, hi = sorted(torch.randint(0, n + 1, (2,)).tolist())
    torch.testing.assert_close(weighted_rows(values, indices, W), z @ W)
    torch.testing.assert_close(pair_sum(pairs, values.flatten()[pairs.order], rows, lo, hi), (z.T @ rows)[lo:hi])
    torch.testing.assert_close(pair_dots(pairs, W, rows).view(b, k), (rows @ W.T).gather(1, indices))


def test_adam_in_portions_is_adam():
    "Portions, few rows and a dense part, a clipped length: torch's Adam on the projected sum."
    torch.manual_seed(0)
    n, d = 300, 2**12                                            # 128 latents a portion
    W, rows = torch.nn.functional.normalize(torch.randn(n, d, dtype=torch.float64), dim=1), torch.randn(40, d, dtype=torch.float64)
    indices, few, index = torch.randint(0, n, (40, 5)), torch.randn(7, d, dtype=torch.float64), torch.tensor([0, 5, 127, 128, 129, 256, 299])
    pairs, weights = Pairs.of(indices, n), torch.randn(200, dtype=torch.float64)
    grad = Gradient(W.clone())
    grad.parts, grad.few, grad.dense = [(pairs, weights, rows)], [(index, few)], torch.randn(n, d, dtype=torch.float64)
    g = torch.zeros_like(W).index_add(0, pairs.latents.long(), weights[:, None] * rows[pairs.rows]).index_add(0, index, few) + grad.dense
    torch.testing.assert_close(grad.rows(), g)
    theirs, m, v = torch.nn.Parameter(W.clone()), torch.zeros_like(W), torch.zeros_like(W)
    adam = torch.optim.Adam([theirs], lr=.01, eps=1e-9)
    for step in range(3):
        theirs.grad = .5 * (g - (g * theirs.data).sum(1, keepdim=True) * theirs.data)
        length = adam_rows_(grad.W, grad, m, v, step, .01, .9, .999, 1e-9, True, .5)
        torch.testing.assert_close(length, (2 * theirs.grad).square().sum())
        adam.step()
        theirs.data /= theirs.data.norm(dim=1, keepdim=True)
        torch.testing.assert_close(grad.W, theirs.data)


def test_a_long_gradient_is_clipped_to_its_limit():
    "Adam does not see a scale, so a state is looked at: its means after one step are those of the shortened gradient."
    torch.manual_seed(0)
    def means(clip):
        torch.manual_seed(0)
        sae = SAE(SAEConfig(d=8, n=32, k=3, normalise="none"))
        for p in sae.parameters(): p.data.normal_()
        state = State(sae, TrainConfig(tokens=64, batch=64, ema=0., clip=clip), scale=1.)
        forward_backward(state, torch.randn(64, 8))
        return update(state), torch.cat([m.flatten() for m, _ in state.adam.values()])
    (long, free), (_, cut) = means(0.), means(.01)
    assert long > .01
    torch.testing.assert_close(cut, free * .01 / long)


def test_a_term_that_knows_nothing_of_the_tape_is_heard():
    "A loss on the weights themselves leaves a dense gradient, which joins the sparse one."
    torch.manual_seed(0)
    sae = SAE(SAEConfig(d=8, n=32, k=3, normalise="none"))
    for p in sae.parameters(): p.data.normal_()
    state = State(sae, TrainConfig(tokens=64, ema=0.), scale=1.)
    forward_backward(state, torch.randn(64, 8))
    before = gradients(state)["W_dec"].rows()
    sae.W_dec.square().sum().backward()
    torch.testing.assert_close(gradients(state)["W_dec"].rows(), before + 2 * sae.W_dec.detach())


class Flags:
    "A setting that somebody else may look at."
    flag = "old"


def test_a_setting_held_by_two_is_put_back_by_the_last():
    "One after the other, one in the other, overlapping, and after an error."
    first, second = held(Flags, "flag", "new"), held(Flags, "flag", "new")
    first.__enter__(); second.__enter__()
    first.__exit__(None, None, None)
    assert Flags.flag == "new"
    second.__exit__(None, None, None)
    assert Flags.flag == "old"
    with pytest.raises(ZeroDivisionError), held(Flags, "flag", "new"): 1 / 0
    assert Flags.flag == "old"
    with held(Flags, "flag", "new"), held(Flags, "flag", "new"): assert Flags.flag == "new"
    assert Flags.flag == "old"


def settings_of_torch():
    "The global settings that decide how a matrix product is computed."
    kinds = torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    return *kinds, torch.get_float32_matmul_precision(), torch.get_num_threads()


@pytest.mark.parametrize("n", [64, 600])
def test_no_setting_is_changed_even_for_a_while(n, monkeypatch):
    "What another thread computes at any moment of a step is computed as it was before."
    from sae_nb import dead, kernels
    seen, before = set(), settings_of_torch()
    def watch(module, name):
        own = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a: (seen.add(settings_of_torch()), own(*a))[1])
    for name in ("top_k", "weighted_rows", "pair_sum", "pair_dots", "product"): watch(kernels, name)
    watch(dead, "aux_loss")
    sae = SAE(SAEConfig(d=8, n=n, k=4))
    cfg = TrainConfig(tokens=400, batch=100, dead_tokens=50)
    list(train(init_(sae, x := torch.randn(100, 8)), [x] * 4, cfg, state=State(sae, cfg, dead.paper_terms(n, 8, cfg))))
    assert seen == {before} and settings_of_torch() == before


@pytest.mark.parametrize("how", ["exact", "bfloat16"])
def test_memory_does_not_grow_with_the_batch(how):
    "Eight times the rows of 65,536 latents would be 940 MB more; here it is the rows themselves and a little."
    code = f"""
import resource, torch
from sae_nb.kernels import encode
W, bias = torch.randn(65_536, 16), torch.zeros(65_536)
def peak(b): encode(torch.randn(b, 16), W, bias, 8, {how!r}); return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
peak(512); small = peak(512); print(peak(4096) - small)
"""
    if not sys.platform.startswith("linux"): pytest.skip("memory is measured in Linux's units")
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}).stdout) / 1e3
    assert grown < 150


# --- below the floor: what the certificate and the quick encoder promise ---------------------------------

def exact_in_bfloat16(*shape): return torch.randn(*shape).bfloat16().float()


@pytest.mark.parametrize("d", [3, 700])
def test_upper_bounds_leave_room_for_sums_in_float32(d):
    "Where nothing is rounded away, what remains of the margin is what a sum of d + 1 products may lose."
    torch.manual_seed(0)
    x, W, bias = exact_in_bfloat16(20, d), exact_in_bfloat16(300, d), exact_in_bfloat16(300)
    left, right = upper_bounds(x, W, bias)
    above = left.double() @ right.double().T - (x.double() @ W.double().T + bias)
    loss = (d + 1) * 2**-24 * (x.abs().double() @ W.abs().double().T + bias.abs())
    assert (above >= loss).all()


@pytest.mark.parametrize("side", [1, -1])
def test_a_bound_that_is_rounded_down_certifies_nothing(side):
    "All latents but one are equal; that one is larger by less than bfloat16 can tell, so its bound is theirs."
    x, W = torch.zeros(1, 8), torch.zeros(400, 8)
    for place in range(0, 400, 7):
        bias = torch.full((400,), 1. * side)
        bias[place] += .9 * 2**-8 if side > 0 else .9 * 2**-9
        bias[(place + 1) % 400] = 100.   # a winner that no bound comes near says nothing of the others
        values, indices, sure = encode_certified(x, W, bias, 4, 16)
        assert not sure or place in indices
        assert place in encode(x, W, bias, 4)[1]


def test_the_bfloat16_encoder_chooses_in_bfloat16_and_computes_in_float32():
    torch.manual_seed(0)
    x, W, bias = torch.randn(40, 64), torch.randn(2_000, 64), torch.randn(2_000)
    values, indices, rest = encode(x, W, bias, 8, "bfloat16")
    pre = x.double() @ W.double().T + bias
    assert values.dtype == torch.float32 and rest == 0
    torch.testing.assert_close(values.double(), pre.gather(1, indices), rtol=1e-6, atol=1e-5)
    true, coarse = pre.topk(8).indices, torch.addmm(bias, x.bfloat16().float(), W.bfloat16().float().T).topk(8).indices
    same = lambda a: (indices[:, :, None] == a[:, None]).any(2).float().mean().item()
    assert same(true) > .95 and same(coarse) > .97
    exact = encode(x, W, bias, 8)[1]
    assert torch.equal(exact.sort(1).values, true.sort(1).values)


def test_a_tape_looks_less_far_again_and_tries_again_what_failed(monkeypatch):
    "After each 64th call; not at all where 6k candidates were too few."
    rest, looks = [0], []
    def stub(x, W, bias, k, how, look):
        looks.append(look)
        return x.new_zeros(len(x), k), torch.zeros(len(x), k, dtype=torch.int64), rest[0]
    monkeypatch.setattr(kernels, "encode", stub)
    tape, x = Tape(SAE(SAEConfig(d=8, n=64, k=4))), torch.zeros(100, 8)
    def calls(many, failing):
        rest[0] = failing
        for _ in range(many): tape.encode(x)
    calls(10, 5)
    assert tape.look == 1.5                                  # one row of twenty may be left
    calls(4, 6)
    assert looks[10:] == pytest.approx([1.5, 2.25, 3.375, 5.0625]) and tape.look > 6
    calls(1, 6)
    assert tape.look == 0                                    # hopeless: the plain way
    calls(64 - tape.calls % 64, 100)
    assert tape.look == 6                                    # tried again
    calls(1, 0)
    assert looks[-1] == 6 and tape.look == 6
    for wanted in (4, 6 / 1.5**2, 6 / 1.5**3, 1.5, 1.5):
        calls(64 - tape.calls % 64, 0)
        assert tape.look == pytest.approx(wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_top_k_of_rows_with_more_than_65536_places(dtype):
    "More than two bytes can count; the winners stand at the end."
    pre = torch.randn(2, 2**16 + 5).to(dtype)
    pre[:, -3:] = 9 + torch.arange(3).to(dtype)
    values, indices = top_k(pre, 3)
    assert torch.equal(indices.sort(1).values, torch.arange(2**16 + 2, 2**16 + 5).expand(2, 3)) and values.min() == 9

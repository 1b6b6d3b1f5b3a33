"""Every Triton kernel against plain torch: interpreted on the processor, compiled for a GPU that need not be there, and run on the GPU if there is one.

`python tests/test_gpu.py DEVICE` runs all checks once, in a process whose environment was set before Triton was imported, and prints what went wrong as JSON."""
import importlib.util, json, os, subprocess, sys, traceback

import pytest
import torch

from sae_nb import gpu, kernels, sae
from sae_nb.kernels import Gradient, Pairs

WHERE = ["interpreted", "compiled"] + ["cuda"] * torch.cuda.is_available()
CHECKS = {}


def check(f): CHECKS[f.__name__] = f; return f


def close(mine, plain, **how): torch.testing.assert_close(mine.cpu().float(), plain.cpu().float(), **{"rtol": 1e-5, "atol": 1e-5, **how})


def code(b, n, k, device, seed=0):
    "A random code over `n` latents, each latent at most once a row."
    g = torch.Generator().manual_seed(seed)
    indices = torch.stack([torch.randperm(n, generator=g)[:k] for _ in range(b)])
    return torch.randn(b, k, generator=g).to(device), indices.to(device)


def dense(values, indices, n): return torch.zeros(len(values), n, device=values.device).scatter_add(1, indices, values)


@check
def decoding(device):
    for d, k in ((5, 1), (64, 6), (100, 7), (1030, 3)):
        (values, indices), W = code(4, 30, k, device), torch.randn(30, d, device=device)
        close(gpu.weighted_rows(values, indices, W), dense(values, indices, 30) @ W)
        close(gpu.weighted_rows(values, indices, W.bfloat16()), dense(values, indices, 30) @ W.bfloat16().float())
        indices[:] = indices[:, :1]                                       # one latent, many times
        close(gpu.weighted_rows(values, indices, W), dense(values, indices, 30) @ W)
    assert gpu.weighted_rows(values[:0], indices[:0], W).shape == (0, d)


@check
def sums_of_pairs(device):
    gpu.SPLIT = 8
    for d, b in ((5, 7), (64, 37), (100, 16)):
        values, indices = code(b, 50, 3, device)
        indices[:, 0] = torch.where((indices[:, 1:] == 9).any(1), indices[:, 0], torch.full_like(indices[:, 0], 9))   # a latent that fires (almost) everywhere
        indices[indices == 20] = 21                                       # one that never does
        pairs, rows = Pairs.of(indices, 50), torch.randn(b, d, device=device)
        rows[1::2] = rows[0]                                              # duplicate rows
        want, weights = dense(values, indices, 50).T @ rows, values.flatten()[pairs.order]
        assert pairs.starts.diff().max() > (8 if b > 7 else 5) and (pairs.starts.diff() == 0).any()
        for lo, hi in ((0, 50), (5, 9), (9, 10), (10, 50), (20, 21)): close(gpu.pair_sum(pairs, weights, rows, lo, hi), want[lo:hi])
        assert torch.equal(gpu.pair_sum(pairs, weights, rows, 0, 50), gpu.pair_sum(pairs, weights, rows, 0, 50))


@check
def products_of_pairs(device):
    for d, b, k in ((5, 3, 1), (64, 5, 4), (300, 6, 5)):
        (_, indices), W, rows = code(b, 20, k, device), torch.randn(20, d, device=device), torch.randn(b, d, device=device)
        pairs = Pairs.of(indices, 20)
        close(gpu.pair_dots(pairs, W, rows).view(b, k), (rows @ W.T).gather(1, indices), atol=1e-4)
        close(gpu.pair_dots(pairs, W.bfloat16(), rows).view(b, k), (rows @ W.bfloat16().float().T).gather(1, indices), atol=1e-4)


def top_k_is_right(pre, k):
    values, indices = gpu.top_k(pre, k)
    assert values.dtype == pre.dtype and indices.dtype == torch.int64 and indices.shape == (len(pre), k)
    assert all(len(set(row)) == k for row in indices.tolist())
    close(pre.gather(1, indices), values, rtol=0, atol=0, equal_nan=True)
    close(values.sort(descending=True).values, pre.topk(k).values, rtol=0, atol=0, equal_nan=True)


@check
def largest_numbers(device):
    torch.manual_seed(0)
    for n, k in ((7, 1), (7, 7), (300, 300), (1000, 1), (2085, 3)):
        pre = torch.randn(3, n, device=device)
        for p in (pre, pre.bfloat16(), pre.half(), -pre.abs(), pre.round(), pre.t().contiguous().t()): top_k_is_right(p, k)


@check
def largest_numbers_in_hard_rows(device):
    torch.manual_seed(0)
    n, k = 5000, 12
    pre = torch.randn(18, n, device=device)                               # more rows than one program has
    assert gpu.kept(n, k) < k
    pre[0, 256:300] += 10                                                 # one bucket wins it all
    pre[1], pre[2] = 0., -0.
    pre[3, 7] = torch.nan
    pre[4, 300:320] = torch.nan
    pre[5], pre[6] = torch.nan, -torch.nan
    pre[7, 2:] = -torch.inf                                               # fewer finite ones than k
    pre[8] = -torch.inf
    pre[9, 4864:] += 100                                                  # in the last bucket, which is not full
    pre[10, ::3] = torch.inf
    pre[11] *= 1e-42                                                      # denormal
    for p in (pre, pre.bfloat16()): top_k_is_right(p, k)
    values = gpu.top_k(pre, k)[0]
    assert values[3].isnan().sum() == 1 and values[4:7].isnan().all()


@check
def fused_encoder(device):
    torch.manual_seed(0)
    for n, d, k, b in ((1000, 5, 1, 20), (1300, 100, 4, 17), (100, 16, 9, 3)):
        x, W, bias = torch.randn(b, d, device=device).bfloat16(), torch.randn(n, d, device=device).bfloat16(), torch.randn(n, device=device) - 100
        values, indices, sure = gpu.encode_top(x, W, bias, k)
        pre = x.float() @ W.float().T + bias
        assert sure.float().mean() > .8
        close(values, pre.gather(1, indices), atol=1e-4)                  # all below zero: nothing from beyond the last latent may win
        close(values[sure].sort(descending=True).values, pre.topk(k).values[sure], atol=1e-4)
    W = torch.randn(1300, 16, device=device).bfloat16()
    W[:40] = W[0]                                                         # winners that one bucket cannot hold
    x = torch.cat([10 * W[:1], torch.full_like(W[:1], torch.nan)])
    values, _, sure = gpu.encode_top(x, W, torch.zeros(1300, device=device), 4)
    assert not sure.any() and values[1].isnan().all()


@check
def adam_on_rows(device):
    torch.manual_seed(0)
    for n, d, sphere in ((12, 5, True), (9, 100, True), (12, 5, False), (1, 2500, False)):
        W = torch.nn.functional.normalize(torch.randn(n, d, device=device), dim=1)
        m, v, theirs = torch.zeros_like(W), torch.zeros_like(W), torch.nn.Parameter(W.clone())
        adam = torch.optim.Adam([theirs], lr=.01, eps=6.25e-10, betas=(.9, .999))
        for step in range(3):
            grad, g = Gradient(W), torch.randn(n, d, device=device)
            grad.dense = g.clone()
            if n > 1:
                (values, indices), rows = code(6, n, 2, device, step), torch.randn(6, d, device=device)
                pairs, index = Pairs.of(indices, n), torch.tensor([1, 3, 8], device=device)
                grad.parts += [(pairs, values.flatten()[pairs.order], rows)] * 2
                grad.few.append((index, torch.randn(3, d, device=device)))
                g = (g + 2 * dense(values, indices, n).T @ rows).index_add(0, index, grad.few[0][1])
            if sphere: g = g - (g * theirs.data).sum(1, keepdim=True) * theirs.data
            theirs.grad = g * .5
            total = gpu.adam_rows_(W, grad, m, v, step, .01, .9, .999, 6.25e-10, sphere, .5)
            adam.step()
            if sphere: theirs.data /= theirs.data.norm(dim=1, keepdim=True)
            assert total.shape == ()
            close(total, g.square().sum())
            close(W, theirs.data, atol=2e-6); close(m, adam.state[theirs]["exp_avg"]); close(v, adam.state[theirs]["exp_avg_sq"])


@check
def plain_functions_do_the_rest(device):
    (values, indices), W = code(4, 2000, 3, device), torch.randn(2000, 6, device=device, requires_grad=True)
    gpu.weighted_rows(values, indices, W).sum().backward()
    close(W.grad.sum(), 6 * values.sum(), atol=1e-4)
    pre = torch.randn(2, 2000, device=device, requires_grad=True)
    gpu.top_k(pre, 3)[0].sum().backward()
    assert pre.grad.sum() == 6
    assert gpu.weighted_rows(values.double(), indices, W.detach().double()).dtype == torch.float64
    top_k_is_right(torch.randn(2, 2000, device=device, dtype=torch.float64), 3)


@check
def training_on_the_routes(device):
    from sae_nb.train import State, TrainConfig, forward_backward, update
    def trained(device, routes):
        old, sae.ROUTES[device] = sae.ROUTES.get(device, {}), routes
        try:
            torch.manual_seed(0)
            assert gpu.kept(520, 1)
            model = sae.SAE(sae.SAEConfig(d=8, n=520, k=1))
            for p in model.parameters(): p.data.normal_()
            sae.unit_rows_(model.W_dec)
            state = State(model.to(device), TrainConfig(tokens=1000, batch=9), scale=1.)
            for _ in range(2): forward_backward(state, torch.randn(9, 8).to(device)); update(state)
            return {k: v.cpu() for k, v in model.state_dict().items()}
        finally: sae.ROUTES[device] = old
    plain, mine = trained("cpu", {}), trained(device, gpu.routes())
    for name in plain: close(mine[name], plain[name], atol=1e-4)


def compile_all():
    "Compile every kernel for a Hopper GPU, at the sizes of real work."
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    wide, half, long, short, i, f = "*fp32", "*bf16", "*i64", "*i32", "i32", "fp32"
    adam = (wide,) * 5 + (i,) * 2 + (f,) * 7
    work = [(gpu._sum_kernel, (wide, long, wide, long, long, wide, i), dict(BLOCK=1024, TOGETHER=4), 4),
            (gpu._dot_kernel, (half, wide, short, long, long, wide, i, i), dict(BLOCK=256, PAIRS=8), 4),
            (gpu._top_kernel, (half, half, half, half, wide, short, i, i, i), dict(ROWS=16, KEEP=4, FUSED=False, BLOCK=64), 4),
            (gpu._top_kernel, (half, half, half, wide, wide, short, i, i, i), dict(ROWS=128, KEEP=4, FUSED=True, BLOCK=64), 8),
            (gpu._adam_kernel, adam, dict(SPHERE=True, BLOCK=1024), 4), (gpu._adam_kernel, adam, dict(SPHERE=False, BLOCK=1024), 4)]
    for kernel, types, sizes, warps in work:
        jit = gpu._compiled(kernel)
        signature = dict(zip(jit.arg_names, types)) | dict.fromkeys(sizes, "constexpr")
        place = {name: (jit.arg_names.index(name),) for name in jit.arg_names}
        aligned = {place[name]: [["tt.divisibility", 16]] for name, kind in signature.items() if kind.startswith("*") or name == "d"}
        source = ASTSource(jit, signature, {place[name]: size for name, size in sizes.items()}, aligned)
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=warps))
        assert built.asm["cubin"] and built.metadata.shared <= 227 * 1024
        assert (kernel is gpu._top_kernel and sizes["FUSED"]) == ("wgmma" in built.asm["ptx"])


def run_all(where):
    "What went wrong in each check."
    wrong, device = {}, "cuda" if where == "cuda" else "cpu"
    for name, f in ({"compile_all": lambda _: compile_all()} if where == "compiled" else CHECKS).items():
        try: f(device)
        except Exception: wrong[name] = traceback.format_exc()
    return wrong


@pytest.fixture(scope="module")
def outcomes():
    "The outcome of each place, found when it is first asked for."
    known = {}
    def outcome(where):
        if importlib.util.find_spec("triton") is None: pytest.skip("triton is not installed: pip install triton runs these checks without a GPU too")
        if where not in known:
            env = {**os.environ, "TRITON_INTERPRET": str(int(where == "interpreted"))}
            done = subprocess.run([sys.executable, "-W", "ignore", __file__, where], env=env, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr[-6000:]
            known[where] = json.loads(done.stdout.splitlines()[-1])
        return known[where]
    return outcome


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("where", [w for w in WHERE if w != "compiled"])
def test_kernels(where, name, outcomes):
    if wrong := outcomes(where).get(name): pytest.fail(wrong, pytrace=False)


def test_kernels_compile_for_a_gpu(outcomes):
    if wrong := outcomes("compiled"): pytest.fail(wrong["compile_all"], pytrace=False)


def test_triton_is_not_imported_before_a_kernel_runs():
    say = "import sys, sae_nb.gpu as gpu; print('triton' in sys.modules, gpu.available(), sorted(gpu.routes()))"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = subprocess.run([sys.executable, "-c", say], env=env, capture_output=True, text=True, check=True).stdout.strip()
    can = torch.cuda.is_available() and importlib.util.find_spec("triton") is not None
    assert out == f"False {can} ['adam_rows_', 'pair_dots', 'pair_sum', 'top_k', 'weighted_rows']"


def test_twins_have_the_names_and_arguments_of_their_plain_functions():
    import inspect
    for name, f in gpu.routes().items():
        assert list(inspect.signature(f).parameters) == list(inspect.signature(getattr(kernels, name)).parameters)


def test_few_rows_overflow():
    for n, k in ((8192, 32), (131_072, 32), (2**20, 64), (1000, 2)): assert gpu.overflow(n, k, gpu.kept(n, k)) < 1e-3
    assert gpu.kept(131_072, 32) == 4 and gpu.kept(64, 8) is None


if __name__ == "__main__": print(json.dumps(run_all(sys.argv[1])))

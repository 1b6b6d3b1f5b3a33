"""Every trainer that is measured, behind one interface: `step(rows)` and `nmse(rows)`."""

import os
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from sae_nb.core import generator
from sae_nb.dead import paper_terms, power_of_two
from sae_nb.runs import recipe
from sae_nb.sae import SAE, SAEConfig, init_, nmse, unit_rows_
from sae_nb.toy import planted
from sae_nb.train import State, TrainConfig, forward_backward, held_out_nmse, row_scale, update

NEVER = -1e3   # bias of a latent that shall never fire again
LONG = 10**9   # tokens or steps that such a latent has been silent

@dataclass(frozen=True)
class Work:
    "A shape to train."
    name:str
    d:int             # width of a row
    n:int             # latents
    k:int             # latents active in a row
    batch:int         # rows a step
    dead:int=0        # dead latents where the work is measured with some; 0: it is not
    device:str="cpu"

    @property
    def weights(self): return 4 * (2 * self.n * self.d + self.n + self.d)   # bytes

WORKS = {w.name: w for w in (
    Work("W1", 768, 16_384, 32, 2048, 382), Work("W2", 128, 2048, 16, 4096, 48), Work("W3", 768, 65_536, 32, 1024),
    Work("G1", 768, 131_072, 32, 131_072, device="cuda"), Work("G1-8k", 768, 131_072, 32, 8192, device="cuda"),
    Work("N262k", 768, 262_144, 32, 1024),
    Work("Q1", 64, 1024, 8, 256, 24), Work("Q2", 32, 512, 4, 512, 12))}   # the last two only try everything out

def pool(work:Work, batches:int, seed=0) -> list:
    "Rows from 4,096 planted directions with power-law frequencies, plus noise."
    toy = planted(4096, work.d, k=work.k, noise=.05)
    def batch(i):
        g = generator("benchmark", seed, i)
        which = torch.multinomial(toy.freq, work.batch * work.k, replacement=True, generator=g).view(work.batch, work.k)
        strength = .5 + torch.empty(which.shape).exponential_(2., generator=g)
        rows = nn.functional.embedding_bag(which, toy.W, per_sample_weights=strength, mode="sum")
        return (rows + toy.noise * torch.randn(rows.shape, generator=g)).to(work.device)
    return [batch(i) for i in range(batches)]

def silent(work:Work, dead:int):
    "Which latents are dead: `dead` of them, evenly spread."
    return torch.arange(dead, device=work.device) * (work.n // max(1, dead))

@contextmanager
def precision(how:str):
    "Let float32 matrices be multiplied as `how` says (ieee, tf32, bf16), on the CPU and on the GPU."
    backends = [torch.backends.mkldnn.matmul] + ([torch.backends.cuda.matmul] if torch.cuda.is_available() and how != "bf16" else [])
    old = [b.fp32_precision for b in backends]
    for b in backends: b.fp32_precision = how
    try: yield
    finally:
        for b, was in zip(backends, old): b.fp32_precision = was

# Ours, and the reference

def settings(work:Work, lr:float=0.) -> TrainConfig:
    "The recipe's settings without what the other trainers have not: weight average and learning-rate decay."
    own = dict(lr=lr) if lr else {}
    return recipe(work.n, work.k, 1000 * work.batch, work.d, batch=work.batch, ema=0., decay=0., dead_tokens=10_000_000, **own)

def fresh(work:Work, rows, dead:int=0) -> SAE:
    "An SAE initialised as in the paper, `dead` of its latents silenced."
    sae = init_(SAE(SAEConfig(d=work.d, n=work.n, k=work.k, normalise="none")).to(work.device), rows)
    if dead: sae.b_enc.data[silent(work, dead)] = NEVER
    return sae

class Ours:
    "This package."
    def __init__(self, work:Work, rows, dead:int=0, lr:float=0.):
        cfg, sae = settings(work, lr), fresh(work, rows, dead)
        terms = paper_terms(work.n, work.d, cfg)
        if dead: terms[0].tracker.since[silent(work, dead).cpu()] = LONG
        self.state = State(sae, cfg, terms, row_scale(sae, rows))

    def step(self, rows):
        forward_backward(self.state, rows)
        update(self.state)

    def nmse(self, rows): return held_out_nmse(self.state.sae, rows)

    def stages(self, rows, steps:int=5) -> dict:
        "Milliseconds a step by kind of operation, largest first."
        from torch.profiler import ProfilerActivity, profile
        cuda = rows.is_cuda
        self.step(rows)
        with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU], acc_events=True) as found:
            with torch.profiler.record_function("whole"):
                for _ in range(steps): self.step(rows)
                if cuda: torch.cuda.synchronize()
        spent = {}
        for event in found.key_averages():
            us = event.self_device_time_total if cuda else event.self_cpu_time_total
            name = kind(event.key) if cuda or event.key.startswith(("aten::", "mkldnn")) else OUTSIDE
            spent[name] = spent.get(name, 0.) + us / 1000 / steps
        small = [k for k in spent if k not in KINDS and k != OUTSIDE and spent[k] < .03 * sum(spent.values())]
        spent["other operators"] = sum(spent.pop(k) for k in small)
        return dict(sorted(spent.items(), key=lambda pair: -pair[1]))

KINDS = {"GEMM": ("mm", "gemm", "matmul", "linear", "cutlass", "nvjet"), "top-k": ("topk", "_top_kernel", "amax", "max", "radixselect"),
         "gather, embedding bag": ("embedding", "gather", "index", "scatter", "bag"), "sort": ("sort", "searchsorted"), "Adam": ("adam",),
         "copies": ("copy",), "elementwise": ("elementwise",), "sums and norms": ("reduce_kernel",)}
OUTSIDE = "outside torch's operators"   # Python and NumPy

def kind(op:str) -> str:
    "To which stage the operator `op` belongs; by default it is one of its own."
    return next((name for name, words in KINDS.items() if any(w in op.lower() for w in words)), op.removeprefix("aten::"))

class Dense:
    "The reference: everything through b × n, gradients by autograd, Adam as torch makes it."
    def __init__(self, work:Work, rows, dead:int=0, lr:float=0.):
        self.cfg, sae = settings(work, lr), fresh(work, rows, dead)
        self.k, self.k_aux, self.scale = work.k, power_of_two(work.d / 2), row_scale(sae, rows)
        self.W_enc, self.W_dec, self.b_enc, self.b_dec = weights = [nn.Parameter(p.data) for p in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec)]
        self.adam = torch.optim.Adam(weights, lr=self.cfg.lr, betas=(self.cfg.beta1, self.cfg.beta2), eps=self.cfg.eps)
        self.since = torch.zeros(work.n, dtype=torch.int64, device=work.device)
        if dead: self.since[silent(work, dead)] = LONG

    def forward(self, rows):
        "The reconstruction, the pre-activations, and the code."
        pre = (rows - self.b_dec) @ self.W_enc.T + self.b_enc
        values, indices = pre.topk(self.k)
        values = values.relu()
        return torch.zeros_like(pre).scatter(-1, indices, values) @ self.W_dec + self.b_dec, pre, values, indices

    def aux(self, error, pre, dead):
        "AuxK: how well the dead latents reconstruct the error."
        values, indices = pre.masked_fill(~dead, -torch.inf).topk(min(self.k_aux, int(dead.sum())))
        guess = torch.zeros_like(pre).scatter(-1, indices, values.relu()) @ self.W_dec
        return (guess - error).square().mean() / (error - error.mean(0)).square().mean()

    def step(self, rows):
        recon, pre, values, indices = self.forward(rows)
        loss = (recon - rows).square().mean() * self.scale
        self.since += len(rows)
        self.since[indices[values > 1e-3]] = 0
        dead = self.since > self.cfg.dead_tokens
        if dead.any(): loss = loss + self.cfg.aux * self.aux((rows - recon).detach(), pre, dead)
        loss.backward()
        with torch.no_grad(): self.W_dec.grad -= (self.W_dec.grad * self.W_dec).sum(1, keepdim=True) * self.W_dec
        self.adam.step()
        self.adam.zero_grad()
        unit_rows_(self.W_dec)

    @torch.no_grad()
    def nmse(self, rows): return nmse(rows, self.forward(rows)[0])

# Others' packages: each imported where it is needed, and called as its own trainer calls it

class Sparsify:
    "EleutherAI's sparsify with Adam: the loop of its `Trainer.fit` without data, logging and warm-up."
    def __init__(self, work:Work, rows, dead:int=0, lr:float=0.):
        if not torch.cuda.is_available(): os.environ["SPARSIFY_DISABLE_TRITON"] = "1"   # its own switch: Triton kernels need a GPU
        from sparsify.config import SparseCoderConfig, TrainConfig
        from sparsify.sparse_coder import SparseCoder
        self.cfg = TrainConfig(SparseCoderConfig(num_latents=work.n, k=work.k), auxk_alpha=1 / 32)
        torch.manual_seed(0)
        self.sae = SparseCoder(work.d, self.cfg.sae, work.device, dtype=torch.float32)
        self.sae.b_dec.data = rows.mean(0)
        self.since = torch.zeros(work.n, device=work.device, dtype=torch.long)
        self.fired = torch.zeros(work.n, device=work.device, dtype=torch.bool)
        if dead: self.sae.encoder.bias.data[silent(work, dead)], self.since[silent(work, dead)] = NEVER, LONG
        self.optimizer = self.optimise(work, lr)

    def optimise(self, work, lr):
        "Its choice `optimizer='adam'`, with its rule for the learning rate."
        return torch.optim.Adam(self.sae.parameters(), lr=lr or 2e-4 / (work.n / 2**14) ** 0.5)

    def step(self, rows):
        with precision("tf32"): self.backward(rows)   # its fit sets float32 matmul precision to "high"
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.since += len(rows)
        self.since[self.fired] = 0
        self.fired.zero_()

    def backward(self, rows):
        self.sae.set_decoder_norm_to_unit_norm()
        variance = (rows - rows.mean(0)).pow(2).sum()
        out = self.sae(x=rows, y=rows, dead_mask=self.since > self.cfg.dead_feature_threshold, total_variance=variance)
        self.fired[out.latent_indices.flatten()] = True
        (out.fvu + self.cfg.auxk_alpha * out.auxk_loss).backward()

    @torch.no_grad()
    def nmse(self, rows): return nmse(rows, self.sae(rows).sae_out.float())

class SparsifySignum(Sparsify):
    "The same with its default optimizer, schedule-free signed gradients."
    def optimise(self, work, lr):
        from schedulefree import ScheduleFreeWrapper
        from sparsify.sign_sgd import SignSGD
        group = dict(params=self.sae.parameters(), lr=lr or 5e-3 / (work.n / 2**14) ** 0.5)
        optimizer = ScheduleFreeWrapper(SignSGD([group]), momentum=0.95)
        optimizer.train()
        return optimizer

    def nmse(self, rows):
        "With the averaged weights, as this optimizer asks for at evaluation."
        self.optimizer.eval()
        try: return super().nmse(rows)
        finally: self.optimizer.train()

class SAELens:
    "SAELens: its `SAETrainer.step` on its TopK training SAE."
    def __init__(self, work:Work, rows, dead:int=0, lr:float=0.):
        from sae_lens.config import SAETrainerConfig
        from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.training.sae_trainer import SAETrainer
        torch.manual_seed(0)
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=work.d, d_sae=work.n, k=work.k, device=work.device))
        rate = dict(lr=lr or SAETrainerConfig.lr)
        cfg = SAETrainerConfig(total_training_samples=LONG, train_batch_size_samples=work.batch, device=work.device, lr_end=rate["lr"] / 10, **rate)
        self.trainer = SAETrainer(cfg, sae.to(work.device), data_provider=iter(()))
        if dead: sae.b_enc.data[silent(work, dead)], self.trainer.n_forward_passes_since_fired[silent(work, dead)] = NEVER, LONG

    def step(self, rows):
        self.trainer.maybe_reset_sparsity()
        self.trainer.step(rows)
        self.trainer.n_training_steps += 1

    @torch.no_grad()
    def nmse(self, rows): return nmse(rows, self.trainer.sae(rows))

class DictionaryLearning:
    "dictionary_learning: its `TopKTrainer.update`, without warm-up."
    def __init__(self, work:Work, rows, dead:int=0, lr:float=0.):
        from dictionary_learning.trainers.top_k import TopKTrainer
        self.trainer = TopKTrainer(steps=LONG, activation_dim=work.d, dict_size=work.n, k=work.k, layer=0, lm_name="none", lr=lr or None,
                                   warmup_steps=0, seed=0, device=work.device)
        if dead: self.trainer.ae.encoder.bias.data[silent(work, dead)], self.trainer.num_tokens_since_fired[silent(work, dead)] = NEVER, LONG
        self.steps = 0

    def step(self, rows):
        self.trainer.update(self.steps, rows)
        self.steps += 1

    @torch.no_grad()
    def nmse(self, rows): return nmse(rows, self.trainer.ae(rows))

TRAINERS = {"ours": Ours, "dense": Dense, "eai-sparsify": Sparsify, "eai-sparsify-signum": SparsifySignum, "sae-lens": SAELens,
            "dictionary-learning": DictionaryLearning}

def make(name:str, work:Work, rows, dead:int=0, lr:float=0.):
    "The trainer of that name, ready to step on `rows`."
    return TRAINERS[name](work, rows, dead, lr)

# The floor

class Floor:
    "The encoder's matrix product alone, into a buffer made before."
    def __init__(self, work:Work, rows, dtype, how=None):
        size = max(1, 2**30 // work.n)   # rows a product: a buffer of at most 2^30 numbers
        self.parts, self.how = rows.to(dtype).split(size), how
        self.W = torch.randn(work.n, work.d, generator=generator("floor")).to(rows.device, dtype)
        self.out = torch.empty(len(self.parts[0]), work.n, dtype=dtype, device=rows.device)

    def step(self, rows=None):
        with precision(self.how or "ieee"):
            for part in self.parts: torch.mm(part, self.W.T, out=self.out[:len(part)])

    def error(self) -> float:
        "Relative error of some rows against float64."
        self.step()
        want = self.parts[-1][:64].double() @ self.W.double().T
        return ((self.out[:64] - want).norm() / want.norm()).item()

def routes(work:Work, rows) -> dict:
    "The ways to multiply in real float32 on this machine."
    plain = {"float32": Floor(work, rows, torch.float32)}
    if work.device != "cpu": return plain
    quick = Floor(work, rows, torch.float32, "bf16")
    return plain | ({"float32 through oneDNN": quick} if quick.error() < 2e-6 else {})

"""Which training settings are best? Short and long runs on kept activations of the packaged models, one setting changed at a time.

    python recipes/tune.py --out DIR [--stage NAME;…]    # DIR/tune.jsonl; hours on one core in all, goes on after an interruption

Each line of the file is a run: its settings, its error on held-out rows, the share of latents that were dead at its end (in its
own window of rows), and the share that is silent on 200,000 training rows.
`recipes/results/tune.json` is what it gave; `12_runs` shows it beside the rules that follow from it.
"""
import argparse, json, time
from pathlib import Path

import torch

from sae_nb.acts import Block, Stream, batches
from sae_nb.dead import paper_terms, power_of_two
from sae_nb.lm import load_lm
from sae_nb.sae import SAE, SAEConfig, init_
from sae_nb.text import load_text
from sae_nb.train import State, TrainConfig, held_out_nmse, row_scale, train

SITES = {"pylib-64": "resid_post.2", "pylib-128": "resid_post.2", "pylib-256": "resid_post.4"}


def base_lr(n, batch): return 2.2e-3 * (4096 / n) ** .5 * min(1., (batch / 2048) ** .5)


def case(lm, n, k, tokens, seed=0, faster=1., batch=0, warmup=0., decay=.2, aux=1 / 32, window=20, scale=1., norm="layer_norm", ema=25):
    "A run: warm-up in shares of the run, the dead window as a part of it, the learning rate as a multiple of ∝ 1/√n · √batch."
    batch = batch or max(256, power_of_two(tokens / 1000))
    return dict(lm=lm, n=n, k=k, tokens=tokens, seed=seed, lr=faster * base_lr(n, batch), faster=faster, batch=batch, warmup=warmup,
                decay=decay, aux=aux, window=window, scale=scale, norm=norm, ema=ema)


def stages():
    "Name -> runs."
    small = dict(lm="pylib-64", n=1024, k=8, tokens=200_000)
    long = dict(lm="pylib-256", n=4096, k=32, tokens=2_000_000)
    half = dict(lm="pylib-256", n=4096, k=32, tokens=500_000)
    one = lambda base, name, values, **more: [case(**{**base, **more, name: v}) for v in values]
    changes = [("warmup", (.02, .05, .1)), ("decay", (0., .4, .7, 1.)), ("aux", (0., 1 / 8)), ("window", (10, 5)), ("scale", (.5, .7)),
               ("norm", ("unit_norm", "none")), ("batch", (128, 512)), ("ema", (10, 60))]
    together = ((2, 1 / 8, "layer_norm"), (2, 1 / 8, "unit_norm"), (3, 1 / 8, "unit_norm"), (2, 1 / 32, "unit_norm"),
                (2, 1 / 2, "unit_norm"), (1.5, 1 / 8, "unit_norm"))
    more = (dict(warmup=.05), dict(scale=.7), dict(batch=256), dict(window=10), dict(window=40))
    best = ((1.75, 1 / 8, 40, 1024), (1.5, 1 / 8, 40, 1024), (2, 1 / 8, 40, 1024), (2, 1 / 32, 40, 512), (2, 1 / 32, 20, 1024))
    return {
        "rate": [case(**small, faster=f, seed=s) for f in (1, 2, 4, 6, 8) for s in (0, 1, 2)],
        "sizes": [case("pylib-128", n, 16, 300_000, faster=f) for n in (512, 2048, 8192) for f in (1, 2, 4, 8)],
        "others": [run for name, values in changes for run in one(small, name, values, faster=4)],
        "half": [case(**half, faster=f) for f in (1, 2, 3, 4)],
        "half, together": [case(**half, faster=f, decay=.4, aux=a, norm=n) for f, a, n in together]
            + [case(**half, faster=2, decay=.4, aux=1 / 8, norm="unit_norm", **m) for m in more],
        "long": [case(**long)]
            + [case(**long, faster=f, decay=.4, norm="unit_norm", aux=a, window=w, batch=b) for f, a, w, b in best],
    }


class Rows:
    "The rows of one model, read once, as blocks of half a million at most."
    def __init__(self, name, tokens):
        lm, text = load_lm(name), load_text("pylib")
        stream = Stream(lm, text, SITES[name], 256, 131_072, mix=16_384).blocks()
        self.blocks, have = [], 0
        while have < tokens:
            self.blocks.append(next(stream).read().clone())
            have += len(self.blocks[-1])
        self.unseen = next(Stream(lm, text, SITES[name], 256, 16_384, held_out=True).blocks()).read().float()
        self.d = self.unseen.shape[1]

    def endless(self):
        while True: yield from (Block(len(b), lambda b=b: b) for b in self.blocks)


def trained(c, rows):
    "Train as `c` says, and what came of it."
    steps = -(-c["tokens"] // c["batch"])
    cfg = TrainConfig(tokens=c["tokens"], batch=c["batch"], lr=c["lr"], warmup=round(c["warmup"] * c["tokens"]), decay=c["decay"], aux=c["aux"],
                      k_aux=power_of_two(rows.d / 2), dead_tokens=max(1, c["tokens"] // c["window"]), ema=max(0., min(.999, 1 - c["ema"] / steps)), seed=c["seed"])
    sae = init_(SAE(SAEConfig(d=rows.d, n=c["n"], k=c["k"], normalise=c["norm"])), rows.blocks[0][:16_384].float(), c["seed"])
    with torch.no_grad(): sae.W_enc.mul_(c["scale"])
    state = State(sae, cfg, paper_terms(c["n"], rows.d, cfg), row_scale(sae, rows.blocks[0][:16_384].float()))
    start = time.process_time()
    for step in train(sae, batches(rows.endless(), cfg.batch, c["seed"]), cfg, state=state): pass
    seconds = time.process_time() - start
    best = min((sae, state.best()), key=lambda s: held_out_nmse(s, rows.unseen))
    return dict(nmse=round(held_out_nmse(best, rows.unseen), 5), silent=silent(best, rows), dead=round(step.dead, 5), seconds=round(seconds, 1))


@torch.no_grad()
def silent(sae, rows, most=200_000):
    "Share of latents that are active in none of so many rows."
    seen, have = torch.zeros(sae.cfg.n, dtype=torch.bool), 0
    for block in rows.blocks:
        for part in block[:most - have].split(8192):
            code = sae.encode(part.float())
            seen[code.indices[code.values > 0]] = True
            have += len(part)
    return round(1 - seen.float().mean().item(), 5)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stage", default="", help="names of stages, with semicolons; all by default")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "tune.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {json.dumps({k: d[k] for k in case("pylib-64", 1, 1, 1)}) for d in done}
    kept = None
    for name, runs in stages().items():
        if args.stage and name not in args.stage.split(";"): continue
        for c in runs:
            if json.dumps(c) in known: continue
            if not kept or kept[0] != c["lm"] or kept[1] < c["tokens"]: kept = c["lm"], c["tokens"], Rows(c["lm"], c["tokens"])
            found = {"stage": name, **c, **trained(c, kept[2])}
            with path.open("a") as f: f.write(json.dumps(found) + "\n")
            print({k: found[k] for k in ("stage", "n", "tokens", "faster", "warmup", "decay", "aux", "window", "scale", "norm", "batch", "ema", "seed", "nmse", "silent", "dead", "seconds")}, flush=True)


if __name__ == "__main__": main()

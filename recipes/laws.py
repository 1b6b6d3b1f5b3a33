"""Record the scaling laws of the packaged models: 121 runs, from nothing, with one command.

    python recipes/laws.py --out DIR        # DIR/laws.csv; about an hour on one quiet core, goes on after an interruption
    python recipes/laws.py --out DIR --part nk     # one part only; several at once share the work, then run all to write the table

`recipes/results/laws.csv` is what it gave, every run by the default recipe. (`laws_before.csv` has the losses at the end of the same
`nk` runs by an earlier one: `layer_norm`, batch 1,024, AuxK 1/32, lower rates; `nbs/explanations/scaling.ipynb` compares them.) Its parts:
  nk       seven sizes over a factor of 64, four k up to a quarter of the size, two seeds on one model, tokens growing as n^0.6
           (the paper's exponent for GPT-2); with what the reconstruction costs the model that reads on (ce, kl)
  subject  six of these sizes at k = 8 on the two other models, two seeds, the same tokens
  noise    seven sizes at k = 8 on Gaussian rows with the mean and the length of real ones, and no structure; the same tokens
  rate     five sizes, eight learning rates each
"""
import argparse, csv, io, json
from pathlib import Path

import torch

from sae_nb.acts import Block
from sae_nb.core import generator, read_json, write_atomic
from sae_nb.lm import load_lm
from sae_nb.metrics import splice
from sae_nb.runs import RunConfig, Source, run
from sae_nb.sae import SAE
from sae_nb.sweep import grid, is_done, sweep, sweep_rows
from sae_nb.text import load_text

SITES = {"pylib-64": "resid_post.2", "pylib-128": "resid_post.2", "pylib-256": "resid_post.4"}   # at five sixths of the depth, as near as they have one
SIZES = [32 * 2**i for i in range(7)]


def tokens(n): return round(1.5e6 * (n / 512)**.6, -3)


def parts(scale):
    "Name of each part -> its runs."
    base = lambda lm, tokens, **more: RunConfig(lm=lm, site=SITES[lm], tokens=int(scale * tokens), **more)
    joined = lambda grids: {name: cfg for g in grids for name, cfg in g.items()}
    return {"nk": joined(grid(base("pylib-128", tokens(n)), n=[n], k=[k for k in (4, 8, 16, 32) if 4 * k <= n], seed=[0, 1]) for n in SIZES),
            "subject": joined(grid(base(lm, tokens(n), k=8), lm=[lm], n=[n], seed=[0, 1]) for lm in ("pylib-64", "pylib-256") for n in SIZES[:6]),
            "noise": joined(grid(base("pylib-128", tokens(n), k=8), n=[n]) for n in SIZES),
            "rate": grid(base("pylib-128", 3e5, k=16), n=SIZES[2:], lr=[1e-3 * 2**i for i in range(8)])}


def noise(real:Source, seed=0) -> Source:
    "Gaussian rows, independent in every direction, with the mean and the mean squared length of real ones."
    mean, scale = real.sample.mean(0), real.sample.var(0).mean().sqrt()
    def rows(count, *key): return mean + scale * torch.randn(count, len(mean), generator=generator(seed, *key)).to(mean)
    blocks = (Block(b.rows, lambda b=b, i=i: rows(b.rows, "noise", i)) for i, b in enumerate(real.blocks))
    return Source(real.lm, rows(len(real.sample), "sample"), rows(len(real.unseen), "unseen"), blocks)


def downstream(folder, lm, cfg) -> dict:
    "What the reconstruction of the run in `folder` costs the model that reads on (nats a token)."
    kept = folder / "downstream.json"
    if not kept.exists():
        seen = splice(SAE.load(folder), lm, load_text(cfg.text), cfg.site, cfg.context, tokens=32_768, downstream=32_768)
        write_atomic(kept, json.dumps(dict(ce=round(seen.loss("sae") - seen.loss("clean"), 6), kl=round(seen.divergence(times=1).value, 6))))
    return read_json(kept)


def main():
    "Train what is missing, and write the table."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scale", type=float, default=1, help="share of the tokens, to try it out")
    parser.add_argument("--part", choices=list(parts(1)), help="train this part only; all by default")
    args = parser.parse_args()
    table = []
    for part, runs in parts(args.scale).items():
        if args.part not in (None, part): continue
        folder = args.out / part
        if part == "noise":
            for name, cfg in runs.items():
                if is_done(folder / name, cfg): continue
                for _ in run(cfg, folder / name, resume=True, source=noise(Source.of(cfg))): pass
                print(part, name, flush=True)
        else:
            for p in sweep(runs, folder):
                if p.step.tokens >= runs[p.run].tokens: print(part, f"{p.done / p.total:.0%}", p.run, f"{p.step.nmse:.4f}", flush=True)
        rows = [{"part": part, **row, "ce": None, "kl": None} for row in sweep_rows(folder, runs)]
        if part == "nk":
            lm = load_lm("pylib-128", dtype="float32")
            for row in rows:
                if row["final"]: row |= downstream(folder / row["run"], lm, runs[row["run"]])
        table += rows
    text = io.StringIO()
    out = csv.DictWriter(text, [c for c in table[0] if c != "run"], lineterminator="\n", extrasaction="ignore")
    out.writeheader(); out.writerows(table)
    write_atomic(args.out / "laws.csv", text.getvalue())


if __name__ == "__main__": main()

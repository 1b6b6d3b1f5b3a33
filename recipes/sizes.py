"""Do more latents make a better SAE, in every measure? Train a few sizes on the same rows and evaluate each.

    python recipes/sizes.py --out DIR       # DIR/sizes.json; half an hour on one quiet core, goes on after an interruption

Three sizes with two seeds each, one for the largest. `recipes/results/sizes.json` is what it gave; `29_suite` shows it.
"""
import argparse, json
from pathlib import Path

from sae_nb.core import write_atomic
from sae_nb.lm import load_lm
from sae_nb.runs import RunConfig
from sae_nb.sae import SAE
from sae_nb.suite import Amounts, evaluate
from sae_nb.sweep import grid, sweep

AMOUNTS = Amounts(tokens=100_000, downstream=32_768, probe_rows=30_000, examples=131_072, build=8, longest=6, scored=16_384,
                  rescaled=32_768, compared=64, positions=16, refined=4_096)


def sizes(out):
    "Name -> run; all read the rows of one store below `out`."
    base = RunConfig(lm="pylib-256", site="resid_post.4", k=32, tokens=1_000_000, store=str(Path(out) / "store"))
    return {**grid(base, n=[512, 2048], seed=[0, 1]), **grid(base, n=[8192], seed=[0])}


def main():
    "Train, evaluate, and collect the figures."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    out, lm, found = parser.parse_args().out, load_lm("pylib-256"), []
    runs = sizes(out)
    for p in sweep(runs, out / "runs", together=2):
        if p.step.step % 100 == 0: print(p.run, p.step.nmse, flush=True)
    for name, cfg in runs.items():
        e = evaluate(SAE.load(out / "runs" / name), lm, "pylib", suite=AMOUNTS, keep=out / "runs" / name / "evaluation.json")
        found.append(dict(n=cfg.n, seed=cfg.seed, metrics={m: dict(value=v.value, low=v.low, high=v.high) for m, v in e.metrics.items()}))
        write_atomic(out / "sizes.json", json.dumps(found, indent=1) + "\n")
        print(name, e, flush=True)


if __name__ == "__main__": main()

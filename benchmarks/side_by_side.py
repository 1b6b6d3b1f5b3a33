"""What does it cost to train eight SAEs from one reading of the model, against eight runs one after the other?

    python benchmarks/side_by_side.py [--out FILE]      # about ten minutes on two cores

Both ways in one process and with the same settings, on pylib-256 after block 4. The figure is the ratio of processor seconds,
which a busy machine changes little; wall seconds stand beside it.
"""
import argparse, json, shutil, tempfile, time
from pathlib import Path

from sae_nb.core import write_atomic
from sae_nb.runs import RunConfig, run
from sae_nb.sweep import grid, sweep


def spent(work):
    "Processor and wall seconds of `work()`."
    processor, wall = time.process_time(), time.perf_counter()
    work()
    return dict(processor=round(time.process_time() - processor, 1), wall=round(time.perf_counter() - wall, 1))


def both(n, tokens, runs):
    "The cost of `runs` seeds of one size, together and one by one."
    cfgs = grid(RunConfig(lm="pylib-256", site="resid_post.4", n=n, k=32, tokens=tokens, batch=2048), seed=list(range(runs)))
    folder = Path(tempfile.mkdtemp())
    try:
        together = spent(lambda: [None for _ in sweep(cfgs, folder / "together")])
        alone = spent(lambda: [None for name, cfg in cfgs.items() for _ in run(cfg, folder / "alone" / name)])
        weights = lambda way: [(folder / way / name / "sae.safetensors").read_bytes() for name in cfgs]
        same = weights("together") == weights("alone")
    finally: shutil.rmtree(folder)
    return dict(n=n, runs=runs, tokens=tokens, together=together, alone=alone, ratio=round(together["processor"] / alone["processor"], 3),
                ratio_wall=round(together["wall"] / alone["wall"], 3), same_weights=same)


def main():
    "Measure three sizes and write them down."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", type=int, default=262_144)
    parser.add_argument("--runs", type=int, default=8)
    args, found = parser.parse_args(), []
    for n in (1024, 2048, 4096):
        found.append(both(n, args.tokens, args.runs))
        print(found[-1], flush=True)
        if args.out: write_atomic(args.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__": main()

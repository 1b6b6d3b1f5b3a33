"""Measure this package beside a dense reference and other packages: time, memory, quality, reading, whole runs."""

import argparse, gc, importlib.metadata, json, math, os, platform, re, subprocess, sys, tempfile, time
from copy import deepcopy
from datetime import datetime, timezone
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch

from benchmarks.trainers import TRAINERS, WORKS, Dense, Floor, Work, make, pool, routes
from sae_nb.acts import normalise
from sae_nb.core import Table, reason, write_atomic
from sae_nb.show import bars

PARTS = ("step", "memory", "quality", "reading", "end")
WITH_DEAD = ("ours", "dense", "eai-sparsify")   # these are also measured with dead latents
WARM_UP = 2                                     # rounds that do not count
PACKAGES = ("torch", "transformers", "eai-sparsify", "sae-lens", "dictionary-learning")

def say(*words):
    "Print a line of progress."
    print(time.strftime("%H:%M:%S"), *words, file=sys.stderr, flush=True)

# Time

def timed(f, cuda:bool=False):
    "Wall and processor seconds of one call of `f`."
    if cuda: torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    f()
    if cuda: torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu

def attempt(name:str, f, failed:dict):
    "What `f` gives; if it fails, one sentence about it goes into `failed`."
    try: return f()
    except Exception as e: failed[name] = f"{type(e).__name__}: {reason(e)[:160]}"   # whatever another package raises
    say(f"{name} is left out: {failed[name]}")

def interleave(entries:dict, batches, rounds:int, every:dict, failed:dict) -> dict:
    "Step all `entries` in turn, in an order that rotates; name → {round: (wall, processor seconds)}."
    found, cuda = {name: {} for name in entries}, batches[0].is_cuda
    for r in range(-WARM_UP, rounds):
        names = [n for n in entries if n not in failed and (r < 0 or r % every.get(n, 1) == 0)]
        turn = (r + WARM_UP) % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            took = attempt(name, lambda: timed(lambda: entries[name].step(batches[r % len(batches)]), cuda), failed)
            if r >= 0 and took: found[name][r] = took
        if r % max(1, rounds // 10) == 0: say(f"round {r + 1} of {rounds}" if r >= 0 else "warm-up")
    return {name: times for name, times in found.items() if times and name not in failed}

def spread(values) -> dict:
    "Smallest value, median and quartiles."
    low, mid, high = torch.tensor(list(values), dtype=torch.float64).quantile(torch.tensor([.25, .5, .75], dtype=torch.float64)).tolist()
    return dict(min=min(values), q1=low, median=mid, q3=high, count=len(values))

def ratio(a:dict, b:dict) -> dict:
    "How many times `b` goes into `a`: over the rounds that have both, and of their minima; wall and processor time."
    both = [r for r in a if r in b]
    if not both: return {}
    least = lambda times, i: min(t[i] for t in times.values())
    wall, cpu = (spread([a[r][i] / b[r][i] for r in both]) | dict(of_minima=least(a, i) / least(b, i)) for i in (0, 1))
    return dict(wall=wall, cpu=cpu)

def summary(times:dict) -> dict:
    "Milliseconds a step, wall and processor, with every single measurement."
    wall, cpu = ([1000 * t[i] for t in times.values()] for i in (0, 1))
    return dict(wall=spread(wall), cpu=spread(cpu), rounds=dict(zip(times, wall)), cpu_rounds=dict(zip(times, cpu)))

def step_part(work:Work, names, rounds:int, every:dict) -> dict:
    "Time a step of every trainer on `work`, interleaved with the floor."
    say(f"{work.name}: d {work.d}, n {work.n}, k {work.k}, batch {work.batch}")
    batches, failed, entries = pool(work, 4), {}, {}
    for name, dead in [(n, 0) for n in names] + [(n, work.dead) for n in names if n in WITH_DEAD and work.dead]:
        label = f"{name}, {dead} dead" if dead else name
        trainer = attempt(label, lambda: make(name, work, batches[0], dead), failed)
        if trainer: entries[label] = trainer
    floors = {f"floor {n}": f for n, f in routes(work, batches[0]).items()} | {"floor bfloat16": Floor(work, batches[0], torch.bfloat16)}
    times = interleave(entries | floors, batches, rounds, every, failed)
    held = pool(work, 1, "held out")[0][:4096]
    nmse = {n: attempt(n, lambda: entries[n].nmse(held), failed) for n in times if n in entries}
    stages = attempt("stages of ours", lambda: entries["ours"].stages(batches[0]), failed) if "ours" in times else None
    steps = {n: summary(t) for n, t in times.items()}
    return dict(work=vars(work), steps=steps, ratios=ratios(times, work), nmse=nmse, stages=stages, failed=failed)

def ratios(times:dict, work:Work) -> dict:
    "Every ratio that is reported, by name."
    pairs = {f"dense / {n}": ("dense", n) for n in times} | {f"{n} / ours": (n, "ours") for n in times}
    pairs |= {f"{n}, dead / ours, dead": (f"{n}, {work.dead} dead", f"ours, {work.dead} dead") for n in WITH_DEAD}
    fast = min((n for n in times if n.startswith("floor float32")), key=lambda n: min(t[0] for t in times[n].values()), default=None)
    pairs |= {"share of the floor float32": (fast, "ours"), "share of the floor bfloat16": ("floor bfloat16", "ours"),
              "ours, dead / ours": (f"ours, {work.dead} dead", "ours")}
    return {k: ratio(times[a], times[b]) for k, (a, b) in pairs.items() if a in times and b in times and a != b}

def between(s:dict) -> str:
    "A median with its quartiles."
    return f"{s['median']:.3g} ({s['q1']:.3g}–{s['q3']:.3g})" if s else ""

def step_tables(found:dict) -> list:
    "Titles and tables for one work."
    r, wall, rows = found["ratios"], lambda name: found["ratios"].get(name, {}).get("wall", {}), []
    for n, s in found["steps"].items():
        rows.append({"trainer": n, "ms, least": s["wall"]["min"], "ms, median (quartiles)": between(s["wall"]), "processor ms, least": s["cpu"]["min"],
                     "dense / it": between(wall(f"dense / {n}")), "of least": wall(f"dense / {n}").get("of_minima"),
                     "it / ours": between(wall(f"{n} / ours")), "of least ": wall(f"{n} / ours").get("of_minima"),
                     "NMSE": found["nmse"].get(n)})
    rows += [{"trainer": n, "ms, least": why} for n, why in found["failed"].items()]
    other = [{"ratio": k, "wall, median (quartiles)": between(v["wall"]), "of least": v["wall"]["of_minima"],
              "processor time, median (quartiles)": between(v["cpu"]), "of least ": v["cpu"]["of_minima"]}
             for k, v in r.items() if v and (k.startswith(("share", "ours, dead")) or k.endswith("ours, dead"))]
    stages = [{"stage": k, "ms": v, "share": v / sum(found["stages"].values())} for k, v in (found["stages"] or {}).items()]
    w = found["work"]
    title = f"{w['name']}: d {w['d']}, n {w['n']:,}, k {w['k']}, batch {w['batch']:,}"
    return [(title, rows), (f"{w['name']}: further ratios", other),
            (f"{w['name']}: where our step goes (under a profiler, which slows it down)", stages)]

# Memory

def memory_now(key:str) -> int:
    "Bytes of this process in memory: `VmRSS` now, `VmHWM` at most (`ru_maxrss` would count its parent's memory too)."
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(key))
    return 1024 * int(line.split()[1])

def memory_of(name:str, work:Work):
    "Print what one trainer takes at most over what the process had before; runs in a process of its own."
    tiny, rows = WORKS["Q1"], pool(work, 2)
    make(name, tiny, (first := pool(tiny, 1)[0])).step(first)   # so that imports do not count
    Path("/proc/self/clear_refs").write_text("5")   # forget the highest mark so far
    before = memory_now("VmRSS")
    trainer = make(name, work, rows[0])
    for i in range(3): trainer.step(rows[i % 2])
    print(json.dumps(dict(peak=memory_now("VmHWM") - before)))

def memory_part(work:Work, names, threads:int) -> dict:
    "Peak memory of each trainer on `work`."
    found, limit = {}, 1.3 * 3 * work.weights + 1e9   # weights and Adam's two states
    for name in names:
        say(f"memory of {name} on {work.name}")
        words = [sys.executable, __file__, "--memory-of", name, work.name, "--threads", str(threads)]
        p = subprocess.run(words, capture_output=True, text=True)
        last = (p.stdout.strip().splitlines() or [""])[-1]
        ok = p.returncode == 0 and last.startswith("{")
        why = f"ended with {p.returncode}: " + (p.stderr.strip().splitlines() or [""])[-1][:160]
        found[name] = json.loads(last) if ok else dict(failed=why)
    return dict(work=vars(work), weights=work.weights, limit=limit, trainers=found)

def memory_table(found:dict) -> list:
    "A row for each work and trainer."
    def row(work, f, name, m):
        start = {"work": work, "trainer": name, "weights MB": f["weights"] / 1e6, "limit MB": f["limit"] / 1e6}
        if "failed" in m: return start | {"peak MB": m["failed"]}
        return start | {"peak MB": m["peak"] / 1e6, "within": m["peak"] <= f["limit"], "peak / weights": m["peak"] / f["weights"]}
    return [row(work, f, n, m) for work, f in found.items() for n, m in f["trainers"].items()]

# Quality for time

class Racer:
    "A trainer on its way through the common stream, with a clock of its own."
    def __init__(self, trainer, stream): self.trainer, self.stream, self.steps, self.spent, self.curve = trainer, stream, 0, 0., []

    def go(self, until:float):
        "Train until the own clock shows `until` seconds."
        while self.spent < until:
            self.spent += timed(lambda: self.trainer.step(self.stream[self.steps % len(self.stream)]))[0]
            self.steps += 1

def quality_part(work:Work, names, seconds:float, lr:float) -> dict:
    "Train all on one stream in turn, each for `seconds` of its own time; NMSE on held-out rows at every tenth."
    stream, held, failed, racers = pool(work, 64), pool(work, 1, "held out")[0][:4096], {}, {}
    for name in names:
        attempt(name, lambda: make(name, work, stream[0], 0, lr).step(stream[0]), failed)   # load its code
        trainer = None if name in failed else make(name, work, stream[0], 0, lr)
        if trainer: racers[name] = Racer(trainer, stream)
    for slice in range(1, 51):
        order = [n for n in racers if n not in failed]
        for name in order[slice % len(order):] + order[:slice % len(order)]:
            attempt(name, lambda: racers[name].go(slice * seconds / 50), failed)
        if slice % 5: continue
        for name, racer in racers.items():
            if name in failed: continue
            racer.curve.append(dict(seconds=racer.spent, steps=racer.steps, nmse=racer.trainer.nmse(held)))
        say(f"quality: {slice // 5} tenths of {seconds:g} s:", {n: round(r.curve[-1]["nmse"], 4) for n, r in racers.items() if r.curve})
    return dict(work=vars(work), seconds=seconds, lr=lr, failed=failed, curves={n: r.curve for n, r in racers.items()})

def quality_table(found:dict) -> list:
    "Tenths down, trainers across; the last rows say how many steps that was."
    rows = [{"seconds": round((i + 1) * found["seconds"] / 10, 2)} | {n: c[i]["nmse"] for n, c in found["curves"].items() if len(c) > i} for i in range(10)]
    return rows + [{"seconds": "steps"} | {n: c[-1]["steps"] for n, c in found["curves"].items() if c}]

# Reading

def random_lm(quick:bool):
    "A GPT-2 with random weights."
    from transformers import GPT2Config, GPT2LMHeadModel
    from sae_nb.lm import LM
    shape = dict(n_layer=3, n_embd=64, n_head=4, vocab_size=500) if quick else {}
    torch.manual_seed(0)
    return LM(GPT2LMHeadModel(GPT2Config(**shape)), None, "gpt2, random")

def reading_part(rounds:int, quick:bool) -> dict:
    "Tokens a second of the whole forward pass, and of reading in the middle."
    whole = random_lm(quick)
    half = deepcopy(whole)
    half.model.bfloat16()
    site = f"resid_post.{len(whole.blocks) // 2 - 1}"
    ids = torch.randint(0, whole.model.config.vocab_size, (8, 128), generator=torch.Generator().manual_seed(0))
    ways = {"whole forward, float32": lambda: whole.logits(ids), f"read {site}, float32": lambda: whole.read(ids, site),
            f"read {site}, bfloat16": lambda: half.read(ids, site)}
    with torch.no_grad(): times = interleave({n: Call(f) for n, f in ways.items()}, [ids], rounds, {}, {})
    first = next(iter(ways))
    speed = lambda t: spread([ids.numel() / wall for wall, _ in t.values()])
    return {n: dict(tokens_per_second=speed(t), whole_over_it=ratio(times[first], t)) for n, t in times.items()}

class Call:
    "A function that is measured like a trainer."
    def __init__(self, f): self.f = f
    def step(self, _): self.f()

def reading_table(found:dict) -> list:
    "A row for each way to read."
    return [{"way": n, "tokens/s, median (quartiles)": between(r["tokens_per_second"]),
             "times the whole forward": between(r["whole_over_it"]["wall"]), "of least": r["whole_over_it"]["wall"]["of_minima"]} for n, r in found.items()]

# Whole runs

def whole_run(lm, site:str, tokens:int, dtype:str, n:int) -> tuple:
    "Rows a second of `runs.run` from its call to its end and while it trains, and the SAE that it leaves."
    from sae_nb.runs import RunConfig, run
    from sae_nb.sae import SAE as Trained
    with tempfile.TemporaryDirectory() as folder:
        start, rate = time.perf_counter(), 0.
        cfg = RunConfig(lm=lm.name, site=site, n=n, k=32, tokens=tokens, dtype=dtype)
        for step in run(cfg, f"{folder}/run", lm=lm): rate = step.rate
        return tokens / (time.perf_counter() - start), rate, Trained.load(f"{folder}/run")

def plain_rows(lm, layer:int):
    "Normalised rows the plain way: whole forward passes of 64 × 256 tokens, every hidden state kept."
    from sae_nb.text import load_text, windows
    for w in windows(load_text("pylib").documents(), lm.tokenizer, 256, 64):
        with torch.no_grad(): states = lm.model(w.ids, use_cache=False, output_hidden_states=True).hidden_states
        yield normalise(states[layer + 1][w.keep].float(), "layer_norm").rows

def plain_run(lm, layer:int, n:int, batch:int, seconds:float) -> float:
    "Rows a second of the plain way: float32 throughout, dense autograd."
    done, trainer, start = 0, None, time.perf_counter()
    for rows in plain_rows(lm, layer):
        trainer = trainer or Dense(Work("end", rows.shape[1], n, 32, batch), rows)
        for part in rows.split(batch): trainer.step(part)
        done += len(rows)
        if time.perf_counter() - start > seconds: return done / (time.perf_counter() - start)

def end_part(name:str, layer:int, tokens:int, n:int, seconds:float, judged:int) -> dict:
    "Whole runs in both precisions beside the plain way, and how good their SAEs are."
    from sae_nb.lm import load_lm
    from sae_nb.metrics import measure
    from sae_nb.runs import recipe
    from sae_nb.text import load_text
    lms, site = {t: load_lm(name, "cpu", t) for t in ("float32", "bfloat16")}, f"resid_post.{layer}"
    batch, found = recipe(n, 32, tokens).batch, {}
    for dtype, lm in lms.items():
        say(f"a run of {tokens:,} tokens, subject model in {dtype}")
        rate, training, sae = whole_run(lm, site, tokens, dtype, n)
        m = measure(sae, lms["float32"], load_text("pylib"), site, tokens=judged, downstream=judged)
        found[dtype] = dict(rows_per_second=rate, while_training=training, nmse=m.nmse, ce_recovered=m.ce_recovered,
                            ce_increase=m.ce_spliced - m.ce_clean, ce_increase_se=m.ce_increase_se)
    say(f"the plain way for {seconds:g} s, batch {batch}")
    plain = plain_run(lms["float32"], layer, n, batch, seconds)
    return dict(lm=name, site=site, tokens=tokens, n=n, k=32, batch=batch, judged=judged, runs=found, plain=plain)

def end_table(found:dict) -> list:
    "The plain way, then each run."
    row = lambda name, r: {"way": name, "rows/s": r["rows_per_second"], "times the plain way": r["rows_per_second"] / found["plain"],
                           "rows/s while it trains": r["while_training"], "times the plain way ": r["while_training"] / found["plain"], "NMSE": r.get("nmse"),
                           "CE recovered": r.get("ce_recovered"), "CE increase (nats)": r.get("ce_increase"), "± standard error": r.get("ce_increase_se")}
    return [row("plain", dict(rows_per_second=found["plain"], while_training=found["plain"]))] + [row(f"run, {t}", r) for t, r in found["runs"].items()]

# The whole

def version(name:str):
    "The installed version of a package, or None."
    try: return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError: return None

def machine(threads:int) -> dict:
    "What was measured where."
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = next((line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")), platform.processor())
    git = lambda *words: subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True).stdout.strip()
    return dict(cpu=cpu, cores=os.cpu_count(), ram=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), threads=threads, waiting=os.environ.get("OMP_WAIT_POLICY", "default"),
                gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None, python=platform.python_version(),
                packages={p: version(p) for p in PACKAGES}, date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                commit=git("rev-parse", "HEAD"), changed=bool(git("status", "--porcelain", "--", "../sae_nb", ".")))

def tables(found:dict) -> list:
    "Titles and tables of all that was measured."
    out = [pair for work in found.get("step", {}).values() for pair in step_tables(work)]
    if "memory" in found: out.append(("Peak memory over weights and optimiser state", memory_table(found["memory"])))
    if q := found.get("quality"):
        out.append((f"NMSE for time on {q['work']['name']}" + (f", every learning rate {q['lr']:g}" if q["lr"] else ""), quality_table(q)))
        out.append(("Left out of quality for time", [{"trainer": n, "why": w} for n, w in q["failed"].items()]))
    if "reading" in found: out.append(("Reading the subject model", reading_table(found["reading"])))
    if "end" in found: out.append((f"A whole run of {found['end']['tokens']:,} tokens", end_table(found["end"])))
    return [(title, Table(rows)) for title, rows in out if rows]

def picture(found:dict):
    "Bars of milliseconds a step, log scale, the floor dashed."
    values, floors = {}, {}
    for name, work in found["step"].items():
        least = {re.sub(r", \d+ dead", ", some dead", n): s["wall"]["min"] for n, s in work["steps"].items()}
        values[name] = {n: ms for n, ms in least.items() if not n.startswith("floor")}
        floors[name] = min(ms for n, ms in least.items() if n.startswith("floor float32"))
    title = "How long does one training step take? Dashed: the encoder's matrix product alone"
    drawn = bars(values, title, "milliseconds a step, least of all rounds", log=True)
    aside = drawn.fig.data[0].orientation == "h"
    for trace, ms in zip(drawn.fig.data, floors.values()):
        (drawn.fig.add_vline if aside else drawn.fig.add_hline)(ms, line=dict(dash="dash", color=trace.marker.color[0], width=1.5))
    low, high = (math.log10(v) for v in (min(floors.values()) / 1.5, 2 * max(v for w in values.values() for v in w.values())))
    ticks = [d * 10 ** e for e in range(math.floor(low), math.ceil(high)) for d in (1, 3)]
    drawn.fig.layout["xaxis" if aside else "yaxis"].update(range=(low, high), tickvals=ticks, ticktext=[f"{t:g}" for t in ticks])
    return drawn

def keep(found:dict, name:str):
    "Write what is known so far."
    folder = HERE / "results"
    write_atomic(folder / f"{name}.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    write_atomic(folder / f"{name}.md", "".join(f"## {title}\n\n{table._repr_markdown_()}\n\n" for title, table in tables(found)))

def draw(found:dict, name:str):
    "Keep the picture as a page and, where a browser can make it, as an image."
    drawn = picture(found)
    write_atomic(HERE / "results" / f"{name}.html", drawn.fig.to_html(include_plotlyjs="cdn"))
    png = attempt("the PNG", drawn.png, {})
    if png: write_atomic(HERE / "results" / f"{name}.png", png)

def options(words=None):
    "What the command line asks for."
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    p.add_argument("--work", nargs="+", choices=WORKS, help="shapes for steps (default: W1 W2 W3, and G1 G1-8k with a GPU)")
    p.add_argument("--trainers", nargs="+", choices=TRAINERS, help="trainers (default: all; eai-sparsify-signum in quality only)")
    p.add_argument("--rounds", type=int, default=20, help="measured rounds for W1 and W2; a quarter of it for larger work")
    p.add_argument("--every", nargs="+", default=[], metavar="NAME=N", help="measure a slow trainer in every Nth round only")
    p.add_argument("--threads", type=int, default=2, help="threads of torch")
    p.add_argument("--seconds", type=float, default=30., help="training time of each trainer in the quality part")
    p.add_argument("--lr", type=float, default=0., help="one learning rate for all in the quality part (default: each by its own rule)")
    p.add_argument("--name", default="", help="name of the result (default: the date; quick with --quick)")
    p.add_argument("--quick", action="store_true", help="tiny shapes and few rounds, to try everything out")
    p.add_argument("--memory-of", nargs=2, metavar=("TRAINER", "WORK"), help=argparse.SUPPRESS)
    o = p.parse_args(words)
    o.every = {n: int(k) for n, _, k in (e.partition("=") for e in o.every)}
    gpu = ["G1", "G1-8k"] * torch.cuda.is_available()
    o.work = o.work or (["Q1", "Q2"] if o.quick else ["W1", "W2", "W3", *gpu])
    if o.quick: o.rounds, o.seconds = 3, .5
    o.name = o.name or ("quick" if o.quick else datetime.now().strftime("%Y-%m-%d-%H%M"))
    return o

def measure(o, found:dict):
    "Measure part by part, keeping what is known after each."
    peers = o.trainers or [n for n in TRAINERS if n != "eai-sparsify-signum"]
    def done(part, value): found[part] = value; keep(found, o.name); gc.collect()
    if "step" in o.parts:
        for name in o.work:
            rounds = o.rounds if name in ("W1", "W2", "Q1", "Q2") else max(3, o.rounds // 4)
            done("step", found.get("step", {}) | {name: step_part(WORKS[name], peers, rounds, o.every)})
    if "memory" in o.parts:
        for name in ("Q1",) if o.quick else ("W1", "W3", "N262k"):
            names = ["ours"] if name == "N262k" else peers[:2] if o.quick else peers
            done("memory", found.get("memory", {}) | {name: memory_part(WORKS[name], names, o.threads)})
    if "quality" in o.parts:
        done("quality", quality_part(WORKS["Q2" if o.quick else "W2"], o.trainers or list(TRAINERS), o.seconds, o.lr))
    if "reading" in o.parts: done("reading", reading_part(o.rounds, o.quick))
    if "end" in o.parts:
        done("end", end_part(*(("pylib-64", 1, 2048, 512, .1, 1024) if o.quick else ("pylib-256", 4, 1_000_000, 4096, 20., 32_768))))

def main():
    o = options()
    torch.set_num_threads(o.threads)
    if o.memory_of: return memory_of(o.memory_of[0], WORKS[o.memory_of[1]])
    found = dict(machine=machine(o.threads))
    measure(o, found)
    for title, table in tables(found): print(f"\n## {title}\n\n{table._repr_markdown_()}")
    if "step" in found: draw(found, o.name)
    say(f"kept in benchmarks/results/{o.name}.json")

if __name__ == "__main__": main()

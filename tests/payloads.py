"A made-up payload of any size for tests: quickly written, always the same, and with all the texts that break pages."
import json
from pathlib import Path

import numpy as np

from sae_nb.core import digest, write_json
from sae_nb.features import Band, Context, Feature, Payload, _sealed, encode_column, moments, write_payload

# each list joined is a text; characters may be split over several tokens, which then are empty up to the last
TEXTS = [["def", " area", "(", "r", "):", "\n", "    ", "return", " 3", ".", "14", " *", " r"],
         ["caf", "é", " «", "é", "»", " cr", "", "è", "me"],
         ["", "", "日", "本", "語", " 日本", "。"],
         [" ok", "", "", "", "🙂", "!", "", "👩‍👩‍👧"],
         ["<b>", "bold", "</b>", "<script>", "alert", "(", "1", ")", "</script>", "&amp;", "&"],
         ["say", " \"", "hi", "\"", " or", " '", "ho", "'", " `", "x", "`", "\\n"],
         ["שלום", " ", "עולם", " means", " hello", " مرحبا"],
         ["a", "\n", "\n", "\t", "b", "\r\n", " ", "   ", "c", "\u200b", "$x^2$", "|", "**no**"],
         ["class", " Very", "Long", "Identifier" * 6, "(", "object", "):", "\n", "    ", "pass"]]


def context(rng, act, number=0, effect=False):
    "A stretch of one of TEXTS around an activation of `act`."
    tokens = TEXTS[number % len(TEXTS)]
    at = int(rng.integers(len(tokens)))
    values = [0.0] * len(tokens)
    values[max(at - 1, 0)], values[at] = act / 3, act
    T = len(tokens) - at
    votes = lambda: [[["é", 1.5], [" the", .5], ["<b>", .25]] for _ in range(T)]
    told = dict(loss=[.3 / (j + 1) for j in range(T - 1)] + [None], kl=[.2 / (j + 1) for j in range(T)], up_logits=votes(), down_logits=votes(), up_probs=votes(), down_probs=votes())
    return Context(tokens, values, at, act, ["asyncio.tasks", "docs.<b>&", "日本.txt"][number % 3], int(rng.integers(5000)), told if effect else None)


def feature(i, seed=0, n=100, bin=.25, many=False):
    "One made-up feature; every seventh never fires, every fourth has effects, every third an explanation."
    rng = np.random.default_rng((seed, i))
    if i % 7 == 3: return Feature(i, bin=bin, neighbours=[[(i + 1) % n, .1]] if n > 1 else [])
    rows, count = 100_000, int(10 ** rng.uniform(0, 3.5))
    acts = np.sort(rng.gamma(2, rng.uniform(.5, 2), count) + .01)[::-1]
    sums = [[(acts ** p).sum()] for p in (1, 2, 3, 4)]
    tops, randoms = (8, 8) if many else (2, 1)
    top = [context(rng, float(a), i + j, effect=i % 4 == 0) for j, a in enumerate(acts[:tops])]
    random = [context(rng, float(a), i + j, effect=i % 4 == 0 and j == 0) for j, a in enumerate(rng.choice(acts, min(randoms, count), replace=False))]
    parts = [p for p in np.array_split(acts, 4 if many else 2) if len(p)]
    bands = [Band(float(p[-1]), float(p[0]), len(p) / count, [context(rng, float(a), i + 5) for a in p[:2 if many else 1]]) for p in parts]
    others = [int(o) for o in rng.integers(n, size=4) if o != i]
    why = {"text": f"fires on é or <b>, number {i}", "precision": .8, "recall": .5} if i % 3 == 0 else None
    return Feature(i, count / rows, **{k: float(v[0]) for k, v in moments(rows, sums).items()}, max=float(acts[0]), effect=float(rng.gamma(1, .2)) if i % 4 == 0 else None,
                   hist=np.bincount((np.ceil(acts / bin) - 1).astype(int)).tolist(), top=top, random=random, bands=bands,
                   logits={"up": [[" the", 1.5], ["é", 1.], ["<b>", .5]], "down": [["\n", -1.], [" «", -.5]]}, neighbours=[[o, .5 - .1 * j] for j, o in enumerate(others)],
                   together=[[o, .4 - .1 * j] for j, o in enumerate(others)], explanation=why, bin=bin)


def about(shard=64, bin=.25):
    "What the index of a made-up payload says."
    return dict(rows=100_000, lm="made-up", site="resid_post.2", text="made-up", context=64, d=32, k=8, bin=bin, shard=shard, sources={"seed": 0})


def made(folder, n=100, seed=0, many=None, shard=64):
    "Write a made-up payload with `n` latents; `many` contexts for each by default up to a thousand latents. Above that, shards repeat under other numbers."
    many, own = n <= 1_000 if many is None else many, n if n <= 1_000 else 16 * shard
    small = write_payload(folder, about(shard), (feature(i, seed, n, many=many) for i in range(own)))
    if n <= own: return small
    repeat = lambda items: [items[i % own] for i in range(n)]
    shards = [small.shard(j) for j in range(16)]
    marks = []
    for j in range(-(-n // shard)):
        first, words = j * shard, json.dumps(shards[j % 16]["words"], ensure_ascii=False)
        latents = [json.dumps(d | {"id": first + i}, ensure_ascii=False, separators=(",", ":")) for i, d in enumerate(shards[j % 16]["latents"][:n - first])]
        content = f'{{"latents":[{",".join(latents)}],"words":{words}}}'.encode()
        (Path(folder) / "shards" / f"{j:05}.json").write_bytes(content)
        marks.append(digest(content))
    columns = {c: encode_column(np.resize(v, n)) for c, v in small.columns.items()}
    index = small.index | dict(n=n, tokens=repeat(small.tokens), quotes=repeat(small.quotes), explanations=repeat(small.explanations), columns=columns, shards=marks)
    write_json(Path(folder) / "index.json", _sealed(index))
    return Payload.open(folder)

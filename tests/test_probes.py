"The probes against slow optimisers and closed forms, and the labels of the code tasks against Python itself."
import ast, io, math, tokenize
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from sae_nb.acts import read_rows
from sae_nb.core import UserError
from sae_nb.lm import load_lm
from sae_nb.probes import RIDGE, Counts, Tasks, binned, dense_probe, joined, newton, nominate, probe, rank_edges
from sae_nb.sae import SAE, Channels, Dictionary, SAEConfig, init_
from sae_nb.tasks import CODE_TASKS, HUB, code_labels, code_tasks, deciding, hub_tasks, table_tasks
from sae_nb.text import Document, Text, Windows, load_text
from sae_nb.toy import planted


def draw(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
def entropy(p): return -(p * math.log(p) + (1 - p) * math.log(1 - p))
def standard(z): return (z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True)


def slow_fit(z, y, ridge=0.):
    "The least mean cross-entropy (and ridge) of a logistic fit on one latent, by a general optimiser in float64."
    at = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([at], max_iter=300, tolerance_grad=1e-11, tolerance_change=1e-15, line_search_fn="strong_wolfe")
    def loss(): return F.binary_cross_entropy_with_logits(at[0] * z + at[1], y) + ridge / 2 * at[0] ** 2
    def closure():
        optimiser.zero_grad()
        value = loss()
        value.backward()
        return value
    optimiser.step(closure)
    return loss().item()


def some_tasks(b=4_000, d=12, t=5, docs=100, seed=0):
    "Answers that hang on the rows in several ways, from balanced to rare."
    rows = draw(b, d, seed=seed)
    labels = rows[:, :t] + draw(b, t, seed=seed + 1) > torch.linspace(0, 3, t)
    return Tasks([f"task {i}" for i in range(t)], rows, labels, torch.arange(b) % docs, "random")


# --- one fit ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["dense", "heavy tail", "sparse", "rare answer"])
def test_newton_equals_a_slow_optimiser(kind):
    "On latents of several shapes, every loss is the least there is."
    z, y = draw(6, 1_500).double(), (draw(1_500, 3, seed=1) + .8 * draw(6, 1_500)[:3].T > (2.2 if kind == "rare answer" else .3)).double()
    if kind == "heavy tail": z = z.sinh() ** 3
    if kind == "sparse": z = (z - 2).relu()
    data = Counts.exact(standard(z), y)
    wb = newton(data)
    mine, slow = data.loss(wb) + RIDGE / 2 * wb[:, 0] ** 2, torch.tensor([[slow_fit(data.z[i], y[:, j], RIDGE) for j in range(3)] for i in range(6)], dtype=torch.float64)
    assert (mine - slow).abs().max() < 1e-9
    free = torch.tensor([slow_fit(data.z[i], y[:, i % 3]) for i in range(6)])
    assert kind == "heavy tail" or (data.loss(wb)[range(6), [0, 1, 2] * 2] - free).abs().max() < 1e-6


def test_rows_of_equal_value_may_be_counted_together():
    "Two values, three rows: the loss of the counts is that of the rows, and the best fit is the base rate at each value."
    z = torch.tensor([[1., 1., 1., -1., -1., -1.]], dtype=torch.float64)
    y = torch.tensor([[1.], [1.], [0.], [0.], [0.], [1.]], dtype=torch.float64)
    grouped = Counts(torch.tensor([[1., -1.]], dtype=torch.float64), torch.tensor([[[2.], [1.]]], dtype=torch.float64), torch.tensor([3., 3.], dtype=torch.float64))
    wb = newton(grouped)
    assert torch.allclose(wb, newton(Counts.exact(z, y))) and torch.allclose(grouped.loss(wb), Counts.exact(z, y).loss(wb))
    assert abs(grouped.loss(wb).item() - entropy(1 / 3)) < 1e-4 and abs(wb[0, 0, 0].item() - math.log(2)) < 1e-3


def test_separable_and_constant_latents():
    "One that tells the answer perfectly has a finite weight and nearly no loss; one that never moves has weight 0 and the entropy of the base rate."
    y = (torch.arange(1_000) < 250).double()
    data = Counts.exact(torch.stack([standard((2 * y - 1)[None])[0], 0 * y]), y[:, None])
    wb = newton(data)
    assert wb.isfinite().all() and data.loss(wb)[0] < 1e-3
    assert wb[1, 0] == 0 and abs(data.loss(wb)[1].item() - entropy(.25)) < 1e-9


@pytest.mark.parametrize("b", [2, 3, 40, 1_000, 70_000])
def test_rank_edges_cut_all_rows(b):
    "From the first row to the last, in order, with small groups at both ends."
    edges = rank_edges(b)
    assert edges[0] == 0 and edges[-1] == b and (edges.diff() > 0).all() and edges.diff()[0] <= 1 + b // 40


def test_groups_hold_every_row_once():
    "Counts and means of the groups add up to those of the rows."
    z, y = draw(7, 900), (draw(900, 4, seed=2) > 1).float()
    few = binned(z, y, rank_edges(900))
    assert few.count.sum() == 900 and torch.equal(few.yes.sum(1), y.sum(0).expand(7, 4))
    assert torch.allclose((few.z * few.count).sum(1), z.sum(1), atol=1e-3) and (few.z.diff(dim=1) >= 0).all()


# --- probes ----------------------------------------------------------------------------------------

def test_probe_equals_the_obvious_search():
    "Latent and both losses are those of a slow search over all latents, in float64."
    tasks = some_tasks()
    sae = init_(SAE(SAEConfig(d=12, n=40, k=4)), tasks.rows)
    mine, fit = probe(sae, tasks), tasks.fit_on()
    z = sae.pre(tasks.rows).T.detach().double()
    z = (z - z[:, fit].mean(1, keepdim=True)) / z[:, fit].std(1, keepdim=True)
    for i in range(5):
        y = tasks.labels[:, i].double()
        losses = torch.tensor([slow_fit(z[j, fit], y[fit]) for j in range(40)])
        assert mine.latent[i] == losses.argmin() and abs(mine.fit[i] - losses.min()) < 1e-5
        u = sae.pre(tasks.rows[~fit], mine.latent[i:i + 1])[:, 0].detach().double() * mine.weight[i] + mine.bias[i]
        assert abs(mine.score[i] - F.binary_cross_entropy_with_logits(u, y[~fit])) < 1e-6
        assert abs(mine.entropy[i] - entropy(y[~fit].mean().item())) < 1e-9


def test_a_noisy_copy_of_the_answer_ends_at_the_noise_floor():
    "A latent that is the answer, flipped with probability ε, has the loss H(ε), up to the luck of 20,000 rows."
    g = torch.Generator().manual_seed(3)
    eps, answers = torch.tensor([.01, .05, .1, .2, .3, .4]), torch.rand(40_000, 6, generator=g) < .5
    copy = torch.where(answers ^ (torch.rand(40_000, 6, generator=g) < eps), 1., -1.)
    tasks = Tasks(list("abcdef"), torch.cat([draw(40_000, 20), copy], 1), answers, torch.arange(40_000) // 100)
    found = probe(Channels(), tasks)
    assert found.latent.tolist() == list(range(20, 26))
    floor = torch.tensor([entropy(e) for e in eps.tolist()])
    room = 4 * (eps * (1 - eps)).sqrt() * ((1 - eps) / eps).log() / 20_000 ** .5
    assert ((found.score - floor).abs() < room + 1e-3).all()


def test_planted_directions_beat_their_nulls():
    "The planted dictionary finds its own direction for each task, below channels and shuffled answers, which end at the base rate."
    toy = planted(n=32, d=16, k=3)
    data = toy.sample(6_000, seed=1)
    tasks = Tasks([str(i) for i in range(32)], data.rows, data.code > 0, torch.arange(6_000) // 30)
    class Known:
        def encode(self, rows): return (rows @ toy.W.T).relu()
        def decode(self, code): return code @ toy.W
        def pre(self, rows, latents=slice(None)): return rows @ toy.W[latents].T
    best, channels, shuffled, dense = probe(Known(), tasks), probe(Channels(), tasks), probe(Known(), tasks.shuffled()), dense_probe(tasks)
    assert (best.latent == torch.arange(32)).all()
    assert best.minus(channels).high < 0 and best.minus(shuffled).high < 0 and dense.minus(best).high < 0
    assert abs((shuffled.score - shuffled.entropy).mean()) < .02 * shuffled.entropy.mean()


def test_order_of_rows_and_size_of_chunks_change_nothing(monkeypatch):
    "Rows in another order, or latents in chunks of another size, give the same figures."
    tasks = some_tasks()
    sae = init_(SAE(SAEConfig(d=12, n=150, k=4)), tasks.rows)
    one, order = probe(sae, tasks), torch.randperm(4_000, generator=torch.Generator().manual_seed(1))
    other = probe(sae, Tasks(tasks.names, tasks.rows[order], tasks.labels[order], tasks.group[order]))
    assert torch.equal(one.latent, other.latent) and (one.score - other.score).abs().max() < 1e-6 and (one.fit - other.fit).abs().max() < 1e-6
    chunks = []
    def count(parts): chunks.extend(parts); return parts
    nominate(Dictionary(sae, tasks.rows), tasks.rows, tasks.labels.float(), progress=count)
    assert sum(map(len, chunks)) == 150
    monkeypatch.setattr(Tensor := torch.Tensor, "split", lambda self, size, dim=0, split=Tensor.split: split(self, 64 if isinstance(size, int) and size > 64 else size, dim))
    small = probe(sae, tasks)
    assert torch.equal(one.latent, small.latent) and (one.score - small.score).abs().max() < 1e-6


def test_dictionaries_of_other_libraries():
    "A dense code without pre-activations is probed on its activations; a latent that never fires gets no advantage."
    class Foreign:
        def encode(self, rows): return torch.cat([rows.relu(), 0 * rows], 1)
        def decode(self, code): return code[:, :12]
    tasks = some_tasks()
    found, fit = probe(Foreign(), tasks), tasks.fit_on()
    assert found.latent.max() < 12 and found.settings["latents"] == 24
    y = tasks.labels[:, 0].double()
    assert abs(found.fit[0] - slow_fit(tasks.rows[fit, found.latent[0]].relu().double(), y[fit])) < 1e-5
    class Dead(Foreign):
        def encode(self, rows): return torch.zeros(len(rows), 3)
        def decode(self, code): return torch.zeros(len(code), 12)
    dead = probe(Dead(), tasks)
    rate = tasks.labels[fit].double().mean(0)
    assert (dead.weight == 0).all() and torch.allclose(dead.fit, F.binary_cross_entropy(rate, rate, reduction="none"), atol=1e-9)


def test_dense_probe_equals_newton_on_all_channels():
    "The joint optimiser ends where a Newton iteration on one task ends."
    tasks, ridge = some_tasks(t=2), 1e-3
    mine, fit = dense_probe(tasks, ridge=ridge), tasks.fit_on()
    x = ((tasks.rows - tasks.rows[fit].mean(0)) / tasks.rows[fit].std(0)).double()
    x = torch.cat([x, torch.ones(len(x), 1)], 1)
    penalty = ridge * torch.cat([torch.ones(12), torch.zeros(1)]).double()
    for i in range(2):
        w, y = torch.zeros(13, dtype=torch.float64), tasks.labels[:, i].double()
        for _ in range(30):
            p = (x[fit] @ w).sigmoid()
            w = w - torch.linalg.solve(x[fit].T @ (x[fit] * (p * (1 - p))[:, None]) / fit.sum() + penalty.diag(), x[fit].T @ (p - y[fit]) / fit.sum() + penalty * w)
        assert abs(F.binary_cross_entropy_with_logits(x[~fit] @ w, y[~fit]) - mine.score[i]) < 1e-4 and mine.latent[i] == -1


@pytest.mark.parametrize("find", [lambda t: probe(Channels(), t), dense_probe])
def test_scaling_is_learned_on_the_fitted_half(find):
    "Rows of the scored half are ten times as long and far from zero; the fit must not have seen that."
    tasks = some_tasks(t=2)
    fit = tasks.fit_on()
    odd = replace(tasks, rows=torch.where(fit[:, None], tasks.rows, 10 * tasks.rows + 5))
    here, there = find(tasks), find(odd)
    assert torch.allclose(here.fit, there.fit, atol=1e-6) and torch.equal(here.latent, there.latent)
    assert torch.allclose(here.weight, there.weight, rtol=1e-4) and (there.score > here.score + .2).all()
    if here.latent[0] < 0: return
    u = odd.rows[~fit][:, here.latent].double() * here.weight + here.bias
    want = F.binary_cross_entropy_with_logits(u, odd.labels[~fit].double(), reduction="none").mean(0)
    assert torch.allclose(there.score, want, rtol=1e-4)


def test_the_best_nominee_is_scored_wherever_it_stands(monkeypatch):
    "Nominees in another order give the same result."
    import sae_nb.probes
    tasks, one = some_tasks(), probe(Channels(), some_tasks())
    monkeypatch.setattr(sae_nb.probes, "nominate", lambda *given, **how: nominate(*given, **how).flip(0))
    other = probe(Channels(), tasks)
    assert torch.equal(one.latent, other.latent) and torch.allclose(one.score, other.score) and torch.allclose(one.fit, other.fit)


def test_the_interval_draws_documents_again():
    "By hand: sums of each scored document, drawn again; the interval is wider when rows of a document agree."
    tasks = some_tasks(t=3)
    found, fit = probe(Channels(), tasks), tasks.fit_on()
    assert found.losses.shape == (50, 3) and (found.rows == 40).all() and found.settings["documents"] == 50
    u = tasks.rows[~fit][:, found.latent].double() * found.weight + found.bias
    loss = F.binary_cross_entropy_with_logits(u, tasks.labels[~fit].double(), reduction="none")
    docs = torch.stack([loss[tasks.group[~fit] == g].sum(0) for g in tasks.group[~fit].unique()])
    assert torch.allclose(docs.sort(0).values, found.losses.sort(0).values, atol=1e-9)
    e, means = found.estimate(), docs.mean(1) / 40
    assert (e.high - e.low) / 3.92 == pytest.approx((means.std() / 50 ** .5).item(), rel=.15)
    assert e.settings["unit"] == "documents" and e.settings["units"] == 50 and "tasks" in e.settings["not_in_it"]
    together = replace(tasks, group=torch.arange(4_000) // 400)
    assert probe(Channels(), together).estimate().settings["units"] == 5


def test_differences_are_taken_on_the_same_documents():
    "Sums are paired by document and task; results of other splits are refused."
    tasks = some_tasks(t=3)
    one, other = probe(Channels(), tasks), probe(Channels(), replace(tasks, rows=tasks.rows + .5 * draw(4_000, 12, seed=9)))
    e = one.minus(other)
    assert e.value == pytest.approx((one.score - other.score).mean().item()) and e.high < 0
    assert one.minus(replace(other, names=[*other.names[:2], "stranger"])).value == pytest.approx((one.score - other.score)[:2].mean().item())
    uneven = replace(tasks, group=torch.arange(4_000) // 39)
    with pytest.raises(UserError, match="same tasks and the same seed"): one.minus(probe(Channels(), uneven))


def test_shuffled_answers_have_lost_their_rows():
    "Answers that one channel tells perfectly: shuffled, it tells them no better than the base rate, in both halves."
    rows = draw(4_000, 6)
    tasks = Tasks(["sign"], rows, rows[:, :1] > 0, torch.arange(4_000) // 40)
    lost = tasks.shuffled()
    agree = (lost.labels == tasks.labels).float().mean()
    assert .45 < agree < .55 and probe(Channels(), tasks).score[0] < .05 and probe(Channels(), lost).score[0] > .67
    assert not torch.equal(lost.labels, tasks.shuffled(1).labels)


def test_tasks_are_cut_by_document_and_seed():
    "No document is on both sides, halves have equal numbers of documents, and the seed decides which."
    tasks = some_tasks()
    fit = tasks.fit_on(0)
    assert not set(tasks.group[fit].tolist()) & set(tasks.group[~fit].tolist()) and len(tasks.group[fit].unique()) == 50
    assert torch.equal(fit, tasks.fit_on(0)) and not torch.equal(fit, tasks.fit_on(1))
    shuffled = tasks.shuffled()
    assert torch.equal(shuffled.labels[fit].sum(0), tasks.labels[fit].sum(0)) and not torch.equal(shuffled.labels, tasks.labels)


def test_tasks_without_enough_rows_have_no_figure():
    "They are named with a reason; when none is left the estimate is missing, and no number is made up."
    tasks = some_tasks(t=3)
    odd = replace(tasks, labels=torch.stack([tasks.labels[:, 0], torch.zeros(4_000, dtype=torch.bool), torch.arange(4_000) > 5], 1))
    found = probe(Channels(), odd)
    assert found.names == ["task 0"] and set(found.missing) == {"task 1", "task 2"} and "0 rows of one class" in found.missing["task 1"]
    none = replace(odd, names=odd.names[1:], labels=odd.labels[:, 1:])
    for empty in (probe(Channels(), none), dense_probe(none)):
        assert empty.names == [] and empty.estimate().value is None and len(empty.missing) == 2 and "none" in repr(empty)


def test_estimates_and_joined_results():
    "The estimate is the mean score over tasks beside the base rate; joined results are those of all tasks."
    one, two = probe(Channels(), some_tasks()), probe(Channels(), some_tasks(seed=7), seed=2)
    e, both = one.estimate({"untrained": .7}), joined([one, two])
    assert abs(e.value - one.score.mean()) < 1e-12 and e.low < e.value < e.high and e.nulls["untrained"] == .7 and abs(e.nulls["base rate"] - one.entropy.mean()) < 1e-12
    assert both.estimate().value == pytest.approx((one.score.sum() + two.score.sum()).item() / 10) and len(both.names) == 10
    assert both.losses.shape == (100, 10) and both.estimate().settings["units"] == 100 and both.settings["score_rows"] == 4_000
    assert one.minus(one).value == 0 and [r["explained"] for r in one.table().rows] == sorted((1 - one.score / one.entropy).tolist(), reverse=True)


@pytest.mark.parametrize("wrong, sentence", [
    (lambda t: replace(t, names=[], labels=t.labels[:, :0]), "0 tasks"),
    (lambda t: replace(t, labels=t.labels[:9]), "one answer"),
    (lambda t: replace(t, group=0 * t.group), "one document"),
    (lambda t: replace(t, rows=t.rows[:, None]), "one vector a row"),
    (lambda t: dense_probe(replace(t, rows=t.rows / 0)), "NaN"),
    (lambda t: probe(object(), t), "no encode"),
    (lambda t: probe(init_(SAE(SAEConfig(d=8, n=16, k=2)), t.rows[:, :8]), t), "do not fit|does not encode"),
    (lambda t: probe(Channels(), replace(t, rows=t.rows / 0)), "NaN"),
    (lambda t: joined([]), "no result")])
def test_what_does_not_fit_is_told_in_a_sentence(wrong, sentence):
    "A mistake is a `UserError` that names it."
    with pytest.raises(UserError, match=sentence): wrong(some_tasks(b=500))


# --- questions about Python ------------------------------------------------------------------------

SOURCE = '''import os as o, re
from a.b import cd

class Foo(Bar):
    """Doc öne.
    more"""
    x: int = 0x1f
    @dec(a=1)
    def __init__(self, p, *r, q=3.5e2):
        # näte [
        if not p and q <= 2: é = f"a{p}b"; print(é, key=[i for i in (1, 2)])
        return {1: r[0:2], **p}

async def g(s=lambda z: z):
    try: await h(); yield
    except (ValueError, E) as e: raise E from e
    for k, v in s.items(): x += -v
'''
KNOWN = {
    "comment": ["# näte ["], "string": ['"""Doc öne.\n    more"""', 'f"a{p}b"'], "float": ["3.5e2"], "hexadecimal number": ["0x1f"], "whole number": list("1212102"), "self": ["self"],
    "dunder name": ["__init__"], "function name at its definition": ["__init__", "g"], "class name at its definition": ["Foo"], "import": ["import os as o, re", "from a.b import cd"],
    "docstring": ['"""Doc öne.\n    more"""'], "first line of a docstring": ['"""Doc öne.'], "decorator": ["dec(a=1)"], "default value": ["3.5e2", "lambda z: z"],
    "parameter name": ["self", "p", "r", "q", "s", "z"], "keyword argument name": ["a", "key"], "attribute name": ["items"], "alias of an import": ["o"], "imported name": ["os", "re", "cd"],
    "annotation": ["int"], "comprehension": ["[i for i in (1, 2)]"], "comparison": ["q <= 2"], "boolean operation": ["not p and q <= 2"], "slice": ["0:2"], "f-string": ['f"a{p}b"'],
    "call of a builtin": ["print"], "lambda": ["lambda z: z"], "base class": ["Bar"], "await": ["await h()"], "yield": ["yield"], "body of a try": ["await h(); yield"],
    "exception class": ["(ValueError, E)", "E"], "raise statement": ["raise E from e"], "loop variable": ["i", "k, v"], "what is looped over": ["(1, 2)", "s.items()"],
    "augmented assignment sign": ["+="], "in three brackets": ["1,", "2"], "line break before a blank line": ["\n", "\n"], "assigned value": ['f"a{p}b"', "-v"], "unary operation": ["not p", "-v"],
    "line of more than 60 characters": ['        if not p and q <= 2: é = f"a{p}b"; print(é, key=[i for i in (1, 2)])'], "condition": ["not p and q <= 2"], "what is called": ["dec", "print", "h", "s.items"]}


def spans(source, marks):
    "The pieces of `source` that are marked."
    cut = [i for i in range(1, len(source)) if marks[i] != marks[i - 1]]
    return [source[a:b] for a, b in zip([0, *cut], [*cut, len(source)]) if marks[a]]


@pytest.mark.parametrize("task", KNOWN)
def test_spans_of_a_known_source(task):
    "Each task marks the characters that a reader would mark, also behind letters of two bytes."
    assert spans(SOURCE, code_labels(SOURCE)[:, CODE_TASKS.index(task)].tolist()) == KNOWN[task]


def test_bodies_levels_and_lines():
    "Nested places hold for everything inside them."
    marks = {n: "".join(spans(SOURCE, m)) for n, m in zip(CODE_TASKS, code_labels(SOURCE).T.tolist())}
    assert marks["body of a class"].startswith('"""Doc') and marks["body of a class"].endswith("**p}") and marks["method"] == marks["inside __init__"]
    assert marks["indented once"].startswith('"""') and "return" in marks["indented twice"] and "class" in marks["not indented"] and "#" not in marks["indented twice"]
    assert marks["last word of a line"].startswith("recd") and marks["first word of a line"].startswith("importfromclass")


def test_comments_and_strings_of_the_library_are_those_of_tokenize():
    "On real modules, the marks of comments, names and docstrings are what a direct reading of tokenize and ast gives."
    for doc in list(load_text("pylib").documents(True))[:4]:
        marks, rows = code_labels(doc.text), doc.text.split("\n")
        starts = [0]
        for row in rows: starts.append(starts[-1] + len(row) + 1)
        for task, ok in (("comment", lambda t: t.type == tokenize.COMMENT), ("self", lambda t: t.string == "self"), ("number", lambda t: t.type == tokenize.NUMBER)):
            want = torch.zeros(len(doc.text), dtype=torch.bool)
            for t in tokenize.generate_tokens(io.StringIO(doc.text).readline):
                if ok(t): want[starts[t.start[0] - 1] + t.start[1]:starts[t.end[0] - 1] + t.end[1]] = True
            assert torch.equal(marks[:, CODE_TASKS.index(task)], want)
        texts = [n.body[0] for n in ast.walk(ast.parse(doc.text)) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(n, False) is not None]
        mine = "".join(spans(doc.text, marks[:, CODE_TASKS.index("docstring")].tolist()))
        assert len(mine) == sum(len(ast.get_source_segment(doc.text, t)) for t in texts)


@pytest.mark.parametrize("text", ["def broken(:", "x = 'open", "a\x00b", "(", "  x\n y"])
def test_a_text_that_is_no_python_has_no_labels(text): assert code_labels(text) is None


def test_tasks_have_different_names(): assert len(set(CODE_TASKS)) == len(CODE_TASKS) >= 100


def test_the_deciding_character():
    "The first that is no space; of nothing but space, the first."
    assert deciding("a  b\n  ", [(0, 1), (1, 4), (4, 7), (7, 7)]) == [0, 3, 4, 7]


# --- rows ------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def lm(): return load_lm("pylib-64", "cpu", "float32")


def prose(*texts): return Text("given", lambda: (Document(str(i), t) for i, t in enumerate(texts)), lambda i, d: True)


def test_code_tasks_read_the_rows_of_their_tokens(lm):
    "Rows, labels and documents belong together, windows are spread over a document, and broken documents are skipped."
    source = SOURCE * 3
    tasks = code_tasks(lm, prose(source, "def broken(: " * 90, source.replace("\n", "\r\n")), "resid_post.1", context=33, tokens=10_000, each=2)
    assert tasks.group.tolist() == [0] * 64 + [2] * 64 and torch.equal(tasks.rows[:64], tasks.rows[64:]) and torch.equal(tasks.labels[:64], tasks.labels[64:])
    ids = lm.tokenizer(source, add_special_tokens=False, return_offsets_mapping=True)
    second = len(ids["input_ids"]) // 32 // 2 * 32
    window = torch.tensor([[lm.tokenizer.bos_token_id, *ids["input_ids"][second:second + 32]]])
    assert torch.allclose(tasks.rows[32:64], lm.read(window, "resid_post.1")[0, 1:], atol=1e-5)
    marks = code_labels(source)
    assert torch.equal(tasks.labels[32:64], marks[torch.tensor(deciding(source, ids["offset_mapping"]))[second:second + 32]])


def test_code_tasks_come_from_all_documents(lm):
    "Few rows of many documents: head and tail of the text take part; seed and side decide which."
    docs = [Document(f"d{i}", f"value_{i} = {i}\n" * 150) for i in range(40)]
    text = Text("many", lambda: iter(docs), lambda i, d: i % 4 == 0)
    read = lambda **how: code_tasks(lm, text, "resid_post.1", context=33, tokens=200, **how)
    tasks, numbers = read(), lambda t: set(t.group.tolist())
    assert max(numbers(tasks)) >= 6 and min(numbers(tasks)) <= 4 and len(numbers(tasks)) >= 4 and 200 <= len(tasks.rows) <= 300
    assert torch.equal(read().rows, tasks.rows) and any(numbers(read(seed=s)) != numbers(tasks) for s in (1, 2, 3))
    assert not torch.equal(read(held_out=False).rows[:200], tasks.rows[:200])


def test_rows_far_out_are_no_rows_of_a_task(lm):
    "They are counted and left out, with their answers."
    whole = code_tasks(lm, prose(SOURCE * 3, SOURCE * 4), "resid_post.1", context=33, tokens=10_000, limit=math.inf)
    norms = whole.rows.norm(dim=1)
    cut = code_tasks(lm, prose(SOURCE * 3, SOURCE * 4), "resid_post.1", context=33, tokens=10_000, limit=norms.median().item())
    near = norms <= norms.median()
    assert cut.left_out == int((~near).sum()) > 0 and torch.equal(cut.rows, whole.rows[near]) and torch.equal(cut.labels, whole.labels[near])
    assert whole.left_out == 0 and torch.equal(cut.group, whole.group[near])


def test_code_tasks_of_nothing(lm):
    "Prose, short sources and wrong contexts are told in a sentence; a slow tokenizer as well."
    for texts in (("no code, " * 300,), ("x = 1\n",), ()):
        with pytest.raises(UserError, match="no Python source"): code_tasks(lm, prose(*texts), "resid_post.1")
    with pytest.raises(UserError, match="at least 2"): code_tasks(lm, prose(SOURCE), "resid_post.1", context=1)
    slow = SimpleNamespace(tokenizer=SimpleNamespace(is_fast=False), name="slow")
    with pytest.raises(UserError, match="fast tokenizer"): code_tasks(slow, prose(SOURCE), "resid_post.1")


def test_table_tasks_read_each_text_alone(lm):
    "A text's row is that of its last token, or the mean, whatever is read beside it."
    texts, labels = ["def f(x): return x", "import os", "a", "class A: pass\n" * 400], ["f", "i", "v", "f"]
    for pool in ("last", "mean"):
        tasks = table_tasks(lm, texts, labels, "resid_post.1", pool=pool, batch=3, source="kinds")
        assert tasks.names == ["kinds: f", "kinds: i", "kinds: v"] and torch.equal(tasks.labels.int(), torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]], dtype=torch.int))
        for text, row in zip(texts, tasks.rows):
            ids = [lm.tokenizer.bos_token_id, *lm.tokenizer(text, add_special_tokens=False)["input_ids"]][:lm.context]
            rows = read_rows(lm, Windows(torch.tensor([ids]), torch.arange(len(ids))[None] > 0, [""]), "resid_post.1")
            assert torch.allclose(row, rows[-1] if pool == "last" else rows.mean(0), atol=1e-4)
    assert table_tasks(lm, texts, [True, False, True, True], "resid_post.1").labels[:, 0].tolist() == [True, False, True, True]


@pytest.mark.parametrize("texts, labels, how, sentence", [
    (["a", "b"], [1, 1], {}, "two classes"), (["a", ""], [0, 1], {}, "no token"), (["a"], [0, 1], {}, "one label"), ([], [], {}, "0 texts"), (["a", "b"], [0, 1], dict(pool="max"), "pool")])
def test_wrong_tables(lm, texts, labels, how, sentence):
    "Labels of one class, empty texts and lists of different lengths."
    with pytest.raises(UserError, match=sentence): table_tasks(lm, texts, labels, "resid_post.1", **how)


def test_hub_tasks_read_a_saved_set(lm, tmp_path):
    "A folder of `datasets`, with class names, a text of two columns, rows without a label, and a limit."
    datasets = pytest.importorskip("datasets")
    rows = {"head": [f"x = {i}" for i in range(60)], "body": ["return x"] * 60, "kind": [(0, 1, 2, -1)[i % 4] for i in range(60)]}
    features = datasets.Features({"head": datasets.Value("string"), "body": datasets.Value("string"), "kind": datasets.ClassLabel(names=["a", "b", "c"])})
    data = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"test": data, "train": data}).save_to_disk(tmp_path / "both")
    tasks = hub_tasks(tmp_path / "both", lm, "resid_post.1", columns="head+body kind test")
    assert tasks.names == ["both: a", "both: b", "both: c"] and len(tasks.rows) == 45 and (tasks.labels.sum(1) == 1).all()
    assert len(hub_tasks(tmp_path / "both", lm, "resid_post.1", columns="head kind test", limit=20).rows) == 20
    assert torch.equal(tasks.rows, hub_tasks(tmp_path / "both", lm, "resid_post.1", columns="head+body kind test").rows)
    for columns, sentence in (("kind", "label column"), ("text kind test", "no column text"), ("head kind valid", "split")):
        with pytest.raises(UserError, match=sentence): hub_tasks(tmp_path / "both", lm, "resid_post.1", columns=columns)


def test_a_set_that_cannot_be_read_is_told_in_a_sentence(lm):
    "Without a network, and without a folder, the name and what to do."
    pytest.importorskip("datasets")
    with pytest.raises(UserError, match="could not be read"): hub_tasks("nobody/nothing", lm, "resid_post.1")


def test_the_table_of_known_sets(): assert len(HUB) >= 15 and all(len(columns.split()) == 3 for columns in HUB.values())

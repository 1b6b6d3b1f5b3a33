"The law explorer and the live monitor: as values, and in a real browser through Voila and JupyterLab."
import gc, os, threading, time

import numpy as np
import pytest
from browsing import chromium, idle, lab, needs_browser, notebook, run_cell, voila
from sae_nb.core import UserError
from sae_nb.plan import advise
from sae_nb.scaling import fit_law
from sae_nb.train import Step
from sae_nb.widgets.laws import LawExplorer, law_curves, needed, read_law, reading_html
from sae_nb.widgets.live import Kept, Monitor, Traffic, gentle, lasting, panels

SHOTS = os.environ.get("SAE_NB_SHOTS")   # a folder for screenshots, to be looked at


def shot(page, name): SHOTS and page.screenshot(path=f"{SHOTS}/c_{name}.png")


# --- laws ---------------------------------------------------------------------------------------------------------------

LAWS = '''
import numpy as np
from sae_nb.plan import advise
from sae_nb.scaling import fit_law

def cost(n, k, tokens): return 6 * 256 * (n + 600 * k) * tokens
def loss(n, k): return np.exp(-.5 + .26 * np.log(k) - .017 * np.log(n) - .042 * np.log(k) * np.log(n)) + np.exp(-1.32 - .085 * np.log(k))
rng = np.random.default_rng(1)
runs = [dict(n=int(n), k=int(k), tokens=float(3e5 * n**.6 * np.exp(.05 * rng.standard_normal())), loss=float(loss(n, k) * np.exp(.01 * rng.standard_normal())))
        for k in (8, 32, 128) for n in 2**np.arange(9, 18)]
law, need = fit_law(runs, "nk", bootstrap=50), fit_law(runs, "tokens ~ n", bootstrap=50)
'''


@pytest.fixture(scope="module")
def fitted():
    scope = {}
    exec(LAWS, scope)
    return scope


def explorer(fitted, **more): return LawExplorer(fitted["law"], fitted["cost"], fitted["need"], advise, runs=fitted["runs"], **more)


def test_curves_say_what_the_law_says(fitted):
    law, cost, need = (fitted[x] for x in ("law", "cost", "need"))
    for c in law_curves(law, (8, 128), cost, need, points=12):
        n = np.unique(np.r_[np.geomspace(512, 2**17, 12), np.geomspace(2**17, 2**21, 4)])
        slowly = [cost(x, c.k, need.predict(n=[x])[0].value) for x in n]
        np.testing.assert_allclose(c.x, slowly, rtol=1e-4)
        np.testing.assert_allclose([e.value for e in c.loss], [law.predict(n=[x], k=[c.k])[0].value for x in n], rtol=1e-9)
        assert c.fitted == [x <= 2**17 * 1.001 for x in n]


def test_tokens_may_be_a_law_a_function_or_a_number(fitted):
    n = np.array([1e3, 1e4])
    assert needed(7.)(n).tolist() == [7., 7.] and needed(lambda n: n * 2)(n).tolist() == [2e3, 2e4]
    assert needed(fitted["need"])(n).tolist() == [e.value for e in fitted["need"].predict(n=n)]


def test_the_line_is_the_budget_and_the_budget_the_line(fitted):
    e = explorer(fitted)
    assert e._chart.line == e.budget == e._slider.value and not e.advice.warnings
    e._chart.line = 1e16
    assert e.budget == e._slider.value == 1e16 and e.advice == advise(fitted["law"], 1e16, fitted["cost"], fitted["need"])
    e._slider.value = 2e15
    assert e._chart.line == e.budget == 2e15 and e.advice.budget == 2e15
    assert "Inside of what was measured" in e._words.value and e._chart.marks[0]["x"] == [2e15]


def test_words_before_figures_beyond_the_runs(fitted):
    e = explorer(fitted, budget=1e18)
    assert "<b>Extrapolation:</b>" in e._words.value and "times above the largest fitted" in e._words.value
    e.budget = 1.
    assert "does not train a single latent" in e.advice and e.advice in e._words.value and e._chart.marks == []
    assert e.snapshot().spec()["layout"]["shapes"]   # a picture all the same


def test_measured_runs_stand_at_their_own_price(fitted):
    spec = explorer(fitted).snapshot().spec()
    dots = next(t for t in spec["data"] if t.get("name") == "measured runs")
    np.testing.assert_allclose(sorted(dots["x"]), sorted(fitted["cost"](r["n"], r["k"], r["tokens"]) for r in fitted["runs"]), rtol=1e-4)
    solid, dashed = (next(t for t in spec["data"] if t.get("name") == "k = 32" and t["line"]["dash"] == how) for how in ("solid", "dash"))
    assert max(solid["x"]) == min(dashed["x"]) and solid["line"]["color"] == dashed["line"]["color"] in dots["marker"]["color"]


def test_a_law_over_its_own_axis():
    flops = [dict(run=i, flops=float(c), loss=float((.2 + 40 * c**-.15) * (1 + .01 * (-1)**i))) for i, c in enumerate(np.geomspace(1e12, 1e16, 20))]
    law = fit_law(flops, "c", bootstrap=50)
    e = LawExplorer(law, runs=flops, budget=1e14)
    assert e.advice == read_law(law, 1e14) and e.advice.loss == law.predict(new=True, flops=[1e14])[0] and e.advice.n is None
    assert read_law(law, 1e11).warnings == ("flops lies below the smallest fitted, 1e+12",)
    sizes = [dict(n=int(n), loss=float(.2 + n**-.4 * (1 + .01 * (-1)**i))) for i, n in enumerate(2**np.arange(8, 18))]
    assert LawExplorer(fit_law(sizes, "n", bootstrap=50), runs=sizes, budget=5e3).advice.n.value == 5e3


def test_one_sentence_when_something_is_missing(fitted):
    with pytest.raises(UserError, match="all three or none"): LawExplorer(fitted["law"], fitted["cost"])


@pytest.mark.parametrize("library", ["numpy", "torch", "pandas", "polars"])
def test_runs_budgets_and_ks_of_every_library(fitted, library):
    "A table of runs, a scalar and a list of numbers of any library do what plain ones do."
    module = pytest.importorskip(library)
    of = dict(numpy=np.array, torch=lambda x: module.tensor(x, dtype=module.float64)).get(library) or (lambda x: module.Series(x))
    if hasattr(module, "DataFrame"): runs = module.DataFrame(fitted["runs"])
    else: runs = [{name: of([v])[0] for name, v in r.items()} for r in fitted["runs"]]
    made = LawExplorer(fitted["law"], fitted["cost"], fitted["need"], advise, runs=runs, ks=of([8, 128]), budget=of([1e15])[0])
    plain = LawExplorer(fitted["law"], fitted["cost"], fitted["need"], advise, runs=fitted["runs"], ks=[8, 128], budget=1e15)
    assert made.snapshot().spec() == plain.snapshot().spec() and made.advice == plain.advice
    made.budget = plain.budget = 1e16
    made._chart.line = of([2e15])[0]
    assert type(made.budget) is float and abs(made.budget / 2e15 - 1) < 1e-6


def test_a_law_is_anything_that_predicts(fitted):
    class Foreign:
        form, span = type("Form", (), dict(x=("n",))), dict(n=(10., 1e3))
        def predict(self, new=False, n=None): return fitted["need"].predict(new=new, n=n)
    assert LawExplorer(Foreign(), budget=100.).advice.loss == fitted["need"].predict(new=True, n=[100.])[0]


def test_snapshots_are_the_same_at_every_run(fitted):
    one, two = (explorer(fitted).snapshot().spec() for _ in range(2))
    assert one == two
    bundle = explorer(fitted)._repr_mimebundle_()
    assert {"application/vnd.jupyter.widget-view+json", "application/vnd.plotly.v1+json"} <= set(bundle) and bundle["text/plain"].startswith("LawExplorer")


def test_words_of_a_reading_cannot_be_markup():
    assert "&lt;b&gt;" in reading_html("<b>no</b>", "x")


# --- the monitor --------------------------------------------------------------------------------------------------------

def steps(count, closed=None, pause=0.):
    "Steps of a run that falls steadily."
    try:
        for i in range(1, count + 1):
            time.sleep(pause)
            yield Step(i, 10 * i, 1 / i, 1 / i, {}, .25, 1e-3, 1., 100., 0., .1, 1 / i if i % 5 == 0 else None)
    finally:
        if closed is not None: closed.append(threading.current_thread().name)


def test_kept_is_even_and_ends_with_the_last():
    for count in (1, 7, 400, 401, 12_345):
        kept = Kept(50)
        for i in range(count): kept.add(i)
        (found,) = kept.columns()
        gaps = {b - a for a, b in zip(found[:-1], found[1:-1])}
        assert found[0] == 0 and found[-1] == count - 1 and len(found) <= 51 and len(gaps) <= 1
    assert Kept().columns() == []


def test_traffic_counts_each_death_and_each_revival():
    dead, traffic = np.random.default_rng(0).random((200, 64)) < .3, Traffic()
    shares = [traffic.add(d) for d in dead]
    died, revived = (sum(int(b[j] and not a[j]) for a, b in pairs for j in range(64)) for pairs in (list(zip(dead, dead[1:])), list(zip(dead[1:], dead))))
    assert (traffic.died, traffic.revived) == (died, revived) and shares[-1] == (dead[-1].mean(), died / 64, revived / 64)


def test_steps_totals_and_shares_of_tensors_and_arrays():
    "Steps that carry tensors, dead latents as a tensor, densities in bfloat16 that require a gradient: as from plain numbers."
    import torch
    density = torch.tensor([0., .5, .25], dtype=torch.bfloat16, requires_grad=True)
    def some(of):
        for i in range(1, 8): yield Step(of(i), of(10 * i), of(1 / i), of(1 / i), {}, of(.25), of(1e-3), of(1.), of(100.), 0., .1, of(1 / i))
    kinds = (torch.tensor, torch.tensor([True, False, False])), (np.array, np.array([1, 0, 0])), (lambda x: x, [True, False, False])
    for of, dead in kinds:
        monitor = Monitor(some(of), total=of(70), density=lambda: density, dead=lambda: dead, every=of(0.))
        list(monitor)
        assert monitor._bar.value == 1 and monitor._kept.columns()[2] == [1 / 3] * 7
        specs = {name: p.spec() for name, p in monitor.pictures().items()}
        assert set(specs) == {"loss", "dead", "density"} and specs == first if of is not torch.tensor else (first := specs)


def test_panels_show_what_there_is():
    assert panels([], []) == {} and set(panels([[1, 2], [1., .5], [None, None], [None] * 2, [None] * 2], [])) == {"loss"}
    some = panels([[1, 2], [1., .5], [0., .1], [None] * 2, [None] * 2], [[2], [.6]], np.array([0., .1, .2]))
    assert set(some) == {"loss", "dead", "density"} and "1 never" in some["density"].spec()["layout"]["title"]["text"]
    assert [t["name"] for t in some["loss"].fig.data] == ["batch", "held out"] and [t["name"] for t in some["dead"].fig.data] == ["dead"]


def test_a_loop_sees_every_step_and_closes_what_it_leaves():
    closed = []
    monitor = Monitor(steps(30, closed), total=300)
    assert [s.step for s in monitor] == [*range(1, 31)]
    assert monitor.words() == "Finished after 30 steps" and not monitor.active and monitor._bar.value == 1
    for step in (monitor := Monitor(steps(30, closed))):
        if step.step == 7: break
    gc.collect()
    assert len(closed) == 2 and not monitor.active and monitor.last.step == 7
    for step in (monitor := Monitor(steps(30, closed))): step.step == 9 and monitor.stop()
    assert len(closed) == 3 and monitor.last.step == 9 and monitor.words().startswith("Stopped after 9 steps")


def test_the_button_ends_a_run_in_the_background_in_its_own_thread():
    closed = []
    monitor = Monitor(steps(10_000, closed, pause=.005), total=100_000, name="pressed").start()
    while monitor.last is None: time.sleep(.01)
    assert monitor.active and not monitor._button.disabled
    monitor._button.click()
    monitor.wait()
    assert closed == ["pressed"] and not monitor.active and monitor.last.step < 10_000 and monitor._button.disabled and "resume=True" in monitor._state.value
    at = monitor.last.step
    monitor.start(steps(3)).wait()
    assert monitor.last.step == 3 and monitor._kept.seen == at + 3   # the curve goes on


def test_an_error_is_told_and_raised_where_one_waits():
    def broken(): yield from steps(3); raise UserError("the loss is not finite at step 4: choose a smaller lr")
    monitor = Monitor(broken(), name="broken").start()
    with pytest.raises(UserError, match="not finite"): monitor.wait()
    assert monitor.words() == "Failed after 3 steps: the loss is not finite at step 4: choose a smaller lr" and "not finite" in monitor._state.value
    with pytest.raises(UserError): list(Monitor(broken()))
    bad = Monitor(steps(5), each=lambda s: 1 / 0, name="bad").start()
    with pytest.raises(ZeroDivisionError): bad.wait()


def test_the_same_name_takes_over_another_trains_beside():
    closed = []
    one, other = Monitor(steps(10_000, closed, pause=.005), name="a").start(), Monitor(steps(10_000, closed, pause=.005), name="b").start()
    two = Monitor(steps(5), name="a").start().wait()
    assert closed == ["a"] and one.stopped and two.last.step == 5 and other.active
    with pytest.raises(UserError, match="stop"): other.start(steps(3))
    other.stop()
    assert closed == ["a", "b"] and Monitor.running == {}
    with pytest.raises(UserError, match="nothing to watch"): Monitor().start()


def test_a_first_interrupt_is_gentle_a_second_is_not():
    import signal
    asked, before = [], signal.getsignal(signal.SIGINT)
    with gentle(lambda: asked.append(1)):
        signal.raise_signal(signal.SIGINT)
        assert asked == [1]
        with pytest.raises(KeyboardInterrupt): signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    closed, seen = [], []
    with pytest.raises(KeyboardInterrupt):
        for step in Monitor(steps(50, closed)):
            seen.append(step.step)
            if step.step == 6: signal.raise_signal(signal.SIGINT)
    assert seen == [*range(1, 7)] and len(closed) == 1 and signal.getsignal(signal.SIGINT) is before


def drawings(every, draws, asks, count=100, start=False):
    "Steps an eighth of a second apart by a clock that stands still else: each drawing as (step, its end, when the next is due)."
    now, seen, asked = [1000.], [], []
    def density():
        asked.append(1)
        now[0] += asks
    def passing():
        for step in steps(count):
            now[0] += 1 / 8
            yield step
    class Timed(Monitor):
        clock = staticmethod(lambda: now[0])
        def pictures(self):
            now[0] += draws
            return {}
        def _draw(self):
            super()._draw()
            seen.append((self.last and self.last.step, now[0], self._next))
    monitor = Timed(passing(), density=density, every=every, name="timed")
    if start: monitor.start().wait()
    else: assert len(list(monitor)) == count
    return seen, len(asked)


# the numbers are sums of halves, so that the clock is exact
@pytest.mark.parametrize("every, draws, asks, gap, apart", [
    (.25, 0, 0, .25, 2),                   # cheap: a quarter of a second, two steps
    (.25, 1 / 1024, 1 / 1024, .25, 2),
    (.25, 1 / 32, 0, 50 / 32, 13),         # dear: fifty times what it took
    (.25, 1 / 64, 1 / 64, 50 / 32, 13),    # the density is a part of it
    (.25, 0, 1 / 32, 50 / 32, 13),
    (.25, 1, 0, 5, 40),                    # very dear: five seconds, so that the reader sees something
    (2., 1 / 1024, 0, 2, 16),              # as seldom as one asks for
    (2., 1 / 8, 0, 5, 40),
    (9., 1, 1, 9, 72),
    (0, 1, 0, 0, 1), (0, 0, 1, 0, 1)])     # each step
def test_drawing_is_seldom_and_never_dearer_than_a_fiftieth(every, draws, asks, gap, apart):
    "By a clock of the test's own: which steps are drawn, and when the next one is due."
    seen, asked = drawings(every, draws, asks)
    at = [*range(1, 101, apart)]
    assert [step for step, *_ in seen] == [None, None, *at, 100]   # before the first step and after the last one as well
    assert all(due == end + gap for _, end, due in seen[2:-1]) and asked == len(at) + 1


def test_a_drawing_that_waits_in_the_kernel_is_not_asked_for_again():
    "A run in the background draws in the kernel's own thread; while that is busy, the steps go on and one drawing waits."
    import asyncio
    async def kernel():
        seen, asked = drawings(.25, 0, 0, start=True)   # the loop is busy until all is done
        return [step for step, *_ in seen], asked
    assert asyncio.run(kernel()) == ([None, None, 100], 2)   # the density of the one that waits, and of the end


def test_times_as_a_person_says_them(): assert [lasting(x) for x in (5, 89.6, 91, 5_399, 5_401)] == ["5 s", "90 s", "2 min", "90 min", "1.5 h"]


def test_untouched_it_says_so():
    assert Monitor().words() == "Nothing to watch yet: start() it, or loop over it" and Monitor().snapshot() is None


# --- a browser ----------------------------------------------------------------------------------------------------------

PAGE = LAWS + '''
import time, torch, ipywidgets
from pathlib import Path
from sae_nb.runs import RunConfig, run
from sae_nb.widgets.laws import LawExplorer
from sae_nb.widgets.live import Monitor
torch.set_num_threads(1)
explorer = LawExplorer(law, cost, need, advise, runs=runs)
echo = ipywidgets.Label("kernel: untouched")
explorer.observe(lambda _: setattr(echo, "value", f"kernel: {{explorer.budget:.3e}} n={{explorer.advice.n.value:.0f}} warnings={{len(explorer.advice.warnings)}}"), "advice")
cfg = RunConfig(lm="pylib-64", site="resid_post.2", n=128, k=8, tokens=8_192, context=64, dtype="float32", device="cpu")
monitor = Monitor(run(cfg, Path({folder!r}) / "run"), total=cfg.tokens, each=lambda step: time.sleep(.5 if step.step < 12 else 8))   # not done before a busy page asks it to stop
'''


def same_as_untouched(folder):
    "The stopped run, gone on with, ends with the weights of one that nobody stopped."
    import torch
    from sae_nb.runs import RunConfig, read_steps, run
    torch.set_num_threads(1)
    cfg = RunConfig(lm="pylib-64", site="resid_post.2", n=128, k=8, tokens=8_192, context=64, dtype="float32", device="cpu")
    done = len(read_steps(folder / "run"))
    assert 0 < done < 32 and (folder / "run/checkpoint/state.safetensors").exists() and not (folder / "run/sae.safetensors").exists()
    rest = list(run(cfg, folder / "run", resume=True))
    assert rest[0].step == done + 1
    list(run(cfg, folder / "whole"))
    assert (folder / "run/sae.safetensors").read_bytes() == (folder / "whole/sae.safetensors").read_bytes()


def drive(page, name):
    "Drag the line, press keys on the slider, stop the training."
    chart = page.locator("[aria-label='chart: What does a budget buy?']")
    chart.locator(".scatterlayer").wait_for()
    shot(page, f"{name}_laws")
    at = lambda: page.evaluate("() => { const b = document.querySelector('[aria-label*=budget]'), a = b._fullLayout.xaxis; return b.getBoundingClientRect().left + a._offset + a.d2p(b._fullLayout.shapes[0].x0) }")
    chart.scroll_into_view_if_needed()
    page.get_by_text("Inside of what was measured").first.wait_for()
    y = chart.bounding_box()["y"] + 150
    page.mouse.move(at(), y); page.mouse.down(); page.mouse.move(at() + 80, y, steps=4); page.mouse.move(at() + 80, y, steps=4); page.mouse.up()
    page.get_by_text("Extrapolation:").first.wait_for()
    page.get_by_text("kernel: ").filter(has_text="warnings=2").first.wait_for()
    shot(page, f"{name}_dragged")
    slider = page.get_by_role("slider").first
    inside = page.get_by_text("kernel: ").filter(has_text="warnings=0")
    for pressed in range(60):
        slider.press("PageDown")   # comes with the focus, which a page that draws may take away
        if pressed >= 30: page.wait_for_timeout(500)
        if inside.count(): break
    inside.first.wait_for()
    page.get_by_text("Inside of what was measured").first.wait_for()
    page.locator("[aria-label='chart: Is the loss falling?'] .scatterlayer").wait_for()
    shot(page, f"{name}_training")
    page.get_by_role("button", name="Stop", exact=True).click()
    page.get_by_text("Stopped after").first.wait_for()
    shot(page, f"{name}_stopped")


@needs_browser
def test_through_voila(tmp_path):
    cells = PAGE.format(folder=str(tmp_path)), "ipywidgets.VBox([explorer, echo])", "monitor.start()"
    with voila(notebook(tmp_path, *cells)) as url, chromium(dark=True, size=(1280, 1300)) as page:
        page.goto(url)
        drive(page, "voila")
        assert "invert" in page.evaluate("getComputedStyle(document.querySelector('.sae-nb-chart')).filter")   # no white figure in the dark
        assert not page.problems
    same_as_untouched(tmp_path)


@needs_browser
def test_through_jupyterlab_and_a_reload(tmp_path):
    cells = PAGE.format(folder=str(tmp_path)), "'kernel says', monitor.last.step, monitor.stopped, explorer.budget", "ipywidgets.VBox([explorer, echo])", "monitor.start()"
    with lab(notebook(tmp_path, *cells)) as url, chromium(size=(1280, 1500)) as page:
        page.goto(url)
        idle(page)
        for i in (0, 2, 3): run_cell(page, i)
        drive(page, "lab")
        run_cell(page, 1)
        said = page.get_by_text("('kernel says'").first
        said.wait_for()
        assert ", True, " in said.inner_text()
        page.keyboard.press("Control+s"); idle(page)
        page.wait_for_function("!document.querySelector('.jp-mod-dirty')")
        page.reload()
        page.get_by_text("Stopped after").first.wait_for()
        page.locator("[aria-label*='budget'] .scatterlayer").wait_for()
        line = page.evaluate("() => document.querySelector('[aria-label*=budget]')._fullLayout.shapes[0].x0")
        assert f"{line:.6e}" == f"{float(said.inner_text().split(',')[-1].strip(' )')):.6e}"   # not the constructor's state
        shot(page, "lab_reloaded")
        assert not page.problems
    same_as_untouched(tmp_path)


@needs_browser
def test_every_chart_of_a_page_is_drawn_in_jupyterlab(tmp_path):
    "The second and third chart come to a page that has plotly already, before their place is on it."
    first = "import ipywidgets as w\nfrom sae_nb.show import lines\nfrom sae_nb.widgets.laws import Chart"
    chart = "w.VBox([Chart(lines({'one': ([1, 2, 3], [3, 1, 2])}, 'Is %s drawn?', 'x', 'y')), w.HTML('x')])"
    with lab(notebook(tmp_path, first, chart % "the first", chart % "the second", chart % "the third")) as url, chromium(size=(1280, 1800)) as page:
        page.goto(url)
        idle(page)
        for i in range(4): run_cell(page, i)
        drawn = "p => p.offsetHeight > 200 && p.querySelector('.scatterlayer path.js-line')"
        page.wait_for_function(f"[...document.querySelectorAll('.js-plotly-plot')].filter({drawn}).length === 3")
        assert not page.problems

"Every widget twice on one page: each hears its own reader, and neither moves the other."
from browsing import chromium, needs_browser, notebook, voila
from payloads import made
from test_live import LAWS

CODE = LAWS + """
import time, ipywidgets as w
from sae_nb.features import Payload
from sae_nb.plan import advise
from sae_nb.train import Step
from sae_nb.widgets.card import Card
from sae_nb.widgets.explorer import Explorer
from sae_nb.widgets.laws import LawExplorer
from sae_nb.widgets.live import Monitor
from sae_nb.widgets.tokens import Tokens

def steps():
    for i in range(1, 100_000):
        time.sleep(.05)
        yield Step(i, 10 * i, 1 / i, 1 / i, {}, .25, 1e-3, 1., 100., 0., .1, None)

payload = Payload.open(FOLDER)
tokens = [Tokens(["a", " b", " c"], [1, 0, -1], "some tokens") for _ in range(2)]
cards = [Card(payload.feature(4)) for _ in range(2)]
explorers = [Explorer(FOLDER) for _ in range(2)]
laws = [LawExplorer(law, cost, need, advise, runs=runs) for _ in range(2)]
monitors = [Monitor(steps(), name=name) for name in ("one", "two")]
echo, ask, begun = w.Label(), w.Button(description="what is known?"), []
def say(_=None):
    if not begun: begun.extend(l.budget for l in laws)
    echo.value = "kernel: " + " | ".join(str(x) for x in ([t.picked for t in tokens], [c.selected for c in cards], [e.selected for e in explorers],
                                                        [l.budget == b for l, b in zip(laws, begun)], [m.stopped for m in monitors]))
ask.on_click(say)
for m in monitors: m.start()
"""
CELLS = "w.HBox(tokens)", "w.VBox(cards)", "w.VBox(explorers)", "w.VBox(laws)", "w.VBox(monitors)", "w.VBox([ask, echo])"


@needs_browser
def test_the_second_of_each_widget_is_its_own(tmp_path):
    "All second ones are used; the first ones stay as they were, and the other way round for the monitors."
    made(tmp_path / "features", n=60)
    first = CODE.replace("FOLDER", repr(str(tmp_path / "features")))
    with voila(notebook(tmp_path, first, *CELLS)) as url, chromium(size=(1280, 1000)) as page:
        page.goto(url)
        second = lambda place: page.locator(place).nth(1)
        known = lambda text: (page.get_by_role("button", name="what is known?").click(), page.get_by_text(f"kernel: {text}", exact=True).wait_for())
        second("[aria-label='chart: What does a budget buy?'] .scatterlayer").wait_for()
        second("[aria-label='chart: Is the loss falling?'] .scatterlayer").wait_for()
        begun = page.locator(".latent.on").first.get_attribute("data-id")
        known(f"[None, None] | [None, None] | [{begun}, {begun}] | [True, True] | [False, False]")

        second(".sae-nb.tokens").locator(".token").nth(2).click()
        related = second(".sae-nb.card").locator("ol.votes button").first
        neighbour = int(related.inner_text())
        related.click()
        box = page.get_by_role("searchbox").nth(1)
        box.fill("number 12"); box.press("ArrowDown")
        page.wait_for_selector("article[data-latent='12'] .card")
        second(".noUi-handle").press("PageDown")
        page.get_by_role("button", name="Stop", exact=True).nth(1).click()
        page.get_by_text("Stopped after").first.wait_for()
        known(f"[None, 2] | [None, {neighbour}] | [{begun}, 12] | [True, False] | [False, True]")
        page.get_by_role("button", name="Stop", exact=True).first.click()
        page.get_by_text("Stopped after").nth(1).wait_for()
        assert not page.problems

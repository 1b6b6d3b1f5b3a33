"A real browser: Chromium without network, pages of files, of Voila and of JupyterLab."
import contextlib, importlib.util, os, shutil, socket, subprocess, sys, time, urllib.request
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
MISSING = [n for n in ("playwright", "voila", "jupyterlab") if not importlib.util.find_spec(n)] + ["Chromium"] * (CHROMIUM is None)
needs_browser = pytest.mark.skipif(bool(MISSING), reason=f"the extra `browser` and Chromium are needed; missing: {', '.join(MISSING)}")


@contextlib.contextmanager
def chromium(dark=False, size=(1280, 900)):
    "A page whose `problems` collects console errors and every request to another host."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport=dict(width=size[0], height=size[1]), color_scheme="dark" if dark else "light")
        page.problems = []
        page.on("console", lambda m: m.type == "error" and page.problems.append(m.text))
        page.on("pageerror", lambda e: page.problems.append(str(e)))
        page.on("request", lambda r: r.url.split(":")[0] in ("http", "https", "ws", "wss") and not r.url.split("/")[2].startswith(("localhost", "127.0.0.1")) and page.problems.append(f"request to {r.url}"))
        try: yield page
        finally: browser.close()


def _port():
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); return s.getsockname()[1]


@contextlib.contextmanager
def served(args, folder, port, path):
    "The address of a server that is started in `folder`, and stopped at the end."
    log = open(Path(folder) / "server.log", "w")
    env = os.environ | {"OMP_NUM_THREADS": "1", "JUPYTER_CONFIG_DIR": str(folder), "JUPYTERLAB_WORKSPACES_DIR": str(folder), "PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]}
    server = subprocess.Popen([sys.executable, "-m", *args], cwd=folder, env=env, stdout=log, stderr=log)
    try:
        for _ in range(600):
            assert server.poll() is None, (Path(folder) / "server.log").read_text()
            with contextlib.suppress(OSError): urllib.request.urlopen(f"http://127.0.0.1:{port}/api" if "jupyterlab" in args else f"http://127.0.0.1:{port}/static/", timeout=1); break
            if "voila" in args:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1): break
            time.sleep(.1)
        yield f"http://127.0.0.1:{port}{path}"
    finally: server.terminate(); server.wait(20); log.close()


def voila(notebook):
    "Voila on a notebook file."
    port = _port()
    return served(["voila", notebook.name, "--no-browser", f"--port={port}", "--Voila.ip=127.0.0.1"], notebook.parent, port, "/")


def lab(notebook):
    "JupyterLab with a notebook file open."
    port = _port()
    return served(["jupyterlab", "--no-browser", f"--ServerApp.port={port}", "--ServerApp.ip=127.0.0.1", "--IdentityProvider.token=", "--ServerApp.password=", "--allow-root",
                   "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--ServerApp.disable_check_xsrf=True"], notebook.parent, port, f"/lab/tree/{notebook.name}")


def notebook(folder, *cells):
    "A notebook file with these code cells."
    import nbformat
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nb.metadata = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    path = Path(folder) / "page.ipynb"
    nbformat.write(nb, path)
    return path

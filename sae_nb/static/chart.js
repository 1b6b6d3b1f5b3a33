// A plotly figure that always shows the state of its model, and a line across it that can be dragged.
// plotly.js comes from the kernel once, in the model that `library` names; all charts of a page share it.

/** plotly: the page's own, else the one that came with the kernel; `sae_nb.js` waits for the same promise. */
function plotly(model) {
  return globalThis.sae_nb_plotly ??= (async () => {
    if (globalThis.Plotly?.react) return globalThis.Plotly;
    const library = await model.widget_manager.get_model(model.get("library"));
    new Function("module", "exports", "define", library.get("code")).call(globalThis);   // the page's own loaders are hidden from it
    return globalThis.Plotly;
  })();
}

function layout(model) {
  const { width, ...rest } = structuredClone(model.get("spec").layout ?? {}), x = model.get("line");
  const line = { type: "line", name: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper", line: { color: "#1f1f1f", width: 2 } };
  return { ...rest, autosize: true, uirevision: "kept", shapes: [...(rest.shapes ?? []), ...(x === null ? [] : [line])] };
}

async function render({ model, el }) {
  const box = document.createElement("div"), label = () => box.setAttribute("aria-label", model.get("label"));
  box.setAttribute("role", "img");
  box.className = "sae-nb-chart";
  el.style.width = "100%";
  el.append(box);
  label();
  const Plotly = await plotly(model);
  // A page that has plotly already comes here before the box is on it: it is drawn at once, and sized when it is seen.

  const config = { displaylogo: false, displayModeBar: false };
  const draw = () => Plotly.react(box, structuredClone([...(model.get("spec").data ?? []), ...model.get("marks")]), layout(model), config);
  const move = () => Plotly.relayout(box, { shapes: layout(model).shapes });
  let dragged = false, sent = 0, later;
  const axis = () => box._fullLayout.xaxis;
  const place = e => e.clientX - box.getBoundingClientRect().left - axis()._offset;
  const near = e => model.get("line") !== null && Math.abs(place(e) - axis().d2p(model.get("line"))) < 9;
  const send = () => { sent = performance.now(); model.save_changes(); };

  function down(e) {
    if (!dragged && !near(e)) return;
    e.preventDefault();
    e.stopPropagation();
    if (e.type !== "pointerdown") return;
    dragged = true;
    box.setPointerCapture(e.pointerId);
  }
  function over(e) {
    if (!dragged) { box.classList.toggle("near", !!box._fullLayout && near(e)); return; }
    e.stopPropagation();
    const [a, b] = [axis().p2d(0), axis().p2d(axis()._length)];
    model.set("line", Math.min(b, Math.max(a, axis().p2d(place(e)))));
    clearTimeout(later);
    if (performance.now() - sent > 100) send(); else later = setTimeout(send, 100);
  }
  function up(e) {
    if (!dragged) return;
    dragged = false;
    clearTimeout(later);
    send();
  }
  for (const [name, f] of Object.entries({ pointerdown: down, mousedown: down, pointermove: over, pointerup: up, pointercancel: up }))
    box.addEventListener(name, f, true);

  await draw();
  let asked = 0;
  const soon = () => { cancelAnimationFrame(asked); asked = requestAnimationFrame(draw); };
  const parts = { "change:spec": soon, "change:marks": soon, "change:line": move, "change:label": label };
  for (const [name, f] of Object.entries(parts)) model.on(name, f);
  const watch = new ResizeObserver(() => box.offsetWidth && Plotly.Plots.resize(box));
  watch.observe(box);
  return () => { watch.disconnect(); for (const [name, f] of Object.entries(parts)) model.off(name, f); Plotly.purge(box); };
}

export default { render };

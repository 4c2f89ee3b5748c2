// What tests/lab.py asks of the page. JupyterLab's application is there as window.jupyterapp.
"use strict";

window.lab = (() => {
  const panels = new Map(); // by path
  const runs = new Map(); // by path and cell: how the cell's last run goes
  const key = (path, index) => `${path}#${index}`;

  const panelOf = (path) => {
    if (!panels.has(path)) throw Error(`${path} is not open in this page`);
    return panels.get(path);
  };
  const cellOf = (path, index) => {
    const cell = panelOf(path).content.widgets[index];
    if (!cell) throw Error(`${path} has no cell ${index}`);
    return cell;
  };

  const shown = (path) => [...window.jupyterapp.shell.widgets("main")].filter((widget) => widget.context?.path === path);

  // A timer of 20 ms that is late by a second was kept from running for a second, and so was a click.
  let last = performance.now();
  let stall = 0;
  const beat = () => {
    const now = performance.now();
    stall = Math.max(stall, now - last - 20);
    last = now;
    return stall;
  };
  setInterval(beat, 20);

  const view = (path, index) => {
    const cell = cellOf(path, index);
    return {
      area: cell.outputArea.node,
      model: cell.model,
      run: runs.get(key(path, index)),
      // In getters, because a predicate is asked ten times a second and an output may be a megabyte.
      get outputs() {
        return cell.model.outputs.toJSON();
      },
      get text() {
        return cell.outputArea.node.innerText;
      },
    };
  };

  const activate = (path, index) => {
    const { id, content } = panelOf(path);
    window.jupyterapp.shell.activateById(id);
    content.activeCellIndex = index;
    content.deselectAll();
  };

  return {
    view,
    activate,

    async open(path) {
      const app = window.jupyterapp;
      await app.restored;
      const panel = shown(path)[0] ?? (await app.commands.execute("docmanager:open", { path, factory: "Notebook" }));
      await Promise.all([panel.context.ready, panel.sessionContext.ready, panel.revealed]);
      const { kernel } = panel.sessionContext.session;
      await kernel.info;
      panels.set(path, panel);
      // Until the kernel has answered on every channel: what it says before the server listens is lost, and a cell whose
      // "idle" is lost never ends.
      if (kernel.status === "idle") await kernel.requestExecute({ code: "", silent: true }).done;
    },

    // For messages about failures.
    state(path, index) {
      const { kernel } = panelOf(path).sessionContext.session ?? {};
      const { executionCount, executionState } = cellOf(path, index).model;
      const run = runs.get(key(path, index));
      return { kernel: kernel?.status, connection: kernel?.connectionStatus, executionCount, executionState, run };
    },

    // What is not saved is lost. The kernel lives on: tests/lab.py ends it, also when the page is beyond it.
    close(path) {
      panels.delete(path);
      for (const panel of shown(path)) panel.dispose();
    },

    // Returns at once; view(path, index).run tells when it is over.
    run(path, index) {
      const { outputArea } = cellOf(path, index);
      activate(path, index);
      const run = { done: false, ok: false, error: "", seconds: 0, changes: 0, nodes: 0 };
      const began = performance.now();
      runs.get(key(path, index))?.observer.disconnect();
      // Past the end of the run, too: what comes last is drawn after it.
      const observer = new MutationObserver((records) => {
        run.changes += 1;
        for (const { addedNodes, removedNodes } of records) run.nodes += addedNodes.length + removedNodes.length;
      });
      observer.observe(outputArea.node, { subtree: true, childList: true, characterData: true, attributes: true });
      Object.defineProperty(run, "observer", { value: observer, enumerable: false });
      runs.set(key(path, index), run);
      beat();
      stall = 0;
      const end = (ok, error) => {
        run.seconds = (performance.now() - began) / 1000;
        Object.assign(run, { done: true, ok, error });
      };
      window.jupyterapp.commands.execute("notebook:run-cell").then(
        (ok) => end(Boolean(ok), ""),
        (error) => end(false, String(error)),
      );
    },

    restart(path) {
      activate(path, panelOf(path).content.activeCellIndex);
      window.lab.restarted = false;
      window.jupyterapp.commands.execute("notebook:restart-kernel").then(() => (window.lab.restarted = true));
    },

    save: (path) => panelOf(path).context.save(),

    stall: () => beat() / 1000,

    size(path, index, selector) {
      const { area } = view(path, index);
      const element = selector ? area.querySelector(selector) : area;
      if (!element?.checkVisibility({ opacityProperty: true, visibilityProperty: true })) return [0, 0];
      const { width, height } = element.getBoundingClientRect();
      return [width, height];
    },
  };
})();

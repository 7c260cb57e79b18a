"use strict";
// Asking the server, saying what went wrong, tabs, the feature dialog. Text from models and
// corpora only ever becomes textContent.
const Bench = (() => {
  const token = document.querySelector("meta[name=rldecoder-token]").content;
  const problem = document.getElementById("problem");
  const at = (id) => document.getElementById(id);
  const { element } = Cards;

  const complain = (error) => {
    if (error.name === "AbortError") return;
    problem.textContent = error.message;
    problem.hidden = false;
  };
  const read = async (response) => {
    const body = await response.json().catch(() => ({}));
    if (response.ok) {
      problem.hidden = true;
      return body;
    }
    const parts = body.error ? [body.error.what, body.error.why, body.error.mend] : ["The server answered " + response.status + "."];
    throw new Error(parts.filter(Boolean).join(" "));
  };
  const reach = (path, options) =>
    fetch(path, options).catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new Error("The server does not answer. Is `rldecoder serve` still running?");
    });
  const ask = async (path, body, signal) => read(await reach(path, {
    method: "POST", signal, body: JSON.stringify(body),
    headers: { "content-type": "application/json", "x-rldecoder-token": token },
  }));
  const get = async (path, signal) => read(await reach(path, { signal }));

  const tabs = [...document.querySelectorAll("[role=tab]")];
  const opened = {};
  const select = (tab) => {
    tabs.forEach((other) => {
      const chosen = other === tab;
      other.setAttribute("aria-selected", String(chosen));
      other.tabIndex = chosen ? 0 : -1;
      at(other.getAttribute("aria-controls")).hidden = !chosen;
    });
    const name = tab.id.slice(4);
    if (opened[name]) opened[name]();
  };
  tabs.forEach((tab, place) => {
    tab.addEventListener("click", () => select(tab));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = tabs[(place + step + tabs.length) % tabs.length];
      next.focus();
      select(next);
    });
  });
  const whenOpened = (name, action) => { opened[name] = action; };
  const isOpen = (name) => !at("view-" + name).hidden;
  const typing = () => {
    const where = document.activeElement;
    return where && (where.matches("input:not([type=checkbox]), textarea, select") || where.isContentEditable);
  };

  const dialog = at("card-dialog");
  at("card-close").addEventListener("click", () => dialog.close());
  const showCard = async (latent) => {
    at("card-title").textContent = "Feature #" + latent;
    const body = at("card-body");
    try {
      const found = await get("/api/features/" + latent);
      body.replaceChildren(...(found.card ? [Cards.card(found.card)] : [
        element("h4", "", "#" + latent + "  " + found.shown),
        element("p", "note", "A description, no label: the run labels its most important latents only. What the decoder makes of it:"),
        Cards.effects("raises", found.promoted), Cards.effects("lowers", found.suppressed),
      ]));
      dialog.showModal();
    } catch (error) { complain(error); }
  };
  return { at, element, ask, get, complain, whenOpened, isOpen, typing, showCard };
})();

"use strict";
// Asking the server, saying what went wrong, tabs. Text from models and corpora only ever becomes
// textContent.
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
  const sentence = (parts) => [parts.what, parts.why, parts.mend].filter(Boolean).join(" ");
  const read = async (response) => {
    const body = await response.json().catch(() => ({}));
    if (response.ok) {
      problem.hidden = true;
      return body;
    }
    throw new Error(body.error ? sentence(body.error) : "The server answered " + response.status + ".");
  };
  const reach = (path, options) =>
    fetch(path, options).catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new Error("The server does not answer. Is `rldecoder serve` still running?");
    });
  const posted = (body, signal) => ({
    method: "POST", signal, body: JSON.stringify(body),
    headers: { "content-type": "application/json", "x-rldecoder-token": token },
  });
  const ask = async (path, body, signal) => read(await reach(path, posted(body, signal)));
  const get = async (path, signal) => read(await reach(path, { signal }));
  // An answer in lines of JSON, each handed over as it comes.
  const follow = async (path, body, signal, take) => {
    const response = await reach(path, posted(body, signal));
    if (!response.ok) return read(response);
    problem.hidden = true;
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      const lines = (rest + (value || "")).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        const found = JSON.parse(line);
        if (found.error) throw new Error(sentence(found.error));
        take(found);
      }
      if (done) return null;
    }
  };

  const button = (text, action, className, label) => {
    const node = element("button", className || "", text);
    node.type = "button";
    if (label) node.setAttribute("aria-label", label);
    node.addEventListener("click", action);
    return node;
  };

  const tabs = [...document.querySelectorAll("[role=tab]")];
  const opened = {};
  const select = (name) => {
    tabs.forEach((tab) => {
      const chosen = tab.id === "tab-" + name;
      tab.setAttribute("aria-selected", String(chosen));
      tab.tabIndex = chosen ? 0 : -1;
      at(tab.getAttribute("aria-controls")).hidden = !chosen;
    });
    at("ask").hidden = name === "features" || name === "review";
    at("ask-row").hidden = name !== "trace";
    if (opened[name]) opened[name]();
  };
  const nameOf = (tab) => tab.id.slice(4);
  // A click is a step that the browser's Back takes back.
  const go = (name) => State.set({ view: name, feature: null }, true);
  tabs.forEach((tab, place) => {
    tab.addEventListener("click", () => go(nameOf(tab)));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = tabs[(place + step + tabs.length) % tabs.length];
      next.focus();
      go(nameOf(next));
    });
  });
  const whenOpened = (name, action) => { opened[name] = action; };
  const isOpen = (name) => !at("view-" + name).hidden;
  const hasView = (name) => tabs.some((tab) => nameOf(tab) === name);
  const typing = () => {
    const where = document.activeElement;
    return where && (where.matches("input:not([type=checkbox]), textarea, select") || where.isContentEditable);
  };
  const showFeature = (latent) => State.set({ view: "features", feature: String(latent) }, true);
  return { at, element, ask, get, follow, complain, button, select, go, hasView, whenOpened, isOpen, typing, showFeature };
})();

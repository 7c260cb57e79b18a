"use strict";
// The feature browser, searched by the server: cards of labelled features, and any other latent.
const Features = (() => {
  const { at, element, get, complain, isOpen, typing, button, showFeature } = Bench;
  const PAGE = 12;
  let shown = 0;
  let abort = new AbortController();

  // What a predicate is in JSON, its label says in words.
  const card = (found) => {
    const box = Cards.card({ ...found, predicate: null });
    box.append(button("open its page", () => showFeature(found.latent), "", "feature " + found.latent + ", its page"));
    return box;
  };
  const others = async (words, cards, signal) => {
    at("others").replaceChildren();
    if (!words.trim()) return;
    const found = await get("/api/find?" + new URLSearchParams({ words, count: 24, others: true }), signal);
    const known = new Set(cards.map((one) => one.latent));
    at("others").replaceChildren(...found.found.filter((one) => !known.has(one.latent)).map((one) => {
      const item = element("li");
      item.append(button("#" + one.latent, () => showFeature(one.latent), "feature-name", "feature " + one.latent + ", its page"),
        element("span", "label-text none", one.shown));
      return item;
    }));
  };
  const load = async (start) => {
    abort.abort();
    abort = new AbortController();
    const words = at("search").value;
    State.set({ words, sort: at("sort").value, only: at("only").value });
    const query = new URLSearchParams({ words, sort: at("sort").value, only: at("only").value, start, count: PAGE });
    try {
      const found = await get("/api/features?" + query, abort.signal);
      const cards = found.cards.map(card);
      if (start) at("cards").append(...cards);
      else at("cards").replaceChildren(...cards);
      shown = start + cards.length;
      at("count").textContent = found.found + " of " + found.all + " labelled features";
      at("more").hidden = shown >= found.found;
      if (!start) await others(words, found.cards, abort.signal);
    } catch (error) { complain(error); }
  };
  let waiting = 0;
  at("search").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => load(0), 150);
  });
  at("search").addEventListener("keydown", (event) => {
    const number = /^\s*#?(\d{1,9})\s*$/.exec(at("search").value);
    if (event.key === "Enter" && number) showFeature(number[1]);
  });
  at("sort").addEventListener("change", () => load(0));
  at("only").addEventListener("change", () => load(0));
  at("more").addEventListener("click", () => load(shown));
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && isOpen("features") && !at("feature-list").hidden && !typing()) {
      event.preventDefault();
      at("search").focus();
    }
  });

  // The list, or a page where the address names a feature.
  let page = "";
  const open = () => {
    const latent = State.get("feature");
    const one = /^\d{1,9}$/.test(latent);
    at("feature-list").hidden = one;
    at("feature-page").hidden = !one;
    if (one && page !== latent) {
      page = latent;
      Feature.open(Number(latent));
      scrollTo(0, 0);
    }
    if (!one) {
      page = "";
      if (!shown) {
        at("search").value = State.get("words");
        for (const id of ["sort", "only"]) if ([...at(id).options].some((o) => o.value === State.get(id))) at(id).value = State.get(id);
        load(0);
      }
    }
  };
  Bench.whenOpened("features", open);
  return { card };
})();
